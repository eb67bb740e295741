"""A run resumes only with the files it was started with, also those that neither weights nor corpus cover."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import make_model
from cut_off import cut_off

from potstill import UserError, distill
from potstill.io.hashing import file_sha256

Recipe = Callable[..., Path]
TRAIN = "{{steps: 4, rows_per_step: 4, lr: 1e-3, device: cpu, save_every: {every}}}"
PLUGIN = '''
from potstill.registry import register


@register("divergence")
def inputs_own(student_logp_NS, teacher_logp_NS):
    """Forward KL, times a factor."""
    return {factor} * (teacher_logp_NS.exp() * (teacher_logp_NS - student_logp_NS)).sum(-1)
'''


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """A teacher and a student of their own, to be changed."""
    return make_model(tmp_path / "teacher"), make_model(tmp_path / "student", seed=1, num_hidden_layers=2)


@pytest.fixture
def begun(
    tiny_recipe: Recipe, models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """A run cut off after step 3: with a checkpoint of step 2, or without any."""

    def begin(every: int) -> Path:
        (tmp_path / "own.py").write_text(PLUGIN.format(factor=1.0))
        recipe = tiny_recipe(
            teacher=f"{{name: torch, model: {models[0]}}}",
            student=f"{{name: checkpoint, model: {models[1]}}}",
            objective="{chunk: 16, divergence: inputs_own}",
            train=TRAIN.format(every=every),
            plugins="[own.py]",
        )
        cut_off(recipe, tmp_path / "run", 3, monkeypatch)
        assert (tmp_path / "run" / "checkpoints").exists() == (every > 0)
        return recipe

    return begin


def change(what: str, folder: Path) -> None:
    path = folder / what
    if path.suffix == ".py":
        path.write_text(PLUGIN.format(factor=1.001))
    elif path.suffix == ".json":
        path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 1e-5, "top_k": 7}))
    else:
        shutil.rmtree(path)
        make_model(path, seed=2, num_hidden_layers=2)


@pytest.mark.parametrize(
    ("changed", "named", "every"),
    [
        ("own.py", "plugins/0/own.py", 2),
        ("own.py", "plugins/0/own.py", 0),
        ("teacher/config.json", "teacher/config.json", 2),
        ("teacher/generation_config.json", "teacher/generation_config.json", 0),
        ("teacher/tokenizer_config.json", "teacher/tokenizer_config.json", 2),
        ("student", "student", 0),
    ],
)
def test_a_run_does_not_go_on_with_another_file(
    begun: Callable[..., Path], tmp_path: Path, changed: str, named: str, every: int
) -> None:
    recipe = begun(every)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    change(changed, tmp_path)
    with pytest.raises(UserError, match=rf"run: .*another input: {named} \('[0-9a-f]+' -> ") as told:
        distill(recipe, out=tmp_path / "run", resume=True)
    assert str(told.value).count(" -> ") == 1, "one thing was changed"
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_setting_that_is_gone_is_another_input(begun: Callable[..., Path], tmp_path: Path) -> None:
    recipe = begun(0)
    (tmp_path / "teacher" / "generation_config.json").unlink()
    with pytest.raises(
        UserError, match=r"another input: teacher/generation_config\.json \('[0-9a-f]+' -> None"
    ):
        distill(recipe, out=tmp_path / "run", resume=True)


def test_a_checkpoint_of_other_files_is_refused_whatever_the_run_s_record_says(
    begun: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = begun(2)
    change("teacher/generation_config.json", tmp_path)
    inputs = json.loads((tmp_path / "run" / "inputs.json").read_text())
    inputs["teacher/generation_config.json"] = file_sha256(tmp_path / "teacher" / "generation_config.json")
    (tmp_path / "run" / "inputs.json").write_text(json.dumps(inputs))
    with pytest.raises(
        UserError,
        match=r"00000002: made with another teacher/generation_config\.json \(\w{12} -> \w{12}\) than",
    ):
        distill(recipe, out=tmp_path / "run", resume=True)


def test_the_receipt_has_the_hash_of_every_file(begun: Callable[..., Path], tmp_path: Path) -> None:
    run = distill(begun(2), out=tmp_path / "run", resume=True)
    inputs = run.receipt()["inputs"]
    assert inputs["plugins/0/own.py"] == file_sha256(tmp_path / "own.py")
    assert inputs["teacher/config.json"] == file_sha256(tmp_path / "teacher" / "config.json")
    assert inputs["student"] == run.receipt()["student"]["weights_sha256_start"]
    assert inputs == run.inputs() and {"student/config.json", "teacher/tokenizer.json"} < inputs.keys()


def test_a_resume_without_a_checkpoint_says_so(
    begun: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from potstill.io.terminal import Display

    run = distill(begun(0), out=tmp_path / "run", resume=True, display=Display())
    assert "no checkpoint: from step 0\n" in capsys.readouterr().err
    assert [line["step"] for line in run.metrics()] == [0, 1, 2, 2, 3, 4, 4]
