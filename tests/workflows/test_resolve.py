"""The walk of a recipe: what its models are made of is looked at once, by `resolve`, and by nobody after it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import make_model

from potstill.cli.main import main
from potstill.models import load

Recipe = Callable[..., Path]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each model's config was opened, by the name of its folder. A tokenizer that Transformers loads may look
    into it, too; that is not counted.
    """
    count: Counter[str] = Counter()
    check_config = load._check_config

    def counting(path: Path) -> None:
        count[path.name] += 1
        check_config(path)

    monkeypatch.setattr(load, "_check_config", counting)
    return count


@pytest.fixture
def recipe(tiny_recipe: Recipe, tmp_path: Path) -> Path:
    """Two models, and a chunk that is planned for: every stage has a config to look at."""
    make_model(tmp_path / "small", seed=1, num_hidden_layers=2)
    return tiny_recipe(
        student=f"{{name: checkpoint, model: {tmp_path / 'small'}}}", objective="{chunk: auto}"
    )


@pytest.mark.parametrize(
    "verb", [["distill", "--out", "RUN"], ["distill", "--smoke", "2"], ["plan"], ["check"]]
)
def test_each_model_s_config_is_opened_once(
    recipe: Path, tmp_path: Path, opened: Counter[str], verb: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("potstill.preflight.auto.AMPLE", 2**60)  # the chunk is chosen by a plan
    assert main([verb[0], str(recipe), *verb[1:]]) == 0
    reloaded = opened.pop("student", 0)  # `check` saves the student and loads it again: files of its own
    assert opened == {"teacher": 1, "small": 1} and reloaded == (verb == ["check"])


def test_a_student_that_is_cut_is_made_of_the_teacher_s_one_config(
    tiny_recipe: Recipe, tmp_path: Path, opened: Counter[str]
) -> None:
    assert main(["distill", str(tiny_recipe()), "--out", str(tmp_path / "run")]) == 0
    assert opened == {"teacher": 1}


def test_a_student_that_names_the_teacher_s_checkpoint_opens_it_through_the_teacher_s_files(
    tiny_recipe: Recipe, teacher_folder: Path, tmp_path: Path, opened: Counter[str]
) -> None:
    student = f"{{name: checkpoint, model: {teacher_folder}}}"
    recipe = tiny_recipe(student=student)
    assert main(["distill", str(recipe), "allow_identical=true", "--out", str(tmp_path / "run")]) == 0
    assert opened == {"teacher": 1}
