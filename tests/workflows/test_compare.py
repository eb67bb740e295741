"""A comparison of arms: one start, one budget, every arm's own run on record, and figures that can be had again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_config

from potstill import UserError, distill, evaluate
from potstill.cli.main import main
from potstill.evals import tasks
from potstill.evals.intervals import wilson
from potstill.evals.sandbox.sandbox import SandboxRefused
from potstill.io.terminal import Display
from potstill.models import generate
from potstill.models.generate import Completion, InferenceFailed
from potstill.recipe import load
from potstill.report.build import report
from potstill.runs.run_dir import RunDir
from potstill.workflows import compare as workflow
from potstill.workflows.compare import compare
from potstill.workflows.compare_stats import CE, CORRECTED, KD, UNTOUCHED, student_t

Write = Callable[..., Path]
SMALL = "{seeds: [0, 1], budget: steps}"
METRICS = {"heldout/kl", "heldout/ce", "heldout/agreement"}


def result(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "comparison.json").read_text()))


def arms(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {arm["name"]: arm for arm in found["arms"]}


def receipts(folder: Path, pattern: str) -> list[dict[str, Any]]:
    return [RunDir(path).receipt() for path in sorted(folder.glob(pattern))]


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, corpus_folder: Path
) -> tuple[Path, Path]:
    """A recipe with all arms, and its comparison."""
    folder = tmp_path_factory.mktemp("comparison")
    path = folder / "pair.yaml"
    path.write_text(
        f"corpus: {{name: text, path: {corpus_folder}, tokens_per_row: 32, heldout_rows: 8}}\n"
        f"teacher: {{name: torch, model: {teacher_folder}}}\n"
        "student: {name: cut, layers: 2}\n"
        "train: {steps: 30, rows_per_step: 4, lr: 3e-3, warmup: 2, device: cpu}\n"
        "compare: {seeds: [0, 1, 2], budget: time, corrected_steps: 2, corrected_lr: 1e-4}\n"
    )
    assert compare(path, out=folder / "out") == folder / "out"
    return path, folder / "out"


def test_every_arm_begins_with_the_untouched_student(whole: tuple[Path, Path]) -> None:
    _, folder = whole
    starts = {
        receipt["student"]["weights_sha256_start"]
        for arm in ("ce", "kd", "corrected")
        for receipt in receipts(folder, f"{arm}-*")
    }
    assert len(starts) == 1
    assert [path.name for path in folder.glob("untouched-*")] == ["untouched-0"]
    assert len(receipts(folder, "ce-*") + receipts(folder, "kd-*") + receipts(folder, "corrected-*")) == 9


def test_plain_training_asks_nothing_of_the_teacher_and_has_the_kd_arm_s_time(
    whole: tuple[Path, Path],
) -> None:
    _, folder = whole
    plan = json.loads((folder / "plan.json").read_text())
    steps = round(30 * plan["step_s"][KD] / plan["step_s"][CE])
    for receipt in receipts(folder, "ce-*"):
        assert receipt["steps"] == steps
        assert receipt["objective"].startswith("1.0 * CE + 0.0 *")
    assert "train/kd" not in RunDir(folder / "ce-0").metrics()[1]
    assert [receipt["steps"] for receipt in receipts(folder, "kd-*")] == [30] * 3
    assert [receipt["seed"] for receipt in receipts(folder, "kd-*")] == [0, 1, 2]


def test_the_corrected_teacher_is_paid_for_by_its_arm(whole: tuple[Path, Path]) -> None:
    _, folder = whole
    plan = json.loads((folder / "plan.json").read_text())
    for own, arm in zip(receipts(folder, "teacher-*"), receipts(folder, "corrected-*"), strict=True):
        assert (own["steps"], own["objective"][:8]) == (2, "1.0 * CE")
        assert arm["steps"] == int(30 - own["training_seconds"] / plan["step_s"][KD]) < 30
        assert arm["teacher"]["weights_sha256"] == own["student"]["weights_sha256_end"]
    told = arms(result(folder))[CORRECTED]
    spent = [
        one["training_seconds"] + two["training_seconds"]
        for one, two in zip(receipts(folder, "teacher-*"), receipts(folder, "corrected-*"), strict=True)
    ]
    assert told["training_seconds"] == pytest.approx(np.mean(spent), abs=0.1)


def test_the_figures_are_those_that_eval_gives_for_each_saved_student(whole: tuple[Path, Path]) -> None:
    path, folder = whole
    loaded = load.load(path)
    for name, places in {
        UNTOUCHED: ["untouched-0"] * 3,
        CORRECTED: [f"corrected-{s}" for s in range(3)],
    }.items():
        arm = arms(result(folder))[name]
        figures = {place: evaluate(loaded, folder / place / "student") for place in {*places}}
        for metric in METRICS:
            values = [figures[place][metric] for place in places]
            assert arm["by_seed"][metric] == pytest.approx(values, abs=1e-5)
            assert arm["metrics"][metric]["mean"] == pytest.approx(np.mean(values), abs=1e-5)
        assert arm["metrics"]["pass@1"] is None


def test_the_result_says_what_is_shown_and_what_was_not_run(whole: tuple[Path, Path]) -> None:
    _, folder = whole
    found = result(folder)
    assert [arm["name"] for arm in found["arms"]] == [UNTOUCHED, CE, KD, CORRECTED]
    kd = next(
        one
        for one in found["differences"]
        if (one["arm"], one["against"], one["metric"]) == (KD, CE, "heldout/kl")
    )
    by_seed = [arms(found)[name]["by_seed"]["heldout/kl"] for name in (KD, CE)]
    assert kd["mean"] == pytest.approx(np.mean(by_seed[0]) - np.mean(by_seed[1]))
    assert kd["low"] < kd["mean"] < kd["high"]
    assert kd["ahead"] == KD and "KD is ahead of plain training (CE only) in held-out KL" in found["sentence"]
    assert found["humaneval"] == "not run" and found["seeds"] == [0, 1, 2]
    page = report([folder], None, 48, False, Display(quiet=True)).read_text()
    assert found["sentence"].split(":")[0] in page and "KD, corrected teacher" in page
    assert all(f">{name}</li>" in page for name in ("ce-0", "kd-0", "corrected-0"))  # their curves


def test_one_budget_may_be_equal_steps(tiny_recipe: Write, tmp_path: Path) -> None:
    folder = compare(
        tiny_recipe(compare="{seeds: [3], budget: steps, corrected_steps: 1}"), out=tmp_path / "out"
    )
    assert folder is not None
    assert [(r["seed"], r["steps"]) for r in receipts(folder, "[ck]*-3")] == [(3, 4), (3, 3), (3, 4)]
    assert any("1 of compare.seeds" in warning for warning in result(folder)["warnings"])
    assert any("4 held-out rows" in warning for warning in result(folder)["warnings"])


def test_the_rate_of_the_teacher_s_own_training_is_the_one_asked_for(
    tiny_recipe: Write, tmp_path: Path
) -> None:
    ends = set()
    for lr in ("1e-4", "1e-2"):
        section = f"{{seeds: [0], budget: steps, corrected_steps: 2, corrected_lr: {lr}}}"
        folder = compare(tiny_recipe(compare=section), out=tmp_path / lr)
        assert folder is not None
        ends |= {receipt["student"]["weights_sha256_end"] for receipt in receipts(folder, "teacher-*")}
        assert RunDir(folder / "teacher-0").metrics()[1]["train/lr"] == float(lr)
    assert len(ends) == 2


def test_the_teacher_s_own_training_is_for_no_file(tiny_recipe: Write, tmp_path: Path) -> None:
    """The students are trained for one."""
    folder = compare(
        tiny_recipe(
            train="{steps: 4, rows_per_step: 4, lr: 1e-3, device: cpu, quantize: q8_0, ema: 0.5}",
            compare="{seeds: [0], budget: steps, corrected_steps: 2}",
        ),
        out=tmp_path / "out",
    )
    assert folder is not None
    trained_for = {
        arm: receipts(folder, f"{arm}-*")[0].get("quantize") for arm in ("teacher", "ce", "kd", "corrected")
    }
    assert trained_for == {"teacher": None, "ce": "q8_0", "kd": "q8_0", "corrected": "q8_0"}
    compared = arms(result(folder))  # what is compared is what the runs have measured: the file's numbers
    for name, arm in ((CE, "ce"), (KD, "kd")):
        of_run = receipts(folder, f"{arm}-*")[0]["heldout_best"]["heldout/kl"]
        assert compared[name]["by_seed"]["heldout/kl"] == pytest.approx([of_run], rel=1e-6)


def test_a_comparison_whose_types_are_left_to_auto_goes_on(tiny_recipe: Write, tmp_path: Path) -> None:
    path = tiny_recipe(
        train="{steps: 4, rows_per_step: 4, lr: 1e-3, device: cpu, precision: auto}",
        compare="{seeds: [0], budget: steps}",
    )
    folder = compare(path, out=tmp_path / "out")
    assert folder is not None
    (folder / "comparison.json").unlink()
    assert compare(path, out=folder, resume=True) == folder and (folder / "comparison.json").exists()


def test_every_arm_s_student_is_put_to_humaneval(
    tiny_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the harness, whose own tests are elsewhere: here it passes the second problem for KD students alone."""
    asked = []

    def evaluate(source: Path, config: Any, out: Path, note: Any) -> dict[str, Any]:
        asked.append(
            (str(source.relative_to(tmp_path)), str(out.relative_to(tmp_path)), config.max_new_tokens)
        )
        passed = {f"HumanEval/{n}": int(n == 1 and source.parent.name.startswith("kd")) for n in range(164)}
        return {"status": "finished", "passed_by_problem": passed}

    monkeypatch.setattr("potstill.evals.humaneval.evaluate", evaluate)
    monkeypatch.setattr("potstill.evals.humaneval.require_sandbox", lambda *_: None)
    section = "{seeds: [0, 1], budget: steps, humaneval_tokens: 7}"
    folder = compare(tiny_recipe(compare=section), out=tmp_path / "out")
    assert folder is not None
    names = ["untouched-0", "ce-0", "ce-1", "kd-0", "kd-1"]
    assert asked == [(f"out/{name}/student", f"out/{name}/evals/humaneval", 7) for name in names]
    found = result(folder)
    scores = {name: arm["metrics"]["pass@1"] for name, arm in arms(found).items()}
    assert scores[CE]["mean"] == 0 and scores[CE]["high"] == pytest.approx(
        0.02289, abs=1e-5
    )  # Wilson, 0 of 164
    assert scores[KD]["mean"] == pytest.approx(1 / 164)
    one = next(d for d in found["differences"] if d["metric"] == "pass@1" and d["against"] == CE)
    assert one["shown"] is False  # one problem of 164 shows nothing
    open_ = (
        found["sentence"]
        .split("no difference of KD and plain training (CE only) is shown in")[1]
        .split(".")[0]
    )
    assert "HumanEval pass@1" in open_


def questions_file(tmp_path: Path) -> str:
    file = tmp_path / "q.jsonl"
    records = [{"q": f"{n}+1?", "a": n + 1, "topic": n // 4} for n in range(6)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return f"{{name: task, source: jsonl, path: {file}, question: q, answer: a, match: number, max_new_tokens: 3}}"


def students_know_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = tasks._load

    def load(source: str, *rest: Any) -> Any:
        arm = Path(source).parent.name

        def complete(model: Any, tokenizer: Any, settings: Any, requests: Any, *_: Any) -> list[Completion]:
            if arm.startswith("untouched"):
                raise InferenceFailed("NaN")
            numbers = [int(request.name.split(" ")[1]) for request in requests]
            return [
                Completion(f"{n + 1 if n == 0 or arm.startswith('kd') else 99}", 1, "eos", 0.0)
                for n in numbers
            ]

        monkeypatch.setattr("potstill.models.generate.complete", complete)
        return loads(source, *rest)

    monkeypatch.setattr(tasks, "_load", load)


def test_every_arm_s_student_answers_the_recipe_s_tasks(
    tiny_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The KD students answer all questions, the others only one, and the untouched student raises an error."""
    students_know_sums(monkeypatch)
    recipe = tiny_recipe(
        compare="{seeds: [0, 1], budget: steps}", evaluations=f"[{questions_file(tmp_path)}]"
    )
    folder = compare(recipe, out=tmp_path / "out")
    assert folder is not None
    found = result(folder)
    scores = {name: arm["metrics"].get("task-q") for name, arm in arms(found).items()}
    low, high = wilson(1, 6)
    assert scores[UNTOUCHED] is None and scores[CE] == {
        "mean": pytest.approx(1 / 6),
        "low": low,
        "high": high,
    }
    assert scores[KD]["mean"] == 1.0 and arms(found)[KD]["by_seed"]["task-q"] == [1.0, 1.0]
    one = next(d for d in found["differences"] if d["metric"] == "task-q")
    assert (one["arm"], one["against"], one["ahead"]) == (KD, CE, KD)
    assert one["mean"] == pytest.approx(5 / 6) and one["low"] > 0
    assert "accuracy in q (by 83.3 points)" in found["sentence"]
    assert "held-out rows and questions" in found["sentence"]
    assert any(
        "task-q has no accuracy for untouched: evals/task-q" in warning for warning in found["warnings"]
    )
    assert (folder / "kd-1" / "evals" / "task-q" / "answers.jsonl").is_file()
    page = report([folder], None, 48, False, Display(quiet=True)).read_text()
    assert "task-q" in page


def test_arms_are_paired_by_what_questions_share(
    tiny_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    students_know_sums(monkeypatch)
    asked = questions_file(tmp_path).replace("match:", "cluster: topic, match:")
    folder = compare(
        tiny_recipe(compare="{seeds: [0, 1], budget: steps}", evaluations=f"[{asked}]"), out=tmp_path / "out"
    )
    assert folder is not None
    found = result(folder)
    of = arms(found)[CE]["metrics"]["task-q"]
    low, high = wilson(1, 6, student_t(1))  # the two differ by less than as many independent questions would
    assert of == {"mean": pytest.approx(1 / 6), "low": pytest.approx(low), "high": pytest.approx(high)}
    one = next(d for d in found["differences"] if d["metric"] == "task-q")
    half = student_t(1) / 9  # of four questions and two, whose differences are 3/4 and 1
    assert (one["low"], one["high"]) == (pytest.approx(5 / 6 - half), pytest.approx(5 / 6 + half))
    assert not one["shown"]


def test_a_comparison_reads_the_answers_that_its_runs_have(
    tiny_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    whole = generate.complete

    def counting(*arguments: Any) -> Any:
        calls.append(len(arguments[3]))
        return whole(*arguments)

    monkeypatch.setattr(generate, "complete", counting)
    recipe = tiny_recipe(compare="{seeds: [0], budget: steps}", evaluations=f"[{questions_file(tmp_path)}]")
    folder = compare(recipe, out=tmp_path / "out")
    assert calls == [6, 6, 6]  # CE only, KD, and the untouched student
    assert folder is not None and arms(result(folder))[UNTOUCHED]["metrics"]["task-q"] is not None
    (folder / "comparison.json").unlink()
    assert compare(recipe, out=folder, resume=True) == folder and calls == [6, 6, 6]


def test_humaneval_that_cannot_run_is_told_before_the_first_arm(
    tiny_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise SandboxRefused("no namespaces, no Landlock", [])

    monkeypatch.setattr("potstill.evals.humaneval.read_problems", list)
    monkeypatch.setattr("potstill.evals.humaneval.Sandbox", refuse)
    path = tiny_recipe(compare="{humaneval_tokens: 7}")
    assert main(["compare", str(path), "--out", str(tmp_path / "out")]) == 2
    said = "error: compare.humaneval_tokens: no sandbox here: no namespaces, no Landlock. Set it to 0.\n"
    assert capsys.readouterr().err.endswith(said)
    assert not (tmp_path / "out").exists()


def test_a_random_student_is_random_by_the_seed(tiny_recipe: Write, tmp_path: Path) -> None:
    tiny_config(num_hidden_layers=2).save_pretrained(tmp_path / "config")
    path = tiny_recipe(student=f"{{name: config, model: {tmp_path / 'config'}}}", compare=SMALL)
    folder = compare(path, out=tmp_path / "out")
    assert folder is not None
    starts = [
        [receipt["student"]["weights_sha256_start"] for receipt in receipts(folder, f"{arm}-*")]
        for arm in ("ce", "kd")
    ]
    assert starts[0] == starts[1] and starts[0][0] != starts[0][1]
    assert sorted(path.name for path in folder.glob("untouched-*")) == ["untouched-0", "untouched-1"]


def test_arms_that_begin_with_other_weights_are_not_compared(
    tiny_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault planted: the plain arm's student is cut otherwise."""
    honest = workflow._recipe_of

    def cheating(arm: str, of: load.Recipe, seed: int, steps: int | None = None) -> load.Recipe:
        found = honest(arm, of, seed, steps)
        return found if arm != CE else replace(found, student=replace(found.student, rule="even", layers=3))

    monkeypatch.setattr(workflow, "_recipe_of", cheating)
    with pytest.raises(UserError, match="CE only, seed 0, started from"):
        compare(tiny_recipe(compare=SMALL), out=tmp_path / "out")


@pytest.mark.soak
def test_a_comparison_goes_on_where_a_kill_or_a_signal_cut_it_off(
    tiny_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_recipe(
        compare=SMALL, train="{steps: 6, rows_per_step: 4, lr: 1e-3, save_every: 2, device: cpu}"
    )
    uncut = compare(path, out=tmp_path / "uncut")
    assert uncut is not None
    out = tmp_path / "cut"
    command = [sys.executable, "-m", "potstill", "distill", str(path), "--out", str(out)]
    for run, number, code in (("ce-0", signal.SIGTERM, 143), ("kd-1", signal.SIGKILL, -signal.SIGKILL)):
        child = subprocess.Popen([*command, *(["--resume"] if out.exists() else [])], stderr=subprocess.PIPE)
        while child.poll() is None and not (out / run / "metrics.jsonl").exists():
            time.sleep(0.002)
        child.send_signal(number)
        told = child.communicate()[1].decode()
        assert child.returncode == code, told
        assert not (out / "comparison.json").exists()
    begun: list[str] = []
    monkeypatch.setattr(
        workflow, "distill", lambda *a, out, **k: begun.append(out.name) or distill(*a, out=out, **k)
    )
    assert compare(path, out=out, resume=True) == out
    assert "ce-0" not in begun and begun[0] == "kd-1"  # finished ones are kept as they are
    ours, theirs = result(out), result(uncut)
    for one, other in zip(ours["arms"], theirs["arms"], strict=True):
        assert one["by_seed"] == other["by_seed"]
    assert ours["differences"] == theirs["differences"]


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"compare": "{seeds: [1, 1]}"}, "compare.seeds: [1, 1] lists a seed twice."),
        ({"compare": "{seeds: []}"}, "compare.seeds: a list of 0, wanted 1 or more entries."),
        ({"compare": "{seed: 1}"}, "compare.seed: unknown key. Did you mean compare.seeds?"),
        ({"compare": "{budget: tokens}"}, "compare.budget: 'tokens' is not one of time, steps."),
        (
            {"compare": "{}", "objective": "{kd_weight: 0, ce_weight: 1}"},
            "compare: objective.kd_weight is 0: there is no KD arm to compare.",
        ),
        (
            {"compare": "{corrected_steps: 5}", "teacher": "{name: fixture, vocab_size: 258}"},
            "compare.corrected_steps: teacher fixture has no weights to train. Set it to 0.",
        ),
        (
            {"compare": "{seeds: [0], budget: steps, corrected_steps: 4}"},
            "compare.corrected_steps: 4 steps of the teacher's own training leave none of 4. Set it lower.",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(
    sections: dict[str, str],
    said: str,
    tiny_recipe: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["compare", str(tiny_recipe(**sections)), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err.splitlines()
    assert said in told[-1] and [line for line in told if line.startswith("error: ")] == [told[-1]]
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_comparison_is_refused(
    tiny_recipe: Write, tmp_path: Path, whole: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = whole
    for arguments, said in {
        (str(path), "--out", str(folder)): f"{folder}: already exists",
        (str(path), "train.lr=1", "--resume", "--out", str(folder)): "another recipe",
        (str(path), "--resume", "--out", str(tmp_path / "none")): "plan.json",
    }.items():
        assert main(["compare", *arguments]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_recipe_s_section_is_not_passed_over(tiny_recipe: Write, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the recipe has a section `compare`"):
        distill(tiny_recipe(compare=SMALL), out=tmp_path / "out")


def test_the_verb_gives_its_result_as_json(
    tiny_recipe: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compare.seeds=[0]", "compare.budget=steps", "--out", str(tmp_path / "out"), "--json"]
    assert main(["distill", str(tiny_recipe(compare="{}")), *arguments]) == 0
    assert json.loads(capsys.readouterr().out) == result(tmp_path / "out")
