"""Jinja filters for Markdown: text of unknown origin cannot leave its line, cell or block."""

from __future__ import annotations

import re

from potstill.io.terminal import printable, short


def text(value: object) -> str:
    """In a line or a cell: it cannot end the cell, nor start a link, a tag or emphasis."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", printable(str(value), keep=""))


def code(value: object) -> str:
    """In a code span."""
    shown = printable(str(value), keep="").replace("|", "\\|").replace("`", "'")
    return f"`{shown}`"


def block(content: str, language: str = "") -> str:
    """In a code block, whose fence is longer than any in the content."""
    longest = max((len(run) for run in re.findall(r"`+", content)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{printable(content).rstrip()}\n{fence}"


def short_hash(value: object) -> str:
    return code(str(value)[:12]) if value else "–"


def last_part(source: object) -> str:
    """The name at the end of a path, which itself is the publisher's own affair."""
    return str(source).rstrip("/").rsplit("/", 1)[-1]


FILTERS = {each.__name__: each for each in (text, code, block, short, short_hash, last_part, repr)}
