"""Signals and deadlines: a run that is asked to stop stops whole, and a run that hangs says where.

Until `begin` there is nothing to save, and SIGTERM or SIGINT ends whatever is being done. After it they are
noted, and every long loop asks: `stopping` after a step, `poll` inside an evaluation. A second signal ends
the process at once. From the start on a thread waits for signs of life; where none comes within the recipe's
deadline, it hands the stacks of all threads to `on_stall`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Self

from potstill.errors import Stopped
from potstill.io.silence import restore_stderr
from potstill.recipe.sections_training import GuardConfig

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def cleaning() -> Iterator[None]:
    """SIGTERM raises Stopped inside, so that what is temporary is removed; a second one ends at once."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Stopped

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Watch:
    """A context: the process's handlers are ours inside it. `on_stall` gets a diagnosis and the stacks."""

    def __init__(self, guard: GuardConfig, on_stall: Callable[[str, str], None]) -> None:
        self.guard, self.on_stall = guard, on_stall
        self.stopping = False
        self._begun = False
        self._life = time.monotonic()
        self._field = "first_step_s"
        self._done = threading.Event()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere signals are not ours to take
            self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        self.beat()
        threading.Thread(target=self._wait, name="potstill-watch", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def begin(self) -> None:
        """From here on there is something to save."""
        self._begun = True
        self.beat()

    def beat(self) -> None:
        """A sign of life."""
        self._life = time.monotonic()

    def stepped(self) -> None:
        """A step is done: the deadline of the first one is past."""
        self.beat()
        self._field = "stall_s"

    def end(self) -> None:
        """Nothing is waited for any more: the receipt takes what it takes."""
        self._done.set()

    def poll(self) -> None:
        """A sign of life from a place where nothing would be lost by stopping."""
        self.beat()
        if self.stopping:
            raise Stopped

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stopping:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.stopping = True
        when = (
            "after this step; once more ends at once"
            if self._begun
            else "before the first step; nothing is lost"
        )
        # Not through the display: it may be what the signal interrupted, and streams are not reentrant.
        with contextlib.suppress(OSError):
            restore_stderr()
            os.write(2, f"{signal.Signals(number).name}: stopping {when}\n".encode())
        if not self._begun:
            raise Stopped

    def _wait(self) -> None:
        seen, silent_s = self._life, 0.0
        while True:
            limit = float(getattr(self.guard, self._field))
            tick = min(1.0, limit / 4)
            if self._done.wait(tick):
                return
            # Ticks are counted and not the clock: a process that was suspended was not silent meanwhile.
            silent_s = silent_s + tick if self._life == seen else 0.0
            seen = self._life
            if silent_s > limit:
                with tempfile.TemporaryFile("w+") as file:
                    faulthandler.dump_traceback(file, all_threads=True)
                    file.seek(0)
                    stacks = file.read()
                waited_for = (
                    "step and no batch of an evaluation" if self._begun else "sign of life at the start"
                )
                restore_stderr()
                self.on_stall(
                    f"no {waited_for} for {silent_s:.3g} s; guard.{self._field} is {limit:g}", stacks
                )
                return
