"""`potstill export`: what is written is the student, and three readers in processes of their own say so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from export.tiny_models import (
    KINDS,
    TEMPLATE,
    make_model,
    make_pieces,
    make_run,
    make_tokenizer,
    needs_llama_cpp,
)
from potstill import distill
from potstill.cli.main import main
from potstill.export import export
from potstill.io.hashing import file_sha256
from potstill.runs.run_dir import RunDir


@pytest.fixture
def made(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "run", make_model(), make_tokenizer("smollm"))


def based_on(run: RunDir, dtype: str | None) -> RunDir:
    """As if the student had started from files of that dtype."""
    receipt = run.receipt()
    receipt["student"]["base_dtype"] = dtype
    run.write_receipt(receipt)
    return run


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


@pytest.mark.usefixtures("warm_python")
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
@pytest.mark.usefixtures("warm_python")
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
        (["--quantize", "Q4_K_M"], "export: no format 'Q4_K_M'. Did you mean q4_k? Known: hf, f32"),
        (["--quantize", "q3_x"], "export: no format 'q3_x'. Known: hf, f32"),
        (["--format", "hf", "--quantize", "f16"], "--quantize: "),
        (["--format", "gguf", "--dtype", "float32"], "--dtype: has no effect with --format gguf"),
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


AT_EVERY_TEST = ("llama", "gemma3", "llama3")
"""The others are read by llama.cpp in `make soak`: each takes three programs."""


def soaked(names: Iterable[str]) -> list[Any]:
    return [each if each in AT_EVERY_TEST else pytest.param(each, marks=pytest.mark.soak) for each in names]


@needs_llama_cpp
@pytest.mark.parametrize("kind", soaked(KINDS))
@pytest.mark.usefixtures("warm_python")
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
@pytest.mark.parametrize("scaling", soaked(ROPES))
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


@pytest.mark.usefixtures("warm_python")
def test_a_folder_has_the_dtype_of_the_base_and_two_paths_read_it(
    made: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    before = file_sha256(made.student / "model.safetensors")
    assert main(["export", str(based_on(made, "bfloat16").path), "--format", "hf", "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    folder = made.path / "exports" / "hf"
    ours, theirs = (load_file(place / "model.safetensors") for place in (made.student, folder))
    assert ours.keys() == theirs.keys()
    for name, trained in ours.items():
        assert trained.dtype == torch.float32
        assert theirs[name].dtype == torch.bfloat16 and torch.equal(theirs[name], trained.bfloat16())
    assert json.loads((folder / "config.json").read_text())["dtype"] == record["dtype"] == "bfloat16"
    assert transformers.AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    for name in ("potstill", "transformers"):
        path = record["three_path"][name]
        assert path["status"] == "passed" and path["top1_equal"] == path["prompts"]
        assert abs(path["mean_kl"]) < 1e-9 < path["mean_kl_to_student"]  # what the rounding costs is there
    # The run keeps what was trained and evaluated.
    assert file_sha256(made.student / "model.safetensors") == before


@pytest.mark.parametrize(
    ("base", "asked", "expected"),
    [
        ("float16", None, torch.float16),
        ("bfloat16", "float32", torch.float32),
        ("float32", "bfloat16", torch.bfloat16),
        (None, None, torch.float32),
    ],
)
def test_the_dtype_of_a_folder_is_a_choice(
    base: str | None, asked: str | None, expected: torch.dtype, made: RunDir
) -> None:
    dtype = {} if asked is None else {"dtype": asked}
    (record,) = export.export_run(based_on(made, base).path, formats=["hf"], check=False, **dtype).records
    weights = load_file(made.exports / "hf" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {expected}
    assert record["dtype"] == str(expected).removeprefix("torch.")


@pytest.mark.parametrize("kind", ["cut", "checkpoint", "config"])
def test_a_run_records_the_dtype_of_its_base_and_keeps_float32(
    kind: str, tiny_recipe: Callable[..., Path], teacher_folder: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(teacher_folder, tmp_path / "base")
    hf = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    hf.save_pretrained(base)
    student = "{name: cut, layers: 2}" if kind == "cut" else f"{{name: {kind}, model: {base}}}"
    teacher = f"{{name: torch, model: {base if kind == 'cut' else teacher_folder}}}"
    train = "{steps: 1, rows_per_step: 2, lr: 1e-3, device: cpu}"
    options = {"student": student, "teacher": teacher, "train": train, "allow_identical": "true"}
    run = distill(tiny_recipe(**options), out=tmp_path / "run")
    assert run.receipt()["student"]["base_dtype"] == "bfloat16"
    weights = load_file(run.student / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    (record,) = export.export_run(run.path, formats=["hf"], check=False).records
    rounded = load_file(run.exports / "hf" / "model.safetensors")
    assert record["dtype"] == "bfloat16" and {t.dtype for t in rounded.values()} == {torch.bfloat16}


def test_shards_are_rounded_one_by_one(made: RunDir) -> None:
    hf = transformers.AutoModelForCausalLM.from_pretrained(made.student)
    (made.student / "model.safetensors").unlink()
    hf.save_pretrained(made.student, max_shard_size="60KB")
    output = {file.name: file_sha256(file) for file in made.student.iterdir()}
    made.write_receipt(made.receipt() | {"output": output})
    (record,) = export.export_run(made.path, formats=["hf"], dtype="bfloat16", check=False).records
    folder = made.exports / "hf"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    again = transformers.AutoModelForCausalLM.from_pretrained(folder)
    weights = dict(again.named_parameters())
    assert index["metadata"]["total_size"] == sum(2 * weight.numel() for weight in weights.values())
    for name, trained in hf.named_parameters():
        assert torch.equal(weights[name], trained.bfloat16())
    assert set(record["files"]) == {file.name for file in folder.iterdir()}


@pytest.mark.usefixtures("warm_python")
def test_a_rounded_folder_with_a_wrong_weight_fails(
    made: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cast = export.cast_folder

    def slip(folder: Path, name: str) -> None:
        cast(folder, name)
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.0.mlp.up_proj.weight"][0] += 1.0
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(export, "cast_folder", slip)
    assert main(["export", str(made.path), "--format", "hf", "--dtype", "bfloat16"]) == 2
    assert "mean KL to the file's own weights" in capsys.readouterr().err


def test_a_weight_that_float16_cannot_hold_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = make_model()
    with torch.no_grad():
        hf.model.norm.weight[3] = 1e6
    made = make_run(tmp_path / "run", hf, make_tokenizer("smollm"))
    assert main(["export", str(made.path), "--format", "hf", "--dtype", "float16"]) == 2
    error = error_of(capsys)
    assert "model.norm.weight: 1e+06 is more than float16 holds, 65504" in error and "--dtype" in error
    assert list(made.exports.iterdir()) == []


def test_an_exported_folder_ends_where_rows_do_and_has_the_template_twice(tmp_path: Path) -> None:
    """Also of a run of an earlier version, whose student has neither."""
    tokenizer = make_tokenizer("smollm")
    tokenizer.eos_token = "<|endoftext|>"
    made = make_run(tmp_path / "run", make_model(eos_token_id=0), tokenizer)
    export.export_run(made.path, formats=["hf"], check=False)
    folder = made.exports / "hf"
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [0, 2]
    assert json.loads((folder / "tokenizer_config.json").read_text())["chat_template"] == TEMPLATE
    assert (folder / "chat_template.jinja").read_text() == TEMPLATE


def test_named_templates_are_exported(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("smollm")
    tokenizer.chat_template = named = {"default": TEMPLATE, "tool_use": "tools"}
    made = make_run(tmp_path / "run", make_model(), tokenizer)
    export.export_run(made.path, formats=["hf"], check=False)
    assert transformers.AutoTokenizer.from_pretrained(made.exports / "hf").chat_template == named


def test_a_modelfile_stops_at_every_end(tmp_path: Path) -> None:
    """A GGUF file has places for three ends; the generation config lists four."""
    tokenizer = make_tokenizer("smollm")
    tokenizer.eos_token = "<|endoftext|>"
    model = make_model(eos_token_id=[0, 1, 5, 6])
    model.generation_config.update(do_sample=True, temperature=0.7, top_k=20)
    made = make_run(tmp_path / "run", model, tokenizer)
    said: list[str] = []
    export.export_run(made.path, tmp_path / "out", ["hf", "f32", "f16"], check=False, note=said.append)
    # The smallest is what it is for, and it samples as the student's own config says.
    ends = [tokenizer.convert_ids_to_tokens(end) for end in (0, 2, 1, 5, 6)]
    assert (tmp_path / "out" / "Modelfile").read_text() == (
        "FROM ./run-F16.gguf\n# FROM ./run-F32.gguf\nPARAMETER temperature 0.7\nPARAMETER top_k 20\n"
        + "".join(f"PARAMETER stop {stop}\n" for stop in (f'"{end}"' for end in ends))
    )
    assert [line for line in said if ": writing" in line] == [
        f"{form}: writing, {number} of 3" for number, form in enumerate(("hf", "f32", "f16"), start=1)
    ]


@pytest.mark.usefixtures("warm_python")
def test_each_stage_of_an_export_is_announced_before_it_starts(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run", make_model(), make_tokenizer("smollm"))
    said: list[str] = []
    records = export.export_run(made.path, formats=["hf"], note=said.append).records
    tried = [name for name, path in records[0]["three_path"].items() if path["status"] != "not run"]
    assert tried and [line for line in said if "reading it back" in line] == [
        f"hf: reading it back in {name}" for name in tried
    ]
    order = [
        next(n for n, line in enumerate(said) if part in line)
        for part in ("writing", "MiB", "reading it back")
    ]
    assert order == sorted(order)


@pytest.mark.parametrize("place", ["out", pytest.param("run/../out/deep", marks=pytest.mark.soak)])
@pytest.mark.usefixtures("warm_python")
def test_an_export_elsewhere_is_recorded_so_that_any_folder_finds_it(
    place: str, made: RunDir, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", "run", "--format", "hf", "--out", place]) == 0
    (record,) = made.receipt()["exports"]
    assert Path(record["file"]) == (tmp_path / place / "hf").resolve()
    assert main(["export", "run", "--format", "hf", "--out", "run/mine"]) == 0
    assert made.receipt()["exports"][0]["file"] == "mine/hf"
