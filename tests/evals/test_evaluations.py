"""A recipe's `evaluations`: their fields reach the evaluation, and one that fails costs the run nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from potstill.cli.main import main
from potstill.errors import UserError
from potstill.evals import humaneval, lm_eval
from potstill.evals.sandbox.sandbox import SandboxRefused
from potstill.evals.subject import Subject
from potstill.recipe.sections_evaluation import HumanEvalConfig, LmEvalConfig

Recipe = Callable[..., Path]
HUMANEVAL = {"samples": 3, "temperature": 0.5, "max_new_tokens": 7, "limit": 2, "seed": 9}
LM_EVAL = {
    "tasks": ["arc_easy", "piqa"],
    "limit": 2,
    "add_bos_token": True,
    "apply_chat_template": False,
    "seed": 9,
}


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    return Subject(tmp_path / "student", tmp_path / "out", "cpu", None, lambda line: None)


@pytest.mark.parametrize("field", HUMANEVAL)
def test_a_field_of_humaneval_is_that_of_its_settings(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    given: list[Any] = []

    def evaluate(source: Path, settings: humaneval.HumanEvalSettings, out: Path, note: Any) -> Any:
        given.extend([source, settings, out])
        score = {"value": 0.25, "low": 0.2, "high": 0.3, "method": "Wilson"}
        return {"status": "finished", "scores": {"pass@1": score}}

    monkeypatch.setattr(humaneval, "evaluate", evaluate)
    figures = HumanEvalConfig(**{field: HUMANEVAL[field]}).run(subject)  # type: ignore[arg-type]
    assert figures == {"pass@1/value": 0.25, "pass@1/low": 0.2, "pass@1/high": 0.3}
    source, settings, out = given
    assert (source, out, settings.device) == (subject.folder, subject.out, subject.device)
    default = humaneval.HumanEvalSettings()
    assert getattr(settings, field) == HUMANEVAL[field] != getattr(default, field)


def test_failed_inference_is_no_score(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = {"status": "inference_failed", "why": "NaN logits"}
    monkeypatch.setattr(humaneval, "evaluate", lambda *_: failed)
    with pytest.raises(UserError, match=r"humaneval: inference failed.*NaN logits"):
        HumanEvalConfig().run(subject)


@pytest.mark.parametrize("field", LM_EVAL)
def test_a_field_of_lm_eval_is_that_of_its_settings(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    given: list[Any] = []

    def evaluate(source: Path, settings: lm_eval.LmEvalSettings, out: Path, note: Any) -> Any:
        given.append(settings)
        return {"results": {"piqa": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "piqa"}}}

    monkeypatch.setattr(lm_eval, "evaluate", evaluate)
    options: dict[str, Any] = {"tasks": ["piqa"]} | {field: LM_EVAL[field]}
    assert LmEvalConfig(**options).run(subject) == {"piqa/acc,none": 0.5, "piqa/acc_stderr,none": 0.1}
    wanted = tuple(LM_EVAL["tasks"]) if field == "tasks" else LM_EVAL[field]  # type: ignore[arg-type]
    assert getattr(given[0], field) == wanted


@pytest.mark.parametrize("error", [UserError("no sandbox here."), ZeroDivisionError("division by zero")])
def test_an_evaluation_that_fails_leaves_its_reason_and_the_run_is_finished(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def failing(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(humaneval, "evaluate", failing)
    monkeypatch.setattr(humaneval, "require_sandbox", lambda *_: None)
    recipe = tiny_recipe(evaluations="[humaneval, {name: humaneval, limit: 3}]")
    assert main(["distill", str(recipe), "--out", str(tmp_path / "run")]) == 0
    receipt = json.loads((tmp_path / "run" / "receipt.json").read_text())
    assert set(receipt["evaluations"]) == {"humaneval", "humaneval-1"}
    assert all(
        reason.startswith("not run: ") and str(error)[:8] in reason
        for reason in receipt["evaluations"].values()
    )


@pytest.mark.parametrize("verb", ["distill", "check", "compare"])
@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ("humaneval", "evaluations: no sandbox here: no namespaces. Remove humaneval."),
        ("{name: humaneval, samples: 2}", "evaluations.humaneval.samples: 2: at temperature 0 all samples"),
        ("{name: lm_eval, tasks: [piqa]}", "lm-eval: the package is not installed. Run: pip install"),
    ],
)
def test_an_evaluation_that_cannot_run_here_is_refused_before_the_run(
    tiny_recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    verb: str,
    evaluation: str,
    message: str,
) -> None:
    def refuse() -> None:
        raise SandboxRefused("no namespaces", [])

    monkeypatch.setattr(humaneval, "read_problems", list)
    monkeypatch.setattr(humaneval, "Sandbox", refuse)
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    recipe = tiny_recipe(evaluations=f"[{evaluation}]")
    out = [] if verb == "check" else ["--out", str(tmp_path / "run")]
    assert main([verb, str(recipe), *out]) == 2
    assert f"error: {message}" in capsys.readouterr().err and not (tmp_path / "run").exists()
