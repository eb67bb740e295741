"""A second profile of a run: whose repeats are added, and whose are not. The models' workers are doubles."""

from __future__ import annotations

import json
import random
import shutil
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from potstill import distill
from potstill.cli.main import main
from potstill.evals.speed import RATES, Model
from potstill.runs.gains import profile_of, sentences
from potstill.runs.run_dir import RunDir
from potstill.workflows import profile as workflow

Json = dict[str, Any]
QUICK = ("--threads", "1", "--repeats", "3", "--prompt-tokens", "12", "--new-tokens", "4")


class Workers:
    """Stands in for `measure`: random figures, and a failure of the model whose path contains `fails`."""

    def __init__(self) -> None:
        self.draw, self.version, self.fails, self.peak = random.Random(0), "1", "", 9000

    def __call__(self, models: Sequence[Model], rounds: int) -> None:
        for model in models:
            if self.fails and self.fails in str(model.request["model"]):
                model.why = "out of memory"
                continue
            model.about = {"version": self.version}
            model.measured = [self.one() for _ in range(rounds)]
            self.peak -= 1
            model.memory = {"peak_memory_bytes": self.peak}

    def one(self) -> Json:
        seconds = {name: self.draw.uniform(0.1, 1) for name in ("prefill_s", "first_token_s", "decoding_s")}
        return {"prefill_tokens": 12, "decoded_tokens": 3} | seconds


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, corpus_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("again")
    shutil.copytree(teacher_folder, folder / "teacher")
    recipe = folder / "small.yaml"
    recipe.write_text(
        f"corpus: {{name: text, path: {corpus_folder}, tokens_per_row: 32, heldout_rows: 4}}\n"
        f"teacher: {{name: torch, model: {folder / 'teacher'}}}\n"
        "student: {name: cut, layers: 1, rule: first_last, repair: false}\n"
        "train: {steps: 1, rows_per_step: 2, lr: 1e-3, device: cpu}\n"
        "allow_weak_teacher: true\n"
    )
    return distill(recipe, out=folder / "run").path


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Workers:
    double = Workers()
    monkeypatch.setattr(workflow, "measure", double)
    monkeypatch.setattr(workflow.acceptance, "measured", lambda request: "not run: a double")
    return double


@pytest.fixture
def run(finished: Path, tmp_path: Path, workers: Workers) -> Path:
    """A run that was profiled once."""
    copied = Path(shutil.copytree(finished, tmp_path / "run"))
    assert main(["profile", str(copied), *QUICK]) == 0
    return copied


def profile(run: Path, *flags: str) -> Json:
    assert main(["profile", str(run), *QUICK, *flags]) == 0
    return dict(json.loads((run / "profile.json").read_text()))


def found_in(run: Path) -> Json:
    return dict(json.loads((run / "profile.json").read_text()))


def edit(run: Path, change: Callable[[Json], Any]) -> None:
    found = found_in(run)
    change(found)
    (run / "profile.json").write_text(json.dumps(found))


def test_repeats_of_the_same_are_added_and_every_figure_is_of_all(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (first,) = (entry for entry in found_in(run)["speeds"] if "why" not in entry)
    capsys.readouterr()
    (both,) = (entry for entry in profile(run, "--repeats", "4")["speeds"] if "why" not in entry)
    shown = capsys.readouterr()
    assert "with the repeats of 1 earlier" in shown.err and "7 repeats of 2 profiles in turns" in shown.out
    assert both["dates"][:1] == first["dates"] and len(both["dates"]) == 2
    for who in ("teacher", "student"):
        all_of_it = both[who]["measured"]
        assert all_of_it[:3] == first[who]["measured"] and both[who]["repeats"] == len(all_of_it) == 7
        assert both[who]["peak_memory_bytes"] == first[who]["peak_memory_bytes"] > 0
        for name, of in RATES.items():
            values = [of(one) for one in all_of_it]
            assert both[who][name] == {
                "median": statistics.median(values),
                "low": min(values),
                "high": max(values),
            }
    pairs = zip(both["student"]["measured"], both["teacher"]["measured"], strict=True)
    slower = [teacher["prefill_s"] / student["prefill_s"] for student, teacher in pairs]
    assert both["ratios"]["prefill_tokens_per_s"]["high"] == pytest.approx(max(slower))
    edit(run, lambda found: found["speeds"][0]["dates"].__setitem__(0, "2026-01-01T00:00:00+00:00"))
    three = profile(run)
    assert three["speeds"][0]["student"]["repeats"] == 10
    (said,) = (line for line in sentences(three) if line.startswith("Medians"))
    dates = three["speeds"][0]["dates"]
    assert "10 repeats of 3 profiles" in said and f"from 2026-01-01T00:00:00+00:00 to {dates[-1]}." in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: found["settings"].update(threads=64), "settings.threads was 64, is 1"),
        (lambda found: found["settings"].update(prompt_sha256="0"), "settings.prompt_sha256 was"),
        (lambda found: found["machine"].update(processor="another"), "machine.processor was"),
        (lambda found: found["machine"].update(host="another"), "machine.host was"),
        (lambda found: found["libraries"].update(torch="0.1"), "libraries.torch was"),
        (lambda found: found.update(python="3.10.0"), "python was"),
        (lambda found: found.update(format=1), "format was 1, is 2"),
        (lambda found: found.update(settings=None), "settings was None"),
        (lambda found: found["speeds"][0]["sha256"].update(student="0"), ""),
        (lambda found: found["speeds"][0]["sha256"].update(teacher="0"), ""),
        (lambda found: found["speeds"][0]["teacher"].update(version="another"), ""),
        (lambda found: found["speeds"][0]["teacher"]["measured"].pop(), ""),
        (lambda found: found["speeds"][0]["teacher"]["measured"][0].update(prefill_s=0), ""),
        (lambda found: found["speeds"][0]["teacher"]["measured"][0].pop("decoding_s"), ""),
        (lambda found: found["speeds"][0]["student"].update(measured="abc"), ""),
        (lambda found: found["speeds"][0].update(teacher="not run: why"), ""),
        (lambda found: found["speeds"][0].update(dates=None), ""),
        (lambda found: found["speeds"][0].update(weights=["float32"]), ""),
        (lambda found: found.update(speeds=None), ""),
        (lambda found: found.pop("speeds"), ""),
    ],
)
def test_repeats_of_anything_else_and_damaged_ones_are_not(
    run: Path, change: Callable[[Json], Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(run, change)
    capsys.readouterr()
    entry = profile(run)["speeds"][0]
    assert entry["student"]["repeats"] == entry["teacher"]["repeats"] == 3 and len(entry["dates"]) == 1
    assert (
        "starting a new profile, without the earlier repeats: " + said in capsys.readouterr().err
    ) == bool(said)


def test_fresh_and_a_damaged_file_start_a_new_profile(run: Path) -> None:
    assert profile(run, "--fresh")["speeds"][0]["student"]["repeats"] == 3
    assert profile(run)["speeds"][0]["student"]["repeats"] == 6
    (run / "profile.json").write_text("{")
    assert profile(run)["speeds"][0]["student"]["repeats"] == 3


def test_a_model_that_fails_this_time_leaves_the_earlier_entry(
    run: Path, workers: Workers, capsys: pytest.CaptureFixture[str]
) -> None:
    before = found_in(run)["speeds"][0]
    workers.fails = "teacher"
    capsys.readouterr()
    assert profile(run)["speeds"][0] == before
    assert "since this time teacher: out of memory" in capsys.readouterr().err
    workers.fails = ""
    assert profile(run)["speeds"][0]["teacher"]["repeats"] == 6


def test_other_weights_at_the_same_place_are_another_model(run: Path) -> None:
    """A teacher whose config alone differs has the same weights, and other figures."""
    resolved = (run / "resolved.yaml").read_text()
    (source,) = {line.split()[-1] for line in resolved.splitlines() if line.strip().startswith("model:")}
    shutil.copytree(source, run.parent / "teacher")
    (run / "resolved.yaml").write_text(resolved.replace(source, str(run.parent / "teacher")))
    assert profile(run)["speeds"][0]["teacher"]["repeats"] == 6
    config = run.parent / "teacher" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 0.01}))
    assert profile(run)["speeds"][0]["teacher"]["repeats"] == 3


def test_the_first_format_is_still_read_and_a_damaged_profile_is_one_line(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def as_before(found: Json) -> None:
        found["format"] = 1
        for entry in found["speeds"]:
            entry.pop("dates", None)
            entry.pop("sha256", None)

    edit(run, as_before)
    date = found_in(run)["date"]
    (said,) = (line for line in sentences(profile_of(RunDir(run))) if line.startswith("Medians"))
    assert "Medians of 3 repeats in turns" in said and said.endswith(f"{date}.")
    edit(run, lambda found: found["speeds"][0]["teacher"].pop("prefill_tokens_per_s"))
    for command in (["show", str(run)], ["report", str(run), "--no-models"]):
        capsys.readouterr()
        assert main(command) == 2
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))
        assert "profile.json: damaged" in line and "profile the run again" in line
