"""One untrusted program, judged by a trusted test: `Sandbox().judge(...)` gives a verdict.

The test runs in a process of ours (`sandbox_judge.py`); the program runs alone in another (`sandbox_inmate.py`),
shut in by the kernel, and answers calls with plain literals over one pipe (`sandbox_wire.py`). An exit code is no
verdict: only the trusted side says `passed`, after the last check. Two tiers, tried in this order:

    bubblewrap   namespaces of its own (user, process, network, mount ...), then Landlock and seccomp inside
    landlock     Landlock and seccomp alone, where namespaces are refused

In both the program reads a copy of Python's standard library and the C library, writes no file, opens no socket,
starts no process and signals none; `docs/sandbox.md` says what is not contained. Standard library only, and
nothing of potstill beside its own three files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from potstill.evals.sandbox_inmate import ARCH

TIERS = ("bubblewrap", "landlock")
UIDS = (1_900_000_000, 2_000_000_000)
"""Nobody's: each program run as root is another user, so that none can count or signal another's processes."""
NOT_STAGED = ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "tkinter", "turtledemo",
              "ensurepip", "pydoc_data", "config-*", "_test*.so")  # fmt: skip
WALL_FLOOR_S = 10.0
HERE = Path(__file__).parent


class SandboxRefused(Exception):
    """No tier shuts a program in on this machine: nothing was run."""


@dataclass(frozen=True)
class Limits:
    """Of the program, per process."""

    memory_bytes: int = 1 << 30
    """Address space, the interpreter's own 30 MiB included."""
    processes: int = 32
    """Threads, that is: no process can be started at all."""
    files: int = 64


@dataclass(frozen=True)
class Verdict:
    status: str
    """`passed`; `failed`: an assertion is false; `error`: it raised, or answered what is no plain literal;
    `timeout`; `died`: it ended early, said more than it was asked, or met a limit."""
    detail: str
    """Printable, 500 characters at most."""
    cpu_s: float
    """Processor time of the program."""

    @property
    def passed(self) -> bool:
        return self.status == "passed"


class Sandbox:
    """A context, or closed by `close`. `judge` may be called from several threads.

    Args:
        tier: one of TIERS; None takes the first that a live probe finds shut.

    Raises:
        SandboxRefused: no tier, or not the one asked for, works here.
    """

    def __init__(self, tier: str | None = None, limits: Limits = Limits()) -> None:  # noqa: B008
        if tier is not None and tier not in TIERS:
            raise ValueError(f"tier: {tier} is not one of {', '.join(TIERS)}")
        self.limits = limits
        self._stage = Path(tempfile.mkdtemp(prefix="potstill-sandbox-"))
        try:
            self._python = _stage_python(self._stage)
            self.tier, self._start_s = self._first_that_holds(TIERS if tier is None else (tier,))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        shutil.rmtree(self._stage, ignore_errors=True)

    def judge(self, *, source: str, entry_point: str, helpers: str, test: str, cpu_s: float) -> Verdict:
        """Run `check(candidate)` of the test, where candidate is `entry_point` of the untrusted source.

        Args:
            source: untrusted; executed in the sandbox.
            helpers: trusted; executed with the test, beside it.
            test: trusted; defines `check`.
            cpu_s: processor time the program may use after Python has started, in seconds.
        """
        limits = {
            "RLIMIT_AS": self.limits.memory_bytes,
            "RLIMIT_CPU": int(cpu_s + self._start_s) + 1,
            "RLIMIT_FSIZE": 0,
            "RLIMIT_NOFILE": self.limits.files,
            "RLIMIT_CORE": 0,
        }
        if os.getuid() == 0 or self.tier == "bubblewrap":  # else the user's own processes would count
            limits["RLIMIT_NPROC"] = self.limits.processes
        inmate = {
            "limits": limits,
            "readable": ["/"] if self.tier == "bubblewrap" else self._readable(),
            "source": source,
            "entry_point": entry_point,
        }
        spec = {"helpers": helpers, "test": test, "inmate": inmate, "cpu_s": int(cpu_s) + 30}
        status, detail, used_s = self._run(spec, WALL_FLOOR_S + 4 * cpu_s)
        used_s = max(used_s - self._start_s, 0.0)
        if used_s > cpu_s:
            status, detail = "timeout", f"{used_s:.1f} s of processor time, {cpu_s:.1f} s were allowed"
        return Verdict(status, _printable(detail), used_s)

    def canaries(self) -> list[tuple[str, str, bool]]:
        """Live probes of what must not be possible: name, what was found, and whether that is as it should be."""
        return [self._probe(*canary) for canary in CANARIES]

    def _probe(self, name: str, body: str, wanted: str) -> tuple[str, str, bool]:
        source = "def probe():\n" + "".join(f"    {line}\n" for line in body.splitlines())
        test = "def check(candidate):\n    found = candidate()\n    raise ValueError(found)\n"
        found = self.judge(source=source, entry_point="probe", helpers="", test=test, cpu_s=3.0)
        said = f"{found.status}: {found.detail}"
        return name, said, wanted in said

    def _first_that_holds(self, tiers: tuple[str, ...]) -> tuple[str, float]:
        """The tier, and the processor time in which a program that does nothing ends."""
        why = []
        for self.tier in tiers:
            self._start_s = 0.0
            if missing := _missing(self.tier):
                why.append(f"{self.tier}: {missing}")
                continue
            sound = [self.judge(**SOUND, cpu_s=5.0) for _ in range(3)]
            if bad := [verdict for verdict in sound if not verdict.passed]:
                why.append(f"{self.tier}: {self._complaint() or bad[0].detail}")
                continue
            self._start_s = min(verdict.cpu_s for verdict in sound)
            if doors := [f"{name}: {found}" for name, found, shut in self.canaries() if not shut]:
                why.append(f"{self.tier}: {doors[0]}")
                continue
            return self.tier, self._start_s
        raise SandboxRefused(f"sandbox: {'; '.join(why)}. Nothing was run. See docs/sandbox.md.")

    def _complaint(self) -> str:
        """What the tier's own program says when it cannot start."""
        command = self._command(["-c", ""], None)
        done = subprocess.run(command, capture_output=True, text=True, env={}, **self._identity())
        return " ".join(done.stderr.split())[-200:]

    def _identity(self) -> dict[str, Any]:
        if os.getuid() != 0:
            return {}
        uid = random.SystemRandom().randrange(*UIDS)
        return {"user": uid, "group": uid, "extra_groups": []}

    def _command(self, python: list[str], info: int | None) -> list[str]:
        root = Path("/python") if self.tier == "bubblewrap" else self._stage
        interpreter = root / "bin" / "python3"
        plain = [_loader(), "--library-path", str(root / "lib"), str(interpreter), "-I", "-S", "-B"]
        command = [*plain, "-X", "utf8", *python]
        if self.tier == "landlock":
            return command
        # fmt: off
        return [
            shutil.which("bwrap") or "bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--new-session",
            "--die-with-parent", "--clearenv", "--cap-drop", "ALL", "--as-pid-1", "--hostname", "sandbox",
            "--ro-bind", str(self._stage), str(root),
            *(word for place in LIBRARIES for word in ("--ro-bind-try", place, place)),
            "--chdir", "/", "--remount-ro", "/", *([] if info is None else ["--info-fd", str(info)]), "--", *command,
        ]
        # fmt: on

    def _run(self, spec: dict[str, Any], wall_s: float) -> tuple[str, str, float]:
        """Status, detail, and processor seconds of the program, all of whose processes are gone."""
        with contextlib.ExitStack() as ends:
            requests, request_end = _pipe(ends)
            answer_end, answers = _pipe(ends)
            command = [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", JUDGE, str(request_end.fileno())]
            judge = subprocess.Popen(
                [*command, str(answer_end.fileno())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=(request_end.fileno(), answer_end.fileno()),
                env={},
            )
            request_end.close()
            answer_end.close()
            inmate = None
            try:
                inmate = _Inmate(self._command, self._identity(), requests, answers)
                requests.close()
                answers.close()
                said, in_time = _listen(judge, spec, wall_s, inmate)
            finally:
                judge.kill()
                judge.communicate()
                used_s = 0.0 if inmate is None else inmate.end()
        if not in_time:
            return "timeout", f"no verdict after {wall_s:.0f} s", used_s
        if not said:
            return "error", "the test itself ran out of time or memory", used_s
        verdict = json.loads(said)
        return verdict["status"], verdict["detail"], used_s

    def _readable(self) -> list[str]:
        return [str(self._stage), *LIBRARIES]


class _Inmate:
    """The process of the untrusted program, with everything it is wrapped in."""

    def __init__(self, command: Any, identity: dict[str, Any], requests: Any, answers: Any) -> None:
        with contextlib.ExitStack() as ends:
            told, info = _pipe(ends)
            self.process = subprocess.Popen(
                command(["-c", INMATE], info.fileno()),
                stdin=requests,
                stdout=answers,
                stderr=subprocess.DEVNULL,
                pass_fds=(info.fileno(),) if command([], 0)[0] != _loader() else (),
                env={},
                start_new_session=True,
                **identity,
            )
            info.close()
            self.first = -1  # the first process of bubblewrap's namespace: all others end with it
            text = told.read()
            with contextlib.suppress(ValueError, KeyError, ProcessLookupError):
                self.first = os.pidfd_open(json.loads(text)["child-pid"])

    def end(self) -> float:
        """Kill what is left and wait for it; processor seconds of all of it."""
        if self.first >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.first, signal.SIGKILL)
            os.close(self.first)
        else:
            os.kill(self.process.pid, signal.SIGKILL)  # not reaped before, so that it is nobody else's number
        _, status, used = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        return used.ru_utime + used.ru_stime


def _listen(
    judge: subprocess.Popen[bytes], spec: dict[str, Any], wall_s: float, inmate: _Inmate
) -> tuple[bytes, bool]:
    """The judge's words, and whether they came in time."""
    try:
        return judge.communicate(json.dumps(spec).encode(), timeout=wall_s)[0], True
    except subprocess.TimeoutExpired:
        return b"", False


def _pipe(ends: contextlib.ExitStack) -> tuple[Any, Any]:
    reading, writing = os.pipe()
    return (
        ends.enter_context(os.fdopen(reading, "rb", buffering=0)),
        ends.enter_context(os.fdopen(writing, "wb", buffering=0)),
    )


def _missing(tier: str) -> str:
    if sys.platform != "linux" or platform.machine() not in ARCH:
        return f"not on {sys.platform} {platform.machine()}"
    if tier == "bubblewrap" and shutil.which("bwrap") is None:
        return "bwrap is not installed"
    return ""


def _loader() -> str:
    """The dynamic loader of this process: it finds a copied interpreter's library without an environment."""
    maps = Path("/proc/self/maps").read_text().split()
    return next(word for word in maps if word.startswith("/") and os.path.basename(word).startswith("ld-"))


def _stage_python(stage: Path) -> Path:
    """A copy of the interpreter and its standard library that any user can read, without installed packages:
    the published solutions are one of those.
    """
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (stage / "bin").mkdir()
    shutil.copy2(os.path.realpath(sys.executable), stage / "bin" / "python3")
    ignore = shutil.ignore_patterns(*NOT_STAGED)
    shutil.copytree(sysconfig.get_path("stdlib"), stage / "lib" / version, ignore=ignore)
    library = Path(sysconfig.get_config_var("LIBDIR") or "") / (sysconfig.get_config_var("INSTSONAME") or "")
    if library.is_file() and library.name:
        shutil.copy2(library, stage / "lib")
    os.chmod(stage, 0o755)
    return stage / "bin" / "python3"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:500])[:500]


def _as_program(name: str) -> str:
    """A file of ours as a text for `python -c`: it imports what it shares from memory."""
    wire = (HERE / "sandbox_wire.py").read_text()
    return (
        "import sys, types\n"
        "wire = sys.modules['potstill.evals.sandbox_wire'] = types.ModuleType('potstill.evals.sandbox_wire')\n"
        f"exec(compile({wire!r}, 'sandbox_wire', 'exec'), wire.__dict__)\n"
        f"exec(compile({(HERE / name).read_text()!r}, {name!r}, 'exec'), {{'__name__': '__main__'}})\n"
    )


JUDGE, INMATE = _as_program("sandbox_judge.py"), _as_program("sandbox_inmate.py")
MULTIARCH = sysconfig.get_config_var("MULTIARCH") or f"{platform.machine()}-linux-gnu"
LIBRARIES = [f"/usr/lib/{MULTIARCH}", f"/lib/{MULTIARCH}", "/lib64", "/usr/lib64", "/etc/ld.so.cache"]
SOUND = {
    "source": "def double(x):\n    return 2 * x\n",
    "entry_point": "double",
    "helpers": "",
    "test": "def check(candidate):\n    assert candidate(21) == 42\n",
}


def _refused(action: str) -> str:
    return f"try:\n    {action}\n    return 'done'\nexcept (OSError, MemoryError) as error:\n    return f'refused: {{error!r}}'"


OPEN_FILES = """import os
found = []
for number in range(64):
    try:
        os.fstat(number)
        found.append(number)
    except OSError:
        pass
return f'{found}'"""
CANARIES = (
    ("network", "import socket\n" + _refused("socket.socket()"), "refused"),
    ("writing a file", _refused("open('/tmp/canary', 'w')"), "refused"),
    ("reading a file", _refused("open('/etc/passwd').read()"), "refused"),
    ("starting a process", "import os\n" + _refused("os.fork() or os._exit(0)"), "refused"),
    ("running a program", "import os\n" + _refused("os.execv('/bin/true', ['true'])"), "refused"),
    ("signalling another", "import os, signal\n" + _refused("os.kill(os.getppid(), 0)"), "refused"),
    ("memory", _refused("bytearray(8 << 30)"), "refused"),
    ("environment", "import os\nreturn f'{sorted(os.environ.keys() - {\"LC_CTYPE\"})}'", "[]"),
    ("descriptors", OPEN_FILES, "[0, 1, 2, 3, 4]"),
    ("exit", "import os\nos._exit(0)", "died"),
    ("an answer that equals all", "class Equal(int):\n    __eq__ = lambda *_: True\nreturn Equal()", "no plain literal"),
)  # fmt: skip
