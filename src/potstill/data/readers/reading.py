"""What the readers share: documents and their files, which files a folder has, text into ids.

A reader refuses what it cannot read whole, with the file and line, the offset or the column. Text readers end
every document with the tokenizer's EOS, which is how a student learns to stop; special tokens spelled out
inside a text stay text. Nothing here knows of rows.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.data.tokenizers import encode
from potstill.errors import UserError
from potstill.io.safe_open import is_encodable, names_of, opened

TEXTS_PER_CALL = 64
MAX_LINE_BYTES = 2**26
"""A document is in memory as a whole, with its tokens: a longer line is a damaged file, or no text."""


@dataclass(frozen=True)
class Document:
    source: str
    """File, and line or row where there are several documents in it."""
    ids: NDArray[np.uint32]
    labels: NDArray[np.bool_] | None = None
    """Which tokens may be predicted; None is all of them."""
    is_text: bool = False
    """Whether it was tokenized from a text, before which the tokenizer may put a token."""
    is_further_part: bool = False
    """Whether it belongs to the document before it, and is held out or trained on with that one."""


@dataclass
class Reading:
    """Documents as they are read, and the files they came from: complete once the documents are used up."""

    documents: Iterator[Document]
    files: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)
    """What else is to be known of the documents, for `corpus.json`."""


def files_of(path: Path, include: Sequence[str], exclude: Sequence[str] = ()) -> list[Path]:
    """Files of a folder that match, sorted so that a corpus is the same on every file system."""
    if os.path.exists(path) and not os.path.isdir(path):
        return [path]  # also a FIFO or a device: opening it raises the error that names it
    if not os.path.isdir(path):
        raise UserError(f"corpus.path: no file or folder {path}.")

    def matches(relative: Path, patterns: Sequence[str]) -> bool:
        return any(fnmatch(str(relative), p) or fnmatch(relative.name, p) for p in patterns)

    matching = []
    for file in path.rglob("*"):
        relative = file.relative_to(path)
        if not matches(relative, include) or matches(relative, exclude):
            continue
        hidden = any(part.startswith(".") or part == "__pycache__" for part in relative.parts)
        # A broken link is kept, so that opening it raises: skipped, a document would be lost silently.
        if not hidden and (file.is_file() or (file.is_symlink() and not file.exists())):
            matching.append(file)
    matching.sort()
    if not matching:
        left = f", {', '.join(exclude)} left out" if exclude else ""
        raise UserError(f"corpus.path: no file of {path} matches {', '.join(include)}{left}.")
    return matching


def lines_of(file: Path, reading: Reading, whole: bool = False) -> Iterator[bytes]:
    """The lines of a file, hashed as they pass: only a file that is one text (`whole`) is held in memory."""
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


def string_field(where: str, record: dict[str, Any], name: str) -> str:
    value = record.get(name)
    if name not in record:
        raise UserError(f"{where}: {name!r} is missing; found {names_of(record)}. Set corpus.field.")
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
