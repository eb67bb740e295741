"""Arms under one budget: the untouched student, plain training (CE only) and KD, so that a gain has something
beside it.

    runs/NAME/comparison.json    every arm's figures with intervals, their differences, and what they show
              plan.json          the recipe, the seconds of a trial step, each arm's steps
              untouched-0/       the student before training
              ce-0/, kd-0/ …     a run directory for each arm and seed
              teacher-0/, corrected-0/   with `compare.corrected_steps`: the teacher's training, and its arm

All arms of a seed start from the same weights, which the hashes in the receipts prove, and see rows in the
same order. What is compared is the student that a run saves, its best by held-out loss, on the same held-out
rows and against the recipe's own teacher, whoever taught it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from potstill.build.resolve import resolve
from potstill.build.setup import RunSetup, process_of, set_up
from potstill.errors import UserError
from potstill.evals.heldout import heldout_by_row
from potstill.evals.pass_at_k import wilson
from potstill.io.safe_open import read_object
from potstill.io.terminal import Display
from potstill.models.load import weights_sha256
from potstill.models.student import Student, from_checkpoint
from potstill.preflight.auto import as_started, settle
from potstill.preflight.trial_steps import step_seconds
from potstill.recipe import load as recipes
from potstill.recipe.load import Recipe
from potstill.recipe.sections_models import CheckpointStudentConfig, HfTeacherConfig
from potstill.recipe.sections_training import CompareConfig
from potstill.runs.comparison import RESULT
from potstill.runs.run_dir import RunDir, default_path, newest_path, write_whole
from potstill.workflows import compare_stats
from potstill.workflows.compare_stats import (
    CE,
    CORRECTED,
    KD,
    UNTOUCHED,
    Estimate,
    Measured,
    Values,
    estimate,
)
from potstill.workflows.distill import distill

PLAN = "plan.json"
TEACHER = "teacher"
FOLDERS = {UNTOUCHED: "untouched", CE: "ce", KD: "kd", CORRECTED: "corrected"}
TOO_UNEQUAL = 0.05
"""Arms whose training times differ by more than this share are told of in a warning."""


def compare(
    recipe: str | Path | Recipe,
    *,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    resume: bool = False,
    display: Display | None = None,
) -> Path | None:
    """Run every arm of a recipe and compare them; returns the folder, or None where a signal stopped it.

    Args:
        recipe: a YAML file or a recipe; without a section `compare` its defaults hold.
        overrides: `a.b=value`, applied to a file.
        out: a folder that does not exist yet; default `runs/<name of the recipe>`.
        resume: go on in `out`: finished arms are kept, one that was cut off goes on.

    Raises:
        UserError: whatever the user can mend.
    """
    display = display or Display(quiet=True)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("compare: it runs in one process. Start it without torchrun, or its arms one by one.")
    recipe = Path(recipe) if isinstance(recipe, str) else recipe
    loaded = recipe if isinstance(recipe, Recipe) else recipes.load(recipe, overrides)
    name = "run" if isinstance(recipe, Recipe) else recipe.stem
    folder = out or (newest_path(name) if resume else default_path(name))
    if loaded.objective.kd_weight == 0:
        raise UserError("objective.kd_weight: it is 0, so there is no KD arm to compare. Raise it.")
    asked = loaded.compare or CompareConfig()
    if asked.humaneval_tokens:
        _require_humaneval()
    plan = _planned(loaded, asked, folder, resume, display)
    loaded = as_started(loaded, _recipe_in(plan, folder))
    comparison = _Comparison(loaded, asked, folder, display, plan)
    if not comparison.run():
        display.note(f"stopped; the same command with --resume --out {folder} goes on")
        return None
    found = comparison.result()
    write_whole(folder / RESULT, (json.dumps(found, indent=2) + "\n").encode())
    _tell(found, folder, display)
    return folder


def _require_humaneval() -> None:
    """No hour is spent on runs that cannot be evaluated after it."""
    from potstill.evals.humaneval_problems import read_problems
    from potstill.evals.sandbox.sandbox import Sandbox, SandboxRefused

    read_problems()
    try:
        Sandbox().close()
    except SandboxRefused as refused:
        raise UserError(
            f"compare.humaneval_tokens: no sandbox here: {refused.why}. Set it to 0."
        ) from refused


def _planned(
    recipe: Recipe, asked: CompareConfig, folder: Path, resume: bool, display: Display
) -> dict[str, Any]:
    """Steps and seconds, from trial steps; a comparison that goes on keeps those that it began with."""
    if resume:
        plan = read_object(
            folder / PLAN, "Give the folder that the comparison printed, or leave --resume out."
        )
        began = _recipe_in(plan, folder)
        if began.without_places() != as_started(recipe, began).without_places():
            raise UserError(f"{folder}: started with another recipe. Resume with the same, or start anew.")
        return plan
    RunDir.require_free(folder)
    resolved = settle(resolve(recipe), display.note)
    recipe = resolved.recipe
    arms = {arm: _recipe_of(arm, recipe, asked.seeds[0]) for arm in (CE, KD)}
    with process_of(recipe):
        setup = set_up(resolved, display.note)
        display.note("comparison: timing steps of both arms, turn by turn")
        with contextlib.closing(setup.teacher):
            step_s = step_seconds(setup, arms)
    steps = {arm: recipe.train.steps for arm in (CE, KD)}
    if asked.budget == "time":
        steps[CE] = max(1, round(recipe.train.steps * step_s[KD] / step_s[CE]))
    plan = {"recipe": recipes.dump(recipe), "step_s": step_s, "steps": steps}
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / PLAN, (json.dumps(plan, indent=2) + "\n").encode())
    return plan


def _recipe_in(plan: dict[str, Any], folder: Path) -> Recipe:
    """As the comparison began with it."""
    return recipes.parse(str(plan.get("recipe")), where=str(folder / PLAN), folder=folder)


def _recipe_of(arm: str, recipe: Recipe, seed: int, steps: int | None = None) -> Recipe:
    """The recipe's own but for the weights of the loss, the seed and the steps."""
    steps = steps or recipe.train.steps
    train = replace(recipe.train, seed=seed, steps=steps, warmup=min(recipe.train.warmup, steps))
    objective = replace(recipe.objective, kd_weight=0.0, ce_weight=1.0) if arm == CE else recipe.objective
    return replace(recipe, train=train, objective=objective, compare=None)


@dataclass(frozen=True)
class _Comparison:
    """The runs of a comparison, and what they come to."""

    recipe: Recipe
    asked: CompareConfig
    folder: Path
    display: Display
    plan: dict[str, Any]

    @property
    def arms(self) -> list[str]:
        return [CE, KD, *([CORRECTED] if self.asked.corrected_steps else [])]

    @property
    def teacher(self) -> HfTeacherConfig:
        """The recipe's, where it has weights to train; a recipe with `corrected_steps` has no other."""
        assert isinstance(self.recipe.teacher, HfTeacherConfig)
        return self.recipe.teacher

    def run_of(self, arm: str, seed: int) -> RunDir:
        return RunDir(self.folder / f"{FOLDERS.get(arm, arm)}-{seed}")

    def run(self) -> bool:
        """Every arm with every seed; False where a signal stopped one. Each seed begins with another arm."""
        for number, seed in enumerate(self.asked.seeds):
            first = number % len(self.arms)
            for arm in self.arms[first:] + self.arms[:first]:
                recipe = _recipe_of(arm, self.recipe, seed, self.plan["steps"].get(arm))
                if arm == CORRECTED:
                    if not self.run_one(TEACHER, seed, self.teacher_recipe(seed)):
                        return False
                    recipe = self.corrected_recipe(seed)
                if not self.run_one(arm, seed, recipe):
                    return False
        return True

    def run_one(self, arm: str, seed: int, recipe: Recipe) -> bool:
        run = self.run_of(arm, seed)
        begun = run.resolved.exists()
        if not (begun and run.status().get("state") == "finished"):
            self.display.note(f"comparison: {arm}, seed {seed}, {recipe.train.steps} steps")
            distill(recipe, out=run.path, resume=begun, display=self.display)
        return bool(run.status()["state"] == "finished")

    def teacher_recipe(self, seed: int) -> Recipe:
        """Plain training of the teacher itself on the rows that the students see."""
        recipe = _recipe_of(CE, self.recipe, seed, self.asked.corrected_steps)
        return replace(
            recipe,
            student=CheckpointStudentConfig(model=self.teacher.model),
            train=replace(recipe.train, lr=self.asked.corrected_lr),
            allow_identical=True,
        )

    def corrected_recipe(self, seed: int) -> Recipe:
        """KD from the teacher that was trained, in what its training left of the budget."""
        if self.asked.budget == "steps":
            steps = self.recipe.train.steps - self.asked.corrected_steps
        else:
            spent_s = self.run_of(TEACHER, seed).receipt()["training_seconds"]
            steps = int(self.recipe.train.steps - spent_s / self.plan["step_s"][KD])
        if steps < 1:
            raise UserError(
                f"compare.corrected_steps: {self.asked.corrected_steps} steps of the teacher's own training"
                f" take the whole budget of {self.recipe.train.steps} KD steps. Set it lower, or train.steps"
                " higher."
            )
        return replace(
            _recipe_of(CORRECTED, self.recipe, seed, steps),
            teacher=replace(
                self.teacher,
                model=str(self.run_of(TEACHER, seed).student),
                weights="full",
                backend="auto",
                reference=None,
            ),
            student=CheckpointStudentConfig(model=str(self.untouched(seed)), lora=self.recipe.lora),
        )

    def untouched(self, seed: int) -> Path:
        """The student as every arm of this seed begins with it; only a random one depends on the seed."""
        run = self.run_of(UNTOUCHED, seed if self.recipe.student.name == "config" else self.asked.seeds[0])
        if not run.student.exists():
            with self.set_up(seed) as setup:
                run.path.mkdir(exist_ok=True)
                run.replace_student(lambda place: setup.student.save(place, setup.tokenizer))
        return run.student

    @contextlib.contextmanager
    def set_up(self, seed: int) -> Iterator[RunSetup]:
        """The objects of the KD arm, before training."""
        resolved = resolve(_recipe_of(KD, self.recipe, seed))
        with process_of(resolved.recipe):
            setup = set_up(resolved, self.display.note)
            with contextlib.closing(setup.teacher):
                yield setup

    def result(self) -> dict[str, Any]:
        """`comparison.json`."""
        with self.set_up(self.asked.seeds[0]) as setup:
            return self.measure(setup)

    def measure(self, setup: RunSetup) -> dict[str, Any]:
        found: dict[str, dict[str, Measured]] = {}
        for arm in (UNTOUCHED, *self.arms):
            self.display.note(f"comparison: measuring {arm}")
            found[arm] = self.measured(arm, setup)
        told = [self.told(arm, metrics) for arm, metrics in found.items()]
        differing = compare_stats.differences(found)
        budget = "training time" if self.asked.budget == "time" else "steps"
        return {
            "sentence": compare_stats.sentence(differing, budget, len(self.asked.seeds)),
            "warnings": self.warnings(told, setup),
            "arms": told,
            "differences": differing,
            "budget": {"equal": budget, "trial_step_s": self.plan["step_s"]},
            "seeds": self.asked.seeds,
            "heldout_rows": len(setup.corpus.heldout),
            "teacher_ce": self.run_of(KD, self.asked.seeds[0]).receipt()["heldout_first"][
                "heldout/teacher_ce"
            ],
            "humaneval": "greedy" if self.asked.humaneval_tokens else "not run",
            "runs": [f"{FOLDERS[arm]}-{seed}" for arm in self.arms for seed in self.asked.seeds],
        }

    def measured(self, arm: str, setup: RunSetup) -> dict[str, Measured]:
        """Held-out rows, and HumanEval where it is asked for, of the students of all seeds."""
        folders = [
            self.untouched(seed) if arm == UNTOUCHED else self.run_of(arm, seed).student
            for seed in self.asked.seeds
        ]
        seen = {folder: self.measured_student(folder, setup) for folder in dict.fromkeys(folders)}
        if arm == UNTOUCHED:
            for seed, folder in zip(self.asked.seeds, folders, strict=True):
                self.require_one_start(seed, seen[folder][0])
        _, weights_U, known = seen[folders[0]]
        found = {
            name: Measured(np.asarray([seen[folder][2][name] for folder in folders]), weights_U)
            for name in known.keys() & compare_stats.METRICS.keys()
        }
        if self.asked.humaneval_tokens:
            passed = {folder: self.humaneval(folder) for folder in seen}
            values_SU = np.asarray([passed[folder] for folder in folders])
            found["pass@1"] = Measured(values_SU, np.ones(values_SU.shape[1]))
        return found

    def measured_student(self, folder: Path, setup: RunSetup) -> tuple[str, Values, dict[str, list[float]]]:
        """A saved student's hash, the positions of each held-out row, and each metric's mean over them."""
        model = from_checkpoint(folder, setup.device)
        sha256 = weights_sha256(model)
        model.mask_from(setup.shared.ids)
        student = Student(model, setup.student.objective, setup.student.autocast)
        positions, values = heldout_by_row(student, setup.teacher, setup.corpus.heldout)
        return sha256, np.asarray(positions, np.float64), values

    def require_one_start(self, seed: int, sha256: str) -> None:
        for arm in self.arms:
            begun = self.run_of(arm, seed).receipt()["student"]["weights_sha256_start"]
            if begun != sha256:
                raise RuntimeError(
                    f"{arm}, seed {seed}: began with {begun}, the untouched student is {sha256}"
                )

    def humaneval(self, folder: Path) -> list[float]:
        """Of each problem, 1 where the greedy sample passed."""
        from potstill.evals.humaneval import Options, evaluate

        out = RunDir(folder.parent).evals / "humaneval"
        options = Options(max_new_tokens=self.asked.humaneval_tokens, device=self.recipe.train.device)
        found = evaluate(folder, out, options, self.display.note)
        if found["status"] != "finished":
            raise UserError(f"{folder}: HumanEval: inference failed, there is no score: {found['why']}")
        return [float(count) for count in found["passed_by_problem"].values()]

    def told(self, arm: str, metrics: dict[str, Measured]) -> dict[str, Any]:
        """An arm of the result; seconds and steps are means over its seeds."""
        receipts = [] if arm == UNTOUCHED else [self.run_of(arm, seed).receipt() for seed in self.asked.seeds]
        spent = [receipt["training_seconds"] for receipt in receipts]
        if arm == CORRECTED:
            own = [self.run_of(TEACHER, seed).receipt()["training_seconds"] for seed in self.asked.seeds]
            spent = [of_teacher + of_student for of_teacher, of_student in zip(own, spent, strict=True)]
        seen = {name: _with_interval(name, of) for name, of in metrics.items()}
        return {
            "name": arm,
            "steps": round(np.mean([receipt["steps"] for receipt in receipts])) if receipts else 0,
            "training_seconds": round(float(np.mean(spent)), 1) if spent else 0.0,
            "metrics": {name: asdict(of) for name, of in seen.items()} | _not_run(metrics),
            "by_seed": {name: [float(v) for v in of.by_seed()] for name, of in metrics.items()},
            "student_is_of_step": [receipt["student_is_of_step"] for receipt in receipts],
        }

    def warnings(self, told: list[dict[str, Any]], setup: RunSetup) -> list[str]:
        found = []
        spent = {arm["name"]: arm["training_seconds"] for arm in told if arm["name"] != UNTOUCHED}
        if self.asked.budget == "time" and max(spent.values()) > (1 + TOO_UNEQUAL) * min(spent.values()):
            said = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in spent.items())
            found.append(
                f"the arms' training times came out unequal: {said}. Trial steps and real ones differed."
            )
        if len(self.asked.seeds) < 3:
            found.append(
                f"{len(self.asked.seeds)} of compare.seeds: intervals over so few say little of other seeds."
            )
        if len(setup.corpus.heldout) < 8:
            found.append(
                f"{len(setup.corpus.heldout)} held-out rows: intervals over so few say little of other text."
            )
        return found


def _with_interval(name: str, of: Measured) -> Estimate:
    """Of problems, Wilson's interval at the mean share: it is not empty where nothing is passed."""
    found = estimate(of.values_SU, of.weights_U)
    problems = len(of.weights_U)
    return Estimate(found.mean, *wilson(found.mean * problems, problems)) if name == "pass@1" else found


def _not_run(metrics: dict[str, Measured]) -> dict[str, None]:
    return {name: None for name in compare_stats.METRICS if name not in metrics}


def _tell(found: dict[str, Any], folder: Path, display: Display) -> None:
    """The end of a comparison, for a person."""
    rows = []
    for arm in found["arms"]:
        values = [arm["metrics"][name] for name in compare_stats.METRICS]
        shown = [
            "not run" if v is None else f"{v['mean']:.4g} [{v['low']:.4g}, {v['high']:.4g}]" for v in values
        ]
        rows.append([arm["name"], str(arm["steps"]), f"{arm['training_seconds']:.0f}", *shown])
    columns = ["arm", "steps", "seconds", *compare_stats.METRICS]
    display.table("arms, with 95 % intervals", columns, rows)
    display.note(found["sentence"])
    for warning in found["warnings"]:
        display.warn(warning)
    display.note(f"comparison: {folder / RESULT}; `potstill report {folder}` makes a page of it")
