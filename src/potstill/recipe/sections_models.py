"""The sections `teacher`, `student` and `capture`: the two models, and the targets kept on disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Interval, MinLen
from pydantic import BeforeValidator, WithJsonSchema

from potstill.recipe.fields import (
    MAX_INT32,
    BelowOne,
    Config,
    Count,
    Layers,
    LocalPath,
    ModelSource,
    Positive,
    Seed,
    lacks_method,
)
from potstill.registry import register

if TYPE_CHECKING:
    import torch

    from potstill.types import Teacher


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(Config):
    """Base of every teacher. A plug-in's subclass adds its fields and makes the teacher in `load`."""

    source: ClassVar[str] = "potstill.teachers.base:TeacherSource"
    """The class that knows the teacher before its weights are loaded, as `module:name`."""
    has_weights: ClassVar[bool] = False
    """Whether `model` is a checkpoint that can itself be trained, as a comparison may ask."""

    @property
    def label(self) -> str:
        """What a person would call it."""
        return self.registered_name

    def load(self, device: torch.device) -> Teacher:
        """The teacher itself, ready to answer."""
        raise lacks_method(self, "load")


@register("teacher")
@dataclass(frozen=True, kw_only=True)
class HfTeacherConfig(TeacherConfig):
    name: Literal["torch"] = "torch"
    """A causal language model run in process."""
    model: ModelSource
    """Hugging Face folder, hub id or GGUF file, relative to the recipe; also `package:NAME/FILE`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights in memory."""
    weights: Literal["full", "int8", "int4", "stored"] = "full"
    """Bits of the layers' matrices: full, those of dtype; int8 or int4 of a folder's; stored, those that a
    GGUF file has. `potstill check` measures what it costs."""
    backend: Literal["auto", "transformers", "torchao", "bitsandbytes", "llama_cpp"] = "auto"
    """What runs the layers; auto: the first of these that serves weights, file and device, and it is said."""
    reference: ModelSource | None = None
    """The full weights that fewer bits are measured against; null: those of model."""
    sharded: bool = False
    """With several processes, each keeps a part of every layer; false: each keeps the whole teacher."""

    source: ClassVar[str] = "potstill.teachers.hf:HfSource"
    has_weights: ClassVar[bool] = True

    @property
    def label(self) -> str:
        return Path(self.model).name


@register("teacher")
@dataclass(frozen=True, kw_only=True)
class FixtureTeacherConfig(TeacherConfig):
    name: Literal["fixture"] = "fixture"
    """A deterministic teacher without weights, for tests."""
    vocab_size: Annotated[int, Interval(ge=2, le=MAX_INT32)]
    """Number of token ids."""

    source: ClassVar[str] = "potstill.teachers.toy:FixtureSource"


@register("teacher")
@dataclass(frozen=True, kw_only=True)
class TableTeacherConfig(TeacherConfig):
    name: Literal["table"] = "table"
    """A teacher whose logits are a table: one row for each last token."""
    path: LocalPath
    """safetensors file with one tensor `logits` [V, V], relative to the recipe."""

    source: ClassVar[str] = "potstill.teachers.toy:TableSource"


@register("teacher")
@dataclass(frozen=True, kw_only=True)
class StoreTeacherConfig(TeacherConfig):
    name: Literal["store"] = "store"
    """A teacher that was asked before: the targets that `potstill capture` wrote."""
    path: LocalPath
    """The store's folder, relative to the recipe."""
    model: ModelSource | None = None
    """The model that was captured, whose weights must be the store's: what a cut student is cut from. null:
    where the capture found it."""

    source: ClassVar[str] = "potstill.teachers.stored:StoreSource"

    @property
    def label(self) -> str:
        return f"store {Path(self.path).name}"


ALL_LINEAR = "all-linear"


def _as_list(value: Any) -> Any:
    return [value] if value == ALL_LINEAR else value


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Config):
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
class CutStudentConfig(Config):
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
    lora: LoraConfig | None = None
    """Train adapters beside its matrices and leave its own weights as they are; null: train every weight."""


@dataclass(frozen=True, kw_only=True)
class CheckpointStudentConfig(Config):
    name: Literal["checkpoint"] = "checkpoint"
    """A trained model to go on from."""
    model: ModelSource
    """Hugging Face folder, hub id or GGUF file, relative to the recipe."""
    lora: LoraConfig | None = None
    """Train adapters beside its matrices and leave its own weights as they are; null: train every weight."""


@dataclass(frozen=True, kw_only=True)
class ConfigStudentConfig(Config):
    name: Literal["config"] = "config"
    """A model with random weights, all of which are trained."""
    model: ModelSource
    """config.json, or a folder or hub id that has one, relative to the recipe."""


@dataclass(frozen=True, kw_only=True)
class CaptureConfig(Config):
    rows: Literal["all", "steps"] = "all"
    """Training rows that are captured: all, or only those that the steps of this recipe read."""
    rows_per_batch: Count = 8
    """Rows that go through the teacher at once: memory, and the last bits of the numbers."""
    rows_per_shard: Count | None = None
    """Rows of one file: what a kill may cost. null: 64, or more where there would be over 1,000 files."""


@dataclass(frozen=True, kw_only=True)
class SampledCaptureConfig(CaptureConfig):
    name: Literal["sampled"] = "sampled"
    """An unbiased sample of each distribution, for forward KL at the recipe's temperature."""
    bytes_per_position: Positive | None = None
    """Bytes of a position's targets on average, which a threshold is found for; null: 32, or by threshold."""
    threshold: Annotated[float, Interval(ge=1e-4, le=1)] | None = None
    """Probability above which an id is kept at its own; smaller is finer. null: by bytes_per_position."""
    seed: Seed = 0
    """Seed of the draws."""


@dataclass(frozen=True, kw_only=True)
class TopkCaptureConfig(CaptureConfig):
    name: Literal["topk"] = "topk"
    """The largest probabilities and the sum of the rest, at the recipe's temperature."""
    k: Count | None = None
    """Number of ids that are kept; null: as many as bytes_per_position hold."""
    bytes_per_position: Positive | None = None
    """Bytes of a position's targets; null: what k needs."""
    dtype: Literal["float16", "float32"] = "float16"
    """Type of the log-probabilities."""


@dataclass(frozen=True, kw_only=True)
class HiddenCaptureConfig(CaptureConfig):
    name: Literal["hidden"] = "hidden"
    """The teacher's final hidden states, for every divergence and temperature."""
    dtype: Literal["float32", "bfloat16", "int8"] = "bfloat16"
    """Type of the hidden states; int8 with a scale for each 64 of them."""
