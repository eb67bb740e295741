"""Conversations as JSON lines; the assistant's tokens bear loss."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from potstill.data.readers.jsonl import records
from potstill.data.readers.reading import Document, Reading, is_encodable, names_of
from potstill.data.tokenizers import label_by_prefix, label_by_template
from potstill.errors import UserError, one_line
from potstill.io.silence import quiet_transformers

GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def read(path: Path, tokenizer: Any, field: str = "messages") -> Reading:
    """One conversation a line, `[{"role", "content"}, …]` under `field`; the assistant's tokens bear loss.

    A template with a `{% generation %}` block marks them itself. With any other template they are what the
    assistant's message adds after the generation prompt, its end-of-turn token included.
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
        for where, record in records(path, reading):
            messages = _messages(where, record, field)
            try:
                with quiet_transformers():
                    ids, labels = label(where, messages, tokenizer)
            except UserError:
                raise
            except Exception as error:  # a template may raise anything, jinja2's own errors included
                raise UserError(
                    f"{where}: the chat template refuses this conversation: {one_line(error)}"
                ) from error
            yield Document(where, np.array(ids, dtype=np.uint32), np.array(labels, dtype=np.bool_))

    reading.documents = conversations()
    return reading


def _messages(where: str, record: dict[str, Any], field: str) -> list[dict[str, str]]:
    messages = record.get(field)
    if not isinstance(messages, list) or not messages:
        raise UserError(
            f"{where}: {field!r} is not a list of messages; the line has {names_of(record)}."
            " Set corpus.field."
        )
    for message in messages:
        parts = [message.get(key) for key in ("role", "content")] if isinstance(message, dict) else []
        if not parts or not all(isinstance(part, str) and is_encodable(part) for part in parts):
            raise UserError(
                f"{where}: a message must have a `role` and a `content`, both strings;"
                f" found {json.dumps(message)[:80]}."
            )
    return messages
