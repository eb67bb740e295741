"""What a quantised file costs: KL to the teacher of a run's student, of its numbers in the file, and of the file.

Held-out rows of the run, nats per position. The first two are computed in float32 by PyTorch, the third by llama.cpp,
which rounds activations, too. A run that was trained for a type (`train.quantize`) is compared with one that was not.

    python bench/quantise.py RUN [RUN ...] [--types q8_0,q4_0,q4_k] [--append bench/results.jsonl]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from potstill import load_recipe
from potstill.build.resolve import resolve
from potstill.build.setup import RunSetup, set_up
from potstill.evals.heldout import heldout
from potstill.export.export import export_run
from potstill.export.grid import Grid
from potstill.losses.objective import Objective
from potstill.models.llama_cpp import LlamaCppLM
from potstill.models.student import Student
from potstill.runs.run_dir import RunDir


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--types", default="q8_0,q4_0,q4_k")
    parser.add_argument("--append", type=Path)
    options = parser.parse_args()
    for run in map(RunDir.open, options.runs):
        for line in measured(run, options.types.split(",")):
            print(json.dumps(line), flush=True)
            if options.append is not None:
                with options.append.open("a") as file:
                    file.write(json.dumps(line) + "\n")


def measured(run: RunDir, types: list[str]) -> list[dict[str, Any]]:
    recipe = load_recipe(run.resolved, ["train.quantize=null"])
    setup = set_up(resolve(recipe, saved_student=run.student), lambda text: None)
    with contextlib.closing(setup.teacher), tempfile.TemporaryDirectory() as folder:
        exported = export_run(run.path, Path(folder), types, check=False)
        student = kl(setup, setup.student)
        lines = []
        for record, type_ in zip(exported.records, types, strict=True):
            setup.student.grid = Grid.of(setup.student.model, type_)
            numbers = kl(setup, setup.student)
            setup.student.grid = None
            file = LlamaCppLM.open(
                Path(folder) / Path(record["file"]).name, torch.float32, recipe.corpus.tokens_per_row, type_
            )
            of_file = kl(setup, Student(file, Objective()))
            lines.append(
                {
                    "bench": "quantise",
                    "run": run.path.name,
                    "trained_for": load_recipe(run.resolved).train.quantize,
                    "type": type_,
                    "mib": round(record["bytes"] / 2**20, 1),
                    "kl_student": round(student, 4),
                    "kl_numbers": round(numbers, 4),
                    "kl_file": round(of_file, 4),
                }
            )
    return lines


def kl(setup: RunSetup, student: Student) -> float:
    return heldout(student, setup.teacher, setup.corpus.heldout, 4)["heldout/kl"]


if __name__ == "__main__":
    main()
