"""kill -9 at any instant of a run whose rows the student writes, inside a rollout too: the same run in the end."""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path

import pytest

from soak.lab import KILLED, OWN, Lab, count

INSIDE = ("token", "rollout", "kept")
"""Of a rollout: while it decodes, before it begins, and before its rows are kept."""


@pytest.mark.parametrize("trial", range(count(2, 30)))
def test_a_run_killed_inside_a_rollout_or_anywhere_is_the_run_that_was_not(
    lab: Lab, tmp_path: Path, trial: int
) -> None:
    """Every third kill at a random entry of a phase of a rollout, the others at a random time; `rollouts/` is compared,
    too.
    """
    generator = random.Random(trial)
    student = ("gpt2", "llama")[trial % 2]
    recipe, out = lab.recipe(student, OWN), tmp_path / "runs" / "cut"
    if trial % 3 == 0:
        phase = INSIDE[trial // 3 % len(INSIDE)]
        nth = generator.randint(1, lab.counts(student, OWN)[phase])
        end = lab.start(recipe, out, aim=(phase, nth, signal.SIGKILL))
        assert end.code == KILLED, f"{phase}, call {nth}: {end.told}"
    else:
        end = lab.start(recipe, out, after_s=generator.random() * lab.wall(student, OWN))
        assert end.code in (KILLED, 0), end.told
        while end.code != KILLED:  # it was faster this time: again, and earlier
            shutil.rmtree(out)
            end = lab.start(recipe, out, after_s=generator.random() * lab.wall(student, OWN) / 2)
    lab.finish(recipe, out)
    lab.assert_same(out, student, OWN)
    assert len(list((out / "rollouts").iterdir())) == OWN["steps"] // OWN["own_every"]
