"""One recipe while `potstill init` makes it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from potstill.build.resolve import Resolved, pin, settle_types
from potstill.io import yaml
from potstill.io.cpu_matmul import choose_product_dtype
from potstill.recipe.commented import Draft
from potstill.recipe.load import Recipe, parse

Note = Callable[[str], None]


class Making:
    """One recipe in the making.

    Args:
        out: where it will be; its paths are relative to that folder.
        given: fields that the user sets, as a tree.
    """

    def __init__(self, out: Path, given: dict[str, Any], note: Note) -> None:
        self.out, self.folder, self.note = out, out.absolute().parent, note
        self.draft = Draft(given)
        self.warnings: list[str] = []
        self.rows = 0.0
        """To train on, estimated where not all data were read."""

    def source(self, value: str, absolute: str) -> str:
        """A path as the recipe names it: relative to its folder where it was given so; anything else as it is."""
        is_relative = os.path.exists(value) and not os.path.isabs(value)
        return os.path.relpath(absolute, self.folder) if is_relative else value

    def parsed(self, tree: dict[str, Any]) -> Recipe:
        return parse(yaml.write(tree), where=str(self.out), folder=self.folder)

    def resolved(self, before: Resolved, tree: dict[str, Any]) -> Resolved:
        """The same models with another recipe. Their files are not read again."""
        recipe = settle_types(self.parsed(tree), choose_product_dtype(before.device)[0])
        recipe, commits = pin(recipe, before.commits)
        return dataclasses.replace(before, commits={**before.commits, **commits}).with_recipe(recipe)
