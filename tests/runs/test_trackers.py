"""Sinks hear every line of metrics.jsonl, and none of them can stop a run."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from potstill import UserError, distill
from potstill.io.terminal import Display
from potstill.registry import entries
from potstill.runs.run_dir import RunDir

Recipe = Callable[..., Path]


class FakeTracker(types.ModuleType):
    """trackio or wandb, as far as it is called; `fails_at` is the step whose telling raises."""

    def __init__(self, name: str, fails_at: int | None = None) -> None:
        super().__init__(name)
        self.inits: list[dict[str, Any]] = []
        self.lines: list[dict[str, float]] = []
        self.finished, self.fails_at = 0, fails_at

    def init(self, **options: Any) -> None:
        print("welcome to the tracker")
        self.inits.append(options)

    def log(self, metrics: dict[str, float], step: int) -> None:
        if step == self.fails_at:
            raise ConnectionError("no route\nto the tracker")
        self.lines.append({"step": step, **metrics})

    def finish(self) -> None:
        self.finished += 1


class Heard(Display):
    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture(params=["trackio", "wandb"])
def tracker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeTracker:
    fake = FakeTracker(request.param)
    monkeypatch.setitem(sys.modules, request.param, fake)
    return fake


def with_sinks(recipe: Recipe, *names: str) -> Path:
    return recipe(
        sinks=f"[{', '.join(names)}]",
        train="{steps: 4, rows_per_step: 2, lr: 1e-3, device: cpu, save_every: 2}",
    )


def test_a_tracker_hears_what_the_run_wrote(
    tracker: FakeTracker, tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = distill(with_sinks(tiny_recipe, tracker.__name__), out=tmp_path / "mine")
    assert tracker.lines == run.metrics()
    assert len(tracker.lines) == 7  # four steps and three evaluations
    assert [options["name"] for options in tracker.inits] == ["mine"]
    assert tracker.finished == 1
    assert capsys.readouterr().out == ""  # stdout is for results


@pytest.mark.parametrize("fails_at", [0, 3])
def test_a_sink_that_fails_is_told_of_once_and_the_run_goes_on(
    fails_at: int, tracker: FakeTracker, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    tracker.fails_at, heard = fails_at, Heard()
    run = distill(with_sinks(tiny_recipe, tracker.__name__), out=tmp_path / "run", display=heard)
    assert run.status() == {"state": "finished"}
    assert [line["step"] for line in run.metrics()] == [0, 1, 2, 2, 3, 4, 4]
    (warning,) = [w for w in heard.warnings if "sink" in w]
    assert warning.startswith(f"sink {tracker.__name__} ") and warning.endswith("no route to the tracker.")
    assert {line["step"] for line in tracker.lines} == {0: set(), 3: {0, 1, 2}}[fails_at]


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_sink_that_is_not_installed_is_refused_before_anything_is_written(
    name: str, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (name, entries("sink")[name].module):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        UserError, match=rf"sinks: {name} cannot be imported: .*pip install 'potstill\[{name}\]'"
    ):
        distill(with_sinks(tiny_recipe, name), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def resumed(recipe: Recipe, name: str, folder: Path, steps: list[int]) -> RunDir:
    """A run that a failure ended at step 4, after it had told of step 3, and that went on from step 2."""
    path = with_sinks(recipe, name)
    log = RunDir.log

    def cut_off(self: RunDir, step: int, metrics: dict[str, float]) -> None:
        if step == 4:
            raise RuntimeError("cut off")
        log(self, step, metrics)
        steps.append(step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDir, "log", cut_off)
        with pytest.raises(RuntimeError, match="cut off"):
            distill(path, out=folder)
    return distill(path, out=folder, resume=True)


def test_a_resumed_run_is_one_run_for_its_tracker(
    tracker: FakeTracker, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    before: list[int] = []
    run = resumed(tiny_recipe, tracker.__name__, tmp_path / "run", before)
    assert before == [0, 1, 2, 2, 3]
    assert tracker.inits[0] == tracker.inits[1]
    assert tracker.inits[0]["resume"] == "allow"
    if tracker.__name__ == "trackio":
        told, written = (
            [(line["step"], *line) for line in lines] for lines in (tracker.lines, run.metrics())
        )
        assert told == written  # no line twice
    else:
        assert tracker.lines[len(before) :] == [line for line in run.metrics() if line["step"] > 2]


def test_tensorboard_has_each_value_of_a_resumed_run_once(tiny_recipe: Recipe, tmp_path: Path) -> None:
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed; not run",
    )
    run = resumed(tiny_recipe, "tensorboard", tmp_path / "run", [])
    found = events.EventAccumulator(str(run.path / "tensorboard"))
    found.Reload()
    told = {name: [(e.step, e.value) for e in found.Scalars(name)] for name in found.Tags()["scalars"]}
    for name in ("train/ce", "train/lr", "heldout/kl"):
        wanted = [(line["step"], line[name]) for line in run.metrics() if name in line]
        assert told[name] == [(step, pytest.approx(value, rel=1e-6)) for step, value in wanted]
