"""Is an exported file the student? Tokens of many texts, and what is to come next after many prompts.

Each export in a run's receipt is read in a process of its own, as `potstill export` does it, but with 10,000
texts and 100 prompts: openings of functions in the Python standard library. Then the student, every weight
moved by a hair so that its numbers are in no file yet, is saved and read in fresh processes: its logits must
be equal bit for bit. `--other-python-path` has another Transformers read the exported folder, too (say,
`pip install --no-deps --target FOLDER 'transformers==4.57.*' 'tokenizers<0.23' 'huggingface_hub<1'`).

    potstill export RUN --format hf
    potstill export RUN --quantize f32,f16,q8_0,q4_k
    python bench/export.py RUN [--texts 10000] [--prompts 100] [--other-python-path FOLDER]
        [--append bench/results.jsonl]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from potstill.data.tokenizers import load_tokenizer
from potstill.export.roundtrip import Reference, ask, check_paths
from potstill.losses.objective import Objective
from potstill.models.causal_lm import CausalLM
from potstill.models.load import load_causal_lm
from potstill.models.student import Student
from potstill.runs.run_dir import RunDir

SHOWN = (
    "status",
    "why",
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


def of_its_numbers(reference: Reference) -> dict[str, float]:
    """KL(student‖its numbers as the file has them) in float32: what the types cost, whoever reads them."""
    if reference.written_PV is None:
        return {}
    kl_P = F.kl_div(reference.written_PV, reference.logp_PV, reduction="none", log_target=True).sum(-1)
    same = int((reference.written_PV.argmax(-1) == reference.logp_PV.argmax(-1)).sum())
    return {"mean_kl": float(kl_P.mean()), "max_kl": float(kl_P.max()), "top1_equal": same}


@torch.no_grad()
def logits_PV(path: str, model: CausalLM, prompts: list[list[int]]) -> torch.Tensor:
    """In this process, as that path's reader computes them."""
    rows = []
    for ids in prompts:
        ids_BT = torch.tensor([ids])
        if path == "potstill":
            rows.append(model.logits(model.hidden(ids_BT)[0][-1:])[0])
        else:
            rows.append(model.hf(input_ids=ids_BT, use_cache=False).logits[0, -1])
    return torch.stack(rows)


def read_again(
    path: str, folder: Path, model: CausalLM, reference: Reference, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """The logits of a fresh process against those of the model in this one."""
    found_PV, told = ask(path, folder, reference, environment)
    ours_PV = logits_PV(path, model, reference.ids)
    pairs = zip(told["tokens"], reference.tokens, strict=True)
    return {
        "texts": len(reference.texts),
        "tokens_equal": sum(theirs == ours for theirs, ours in pairs),
        "prompts": len(reference.ids),
        "bit_equal": int((found_PV == ours_PV).all(-1).sum()),
        "max_difference": float((found_PV - ours_PV).abs().max()),
        "version": told["version"],
    }


def saved_and_read(model: CausalLM, tokenizer: Any, reference: Reference) -> dict[str, Any]:
    """Moves the model's weights."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.hf.parameters():
            parameter.mul_(1 + 1e-4 * torch.randn_like(parameter))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "saved"
        Student(model, Objective()).save(folder, tokenizer)
        return {path: read_again(path, folder, model, reference) for path in ("potstill", "transformers")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--texts", type=int, default=10_000)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--other-python-path", type=Path)
    parser.add_argument("--append", type=Path)
    options = parser.parse_args()
    run = RunDir.open(options.run)
    model, tokenizer = load_causal_lm(run.whole_student()), load_tokenizer(run.student)
    reference = Reference.of(model, tokenizer, texts=options.texts, prompts=openings(options.prompts))
    found: dict[str, dict[str, Any]] = {}
    for record in run.receipt()["exports"]:
        form, file = record["format"], run.path / record["file"]
        asked = reference.of_written(model, file, form, record.get("dtype", "float32"))
        found[form] = {
            name: {key: path[key] for key in SHOWN if key in path}
            for name, path in check_paths(form, file, asked).items()
            if path["status"] != "not run"
        }
        found[form] |= {"bytes": record["bytes"], "of_its_numbers": of_its_numbers(asked)}
        if form == "hf" and options.other_python_path:
            there = [str(options.other_python_path.resolve()), os.environ.get("PYTHONPATH", "")]
            path = {"PYTHONPATH": os.pathsep.join(filter(None, there))}
            found[form]["other transformers"] = read_again("transformers", file, model, reference, path)
        print(form, json.dumps(found[form]), flush=True)
    saved = saved_and_read(model, tokenizer, reference)
    print("saved and read", json.dumps(saved), flush=True)
    if options.append:
        line = {
            "bench": "export",
            "steps": run.receipt()["steps"],
            "exports": found,
            "saved_and_read": saved,
            "machine": platform.machine(),
            "python": platform.python_version(),
        }
        with open(options.append, "a", encoding="utf-8") as results:
            results.write(json.dumps(line) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
