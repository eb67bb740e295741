"""One untrusted program, judged by a trusted test: `Sandbox().judge(...)` gives a verdict.

The test runs in a process of ours (`judge.py`); the program runs alone in another
(`guest.py`), shut in by the kernel, and answers calls with plain literals over one pipe
(`protocol.py`). An exit code is no verdict: only the trusted side says `passed`, after the last check.
Two tiers, tried in this order:

    bubblewrap   namespaces of its own (user, process, network, mount ...), then Landlock and seccomp inside
    landlock     Landlock and seccomp alone, where namespaces are refused

In both the program reads a copy of Python's standard library and the C library, writes no file, opens no
socket, starts no process and signals none; `docs/sandbox.md` says what is not contained. Standard library
only, and nothing of potstill beside its own three files.
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
from potstill.evals.sandbox.probes import CANARIES

TIERS = ("bubblewrap", "landlock")
UIDS = (1_900_000_000, 2_000_000_000)
"""Nobody's: each program of root's is another user, none of whom can count or signal another's processes."""
PLAIN = ["-s", "-P", "-S", "-B", "-X", "utf8"]
"""`-I`, which would ignore the seed."""
NOT_STAGED = [
    *("site-packages", "dist-packages", "ensurepip", "test", "tests", "idlelib", "lib2to3", "tkinter"),
    *("turtledemo", "pydoc_data", "config-*", "_test*.so", "*.opt-?.pyc"),
]
BARE = {"PYTHONHASHSEED": "0"}
"""The whole environment: a program that lists a set of strings gives one verdict each time."""
LEAVE_S = 0.5
"""For a program whose pipes have ended."""
HERE = Path(__file__).parent


class SandboxRefused(Exception):
    """No tier shuts a program in on this machine: nothing was run but `canaries`, those of the last tier."""

    def __init__(self, why: str, canaries: list[tuple[str, str, bool]]) -> None:
        super().__init__(f"sandbox: {why}. Nothing was run. See docs/sandbox.md.")
        self.why, self.canaries = why, canaries


@dataclass(frozen=True)
class Limits:
    """Of the program, per process."""

    memory_bytes: int = 1 << 30
    """Address space, the interpreter's own 30 MiB included."""
    processes: int = 32
    """Threads, that is: no process can be started at all. Where the user's own are counted too (Landlock,
    not root): beside those."""
    files: int = 64
    wall_floor_s: float = 10.0
    """No verdict after this and four times `cpu_s`: `timeout`."""


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

    `canaries` are the live probes by which the tier was chosen: name, what was found, whether it is shut.

    Args:
        tier: one of TIERS; None takes the first that a live probe finds shut.

    Raises:
        SandboxRefused: no tier, or not the one asked for, works here.
    """

    def __init__(self, tier: str | None = None, limits: Limits | None = None) -> None:
        if tier is not None and tier not in TIERS:
            raise ValueError(f"tier: {tier} is not one of {', '.join(TIERS)}")
        self.limits = limits or Limits()
        self._stage = Path(tempfile.mkdtemp(prefix="potstill-sandbox-")).resolve()
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
            "RLIMIT_NPROC": self.limits.processes,
            "RLIMIT_CORE": 0,
        }
        if os.getuid() != 0 and self.tier == "landlock":
            limits["RLIMIT_NPROC"] += _threads_of(os.getuid())
        inmate = {
            "limits": limits,
            "readable": ["/"] if self.tier == "bubblewrap" else self._readable(),
            "source": source,
            "entry_point": entry_point,
        }
        spec = {"helpers": helpers, "test": test, "inmate": inmate, "cpu_s": int(cpu_s) + 30}
        status, detail, used_s = self._run(spec, self.limits.wall_floor_s + 4 * cpu_s)
        used_s = max(used_s - self._start_s, 0.0)
        if used_s > cpu_s:
            status, detail = "timeout", f"{used_s:.1f} s of processor time, {cpu_s:.1f} s were allowed"
        return Verdict(status, _printable(detail), used_s)

    def _probe(self, name: str, body: str, wanted: str) -> tuple[str, str, bool]:
        source = "def probe():\n" + "".join(f"    {line}\n" for line in body.splitlines())
        test = "def check(candidate):\n    found = candidate()\n    raise ValueError(found)\n"
        found = self.judge(source=source, entry_point="probe", helpers="", test=test, cpu_s=3.0)
        said = f"{found.status}: {found.detail}".removeprefix("error: ValueError: ")
        return name, said, wanted in said

    def _first_that_holds(self, tiers: tuple[str, ...]) -> tuple[str, float]:
        """The tier, and the processor time in which a program that does nothing ends."""
        why = []
        for self.tier in tiers:
            self._start_s = 0.0
            self.canaries: list[tuple[str, str, bool]] = []
            if missing := _missing(self.tier):
                why.append(f"{self.tier}: {missing}")
                continue
            try:
                sound = [self.judge(**SOUND, cpu_s=5.0) for _ in range(3)]
            except OSError as error:  # another user cannot be become, or the kernel is too old
                why.append(f"{self.tier}: {error}")
                continue
            if bad := [verdict for verdict in sound if not verdict.passed]:
                why.append(f"{self.tier}: {self._complaint() or bad[0].detail}")
                continue
            self._start_s = min(verdict.cpu_s for verdict in sound)
            self.canaries = [self._probe(*canary) for canary in CANARIES]
            if doors := [f"{name}: {found}" for name, found, shut in self.canaries if not shut]:
                why.append(f"{self.tier}: {doors[0]}")
                continue
            return self.tier, self._start_s
        raise SandboxRefused("; ".join(why), self.canaries)

    def _complaint(self) -> str:
        """What the tier's own program says when it cannot start."""
        command = self._command(["-c", ""], None)
        done = subprocess.run(command, capture_output=True, text=True, env=BARE, **self._identity())
        return " ".join(done.stderr.split())[-200:]

    def _identity(self) -> dict[str, Any]:
        if os.getuid() != 0:
            return {}
        uid = random.SystemRandom().choice(_unused_ids())
        return {"user": uid, "group": uid, "extra_groups": []}

    def _command(self, python: list[str], info: int | None) -> list[str]:
        root = Path("/python") if self.tier == "bubblewrap" else self._stage
        interpreter = root / "bin" / "python3"
        plain = [_loader(), "--library-path", str(root / "lib"), str(interpreter), *PLAIN]
        command = [*plain, *python]
        if self.tier == "landlock":
            return command
        # fmt: off
        return [
            shutil.which("bwrap") or "bwrap",
            "--unshare-all", "--unshare-user", "--disable-userns", "--new-session",
            "--die-with-parent", "--clearenv", "--cap-drop", "ALL", "--as-pid-1", "--hostname", "sandbox",
            *(word for name in BARE for word in ("--setenv", name, BARE[name])),
            "--ro-bind", str(self._stage), str(root),
            *(word for place in LIBRARIES for word in ("--ro-bind-try", place, place)),
            "--chdir", "/", "--remount-ro", "/", *([] if info is None else ["--info-fd", str(info)]),
            "--", *command,
        ]
        # fmt: on

    def _run(self, spec: dict[str, Any], wall_s: float) -> tuple[str, str, float]:
        """Status, detail, and processor seconds of the program, all of whose processes are gone."""
        with contextlib.ExitStack() as ends:
            requests, request_end = _pipe(ends)
            answer_end, answers = _pipe(ends)
            command = [sys.executable, *PLAIN, "-c", JUDGE, str(request_end.fileno())]
            judge = subprocess.Popen(
                [*command, str(answer_end.fileno())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=(request_end.fileno(), answer_end.fileno()),
                env=BARE,
                cwd="/",
            )
            request_end.close()
            answer_end.close()
            inmate = None
            try:
                inmate = _Inmate(self._command, self._identity(), requests, answers)
                requests.close()
                answers.close()
                said, in_time = judge.communicate(json.dumps(spec).encode(), timeout=wall_s)[0], True
            except subprocess.TimeoutExpired:
                said, in_time = b"", False
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


def survey() -> list[dict[str, Any]]:
    """Every tier, in the order in which they are tried: whether it holds here, why not, and its canaries."""
    found = []
    for tier in TIERS:
        try:
            with Sandbox(tier) as sandbox:
                why, canaries = "", sandbox.canaries
        except SandboxRefused as refused:
            why, canaries = refused.why.removeprefix(f"{tier}: "), refused.canaries
        probes = [dict(zip(("name", "found", "shut"), canary, strict=True)) for canary in canaries]
        found.append({"tier": tier, "holds": not why, "why": why, "canaries": probes})
    return found


class _Inmate:
    """The process of the untrusted program, with everything it is wrapped in."""

    def __init__(self, command: Any, identity: dict[str, Any], requests: Any, answers: Any) -> None:
        wrapped = command([], 0)[0] != _loader()
        with contextlib.ExitStack() as ends:
            told, info = _pipe(ends)
            pipes = (requests.fileno(), answers.fileno())  # above 2: bubblewrap's own processes close them
            self.process = subprocess.Popen(
                command(["-c", INMATE, *map(str, pipes)], info.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(*pipes, info.fileno()) if wrapped else pipes,
                env=BARE,
                cwd="/",
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
            # Killed, it forgets what its children have used.
            select.select([self.first], [], [], LEAVE_S)
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.first, signal.SIGKILL)
            os.close(self.first)
        else:
            os.kill(self.process.pid, signal.SIGKILL)  # not reaped before, so that it is nobody else's number
        _, status, used = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        return used.ru_utime + used.ru_stime


def _pipe(ends: contextlib.ExitStack) -> tuple[Any, Any]:
    reading, writing = os.pipe()
    return (
        ends.enter_context(os.fdopen(reading, "rb", buffering=0)),
        ends.enter_context(os.fdopen(writing, "wb", buffering=0)),
    )


def _unused_ids() -> range:
    """User and group ids that nobody has, of those that exist here: a container may know 65,536."""
    maps = [Path(f"/proc/self/{kind}_map").read_text().split() for kind in ("uid", "gid")]
    end = min(
        max(int(first) + int(count) for first, count in zip(m[::3], m[2::3], strict=True)) for m in maps
    )
    if end < 2000:
        raise OSError(f"root of a user namespace without other users: {end} of them")
    return range(*UIDS) if end >= UIDS[1] else range(end - 1000, end)


def _threads_of(uid: int) -> int:
    found = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            found += len(os.listdir(process / "task")) if process.stat().st_uid == uid else 0
    return found


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
    for folder in (stage, stage / "bin", stage / "lib"):
        folder.chmod(0o755)  # whatever the umask
    return stage / "bin" / "python3"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:500])[:500]


def _as_program(name: str) -> str:
    """A file of ours as a text for `python -c`: it imports what it shares from memory."""
    wire = (HERE / "protocol.py").read_text()
    return (
        "import sys, types\n"
        "name = 'potstill.evals.sandbox.protocol'\n"
        "protocol = sys.modules[name] = types.ModuleType(name)\n"
        f"exec(compile({wire!r}, 'protocol.py', 'exec'), protocol.__dict__)\n"
        f"exec(compile({(HERE / name).read_text()!r}, {name!r}, 'exec'), {{'__name__': '__main__'}})\n"
    )


JUDGE, INMATE = _as_program("judge.py"), _as_program("guest.py")
MULTIARCH = sysconfig.get_config_var("MULTIARCH") or f"{platform.machine()}-linux-gnu"
LIBRARIES = [f"/usr/lib/{MULTIARCH}", f"/lib/{MULTIARCH}", "/lib64", "/usr/lib64", "/etc/ld.so.cache"]
SOUND = {
    "source": "def double(x):\n    return 2 * x\n",
    "entry_point": "double",
    "helpers": "",
    "test": "def check(candidate):\n    assert candidate(21) == 42\n",
}
