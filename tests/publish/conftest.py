from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import potstill
from publish.hub import Hub, loopback
from publish.lab import TOKEN, point_at


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, corpus_folder: Path) -> Path:
    """A small real run; never written to."""
    folder = tmp_path_factory.mktemp("publish")
    recipe = folder / "small.yaml"
    recipe.write_text(
        f"corpus: {{name: text, path: {corpus_folder}, tokens_per_row: 32, heldout_rows: 4}}\n"
        f"teacher: {{name: torch, model: {teacher_folder}}}\n"
        "student: {name: cut, layers: 2, rule: first_last, ffn_width: 48, kv_heads: 1, hidden_size: 24,"
        " repair: false}\n"
        "allow_weak_teacher: true\n"
        "train: {steps: 4, rows_per_step: 4, lr: 1e-3, device: cpu}\n"
        "eval: {every: 2, sample_prompt: the cat, sample_tokens: 4}\n"
    )
    return potstill.distill(recipe, out=folder / "run").path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with loopback(TOKEN) as hub:
        point_at(hub, monkeypatch)
        yield hub
