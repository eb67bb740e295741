"""Prompts without answers: a question or a conversation a record, as the model is asked with it.

Where the tokenizer has a chat template, a prompt is rendered up to where the assistant answers. The teacher reads it by
its own template, and may read a context that the student does not.
"""

from __future__ import annotations

import contextlib
import datetime
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from potstill.data.chats.labels import Labeller
from potstill.data.chats.messages import parsed, quoted, refused, text_of
from potstill.data.chats.records import Conversation, Shapes
from potstill.data.chats.roles import INSTRUCTIONS
from potstill.data.chats.templates import ChatTemplate, ConversationRefused
from potstill.data.readers import jsonl, parquet
from potstill.data.readers.chat import records_at
from potstill.data.readers.reading import Document, Reading
from potstill.data.tokenizers import encode
from potstill.errors import UserError, one_line
from potstill.io.safe_open import names_of

PATTERNS = (*jsonl.FILES, *parquet.PATTERNS)
FIELDS = ("prompt", "messages", "conversations", "question", "instruction", "problem", "query")
"""Keys that a prompt may have, in the order in which they are looked for."""
BESIDE = ("system", "tools", "functions")
"""Keys of a record that are read beside its prompt."""
ANSWER = "potstill"
"""Stands for the answer that is to be written: it ends what is rendered, and is no part of the prompt."""

Json = dict[str, Any]
Ids = NDArray[np.uint32]
T = TypeVar("T")


@dataclass(frozen=True)
class Selection:
    """Which records of a path are read, and what of them."""

    field: str | None = None
    """Key of the prompt; None: the first of `FIELDS` that a record has."""
    context: str | None = None
    """Key of what the teacher alone reads, before the last question."""
    date: datetime.date = datetime.date(2024, 7, 26)
    split: str | None = None
    subset: str | None = None
    count: int | None = None
    skip_refused: bool = False


def read(
    path: str | Path, tokenizer: Any, teacher_tokenizer: Any, selection: Selection, is_chat: bool
) -> Reading:
    """One prompt a record.

    Args:
        tokenizer: of the student's rows.
        teacher_tokenizer: with the teacher's chat template; the tokens are the same.
        is_chat: whether prompts are rendered by a chat template, or are texts as they are.
    """
    reading = Reading(iter(()))

    def documents() -> Iterator[Document]:
        with contextlib.ExitStack() as stack:
            student = stack.enter_context(_Renderer(tokenizer, selection, is_chat))
            is_other = is_chat and teacher_tokenizer.chat_template not in (None, tokenizer.chat_template)
            teacher = student
            if is_other:
                teacher = stack.enter_context(_Renderer(teacher_tokenizer, selection, is_chat))
                reading.counts["teacher_has_its_own_template"] = True

            def document(where: str, prompt: _Prompt, context: str) -> Document:
                for_teacher = (
                    teacher.ids(where, prompt.behind(where, context)) if is_other or context else None
                )
                ids = student.ids(where, prompt)
                return Document(where, ids, is_text=not is_chat, for_teacher=for_teacher)

            yield from _rendered(path, student, selection, reading, document)

    reading.documents = documents()
    return reading


def _rendered(
    path: str | Path,
    renderer: _Renderer,
    selection: Selection,
    reading: Reading,
    made: Callable[[str, _Prompt, str], T],
) -> Iterator[T]:
    """What `made` makes of each record's place, prompt and context; records that are refused are counted."""
    counts, first = Counter[str](), ""
    for where, record in records_at(
        path, reading, selection.split, selection.subset, selection.count, PATTERNS
    ):
        counts["prompts"] += 1
        try:
            context = _context(where, record, selection)
            result = made(where, renderer.prompt(where, record), context)
        except ConversationRefused as error:
            if not selection.skip_refused:
                raise
            counts["prompts_refused"] += 1
            first = first or one_line(error)
            continue
        counts["prompts_with_context"] += bool(context)
        yield result
    reading.counts |= {name: number for name, number in counts.items() if number}
    _require_some(path, selection, counts, first)


def _require_some(path: str | Path, selection: Selection, counts: Counter[str], first: str) -> None:
    """UserError where there was no prompt, or no context although one was asked for."""
    if counts["prompts"] == counts["prompts_refused"]:
        raise UserError(
            f"{path}: all of {counts['prompts']} prompts are refused. {first}"
            if first
            else f"{path}: not one record with a prompt in it. Check the path and corpus.field."
        )
    if selection.context is not None and not counts["prompts_with_context"]:
        raise UserError(
            f"corpus.context: not one of {counts['prompts']} records in {path} has a text under"
            f" {selection.context!r}: the teacher would read what the student reads. Correct the key, or leave it out."
        )


@dataclass(frozen=True)
class Asked:
    """A prompt for the teacher to answer."""

    where: str
    ids: list[int]
    record: Json
    """What the student is asked: `messages`, and `tools` where there are any; or `text`, without a template."""


def asked(
    path: str | Path, tokenizer: Any, selection: Selection, is_chat: bool, reading: Reading
) -> Iterator[Asked]:
    """The prompts as the teacher reads them, its context included, and as they are written down, without it.

    Args:
        tokenizer: the teacher's.
        reading: gets the files, and counts.
    """
    with _Renderer(tokenizer, selection, is_chat) as renderer:

        def made(where: str, prompt: _Prompt, context: str) -> Asked:
            return Asked(where, renderer.ids(where, prompt.behind(where, context)).tolist(), prompt.record)

        yield from _rendered(path, renderer, selection, reading, made)


@dataclass(frozen=True)
class _Prompt:
    """A text, or a conversation that ends with a question."""

    text: str = ""
    messages: tuple[Json, ...] = ()
    tools: list[Json] | None = None

    @property
    def record(self) -> Json:
        """As a record of a chat corpus, whose answer is to come, or of a text corpus."""
        if not self.messages:
            return {"text": self.text}
        return {"messages": [*self.messages]} | ({"tools": self.tools} if self.tools else {})

    def behind(self, where: str, context: str) -> _Prompt:
        """With the teacher's context before the last question."""
        if not context:
            return self
        if not self.messages:
            return replace(self, text=f"{context}\n\n{self.text}")
        words = self.messages[-1].get("content")
        if not isinstance(words, str):
            raise refused(
                where,
                "the last message's content is not a text, and a context goes before it",
                "Write it as a text",
            )
        return replace(
            self, messages=(*self.messages[:-1], self.messages[-1] | {"content": f"{context}\n\n{words}"})
        )


class _Renderer:
    """Records into prompts, and prompts into ids, by one tokenizer."""

    def __init__(self, tokenizer: Any, selection: Selection, is_chat: bool) -> None:
        self.tokenizer, self.selection = tokenizer, selection
        self.template = ChatTemplate(tokenizer, selection.date) if is_chat else None
        self.labeller = None if self.template is None else Labeller(self.template)

    def __enter__(self) -> _Renderer:
        return self

    def __exit__(self, *_: object) -> None:
        if self.template is not None:
            self.template.close()

    def prompt(self, where: str, record: Json) -> _Prompt:
        """What a record asks.

        Raises:
            ConversationRefused: nothing, or a list of messages without a template.
        """
        key, value = _value(where, record, self.selection)
        if isinstance(value, str):
            parts = [value]
            if key == "instruction" and self.selection.context != "input":
                parts += [text_of(where, "input", record["input"])] if record.get("input") else []
            if self.labeller is None:
                return _Prompt(text="\n\n".join(parts))
            record = {k: v for k, v in record.items() if k in BESIDE}
            record |= {"messages": [{"role": "user", "content": "\n\n".join(parts)}]}
            key = "messages"
        elif self.labeller is None:
            raise refused(
                where,
                f"the prompt is a list of messages, and {self.tokenizer.name_or_path} has no chat template or"
                " corpus.chat is false",
                "Give it as a text",
            )
        found = Shapes(key).conversation(where, {k: v for k, v in record.items() if k in (key, *BESIDE)})
        messages = [] if found is None else list(found.messages)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()  # the answer that the data has is not the student's
        if found is None or all(each["role"] in INSTRUCTIONS for each in messages):
            raise refused(where, f"{key!r} has no question", "Leave the record out")
        return _Prompt(messages=tuple(messages), tools=found.tools)

    def ids(self, where: str, prompt: _Prompt) -> Ids:
        """Of the text that the model is asked with.

        Raises:
            ConversationRefused: the template refuses it.
        """
        if self.labeller is None:
            return np.array(encode(where, [prompt.text], self.tokenizer)[0], dtype=np.uint32)
        messages = [*prompt.messages, {"role": "assistant", "content": ANSWER}]
        return self.labeller.prompt(Conversation(where, messages, prompt.tools))


def _value(where: str, record: Json, selection: Selection) -> tuple[str, str | list[Json]]:
    """The prompt and its key."""
    key = selection.field or next((each for each in FIELDS if record.get(each) is not None), None)
    if key is None or record.get(key) is None:
        wanted = f"no {selection.field!r}" if selection.field else "no prompt"
        raise refused(
            where,
            f"{wanted}; the record has {names_of(record)}",
            "Set corpus.field to the key of the prompt, a text or a list of messages",
        )
    value = parsed(record[key])
    if not value or not isinstance(value, str | list) or (isinstance(value, str) and not value.strip()):
        raise refused(
            where,
            f"{key!r} is {quoted(record[key])}, neither a text nor a list of messages with a question",
            "Correct the record",
        )
    return key, value


def _context(where: str, record: Json, selection: Selection) -> str:
    """What the teacher alone reads; empty where the record has nothing."""
    context = None if selection.context is None else record.get(selection.context)
    if context is not None and not isinstance(context, str):
        raise refused(where, f"{selection.context!r} is {quoted(context)}, not a text", "Correct the record")
    return context or ""


def notes(counts: Json) -> Iterator[str]:
    """What whoever starts a run should know of the prompts, a line each."""
    if number := counts.get("prompts_refused"):
        yield f"{number} of {counts['prompts']} prompts are left out (corpus.skip_refused): they cannot be rendered"
    if number := counts.get("prompts_with_context"):
        yield f"with {number} of {counts['prompts']} prompts the teacher reads a context that the student does not"
    if counts.get("teacher_has_its_own_template"):
        yield "the teacher reads each prompt by its own chat template"
