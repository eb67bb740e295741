"""What messages are called: roles, keys of thoughts, and every text in them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

ROLES = (
    "system",
    "developer",
    "user",
    "assistant",
    "tool",
    "function",
    "ipython",
    "environment",
    "documents",
)
"""What templates know. A template may refuse some of them, and says so."""
INSTRUCTIONS, TOOLS = ("system", "developer"), ("tool", "function", "ipython", "environment")
SYNONYMS = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
"""Roles that data sets write for those of the templates; capitals do not matter."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message for the thought before its answer, under which templates look for it, too."""
OTHER_REASONING = ("thought", "thoughts", "reason")
"""More of them, of data sets alone; read as the first of `REASONING`."""

Json = dict[str, Any]


def strings(tree: Any) -> Iterator[str]:
    """Every string of nested lists and mappings, keys too."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict):
        yield from strings([*tree, *tree.values()])
    elif isinstance(tree, list):
        for each in tree:
            yield from strings(each)
