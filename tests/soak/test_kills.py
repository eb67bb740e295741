"""kill -9 at any instant: the restarted run is the run that was never killed, bit for bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from soak.forkserver import PHASES
from soak.lab import KILLED, LONG, ROWS_PER_STEP, SHORT, Lab, count

STUDENTS = ("gpt2", "llama")
PARTS = count(1, 24)


@pytest.mark.parametrize("trial", range(count(1, 200)))
def test_a_run_killed_at_a_random_instant_is_the_run_that_was_not(
    lab: Lab, tmp_path: Path, trial: int
) -> None:
    """One kill and a restart; every second at a random time, the others at a random entry of a named phase."""
    generator = random.Random(trial)
    student = STUDENTS[trial % 4 // 2]
    recipe, out = lab.recipe(student, LONG), tmp_path / "runs" / "cut"
    if trial % 2:
        phase = list(PHASES)[trial // 2 % len(PHASES)]
        nth = generator.randint(1, lab.counts(student, LONG)[phase])
        end = lab.start(recipe, out, aim=(phase, nth, signal.SIGKILL))
        assert end.code == KILLED, f"{phase}, call {nth}: {end.told}"
    else:
        end = lab.start(recipe, out, after_s=generator.random() * lab.wall(student, LONG))
        assert end.code in (KILLED, 0), end.told
        while end.code != KILLED:  # it was faster this time: again, and earlier
            shutil.rmtree(out)
            end = lab.start(recipe, out, after_s=generator.random() * lab.wall(student, LONG) / 2)
    lab.finish(recipe, out)
    lab.assert_same(out, student, LONG)


@pytest.mark.parametrize("chain", range(count(1, 20)))
def test_five_kills_in_a_row_neither_lose_nor_repeat_a_row(lab: Lab, tmp_path: Path, chain: int) -> None:
    """Kills in one epoch, or at five ends of epochs, which lie inside steps; then every epoch has every row
    once.
    """
    generator = random.Random(chain)
    student = STUDENTS[chain % 4 // 2]
    recipe, out, record = lab.recipe(student, LONG), tmp_path / "runs" / "cut", tmp_path / "rows.jsonl"
    per_step, steps = ROWS_PER_STEP, LONG["steps"]
    num_rows = json.loads((lab.whole(student, LONG) / "corpus.json").read_text())["train_rows"]
    assert num_rows % per_step, "an epoch should end inside a step"
    epochs = steps * per_step // num_rows
    if chain % 2 == 0:
        ends = [(epoch + 1) * num_rows // per_step for epoch in range(epochs)]
        targets = sorted(generator.choices([end + near for end in ends for near in (0, 1)], k=5))
    else:
        epoch = generator.randrange(epochs)
        inside = range(epoch * num_rows // per_step + 1, (epoch + 1) * num_rows // per_step)
        targets = sorted(generator.choices(inside, k=5))
    for target in targets:
        newest = max((int(p.name) for p in (out / "checkpoints").glob("*") if p.name.isdecimal()), default=0)
        nth = max(target - newest, 0) + 1
        end = lab.start(recipe, out, aim=("forward", nth, signal.SIGKILL), rows=record)
        assert end.code == KILLED, end.told
    assert lab.start(recipe, out, rows=record).code == 0
    lab.assert_same(out, student, LONG)

    # A process takes up where its checkpoint was: what an earlier one did from there on does not count.
    taken: dict[int, list[int]] = {}
    last = None
    for process, step, rows in map(json.loads, record.read_text().splitlines()):
        if process != last:
            assert step <= len(taken), "a process began behind what was done"
            taken = {done: rows for done, rows in taken.items() if done < step}
            last = process
        taken[step] = rows
    assert list(taken) == list(range(steps))
    fed = [row for rows in taken.values() for row in rows]
    for epoch in range(epochs):
        assert sorted(fed[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))


@pytest.mark.parametrize("part", range(PARTS))
def test_every_file_system_call_can_be_the_last(lab: Lab, tmp_path: Path, part: int) -> None:
    """The whole run, from the first folder to the receipt, killed before each call that changes a file; then
    once more with what was being written cut in the middle.
    """
    calls = lab.calls("gpt2", SHORT)
    numbers = range(part + 1, len(calls) + 1, PARTS)
    for number in random.Random(part).sample(numbers, count(1, len(numbers))):
        is_write = number > 1 and calls[number - 2].startswith(("open", "tensors"))
        for torn in (None, 0.5)[: 1 + is_write][-count(1, 2) :]:
            recipe, out = lab.recipe("gpt2", SHORT), tmp_path / f"{number}-{torn}" / "cut"
            end = lab.start(recipe, out, watch=out, die_at=number, torn=torn)
            assert end.code == KILLED, f"{number} {calls[number - 1]}: {end.told}"
            end = lab.start(recipe, out)
            assert end.code == 0, f"{number} {calls[number - 1]}: {end.told}"
            lab.assert_same(out, "gpt2", SHORT)


@pytest.mark.parametrize("trial", range(count(1, 60)))
def test_a_kill_while_a_kill_is_being_mended_changes_nothing(lab: Lab, tmp_path: Path, trial: int) -> None:
    generator = random.Random(trial)
    recipe, out = lab.recipe("gpt2", SHORT), tmp_path / "runs" / "cut"
    first = generator.randint(1, len(lab.calls("gpt2", SHORT)))
    assert lab.start(recipe, out, watch=out, die_at=first, torn=generator.random()).code == KILLED
    second = generator.randint(1, 12)
    end = lab.start(recipe, out, watch=out, die_at=second, torn=generator.random())
    assert end.code in (KILLED, 0), f"{first}, {second}: {end.told}"
    lab.finish(recipe, out)
    lab.assert_same(out, "gpt2", SHORT)


@pytest.mark.soak
def test_processes_of_their_own_are_killed_alike(lab: Lab, tmp_path: Path) -> None:
    """The same without a fork server: `python -m potstill`, killed while it trains."""
    recipe, out = lab.recipe("gpt2", LONG), tmp_path / "runs" / "cut"
    command = [sys.executable, "-m", "potstill", "distill", str(recipe), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    generator, metrics, kills, wanted = random.Random(0), out / "metrics.jsonl", 0, count(1, 3)
    while True:
        resume = ["--resume"] if (out / "resolved.yaml").exists() else []
        size = metrics.stat().st_size if metrics.exists() else 0
        child = subprocess.Popen([*command, *resume], env=environment, stderr=subprocess.PIPE, text=True)
        while (
            kills < wanted
            and child.poll() is None
            and (metrics.stat().st_size if metrics.exists() else 0) == size
        ):
            time.sleep(0.005)
        if kills < wanted:
            time.sleep(generator.random() * 0.15)
            child.kill()
        _, told = child.communicate()
        if child.returncode != KILLED:
            break
        kills += 1
    assert (kills, child.returncode) == (wanted, 0), told
    lab.assert_same(out, "gpt2", LONG)
