"""Error messages of recipes: an error of pydantic becomes a field and a plain sentence.

Pydantic's own wording does not reach the user where this file knows the error. Called by `load.py`, which reports
all mistakes together.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from potstill.recipe.synonyms import VALUES, meant_field, meant_name
from potstill.registry import nearest

Path = tuple[str, ...]
Schema = Mapping[Path, tuple[Any, ...]]
"""The dataclasses that each section accepts; where there are several, the field `name` selects one."""

WORDS = {"True": "true", "False": "false"}
WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a whole number of a size that fits",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "dataclass_type": "a mapping",
    "model_attributes_type": "a mapping",
}
WHAT: dict[Path, str] = {
    ("evaluations", "*"): "evaluation",
    ("sinks", "*"): "sink",
    ("corpus", "sources", "*"): "source of a mix",
    ("teacher", "teachers", "*", "teacher"): "teacher of a mixture",
}
"""What one entry of a list is called."""
BOUNDS = {
    "greater_than": ("gt", "must be greater than {}."),
    "greater_than_equal": ("ge", "must be {} or more."),
    "less_than": ("lt", "must be less than {}."),
    "less_than_equal": ("le", "must be {} or less."),
}


def explain(finding: Mapping[str, Any], tree: dict[str, Any], schema: Schema) -> tuple[Path, str]:
    """The field that a pydantic error is about, and a sentence that says what is wrong with it."""
    kind, value = finding["type"], finding["input"]
    context: dict[str, Any] = finding.get("ctx", {})
    path = _path(finding["loc"], schema)
    if kind == "unexpected_keyword_argument":
        return path, _unknown_key(path, tree, schema)
    if kind == "missing":
        return path, f"missing. {_owner(path[:-1], tree, schema)} needs it."
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _unknown_name(path, tree, schema)
    if kind in WANTED:
        return path, _wrong_type(kind, value)
    if kind in BOUNDS:
        key, requirement = BOUNDS[kind]
        bound = context[key]
        return path, f"{shown(value)} {requirement.format(int(bound) if bound == int(bound) else bound)}"
    if kind == "literal_error":
        known = [WORDS.get(word, word.strip("'")) for word in re.split(", | or ", context["expected"])]
        meant = VALUES.get(str(value).lower())
        close = [meant] if meant in known else difflib.get_close_matches(str(value), known, n=1)
        return path, f"{shown(value)} is not one of {', '.join(known)}." + (
            f" Did you mean {close[0]}?" if close else ""
        )
    if kind == "too_short":
        return path, f"a list of {context['actual_length']}, wanted {context['min_length']} or more entries."
    if kind == "string_too_short":
        return path, "an empty text. Write one, or null for none."
    if kind == "user_error":
        return path, context["message"]
    requirement = str(finding["msg"]).replace("Input should", "it must")
    return path, f"{shown(value)} does not fit: {requirement}."


def shown(value: Any) -> str:
    """A value as a person wrote it, shortened."""
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _wrong_type(kind: str, value: Any) -> str:
    sentence = f"{shown(value)} is not {WANTED[kind]}."
    if kind == "string_type" and isinstance(value, int | float):
        return f"{sentence} Write it in quotes."
    if (
        kind in ("int_type", "float_type")
        and isinstance(value, str)
        and value.strip().replace(".", "", 1).isdecimal()
    ):
        return f"{sentence} Write it without quotes."
    if kind == "list_type" and isinstance(value, str):
        return f"{sentence} Write [{value!r:.60}]."
    return sentence


def _path(location: Iterable[str | int], schema: Schema) -> Path:
    """The location as the file has it: after a section of several classes, pydantic inserts the name of one."""
    path: Path = ()
    tag_is_next = False
    for step in location:
        if not tag_is_next:
            path = (*path, str(step))
        tag_is_next = not tag_is_next and len(schema.get(_section(path), ())) > 1
    return path


def _section(path: Path) -> Path:
    """The path as a key of the schema: `*` for an index of a list."""
    return tuple("*" if step.isdigit() else step for step in path)


def _called(path: Path) -> str:
    """What a section holds: `teacher`, `sink`."""
    return WHAT.get(_section(path), path[-1])


def _at(tree: Any, path: Path) -> Any:
    for step in path:
        if isinstance(tree, list):
            tree = tree[int(step)] if step.isdigit() and int(step) < len(tree) else None
        else:
            tree = tree.get(step) if isinstance(tree, dict) else None
    return tree


def _chosen(section: Path, tree: Any, schema: Schema) -> Any | None:
    """The dataclass that a section's name selects, or None where it selects none."""
    kinds = schema.get(_section(section), ())
    if len(kinds) < 2:
        return kinds[0] if kinds else None
    value = _at(tree, section)
    name = value.get("name") if isinstance(value, dict) else value
    return next((kind for kind in kinds if kind.name == name), None)


def _names(kind: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(kind)]


def _owner(section: Path, tree: Any, schema: Schema) -> str:
    kind = _chosen(section, tree, schema)
    return (
        "Every recipe"
        if len(schema.get(_section(section), ())) < 2 or kind is None
        else f"{_called(section)} {kind.name}"
    )


def _unknown_key(path: Path, tree: Any, schema: Schema) -> str:
    *section, key = path
    here = tuple(section)
    kind = _chosen(here, tree, schema)
    if kind is None:  # inside an option whose type is a plug-in's
        return "unknown key. Remove it."
    of = f" for {kind.name}" if len(schema[_section(here)]) > 1 else ""
    siblings = [other.name for other in schema[_section(here)] if other is not kind and key in _names(other)]
    if siblings:
        return f"unknown key{of}; it is one of {' and '.join(siblings)}.{nearest('', _names(kind))}"
    if meant := meant_field(key):
        return f"unknown key{of}. Here it is {meant}."
    # A typo within the section is likelier than a field of another one.
    dotted = _nearest_fields(key, [(*here, name) for name in _names(kind)])
    if not dotted:
        chosen = {section: _chosen(section, tree, schema) for section in schema}
        dotted = _nearest_fields(
            key, [(*section, name) for section, kind in chosen.items() if kind for name in _names(kind)]
        )
    hint = f" Did you mean {' or '.join(dotted)}?" if dotted else nearest("", _names(kind))
    return f"unknown key{of}.{hint}"


def _nearest_fields(key: str, fields: list[Path]) -> list[str]:
    """Dotted fields whose last name is the key or, failing that, most similar to it."""
    close = difflib.get_close_matches(key, sorted({field[-1] for field in fields}), n=1)
    return [".".join(field) for field in fields if field[-1] in close]


def _unknown_name(path: Path, tree: Any, schema: Schema) -> tuple[Path, str]:
    value = _at(tree, path)
    known = [kind.name for kind in schema[_section(path)]]
    plugin = " Your own: list its file under plugins." if path[0] not in ("student", "capture") else ""
    if isinstance(value, dict):
        if "name" not in value:
            return (*path, "name"), f"missing.{nearest('', known)}{plugin}"
        path, value = (*path, "name"), value["name"]
    what = _called(path[:-1] if path[-1] == "name" else path)
    meant = meant_name(what, str(value))
    hint = f" Did you mean {meant}?" if meant in known else nearest(str(value), known)
    return path, f"no {what} called {shown(value)}.{hint}{plugin}"
