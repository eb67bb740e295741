"""The sections `teacher`, `student` and `capture`: the two models, and the targets stored on disk."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from annotated_types import Interval, MinLen
from pydantic import BeforeValidator, WithJsonSchema

from potstill.errors import UserError
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
    TokenizerSource,
    Weights,
    check,
    lacks_method,
)
from potstill.recipe.paths import short_name
from potstill.registry import register

if TYPE_CHECKING:
    import torch

    from potstill.types import Teacher


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(Config):
    """Base of every teacher. A plug-in's subclass adds its fields and builds the teacher in `load`."""

    source: ClassVar[str] = "potstill.teachers.base:TeacherSource"
    """Its `TeacherSource`, what is known before the weights are loaded, as `module:name`."""
    can_be_mixed: ClassVar[bool] = True
    """Whether it may be one of a mixture."""
    has_weights: ClassVar[bool] = False
    """Whether `model` is a checkpoint that can itself be trained, as `compare.corrected_steps` does."""

    def with_model(self, model: str) -> TeacherConfig:
        """The same teacher with another checkpoint, at full precision; for one that `has_weights`."""
        raise lacks_method(self, "with_model")

    def with_dtype(self, dtype: Any) -> TeacherConfig:
        """The same teacher with this type where its own is `auto`."""
        return self

    def dtypes(self) -> dict[str, str]:
        """The types of weights that it names, by field."""
        return {}

    def without_places(self) -> TeacherConfig:
        """Without the fields that say where it is and how it is reached, not which one it is; for comparing recipes."""
        return self

    @property
    def label(self) -> str:
        """A short name for messages."""
        return self.registered_name

    @classmethod
    def mistakes(cls, given: Mapping[str, Any], corpus: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Field and sentence of each mistake that shows in several fields together, those of the corpus included. Both
        sections are as they were written, before their types are known.
        """
        return iter(())

    def load(self, device: torch.device) -> Teacher:
        """The teacher on `device`, ready to compute targets: see `potstill.teachers.base.BaseTeacher`."""
        raise lacks_method(self, "load")


@register("teacher")
@dataclass(frozen=True, kw_only=True)
class HfTeacherConfig(TeacherConfig):
    name: Literal["torch"] = "torch"
    """A causal language model run in process."""
    model: ModelSource
    """Hugging Face folder or GGUF file, relative to the recipe; a hub id, owner/name, or owner/name@ and a branch,
    tag or commit; also `package:NAME/FILE`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Type of the weights in memory. auto: bfloat16 where the device has instructions for it, else float32."""
    weights: Literal["full", "int8", "int4", "stored"] = "full"
    """Bits of the layers' matrices: full, those of dtype; int8 or int4 of a folder's; stored, those that a
    GGUF file has. `potstill check` measures the loss of accuracy."""
    backend: Literal["auto", "transformers", "torchao", "bitsandbytes", "llama_cpp"] = "auto"
    """What runs the layers; auto: the first of these that serves weights, file and device. It is reported."""
    reference: ModelSource | None = None
    """The full weights that fewer bits are measured against; null: those of model."""
    sharded: bool = False
    """With several processes, each keeps a part of every layer; false: each keeps the whole teacher."""

    source: ClassVar[str] = "potstill.teachers.hf:HfSource"
    has_weights: ClassVar[bool] = True

    def with_dtype(self, dtype: Any) -> HfTeacherConfig:
        return replace(self, dtype=dtype) if self.dtype == "auto" else self

    def dtypes(self) -> dict[str, str]:
        return {"dtype": self.dtype}

    def with_model(self, model: str) -> HfTeacherConfig:
        return replace(self, model=model, weights="full", backend="auto", reference=None)

    @property
    def label(self) -> str:
        return short_name(self.model)


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
    """Targets computed beforehand: a store that `potstill capture` wrote."""
    path: LocalPath
    """The store's folder, relative to the recipe."""
    model: ModelSource | None = None
    """The captured model, with the weights that the store records: what a cut student is cut from. null: the
    path or hub id that the store records."""

    source: ClassVar[str] = "potstill.teachers.stored:StoreSource"

    @property
    def label(self) -> str:
        return f"store {Path(self.path).name}"


def _server_url(value: str, folder: Path) -> str:
    # Without the value: it may hold a password.
    try:
        parts = urlsplit(value)
        has_address = bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that do not close, or a port that is no number
        has_address = False
    if not has_address or parts.scheme not in ("http", "https") or parts.query or parts.fragment:
        raise UserError("is not the address of a server. Write it as http://HOST:PORT or https://HOST.")
    if parts.username or parts.password:
        raise UserError(
            "has a user or a password in it. Name the variable that has the key: api_key_variable."
        )
    if parts.path.rstrip("/").endswith("/v1"):
        raise UserError(f"{value} ends in /v1, which is added. Leave it out.")
    return value.rstrip("/")


def _variable(value: str, folder: Path) -> str:
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]{0,63}", value):  # without the value: it may be the key itself
        raise UserError("is not the name of an environment variable. Name the one that has the key.")
    return value


@register("teacher")
@dataclass(frozen=True, kw_only=True)
class ServerTeacherConfig(TeacherConfig):
    name: Literal["server"] = "server"
    """A model on a server, which gives the log-probabilities of the likeliest ids at each position of a given text."""
    url: Annotated[str, MinLen(1), check(_server_url)]
    """Where the server is, without /v1, such as http://127.0.0.1:8000; the certificate of https is verified."""
    model: Annotated[str, MinLen(1)]
    """The model's name on the server."""
    tokenizer: TokenizerSource
    """Its tokenizer: a folder or GGUF file, relative to the recipe, or a hub id. It is compared with the server's."""
    api: Literal["vllm", "sglang", "openai"] = "vllm"
    """How the server is asked: as vLLM, as SGLang, or by OpenAI's completions with `echo` and `logprobs`."""
    top_k: Annotated[int, Interval(ge=1, le=100_000)] = 64
    """Ids whose log-probabilities are asked for at each position; all others are one class, so that each divergence
    is a lower bound of the full one."""
    requests: Annotated[int, Interval(ge=1, le=1024)] = 8
    """Requests in flight at most."""
    timeout_s: Positive = 120.0
    """Deadline of one request, in seconds."""
    deadline_s: Positive = 600.0
    """How long a request is repeated while the server gives no answer, in seconds; then the run ends."""
    api_key_variable: Annotated[str, check(_variable)] | None = None
    """Environment variable that has the server's API key; null: it wants none."""

    source: ClassVar[str] = "potstill.teachers.server:ServerSource"

    def without_places(self) -> ServerTeacherConfig:
        """The same model may move; that it is the same, it proves itself."""
        asked = {name: getattr(ServerTeacherConfig, name) for name in ("requests", "timeout_s", "deadline_s")}
        return replace(self, url="", api_key_variable=None, **asked)

    @property
    def label(self) -> str:
        return f"{short_name(self.model)} at {self.url}"


ALL_LINEAR = "all-linear"


def _as_list(value: Any) -> Any:
    return [value] if value == ALL_LINEAR else value


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Config):
    rank: Annotated[int, Interval(ge=1, le=4096)] = 16
    """Columns of B and rows of A: an adapter of a matrix [n, m] has rank * (n + m) weights."""
    alpha: Positive = 32.0
    """Scale: alpha / rank * B A is added to a matrix."""
    dropout: BelowOne = 0.0
    """Probability that an element of an adapter's input is dropped in a training step; above 0, fused experts have
    no adapters."""
    targets: Annotated[
        list[Annotated[str, MinLen(1)]],
        MinLen(1),
        BeforeValidator(_as_list),
        WithJsonSchema(
            {"anyOf": [{"const": ALL_LINEAR}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}
        ),
    ] = field(default_factory=lambda: [ALL_LINEAR])
    """Linear layers of the body and matrices of fused experts that get adapters, by the ends of their names, such as
    [q_proj, v_proj], or all-linear: every one, which the output head is not."""


@dataclass(frozen=True, kw_only=True)
class CutStudentConfig(Config):
    name: Literal["cut"] = "cut"
    """Some of the teacher's layers, how many (layers) or which (keep), with some channels and attention heads."""
    layers: Count | None = None
    """Number of layers to keep, chosen by the rule."""
    keep: Layers | None = None
    """Layers to keep, by index from 0, ascending."""
    weights: Weights | None = None
    """At most so many weights, embeddings included, such as 60M: layers, channels and heads are chosen together, by
    the KL that each costs on four training rows for the weights that it saves. Beside keep: what that was chosen
    for."""
    fraction: Annotated[float, Interval(gt=0, lt=1)] | None = None
    """The same, as a fraction of the teacher's weights."""
    rule: Literal["first_last", "even", "least_harm", "greedy"] | None = None
    """How `layers` are chosen: from both ends of the stack, evenly spaced, or by the KL without each of them on four
    training rows, of each alone (least_harm) or one after the other (greedy); null: least_harm."""
    ffn_width: Count | None = None
    """Channels of each layer's MLP to keep, those that contribute most on eight training rows; null: all."""
    kv_heads: Count | None = None
    """Key/value heads of each layer's attention to keep, with the query heads that read them: those that contribute
    most on eight training rows; null: all."""
    hidden_size: Count | None = None
    """Channels of the residual stream to keep, in every tensor that it goes through, embeddings and head included:
    those that the norms give most of on eight training rows; null: all."""
    repair: bool | None = None
    """Fit the MLPs and attentions to what left-out channels and heads did, the MLPs before a gap to what left-out
    layers did, and what reads the residual stream to what its left-out channels did, by least squares on sixteen
    training rows, where that lowers the KL to the teacher on four others; null: true."""
    lora: LoraConfig | None = None
    """Train adapters beside its matrices and leave its own weights as they are; null: train every weight."""

    @property
    def is_measured(self) -> bool:
        """Whether the teacher's weights decide which layers are kept."""
        return self.keep is None and self.rule in (None, "least_harm", "greedy")

    @property
    def is_sized(self) -> bool:
        """Whether layers, channels and heads are still to be chosen for a number of weights."""
        return self.keep is None and (self.weights is not None or self.fraction is not None)

    def with_layers(
        self, keep: Sequence[int], ffn_width: int | None, kv_heads: int | None
    ) -> CutStudentConfig:
        """With the layers that a rule chose, by index, the channels of each MLP and the KV groups of each attention."""
        return replace(self, layers=None, keep=[*keep], ffn_width=ffn_width, kv_heads=kv_heads, rule=None)

    @property
    def is_repaired(self) -> bool:
        """Whether what was left out is made up for by what was kept."""
        return self.repair is not False


@dataclass(frozen=True, kw_only=True)
class CheckpointStudentConfig(Config):
    name: Literal["checkpoint"] = "checkpoint"
    """A trained model to start from."""
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
    """Rows that go through the teacher at once: memory, and results by rounding alone."""
    rows_per_shard: Count | None = None
    """Rows of one file, the most that an interruption loses. null: 64, or more to have at most 1,000 files."""


@dataclass(frozen=True, kw_only=True)
class SampledCaptureConfig(CaptureConfig):
    name: Literal["sampled"] = "sampled"
    """An unbiased sample of each distribution, for forward KL at the recipe's temperature."""
    bytes_per_position: Positive | None = None
    """Average bytes of a position's targets, from which the threshold follows; null: 32, or by threshold."""
    threshold: Annotated[float, Interval(ge=1e-4, le=1)] | None = None
    """Probability above which an id is kept exactly; smaller is finer. null: by bytes_per_position."""
    seed: Seed = 0
    """Seed of the draws."""


@dataclass(frozen=True, kw_only=True)
class TopkCaptureConfig(CaptureConfig):
    name: Literal["topk"] = "topk"
    """The largest probabilities and the sum of the rest, at the recipe's temperature."""
    k: Count | None = None
    """Number of ids to keep; null: as many as fit into bytes_per_position."""
    bytes_per_position: Positive | None = None
    """Bytes of a position's targets; null: what k needs."""
    dtype: Literal["float16", "float32"] = "float16"
    """Type of the log-probabilities."""


@dataclass(frozen=True, kw_only=True)
class HiddenCaptureConfig(CaptureConfig):
    name: Literal["hidden"] = "hidden"
    """The teacher's final hidden states, for every divergence and temperature."""
    dtype: Literal["float32", "bfloat16", "int8"] = "bfloat16"
    """Type of the hidden states; int8 has one scale for each 64 elements."""
