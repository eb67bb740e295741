"""One untrusted program, judged by a trusted test: `Sandbox().judge(...)` returns a verdict.

The test runs in a trusted process (`judge.py`). The program runs alone in another one (`guest.py`), confined
by the kernel, and answers calls with plain literals over a pipe (`protocol.py`). An exit code is not a
verdict: only the trusted side reports `passed`, after the last check. Two tiers, tried in this order:

    bubblewrap   namespaces of its own (user, process, network, mount ...), then Landlock and seccomp inside
    landlock     Landlock and seccomp alone, where namespaces are not available

In both, the program can read a copy of Python's standard library and the C library. It cannot write a file,
open a socket to anything outside it, start a process or signal one. `docs/sandbox.md` says what is not
contained. This folder uses the standard library only and nothing else from potstill.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import random
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from potstill.evals.sandbox.guest import ARCH
from potstill.evals.sandbox.probes import PROBES

TIERS = ("bubblewrap", "landlock")
UIDS = (1_900_000_000, 2_000_000_000)
"""Unused ids. Started by root, each program gets its own, and so cannot count or signal other processes."""
PYTHON_FLAGS = ["-s", "-P", "-S", "-B", "-X", "utf8"]
"""Isolated as by `-I`, which would also ignore the hash seed."""
NOT_STAGED = [
    *("site-packages", "dist-packages", "ensurepip", "test", "tests", "idlelib", "lib2to3", "tkinter"),
    *("turtledemo", "pydoc_data", "config-*", "_test*.so", "*.opt-?.pyc"),
]
ENVIRONMENT = {"PYTHONHASHSEED": "0"}
"""All of it. The fixed seed gives a program that lists a set of strings the same verdict each time."""
EXIT_GRACE_S = 0.5
"""For a program to exit once its pipes have ended."""
HERE = Path(__file__).parent


class SandboxRefused(Exception):
    """No tier works on this machine. Nothing was run but `probes`, those of the last tier that was tried."""

    def __init__(self, why: str, probes: list[tuple[str, str, bool]]) -> None:
        super().__init__(f"sandbox: {why}. Nothing was run. See docs/sandbox.md.")
        self.why, self.probes = why, probes


@dataclass(frozen=True)
class Limits:
    """Limits of the program, per process."""

    memory_bytes: int = 1 << 30
    """Address space, including 30 MiB of the interpreter itself."""
    processes: int = 32
    """In effect threads, since no process can be started. In the landlock tier without root, the kernel also
    counts the user's other threads, which are added to the limit."""
    files: int = 64
    wall_floor_s: float = 10.0
    """The verdict is `timeout` after this plus four times `cpu_s`."""


@dataclass(frozen=True)
class Verdict:
    status: str
    """`passed`; `failed`: an assertion is false; `error`: it raised, or returned something other than a plain
    literal; `timeout`; `died`: it exited early, sent more than was requested, or hit a limit."""
    detail: str
    """Printable, 500 characters at most."""
    cpu_s: float
    """Processor time of the program."""

    @property
    def passed(self) -> bool:
        return self.status == "passed"


class Sandbox:
    """A context manager. `judge` may be called from several threads.

    `probes` are the results by which the tier was chosen: name, outcome, whether the attempt was stopped.

    Args:
        tier: one of TIERS; None takes the first one that works here.

    Raises:
        SandboxRefused: no tier works here, or not the given one.
    """

    def __init__(self, tier: str | None = None, limits: Limits | None = None) -> None:
        if tier is not None and tier not in TIERS:
            raise ValueError(f"tier: {tier} is not one of {', '.join(TIERS)}")
        self.limits = limits or Limits()
        self._stage = Path(tempfile.mkdtemp(prefix="potstill-sandbox-")).resolve()
        try:
            self._python = _stage_python(self._stage)
            self.tier, self._startup_s = self._first_that_works(TIERS if tier is None else (tier,))
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
            source: untrusted; runs in the sandbox.
            helpers: trusted; runs before the test, in its namespace.
            test: trusted; defines `check`.
            cpu_s: processor time the program may use after Python has started, in seconds.
        """
        limits = {
            "RLIMIT_AS": self.limits.memory_bytes,
            "RLIMIT_CPU": int(cpu_s + self._startup_s) + 1,
            "RLIMIT_FSIZE": 0,
            "RLIMIT_NOFILE": self.limits.files,
            "RLIMIT_NPROC": self.limits.processes,
            "RLIMIT_CORE": 0,
        }
        if os.getuid() != 0 and self.tier == "landlock":
            limits["RLIMIT_NPROC"] += _threads_of(os.getuid())
        guest = {
            "limits": limits,
            "readable": ["/"] if self.tier == "bubblewrap" else self._readable(),
            "source": source,
            "entry_point": entry_point,
        }
        spec = {"helpers": helpers, "test": test, "guest": guest, "cpu_s": int(cpu_s) + 30}
        status, detail, used_s = self._run(spec, self.limits.wall_floor_s + 4 * cpu_s)
        used_s = max(used_s - self._startup_s, 0.0)
        if used_s > cpu_s:
            status, detail = "timeout", f"{used_s:.1f} s of processor time, {cpu_s:.1f} s are allowed"
        return Verdict(status, _printable(detail), used_s)

    def _probe(self, name: str, body: str, expected: str) -> tuple[str, str, bool]:
        source = "def probe():\n" + "".join(f"    {line}\n" for line in body.splitlines())
        test = "def check(candidate):\n    outcome = candidate()\n    raise ValueError(outcome)\n"
        verdict = self.judge(source=source, entry_point="probe", helpers="", test=test, cpu_s=3.0)
        outcome = f"{verdict.status}: {verdict.detail}".removeprefix("error: ValueError: ")
        return name, outcome, expected in outcome

    def _first_that_works(self, tiers: tuple[str, ...]) -> tuple[str, float]:
        """The tier, and the processor time that starting Python takes in it."""
        why = []
        for self.tier in tiers:
            self._startup_s = 0.0
            self.probes: list[tuple[str, str, bool]] = []
            if missing := _missing(self.tier):
                why.append(f"{self.tier}: {missing}")
                continue
            try:
                trials = [self.judge(**TRIVIAL, cpu_s=5.0) for _ in range(3)]
            except OSError as error:  # cannot switch to another user, or the kernel is too old
                why.append(f"{self.tier}: {error}")
                continue
            if failed := [verdict for verdict in trials if not verdict.passed]:
                why.append(f"{self.tier}: {self._startup_error() or failed[0].detail}")
                continue
            self._startup_s = min(verdict.cpu_s for verdict in trials)
            self.probes = [self._probe(*probe) for probe in PROBES]
            if holes := [f"{name}: {outcome}" for name, outcome, stopped in self.probes if not stopped]:
                why.append(f"{self.tier}: {holes[0]}")
                continue
            return self.tier, self._startup_s
        raise SandboxRefused("; ".join(why), self.probes)

    def _startup_error(self) -> str:
        """What the tier's own program prints if it cannot start."""
        command = self._command(["-c", ""], None)
        done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, **self._identity())
        return " ".join(done.stderr.split())[-200:]

    def _identity(self) -> dict[str, Any]:
        if os.getuid() != 0:
            return {}
        uid = random.SystemRandom().choice(_unused_ids())
        return {"user": uid, "group": uid, "extra_groups": []}

    def _command(self, python: list[str], info: int | None) -> list[str]:
        root = Path("/python") if self.tier == "bubblewrap" else self._stage
        interpreter = root / "bin" / "python3"
        loader = [_loader(), "--library-path", str(root / "lib"), str(interpreter)]
        command = [*loader, *PYTHON_FLAGS, *python]
        if self.tier == "landlock":
            return command
        # fmt: off
        return [
            shutil.which("bwrap") or "bwrap",
            "--unshare-all", "--unshare-user", "--disable-userns", "--new-session",
            "--die-with-parent", "--clearenv", "--cap-drop", "ALL", "--as-pid-1", "--hostname", "sandbox",
            *(word for name, value in ENVIRONMENT.items() for word in ("--setenv", name, value)),
            "--ro-bind", str(self._stage), str(root),
            *(word for path in LIBRARIES for word in ("--ro-bind-try", path, path)),
            "--chdir", "/", "--remount-ro", "/", *([] if info is None else ["--info-fd", str(info)]),
            "--", *command,
        ]
        # fmt: on

    def _run(self, spec: dict[str, Any], wall_s: float) -> tuple[str, str, float]:
        """Status, detail and processor seconds of the program. None of its processes is left afterwards."""
        with contextlib.ExitStack() as stack:
            requests, request_end = _pipe(stack)
            answer_end, answers = _pipe(stack)
            command = [sys.executable, *PYTHON_FLAGS, "-c", JUDGE, str(request_end.fileno())]
            judge = subprocess.Popen(
                [*command, str(answer_end.fileno())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=(request_end.fileno(), answer_end.fileno()),
                env=ENVIRONMENT,
                cwd="/",
            )
            request_end.close()
            answer_end.close()
            guest = None
            try:
                guest = _GuestProcess(self._command, self._identity(), requests, answers)
                requests.close()
                answers.close()
                output, in_time = judge.communicate(json.dumps(spec).encode(), timeout=wall_s)[0], True
            except subprocess.TimeoutExpired:
                output, in_time = b"", False
            finally:
                judge.kill()
                judge.communicate()
                used_s = 0.0 if guest is None else guest.end()
        if not in_time:
            return "timeout", f"no verdict after {wall_s:.0f} s", used_s
        if not output:
            return "error", "the test itself ran out of time or memory", used_s
        verdict = json.loads(output)
        return verdict["status"], verdict["detail"], used_s

    def _readable(self) -> list[str]:
        return [str(self._stage), *LIBRARIES]


def survey() -> list[dict[str, Any]]:
    """Every tier, in the order in which they are tried: whether it works here, why not, and its probes."""
    tiers = []
    for tier in TIERS:
        try:
            with Sandbox(tier) as sandbox:
                why, results = "", sandbox.probes
        except SandboxRefused as refused:
            why, results = refused.why.removeprefix(f"{tier}: "), refused.probes
        probes = [dict(zip(("name", "found", "shut"), result, strict=True)) for result in results]
        tiers.append({"tier": tier, "holds": not why, "why": why, "canaries": probes})
    return tiers


class _GuestProcess:
    """The process of the untrusted program, with its wrapper if the tier has one."""

    def __init__(self, command: Any, identity: dict[str, Any], requests: Any, answers: Any) -> None:
        wrapped = command([], 0)[0] != _loader()
        with contextlib.ExitStack() as stack:
            info, info_end = _pipe(stack)
            pipes = (requests.fileno(), answers.fileno())  # above 2: bubblewrap's own processes close them
            self.process = subprocess.Popen(
                command(["-c", GUEST, *map(str, pipes)], info_end.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(*pipes, info_end.fileno()) if wrapped else pipes,
                env=ENVIRONMENT,
                cwd="/",
                start_new_session=True,
                **identity,
            )
            info_end.close()
            self.first = -1  # the first process of bubblewrap's namespace: all others end with it
            text = info.read()
            with contextlib.suppress(ValueError, KeyError, ProcessLookupError):
                self.first = os.pidfd_open(json.loads(text)["child-pid"])

    def end(self) -> float:
        """Kill what is left and wait for it. Returns the processor seconds of all of it."""
        if self.first >= 0:
            # If it is killed, the processor time of its children is lost.
            select.select([self.first], [], [], EXIT_GRACE_S)
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.first, signal.SIGKILL)
            os.close(self.first)
        else:
            os.kill(self.process.pid, signal.SIGKILL)  # not reaped yet, so its pid cannot have been reused
        _, status, used = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        return used.ru_utime + used.ru_stime


def _pipe(stack: contextlib.ExitStack) -> tuple[Any, Any]:
    reading, writing = os.pipe()
    return (
        stack.enter_context(os.fdopen(reading, "rb", buffering=0)),
        stack.enter_context(os.fdopen(writing, "wb", buffering=0)),
    )


def _unused_ids() -> range:
    """User and group ids in use by nobody, of those that exist here: a container may have 65,536."""
    maps = [Path(f"/proc/self/{kind}_map").read_text().split() for kind in ("uid", "gid")]
    end = min(
        max(int(first) + int(count) for first, count in zip(m[::3], m[2::3], strict=True)) for m in maps
    )
    if end < 2000:
        raise OSError(f"root of a user namespace without other users: {end} of them")
    return range(*UIDS) if end >= UIDS[1] else range(end - 1000, end)


def _threads_of(uid: int) -> int:
    threads = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has exited
            threads += len(os.listdir(process / "task")) if process.stat().st_uid == uid else 0
    return threads


def _missing(tier: str) -> str:
    if sys.platform != "linux" or platform.machine() not in ARCH:
        return f"not on {sys.platform} {platform.machine()}"
    if tier == "bubblewrap" and shutil.which("bwrap") is None:
        return "bwrap is not installed"
    return ""


def _loader() -> str:
    """This process's dynamic loader, which starts the copied interpreter without an environment variable."""
    maps = Path("/proc/self/maps").read_text().split()
    return next(word for word in maps if word.startswith("/") and os.path.basename(word).startswith("ld-"))


def _stage_python(stage: Path) -> Path:
    """Copy the interpreter and its standard library to where any user can read them.

    Installed packages are left out: one of them contains the published solutions.
    """
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (stage / "bin").mkdir()
    shutil.copy2(os.path.realpath(sys.executable), stage / "bin" / "python3")
    ignore = shutil.ignore_patterns(*NOT_STAGED)
    shutil.copytree(sysconfig.get_path("stdlib"), stage / "lib" / version, ignore=ignore)
    library = Path(sysconfig.get_config_var("LIBDIR") or "") / (sysconfig.get_config_var("INSTSONAME") or "")
    if library.is_file() and library.name:
        shutil.copy2(library, stage / "lib")
    for folder in (stage, stage / "bin", stage / "lib"):
        folder.chmod(0o755)  # whatever the umask
    return stage / "bin" / "python3"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:500])[:500]


def _as_program(name: str) -> str:
    """A file of this folder as a text for `python -c`, with the module `protocol` included."""
    protocol = (HERE / "protocol.py").read_text()
    return (
        "import sys, types\n"
        "name = 'potstill.evals.sandbox.protocol'\n"
        "protocol = sys.modules[name] = types.ModuleType(name)\n"
        f"exec(compile({protocol!r}, 'protocol.py', 'exec'), protocol.__dict__)\n"
        f"exec(compile({(HERE / name).read_text()!r}, {name!r}, 'exec'), {{'__name__': '__main__'}})\n"
    )


JUDGE, GUEST = _as_program("judge.py"), _as_program("guest.py")
MULTIARCH = sysconfig.get_config_var("MULTIARCH") or f"{platform.machine()}-linux-gnu"
LIBRARIES = [f"/usr/lib/{MULTIARCH}", f"/lib/{MULTIARCH}", "/lib64", "/usr/lib64", "/etc/ld.so.cache"]
TRIVIAL = {
    "source": "def double(x):\n    return 2 * x\n",
    "entry_point": "double",
    "helpers": "",
    "test": "def check(candidate):\n    assert candidate(21) == 42\n",
}
