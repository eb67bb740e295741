"""`potstill write`: a corpus that the teacher writes is complete, repeats, goes on after a kill, and trains a student."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file, save_file

from potstill import UserError, distill
from potstill.cli.main import main
from potstill.workflows.write import write_corpus

Recipe = Callable[..., Path]
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
QUESTIONS = [f"what is {a} and {b}?" for a in range(5) for b in range(4)]
BASE = "{max_new_tokens: 12, truncated: keep}"


@pytest.fixture
def writing(tiny_recipe: Recipe, tmp_path: Path) -> Callable[..., Path]:
    """A recipe whose teacher ends an answer now and then."""

    def made(
        write: str = BASE, corpus: str = "", records: list[dict[str, Any]] | None = None, **sections: str
    ) -> Path:
        teacher = make_model(tmp_path / "teacher", with_tokenizer=False, tie_word_embeddings=False)
        tensors = load_file(teacher / "model.safetensors")
        tensors["lm_head.weight"] *= 0.3
        save_file(tensors, teacher / "model.safetensors", {"format": "pt"})
        tokenizer = make_tokenizer()
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(teacher)
        records = [{"prompt": q} for q in QUESTIONS] if records is None else records
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        given = {
            "corpus": f"{{name: prompts, path: {path}, tokens_per_row: 96, heldout_rows: 3{corpus}}}",
            "teacher": f"{{name: torch, model: {teacher}}}",
            "rollouts": "{max_new_tokens: 6}",
            "write": write,
        }
        return tiny_recipe(**given | sections)

    return made


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "corpus.jsonl").read_text().splitlines()]


def answers(out: Path) -> list[str]:
    return [line["messages"][-1]["content"] for line in lines(out)]


def test_every_prompt_has_its_answers_in_order(writing: Callable[..., Path], tmp_path: Path) -> None:
    receipt = write_corpus(writing("{max_new_tokens: 12, truncated: keep, samples: 2}"), out=tmp_path / "out")
    found = lines(tmp_path / "out")
    assert receipt["prompts"] == 20 and receipt["answers"] == 40
    assert receipt["kept"] == len(found) == 40 - receipt["too_short"]
    for line in found:
        asked, answered = line["messages"]
        assert asked == {"role": "user", "content": QUESTIONS[int(line["of"].rpartition(":")[2]) - 1]}
        assert answered["role"] == "assistant" and "<eos>" not in answered["content"]
    assert [line["sample"] for line in found] == [0, 1] * 20 or receipt["too_short"]
    assert receipt["settings"]["samples"] == 2 and receipt["ends"] == {"0": "<eos>"}
    assert not (tmp_path / "out" / ".lock").exists()


CHANGES = ("samples=2", "max_new_tokens=11", "temperature=0.5", "top_p=0.3", "top_k=3", "seed=1")


def test_every_field_changes_what_is_written(writing: Callable[..., Path], tmp_path: Path) -> None:
    recipe = writing()
    write_corpus(recipe, out=tmp_path / "plain")
    for change in CHANGES:
        write_corpus(recipe, [f"write.{change}"], out=tmp_path / change)
        assert answers(tmp_path / "plain") != answers(tmp_path / change), change


def test_what_is_dropped_is_counted(writing: Callable[..., Path], tmp_path: Path) -> None:
    recipe = writing("{max_new_tokens: 40, samples: 4, truncated: drop, min_new_tokens: 3}")
    receipt = write_corpus(recipe, out=tmp_path / "out")
    assert 0 < receipt["kept"] < receipt["answers"] == 80
    assert receipt["kept"] + receipt["truncated"] + receipt["too_short"] == 80
    assert receipt["truncated"] > 0 and receipt["too_short"] > 0
    assert all(len(text.encode()) >= 3 for text in answers(tmp_path / "out"))


def test_it_repeats_and_greedy_takes_the_likeliest(writing: Callable[..., Path], tmp_path: Path) -> None:
    recipe = writing()
    for name in ("one", "two"):
        write_corpus(recipe, out=tmp_path / name)
    assert (tmp_path / "one" / "corpus.jsonl").read_bytes() == (
        tmp_path / "two" / "corpus.jsonl"
    ).read_bytes()
    for name, seed in (("three", 0), ("four", 1)):
        write_corpus(recipe, ["write.temperature=0", f"write.seed={seed}"], out=tmp_path / name)
    assert answers(tmp_path / "three") == answers(tmp_path / "four")
    torch.manual_seed(0)


def test_the_batch_has_no_say(writing: Callable[..., Path], tmp_path: Path) -> None:
    """`prompts_at_once` is memory and speed."""
    recipe = writing()
    write_corpus(recipe, out=tmp_path / "one")
    write_corpus(recipe, ["write.prompts_at_once=3"], out=tmp_path / "two")
    assert answers(tmp_path / "one") == answers(tmp_path / "two")


@pytest.mark.usefixtures("warm_python")
def test_a_kill_loses_nothing(writing: Callable[..., Path], tmp_path: Path) -> None:
    """Killed twice, each time with a torn line behind what was whole: the same bytes in the end."""
    recipe, out = writing("{max_new_tokens: 12, truncated: keep, prompts_at_once: 1}"), tmp_path / "out"
    whole = write_corpus(recipe, out=tmp_path / "whole")
    for wanted in (4, 12):
        process = subprocess.Popen([sys.executable, "-m", "potstill", "write", recipe, "--out", out])
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            progress = out / "progress.json"
            if progress.exists() and json.loads(progress.read_text())["prompts"] >= wanted:
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with (out / "corpus.jsonl").open("a") as file:
            file.write('{"messages": [{"ro')
    receipt = write_corpus(recipe, out=out)
    assert (out / "corpus.jsonl").read_bytes() == (tmp_path / "whole" / "corpus.jsonl").read_bytes()
    timed = {"seconds", "environment"}
    assert {k: v for k, v in receipt.items() if k not in timed} == {
        k: v for k, v in whole.items() if k not in timed
    }
    assert write_corpus(recipe, out=out) == receipt


@pytest.mark.parametrize("damage", ["shorter", "gone", "changed", "progress"])
def test_a_folder_that_was_damaged_does_not_go_on(
    damage: str, writing: Callable[..., Path], tmp_path: Path
) -> None:
    recipe, out = writing(), tmp_path / "out"
    write_corpus(recipe, out=out)
    (out / "receipt.json").unlink()
    corpus = out / "corpus.jsonl"
    data = corpus.read_bytes()
    if damage == "gone":
        corpus.unlink()
    elif damage == "progress":
        (out / "progress.json").write_text(
            json.dumps({"of": json.loads((out / "progress.json").read_text())["of"]})
        )
    else:
        corpus.write_bytes(data[:-9] if damage == "shorter" else data[:-9] + b"x" * 9)
    with pytest.raises(UserError, match=r"damaged"):
        write_corpus(recipe, out=out)


def test_other_prompts_do_not_go_on_in_the_same_folder(writing: Callable[..., Path], tmp_path: Path) -> None:
    recipe = writing()
    write_corpus(recipe, out=tmp_path / "out")
    path = tmp_path / "prompts.jsonl"
    path.write_text(path.read_text().replace("what", "WHAT"))
    with pytest.raises(UserError, match=r"started with another prompts"):
        write_corpus(recipe, out=tmp_path / "out")


def test_another_recipe_does_not_go_on_in_the_same_folder(
    writing: Callable[..., Path], tmp_path: Path
) -> None:
    write_corpus(writing(), out=tmp_path / "out")
    with pytest.raises(UserError, match=r"started with another write"):
        write_corpus(writing(), ["write.seed=1"], out=tmp_path / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"exists already"):
        write_corpus(writing(), out=tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["mine.txt"]


def test_the_teacher_reads_a_context_that_is_not_written(
    writing: Callable[..., Path], tmp_path: Path
) -> None:
    plain = [{"prompt": q} for q in QUESTIONS]
    hinted = [record | {"hint": "think of four"} for record in plain]
    write_corpus(writing(records=plain), out=tmp_path / "one")
    write_corpus(writing(records=hinted, corpus=", context: hint"), out=tmp_path / "two")
    assert answers(tmp_path / "one") != answers(tmp_path / "two")
    assert "think of four" not in (tmp_path / "two" / "corpus.jsonl").read_text()


def test_what_was_written_trains_a_student(
    writing: Callable[..., Path], tmp_path: Path, tiny_recipe: Recipe
) -> None:
    write_corpus(writing("{max_new_tokens: 12, truncated: keep, samples: 3}"), out=tmp_path / "out")
    teacher = tmp_path / "teacher"
    corpus = f"{{name: chat, path: {tmp_path / 'out' / 'corpus.jsonl'}, tokens_per_row: 96, heldout_rows: 3}}"
    run = distill(
        tiny_recipe("then.yaml", corpus=corpus, teacher=f"{{name: torch, model: {teacher}}}"),
        out=tmp_path / "run",
    )
    assert run.receipt()["steps"] == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["write.max_new_tokens=96"], "write.max_new_tokens: 96 tokens leave no room"),
        (["write.truncated=mask"], "write.truncated"),
        (["write.samples=0"], "write.samples"),
        (["write.temperature=0", "write.samples=3"], "write.samples"),
        (["write.min_new_tokens=20"], "write.min_new_tokens"),
        (["write.temperature=0", "write.top_p=0.5"], "write.top_p"),
        (["write.max_new_tokens=90"], "not one answer to 20 prompts is kept .*20 too long"),
        (["corpus={name: text, path: TEXT}"], "corpus.name: text has no questions"),
    ],
)
def test_a_wrong_recipe_is_refused(
    overrides: list[str],
    message: str,
    writing: Callable[..., Path],
    tmp_path: Path,
    corpus_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = [each.replace("TEXT", str(corpus_folder)) for each in overrides]
    recipe = writing()
    with pytest.raises(UserError, match=message):
        write_corpus(recipe, overrides, out=tmp_path / "out")
    assert main(["write", str(recipe), *overrides, "--out", str(tmp_path / "out")]) == 2
    assert "Traceback" not in capsys.readouterr().err
