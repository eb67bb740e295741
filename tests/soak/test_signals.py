"""SIGTERM at any instant: the documented code within a step and a save, and a run that goes on bit for bit."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from potstill.runs.run_dir import RunDir
from soak.forkserver import BEFORE, PHASES, End
from soak.lab import LONG, SHORT, Lab, count

STUDENTS = ("gpt2", "llama")
STOPPED = 143


def assert_stopped(end: End, out: Path) -> None:
    """What the signal found decides: nothing yet, a run, or one whose last number was already there."""
    lines = end.told.splitlines()
    asked = next((number for number, line in enumerate(lines) if line.startswith("SIGTERM: ")), None)
    if asked is None:  # before the handler was there, or after it was gone
        assert end.code in (-signal.SIGTERM, 0), end.told
        assert not out.exists() or RunDir(out).status() == {"state": "finished"}
    elif "before the first step" in lines[asked]:
        assert end.code == STOPPED and len(lines) == asked + 1, end.told
        assert not (out / "metrics.jsonl").exists()
    elif end.code == 0:
        assert f"step {RunDir(out).metrics()[-1]['step']}/" in end.told and RunDir(out).status() == {
            "state": "finished"
        }
    else:
        assert end.code == STOPPED, end.told
        assert len([line for line in lines[asked:] if line.startswith("step ")]) <= 1, end.told
        assert len([line for line in lines[asked:] if line.startswith("held out")]) <= 1, end.told
        assert RunDir(out).status()["state"] == "stopped"
        assert list((out / "checkpoints").iterdir()) and not list(out.rglob("*.new"))
    assert "Traceback" not in end.told


@pytest.mark.parametrize("trial", range(count(1, 50)))
def test_a_signal_at_a_random_instant_stops_within_a_step_and_a_save(
    lab: Lab, tmp_path: Path, trial: int
) -> None:
    student = STUDENTS[trial % 2]
    recipe, out = lab.recipe(student, LONG), tmp_path / "runs" / "cut"
    after_s = random.Random(trial).random() * lab.wall(student, LONG)
    end = lab.start(recipe, out, after_s=after_s, number=signal.SIGTERM)
    assert_stopped(end, out)
    lab.finish(recipe, out)
    lab.assert_same(out, student, LONG, but_for_older_checkpoints=True)


@pytest.mark.parametrize("phase", list(PHASES)[:: count(4, 1)])
def test_a_signal_in_each_phase_stops_the_run_there(lab: Lab, tmp_path: Path, phase: str) -> None:
    """Reading, loading, the teacher's pass, the student's, evaluations, saves: its first, its last, others."""
    last = lab.counts("gpt2", SHORT)[phase]
    others = random.Random(phase).sample(range(2, last), min(3, max(last - 2, 0)))
    for number in list(dict.fromkeys([1, last, *others]))[: count(1, 5)]:
        recipe, out = lab.recipe("gpt2", SHORT), tmp_path / f"{phase}-{number}" / "cut"
        end = lab.start(recipe, out, aim=(phase, number, signal.SIGTERM))
        assert_stopped(end, out)
        if phase in BEFORE:
            assert end.code == STOPPED and not out.exists(), end.told
        lab.finish(recipe, out)
        lab.assert_same(out, "gpt2", SHORT, but_for_older_checkpoints=True)
