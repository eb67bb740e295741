"""A recipe as objects for a loop of one's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from potstill.build.resolve import resolve
from potstill.build.setup import RunSetup, set_up
from potstill.preflight.auto import note_types, settle
from potstill.recipe import load as recipes
from potstill.recipe.load import Recipe


def prepare(
    recipe: str | Path | Recipe,
    overrides: Sequence[str] = (),
    note: Callable[[str], None] = lambda line: None,
) -> RunSetup:
    """Build what a recipe describes, checked and matched as for a run: `teacher` of any kind, `student`, `corpus` with
    its `train` and `heldout` rows, `tokenizer`, and `data()`, whose `step(n)` has the micro-batches of step n, those
    that the student writes included. Nothing is trained, and no run directory is made. Close the teacher at the end.

    Args:
        recipe: a YAML file, or a recipe already loaded.
        overrides: `a.b=value`, applied to a file.
        note: called with a line for each object, and for each warning.

    Raises:
        UserError: whatever `distill` refuses before its first step.
    """
    loaded = recipe if isinstance(recipe, Recipe) else recipes.load(recipe, overrides)
    loaded.require_available()
    note_types(resolved := resolve(loaded), note)
    return set_up(settle(resolved, note), note)
