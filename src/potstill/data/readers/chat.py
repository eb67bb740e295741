"""Conversations as JSON, Parquet or a saved dataset; the assistant's tokens bear loss."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from potstill.data.chats.labels import Labeller
from potstill.data.chats.records import Shapes
from potstill.data.chats.templates import ChatTemplate
from potstill.data.readers import hf, jsonl, parquet
from potstill.data.readers.folders import files_of
from potstill.data.readers.reading import Document, Reading
from potstill.errors import UserError

DATE = datetime.date(2024, 7, 26)
"""What the templates of Llama 3 write without a clock."""


PATTERNS = ("*.jsonl", "*.parquet")


def read(
    path: Path,
    tokenizer: Any,
    field: str | None = None,
    date: datetime.date = DATE,
    split: str | None = None,
) -> Reading:
    """One conversation a record, in any shape that `data.chats.records` knows; see there and `data.chats.labels`.

    Args:
        field: key of the list of messages; None takes the shape that a record has.
        date: what a template that asks for the time is told.
        split: of a dataset that `save_to_disk` wrote; its only one needs no name.
    """
    template = ChatTemplate(tokenizer, date)  # refused before anything is read
    reading = Reading(iter(()))
    found = _records(path, reading, split)

    def conversations() -> Iterator[Document]:
        shapes, counts = Shapes(field), Counter[str]()
        with template:
            labeller = Labeller(template)
            for where, record in found:
                conversation = shapes.conversation(where, record)
                documents = labeller.documents(conversation)
                counts["conversations"] += 1
                counts["without_an_answer"] += not any(each.labels.any() for each in documents)
                counts["in_several_documents"] += len(documents) > 1
                counts["without_an_end"] += not all(each.ends for each in documents)
                for number, each in enumerate(documents):
                    if each.labels.any():
                        yield Document(where, each.ids, each.labels, is_further_part=number > 0)
        counts["spell_control_tokens"] = len(labeller.spelled)
        counts["turns_prompted_otherwise"] = len(labeller.prompted)
        renamed = {f"{old} as {new}": number for (old, new), number in sorted(shapes.renamed.items())}
        reading.counts |= {name: number for name, number in counts.items() if number}
        reading.counts |= {"roles": renamed} if renamed else {}
        if counts["conversations"] and counts["conversations"] == counts["without_an_answer"]:
            raise UserError(
                f"{path}: none of {counts['conversations']} conversations has a token of the assistant's to learn: no"
                " message has that role, all are marked as not to be trained on, or the chat template writes nothing"
                f" for them. `role: assistant` is looked for, and what {tokenizer.name_or_path} writes for it."
            )

    reading.documents = conversations()
    return reading


def _records(path: Path, reading: Reading, split: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    if hf.is_saved(path):
        return hf.records(path, reading, split)
    if split is not None:
        raise UserError(f"corpus.split: {path} is no dataset that save_to_disk wrote. Set it to null.")
    if path.suffix == ".json" and path.is_file():
        return jsonl.records_of_array(path, reading)
    files = files_of(path, PATTERNS)
    return (
        each
        for file in files
        for each in (parquet.records if file.suffix == ".parquet" else jsonl.records_of)(file, reading)
    )


def notes(counts: dict[str, Any]) -> Iterator[str]:
    """What a reader of a chat corpus should know of it, a line each."""
    of = f"of {counts.get('conversations', 0)} conversations"
    if roles := counts.get("roles"):
        read_as = ", ".join(f"{each} in {number} messages" for each, number in roles.items())
        yield f"a role is read as another: {read_as}"
    if number := counts.get("without_an_answer"):
        yield f"{number} {of} have no token to learn, and are left out"
    if number := counts.get("in_several_documents"):
        yield f"{number} {of} are several documents: the chat template writes earlier turns otherwise than they were"
    if number := counts.get("spell_control_tokens"):
        yield f"{number} {of} spell control tokens, which stay words"
    if number := counts.get("without_an_end"):
        yield (
            f"{number} {of} have a turn without an end of turn (a control token): the student does not learn to stop"
            " there. Use a chat template that writes one."
        )
    if number := counts.get("turns_prompted_otherwise"):
        yield (
            f"in {number} turns the generation prompt writes what is missing before the written answer (a thought,"
            " mostly): at inference the student answers after a text that it has not learnt from"
        )
