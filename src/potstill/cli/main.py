"""The roof: the verbs. Torch is imported only inside one that needs it: --help and a typo answer at once.

Exit codes: 0 done; 2 the user's mistake, one line each on stderr, a red check, or a plan that does not fit;
130 interrupted before training; 143 stopped by a signal after a saved checkpoint; anything else is a bug and
shows its traceback.
Results go to stdout, progress to stderr, so that `--json` may be piped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from potstill import __version__
from potstill.cli import capture, evaluate, export, gather
from potstill.errors import OfOneRank, Stopped, UserError
from potstill.io.terminal import Display, aligned, clock, hold_streams, let_go_of_streams, size


def main(arguments: Sequence[str] | None = None) -> int:
    code = None
    hold_streams()
    try:
        code = _run_verb(arguments)
        return code
    finally:
        lost = let_go_of_streams()
        if lost and code != 2:  # not told yet
            Display().error((lost,))
            raise SystemExit(2)


def _run_verb(arguments: Sequence[str] | None) -> int:
    options = _parse(arguments)
    is_first = int(os.environ.get("RANK", "0")) == 0  # of the processes that torchrun started
    display, code = Display(quiet=not is_first), 0
    try:
        code = options.verb(options, display) or 0
    except UserError as error:
        if error.is_told if isinstance(error, OfOneRank) else is_first:
            display.error(error.mistakes)
        return 2
    except Stopped:
        return 143
    except KeyboardInterrupt:
        display.error(("interrupted.",))
        return 130
    except BrokenPipeError:
        if options.verb in (_demo, _distill, _compare, _check):
            return 1  # what ran has been cut off
        # The reader of a result has seen enough: `potstill show RUN | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """As argparse does, but overrides may stand anywhere, also behind a flag."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [word for word in rest if word.startswith("-") or not hasattr(options, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="potstill", description="Distil a teacher into a student, and prove it."
    )
    parser.add_argument("--version", action="version", version=f"potstill {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, run: Any, summary: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        sub.set_defaults(verb=run)
        sub.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
        return sub

    demo = verb("demo", _demo, "distil the 135M demo teacher on the Python standard library")
    dist = verb("distill", _distill, "run a recipe, from corpus to receipt")
    dist.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML file; see `potstill schema`")
    comp = verb(
        "compare", _compare, "run the untouched student, plain training and KD under one budget, and compare"
    )
    comp.add_argument("recipe", type=Path, metavar="RECIPE", help="its section `compare` says how")
    for sub in (demo, dist, comp):
        sub.add_argument("overrides", nargs="*", metavar="a.b=value", help="set a field of the recipe")
        sub.add_argument("--out", type=Path, help="run directory to make; default runs/NAME")
        mode = sub.add_mutually_exclusive_group()
        mode.add_argument("--resume", action="store_true", help="go on with what was cut off there")
        if sub is comp:
            continue
        mode.add_argument(
            "--smoke", type=int, metavar="N", help="N steps, the projected time, nothing written"
        )

    check = verb("check", _check, "look for what would make the run worthless, before an hour is spent on it")
    check.add_argument("recipe", type=Path, nargs="?", metavar="RECIPE")
    check.add_argument("overrides", nargs="*", metavar="a.b=value", help="set a field of the recipe")
    check.add_argument("--sandbox", action="store_true", help="instead: does this machine shut a program in?")

    plan = verb("plan", _plan, "peak memory by what it holds, disk and time, from the configs alone")
    plan.add_argument("recipe", type=Path, metavar="RECIPE")
    plan.add_argument("overrides", nargs="*", metavar="a.b=value", help="set a field of the recipe")
    plan.add_argument("--measure", action="store_true", help="also run three steps, and project the time")

    capture.add_flags(
        verb("capture", capture.run_capture, "a recipe's teacher asked once: its targets into a folder"),
        verb("store", capture.run_store, "verify, show or merge folders of captured targets"),
    )

    gather.add_flags(
        verb("gather", gather.run_gather, "a corpus of the sources of packages, with their licences")
    )

    evaluate.add_flags(
        verb(
            "eval",
            evaluate.run_eval,
            "held-out CE, KL to the teacher and top-1 agreement of a run's student, or of a model",
        )
    )

    export.add_export_flags(
        verb("export", export.export, "a run's student as others run it: a folder and GGUF files")
    )
    export.add_publish_flags(
        verb("publish", export.publish, "a finished run to the Hub: card, licence, hashes; or why not")
    )

    show = verb("show", _show, "what a run was: receipt, and first, best and last of each metric")
    show.add_argument("run", type=Path, metavar="RUN")

    report = verb("report", _report, "runs or a comparison as one HTML page that needs nothing else")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory, or a comparison's")
    report.add_argument(
        "--out", type=Path, metavar="FILE", help="default RUN/report.html, of several ./report.html"
    )
    report.add_argument(
        "--tokens", type=int, default=512, metavar="N", help="held-out tokens to look at; default 512"
    )
    report.add_argument(
        "--no-models", action="store_true", help="load no model: no disagreement but a known one"
    )

    verb("schema", _schema, "the JSON schema of a recipe, for editors")
    return parser


def _demo(options: argparse.Namespace, display: Display) -> int:
    code = _run_recipe(Path(str(resources.files("potstill") / "demo.yaml")), options, display)
    if code == 0 and "run" in options:
        from potstill.publish.publish import note_card

        note_card(options.run, display)
    return code


def _distill(options: argparse.Namespace, display: Display) -> int:
    return _run_recipe(options.recipe, options, display)


def _run_recipe(recipe: Path, options: argparse.Namespace, display: Display) -> int:
    from potstill.recipe.load import load

    loaded = load(recipe, options.overrides)  # a typo is told before torch is imported
    from potstill.preflight.trial_steps import smoke
    from potstill.workflows.distill import distill

    if options.smoke is not None:
        if options.out is not None:
            raise UserError("--out: --smoke writes nothing, and --out would have no effect. Leave one out.")
        found = smoke(loaded, options.smoke, display, recipe.stem)
        if options.json:
            display.result(json.dumps(found, indent=2))
        else:
            display.result(
                f"{options.smoke} steps ran, loss {found['train/loss']:.4f}, {found['smoke/step_s']:.3g} s"
                f" a step;"
                f" the full run of {loaded.train.steps} steps takes about {clock(found['smoke/projected_s'])}"
            )
        return 0
    if loaded.compare is not None:
        return _compare(options, display, recipe)
    run = distill(
        recipe, overrides=options.overrides, out=options.out, resume=options.resume, display=display
    )
    if options.json:
        display.result(json.dumps({"run": str(run.path), **run.status(), **run.receipt()}, indent=2))
    options.run = run.path
    return 143 if run.status()["state"] == "stopped" else 0


def _compare(options: argparse.Namespace, display: Display, recipe: Path | None = None) -> int:
    from potstill.recipe.load import load

    recipe = recipe or options.recipe
    load(recipe, options.overrides)
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


def _check(options: argparse.Namespace, display: Display) -> int:
    if options.sandbox == (options.recipe is not None):
        given = (
            f"both {options.recipe} and --sandbox" if options.sandbox else "neither a recipe nor --sandbox"
        )
        raise UserError(f"check: {given} given. Give one of them.")
    if options.sandbox:
        return _check_sandbox(options, display)
    from potstill.recipe.load import load

    recipe = load(options.recipe, options.overrides)
    from potstill.build.setup import assemble
    from potstill.preflight.auto import settled
    from potstill.preflight.trial_steps import check
    from potstill.runs.run_dir import default_path
    from potstill.training.watchdog import cleaning

    findings = []
    with cleaning():
        cast = assemble(settled(recipe, display.note), display.note)
        for finding in check(cast, default_path(options.recipe.stem)):
            findings.append(finding)
            verdict, advice = ("ok ", "") if finding.ok else ("RED", f". {finding.advice}")
            if not options.json:
                display.result(f"{verdict}  {finding.name}: {finding.figure}{advice}")
    red = [finding.name for finding in findings if not finding.ok]
    if options.json:
        display.result(json.dumps([vars(finding) for finding in findings], indent=2))
    else:
        display.result(f"{len(findings) - len(red)} of {len(findings)} checks passed")
    return 2 if red else 0


def _check_sandbox(options: argparse.Namespace, display: Display) -> int:
    """Exit code 0 where a tier holds, 2 where none does."""
    from potstill.evals.sandbox.sandbox import survey

    tiers = survey()
    used = next((tier["tier"] for tier in tiers if tier["holds"]), None)
    if options.json:
        display.result(json.dumps({"used": used, "tiers": tiers}, indent=2))
        return 0 if used else 2
    for tier in tiers:
        display.result(f"{tier['tier']}: {'holds' if tier['holds'] else 'not here: ' + tier['why']}")
        for probe in tier["canaries"]:
            display.result(f"  {'ok ' if probe['shut'] else 'RED'}  {probe['name']}: {probe['found']}")
    display.result(f"used: {used or 'none; no program is run on this machine. See docs/sandbox.md'}")
    return 0 if used else 2


def _plan(options: argparse.Namespace, display: Display) -> int:
    """Exit code 0 where the run fits this machine, 2 where it does not."""
    from potstill.recipe.load import load

    recipe = load(options.recipe, options.overrides)
    from potstill.preflight.auto import choose, with_chunk
    from potstill.preflight.plan import available, capture_size, plan
    from potstill.preflight.plan_advice import advice

    chunk = choose(recipe)
    recipe = with_chunk(recipe, chunk.used)
    found, captured = plan(recipe), capture_size(recipe)
    memory, disk = available(recipe, Path("runs"))
    fits = found.fits(memory, disk)
    changes = [] if found.peak_bytes <= memory else advice(recipe, found, memory)
    if options.measure and fits:
        from potstill.preflight.trial_steps import smoke

        measured = smoke(recipe, min(3, recipe.train.steps), display, options.recipe.stem)
        found = dataclasses.replace(found, time_s=measured["smoke/projected_s"])
    if options.json:
        told = found.as_dict() | {"fits": fits, "chunk": chunk.as_dict()}
        told |= {"memory_available_bytes": memory, "disk_available_bytes": disk, "capture": captured}
        told["advice"] = [
            {"set": change.settings, "peak_bytes": change.peak_bytes, "fits": change.fits}
            for change in changes
        ]
        display.result(json.dumps(told, indent=2))
        return 0 if fits else 2

    rows = [[name, size(part), size(found.largest.get(name, part))] for name, part in found.parts.items()]
    display.result(aligned(["part", "at the peak", "at most"], [*rows, ["sum", size(found.peak_bytes), ""]]))
    display.result(f"the peak is in the {found.phase} on {found.device}; {size(memory)} are available")
    display.result(chunk.told)
    display.result(
        f"disk: {size(found.disk_peak_bytes)} in the run, {size(found.disk_bytes)} after; {size(disk)} free"
    )
    if captured is not None:
        each, tokens = captured["bytes_per_position"], captured["tokens"]
        wanted = f"{size(int(captured['bytes']))}, {each:.4g} bytes for each of about {tokens} tokens"
        display.result(f"`potstill capture` would keep {recipe.capture.name} targets: {wanted}")
    unknown = "not measured; `potstill plan RECIPE --measure` runs three steps"
    display.result(f"time: {unknown if found.time_s is None else clock(found.time_s)}")
    display.result("it fits" if fits else "it does not fit")
    for change in changes:
        less, verdict = size(found.peak_bytes - change.peak_bytes), "fits" if change.fits else "does not fit"
        display.result(f"  {' '.join(change.settings)}: {less} less, {size(change.peak_bytes)}, {verdict}")
    if found.peak_bytes > memory and not any(change.fits for change in changes):
        display.result(
            f"  no such change fits {size(memory)}: take smaller models, or a machine with more memory"
        )
    if found.disk_peak_bytes > disk:
        lacking = size(found.disk_peak_bytes - disk)
        display.result(f"  {lacking} too few on the disk: make room, or give --out a folder on another")
    return 0 if fits else 2


def _show(options: argparse.Namespace, display: Display) -> None:
    from potstill.runs.run_dir import RunDir, summary

    run = RunDir.open(options.run)
    found = summary(run)
    if options.json:
        display.result(
            json.dumps({"status": run.status(), "receipt": run.receipt(), "metrics": found}, indent=2)
        )
        return
    display.result(
        f"{run.path}: {run.status().get('state', 'unknown')} {run.status().get('why', '')}".rstrip()
    )
    for key, value in run.receipt().items():
        display.result(f"  {key}: {json.dumps(value) if isinstance(value, dict | list) else value}")
    rows = [[name, *(f"{of[when]:.6g}" for when in ("first", "best", "last"))] for name, of in found.items()]
    display.result(aligned(["metric", "first", "best", "last"], rows))


def _report(options: argparse.Namespace, display: Display) -> None:
    from potstill.report.build import report

    place = report(options.runs, options.out, options.tokens, not options.no_models, display)
    display.result(json.dumps({"report": str(place)}, indent=2) if options.json else str(place))


def _schema(options: argparse.Namespace, display: Display) -> None:
    from potstill.recipe.load import json_schema

    display.result(json.dumps(json_schema(), indent=2))


if __name__ == "__main__":
    sys.exit(main())
