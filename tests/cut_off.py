"""A run that dies without a word, as one that is killed does."""

from __future__ import annotations

from pathlib import Path

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
