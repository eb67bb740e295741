"""The site of README and docs, for Sphinx: `make docs`. Its navigation is the README's section Documentation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

project = "potstill"
root_doc = "README"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "bench/lease/README.md"]
extensions = ["myst_parser"]
myst_heading_anchors = 4  # of headings, as GitHub makes them
highlight_language = "none"  # of a block that names no language
nitpicky = True
html_theme = "furo"
html_title = "potstill"
html_extra_path = ["site"]  # relative to this file


def navigation(readme: str) -> str:
    """The README's lines of links, `Start: [quickstart](docs/quickstart.md) · …`, as the site's navigation."""
    lines = re.findall(r"^(\w[\w ]*): (\[.*)$", readme.partition("## Documentation")[2], re.MULTILINE)
    blocks = []
    for caption, links in lines:
        pages = [name.removesuffix(".md") for name in re.findall(r"\]\(([^)#]+\.md)\)", links)]
        blocks.append("\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```"]))
    return "\n\n".join(blocks)


def setup(app: Any) -> None:
    from pygments.lexers import JsonLexer

    app.add_lexer("jsonl", JsonLexer)

    def add_navigation(app: Any, page: str, source: list[str]) -> None:
        if page == root_doc:
            source[0] += "\n" + navigation(source[0])

    app.connect("source-read", add_navigation)
