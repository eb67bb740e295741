"""Which settings make the better student in the same time?

The pair of bench/targets.py, from the teacher's hidden states in float32, rows of 2 x 256. Every arm changes
one thing of a base (12 layers, forward KL, temperature 1, 0.9 KD + 0.1 CE, AdamW 5e-4) and trains for the
processor time that the base takes for --steps: its number of steps comes from two trial steps of its own, and
schedules are stretched to it. Held-out KL is at temperature 1, whatever was trained.

    python bench/study.py --steps 30 --seeds 0

It goes on where it was cut off: results are lines of --append, and what is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import targets

from potstill.build.resolve import resolve
from potstill.build.setup import RunSetup, set_up
from potstill.evals.heldout import heldout
from potstill.recipe.load import load
from potstill.training.loop import Hooks, train

TRIAL_STEPS = 3  # the first is not counted
ARMS: dict[str, list[str]] = {
    "base": [],
    "8 layers": ["student.layers=8"],
    "16 layers": ["student.layers=16"],
    "21 layers": ["student.layers=21"],
    "21 layers, every other way": ["student.layers=21", "student.rule=even"],
    "ffn 768": ["student.ffn_width=768"],
    "21 layers, ffn 768": ["student.layers=21", "student.ffn_width=768"],
    "16 layers, ffn 1024": ["student.layers=16", "student.ffn_width=1024"],
    "temperature 2": ["objective.temperature=2"],
    "temperature 4": ["objective.temperature=4"],
    "KD alone": ["objective.kd_weight=1", "objective.ce_weight=0"],
    "0.5 KD + 0.5 CE": ["objective.kd_weight=0.5", "objective.ce_weight=0.5"],
    "CE alone": ["objective.kd_weight=0", "objective.ce_weight=1"],
    "reverse KL": ["objective.divergence=reverse_kl"],
    "JSD 0.5": ["objective.divergence={name: jsd, beta: 0.5}"],
    "skew KL 0.1": ["objective.divergence={name: skew_kl, alpha: 0.1}"],
    "total variation": ["objective.divergence=tvd"],
    "Muon": ["train.optimizer=muon"],
    "bfloat16": ["train.precision=bfloat16"],
    "Muon, bfloat16": ["train.optimizer=muon", "train.precision=bfloat16"],
}


def setup_of(options: argparse.Namespace, arm: str, seed: int, steps: int) -> RunSetup:
    store = f"teacher={{name: store, path: {targets.the_store(options).absolute()}}}"
    given = [*targets.overrides(options), store, f"train.seed={seed}", "train.rows_per_step=2", *ARMS[arm]]
    warmup = f"train.warmup={max(steps // 10, 1)}"
    return set_up(resolve(load(targets.RECIPE, [*given, f"train.steps={steps}", warmup])), lambda text: None)


def trained(setup: RunSetup, seed: int) -> float:
    """Seconds of processor time of a step, the first left out."""
    clock: list[float] = []
    hooks = Hooks(
        lambda step: {"heldout/loss": math.inf}, lambda *_: clock.append(time.process_time()), lambda *_: None
    )
    teacher = setup.teacher if setup.recipe.objective.kd_weight else None
    train(setup.student, teacher, setup.data(), setup.recipe, hooks)
    return (clock[-1] - clock[0]) / (len(clock) - 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30, help="of the base")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--corpus", default="unittest", help="folder of the standard library")
    parser.add_argument("--store", type=Path, default=Path("targets/bench"))
    parser.add_argument("--append", type=Path, default=Path("bench/results.jsonl"))
    options = parser.parse_args()
    done = (
        [json.loads(line) for line in options.append.read_text().splitlines()]
        if options.append.exists()
        else []
    )
    done = [line for line in done if line["bench"] == "study" and line["base_steps"] == options.steps]
    known = {(line["arm"], line["seed"]) for line in done}
    base_s = trained(setup_of(options, "base", 0, TRIAL_STEPS), 0)
    for seed in options.seeds:
        for arm in options.arms:
            if (arm, seed) not in known:
                targets.append(options, measured(options, arm, seed, base_s))
    return 0


def measured(options: argparse.Namespace, arm: str, seed: int, base_s: float) -> dict[str, Any]:
    step_s = base_s if arm == "base" else trained(setup_of(options, arm, seed, TRIAL_STEPS), seed)
    steps = max(round(options.steps * base_s / step_s), 2)
    setup = setup_of(options, arm, seed, steps)
    before = heldout(setup.student, setup.teacher, setup.corpus.heldout, 4)
    taken_s = trained(setup, seed)
    after = heldout(setup.student, setup.teacher, setup.corpus.heldout, 4)
    kept = ("heldout/kl", "heldout/ce", "heldout/agreement")
    return {
        "bench": "study",
        "arm": arm,
        "seed": seed,
        "base_steps": options.steps,
        "steps": steps,
        "cpu_s": round(taken_s * steps, 1),
        "million_weights": round(sum(p.numel() for p in setup.student.parameters()) / 1e6, 1),
        "before": {name: round(before[name], 4) for name in kept},
        "after": {name: round(after[name], 4) for name in kept},
    }


if __name__ == "__main__":
    sys.exit(main())
