"""What `auto` is, of `objective.chunk` and `train.matmul`: chosen once, before a run, and kept with it.

Both change results by rounding. So a run that goes on, its evaluations and its report take what it began
with, which its `resolved.yaml` has, whatever memory is free by then and whoever made the processor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from potstill.build.corpus import teacher_vocab_size
from potstill.errors import one_line
from potstill.io.cpu_matmul import Multiplier, choose_matmul
from potstill.io.terminal import size
from potstill.models.load import choose_device
from potstill.preflight.plan import available, configs_of, plan_with
from potstill.recipe.load import Recipe

FEWEST_POSITIONS = 32
"""Of a chunk: with fewer the matrix products are slow, and nothing is saved."""
SHARE = 8
"""The logits of both models may take this part of what is free. A divergence of the user's own has four times
as much alive at once, and glibc keeps some of it: that is less than all of it."""
AMPLE = 32
"""Where they take less than this part of the whole memory, the run is not planned for it: a trace of the step
takes seconds, and whether all of it fits is looked at before the first step anyway."""
MORE = "more is not faster"
MOST_POSITIONS = {"cpu": 256, "cuda": 1024}
"""More make no step faster on a CPU (docs/losses.md); a GPU wants larger products, of a size not measured."""


@dataclass(frozen=True)
class Chunk:
    asked: int | Literal["auto"]
    used: int
    why: str

    @property
    def told(self) -> str:
        return f"objective.chunk: {self.used}, {self.why}"

    def as_dict(self) -> dict[str, Any]:
        """For machines."""
        return dataclasses.asdict(self)


def choose(recipe: Recipe, note: Callable[[str], None] = lambda text: None) -> Chunk:
    """The recipe's own number; or one that the free memory of its device allows, which is told."""
    asked = recipe.objective.chunk
    if asked != "auto":
        return Chunk(asked, asked, "as the recipe says")
    try:
        chosen = _by_memory(recipe)
    except Exception as error:  # what is wrong with the recipe is told where it is assembled
        usual = recipe.objective.positions_at_once
        return Chunk("auto", usual, f"auto: the memory is not planned: {one_line(error)}")
    note(chosen.told)
    return chosen


def _by_memory(recipe: Recipe) -> Chunk:
    most = MOST_POSITIONS[choose_device(recipe.train.device).type]
    there, needed = available(recipe, Path())[0], logits_bytes(most, teacher_vocab_size(recipe))
    if AMPLE * needed <= there:
        logits = f"logits of both models take {size(needed)} of {size(there)}"
        return Chunk("auto", most, f"auto: {MORE}; {logits}")
    configs = configs_of(recipe, None)
    planned = plan_with(with_chunk(recipe, FEWEST_POSITIONS), configs, None)
    free = max(there - planned.peak_bytes, 0)
    ids = configs.student.get_text_config().vocab_size
    used = _largest(free, ids, most)
    reason = {most: MORE, FEWEST_POSITIONS: "fewer are slow"}.get(used, "as many as may be")
    logits = f"logits of both models take {size(logits_bytes(used, ids))}"
    return Chunk("auto", used, f"auto: {reason}; {logits}, {size(free)} are free beside the plan")


def logits_bytes(positions: int, ids: int) -> int:
    """Of student and teacher in float32; the gradient takes the place of the student's."""
    return 2 * 4 * positions * ids


def _largest(free: int, ids: int, most: int) -> int:
    """The largest power of two whose logits are a SHARE of what is free, from FEWEST_POSITIONS to `most`."""
    positions = FEWEST_POSITIONS
    while positions < most and SHARE * logits_bytes(2 * positions, ids) <= free:
        positions *= 2
    return positions


def with_chunk(recipe: Recipe, positions: int | Literal["auto"]) -> Recipe:
    return dataclasses.replace(recipe, objective=dataclasses.replace(recipe.objective, chunk=positions))


def choose_multiplier(recipe: Recipe, note: Callable[[str], None]) -> Multiplier:
    """The recipe's own; or what this machine's processor is best at, which is told."""
    used, why = choose_matmul(recipe.train.matmul, choose_device(recipe.train.device))
    if recipe.train.matmul == "auto":
        note(f"train.matmul: {used}, {why}")
    return used


def with_matmul(recipe: Recipe, used: Literal["auto"] | Multiplier) -> Recipe:
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, matmul=used))


def settled(recipe: Recipe, note: Callable[[str], None]) -> Recipe:
    """The recipe with nothing left to choose."""
    return with_matmul(with_chunk(recipe, choose(recipe, note).used), choose_multiplier(recipe, note))


def as_begun(recipe: Recipe, begun: Recipe) -> Recipe:
    """The recipe of a run that goes on, with what was chosen when it began."""
    if recipe.train.matmul == "auto":
        recipe = with_matmul(recipe, begun.train.matmul)
    return with_chunk(recipe, begun.objective.chunk) if recipe.objective.chunk == "auto" else recipe
