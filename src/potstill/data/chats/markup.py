"""What in a message is markup, and what are words that only spell it.

A control token in somebody's words, or a tag of thoughts that an answer talks of, would be read by the tokenizer as a
token and by the template as the end of a thought. Such words are shielded: a mark inside of them, a character that no
text has, keeps both from it, and is taken out before the words are tokenized.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from potstill.data.chats.roles import REASONING, TOOLS, Json, strings

Span = tuple[int, int]
"""The first character, and the one after the last."""
Pair = tuple[str, str]
"""What opens something, and what closes it."""

THOUGHTS: tuple[Pair, ...] = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
NAMED_THOUGHT = re.compile(r"</([\w:.-]*(?:think|thought|reason)[\w:.-]*)>")
"""How templates of other models call the end of a thought: </seed:think>, </thought>, </reasoning>."""
RESULT: Pair = ("<tool_response>", "</tool_response>")
QUOTES = "`'\"“”„«»‘’"
FENCE = "```"


def thought_pairs(source: str) -> tuple[Pair, ...]:
    """Tags of thoughts that a template may look for in an answer."""
    named = ((f"<{name}>", f"</{name}>") for name in NAMED_THOUGHT.findall(source))
    return tuple(dict.fromkeys([*THOUGHTS, *named]))


def thought_in(message: Json, pairs: Iterable[Pair]) -> tuple[Pair, Span] | None:
    """The tags of the thought that a message begins with, and where the closing one stands; None: it has no thought.

    A thought stands between its tags in front of the answer; or, as the data of R1 has it, whose prompt opens the
    thought, from the beginning to a closing tag that the answer follows on a line of its own. Every other tag is a word
    of somebody who talks of tags.
    """
    content: str = message["content"]
    has_calls = bool(message.get("tool_calls"))
    is_apart = any(isinstance(message.get(key), str) and message[key].strip() for key in REASONING)
    for begin, end in pairs:
        closing = [found.span() for found in re.finditer(re.escape(end), content)]
        if closing and content.lstrip().startswith(begin):
            plain = (span for span in closing if not _is_quoted(content, span))
            alone = (span for span in closing if _is_alone(content, span))
            return (begin, end), next(plain, next(alone, closing[0]))
        first = next((span for span in closing if not _is_quoted(content, span)), None)
        if first is None or is_apart or not content[: first[0]].strip():
            continue
        opened = [found.span() for found in re.finditer(re.escape(begin), content[: first[0]])]
        behind = content[first[1] :]
        goes_on = bool(behind.strip()) and (
            _is_alone(content, first) or bool(re.match(r"[ \t]*\n\s*\n", behind))
        )
        if (goes_on or (has_calls and not behind.strip())) and all(
            _is_quoted(content, span) for span in opened
        ):
            return (begin, end), first
    return None


def answer_in(message: Json, pairs: Iterable[Pair]) -> str:
    """The words of a message behind its thought."""
    thought = thought_in(message, pairs)
    return str(message["content"])[thought[1][1] if thought else 0 :].strip()


def _is_alone(content: str, span: Span) -> bool:
    """Whether a tag is a line of its own."""
    before, behind = content[: span[0]].rpartition("\n")[2], content[span[1] :].partition("\n")[0]
    return not before.strip() and not behind.strip()


def _is_quoted(content: str, span: Span) -> bool:
    """Whether a tag stands in quotes or in code."""
    before, behind = content[: span[0]], content[span[1] :]
    if before.count(FENCE) % 2:
        return True
    line = before.rpartition("\n")[2].replace(FENCE, "")
    if line.count("`") % 2 and "`" in behind.partition("\n")[0]:
        return True
    return bool(before and behind) and before[-1] in QUOTES and behind[0] in QUOTES


def _calls_in(content: str, start: int, pairs: Iterable[Pair]) -> set[Span]:
    """Tags around calls that an answer's text has as markup: at the beginning of a line, with JSON or XML between."""
    spans: set[Span] = set()
    for begin, end in pairs:
        place, last = content.find(begin, start), start
        while place >= 0:
            inside = place + len(begin)
            before = content[last:place]
            is_first = not before.rpartition("\n")[2].strip() and not content.count(FENCE, 0, place) % 2
            closed = _closed(content, inside, end) if is_first else None
            if closed is not None:
                spans |= {(place, inside), closed}
                last = closed[1]
            place = content.find(begin, closed[1] if closed else inside)
    return spans


def _results_in(content: str) -> set[Span]:
    """Tags of results in a message that is nothing but results, which Qwen's templates take for no question."""
    begin, end = RESULT
    words = content.strip()
    if not (words.startswith(begin) and words.endswith(end)):
        return set()
    found = [tag.span() for tag in re.finditer(f"{re.escape(begin)}|{re.escape(end)}", content)]
    return {span for span in found if span in (found[0], found[-1]) or _is_alone(content, span)}


def _closed(content: str, inside: int, end: str) -> Span | None:
    """Where the tag stands that closes a call; None for what is no call."""
    body = inside + len(content[inside:]) - len(content[inside:].lstrip())
    if content[body : body + 1] not in ("{", "[", "<"):
        return None
    try:
        _, length = json.JSONDecoder().raw_decode(content[body:])
        behind = content[body + length :]
        place = body + length + len(behind) - len(behind.lstrip())
        if not content.startswith(end, place):
            return None
    except (ValueError, RecursionError):  # XML, or calls as Python writes them
        place = content.find(end, body)
    return (place, place + len(end)) if place >= 0 else None


@dataclass(frozen=True)
class Markup:
    """What a tokenizer and a template take for more than words.

    Args:
        control: control tokens.
        thoughts: tags of thoughts that the template or the tokenizer knows.
    """

    control: tuple[str, ...]
    thoughts: tuple[Pair, ...]

    @cached_property
    def is_control(self) -> re.Pattern[str]:
        return any_of(self.control)

    @cached_property
    def shielded(self) -> tuple[str, ...]:
        """What stays words where words spell it."""
        return tuple(dict.fromkeys([*self.control, *(tag for pair in self.thoughts for tag in pair)]))

    @cached_property
    def is_shielded(self) -> re.Pattern[str]:
        return any_of(self.shielded)

    @cached_property
    def calls(self) -> tuple[Pair, ...]:
        """Control tokens that come in pairs, those of thoughts aside."""
        pairs = [(each, f"{each[0]}/{each[1:]}") for each in self.control if each[0] in "<["]
        return tuple(pair for pair in pairs if pair[1] in self.control and pair not in self.thoughts)

    def genuine(self, message: Json) -> set[Span]:
        """Where in a message's content markup stands that the data means as such."""
        content: str = message["content"]
        if message["role"] != "assistant":
            return _results_in(content) if message["role"] in ("user", *TOOLS) else set()
        found, spans, start = thought_in(message, self.thoughts), set(), 0
        if found is not None:
            (begin, _), closing = found
            opening = len(content) - len(content.lstrip())
            spans = {closing} | (
                {(opening, opening + len(begin))} if content.startswith(begin, opening) else set()
            )
            start = closing[1]
        return spans | _calls_in(content, start, self.calls)

    def is_spelled(self, message: Json) -> bool:
        """Whether the words of a message spell markup."""
        genuine = self.genuine(message)
        found = (each.span() for each in self.is_shielded.finditer(message["content"]))
        rest = {key: value for key, value in message.items() if key not in ("role", "content")}
        return any(span not in genuine for span in found) or self.is_spelled_in(rest)

    def is_spelled_in(self, tree: Any) -> bool:
        return any(self.is_shielded.search(text) for text in strings(tree))

    def shield(self, message: Json, mark: str) -> Json:
        """A message whose words spell no markup."""
        genuine = self.genuine(message)

        def shielded(found: re.Match[str]) -> str:
            return found[0] if found.span() in genuine else marked(found[0], mark)

        made = {
            self.shield_all(key, mark): value if key == "role" else self.shield_all(value, mark)
            for key, value in message.items()
        }
        return made | {"content": self.is_shielded.sub(shielded, message["content"])}

    def shield_all(self, tree: Any, mark: str) -> Any:
        """Nested lists and mappings, of which every string is words."""
        if isinstance(tree, str):
            return self.is_shielded.sub(lambda found: marked(found[0], mark), tree)
        if isinstance(tree, dict):
            return {self.shield_all(key, mark): self.shield_all(value, mark) for key, value in tree.items()}
        return [self.shield_all(each, mark) for each in tree] if isinstance(tree, list) else tree


def marked(token: str, mark: str) -> str:
    return token[0] + mark + token[1:]


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Finds any of them, the longest first; nothing where there is none."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
