"""A message as templates take it: its words, its calls of tools, and whether it bears loss."""

from __future__ import annotations

import json
from typing import Any

from potstill.data.chats.roles import OTHER_REASONING, REASONING, Json
from potstill.data.chats.templates import SKIP, ConversationRefused
from potstill.errors import one_line
from potstill.io.safe_open import parse_json

ARGUMENTS = ("arguments", "parameters", "input")
"""Keys of a call under which data sets have its arguments."""
UNTRAINED = ("weight", "train", "training", "trainable", "learn", "loss", "loss_mask")
"""Keys of a message that say whether it bears loss; no template sees them."""
SOUNDS_LIKE_LOSS = ("train", "loss", "mask", "weight", "learn")

MAX_ENCODED = 4
"""Times that arguments may be encoded as JSON beyond the first."""
MAX_DEPTH = 100
"""Levels of lists and objects in a message; Python's own bound is on what it calls, and the template's process has it
too.
"""


def refused(where: str, what: str, todo: str) -> ConversationRefused:
    return ConversationRefused(f"{where}: {what}. {todo}, or {SKIP}.")


def quoted(value: Any, limit: int = 60) -> str:
    """The beginning of a value for an error: tables have dates and bytes, too."""
    try:
        return json.dumps(value, default=str)[:limit]
    except RecursionError:
        return f"a {type(value).__name__} of many levels"


def require_shallow(place: str, tree: Any) -> None:
    level = [tree]
    for _ in range(MAX_DEPTH):
        level = [below for each in level if isinstance(each, list | dict) for below in _below(each)]
        if not level:
            return
    raise refused(place, f"holds more than {MAX_DEPTH} levels of lists and objects", "Correct the record")


def _below(tree: list[Any] | Json) -> list[Any]:
    return list(tree.values()) if isinstance(tree, dict) else tree


def parsed(value: Any) -> Any:
    """JSON that a data set keeps as a string."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return parse_json(value.encode("utf-8", "surrogatepass"))
        except ValueError:
            return value
    return value


def joined(place: str, content: Any) -> Any:
    """Content in parts, as multimodal data writes it, as one text."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise refused(
                place,
                f"a message must have a `role` and a `content`, both strings; a part of its content is {kind!r:.40},"
                " no text",
                "Only texts are learnt from: remove the part",
            )
        texts.append(text)
    return "".join(texts)


def text_of(place: str, key: str, value: Any) -> str:
    """A text beside the messages, which may be in parts as content is; empty where there is none."""
    text = joined(f"{place}: {key!r}", value or "")
    if not isinstance(text, str):
        raise refused(place, f"{key!r} is {quoted(value)}, no text", "Write it as one")
    return text


def with_thought(place: str, message: Json) -> Json:
    """A message of the assistant with its thought as a text, under a key that templates know."""
    found: Json = {}
    for key in (*REASONING, *OTHER_REASONING):
        value = message.get(key)
        if isinstance(value, bool) or not (text := text_of(place, key, value)).strip():
            continue  # whether there was one, or none
        if next(iter(found.values()), text).strip() != text.strip():
            raise refused(place, f"two thoughts, {next(iter(found))!r} and {key!r}", "Remove one of them")
        found[REASONING[0] if key in OTHER_REASONING else key] = text
    keys = {key for key in (*REASONING, *OTHER_REASONING) if not isinstance(message.get(key), bool)}
    return {key: value for key, value in message.items() if key not in keys} | found


def bears_loss(place: str, message: Json) -> bool:
    """What the keys of `UNTRAINED` say, 1 and true or 0 and false; refused where another key may say it.

    A mark that is passed over trains on what was to be left out.
    """
    for key, value in message.items():
        if key in UNTRAINED or not any(word in key.lower() for word in SOUNDS_LIKE_LOSS):
            continue
        if value in (0, 1) or (isinstance(value, list) and value):
            raise refused(
                place,
                f"{key!r} is {value!r:.40}; whether a message is trained on is said by {', '.join(UNTRAINED)}: 1, true"
                " or 0, false",
                "Rename the key, or remove it",
            )
    return all(said_to_train(place, key, message.get(key)) for key in UNTRAINED)


def said_to_train(place: str, key: str, value: Any) -> bool:
    if value is not None and value not in (0, 1):
        raise refused(
            place,
            f"{key!r} is {value!r:.40}; it is trained on (1, true) or not (0, false)",
            "Write one of them",
        )
    return value is None or bool(value)


def calls_of(place: str, calls: Any) -> list[Json]:
    """`tool_calls` as templates want them: arguments as an object, whether the data spells them so or as a string."""
    calls = parsed(calls)
    if calls in (None, "", []):
        return []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise refused(place, f"tool_calls is {quoted(calls)}, not a list of calls", "Write a list of objects")
    made = []
    for call in calls:
        function = dict(call["function"]) if isinstance(call.get("function"), dict) else dict(call)
        if not isinstance(function.get("name"), str):
            raise refused(place, f"a call of tool_calls without a name: {quoted(call)}", "Write its `name`")
        given = [function.pop(key) for key in ARGUMENTS if key in function]
        function["arguments"] = _arguments(place, next((each for each in given if each is not None), None))
        outer = {key: value for key, value in call.items() if value is not None} if "function" in call else {}
        made.append({"type": "function"} | outer | {"function": function})
    return made


def _arguments(place: str, arguments: Any) -> Any:
    if arguments in (None, ""):
        return {}
    if isinstance(arguments, str):
        try:
            return _decoded(parse_json(arguments.encode("utf-8", "surrogatepass")))
        except ValueError as error:
            raise refused(
                place,
                f"the arguments of a tool call are a string that is no JSON: {one_line(error).rstrip('.')}",
                "Write them as an object, or as JSON",
            ) from error
    return arguments


def _decoded(value: Any) -> Any:
    """Of arguments that were encoded more than once the object, under which templates look for each."""
    found = value
    for _ in range(MAX_ENCODED):
        if not isinstance(found, str):
            break
        try:
            found = parse_json(found.encode("utf-8", "surrogatepass"))
        except ValueError:
            break
    return found if isinstance(found, dict) else value


def tools_of(where: str, tools: Any) -> list[Json] | None:
    """Descriptions of functions as servers take them: `{"type": "function", "function": {…}}`."""
    tools = parsed(tools)
    if tools in (None, "", "null", []):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise refused(where, f"tools is {quoted(tools)}, not a list of functions", "Write a list of objects")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
