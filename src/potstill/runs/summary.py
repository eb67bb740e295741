"""What a run has come to, from its folder alone: its state, its metrics in short, and a line for a table of runs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from potstill.errors import UserError
from potstill.io import yaml
from potstill.io.atomic import listed
from potstill.io.locks import is_locked
from potstill.io.safe_open import opened
from potstill.runs.places import LATEST
from potstill.runs.run_dir import READABLE, RunDir

MARKS = ("resolved.yaml", "recipe.yaml", "status.json", "metrics.jsonl", "receipt.json")
"""Files of which a run's folder has one, however it was damaged."""


Summary = dict[str, dict[str, float]]
"""Metric -> `first`, `last` and, of held-out ones, `best`."""


@dataclass(frozen=True, kw_only=True)
class RunLine:
    """One run of a table. What cannot be read is None, and `why` says so."""

    run: str
    """Its folder."""
    state: str
    """beginning, running, interrupted (its process is gone), stopped, failed, finished or damaged."""
    step: int | None = None
    """Optimizer steps taken."""
    steps: int | None = None
    """Those of the whole run."""
    kl: float | None = None
    """Held-out KL to the teacher of the best student so far, in nats per position."""
    bytes: int = 0
    """Size of its files."""
    age_s: float = 0.0
    """Seconds since it was started."""
    why: str = ""
    """What ended it."""


def state_of(run: RunDir) -> str:
    """Its status, but `interrupted` where it says that it runs and no process is at work on it.

    Raises:
        UserError: the status is damaged.
    """
    state = str(run.status().get("state", "unknown"))
    return "interrupted" if state == "running" and not is_locked(run.path) else state


def best_evaluation(metrics: Iterable[Mapping[str, float]]) -> Mapping[str, float]:
    """The evaluation of the student that was saved: the first with the lowest held-out loss. Empty before any."""
    evaluations = [line for line in metrics if "heldout/loss" in line]
    return min(evaluations, key=lambda line: line["heldout/loss"], default={})


def run_lines(folder: Path) -> list[RunLine]:
    """The runs in a folder, and those of comparisons in it, the newest first; of a run's own folder, itself.

    Raises:
        UserError: there is no such folder, or it cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. Give one that has runs; `distill` makes them in runs/.")
    if _is_run(folder):
        return [_line(folder)]
    runs = []
    for path in _folders(folder):
        runs += [path] if _is_run(path) else [inner for inner in _folders(path) if _is_run(inner)]
    return sorted(map(_line, runs), key=lambda line: line.age_s)


def _folders(folder: Path) -> list[Path]:
    try:
        entries = listed(folder)
    except UserError:  # one that cannot be read hides none of the others
        return []
    return [Path(e.path) for e in entries if e.is_dir() and not (e.name == LATEST and e.is_symlink())]


def _is_run(folder: Path) -> bool:
    return any(os.path.lexists(folder / name) for name in MARKS)


def _line(path: Path) -> RunLine:
    run, (num_bytes, age_s) = RunDir(path), _size_and_age(path)
    try:
        state, metrics, status = state_of(run), run.metrics(), run.status()
        if state == "beginning":
            return RunLine(run=str(path), state=state, bytes=num_bytes, age_s=age_s)
        return RunLine(
            run=str(path),
            state=state,
            step=int(max((line["step"] for line in metrics), default=0)),
            steps=_steps_of(run),
            kl=best_evaluation(metrics).get("heldout/kl"),
            bytes=num_bytes,
            age_s=age_s,
            why=str(status.get("why", "")),
        )
    except (UserError, OSError) as error:
        return RunLine(run=str(path), state="damaged", bytes=num_bytes, age_s=age_s, why=str(error))


def _steps_of(run: RunDir) -> int | None:
    with opened(run.resolved, "a recipe", READABLE) as file:
        tree, mistakes = yaml.read(yaml.decode(file.read(), str(run.resolved)), str(run.resolved))
    train = tree.get("train") if isinstance(tree, dict) else None
    if mistakes or not isinstance(train, dict):
        raise UserError(f"{run.resolved}: damaged: no section `train`. {READABLE}")
    return train["steps"] if type(train.get("steps")) is int else None


def _size_and_age(path: Path) -> tuple[int, float]:
    """The bytes of a run's files, and seconds since the first of them was written."""
    num_bytes, started_s = 0, time.time()
    for root, _, names in os.walk(path):
        for name in names:
            try:  # of a run at work, files come and go
                stat = os.lstat(os.path.join(root, name))
            except OSError:
                continue
            num_bytes, started_s = num_bytes + stat.st_size, min(started_s, stat.st_mtime)
    return num_bytes, time.time() - started_s


def summary(run: RunDir) -> Summary:
    """First and last value of each metric; of held-out ones also the best: those of the saved student, whose held-out
    loss was the lowest.
    """
    lines = run.metrics()
    values: Summary = {}
    for line in lines:
        for name, value in line.items():
            if name != "step":
                values.setdefault(name, {"first": value})["last"] = value
    for name, value in best_evaluation(lines).items():
        if name != "step":
            values[name]["best"] = value
    return values
