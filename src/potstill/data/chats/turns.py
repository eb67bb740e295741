"""A conversation as text, and where in it each of the assistant's turns stands."""

from __future__ import annotations

import json
import re
from typing import Any

from potstill.data.chats.records import Conversation, Json
from potstill.data.chats.templates import ChatTemplate, TemplateRefused
from potstill.errors import UserError

NONCHARACTERS = "".join(map(chr, range(0xFDD0, 0xFDF0)))
"""Code points that Unicode assigns to nothing: no text should have them."""
THOUGHTS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message under which data sets keep the thoughts before an answer."""

Span = tuple[int, int]
"""The first character, and the one after the last."""


class Turns:
    """Texts of one conversation: what the assistant is asked with, and what it adds, turn by turn.

    Args:
        added: finds the added tokens of the tokenizer in a text.
    """

    def __init__(self, conversation: Conversation, template: ChatTemplate, added: re.Pattern[str]) -> None:
        self.conversation, self.template, self.added = conversation, template, added
        self._messages = conversation.messages
        self._texts: dict[tuple[int, bool], str] = {}

    def upto(self, turn: int) -> str:
        """The conversation up to a message, that message included."""
        return self._text(turn + 1, False)

    def asked(self, turn: int) -> str:
        """The text that the assistant answers with this message."""
        return self._text(turn, True)

    def _text(self, count: int, prompt: bool) -> str:
        if (count, prompt) not in self._texts:
            where, tools = self.conversation.where, self.conversation.tools
            try:
                text = self.template.render(where, self._messages[:count], tools, prompt)
            except TemplateRefused:
                # Some templates join the arguments of a call to their text as they are, for which they must be one.
                if self._messages is not self.conversation.messages or not _has_objects(self._messages):
                    raise
                self._messages = _arguments_as_text(self._messages)
                return self._text(count, prompt)
            self._texts[count, prompt] = text
        return self._texts[count, prompt]

    def is_prompted_otherwise(self, turn: int) -> bool:
        """Whether the generation prompt has a text that is missing before the turn once it is written."""
        return not self.template.has_blocks and not self.upto(turn).startswith(self.asked(turn))

    def is_part_of(self, turn: int, text: str) -> bool:
        """Whether a text that goes on writes the conversation up to this turn as it was at inference."""
        written = self.upto(turn)
        if text.startswith(written):
            return True
        return text.startswith(written[: self._end(turn)])

    def span(self, turn: int, is_last: bool) -> Span:
        """What the assistant adds; `is_last`: whether the text ends with this turn.

        Raises: UserError: the template writes the question otherwise once it is answered.
        """
        return self._start(turn), len(self.upto(turn)) if is_last else self._end(turn)

    def _start(self, turn: int) -> int:
        written = self.upto(turn)
        try:
            asked = self.asked(turn)
            if written.startswith(asked):
                return len(asked)
            # The generation prompt begins an answer, with a thought mostly, and this one begins otherwise.
            start, least = self._common(asked, written), self._common(asked, self._text(turn, False))
        except TemplateRefused:
            if self.template.has_blocks:
                return 0
            raise
        if start < least and not self.template.has_blocks:
            raise UserError(
                f"{self.conversation.where}: the chat template rewrites earlier turns, so the assistant's tokens of"
                f" message {turn} cannot be told apart. Use a template with a {{% generation %}} block."
            )
        begin = written.find(self._messages[turn]["content"].strip()[:16] or written, least)
        return start if begin < 0 else min(start, begin)

    def _end(self, turn: int) -> int:
        """Where the turn's text ends if the conversation goes on: some templates write more where it does not."""
        try:
            return self._common(self.upto(turn), self._text(turn + 1, True))
        except TemplateRefused:
            return len(self.upto(turn))

    def _common(self, one: str, other: str) -> int:
        """The length of what two texts begin with, without the beginning of an added token."""
        length = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
        length = min(len(one), len(other)) if length is None else length
        for text in (one, other):
            for found in self.added.finditer(text, max(0, length - 256)):
                if found.start() < length < found.end():
                    length = found.start()
        return length

    def with_thought(self, turn: int) -> tuple[str, Span] | None:
        """The text of a turn whose thoughts the template does not write, put together from what it does write.

        Templates of reasoning models leave thoughts out of a written turn, and open one in the generation prompt:
        what the model wrote at inference was the rest of it, and the answer. None: the template writes all of it.
        """
        message, asked, written = self._messages[turn], self.asked(turn), self.upto(turn)
        content = message["content"]
        reasoning = next((message[key] for key in REASONING if isinstance(message.get(key), str)), "")
        opened = next((pair for pair in THOUGHTS if asked.rstrip().endswith(pair[0])), None)
        begin, end = next((pair for pair in THOUGHTS if pair[1] in content), opened or THOUGHTS[0])
        if end not in content and reasoning.strip():
            content = f"{begin}\n{reasoning.strip()}\n{end}\n\n{content}"
        thought, _, answer = content.partition(end)
        thought, answer = thought.split(begin)[-1].strip(), content.rpartition(end)[2].strip()
        if end not in content or not thought or not answer:
            return None
        added = written[len(asked) :] if written.startswith(asked) else "" if opened else written
        at = written.rfind(answer)
        if thought in added or at < 0:
            return None
        said = content.lstrip().removeprefix(begin).lstrip("\n") if opened else content
        return asked + said + written[at + len(answer) :], (
            len(asked),
            len(asked + said) + len(written) - at - len(answer),
        )

    def blocks(self, turn: int) -> list[Span]:
        """What the template's `{% generation %}` blocks write, in the text up to this turn.

        Transformers' own mask looks for the block in the wrong place where a macro has it, and labels the user's turns
        of further templates in some versions. So the blocks are marked in the text, by a character at both ends.
        """
        whole, where = self.upto(turn), self.conversation.where
        marks = unused(whole, 2)
        marked = self.template.render(
            where, self._messages[: turn + 1], self.conversation.tools, marks=(marks[0], marks[1])
        )
        pieces = re.split(f"([{marks}])", marked)
        parts, found = pieces[::2], pieces[1::2]
        if "".join(parts) != whole or found != [*marks] * (len(found) // 2):
            raise UserError(
                f"{where}: the chat template changes what its {{% generation %}} blocks write, so the assistant's"
                " tokens cannot be told apart. Use a template that writes them as they are."
            )
        bounds, place = [0], 0  # parts outside and inside of blocks alternate
        for part in parts:
            place += len(part)
            bounds.append(place)
        return list(zip(bounds[1::2], bounds[2::2], strict=False))


def unused(text: str, count: int) -> str:
    """Characters that a text does not have."""
    return "".join(each for each in NONCHARACTERS if each not in text)[:count]


def _has_objects(messages: list[Json]) -> bool:
    return any(
        not isinstance(call["function"]["arguments"], str)
        for each in messages
        for call in each.get("tool_calls", [])
    )


def _arguments_as_text(messages: list[Json]) -> list[Json]:
    def with_text(call: Json) -> Json:
        arguments: Any = call["function"]["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return call | {"function": call["function"] | {"arguments": text}}

    return [
        each | {"tool_calls": [with_text(call) for call in each["tool_calls"]]}
        if each.get("tool_calls")
        else each
        for each in messages
    ]
