"""Text files, one document each."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from potstill.data.readers.folders import files_of
from potstill.data.readers.reading import MARK, Document, Reading, lines_of, not_utf8, tokenize
from potstill.errors import UserError

MAX_TEXT_BYTES = 2**28


def read(
    path: Path,
    tokenizer: Any,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    longest: int | None = None,
) -> Reading:
    """One document a file, its line ends as they are and without a byte-order mark. Patterns match a file's name
    or its path in the folder; hidden files are none.

    Args:
        longest: tokens of a document; a longer file is several. None: any number.
    """
    reading = Reading(iter(()))

    def texts() -> Iterator[tuple[str, str]]:
        for file in files_of(path, include, exclude):
            if os.path.isfile(file) and (size := os.path.getsize(file)) > MAX_TEXT_BYTES:
                raise UserError(
                    f"{file}: a document of {size} bytes, at most {MAX_TEXT_BYTES} are read."
                    " Split it, or write a document a line as JSONL."
                )
            content = b"".join(lines_of(file, reading, whole=True))
            try:
                decoded = content.decode("utf-8")
            except UnicodeDecodeError as error:
                raise not_utf8(str(file), error) from error
            if b"\0" in content:
                raise UserError(
                    f"{file}: not a text: zero byte at {content.index(0)} of {len(content)}."
                    " Leave it out with corpus.include or corpus.exclude."
                )
            yield str(file), decoded.removeprefix(MARK)

    documents = tokenize(texts(), tokenizer)
    reading.documents = documents if longest is None else _pieces(documents, longest)
    return reading


def _pieces(documents: Iterator[Document], longest: int) -> Iterator[Document]:
    """Only the first piece of a file begins as a text does, and only the last ends with the EOS."""
    for document in documents:
        for start in range(0, len(document.ids), longest):
            place = f"{document.source}: token {start}" if start else document.source
            yield Document(place, document.ids[start : start + longest], is_text=start == 0)
