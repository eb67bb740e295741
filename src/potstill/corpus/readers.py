"""Files into documents of token ids: text, JSONL, chat, Parquet, Hugging Face datasets, token shards.

Each reader refuses what it cannot read whole, with the file and line, the offset or the column. Text readers
end every document with the tokenizer's EOS, which is how a student learns to stop; special tokens spelled out
inside a text stay text. Called by the assembly; knows nothing of rows.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.errors import UserError, one_line
from potstill.quiet import quiet_transformers

# A shard without document ends is cut in pieces of so many rows, so that some of them can be held out.
ROWS_PER_PIECE = 16
TEXTS_PER_CALL = 64
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
            content = b"".join(_lines(file, reading))
            try:
                yield str(file), content.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{file}: not UTF-8 text at byte {error.start} of {len(content)}."
                    " Leave it out with corpus.include or corpus.exclude."
                ) from error

    reading.documents = _tokenize(texts(), tokenizer)
    return reading


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
    label = _by_template if GENERATION_BLOCK.search(template) else _by_prefix
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
    pa, pq = _extra("pyarrow"), _extra("pyarrow.parquet")
    reading = Reading(iter(()))

    def texts() -> Iterator[tuple[str, str]]:
        for file in files_of(path, ("*.parquet",)):
            _record(file, reading)
            try:
                with pq.ParquetFile(file) as table:
                    _require_column(file, column, table.schema_arrow.names)
                    number = 0
                    for batch in table.iter_batches(columns=[column], batch_size=TEXTS_PER_CALL):
                        for value in batch.column(0).to_pylist():
                            yield f"{file}:{number}", _string(f"{file}:{number}", {column: value}, column)
                            number += 1
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"{file}: not a readable Parquet file: {one_line(error)}") from error

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
    if isinstance(data, datasets.DatasetDict):
        chosen = next(iter(data)) if split is None and len(data) == 1 else split
        if chosen not in data:
            asked = "none" if split is None else repr(split)
            raise UserError(f"corpus.split: {path} has the splits {', '.join(data)}; {asked} was asked for.")
        data = data[chosen]
    elif split is not None:
        raise UserError(f"corpus.split: {path} is one dataset without splits; {split!r} was asked for.")
    _require_column(path, column, data.column_names)

    def texts() -> Iterator[tuple[str, str]]:
        for file in data.cache_files:
            _record(Path(file["filename"]), reading)
        for number, record in enumerate(data.select_columns([column])):
            yield f"{path}:{number}", _string(f"{path}:{number}", record, column)

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
        for file in files_of(path, ("*.bin",) if any(path.rglob("*.bin")) else ("*",)):
            _record(file, reading)
            size = reading.files[-1]["bytes"]
            if size == 0:
                raise UserError(f"{file}: an empty shard. Leave it out or write it again.")
            if size % width:
                raise UserError(
                    f"{file}: {size} bytes are not a whole number of {dtype} ids of {width} bytes."
                    " The shard is cut off, or the dtype is another."
                )
            ids = np.memmap(file, dtype=np.dtype(dtype).newbyteorder("<"), mode="r")
            ends = [] if document_end is None else (np.flatnonzero(ids == document_end) + 1).tolist()
            cuts = ends or range(ROWS_PER_PIECE * tokens_per_row, len(ids), ROWS_PER_PIECE * tokens_per_row)
            for start, end in pairwise([0, *cuts, len(ids)]):
                if end > start:
                    part = np.asarray(ids[start:end], dtype=np.uint32)
                    require_ids(str(file), part, vocab_size, start)
                    yield Document(f"{file}:{start}", part)

    reading.documents = documents()
    return reading


def require_ids(where: str, ids: NDArray[np.uint32], vocab_size: int, offset: int = 0) -> None:
    """Refuse an id outside the vocabulary, with its place."""
    if len(ids) and int(ids.max()) >= vocab_size:
        at = int(np.argmax(ids >= vocab_size))
        raise UserError(
            f"{where}: id {int(ids[at])} at token {offset + at} is outside the vocabulary of {vocab_size}"
            " ids. The corpus and the teacher do not belong together, or the dtype is another."
        )


def _tokenize(texts: Iterable[tuple[str, str]], tokenizer: Any) -> Iterator[Document]:
    full = ((where, content) for where, content in texts if content)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    while chunk := list(islice(full, TEXTS_PER_CALL)):
        with quiet_transformers():
            encoded = tokenizer(
                [content for _, content in chunk], add_special_tokens=False, split_special_tokens=True
            )
        for (where, _), ids in zip(chunk, encoded["input_ids"], strict=True):
            yield Document(where, np.array([*ids, *end], dtype=np.uint32))


def _by_template(where: str, messages: list[dict[str, str]], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Ids, and labels where the template says the assistant speaks, with the end-of-turn token after it."""
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, spoken = encoded["input_ids"], [bool(said) for said in encoded["assistant_masks"]]
    # Many templates close the block before the end of turn; a student that is never taught it never stops.
    ends = [i > 0 and spoken[i - 1] and id_ == tokenizer.eos_token_id for i, id_ in enumerate(ids)]
    return ids, [said or end for said, end in zip(spoken, ends, strict=True)]


def _by_prefix(where: str, messages: list[dict[str, str]], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Ids, and labels on what each of the assistant's messages adds to the text.

    Texts are compared and not ids: a tokenizer may merge the prompt's last character with the answer's first.
    """

    def render(upto: int, prompt: bool) -> str:
        rendered: str = tokenizer.apply_chat_template(
            messages[:upto], add_generation_prompt=prompt, tokenize=False
        )
        return rendered

    whole = render(len(messages), False)
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    begins = np.array([begin for begin, _ in encoded["offset_mapping"]], dtype=np.int64)
    labels = np.zeros(len(begins), dtype=np.bool_)
    if messages[0]["role"] == "assistant":
        raise UserError(
            f"{where}: message 0 is the assistant's, and answers nothing. Put a user's before it."
        )
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = render(turn, True), render(turn + 1, False)
            if not (whole.startswith(after) and after.startswith(before)):
                raise UserError(
                    f"{where}: the chat template rewrites earlier turns, so the assistant's tokens of message"
                    f" {turn} cannot be told apart. Use a template with a {{% generation %}} block."
                )
            labels |= (begins >= len(before)) & (begins < len(after))
    return encoded["input_ids"], labels.tolist()


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
    for file in files_of(path, ("*.jsonl",)):
        for number, line in enumerate(_lines(file, reading), start=1):
            if line.strip():
                where = f"{file}:{number}"
                try:
                    record = json.loads(line.decode("utf-8"))
                except (ValueError, RecursionError) as error:
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
    if path.is_file():
        return [path]
    if not path.is_dir():
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


def _lines(file: Path, reading: Reading) -> Iterator[bytes]:
    """The lines of a file, hashed as they pass: a large file is never held whole."""
    digest, size = hashlib.sha256(), 0
    try:
        with open(file, "rb") as stream:
            for line in stream:
                digest.update(line)
                size += len(line)
                yield line
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}.") from error
    reading.files.append({"path": str(file), "bytes": size, "sha256": digest.hexdigest()})


def _record(file: Path, reading: Reading) -> None:
    """Hash a file that its own library opens; its lines, if it has any, may be as long as the file."""
    try:
        with open(file, "rb") as stream:
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
