"""Run directories, stores and checkpoints that potstill 0.1.0 wrote: `tests/data/v1`, whose `make.py` says how.

They are opened by the command line, somewhere else than they were written. Numbers of that time are another
machine's: they are met within rounding, and to the last bit where this machine computes like that one.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from potstill.cli.main import main

OLD = Path(__file__).parent / "data" / "v1"
PLACE = "/tmp/potstill-v1"  # where they were written
RUNS = ("finished", "interrupted")
AS_THEN = ("student.rule=first_last", "student.repair=false")
"""What a new run needs for the student that was the default."""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy, in which the paths of the runs lead to where it is now."""
    to = tmp_path / "v1"
    shutil.copytree(OLD, to)
    for run in RUNS:
        for name in ("resolved.yaml", "corpus.json"):
            file = to / run / name
            assert PLACE in file.read_text()
            file.write_text(file.read_text().replace(PLACE, str(to)))
    return to


def numbers(run: Path) -> list[dict[str, float]]:
    """Every line of metrics, without those of the clock and of the memory."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    timed = ("speed/", "memory/")
    return [{name: v for name, v in line.items() if not name.startswith(timed)} for line in lines]


def receipt(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "receipt.json").read_text()))


def assert_close(found: list[dict[str, float]], wanted: list[dict[str, float]]) -> None:
    assert len(found) == len(wanted)
    # A gradient's norm after eight steps differs by 1.1e-5 between an EPYC and a Xeon with AMX; where a moment of the
    # checkpoint is lost, by 0.3, and every loss by 5e-3 or more.
    norm = "train/grad_norm"
    for one, two in zip(found, wanted, strict=True):
        assert one.pop(norm, 0) == pytest.approx(two.pop(norm, 0), rel=1e-4)
        assert one == pytest.approx(two, rel=1e-5, abs=1e-6)


def test_a_finished_run_is_shown_and_reported_where_its_models_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, page = tmp_path / "moved", tmp_path / "report.html"
    shutil.copytree(OLD / "finished", run)
    assert main(["show", str(run), "--json"]) == 0
    shown, logged = json.loads(capsys.readouterr().out), numbers(run)
    assert shown["status"] == {"state": "finished"} and shown["receipt"] == receipt(run)
    assert shown["metrics"]["train/loss"]["last"] == logged[-2]["train/loss"]
    assert shown["metrics"]["heldout/kl"]["first"] == logged[0]["heldout/kl"]
    assert main(["report", str(run), "--no-models", "--out", str(page)]) == 0
    assert receipt(run)["student"]["weights_sha256_end"][:12] in page.read_text()


def test_its_student_is_evaluated_as_it_was(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(old / "finished"), "--json"]) == 0
    found, recorded = json.loads(capsys.readouterr().out), receipt(OLD / "finished")["heldout_best"]
    assert found == pytest.approx(recorded, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", ["sampled", "topk", "hidden"])
def test_a_store_is_sound_and_teaches_as_it_did(kind: str, old: Path) -> None:
    store, run = old / "stores" / kind, old / "run"
    assert main(["store", "verify", str(store)]) == 0
    teacher = f"teacher={{name: store, path: {store}, model: teacher}}"
    assert main(["distill", str(old / "recipe.yaml"), teacher, *AS_THEN, "--out", str(run)]) == 0
    found = [line["train/loss"] for line in numbers(run) if "train/loss" in line]
    assert found == pytest.approx(json.loads((OLD / "losses.json").read_text())[kind], rel=1e-5)


def test_an_interrupted_run_goes_on_from_its_checkpoint_and_is_the_run_that_was_not(
    old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run, before = str(old / "recipe.yaml"), old / "interrupted", numbers(OLD / "interrupted")
    assert main(["distill", recipe, "--resume", "--out", str(run)]) == 0
    assert f"resumed from {run / 'checkpoints'}" in capsys.readouterr().err
    assert main(["distill", recipe, *AS_THEN, "--out", str(old / "fresh")]) == 0
    whole = OLD / "finished"
    assert numbers(run)[: len(before)] == before == numbers(whole)[: len(before)]
    assert_close(numbers(run), numbers(whole))
    assert_close(numbers(old / "fresh"), numbers(whole))
    if numbers(old / "fresh") == numbers(whole):  # this machine computes like that one
        assert numbers(run) == numbers(whole)
        ours, theirs = receipt(run), receipt(whole)
        for name in ("heldout_last", "heldout_best", "student_is_of_step", "positions"):
            assert ours[name] == theirs[name], name
        assert {name: ours["samples"][name] for name in theirs["samples"]} == theirs["samples"]
        assert ours["student"]["weights_sha256_end"] == theirs["student"]["weights_sha256_end"]
