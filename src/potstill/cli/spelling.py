"""What a mistyped verb or flag was meant to be, as far as it can be known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

VERBS = {
    **dict.fromkeys(("train", "run", "start", "fit"), "distill"),
    **dict.fromkeys(("resume", "continue"), "distill RECIPE --resume"),
    **dict.fromkeys(("evaluate", "benchmark", "bench", "test"), "eval"),
    **dict.fromkeys(("convert", "quantize", "quantise", "gguf"), "export"),
    **dict.fromkeys(("generate", "infer", "sample", "talk"), "chat"),
    **dict.fromkeys(("push", "upload"), "publish"),
    **dict.fromkeys(("ls", "list", "status", "ps"), "runs"),
    **dict.fromkeys(("validate", "lint", "doctor", "dry-run"), "check"),
    **dict.fromkeys(("estimate", "memory"), "plan"),
    **dict.fromkeys(("info", "inspect", "metrics"), "show"),
    **dict.fromkeys(("data", "preview"), "rows"),
    **dict.fromkeys(("cache", "store-targets"), "capture"),
}


def meant_verb(word: str, verbs: Iterable[str]) -> str | None:
    """The verb that a mistyped one comes closest to, or another tool's word for it."""
    close = difflib.get_close_matches(word, list(verbs), n=1, cutoff=0.7)
    return close[0] if close else VERBS.get(word)


def meant_flag(word: str, given: Sequence[str], flags: Iterable[str], *, takes_fields: bool) -> str:
    """A sentence on an unknown flag: a field of the recipe, a flag that is spelt like it, or nothing.

    Args:
        given: the whole command line, where the flag's value may follow it.
        flags: those of the verb.
        takes_fields: whether the verb takes overrides of a recipe.
    """
    flag, _, value = word.partition("=")
    if close := difflib.get_close_matches(flag, list(flags), n=1, cutoff=0.7):
        return f". Did you mean {close[0]}?"
    if not takes_fields or not flag.startswith("--"):
        return ""
    from potstill.recipe.load import fields_called

    after = list(given)[list(given).index(word) + 1 :]
    value = value or next((each for each in after[:1] if not each.startswith("-")), "…")
    found = fields_called(flag.removeprefix("--"))
    return (
        f". A field of the recipe is set by {' or '.join(f'{each}={value}' for each in found)}."
        if found
        else ""
    )
