"""`train.freeze`: what is frozen stays bit for bit and has no state, the rest trains as before, and a run goes on."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cut_off import cut_off
from refusals import refusal
from safetensors.torch import load_file

from potstill import distill, load_recipe
from potstill.build.resolve import resolve
from potstill.preflight.plan import plan

Recipe = Callable[..., Path]
TRAIN = "{steps: 4, rows_per_step: 4, lr: 1e-2, device: cpu, save_every: 2, freeze: %s}"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("patterns", "is_frozen"),
    [
        ("['*embed_tokens*']", lambda name: "embed_tokens" in name),
        ("['model.layers.0.*', '*norm*']", lambda name: "layers.0." in name or "norm" in name),
    ],
)
def test_frozen_weights_stay_and_the_others_move(
    tiny_recipe: Recipe, teacher_folder: Path, tmp_path: Path, patterns: str, is_frozen: Callable[[str], bool]
) -> None:
    student = f"{{name: checkpoint, model: {teacher_folder}}}"
    recipe = tiny_recipe(
        train=TRAIN % patterns,
        student=student,
        allow_identical="true",
        objective="{kd_weight: 0, ce_weight: 1}",
    )
    run = distill(recipe, out=tmp_path / "run")
    before, after = weights(teacher_folder), weights(run.student)
    same = {name for name, tensor in before.items() if torch.equal(after[name], tensor)}
    assert same == {name for name in before if is_frozen(name)} != set()
    assert run.receipt()["frozen"] == load_recipe(recipe).train.freeze


def test_a_run_with_frozen_weights_goes_on(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(train=TRAIN % "['*embed_tokens*']")
    whole = distill(recipe, out=tmp_path / "whole")
    cut_off(recipe, tmp_path / "cut", 3, monkeypatch)
    on = distill(recipe, out=tmp_path / "cut", resume=True)
    assert on.receipt()["output"] == whole.receipt()["output"]
    other = distill(recipe, overrides=["train.freeze=[]"], out=tmp_path / "other")
    assert other.receipt()["output"] != whole.receipt()["output"]


def test_what_is_frozen_is_in_no_plan_of_gradients_and_moments(tiny_recipe: Recipe) -> None:
    recipe = tiny_recipe()
    own, frozen = (
        plan(resolve(load_recipe(recipe, more))) for more in ([], ['train.freeze=["*embed_tokens*"]'])
    )
    assert (
        frozen.largest["gradients"] < own.largest["gradients"]
        and frozen.largest["optimizer"] < own.largest["optimizer"]
    )


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        ("['*embedding*']", r"train.freeze: '\*embedding\*' matches no weight"),
        ("['*']", "train.freeze: nothing is left to train"),
    ],
)
def test_what_cannot_be_frozen_is_refused(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], patterns: str, said: str
) -> None:
    recipe = tiny_recipe(train=TRAIN % patterns)
    message = refusal(["distill", str(recipe), "--out", str(tmp_path / "run")], capsys, tmp_path)
    assert re.search(said, message), message


def test_adapters_are_all_that_trains_already(
    tiny_recipe: Recipe, tmp_path: Path, teacher_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = f"{{name: checkpoint, model: {teacher_folder}, lora: {{rank: 2}}}}"
    recipe = tiny_recipe(train=TRAIN % "['*norm*']", student=student)
    assert "train.freeze: student.lora trains" in refusal(["check", str(recipe)], capsys, tmp_path)
