"""The verbs that only read: `potstill show`, `potstill report` and `potstill schema`."""

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
        "--no-models", action="store_true", help="load no model; show a disagreement only if already measured"
    )


def run_show(options: argparse.Namespace, display: Display) -> None:
    from potstill.runs.run_dir import RunDir
    from potstill.runs.summary import summary

    run = RunDir.open(options.run)
    status, receipt, metrics = run.status(), run.receipt(), summary(run)
    if options.json:
        display.result(json.dumps({"status": status, "receipt": receipt, "metrics": metrics}, indent=2))
        return
    display.result(f"{run.path}: {status.get('state', 'unknown')} {status.get('why', '')}".rstrip())
    for key, value in receipt.items():
        display.result(f"  {key}: {json.dumps(value) if isinstance(value, dict | list) else value}")
    columns = ("first", "best", "last")
    rows = [[name, *(f"{values[column]:.6g}" for column in columns)] for name, values in metrics.items()]
    display.result(aligned(["metric", *columns], rows))


def run_report(options: argparse.Namespace, display: Display) -> None:
    from potstill.report.build import report

    path = report(options.runs, options.out, options.tokens, not options.no_models, display)
    display.result(json.dumps({"report": str(path)}, indent=2) if options.json else str(path))


def run_schema(options: argparse.Namespace, display: Display) -> None:
    from potstill.recipe.load import json_schema, load

    if options.recipe is not None:
        load(options.recipe)  # its plug-ins register what they define
    display.result(json.dumps(json_schema(), indent=2))
