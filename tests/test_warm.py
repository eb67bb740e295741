"""tests/warm.py: what a test starts there is a process like any other."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import warm


def run(*words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([warm.python(), *words], text=True, capture_output=True, **more)


def test_it_has_the_words_the_folder_the_environment_and_the_streams(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("WHERE = __file__\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "program.py").write_text(
        "import os, sys, potstill\nsys.stderr.write(sys.stdin.read())\n"
        "print(os.getcwd(), os.environ, sys.argv, sys.path[0], potstill.__file__, __name__)\n"
    )
    (tmp_path / "potstill").mkdir()
    (tmp_path / "potstill" / "__init__.py").touch()
    environment = {"LC_ALL": "C.UTF-8", "PYTHONPATH": str(tmp_path)}
    path = str(tmp_path / "other" / "program.py")
    done = run(path, "--x", "y", cwd=tmp_path, env=environment, input="said")
    expected = f"{tmp_path} environ({environment}) {[path, '--x', 'y']} {tmp_path / 'other'}"
    assert done.stdout == f"{expected} {tmp_path / 'potstill' / '__init__.py'} __main__\n"
    assert (done.stderr, done.returncode) == ("said", 0)
    ways = (["-c", "import own"], ["-m", "own"], ["-"], ["-P", "-c", "import own"])
    assert [run(*way, cwd=tmp_path, input="import own").returncode for way in ways] == [0, 0, 0, 1]


def test_one_with_a_hash_seed_of_its_own_begins_with_nothing() -> None:
    said = {run("-c", "print(hash('a'))", env={"PYTHONHASHSEED": "1"}).stdout for _ in range(2)}
    assert len(said) == 1 and said != {run("-c", "print(hash('a'))", env={"PYTHONHASHSEED": "2"}).stdout}


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('no')", 1, "no\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
        ("import sys; assert 'torch' in sys.modules and 'potstill' not in sys.modules", 0, ""),
    ],
)
def test_it_ends_as_its_program_does(program: str, code: int, said: str) -> None:
    done = run("-c", program)
    assert done.returncode == code and done.stderr.endswith(said) and bool(done.stderr) == bool(said)


def test_what_is_killed_is_gone() -> None:
    program = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    with subprocess.Popen([warm.python(), "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -9
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, "the program outlives its client"
        time.sleep(0.01)
