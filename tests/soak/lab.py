"""Recipes of two small real students, starts of them, and the account of a finished run."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from potstill.runs.run_dir import RunDir
from potstill.training.checkpoint import verify
from soak.forkserver import End, ForkServer

LONG = {"steps": 300 if "SOAK" in os.environ else 40, "save_every": 10, "every": 15, "micro": 4}
SHORT = {"steps": 12, "save_every": 3, "every": 5, "micro": 2}
OWN = {"steps": 16, "save_every": 4, "every": 8, "micro": 2, "own_every": 2}
"""Half of the rows are the student's."""
ROWS_PER_STEP = 4
KILLED = -signal.SIGKILL
WHEN_AND_WHERE = (
    "commit",
    "uncommitted_changes",
    "environment",
    "training_seconds",
    "total_seconds",
    "peak_memory_gib",
    "plan",
    "check",
)


def count(small: int, full: int) -> int:
    """How often: `small` under `make test`, `full` under `make soak`."""
    return full if "SOAK" in os.environ else small


@dataclass
class Lab:
    """Recipes, and starts of them."""

    folder: Path
    server: ForkServer
    seconds: dict[Path, float] = field(default_factory=dict)

    def recipe(self, student: str, plan: dict[str, int]) -> Path:
        path = self.folder / f"{student}-{plan['steps']}{'-own' if 'own_every' in plan else ''}.yaml"
        sections = {
            "corpus": f"{{name: text, path: {self.folder}/texts, tokens_per_row: 32, heldout_rows: 4}}",
            "teacher": f"{{name: torch, model: {self.folder}/teacher}}",
            "student": f"{{name: checkpoint, model: {self.folder}/{student}}}",
            "objective": "{chunk: 64}",
            "train": f"{{steps: {plan['steps']}, rows_per_step: {ROWS_PER_STEP}, lr: 1e-2, warmup: 4,"
            f" rows_per_micro_batch: {plan['micro']}, save_every: {plan['save_every']}, device: cpu}}",
            "eval": f"{{every: {plan['every']}}}",
        }
        if "own_every" in plan:
            own = f"fraction: 0.5, every: {plan['own_every']}, max_new_tokens: 8, prompt_tokens: 6"
            sections["rollouts"] = f"{{{own}}}"
        path.write_text("".join(f"{key}: {value}\n" for key, value in sections.items()))
        return path

    def start(self, recipe: Path, out: Path, **how: Any) -> End:
        """What whoever restarts a run does: `--resume` where there is one, a new start where there is none."""
        out.parent.mkdir(parents=True, exist_ok=True)
        resume = ["--resume"] if (out / "resolved.yaml").exists() else []
        return self.server.start(["distill", str(recipe), "--out", str(out), *resume], **how)

    def finish(self, recipe: Path, out: Path) -> End:
        end = self.start(recipe, out)
        assert end.code == 0, end.told
        return end

    def whole(self, student: str, plan: dict[str, int]) -> Path:
        """The uninterrupted run, once a session; `calls` and `counts` beside it say what it did."""
        recipe = self.recipe(student, plan)
        out = recipe.with_suffix("")
        if not out.exists():
            calls, counts = out.with_suffix(".calls"), out.with_suffix(".counts")
            end = self.start(recipe, out, watch=out, calls=calls, counts=counts)
            assert end.code == 0, end.told
            self.seconds[out] = end.seconds
        return out

    def wall(self, student: str, plan: dict[str, int]) -> float:
        """Seconds that the uninterrupted run takes."""
        return self.seconds[self.whole(student, plan)]

    def counts(self, student: str, plan: dict[str, int]) -> dict[str, int]:
        """How often the uninterrupted run comes to each phase."""
        return dict(json.loads(self.whole(student, plan).with_suffix(".counts").read_text()))

    def calls(self, student: str, plan: dict[str, int]) -> list[str]:
        """Its file-system calls, in order."""
        return list(json.loads(self.whole(student, plan).with_suffix(".calls").read_text()))

    def assert_same(
        self, run: Path, student: str, plan: dict[str, int], *, but_for_older_checkpoints: bool = False
    ) -> None:
        """`run` is the uninterrupted one, bit for bit and file for file, and nothing lies beside it.

        A run that was stopped has saved the step it was stopped at, maybe before an evaluation was made up
        for; `but_for_older_checkpoints` allows that, and compares weights, moments and random state.
        """
        for place in (run / "checkpoints").iterdir():
            verify(place)
        ours, theirs = account(run), account(self.whole(student, plan))
        if but_for_older_checkpoints:
            newest = f"checkpoints/{plan['steps']:08d}"
            for told in (ours, theirs):
                for name in [n for n in told["names"] if n.startswith("checkpoints/")]:
                    if not name.startswith(newest):
                        told["names"].remove(name)
                    if not name.startswith(newest) or name.endswith("state.json"):
                        told.pop(name, None)
        found = differing(ours, theirs)
        assert not found, f"not as in the uninterrupted run: {found}"
        beside = sorted(path.name for path in run.parent.iterdir())
        assert beside == [run.name], f"left beside the run: {beside}"


def account(run: Path) -> dict[str, Any]:
    """All of a finished run that may not depend on how often it was cut off: everything but wall times."""
    names = sorted(str(path.relative_to(run)) for path in run.rglob("*"))
    told: dict[str, Any] = {"names": names}
    for name in names:
        path = run / name
        if path.is_dir() or name in ("environment.json", "code.diff", "metrics.jsonl"):
            continue
        if path.name == "manifest.json":
            continue  # the hash of state.json, which has wall times in it
        value: Any = path.read_bytes()
        if path.suffix == ".json" and "student" not in path.parts:
            value = json.loads(value)
        told[name] = value
    for name, value in told.items():
        if name.endswith("state.json"):
            del value["outcome"]["seconds"]
    for name in WHEN_AND_WHERE:
        del told["receipt.json"][name]
    told["metrics"] = [
        {name: value for name, value in line.items() if not name.startswith(("speed/", "memory/"))}
        for line in RunDir(run).metrics()
    ]
    return told


def differing(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Names of what is not the same in two accounts; [] is bit for bit."""
    found = [name for name in sorted(ours | theirs) if ours.get(name) != theirs.get(name)]
    missing = set(ours["names"]) ^ set(theirs["names"])
    return [*found, *(f"only in one: {name}" for name in sorted(missing))]
