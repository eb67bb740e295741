"""`train.epochs`: passes over the training rows, settled to steps once the corpus is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cut_off import cut_off
from refusals import refusal

import potstill
from potstill.cli.main import main
from potstill.recipe.sections_training import TrainConfig
from potstill.runs.run_dir import RunDir

Recipe = Callable[..., Path]
TRAIN = "rows_per_step: 4, lr: 1e-3, device: cpu"


@pytest.mark.parametrize(
    ("epochs", "rows", "per_step", "steps"),
    [(1, 12, 4, 3), (1, 13, 4, 4), (0.7, 10, 1, 7), (2.5, 6, 4, 4), (0.01, 5, 4, 1)],
)
def test_a_step_that_is_begun_is_counted(epochs: float, rows: int, per_step: int, steps: int) -> None:
    assert TrainConfig(epochs=epochs, rows_per_step=per_step, lr=1.0).of_rows(rows).num_steps == steps


def test_epochs_are_the_run_of_as_many_steps(tiny_recipe: Recipe, tmp_path: Path) -> None:
    by_epochs = potstill.distill(tiny_recipe(train=f"{{epochs: 0.5, {TRAIN}}}"), out=tmp_path / "epochs")
    rows = json.loads((by_epochs.path / "corpus.json").read_text())["train_rows"]
    steps = -(-rows // 8)
    assert by_epochs.receipt()["steps"] == steps > 2
    by_steps = potstill.distill(tiny_recipe(train=f"{{steps: {steps}, {TRAIN}}}"), out=tmp_path / "steps")
    hashes = [run.receipt()["student"]["weights_sha256_end"] for run in (by_epochs, by_steps)]
    assert hashes[0] == hashes[1]
    fewer = potstill.distill(tiny_recipe(train=f"{{steps: 2, epochs: 0.5, {TRAIN}}}"), out=tmp_path / "fewer")
    assert fewer.receipt()["steps"] == 2


def test_a_resumed_run_has_its_steps(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(train=f"{{epochs: 0.5, save_every: 1, {TRAIN}}}")
    cut_off(recipe, tmp_path / "run", 2, monkeypatch)
    again = ["distill", str(recipe), "--resume", "--out", str(tmp_path / "run")]
    line = refusal([*again, "train.epochs=1"], capsys, tmp_path / "run")
    assert "train.epochs (0.5 -> 1.0)" in line
    line = refusal([*again, "train.steps=3"], capsys, tmp_path / "run")
    assert "train.steps (" in line and "-> 3)" in line
    assert main(again) == 0
    whole = potstill.distill(recipe, out=tmp_path / "whole")
    ends = [run.receipt()["student"]["weights_sha256_end"] for run in (RunDir.open(tmp_path / "run"), whole)]
    assert ends[0] == ends[1]


def test_all_verbs_know_them(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(tiny_recipe(train=f"{{epochs: 0.5, {TRAIN}}}", compare="{seeds: [0], budget: time}"))
    assert main(["plan", recipe]) == 0
    few = ["plan", recipe, "train.epochs=0.01", "train.warmup=0", "--measure"]  # fewer steps than it measures
    assert main(few) == 0
    assert main(["distill", recipe, "--smoke", "1"]) == 0
    assert "the full run of " in capsys.readouterr().out
    # Plain training is given twice the steps, beyond the recipe's epochs.
    monkeypatch.setattr(
        "potstill.workflows.compare.step_seconds", lambda setup, arms: {"CE only": 1.0, "KD": 2.0}
    )
    assert main(["compare", recipe, "--out", str(tmp_path / "compared")]) == 0
    plan = json.loads((tmp_path / "compared" / "plan.json").read_text())
    receipts = [json.loads(file.read_text()) for file in (tmp_path / "compared").glob("*/receipt.json")]
    assert {receipt["steps"] for receipt in receipts} == set(plan["steps"].values())
    assert len(set(plan["steps"].values())) == 2
    assert main(["compare", recipe, "--resume", "--out", str(tmp_path / "compared")]) == 0


def test_what_cannot_be_counted_is_one_line(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for train, said in (
        (f"{{{TRAIN}}}", "train.steps: missing. Give steps or epochs."),
        (f"{{epochs: 0, {TRAIN}}}", "train.epochs: 0 must be greater than 0."),
        (f"{{epochs: 0.5, warmup: 900, {TRAIN}}}", "train.warmup: 900 steps of warm-up in a run of "),
    ):
        command = ["distill", str(tiny_recipe(train=train)), "--out", str(tmp_path / "run")]
        assert said in refusal(command, capsys, tmp_path / "run")
