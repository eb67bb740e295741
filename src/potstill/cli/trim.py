"""The verb `trim`: a recipe's teacher with fewer tokens."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from potstill.cli.overrides import add_overrides
from potstill.io.terminal import Display


def add_flags(trim: argparse.ArgumentParser) -> None:
    trim.add_argument(
        "recipe", type=Path, metavar="RECIPE", help="a YAML file; its teacher and corpus are read"
    )
    add_overrides(trim)
    trim.add_argument(
        "--ids",
        type=int,
        required=True,
        metavar="N",
        help="the vocabulary size: how many tokens to keep at most",
    )
    trim.add_argument("--out", type=Path, metavar="FOLDER", help="default trimmed/NAME")


def run_trim(options: argparse.Namespace, display: Display) -> None:
    from potstill.workflows.trim import trim

    out = options.out or Path("trimmed") / options.recipe.stem
    record = trim(options.recipe, options.ids, options.overrides, out, display)
    shown = {name: value for name, value in record.items() if name != "kept"} | {"folder": str(out)}
    display.result(json.dumps(shown, indent=2) if options.json else f"{out}: a teacher for teacher.model")
