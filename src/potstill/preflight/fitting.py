"""The mildest changes with which a run fits this machine, for a recipe that is being written: `potstill init`.

`plan_advice` names changes to a recipe that somebody has written; here they are made, in one order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from potstill.build.resolve import Resolved
from potstill.errors import UserError, one_line
from potstill.preflight.plan import Plan, available, plan

SHARE = 0.9
"""Of the memory that is available now: somebody else may take some before the run starts."""

Changes = dict[str, Any]
"""Dotted field -> value."""


@dataclass(frozen=True)
class Fitted:
    """What was changed, and the plan with it."""

    changes: Changes
    planned: Plan | None
    """None: see `why_not`."""
    memory: int
    """Bytes that are available."""
    disk: int
    whole_bytes: int = 0
    """The planned peak without a change."""
    why_not: str = ""
    """What could not be planned."""
    tried: list[str] = field(default_factory=list)
    """Fields that were changed one after the other, where none of it is enough."""

    @property
    def fits(self) -> bool:
        return self.planned is not None and self.planned.fits(self.memory, self.disk)


def fitted(
    resolved: Resolved, recipe_with: Callable[[Changes], Resolved], is_open: Callable[[str], bool]
) -> Fitted:
    """Plan the run, and change what `is_open` until it fits: first the micro-batch, then what saves more.

    Args:
        resolved: the run with all rows of a step at once.
        recipe_with: the same with changes.
        is_open: whether a field may be changed.
    """
    memory, disk = available(resolved.recipe, Path("runs"))

    def planned(changes: Changes) -> Plan:
        return plan(recipe_with(changes))

    try:
        whole = planned({})
    except UserError:
        raise
    except Exception as error:  # some models cannot run on fake tensors; `check` runs them
        return Fitted({}, None, memory, disk, why_not=one_line(error))
    bound = int(SHARE * memory)
    if whole.peak_bytes <= bound:
        return Fitted({}, whole, memory, disk, whole.peak_bytes)
    best, tried, changes = whole, list[str](), Changes()
    for step in _steps(resolved, is_open):
        try:
            found = planned(changes | step)
        except (UserError, ImportError):  # a part that is not installed, or a model that it is not for
            continue
        changes, best = changes | step, found
        tried += step
        if found.peak_bytes <= bound:
            break
    else:
        return Fitted({}, whole, memory, disk, whole.peak_bytes, tried=tried)
    rows = resolved.recipe.train.rows_per_step
    if "train.rows_per_micro_batch" in changes:
        changes, best = _largest(planned, changes, best, bound, rows)
    return Fitted(changes, best, memory, disk, whole.peak_bytes)


def _steps(resolved: Resolved, is_open: Callable[[str], bool]) -> Iterator[Changes]:
    """From what changes no result to what trains fewer weights or reads a coarser teacher."""
    teacher: Any = resolved.recipe.teacher
    steps: list[Changes] = [{"train.rows_per_micro_batch": 1}, {"train.activation_checkpointing": True}]
    if getattr(teacher, "dtype", "") == "float32":
        steps.append({"teacher.dtype": "bfloat16"})
    if resolved.recipe.student.name != "config":
        steps.append({"student.lora": {"rank": 16, "alpha": 32}})
    if fewer_bits := resolved.teacher.fewer_bits(resolved.device_type):
        steps.append({"teacher.weights": fewer_bits})
    for step in steps:
        if all(map(is_open, step)):
            yield step


def _largest(
    planned: Callable[[Changes], Plan], changes: Changes, one: Plan, bound: int, rows: int
) -> tuple[Changes, Plan]:
    """The largest power of two of rows at once that fits. What a row takes is the difference of two plans."""
    if rows < 2:
        return changes, one
    each = max(planned(changes | {"train.rows_per_micro_batch": 2}).peak_bytes - one.peak_bytes, 1)
    number = 1
    while 2 * number <= rows and one.peak_bytes + (2 * number - 1) * each <= bound:
        number *= 2
    while number > 1:
        found = planned(changes | {"train.rows_per_micro_batch": number})
        if found.peak_bytes <= bound:
            return changes | {"train.rows_per_micro_batch": number}, found
        number //= 2
    return changes, one
