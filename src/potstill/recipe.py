"""A recipe: one YAML file that says a whole run. Plain frozen dataclasses, checked at one door, `load`.

Every mistake of a file is told at once, each with its dotted field. Refused: unknown keys, values of another
type (a quoted "5" is not 5), numbers that are not finite, paths where nothing lies. Torch is not imported, so
that a typo is told at once. Everybody reads recipes; the command line and `line.py` load them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from annotated_types import Interval, MinLen
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationInfo, WithJsonSchema
from pydantic_core import PydanticCustomError

from potstill import yaml_strict
from potstill.errors import UserError
from potstill.recipe_mistakes import explain, shown
from potstill.recipe_paths import locate
from potstill.recipe_plugins import CONFIG, RegisteredDivergence, divergence, divergences, load_plugins

MAX_INT32 = 2**31 - 1
DEVICE = "^(auto|cpu|cuda(:[0-9]{1,3})?)$"


def _device(value: str, folder: Path) -> str:
    if not re.fullmatch(DEVICE, value):
        raise UserError(f"{shown(value)} is not one of auto, cpu, cuda, cuda:N.")
    return value


def _rising(value: list[int], folder: Path) -> list[int]:
    if value != sorted(set(value)):
        raise UserError(f"{value} does not rise. List each layer once, the lowest first.")
    return value


def _check(check: Callable[[Any, Path], Any]) -> AfterValidator:
    """A check of a value, given the recipe's folder; its UserError is told with the field's name in front."""

    def validate(value: Any, info: ValidationInfo) -> Any:
        try:
            return check(value, typing.cast(Path, info.context))
        except UserError as error:
            raise PydanticCustomError("user_error", "{said}", {"said": str(error)}) from error

    return AfterValidator(validate)


LocalPath = Annotated[str, _check(locate)]
ModelSource = Annotated[str, _check(functools.partial(locate, or_hub_id=True))]
Count = Annotated[int, Interval(ge=1, le=MAX_INT32)]
CountOrZero = Annotated[int, Interval(ge=0, le=MAX_INT32)]
Positive = Annotated[float, Interval(gt=0)]
PositiveOrZero = Annotated[float, Interval(ge=0)]
BelowOne = Annotated[float, Interval(ge=0, lt=1)]


class Section:
    __pydantic_config__: ClassVar[ConfigDict] = CONFIG


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
class CutStudent(Section):
    name: Literal["cut"] = "cut"
    """Some of the teacher's layers: either how many (layers), or which (keep)."""
    layers: Count | None = None
    """Number of layers to keep, chosen by the rule."""
    keep: Annotated[list[CountOrZero], MinLen(1), _check(_rising)] | None = None
    """Layer numbers to keep, rising, from 0."""
    rule: Literal["first_last", "even"] = "first_last"
    """Which layers are kept when their number is given: both ends of the stack, or evenly spaced ones."""


@dataclass(frozen=True, kw_only=True)
class CheckpointStudent(Section):
    name: Literal["checkpoint"] = "checkpoint"
    """A trained model to go on from."""
    model: ModelSource
    """Hugging Face folder, hub id or GGUF file, relative to the recipe."""


@dataclass(frozen=True, kw_only=True)
class ConfigStudent(Section):
    name: Literal["config"] = "config"
    """A model with random weights."""
    model: ModelSource
    """config.json, or a folder or hub id that has one, relative to the recipe."""


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
    chunk: Count = 256
    """Positions whose logits exist at once: memory, not results."""


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
    save_every: CountOrZero = 500
    """Steps between checkpoints, of which two are kept; 0: only when a signal stops the run."""
    device: Annotated[str, _check(_device), WithJsonSchema({"type": "string", "pattern": DEVICE})] = "auto"
    """auto, cpu, cuda or cuda:N; auto: CUDA where there is a device, else the CPU."""
    seed: Annotated[int, Interval(ge=0, le=2**63 - 1)] = 0
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


Corpus = TextCorpus | JsonlCorpus | ChatCorpus | ParquetCorpus | HfCorpus | TokensCorpus
Teacher = TorchTeacher | FixtureTeacher | TableTeacher
Student = CutStudent | CheckpointStudent | ConfigStudent


@dataclass(frozen=True, kw_only=True)
class Recipe(Section):
    corpus: Annotated[Corpus, Field(discriminator="name")]
    """What the student reads."""
    teacher: Annotated[Teacher, Field(discriminator="name")]
    """Whom the student learns from."""
    student: Annotated[Student, Field(discriminator="name")]
    """What is trained."""
    objective: Objective = field(default_factory=Objective)
    """What a step minimises."""
    train: Train
    """How it is minimised."""
    eval: Eval = field(default_factory=Eval)
    """What is measured on the way."""
    plugins: list[LocalPath] = field(default_factory=list)
    """Python files, relative to the recipe, that register divergences of your own."""


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, complete and check a recipe.

    Raises:
        UserError: with every mistake of the file and of the overrides `a.b=value`.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(yaml_strict.MAX_BYTES + 1)
    except IsADirectoryError as error:
        raise UserError(f"{path}: a folder. Give the recipe's YAML file.") from error
    except (OSError, ValueError) as error:
        said = error.strerror.lower() if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"{path}: cannot be read: {said}. Give the recipe's YAML file.") from error
    text = yaml_strict.decode(data, str(path))
    return parse(text, where=str(path), folder=Path(path).absolute().parent, overrides=overrides)


def parse(text: str, *, where: str, folder: Path, overrides: Sequence[str] = ()) -> Recipe:
    """`load` for a text; `where` is its name in messages, `folder` what its paths are relative to."""
    tree, mistakes = yaml_strict.read(text, where)
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else shown(tree)
        raise UserError(
            f"{where}: {found} at the top, not a mapping. Write corpus:, teacher:, student: and train:."
        )
    overridden: dict[str, str] = {}
    for override in overrides:
        try:
            overridden[yaml_strict.override(tree, override, SHORT_FORMS)] = override
        except UserError as error:
            mistakes += error.mistakes

    def tell(path: tuple[str, ...], what: str) -> None:
        dotted = ".".join(path)
        by = next((o for at, o in overridden.items() if dotted == at or dotted.startswith(f"{at}.")), None)
        if by is None:
            mistakes.append(f"{where}: {dotted}: {what}")
        else:
            mistakes.append(
                f"override {by:.200}: {what}"
                if by.startswith(f"{dotted}=")
                else f"override {by:.200}: {dotted}: {what}"
            )

    for path, what in (*load_plugins(tree, folder), *_across_fields(tree)):
        tell(path, what)
    try:
        kinds = divergences()
    except UserError as error:
        raise UserError(*mistakes, *(f"{where}: plugins: {m}" for m in error.mistakes)) from error
    try:
        recipe = _adapter(kinds).validate_json(json.dumps(tree), strict=True, context=folder)
    except pydantic.ValidationError as error:
        schema = SCHEMA | {("objective", "divergence"): kinds}
        for finding in error.errors(include_url=False):
            tell(*explain(finding, tree, schema))
    if mistakes:
        raise UserError(*dict.fromkeys(mistakes))
    return recipe


def dump(recipe: Recipe) -> str:
    """The recipe with every default filled in and absolute paths, as YAML that loads as an equal recipe."""
    return yaml_strict.write(dataclasses.asdict(recipe, dict_factory=_name_first))


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors; divergences of plug-ins that are loaded are in it."""
    schema = _adapter(divergences()).json_schema()
    inherited = TypeAdapter(AnyCorpus).json_schema()[
        "properties"
    ]  # pydantic reads no docstrings of a base class
    for kind in typing.get_args(Corpus):
        schema["$defs"][kind.__name__]["properties"] |= inherited
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "potstill recipe"}


SHORT_FORMS = {("objective", "divergence")}
SCHEMA: dict[tuple[str, ...], tuple[Any, ...]] = {
    (): (Recipe,),
    ("corpus",): typing.get_args(Corpus),
    ("teacher",): typing.get_args(Teacher),
    ("student",): typing.get_args(Student),
    ("objective",): (Objective,),
    ("train",): (Train,),
    ("eval",): (Eval,),
}


@functools.lru_cache(maxsize=4)
def _adapter(divergences: tuple[Any, ...]) -> TypeAdapter[Recipe]:
    """A validator that knows these divergences, which are those registered now."""
    return TypeAdapter(Recipe)


def _name_first(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return dict(sorted(items, key=lambda item: item[0] != "name"))


def _across_fields(tree: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """What fields make wrong together. Read from the tree, so that a mistake elsewhere does not hide it."""
    student, objective, train = (
        tree[s] if isinstance(tree.get(s), dict) else {} for s in ("student", "objective", "train")
    )
    if student.get("name") == "cut" and (student.get("layers") is None) == (student.get("keep") is None):
        both = "and keep are both given" if student.get("keep") is not None else "or keep must be given"
        yield ("student", "layers"), f"layers {both}. Give one of them: how many layers, or which."
    if objective.get("kd_weight") == objective.get("ce_weight") == 0:
        yield (
            ("objective", "kd_weight"),
            "kd_weight and ce_weight are both 0: nothing would be learned. Raise one.",
        )
    steps, warmup = train.get("steps"), train.get("warmup")
    if isinstance(steps, int) and isinstance(warmup, int) and warmup > steps > 0:
        yield (
            ("train", "warmup"),
            f"{warmup} steps of warm-up in a run of {steps}. Lower it, or raise train.steps.",
        )
