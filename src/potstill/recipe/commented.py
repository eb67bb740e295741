"""A recipe as it is written for people: every value with its reason above it."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from potstill.io import yaml

WIDTH = 110
"""Characters of a line of reasons."""
GIVEN = "as given"
ORDER = ("plugins", "teacher", "student", "corpus", "objective", "rollouts", "train", "eval")
"""Of sections; others come behind."""


@dataclass(frozen=True)
class Chosen:
    """A value and its reason."""

    field: str
    """Dotted, `train.lr`; or of the recipe itself, `plugins`."""
    value: Any
    why: str
    """Empty: the value speaks for itself."""


class Draft:
    """The values of a recipe as they are chosen. Those that the user gives are kept."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = given
        self._chosen: dict[str, Chosen] = {}

    def is_given(self, field: str) -> bool:
        section, _, name = field.partition(".")
        inside = self.given.get(section)
        return section in self.given if not name else isinstance(inside, dict) and name in inside

    def choose(self, field: str, value: Any, why: str = "") -> Any:
        """Keep the value, unless the user gives another; returns the one that is kept."""
        section, _, name = field.partition(".")
        if self.is_given(field):
            value, why = (self.given[section][name] if name else self.given[section]), GIVEN
        self._chosen[field] = Chosen(field, value, why)
        return value

    @property
    def chosen(self) -> list[Chosen]:
        """All values, those of one section together; behind them what else the user gives."""
        found = dict(self._chosen)
        for section, inside in self.given.items():
            for field in [f"{section}.{name}" for name in inside] if isinstance(inside, dict) else [section]:
                if field not in found:
                    name = field.partition(".")[2]
                    found[field] = Chosen(field, inside[name] if name else inside, GIVEN)
        sections = list(dict.fromkeys([*ORDER, *(field.partition(".")[0] for field in found)]))
        return sorted(found.values(), key=lambda each: sections.index(each.field.partition(".")[0]))

    def tree(self) -> dict[str, Any]:
        """As a recipe's YAML is read."""
        made: dict[str, Any] = {}
        for each in self.chosen:
            section, _, name = each.field.partition(".")
            if name:
                made.setdefault(section, {})[name] = each.value
            else:
                made[section] = each.value
        return made

    def with_reasons(self, head: Sequence[str]) -> str:
        """YAML that reads back as `tree()`; `head` stands in comments above it."""
        return "\n".join([*_comment(head), *_lines(self.chosen)]) + "\n"


def replaced(draft: Draft, values: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with other values at some dotted fields."""
    tree = draft.tree()
    for field, value in values.items():
        section, _, name = field.partition(".")
        tree[section] = dict(tree.get(section, {})) | {name: value}
    return tree


def _lines(chosen: Sequence[Chosen]) -> Iterator[str]:
    section = ""
    for each in chosen:
        its, _, name = each.field.partition(".")
        if its != section:
            section = its
            yield ""
            if name:
                yield f"{section}:"
        indent = "  " if name else ""
        for line in _comment([each.why] if each.why and each.why != GIVEN else []):
            yield indent + line
        yield from textwrap.indent(_entry(name or its, each.value), indent).splitlines()


def _comment(texts: Any) -> Iterator[str]:
    for text in texts:
        for line in textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False) or [""]:
            yield f"# {line}".rstrip()


def _entry(name: str, value: Any) -> str:
    if isinstance(value, dict | list):
        return f"{name}: {json.dumps(value)}"  # a line of JSON is YAML, too
    return yaml.write({name: value}).rstrip("\n")
