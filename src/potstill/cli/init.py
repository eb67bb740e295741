"""The verb `init`: a recipe for two models and data."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill.cli.overrides import add_overrides
from potstill.io.terminal import Display, printable
from potstill.recipe.commented import GIVEN

if TYPE_CHECKING:
    from potstill.workflows.init import Written

EXAMPLES = """
examples:
  potstill init Qwen/Qwen2.5-1.5B-Instruct Qwen/Qwen2.5-0.5B-Instruct chats.jsonl
  potstill init teacher.gguf cut texts/ --out half.yaml
  potstill init ./teacher ./config.json articles.parquet train.steps=500

It reads the configs and tokenizers of both models and a sample of the data, and no weight. Every value of the
recipe has its reason above it. A file that is there is not overwritten, and where something is wrong none is written.
"""


def add_flags(init: argparse.ArgumentParser) -> None:
    init.formatter_class = argparse.RawDescriptionHelpFormatter
    init.epilog = EXAMPLES
    init.add_argument("teacher", metavar="TEACHER", help="a folder, a GGUF file or a hub name, owner/name")
    init.add_argument(
        "student",
        metavar="STUDENT",
        help="the same; a config.json, for random weights; or the word cut: made of the teacher's own layers",
    )
    init.add_argument(
        "data",
        metavar="DATA",
        help="texts, JSON lines, Parquet, chats, prompts or token shards (*.bin): a file, a folder, stdlib: or a data"
        " set of the hub. Which it is, is seen by its content",
    )
    add_overrides(init, "a field of the recipe that you choose yourself")
    init.add_argument(
        "--out", type=Path, metavar="FILE", default=Path("recipe.yaml"), help="default: recipe.yaml"
    )


def run_init(options: argparse.Namespace, display: Display) -> None:
    from potstill.workflows.init import init

    made = init(options.teacher, options.student, options.data, options.out, options.overrides, display.note)
    if options.json:
        display.result(json.dumps(_as_dict(made), indent=2))
        return
    for line in _lines(made):
        display.result(line)


def _as_dict(made: Written) -> dict[str, Any]:
    found = made.fitted
    return {
        "recipe": str(made.path),
        "fits": found.fits,
        "peak_bytes": None if found.planned is None else found.planned.peak_bytes,
        "memory_available_bytes": found.memory,
        "chosen": [vars(each) for each in made.chosen],
        "warnings": made.warnings,
    }


def _lines(made: Written) -> list[str]:
    from potstill.workflows.init_values import verdict

    named = [each for each in made.chosen if each.why]
    rows = [(each.field, _shown(each.value), each.why) for each in named if each.why != GIVEN]
    width, other = (max((len(row[n]) for row in rows), default=0) for n in (0, 1))
    path, quoted = (printable(text, keep="") for text in (str(made.path), shlex.quote(str(made.path))))
    return [
        *(f"{field.ljust(width)}  {value.ljust(other)}  {why}" for field, value, why in rows),
        *(f"warning: {each}" for each in made.warnings),
        verdict(made.fitted),
        f"{path} is written. Next:",
        f"  potstill check {quoted}      # what would make the run worthless, tried on your models and rows",
        f"  potstill distill {quoted}",
    ]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
