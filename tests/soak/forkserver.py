"""Starts of potstill by fork: importing torch once, not once a start, is what makes hundreds of kills possible.

Run as a program, this is a process of one thread that has imported everything, and forks a child for each
order it reads, or as many ranks of one run as it asks for. `ForkServer` is the other end. An order may also put
instruments into the child: they count its file-system calls, end it at one of them, or send a signal from inside
a named function.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import io
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEFORE = {
    "tokenizer": "transformers:AutoTokenizer.from_pretrained",  # while stderr is kept quiet
    "corpus": "potstill.data.packing:pack",
    "loading": "potstill.models.causal_lm:CausalLM.probe",
    "check": "potstill.workflows.distill:require_sound",
}
PHASES = BEFORE | {
    "order": "potstill.data.fixed:Order.rows",
    "teacher": "potstill.teachers.hf:TorchTeacher.targets",
    "forward": "potstill.models.student:Student.forward",
    "backward": "torch:Tensor.backward",
    "evaluation": "potstill.models.student:Student.measure",
    "log": "potstill.runs.run_dir:RunDir.log",
    "student": "potstill.runs.run_dir:RunDir.replace_student",
    "tensors": "safetensors.torch:serialize_file",
    "flush": "potstill.training.checkpoint:flush",
    "prune": "shutil:rmtree",
    "receipt": "potstill.runs.run_dir:RunDir.write_receipt",
}
"""Where in a run a signal can be aimed at; all but those of BEFORE count from the loop's begin on."""
OF_ROLLOUTS = {
    "rollout": "potstill.training.rollouts:Rollouts._write",
    "token": "potstill.models.decoding:choose",
    "kept": "potstill.training.rollouts:Rollouts._keep",
}
"""The same, of a run whose rows the student writes."""

begun: list[bool] = []
"""Not empty in a child whose loop has begun."""
LIMIT_S = 300  # no start takes this long; one that does is ended and fails its test


@dataclass(frozen=True)
class End:
    """How a start ended."""

    code: int
    """Exit code, or minus the signal."""
    seconds: float
    told: str
    """All of stderr."""


class ForkServer:
    """The other end: one order at a time."""

    def __init__(self, folder: Path) -> None:
        self.told = folder / "told.txt"
        threads = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        environment = os.environ | threads | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        environment["CUDA_VISIBLE_DEVICES"] = ""  # a process that has looked for devices cannot fork
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def start(
        self, arguments: list[str], *, after_s: float | None = None, number: int = signal.SIGKILL, **play: Any
    ) -> End:
        """Run potstill in a child to its end; `after_s` sends it the signal `number` from outside."""
        return self._order(arguments=arguments, after_s=after_s, number=number, play=play)

    def prepare(self, arguments: list[str]) -> None:
        """Run potstill in the server itself: what libraries do at a first call, no child does again."""
        end = self._order(arguments=arguments, is_here=True)
        assert end.code == 0, end.told

    def ranks(self, world: int, *arguments: object) -> None:
        """Run potstill in `world` children, each with the environment that torchrun gives a rank."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        of_all = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
        each = [of_all | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
        end = self._order(arguments=list(map(str, arguments)), ranks=each)
        assert end.code == 0, end.told

    def _order(self, **order: Any) -> End:
        assert self.process.stdin is not None and self.process.stdout is not None
        order = {"told": str(self.told), "after_s": None, "number": signal.SIGKILL, "play": {}} | order
        self.process.stdin.write(json.dumps(order, default=str) + "\n")
        self.process.stdin.flush()
        found = json.loads(self.process.stdout.readline())
        return End(**found, told=self.told.read_text())

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


class FileSystemCalls:
    """Every call of this process that changes something in a folder, in order: each is an instant to die at.

    Python reports such calls before they happen, and lets a hook refuse them. The safetensors library writes
    without Python, so its one function is counted as a call.
    """

    def __init__(self, play: dict[str, Any]) -> None:
        self.folder = play["watch"]
        self.play = play
        self.seen: list[str] = []
        self.written: str | None = None
        self.before = 0
        import safetensors.torch

        serialize = safetensors.torch.serialize_file

        def serialize_file(tensors: Any, filename: Any, *rest: Any, **more: Any) -> Any:
            self.happens("tensors", os.fspath(filename), is_write=True)
            return serialize(tensors, filename, *rest, **more)

        safetensors.torch.serialize_file = serialize_file
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            # A file without a name, by which filelock finds out what the file system can do, changes nothing.
            is_nameless = flags & os.O_TMPFILE == os.O_TMPFILE
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and self.is_ours(path) and not is_nameless:
                self.happens("open", os.fspath(path), is_write=True)
        elif event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            # What is removed with a whole tree is named relative to an open folder.
            within = event in ("os.remove", "os.rmdir") and arguments[-1] not in (-1, None)
            # Python makes parents, and folders that may be there, by trying.
            is_vain = event == "os.mkdir" and (
                os.path.exists(arguments[0]) or not os.path.exists(os.path.dirname(arguments[0]))
            )
            if within or (self.is_ours(arguments[0]) and not is_vain):
                self.happens(event, os.fspath(arguments[0]), is_write=False)

    def is_ours(self, path: Any) -> bool:
        return not isinstance(path, int) and os.fsdecode(path).startswith(self.folder)

    def happens(self, what: str, path: str, *, is_write: bool) -> None:
        self.seen.append(f"{what} {path.removeprefix(self.folder)}")
        if len(self.seen) == self.play.get("die_at"):
            if self.written is not None and os.path.exists(self.written):
                self.tear(self.written)
            os.kill(os.getpid(), signal.SIGKILL)
        if len(self.seen) == self.play.get("full_at"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        self.written = path if is_write else None
        self.before = os.path.getsize(path) if is_write and os.path.exists(path) else 0

    def tear(self, path: str) -> None:
        """What was being written when the next call came, cut somewhere: as if the end had come earlier."""
        if (torn := self.play.get("torn")) is not None:
            size = os.path.getsize(path)
            kept = self.before if self.before <= size else 0
            os.truncate(path, kept + int((size - kept) * torn))


def note_begin() -> None:
    from potstill.workflows import distill

    train = distill.train

    def noted(*arguments: Any) -> Any:
        begun.append(True)
        return train(*arguments)

    distill.train = noted


def on_call(name: str, act: Any) -> None:
    """Have `act(number of this call)` run each time the function is entered: the check before a run uses some
    of the same ones, and is not counted.
    """
    module, _, path = (PHASES | OF_ROLLOUTS)[name].partition(":")
    *owners, attribute = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    function = getattr(owner, attribute)
    calls = Counter[str]()

    @functools.wraps(function)
    def instrumented(*arguments: Any, **more: Any) -> Any:
        if name in BEFORE or begun:
            calls[name] += 1
            act(calls[name])
        return function(*arguments, **more)

    setattr(owner, attribute, instrumented)


def record_rows(path: str) -> None:
    """Append `[process, step, rows]` for each micro-batch of training rows that the loop asks for."""
    from potstill.data.fixed import Order
    from potstill.data.packing import PackedRows

    rows, batch = Order.rows, PackedRows.batch
    order: dict[str, int] = {}

    def recording_rows(self: Any, step: int, rows_per_step: int) -> list[int]:
        order.update(step=step, num_rows=self.num_rows)
        return rows(self, step, rows_per_step)

    def recording_batch(self: Any, rows_B: Any) -> Any:
        if begun and len(self) == order.get("num_rows"):
            with open(path, "a") as file:
                file.write(json.dumps([os.getpid(), order["step"], list(rows_B)]) + "\n")
        return batch(self, rows_B)

    Order.rows, PackedRows.batch = recording_rows, recording_batch


def limit_file_size_in_save(num_bytes: int) -> None:
    """From the first checkpoint on, no file may grow past a size: what a full disk is to a library."""
    from potstill.training.checkpoint import Checkpoints

    save = Checkpoints.save

    def starved(self: Any, *arguments: Any) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
        try:
            save(self, *arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    Checkpoints.save = starved


def child(order: dict[str, Any]) -> int:
    from potstill.cli.main import main

    play = order["play"]
    note_begin()
    calls = FileSystemCalls(play) if "watch" in play else None
    counts = Counter[str]()
    for name in (PHASES | OF_ROLLOUTS) if "counts" in play else ():
        on_call(name, lambda number, name=name: counts.update({name: 1}))
    if "aim" in play:
        name, nth, number = play["aim"]
        last = nth + play.get("times", 1) - 1
        on_call(name, lambda call: signal.raise_signal(number) if nth <= call <= last else None)
    if "slow" in play:
        name, seconds = play["slow"]
        on_call(name, lambda call: time.sleep(seconds))
    if "rows" in play:
        record_rows(play["rows"])
    if "limit" in play:
        limit_file_size_in_save(play["limit"])
    code = main(order["arguments"])
    if calls is not None and "calls" in play:
        Path(play["calls"]).write_text(json.dumps(calls.seen))
    if "counts" in play:
        Path(play["counts"]).write_text(json.dumps(counts))
    return code


def fork(order: dict[str, Any], **environment: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        # Before any thread begins: see `mend_threads` in tests/warm.py.
        sys.modules["torch"].set_num_threads(1)
        os.environ.update(environment)
        told = os.open(order["told"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(told, 2)
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 1)
        os.dup2(nothing, 0)
        code = child(order)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def watch(pid: int, after_s: float | None, number: int) -> dict[str, float]:
    started, signalled = time.perf_counter(), False
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        now = time.perf_counter()
        if ended:
            return {"code": os.waitstatus_to_exitcode(status), "seconds": now - started}
        if after_s is not None and not signalled and now - started >= after_s:
            os.kill(pid, number)
            signalled = True
        if now - started > LIMIT_S:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.0005)


def run(order: dict[str, Any]) -> dict[str, float]:
    """How it ended; of several ranks, the worst code."""
    with open(order["told"], "w") as told:
        if order.get("is_here"):
            from potstill.cli.main import main
            from potstill.data import tokenizers

            with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
                code = main(order["arguments"])
            tokenizers._read.cache_clear()  # each child reads its own, as a process does
            return {"code": code, "seconds": 0}
    pids = [fork(order, **environment) for environment in order.get("ranks", [{}])]
    ends = [watch(pid, order["after_s"], order["number"]) for pid in pids]
    return max(ends, key=lambda end: abs(end["code"]))


def serve() -> None:
    import torch

    for name in ("gpt2.modeling_gpt2", "llama.modeling_llama"):
        importlib.import_module(f"transformers.models.{name}")
    importlib.import_module("potstill.workflows.distill")

    torch.set_num_threads(1)
    os.fsync = os.fstat  # type: ignore[assignment]  # as in conftest.py
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
    os._exit(0)  # torch takes seconds to say goodbye


if __name__ == "__main__":
    serve()
