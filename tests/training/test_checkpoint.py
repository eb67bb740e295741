"""A run that was cut off and resumed is the run that was not, bit for bit; a checkpoint is whole or not there."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_model, write_recipe
from cut_off import cut_off
from safetensors.torch import load_file, save_file

from potstill import UserError, distill
from potstill.cli.main import main
from potstill.runs.run_dir import RunDir

Recipe = Callable[..., Path]
TIMES = ("speed/", "memory/")
TRAIN = (
    "{steps: 12, rows_per_step: 3, rows_per_micro_batch: 2, lr: 1e-2, warmup: 4, save_every: 3, device: cpu}"
)


def recipe_in(folder: Path, teacher: Path) -> Path:
    """GPT-2 with dropout, so that the random state matters; rows that wrap into a second and third epoch."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=258, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "student")
    texts = folder / "texts"
    texts.mkdir()
    for number in range(12):
        (texts / f"{number}.txt").write_text(f"{number} bottles of beer on the wall " * 2)
    sections = {
        "student": f"{{name: checkpoint, model: {folder / 'student'}}}",
        "train": TRAIN,
        "eval": "{every: 5}",
    }
    corpus = f"{{name: text, path: {texts}, tokens_per_row: 32, heldout_rows: 2}}"
    return write_recipe(folder / "tiny.yaml", teacher, texts, sections | {"corpus": corpus})


@pytest.fixture
def recipe(tmp_path: Path, teacher_folder: Path) -> Path:
    return recipe_in(tmp_path, teacher_folder)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Path:
    """The recipe of the tests that change neither it nor what it names."""
    return recipe_in(tmp_path_factory.mktemp("dropout"), teacher_folder)


@pytest.fixture(scope="module")
def whole(kept: Path) -> Path:
    """The run that was not cut off."""
    return distill(kept, out=kept.parent / "whole").path


def essence(run: Path) -> tuple[list[dict[str, float]], dict[str, Any], bytes]:
    """All that may not depend on kills: the lines without wall times, the receipt's facts, the best student."""
    lines = [
        {name: value for name, value in line.items() if not name.startswith(TIMES)}
        for line in RunDir(run).metrics()
    ]
    receipt = RunDir(run).receipt()
    facts = {key: receipt[key] for key in ("student", "positions", "heldout_best", "student_is_of_step")}
    return lines, facts, (run / "student" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "after", [1, pytest.param(3, marks=pytest.mark.soak), 5, pytest.param(7, marks=pytest.mark.soak), 11]
)
def test_a_resumed_run_is_the_run_that_was_not_cut_off(
    kept: Path, whole: Path, tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_off(kept, tmp_path / "cut", after, monkeypatch)
    distill(kept, out=tmp_path / "cut", resume=True)
    assert essence(tmp_path / "cut") == essence(whole)
    assert RunDir(tmp_path / "cut").status() == {"state": "finished"}


@pytest.fixture(scope="module")
def cut_at_8(kept: Path) -> Path:
    """Cut off after step 8."""
    with pytest.MonkeyPatch.context() as patch:
        cut_off(kept, kept.parent / "cut", 8, patch)
    return kept.parent / "cut"


@pytest.mark.parametrize("lost", ["random", "moments", "weights", "step", "best"])
def test_a_checkpoint_that_lacks_something_does_not_resume_exactly(
    kept: Path, whole: Path, cut_at_8: Path, tmp_path: Path, lost: str
) -> None:
    """The negative control: whatever is dropped, the comparison above notices."""
    shutil.copytree(cut_at_8, tmp_path / "cut")
    place = tmp_path / "cut" / "checkpoints" / "00000006"
    tensors, state = load_file(place / "tensors.safetensors"), json.loads((place / "state.json").read_text())
    if lost == "random":
        torch.manual_seed(99)
        tensors["random/cpu"] = torch.get_rng_state()
    for name in tensors:
        if lost == "moments" and name.endswith("exp_avg"):
            tensors[name] = torch.zeros_like(tensors[name])
        if lost == "weights" and name.endswith("wpe.weight"):
            tensors[name] = torch.zeros_like(tensors[name])
    state["outcome"]["step"] -= lost == "step"
    if lost == "best":
        state["outcome"]["best"]["heldout/loss"] = -1.0
    save_file(tensors, place / "tensors.safetensors")
    (place / "state.json").write_text(json.dumps(state))
    rewrite_manifest(place)
    if lost == "step":  # a step that is not its folder's would be noticed
        place.rename(place.with_name("00000005"))
    distill(kept, out=tmp_path / "cut", resume=True)
    assert essence(tmp_path / "cut") != essence(whole)


def rewrite_manifest(place: Path) -> None:
    from potstill.io.hashing import file_sha256

    names = ("tensors.safetensors", "state.json")
    manifest = {n: {"bytes": (place / n).stat().st_size, "sha256": file_sha256(place / n)} for n in names}
    (place / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def cut_run(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cut_off(recipe, tmp_path / "cut", 10, monkeypatch)
    return tmp_path / "cut"


def test_where_no_checkpoint_is_sound_nothing_is_trained(recipe: Path, cut_run: Path) -> None:
    for place in (cut_run / "checkpoints").iterdir():
        (place / "state.json").write_text("{")
    before = (cut_run / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="none of 2 checkpoints is sound"):
        distill(recipe, out=cut_run, resume=True)
    assert (cut_run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("change", ["recipe", "corpus", "teacher"])
def test_a_run_does_not_go_on_as_another(
    recipe: Path, cut_run: Path, tmp_path: Path, change: str, teacher_folder: Path
) -> None:
    overrides = []
    if change == "recipe":
        overrides = ["train.lr=2e-2"]
    elif change == "corpus":
        (tmp_path / "texts" / "0.txt").write_text(
            "another text altogether, and as long as the one before it was"
        )
    else:
        shutil.copytree(teacher_folder, tmp_path / "kept")
        shutil.rmtree(teacher_folder)
        make_model(teacher_folder, seed=5)
    try:
        with pytest.raises(
            UserError, match={"recipe": r"train\.lr \(0\.01 -> 0\.02\)"}.get(change, f"another.*{change}")
        ):
            distill(recipe, out=cut_run, resume=True, overrides=overrides)
    finally:
        if change == "teacher":
            shutil.rmtree(teacher_folder)
            shutil.copytree(tmp_path / "kept", teacher_folder)


@pytest.mark.parametrize("change", ["student", "teacher"])
def test_a_model_of_another_shape_is_named_and_no_checkpoint_is_called_damaged(
    recipe: Path,
    tmp_path: Path,
    change: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Under the names of the recipe: neither it nor the corpus differs, and no tensor fits."""
    teacher = make_model(tmp_path / "teacher")
    lines = [line for line in recipe.read_text().splitlines() if not line.startswith("teacher: ")]
    if change == "teacher":
        lines = [line for line in lines if not line.startswith("student: ")]
        lines += ["student: {name: cut, layers: 2}"]  # of another teacher it is another one, too
    recipe.write_text("\n".join([*lines, f"teacher: {{name: torch, model: {teacher}}}"]))
    cut_off(recipe, tmp_path / "cut", 10, monkeypatch)
    kept = sorted((tmp_path / "cut" / "checkpoints").rglob("*"))
    if change == "teacher":
        make_model(teacher, hidden_size=64)
    else:
        config = transformers.GPT2Config.from_pretrained(tmp_path / "student", n_embd=16)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "student")
    for told_by in ("another input: ", "00000009: made with another "):
        capsys.readouterr()
        assert main(["distill", str(recipe), "--out", str(tmp_path / "cut"), "--resume"]) == 2
        told = capsys.readouterr().err
        (line,) = [line for line in told.splitlines() if line.startswith("error: ")]
        assert told_by in line and "student (" in line and ("teacher (" in line) == (change == "teacher")
        assert "damaged" not in told
        assert sorted((tmp_path / "cut" / "checkpoints").rglob("*")) == kept
        for module in ("distill", "start"):  # the checkpoint knows it alone, too
            monkeypatch.setattr(f"potstill.workflows.{module}.require_equal", lambda *_: None)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_ends_with_its_code_and_resumes_exactly(
    kept: Path, whole: Path, tmp_path: Path, number: int
) -> None:
    log = RunDir.log

    def signalling(self: RunDir, step: int, metrics: dict[str, float]) -> None:
        log(self, step, metrics)
        if step == 5 and "train/loss" in metrics:
            signal.raise_signal(number)

    before = signal.getsignal(number)
    arguments = ["distill", str(kept), "--out", str(tmp_path / "cut")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDir, "log", signalling)
        assert main(arguments) == 143
    assert signal.getsignal(number) is before
    assert RunDir(tmp_path / "cut").status()["state"] == "stopped"
    assert main([*arguments, "--resume"]) == 0
    assert essence(tmp_path / "cut") == essence(whole)
    left = tmp_path / "cut" / ".lock"  # by a kill after the receipt
    left.touch()
    assert main([*arguments, "--resume"]) == 0  # finished already
    assert not left.exists()


def test_resuming_what_is_no_run_is_refused(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run directory"):
        distill(recipe, out=tmp_path / "nothing", resume=True)
