"""Conversations as JSON, Parquet or a saved dataset; the assistant's tokens bear loss."""

from __future__ import annotations

import datetime
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from potstill.data.chats.labels import Labeller
from potstill.data.chats.records import Shapes
from potstill.data.chats.templates import DATE, ChatTemplate, ConversationRefused
from potstill.data.readers import hf, hub, jsonl, parquet
from potstill.data.readers.reading import Document, Reading, files_to_read
from potstill.errors import UserError, one_line
from potstill.io.safe_open import printable_name

SHOWN = 8
"""Keys that a note names."""
PATTERNS = (*jsonl.FILES, *parquet.PATTERNS)


def read(
    path: str | Path,
    tokenizer: Any,
    field: str | None = None,
    date: datetime.date = DATE,
    split: str | None = None,
    subset: str | None = None,
    count: int | None = None,
    skip_refused: bool = False,
) -> Reading:
    """One conversation a record, in any shape that `data.chats.records` knows; see there and `data.chats.labels`.

    Args:
        field: key of the list of messages; None takes the shape that a record has.
        date: what a template gets that asks for the date.
        split: of a dataset that `save_to_disk` wrote, or of one on the hub.
        subset, count: of a data set on the hub; see `hub.records`.
        skip_refused: leave out, and count, conversations that cannot be learnt from; else the first ends the reading.
    """
    template = ChatTemplate(tokenizer, date)  # refused before anything is read
    reading = Reading(iter(()))
    found = records_at(path, reading, split, subset, count, PATTERNS)

    def conversations() -> Iterator[Document]:
        shapes, counts, first = Shapes(field), Counter[str](), dict[str, str]()
        with template:
            labeller = Labeller(template)
            for where, record in found:
                counts["conversations"] += 1
                try:
                    conversation = shapes.conversation(where, record)
                    if conversation is None:
                        continue
                    documents = [each for each in labeller.documents(conversation) if each.labels.any()]
                except ConversationRefused as error:
                    if not skip_refused:
                        raise
                    counts["refused"] += 1
                    first.setdefault("refused", one_line(error))
                    continue
                for name, is_so in (
                    ("without_an_answer", not documents),
                    ("in_several_documents", len(documents) > 1),
                    ("without_an_end", not all(each.ends for each in documents)),
                ):
                    counts[name] += is_so
                    if is_so:
                        first.setdefault(name, where)
                part_of = where if len(documents) > 1 else None
                for each in documents:
                    yield Document(where, each.ids, each.labels, part_of=part_of)
        reading.counts |= _counts(counts, first, shapes, labeller)
        if counts["refused"] and counts["conversations"] == counts["refused"]:
            raise UserError(
                f"{path}: all of {counts['conversations']} conversations are refused. {first['refused']}"
            )
        idle = counts["refused"] + counts["without_an_answer"] + len(shapes.left_out)
        if counts["conversations"] and counts["conversations"] == idle:
            raise UserError(
                f"{path}: none of {counts['conversations']} conversations has a token of the assistant's to learn: no"
                " message has that role, all are marked as not to be trained on or answer an empty question, or the"
                " chat template writes nothing for them. `role: assistant` is looked for, and what"
                f" {tokenizer.name_or_path} writes for it."
            )

    reading.documents = conversations()
    return reading


def _counts(
    counts: Counter[str], first: dict[str, str], shapes: Shapes, labeller: Labeller
) -> dict[str, Any]:
    """What was read as something else or left out, and of each kind the first place."""
    for name, places in (
        ("spell_control_tokens", labeller.with_control_tokens),
        ("turns_prompted_otherwise", labeller.with_other_prompt),
        ("turns_without_their_thought", labeller.without_thought),
        ("turns_without_their_calls", labeller.without_calls),
        ("turns_without_their_answer", labeller.without_answer),
        ("turns_without_their_text", labeller.without_text),
        ("turns_without_their_question", labeller.without_question),
        ("without_their_instructions", labeller.without_instructions),
        ("marked_as_untrained", shapes.left_out),
        ("without_their_tools", labeller.without_tools),
        ("unanswered", shapes.unanswered),
        ("turns_of_an_empty_question", shapes.wordless),
        ("begun_by_the_assistant", shapes.unasked),
    ):
        counts[name] = len(places)
        first |= {name: places[0]} if places else {}
    roles = shapes.renamed + labeller.renamed
    renamed = {f"{old} as {new}": number for (old, new), number in sorted(roles.items())}
    found: dict[str, Any] = {name: number for name, number in counts.items() if number}
    found |= {"roles": renamed} if renamed else {}
    unread = {key: shapes.keys[key] for key in sorted(shapes.keys) if not _names(labeller.template, key)}
    found |= {"message_keys_not_read": unread} if unread else {}
    return found | ({"first": first} if first else {})


def _names(template: ChatTemplate, key: str) -> bool:
    """Whether a text of the template asks a message for a key: `message.key` or `message['key']`, mostly."""
    asks = re.compile(rf"(?:\.|['\"]){re.escape(key)}(?!\w)")
    return any(asks.search(source.text) for source in (template.source(None), template.source([{}])))


def records_at(
    path: str | Path,
    reading: Reading,
    split: str | None,
    subset: str | None,
    count: int | None,
    patterns: tuple[str, ...],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Records of files, of a dataset on disk or of one on the hub, each with where it stands."""
    if hf.is_dataset(path):
        return without_nulls(hf.records(path, reading, split, None, subset, count))
    if split is not None:
        raise UserError(
            f"corpus.split: {path} is no dataset that save_to_disk wrote, and none of the hub. Set it to null."
        )
    hub.refuse_selection(path, subset, count)
    return _records_of(files_to_read(Path(path), patterns, reading), reading)


def _records_of(files: list[Path], reading: Reading) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in files:
        if file.suffix.lower() == ".parquet":
            yield from without_nulls(parquet.records(file, reading))
        else:
            yield from jsonl.records_of(file, reading)


def without_nulls(records: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of tables, whose columns are the union of all records' keys: what other records have is null here. A message's
    content of null stays: it says nothing, and a message without content is none.
    """
    spoken = {"content": "role", "value": "from"}

    def stripped(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {
                key: stripped(value)
                for key, value in tree.items()
                if value is not None or tree.get(spoken.get(key, key)) is not None
            }
        return [stripped(each) for each in tree] if isinstance(tree, list) else tree

    for where, record in records:
        yield where, stripped(record)


NOTES = {
    "refused": "{number} of {all} conversations are left out (corpus.skip_refused): they cannot be learnt from",
    "without_an_answer": "{number} of {all} conversations have no token to learn, and are left out",
    "in_several_documents": "{number} of {all} conversations are several documents: the chat template writes earlier"
    " turns otherwise than they were",
    "spell_control_tokens": "{number} of {all} conversations spell control tokens, which stay words",
    "without_an_end": "{number} of {all} conversations have a turn without an end of turn: the student does not learn"
    " to stop there. Use a chat template that writes one",
    "turns_prompted_otherwise": "in {number} turns the generation prompt writes what is missing before the written"
    " answer (a thought, mostly): at inference the student answers after a text that it has not learnt from",
    "turns_without_their_thought": "the thoughts of {number} turns are left out: the chat template knows of none",
    "turns_without_their_text": "the words of {number} turns are left out: beside a call of tools the chat template"
    " writes none",
    "begun_by_the_assistant": "{number} of {all} conversations begin with the assistant: what it says before the first"
    " question is left out",
    "turns_without_their_question": "{number} turns bear no loss: the chat template writes nothing of a message that"
    " they answer",
    "without_their_instructions": "the system's words of {number} of {all} conversations are left out: the chat"
    " template writes none",
    "marked_as_untrained": "{number} of {all} conversations are left out: their records say that they are not to be"
    " trained on",
    "turns_of_an_empty_question": "{number} turns bear no loss: the question that they answer is empty",
    "without_their_tools": "the tools of {number} of {all} conversations are left out: the chat template writes none",
    "unanswered": "{number} turns bear no loss: their content is null, and they call no tool",
    "turns_without_their_answer": "{number} turns bear no loss: the chat template does not write all words of their"
    " answers where they were said",
    "turns_without_their_calls": "{number} turns bear no loss: the chat template does not write their calls of tools",
}


def notes(counts: dict[str, Any]) -> Iterator[str]:
    """What a reader of a chat corpus should know of it, a line each, with the first place."""
    if roles := counts.get("roles"):
        read_as = ", ".join(f"{each} in {number} messages" for each, number in roles.items())
        yield f"a role is read as another: {read_as}"
    if keys := counts.get("message_keys_not_read"):
        listed = ", ".join(f"{printable_name(key)} in {number}" for key, number in list(keys.items())[:SHOWN])
        yield f"keys of messages that are not read: {listed}{', …' if len(keys) > SHOWN else ''}"
    for name, words in NOTES.items():
        if number := counts.get(name):
            line = words.format(number=number, all=counts["conversations"])
            yield f"{line} (first: {counts['first'][name]})"
