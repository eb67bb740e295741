"""What the documentation names exists: files, tests, links, anchors and imports; and the Python page runs.

Its commands: test_commands.py.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from conftest import make_model
from data.chat_templates import QWEN_3, tokenizer_for

import potstill
import potstill.losses
from potstill.cli.main import main

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "potstill"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/lease/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
TREES = "src|tests|docs|bench|tools|examples|recipes"
NAMED = re.compile(rf"(?<![\w./-])((?:{TREES})/[\w./-]*[\w/])(?:::(\w+))?(?![\w*<])")
IN_PACKAGE = re.compile(r"`((?:[a-z_]+/)*[a-z_]+/[a-z_]+\.py)`")  # as `training/loop.py`, below src/potstill
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def missing_paths(text: str) -> list[str]:
    """Paths of the repository that are not there, and `tests/...::test` nodes that no file defines."""
    missing = []
    for match in NAMED.finditer(text):
        path = ROOT / match[1].rstrip(".")
        if not path.exists() or (match[2] and f"def {match[2]}(" not in path.read_text()):
            missing.append(match[0])
    for name in IN_PACKAGE.findall(text):
        unit = PACKAGE / name.split("/")[0]
        if unit.is_dir() and not (PACKAGE / name).exists():
            missing.append(name)
    return missing


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path, text: str) -> list[str]:
    broken = []
    for target in LINK.findall(text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    gone = page.name == "CHANGELOG.md"  # it tells of what was, too
    assert ([] if gone else missing_paths(text), broken_links(page, text)) == ([], [])


def test_every_page_is_reached_from_the_readme() -> None:
    linked = {target.partition("#")[0] for target in LINK.findall((ROOT / "README.md").read_text())}
    assert [page.name for page in PAGES[1:] if str(page.relative_to(ROOT)) not in linked] == []


def test_the_site_has_every_page_once_in_the_order_of_the_readme() -> None:
    spec = importlib.util.spec_from_file_location("site_settings", ROOT / "docs" / "conf.py")
    settings = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(settings)
    tree = settings.navigation((ROOT / "README.md").read_text())
    assert re.findall(r":caption: (.*)", tree) == ["Start", "Jobs", "Capabilities", "Project"]
    pages = [f"{line}.md" for line in tree.splitlines() if re.fullmatch(r"[\w/-]+", line)]
    assert sorted(pages) == sorted(str(page.relative_to(ROOT)) for page in PAGES[1:])


def test_the_picture_is_what_its_script_draws() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "picture.py")], capture_output=True, text=True, check=True
    )
    assert (ROOT / "docs" / "picture.svg").read_text() == done.stdout
    root = ElementTree.fromstring(done.stdout)
    assert root.attrib["role"] == "img" and root[0].tag.endswith("title")


def test_what_is_not_there_is_seen() -> None:
    page = ROOT / "docs" / "losses.md"
    assert missing_paths(
        "`tests/no_such.py`, `docs/losses.md`, `training/no_such.py`, `training/loop.py`"
    ) == [
        "tests/no_such.py",
        "training/no_such.py",
    ]
    assert missing_paths("pytest tests/test_docs.py::test_no_such_one") == [
        "tests/test_docs.py::test_no_such_one"
    ]
    assert broken_links(page, "[a](no.md) [b](trust.md#no-such) [c](targets.md) [d](#losses)") == [
        "no.md",
        "trust.md#no-such",
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_imports_can_be_imported(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def listed(heading: str) -> list[str]:
    """The names in the first column of the table with this heading on the Python page."""
    page = (ROOT / "docs" / "python-api.md").read_text()
    rows = page.split(f"| {heading} | what it is |\n|---|---|\n")[1].split("\n\n")[0].splitlines()
    return [name for row in rows for name in re.findall(r"`(\w+)[`(]", row.split("|")[1])]


@pytest.mark.parametrize(
    ("module", "heading"), [(potstill, "name"), (potstill.losses, "name in `potstill.losses`")]
)
def test_the_python_page_lists_the_public_names_and_no_others(module: Any, heading: str) -> None:
    assert sorted(listed(heading)) == sorted(module.__all__)
    assert [name for name in module.__all__ if getattr(module, name) is None] == []
    assert set(module.__all__) <= set(dir(module))
    with pytest.raises(AttributeError):
        _ = module.no_such_name


def python_page(tiny_recipe: Callable[..., Path], teacher: Path, text: Path, folder: Path) -> list[str]:
    """Its blocks; what they need lies in the folder."""
    tiny_recipe("recipe.yaml")
    (folder / "teacher").symlink_to(teacher)
    (folder / "text").symlink_to(text)
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python-api.md").read_text(), re.DOTALL)


@pytest.mark.usefixtures("warm_python")
def test_the_python_page_runs(
    tiny_recipe: Callable[..., Path], teacher_folder: Path, corpus_folder: Path, tmp_path: Path
) -> None:
    blocks = python_page(tiny_recipe, teacher_folder, corpus_folder, tmp_path)
    blocks = [block for block in blocks if "import lightning" not in block]
    assert len(blocks) > 12
    (tmp_path / "page.py").write_text("\n\n".join(blocks))
    done = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "runs/first finished" in done.stdout
    assert "objective.temperature" in done.stdout  # the nearest known name, in the error
    assert (tmp_path / "by-hand" / "model.safetensors").exists()
    assert (tmp_path / "trained" / "checkpoint-4" / "model.safetensors").exists()


def test_the_lightning_loop_runs(
    tiny_recipe: Callable[..., Path], teacher_folder: Path, corpus_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lightning", reason="lightning is no part of potstill; not run")
    blocks = python_page(tiny_recipe, teacher_folder, corpus_folder, tmp_path)
    (tmp_path / "page.py").write_text("\n\n".join(blocks))
    done = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"3 steps, KL \d+\.\d{3}", done.stdout)


def test_the_page_of_chats_shows_what_is_printed(
    tiny_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "chats.md").read_text()
    (chats,), (printed,) = (
        re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("jsonl", "text")
    )
    tokenizer = tokenizer_for(QWEN_3)
    make_model(tmp_path / "T", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path / "T")
    (tmp_path / "chats.jsonl").write_text(chats)
    recipe = tiny_recipe(
        corpus="{name: chat, path: chats.jsonl}", teacher=f"{{name: torch, model: {tmp_path / 'T'}}}"
    )
    assert main(["rows", str(recipe), "--documents", "--limit", "9"]) == 0
    assert capsys.readouterr().out.replace(f"{tmp_path}/", "") == printed
