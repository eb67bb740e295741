"""How much of a step the student should write: the demo's student, on by fixed rows, half its own, or its own alone.

    python bench/own_share.py [--steps 12] [--new 64] [--shares 0,0.5,1] [--student FOLDER] [--append FILE]

Each arm takes as many steps of as many rows, with JSD, from the same student: the demo's, made first unless given.
Held-out KL is on the standard library's text; own KL is the reverse KL on one sample a prompt, at temperature 1; a
sample parses where Python finds no error in the prompt and what was written behind it, up to its last line break.
Seconds are of the wall, decoding charged. The student is that of the last step, also where the one before training has
the lower held-out loss.
"""

from __future__ import annotations

import argparse
import ast
import codeop
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

from equal_time import keep_the_last

from potstill import distill, load_recipe
from potstill.build.resolve import resolve
from potstill.build.setup import set_up
from potstill.evals.heldout import heldout
from potstill.evals.own_samples import own_samples

DEMO = Path(__file__).resolve().parent.parent / "src" / "potstill" / "demo.yaml"
HELDOUT = 48


def parses(text: str) -> bool:
    """Whether Python finds no error in whole lines that may go on."""
    lines = text[: text.rfind("\n") + 1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ast.parse(lines)
            return True
        except (SyntaxError, ValueError):
            pass
        try:
            return codeop.compile_command(lines, symbol="exec") is None
        except (SyntaxError, ValueError, OverflowError):
            return False


def overrides_of(student: Path, share: float, new: int) -> list[str]:
    return [
        f"student={{name: checkpoint, model: {student}}}",
        "objective.divergence=jsd",
        f"corpus.heldout_rows={HELDOUT}",
        f"rollouts={{fraction: {share}, max_new_tokens: {new}, prompt_tokens: 48}}",
    ]


def scores(student: Path, base: Path, new: int) -> dict[str, float]:
    recipe = load_recipe(DEMO, overrides_of(base, 1.0, new))
    setup = set_up(resolve(recipe, saved_student=student), lambda line: None)
    given, tokenizer = setup.rollouts, setup.tokenizer
    assert given is not None and tokenizer is not None
    rows = recipe.train.micro_batch_rows
    own, written = own_samples(setup.student, setup.teacher, given.heldout, given.config, given.ends, rows)
    held = heldout(setup.student, setup.teacher, setup.corpus.heldout, rows)
    texts = [tokenizer.decode([*each.prompt.ids, *each.new], skip_special_tokens=True) for each in written]
    return {
        "heldout_kl": held["heldout/kl"],
        "own_reverse_kl": own["own/reverse_kl"],
        "own_distinct_4": own["own/distinct_4"],
        "parses": sum(map(parses, texts)) / len(texts),
        "samples": len(texts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--shares", default="0,0.5,1")
    parser.add_argument("--student", type=lambda text: Path(text).absolute())
    parser.add_argument("--append", type=Path)
    options = parser.parse_args()

    def say(line: dict[str, Any]) -> None:
        print(json.dumps(line), flush=True)
        if options.append is not None:
            with options.append.open("a") as file:
                file.write(json.dumps(line) + "\n")

    with tempfile.TemporaryDirectory() as place:
        base = options.student or distill(DEMO, out=Path(place) / "demo").student
        say({"bench": "own_share", "share": None, **scores(base, base, options.new)})
        keep_the_last()
        for share in map(float, options.shares.split(",")):
            settings = [f"train.steps={options.steps}", "train.lr=1e-4", "eval.every=0"]
            run = distill(
                DEMO,
                overrides=[*overrides_of(base, share, options.new), *settings],
                out=Path(place) / str(share),
            )
            line = {"bench": "own_share", "share": share, "steps": options.steps, "new": options.new}
            say(
                line
                | {"training_s": run.receipt()["training_seconds"]}
                | scores(run.student, base, options.new)
            )


if __name__ == "__main__":
    main()
