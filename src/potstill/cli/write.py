"""The verb `write`: a corpus that the teacher writes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from potstill.cli.overrides import add_overrides
from potstill.io.terminal import Display


def add_flags(write: argparse.ArgumentParser) -> None:
    write.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML file; see its section `write`")
    add_overrides(write)
    write.add_argument(
        "--out", type=Path, metavar="FOLDER", help="default written/NAME; one that was started goes on"
    )


def run_write(options: argparse.Namespace, display: Display) -> None:
    from potstill.workflows.write import CORPUS, write_corpus

    out = options.out or Path("written") / options.recipe.stem
    receipt = write_corpus(options.recipe, options.overrides, out, display)
    if options.json:
        display.result(json.dumps(receipt, indent=2))
        return
    left_out = {name: receipt[name] for name in ("truncated", "too_short", "too_long", "prompts_refused")}
    others = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in left_out.items() if number)
    kept = f"{receipt['kept']} of {receipt['answers']} answers to {receipt['prompts']} prompts"
    display.result(f"{out / CORPUS}: {kept}{f'; left out: {others}' if others else ''}")
