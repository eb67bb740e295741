"""The example is the big loop's step: the same rows give the same losses, and its own packing gives the same rows."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import potstill
from potstill.build.corpus import make_corpus
from potstill.build.resolve import resolve

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "minimal_distill.py"
STEPS, ROWS, AT_ONCE, LR, WARMUP = 6, 5, 2, 1e-2, 2  # micro-batches of 2, 2 and 1 rows


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("minimal_distill", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its annotations are strings that NamedTuple looks up there
    spec.loader.exec_module(module)
    return module


def test_it_fits_in_150_lines() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 150


def test_its_losses_are_those_of_the_big_loop(
    example: Any,
    tiny_recipe: Callable[..., Path],
    teacher_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tiny_recipe(
        student="{name: cut, layers: 3, rule: first_last, repair: false}",
        objective="{kd_weight: 0.7, ce_weight: 0.3, temperature: 2.0, chunk: 16}",
        train=f"{{steps: {STEPS}, rows_per_step: {ROWS}, rows_per_micro_batch: {AT_ONCE}, lr: {LR}, warmup: {WARMUP},"
        " device: cpu}",
    )
    run = potstill.distill(path, out=tmp_path / "run")
    metrics = map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines())
    logged = [line["train/loss"] for line in metrics if "train/loss" in line]

    for name, value in {"KD_WEIGHT": 0.7, "CE_WEIGHT": 0.3, "TEMPERATURE": 2.0}.items():
        monkeypatch.setattr(example, name, value)
    corpus, _ = make_corpus(resolve(potstill.load_recipe(path)))
    steps = [corpus.order(0).rows(step, ROWS) for step in range(STEPS)]
    batches = [[corpus.train.batch(rows[i : i + AT_ONCE]) for i in range(0, ROWS, AT_ONCE)] for rows in steps]
    teacher = transformers.AutoModelForCausalLM.from_pretrained(teacher_folder).eval().requires_grad_(False)
    assert losses_of(example, teacher, batches, LR) == pytest.approx(logged, rel=1e-5)
    # The updates are large enough that a wrong one would show.
    assert losses_of(example, teacher, batches, LR / 2)[2:] != pytest.approx(logged[2:], rel=1e-3)


def losses_of(example: Any, teacher: Any, batches: list[list[Any]], peak_lr: float) -> list[float]:
    student = example.cut(teacher, 3).train()
    optimizer = example.make_optimizer(student)
    losses = []
    for step, of_step in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = example.lr_at(step, STEPS, peak_lr, WARMUP)
        losses.append(example.train_step(student, teacher, of_step, optimizer))
    return losses


def test_its_rows_are_packed_as_the_corpus_packs_them(example: Any, tiny_recipe: Callable[..., Path]) -> None:
    corpus, tokenizer = make_corpus(resolve(potstill.load_recipe(tiny_recipe())))
    eos = tokenizer.eos_token_id
    documents: list[list[int]] = []
    for first, last in zip(corpus.train.starts, [*corpus.train.starts[1:], None], strict=True):
        documents.append(corpus.train.ids[first:last].tolist())
    assert {document[-1] for document in documents} == {eos}
    rows = example.Rows(documents, 32)
    assert len(rows) >= len(corpus.train) - 1 > 1  # the example leaves the unfinished last row out
    for row in range(len(rows)):
        ours, theirs = rows.batch(torch.tensor([row])), corpus.train.batch([row])
        for name in ours._fields:
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), (row, name)


@pytest.mark.usefixtures("warm_python")
def test_it_runs_as_a_script_and_its_student_opens(
    teacher_folder: Path, corpus_folder: Path, tmp_path: Path
) -> None:
    arguments = [teacher_folder, corpus_folder, tmp_path / "student", "--layers", "2", "--steps", "3"]
    command = [sys.executable, str(EXAMPLE), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("nats per position") == 3
    student = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert student.config.num_hidden_layers == 2
    ids = torch.arange(8)[None]
    assert student.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 10)  # with a key-value cache
