"""The parser and the exit codes. Torch is imported only inside a verb that needs it, so that --help and the report of
a typo are instant.

Exit codes: 0 success; 2 user errors (one line each on stderr), a failed check, or a plan that does not fit; 130
interrupted before training; 143 stopped by a signal, with a checkpoint saved. Anything else is a bug and shows its
traceback.
Results go to stdout and progress to stderr, so that `--json` can be piped.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from potstill import __version__
from potstill.cli import (
    capture,
    chat,
    check,
    distill,
    evaluate,
    export,
    init,
    profile,
    report,
    rows,
    runs,
    show,
    trim,
    write,
)
from potstill.cli.completion import SHELLS, PrintCompletion
from potstill.cli.spelling import meant_flag, meant_verb
from potstill.errors import RankError, Stopped, UserError
from potstill.io.terminal import Display, flush_streams, reserve_streams


def main(arguments: Sequence[str] | None = None) -> int:
    code = None
    reserve_streams()
    try:
        code = _run_verb(arguments)
        return code
    finally:
        lost = flush_streams()
        if lost and code != 2:  # with code 2 an error has been printed already
            Display().error((lost,))
            raise SystemExit(2)


def _run_verb(arguments: Sequence[str] | None) -> int:
    options = _parse(arguments)
    is_first = int(os.environ.get("RANK", "0")) == 0  # of the processes that torchrun started
    display, code = Display(quiet=not is_first), 0
    try:
        code = options.verb(options, display) or 0
    except UserError as error:
        # Rank 0 speaks for all of them, unless the error is one that it may not have seen.
        if error.is_reported if isinstance(error, RankError) else is_first:
            display.error(error.mistakes)
        return 2
    except Stopped:
        return 143
    except KeyboardInterrupt:
        display.error(("interrupted.",))
        return 130
    except BrokenPipeError:
        if options.verb in (distill.run_demo, distill.run_distill, distill.run_compare, check.run_check):
            return 1  # the work itself was interrupted
        # The reader closed the pipe after what it needed: `potstill show RUN | head`. Not an error; /dev/null
        # takes the rest, so that Python's flush at exit does not raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Like argparse, but overrides may come anywhere, also after a flag."""
    parser = _parser()
    verbs = _verbs_of(parser)
    given: list[str] = distill.spell_resume(sys.argv[1:] if arguments is None else arguments)
    named = next((word for word in given if not word.startswith("-")), "")
    if named and named not in verbs and (meant := meant_verb(named, verbs)):
        parser.error(f"no verb {named!r}. Did you mean {meant}?")
    options, rest = parser.parse_known_args(given)
    unknown = [word for word in rest if word.startswith("-") or not hasattr(options, "overrides")]
    if unknown:
        hint = meant_flag(
            unknown[0], given, verbs[named]._option_string_actions, takes_fields=hasattr(options, "overrides")
        )
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _verbs_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (verbs,) = (each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    return dict(verbs.choices)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="potstill", description="Distil a teacher into a student, and prove it."
    )
    parser.add_argument("--version", action="version", version=_versions())
    parser.add_argument(
        "--completion",
        choices=SHELLS,
        action=PrintCompletion,
        help="print what this shell needs to complete verbs, options, files and a recipe's fields",
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, run: Any, summary: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        sub.set_defaults(verb=run)
        sub.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
        return sub

    _add_verbs_of_training(verb)
    _add_verbs_of_results(verb)
    return parser


def _versions() -> str:
    """potstill's, and those that a report of a fault needs; without importing them."""
    others = []
    for name in ("torch", "transformers", "tokenizers", "safetensors"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            others.append(f"{name} {metadata.version(name)}")
    return f"potstill {__version__} (Python {platform.python_version()}, {', '.join(others)})"


def _add_verbs_of_training(verb: Callable[..., argparse.ArgumentParser]) -> None:
    distill.add_flags(
        verb("demo", distill.run_demo, "distil the 135M demo teacher on the Python standard library"),
        verb("distill", distill.run_distill, "run a recipe, from corpus to receipt"),
        verb(
            "compare",
            distill.run_compare,
            "run the untouched student, plain training and KD under one budget, and compare",
        ),
    )
    init.add_flags(
        verb("init", init.run_init, "write a recipe for two models and data, with a reason for each value")
    )
    check.add_flags(
        verb("check", check.run_check, "find what would make the run worthless, before time is spent on it"),
        verb("plan", check.run_plan, "estimate peak memory by part, disk and time from the configs alone"),
    )
    rows.add_flags(
        verb("rows", rows.run_rows, "print what a recipe trains on, with the tokens that bear loss marked")
    )
    capture.add_flags(
        verb("capture", capture.run_capture, "run a recipe's teacher once and store its targets in a folder"),
        verb("store", capture.run_store, "verify, show, merge, push or pull captured targets"),
    )
    write.add_flags(
        verb("write", write.run_write, "have a recipe's teacher answer its prompts: a corpus to train on")
    )
    trim.add_flags(
        verb("trim", trim.run_trim, "write a recipe's teacher with fewer tokens: those that its corpus needs")
    )


def _add_verbs_of_results(verb: Callable[..., argparse.ArgumentParser]) -> None:
    evaluate.add_flags(
        verb(
            "eval",
            evaluate.run_eval,
            "measure held-out CE, KL to the teacher and top-1 agreement of a run's student or any model",
        )
    )
    chat.add_flags(verb("chat", chat.run_chat, "talk to a run's student, or any model, in the terminal"))
    export.add_export_flags(
        verb("export", export.export, "write a run's student as a Hugging Face folder and GGUF files")
    )
    export.add_publish_flags(
        verb("publish", export.publish, "upload a finished run to the Hub with a model card, or say why not")
    )
    show.add_flags(
        verb("show", show.run_show, "print what came out of a run: metrics, model, data, warnings")
    )
    profile.add_flags(
        verb(
            "profile",
            profile.run_profile,
            "measure size, speed, memory and acceptance of a run's student beside its teacher's",
        )
    )
    report.add_flags(
        verb("report", report.run_report, "render runs or a comparison as one self-contained HTML page")
    )
    runs.add_flags(
        verb("runs", runs.run_runs, "list runs with their state, step, best held-out KL, size and age")
    )
    schema = verb("schema", report.run_schema, "print the JSON schema of a recipe, for editors")
    schema.add_argument(
        "recipe", type=Path, nargs="?", metavar="RECIPE", help="with the plug-ins of this one"
    )


if __name__ == "__main__":
    sys.exit(main())
