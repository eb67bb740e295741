"""What to change of a recipe whose plan does not fit the memory, with the peak that each change leaves.

A field is turned as little as makes the run fit, and as far as it goes where that is not enough. Each figure
is a plan of its own; a search by halves keeps their number small.
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
"""Tokens: a row is rather made shorter than a smaller model taken, but not so short that it says nothing."""
CHECKPOINTING: dict[Any, list[Any]] = {False: ["selective", True], "selective": [True], True: []}


@dataclass(frozen=True)
class Advice:
    """Fields to change, `a.b=value` each, and the peak that is planned with them."""

    settings: tuple[str, ...]
    peak_bytes: int
    fits: bool


def advice(resolved: Resolved, now: Plan, memory_bytes: int = 0) -> list[Advice]:
    """Fields that lower the peak of the plan `now`: each alone, those that suffice first; then the fewest in
    their order that suffice together, or all.

    Those that change no result come before those that do: `train.precision`, `teacher.dtype` and, last of
    all, `corpus.tokens_per_row`.
    """
    recipe = resolved.recipe

    def peak(changed: Recipe) -> int:
        changed_plan = plan(resolved.with_recipe(changed))
        return dataclasses.replace(changed_plan, libraries=now.libraries).peak_bytes

    def turned(lever: _Lever) -> tuple[Advice, Any]:
        """The lever as little turned as suffices, else as far as it goes."""
        values, least = lever.values, peak(lever.set(recipe, lever.values[-1]))
        chosen, low, high = values[-1], 0, len(values) - 1
        while least <= memory_bytes and low < high:
            middle = (low + high) // 2
            there = peak(lever.set(recipe, values[middle]))
            if there <= memory_bytes:
                chosen, least, high = values[middle], there, middle
            else:
                low = middle + 1
        return Advice((lever.told(chosen),), least, least <= memory_bytes), chosen

    found = [(lever, *turned(lever)) for lever in _levers(recipe)]
    found = [(lever, told, value) for lever, told, value in found if told.peak_bytes < now.peak_bytes]
    alone = sorted((told for _, told, _ in found), key=lambda each: (not each.fits, each.peak_bytes))
    if len(found) < 2 or alone[0].fits:
        return alone
    together, lowest = recipe, now.peak_bytes
    settings: tuple[str, ...] = ()
    for lever, _, value in found:
        tried = lever.set(together, value)
        if (lower := peak(tried)) >= lowest:
            continue
        together, settings, lowest = tried, (*settings, lever.told(value)), lower
        if lowest <= memory_bytes:
            break
    return [*alone, Advice(settings, lowest, lowest <= memory_bytes)]


@dataclass(frozen=True)
class _Lever:
    field: str
    values: list[Any]
    """From the least change to the greatest."""

    def told(self, value: Any) -> str:
        return f"{self.field}={str(value).lower()}"

    def set(self, recipe: Recipe, value: Any) -> Recipe:
        section, _, name = self.field.partition(".")
        changed = dataclasses.replace(getattr(recipe, section), **{name: value})
        return dataclasses.replace(recipe, **{section: changed})


def _levers(recipe: Recipe) -> list[_Lever]:
    train = recipe.train
    levers = [
        _Lever("train.rows_per_micro_batch", _halves(train.micro_batch_rows, 1)),
        _Lever("objective.chunk", _halves(recipe.objective.positions_at_once, FEWEST_POSITIONS)),
        _Lever("train.activation_checkpointing", CHECKPOINTING[train.activation_checkpointing]),
        _Lever("train.return_memory", [] if train.return_memory else [True]),
        _Lever("train.precision", ["bfloat16"] if train.precision == "float32" else []),
        _Lever("teacher.dtype", ["bfloat16"] if getattr(recipe.teacher, "dtype", "") == "float32" else []),
        _Lever("corpus.tokens_per_row", _halves(recipe.corpus.tokens_per_row, SHORTEST_ROW)),
    ]
    return [lever for lever in levers if lever.values]


def _halves(value: int, least: int) -> list[int]:
    found = []
    while (value := value // 2) >= least:
        found.append(value)
    return found
