"""`potstill compare`: the untouched student, plain training (CE only) and KD under one budget.

    runs/NAME/comparison.json    metrics of every arm with intervals, their differences, and what they show
              plan.json          the recipe, the seconds of a trial step, each arm's steps
              untouched-0/       the student before training
              ce-0/, kd-0/ …     a run directory for each arm and seed
              teacher-0/, corrected-0/   with `compare.corrected_steps`: the teacher's training, and its arm

All arms of a seed start from the same weights, which the hashes in the receipts prove, and see the same rows in the
same order. Each run's saved student, its best by held-out loss, is evaluated on the same held-out rows and against
the recipe's own teacher, even where the arm was trained with another one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from potstill.build.resolve import pin, resolve
from potstill.build.setup import RunSetup, process_of, set_up
from potstill.errors import UserError
from potstill.evals.heldout import heldout_by_row
from potstill.evals.intervals import Values, clustered
from potstill.evals.subject import Subject
from potstill.io.locks import remove_leftover_lock
from potstill.io.safe_open import read_object
from potstill.io.terminal import Display
from potstill.models.load import weights_sha256
from potstill.models.student import Student, from_checkpoint
from potstill.preflight.auto import as_recorded, as_started, note_types, settle
from potstill.preflight.trial_steps import step_seconds
from potstill.recipe import load as recipes
from potstill.recipe.load import Recipe
from potstill.recipe.sections_evaluation import TaskConfig, labelled
from potstill.recipe.sections_models import CheckpointStudentConfig
from potstill.recipe.sections_training import CompareConfig
from potstill.runs.comparison import RESULT
from potstill.runs.places import default_path, link_latest, newest_path
from potstill.runs.run_dir import RunDir, write_whole
from potstill.workflows import compare_stats
from potstill.workflows.compare_stats import (
    CE,
    CORRECTED,
    KD,
    UNTOUCHED,
    Estimate,
    Measured,
    estimate,
)
from potstill.workflows.distill import distill
from potstill.workflows.start import Resume

PLAN = "plan.json"
TEACHER = "teacher"
FOLDERS = {UNTOUCHED: "untouched", CE: "ce", KD: "kd", CORRECTED: "corrected"}
TOO_UNEQUAL = 0.05
"""Training times that differ by more than this fraction cause a warning."""


def compare(
    recipe: str | Path | Recipe,
    *,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    resume: Resume = False,
    display: Display | None = None,
) -> Path | None:
    """Run every arm of a recipe and compare them; returns the folder, or None where a signal stopped it.

    Args:
        recipe: a YAML file or a recipe. Without a section `compare`, its defaults apply.
        overrides: `a.b=value`, applied to a file.
        out: a folder that does not exist yet; default `runs/<name of the recipe>`.
        resume: continue the comparison in `out`: finished arms are kept, an interrupted one is resumed. "auto": only
            where there is one of this recipe; otherwise a new one starts.

    Raises:
        UserError: anything the user can fix.
    """
    display = display or Display(quiet=True)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "compare: runs in one process. Start it without torchrun, or run its arms one by one."
        )
    recipe = Path(recipe) if isinstance(recipe, str) else recipe
    loaded = recipe if isinstance(recipe, Recipe) else recipes.load(recipe, overrides)
    name = "run" if isinstance(recipe, Recipe) else recipe.stem
    folder, resume = _place(loaded, name, out, resume, display)
    if loaded.corpus.is_prompts:
        raise UserError(
            "corpus.name: prompts have no answers for the arm of plain training. Compare on another corpus."
        )
    if loaded.objective.kd_weight == 0:
        raise UserError("objective.kd_weight: 0, so there is no KD arm to compare. Set it above 0.")
    config = loaded.compare or CompareConfig()
    loaded.require_available()
    if config.humaneval_tokens:
        from potstill.evals.humaneval import require_sandbox

        require_sandbox("compare.humaneval_tokens", "Set it to 0.")
    plan = _make_or_read_plan(loaded, config, folder, resume, display)
    # The plan's recipe has every `auto` settled: all arms must run with the same choices and the same commits.
    pinned = pin(loaded, plan.get("commits", {}))[0]
    loaded = as_started(pinned, _recipe_in(plan, folder), plan.get("train_rows"))
    link_latest(folder)
    comparison = _Comparison(loaded, config, folder, display, plan)
    if not comparison.run():
        display.note(f"stopped; the same command with --resume --out {folder} continues")
        return None
    result = comparison.result()
    write_whole(folder / RESULT, (json.dumps(result, indent=2) + "\n").encode())
    _print_result(result, folder, display)
    return folder


def _make_or_read_plan(
    recipe: Recipe, config: CompareConfig, folder: Path, resume: bool, display: Display
) -> dict[str, Any]:
    """`plan.json`: each arm's steps, from timed trial steps. A resumed comparison keeps its plan."""
    if resume:
        plan = _plan_of(folder)
        if not _is_of(recipe, plan, folder):
            raise UserError(
                f"{folder}: started with another recipe. Resume with the same one, or start a new comparison."
            )
        return plan
    RunDir.require_free(folder)
    note_types(resolved := resolve(recipe), display.note)
    resolved = settle(resolved, display.note)
    with process_of(resolved.recipe):
        setup = set_up(resolved, display.note)
        recipe = setup.recipe
        if config.budget == "steps" and config.corrected_steps >= recipe.train.num_steps:
            setup.teacher.close()
            raise _no_steps_left(config, recipe)
        arms = {arm: _recipe_of(arm, recipe, config.seeds[0]) for arm in (CE, KD)}
        display.note("comparison: timing trial steps of both arms, alternating")
        with contextlib.closing(setup.teacher):
            step_s = step_seconds(setup, arms)
    steps = {arm: recipe.train.num_steps for arm in (CE, KD)}
    if config.budget == "time":
        steps[CE] = max(1, round(recipe.train.num_steps * step_s[KD] / step_s[CE]))
    plan = {
        "recipe": recipes.dump(recipe),
        "step_s": step_s,
        "steps": steps,
        "train_rows": len(setup.corpus.train),
        "commits": dict(resolved.commits),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / PLAN, (json.dumps(plan, indent=2) + "\n").encode())
    return plan


def _place(
    recipe: Recipe, name: str, out: Path | None, resume: Resume, display: Display
) -> tuple[Path, bool]:
    """The folder of a comparison, and whether it goes on there."""
    newest = out or newest_path(name)
    is_begun = (newest / PLAN).exists()
    if resume == "auto":
        resume = is_begun and (out is not None or _is_plan_of(recipe, newest))
    elif is_begun and not resume and not (newest / RESULT).exists() and (out or _is_plan_of(recipe, newest)):
        what = "a comparison that is not finished"
        if out is not None:
            raise UserError(
                f"{newest}: already exists, with {what}, and none is overwritten. Add --resume to go on with it, or"
                " give --out another folder."
            )
        display.warn(
            f"{newest}: {what}. The same command with --resume --out {newest} goes on with it; this is a new one."
        )
    return out or (newest if resume else default_path(name)), resume


def _plan_of(folder: Path) -> dict[str, Any]:
    return read_object(folder / PLAN, "Give the folder that the comparison printed, or leave --resume out.")


def _is_plan_of(recipe: Recipe, folder: Path) -> bool:
    """Whether a folder has a comparison of this recipe. A damaged one is of none."""
    try:
        return _is_of(recipe, _plan_of(folder), folder)
    except UserError:
        return False


def _is_of(recipe: Recipe, plan: dict[str, Any], folder: Path) -> bool:
    """Whether the plan of a comparison is of this recipe."""
    recorded, recipe = (pin(each, plan.get("commits", {}))[0] for each in (_recipe_in(plan, folder), recipe))
    now = as_started(recipe, recorded, plan.get("train_rows"))
    return recorded.without_places() == now.without_places()


def _recipe_in(plan: dict[str, Any], folder: Path) -> Recipe:
    """The recipe that the comparison was started with."""
    return as_recorded(recipes.parse(str(plan.get("recipe")), where=str(folder / PLAN), folder=folder))


def _recipe_of(arm: str, recipe: Recipe, seed: int, steps: int | None = None) -> Recipe:
    """The recipe of one arm's run: only the loss weights, the seed and the number of steps differ."""
    steps = steps or recipe.train.num_steps
    warmup = min(recipe.train.warmup, steps)
    train = replace(recipe.train, seed=seed, steps=steps, epochs=None, warmup=warmup)
    objective = replace(recipe.objective, kd_weight=0.0, ce_weight=1.0) if arm == CE else recipe.objective
    rollouts = None if arm == CE else recipe.rollouts  # nothing but the teacher says what those are worth
    return replace(recipe, train=train, objective=objective, rollouts=rollouts, compare=None)


def _no_steps_left(config: CompareConfig, recipe: Recipe) -> UserError:
    return UserError(
        f"compare.corrected_steps: {config.corrected_steps} steps of the teacher's own training take the whole budget"
        f" of {recipe.train.num_steps} KD steps. Set it lower, or train.steps or train.epochs higher."
    )


@dataclass(frozen=True)
class _Comparison:
    """The runs of a comparison, and its result."""

    recipe: Recipe
    config: CompareConfig
    folder: Path
    display: Display
    plan: dict[str, Any]

    @property
    def arms(self) -> list[str]:
        return [CE, KD, *([CORRECTED] if self.config.corrected_steps else [])]

    def run_of(self, arm: str, seed: int) -> RunDir:
        return RunDir(self.folder / f"{FOLDERS.get(arm, arm)}-{seed}")

    def run(self) -> bool:
        """Run every arm with every seed; False where a signal stopped one."""
        for number, seed in enumerate(self.config.seeds):
            # The arms take turns at going first, so that a machine that warms up or slows down favours none.
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
        started = run.resolved.exists()
        if not (started and run.status().get("state") == "finished"):
            self.display.note(f"comparison: {arm}, seed {seed}, {recipe.train.num_steps} steps")
            distill(recipe, out=run.path, resume=started, display=self.display)
        else:
            remove_leftover_lock(run.path)
        return bool(run.status()["state"] == "finished")

    def teacher_recipe(self, seed: int) -> Recipe:
        """Plain training of the teacher on the rows that the students are trained on, as the teacher that it is: it is
        not shipped, and not rounded for that.
        """
        recipe = _recipe_of(CE, self.recipe, seed, self.config.corrected_steps)
        return replace(
            recipe,
            student=CheckpointStudentConfig(model=str(vars(self.recipe.teacher)["model"])),
            train=replace(recipe.train, lr=self.config.corrected_lr, quantize=None, ema=None),
            allow_identical=True,
            evaluations=[],
        )

    def corrected_recipe(self, seed: int) -> Recipe:
        """KD from the trained teacher, with what its training has left of the budget."""
        if self.config.budget == "steps":
            steps = self.recipe.train.num_steps - self.config.corrected_steps
        else:
            spent_s = self.run_of(TEACHER, seed).receipt()["training_seconds"]
            steps = int(self.recipe.train.num_steps - spent_s / self.plan["step_s"][KD])
        if steps < 1:
            raise _no_steps_left(self.config, self.recipe)
        return replace(
            _recipe_of(CORRECTED, self.recipe, seed, steps),
            teacher=self.recipe.teacher.with_model(str(self.run_of(TEACHER, seed).student)),
            student=CheckpointStudentConfig(model=str(self.untouched(seed)), lora=self.recipe.lora),
        )

    def untouched(self, seed: int) -> Path:
        """The student from which every arm of this seed starts. Only a randomly initialized one depends on the seed."""
        run = self.run_of(UNTOUCHED, seed if self.recipe.student.name == "config" else self.config.seeds[0])
        if not run.student.exists():
            with self.set_up(seed) as setup:
                run.path.mkdir(exist_ok=True)
                run.replace_student(lambda place: setup.student.save(place, setup.tokenizer))
        return run.student

    @contextlib.contextmanager
    def set_up(self, seed: int) -> Iterator[RunSetup]:
        """The RunSetup of the KD arm, before training."""
        resolved = resolve(_recipe_of(KD, self.recipe, seed))
        with process_of(resolved.recipe):
            setup = set_up(resolved, self.display.note)
            with contextlib.closing(setup.teacher):
                yield setup

    def result(self) -> dict[str, Any]:
        """The content of `comparison.json`."""
        with self.set_up(self.config.seeds[0]) as setup:
            return self.measure_arms(setup)

    def measure_arms(self, setup: RunSetup) -> dict[str, Any]:
        measured: dict[str, dict[str, Measured]] = {}
        for arm in (UNTOUCHED, *self.arms):
            self.display.note(f"comparison: measuring {arm}")
            measured[arm] = self.measure_arm(arm, setup)
        summaries = [self.summarize_arm(arm, metrics) for arm, metrics in measured.items()]
        differences = compare_stats.differences(measured)
        budget = "training time" if self.config.budget == "time" else "steps"
        return {
            "sentence": compare_stats.sentence(differences, budget, len(self.config.seeds)),
            "warnings": self.warnings(summaries, setup),
            "arms": summaries,
            "differences": differences,
            "budget": {"equal": budget, "trial_step_s": self.plan["step_s"]},
            "seeds": self.config.seeds,
            "heldout_rows": len(setup.corpus.heldout),
            "teacher_ce": self.run_of(KD, self.config.seeds[0]).receipt()["heldout_first"][
                "heldout/teacher_ce"
            ],
            "humaneval": "greedy" if self.config.humaneval_tokens else "not run",
            "runs": [f"{FOLDERS[arm]}-{seed}" for arm in self.arms for seed in self.config.seeds],
        }

    def measure_arm(self, arm: str, setup: RunSetup) -> dict[str, Measured]:
        """Held-out metrics of the arm's students, one a seed, and HumanEval where the recipe has it."""
        folders = [
            self.untouched(seed) if arm == UNTOUCHED else self.run_of(arm, seed).student
            for seed in self.config.seeds
        ]
        # Seeds may share the untouched student: each folder is evaluated once.
        evaluated = {folder: self.evaluate_student(folder, setup) for folder in dict.fromkeys(folders)}
        if arm == UNTOUCHED:
            for seed, folder in zip(self.config.seeds, folders, strict=True):
                self.require_same_start(seed, evaluated[folder][0])
        _, weights_U, by_metric = evaluated[folders[0]]
        metrics = {
            name: Measured(np.asarray([evaluated[folder][2][name] for folder in folders]), weights_U)
            for name in by_metric.keys() & compare_stats.METRICS.keys()
        }
        if self.config.humaneval_tokens:
            passed = {folder: self.humaneval(folder) for folder in evaluated}
            values_SU = np.asarray([passed[folder] for folder in folders])
            metrics["pass@1"] = Measured(values_SU, np.ones(values_SU.shape[1]))
        return metrics | self.measure_tasks(arm, folders)

    @property
    def tasks(self) -> dict[str, TaskConfig]:
        evaluations = labelled(self.recipe.evaluations).items()
        return {label: config for label, config in evaluations if isinstance(config, TaskConfig)}

    def measure_tasks(self, arm: str, folders: Sequence[Path]) -> dict[str, Measured]:
        """Accuracy of the arm's students, one a seed, in each task of the recipe's. Every arm is asked the same. One
        that fails is left out with a warning: it must not cost the other figures.
        """
        metrics = {}
        for label, config in self.tasks.items():
            try:
                by_folder = {
                    folder: self.accuracy_by_unit(label, config, folder) for folder in dict.fromkeys(folders)
                }
            except UserError as error:
                self.display.warn(f"comparison: {arm}: {error}")
                continue
            values_SU = np.asarray([by_folder[folder][0] for folder in folders])
            metrics[label] = Measured(values_SU, by_folder[folders[0]][1])
        return metrics

    def accuracy_by_unit(self, label: str, config: TaskConfig, folder: Path) -> tuple[Values, Values]:
        """The share of correct answers to each question, or cluster of them, and the questions of each; those of an
        arm's run are in its folder already.
        """
        from potstill.evals.tasks import accuracy_by_unit

        out, device = RunDir(folder.parent).evals / label, self.recipe.train.device
        return accuracy_by_unit(config, Subject(folder, out, device, None, self.display.note))

    def evaluate_student(self, folder: Path, setup: RunSetup) -> tuple[str, Values, dict[str, list[float]]]:
        """A saved student's hash, the number of positions of each held-out row, and each metric's mean over them."""
        model = from_checkpoint(folder, setup.device)
        sha256 = weights_sha256(model)
        model.mask_from(setup.shared.ids)
        student = Student(model, setup.student.objective, setup.student.autocast)
        student.grid = setup.student.grid  # of a model of the same shape
        positions, values = heldout_by_row(student, setup.teacher, setup.corpus.heldout)
        return sha256, np.asarray(positions, np.float64), values

    def require_same_start(self, seed: int, sha256: str) -> None:
        for arm in self.arms:
            start = self.run_of(arm, seed).receipt()["student"]["weights_sha256_start"]
            if start != sha256:
                raise UserError(
                    f"{self.run_of(arm, seed).path}: {arm}, seed {seed}, started from weights {start}, and the"
                    f" untouched student has {sha256}: they were made on different machines, perhaps. Start a new"
                    " comparison."
                )

    def humaneval(self, folder: Path) -> list[float]:
        """For each problem, 1 if the greedy sample passed, else 0."""
        from potstill.evals.humaneval import HumanEvalSettings, evaluate

        out = RunDir(folder.parent).evals / "humaneval"
        config = HumanEvalSettings(
            max_new_tokens=self.config.humaneval_tokens, device=self.recipe.train.device
        )
        result = evaluate(folder, config, out, self.display.note)
        if result["status"] != "finished":
            raise UserError(f"{folder}: HumanEval: inference failed, there is no score: {result['why']}")
        return [float(count) for count in result["passed_by_problem"].values()]

    def summarize_arm(self, arm: str, metrics: dict[str, Measured]) -> dict[str, Any]:
        """An arm's entry in the result. Seconds and steps are means over its seeds."""
        receipts = (
            [] if arm == UNTOUCHED else [self.run_of(arm, seed).receipt() for seed in self.config.seeds]
        )
        seconds = [receipt["training_seconds"] for receipt in receipts]
        if arm == CORRECTED:  # the teacher's own training counts against the budget
            extra = [self.run_of(TEACHER, seed).receipt()["training_seconds"] for seed in self.config.seeds]
            seconds = [teacher_s + student_s for teacher_s, student_s in zip(extra, seconds, strict=True)]
        estimates = {name: _with_interval(name, values) for name, values in metrics.items()}
        return {
            "name": arm,
            "steps": round(np.mean([receipt["steps"] for receipt in receipts])) if receipts else 0,
            "training_seconds": round(float(np.mean(seconds)), 1) if seconds else 0.0,
            "metrics": {name: asdict(value) for name, value in estimates.items()} | _not_run(metrics),
            "by_seed": {name: [float(v) for v in values.by_seed()] for name, values in metrics.items()},
            "student_is_of_step": [receipt["student_is_of_step"] for receipt in receipts],
        }

    def warnings(self, summaries: list[dict[str, Any]], setup: RunSetup) -> list[str]:
        warnings = []
        spent_s = {arm["name"]: arm["training_seconds"] for arm in summaries if arm["name"] != UNTOUCHED}
        if self.config.budget == "time" and max(spent_s.values()) > (1 + TOO_UNEQUAL) * min(spent_s.values()):
            times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in spent_s.items())
            warnings.append(
                f"the arms' training times are unequal: {times}. Trial steps did not predict the real ones."
            )
        if len(self.config.seeds) < 3:
            warnings.append(
                f"only {len(self.config.seeds)} of compare.seeds: the intervals say little about other seeds."
            )
        if len(setup.corpus.heldout) < 8:
            warnings.append(
                f"only {len(setup.corpus.heldout)} held-out rows: the intervals say little about other text."
            )
        for label in self.tasks:
            if failed := [arm["name"] for arm in summaries if label not in arm["metrics"]]:
                warnings.append(
                    f"{label} has no accuracy for {', '.join(failed)}: evals/{label} of its runs has the reason."
                )
        return warnings


def _with_interval(name: str, metric: Measured) -> Estimate:
    """The mean and its interval. Of problems and questions Wilson's, which has a width even where none is right."""
    result = estimate(metric.values_SU, metric.weights_U)
    if name != "pass@1" and name in compare_stats.METRICS:
        is_share = compare_stats.named(name)[1] == compare_stats.SHARE
        return result.within(0.0, 1.0 if is_share else math.inf)
    return Estimate(result.mean, *clustered(metric.values_SU.mean(0), metric.weights_U))


def _not_run(metrics: dict[str, Measured]) -> dict[str, None]:
    return {name: None for name in compare_stats.METRICS if name not in metrics}


def _print_result(result: dict[str, Any], folder: Path, display: Display) -> None:
    rows = []
    metrics = compare_stats.in_order(dict.fromkeys(name for arm in result["arms"] for name in arm["metrics"]))
    for arm in result["arms"]:
        values = [arm["metrics"].get(name) for name in metrics]
        cells = [
            "not run" if v is None else f"{v['mean']:.4g} [{v['low']:.4g}, {v['high']:.4g}]" for v in values
        ]
        rows.append([arm["name"], str(arm["steps"]), f"{arm['training_seconds']:.0f}", *cells])
    columns = ["arm", "steps", "seconds", *metrics]
    display.table("arms, with 95 % intervals", columns, rows)
    display.note(result["sentence"])
    for warning in result["warnings"]:
        display.warn(warning)
    display.note(f"comparison: {folder / RESULT}; `potstill report {folder}` renders it as a page")
