"""The loop: one function, read top to bottom. Everything else is a noun it calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from potstill.errors import UserError
from potstill.recipe import Recipe
from potstill.students.student import Student
from potstill.training.checkpoint import Outcome
from potstill.training.optim import lr_at, make_optimizer, set_lr
from potstill.types import Batch, Order, Rows, Targets, Teacher

Metrics = dict[str, float]


@dataclass(frozen=True)
class Hooks:
    """What happens beside the mathematics. `evaluate` gives held-out metrics; the loop sees no rows."""

    evaluate: Callable[[int], Metrics]
    on_step: Callable[[int, Metrics], None]
    on_best: Callable[[int, Metrics], None]
    resume: Callable[[Optimizer], Outcome | None] = lambda optimizer: None
    save: Callable[[Optimizer, Outcome], None] = lambda optimizer, outcome: None
    should_stop: Callable[[], bool] = lambda: False


def train(
    student: Student, teacher: Teacher | None, rows: Rows, order: Order, recipe: Recipe, hooks: Hooks
) -> Outcome:
    """Train `student` in place up to `recipe.train.steps` steps, or to a stop that was asked for.

    `teacher` may be None only where `objective.kd_weight` is 0. The gradient of a step is that of the sum of
    the loss over all supervised positions of the step, divided once by their number: how rows are cut into
    micro-batches changes nothing.
    """
    plan, device = recipe.train, student.model.device
    optimizer = make_optimizer(student, plan)
    outcome = hooks.resume(optimizer)
    if outcome is None:
        first = hooks.evaluate(0)
        outcome = Outcome(first=first, best=first)
        hooks.on_best(0, first)
    student.train()

    for step in range(outcome.step, plan.steps):
        started = time.perf_counter()
        step_rows = order.rows(step, plan.rows_per_step)
        size = plan.micro_batch_rows
        batches = [rows.batch(step_rows[i : i + size]) for i in range(0, len(step_rows), size)]
        positions = sum(len(batch.positions_N) for batch in batches)  # of the whole step, before any backward

        sums: dict[str, float] = {}
        for batch in (batch.to(device) for batch in batches):
            targets = None if teacher is None else ask(teacher, batch, step)
            try:
                terms = student(batch, targets)
            except UserError as error:
                raise UserError(f"step {step + 1}, rows {batch.rows_B.tolist()}: {error}") from error
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
        outcome.step = step + 1
        outcome.positions += positions
        outcome.seconds += seconds
        losses = {f"train/{name}": value / positions for name, value in sums.items()}
        figures = {
            "train/lr": lr,
            "train/grad_norm": float(grad_norm),
            "train/positions": positions,
            "train/epoch": order.epoch(step, plan.rows_per_step),
            "speed/tokens_per_s": sum(batch.input_ids_BT.numel() for batch in batches) / seconds,
            "speed/step_s": seconds,
        }
        hooks.on_step(outcome.step, losses | figures)

        is_last = outcome.step == plan.steps
        if is_last or due(outcome.step, recipe.eval.every):
            outcome.last = hooks.evaluate(outcome.step)
            if outcome.last["heldout/loss"] < outcome.best["heldout/loss"]:
                outcome.best, outcome.best_step = outcome.last, outcome.step
                hooks.on_best(outcome.step, outcome.last)
        stopping = hooks.should_stop() and not is_last
        if stopping or due(outcome.step, plan.save_every):
            hooks.save(optimizer, outcome)
        if stopping:
            break
    return outcome


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


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
