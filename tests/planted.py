"""pytest in a fork: torch and Transformers are imported once, and each test sees the package it is pointed at.

Run as a program it reads orders, one JSON object a line, and answers each with the exit code of pytest.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

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


class Forks:
    """The other end: one order at a time."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )

    def run(self, source: Path, test: str, told: Path) -> int:
        """The exit code of pytest on `test`, with the package in `source`; what it says goes into `told`."""
        assert self.process.stdin is not None and self.process.stdout is not None
        order = {"source": str(source), "test": str(ROOT / "tests" / test), "told": str(told)}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


def child(order: dict[str, Any]) -> None:
    """Never returns."""
    code = 70
    try:
        with open(order["told"], "wb") as told:
            os.dup2(told.fileno(), 1)
            os.dup2(told.fileno(), 2)
        os.chdir(ROOT)
        os.environ["PYTHONPATH"] = order["source"]
        sys.path.insert(0, order["source"])
        import pytest

        code = int(pytest.main([*OPTIONS, order["test"]]))
        import potstill

        if not str(potstill.__file__).startswith(order["source"]):
            print(f"another package was tested: {potstill.__file__}")
            code = 71
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    import pytest  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            child(json.loads(line))
        _, status = os.waitpid(pid, 0)
        answers.write(f"{os.waitstatus_to_exitcode(status)}\n")
        answers.flush()


if __name__ == "__main__":
    main()
