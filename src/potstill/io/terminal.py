"""The terminal: step lines, tables, messages. The only importer of rich.

Everything goes to stderr except results, which go to stdout and may be piped. On a terminal there is a bar
with the figures of the step; on a pipe, one plain line a step. Text from files and models cannot drive the
terminal: markup is not interpreted, control characters are escaped.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import math
import os
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

from potstill.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID


def _decimals(value: float, places: int = 2) -> str:
    """So many decimals, or two digits where these would round most of it away."""
    return f"{value:#.2g}" if 0 < abs(value) < 10 ** (1 - places) else f"{value:.{places}f}"


FIGURES: dict[str, Callable[[float], str]] = {
    "train/loss": lambda value: f"loss {_decimals(value)}",
    "train/ce": lambda value: f"ce {_decimals(value)}",
    "train/kd": lambda value: f"kd {_decimals(value)}",
    "train/router_loss": lambda value: f"router {_decimals(value, 3)}",
    "rollout/tokens": "wrote {:.0f}".format,
    "rollout/ended": "ended {:.0%}".format,
    "train/lr": "lr {:.1e}".format,
    "train/grad_norm": lambda value: f"grad {_decimals(value)}",
    "train/positions": "positions {:.0f}".format,
    "speed/tokens_per_s": "{:.0f} tok/s".format,
}


class Display:
    """What the commands print. `quiet` drops everything but errors."""

    def __init__(self, quiet: bool = False, *, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.quiet = quiet
        self._out: TextIO | None = out or sys.stdout  # None where the process was started without
        self._err: TextIO | None = err or sys.stderr
        self._is_terminal = self._err is not None and self._err.isatty() and os.environ.get("TERM") != "dumb"
        self._console: Console | None = None
        self._bar: tuple[Progress, TaskID] | None = None

    def step_line(self, step: int, steps: int, metrics: Mapping[str, float], eta_s: float) -> None:
        """Loss terms apart, learning rate, gradient norm, supervised positions, speed and time left."""
        if self.quiet:
            return
        figures = [shown(metrics[name]) for name, shown in FIGURES.items() if name in metrics]
        columns = "  ".join([*figures, f"left {clock(eta_s)}"])
        if not self._is_terminal:
            self._say(f"step {step}/{steps}  {columns}")
            return
        bar, task = self._opened_bar(steps)
        bar.update(task, completed=step, description=columns, refresh=True)
        if step >= steps:
            self.close()

    def heldout_line(self, step: int, metrics: Mapping[str, float]) -> None:
        """The metrics of an evaluation, nats per position but for the agreement."""
        lines: dict[str, list[str]] = {}
        for name, value in metrics.items():
            *source, metric = name.removeprefix("heldout/").split("/")
            # Of a mix, a line for each source; `own/` and the like are whole names.
            of = source[0] if source and name.startswith("heldout/") else ""
            lines.setdefault(of, []).append(
                f"{metric if of else name.removeprefix('heldout/')} {_decimals(value, 4)}"
            )
        for of, figures in lines.items():
            self.note(f"held out at step {step}{f', {of}' if of else ''}  {'  '.join(figures)}")

    def note(self, text: str) -> None:
        if not self.quiet:
            self._say(printable(text))

    def warn(self, text: str) -> None:
        self.note(f"warning: {text}")

    def error(self, mistakes: Sequence[str]) -> None:
        """One line for each mistake, whatever text it quotes."""
        self.close()
        for mistake in mistakes:
            with contextlib.suppress(OSError):  # the exit code remains
                _write(self._err, f"error: {printable(mistake, keep='')}")

    def result(self, text: str) -> None:
        """The result of the command, on stdout."""
        self.stream(f"{text}\n")

    def stream(self, piece: str) -> None:
        """A piece of a result whose end is not known yet."""
        if not self.quiet:
            self.close()
            try:
                if self._out is None:
                    raise OSError(errno.EBADF, "it is closed")
                _write(self._out, printable(piece), end="")
            except BrokenPipeError:
                raise
            except OSError as error:
                raise UserError(_lost(error)) from error

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """The first column to the left, the others, which are numbers, to the right."""
        if self.quiet:
            return
        self.close()
        title, cells = printable(title, keep=""), _cells(columns, rows)
        if self._is_terminal:
            self._rich_table(title, cells)
        else:
            self._say(f"{title}\n{aligned(columns, rows)}")

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar[0].stop()
            self._bar = None
            atexit.unregister(self.close)

    def _say(self, text: str) -> None:
        if self._bar is None:
            try:
                _write(self._err, text)
            except BrokenPipeError:
                raise
            except (
                OSError
            ):  # say, a log on a full disk: the run goes on, and its directory records all of this
                pass
        else:  # above the bar, which stays
            self._bar[0].console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def _opened_bar(self, steps: int) -> tuple[Progress, TaskID]:
        if self._bar is None:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            columns = (
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.description}", markup=False),
            )
            # Without rich's own thread: the bar moves when a step is done, and the trainer keeps its core.
            progress = Progress(*columns, console=self._rich_console(), auto_refresh=False)
            self._bar = progress, progress.add_task("", total=steps)
            atexit.register(self.close)  # a traceback, too, must give the cursor back
            progress.start()
        return self._bar

    def _rich_table(self, title: str, cells: Sequence[Sequence[str]]) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(title), title_justify="left")
        for number, column in enumerate(cells[0]):
            table.add_column(Text(column), justify="right" if number else "left", overflow="fold")
        for row in cells[1:]:
            table.add_row(*map(Text, row))
        self._rich_console().print(table)

    def _rich_console(self) -> Console:
        if self._console is None:
            from rich.console import Console

            self._console = Console(file=self._err)
        return self._console


def aligned(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in plain text, the first column to the left and the others to the right."""
    cells = _cells(columns, rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *others in cells:
        numbers = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join(["", first.ljust(widths[0]), *numbers]).rstrip())
    return "\n".join(lines)


def _cells(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[list[str]]:
    return [[printable(cell, keep="") for cell in row] for row in (columns, *rows)]


def clock(seconds: float) -> str:
    """3:07, or 2:03:07; `?` while it is unknown."""
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(max(round(seconds), 0), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def size(num_bytes: float) -> str:
    """1.25 GiB; in MiB or KiB where that would be less than one."""
    for exponent, unit in ((30, "GiB"), (20, "MiB")):
        if num_bytes >= 2**exponent:
            return f"{num_bytes / 2**exponent:.2f} {unit}"
    return f"{num_bytes / 2**10:.1f} KiB"


def short(number: int) -> str:
    """102.7 M, 1.24 B."""
    if number >= 1e9:
        return f"{number / 1e9:.2f} B"
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number:,}"


def printable(text: str, keep: str = "\n\t") -> str:
    """The text with controls, directional marks, line separators and lone surrogates written as escapes."""
    hidden = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "".join(c if c in keep or unicodedata.category(c) not in hidden else repr(c)[1:-1] for c in text)


def reserve_streams() -> None:
    """Open the standard streams that the process was started without: else the first file it opens would take
    the number of one, and be written into.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one


def flush_streams() -> str:
    """Flush, and drop what cannot be written, so that the interpreter's shutdown does not fail on it.

    Returns:
        The error where results were lost, else an empty string.
    """
    lost = ""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError as error:
            if stream is sys.stdout and not isinstance(error, BrokenPipeError):
                lost = _lost(error)
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return lost


def _lost(error: OSError) -> str:
    return (
        f"stdout: the result cannot be written: {error.strerror}. Redirect it to a file that can be written."
    )


def _write(stream: TextIO | None, text: str, end: str = "\n") -> None:
    """Text, by default a line, in whatever encoding the stream has."""
    if stream is None:
        return
    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + end)
    stream.flush()
