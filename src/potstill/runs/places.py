"""Where runs are: `runs/NAME`, `runs/NAME-2` …, and `runs/latest`, a link to the one that was started last."""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from pathlib import Path

from potstill.io.atomic import listed

RUNS = Path("runs")
LATEST = "latest"


def places(name: str) -> list[Path]:
    """Those of runs/NAME, runs/NAME-2 … that exist, the newest first."""
    numbers = []
    for entry in listed(RUNS) if RUNS.is_dir() else []:
        match = re.fullmatch(rf"{re.escape(name)}(?:-([1-9][0-9]*))?", entry.name)
        if match and not entry.is_symlink() and match[1] != "1":
            numbers.append(int(match[1] or 1))
    return [_numbered(name, number) for number in sorted(numbers, reverse=True)]


def default_path(name: str) -> Path:
    """runs/NAME, or the first of runs/NAME-2, runs/NAME-3 … behind which there is none."""
    taken = places(name)
    number = 1 + (_number(taken[0], name) if taken else 0)
    while os.path.lexists(path := _numbered(name, number)):  # a link, which `places` leaves out
        number += 1
    return path


def newest_path(name: str) -> Path:
    """The last of runs/NAME, runs/NAME-2 … that exists: what `--resume` continues by default."""
    return next(iter(places(name)), RUNS / name)


def link_latest(run: Path) -> None:
    """Make `runs/latest` a link to a run in `runs/`: the old link or the new one at every instant. Where the file
    system has no links, or something else has that name, there is none.
    """
    if run.parent.resolve() != RUNS.resolve():
        return
    beside = RUNS / f".{LATEST}-{uuid.uuid4().hex}"  # of this process: two runs may start at once
    with contextlib.suppress(OSError):
        if os.path.lexists(RUNS / LATEST) and not (RUNS / LATEST).is_symlink():
            return
        beside.symlink_to(run.name, target_is_directory=True)
        try:
            os.replace(beside, RUNS / LATEST)
        finally:
            with contextlib.suppress(FileNotFoundError):
                beside.unlink()


def _numbered(name: str, number: int) -> Path:
    return RUNS / (name if number == 1 else f"{name}-{number}")


def _number(path: Path, name: str) -> int:
    return int(path.name.removeprefix(name).removeprefix("-") or 1)
