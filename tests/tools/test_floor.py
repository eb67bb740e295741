"""`make test-floor`: the lowest versions that pyproject.toml allows, one of each dependency."""

from __future__ import annotations

import importlib.util
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("floor", ROOT / "tools" / "floor.py")
assert SPEC is not None and SPEC.loader is not None
floor = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(floor)


def project(*dependencies: str, **extras: list[str]) -> dict[str, Any]:
    return {"project": {"dependencies": list(dependencies), "optional-dependencies": extras}}


def test_each_bound_is_a_constraint_the_extras_too() -> None:
    found = floor.floor(project("a>=1.5,<2", "b-c == 3.0.1", d=["e.f>=2026.10", "g>=0"]))
    assert found == ["a==1.5", "b-c==3.0.1", "e.f==2026.10", "g==0"]


@pytest.mark.parametrize("requirement", ["a", "a<2", "a!=1", "a[x]"])
def test_a_dependency_without_a_lower_bound_is_named(requirement: str) -> None:
    with pytest.raises(ValueError, match=r"^a.*: no lower bound"):
        floor.floor(project("b>=1", requirement))


def test_every_dependency_of_ours_has_one() -> None:
    lines = floor.floor(tomllib.loads((ROOT / "pyproject.toml").read_text()))
    assert len(lines) > 20 and any(line.startswith("transformers==") for line in lines)
