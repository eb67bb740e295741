"""How fast models are on this machine, and what memory that takes: each in a process of its own, in turns.

All are loaded at once and only one computes at a time. Each round measures every model once, and begins with another
one: what the machine does beside it falls on all alike, so that their ratios are sound where their figures are not.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from potstill.errors import UserError, one_line

DEADLINE_S = 1800
"""Of an answer: to load a model, or for one measurement."""
SPREAD = "lowest, highest"
RATES: dict[str, Callable[[dict[str, Any]], float]] = {
    "prefill_tokens_per_s": lambda one: float(one["prefill_tokens"] / one["prefill_s"]),
    "decoding_tokens_per_s": lambda one: float(one["decoded_tokens"] / one["decoding_s"]),
    "first_token_s": lambda one: float(one["first_token_s"]),
}
"""Each figure of a measurement; a ratio is the student's to the teacher's."""
Json = dict[str, Any]
Note = Callable[[str], None]


@dataclass
class Model:
    """What a worker loads, and what it has answered."""

    kind: str
    """Of `speed_worker.KINDS`."""
    request: Mapping[str, Any]
    about: Json = field(default_factory=dict)
    measured: list[Json] = field(default_factory=list)
    memory: Json = field(default_factory=dict)
    why: str = ""
    """Why it was not measured."""

    def figures(self) -> Json | str:
        """Medians with spread and what they are of, or `not run: why`."""
        if self.why:
            return f"not run: {self.why}"
        rates = {name: spread([of(one) for one in self.measured]) for name, of in RATES.items()}
        return self.about | rates | {"repeats": len(self.measured), "measured": self.measured} | self.memory


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratios(student: Model, teacher: Model) -> dict[str, dict[str, float]]:
    """Of each figure, student to teacher within each round; empty where one of them was not measured."""
    rounds = list(zip(student.measured, teacher.measured, strict=True)) if _are_run(student, teacher) else []
    return {
        name: spread([of(of_student) / of(of_teacher) for of_student, of_teacher in rounds])
        for name, of in RATES.items()
        if rounds
    }


def _are_run(*models: Model) -> bool:
    return not any(model.why for model in models)


def measure(models: Sequence[Model], rounds: int, warm_up: bool = True) -> None:
    """Fill in `about`, `measured` and `memory` of each, or `why` of one that cannot be loaded or measured.

    Args:
        warm_up: a first measurement of each that is not counted: caches, threads and the clock of a processor settle.
    """
    with contextlib.ExitStack() as stack:
        workers: dict[int, _Worker] = {}
        for number, model in enumerate(models):
            with _reason_in(model):
                workers[number] = stack.enter_context(_worker(model))
                model.about = workers[number].answer()
        for turn in range(-int(warm_up), rounds):
            order = sorted(workers, key=lambda number: (number - turn) % len(models))
            for number in order:
                with _reason_in(models[number]):
                    one = workers[number].ask("measure")
                    models[number].measured += [one] if turn >= 0 else []
            workers = {number: worker for number, worker in workers.items() if not models[number].why}
        for number, worker in workers.items():
            with _reason_in(models[number]):
                models[number].memory = worker.ask("")


@contextlib.contextmanager
def _reason_in(model: Model) -> Iterator[None]:
    """A model that fails is not measured; the others are."""
    try:
        yield
    except UserError as error:
        model.why = error.mistakes[0]


@dataclass
class _Worker:
    kind: str
    process: subprocess.Popen[str]
    errors: Any

    def ask(self, line: str) -> Json:
        with contextlib.suppress(BrokenPipeError):  # it has ended, and why is in its errors
            assert self.process.stdin is not None
            print(line, file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self) -> Json:
        """The next line.

        Raises:
            UserError: the process has ended, or does not answer in time.
        """
        assert self.process.stdout is not None
        timer = threading.Timer(DEADLINE_S, self.process.kill)
        timer.start()
        try:
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
        if line:
            answer: Json = json.loads(line)
            return answer
        self.process.wait()
        self.errors.seek(0)
        last = (self.errors.read().strip().splitlines() or [f"no answer within {DEADLINE_S} s"])[-1]
        raise UserError(f"{self.kind}: {one_line(RuntimeError(last))}")


@contextlib.contextmanager
def _worker(model: Model) -> Iterator[_Worker]:
    command = [sys.executable, "-P", "-m", "potstill.evals.speed_worker", model.kind]
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, encoding="utf-8", stdin=pipe, stdout=pipe, stderr=errors)
        try:
            worker = _Worker(model.kind, process, errors)
            with contextlib.suppress(BrokenPipeError):
                assert process.stdin is not None
                print(json.dumps(model.request), file=process.stdin, flush=True)
            yield worker
        finally:
            process.kill()
            process.communicate()
