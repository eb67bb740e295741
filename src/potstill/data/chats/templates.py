"""Chat templates, which are programs that came with a model: run in a process of their own, within limits.

A template cannot be stopped from inside: one expression may compute for days or fill the memory. So a child process
renders, with a limit of memory, and is ended where it takes too long.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import itertools
import multiprocessing
import os
import random
import re
import resource
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from potstill.data.chats.roles import ROLES, TOOLS, strings
from potstill.errors import UserError, one_line
from potstill.io.silence import quiet_process, quiet_transformers

DATE = datetime.date(2024, 7, 26)
"""What the templates of Llama 3 write without a clock."""
SECONDS = 10
"""For one text. A template needs a millisecond."""
MEMORY_BYTES = 2**30
"""Beyond what this process has when the child is forked."""
MAX_CHARACTERS = 2**26
SEED = 0
"""Of each text, so that the corpus of a template that draws numbers is the same tomorrow, and turn by turn."""
TWICE = 32
"""The first texts, for each of which the template is asked twice: it must write the same."""
ADDRESS = re.compile(r" at 0x[0-9a-f]{6,}")
"""In what Python writes for an object that has no text of its own."""
PROBE = "potstill asks"
GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
BLOCK_TAG = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")
MARKING = "{%% macro potstill_mark() %%}%s{{ caller() }}%s{%% endmacro %%}\n"
"""Put before a template whose blocks call it. The line end is no text: Transformers sets trim_blocks."""
CLOCK = (
    "{% macro strftime_now(format) %}{% if format not in potstill_dates %}"
    "{{ raise_exception('strftime_now of a format that is no literal of the template') }}"
    "{% endif %}{{ potstill_dates[format] }}{% endmacro %}\n"
)
"""Put before a template that asks for the time, which would make the corpus another one every day."""
FORMAT = re.compile(r"strftime_now\(\s*(?:'([^']*)'|\"([^\"]*)\")\s*\)")

Json = dict[str, Any]

_samples: dict[tuple[Source, Source, str], str] = {}


class ConversationRefused(UserError):
    """One conversation cannot be learnt from; others can. `corpus.skip_refused` leaves it out."""


class TemplateRefused(ConversationRefused):
    """The template raised an error of its own for this conversation."""


@dataclasses.dataclass(frozen=True)
class Source:
    """The text of a template, and what is to be known of it."""

    text: str
    date: datetime.date

    @functools.cached_property
    def has_blocks(self) -> bool:
        return GENERATION_BLOCK.search(self.text) is not None

    @functools.cached_property
    def dates(self) -> dict[str, str] | None:
        """What each call of `strftime_now` gives, by its format; None for a template that does not ask."""
        if "strftime_now" not in self.text:
            return None
        formats = {single or double for single, double in FORMAT.findall(self.text)}
        return {format: self.date.strftime(format) for format in formats}


class ChatTemplate:
    """The chat template of a tokenizer, or its two: one may be for conversations with tools. A context manager, which
    ends the child process.

    Args:
        date: what a template gets that asks for the date.
        advice: what to do about one that takes too long.

    Raises:
        UserError: a tokenizer without a chat template.
    """

    def __init__(self, tokenizer: Any, date: datetime.date, advice: str | None = None) -> None:
        self.advice = advice or TAKE_ANOTHER
        try:
            kinds: tuple[list[Json] | None, ...] = (None, [{}])
            texts = [str(tokenizer.get_chat_template(tools=tools)) for tools in kinds]
        except ValueError as error:
            raise UserError(
                "corpus.name: chat needs a tokenizer with a chat template, and this one has none."
                f" Set corpus.tokenizer to another. ({one_line(error)})"
            ) from error
        self.tokenizer = tokenizer
        self._plain, self._with_tools = (Source(text, date) for text in texts)
        self._takes_parts: dict[str, bool] = {}
        """By the text of a template: see `takes_parts`."""
        self._asked_twice = 0
        self._child: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None

    def source(self, tools: list[Json] | None) -> Source:
        """The template of a conversation with these tools."""
        return self._with_tools if tools else self._plain

    @property
    def sources(self) -> tuple[Source, Source]:
        """The template of a conversation without tools, and the one with tools."""
        return self._plain, self._with_tools

    def __enter__(self) -> ChatTemplate:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.join()
            self._child = self._connection = None

    def render(
        self,
        where: str,
        messages: list[Json],
        tools: list[Json] | None = None,
        prompt: bool = False,
        marks: tuple[str, str] | None = None,
        goes_on: bool = False,
    ) -> str:
        """The text of a conversation.

        Args:
            where: what is rendered, for errors.
            prompt: whether the text goes on to where the assistant answers.
            marks: put at both ends of what a `{% generation %}` block writes.
            goes_on: whether the text ends with the words of the last message, which the assistant goes on with.

        Raises:
            TemplateRefused: the template has an error, or raises one.
            UserError: it takes too long, or too much memory.
        """
        source = self.source(tools)
        if self.takes_parts(where, source):
            messages = [_in_parts(message) for message in messages]
        options = {"add_generation_prompt": prompt} | ({"continue_final_message": True} if goes_on else {})
        text = self._render(where, source, messages, tools, options, marks)
        written = ADDRESS.search(text)
        if written and not any(written[0] in words for words in strings([messages, tools])):
            raise UserError(
                f"{where}: {self._name()} writes a place in memory ({written[0].strip()}), which is another one every"
                f" time. {self.advice}"
            )
        if self._asked_twice < TWICE:
            self._asked_twice += 1
            self._refuse_chance(where, text, self._render(where, source, messages, tools, options, marks))
        return text

    def refuse_chance(
        self, where: str, messages: list[Json], tools: list[Json] | None, prompt: bool, text: str
    ) -> None:
        """Raises: UserError: the template now writes another text than it did for the same conversation."""
        self._refuse_chance(where, text, self.render(where, messages, tools, prompt))

    def _refuse_chance(self, where: str, text: str, again: str) -> None:
        if text != again:
            raise UserError(
                f"{where}: {self._name()} writes another text for the same conversation each time. {self.advice}"
            )

    def takes_parts(self, where: str, source: Source) -> bool:
        """Whether a template writes content that is a list of parts and none that is a text, as those of some
        multimodal models do.
        """
        if source.text not in self._takes_parts:
            asked: Json = {"role": "user", "content": PROBE}

            def is_written(message: Json) -> bool:
                try:
                    return PROBE in self._render(where, source, [message], None, {}, None)
                except TemplateRefused:
                    return False

            self._takes_parts[source.text] = not is_written(asked) and is_written(_in_parts(asked))
        return self._takes_parts[source.text]

    def sample(self, where: str) -> str:
        """What the template writes for each role that it knows: it may put its tokens together from parts.

        A template that this process has asked, with the same special tokens, is not asked again.
        """
        key = (*self.sources, repr(self.tokenizer.special_tokens_map))
        if key not in _samples:
            _samples[key] = self._sample(where)
        return _samples[key]

    def _sample(self, where: str) -> str:
        asked: Json = {"role": "user", "content": PROBE}
        texts: list[str] = []
        called: Json = {
            "type": "function",
            "id": "potstill1",
            "function": {"name": "ask", "arguments": {"a": "b"}},
        }
        calling = [asked, {"role": "assistant", "content": "", "tool_calls": [called]}]
        chats = [[asked], [{"role": "system", "content": PROBE}, asked], calling]
        chats += [[asked, {"role": role, "content": PROBE}] for role in ROLES if role not in TOOLS]
        chats += [[*calling, {"role": role, "content": PROBE}] for role in TOOLS]
        tool = {"type": "function", "function": {"name": "ask", "description": "", "parameters": {}}}
        for messages, tools in itertools.product(chats, (None, [tool])):
            with contextlib.suppress(TemplateRefused):
                texts.append(self.render(where, messages, tools, prompt=messages[-1]["role"] != "assistant"))
        return "\n".join(texts)

    def _render(
        self,
        where: str,
        source: Source,
        messages: list[Json],
        tools: list[Json] | None,
        options: Json,
        marks: tuple[str, str] | None,
    ) -> str:
        options = options | {"tools": tools, "tokenize": False}
        text = source.text
        if marks is not None:
            text = BLOCK_TAG.sub(
                lambda tag: tag[1] + ("endcall" if tag[2] else "call potstill_mark()") + tag[3], text
            )
            text = MARKING % marks + text
        if source.dates is not None:
            text = CLOCK + text
            options["potstill_dates"] = source.dates
        if self._connection is None:
            self._start()
        assert self._connection is not None
        try:
            self._connection.send((messages, options | {"chat_template": text}))
            if not self._connection.poll(SECONDS):
                self.close()
                raise UserError(f"{where}: {self._name()} took more than {SECONDS} s. {self.advice}")
            is_text, answer = self._connection.recv()
        except (EOFError, OSError) as error:
            self.close()
            raise UserError(
                f"{where}: {self._name()} ended its process, for want of memory perhaps. {self.advice}"
            ) from error
        if is_text:
            return str(answer)
        if answer is None:
            raise UserError(f"{where}: {self._name()} took more than 1 GiB of memory. {self.advice}")
        raise TemplateRefused(f"{where}: the chat template refuses this conversation: {answer}")

    def _name(self) -> str:
        return f"the chat template of {self.tokenizer.name_or_path}"

    def _start(self) -> None:
        fork = multiprocessing.get_context(
            "fork"
        )  # the tokenizer is there already, and Transformers imported
        self._connection, theirs = fork.Pipe()
        arguments = (theirs, self._connection, self.tokenizer.apply_chat_template)
        self._child = fork.Process(target=_serve, args=arguments, daemon=True)
        with warnings.catch_warnings():
            # Of threads that may hold locks: the child takes none of theirs.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._child.start()
        theirs.close()


def _in_parts(message: Json) -> Json:
    return message | {"content": [{"type": "text", "text": message["content"]}]}


SKIP = "leave such records out by corpus.skip_refused: true"
TAKE_ANOTHER = "Set corpus.tokenizer to one whose template does not."


def _serve(connection: Connection, parents: Connection, apply: Callable[..., str]) -> None:
    """The child: texts for conversations, until it is killed or the parent has gone."""
    parents.close()  # or the parent's end would never seem closed
    _limit_memory()
    with quiet_transformers(), quiet_process(), contextlib.suppress(EOFError, OSError):
        while True:
            messages, options = connection.recv()
            random.seed(SEED)  # what `random` and `lipsum` of a template draw is the same for each text
            try:
                text = apply(messages, **options)
                answer: tuple[bool, str | None] = (True, text)
                if len(text) > MAX_CHARACTERS:
                    answer = (False, None)
            except MemoryError:
                answer = (False, None)
            except Exception as error:  # a template may raise anything, jinja2's own errors included
                answer = (False, one_line(error))
            connection.send(answer)
    os._exit(0)


def _limit_memory() -> None:
    try:
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:  # not Linux: limited by time alone
        return
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY_BYTES, resource.RLIM_INFINITY))
