"""Each check goes red on its own planted fault, and on nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_model

from potstill import load_recipe
from potstill.assembly import Cast, assemble
from potstill.cli import main
from potstill.proof.preflight import preflight
from potstill.types import HiddenTargets

Recipe = Callable[..., Path]


def red(cast: Cast) -> list[str]:
    return [finding.name for finding in preflight(cast) if not finding.ok]


def cast_of(recipe: Path) -> Cast:
    return assemble(load_recipe(recipe), lambda text: None)


def test_a_sound_recipe_has_no_red_line(tiny_recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tiny_recipe())]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[-1] == "12 of 12 checks passed" and all(line.startswith("ok ") for line in told[:-1])


def test_check_leaves_nothing_behind_and_speaks_json(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe()
    monkeypatch.chdir(tmp_path)
    before = {path for path in tmp_path.rglob("*")}
    assert main(["check", str(recipe), "--json"]) == 0
    assert {path for path in tmp_path.rglob("*")} == before
    assert all(finding["ok"] and finding["figure"] for finding in json.loads(capsys.readouterr().out))


@pytest.mark.parametrize("disguise", ["same folder", "another name and format", "all layers cut"])
def test_a_teacher_that_is_its_student_is_red_under_any_name(
    disguise: str, tiny_recipe: Recipe, teacher_folder: Path, tmp_path: Path
) -> None:
    student = f"{{name: checkpoint, model: {teacher_folder}}}"
    if disguise == "another name and format":
        hf = transformers.AutoModelForCausalLM.from_pretrained(teacher_folder)
        hf.save_pretrained(tmp_path / "renamed", max_shard_size="40KB")
        student = f"{{name: checkpoint, model: {tmp_path / 'renamed'}}}"
    elif disguise == "all layers cut":
        student = "{name: cut, layers: 4}"
    assert "KD term" in red(cast_of(tiny_recipe(student=student)))


def test_a_constant_teacher_is_red(tiny_recipe: Recipe) -> None:
    cast = cast_of(tiny_recipe())

    def constant(batch: Any) -> HiddenTargets:
        return HiddenTargets(torch.ones(len(batch.positions_N), 258), lambda logits: logits * 2)

    cast.teacher.targets = constant  # type: ignore[method-assign]
    assert red(cast) == ["teacher"]


def test_a_student_that_does_not_read_is_red(tiny_recipe: Recipe) -> None:
    cast = cast_of(tiny_recipe())
    body = cast.student.model.hf.base_model.forward

    def blind(input_ids: torch.Tensor, **inputs: Any) -> Any:
        return body(input_ids=torch.zeros_like(input_ids), **inputs)

    cast.student.model.hf.base_model.forward = blind
    assert "student" in red(cast)


def test_shifted_labels_are_red(tiny_recipe: Recipe) -> None:
    cast = cast_of(tiny_recipe())
    cast.corpus.train.ids[1:] = cast.corpus.train.ids[:-1].copy()
    batch = type(cast.corpus.train).batch

    def shifted(self: Any, rows: Any) -> Any:
        found = batch(self, rows)
        return type(found)(
            found.rows_B, found.input_ids_BT, found.position_ids_BT, found.positions_N, found.labels_N.roll(1)
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(cast.corpus.train), "batch", shifted)
        assert "labels" in red(cast)


def test_a_frozen_embedding_is_red(tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    make = torch.optim.AdamW

    def without_embedding(groups: Any, **options: Any) -> Any:
        for group in groups:
            group["params"] = [p for p in group["params"] if len(p) != 258]
        return make(groups, **options)

    monkeypatch.setattr(torch.optim, "AdamW", without_embedding)
    assert red(cast_of(tiny_recipe())) == ["weights move"]


def test_a_rate_that_is_not_the_schedule_s_is_red(
    tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("potstill.training.loop.lr_at", lambda step, plan: plan.lr)
    assert red(cast_of(tiny_recipe())) == ["learning rate"]


def test_a_head_that_changed_after_it_was_probed_is_red(tiny_recipe: Recipe) -> None:
    cast = cast_of(tiny_recipe())
    cast.student.model.hf.config.logit_scale = 3.0  # config drifted: our head scales, the model does not
    assert "cross-entropy" in red(cast)


def test_a_student_far_above_chance_is_red(tiny_recipe: Recipe, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "loud", seed=8, initializer_range=1.0)
    assert "chance" in red(cast_of(tiny_recipe(student=f"{{name: checkpoint, model: {folder}}}")))


def test_a_student_that_saves_something_else_is_red(
    tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    cast = cast_of(tiny_recipe())
    save = type(cast.student).save

    def lossy(self: Any, folder: Path, tokenizer: Any) -> None:
        kept = self.model.hf.model.norm.weight.clone()
        with torch.no_grad():
            self.model.hf.model.norm.weight[0] += 1
        save(self, folder, tokenizer)
        with torch.no_grad():
            self.model.hf.model.norm.weight.copy_(kept)

    monkeypatch.setattr(type(cast.student), "save", lossy)
    assert red(cast) == ["save and reload"]


def test_a_red_line_is_exit_code_two_with_its_advice(
    tiny_recipe: Recipe, teacher_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(student=f"{{name: checkpoint, model: {teacher_folder}}}")
    assert main(["check", str(recipe)]) == 2
    told = capsys.readouterr().out
    assert "RED  KD term: held-out KL to the teacher" in told and "nothing would be learned" in told
