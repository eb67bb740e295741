"""`potstill profile`: what is written, where it is shown, and what is refused. No test asserts a time."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import warm
import yaml
from conftest import make_corpus
from export.tiny_models import make_model, make_tokenizer, needs_llama_cpp

from potstill import distill
from potstill.cli.main import main
from potstill.report.tradeoff import Quality, picture, qualities
from potstill.runs.gains import profile_of, rows, sentences_for_others
from potstill.runs.run_dir import RunDir
from potstill.workflows import profile as workflow

Recipe = Callable[..., Path]
QUICK = ("--threads", "1", "--repeats", "3", "--prompt-tokens", "12", "--new-tokens", "4")
SPREAD = {"median", "low", "high"}


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose models llama.cpp can read, too, with one export, profiled by the command."""
    folder = tmp_path_factory.mktemp("profile")
    make_model("llama").save_pretrained(folder / "teacher")
    make_tokenizer("gpt-2").save_pretrained(folder / "teacher")
    make_corpus(folder / "text")
    recipe = folder / "small.yaml"
    recipe.write_text(
        f"corpus: {{name: text, path: {folder / 'text'}, tokens_per_row: 32, heldout_rows: 4}}\n"
        f"teacher: {{name: torch, model: {folder / 'teacher'}}}\n"
        "student: {name: cut, layers: 1, rule: first_last, repair: false}\n"
        "train: {steps: 2, rows_per_step: 4, lr: 1e-3, device: cpu}\n"
        "allow_weak_teacher: true\n"
    )
    run = distill(recipe, out=folder / "run").path
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", warm.python())
        assert main(["export", str(run), "--format", "gguf", "--quantize", "f16"]) == 0
        assert main(["profile", str(run), *QUICK]) == 0
    return run


def found_in(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "profile.json").read_text()))


@needs_llama_cpp
def test_every_figure_of_both_models_is_there(profiled: Path) -> None:
    found, receipt = found_in(profiled), RunDir(profiled).receipt()
    assert found["of"] == receipt["output"]
    assert found["settings"] == {
        "threads": 1,
        "repeats": 3,
        "prompt_tokens": 12,
        "new_tokens": 4,
        "device": "cpu",
        "dtype": "float32",
        "prompt": "held-out text",
        "prompt_sha256": found["settings"]["prompt_sha256"],
    }
    assert found["machine"]["processors"] >= 1 and found["machine"]["memory_bytes"] > 2**28
    teacher, student = found["models"]["teacher"], found["models"]["student"]
    assert student["bytes"] == (profiled / "student" / "model.safetensors").stat().st_size
    assert teacher["parameters"] > student["parameters"] > 0
    (export,) = found["exports"]
    assert export["bytes"] == next(profiled.glob("exports/*.gguf")).stat().st_size
    assert [(speed["runtime"], speed["weights"]) for speed in found["speeds"]] == [
        ("transformers", "float32"),
        ("llama.cpp", "f16"),
    ]
    for speed in found["speeds"]:
        for who in ("teacher", "student"):
            figures = speed[who]
            assert figures["repeats"] == 3 and figures["peak_memory_bytes"] > 2**20
            for name in ("prefill_tokens_per_s", "decoding_tokens_per_s", "first_token_s"):
                assert figures[name].keys() == SPREAD
                assert 0 < figures[name]["low"] <= figures[name]["median"] <= figures[name]["high"]
        assert speed["ratios"].keys() == {"prefill_tokens_per_s", "decoding_tokens_per_s", "first_token_s"}
    of_gguf = found["speeds"][1]
    assert of_gguf["student_bytes"] == export["bytes"] < of_gguf["teacher_bytes"]


def test_acceptance_is_of_the_held_out_rows_and_within_what_kl_allows(profiled: Path) -> None:
    found, run = found_in(profiled)["acceptance"], RunDir(profiled)
    assert found["expected"]["positions"] == run.corpus()["heldout_positions"]
    # Pinsker: total variation is at most sqrt(KL / 2), and so is its mean at most that of the mean.
    kl = run.receipt()["heldout_best"]["heldout/kl"]
    assert 1 > found["expected"]["mean"] >= 1 - math.sqrt(kl / 2)
    measured = found["measured"]
    assert measured["new_tokens"] == 4 * 4 and measured["rounds"] + measured["accepted"] == 16
    assert (
        measured["low"] <= measured["rate"] == measured["accepted"] / measured["judged"] <= measured["high"]
    )


def test_it_is_shown_in_the_terminal_the_report_and_the_card(
    profiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(profiled, tmp_path / "run"))
    licenses = ("publish.teacher_license=mit", "publish.data_license=mit", "--allow-regression")

    def shown() -> tuple[str, str, str]:
        capsys.readouterr()
        assert main(["show", str(run)]) == 0
        terminal = capsys.readouterr().out
        assert main(["report", str(run), "--no-models"]) == 0
        assert main(["publish", str(run), "--repo", "me/small", "--dry-run", *licenses]) == 0
        page = (run / "report.html").read_text()
        return terminal, page, (run / "publish" / "README.md").read_text()

    profile = profile_of(RunDir(run))
    expected = f"{profile['acceptance']['expected']['mean']:.4f}"
    terminal, page, card = shown()
    assert all(expected in text for text in (terminal, page, card))
    assert 'id="gains"' in page and "## What was gained" in card
    assert len(rows(profile)) == 2 + 1 + 4 * len([s for s in profile["speeds"] if "why" not in s])
    for row in rows(profile):
        assert row.teacher in page and row.teacher.replace("[", r"\[").replace("]", r"\]") in card
    assert str(tmp_path) not in card
    capsys.readouterr()
    assert main(["show", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["profile"] == profile
    # Of another student it says nothing, and neither does a run that was not profiled.
    for change in ({"of": {"model.safetensors": "0" * 64}}, None):
        RunDir(run).write_profile({**profile, **change} if change else {})
        for text in shown():
            assert expected not in text and "gained" not in text and 'id="gains"' not in text


@pytest.mark.usefixtures("warm_python")
def test_what_cannot_be_measured_is_not_run_and_the_rest_is(
    profiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher that is gone, and no llama.cpp."""
    run = Path(shutil.copytree(profiled, tmp_path / "run"))
    text = run.joinpath("resolved.yaml").read_text()
    run.joinpath("resolved.yaml").write_text(text.replace(f"{profiled.parent}/teacher", "/nowhere/teacher"))
    monkeypatch.setattr(workflow.importlib.util, "find_spec", lambda name: None)
    assert main(["profile", str(run), *QUICK]) == 0
    found = found_in(run)
    assert found["models"]["teacher"].startswith("not run: ") and "/nowhere/teacher" in str(found["models"])
    in_transformers, in_llama_cpp = found["speeds"]
    assert in_transformers["teacher"] == found["models"]["teacher"] and in_transformers["ratios"] == {}
    assert in_transformers["student"]["repeats"] == 3
    assert in_llama_cpp["why"].startswith("not run: xllamacpp")
    assert found["acceptance"] == dict.fromkeys(("expected", "measured"), found["models"]["teacher"])
    assert found["settings"]["prompt"] == "random ids"
    assert {row.teacher for row in rows(found)} == {"–"}
    for_others = " ".join(sentences_for_others(found))  # a reason may name a folder of this machine
    assert "Not run: teacher; " in for_others and "/nowhere" not in for_others


def test_another_model_in_the_teachers_place_is_not_run(profiled: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(profiled.parent, tmp_path / "all"))
    run, before = folder / "run", profiled.joinpath("resolved.yaml").read_text()
    run.joinpath("resolved.yaml").write_text(
        before.replace(f"{profiled.parent}/teacher", f"{folder}/teacher")
    )
    make_model("llama", intermediate_size=64).save_pretrained(folder / "teacher")
    assert main(["profile", str(run), *QUICK]) == 0
    found = found_in(run)
    assert found["models"]["teacher"].startswith("not run: ") and "sha256" in found["models"]["teacher"]
    assert {speed["teacher"] for speed in found["speeds"] if "why" not in speed} == {
        found["models"]["teacher"]
    }
    assert {row.teacher for row in rows(found)} == {"–"}


@pytest.mark.soak
@needs_llama_cpp
def test_of_a_store_it_is_the_captured_model_that_is_run(tiny_recipe: Recipe, tmp_path: Path) -> None:
    assert main(["capture", str(tiny_recipe()), "--out", str(tmp_path / "store")]) == 0
    recipe = tiny_recipe("stored.yaml", teacher=f"{{name: store, path: {tmp_path / 'store'}}}")
    run = distill(recipe, out=tmp_path / "run").path
    assert main(["profile", str(run), *QUICK]) == 0
    found = found_in(run)  # by processes that begin with nothing
    assert found["models"]["teacher"]["parameters"] > found["models"]["student"]["parameters"]
    assert found["speeds"][0]["teacher"]["repeats"] == found["speeds"][0]["student"]["repeats"] == 3
    assert found["acceptance"]["expected"].startswith("not run: ")  # its targets are a sample
    assert found["acceptance"]["measured"]["new_tokens"] > 0
    assert found["settings"]["prompt"] == "held-out text"
    assert found["speeds"][1]["why"].startswith("not run: no GGUF file")
    resolved = yaml.safe_load((run / "resolved.yaml").read_text())
    resolved["teacher"]["model"] = "/nowhere/teacher"
    (run / "resolved.yaml").write_text(yaml.safe_dump(resolved))
    assert main(["profile", str(run), *QUICK]) == 0
    gone = found_in(run)
    assert gone["models"]["teacher"] == gone["acceptance"]["measured"] and gone["speeds"][0]["ratios"] == {}
    assert (
        gone["models"]["teacher"].startswith("not run: ") and "/nowhere/teacher" in gone["models"]["teacher"]
    )


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--repeats", "2"), "--repeats 2"),
        (("--threads", "0"), "--threads 0"),
        (("--threads", "100000"), "--threads 100000"),
        (("--new-tokens", "1"), "--new-tokens 1"),
        (("--prompt-tokens", "0"), "--prompt-tokens 0"),
        (("--prompt-tokens", "5000"), "--prompt-tokens"),
        (("--device", "cuda:99"), "cuda:99"),
    ],
)
def test_settings_that_nothing_can_be_measured_with_are_refused(
    profiled: Path, flags: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (profiled / "profile.json").read_bytes()
    capsys.readouterr()
    assert main(["profile", str(profiled), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line and (profiled / "profile.json").read_bytes() == before


def test_a_run_that_is_not_finished_or_not_whole_is_refused(
    profiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(profiled, tmp_path / "run"))
    (run / "profile.json").unlink()
    changed = bytearray((run / "student" / "model.safetensors").read_bytes())
    changed[-2] ^= 1
    (run / "student" / "model.safetensors").write_bytes(changed)
    for why in ("model.safetensors", "stopped"):
        capsys.readouterr()
        assert main(["profile", str(run), *QUICK]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert why in line and not (run / "profile.json").exists()
        RunDir(run).set_status("stopped")
    assert main(["profile", str(tmp_path / "none")]) == 2


def test_the_picture_says_in_words_what_it_draws() -> None:
    receipt = {
        "heldout_first": {"heldout/kl": 1.0, "heldout/agreement": 0.25},
        "heldout_best": {"heldout/kl": 0.5, "heldout/agreement": 0.75},
    }
    profile = {"acceptance": {"expected": {"mean": 0.625}}}
    of = qualities(receipt, profile, {"task-sums": 0.125})
    assert of == [
        Quality("top-1 agreement", 0.75, 0.25),
        Quality("exp(-KL)", math.exp(-0.5), math.exp(-1.0)),
        Quality("expected acceptance", 0.625),
        Quality("task-sums", 0.125),
    ]
    drawn = picture(of, {"weights": 0.5, "decoding in transformers, float32": 2.0})
    label = drawn.split('aria-label="')[1].split('"')[0]
    for said in (
        "top-1 agreement 0.750 (untouched 0.250)",
        "exp(-KL) 0.607 (untouched 0.368)",
        "expected acceptance 0.625",
        "task-sums 0.125",
        "weights 0.5",
        "decoding in transformers, float32 2",
    ):
        assert said in label
    assert drawn.count('class="whisker') == 4 and drawn.count("stroke") == 0
    assert picture(of, {}) == "" == picture([], {"weights": 0.5})
