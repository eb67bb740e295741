"""Files into documents of token ids: text, JSONL, chat, Parquet, Hugging Face datasets, token shards.

Each reader refuses what it cannot read whole, with the file and line, the offset or the column. Text readers
end every document with the tokenizer's EOS, which is how a student learns to stop; special tokens spelled out
inside a text stay text. Called by the assembly; knows nothing of rows.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.data.memmap import places_after, require_ids
from potstill.data.tokenizers import encode, label_by_prefix, label_by_template
from potstill.errors import UserError, one_line
from potstill.io.safe_open import opened, parse_json
from potstill.io.silence import quiet_transformers

JSONL, PARQUET = ("*.jsonl",), ("*.parquet",)
# A shard without document ends is cut in pieces of so many rows, so that some of them can be held out.
ROWS_PER_PIECE = 16
TEXTS_PER_CALL = 64
# A document is in memory as a whole, with its tokens. A longer one is a file never written, or no text.
MAX_TEXT_BYTES, MAX_LINE_BYTES = 2**28, 2**26
ZEROS = 2**16
GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Document:
    source: str
    """File, and line or row where there are several documents in it."""
    ids: NDArray[np.uint32]
    labels: NDArray[np.bool_] | None = None
    """Which tokens may be predicted; None is all of them."""


@dataclass
class Reading:
    """Documents as they are read, and the files they came from: complete once the documents are used up."""

    documents: Iterator[Document]
    files: list[dict[str, Any]] = field(default_factory=list)


def text(path: Path, tokenizer: Any, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> Reading:
    """One document a file. Patterns match a file's name or its path in the folder; hidden files are none."""
    reading = Reading(iter(()))

    def texts() -> Iterator[tuple[str, str]]:
        for file in files_of(path, include, exclude):
            if os.path.isfile(file) and (size := os.path.getsize(file)) > MAX_TEXT_BYTES:
                raise UserError(
                    f"{file}: a document of {size} bytes, at most {MAX_TEXT_BYTES} are read."
                    " Split it, or write a document a line as JSONL."
                )
            content = b"".join(_lines(file, reading, whole=True))
            try:
                decoded = content.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{file}: not UTF-8 text at byte {error.start} of {len(content)}."
                    " Leave it out with corpus.include or corpus.exclude."
                ) from error
            if b"\0" in content:
                raise UserError(
                    f"{file}: not a text: zero byte at {content.index(0)} of {len(content)}."
                    " Leave it out with corpus.include or corpus.exclude."
                )
            yield str(file), decoded

    reading.documents = _tokenize(texts(), tokenizer)
    return reading


def from_texts(texts: Iterable[tuple[str, str]], tokenizer: Any) -> Reading:
    """Documents of a corpus that is no file: (where it stands, its text)."""
    return Reading(_tokenize(texts, tokenizer))


def jsonl(path: Path, tokenizer: Any, field: str = "text") -> Reading:
    """One document a line, the string under `field`."""
    reading = Reading(iter(()))
    texts = ((where, _string(where, record, field)) for where, record in _records(path, reading))
    reading.documents = _tokenize(texts, tokenizer)
    return reading


def chat(path: Path, tokenizer: Any, field: str = "messages") -> Reading:
    """One conversation a line, `[{"role", "content"}, …]` under `field`; the assistant's tokens bear loss.

    What that is, a template with a `{% generation %}` block says itself. Of any other template it is what the
    assistant's message adds to the text after the generation prompt, its end-of-turn token included.
    """
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise UserError(
            "corpus.name: chat needs a tokenizer with a chat template, and this one has none."
            f" Set corpus.tokenizer to another. ({one_line(error)})"
        ) from error
    label = label_by_template if GENERATION_BLOCK.search(template) else label_by_prefix
    reading = Reading(iter(()))

    def conversations() -> Iterator[Document]:
        for where, record in _records(path, reading):
            messages = _messages(where, record, field)
            try:
                with quiet_transformers():
                    ids, labels = label(where, messages, tokenizer)
            except UserError:
                raise
            except Exception as error:  # templates raise what they like, jinja2's own errors among it
                raise UserError(
                    f"{where}: the chat template refuses this conversation: {one_line(error)}"
                ) from error
            yield Document(where, np.array(ids, dtype=np.uint32), np.array(labels, dtype=np.bool_))

    reading.documents = conversations()
    return reading


def parquet(path: Path, tokenizer: Any, column: str = "text") -> Reading:
    """One document a record, the string in `column`."""
    _, pq = _extra("pyarrow"), _extra("pyarrow.parquet")
    reading = Reading(iter(()))

    def texts() -> Iterator[tuple[str, str]]:
        for file in files_of(path, PARQUET):
            where, number = str(file), 0
            with opened(file, "Parquet", "Leave it out, or write it again."):
                pass
            try:
                with pq.ParquetFile(file, page_checksum_verification=True) as table:
                    _require_column(file, column, table.schema_arrow.names)
                    for batch in table.iter_batches(columns=[column], batch_size=TEXTS_PER_CALL):
                        for value in batch.column(0):
                            where = f"{file}:{number}"
                            yield where, _string(where, {column: value.as_py()}, column)
                            number += 1
                    if number != table.metadata.num_rows:
                        raise ValueError(f"{number} records, its footer says {table.metadata.num_rows}")
            except UserError:
                raise
            except Exception as error:  # over damaged pages not Arrow's own errors alone
                raise UserError(f"{where}: not a readable Parquet file: {one_line(error)}") from error
            _record(file, reading)  # last: of gigabytes that are no Parquet not one is read

    reading.documents = _tokenize(texts(), tokenizer)
    return reading


def hf(path: Path, tokenizer: Any, split: str | None = None, column: str = "text") -> Reading:
    """One document a record of a dataset that `save_to_disk` wrote; the only split needs no name."""
    datasets = _extra("datasets")
    reading = Reading(iter(()))
    try:
        data = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a dataset that save_to_disk wrote: {one_line(error)}") from error
    described, folder = [], path
    if isinstance(data, datasets.DatasetDict):
        chosen = next(iter(data)) if split is None and len(data) == 1 else split
        if chosen not in data:
            asked = "none" if split is None else repr(split)
            raise UserError(f"corpus.split: {path} has the splits {', '.join(data)}; {asked} was asked for.")
        data, described, folder = data[chosen], [path / "dataset_dict.json"], path / str(chosen)
    elif split is not None:
        raise UserError(f"corpus.split: {path} is one dataset without splits; {split!r} was asked for.")
    _require_column(path, column, data.column_names)

    def texts() -> Iterator[tuple[str, str]]:
        # state.json says which files are the data: what `.map()` leaves beside them is not.
        described.extend(folder / name for name in ("state.json", "dataset_info.json"))
        for file in (*described, *(Path(each["filename"]) for each in data.cache_files)):
            _record(file, reading)
        where = str(path)
        try:
            for number, record in enumerate(data.select_columns([column])):
                where = f"{path}:{number}"
                yield where, _string(where, record, column)
        except UserError:
            raise
        except Exception as error:  # a damaged table says so when it is read, in many ways
            raise UserError(f"{where}: not a readable dataset: {one_line(error)}") from error

    reading.documents = _tokenize(texts(), tokenizer)
    return reading


def tokens(path: Path, dtype: str, vocab_size: int, document_end: int | None, tokens_per_row: int) -> Reading:
    """Headerless little-endian shards of ids, memory-mapped. A document ends after each `document_end`.

    Of a folder the `*.bin` files are read, or all of them where none has that name.
    """
    if document_end is not None and document_end >= vocab_size:
        raise UserError(
            f"corpus.document_end: id {document_end} is outside the vocabulary of {vocab_size} ids."
        )
    width = {"uint16": 2, "uint32": 4}[dtype]
    reading = Reading(iter(()))

    def documents() -> Iterator[Document]:
        for file in shards_of(path):
            size = _size_of_shard(file)
            if size == 0:
                raise UserError(f"{file}: an empty shard. Leave it out or write it again.")
            if size % width:
                raise UserError(
                    f"{file}: {size} bytes are not a whole number of {dtype} ids of {width} bytes."
                    " The shard is cut off, or the dtype is another."
                )
            _record(file, reading)
            ids = np.memmap(file, dtype=np.dtype(dtype).newbyteorder("<"), mode="r")
            ends = () if document_end is None else places_after(ids, document_end)
            cuts = ends or range(ROWS_PER_PIECE * tokens_per_row, len(ids), ROWS_PER_PIECE * tokens_per_row)
            for start, end in pairwise(chain([0], cuts, [len(ids)])):
                if end > start:
                    part = np.asarray(ids[start:end], dtype=np.uint32)
                    require_ids(str(file), part, vocab_size, start)
                    yield Document(f"{file}:{start}", part)

    reading.documents = documents()
    return reading


def shards_of(path: Path) -> list[Path]:
    return files_of(path, ("*.bin",) if any(path.rglob("*.bin")) else ("*",))


def _size_of_shard(file: Path) -> int:
    """Its bytes, when it may hold ids: space that was set aside and never written is all zeros."""
    with opened(file, "token ids", "Leave it out, or write it again.") as stream:
        first = stream.read(ZEROS)
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(size - ZEROS, 0))
        for part, where in ((first, "first"), (stream.read(ZEROS), "last")):
            if len(part) == ZEROS and not any(part):
                raise UserError(
                    f"{file}: its {where} {ZEROS} bytes are zero: never written, or cut off. Write it again."
                )
    return size


def _tokenize(texts: Iterable[tuple[str, str]], tokenizer: Any) -> Iterator[Document]:
    full = ((where, content) for where, content in texts if content)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    heard = False
    while chunk := list(islice(full, TEXTS_PER_CALL)):
        contents = [content for _, content in chunk]
        ids_of = encode(chunk[0][0], contents, tokenizer)
        heard = heard or any(ids_of)
        if not heard and any(content.strip() for content in contents):
            raise UserError(
                f"{tokenizer.name_or_path}: its tokenizer finds no token in {chunk[0][0]} and the"
                f" {len(chunk) - 1} documents after it. Set corpus.tokenizer to one for this text."
            )
        for (where, _), ids in zip(chunk, ids_of, strict=True):
            yield Document(where, np.array([*ids, *end], dtype=np.uint32))


def _messages(where: str, record: dict[str, Any], field: str) -> list[dict[str, str]]:
    messages = record.get(field)
    if not isinstance(messages, list) or not messages:
        raise UserError(
            f"{where}: {field!r} is not a list of messages; the line has {_names(record)}. Set corpus.field."
        )
    for message in messages:
        parts = [message.get(key) for key in ("role", "content")] if isinstance(message, dict) else []
        if not parts or not all(isinstance(part, str) and _encodable(part) for part in parts):
            raise UserError(
                f"{where}: a message must have a `role` and a `content`, both strings;"
                f" found {json.dumps(message)[:80]}."
            )
    return messages


def _records(path: Path, reading: Reading) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line of each file as a mapping, with its place."""
    for file in files_of(path, JSONL):
        for number, line in enumerate(_lines(file, reading), start=1):
            if line.strip():
                where = f"{file}:{number}"
                try:
                    record = parse_json(line)
                except ValueError as error:
                    raise UserError(f"{where}: not a line of JSON: {one_line(error)}") from error
                if not isinstance(record, dict):
                    raise UserError(f"{where}: {type(record).__name__}, not an object with named fields.")
                yield where, record


def _string(where: str, record: dict[str, Any], name: str) -> str:
    value = record.get(name)
    if name not in record:
        raise UserError(f"{where}: {name!r} is missing; found {_names(record)}. Set corpus.field.")
    if not isinstance(value, str):
        raise UserError(
            f"{where}: {name!r} is {type(value).__name__}, not a string; found {_names(record)}."
            " Name the text's own field, or mend the record."
        )
    if not _encodable(value):
        raise UserError(
            f"{where}: {name!r} holds half of a surrogate pair, which no text can. Mend the record."
        )
    return value


def _encodable(value: str) -> bool:
    """Whether UTF-8 can write it: JSON may spell half a surrogate pair, which tokenizers refuse."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _names(record: dict[str, Any]) -> str:
    return ", ".join(record) or "nothing"


def _require_column(where: Path, column: str, names: Sequence[str]) -> None:
    if column not in names:
        raise UserError(f"{where}: no column {column!r}; found {', '.join(names)}. Set corpus.column.")


def files_of(path: Path, include: Sequence[str], exclude: Sequence[str] = ()) -> list[Path]:
    """In sorted order, so that a corpus is the same on every file system."""
    if os.path.exists(path) and not os.path.isdir(path):
        return [path]  # also what is not plain: opening it says what it is
    if not os.path.isdir(path):
        raise UserError(f"corpus.path: no file or folder {path}.")

    def matches(relative: Path, patterns: Sequence[str]) -> bool:
        return any(fnmatch(str(relative), p) or fnmatch(relative.name, p) for p in patterns)

    found = []
    for file in path.rglob("*"):
        relative = file.relative_to(path)
        if not matches(relative, include) or matches(relative, exclude):
            continue
        hidden = any(part.startswith(".") or part == "__pycache__" for part in relative.parts)
        # A link that leads nowhere is kept: opening it names it, passed over, a file would be lost unseen.
        if not hidden and (file.is_file() or (file.is_symlink() and not file.exists())):
            found.append(file)
    found.sort()
    if not found:
        left = f", {', '.join(exclude)} left out" if exclude else ""
        raise UserError(f"corpus.path: no file of {path} matches {', '.join(include)}{left}.")
    return found


def _lines(file: Path, reading: Reading, whole: bool = False) -> Iterator[bytes]:
    """The lines of a file, hashed as they pass: a large file is never held whole, unless it is one text."""
    digest, size, number = hashlib.sha256(), 0, 1
    try:
        with opened(file, "text", "Leave it out, or write it again.") as stream:
            while line := stream.readline(MAX_LINE_BYTES + 1):
                if len(line) > MAX_LINE_BYTES and not whole:
                    raise UserError(
                        f"{file}:{number}: a line longer than {MAX_LINE_BYTES} bytes."
                        " Write one document a line."
                    )
                digest.update(line)
                size += len(line)
                number += 1
                yield line
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}.") from error
    reading.files.append({"path": str(file), "bytes": size, "sha256": digest.hexdigest()})


def _record(file: Path, reading: Reading) -> None:
    """Hash a file that its own library opens; its lines, if it has any, may be as long as the file."""
    try:
        with opened(file, "a corpus", "Leave it out, or write it again.") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            size = stream.tell()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}.") from error
    reading.files.append({"path": str(file), "bytes": size, "sha256": digest})


def _extra(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"corpus.name: this reader needs {module.split('.')[0]}, which is not installed."
            " Install it: pip install 'potstill[data]'."
        ) from error
