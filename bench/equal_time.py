"""Runs of equal processor time: an arm's recipe, as many steps of it as fit, in a process of its own, and a table.

What is charged is training: evaluations and checkpoints are off, and seconds are of the processor, so that other work
on the machine does not count. The student is that of the last step: an arm's worth is what its time made.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def trained(recipe: Path, text: str, seed: int, out: Path, *, control: bool = False) -> tuple[Path, float]:
    """Write the recipe and run it; its student, and the seconds of processor time that it took."""
    shutil.rmtree(out, ignore_errors=True)  # of an earlier try
    recipe.write_text(text)
    command = [sys.executable, __file__, str(recipe), "--out", str(out), "--seed", str(seed)]
    done = subprocess.run([*command, *["--control"] * control], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return out / "student", float(done.stdout.splitlines()[-1])


def steps_in(seconds: float, seconds_of: Mapping[int, float], least: int = 20) -> int:
    """Steps that fit, from the seconds of a short run and a longer one, whose difference has no start in it."""
    few, more = sorted(seconds_of)
    return max(int(seconds * (more - few) / (seconds_of[more] - seconds_of[few])), least)


def asked(model: Path, task: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """The result of `potstill eval --task`."""
    command = [sys.executable, "-m", "potstill", "eval", str(model), "--task", json.dumps(task)]
    done = subprocess.run([*command, "--out", str(out), "--json"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def record(line: dict[str, Any], file: Path | None) -> None:
    print(json.dumps(line), flush=True)
    if file is not None:
        with file.open("a") as lines:
            lines.write(json.dumps(line) + "\n")


def table(
    lines: Mapping[tuple[str, int], Mapping[str, float]], base: str, figures: Sequence[str]
) -> Iterator[str]:
    """For each arm the means over seeds, and of the first figure the difference from `base` by seed, with its interval
    of 95 % (Student's t).
    """
    from scipy import stats

    for arm in dict.fromkeys(name for name, _ in lines):
        of = {seed: line for (name, seed), line in lines.items() if name == arm}
        means = {name: statistics.mean(line[name] for line in of.values()) for name in figures}
        shown = ", ".join(f"{name} {value:.3f}" for name, value in means.items())
        behind = [line[figures[0]] - lines[base, seed][figures[0]] for seed, line in of.items()]
        if arm != base and behind[1:]:
            half = float(stats.t.ppf(0.975, len(behind) - 1)) * statistics.stdev(behind) / len(behind) ** 0.5
            mean = statistics.mean(behind)
            shown += f"; minus {base} {mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"
        yield f"{arm:>24} {shown} ({len(of)} seeds)"


def keep_the_last() -> None:
    """From now on a run is evaluated at its end alone, so that its student is that of the last step."""
    from potstill.training import loop

    loop.evaluation_due = lambda outcome, recipe: outcome.evaluated < outcome.step == recipe.train.num_steps


def child(options: argparse.Namespace) -> None:
    """The run; prints the seconds of processor time that it took."""
    import torch

    torch.set_num_threads(1)
    from potstill import distill
    from potstill.models.student import Student
    from potstill.workflows import distill as workflow

    keep_the_last()
    if options.control:
        forward = Student.forward

        def without_teacher(self: Student, batch: Any, targets: Any, *rest: Any) -> dict[str, Any]:
            """Every sampled token gets the advantage -1: its log-probability is lowered."""
            objective = self.objective
            self.objective = replace(objective, kd_weight=0.0, ce_weight=1.0)
            try:
                plain = forward(self, replace(batch, is_rollout=False), targets, *rest)
            finally:
                self.objective = objective
            nll = plain["ce"].detach()
            kd = torch.zeros_like(nll)  # not asked for
            return {"loss": -plain["loss"], "kd": kd, "rollout_nll": nll, "rollout_kd": kd}

        def train(*given: Any, **options: Any) -> Any:
            """The checks before it would end the run: this is no loss that they let pass."""
            Student.forward = without_teacher  # type: ignore[method-assign]
            return before(*given, **options)

        before, workflow.train = workflow.train, train
    overrides = [f"train.seed={options.seed}", "guard.loss_ceiling=1e6", "eval.every=0", "train.save_every=0"]
    distill(options.recipe, overrides=overrides, out=options.out)
    print(time.process_time())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--control", action="store_true", help="the student's rows without a teacher")
    child(parser.parse_args())


if __name__ == "__main__":
    main()
