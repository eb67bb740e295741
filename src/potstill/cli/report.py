"""The verbs `potstill report` and `potstill schema`, which only read."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from potstill.io.terminal import Display


def add_flags(report: argparse.ArgumentParser) -> None:
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory, or a comparison's")
    report.add_argument(
        "--out", type=Path, metavar="FILE", help="default RUN/report.html; ./report.html for several"
    )
    report.add_argument(
        "--tokens", type=int, default=512, metavar="N", help="held-out tokens to measure; default 512"
    )
    report.add_argument(
        "--no-models", action="store_true", help="load no model; show a disagreement only if already measured"
    )


def run_report(options: argparse.Namespace, display: Display) -> None:
    from potstill.report.build import report

    path = report(options.runs, options.out, options.tokens, not options.no_models, display)
    display.result(json.dumps({"report": str(path)}, indent=2) if options.json else str(path))


def run_schema(options: argparse.Namespace, display: Display) -> None:
    from potstill.recipe.load import json_schema, load

    if options.recipe is not None:
        load(options.recipe)  # its plug-ins register what they define
    display.result(json.dumps(json_schema(), indent=2))
