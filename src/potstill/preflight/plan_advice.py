"""Advice for a recipe whose plan does not fit the memory: which fields to change, and the peak that results.

Each field gets the mildest value that makes the run fit, or its last one where none does. Every figure is a plan
of its own; a binary search over the values keeps their number small.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from potstill.build.resolve import Resolved
from potstill.preflight.auto import FEWEST_POSITIONS
from potstill.preflight.plan import Plan, plan
from potstill.recipe.load import Recipe

SHORTEST_ROW = 128
"""Shortest row that is proposed, in tokens: below it there is too little context to learn from."""
CHECKPOINTING: dict[Any, list[Any]] = {False: ["selective", True], "selective": [True], True: []}
"""`train.activation_checkpointing` -> the values that need less memory, mildest first."""


@dataclass(frozen=True)
class Advice:
    """Fields to change, each as `a.b=value`, and the planned peak with them."""

    settings: tuple[str, ...]
    peak_bytes: int
    fits: bool


def advice(resolved: Resolved, now: Plan, memory_bytes: int = 0) -> list[Advice]:
    """Fields that lower the peak of the plan `now`.

    First each one alone, those that suffice at the top. Where none suffices, then also a combination: fields are
    added in order until the run fits, or all are in. In that order, fields that change no result come before
    `train.precision`, `teacher.dtype` and, last, `corpus.tokens_per_row`, which do.
    """
    recipe = resolved.recipe

    def peak(changed: Recipe) -> int:
        changed_plan = plan(resolved.with_recipe(changed))
        # The libraries of `now`: this process has grown by the plans since.
        return dataclasses.replace(changed_plan, libraries=now.libraries).peak_bytes

    def mildest(option: _Option) -> tuple[Advice, Any]:
        """The mildest value of one field that makes the run fit, else its last one."""
        values, lowest = option.values, peak(option.apply(recipe, option.values[-1]))
        chosen, low, high = values[-1], 0, len(values) - 1
        while lowest <= memory_bytes and low < high:
            middle = (low + high) // 2
            middle_peak = peak(option.apply(recipe, values[middle]))
            if middle_peak <= memory_bytes:
                chosen, lowest, high = values[middle], middle_peak, middle
            else:
                low = middle + 1
        return Advice((option.setting(chosen),), lowest, lowest <= memory_bytes), chosen

    changes = [(option, *mildest(option)) for option in _options(resolved)]
    changes = [change for change in changes if change[1].peak_bytes < now.peak_bytes]
    alone = sorted((each for _, each, _ in changes), key=lambda each: (not each.fits, each.peak_bytes))
    if len(changes) < 2 or alone[0].fits:
        return alone
    combined, lowest = recipe, now.peak_bytes
    settings: tuple[str, ...] = ()
    for option, _, value in changes:
        candidate = option.apply(combined, value)
        if (lower := peak(candidate)) >= lowest:
            continue
        combined, settings, lowest = candidate, (*settings, option.setting(value)), lower
        if lowest <= memory_bytes:
            break
    return [*alone, Advice(settings, lowest, lowest <= memory_bytes)]


@dataclass(frozen=True)
class _Option:
    """A field that can lower the peak."""

    field: str
    values: list[Any]
    """From the mildest change to the strongest."""

    def setting(self, value: Any) -> str:
        """As an override of the command line."""
        return f"{self.field}={str(value).lower()}"

    def apply(self, recipe: Recipe, value: Any) -> Recipe:
        section, _, name = self.field.partition(".")
        changed = dataclasses.replace(getattr(recipe, section), **{name: value})
        return dataclasses.replace(recipe, **{section: changed})


def _options(resolved: Resolved) -> list[_Option]:
    """Fields that may still be lowered; the order is that in which `advice` combines them."""
    recipe, train = resolved.recipe, resolved.recipe.train
    fewer_bits = resolved.teacher.fewer_bits(resolved.device_type)
    options = [
        _Option("train.rows_per_micro_batch", _halves(train.micro_batch_rows, 1)),
        _Option("objective.chunk", _halves(recipe.objective.positions_at_once, FEWEST_POSITIONS)),
        _Option("train.activation_checkpointing", CHECKPOINTING[train.activation_checkpointing]),
        _Option("train.return_memory", [] if train.return_memory else [True]),
        _Option("train.precision", ["bfloat16"] if train.precision == "float32" else []),
        _Option("teacher.dtype", ["bfloat16"] if getattr(recipe.teacher, "dtype", "") == "float32" else []),
        _Option("teacher.weights", [fewer_bits] if fewer_bits else []),
        _Option("teacher.in_memory", ["one"] if getattr(recipe.teacher, "in_memory", "") == "all" else []),
        _Option("corpus.tokens_per_row", _halves(recipe.corpus.tokens_per_row, SHORTEST_ROW)),
    ]
    return [option for option in options if option.values]


def stored(resolved: Resolved, now: Plan, memory_bytes: int) -> Advice | None:
    """Targets captured beforehand, by a process that has the teacher alone; None where they would not help, or cannot
    be. The peak is that of the plan without the teacher's weights, at least: its activations count as the student's.
    """
    if not getattr(resolved.recipe.teacher, "has_weights", False) or resolved.recipe.rollouts is not None:
        return None
    peak = now.peak_bytes - now.teacher
    settings = ("teacher={name: store, path: STORE}",)
    return Advice(settings, peak, peak <= memory_bytes) if now.teacher else None


def _halves(value: int, smallest: int) -> list[int]:
    halves = []
    while (value := value // 2) >= smallest:
        halves.append(value)
    return halves
