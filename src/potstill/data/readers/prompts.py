"""Prompts without answers: a question or a conversation a record, as the model is asked with it.

Where the tokenizer has a chat template, a prompt is rendered up to where the assistant answers. The teacher reads it by
its own template, and may read a context that the student does not.
"""

from __future__ import annotations

import contextlib
import datetime
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.data.chats.labels import Labeller
from potstill.data.chats.messages import parsed, quoted, refused
from potstill.data.chats.records import Conversation, Shapes
from potstill.data.chats.templates import ChatTemplate, ConversationRefused
from potstill.data.readers import jsonl, parquet
from potstill.data.readers.chat import records_at
from potstill.data.readers.reading import Document, Reading
from potstill.data.tokenizers import encode
from potstill.errors import UserError, one_line
from potstill.io.safe_open import names_of

PATTERNS = (*jsonl.PATTERNS, "*.json", *parquet.PATTERNS)
FIELDS = ("prompt", "messages", "conversations", "question", "instruction")
"""Keys that a prompt may have, in the order in which they are looked for."""
ANSWER = "potstill"
"""Stands for the answer that is to be written: it ends what is rendered, and is no part of the prompt."""

Json = dict[str, Any]
Ids = NDArray[np.uint32]


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
    found = records_at(path, reading, selection.split, selection.subset, selection.count, PATTERNS)

    def documents() -> Iterator[Document]:
        counts, first = Counter[str](), ""
        with contextlib.ExitStack() as stack:
            student = stack.enter_context(_Renderer(tokenizer, selection.date, is_chat))
            is_other = is_chat and teacher_tokenizer.chat_template not in (None, tokenizer.chat_template)
            teacher = student
            if is_other:
                teacher = stack.enter_context(_Renderer(teacher_tokenizer, selection.date, is_chat))
            for where, record in found:
                counts["prompts"] += 1
                try:
                    prompt, context = _prompt(where, record, selection)
                    ids = student.ids(where, record, prompt)
                    for_teacher = None
                    if is_other or context:
                        for_teacher = teacher.ids(where, record, _with_context(where, prompt, context))
                except ConversationRefused as error:
                    if not selection.skip_refused:
                        raise
                    counts["prompts_refused"] += 1
                    first = first or one_line(error)
                    continue
                counts["prompts_with_context"] += bool(context)
                yield Document(where, ids, is_text=not is_chat, for_teacher=for_teacher)
        reading.counts |= {name: number for name, number in counts.items() if number}
        if is_other:
            reading.counts["teacher_has_its_own_template"] = True
        if counts["prompts"] == counts["prompts_refused"]:
            raise UserError(
                f"{path}: all of {counts['prompts']} prompts are refused. {first}"
                if first
                else f"{path}: not one record with a prompt in it. Check the path and corpus.field."
            )

    reading.documents = documents()
    return reading


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
    found = records_at(path, reading, selection.split, selection.subset, selection.count, PATTERNS)
    with _Renderer(tokenizer, selection.date, is_chat) as renderer:
        for where, record in found:
            try:
                prompt, context = _prompt(where, record, selection)
                ids = renderer.ids(where, record, _with_context(where, prompt, context))
                yield Asked(where, ids.tolist(), renderer.written(where, record, prompt))
            except ConversationRefused:
                if not selection.skip_refused:
                    raise
                reading.counts["prompts_refused"] = reading.counts.get("prompts_refused", 0) + 1


class _Renderer:
    """Prompts into ids, by one tokenizer."""

    def __init__(self, tokenizer: Any, date: datetime.date, is_chat: bool) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, date) if is_chat else None
        self.labeller = None if self.template is None else Labeller(self.template)

    def __enter__(self) -> _Renderer:
        return self

    def __exit__(self, *_: object) -> None:
        if self.template is not None:
            self.template.close()

    def ids(self, where: str, record: Json, prompt: str | list[Json]) -> Ids:
        """Of the text that the model is asked with.

        Raises:
            ConversationRefused: the template refuses it, or a list of messages without a template.
        """
        if self.labeller is None:
            if not isinstance(prompt, str):
                raise refused(
                    where,
                    f"the prompt is a list of messages, and {self.tokenizer.name_or_path} has no chat template or"
                    " corpus.chat is false",
                    "Give it as a text",
                )
            return np.array(encode(where, [prompt], self.tokenizer)[0], dtype=np.uint32)
        return self.labeller.prompt(_conversation(where, record, prompt))

    def written(self, where: str, record: Json, prompt: str | list[Json]) -> Json:
        """The prompt as a record of a chat corpus, whose answer is to come, or of a text corpus."""
        if self.labeller is None:
            return {"text": prompt}
        conversation = _conversation(where, record, prompt)
        tools = {"tools": conversation.tools} if conversation.tools else {}
        return {"messages": conversation.messages[:-1]} | tools


def _conversation(where: str, record: Json, prompt: str | list[Json]) -> Conversation:
    """With an answer in the place of the one to come."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answered = {"messages": [*messages, {"role": "assistant", "content": ANSWER}]}
    beside = {key: record[key] for key in ("system", "tools", "functions") if record.get(key) is not None}
    conversation = Shapes().conversation(where, answered | beside)
    assert conversation is not None
    return conversation


def _prompt(where: str, record: Json, selection: Selection) -> tuple[str | list[Json], str]:
    """The prompt, and the teacher's context, empty where there is none."""
    key = selection.field or next((each for each in FIELDS if record.get(each) is not None), None)
    if key is None or record.get(key) is None:
        wanted = f"no {selection.field!r}" if selection.field else "no prompt"
        raise refused(
            where,
            f"{wanted}; the record has {names_of(record)}",
            "Set corpus.field to the key of the prompt, a text or a list of messages",
        )
    prompt = parsed(record[key])
    if isinstance(prompt, list):
        while prompt and isinstance(prompt[-1], dict) and _role(prompt[-1]) in ("assistant", "gpt"):
            prompt = prompt[:-1]  # the answer that the data has is not the student's
    if not prompt or not isinstance(prompt, str | list) or (isinstance(prompt, str) and not prompt.strip()):
        raise refused(
            where,
            f"{key!r} is {quoted(record[key])}, neither a text nor a list of messages with a question",
            "Correct the record",
        )
    context = None if selection.context is None else record.get(selection.context)
    if context is not None and not isinstance(context, str):
        raise refused(where, f"{selection.context!r} is {quoted(context)}, not a text", "Correct the record")
    return prompt, context or ""


def _role(message: Json) -> Any:
    return message.get("role", message.get("from"))


def _with_context(where: str, prompt: str | list[Json], context: str) -> str | list[Json]:
    """With the teacher's context before the last question."""
    if not context:
        return prompt
    if isinstance(prompt, str):
        return f"{context}\n\n{prompt}"
    key = "content" if "content" in prompt[-1] else "value"
    words = prompt[-1].get(key)
    if not isinstance(words, str):
        raise refused(
            where,
            "the last message's content is not a text, and a context goes before it",
            "Write it as a text",
        )
    return [*prompt[:-1], prompt[-1] | {key: f"{context}\n\n{words}"}]


def notes(counts: Json) -> Iterator[str]:
    """What whoever starts a run should know of the prompts, a line each."""
    if number := counts.get("prompts_refused"):
        yield f"{number} of {counts['prompts']} prompts are left out (corpus.skip_refused): they cannot be rendered"
    if number := counts.get("prompts_with_context"):
        yield f"with {number} of {counts['prompts']} prompts the teacher reads a context that the student does not"
    if counts.get("teacher_has_its_own_template"):
        yield "the teacher reads each prompt by its own chat template"
