"""The loop: one function, read top to bottom. Everything else is a noun it calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from potstill.errors import UserError
from potstill.recipe import Recipe
from potstill.students.student import Student
from potstill.training.optim import lr_at, make_optimizer, set_lr
from potstill.types import Batch, Order, Rows, Targets, Teacher

Metrics = dict[str, float]


@dataclass(frozen=True)
class Hooks:
    """What happens beside the mathematics. `evaluate` returns held-out metrics; the loop never sees the
    rows.
    """

    evaluate: Callable[[int], Metrics]
    on_step: Callable[[int, Metrics], None]
    on_best: Callable[[int, Metrics], None]


@dataclass
class Outcome:
    first: Metrics
    """Held-out metrics of the untouched student."""
    last: Metrics = field(default_factory=dict)
    best: Metrics = field(default_factory=dict)
    best_step: int = 0
    """Optimizer steps that the best student has seen; chosen by held-out loss alone."""
    positions: int = 0
    """Supervised positions trained on."""
    seconds: float = 0.0
    """Wall time in steps, evaluations excluded."""


def train(
    student: Student, teacher: Teacher | None, rows: Rows, order: Order, recipe: Recipe, hooks: Hooks
) -> Outcome:
    """Train `student` in place for `recipe.train.steps` steps.

    `teacher` may be None only where `objective.kd_weight` is 0. The gradient of a step is that of the sum of
    the loss over all supervised positions of the step, divided once by their number: how rows are cut into
    micro-batches changes nothing.
    """
    plan, device = recipe.train, student.model.device
    optimizer = make_optimizer(student, plan)
    first = hooks.evaluate(0)
    outcome = Outcome(first=first, best=first)
    hooks.on_best(0, first)
    student.train()

    for step in range(plan.steps):
        started = time.perf_counter()
        step_rows = order.rows(step, plan.rows_per_step)
        size = plan.micro_batch_rows
        batches = [rows.batch(step_rows[i : i + size]) for i in range(0, len(step_rows), size)]
        positions = sum(
            len(batch.positions_N) for batch in batches
        )  # of the whole step, before the first backward

        sums: dict[str, float] = {}
        for batch in (batch.to(device) for batch in batches):
            terms = student(batch, None if teacher is None else ask(teacher, batch, step))
            (terms["loss"] / positions).backward()  # the one division
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach())

        parameters = [p for p in student.parameters() if p.grad is not None]
        grad_norm = get_total_norm(p.grad for p in parameters if p.grad is not None)
        if not torch.isfinite(grad_norm):
            raise UserError(
                f"step {step + 1}: the gradient norm is {float(grad_norm)}. The weights are those before"
                f" the step."
            )
        if plan.clip is not None:
            clip_grads_with_norm_(parameters, plan.clip, grad_norm)
        lr = set_lr(optimizer, lr_at(step, plan))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        seconds = time.perf_counter() - started
        outcome.positions += positions
        outcome.seconds += seconds
        hooks.on_step(
            step + 1,
            {f"train/{name}": value / positions for name, value in sums.items()}
            | {
                "train/lr": lr,
                "train/grad_norm": float(grad_norm),
                "train/positions": positions,
                "train/epoch": order.epoch(step, plan.rows_per_step),
                "speed/tokens_per_s": sum(batch.input_ids_BT.numel() for batch in batches) / seconds,
                "speed/step_s": seconds,
            },
        )

        is_last = step + 1 == plan.steps
        if is_last or (recipe.eval.every and (step + 1) % recipe.eval.every == 0):
            outcome.last = hooks.evaluate(step + 1)
            student.train()
            if outcome.last["heldout/loss"] < outcome.best["heldout/loss"]:
                outcome.best, outcome.best_step = outcome.last, step + 1
                hooks.on_best(step + 1, outcome.last)
    return outcome


def ask(teacher: Teacher, batch: Batch, step: int) -> Targets:
    """The teacher's targets, or the end of the run with a name: never a step without them."""
    try:
        targets = teacher.targets(batch)
    except (RuntimeError, ValueError, IndexError, TypeError, OSError) as error:
        raise UserError(
            f"step {step + 1}: the teacher failed on rows {batch.rows_B.tolist()}: {type(error).__name__}:"
            f" {error}"
        ) from error
    if len(targets) != len(batch.positions_N):
        raise UserError(
            f"step {step + 1}: the teacher gave targets for {len(targets)} positions,"
            f" {len(batch.positions_N)} were asked."
        )
    return targets
