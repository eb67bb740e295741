"""A plan for a device that this machine does not have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from refusals import refusal
from test_malformed import gguf_file, gguf_tensors

from potstill import load_recipe
from potstill.build.resolve import resolve
from potstill.cli.main import main
from potstill.preflight import fake_step, plan_advice
from potstill.preflight.other_device import MEMORY_GB, OtherDevice, resolve_for
from potstill.preflight.plan import plan
from potstill.preflight.plan_advice import stored
from potstill.training import loop
from potstill.training.prefetch import Prefetch

Write = Callable[..., Path]
TRAIN = "{steps: 6, rows_per_step: 8, rows_per_micro_batch: 4, lr: 1e-3, precision: auto, device: cuda}"
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device; not run")


@pytest.fixture
def recipe(tiny_recipe: Write, tmp_path: Path) -> Path:
    """A teacher of 5 MiB in bfloat16 for a student of 1: most of the memory is the teacher's."""
    teacher = make_model(tmp_path / "teacher", hidden_size=256, intermediate_size=768, initializer_range=0.02)
    student = make_model(tmp_path / "student", seed=1, num_hidden_layers=1)
    return tiny_recipe(
        teacher=f"{{name: torch, model: {teacher}, dtype: auto}}",
        student=f"{{name: checkpoint, model: {student}}}",
        train=TRAIN,
    )


def planned(recipe: Path, capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["plan", str(recipe), *words, "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_plan_for_another_device_has_its_memory_types_and_no_process(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = planned(recipe, capsys, "--device", "H100")
    assert (there["planned_for"], there["device"]) == ("h100", "cuda")
    assert there["memory_available_bytes"] == MEMORY_GB["h100"] * 10**9
    assert there["libraries"] == there["allocator"] == there["corpus"] == 0
    assert there["disk_available_bytes"] is None and there["time_s"] is None and there["fits"]
    # A T4 multiplies no bfloat16, so `auto` is float32 there.
    on_t4 = planned(recipe, capsys, "--device", "t4")
    assert on_t4["teacher"] == pytest.approx(2 * there["teacher"], rel=1e-3)
    here = planned(recipe, capsys, "--device", "cpu", "--device-memory", "4GiB", "teacher.dtype=bfloat16")
    assert here["libraries"] > 0 and here["memory_available_bytes"] == 4 * 2**30
    assert main(["plan", str(recipe), "--device", "h100"]) == 0
    assert "time: not measured here" in capsys.readouterr().out


def test_the_teacher_is_ahead_as_on_that_device(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    class Watched(Prefetch):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            seen.append(self.is_ahead)

    monkeypatch.setattr(loop, "Prefetch", Watched)
    monkeypatch.setattr(fake_step, "_known", {})
    for is_cuda in (True, False):
        other = OtherDevice("cuda" if is_cuda else "cpu", is_cuda, 2**30)
        plan(resolve_for(load_recipe(recipe), other))
    assert seen == [True, False]


@pytest.mark.parametrize(
    ("size", "num_bytes"),
    [("80GiB", 80 * 2**30), ("80 GB", 80 * 10**9), ("1.5gib", 3 * 2**29), ("512M", 512 * 10**6)],
)
def test_a_size_is_read_in_both_kinds_of_units(
    recipe: Path, capsys: pytest.CaptureFixture[str], size: str, num_bytes: int
) -> None:
    found = planned(recipe, capsys, "--device-memory", size)
    assert (found["planned_for"], found["memory_available_bytes"]) == ("cuda", num_bytes)


@pytest.mark.parametrize(("there", "offered"), [("cpu", {"stored"}), ("h100", set())])
def test_of_a_gguf_file_only_what_a_run_takes_is_offered(
    there: str, offered: set[str], tiny_recipe: Write, tmp_path: Path
) -> None:
    teacher = gguf_file(tmp_path / "t.gguf", gguf_tensors(), {})
    path = tiny_recipe(teacher=f"{{name: torch, model: {teacher}}}", train=TRAIN)
    loaded = load_recipe(path, ["train.device=cpu"])
    resolved = resolve(loaded) if there == "cpu" else resolve_for(loaded, OtherDevice(there, True, 2**20))
    words = plan_advice._options(resolved)
    assert {
        value for option in words if option.field == "teacher.weights" for value in option.values
    } == offered


def test_a_plan_that_does_not_fit_offers_fewer_bits_and_a_store(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Few fields are left to lower: each that can be is planned several times.
    fixed = ("objective.chunk=32", "train.return_memory=true", "train.activation_checkpointing=true")
    words = ("train.rows_per_micro_batch=1", "corpus.tokens_per_row=200", "corpus.heldout_rows=1", *fixed)
    there = planned(recipe, capsys, "--device", "h100", *words)
    enough = f"{there['peak_bytes'] - there['teacher'] + 2**16}B"
    found = planned(recipe, capsys, "--device", "cuda", "--device-memory", enough, *words, code=2)
    advice = {change["set"][0]: change for change in found["advice"]}
    by_store = advice["teacher={name: store, path: STORE}"]
    assert by_store["fits"] and by_store["peak_bytes"] == found["peak_bytes"] - found["teacher"]
    eighth = planned(recipe, capsys, "--device", "h100", *words, "teacher.weights=int8")
    if eighth["peak_bytes"] < found["peak_bytes"]:
        assert advice["teacher.weights=int8"]["peak_bytes"] == eighth["peak_bytes"]
    else:  # the check of such a teacher has the full weights beside it
        assert "teacher.weights=int8" not in advice
    rollouts = "rollouts={fraction: 0.5, prompt_tokens: 8, max_new_tokens: 8}"
    on_policy = resolve_for(load_recipe(recipe, [rollouts]), OtherDevice("h100", True, 2**20))
    assert stored(on_policy, plan(on_policy), 2**40) is None, (
        "a store has no targets for what a student writes"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "gpu9"], "gpu9 is not known"),
        (["--device", "cuda"], "--device-memory"),
        (["--device", "h100", "--device-memory", "much"], "'much'"),
        (["--device-memory", "0GiB"], "'0GiB'"),
        (["--device", "h100", "--measure"], "--measure: "),
    ],
)
def test_what_cannot_be_planned_for_is_refused(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert said in refusal(["plan", str(recipe), *words], capsys, tmp_path)


@needs_no_gpu
def test_here_the_recipe_is_still_refused(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "device: is cuda" in refusal(["check", str(recipe)], capsys, tmp_path)
    assert "--device h100" in refusal(["plan", str(recipe)], capsys, tmp_path)
