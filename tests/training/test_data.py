"""When the loop asks for a step's rows: once, in order, and not before the update that they may depend on."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from potstill import load_recipe
from potstill.build.resolve import resolve
from potstill.build.setup import RunSetup, set_up
from potstill.data.packing import PackedRows
from potstill.training import loop
from potstill.training.checkpoint import Outcome
from potstill.training.loop import Hooks, train
from potstill.training.prefetch import Prefetch
from potstill.types import Batch

Recipe = Callable[..., Path]
STEPS = 4
TRAIN = f"{{steps: {STEPS}, rows_per_step: 4, rows_per_micro_batch: 2, lr: 1e-2, device: cpu}}"
ON_BOTH = pytest.mark.parametrize("is_ahead", [False, True])


class StudentWritten:
    """Rows that are chosen by the student's weights at the time they are asked for."""

    fixed = False

    def __init__(self, setup: RunSetup) -> None:
        self.setup = setup
        self.requests: list[tuple[int, str]] = []

    def step(self, step: int) -> list[Batch]:
        weights = self.setup.student.weights_sha256()
        self.requests.append((step, weights))
        return [self.setup.corpus.train.batch(rows) for rows in rows_of(self.setup, weights)]

    def epoch(self, step: int) -> int:
        return 0

    def figures(self, step: int) -> dict[str, float]:
        return {}


def rows_of(setup: RunSetup, weights: str) -> list[list[int]]:
    """Two micro-batches of two rows, of those that the digits of a hash name."""
    one, two, three, four = (int(weights[i : i + 8], 16) % len(setup.corpus.train) for i in (0, 8, 16, 24))
    return [[one, two], [three, four]]


class Logged:
    """The recipe's own data, and when it was asked for what."""

    fixed = True

    def __init__(self, setup: RunSetup, events: list[tuple[str, int]]) -> None:
        self.data, self.events = setup.data(), events

    def step(self, step: int) -> list[Batch]:
        self.events.append(("asked", step))
        return self.data.step(step)

    def epoch(self, step: int) -> int:
        return self.data.epoch(step)

    def figures(self, step: int) -> dict[str, float]:
        return self.data.figures(step)


def run(
    setup: RunSetup,
    data: Any,
    is_ahead: bool,
    on_step: Callable[[int, Any], None] = lambda *_: None,
    **hooks: Any,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Prefetch", lambda *given: Prefetch(*given[:-1], is_ahead=is_ahead))
        every = Hooks(lambda step: {"heldout/loss": math.inf}, on_step, lambda *_: None, **hooks)
        train(setup.student, setup.teacher, data, setup.recipe, every)


@pytest.fixture
def setup(tiny_recipe: Recipe) -> RunSetup:
    recipe = tiny_recipe(train=TRAIN, guard="{policy: skip}")
    return set_up(resolve(load_recipe(recipe)), lambda text: None)


@ON_BOTH
def test_rows_that_the_student_writes_are_of_the_weights_after_the_last_update(
    setup: RunSetup, is_ahead: bool
) -> None:
    weights = [setup.student.weights_sha256()]
    trained: list[list[int]] = []
    forward = setup.student.forward

    def noted(batch: Batch, targets: Any) -> dict[str, Tensor]:
        trained.append(batch.rows_B.tolist())
        return forward(batch, targets)

    setup.student.forward = noted  # type: ignore[method-assign]
    data = StudentWritten(setup)
    run(setup, data, is_ahead, lambda *_: weights.append(setup.student.weights_sha256()))
    assert len(set(weights)) == STEPS + 1
    assert data.requests == list(enumerate(weights[:STEPS]))
    assert trained == [rows for of in weights[:STEPS] for rows in rows_of(setup, of)]


@ON_BOTH
def test_fixed_rows_are_asked_for_once_in_order_and_ahead_only_where_prefetch_is(
    setup: RunSetup, is_ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, int]] = []
    packed: list[list[int]] = []
    batch = PackedRows.batch
    monkeypatch.setattr(
        PackedRows, "batch", lambda self, rows: packed.append(list(rows)) or batch(self, rows)
    )
    run(setup, Logged(setup, events), is_ahead, lambda step, _: events.append(("updated", step)))
    in_turn = [event for step in range(STEPS) for event in (("asked", step), ("updated", step + 1))]
    ahead = [("asked", 0), *(e for n in range(1, STEPS) for e in (("asked", n), ("updated", n)))]
    assert events == ([*ahead, ("updated", STEPS)] if is_ahead else in_turn)
    order = setup.corpus.order(0)
    assert packed == [rows[i : i + 2] for n in range(STEPS) for rows in [order.rows(n, 4)] for i in (0, 2)]


@ON_BOTH
def test_a_step_that_is_left_out_is_not_asked_for(setup: RunSetup, is_ahead: bool) -> None:
    """Steps 2 and 4, counted from 1, as a run that was resumed knows them."""
    events: list[tuple[str, int]] = []
    run(setup, Logged(setup, events), is_ahead, resume=lambda optimizer: Outcome(left_out=[2, 4]))
    assert events == [("asked", 0), ("asked", 2)]


@pytest.mark.parametrize("fixed", [True, False])
@ON_BOTH
def test_a_step_after_a_refused_one_is_asked_for_once(setup: RunSetup, is_ahead: bool, fixed: bool) -> None:
    """A loss that is not a number, in the second step's last micro-batch."""
    events: list[tuple[str, int]] = []
    data = Logged(setup, events)
    data.fixed = fixed
    forward, calls = setup.student.forward, [0]

    def spoiled(batch: Batch, targets: Any) -> dict[str, Tensor]:
        calls[0] += 1
        terms = forward(batch, targets)
        return terms | {"loss": terms["loss"] * (math.nan if calls[0] == 4 else 1.0)}

    setup.student.forward = spoiled  # type: ignore[method-assign]
    faults: list[int] = []
    run(setup, data, is_ahead, on_fault=lambda step, *_: faults.append(step))
    assert faults == [2] and events == [("asked", step) for step in range(STEPS)]
    assert all(bool(torch.isfinite(p).all()) for p in setup.student.parameters())
