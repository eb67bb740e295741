"""Is an exported file the student? Tokens of many texts, and the next-token distribution after many prompts.

Each export in a run's receipt is read in a process of its own, as `potstill export` does it, but with 10,000
texts and 100 prompts: openings of functions in the Python standard library.

    potstill export RUN --quantize f32,f16,q8_0,q4_k
    python bench/export.py RUN [--texts 10000] [--prompts 100] [--append bench/results.jsonl]
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import sysconfig
from pathlib import Path

from potstill.corpus.vocab import load_tokenizer
from potstill.models.load import load_causal_lm
from potstill.runs.rundir import RunDir
from potstill.shipping.three_paths import Reference, check_paths

SHOWN = (
    "status",
    "texts",
    "tokens_equal",
    "prompts",
    "top1_equal",
    "mean_kl_to_student",
    "mean_kl",
    "max_kl",
    "version",
)


def openings(count: int) -> list[str]:
    """The first line of a function and the one after it, one a file."""
    found = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if match := re.search(r"^def .*\n.*\n", file.read_text(encoding="utf-8"), re.MULTILINE):
            found.append(match[0].rstrip())
    assert len(found) >= count, f"{len(found)} files with a function"
    return found[:count]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--texts", type=int, default=10_000)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--append", type=Path)
    options = parser.parse_args()
    run = RunDir.open(options.run)
    model = load_causal_lm(run.whole_student())
    reference = Reference.of(
        model, load_tokenizer(run.student), texts=options.texts, prompts=openings(options.prompts)
    )
    found = {}
    for record in run.receipt()["exports"]:
        form, file = record["format"], run.path / record["file"]
        paths = check_paths(form, file, reference.of_written(model, file, form))
        found[form] = {
            name: {key: path[key] for key in SHOWN if key in path}
            for name, path in paths.items()
            if path["status"] != "not run"
        }
        print(form, json.dumps(found[form]), flush=True)
    if options.append:
        line = {
            "bench": "export",
            "exports": found,
            "machine": platform.machine(),
            "python": platform.python_version(),
        }
        with open(options.append, "a", encoding="utf-8") as results:
            results.write(json.dumps(line) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
