"""What `auto` means for `objective.chunk` and `train.matmul`: chosen once, before a run, and kept with it.

Both change results by rounding. So a run that is resumed, its evaluations and its report take what the run
started with, which its `resolved.yaml` has, whatever memory is free by then and whichever processor it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from potstill.build.resolve import Resolved
from potstill.errors import one_line
from potstill.io.cpu_matmul import MatmulBackend, choose_matmul
from potstill.io.terminal import size
from potstill.preflight.plan import available, plan
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
    def summary(self) -> str:
        return f"objective.chunk: {self.used}, {self.why}"

    def as_dict(self) -> dict[str, Any]:
        """For machines."""
        return dataclasses.asdict(self)


def choose_chunk(resolved: Resolved, note: Callable[[str], None] = lambda text: None) -> Chunk:
    """The recipe's own number; or one that the free memory of its device allows, which is logged."""
    config = resolved.recipe.objective
    if config.chunk != "auto":
        return Chunk(config.chunk, config.chunk, "as the recipe says")
    try:
        chosen = _by_memory(resolved)
    except Exception as error:  # what is wrong with the recipe is reported where its objects are made
        usual = config.positions_at_once
        return Chunk("auto", usual, f"auto: the memory is not planned: {one_line(error)}")
    note(chosen.summary)
    return chosen


def _by_memory(resolved: Resolved) -> Chunk:
    most = MOST_POSITIONS[resolved.device.type]
    there, needed = available(resolved.recipe, Path())[0], logits_bytes(most, resolved.teacher.vocab_size)
    if AMPLE * needed <= there:
        logits = f"logits of both models take {size(needed)} of {size(there)}"
        return Chunk("auto", most, f"auto: {MORE}; {logits}")
    planned = plan(resolved.with_recipe(with_chunk(resolved.recipe, FEWEST_POSITIONS)))
    free = max(there - planned.peak_bytes, 0)
    ids = resolved.student.model_config.get_text_config().vocab_size
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


def choose_backend(resolved: Resolved, note: Callable[[str], None]) -> MatmulBackend:
    """The recipe's own; or what this machine's processor is best at, which is logged."""
    config = resolved.recipe.train
    backend, reason = choose_matmul(config.matmul, resolved.device)
    if config.matmul == "auto":
        note(f"train.matmul: {backend}, {reason}")
    return backend


def with_matmul(recipe: Recipe, backend: Literal["auto"] | MatmulBackend) -> Recipe:
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, matmul=backend))


def settle(resolved: Resolved, note: Callable[[str], None]) -> Resolved:
    """With nothing left to choose."""
    recipe = with_chunk(resolved.recipe, choose_chunk(resolved, note).used)
    return resolved.with_recipe(with_matmul(recipe, choose_backend(resolved, note)))


def as_started(recipe: Recipe, started: Recipe) -> Recipe:
    """The recipe of a run that goes on, with what was chosen when it started."""
    if recipe.train.matmul == "auto":
        recipe = with_matmul(recipe, started.train.matmul)
    return with_chunk(recipe, started.objective.chunk) if recipe.objective.chunk == "auto" else recipe
