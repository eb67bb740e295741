"""A run that dies without a word, as one that is killed does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from potstill import distill
from potstill.runs.run_dir import RunDir


class Killed(BaseException):
    """What no handler takes for its own."""


def cut_off(recipe: Path, out: Path, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run, and die right after the line of step `after` was logged."""
    log = RunDir.log

    def dying(self: RunDir, step: int, metrics: dict[str, float]) -> None:
        log(self, step, metrics)
        if step == after and "train/loss" in metrics:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "log", dying)
        with pytest.raises(Killed):
            distill(recipe, out=out)


def assert_goes_on_without(
    recipe: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    """A run that was cut off goes on without calling a function of `owner` again, and is the run that was not."""
    whole = distill(recipe, out=folder / "whole")
    cut_off(recipe, folder / "again", 3, monkeypatch)

    def called(*given: Any) -> None:
        raise AssertionError(f"{name} was called again")

    monkeypatch.setattr(owner, name, called)
    again = distill(recipe, out=folder / "again", resume=True)
    assert again.metrics()[-1]["heldout/kl"] == whole.metrics()[-1]["heldout/kl"]
    assert again.receipt()["student"] == whole.receipt()["student"]
