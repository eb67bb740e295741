"""Records of a data set as conversations: every shape that people's data has, brought to one.

| shape | keys |
|---|---|
| messages | `messages` (or `conversations`), a list of `role` and `content` |
| ShareGPT | `conversations`, a list of `from` and `value`, with `system` and `tools` beside it |
| prompt and completion | `prompt` and `completion` (or `response`), each a text or a list of messages |
| Alpaca | `instruction`, `input` and `output` (or `response`), with `system` beside it |
| question and answer | `question` (or `problem`, `query`, `input`) and `answer` (or `solution`, `response`, `output`) |
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from potstill.data.chats.messages import (
    UNTRAINED,
    bears_loss,
    calls_of,
    joined,
    parsed,
    quoted,
    refused,
    require_shallow,
    said_to_train,
    text_of,
    tools_of,
    with_thought,
)
from potstill.data.chats.roles import INSTRUCTIONS, REASONING, ROLES, SYNONYMS, TOOLS, Json, strings
from potstill.io.safe_open import is_encodable, names_of

LISTS = ("messages", "conversations", "conversation")
ANSWERS = ("completion", "response", "output")
ASKED = ("question", "problem", "query", "input")
ANSWERED = ("solution", "answer", "response", "output", "completion")
"""Keys of a question and its answer, where a record has no other shape: a worked solution before the final answer."""
CHOICES = ("choices", "options")
"""Keys of the choices of a test, whose answer may be a number or a letter."""
VERDICTS = ("label", "kto_tag")
"""Keys of a record that say whether its answer is a good one, as KTO's data has them."""
BESIDE = (*REASONING, "thought", "thoughts")
"""Keys of a record for the thought before its one answer; a `reason` is one for the record, mostly."""
SWITCHES = {"on", "off", "yes", "no", "true", "false", "none", "low", "medium", "high"}
"""What such keys say elsewhere: whether and how much was thought."""
PAIRED = ("tool_call_id",)
"""Keys of a message that templates need not write: results stand behind their calls."""
MARKS = tuple(key for key in UNTRAINED if key != "loss")
"""Keys of a record that say whether it is trained on; a `loss` beside a conversation is a measured one, mostly."""
SHAPES = (
    "a list of messages under `messages` or `conversations`, `prompt` and `completion`,"
    " `instruction` and `output`, or `question` and `answer`"
)


@dataclass(frozen=True)
class Conversation:
    where: str
    """File and line."""
    messages: list[Json]
    tools: list[Json] | None = None
    untrained: frozenset[int] = frozenset()
    """Messages of the assistant that bear no loss, by number."""
    mark: str = ""
    """A character put inside of control tokens that the words spell; empty: there are none."""

    @property
    def trained(self) -> list[int]:
        """Numbers of the messages that bear loss."""
        turns = (number for number, each in enumerate(self.messages) if each["role"] == "assistant")
        return [number for number in turns if number not in self.untrained]


@dataclass
class Shapes:
    """Reads records, and counts what it took for something else.

    Args:
        field: key of the list of messages; None takes the shape that a record has.
    """

    field: str | None = None

    def __post_init__(self) -> None:
        self.renamed: Counter[tuple[str, str]] = Counter()
        """(role as written, role it was read as) -> messages."""
        self.unasked: list[str] = []
        """Conversations that the assistant began; what it said before there was a question is left out."""
        self.unanswered: list[str] = []
        """Conversations, once a turn of the assistant without content and calls: it bears no loss."""
        self.left_out: list[str] = []
        """Conversations whose record says that they are not to be trained on."""
        self.keys: Counter[str] = Counter()
        """Keys that only a template may read -> messages."""
        self.wordless: list[str] = []
        """Conversations, once a turn of the assistant that answers an empty question: it bears no loss."""

    def conversation(self, where: str, record: Json) -> Conversation | None:
        """None where the record says that it is not to be trained on.

        Raises:
            ConversationRefused: a record of no known shape, or a message that is none.
        """
        if not _is_trained_on(where, record):
            self.left_out.append(where)
            return None
        if given := _given(record.get("chat_template_kwargs")):
            raise refused(
                where,
                f"'chat_template_kwargs' is {quoted(given)}; a template gets no variables of a record",
                "Remove the key where the template writes what is meant without it",
            )
        found, context = self._messages(where, record)
        messages, untrained = [], set()
        for number, message in enumerate(found):
            place = f"{where}: message {number}"
            require_shallow(place, message)
            messages.append(self._message(place, message))
            if _is_unanswered(message) and messages[-1]["role"] == "assistant":
                self.unanswered.append(where)
                untrained.add(number)
            if number < context or not bears_loss(place, message):
                untrained.add(number)
        self._think(where, record, messages)
        if system := _system(where, record):
            if messages[0]["role"] == "system":
                system += _behind(system, messages.pop(0)["content"])
            else:
                untrained = {number + 1 for number in untrained}
            messages.insert(0, {"role": "system", "content": system})
        messages, untrained = self._asked(where, messages, untrained)
        wordless = _without_a_question(messages) - untrained
        self.wordless += [where] * len(wordless)
        untrained |= wordless
        # `functions`, as servers wrote it before `tools`
        tools = tools_of(where, record.get("tools") or record.get("functions"))
        require_shallow(where, [messages, tools])
        for text in strings([messages, tools]):
            if not is_encodable(text):
                raise refused(
                    where, "holds half of a surrogate pair, which UTF-8 cannot encode", "Correct the record"
                )
        return Conversation(where, messages, tools, frozenset(untrained))

    def _think(self, where: str, record: Json, messages: list[Json]) -> None:
        """Gives the thought beside the messages to the answer, which must be one where they are a list."""
        key = next((key for key in BESIDE if _is_thought(record.get(key))), None)
        turns = [number for number, each in enumerate(messages) if each["role"] == "assistant"]
        if key is None or not turns or any(messages[at].get(each) for at in turns for each in REASONING):
            return  # those of the messages say whose they are
        if len(turns) > 1 and any(record.get(name) is not None for name in (self.field or LISTS[0], *LISTS)):
            raise refused(
                where,
                f"{key!r} beside the messages may be the thought of any of {len(turns)} answers",
                "Write it into its message, as `reasoning_content`",
            )
        messages[turns[-1]]["reasoning_content"] = text_of(where, key, record[key])

    def _asked(self, where: str, messages: list[Json], untrained: set[int]) -> tuple[list[Json], set[int]]:
        """Without what the assistant and its tools say before the first question: many templates refuse it.

        Instructions alone are a question, too.

        Raises:
            ConversationRefused: there is nothing else.
        """
        first = next(
            (at for at, each in enumerate(messages) if each["role"] not in INSTRUCTIONS), len(messages)
        )
        answers = ("assistant", *TOOLS)
        asked = next((at for at in range(first, len(messages)) if messages[at]["role"] not in answers), None)
        if asked is None and first:
            return messages, untrained
        if asked is None:
            raise refused(
                where,
                f"message {first} is the assistant's, with nothing to answer",
                "Put a user's before it",
            )
        if left_out := asked - first:
            self.unasked.append(where)
            messages = messages[:first] + messages[asked:]
            untrained = {at if at < first else at - left_out for at in untrained if not first <= at < asked}
        return messages, untrained

    def _messages(self, where: str, record: Json) -> tuple[list[Any], int]:
        """The messages, and how many of them are there as context alone."""
        key = self.field or next((name for name in LISTS if record.get(name) is not None), None)
        if key is not None:
            messages = parsed(record.get(key))
            if messages == []:
                raise refused(where, f"{key!r} is an empty list of messages", "Leave the record out")
            if not isinstance(messages, list) or not messages:
                raise refused(
                    where,
                    f"{key!r} is not a list of messages; the line has {names_of(record)}",
                    f"Set corpus.field to its key, or to null where a record is {SHAPES}",
                )
            if self.field is None and not _is_answered(messages[-1]):
                _refuse_two_answers(where, record)
            return messages, 0
        answer = next((name for name in ANSWERS if record.get(name) is not None), None)
        if answer is not None and record.get("prompt") is not None:
            prompt, answered = _as_turns(record["prompt"], "user"), _as_turns(record[answer], "assistant")
            return [*prompt, *answered], len(prompt)
        if answer is not None and "instruction" in record:
            return _instructed(where, record, "instruction", ("input", "context"), answer), 0
        _refuse_two_answers(where, record)
        asked = next((name for name in ASKED if isinstance(record.get(name), str)), None)
        answer = next((name for name in ANSWERED if record.get(name) is not None), None)
        if asked is not None and answer is not None:
            _refuse_choices(where, record)
            return _instructed(where, record, asked, ("context",), answer), 0
        raise refused(
            where,
            f"no conversation; the line has {names_of(record)}. A record is {SHAPES}",
            "Rename its keys, or set corpus.field to the key of a list of messages",
        )

    def _message(self, place: str, message: Any) -> Json:
        """`role`, `content` and whatever else the template may look at."""
        given = (
            {key: value for key, value in message.items() if value is not None}
            if isinstance(message, dict)
            else {}
        )
        role = given.pop("role", given.pop("from", None))
        content = given.pop("content", given.pop("value", None))
        call = given.pop("function_call", None)  # one, as servers wrote it before `tool_calls`
        calls = calls_of(place, given.pop("tool_calls", None if call is None else [call]))
        if role == "function_call":  # of LLaMA-Factory: the call is the message's text
            role, calls, content = "assistant", calls_of(place, _as_list(parsed(content))), ""
        if content is None and (calls or (isinstance(message, dict) and "content" in message)):
            content = ""
        content = joined(place, content)
        if not isinstance(role, str) or not isinstance(content, str):
            raise refused(
                place,
                f"a message must have a `role` and a `content`, both strings; found {quoted(message, 80)}",
                "Write both as strings",
            )
        named = {"role": self._role(place, role), "content": content}
        rest = {key: value for key, value in given.items() if key not in UNTRAINED}
        if named["role"] == "assistant":
            rest = with_thought(place, rest)
        self.keys.update(key for key in rest if key not in (*REASONING, *PAIRED))
        return named | ({"tool_calls": calls} if calls else {}) | rest

    def _role(self, place: str, written: str) -> str:
        role = written.strip().lower()
        role = SYNONYMS.get(role, role)
        if role not in ROLES:
            raise refused(
                place,
                f"role {written!r:.60} is none that a chat template knows: {', '.join(ROLES)}",
                "Rename it",
            )
        if role != written:
            self.renamed[written, role] += 1
        return role


def _is_trained_on(where: str, record: Json) -> bool:
    """What the record says beside its messages: of a `label` only true and false, as numbers name classes."""
    if any(record.get(key) is False for key in VERDICTS):
        return False
    said = {key: record.get(key) for key in MARKS}
    return all(
        said_to_train(where, key, value) for key, value in said.items() if isinstance(value, int | float)
    )


def _instructed(where: str, record: Json, asked: str, about: tuple[str, ...], answer: str) -> list[Json]:
    """What is asked, what it is about below it, and the answer; the turns of a `history` before them."""
    parts = [text_of(where, asked, record[asked])]
    parts += [_as_text(where, key, record.get(key)) for key in about]
    question = "\n\n".join(part for part in parts if part)
    turns = [*_history(where, record.get("history")), {"role": "user", "content": question}]
    return [*turns, {"role": "assistant", "content": record[answer]}]


def _refuse_choices(where: str, record: Json) -> None:
    """Of a test with choices, whose answer may be a number or a letter and whose question may not have them."""
    key = next((key for key in CHOICES if record.get(key)), None)
    if key is not None:
        raise refused(
            where,
            f"a question with {key!r}, whose answer may be one of them or its number",
            "Write question and answer as messages, with the choices in the question",
        )


def _history(where: str, history: Any) -> list[Json]:
    """Turns before an instruction: pairs of a question and its answer, as LLaMA-Factory has them, or messages."""
    turns: list[Json] = []
    found = parsed(history) or []
    for number, pair in enumerate(found if isinstance(found, list) else [found]):
        if isinstance(pair, dict) and ("role" in pair or "from" in pair):
            turns.append(pair)
            continue
        is_pair = isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)
        if not is_pair or not isinstance(pair[1], str | None):
            raise refused(
                where,
                f"element {number} of 'history' is {quoted(pair)}, no pair of a question and its answer",
                "Write pairs of strings, or a list of messages",
            )
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def _as_text(where: str, key: str, value: Any) -> str:
    """What an instruction is about: a text, or data, which is asked of as JSON."""
    if isinstance(value, str) or value in (None, [], {}):
        return value or ""
    parts = value if isinstance(value, list) else []
    if parts and all(isinstance(part, dict) and "text" in part for part in parts):
        return text_of(where, key, value)
    if parts and all(isinstance(part, str) for part in parts):  # passages
        return "\n\n".join(parts)
    require_shallow(f"{where}: {key!r}", value)
    return json.dumps(value, ensure_ascii=False, default=str)


def _system(where: str, record: Json) -> str:
    """The system's words beside the messages."""
    words = ""
    for key in ("system", "system_prompt"):
        words += _behind(words, text_of(where, key, record.get(key)))
    return words


def _behind(words: str, others: str) -> str:
    """What others add to words: nothing where they are the same."""
    if not others.strip() or others.strip() == words.strip():
        return ""
    return f"\n\n{others}" if words else others


def _without_a_question(messages: list[Json]) -> set[int]:
    """Turns of the assistant that answer messages without words. A call may have an empty result."""
    found, before = set(), list[Json]()
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            before.append(message)
            continue
        if before and not any(each["content"].strip() or each["role"] in TOOLS for each in before):
            found.add(number)
        before = []
    return found


def _given(variables: Any) -> Any:
    """In a table records have the variables of others as nulls."""
    if not isinstance(variables, dict):
        return variables
    return {key: value for key, value in variables.items() if value is not None}


def _is_thought(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip()) and value.strip().lower() not in SWITCHES
    return isinstance(value, list) and bool(value)


def _refuse_two_answers(where: str, record: Json) -> None:
    """Of data for preferences: which answer is to be learnt is not guessed."""
    if record.get("chosen") is None or record.get("rejected") is None:
        return
    chosen = parsed(record["chosen"])
    if isinstance(chosen, list) and chosen and not _is_answered(chosen[0]):
        todo = "set corpus.field: chosen"
    elif any(record.get(key) is not None for key in LISTS):
        todo = "put them at the end of the messages"
    else:
        todo = f"rename `chosen` to `{'output' if 'instruction' in record else 'completion'}`"
    raise refused(where, "two answers, `chosen` and `rejected`", f"To learn the chosen ones {todo}")


def _is_answered(message: Any) -> bool:
    """Whether a message, as the data has it, is the assistant's."""
    role = message.get("role", message.get("from")) if isinstance(message, dict) else None
    return isinstance(role, str) and SYNONYMS.get(role.strip().lower(), role.strip().lower()) == "assistant"


def _is_unanswered(message: Any) -> bool:
    """Whether a message has content of null and nothing in its place."""
    if not isinstance(message, dict):
        return False
    key = next((key for key in ("content", "value") if key in message), None)
    return (
        key is not None
        and message[key] is None
        and not (message.get("tool_calls") or message.get("function_call"))
    )


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _as_turns(value: Any, role: str) -> list[Any]:
    found = parsed(value)
    if isinstance(found, list) and found and all(isinstance(each, dict) and "role" in each for each in found):
        return found
    return value if isinstance(value, list) else [{"role": role, "content": value}]
