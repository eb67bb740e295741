"""`potstill --completion SHELL`: what a shell needs to complete verbs, options, files and a recipe's fields."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SHELLS = ("bash", "zsh", "fish")
FILE_NAMES = ("RUN|MODEL", "MODEL", "TEACHER", "STUDENT", "DATA")
"""Metavars of words that may be a path, or a hub id."""
# A field is followed by its value, without a space between them. shtab has no word for that: bash gets it after its
# function, zsh in ours, fish sees the "=".
FIELDS = {
    "bash": '_potstill_fields() {{ compgen -W "{fields}" -- "$1"; }}',
    "zsh": "_potstill_fields() {{ compadd -S '' -- {fields} }}",
    "fish": "function _potstill_fields\n    printf '%s\\n' {fields}\nend",
}
WITHOUT_SPACE = """
_potstill() {
  _shtab_potstill "$@"
  [[ "${COMPREPLY[*]}" == *= ]] && compopt -o nospace 2>/dev/null
  return 0
}
complete -o bashdefault -F _potstill potstill"""


class PrintCompletion(argparse.Action):
    """Prints the script on stdout and ends the program."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        print(script(parser, str(values)))
        parser.exit()


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The completion script of a parser and its verbs for one of `SHELLS`."""
    import shtab

    from potstill.recipe.load import dotted_fields

    for action in _actions(parser):
        takes_path = action.type is Path or action.metavar in FILE_NAMES
        if action.dest in ("overrides", "resume"):  # --resume may stand without a value before an override
            vars(action)["complete"] = {
                "bash": "_potstill_fields",
                "zsh": "_potstill_fields",
                "fish": "(_potstill_fields)",
            }
        elif takes_path:
            vars(action)["complete"] = shtab.FILE
    fields = " ".join(f"{field}=" for field in sorted(dotted_fields()))
    text: str = shtab.complete(parser, shell, preamble={shell: FIELDS[shell].format(fields=fields)})
    return text + WITHOUT_SPACE if shell == "bash" else text


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            yield from itertools.chain.from_iterable(_actions(verb) for verb in action.choices.values())
