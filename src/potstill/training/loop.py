"""The loop: one function, read top to bottom. Everything else is a noun it calls."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from potstill.errors import Fault, Stopped, UserError
from potstill.losses.objective import require_finite
from potstill.models.student import Student
from potstill.recipe.load import Recipe
from potstill.training.checkpoint import Outcome
from potstill.training.distributed import ALONE, Ranks, full
from potstill.training.optim import lr_at, make_optimizer, set_lr
from potstill.training.prefetch import Prefetch
from potstill.types import Batch, Order, Rows, Teacher

Metrics = dict[str, float]
MOST_LEFT_OUT = 3  # in a row: beyond, it is not a bad batch but a bad run


@dataclass(frozen=True)
class Hooks:
    """What happens beside the mathematics. `evaluate` gives held-out metrics; the loop sees no rows."""

    evaluate: Callable[[int], Metrics]
    """It may raise Stopped: the step is then saved, and evaluated when the run goes on."""
    on_step: Callable[[int, Metrics], None]
    on_best: Callable[[int, Metrics], None]
    resume: Callable[[Optimizer], Outcome | None] = lambda optimizer: None
    """Put the newest checkpoint into the student and the optimizer; None where there is none."""
    save: Callable[[Optimizer, Outcome], None] = lambda optimizer, outcome: None
    should_stop: Callable[[], bool] = lambda: False
    on_fault: Callable[[int, str, list[dict[str, Any]]], None] = lambda step, what, rows: None
    """Told the rows, too, that are not usable by themselves: what `offending` gives."""
    beat: Callable[[], None] = lambda: None


def train(
    student: Student,
    teacher: Teacher | None,
    rows: Rows,
    order: Order,
    recipe: Recipe,
    hooks: Hooks,
    ranks: Ranks = ALONE,
) -> Outcome:
    """Train `student` in place up to `recipe.train.steps` steps, or to a stop that was asked for.

    `teacher` may be None only where `objective.kd_weight` is 0. The gradient of a step is that of the sum of
    the loss over all supervised positions of the step, divided once by their number: how rows are cut into
    micro-batches changes nothing.

    Raises:
        UserError: a loss or gradient that `guard.policy` does not let pass; the weights are those before it.
    """
    plan, device = recipe.train, student.model.device
    ceiling = loss_ceiling(recipe, student.model.vocab_size)
    stepping = ranks.spread(student)
    optimizer = make_optimizer(student, plan)
    resumed = hooks.resume(optimizer)
    outcome = resumed or Outcome()
    saved = -1 if resumed is None else resumed.step
    student.train()

    def micro_batches(step: int) -> list[Batch]:
        """Of all ranks."""
        step_rows = order.rows(step, plan.rows_per_step)
        size = ranks.rows_at_once(plan.micro_batch_rows, plan.rows_per_step)
        return [rows.batch(step_rows[i : i + size]) for i in range(0, len(step_rows), size)]

    def first_of(step: int) -> Batch | None:
        if step >= plan.steps or step + 1 in outcome.left_out:
            return None
        return ranks.share(micro_batches(step))[0]

    ahead = Prefetch(teacher, device, first_of)

    while True:
        is_last = outcome.step == plan.steps
        stopping = ranks.any(hooks.should_stop()) and not is_last
        evaluating = outcome.step == 0 or is_last or due(outcome.step, recipe.eval.every)
        try:
            if evaluating and outcome.evaluated < outcome.step and not stopping:
                with ranks.whole(student):
                    found = ranks.first_says(hooks.evaluate(outcome.step))
                outcome.first, outcome.last = outcome.first or found, found
                if not outcome.best or found["heldout/loss"] < outcome.best["heldout/loss"]:
                    outcome.best, outcome.best_step = found, outcome.step
                    with ranks.whole(student):
                        hooks.on_best(outcome.step, found)
                outcome.evaluated = outcome.step
        except Stopped:
            stopping = True
        if outcome.step > saved and (stopping or save_due(outcome.step, recipe)):
            hooks.beat()
            hooks.save(optimizer, outcome)
            saved = outcome.step
        if stopping or is_last:
            return outcome
        if outcome.step + 1 in outcome.left_out:
            outcome.step += 1
            continue

        step, started = outcome.step, time.perf_counter()
        step_rows = order.rows(step, plan.rows_per_step)
        of_all_ranks = micro_batches(step)
        positions = sum(len(batch.positions_N) for batch in of_all_ranks)  # of the step, before any backward
        batches = ranks.share(of_all_ranks)
        for batch in batches:
            with named(step, batch.rows_B.tolist()):
                student.require_labels(batch)

        of_batches: list[dict[str, Tensor]] = []  # on the device: nothing waits for it until `read`
        sums: dict[str, float] = {}
        try:
            for batch, targets in ahead.step(step, batches):
                with ranks.until_last(stepping, is_last=len(of_batches) + 1 == len(batches)):
                    with named(step, batch.rows_B.tolist()):
                        terms = stepping(batch, targets)
                    # The one division. Ranks average their gradients; the sum is meant.
                    (terms["loss"] / positions * ranks.world).backward()
                of_batches.append({name: value.detach() for name, value in terms.items()})
                hooks.beat()
            parameters = [p for p in student.parameters() if p.grad is not None]
            total_norm = get_total_norm(p.grad for p in parameters if p.grad is not None)
            values, grad_norm = read(of_batches, full(total_norm))
            for of_batch in values:
                for name, number in of_batch.items():
                    sums[name] = sums.get(name, 0.0) + number
            sums = ranks.total(sums)
            for batch, of_batch in zip(batches, values, strict=True):
                with named(step, batch.rows_B.tolist()):
                    require_finite(of_batch, len(batch.positions_N))
            with named(step, step_rows):
                require_finite(sums, positions)
                require_usable(sums["loss"] / positions, ceiling, grad_norm, student)
        except Fault as fault:
            alone = offending(student, teacher, rows, step_rows, ceiling, hooks.beat)
            optimizer.zero_grad(set_to_none=True)
            refused = Fault(f"{fault} {blamed(alone, len(step_rows))}")
            hooks.on_fault(step + 1, str(refused), alone)
            outcome = without_step(refused, outcome, recipe, lambda: hooks.resume(optimizer))
            saved = min(saved, outcome.step)  # going back may have passed over a damaged checkpoint
            continue
        if plan.clip is not None:
            clip_grads_with_norm_(parameters, plan.clip, total_norm)
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
            "train/grad_norm": grad_norm,
            "train/positions": positions,
            "train/epoch": order.epoch(step, plan.rows_per_step),
            "speed/tokens_per_s": sum(batch.input_ids_BT.numel() for batch in of_all_ranks) / seconds,
            "speed/step_s": seconds,
        }
        hooks.on_step(outcome.step, losses | figures)


def due(step: int, every: int) -> bool:
    return step > 0 and every > 0 and step % every == 0


def save_due(step: int, recipe: Recipe) -> bool:
    """A run that may roll back has a checkpoint to roll back to from its first step on."""
    return due(step, recipe.train.save_every) or (step == 0 and recipe.guard.policy == "rollback")


@contextlib.contextmanager
def named(step: int, step_rows: list[int]) -> Iterator[None]:
    """Say which step and which rows an error is about."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"step {step + 1}, rows [{shown(step_rows)}]: {error}") from error


def shown(numbers: list[int]) -> str:
    """At most 16 of them."""
    return ", ".join(map(str, numbers[:16])) + (f", … {len(numbers)} in all" if numbers[16:] else "")


def loss_ceiling(recipe: Recipe, vocab_size: int) -> float:
    """The recipe's, or five times what a uniform guess costs a label, ln V, and the same for the KD term."""
    objective = recipe.objective
    weight = objective.ce_weight + objective.kd_weight * objective.temperature**2
    return recipe.guard.loss_ceiling or 5 * weight * math.log(vocab_size)


def read(of_batches: list[dict[str, Tensor]], total_norm: Tensor) -> tuple[list[Metrics], float]:
    """The terms of each micro-batch and the norm of the gradient: a step waits for its device here alone."""
    on_device = [value for terms in of_batches for value in terms.values()]
    numbers = iter(torch.stack([value.double() for value in (*on_device, total_norm)]).tolist())
    return [{name: next(numbers) for name in terms} for terms in of_batches], next(numbers)


def require_usable(loss: float, ceiling: float, grad_norm: float, student: Student) -> None:
    """Refuse what no update may be made of; a NaN is below no ceiling."""
    if not loss <= ceiling:
        raise Fault(
            f"the loss is {loss:.6g} nats per position, above the ceiling of {ceiling:.6g}"
            " (guard.loss_ceiling)."
        )
    if not math.isfinite(grad_norm):
        broken = (
            n for n, p in student.named_parameters() if p.grad is not None and not p.grad.isfinite().all()
        )
        raise Fault(f"the gradient norm is {grad_norm}, first in {next(broken, 'the sum')}.")


def offending(
    student: Student,
    teacher: Teacher | None,
    rows: Rows,
    step_rows: list[int],
    ceiling: float,
    beat: Callable[[], None],
) -> list[dict[str, Any]]:
    """Every row of a refused step that is not usable by itself: {"row", and "loss" in nats per position or
    "grad_norm"}, numbers where they are finite and text where not. Leaves the random state as it was.
    """
    device = student.model.device
    found: list[dict[str, Any]] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for row in dict.fromkeys(step_rows):
            beat()
            student.zero_grad(set_to_none=True)
            batch = rows.batch([row]).to(device)
            positions = len(batch.positions_N)
            terms = student(batch, None if teacher is None else teacher.targets(batch))
            (terms["loss"] / positions).backward()
            norm = get_total_norm(p.grad for p in student.parameters() if p.grad is not None)
            (of_row,), grad_norm = read([{name: value.detach() for name, value in terms.items()}], full(norm))
            worst = next((v for v in of_row.values() if not math.isfinite(v)), of_row["loss"]) / positions
            if not worst <= ceiling:
                found.append({"row": row, "loss": _as_json(worst)})
            elif not math.isfinite(grad_norm):
                found.append({"row": row, "grad_norm": _as_json(grad_norm)})
    return found


def blamed(alone: list[dict[str, Any]], rows: int) -> str:
    """What `offending` found, in a sentence."""
    if not alone:
        return f"None of the step's {rows} rows goes wrong by itself."
    at_fault = shown([entry["row"] for entry in alone])
    return f"Of the step's {rows} rows these go wrong by themselves: [{at_fault}]."


def _as_json(value: float) -> float | str:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else str(value)


def without_step(
    fault: Fault, outcome: Outcome, recipe: Recipe, resume: Callable[[], Outcome | None]
) -> Outcome:
    """Where to go on from after a step whose update was refused, or the end of the run."""
    refused = outcome.step + 1
    if recipe.guard.policy == "stop":
        raise UserError(
            f"{fault} The weights are those before the step. Look at these rows, lower train.lr, or set"
            " guard.policy: skip."
        ) from fault
    if all(refused - back in outcome.left_out for back in range(1, MOST_LEFT_OUT + 1)):
        raise UserError(
            f"{fault} {MOST_LEFT_OUT} steps before it were left out too; the run is not sound."
        ) from fault
    left_out = [*outcome.left_out, refused]
    if recipe.guard.policy == "rollback" and (earlier := resume()) is not None:
        outcome = earlier
    outcome.left_out = left_out
    return outcome
