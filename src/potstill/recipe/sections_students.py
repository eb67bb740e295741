"""The students that a recipe may name: what may stand in each, its bounds, its default, and what it means.

`recipe/sections.py` has the other sections.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Interval, MinLen
from pydantic import BeforeValidator, WithJsonSchema

from potstill.recipe.sections import BelowOne, Count, Layers, ModelSource, Positive, Section

ALL_LINEAR = "all-linear"


def _as_list(value: Any) -> Any:
    return [value] if value == ALL_LINEAR else value


@dataclass(frozen=True, kw_only=True)
class Lora(Section):
    rank: Annotated[int, Interval(ge=1, le=4096)] = 16
    """Columns of B and rows of A: an adapter of a matrix [n, m] has rank * (n + m) weights."""
    alpha: Positive = 32.0
    """What is added to a matrix is alpha / rank * B A."""
    dropout: BelowOne = 0.0
    """Probability that an input of an adapter is left out in a training step."""
    targets: Annotated[
        list[Annotated[str, MinLen(1)]],
        MinLen(1),
        BeforeValidator(_as_list),
        WithJsonSchema(
            {"anyOf": [{"const": ALL_LINEAR}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}
        ),
    ] = field(default_factory=lambda: [ALL_LINEAR])
    """Linear layers of the body that get adapters, by the ends of their names, such as [q_proj, v_proj], or
    all-linear: every one, which the output head is not."""


@dataclass(frozen=True, kw_only=True)
class CutStudent(Section):
    name: Literal["cut"] = "cut"
    """Some of the teacher's layers, how many (layers) or which (keep), and some channels of their MLPs."""
    layers: Count | None = None
    """Number of layers to keep, chosen by the rule."""
    keep: Layers | None = None
    """Layer numbers to keep, rising, from 0."""
    rule: Literal["first_last", "even"] = "first_last"
    """Which layers are kept when their number is given: both ends of the stack, or evenly spaced ones."""
    ffn_width: Count | None = None
    """Channels of each layer's MLP that are kept, those that add most on eight training rows; null: all."""
    lora: Lora | None = None
    """Train adapters beside its matrices and leave its own weights as they are; null: train every weight."""


@dataclass(frozen=True, kw_only=True)
class CheckpointStudent(Section):
    name: Literal["checkpoint"] = "checkpoint"
    """A trained model to go on from."""
    model: ModelSource
    """Hugging Face folder, hub id or GGUF file, relative to the recipe."""
    lora: Lora | None = None
    """Train adapters beside its matrices and leave its own weights as they are; null: train every weight."""


@dataclass(frozen=True, kw_only=True)
class ConfigStudent(Section):
    name: Literal["config"] = "config"
    """A model with random weights, all of which are trained."""
    model: ModelSource
    """config.json, or a folder or hub id that has one, relative to the recipe."""
