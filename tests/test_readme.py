"""The README's own commands, from a JSONL file and two models to a student that others can load: nothing else is known."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import WORDS
from export.tiny_models import make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from potstill.cli.main import main

TASK = '{"source": "jsonl", "path": "questions.jsonl", "question": "question", "answer": "answer", "max_new_tokens": 3}'
README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def commands(heading: str) -> list[list[str]]:
    """The words of each potstill command in a section's code block."""
    section = README.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = re.findall(r"^    (potstill .*)$", section, re.MULTILINE)
    return [shlex.split(line, comments=True)[1:] for line in lines]


def test_two_models_and_a_jsonl_file_become_a_student_by_the_commands_of_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, layers in (("teacher", 3), ("student", 2)):
        make_model(num_hidden_layers=layers).save_pretrained(tmp_path / name)
        make_tokenizer("qwen2").save_pretrained(tmp_path / name)
    texts = [" ".join(WORDS[(n * 7 + k * k) % len(WORDS)] for k in range(40)) for n in range(90)]
    (tmp_path / "data.jsonl").write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts))
    (tmp_path / "questions.jsonl").write_text('{"question": "the cat", "answer": "sat"}\n' * 2)
    monkeypatch.chdir(tmp_path)
    own = {"TEACHER": "teacher", "STUDENT": "student", "DATA": "data.jsonl"}
    found = [[own.get(word, word) for word in words] for words in commands("Install") if words[0] != "demo"]
    assert [words[0] for words in found] == ["init", "distill", "export"]
    assert set(own.values()) <= set(found[0])
    # The teacher is random, and no reader's is.
    found[1].append("allow_weak_teacher=true")
    for words in found:
        assert main(words) == 0, words
    (exported,) = (tmp_path / "runs" / "recipe" / "exports").glob("*.gguf")
    receipt = json.loads((tmp_path / "runs" / "recipe" / "receipt.json").read_text())
    assert receipt["heldout_best"]["heldout/kl"] < receipt["heldout_first"]["heldout/kl"]
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "recipe" / "student")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "runs" / "recipe" / "student")
    asked = tokenizer("the cat", return_tensors="pt")
    assert student.generate(**asked, max_new_tokens=3).shape[1] > asked["input_ids"].shape[1]
    assert main(["eval", str(exported), "--task", TASK, "--out", str(tmp_path / "asked")]) == 0
