"""Files into documents of token ids: text and source folders, JSONL, chat, Parquet, Hugging Face datasets, token shards.

Each reader is a generator that refuses what it cannot read whole, with the file and line, the offset or the column. Text
readers end every document with the tokenizer's EOS, which is how a student learns to stop; special tokens spelled out inside
a text stay text. Called by the assembly; knows nothing of rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.errors import UserError
from potstill.quiet import quiet_transformers

ROWS_PER_PIECE = 16  # a shard without document ends is cut in pieces of so many rows, so that some can be held out
TEXTS_PER_CALL = 64


@dataclass(frozen=True)
class Document:
    source: str
    """File, and line or row where there are several documents in it."""
    ids: NDArray[np.uint32]
    labels: NDArray[np.bool_] | None = None
    """Which tokens may be predicted; None is all of them."""


@dataclass
class Reading:
    """Documents as they are read, and the hashes of the files they came from: complete once the documents are used up."""

    documents: Iterator[Document]
    files: list[dict[str, Any]] = field(default_factory=list)


def text(path: Path, tokenizer: Any, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> Reading:
    """One document a file. Patterns match a file's name or its path below the folder; hidden files are passed over."""
    reading = Reading(iter(()))

    def texts() -> Iterator[tuple[str, str]]:
        for file in _files(path, include, exclude):
            content = _read(file, reading)
            try:
                yield str(file), content.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{file}: not UTF-8 text at byte {error.start}. Leave it out with corpus.include or exclude.") from error

    reading.documents = _tokenize(texts(), tokenizer)
    return reading


def jsonl(path: Path, tokenizer: Any, field: str = "text") -> Reading:
    """One document a line, the string under `field`."""
    reading = Reading(iter(()))
    texts = ((where, _string(where, record, field)) for where, record in _records(path, reading))
    reading.documents = _tokenize(texts, tokenizer)
    return reading


def chat(path: Path, tokenizer: Any, field: str = "messages") -> Reading:
    """One conversation a line, `[{"role", "content"}, …]` under `field`; only what the assistant says bears loss.

    A turn is what the chat template adds when its message is added; the assistant's starts after the generation prompt and
    includes its end-of-turn token.
    """
    if not tokenizer.chat_template:
        raise UserError("corpus.name: chat needs a tokenizer with a chat template, and this one has none. Set corpus.tokenizer.")
    reading = Reading(iter(()))

    def conversations() -> Iterator[Document]:
        for where, record in _records(path, reading):
            yield _conversation(where, _messages(where, record, field), tokenizer)

    reading.documents = conversations()
    return reading


def parquet(path: Path, tokenizer: Any, column: str = "text") -> Reading:
    """One document a row, the string in `column`."""
    pq = _extra("pyarrow.parquet")
    import pyarrow as pa

    reading = Reading(iter(()))

    def texts() -> Iterator[tuple[str, str]]:
        for file in _files(path, ("*.parquet",), ()):
            _record(file, reading)
            try:
                table = pq.ParquetFile(file)
                names = table.schema_arrow.names
                if column not in names:
                    raise UserError(f"{file}: no column {column!r}; found {', '.join(names)}. Set corpus.column.")
                row = 0
                for batch in table.iter_batches(columns=[column]):
                    for value in batch.column(0).to_pylist():
                        yield f"{file}:{row}", _string(f"{file}:{row}", {column: value}, column)
                        row += 1
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"{file}: not a readable Parquet file: {_first_line(error)}") from error

    reading.documents = _tokenize(texts(), tokenizer)
    return reading


def hf(path: Path, tokenizer: Any, split: str | None = None, column: str = "text") -> Reading:
    """One document a row of a dataset that `save_to_disk` wrote."""
    datasets = _extra("datasets")
    reading = Reading(iter(()))
    try:
        data = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a dataset that save_to_disk wrote: {_first_line(error)}") from error
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise UserError(f"corpus.split: {path} has the splits {', '.join(data)}; {split!r} was asked for.")
        data = data[split]
    elif split is not None:
        raise UserError(f"corpus.split: {path} is one dataset without splits; {split!r} was asked for.")
    if column not in data.column_names:
        raise UserError(f"{path}: no column {column!r}; found {', '.join(data.column_names)}. Set corpus.column.")
    for file in sorted(p for p in path.rglob("*.arrow")):
        _record(file, reading)
    texts = ((f"{path}:{i}", _string(f"{path}:{i}", row, column)) for i, row in enumerate(data.select_columns([column])))
    reading.documents = _tokenize(texts, tokenizer)
    return reading


def tokens(path: Path, dtype: str, vocab_size: int, document_end: int | None, tokens_per_row: int) -> Reading:
    """Headerless little-endian shards of ids, memory-mapped. A document ends after each `document_end`."""
    if document_end is not None and document_end >= vocab_size:
        raise UserError(f"corpus.document_end: id {document_end} is outside the vocabulary of {vocab_size} ids.")
    width = {"uint16": 2, "uint32": 4}[dtype]
    reading = Reading(iter(()))

    def documents() -> Iterator[Document]:
        for file in _files(path, ("*",), ()):
            size = file.stat().st_size
            if size == 0:
                raise UserError(f"{file}: an empty shard. Leave it out or write it again.")
            if size % width:
                raise UserError(f"{file}: {size} bytes are not a whole number of {dtype} ids of {width} bytes. The shard is cut off.")
            _record(file, reading)
            ids = np.memmap(file, dtype=np.dtype(dtype).newbyteorder("<"), mode="r")
            piece = ROWS_PER_PIECE * tokens_per_row
            ends = [] if document_end is None else (np.flatnonzero(ids == document_end) + 1).tolist()
            start = 0
            for end in [*ends, len(ids)]:
                if end == len(ids) and end - start > piece and not ends:
                    cuts = range(start, end, piece)
                else:
                    cuts = range(start, end, max(end - start, 1))
                for begin in cuts:
                    part = np.asarray(ids[begin : min(begin + cuts.step, end)], dtype=np.uint32)
                    require_ids(f"{file}", part, vocab_size, begin)
                    yield Document(f"{file}:{begin}", part)
                start = end

    reading.documents = documents()
    return reading


def require_ids(where: str, ids: NDArray[np.uint32], vocab_size: int, offset: int = 0) -> None:
    """Refuse an id outside the vocabulary, with its place."""
    if len(ids) and int(ids.max()) >= vocab_size:
        at = int(np.argmax(ids >= vocab_size))
        raise UserError(
            f"{where}: id {int(ids[at])} at token {offset + at} is outside the vocabulary of {vocab_size} ids."
            " The corpus and the teacher do not belong together, or the dtype is another."
        )


def _tokenize(texts: Iterable[tuple[str, str]], tokenizer: Any) -> Iterator[Document]:
    texts = iter(texts)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    while chunk := list(islice(texts, TEXTS_PER_CALL)):
        with quiet_transformers():
            encoded = tokenizer([content for _, content in chunk], add_special_tokens=False, split_special_tokens=True)
        for (where, content), ids in zip(chunk, encoded["input_ids"], strict=True):
            if content:
                yield Document(where, np.array([*ids, *end], dtype=np.uint32))


def _conversation(where: str, messages: list[dict[str, str]], tokenizer: Any) -> Document:
    def ids_of(upto: int, prompt: bool) -> list[int]:
        if upto == 0 and not prompt:
            return []
        try:
            ids: list[int] = tokenizer.apply_chat_template(
                messages[:upto], add_generation_prompt=prompt, tokenize=True, return_dict=False
            )
        except Exception as error:  # templates raise what they like, jinja2's own errors among it
            raise UserError(f"{where}: the chat template refuses this conversation: {_first_line(error)}") from error
        return ids

    whole = ids_of(len(messages), False)
    labels = np.zeros(len(whole), dtype=np.bool_)
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = ids_of(turn, True), ids_of(turn + 1, False)
            if whole[: len(before)] != before or whole[: len(after)] != after:
                raise UserError(
                    f"{where}: the chat template rewrites earlier turns, so the assistant's tokens cannot be told apart."
                    " Train on it as corpus.name: jsonl, or with another template."
                )
            labels[len(before) : len(after)] = True
    return Document(where, np.array(whole, dtype=np.uint32), labels)


def _messages(where: str, record: dict[str, Any], field: str) -> list[dict[str, str]]:
    messages = record.get(field)
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: {field!r} is not a list of messages; the line has {', '.join(record)}. Set corpus.field.")
    for message in messages:
        if not (isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)):
            raise UserError(f"{where}: a message must have a `role` and a `content`, both strings; found {json.dumps(message)[:80]}.")
    return messages


def _records(path: Path, reading: Reading) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line of each file as a mapping, with its place."""
    for file in _files(path, ("*.jsonl", "*.json") if path.is_dir() else ("*",), ()):
        for number, line in enumerate(_read(file, reading).split(b"\n"), start=1):
            if line.strip():
                where = f"{file}:{number}"
                try:
                    record = json.loads(line.decode("utf-8"))
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{where}: not a line of JSON: {_first_line(error)}") from error
                if not isinstance(record, dict):
                    raise UserError(f"{where}: a {type(record).__name__}, wanted an object like {{\"text\": …}}.")
                yield where, record


def _string(where: str, record: dict[str, Any], field: str) -> str:
    value = record.get(field)
    if not isinstance(value, str):
        found = f"is {type(value).__name__}" if field in record else f"is missing; found {', '.join(record) or 'nothing'}"
        raise UserError(f"{where}: {field!r} {found}, wanted a string. Name the text's own field in the recipe.")
    return value


def _files(path: Path, include: Sequence[str], exclude: Sequence[str]) -> list[Path]:
    """In sorted order, so that a corpus is the same on every file system."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"corpus.path: no file or folder {path}.")

    def matches(relative: Path, patterns: Sequence[str]) -> bool:
        return any(fnmatch(str(relative), p) or fnmatch(relative.name, p) for p in patterns)

    found = []
    for file in sorted(path.rglob("*")):
        relative = file.relative_to(path)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in relative.parts)
        if not hidden and file.is_file() and matches(relative, include) and not matches(relative, exclude):
            found.append(file)
    if not found:
        raise UserError(f"corpus.path: no file of {path} matches {', '.join(include)}. Look at corpus.include and exclude.")
    return found


def _read(file: Path, reading: Reading) -> bytes:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}.") from error
    reading.files.append({"path": str(file), "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()})
    return content


def _record(file: Path, reading: Reading) -> None:
    """Hash a large file without holding it."""
    try:
        with open(file, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}.") from error
    reading.files.append({"path": str(file), "bytes": file.stat().st_size, "sha256": digest})


def _extra(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"corpus.name: this reader needs {module.split('.')[0]}: pip install 'potstill[data]'.") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{lines[0].rstrip('.')}."


