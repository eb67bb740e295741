"""The loop: one function, read top to bottom.

What keeps unsound numbers from the weights is in `guard.py`, the arithmetic around a step in `step.py`, and
what happens beside the mathematics in the `Hooks` that a caller gives.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from torch.optim import Optimizer

from potstill.errors import Fault, Stopped
from potstill.models.student import Student
from potstill.recipe.load import Recipe
from potstill.training.checkpoint import Metrics, Outcome
from potstill.training.distributed import ALONE, Ranks
from potstill.training.guard import OnFault, StepGuard
from potstill.training.optim import averaged, lr_at, make_optimizer, set_lr, update_average
from potstill.training.prefetch import Prefetch
from potstill.training.step import error_context
from potstill.types import Data, Teacher


@dataclass(frozen=True)
class Hooks:
    """What happens beside the mathematics. Steps are counted from 1, and 0 is the untouched student."""

    evaluate: Callable[[int], Metrics]
    """Held-out metrics. It may raise Stopped: the step is saved, and evaluated when the run goes on."""
    on_step: Callable[[int, Metrics], None]
    on_best: Callable[[int, Metrics], None]
    resume: Callable[[Optimizer], Outcome | None] = lambda optimizer: None
    """Put the newest checkpoint into the student and the optimizer; None where there is none."""
    save: Callable[[Optimizer, Outcome], None] = lambda optimizer, outcome: None
    should_stop: Callable[[], bool] = lambda: False
    on_fault: OnFault = lambda step, message, rows: None
    beat: Callable[[], None] = lambda: None
    """A sign of life, after each micro-batch and before whatever takes long."""
    is_ahead: bool | None = None
    """Whether the teacher is asked for a micro-batch before the student is done with the one before; None: as the
    device and the teacher are."""


def train(
    student: Student, teacher: Teacher | None, data: Data, recipe: Recipe, hooks: Hooks, ranks: Ranks = ALONE
) -> Outcome:
    """Train `student` in place for `recipe.train.num_steps` steps, or until `hooks.should_stop`.

    The gradient of a step is that of the loss summed over all its supervised positions, divided once by their
    number: how rows are cut into micro-batches and shared among ranks changes nothing. So it is with a mixture's
    balancing loss of all tokens of the step. `teacher` may be None only where `objective.kd_weight` is 0.

    Raises:
        UserError: a loss or gradient that `guard.policy` does not let pass; the weights are those before it.
    """
    plan = recipe.train
    # In this order: FSDP replaces the parameters by shards, which are what the optimizer must hold.
    forward, device = ranks.parallelize(student), student.model.device
    optimizer = make_optimizer(student, plan)
    resumed = hooks.resume(optimizer)
    outcome, saved_step = resumed or Outcome(), -1 if resumed is None else resumed.step
    guard = StepGuard(student, teacher, recipe, hooks.on_fault, hooks.beat)
    prefetch = Prefetch(teacher, data, ranks, device, lambda n: is_taken(n, outcome, recipe), hooks.is_ahead)
    student.train()

    while True:
        is_last = outcome.step == plan.num_steps
        stopping = ranks.any(hooks.should_stop()) and not is_last
        # Before the checkpoint, so that a step's checkpoint holds its evaluation and no resume repeats it.
        if evaluation_due(outcome, recipe) and not stopping:
            stopping = not evaluated(student, optimizer, outcome, hooks, ranks)
        if outcome.step > saved_step and (stopping or checkpoint_due(outcome.step, recipe)):
            hooks.beat()
            hooks.save(optimizer, outcome)
            saved_step = outcome.step
        if stopping or is_last:
            return outcome
        if outcome.step + 1 in outcome.left_out:
            outcome.step += 1
            continue

        started = time.perf_counter()
        step = prefetch.step(outcome.step)
        step.require_labels(student)
        try:
            with student.on_grid():
                counts = step.expert_counts(student, hooks.beat)
                for batch, targets in prefetch.with_targets(step):
                    with ranks.no_sync_before_last(forward, is_last=step.is_at_last_batch):
                        with error_context(step.number, batch):
                            terms = forward(batch, targets, *counts)
                        # The one division: the router's term is a part of a mean over the step already.
                        loss = terms["loss"] / step.positions + student.router_term(terms)
                        (loss * ranks.world).backward()  # ranks average their gradients, and the sum is meant
                    step.add(terms)
                    hooks.beat()
            totals = step.totals(student)
            guard.require_usable(step, totals)
        except Fault as fault:
            outcome = guard.leave_out(step, fault, outcome, lambda: hooks.resume(optimizer))
            # A rollback may have gone past a damaged checkpoint, whose step is then to be saved again.
            saved_step = min(saved_step, outcome.step)
            continue
        totals.clip(plan.clip)
        lr = set_lr(optimizer, lr_at(step.number, plan))
        optimizer.step()
        update_average(optimizer, step.number)
        optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        outcome.step += 1
        outcome.positions += step.positions
        outcome.seconds += seconds
        hooks.on_step(outcome.step, step.metrics(totals, lr, data, seconds))


def evaluated(student: Student, optimizer: Optimizer, outcome: Outcome, hooks: Hooks, ranks: Ranks) -> bool:
    """Evaluate the student with its averaged weights, where there are any, and hand it over where none was better.
    False where a signal cut it short.
    """
    try:
        with averaged(optimizer):
            # Before they are gathered, which every forward does again.
            with student.on_grid(), ranks.gathered(student):
                metrics = ranks.broadcast(hooks.evaluate(outcome.step))
            outcome.first, outcome.last = outcome.first or metrics, metrics
            if not outcome.best or metrics["heldout/loss"] < outcome.best["heldout/loss"]:
                outcome.best, outcome.best_step = metrics, outcome.step
                with ranks.gathered(student):
                    hooks.on_best(outcome.step, metrics)
    except Stopped:
        return False
    outcome.evaluated = outcome.step  # last: until then it is still to be done
    return True


def evaluation_due(outcome: Outcome, recipe: Recipe) -> bool:
    """At the start, at intervals and at the end; once, however often a run is resumed there."""
    step = outcome.step
    is_moment = step in (0, recipe.train.num_steps) or is_multiple(step, recipe.eval.every)
    return is_moment and outcome.evaluated < step


def checkpoint_due(step: int, recipe: Recipe) -> bool:
    """A run that may roll back has a checkpoint to roll back to from its first step on."""
    return is_multiple(step, recipe.train.save_every) or (step == 0 and recipe.guard.policy == "rollback")


def is_multiple(step: int, every: int) -> bool:
    return step > 0 and every > 0 and step % every == 0


def is_taken(number: int, outcome: Outcome, recipe: Recipe) -> bool:
    """Whether a step, counted from 0, is before the end of the run and not left out by the guard."""
    return number < recipe.train.num_steps and number + 1 not in outcome.left_out
