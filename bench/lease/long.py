"""Stage 5: does the demo pair's student learn, and how far does it come in the time that is left?

    kd, ce    a few hundred steps of distillation and of plain training, from the same student on the same rows
    long      as many steps of distillation as fit into the rest of --seconds, by what a step of `kd` took

The student before training and after `long` are kept as folders for stage 6, and the latter in bfloat16 as parts
of --mib that can be taken home. A run that is over its time is stopped and leaves its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import parts

KEPT = ("metrics.jsonl", "receipt.json", "resolved.yaml", "status.json")
PLAIN = ["objective.kd_weight=0", "objective.ce_weight=1"]
SPARE_S = 15  # to stop a run or to export its student


class Stage:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.started = options, time.monotonic()
        self.runs, self.results = options.work / "runs", options.results

    @property
    def left_s(self) -> float:
        return float(self.options.seconds - (time.monotonic() - self.started))

    def run(self, name: str, steps: int, overrides: list[str], warmup: int) -> float:
        """One run to its end, or until the time is over. Seconds that it took.

        Raises:
            SystemExit: it failed, or was stopped before it had taken a step.
        """
        began, out = time.monotonic(), self.runs / name
        given = [*self.options.overrides, *overrides, f"train.steps={steps}", f"train.warmup={warmup}"]
        command = [sys.executable, "-m", "potstill", "distill", str(self.options.recipe), *given]
        child = subprocess.Popen([*command, "--out", str(out)])
        try:
            code = child.wait(max(self.left_s - SPARE_S, 1))
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGTERM)
            code = child.wait(SPARE_S)
        kept = self.results / f"5-{name}"
        kept.mkdir(parents=True, exist_ok=True)
        for file in KEPT:
            if (out / file).exists():
                shutil.copy(out / file, kept)
        print(f"{name}: exit {code} after {time.monotonic() - began:.1f} s", flush=True)
        if code == -signal.SIGTERM:
            sys.exit(f"{name}: no time was left for it")
        if code not in (0, 143):
            sys.exit(code)
        return time.monotonic() - began

    def step_s(self, name: str) -> float:
        lines = map(json.loads, (self.runs / name / "metrics.jsonl").read_text().splitlines())
        return statistics.median(line["speed/step_s"] for line in lines if "speed/step_s" in line)


def untouched(options: argparse.Namespace) -> None:
    """Save the student before training."""
    from potstill.build.resolve import resolve
    from potstill.build.setup import process_of, set_up
    from potstill.recipe.load import load

    resolved = resolve(load(options.recipe, options.overrides))
    with process_of(resolved.recipe):
        setup = set_up(resolved, lambda text: print(text, flush=True))
        setup.student.save(options.work / "models" / "untouched", setup.tokenizer)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    parser.add_argument("--results", type=Path, required=True, help="for metrics and receipts")
    parser.add_argument("--work", type=Path, required=True, help="for runs, models and parts")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--arm-steps", type=int, default=200)
    parser.add_argument("--most-steps", type=int, default=100_000, help="of the long run")
    parser.add_argument("--mib", type=float, default=15.9, help="of a part of the student")
    options = parser.parse_args()
    stage, arm_steps = Stage(options), options.arm_steps
    found: dict[str, Any] = {}
    warmup = max(arm_steps // 10, 1)
    spent = stage.run("kd", arm_steps, [], warmup)
    step_s = stage.step_s("kd")
    found |= {"step_s": step_s, "before_and_after_s": spent - arm_steps * step_s}
    stage.run("ce", arm_steps, PLAIN, warmup)
    untouched(options)
    # A longer run evaluates five times more, which the tenth that is left free is for.
    steps = int(0.9 * (stage.left_s - found["before_and_after_s"] - SPARE_S) / step_s)
    found["long_steps"] = steps = min(steps, options.most_steps)
    if steps > arm_steps:
        every = f"eval.every={max(steps // 6, 1)}"
        stage.run("long", steps, [every, f"train.save_every={max(steps // 3, 1)}"], max(steps // 20, 1))
    else:
        found["not_run"] = f"long: {stage.left_s:.0f} s are left, {step_s:.3f} s a step"
    (stage.results / "5-long.json").write_text(json.dumps(found, indent=1))
    if (stage.runs / "long" / "receipt.json").exists():
        exported = options.work / "models" / "student"
        command = [sys.executable, "-m", "potstill", "export", str(stage.runs / "long"), "--format", "hf"]
        subprocess.run([*command, "--dtype", "bfloat16", "--out", str(options.work / "exported")], check=True)
        shutil.move(next(path.parent for path in options.work.glob("exported/**/config.json")), exported)
        back = options.work / "back"
        parts.split(exported, back, int(options.mib * 2**20), halves=True)
        # Into the one file of results, so that there are fewer to take home.
        for record in (parts.LIST, parts.HALVES):
            shutil.copy(back / record, stage.results / f"5-{record}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
