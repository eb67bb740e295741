"""The map of the package, computed from its imports: units, floors and arrows. `make map` prints it.

A unit is a folder of `src/potstill`, or a file beside them. A unit stands one floor above the highest unit that it
imports; imports inside functions count, those under `TYPE_CHECKING` do not, since they are never executed.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "potstill"
ENTRY = {"__init__", "__main__"}
"""Files that only hand over to others: they stand on the floor of no one."""


def modules(package: Path = PACKAGE) -> list[Path]:
    return sorted(package.rglob("*.py"))


def dotted(path: Path, package: Path = PACKAGE) -> str:
    """The module's name below the package: `training.loop`."""
    return ".".join(path.relative_to(package).with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def imported(path: Path) -> frozenset[str]:
    """Full dotted names of everything that a file imports, `TYPE_CHECKING` blocks left out."""
    names = set()
    for node in ast.walk(_without_type_checking(ast.parse(path.read_text()))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def _without_type_checking(tree: ast.AST) -> ast.AST:
    class Drop(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING" else node

    return Drop().visit(tree)


def module_arrows(package: Path = PACKAGE) -> dict[str, set[str]]:
    """Module -> modules of the package that it imports."""
    known = {dotted(path, package) for path in modules(package)} - {""}

    def home(name: str) -> str | None:
        parts = name.split(".")[1:]
        return next((m for n in range(len(parts), 0, -1) if (m := ".".join(parts[:n])) in known), None)

    arrows = {}
    for path in modules(package):
        names = (home(name) for name in imported(path) if name.startswith("potstill."))
        arrows[dotted(path, package)] = {name for name in names if name} - {dotted(path, package)}
    return arrows


def unit_arrows(package: Path = PACKAGE) -> dict[str, set[str]]:
    """Unit -> units that it imports."""
    arrows: dict[str, set[str]] = {}
    for module, others in module_arrows(package).items():
        unit = module.split(".")[0]
        if unit and unit not in ENTRY:
            arrows.setdefault(unit, set()).update({other.split(".")[0] for other in others} - {unit, ""})
    return arrows


def circles(arrows: dict[str, set[str]]) -> list[str]:
    """Those that can be reached from themselves."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [*arrows.get(start, ())]
        while waiting:
            if (name := waiting.pop()) not in seen:
                seen.add(name)
                waiting += arrows.get(name, ())
        return seen

    return sorted(name for name in arrows if name in reached(name))


def floors(arrows: dict[str, set[str]]) -> dict[str, int]:
    """Unit -> its floor, from 1. Only for arrows without a circle."""

    @functools.cache
    def floor(name: str) -> int:
        return 1 + max((floor(other) for other in arrows.get(name, ())), default=0)

    return {name: floor(name) for name in arrows}


def floor_lines(package: Path = PACKAGE) -> str:
    """Floors from the top down, each unit with the units that it imports, the highest first."""
    arrows = unit_arrows(package)
    of = floors(arrows)
    lines = []
    for number in range(max(of.values()), 0, -1):
        for unit in sorted(name for name in of if of[name] == number):
            below = sorted(arrows[unit], key=lambda name: (-of[name], name))
            lines.append(f"{number:2}  {unit:<10} {' '.join(below)}".rstrip())
    return "\n".join(lines)


def sums(package: Path = PACKAGE) -> str:
    """What the map adds up to."""
    arrows = unit_arrows(package)
    sizes = [len(path.read_text().splitlines()) for path in modules(package)]
    return (
        f"{max(floors(arrows).values())} floors, {sum(map(len, arrows.values()))} arrows between {len(arrows)}"
        f" units, circles: {circles(module_arrows(package)) or 'none'}; {len(sizes)} files, {sum(sizes)} lines"
    )


if __name__ == "__main__":
    print(floor_lines(), sums(), sep="\n")
