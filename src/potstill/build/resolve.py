"""From a recipe to what its names stand for: the one place that opens the files of models before they are loaded.

What is found here is handed on: planning, checking and setting up open no config again.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from potstill.models.load import choose_device, plain_config
from potstill.models.pruning import cut_config, layers_to_keep
from potstill.models.source import ModelFiles
from potstill.recipe.load import AnyStudent, Recipe
from potstill.recipe.sections_models import CheckpointStudentConfig
from potstill.teachers.base import TeacherSource, refuse_cut, source_of


class StudentSource:
    """A student before it is made: the config that it will have, and where its weights come from."""

    def __init__(self, config: AnyStudent, teacher: TeacherSource) -> None:
        self.config = config
        self.teacher = teacher
        self.files = None if config.name == "cut" else _shared_files(config.model, teacher)
        """Of a checkpoint or a config; None for a student that is cut from the teacher."""

    @property
    def is_cut(self) -> bool:
        return self.files is None

    @cached_property
    def layers_kept(self) -> Sequence[int]:
        """Of a cut student, as numbers of the teacher's layers."""
        assert self.config.name == "cut"
        total = self._layers_config.get_text_config().num_hidden_layers
        return self.config.keep or layers_to_keep(total, self.config.layers or 0, self.config.rule)

    @cached_property
    def model_config(self) -> Any:
        """The Transformers config that it will have.

        Raises:
            UserError: cut of a teacher without layers, or to a width that its config does not have.
        """
        if self.files is not None:
            return plain_config(self.files.config)
        assert self.config.name == "cut"
        total = self._layers_config.get_text_config().num_hidden_layers
        return cut_config(self._layers_config, self.layers_kept, total, self.config.ffn_width)

    @property
    def checkpoints(self) -> list[ModelFiles]:
        """Models whose weights it begins with."""
        return [self.files] if self.files is not None and self.config.name == "checkpoint" else []

    @property
    def inputs(self) -> dict[str, Path]:
        return {} if self.files is None else {"student": self.files.path}

    @property
    def _layers_config(self) -> Any:
        config = self.teacher.layers_config
        return refuse_cut(self.teacher.config.registered_name) if config is None else config


@dataclass(frozen=True)
class Resolved:
    """A recipe, and what its names stand for."""

    recipe: Recipe
    device: torch.device
    teacher: TeacherSource
    student: StudentSource

    @property
    def teacher_config(self) -> Any | None:
        """The Transformers config of the teacher's model, where the run has its layers: to run, or to cut from."""
        config = self.teacher.layers_config if self.student.is_cut else self.teacher.model_config
        return None if config is None else plain_config(config)

    @property
    def checkpoints(self) -> list[ModelFiles]:
        """Every model that is verified before a library opens it, the teacher's first."""
        return list(dict.fromkeys([*self.teacher.checkpoints, *self.student.checkpoints]))

    @property
    def inputs(self) -> dict[str, Path]:
        """Files and model folders whose hashes --resume compares, by role."""
        tokenizer = self.recipe.corpus.tokenizer
        reader = {} if tokenizer is None else {"tokenizer": ModelFiles(tokenizer).path}
        return self.teacher.inputs | self.student.inputs | reader

    def with_recipe(self, recipe: Recipe) -> Resolved:
        """The same models, whose files stay looked at, with another recipe about them."""
        teacher = copy.copy(self.teacher)
        teacher.config = recipe.teacher
        return dataclasses.replace(self, recipe=recipe, teacher=teacher)


def resolve(recipe: Recipe, saved_student: str | Path | None = None) -> Resolved:
    """Look up what the recipe names. `saved_student` takes the place of its student: a folder to be measured.

    Raises:
        UserError: a device that this machine does not have, or a model that is not there.
    """
    if saved_student is not None:
        recipe = dataclasses.replace(recipe, student=CheckpointStudentConfig(model=str(saved_student)))
    device = choose_device(recipe.train.device)
    teacher = source_of(recipe.teacher, device)
    return Resolved(recipe, device, teacher, StudentSource(recipe.student, teacher))


def _shared_files(source: str, teacher: TeacherSource) -> ModelFiles:
    """A student that names the teacher's own checkpoint opens it through the teacher's files."""
    return next((files for files in teacher.checkpoints if files.source == source), None) or ModelFiles(
        source
    )
