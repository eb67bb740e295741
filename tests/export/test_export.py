"""`potstill export`: what is written is the student, and three readers in processes of their own say so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.tiny_models import KINDS, make_model, make_pieces, make_run, make_tokenizer, needs_llama_cpp
from potstill.cli.main import main
from potstill.export import export
from potstill.io.hashing import file_sha256
from potstill.runs.run_dir import RunDir


@pytest.fixture
def made(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "run", make_model(), make_tokenizer("smollm"))


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_the_folder_is_the_student_and_two_paths_read_it(
    made: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(made.path), "--format", "hf", "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert record == made.receipt()["exports"][0]
    folder = made.path / "exports" / "hf"
    ours, theirs = (load_file(place / "model.safetensors") for place in (made.student, folder))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert {name: of["sha256"] for name, of in record["files"].items()} == {
        file.name: file_sha256(file) for file in folder.iterdir()
    }
    paths = record["three_path"]
    assert {name: path["status"] for name, path in paths.items()} == {
        "potstill": "passed",
        "transformers": "passed",
        "llama.cpp": "not run",
    }
    for name in ("potstill", "transformers"):
        found = paths[name]
        assert found["tokens_equal"] == found["texts"] >= 200 and found["top1_equal"] == found["prompts"]
        assert abs(found["max_kl"]) < 1e-9 and found["version"].startswith(name)


def test_a_folder_with_other_weights_fails_and_the_error_names_the_gap(
    made: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = export._copy_student

    def slip(student: Path, to: Path, model: Any) -> None:
        copy(student, to, model)
        weights = load_file(to / "model.safetensors")
        weights["model.layers.0.mlp.up_proj.weight"][0] += 1.0
        save_file(weights, to / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(export, "_copy_student", slip)
    assert main(["export", str(made.path), "--format", "hf"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and all("mean KL to the student" in line for line in errors)
    assert export.verdict(made.receipt()["exports"][0]) == "failed"


@pytest.mark.soak
def test_a_folder_with_another_tokenizer_fails(
    made: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = export._copy_student

    def slip(student: Path, to: Path, model: Any) -> None:
        copy(student, to, model)
        make_tokenizer("gpt-2").save_pretrained(to)

    monkeypatch.setattr(export, "_copy_student", slip)
    assert main(["export", str(made.path), "--format", "hf"]) == 2
    assert "other tokens for" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--quantize", "q3_x"], "export: no format 'q3_x'. Known: hf, f32"),
        (["--format", "hf", "--quantize", "f16"], "--quantize: "),
    ],
)
def test_a_wrong_format_is_one_line(
    arguments: list[str], error: str, made: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(made.path), *arguments]) == 2
    assert error in error_of(capsys)
    assert not made.exports.exists()


def test_a_run_without_a_whole_student_is_refused(made: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    with open(made.student / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    assert main(["export", str(made.path)]) == 2
    assert "model.safetensors" in error_of(capsys)
    shutil.rmtree(made.student)
    made.set_status("stopped")
    assert main(["export", str(made.path)]) == 2
    assert "nothing to export" in error_of(capsys)
    assert not made.exports.exists()


@needs_llama_cpp
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_reads_what_was_written(kind: str, tmp_path: Path) -> None:
    pieces = {"gemma2": "gemma", "gemma3": "gemma", "mistral": "llama-2", "phi3": "phi-3"}
    tokenizer = make_pieces(pieces[kind]) if kind in pieces else make_tokenizer("qwen2")
    made = make_run(tmp_path / "run", make_model(kind, eos_token_id=tokenizer.eos_token_id), tokenizer)
    assert main(["export", str(made.path), "--format", "gguf", "--quantize", "f32,q8_0"]) == 0
    for record in made.receipt()["exports"]:
        assert record["three_path"]["llama.cpp"]["status"] == "passed"


ROPES = {
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0},
    "longrope": {"short_factor": [1.0 + i for i in range(8)], "long_factor": [9.0 - i for i in range(8)]},
}


@needs_llama_cpp
@pytest.mark.parametrize("scaling", ROPES)
def test_llama_cpp_scales_a_rope_as_the_student_does(scaling: str, tmp_path: Path) -> None:
    rope = {"rope_theta": 5000.0, "rope_type": scaling} | ROPES[scaling]
    if scaling != "linear":
        rope["original_max_position_embeddings"] = 512
    made = make_run(
        tmp_path / "run",
        make_model(rope_parameters=rope, max_position_embeddings=1024),
        make_tokenizer("gpt-2"),
    )
    assert main(["export", str(made.path), "--format", "gguf", "--quantize", "f32"]) == 0
    (record,) = made.receipt()["exports"]
    found = record["three_path"]["llama.cpp"]
    assert found["status"] == "passed" and found["far_tokens"] == (320 if scaling == "linear" else 576)
