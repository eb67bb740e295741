"""The lowest versions that pyproject.toml allows, as constraints for pip: `python tools/floor.py > floor.txt`.

`make test-floor` installs them and runs the tests. A bound that is too low fails there, and not at a user's.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)\s*(?:==|>=)\s*(?P<version>[\w.]+)")


def floor(pyproject: dict[str, Any]) -> list[str]:
    """`name==version` of every dependency, those of the extras too.

    Raises:
        ValueError: a dependency without a lower bound.
    """
    project = pyproject["project"]
    extras = project.get("optional-dependencies", {}).values()
    lines = []
    for requirement in (*project["dependencies"], *(each for extra in extras for each in extra)):
        found = REQUIREMENT.match(requirement)
        if found is None:
            raise ValueError(f"{requirement}: no lower bound. Write one that the tests pass with.")
        lines.append(f"{found['name']}=={found['version']}")
    return lines


if __name__ == "__main__":
    print(*floor(tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())), sep="\n")
