"""What is published, with a card of the run's own numbers, and what is refused, with one line for each reason."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import make_model
from gguf import GGUFWriter
from huggingface_hub import ModelCard
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

from potstill import distill
from potstill.cli.main import main
from potstill.errors import UserError
from potstill.io.hashing import file_sha256
from potstill.models.model_files import folder_sha256
from potstill.publish.licenses import Parent, license_of, settle
from potstill.publish.markdown import block
from potstill.runs.run_dir import RunDir
from publish.lab import edit, planned, publish

Change = Callable[[Path], None]


def in_receipt(**values: Any) -> Change:
    return lambda run: edit(run / "receipt.json", lambda receipt: receipt.update(values))


def not_finished(run: Path) -> None:
    (run / "status.json").write_text('{"state": "stopped"}')


def with_nan(run: Path) -> None:
    """In the weights and in the receipt, as a run that wrote it would have it."""
    file = run / "student" / "model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[-1]
    tensors[name].flat[3] = np.nan
    save_file(tensors, file, metadata={"format": "pt"})
    edit(run / "receipt.json", lambda r: r["output"].update({file.name: file_sha256(file)}))


def changed(run: Path) -> None:
    file = run / "student" / "generation_config.json"
    file.write_text(file.read_text() + " ")


def one_more(run: Path) -> None:
    (run / "student" / "notes.txt").write_text("mine")


def one_less(run: Path) -> None:
    (run / "student" / "tokenizer.json").unlink()


def worse(run: Path) -> None:
    def change(receipt: dict[str, Any]) -> None:
        receipt["heldout_first"]["heldout/kl"], receipt["heldout_best"]["heldout/kl"] = 1.5, 2.0

    edit(run / "receipt.json", change)


def record(run: Path, **more: Any) -> dict[str, Any]:
    """As `potstill export` writes one of a GGUF file; the content of the file does not matter here."""
    place = run / "exports" / "small-F16.gguf"
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(gguf())
    return {
        "format": "f16",
        "file": "exports/small-F16.gguf",
        "sha256": file_sha256(place),
        "bytes": place.stat().st_size,
        "student_sha256": folder_sha256(run / "student"),
        "three_path": {
            "potstill": {"status": "passed", "prompts": 4, "tokens_equal": 4, "top1_equal": 4},
            "llama.cpp": {"status": "not run", "why": "xllamacpp is not installed"},
        },
    } | more


def gguf() -> bytes:
    """An empty one: magic, version, no tensors, one key."""
    key, value = b"general.architecture", b"llama"
    text = len(key).to_bytes(8, "little") + key + (8).to_bytes(4, "little")
    text += len(value).to_bytes(8, "little") + value
    return b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + (1).to_bytes(8, "little") + text


def failed_path(run: Path) -> None:
    paths = {"llama.cpp": {"status": "failed", "why": "top-1 equal on 3 of 4 prompts"}}
    in_receipt(exports=[record(run, three_path=paths)])(run)


def stale_export(run: Path) -> None:
    in_receipt(exports=[record(run, student_sha256="0" * 64)])(run)


def changed_export(run: Path) -> None:
    in_receipt(exports=[record(run, sha256="0" * 64)])(run)


def token_in_the_recipe(run: Path) -> None:
    (run / "recipe.yaml").write_text("# hf_" + "abcdefghij" * 3 + "\n")


def humaneval_of_another(run: Path) -> None:
    place = run / "evals" / "humaneval"
    place.mkdir(parents=True)
    settings = {"dtype": "float32", "weights_sha256": "0" * 64}
    (place / "humaneval.json").write_text(json.dumps({"status": "finished", "settings": settings}))


def task_of_another(run: Path) -> None:
    place = run / "evals" / "task-sums"
    place.mkdir(parents=True)
    settings = {"dtype": "float32", "weights_sha256": "0" * 64}
    (place / "result.json").write_text(json.dumps({"status": "finished", "settings": settings}))


def untouched_is_ahead(run: Path) -> None:
    lost = {"against": "untouched", "arm": "KD", "ahead": "untouched", "metric": "pass@1"}
    (run.parent / "comparison.json").write_text(json.dumps({"runs": [run.name], "differences": [lost]}))


REFUSED: dict[str, tuple[Change, str]] = {
    "not finished": (not_finished, "the run is stopped"),
    "no receipt": (lambda run: (run / "receipt.json").unlink(), "not finished"),
    "red check": (in_receipt(check_red=["labels"]), "the check `labels`"),
    "no check": (in_receipt(check={}), "its receipt has no check"),
    "weights not finite": (with_nan, "has a value that is not finite"),
    "another file": (changed, "generation_config.json: is not the file of the receipt"),
    "one file more": (one_more, "notes.txt: is not in the receipt"),
    "one file less": (one_less, "tokenizer.json: is missing"),
    "behind the untouched": (worse, "heldout/kl is 2.0000, that of the untouched student 1.5000"),
    "nothing learned": (in_receipt(student_is_of_step=0), "no evaluation was better"),
    "behind in the comparison": (untouched_is_ahead, "ahead of KD in pass@1"),
    "another's score": (humaneval_of_another, "the evaluation of another student"),
    "another's accuracy": (task_of_another, "the evaluation of another student"),
    "failed path": (failed_path, "fails when llama.cpp loads it: top-1 equal on 3 of 4"),
    "stale export": (stale_export, "another student"),
    "changed export": (changed_export, "small-F16.gguf: missing, or not the file"),
    "a token": (token_in_the_recipe, "holds what looks like a token"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_must_not_be_published_is_refused_in_one_line(
    name: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, reason = REFUSED[name]
    change(run)
    assert publish(run, "--dry-run") == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and reason in error
    assert not (run / "publish" / "plan.json").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--repo", "small"], "--repo small: "),
        (["--repo", "me/small", "train.steps=9"], "train.steps=9: a finished run"),
        (["--repo", "me/small", "publish.licence=mit"], "publish.licence: unknown key"),
        (["--repo", "me/small", "publish.license=A license"], "publish.license: 'A license'"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: list[str], reason: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["publish", str(run), "--dry-run", *options]) == 2
    assert reason in capsys.readouterr().err


def test_a_comparison_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "comparison.json").write_text("{}")
    assert publish(run, "--dry-run") == 2
    assert str(run / "kd-0") in capsys.readouterr().err


def test_an_unknown_license_is_refused_with_the_recipe_line_to_add(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish(run, "--dry-run", overrides=()) == 2
    teacher, data = capsys.readouterr().err.splitlines()
    assert "publish: {teacher_license: apache-2.0}" in teacher and "publish: {data_license:" in data
    resolved = run / "resolved.yaml"
    resolved.write_text(
        resolved.read_text()
        .replace("teacher_license: null", "teacher_license: mit")
        .replace("data_license: null", "data_license: cc0-1.0")
    )
    assert publish(run, "--dry-run", overrides=()) == 0
    assert "license: mit\n" in (run / "publish" / "README.md").read_text()


APACHE, MIT, CC0 = "apache-2.0", "mit", "cc0-1.0"
SETTLED = [
    ((APACHE, CC0), None, APACHE),
    ((MIT, APACHE, CC0), None, MIT),
    ((APACHE, "cc-by-sa-4.0"), None, "cc-by-sa-4.0"),
    (("llama3.2", CC0), None, "llama3.2"),
    ((APACHE, CC0), "gpl-3.0", "gpl-3.0"),
    (("gemma", "cc-by-sa-4.0"), "gemma", "gemma"),
    (("qwen-research", CC0), None, "qwen-research"),
]
UNSETTLED = [
    ((None, CC0), None, "its files name none"),
    (("cc-by-nd-4.0", CC0), APACHE, "does not permit sharing derivatives"),
    (("cc-by-nc-nd-4.0", CC0), None, "does not permit sharing derivatives"),
    (("gemma", "cc-by-sa-4.0"), None, "require different terms"),
    (("gemma", "cc-by-sa-4.0"), MIT, "require different terms"),
    (("cc-by-nc-4.0", CC0), MIT, "requires cc-by-nc-4.0"),
]


def parents(licenses: tuple[str | None, ...]) -> list[Parent]:
    roles = ("student", "teacher", "data")[-len(licenses) :]
    return [Parent(role, "x", license, "y") for role, license in zip(roles, licenses, strict=True)]


@pytest.mark.parametrize(("licenses", "requested", "settled"), SETTLED)
def test_the_license_follows_from_the_parents(
    licenses: tuple[str | None, ...], requested: str | None, settled: str
) -> None:
    assert settle(parents(licenses), requested).license == settled


@pytest.mark.parametrize(("licenses", "requested", "reason"), UNSETTLED)
def test_a_license_that_the_parents_do_not_allow_is_refused(
    licenses: tuple[str | None, ...], requested: str | None, reason: str
) -> None:
    with pytest.raises(UserError, match=re.escape(reason)):
        settle(parents(licenses), requested)


def test_a_license_is_read_from_a_card_and_a_config(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: MIT\n---\n# x\n")
    assert license_of(str(tmp_path)) == {"license": "mit", "read_from": "README.md"}
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: qwen-research\n---\n")
    assert license_of(str(tmp_path))["license"] == "qwen-research"
    (tmp_path / "README.md").write_text("---\nlicense: [mit, gpl-3.0]\n---\n")
    (tmp_path / "config.json").write_text('{"license": "apache-2.0"}')
    assert license_of(str(tmp_path)) == {"license": "apache-2.0", "read_from": "config.json"}
    assert license_of(str(tmp_path / "nothing"))["license"] is None


def test_the_card_s_numbers_are_those_of_the_receipt_and_what_was_not_measured_is_not_run(run: Path) -> None:
    assert publish(run, "--dry-run") == 0
    card = (run / "publish" / "README.md").read_text()
    receipt = json.loads((run / "receipt.json").read_text())
    for when in ("heldout_first", "heldout_best"):
        for name in ("heldout/kl", "heldout/ce", "heldout/agreement"):
            assert f"| {receipt[when][name]:.4f} |" in card
    for sentence in ("HumanEval: not run.", "Other benchmarks: not run.", "95 % interval: not run"):
        assert sentence in card
    assert (
        "2 of 4 layers, 48 of 64 channels of each MLP, 1 of 2 KV groups of each attention and 24 of 32 channels of the"
        " residual stream of the teacher, cut out" in card
    )
    assert f"{receipt['positions']:,}" in card and receipt["objective"] in card
    assert all(name in card for name in receipt["check"])
    data = ModelCard(card).data
    assert data.license == "apache-2.0" and data.library_name == "transformers"
    assert [round(result.metric_value, 6) for result in data.eval_results] == [
        round(receipt["heldout_best"][f"heldout/{kind}"], 6) for kind in ("kl", "ce", "agreement")
    ]
    manifest = json.loads((run / "publish" / "manifest.json").read_text())["files"]
    plan = planned(run)
    assert {path: of["sha256"] for path, of in manifest.items()} == {
        path: sha256 for path, sha256 in plan.items() if path != "manifest.json"
    }
    provenance = json.loads((run / "publish" / "provenance.json").read_text())
    assert provenance["teacher"]["weights_sha256"] == receipt["teacher"]["weights_sha256"]
    assert provenance["recipe_sha256"] == file_sha256(run / "recipe.yaml")


def test_the_card_gives_the_kl_that_a_repair_of_the_narrower_stream_has_won(run: Path) -> None:
    """Before the stream was narrowed the KL was another."""
    refit = {
        name: {"kl_before": before, "kl_after": after, "ridge": 0.0}
        for name, before, after in (
            ("refit", 0.5, 0.25),
            ("refit_norms", 4.0, 3.0),
            ("refit_stream", 3.0, 2.0),
        )
    }
    receipt = json.loads((run / "receipt.json").read_text())
    receipt["student"]["repair"] = {"folds": [], "why_not": None} | refit
    (run / "receipt.json").write_text(json.dumps(receipt))
    assert publish(run, "--dry-run") == 0
    card = (run / "publish" / "README.md").read_text()
    assert "channels and channels of the stream did" in card and "KL 4.000 to 2.000 nats" in card


def test_the_card_says_how_the_weights_were_trained(run: Path) -> None:
    assert publish(run, "--dry-run") == 0
    plain = (run / "publish" / "README.md").read_text()
    assert (
        "cosine to" in plain and "average of its weights" not in plain and "quantisation-aware" not in plain
    )
    receipt = json.loads((run / "receipt.json").read_text())
    (run / "receipt.json").write_text(json.dumps(receipt | {"quantize": "q4_k"}))
    resolved = yaml.safe_load((run / "resolved.yaml").read_text())
    resolved["train"] |= {"schedule": "wsd", "ema": 0.99, "quantize": "q4_k"}
    (run / "resolved.yaml").write_text(yaml.safe_dump(resolved))
    assert publish(run, "--dry-run") == 0
    card = (run / "publish" / "README.md").read_text()
    assert "wsd to" in card and "an average of its weights, decay 0.99" in card
    assert "rounded as a q4_k GGUF file has them" in card


def test_the_card_calls_bounds_bounds_and_names_each_teacher(run: Path) -> None:
    receipt = json.loads((run / "receipt.json").read_text())
    teachers = [{"name": name, "source": f"them/{name}", "teaches": [name]} for name in ("one", "two")]
    few = {
        "teachers": teachers,
        "held_out": "lower bounds: over 64 ids a position and one class for all others",
    }
    of_each = {
        f"teacher/{name}": {"license": "apache-2.0", "read_from": "its card"} for name in ("one", "two")
    }
    receipt |= {"teacher": receipt["teacher"] | few, "licences": receipt["licences"] | of_each}
    (run / "receipt.json").write_text(json.dumps(receipt))
    assert publish(run, "--dry-run") == 0
    card = (run / "publish" / "README.md").read_text()
    assert "figures are lower bounds: over 64 ids a position" in card
    for name in ("one", "two"):
        assert f"| teacher | {name} | of the rows of {name} | apache-2.0" in card


def test_hub_ids_of_teacher_and_base_model_are_in_the_metadata(run: Path) -> None:
    assert publish(run, "--dry-run", "publish.teacher=them/large") == 0
    front = yaml.safe_load((run / "publish" / "README.md").read_text().split("---\n")[1])
    assert front["base_model"] == front["distilled_from"] == "them/large"
    assert front["base_model_relation"] == "finetune"


def test_an_allowed_regression_is_stated_on_the_card(run: Path) -> None:
    worse(run)
    assert publish(run, "--dry-run", "--allow-regression") == 0
    card = (run / "publish" / "README.md").read_text()
    assert "**Worse than before training.** heldout/kl is" in card


def test_completions_that_nobody_judged_are_no_humaneval(run: Path) -> None:
    place = run / "evals" / "humaneval"
    place.mkdir(parents=True, exist_ok=True)
    (place / "humaneval.json").write_text(json.dumps({"status": "not_judged", "settings": {}}))
    assert publish(run, "--dry-run") == 0
    assert "HumanEval: not run." in (run / "publish" / "README.md").read_text()


def test_a_score_of_humaneval_has_its_n_seed_and_interval_in_card_and_metadata(run: Path) -> None:
    score = {"value": 0.25, "low": 0.19, "high": 0.32, "interval": "Wilson, 95 %"}
    settings = {"problems": 164, "samples": 1, "seed": 7, "prompt": "base", "max_new_tokens": 512}
    place = run / "evals" / "humaneval"
    place.mkdir(parents=True)
    found = {
        "status": "finished",
        "scores": {"pass@1": score},
        "settings": settings | {"do_sample": False},
        "controls": {"canonical": "164/164", "empty": "0/164"},
        "cut_in_thought": 12,
    }
    (place / "humaneval.json").write_text(json.dumps(found))
    assert publish(run, "--dry-run") == 0
    card = (run / "publish" / "README.md").read_text()
    assert "| pass@1 | 25.0 % | 19.0 to 32.0 % | Wilson, 95 % |" in card
    assert (
        "164 problems, 1 sample each, greedy, seed 7, base prompts, at most 512 tokens, 12 answers cut in their thought"
        in card
    )
    entry = yaml.safe_load((run / "publish" / ".eval_results" / "humaneval.yaml").read_text())[0]
    assert entry["dataset"] == {"id": "openai/openai_humaneval", "task_id": "openai_humaneval"}
    assert entry["value"] == 25.0
    assert ".eval_results/humaneval.yaml" in planned(run)
    assert ModelCard(card).data.eval_results[-1].metric_value == 0.25


def test_an_accuracy_has_its_interval_and_its_questions_on_the_card(run: Path) -> None:
    assert publish(run, "--dry-run") == 0
    assert "Tasks with a verifier: not run." in (run / "publish" / "README.md").read_text()
    file = run / "sums.jsonl"
    file.write_text("".join(json.dumps({"q": f"{n}+1?", "a": n + 1}) + "\n" for n in range(5)))
    task = (
        f"{{source: jsonl, path: {file}, question: q, answer: a, match: number, max_new_tokens: 3, seed: 7}}"
    )
    assert main(["eval", str(run), "--task", task]) == 0
    file.unlink()
    found = json.loads((run / "evals" / "task-sums" / "result.json").read_text())
    of, sha256 = found["accuracy"], found["settings"]["questions_sha256"]
    assert publish(run, "--dry-run") == 0
    card = (run / "publish" / "README.md").read_text()
    interval = f"{100 * of['low']:.1f} to {100 * of['high']:.1f} %"
    assert (
        f"| sums.jsonl | {100 * of['value']:.1f} % | {interval} | Wilson, 95 % | – | `{sha256[:12]}" in card
    )
    assert (
        "sums.jsonl: match number, 5 questions, 1 per question, greedy, seed 7, plain prompts, at most 3 tokens."
        " Controls: empty 0/5, expected 5/5." in card
    )
    failed = {"status": "inference_failed", "why": "NaN", "settings": {"name": "sums"}}
    (run / "evals" / "task-sums" / "result.json").write_text(json.dumps(failed))
    assert publish(run, "--dry-run") == 0
    assert "| sums | none: NaN | – | – | – |" in (run / "publish" / "README.md").read_text()


def test_a_score_of_lm_eval_says_how_prompts_were_written(run: Path) -> None:
    place = run / "evals" / "lm-eval"
    place.mkdir(parents=True)
    result = {"whole": True, "lm_eval": "0.4.13", "results": {"cats": {"acc,none": 0.25}}}
    prompts = "chat template (the model ends a turn with <|im_end|>), nothing added before it"
    for recorded, shown in (
        ({}, "as lm-eval writes them"),
        ({"prompts": prompts}, "chat template (the model"),
    ):
        (place / "result.json").write_text(json.dumps(result | recorded))
        assert publish(run, "--dry-run") == 0
        card = (run / "publish" / "README.md").read_text()
        assert "| cats | acc,none | 0.2500 |\n\nPrompts: " + shown in card


def test_an_exported_gguf_file_comes_with_a_modelfile_and_its_three_paths(run: Path) -> None:
    in_receipt(exports=[record(run)])(run)
    assert publish(run, "--dry-run") == 0
    assert {"small-F16.gguf", "Modelfile", "model.safetensors"} <= planned(run).keys()
    assert (run / "publish" / "Modelfile").read_text().startswith("FROM ./small-F16.gguf\n")
    card = (run / "publish" / "README.md").read_text()
    assert "| f16 | llama.cpp | not run | xllamacpp is not installed |" in card
    assert "ollama create small -f Modelfile" in card


@pytest.mark.usefixtures("warm_python")
def test_an_export_elsewhere_is_published_from_any_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["export", "run", "--format", "hf", "--out", "shelf/deep"]) == 0
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert publish(Path("../run"), "--dry-run") == 0
    shelf = tmp_path / "shelf" / "deep" / "hf"
    assert planned(run)["model.safetensors"] == file_sha256(shelf / "model.safetensors")
    assert str(tmp_path / "shelf") not in "".join(
        file.read_text() for file in (run / "publish").iterdir() if file.is_file()
    )
    (shelf / "model.safetensors").unlink()
    assert publish(Path("../run"), "--dry-run") == 2


@pytest.mark.usefixtures("warm_python")
def test_a_folder_in_another_dtype_is_what_is_published_and_the_card_says_what_that_costs(run: Path) -> None:
    assert main(["export", str(run), "--format", "hf", "--dtype", "bfloat16"]) == 0
    assert publish(run, "--dry-run") == 0
    assert planned(run)["model.safetensors"] == file_sha256(run / "exports" / "hf" / "model.safetensors")
    (record,) = json.loads((run / "receipt.json").read_text())["exports"]
    cost = record["three_path"]["potstill"]["mean_kl_to_student"]
    card = (run / "publish" / "README.md").read_text()
    assert f"weights rounded to bfloat16: mean KL {cost:.2g} nats to those as trained" in card


def test_the_modelfile_stops_at_each_end_of_the_generation_config_and_of_the_file(run: Path) -> None:
    exported = record(run)
    place = run / exported["file"]
    writer = GGUFWriter(place, "llama")
    writer.add_token_list([f"<{i}>" for i in range(80)] + ['say "x"'])  # which no Modelfile can name
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(80)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    in_receipt(exports=[exported | {"sha256": file_sha256(place)}])(run)
    settings = run / "student" / "generation_config.json"
    edit(settings, lambda found: found.update(eos_token_id=[0, 70, 2]))
    edit(run / "receipt.json", lambda r: r["output"].update({settings.name: file_sha256(settings)}))
    assert publish(run, "--dry-run") == 0
    assert (run / "publish" / "Modelfile").read_text().splitlines() == [
        "FROM ./small-F16.gguf",
        "TEMPLATE {{ .Prompt }}",
        'PARAMETER stop "<2>"',
        'PARAMETER stop "<0>"',
        'PARAMETER stop "<70>"',
    ]


def test_an_export_that_fails_and_is_removed_is_reported_and_not_published(run: Path) -> None:
    failed_path(run)
    (run / "exports" / "small-F16.gguf").unlink()
    assert publish(run, "--dry-run") == 0
    assert not {"small-F16.gguf", "Modelfile"} & planned(run).keys()
    card = (run / "publish" / "README.md").read_text()
    assert "| f16 | llama.cpp | failed, so it is not here | top-1 equal on 3 of 4 prompts |" in card


def test_a_sample_is_apart_from_its_prompt(run: Path) -> None:
    written = {"prompt": "What is 2 + 2?", "before": "6, or 7", "after": "4, I think"}
    in_receipt(samples=written)(run)
    assert publish(run, "--dry-run") == 0
    card = (run / "publish" / "README.md").read_text()
    assert "every time:\n\n```\nWhat is 2 + 2?\n```\n\nUntouched student:\n\n```\n6, or 7\n```" in card
    assert "This model:\n\n```\n4, I think\n```" in card and "\nTeacher:" not in card


def test_prompts_of_the_corpus_are_not_published(run: Path) -> None:
    """Of an on-policy run the report shows the first held-out ones."""
    RunDir.open(run).write_answers({"prompt": ["a secret"], "before": ["mewed"], "after": ["barks"]})
    assert publish(run, "--dry-run") == 0
    assert "a secret" not in (run / "publish" / "README.md").read_text()


def test_the_card_of_a_chat_model_asks_it_through_its_template(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of `eval.sample_prompts`, as `potstill init` writes them; what the card tells a reader to run writes the same."""
    teacher = make_model(tmp_path / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(teacher)
    (tmp_path / "chats.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": f"say {n}"},
                        {"role": "assistant", "content": "cat"},
                    ]
                }
            )
            + "\n"
            for n in range(60)
        )
    )
    recipe = tmp_path / "chat.yaml"
    recipe.write_text(
        f"corpus: {{name: chat, path: {tmp_path / 'chats.jsonl'}, tokens_per_row: 64, heldout_rows: 3}}\n"
        f"teacher: {{name: torch, model: {teacher}}}\n"
        "student: {name: cut, layers: 2, rule: first_last, repair: false}\n"
        "allow_weak_teacher: true\n"
        "train: {steps: 2, rows_per_step: 2, lr: 1e-3, device: cpu}\n"
        "eval: {every: 2, sample_prompts: [say 3, say 4], sample_system: be brief, sample_tokens: 40}\n"
    )
    run = distill(recipe, out=tmp_path / "run").path
    assert publish(run, "--dry-run") == 0
    card = (run / "publish" / "README.md").read_text()
    code = re.search(r"^## Use\n\n```python\n(.*?)^```", card, re.DOTALL | re.MULTILINE)
    assert code is not None
    capsys.readouterr()
    exec(code[1].replace(repr("me/small"), repr(str(run / "student"))), {})
    by_reader = capsys.readouterr().out
    saved = json.loads((run / "receipt.json").read_text())["student_is_of_step"]
    of_step = {
        line["step"]: line["samples"]
        for line in map(json.loads, (run / "samples.jsonl").read_text().splitlines())
    }
    assert [each["prompt"] for each in of_step[saved]] == ["say 3", "say 4"]
    for each in of_step[saved]:
        assert block(each["prompt"]) in card and f"This model:\n\n{block(each['text'])}" in card
    assert by_reader.startswith(
        "system: be brief<eos>user: say 3<eos>assistant: " + of_step[saved][0]["text"]
    )


def test_text_of_unknown_origin_cannot_leave_its_cell_or_its_block(run: Path) -> None:
    hostile = "x | y `z` <script>\n## Verified [a](b)"
    in_receipt(check={"labels": hostile}, samples={"prompt": "```\n# p", "after": "\n```\n# q"})(run)
    (run / "recipe.yaml").write_text("# ```\n# ````\n")
    assert publish(run, "--dry-run") == 0
    card = (run / "publish" / "README.md").read_text()
    assert "<script>" not in card.replace("\\<script\\>", "")
    assert not re.search(r"^## Verified", card, re.MULTILINE)
    assert "`````yaml\n# ```\n# ````\n`````" in card


def test_the_arms_of_a_comparison_are_on_the_card_of_its_run(run: Path) -> None:
    of = {"mean": 1.5, "low": 1.4, "high": 1.6}
    metrics = {"heldout/kl": of, "heldout/ce": of, "heldout/agreement": of, "pass@1": None, "task-q": of}
    found = {
        "runs": [run.name],
        "arms": [{"name": "KD", "steps": 4, "metrics": metrics}],
        "budget": {"equal": "training time"},
        "seeds": [0, 1, 2],
        "heldout_rows": 4,
        "sentence": "KD is ahead.",
        "warnings": [],
        "differences": [],
    }
    (run.parent / "comparison.json").write_text(json.dumps(found))
    assert publish(run, "--dry-run") == 0
    card = (run / "publish" / "README.md").read_text()
    assert "1.5 [1.4, 1.6]" in card and "over seeds 0, 1, 2 and 4 held-out rows" in card
    assert "| agreement | pass@1 | q |\n|:--|--:|--:|--:|--:|--:|--:|\n" in card
    assert "| not run | 1.5 [1.4, 1.6] |\n" in card


def test_the_demo_ends_with_its_card(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = (finished / "recipe.yaml").read_text()
    lines = "publish: {teacher_license: apache-2.0, data_license: cc0-1.0}\n"
    (tmp_path / "demo.yaml").write_text(recipe + lines)
    monkeypatch.setattr("potstill.cli.distill.resources.files", lambda package: tmp_path)
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 0
    assert f"{tmp_path / 'demo' / 'publish' / 'README.md'}\n" in capsys.readouterr().err
    (tmp_path / "demo.yaml").write_text(recipe)
    assert main(["demo", "--out", str(tmp_path / "other")]) == 0  # the run itself succeeds
    assert "not to be published: license of the teacher" in capsys.readouterr().err
