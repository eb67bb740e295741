"""Steps in order, and their micro-batches on the device with the teacher's targets.

On CUDA the teacher works one micro-batch ahead of the student: copy and forward are queued on a stream of
their own, so that the device has them to fill the gaps of the student's kernels with, over the end of a step
too where the next step's rows are fixed. A teacher elsewhere is asked one micro-batch ahead by a thread, on any
device. Otherwise everything is computed at its turn on the CPU. Either way each step and each target is
requested once, in the same order, and the numbers are the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from potstill.errors import RankError, UserError
from potstill.training.distributed import Ranks
from potstill.training.step import Step
from potstill.types import Batch, Data, Targets, Teacher, answer

OnDevice = tuple[Batch, Targets | None]


@dataclass(frozen=True)
class _Queued:
    """A micro-batch whose targets were requested before its turn."""

    batch: Batch
    result: OnDevice | UserError | torch.OutOfMemoryError | Future[OnDevice]
    done: torch.cuda.Event | None


class Prefetch:
    """`is_taken` says whether the run takes a step: it has an end, and the guard leaves steps out.

    `is_ahead` is for tests: by default it is what the device says.
    """

    def __init__(
        self,
        teacher: Teacher | None,
        data: Data,
        ranks: Ranks,
        device: torch.device,
        is_taken: Callable[[int], bool],
        is_ahead: bool | None = None,
    ) -> None:
        self.teacher, self.data, self.ranks, self.device = teacher, data, ranks, device
        self.is_taken = is_taken
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        is_elsewhere = bool(getattr(teacher, "is_elsewhere", False))  # the loop asks little of a teacher
        self._thread = ThreadPoolExecutor(1, "potstill-teacher") if is_elsewhere else None
        self.is_ahead = device.type == "cuda" or is_elsewhere if is_ahead is None else is_ahead
        self._next_step: Step | None = None
        self._queued: _Queued | None = None

    def step(self, number: int) -> Step:
        """The step with its micro-batches, made now unless it was made ahead."""
        made, self._next_step = self._next_step, None
        if made is not None and made.number == number:
            return made
        return self._make(number)

    def with_targets(self, step: Step) -> Iterator[OnDevice]:
        """This rank's micro-batches of the step, on the device.

        Raises:
            UserError: the teacher failed; at the turn of the micro-batch that it failed on.
        """
        for number, batch in enumerate(step.share):
            current = self._take(batch, step.number)
            if self.is_ahead:
                # Queued before the student's kernels of `current`, which the caller queues after this yield.
                if number + 1 < len(step.share):
                    self._queued = self._queue(step.share[number + 1], step.number)
                elif self.data.fixed and self.is_taken(step.number + 1):
                    self._next_step = self._make(step.number + 1)
                    self._queued = self._queue(self._next_step.share[0], step.number + 1)
            yield current

    def _make(self, number: int) -> Step:
        return Step(number, self.data.step(number), self.ranks)

    def _take(self, batch: Batch, number: int) -> OnDevice:
        queued, self._queued = self._queued, None
        if queued is None or queued.batch is not batch:  # the guard may have chosen another step
            return self._to_device(batch, number)
        if queued.done is not None:
            # The student's stream waits; this thread does not.
            torch.cuda.current_stream(self.device).wait_event(queued.done)
        if isinstance(queued.result, Future):
            return queued.result.result()
        if isinstance(queued.result, Exception):
            raise queued.result
        return queued.result

    def _queue(self, batch: Batch, number: int) -> _Queued:
        if self._thread is not None:
            return _Queued(batch, self._thread.submit(self._to_device, batch, number), None)
        result: OnDevice | UserError | torch.OutOfMemoryError
        done = None
        with contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            if self.stream is not None:
                # Memory that is freed on this stream is given out again to this stream, while kernels of the
                # student's, which the allocator knows nothing of, may still be to read it. They were queued
                # before it was freed, so waiting for what is queued until now is enough.
                self.stream.wait_stream(torch.cuda.default_stream(self.device))
            try:
                result = self._to_device(batch, number)
            except (UserError, torch.OutOfMemoryError) as error:
                result = error  # the current micro-batch is sound: raised at the next one's turn
            if self.stream is not None:
                done = self.stream.record_event()
        return _Queued(batch, result, done)

    def _to_device(self, batch: Batch, number: int) -> OnDevice:
        on_device = batch.to(self.device)
        if self.teacher is None:
            return on_device, None
        read = batch if self.teacher.reads_on_cpu else on_device
        return on_device, checked_targets(self.teacher, read, number)


def checked_targets(teacher: Teacher, batch: Batch, number: int) -> Targets:
    """The teacher's targets, or the end of the run by name: never a step without them."""
    try:
        targets = answer(teacher, batch)
    except torch.OutOfMemoryError:
        raise  # it has advice of its own
    except (RuntimeError, ValueError, IndexError, TypeError, OSError) as error:
        raise RankError(
            f"step {number + 1}: the teacher failed on rows {batch.rows_B.tolist()}: {type(error).__name__}:"
            f" {error}"
        ) from error
    if len(targets) != len(batch.positions_N):
        raise RankError(
            f"step {number + 1}: the teacher gave targets for {len(targets)} positions, and the batch has"
            f" {len(batch.positions_N)}."
        )
    return targets
