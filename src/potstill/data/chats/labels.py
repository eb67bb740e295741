"""Which tokens of a conversation bear loss: what the assistant writes at inference, and its end of turn.

A turn of the assistant is what it adds to the text that it is asked with. Where a template writes earlier turns
otherwise than it did when they were the last (Qwen 3 drops their thoughts), one text cannot teach all of them, and the
conversation becomes several documents: each turn is learnt from the text that it has at inference.
"""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken

from potstill.data.chats.markup import Markup, Span, any_of, marked, thought_pairs
from potstill.data.chats.records import Conversation
from potstill.data.chats.roles import INSTRUCTIONS, TOOLS, strings
from potstill.data.chats.templates import SKIP, ChatTemplate, ConversationRefused
from potstill.data.chats.turns import Turns, unused
from potstill.errors import UserError

MAX_BEFORE_END = 4
"""Tokens of white space that a template may write between an answer and its end of turn."""

IN_BRACKETS = re.compile(r"[^\w\s].*\w.*[^\w\s]", re.DOTALL)
"""Looks like a control token: a name between signs."""

Numbers = NDArray[np.int64]
Labels = NDArray[np.bool_]


@dataclass(frozen=True)
class Labelled:
    """A document of a conversation."""

    ids: NDArray[np.uint32]
    labels: Labels
    ends: bool
    """Whether every turn that bears loss ends with a control token: without one a student never learns to stop."""


@dataclass
class Labeller:
    """Conversations into documents, by the chat template of a tokenizer."""

    template: ChatTemplate
    with_control_tokens: list[str] = field(default_factory=list)
    """Conversations whose words spell control tokens; they stay words."""
    with_other_prompt: list[str] = field(default_factory=list)
    """Conversations, once a turn, where the generation prompt writes what is missing before the written answer."""
    without_thought: list[str] = field(default_factory=list)
    """Conversations, once a turn, whose thoughts the template knows nothing of; they are left out."""
    without_calls: list[str] = field(default_factory=list)
    """Conversations, once a turn, whose calls of tools the template does not write; these turns bear no loss."""

    without_question: list[str] = field(default_factory=list)
    """Conversations, once a turn, where the template writes nothing of what the turn answers; these bear no loss."""
    without_instructions: list[str] = field(default_factory=list)
    """Conversations whose system's words the template does not write."""
    without_tools: list[str] = field(default_factory=list)
    """Conversations of whose tools the template writes nothing."""
    renamed: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(role, the one in its place that the template writes) -> messages."""
    without_answer: list[str] = field(default_factory=list)
    """Conversations, once a turn, of whose answer the template does not write all words; these turns bear no loss."""
    without_text: list[str] = field(default_factory=list)
    """Conversations, once a turn, whose words beside a call of tools the template does not write."""

    def __post_init__(self) -> None:
        self.tokenizer = self.template.tokenizer
        if not getattr(self.tokenizer, "is_fast", False):
            raise UserError(
                f"{self.tokenizer.name_or_path}: chat needs a tokenizer with tokenizer.json, which knows where"
                " in a text each token stands. Set corpus.tokenizer to one."
            )
        added = self.tokenizer.added_tokens_decoder
        # Tags such as </think> close something else than a turn.
        ends = {number for number, token in added.items() if not token.content.startswith(("</", "[/"))}
        self._end_ids = ends | {self.tokenizer.eos_token_id}
        self._is_added = any_of(token.content for token in added.values())
        self._found: Markup | None = None

    def _markup(self, where: str) -> Markup:
        """What the template takes for markup; `where`: the conversation that asks first, for errors."""
        if self._found is None:
            self._found = self._find_markup(self.template.sample(where))
        return self._found

    def _find_markup(self, sample: str) -> Markup:
        added = self.tokenizer.added_tokens_decoder.values()
        names = {token.content for token in added}
        source = "".join(each.text for each in self.template.sources)
        pairs = thought_pairs(source)
        known = [pair for pair in pairs if any(tag in source for tag in pair)]
        known += [pair for pair in pairs if any(tag in names for tag in pair)]
        tags = {tag for pair in known for tag in pair}

        def is_control(token: Any) -> bool:
            if token.special or token.content in tags:
                return len(token.content) > 1  # a mark inside of one keeps it from being read
            # Those of Qwen's tools and of R1's roles are not flagged. White space and words may be added tokens, too.
            is_written = token.content in source or token.content in sample
            return is_written and IN_BRACKETS.fullmatch(token.content) is not None

        control = [token.content for token in added if is_control(token)]
        return Markup(tuple(control), tuple(dict.fromkeys(known)))

    def documents(self, conversation: Conversation) -> list[Labelled]:
        """None for a conversation without a turn that bears loss.

        Raises:
            UserError: the template refuses the conversation, or the assistant's part cannot be told apart.
        """
        turns = self._in_known_roles(self._turns(self._shielded(conversation)))
        conversation = turns.conversation
        asked = [turn for turn in conversation.trained if not turns.lacks_question(turn)]
        self.without_question += [conversation.where] * (len(conversation.trained) - len(asked))
        calling = [turn for turn in asked if turns.writes_calls(turn)]
        self.without_calls += [conversation.where] * (len(asked) - len(calling))
        remaining, made = [turn for turn in calling if turns.writes_answer(turn)], []
        self.without_answer += [conversation.where] * (len(calling) - len(remaining))
        self.without_thought += [conversation.where for turn in remaining if turns.leaves_thoughts_out(turn)]
        self.without_text += [conversation.where for turn in remaining if turns.leaves_text_out(turn)]
        if remaining and turns.leaves_tools_out(remaining[-1]):
            self.without_tools.append(conversation.where)
        while remaining:
            last = remaining[-1]
            if (by_hand := turns.with_thought(last) or turns.with_own_question(last)) is not None:
                text, span = by_hand
                made.append(self._labelled(conversation, text, [span], None))
                remaining = remaining[:-1]
                continue
            text = turns.upto(last)
            taught = [turn for turn in remaining if turn == last or self._is_taught(turns, turn, text)]
            self.with_other_prompt += [
                conversation.where for turn in taught if turns.is_prompted_otherwise(turn)
            ]
            spans = [turns.span(turn, is_last=turn == last) for turn in taught]
            blocks = [turns.own_blocks(turn, last) for turn in taught] if turns.has_blocks else None
            made.append(self._labelled(conversation, text, spans, blocks))
            remaining = [turn for turn in remaining if turn not in taught]
        return made[::-1]

    def prompt(self, conversation: Conversation) -> NDArray[np.uint32]:
        """Ids of the text that the assistant answers with its last message.

        Raises:
            UserError: the template refuses the conversation.
        """
        turns = self._in_known_roles(self._turns(self._shielded(conversation)))
        text = turns.asked(len(turns.conversation.messages) - 1)
        return self._tokens(turns.conversation, text)[0].astype(np.uint32)

    def _turns(self, conversation: Conversation) -> Turns:
        return Turns(conversation, self.template, self._is_added, self._markup(conversation.where).thoughts)

    @staticmethod
    def _is_taught(turns: Turns, turn: int, text: str) -> bool:
        """Whether a text that goes on has all of an earlier turn, as it was at inference."""
        by_hand = turns.with_thought(turn) or turns.with_own_question(turn)
        return by_hand is None and turns.is_part_of(turn, text)

    def _in_known_roles(self, turns: Turns) -> Turns:
        """With `tool` for `function`, `system` for `developer` and the like where the template writes nothing of a
        message of that role, and something of one of the other.
        """
        conversation, messages = turns.conversation, turns.conversation.messages
        for number, message in enumerate(messages):
            alike = next((roles for roles in (TOOLS, INSTRUCTIONS) if message["role"] in roles), ())
            if not alike or not turns.ignores(number):
                continue
            for role in (each for each in alike if each != message["role"]):
                others = [*messages[:number], message | {"role": role}, *messages[number + 1 :]]
                renamed = self._turns(replace(conversation, messages=others))
                if renamed.writes(number):
                    self.renamed[message["role"], role] += 1
                    return self._in_known_roles(renamed)
            if message["role"] in INSTRUCTIONS:
                self.without_instructions.append(conversation.where)
        return turns

    def _shielded(self, conversation: Conversation) -> Conversation:
        """With a mark inside of all markup that somebody's words spell, so that it is not read as such."""
        messages, tools, markup = conversation.messages, conversation.tools, self._markup(conversation.where)
        if not any(map(markup.is_spelled, messages)) and not markup.is_spelled_in(tools):
            return conversation
        self.with_control_tokens.append(conversation.where)
        mark = unused("".join(strings([messages, tools])), 1)
        messages = [markup.shield(each, mark) for each in messages]
        return replace(conversation, messages=messages, tools=markup.shield_all(tools, mark), mark=mark)

    def _labelled(
        self, conversation: Conversation, text: str, spans: list[Span], blocks: list[list[Span]] | None
    ) -> Labelled:
        ids, begins, ends = self._tokens(conversation, text)
        labels, stops = np.zeros(len(ids), dtype=np.bool_), True
        for number, (start, stop) in enumerate(spans):
            # A tokenizer may merge the prompt's last character with the answer's first: that token is the prompt's.
            own = (begins >= start) & (begins < stop)
            if blocks is not None:
                own = self._in_blocks(ids, begins, ends, own, blocks[number])
            labels |= own
            stops &= self._ends(ids[own])
        return Labelled(ids.astype(np.uint32), labels, stops)

    def _in_blocks(
        self, ids: Numbers, begins: Numbers, ends: Numbers, own: Labels, blocks: list[Span]
    ) -> Labels:
        """Of a turn's own tokens those that have a character of a block, and the end of turn behind the last one.

        Many templates end the block before the end of turn; a student never trained on that token never stops.
        """
        chosen = np.zeros(len(ids), dtype=np.bool_)
        for start, stop in blocks:
            chosen |= own & (begins < stop) & (ends > start)
        behind = np.flatnonzero(own & (begins >= blocks[-1][1])) if blocks else np.zeros(0, np.int64)
        for at in behind[:MAX_BEFORE_END]:
            if int(ids[at]) in self._end_ids:
                chosen[behind[0] : at + 1] = True
                break
            if self.tokenizer.decode([int(ids[at])]).strip():
                break
        return chosen

    def _ends(self, ids: Numbers) -> bool:
        """Whether labelled ids end with an end of turn, white space behind it aside."""
        for number in ids[: -MAX_BEFORE_END - 1 : -1]:
            if int(number) in self._end_ids:
                return True
            if self.tokenizer.decode([int(number)]).strip():
                return False
        return False

    def _tokens(self, conversation: Conversation, text: str) -> tuple[Numbers, Numbers, Numbers]:
        """Ids of a text, and for each the character that it begins with and the one that it ends before."""
        mark = conversation.mark
        if not mark:
            return _whole_tokens(text, self.tokenizer)
        markup = self._markup(conversation.where)
        harmless = any_of(marked(token, mark) for token in markup.shielded).sub("", text)
        ids = self._in_pieces(harmless, mark, markup)[0]
        is_escaped = json.dumps(mark)[1:-1] in text.lower()
        if (
            is_escaped
            or mark in harmless
            or not np.array_equal(ids, _whole_tokens(harmless, self.tokenizer)[0])
        ):
            raise ConversationRefused(
                f"{conversation.where}: the words of a message spell a control token, and this tokenizer or"
                f" its template cannot keep it as words. Write it otherwise, or {SKIP}."
            )
        return self._in_pieces(text, mark, markup)

    def _in_pieces(self, text: str, mark: str, markup: Markup) -> tuple[Numbers, Numbers, Numbers]:
        """The same, where marks are no characters, and only what the template wrote is a control token."""
        inner, is_control, tokens = _reads_words(self.tokenizer, markup.control), markup.is_control, []
        place = 0
        for piece in re.split(f"({is_control.pattern})", text):
            if is_control.fullmatch(piece):
                tokens.append((self.tokenizer.convert_tokens_to_ids(piece), place, place + len(piece)))
            elif piece:
                kept = [at for at, character in enumerate(piece, place) if character != mark]
                encoded = inner.encode(piece.replace(mark, ""), add_special_tokens=False)
                kept.append(place + len(piece))
                for number, (begin, end) in zip(encoded.ids, encoded.offsets, strict=True):
                    tokens.append((number, kept[begin], kept[end - 1] + 1 if end > begin else kept[begin]))
            place += len(piece)
        ids, begins, ends = np.array(tokens, dtype=np.int64).reshape(-1, 3).T
        return ids, begins, ends


def _whole_tokens(text: str, tokenizer: Any) -> tuple[Numbers, Numbers, Numbers]:
    """Ids of a text, and for each the character that it begins with and the one that it ends before."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    if "trim_offsets=True" in repr(tokenizer.backend_tokenizer.post_processor):
        offsets = _untrimmed(tokenizer).encode(text, add_special_tokens=False).offsets
    begins, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    return np.array(encoded["input_ids"], dtype=np.int64), begins, ends


@lru_cache(maxsize=2)
def _untrimmed(tokenizer: Any) -> Any:
    """A copy of the library's tokenizer whose offsets include the spaces at a token's ends: without them a token of
    spaces alone has no characters, and the answer's last one seems to lie behind the answer.
    """
    inner = copy.deepcopy(tokenizer.backend_tokenizer)
    inner.post_processor = None  # it only adds special tokens, which a template has, and trims
    return inner


@lru_cache(maxsize=2)
def _reads_words(tokenizer: Any, control: tuple[str, ...]) -> Any:
    """A copy that reads control tokens as the words that spell them."""
    inner = copy.deepcopy(_untrimmed(tokenizer))
    added = tokenizer.added_tokens_decoder.values()
    # Those of Qwen's tools and of R1's roles are not flagged as special, and the library reads on what is.
    inner.add_special_tokens([_as_special(token) for token in added if token.content in control])
    inner.encode_special_tokens = True
    return inner


def _as_special(token: Any) -> AddedToken:
    sides = {"lstrip": token.lstrip, "rstrip": token.rstrip, "single_word": token.single_word}
    return AddedToken(token.content, special=True, normalized=token.normalized, **sides)
