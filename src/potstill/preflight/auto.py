"""Choose `objective.chunk` and `train.matmul` where the recipe says `auto`: once, before the run.

Both change results by rounding. So a resumed run, its evaluations and its report use the values that the run
started with, from its `resolved.yaml`, whatever memory is free by then and whatever the processor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from potstill.build.resolve import Resolved, notes_on_types
from potstill.errors import one_line
from potstill.io.cpu_matmul import MatmulBackend, choose_matmul, choose_product_dtype
from potstill.io.terminal import size
from potstill.preflight.plan import available, plan
from potstill.recipe.load import Recipe

FEWEST_POSITIONS = 32
"""Smallest chunk: below it the matrix products are slow, and little memory is saved."""
SHARE = 8
"""The logits of both models may take 1 / SHARE of the free memory. A plug-in's divergence has four times as much
alive at once, and glibc keeps some freed blocks: together that still fits."""
AMPLE = 32
"""Where they take less than 1 / AMPLE of the available memory, no plan is made to find out how much is free:
tracing a step takes seconds, and whether the run fits is checked before its first step anyway."""
MORE = "more is not faster"
MOST_POSITIONS = {"cpu": 256, "cuda": 1024}
"""Largest chunk. More makes no step faster on a CPU (docs/losses.md); a GPU needs larger products, and its value
is not measured."""


@dataclass(frozen=True)
class Chunk:
    """`objective.chunk`: the recipe's value, the one that is used, and the reason. Its fields are the receipt's."""

    asked: int | Literal["auto"]
    used: int
    why: str

    @property
    def summary(self) -> str:
        return f"objective.chunk: {self.used}, {self.why}"

    def as_dict(self) -> dict[str, Any]:
        """For machines."""
        return dataclasses.asdict(self)


def choose_chunk(
    resolved: Resolved, note: Callable[[str], None] = lambda text: None, memory: int | None = None
) -> Chunk:
    """The recipe's own chunk; for `auto` the largest useful one that the device's free memory allows, reported
    through `note`.

    Args:
        memory: bytes of it; None: what this machine has.
    """
    config = resolved.recipe.objective
    if config.chunk != "auto":
        return Chunk(config.chunk, config.chunk, "as the recipe says")
    try:
        chosen = _by_memory(resolved, available(resolved.recipe, Path())[0] if memory is None else memory)
    except Exception as error:  # a faulty recipe is reported where its objects are built
        usual = config.positions_at_once
        return Chunk("auto", usual, f"auto: the memory is not planned: {one_line(error)}")
    note(chosen.summary)
    return chosen


def _by_memory(resolved: Resolved, memory: int) -> Chunk:
    most = MOST_POSITIONS[resolved.device_type]
    needed = logits_bytes(most, resolved.teacher.vocab_size)
    if AMPLE * needed <= memory:
        logits = f"logits of both models take {size(needed)} of {size(memory)}"
        return Chunk("auto", most, f"auto: {MORE}; {logits}")
    planned = plan(resolved.with_recipe(with_chunk(resolved.recipe, FEWEST_POSITIONS)))
    free = max(memory - planned.peak_bytes, 0)
    ids = resolved.student.model_config.get_text_config().vocab_size
    used = _largest(free, ids, most)
    reason = {most: MORE, FEWEST_POSITIONS: "fewer are slow"}.get(used, "as many as fit")
    logits = f"logits of both models take {size(logits_bytes(used, ids))}"
    return Chunk("auto", used, f"auto: {reason}; {logits}, the plan leaves {size(free)} free")


def logits_bytes(positions: int, ids: int) -> int:
    """Logits of student and teacher in float32; the gradient overwrites the student's."""
    return 2 * 4 * positions * ids


def _largest(free: int, ids: int, most: int) -> int:
    """The largest power of two from FEWEST_POSITIONS to `most` whose logits take 1 / SHARE of the free bytes."""
    positions = FEWEST_POSITIONS
    while positions < most and SHARE * logits_bytes(2 * positions, ids) <= free:
        positions *= 2
    return positions


def with_chunk(recipe: Recipe, positions: int | Literal["auto"]) -> Recipe:
    return dataclasses.replace(recipe, objective=dataclasses.replace(recipe.objective, chunk=positions))


def choose_backend(resolved: Resolved, note: Callable[[str], None]) -> MatmulBackend:
    """The recipe's own BLAS backend; for `auto` the fastest on this processor, reported through `note`."""
    config = resolved.recipe.train
    backend, reason = choose_matmul(config.matmul, resolved.device)
    if config.matmul == "auto":
        note(f"train.matmul: {backend}, {reason}")
    return backend


def with_matmul(recipe: Recipe, backend: Literal["auto"] | MatmulBackend) -> Recipe:
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, matmul=backend))


def settle(resolved: Resolved, note: Callable[[str], None]) -> Resolved:
    """The recipe with every `auto` of the two replaced by the value chosen for this machine."""
    try:
        recipe = with_chunk(resolved.recipe, choose_chunk(resolved, note).used)
        return resolved.with_recipe(with_matmul(recipe, choose_backend(resolved, note)))
    except BaseException:
        resolved.teacher.close()
        raise


def note_types(resolved: Resolved, note: Callable[[str], None], trains: bool = True) -> None:
    """Report types that were left to `auto`, and those in which this machine is slower than it could be; of the teacher
    alone where nothing `trains`.
    """
    for line in notes_on_types(resolved.asked, *choose_product_dtype(resolved.device), trains):
        note(line)


def as_recorded(recipe: Recipe) -> Recipe:
    """The recipe that a run has in its folder: a run that does not say whether it repaired its student is of a version
    that repaired none.
    """
    if recipe.student.name != "cut" or recipe.student.repair is not None:
        return recipe
    return dataclasses.replace(recipe, student=dataclasses.replace(recipe.student, repair=False))


def with_types_of(recipe: Recipe, started: Recipe) -> Recipe:
    """The recipe of a resumed run with the types of `started` where it leaves them to `auto`: before its models are
    looked up.
    """
    if recipe.train.precision == "auto":
        train = dataclasses.replace(recipe.train, precision=started.train.precision)
        recipe = dataclasses.replace(recipe, train=train)
    dtype = getattr(started.teacher, "dtype", "float32")
    return dataclasses.replace(recipe, teacher=recipe.teacher.with_dtype(dtype))


def as_started(recipe: Recipe, started: Recipe, num_rows: int | None = None) -> Recipe:
    """The recipe of a resumed run, with the values that were chosen when it `started`.

    Args:
        num_rows: its training rows, of which epochs are steps; None where no epochs were known.
    """
    recipe = with_types_of(recipe, started)
    if recipe.train.matmul == "auto":
        recipe = with_matmul(recipe, started.train.matmul)
    if num_rows is not None:
        recipe = dataclasses.replace(recipe, train=recipe.train.of_rows(num_rows))
    asked, settled = recipe.student, started.student
    if asked.name == settled.name == "cut" and asked.is_measured and asked.layers == len(settled.keep or []):
        assert settled.keep is not None
        named = dataclasses.replace(
            asked.with_layers(settled.keep, asked.ffn_width, asked.kv_heads), rule=settled.rule
        )
        recipe = dataclasses.replace(recipe, student=named)
    elif asked.name == settled.name == "cut" and asked.is_sized and settled.keep is not None:
        chosen = asked.with_layers(settled.keep, settled.ffn_width, settled.kv_heads)
        recipe = dataclasses.replace(recipe, student=chosen)
    elif asked.name == settled.name == "cut" and asked.rule is None:
        recipe = dataclasses.replace(recipe, student=dataclasses.replace(asked, rule=settled.rule))
    student = recipe.student
    if student.name == settled.name == "cut" and student.repair is None:
        recipe = dataclasses.replace(recipe, student=dataclasses.replace(student, repair=settled.repair))
    return with_chunk(recipe, started.objective.chunk) if recipe.objective.chunk == "auto" else recipe
