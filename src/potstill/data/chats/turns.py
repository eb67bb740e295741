"""A conversation as text, and where in it each of the assistant's turns stands."""

from __future__ import annotations

import functools
import itertools
import json
import re
from typing import Any

from potstill.data.chats.calls import Part, parts_of, value_of, with_ends, with_other_names
from potstill.data.chats.markup import THOUGHTS, Pair, Span, answer_in
from potstill.data.chats.records import Conversation
from potstill.data.chats.roles import INSTRUCTIONS, REASONING, Json
from potstill.data.chats.templates import SKIP, ChatTemplate, ConversationRefused, TemplateRefused
from potstill.errors import UserError

NONCHARACTERS = "".join(map(chr, range(0xFDD0, 0xFDF0)))
"""Code points that Unicode assigns to nothing: no text should have them."""
UNASSIGNED = NONCHARACTERS + "".join(map(chr, range(0xF0000, 0x100000)))
"""The same, and a plane for private use: no text has all of them."""
OTHER_WORDS, OTHER_END = "potstill says", "_potstill"
LONG = 16
"""Characters of an answer that stand nowhere by chance."""


class Turns:
    """Texts of one conversation: what the assistant is asked with, and what it adds, turn by turn.

    Args:
        added: finds the added tokens of the tokenizer in a text.
        thoughts: tags of thoughts that the template or the tokenizer knows, the likeliest first.
    """

    def __init__(
        self,
        conversation: Conversation,
        template: ChatTemplate,
        added: re.Pattern[str],
        thoughts: tuple[Pair, ...],
    ) -> None:
        self.conversation, self.template, self.added, self.thoughts = conversation, template, added, thoughts
        self._messages = conversation.messages
        self._texts: dict[tuple[int, bool], str] = {}
        # Each is asked for by every later turn.
        self._start, self._end = functools.cache(self._find_start), functools.cache(self._find_end)
        self.with_thought = functools.cache(self._find_thought)
        self.with_own_question = functools.cache(self._find_answer)
        self.blocks = functools.cache(self._find_blocks)

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

    @property
    def has_blocks(self) -> bool:
        """Whether the template says itself what the assistant writes."""
        return self.template.source(self.conversation.tools).has_blocks

    def is_prompted_otherwise(self, turn: int) -> bool:
        """Whether the generation prompt has a text that is missing before the turn once it is written."""
        return not self.has_blocks and not self.upto(turn).startswith(self.asked(turn))

    def is_part_of(self, turn: int, text: str) -> bool:
        """Whether a text that goes on writes the conversation up to this turn as it was at inference, to its end."""
        written, end = self.upto(turn), self._end(turn)
        if text.startswith(written):
            return True
        # What is written only where nothing follows may be another token, not a part of the answer or its end.
        added = written[self._start(turn) : end].rstrip()
        ends = any(found.end() == len(added) for found in self.added.finditer(added))
        return ends and not self.added.sub("", written[end:]).strip() and text.startswith(written[:end])

    def span(self, turn: int, is_last: bool) -> Span:
        """What the assistant adds; `is_last`: whether the text ends with this turn.

        Raises: UserError: the template writes the question otherwise once it is answered.
        """
        return self._start(turn), len(self.upto(turn)) if is_last else self._end(turn)

    def writes_calls(self, turn: int) -> bool:
        """Whether the turn's text has the name and the arguments of every call: many templates leave calls out.

        That a name stands somewhere in the text says nothing: the words beside a call often have it, too.
        """
        written = self.upto(turn)
        calls = self._messages[turn].get("tool_calls", [])
        parts = parts_of(calls)
        if not parts:
            return True
        marks = unused(written + self.conversation.mark, len(parts))
        text = self._with_ends(turn, dict(zip(parts, marks, strict=True))) or ""
        missing = [part for part, mark in zip(parts, marks, strict=True) if not _found(mark, text)]
        for part in missing:  # written in another form, perhaps: then another makes another text
            other = self._with_ends(turn, {part: OTHER_END})
            if other == written or (other is None and str(value_of(calls, part)) not in self._own_text(turn)):
                return False
        return True

    def _with_ends(self, turn: int, ends: dict[Part, str]) -> str | None:
        """The text up to a turn where parts of its calls end otherwise; None: the template refuses it."""
        message = self._messages[turn]
        other = message | {"tool_calls": with_ends(message["tool_calls"], ends)}
        where, tools = self.conversation.where, self.conversation.tools
        try:
            return self.template.render(where, [*self._messages[:turn], other], tools)
        except TemplateRefused:
            return None

    def _find_start(self, turn: int) -> int:
        written = self.upto(turn)
        try:
            asked = self.asked(turn)
            if written.startswith(asked):
                return len(asked)
            # The generation prompt begins an answer, with a thought mostly, and this one begins otherwise.
            start, least = self._common(asked, written), self._common(asked, self._text(turn, False))
        except TemplateRefused:
            if self.has_blocks:
                return 0
            raise
        if start < least and not self.has_blocks:
            before = self._messages[:turn]
            where, tools = self.conversation.where, self.conversation.tools
            self.template.refuse_chance(where, before, tools, True, asked)
            raise ConversationRefused(
                f"{self.conversation.where}: the chat template rewrites earlier turns, so the assistant's tokens of"
                f" message {turn} cannot be told apart. Use a template with a {{% generation %}} block, or {SKIP}."
            )
        # The two may have their first characters in common.
        head = self._messages[turn]["content"].strip()[:16]
        shifts = range(min(16, start - least + 1)) if head else ()
        return next((start - shift for shift in shifts if written.startswith(head, start - shift)), start)

    def _find_end(self, turn: int) -> int:
        """Where the turn's text ends if the conversation goes on: some templates write more where it does not."""
        try:
            return self._common(self.upto(turn), self._text(turn + 1, True))
        except TemplateRefused:
            return len(self.upto(turn))

    def _common(self, one: str, other: str) -> int:
        """The length of what two texts begin with, without the beginning of an added token."""
        length, least, most = 0, 0, min(len(one), len(other))
        while least <= most:
            length = (least + most) // 2
            least, most = (length + 1, most) if one[:length] == other[:length] else (least, length - 1)
        length = most
        for text in (one, other):
            for found in self.added.finditer(text, max(0, length - 256)):
                if found.start() < length < found.end():
                    length = found.start()
        return length

    def _find_thought(self, turn: int) -> tuple[str, Span] | None:
        """The text of a turn whose thoughts the template does not write, put together from what it does write.

        Templates of reasoning models leave thoughts out of a written turn, and open one in the generation prompt:
        what the model wrote at inference was the rest of it, and the answer. None: the template writes all of it, or
        knows of no thoughts.
        """
        asked, written = self.asked(turn), self.upto(turn)
        content, pair = self._with_reasoning(turn)
        if pair is None or pair[1] not in content:
            return None
        begin, end = pair
        thought, answer = (
            content.partition(end)[0].split(begin)[-1].strip(),
            content.rpartition(end)[2].strip(),
        )
        is_opened = asked.rstrip().endswith(begin)
        added = written[len(asked) :] if written.startswith(asked) else "" if is_opened else written
        if not thought or thought in added:
            return None
        at = self._start(turn)
        at += len(written[at:]) - len(written[at:].lstrip()) if answer else 0
        if not written.startswith(answer, at):
            return None
        if asked.rstrip().endswith(end):  # the prompt for answers without a thought closes one at once
            asked, is_opened = asked.rstrip().removesuffix(end) + begin, True
        said = content.lstrip().removeprefix(begin).lstrip("\n") if is_opened else content
        text = asked + said + written[at + len(answer) :]
        return text, (len(asked), len(text))

    def _find_answer(self, turn: int) -> tuple[str, Span] | None:
        """The text of a turn whose question is written otherwise once it is answered: the question as it was asked,
        and the answer and its end as they are written.

        Mistral's templates write the system's message into the last message where that is the user's, and nowhere once
        it is answered. None: the written turn begins with its question, or where its answer begins cannot be told.
        """
        asked, written = self.asked(turn), self.upto(turn)
        if self.has_blocks or written.startswith(asked):
            return None
        if self._common(asked, written) >= self._common(asked, self._text(turn, False)):
            return None  # the question is as it was: the two differ in the prompt for an answer
        # Both stand behind a token of the template's that ends each question, such as [/INST].
        in_question = list(self.added.finditer(asked))
        if not in_question or in_question[-1].end() != len(asked):
            return None
        token = in_question[-1][0]
        same = [found.end() for found in self.added.finditer(written) if found[0] == token]
        questions = sum(found[0] == token for found in in_question)
        if len(same) < questions:
            return None
        added = written[same[questions - 1] :]
        return asked + added, (len(asked), len(asked) + len(added))

    def writes_answer(self, turn: int) -> bool:
        """Whether the turn's text has all words of the answer, where they were said; those beside calls aside.

        A template may take a part of them for something else, as for a thought what stands before a tag that closes
        one.
        """
        message = self._messages[turn]
        words = answer_in(message, self.thoughts)
        if message.get("tool_calls") or not words:
            return True
        own = self._own_text(turn)
        for _, end in self.thoughts:  # tags that the answer spells are shielded
            own = own.partition(end)[2] if end in own else own
        if own.lstrip().startswith(words):
            return True
        if len(words) >= LONG and "".join(words.split()) in "".join(own.split()):
            return True
        # In another form, perhaps: then each word is there, and around them stands what stands around others.
        spaces = len(re.findall(r"\s+", words))
        said, other = self._around(turn, words), self._around(turn, OTHER_WORDS)
        if len(said) == spaces + 3 and len(other) > 1 and (said[0], said[-1]) == (other[0], other[-1]):
            return True
        if self.has_blocks:
            self.blocks(turn)  # refused by name where the template changes what they write
        return False

    def _own_text(self, turn: int) -> str:
        by_hand = self.with_thought(turn) or self.with_own_question(turn)
        return self.upto(turn)[self._start(turn) :] if by_hand is None else by_hand[0][by_hand[1][0] :]

    def _around(self, turn: int, words: str) -> list[str]:
        """The text of a turn with other words for its answer: what stands before them, each of them, and the rest."""
        message = self._messages[turn]
        thought = message["content"].rstrip().removesuffix(answer_in(message, self.thoughts))
        mark = unused(self.upto(turn) + words + self.conversation.mark, 1)
        content = thought + mark + re.sub(r"\s+", lambda space: mark + space[0], words) + mark
        messages = [*self._messages[:turn], message | {"content": content}]
        try:
            text = self.template.render(self.conversation.where, messages, self.conversation.tools)
        except TemplateRefused:
            return []
        return re.split(_finds(mark), text, flags=re.IGNORECASE)

    def leaves_text_out(self, turn: int) -> bool:
        """Whether the words beside the turn's calls of tools are not written."""
        message = self._messages[turn]
        words = answer_in(message, self.thoughts)
        return bool(message.get("tool_calls") and words) and words not in self.upto(turn)

    def leaves_thoughts_out(self, turn: int) -> bool:
        """Whether the data has a thought for the turn that neither the template nor `with_thought` writes."""
        content, pair = self._with_reasoning(turn)
        reasoning = self._reasoning(turn).strip()
        if pair is not None and pair[1] in content:
            reasoning = content.partition(pair[1])[0].split(pair[0])[-1].strip()
        return bool(reasoning) and self.with_thought(turn) is None and reasoning not in self.upto(turn)

    def _reasoning(self, turn: int) -> str:
        message = self._messages[turn]
        return next((message[key] for key in REASONING if isinstance(message.get(key), str)), "")

    def _with_reasoning(self, turn: int) -> tuple[str, tuple[str, str] | None]:
        """The content with the thought before it, and the tags of thoughts; None where template and tokens have
        none.
        """
        content, reasoning = self._messages[turn]["content"], self._reasoning(turn).strip()
        if not self.thoughts:
            return content, None
        # Tags that an answer only spells are shielded: the one that is there closes a thought.
        begin, end = next((pair for pair in self.thoughts if pair[1] in content), self.thoughts[0])
        if end not in content and reasoning:
            content = f"{begin}\n{reasoning}\n{end}\n\n{content}"
        return content, (begin, end)

    def ignores(self, number: int) -> bool:
        """Whether the template writes nothing of a message's words in the text that the next answer is learnt from."""
        words = self._messages[number]["content"].strip()
        answers = (
            at for at in range(number, len(self._messages)) if self._messages[at]["role"] == "assistant"
        )
        end = next(answers, len(self._messages))
        prompt = not self.has_blocks  # which are looked for in the text of the answer itself
        end = end if prompt else min(end + 1, len(self._messages))
        where, tools = self.conversation.where, self.conversation.tools
        try:
            text = self._text(end, prompt)
            if not words or words in text:
                return False
            # Written in another form, perhaps: then other words make another text.
            others = [*self._messages[:end]]
            others[number] = others[number] | {"content": OTHER_WORDS}
            return self.template.render(where, others, tools, prompt) == text
        except TemplateRefused:
            return False

    def leaves_tools_out(self, turn: int) -> bool:
        """Whether the template writes nothing of the record's tools in the text that a turn is learnt from."""
        tools = self.conversation.tools
        if not tools:
            return False
        prompt = not self.has_blocks
        count = turn if prompt else turn + 1
        try:
            text = self._text(count, prompt)
            others = with_other_names(tools, OTHER_END)
            return (
                self.template.render(self.conversation.where, self._messages[:count], others, prompt) == text
            )
        except TemplateRefused:
            return False

    def writes(self, number: int) -> bool:
        """Whether the template takes a message, and writes something of its words."""
        try:
            self.upto(number)
        except TemplateRefused:
            return False
        return not self.ignores(number)

    def lacks_question(self, turn: int) -> bool:
        """Whether the template writes nothing of a message that the turn answers, instructions aside."""
        before = range(turn - 1, -1, -1)
        first = next((at + 1 for at in before if self._messages[at]["role"] == "assistant"), 0)
        return any(
            self.ignores(at) for at in range(first, turn) if self._messages[at]["role"] not in INSTRUCTIONS
        )

    def own_blocks(self, turn: int, last: int) -> list[Span]:
        """Of the blocks in the text up to message `last` those that write this turn: other words change them."""
        blocks = self.blocks(last)
        if [each["role"] for each in self._messages[: last + 1]].count("assistant") == 1:
            return blocks
        mark = unused(self.upto(last) + self._messages[turn]["content"], 1)
        messages = [*self._messages[: last + 1]]
        messages[turn] = _touched(messages[turn], mark)
        try:
            where, tools = self.conversation.where, self.conversation.tools
            touched = [
                text for text, _ in self._pieces(messages, self.template.render(where, messages, tools))
            ]
        except UserError:
            touched = []
        if len(touched) != len(blocks) or not any(mark in text for text in touched):
            start, stop = self.span(turn, is_last=turn == last)
            return [block for block in blocks if start <= block[1] <= stop]
        return [block for block, text in zip(blocks, touched, strict=True) if mark in text]

    def _find_blocks(self, turn: int) -> list[Span]:
        """What the template's `{% generation %}` blocks write, in the text up to this turn.

        Transformers' own mask looks for the block in the wrong place where a macro has it, and labels the user's turns
        of further templates in some versions. So the blocks are marked in the text, by a character at both ends.
        """
        whole = self.upto(turn)
        return [span for _, span in self._pieces(self._messages[: turn + 1], whole)]

    def _pieces(self, messages: list[Json], whole: str) -> list[tuple[str, Span]]:
        """The text of each block, and where it stands in `whole`, the text of the messages."""
        where, tools = self.conversation.where, self.conversation.tools
        marks = unused(whole, 2)
        marked = self.template.render(where, messages, tools, marks=(marks[0], marks[1]))
        pieces = re.split(f"([{marks}])", marked)
        parts, found = pieces[::2], pieces[1::2]
        if "".join(parts) != whole or found != [*marks] * (len(found) // 2):
            raise ConversationRefused(
                f"{where}: the chat template changes what its {{% generation %}} blocks write, so the assistant's"
                " tokens cannot be told apart. Use a template that writes them as they are."
            )
        bounds, place = [0], 0  # parts outside and inside of blocks alternate
        for part in parts:
            place += len(part)
            bounds.append(place)
        return list(zip(parts[1::2], zip(bounds[1::2], bounds[2::2], strict=False), strict=False))


def unused(text: str, count: int) -> str:
    """Characters that a text does not have."""
    free = (each for each in UNASSIGNED if each not in text)
    return "".join(itertools.islice(free, count))


def _finds(mark: str) -> str:
    """An expression for a character, also as JSON escapes it."""
    return f"{mark}|{re.escape(json.dumps(mark)[1:-1])}"


def _found(mark: str, text: str) -> bool:
    return re.search(_finds(mark), text, re.IGNORECASE) is not None


def _touched(message: Json, mark: str) -> Json:
    """With a mark in everything that a turn says: its answer, its thought, the names of its calls."""
    content = message["content"]
    for begin, end in THOUGHTS:
        content = content.replace(end, mark + end, 1) if begin in content else content
    made = message | ({"content": content + mark} if content.strip() else {})
    made |= {
        key: made[key] + mark for key in REASONING if isinstance(made.get(key), str) and made[key].strip()
    }
    if made.get("tool_calls"):
        made["tool_calls"] = [
            call | {"function": call["function"] | {"name": call["function"]["name"] + mark}}
            for call in made["tool_calls"]
        ]
    return made


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
