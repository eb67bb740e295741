"""recipes/task: its notes share nothing between the splits that must not be shared, and its one command goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from export.tiny_models import make_model, make_tokenizer

FOLDER = Path(__file__).resolve().parent.parent / "recipes" / "task"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def made(folder: Path, *words: str) -> dict[str, Any]:
    command = [sys.executable, str(FOLDER / "make.py"), str(folder), *words]
    said: dict[str, Any] = json.loads(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout
    )
    return said


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_no_note_payee_day_or_amount_is_in_two_splits_and_every_record_is_json(tmp_path: Path) -> None:
    said = made(tmp_path, "--train", "9000", "--seed", "1")
    assert set(said["in more than one split"].values()) == {0}
    assert said["notes"] == {"train": 9000, "heldout": 190, "test": 345}
    answers = {
        name: [each["answer"] for each in records(tmp_path / f"{name}.jsonl")] for name in ("heldout", "test")
    }
    answers["train"] = [each["messages"][-1]["content"] for each in records(tmp_path / "train.jsonl")]
    seen: dict[str, dict[str, set[Any]]] = {}
    for split, of in answers.items():
        parsed = [json.loads(answer) for answer in of]
        assert all(list(each) == ["payee", "date", "amount", "currency"] for each in parsed)
        words = {word for each in parsed for word in each["payee"].split()}
        values = {name: {each[name] for each in parsed} for name in ("date", "amount")}
        seen[split] = {**values, "word": words}
    for kind in ("date", "amount", "word"):
        each = [seen[split][kind] for split in seen]
        assert sum(map(len, each)) == len(set().union(*each)), kind


def test_the_notes_are_those_of_their_seed(tmp_path: Path) -> None:
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        made(tmp_path / name, "--train", "50", "--seed", seed)
    a, b, c = ((tmp_path / name / "test.jsonl").read_text() for name in "abc")
    assert a == b != c


def command_of(folder: Path, model: Path) -> list[str]:
    """`make task-smoke`, with two layers in the place of SmolLM2."""
    command = [sys.executable, str(FOLDER / "run.py"), str(folder), "--smoke"]
    for word in (f"teacher.model={model}", f"student.model={model}", "student.name=checkpoint"):
        command += ["--teacher", word]
    return [*command, "--student", "student={name: cut, layers: 1, rule: first_last}"]


def killed_at(command: list[str], line: str, place: Path) -> None:
    """Start the command, and end it with all of its processes once a line of what it says of `place` begins so."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    assert process.stdout is not None
    is_there = False
    for said in process.stdout:
        is_there = is_there or said.strip() == f"run: {place}"
        if is_there and said.startswith(line):
            os.killpg(process.pid, signal.SIGKILL)
            break
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.soak
@pytest.mark.usefixtures("warm_python")
def test_one_command_makes_everything_and_killed_twice_it_makes_the_same(tmp_path: Path) -> None:
    model, tokenizer = tmp_path / "model", make_tokenizer("smollm")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    make_model(max_position_embeddings=512).save_pretrained(model)
    found = {}
    for name in ("whole", "killed"):
        folder = tmp_path / name
        command = command_of(folder, model)
        if name == "killed":
            killed_at(command, "step 3/4", folder / "teacher")
            killed_at(command, "step 2/4", folder / "student")
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        lines = json.loads((folder / "result.json").read_text())
        weights = (folder / "student" / "student" / "model.safetensors").read_bytes()
        found[name] = lines, weights
    assert [line["model"] for line in found["whole"][0]] == [
        "teacher",
        "student",
        "student Q4_0",
        "student Q8_0",
    ]
    assert found["whole"] == found["killed"]
