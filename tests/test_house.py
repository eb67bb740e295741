"""The house keeps its rules: sizes, arrows between wings, names, and nothing that does not belong in a
published project.
"""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import potstill

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "potstill"
MODULES = sorted(PACKAGE.rglob("*.py"))
FLOORS = [
    {"errors", "types", "registry", "display", "quiet", "plain_files", "process"},
    {"losses", "corpus", "models", "recipe"},
    {"runs"},
    {"targets"},
    {"teachers", "students"},
    {"training", "evals", "shipping", "sharding"},
    {"corpora"},
    {"assembly"},
    {"proof"},
    {"capturing"},
    {"line", "reporting", "benchmarks", "delivery", "storing", "gathering"},
    {"comparing"},
    {"cli", "__main__", "__init__"},
]
FLOOR = {wing: number for number, wings in enumerate(FLOORS) for wing in wings}


RECIPE = {
    "recipe",
    "recipe_mistakes",
    "recipe_paths",
    "recipe_plugins",
    "recipe_publish",
    "recipe_sections",
    "recipe_students",
    "yaml_strict",
}  # one wing without a folder


def wing_of(path: Path) -> str:
    return wing(path.relative_to(PACKAGE).parts[0].removesuffix(".py"))


def wing(name: str) -> str:
    return "recipe" if name in RECIPE else name


def imported(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, also inside functions, `TYPE_CHECKING` blocks
    excepted.
    """
    found = set()
    for node in ast.walk(without_type_checking(ast.parse(path.read_text()))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def without_type_checking(tree: ast.AST) -> ast.AST:
    class Drop(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING" else node

    return Drop().visit(tree)


def upward_imports(path: Path) -> list[str]:
    here = wing_of(path)
    wrong = []
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "potstill" and len(parts) > 1 and wing(parts[1]) in FLOOR:
            there = wing(parts[1])
            inside_one_wing = there == here and FLOOR[here] > 0
            beside = (here, there) == ("__main__", "cli") or (FLOOR[here] == 0 and there == "errors")
            if not (inside_one_wing or beside or FLOOR[there] < FLOOR[here]):
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    return wrong


def test_every_wing_has_a_floor() -> None:
    assert {wing_of(path) for path in MODULES} <= set(FLOOR)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    assert upward_imports(path) == []


def test_an_import_that_points_upwards_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "losses").mkdir()
    wrong = tmp_path / "losses" / "x.py"
    wrong.write_text("from potstill.training.loop import train\n")
    assert upward_imports(wrong) == ["losses/x.py imports potstill.training.loop.train"]


def test_no_wing_imports_in_a_circle() -> None:
    edges = {
        f"potstill.{'.'.join(path.relative_to(PACKAGE).with_suffix('').parts)}": {
            name for name in imported(path) if name.startswith("potstill.")
        }
        for path in MODULES
    }
    graph = {
        m: {o for o in edges for name in names if name == o or name.startswith(f"{o}.")}
        for m, names in edges.items()
    }

    def reaches(start: str, goal: str, seen: set[str]) -> bool:
        return any(
            n == goal or (n not in seen and not seen.add(n) and reaches(n, goal, seen)) for n in graph[start]
        )

    assert [module for module in graph if reaches(module, module, set())] == []


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("losses", "transformers"),
        ("losses", "torch.distributed"),
        ("losses", "potstill.recipe"),
        ("corpus", "potstill.teachers"),
        ("recipe.py", "torch"),
        ("registry.py", "torch"),
        ("cli.py", "torch"),
        ("training", "potstill.teachers"),
        ("training", "potstill.losses.divergences"),
    ],
)
def test_a_wing_does_not_know(where: str, what: str) -> None:
    place = PACKAGE / where
    files = [place] if place.is_file() else sorted(place.rglob("*.py"))
    assert files
    assert [
        f"{f.name}: {n}" for f in files for n in imported(f) if n == what or n.startswith(f"{what}.")
    ] == []


def test_only_display_imports_rich() -> None:
    assert [p.name for p in MODULES if any(n.split(".")[0] == "rich" for n in imported(p))] == ["display.py"]


def test_the_budget_of_files_and_lines_is_kept() -> None:
    with_code = [path for path in MODULES if len(ast.parse(path.read_text()).body) > 1]
    assert len(with_code) <= 108
    assert sum(len(path.read_text().splitlines()) for path in MODULES) < 22_000
    assert {p.name: n for p in MODULES if (n := len(p.read_text().splitlines())) >= 400} == {}


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
        dotted = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        if path.name != "__main__.py":
            assert importlib.import_module(dotted).__doc__, f"{path} has no docstring"


@pytest.mark.parametrize("code", ["import potstill", "import potstill.cli", "import potstill.recipe"])
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
        for top in ("src", "docs", "recipes", "bench")
        for p in (ROOT / top).rglob("*")
        if p.suffix in {".py", ".md", ".yaml"}
    ] + [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile")]
    assert [f"{p.relative_to(ROOT)}: {m[0]}" for p in published for m in TRACES.finditer(p.read_text())] == []
