"""The house keeps its rules: arrows that point down, no circle, sizes, names, and nothing that does not belong in a
published project. Nothing here is a list of the package's parts: the map is read from the imports.
"""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import house
import pytest

import potstill

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = house.PACKAGE
MODULES = house.modules()
MOST_LINES = {"function": 70, "file": 600}


def test_no_unit_and_no_module_imports_in_a_circle() -> None:
    assert house.circles(house.unit_arrows()) == []
    assert house.circles(house.module_arrows()) == []


def test_a_circle_is_seen(tmp_path: Path) -> None:
    for unit, other in (("losses", "training"), ("training", "data"), ("data", "losses")):
        (tmp_path / unit).mkdir()
        (tmp_path / unit / "x.py").write_text(f"def late():\n    from potstill.{other}.x import late\n")
    (tmp_path / "free.py").write_text("from potstill.losses import x\n")
    assert house.circles(house.unit_arrows(tmp_path)) == ["data", "losses", "training"]
    assert house.circles(house.module_arrows(tmp_path)) == ["data.x", "losses.x", "training.x"]


def test_there_are_at_most_ten_floors() -> None:
    assert max(house.floors(house.unit_arrows()).values()) <= 10


def test_the_chart_in_contributing_is_the_map() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert house.floor_lines() in text, "run `make map` and put its floors into CONTRIBUTING.md"


def test_at_most_six_files_lie_at_the_root() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 6


def test_no_function_and_no_file_is_too_long_to_read() -> None:
    functions = {
        f"{house.dotted(path)}.{node.name}": lines
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or 0) - node.lineno + 1) > MOST_LINES["function"]
    }
    files = {
        house.dotted(path): lines
        for path in MODULES
        if (lines := len(path.read_text().splitlines())) > MOST_LINES["file"]
    }
    assert (functions, files) == ({}, {})


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("losses", "transformers"),
        ("losses", "torch.distributed"),
        ("losses", "potstill.recipe"),
        ("data", "potstill.teachers"),
        ("recipe", "torch"),
        ("registry.py", "torch"),
        ("cli/main.py", "torch"),
        ("training", "potstill.teachers"),
        ("training", "potstill.losses.divergences"),
    ],
)
def test_a_unit_does_not_know(where: str, what: str) -> None:
    place = PACKAGE / where
    files = [place] if place.is_file() else sorted(place.rglob("*.py"))
    assert files
    known = [f"{f.name}: {n}" for f in files for n in house.imported(f) if f"{n}.".startswith(f"{what}.")]
    assert known == []


def test_only_the_terminal_imports_rich() -> None:
    assert [
        house.dotted(p) for p in MODULES if any(n.split(".")[0] == "rich" for n in house.imported(p))
    ] == ["io.terminal"]


def test_losses_reduce_nothing_to_a_mean() -> None:
    assert [p.name for p in (PACKAGE / "losses").glob("*.py") if ".mean(" in p.read_text()] == []


def test_all_is_what_can_be_imported() -> None:
    for name in potstill.__all__:
        assert getattr(potstill, name) is not None
    assert set(potstill.__all__) | {"__version__"} == set(dir(potstill))
    with pytest.raises(AttributeError):
        _ = potstill.no_such_name


def test_every_module_imports_and_says_what_it_is_for() -> None:
    for path in MODULES:
        name = ".".join(["potstill", *filter(None, [house.dotted(path)])]).removesuffix(".__init__")
        if path.name != "__main__.py":
            assert importlib.import_module(name).__doc__, f"{path} has no docstring"


@pytest.mark.parametrize(
    "code", ["import potstill", "import potstill.cli.main", "import potstill.recipe.load"]
)
def test_importing_the_face_of_the_package_does_not_import_torch(code: str) -> None:
    program = f"{code}; import sys; print(sorted({{'torch', 'transformers', 'numpy'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_registered_divergence_is_documented_and_has_a_golden() -> None:
    from potstill.registry import entries

    page = (ROOT / "docs" / "losses.md").read_text()
    golden = (ROOT / "tests" / "golden" / "divergences.json").read_text()
    assert [
        name for name in entries("divergence") if f"`{name}`" not in page or f'"{name}"' not in golden
    ] == []


TRACES = re.compile(
    r"/(work|root|home|tmp)/|NotImplementedError|\bTODO\b|\bFIXME\b|# type: ignore\s*$", re.MULTILINE
)


def test_no_trace_of_a_machine_or_of_unfinished_work_is_published() -> None:
    published = [
        p
        for top in ("src", "docs", "recipes", "bench", "tools", "examples")
        for p in (ROOT / top).rglob("*")
        if p.suffix in {".py", ".md", ".yaml"}
    ] + [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile")]
    assert [f"{p.relative_to(ROOT)}: {m[0]}" for p in published for m in TRACES.finditer(p.read_text())] == []
