"""Signals and deadlines: a run that is asked to stop stops whole, and a run that hangs says where.

Until `begin` there is nothing to save, and SIGTERM or SIGINT ends whatever is being done. After it they are
noted, and every long loop asks: `stopping` after a step, `poll` inside an evaluation. A second signal ends
the process at once. From `begin` on a thread waits for signs of life; where none comes within the recipe's
deadline, it hands the stacks of all threads to `on_stall`.
"""

from __future__ import annotations

import faulthandler
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

from potstill.errors import Stopped
from potstill.recipe_sections import Guard

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Watch:
    """A context: the process's handlers are ours inside it. `on_stall` gets a diagnosis and the stacks."""

    def __init__(
        self, guard: Guard, tell: Callable[[str], None], on_stall: Callable[[str, str], None]
    ) -> None:
        self.guard, self.tell, self.on_stall = guard, tell, on_stall
        self.stopping = False
        self._begun = False
        self._life = time.monotonic()
        self._limit = guard.first_step_s
        self._done = threading.Event()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere signals are not ours to take
            self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def begin(self) -> None:
        """From here on there is something to save, and something to wait for."""
        self._begun = True
        self._life = time.monotonic()
        threading.Thread(target=self._wait, name="potstill-watch", daemon=True).start()

    def beat(self) -> None:
        """A sign of life."""
        self._life = time.monotonic()

    def stepped(self) -> None:
        """A step is done: the deadline of the first one is past."""
        self._limit = self.guard.stall_s
        self.beat()

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
        name = signal.Signals(number).name
        if not self._begun:
            self.tell(f"{name}: stopping before the first step; nothing is lost")
            raise Stopped
        self.tell(f"{name}: stopping after this step; once more ends at once")

    def _wait(self) -> None:
        while not self._done.wait(min(1.0, self._limit / 4)):
            silent_s = time.monotonic() - self._life
            if silent_s > self._limit:
                field = "first_step_s" if self._limit == self.guard.first_step_s else "stall_s"
                with tempfile.TemporaryFile("w+") as file:
                    faulthandler.dump_traceback(file, all_threads=True)
                    file.seek(0)
                    stacks = file.read()
                what = f"no step and no batch of an evaluation for {silent_s:.3g} s"
                self.on_stall(f"{what}; guard.{field} is {self._limit:g}", stacks)
                return
