"""What samples rollouts: the student itself, or a vLLM engine in a process of its own."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from potstill.data.completions import Completion, CompletionRows
from potstill.data.prompts import Prompt
from potstill.errors import UserError, one_line
from potstill.models.student import Student
from potstill.recipe.sections_rollouts import RolloutsConfig
from potstill.training.sampling import write

MEMORY = Path("/dev/shm")
"""A file system in memory, where there is one."""
ROWS_PER_BATCH = 8
LOOK_S = 60
END_S = 10
"""For a worker to end in."""


class Engine(Protocol):
    is_other: bool
    """Whether its numbers are not the trainer's own, so that the gap between the two is to be measured."""

    def write(
        self, student: Student, prompts: Sequence[tuple[str, Prompt]], seed: int, beat: Callable[[], None]
    ) -> list[Completion]:
        """Completions by the student's weights of now."""
        ...


class OwnEngine:
    """The student decodes by itself."""

    is_other = False

    def __init__(self, config: RolloutsConfig, ends: frozenset[int]) -> None:
        self.config, self.ends = config, ends

    def write(
        self, student: Student, prompts: Sequence[tuple[str, Prompt]], seed: int, beat: Callable[[], None]
    ) -> list[Completion]:
        return write(student.decode, prompts, self.config, self.ends, seed, beat)


class VllmEngine:
    """vLLM in a process of its own, by a Python that has it. The weights are handed over before each sampling, as a
    folder on a file system in memory.
    """

    is_other = True

    def __init__(self, config: RolloutsConfig, ends: frozenset[int], tokens: int) -> None:
        self.config, self.ends, self.tokens = config, ends, tokens
        self.python = config.vllm_python or sys.executable
        self.place = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
        weakref.finalize(self, shutil.rmtree, self.place, ignore_errors=True)
        self.log = self.place / "vllm.log"
        self.process: subprocess.Popen[str] | None = None

    def write(
        self, student: Student, prompts: Sequence[tuple[str, Prompt]], seed: int, beat: Callable[[], None]
    ) -> list[Completion]:
        if not prompts:
            return []
        beat()
        folder = self._hand_over(student)
        if self.process is None:
            self._start(student, folder, len(prompts))
            beat()
        found = self._ask(
            {
                "names": [name for name, _ in prompts],
                "prompts": [prompt.ids for _, prompt in prompts],
                "ends": sorted(self.ends),
                "known": student.model.known,
                "seed": seed,
                "temperature": self.config.temperature,
                "top_p": self.config.top_p,
                "top_k": self.config.top_k,
                "max_new_tokens": self.config.max_new_tokens,
            }
        )
        beat()
        written = zip(prompts, found["new"], found["logps"], strict=True)
        return [
            Completion(prompt, new, logps, bool(new) and new[-1] in self.ends)
            for (_, prompt), new, logps in written
        ]

    def _hand_over(self, student: Student) -> Path:
        folder, fresh = self.place / "student", self.place / "fresh"
        student.save(fresh, None)
        if folder.exists():
            shutil.rmtree(folder)
        fresh.rename(folder)
        return folder

    def _start(self, student: Student, folder: Path, rows: int) -> None:
        worker = Path(__file__).with_name("vllm_worker.py")
        with self.log.open("w") as log:
            try:
                self.process = subprocess.Popen(
                    [self.python, str(worker)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    cwd=self.place,
                )
            except OSError as error:
                raise _not_startable(self.python, str(error.strerror)) from error
        weakref.finalize(self, _end, self.process)
        dtype = "float32" if student.autocast is None else str(student.autocast).removeprefix("torch.")
        ready = self._ask({"folder": str(folder), "dtype": dtype, "tokens": self.tokens, "rows": rows})
        if "missing" in ready:
            raise _without_vllm(self.python, ready["missing"])

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self.process is not None and self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise UserError(
                f"rollouts.engine: the vLLM process has ended: {self._last_words()} Start the same command again with"
                " --resume: it goes on from the last checkpoint."
            )
        return dict(json.loads(line))

    def _last_words(self) -> str:
        """The last line of its log that says what was wrong."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines()]
        return f"{next((line for line in reversed(lines) if 'Error' in line), 'it says no error.'):.300}"


def _end(process: subprocess.Popen[str]) -> None:
    """A worker ends when its stdin does; one that hangs is killed."""
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with contextlib.suppress(OSError):
            pipe.close()
    try:
        process.wait(timeout=END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def require(config: RolloutsConfig) -> None:
    """UserError before a run whose engine is not installed; vLLM is looked for and not imported."""
    if config.engine != "vllm":
        return
    python = config.vllm_python or sys.executable
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        found = subprocess.run([python, "-c", look], capture_output=True, timeout=LOOK_S).returncode == 0
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _not_startable(python, one_line(error)) from error
    if not found:
        raise _without_vllm(python, "No module named 'vllm'")


def _not_startable(python: str, why: str) -> UserError:
    return UserError(
        f"rollouts.vllm_python: {python}: cannot be started: {why}. Name the Python of an environment that has vLLM."
    )


def _without_vllm(python: str, why: str) -> UserError:
    return UserError(
        f"rollouts.engine: vllm: {python} has no vLLM ({why}). Set rollouts.vllm_python to the Python of an environment"
        " that has it, or rollouts.engine: transformers."
    )


def engine_of(config: RolloutsConfig, ends: frozenset[int], tokens: int) -> Engine:
    return OwnEngine(config, ends) if config.engine == "transformers" else VllmEngine(config, ends, tokens)


@torch.no_grad()
def gap(student: Student, written: Sequence[Completion], beat: Callable[[], None]) -> float:
    """Mean absolute difference, in nats, between the engine's log-probabilities of what it wrote and the trainer's."""
    was_training = student.training
    student.eval()
    rows, total, count = CompletionRows(written), 0.0, 0
    try:
        for start in range(0, len(rows), ROWS_PER_BATCH):
            beat()
            batch = rows.batch(range(start, min(start + ROWS_PER_BATCH, len(rows)))).to(student.model.device)
            logps = [p for each in written[start : start + ROWS_PER_BATCH] for p in each.logps]
            for part, logits_CV in student.logits(batch):
                own_C = logits_CV.log_softmax(-1).gather(-1, batch.labels_N[part, None])[:, 0]
                theirs_C = own_C.new_tensor(logps[part])
                total += float((own_C - theirs_C).abs().sum())
                count += len(own_C)
    finally:
        student.train(was_training)
    return total / max(count, 1)
