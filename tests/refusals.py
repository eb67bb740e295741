"""What every refusal of the command line has in common."""

from __future__ import annotations

from pathlib import Path

import pytest

from potstill.cli.main import main


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str], folder: Path) -> str:
    """The one line of a refusal; also that it exits 2, shows no traceback and leaves no file behind."""
    before = {path for path in folder.rglob("*")}
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, captured.err
    assert {path for path in folder.rglob("*")} == before
    return lines[0]
