"""The verb `potstill runs`: a line for each run of a folder."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from potstill.io.terminal import Display, aligned, printable, size

if TYPE_CHECKING:
    from potstill.runs.summary import RunLine

UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def add_flags(runs: argparse.ArgumentParser) -> None:
    runs.add_argument("folder", type=Path, nargs="?", metavar="FOLDER", help="default runs/")


def run_runs(options: argparse.Namespace, display: Display) -> None:
    from potstill.runs.places import RUNS
    from potstill.runs.summary import run_lines

    nothing_yet = options.folder is None and not RUNS.exists()
    lines = [] if nothing_yet else run_lines(options.folder or RUNS)
    if options.json:
        display.result(json.dumps([dataclasses.asdict(line) for line in lines], indent=2))
    elif not lines:
        display.result(f"{options.folder or RUNS}: no runs")
    else:
        table = aligned(["run", "state", "step", "best KL", "size", "age"], [_cells(line) for line in lines])
        heading, *rows = table.splitlines()
        width = shutil.get_terminal_size().columns
        reasons = (printable(line.why, keep="") for line in lines)
        noted = (f"{row}  {why}".rstrip() for row, why in zip(rows, reasons, strict=True))
        display.result("\n".join([heading, *(_cut(row, width) for row in noted)]))


def _cells(line: RunLine) -> list[str]:
    taken = "" if line.step is None else f"{line.step}/{'?' if line.steps is None else line.steps}"
    kl = "" if line.kl is None else f"{line.kl:.4f}"
    return [line.run, line.state, taken, kl, size(line.bytes), _age(line.age_s)]


def _age(seconds: float) -> str:
    """3 d, 5 h, 12 min, 40 s."""
    length, unit = next((each for each in UNITS if seconds >= each[0]), UNITS[-1])
    return f"{int(seconds // length)} {unit}"


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else f"{line[: width - 1]}…"
