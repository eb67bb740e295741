"""Streams that are closed or full, and names that are not text: one line or an exit code, never a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import warm

from potstill.cli.main import main

Recipe = Callable[..., Path]
POTSTILL = f"{sys.executable} -m potstill"
CLOSED = ">&- 2>&- <&-"


def run(command: str, folder: Path) -> tuple[int, str]:
    """Exit code, and all that reached the test's own stderr and stdout."""
    # Unbuffered, argparse would meet the full disk itself, and pass over it.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("verb", "streams", "said"),
    [
        ("schema", ">/dev/full", "No space left on device"),
        ("--version", ">/dev/full", "No space left on device"),
        ("schema", ">&-", "it is closed"),
        ("schema", ">/dev/full 2>/dev/full", ""),
        ("schema", ">&- 2>&- <&-", ""),
    ],
)
def test_a_result_that_cannot_be_written_is_one_line_and_code_2(
    verb: str, streams: str, said: str, tmp_path: Path
) -> None:
    code, told = run(f"{POTSTILL} {verb} {streams}", tmp_path)
    assert code == 2
    lines = [
        f"error: stdout: the result cannot be written: {said}. Redirect it to a file that can be written."
    ]
    assert told.splitlines() == (lines if said else [])


@pytest.mark.parametrize("streams", ["2>/dev/full", "2>&-", ">&- 2>&- <&-"])
def test_a_mistake_has_its_code_where_nobody_can_be_told(streams: str, tmp_path: Path) -> None:
    assert run(f"{POTSTILL} show nothing {streams}", tmp_path) == (2, "")


@pytest.mark.parametrize("streams", ["2>/dev/full", pytest.param(CLOSED, marks=pytest.mark.soak)])
def test_a_run_goes_on_where_its_log_cannot(tiny_recipe: Recipe, tmp_path: Path, streams: str) -> None:
    # What a process makes of streams that are closed it decides as it starts.
    python = sys.executable if streams == CLOSED else warm.python()
    code, told = run(f"{python} -m potstill distill {tiny_recipe()} --out run {streams}", tmp_path)
    assert (code, told) == (0, "")
    assert b"finished" in (tmp_path / "run" / "status.json").read_bytes()
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes().count(b"\n") == 7, "nobody else wrote into it"


def test_a_folder_whose_name_is_no_text_is_refused(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = tiny_recipe()
    before = sorted(os.listdir(tmp_path))
    for more in ([], ["--resume"]):
        assert main(["distill", str(recipe), *more, "--out", os.fsdecode(b"\xff\xfe")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: \\udcff\\udcfe: ")
    assert sorted(os.listdir(tmp_path)) == before
