"""Micro-batches on their device with the teacher's targets, the teacher one micro-batch ahead of the student.

On CUDA the copy and the teacher's forward are queued on a stream of their own before the student's step is:
while the student trains on one micro-batch, the device has the next one's targets to fill its gaps with, over
the end of a step too. On the CPU each is asked for in its turn. Either way every micro-batch is asked for
once, in order, and the numbers are the same. The loop iterates over it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from potstill.errors import OfOneRank, UserError
from potstill.types import Batch, Targets, Teacher


@dataclass(frozen=True)
class _Asked:
    """What was asked for before its turn."""

    rows: list[int]
    step: int
    found: tuple[Batch, Targets | None] | Exception
    done: torch.cuda.Event | None


class Prefetch:
    """`first_of` gives the first micro-batch of a step, None where no step follows.

    `is_ahead` is for tests: by default it is what the device says.
    """

    def __init__(
        self,
        teacher: Teacher | None,
        device: torch.device,
        first_of: Callable[[int], Batch | None],
        is_ahead: bool | None = None,
    ) -> None:
        self.teacher, self.device, self.first_of = teacher, device, first_of
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.is_ahead = device.type == "cuda" if is_ahead is None else is_ahead
        self._next: _Asked | None = None

    def step(self, step: int, batches: Sequence[Batch]) -> Iterator[tuple[Batch, Targets | None]]:
        """The micro-batches of a step, which are on the CPU, on the device.

        Raises:
            UserError: the teacher failed; at the turn of the micro-batch that it failed on.
        """
        for number, batch in enumerate(batches):
            taken = self._take(batch, step)
            if self.is_ahead:
                is_last = number + 1 == len(batches)
                following = self.first_of(step + 1) if is_last else batches[number + 1]
                self._next = None if following is None else self._ask_ahead(following, step + is_last)
            yield taken

    def _take(self, batch: Batch, step: int) -> tuple[Batch, Targets | None]:
        asked, self._next = self._next, None
        if asked is None or (asked.rows, asked.step) != (batch.rows_B.tolist(), step):
            return self._ask(batch, step)  # the first of a run, or the guard chose another step
        if asked.done is not None:
            torch.cuda.current_stream(self.device).wait_event(asked.done)
        if isinstance(asked.found, Exception):
            raise asked.found
        return asked.found

    def _ask_ahead(self, batch: Batch, step: int) -> _Asked:
        found: tuple[Batch, Targets | None] | Exception
        done = None
        with contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            if self.stream is not None:
                # What is freed on this stream may be read on the student's, which does not tell the
                # allocator. It was freed before now, so it is read before what was queued until now is done.
                self.stream.wait_stream(torch.cuda.default_stream(self.device))
            try:
                found = self._ask(batch, step)
            except (UserError, torch.OutOfMemoryError) as error:
                found = error
            if self.stream is not None:
                done = self.stream.record_event()
        return _Asked(batch.rows_B.tolist(), step, found, done)

    def _ask(self, batch: Batch, step: int) -> tuple[Batch, Targets | None]:
        on_device = batch.to(self.device)
        if self.teacher is None:
            return on_device, None
        is_read = getattr(self.teacher, "reads_on_the_cpu", False)
        return on_device, ask(self.teacher, batch if is_read else on_device, step)


def ask(teacher: Teacher, batch: Batch, step: int) -> Targets:
    """The teacher's targets, or the end of the run with a name: never a step without them."""
    try:
        targets = teacher.targets(batch)
    except torch.OutOfMemoryError:
        raise  # it has advice of its own
    except (RuntimeError, ValueError, IndexError, TypeError, OSError) as error:
        raise OfOneRank(
            f"step {step + 1}: the teacher failed on rows {batch.rows_B.tolist()}: {type(error).__name__}:"
            f" {error}"
        ) from error
    if len(targets) != len(batch.positions_N):
        raise OfOneRank(
            f"step {step + 1}: the teacher gave targets for {len(targets)} positions,"
            f" {len(batch.positions_N)} were asked."
        )
    return targets
