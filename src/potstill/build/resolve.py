"""Resolve the names of a recipe: the one place that opens the files of models before their weights are loaded.

Planning, checks and setup all use its result, so that each config is read once.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from potstill.data.readers import hub
from potstill.errors import UserError
from potstill.io.cpu_matmul import ProductDtype, choose_product_dtype
from potstill.models.hub import WITHOUT_WEIGHTS, hub_model, pinned, tokenizer_files
from potstill.models.load import choose_device, num_weights, plain_config
from potstill.models.pruning import cut_config, layers_to_keep, require_heads
from potstill.models.source import ModelFiles
from potstill.models.stream_config import set_hidden_size, stream_dims
from potstill.recipe.fields import HubKind, with_sources
from potstill.recipe.load import AnyStudent, Recipe
from potstill.recipe.sections_models import CheckpointStudentConfig
from potstill.teachers.base import TeacherSource, refuse_cut, source_of

PINNED: dict[HubKind, Callable[[str], str]] = {
    "model": pinned,
    "tokenizer": functools.partial(pinned, files=WITHOUT_WEIGHTS),
    "data set": hub.pinned,
}
"""The newest commit of what a field names, by its kind."""


class StudentSource:
    """A student before it is built: its model config, and where its weights come from."""

    def __init__(self, config: AnyStudent, teacher: TeacherSource, is_saved: bool = False) -> None:
        self.config = config
        self.teacher = teacher
        self.is_saved = is_saved
        """Whether it is a finished student, to be measured and not trained."""
        self.files = None if config.name == "cut" else _shared_files(config.model, teacher)
        """Those of a checkpoint or a config; None for a student that is cut from the teacher."""

    @property
    def is_cut(self) -> bool:
        return self.files is None

    @cached_property
    def layers_kept(self) -> Sequence[int]:
        """The teacher's layers that a cut student keeps, by index, ascending. Where its weights decide, and nobody
        has looked yet, as many others: for a plan.
        """
        assert self.config.name == "cut"
        total = self._layers_config.get_text_config().num_hidden_layers
        if self.config.is_sized:
            return layers_to_keep(total, self._layers_for_weights(total), None)
        return self.config.keep or layers_to_keep(total, self.config.layers or 0, self.config.rule)

    @property
    def most_weights(self) -> int:
        """Of a student whose layers, channels and heads are chosen for a size."""
        assert self.config.name == "cut"
        whole = num_weights(plain_config(self._layers_config))
        return self.config.weights or int((self.config.fraction or 1.0) * whole)

    def _layers_for_weights(self, total: int) -> int:
        """As many as give so many weights: channels and heads are chosen with the teacher's weights alone."""
        one, two = (num_weights(cut_config(self._layers_config, range(n), total)) for n in (1, min(2, total)))
        return min(max((self.most_weights - one) // max(two - one, 1) + 1, 1), total)

    @cached_property
    def model_config(self) -> Any:
        """The student's Transformers config.

        Raises:
            UserError: a student cut from a teacher without layers, or to a width, heads or a hidden size that its
                config cannot have.
        """
        if self.files is not None:
            return plain_config(self.files.config)
        assert self.config.name == "cut"
        total = self._layers_config.get_text_config().num_hidden_layers
        width, kv_heads = self.config.ffn_width, self.config.kv_heads
        if kv_heads is not None:
            require_heads(plain_config(self._layers_config), kv_heads)
        config = cut_config(self._layers_config, self.layers_kept, total, width, kv_heads)
        if self.config.hidden_size is None:
            return config
        narrow = set_hidden_size(plain_config(config), self.config.hidden_size)
        stream_dims(config, narrow)  # refuses a model in which more follows it
        return narrow

    @property
    def checkpoints(self) -> list[ModelFiles]:
        """Models whose weights the student starts from."""
        return [self.files] if self.files is not None and self.config.name == "checkpoint" else []

    @property
    def inputs(self) -> dict[str, Path]:
        """Files and model folders whose hashes --resume compares, by role."""
        return {} if self.files is None else {"student": self.files.path}

    @property
    def _layers_config(self) -> Any:
        config = self.teacher.layers_config
        return refuse_cut(self.teacher.config.registered_name) if config is None else config


@dataclass(frozen=True)
class Resolved:
    """A recipe, with its device and the sources of its two models."""

    recipe: Recipe
    """With the commit of each model and data set on the hub: see `pin`."""
    asked: Recipe
    """The one that was given, with the types that it leaves to `auto`."""
    device: torch.device
    teacher: TeacherSource
    student: StudentSource

    commits: Mapping[str, str]
    """The commit of each model and data set on the hub, by the recipe's name for it: see `pin`."""

    planned_type: Literal["cpu", "cuda"] | None = None
    """Of a plan for a machine that is not this one: the type of its device, for which `device` stands in."""

    @property
    def device_type(self) -> str:
        """`cpu` or `cuda`: where the run is to be."""
        return self.planned_type or self.device.type

    @property
    def teacher_config(self) -> Any | None:
        """The Transformers config of the teacher's model, if this process runs it or cuts the student from it."""
        config = self.teacher.layers_config if self.student.is_cut else self.teacher.model_config
        return None if config is None else plain_config(config)

    @property
    def checkpoints(self) -> list[ModelFiles]:
        """Every model to verify before a library opens it, the teacher's first; one that both name, once."""
        return list(dict.fromkeys([*self.teacher.checkpoints, *self.student.checkpoints]))

    @property
    def inputs(self) -> dict[str, Path]:
        """Files and model folders whose hashes --resume compares, by role."""
        tokenizer = self.recipe.corpus.tokenizer
        reader = {} if tokenizer is None else {"tokenizer": tokenizer_files(tokenizer)}
        return self.teacher.inputs | self.student.inputs | reader

    def with_recipe(self, recipe: Recipe) -> Resolved:
        """The same models under another recipe. Their files are not read again."""
        teacher, student = copy.copy(self.teacher), self.student
        teacher.config = recipe.teacher
        if not student.is_saved and recipe.student != student.config:
            student = StudentSource(recipe.student, teacher)
        return dataclasses.replace(self, recipe=recipe, teacher=teacher, student=student)


def resolve(
    recipe: Recipe, saved_student: str | Path | None = None, commits: Mapping[str, str] | None = None
) -> Resolved:
    """Look up the device and the models that a recipe names.

    Args:
        recipe: any recipe that `load` accepts.
        saved_student: folder of a trained student to evaluate in place of the recipe's.
        commits: those that a run started with, `Resolved.commits`; of other models on the hub the newest is used.

    Raises:
        UserError: a device that this machine does not have, or a model that does not exist.
    """
    if saved_student is not None:
        recipe = dataclasses.replace(recipe, student=CheckpointStudentConfig(model=str(saved_student)))
    device = choose_device(recipe.train.device)
    asked, recipe = recipe, settle_types(recipe, choose_product_dtype(device)[0])
    recipe, commits = pin(recipe, commits or {})
    teacher = source_of(recipe.teacher, device)
    return Resolved(
        recipe,
        asked,
        device,
        teacher,
        StudentSource(recipe.student, teacher, saved_student is not None),
        commits,
    )


def settle_types(recipe: Recipe, dtype: ProductDtype) -> Recipe:
    """The recipe with this type where it leaves one to `auto`."""
    if recipe.train.precision == "auto":
        recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, precision=dtype))
    return dataclasses.replace(recipe, teacher=recipe.teacher.with_dtype(dtype))


def notes_on_types(recipe: Recipe, dtype: ProductDtype, why: str, trains: bool = True) -> list[str]:
    """A line for each type that `recipe` leaves to `auto`, and for each that is float32 where the device is faster in
    `dtype`.

    Args:
        why: the device multiplies fastest in `dtype`, as `choose_product_dtype` says it.
        trains: whether there is a student, too.
    """
    types: dict[str, str] = {"train.precision": recipe.train.precision} if trains else {}
    types |= {f"teacher.{field}": asked for field, asked in recipe.teacher.dtypes().items()}
    notes = [f"{field}: {dtype}, {why}" for field, asked in types.items() if asked == "auto"]
    if recipe.train.quantize is not None:  # whose grid bfloat16 would round once more
        types.pop("train.precision", None)
    found = why.removeprefix("auto: ")
    return notes + [
        f"{field}: float32; auto would be {dtype}, which is faster ({found})"
        for field, asked in types.items()
        if asked == "float32" != dtype
    ]


def pin(recipe: Recipe, commits: Mapping[str, str]) -> tuple[Recipe, dict[str, str]]:
    """The recipe with each `owner/name@revision` as `owner/name@COMMIT`, and these commits: one for all that names the
    same, although its branch may move meanwhile. A data set's is under `datasets/owner/name@revision`.

    Args:
        commits: known ones, which are not looked up.

    Raises:
        UserError: a model that neither the hub nor its cache has, or a data set that the hub does not have.
    """
    found: dict[str, str] = {}

    def replaced(field: str, source: str, kind: HubKind) -> str:
        is_model = kind != "data set"
        if (on_hub := hub_model(source) if is_model else hub.hub_dataset(source)) is None:
            return source
        name, revision = on_hub
        full = f"{name}@{revision}"
        key = full if is_model else f"datasets/{full}"
        if key not in found:
            try:
                found[key] = commits.get(key) or PINNED[kind](full).rpartition("@")[2]
            except UserError as error:
                raise UserError(f"{field}: {error}") from error
        return f"{name}@{found[key]}"

    return with_sources(recipe, replaced), found


def _shared_files(source: str, teacher: TeacherSource) -> ModelFiles:
    """The files of `source`; the teacher's own where both are the same checkpoint, so that it is read once."""
    return next((files for files in teacher.checkpoints if files.source == source), None) or ModelFiles(
        source
    )
