"""What the readers share: documents and their files, lines of text, text into ids.

A reader refuses what it cannot read whole, with the file and line, the offset or the column. Text readers end
every document with the tokenizer's EOS, which is how a student learns to stop; special tokens spelled out
inside a text stay text. Nothing here knows of rows.
"""

from __future__ import annotations

import codecs
import hashlib
import importlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.data.readers.folders import SHOWN, files_with, listed
from potstill.data.tokenizers import encode
from potstill.errors import UserError
from potstill.io.safe_open import is_encodable, names_of, opened, require_file

TEXTS_PER_CALL = 64
CONVERSATION_KEYS = {"messages", "conversations", "conversation", "instruction", "prompt", "completion"}
"""Of records that `corpus.name: chat` reads."""
MAX_LINE_BYTES = 2**26
"""A document is in memory as a whole, with its tokens: a longer line is a damaged file, or no text."""
MARK = "\ufeff"
"""The byte-order mark that some editors write in front of a text: not a character of it."""
OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


COMPRESSIONS = {
    "gzip": (re.compile(rb"\x1f\x8b"), "gunzip"),
    "zstd": (re.compile(rb"\x28\xb5\x2f\xfd"), "unzstd"),
    "bzip2": (re.compile(rb"BZh[1-9]1AY&SY"), "bunzip2"),
    "xz": (re.compile(rb"\xfd7zXZ\0"), "unxz"),
    "zip": (re.compile(rb"PK\x03\x04"), "unzip"),
}
"""The bytes that such files begin with, and the program for them."""
LONGEST_MARK = 10


@dataclass(frozen=True)
class Document:
    source: str
    """File, and line or row where there are several documents in it."""
    ids: NDArray[np.uint32]
    labels: NDArray[np.bool_] | None = None
    """Which tokens may be predicted; None is all of them."""
    is_text: bool = False
    """Whether it was tokenized from a text, before which the tokenizer may put a token."""
    part_of: str | None = None
    """What it is a part of: neighbours that are parts of the same are held out or trained on together."""
    for_teacher: NDArray[np.uint32] | None = None
    """Of a prompt: what the teacher reads in place of `ids`; None: the same."""


@dataclass
class Reading:
    """Documents as they are read, and the files they came from: complete once the documents are used up."""

    documents: Iterator[Document]
    files: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)
    """What else is to be known of the documents, for `corpus.json`."""


def files_to_read(path: Path, patterns: Sequence[str], reading: Reading) -> list[Path]:
    """Files of a folder that match a reader's patterns; the others are counted."""
    others: list[str] = []
    found = files_with(path, patterns, others)
    if others:
        reading.counts["files_not_read"] = {"number": len(others), "first": others[:SHOWN]}
    return found


def about_files(counts: dict[str, Any]) -> Iterator[str]:
    if others := counts.get("files_not_read"):
        names = listed(others["first"], others["number"])
        yield f"files of the folder that are not read: {others['number']} ({names})"


def lines_of(file: Path, reading: Reading, whole: bool = False) -> Iterator[bytes]:
    """The lines of a file, hashed as they pass: only a file that is one text (`whole`) is held in memory."""
    digest, size, number = hashlib.sha256(), 0, 1
    _refuse_compressed(file)
    try:
        with opened(file, "text", "Leave it out, or write it again.") as stream:
            _require_no_other_mark(file, stream.peek(4))
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


def _require_no_other_mark(file: Path, start: bytes) -> None:
    """Refuse UTF-16 and UTF-32 by their marks, none of which is UTF-8."""
    for mark, encoding in OTHER_ENCODINGS.items():
        if start.startswith(mark):
            raise UserError(
                f"{file}: {encoding} text (it begins with the bytes {mark.hex(' ')}), not UTF-8."
                f" Convert it: iconv -f {encoding} -t UTF-8."
            )


def not_utf8(where: str, error: UnicodeDecodeError) -> UserError:
    """Of bytes in another encoding, whose name is not in them."""
    byte = error.object[error.start]
    return UserError(
        f"{where}: not UTF-8 text: byte 0x{byte:02x} at {error.start} of {len(error.object)}. Convert it"
        " (iconv -f WINDOWS-1252 -t UTF-8, if that is its encoding), or leave it out."
    )


def _refuse_compressed(file: Path) -> None:
    """Before a zip is refused as what pickles come in, and another as no UTF-8."""
    require_file(file, "Leave it out, or write it again.")
    try:
        with file.open("rb") as stream:
            start = stream.read(LONGEST_MARK)
    except (OSError, ValueError):
        return  # whoever reads it says why not
    for kind, (mark, command) in COMPRESSIONS.items():
        if mark.match(start):
            raise UserError(
                f"{file}: compressed ({kind}), not text. Decompress it first ({command}), or leave it out."
            )


def add_file(file: Path, reading: Reading) -> None:
    """Hash a file that a library opens by itself, and list it."""
    try:
        with opened(file, "a corpus", "Leave it out, or write it again.") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            size = stream.tell()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}.") from error
    reading.files.append({"path": str(file), "bytes": size, "sha256": digest})


def tokenize(texts: Iterable[tuple[str, str]], tokenizer: Any) -> Iterator[Document]:
    full = ((where, content) for where, content in texts if content)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    has_ids = False
    while chunk := list(islice(full, TEXTS_PER_CALL)):
        contents = [content for _, content in chunk]
        ids_of = encode(chunk[0][0], contents, tokenizer)
        has_ids = has_ids or any(ids_of)
        if not has_ids and any(content.strip() for content in contents):
            raise UserError(
                f"{tokenizer.name_or_path}: its tokenizer yields no token for {chunk[0][0]} and the"
                f" {len(chunk) - 1} documents after it. Set corpus.tokenizer to one for this text."
            )
        for (where, _), ids in zip(chunk, ids_of, strict=True):
            yield Document(where, np.array([*ids, *end], dtype=np.uint32), is_text=True)


def from_texts(texts: Iterable[tuple[str, str]], tokenizer: Any) -> Reading:
    """Documents of a corpus without files, each as (where it stands, its text)."""
    return Reading(tokenize(texts, tokenizer))


def string_field(where: str, record: dict[str, Any], name: str, drop_nulls: str) -> str:
    """The text of a record, which may be empty. `drop_nulls` is how its format leaves out records without one."""
    value = record.get(name)
    if name not in record:
        todo = (
            "Set corpus.name: chat."
            if record.keys() & CONVERSATION_KEYS
            else "Set corpus.field to the key of its text."
        )
        raise UserError(f"{where}: {name!r} is missing; found {names_of(record)}. {todo}")
    if value is None:
        raise UserError(f"{where}: {name!r} is null, not a string. Drop such records: {drop_nulls}.")
    if not isinstance(value, str):
        raise UserError(
            f"{where}: {name!r} is {type(value).__name__}, not a string; found {names_of(record)}."
            " Name the field of the text, or correct the record."
        )
    if not is_encodable(value):
        raise UserError(
            f"{where}: {name!r} holds half of a surrogate pair, which UTF-8 cannot encode."
            " Correct the record."
        )
    return value


def require_column(where: Path, column: str, names: Sequence[str]) -> None:
    if column not in names:
        raise UserError(f"{where}: no column {column!r}; found {', '.join(names)}. Set corpus.column.")


def import_extra(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"corpus.name: this reader needs {module.split('.')[0]}, which is not installed."
            " Install it: pip install 'potstill[data]'."
        ) from error
