"""Which road gives the best student of recipes/task? Arms of equal processor time, in the folder of `make task`.

    untouched       the cut student before any training
    CE              on the data's right records
    CE answers      on the records that the teacher writes
    KD              forward KL on the data, from the store
    on-policy       half of the time KD, then half of the rows the student's own, with reverse KL
    control         the same, but the student's rows without a teacher: every sampled token gets the advantage -1

    python bench/task_arms.py run runs/task [--seconds 900] [--seeds 0,1,2] [--arms CE,KD] [--asked N] [--append FILE]
    python bench/task_arms.py table FILE

Accuracy is of greedy answers to the test notes, `brier` and `ece` of the answers' own probabilities; KL is on the
held-out rows. Seconds are of one core's processor time, without what it takes to write the teacher's answers (CE
answers) and to store its targets (KD).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import equal_time
import yaml

RECIPES = Path(__file__).resolve().parent.parent / "recipes" / "task"
PLAIN = {"kd_weight": 0, "ce_weight": 1, "chunk": 256}
OWN = {"divergence": "reverse_kl", "kd_weight": 1, "ce_weight": 0, "chunk": 256}
ROLLOUTS = {"fraction": 0.5, "max_new_tokens": 64}
WRITE = {"max_new_tokens": 64, "temperature": 0, "prompts_at_once": 64}
ARMS = ("untouched", "CE", "CE answers", "KD", "on-policy", "control")
TEACHER = Path("teacher", "student")
"""In the folder."""
PER_STEP = 4, 16
"""Steps of the two short runs whose difference in seconds is that of the steps between."""
FIGURES = ("accuracy", "heldout_kl", "brier", "ece")


class Arms:
    """The arms of one folder."""

    def __init__(self, folder: Path, seconds: float, asked: int | None) -> None:
        self.folder, self.seconds, self.place = folder, seconds, folder / "arms"
        self.place.mkdir(exist_ok=True)
        self.base = yaml.safe_load((RECIPES / "student.yaml").read_text())
        self.base["corpus"]["path"] = str(folder / "data" / "train.jsonl")
        self.live = {"name": "torch", "model": str(folder / TEACHER)}
        self.stored = {"name": "store", "path": str(folder / "targets"), "model": self.live["model"]}
        sys.path.insert(0, str(RECIPES))
        from make import SYSTEM

        self.task = {"source": "jsonl", "path": str(folder / "data" / "test.jsonl"), "system": SYSTEM}
        self.task |= {"question": "question", "answer": "answer", "cluster": "sentence"}
        self.task |= {"max_new_tokens": 80, "size": asked}
        self.per_step: dict[str, dict[int, float]] = {}
        """By part: the seconds of its two short runs, which are of the first seed."""
        self.base["student"] = {"name": "checkpoint", "model": str(self.start())}

    def start(self) -> Path:
        """The student that is cut from the teacher, before any training: every arm's, cut once."""
        start = self.place / "start" / "student"
        if not start.exists():
            self.trained("start", {"teacher": self.stored}, 0, 1, 1e-12, start.parent)
        return start

    def of(self, name: str, seed: int) -> dict[str, Any]:
        """One arm's student, and its figures."""
        line: dict[str, Any] = {"bench": "task_arms", "arm": name, "seed": seed, "seconds": self.seconds}
        if name == "untouched":
            return line | self.score(self.start())
        if name == "CE":
            parts = [({"teacher": self.stored, "objective": PLAIN}, self.seconds)]
        elif name == "CE answers":
            corpus = self.base["corpus"] | {"path": str(self.answers())}
            parts = [({"teacher": self.live, "objective": PLAIN, "corpus": corpus}, self.seconds)]
        else:
            share = 1.0 if name == "KD" else 0.5
            parts = [({"teacher": self.stored}, share * self.seconds)]
            if name != "KD":
                own = {"teacher": self.live, "objective": OWN, "rollouts": ROLLOUTS}
                parts.append((own, 0.5 * self.seconds))
        student, spent, steps = None, 0.0, []
        for number, (changes, seconds) in enumerate(parts):
            if student is not None:
                changes = changes | {"student": {"name": "checkpoint", "model": str(student)}}
            student, took, count = self.in_time(f"{name}-{number}", changes, seed, seconds)
            spent, steps = spent + took, [*steps, count]
        assert student is not None
        return line | {"processor_s": round(spent, 1), "steps": steps} | self.score(student)

    def in_time(
        self, name: str, changes: dict[str, Any], seed: int, seconds: float
    ) -> tuple[Path, float, int]:
        """As many steps as fit."""
        if name not in self.per_step:
            self.per_step[name] = {steps: self.trained(name, changes, seed, steps)[1] for steps in PER_STEP}
        steps = equal_time.steps_in(seconds, self.per_step[name])
        student, spent = self.trained(name, changes, seed, steps)
        return student, spent, steps

    def trained(
        self,
        name: str,
        changes: dict[str, Any],
        seed: int,
        steps: int,
        lr: float | None = None,
        out: Path | None = None,
    ) -> tuple[Path, float]:
        own = self.base | changes
        train = self.base["train"] | {"steps": steps, "warmup": max(min(30, steps // 10), 1)}
        own["train"] = train | ({"lr": lr} if lr is not None else {})
        out = out or self.place / f"{name.replace(' ', '-')}-{seed}-{steps}"
        text = yaml.safe_dump(own)
        control = name == "control-1"
        return equal_time.trained(out.with_suffix(".yaml"), text, seed, out, control=control)

    def answers(self) -> Path:
        """What the teacher writes for the training notes, once."""
        out = self.folder / "answers"
        if not (out / "corpus.jsonl").exists():
            own = self.base | {"teacher": self.live, "write": WRITE}
            recipe = self.place / "write.yaml"
            recipe.write_text(yaml.safe_dump(own))
            subprocess.run(
                [sys.executable, "-m", "potstill", "write", str(recipe), "--out", str(out)], check=True
            )
        return out / "corpus.jsonl"

    def score(self, student: Path) -> dict[str, float]:
        found = equal_time.asked(student, self.task, student.parent / "asked")
        recipe = self.place / "measure.yaml"
        recipe.write_text(yaml.safe_dump(self.base | {"teacher": self.stored}))
        command = [sys.executable, "-m", "potstill", "eval", str(student), "--recipe", str(recipe), "--json"]
        held = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        line = {"accuracy": found["accuracy"]["value"], "heldout_kl": held["heldout/kl"]}
        return line | {name: found["calibration"][name] for name in ("brier", "ece")}


def table(lines: list[dict[str, Any]]) -> Iterator[str]:
    of = {(line["arm"], line["seed"]): line for line in lines if line.get("bench") == "task_arms"}
    return equal_time.table(of, "CE", FIGURES)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run")
    run.add_argument("folder", type=lambda text: Path(text).absolute())
    run.add_argument("--seconds", type=float, default=900.0)
    run.add_argument("--seeds", default="0,1,2")
    run.add_argument("--arms", default=",".join(ARMS))
    run.add_argument("--asked", type=int, help="test notes that are asked (default: all)")
    run.add_argument("--append", type=Path)
    shown = verbs.add_parser("table")
    shown.add_argument("file", type=Path)
    options = parser.parse_args()
    if options.verb == "table":
        print(*table([json.loads(line) for line in options.file.read_text().splitlines()]), sep="\n")
        return
    arms, lines = Arms(options.folder, options.seconds, options.asked), []
    for seed in map(int, options.seeds.split(",")):
        for name in options.arms.split(","):
            lines.append(arms.of(name, seed))
            equal_time.record(lines[-1], options.append)
    print(*table(lines), sep="\n")


if __name__ == "__main__":
    main()
