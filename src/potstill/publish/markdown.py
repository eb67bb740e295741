"""Markdown of text that others wrote: it cannot leave its line, cell or block. Called by `card.py`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from potstill.io.terminal import printable


def text(value: object) -> str:
    """Text of unknown origin in a line or a cell: it cannot end the cell, nor begin a link or a tag."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", printable(str(value), keep=""))


def code(value: object) -> str:
    """The same in a code span."""
    shown = printable(str(value), keep="").replace("|", "\\|").replace("`", "'")
    return f"`{shown}`"


def block(content: str, language: str = "") -> str:
    """A code block that its content cannot end."""
    longest = max((len(run) for run in re.findall(r"`+", content)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{printable(content).rstrip()}\n{fence}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first column to the left, the others to the right where they are numbers."""
    line = "|".join([":--", *("--:" if _all_numbers(rows, i) else ":--" for i in range(1, len(columns)))])
    lines = [" | ".join(columns), line, *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {one} |" if one != line else f"|{one}|" for one in lines)


def _all_numbers(rows: Sequence[Sequence[str]], column: int) -> bool:
    return all(re.match(r"[-+–\d]|not run", row[column]) for row in rows)


def quoted(word: str) -> str:
    return word if re.fullmatch(r"[\w.=:/@%+,-]+", word) else "'" + word.replace("'", "'\\''") + "'"


def short(count: int) -> str:
    """102.7 M, 1.24 B."""
    return (
        f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"
    )


def short_hash(value: object) -> str:
    return code(str(value)[:12]) if value else "–"
