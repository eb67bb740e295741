"""The verbs that read what is already there: `potstill show`, `potstill report` and `potstill schema`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from potstill.io.terminal import Display, aligned


def add_flags(show: argparse.ArgumentParser, report: argparse.ArgumentParser) -> None:
    show.add_argument("run", type=Path, metavar="RUN")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory, or a comparison's")
    report.add_argument(
        "--out", type=Path, metavar="FILE", help="default RUN/report.html; ./report.html for several"
    )
    report.add_argument(
        "--tokens", type=int, default=512, metavar="N", help="held-out tokens to measure; default 512"
    )
    report.add_argument(
        "--no-models", action="store_true", help="load no model: show only a disagreement measured before"
    )


def run_show(options: argparse.Namespace, display: Display) -> None:
    from potstill.runs.run_dir import RunDir, summary

    run = RunDir.open(options.run)
    status, receipt, metrics = run.status(), run.receipt(), summary(run)
    if options.json:
        display.result(json.dumps({"status": status, "receipt": receipt, "metrics": metrics}, indent=2))
        return
    display.result(f"{run.path}: {status.get('state', 'unknown')} {status.get('why', '')}".rstrip())
    for key, value in receipt.items():
        display.result(f"  {key}: {json.dumps(value) if isinstance(value, dict | list) else value}")
    columns = ("first", "best", "last")
    rows = [[name, *(f"{of[column]:.6g}" for column in columns)] for name, of in metrics.items()]
    display.result(aligned(["metric", *columns], rows))


def run_report(options: argparse.Namespace, display: Display) -> None:
    from potstill.report.build import report

    place = report(options.runs, options.out, options.tokens, not options.no_models, display)
    display.result(json.dumps({"report": str(place)}, indent=2) if options.json else str(place))


def run_schema(options: argparse.Namespace, display: Display) -> None:
    from potstill.recipe.load import json_schema

    display.result(json.dumps(json_schema(), indent=2))
