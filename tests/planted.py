"""pytest in a process of its own, on the package that it is pointed at."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import warm

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = [
    "-x",
    "-q",
    "-p",
    "no:cacheprovider",
    "--no-header",
    "-W",
    "ignore::pytest.PytestAssertRewriteWarning",
]
PROGRAM = """
import sys, pytest
sys.executable, source, *words = sys.argv[1:]
code = pytest.main(words)
import potstill
if not potstill.__file__.startswith(source):
    sys.exit(f"another package was tested: {potstill.__file__}")
sys.exit(code)
"""


def run(source: Path, test: str, told: Path) -> int:
    """The exit code of pytest on `test`, with the package in `source`; what it says goes into `told`."""
    words = [str(source), *OPTIONS, str(ROOT / "tests" / test)]
    command = [warm.python(), "-c", PROGRAM, sys.executable, *words]
    environment = os.environ | {"PYTHONPATH": str(source)}
    with told.open("wb") as file:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
    return done.returncode
