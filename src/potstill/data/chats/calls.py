"""The parts of a turn's calls of tools, their names and each of their arguments, and the tools of a record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from potstill.data.chats.roles import Json

Part = tuple[int, str | None]
"""The number of a call, and the name of an argument; None: the name of the tool."""
WHOLE = ""
"""In place of an argument's name: arguments that are no object."""


def parts_of(calls: list[Json]) -> list[Part]:
    parts: list[Part] = []
    for number, call in enumerate(calls):
        arguments = call["function"]["arguments"]
        names = arguments if isinstance(arguments, dict) else [WHOLE]
        parts += [(number, None), *((number, name) for name in names)]
    return parts


def value_of(calls: list[Json], part: Part) -> Any:
    number, name = part
    function = calls[number]["function"]
    if name is None:
        return function["name"]
    arguments = function["arguments"]
    return arguments[name] if isinstance(arguments, dict) else arguments


def with_ends(calls: list[Json], ends: Mapping[Part, str]) -> list[Json]:
    """Calls of which some parts end otherwise; those that are no text have the end alone."""

    def ended(part: Part) -> Any:
        value = value_of(calls, part)
        if part not in ends:
            return value
        return value + ends[part] if isinstance(value, str) else ends[part]

    made = []
    for number, call in enumerate(calls):
        arguments = call["function"]["arguments"]
        if isinstance(arguments, dict):
            others: Any = {name: ended((number, name)) for name in arguments}
        else:
            others = ended((number, WHOLE))
        changed = {"name": ended((number, None)), "arguments": others}
        made.append(call | {"function": call["function"] | changed})
    return made


def with_other_names(tools: list[Json], end: str) -> list[Json]:
    """Tools whose names end otherwise."""

    def renamed(tool: Json) -> Json:
        return {key: f"{value}{end}" if key == "name" else value for key, value in tool.items()}

    return [
        renamed(tool)
        | ({"function": renamed(tool["function"])} if isinstance(tool.get("function"), dict) else {})
        for tool in tools
    ]
