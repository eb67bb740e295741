"""The verb `potstill profile`: what a run has gained, measured on this machine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from potstill.errors import UserError
from potstill.io.terminal import Display

FLAGS = ("threads", "repeats", "prompt_tokens", "new_tokens", "device", "dtype")


def add_flags(profile: argparse.ArgumentParser) -> None:
    def number(flag: str, text: str) -> None:
        profile.add_argument(flag, type=int, default=argparse.SUPPRESS, metavar="N", help=text)

    profile.add_argument("run", type=Path, metavar="RUN")
    number("--threads", "of each model; default: as many as PyTorch takes")
    number(
        "--repeats",
        "of each measurement, at least 3; default 11; those of the run's earlier profiles are kept",
    )
    number("--prompt-tokens", "read before the first new one; default 128")
    number("--new-tokens", "decoded behind them; default 32")
    profile.add_argument(
        "--fresh", action="store_true", help="start a new profile, without the repeats of earlier ones"
    )
    profile.add_argument("--device", default=argparse.SUPPRESS, help="auto, cpu, cuda or cuda:N")
    profile.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default=argparse.SUPPRESS,
        help="of the weights in Transformers; default auto: float32 on a CPU, bfloat16 on a GPU",
    )


def run_profile(options: argparse.Namespace, display: Display) -> None:
    from potstill.runs.gains import lines
    from potstill.workflows.profile import ProfileSettings, profile

    given = {name: value for name, value in vars(options).items() if name in FLAGS}
    settings = ProfileSettings(**given)
    if mistakes := settings.mistakes():
        raise UserError(*(f"--{name.replace('_', '-')} {problem}" for name, problem in mistakes.items()))
    found = profile(options.run, settings, display.note, fresh=options.fresh)
    if options.json:
        display.result(json.dumps(found, indent=2))
        return
    display.result("\n".join(lines(found)))
    display.note(f"all of it: {options.run / 'profile.json'}")
