"""`objective.chunk: auto`: a number by the memory, chosen once, kept with the run and taken again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from potstill import distill, load_recipe
from potstill.build.resolve import resolve
from potstill.build.setup import set_up
from potstill.cli.main import main
from potstill.errors import UserError
from potstill.preflight import auto as choosing
from potstill.preflight.auto import choose_chunk, with_chunk
from potstill.preflight.checks import Checked
from potstill.preflight.plan import plan
from potstill.runs.run_dir import RunDir
from potstill.workflows.distill import evaluate

Write = Callable[..., Path]
AMPLE, NONE = 2**44, 0


@pytest.fixture
def auto(tiny_recipe: Write) -> Path:
    train = "{steps: 4, rows_per_step: 8, lr: 1e-2, device: cpu, save_every: 2}"
    return tiny_recipe(objective="{}", train=train)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is planned, and nothing looked at before a run."""
    monkeypatch.setattr(choosing, "plan", lambda *_: SimpleNamespace(peak_bytes=0))
    monkeypatch.setattr(
        "potstill.workflows.distill.require_sound", lambda setup, place, note: Checked("not planned", [])
    )


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the memory that is available when a number is chosen."""

    def set_to(size: int) -> None:
        monkeypatch.setattr(choosing, "available", lambda recipe, folder: (size, 0))

    return set_to


def weights(run: RunDir) -> str:
    return str(run.receipt()["student"]["weights_sha256_end"])


def test_the_logits_take_an_eighth_of_what_the_plan_leaves(
    auto: Path, free: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(auto)
    planned = plan(resolve(recipe).with_recipe(with_chunk(recipe, 32)))
    asked: list[object] = []
    monkeypatch.setattr(choosing, "plan", lambda resolved: asked.append(resolved.recipe) or planned)
    share, never = choosing.AMPLE, 2**60
    monkeypatch.setattr(choosing, "AMPLE", never)
    for positions in (32, 64, 128, 256):
        just = planned.peak_bytes + 8 * (2 * 4 * positions * 258)  # float32 of two models of 258 ids
        free(just)
        found = choose_chunk(resolve(recipe))
        assert (found.asked, found.used) == ("auto", positions)
        free(just - 1)
        assert choose_chunk(resolve(recipe)).used == max(positions // 2, 32)
    assert asked == [with_chunk(recipe, 32)] * 8
    asked.clear()
    monkeypatch.setattr(choosing, "AMPLE", share)
    free(NONE)
    assert choose_chunk(resolve(recipe)).used == 32
    free(AMPLE)
    assert choose_chunk(resolve(recipe)).used == 256
    on_cuda = dataclasses.replace(resolve(recipe), device=torch.device("cuda"))
    assert choose_chunk(on_cuda).used == 1024
    free(32 * (2 * 4 * 1024 * 258))
    assert (choose_chunk(on_cuda).used, asked) == (
        1024,
        [with_chunk(recipe, 32)],
    )  # that of NONE: no plan where it is ample


def test_a_number_is_taken_as_it_is_and_what_cannot_be_planned_has_the_usual_one(
    tiny_recipe: Write, auto: Path, free: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = choose_chunk(resolve(load_recipe(tiny_recipe("set.yaml", objective="{chunk: 7}"))))
    assert (found.asked, found.used) == (7, 7)

    def cannot(*_: object) -> None:
        raise RuntimeError("a layer without a fake\nsecond line")

    monkeypatch.setattr(choosing, "plan", cannot)
    free(NONE)
    found = choose_chunk(resolve(load_recipe(auto)))
    assert found.used == 256 and "not planned: a layer without a fake" in found.why


def test_a_run_goes_on_with_the_number_that_it_began_with(
    quick: None, auto: Path, free: Callable[[int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number changes bits: a run under no free memory has others. One that goes on there has not."""
    free(AMPLE)
    whole = distill(auto, out=tmp_path / "whole")
    log = RunDir.log

    def dying(run: RunDir, step: int, metrics: dict[str, float]) -> None:
        if step == 3:
            raise KeyboardInterrupt
        log(run, step, metrics)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunDir, "log", dying)
        distill(auto, out=tmp_path / "cut")
    free(NONE)
    cut = distill(auto, resume=True, out=tmp_path / "cut")
    other = distill(auto, out=tmp_path / "other")
    assert weights(cut) == weights(whole) != weights(other)
    for run, used in ((whole, 256), (cut, 256), (other, 32)):
        kept = run.receipt()["chunk"]
        assert (kept["asked"], kept["used"]) == ("auto", used)
        assert load_recipe(run.resolved).objective.chunk == used
    with pytest.raises(UserError, match=r"another recipe: objective\.chunk \(256 -> 64\)"):
        distill(auto, overrides=["objective.chunk=64"], resume=True, out=whole.path)


def test_every_rank_takes_the_first_one_s(
    quick: None, auto: Path, free: Callable[[int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the only rank is told what another first rank would say."""
    free(NONE)
    told = choosing.Chunk("auto", 128, "said by the first")
    says = "potstill.training.distributed.Ranks.broadcast"
    monkeypatch.setattr(says, lambda ranks, value: told if isinstance(value, choosing.Chunk) else value)
    assert distill(auto, overrides=["train.steps=1"], out=tmp_path / "run").receipt()["chunk"]["used"] == 128


def test_whatever_runs_a_recipe_has_a_number(
    quick: None,
    auto: Path,
    free: Callable[[int], None],
    teacher_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free(NONE)
    seen: list[int] = []

    def watched(*given: object, **named: object) -> object:
        setup = set_up(*given, **named)  # type: ignore[arg-type]
        seen.append(setup.student.objective.chunk)
        return setup

    monkeypatch.setattr("potstill.workflows.distill.set_up", watched)
    monkeypatch.setattr("potstill.preflight.trial_steps.set_up", watched)
    evaluate(load_recipe(auto), teacher_folder)
    assert main(["distill", str(auto), "--smoke", "1"]) == 0
    assert seen == [32, 32]
    untouched = set_up(resolve(load_recipe(auto)), lambda text: None)
    assert untouched.student.objective.chunk == 256  # nobody chose


def test_plan_says_the_number_and_why(
    auto: Path, free: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    free(AMPLE)
    assert main(["plan", str(auto)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("objective.chunk")]
    assert line.startswith(
        "objective.chunk: 256, auto: more is not faster; logits of both models take 516.0 KiB"
    )
    assert main(["plan", str(auto), "objective.chunk=8", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["chunk"] == {"asked": 8, "used": 8, "why": "as the recipe says"}
