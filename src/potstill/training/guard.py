"""Steps that no update may be made of: what is refused, which rows are to blame, where the run goes on.

Nothing here is reached by a step whose numbers are sound, but for the look at them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from potstill.errors import Fault, UserError
from potstill.losses.laws import is_plugin
from potstill.losses.objective import require_finite
from potstill.models.student import Student
from potstill.recipe.load import Recipe
from potstill.training.checkpoint import Outcome
from potstill.training.step import Step, Totals, abbreviated, error_context, norm_of_gradients, read
from potstill.types import Batch, Teacher, answer

MAX_LEFT_OUT_IN_A_ROW = 3  # beyond, it is not a bad batch but a bad run

OnFault = Callable[[int, str, list[dict[str, Any]]], None]


class StepGuard:
    """`on_fault` gets the step, counted from 1, the message, and what `rows_at_fault` gives."""

    def __init__(
        self,
        student: Student,
        teacher: Teacher | None,
        recipe: Recipe,
        on_fault: OnFault,
        beat: Callable[[], None],
    ) -> None:
        self.student, self.teacher, self.recipe = student, teacher, recipe
        self.on_fault, self.beat = on_fault, beat
        self.plugin = recipe.objective.divergence.name if is_plugin(student.objective.divergence) else ""
        self.ceiling = loss_ceiling(recipe, student.model.vocab_size)

    def require_usable(self, step: Step, totals: Totals) -> None:
        """The step's own micro-batches first, so that the error names the fewest rows.

        Raises:
            Fault: a term that is not finite, a loss above its ceiling, a gradient that is not finite.
        """
        for batch, sums in zip(step.share, totals.of_batches, strict=True):
            with error_context(step.number, batch):
                require_finite(sums, len(batch.positions_N), self.plugin)
        with error_context(step.number, *step.batches):
            require_finite(totals.sums, step.positions, self.plugin)
            loss = totals.sums["loss"] / step.positions
            if not loss <= self.ceiling:  # a NaN is below no ceiling
                raise Fault(
                    f"the loss is {loss:.6g} nats per position, above the ceiling of {self.ceiling:.6g}"
                    " (guard.loss_ceiling)."
                )
            if not math.isfinite(totals.grad_norm):
                first = next(_not_finite(self.student), "the sum")
                raise Fault(f"the gradient norm is {totals.grad_norm}, first in {first}.")

    def leave_out(
        self, step: Step, fault: Fault, outcome: Outcome, resume: Callable[[], Outcome | None]
    ) -> Outcome:
        """Report a refused step; where the run goes on from.

        Raises:
            UserError: nowhere; the weights are those before the step.
        """
        at_fault = rows_at_fault(self.student, self.teacher, step.batches, self.ceiling, self.beat)
        # Those of the step or of a row alone would be added to the next step's.
        self.student.zero_grad(set_to_none=True)
        fault = Fault(f"{fault} {blame(at_fault, step.num_rows)}")
        # Reported before the policy is applied: `stop` ends the run there.
        self.on_fault(step.number + 1, str(fault), at_fault)
        return without_step(fault, outcome, self.recipe, resume)


def loss_ceiling(recipe: Recipe, vocab_size: int) -> float:
    """The recipe's, or five times what a uniform guess costs a label, ln V, and the same for the KD term."""
    objective = recipe.objective
    weight = objective.ce_weight + objective.kd_weight * objective.temperature**2
    return recipe.guard.loss_ceiling or 5 * weight * math.log(vocab_size)


def rows_at_fault(
    student: Student,
    teacher: Teacher | None,
    batches: Iterable[Batch],
    ceiling: float,
    beat: Callable[[], None],
) -> list[dict[str, Any]]:
    """Every row of a refused step that is not usable by itself: {"row", and "loss" in nats per position or
    "grad_norm"}, numbers where they are finite and text where not. Leaves the random state as it was.
    """
    device = student.model.device
    seen: set[int] = set()
    at_fault: list[dict[str, Any]] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for row_batch in (row_batch for batch in batches for row_batch in batch.split()):
            row, positions = int(row_batch.rows_B), len(row_batch.positions_N)
            if row in seen:
                continue
            seen.add(row)
            beat()
            student.zero_grad(set_to_none=True)
            on_device = row_batch.to(device)
            terms = student(on_device, None if teacher is None else answer(teacher, on_device))
            (terms["loss"] / positions + student.router_term(terms)).backward()
            total_norm = norm_of_gradients(student.parameters())
            terms.pop("expert_counts", None)
            (sums,), (grad_norm,) = read([terms], [total_norm])
            worst = next((v for v in sums.values() if not math.isfinite(v)), sums["loss"]) / positions
            if not worst <= ceiling:
                at_fault.append({"row": row, "loss": _as_json(worst)})
            elif not math.isfinite(grad_norm):
                at_fault.append({"row": row, "grad_norm": _as_json(grad_norm)})
    return at_fault


def blame(at_fault: list[dict[str, Any]], num_rows: int) -> str:
    """What `rows_at_fault` found, in a sentence."""
    if not at_fault:
        return f"None of the step's {num_rows} rows goes wrong by itself."
    rows = abbreviated([entry["row"] for entry in at_fault])
    return f"Of the step's {num_rows} rows these go wrong by themselves: [{rows}]."


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
    if all(refused - back in outcome.left_out for back in range(1, MAX_LEFT_OUT_IN_A_ROW + 1)):
        raise UserError(
            f"{fault} {MAX_LEFT_OUT_IN_A_ROW} steps before it were left out too; the run is not sound."
        ) from fault
    left_out = [*outcome.left_out, refused]
    if recipe.guard.policy == "rollback" and (earlier := resume()) is not None:
        outcome = earlier
    # After the rollback: the checkpoint does not know yet that the step is left out.
    outcome.left_out = left_out
    return outcome


def _not_finite(student: Student) -> Iterator[str]:
    """Names of parameters whose gradient has a number that is not finite."""
    for name, parameter in student.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            yield name


def _as_json(value: float) -> float | str:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else str(value)
