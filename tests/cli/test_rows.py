"""`potstill rows`: what is trained on, as it is trained on."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import make_model, tiny_config
from data.chat_templates import CHATML, QWEN_3, tokenizer_for
from tokenizers import processors

from potstill.cli.main import main

Recipe = Callable[..., Path]


def with_tokenizer(folder: Path, adds_bos: bool = False, template: str = CHATML) -> Path:
    tokenizer = tokenizer_for(template)
    if adds_bos:
        bos = tokenizer.bos_token
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    make_model(folder, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    return folder


def chat_recipe(tiny_recipe: Recipe, folder: Path, **corpus: Any) -> Path:
    teacher = with_tokenizer(folder / "T")
    chats = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"it is {n}"}]}
        for n in range(40)
    ]
    (folder / "c.jsonl").write_text(
        "".join(json.dumps(each) + "\n" for each in [*chats, {"messages": chats[0]["messages"][:1]}])
    )
    section = {"name": "chat", "path": "c.jsonl", "tokens_per_row": 64, "heldout_rows": 2} | corpus
    return tiny_recipe(corpus=json.dumps(section), teacher=f"{{name: torch, model: {teacher}}}")


def test_rows_are_shown_with_what_bears_loss_and_what_was_left_out(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = chat_recipe(tiny_recipe, tmp_path)
    assert main(["rows", str(recipe), "--limit", "1"]) == 0
    out = capsys.readouterr().out
    assert "--- row 0: " in out and "<|im_start|>assistant\n⟦it is " in out and "<|im_end|>\n⟧" in out
    assert "1 of 41 conversations have no token to learn, and are left out" in out
    assert main(["rows", str(recipe), "--json", "--heldout"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2
    for line in lines:
        assert len(line["ids"]) == len(line["labels"]) and any(line["labels"]) and not line["labels"][0]


def test_a_row_shows_where_its_documents_begin(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = chat_recipe(tiny_recipe, tmp_path, tokens_per_row=192)
    assert main(["rows", str(recipe), "--json", "--limit", "3"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    start = lines[0]["ids"][
        0
    ]  # of each conversation the first token is <|im_start|>, as is that of its answer
    for line in lines:
        assert line["begins"]
        for at in (0, *line["begins"]):
            begun = line["ids"][at : at + 200]
            assert begun[0] == start and begun.count(start) >= 2
        assert 2 * (1 + len(line["begins"])) == line["ids"].count(start)
    assert main(["rows", str(recipe), "--limit", "1"]) == 0
    row = capsys.readouterr().out.partition("--- row 1")[0]
    assert row.count("\n|\n") == len(lines[0]["begins"])


def test_the_label_of_the_last_position_is_shown_where_a_row_ends_inside_of_a_document(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = chat_recipe(tiny_recipe, tmp_path, tokens_per_row=50, whole_documents=False)
    assert main(["rows", str(recipe), "--json"]) == 0
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in captured.out.splitlines()]
    shown = sum(sum(row["labels"]) + (row["next"] is not None) for row in rows)
    assert f" {shown} tokens bear loss" in captured.err
    cut = [row for row in rows if row["next"] is not None]
    assert cut and len(cut) < len(rows)
    for row, after in itertools.pairwise(rows):
        assert row["next"] in (None, after["ids"][0])
    assert main(["rows", str(recipe), "--limit", "50"]) == 0
    out = capsys.readouterr().out
    assert out.count(", and the first of the next row, which is shown") == len(cut)
    heads = [line for line in out.splitlines() if line.startswith("--- row ")]
    assert sum(int(head.partition(" tokens, ")[2].split()[0]) for head in heads) + len(cut) == shown


def test_tokens_that_are_in_no_row_are_counted(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = chat_recipe(tiny_recipe, tmp_path, heldout_rows=1)
    assert main(["rows", str(recipe), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert main(["rows", str(recipe), "--json", "--heldout"]) == 0
    captured = capsys.readouterr()
    rows += [json.loads(line) for line in captured.out.splitlines()]
    assert main(["rows", str(recipe), "--documents", "--json"]) == 0
    documents = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    unused = sum(len(each["ids"]) for each in documents) - sum(len(row["ids"]) for row in rows)
    said = [line for line in captured.err.splitlines() if "are in no row" in line]
    assert (unused > 0) == bool(said) and (not said or said[0].lstrip().startswith(f"{unused} of "))


def test_parts_of_conversations_and_their_counts_pass_the_decontamination(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first part of the first conversation is dropped; the others stay, and so do the counts."""
    leak = "one two three four five six seven eight nine ten eleven twelve"
    (tmp_path / "leak.txt").write_text(leak)
    teacher = with_tokenizer(tmp_path / "T", template=QWEN_3)
    chats = []
    for number in range(40):
        thought = leak if number == 0 else f"hm {number}"
        turns = [
            ("user", "q"),
            ("assistant", f"<think>\n{thought}\n</think>\n\na{number}"),
            ("user", "r"),
            ("assistant", "b"),
        ]
        chats.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(each) + "\n" for each in chats))
    corpus = {
        "name": "chat", "path": "c.jsonl", "tokens_per_row": 128, "heldout_rows": 2,
        "decontaminate": {"against": ["leak.txt"]},
    }  # fmt: skip
    recipe = tiny_recipe(corpus=json.dumps(corpus), teacher=f"{{name: torch, model: {teacher}}}")
    assert main(["rows", str(recipe)]) == 0
    out = capsys.readouterr().out
    assert "79 documents" in out and "40 of 40 conversations are several documents" in out


def test_chats_of_a_tokenizer_with_a_bos_are_not_said_to_begin_with_it(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = chat_recipe(tiny_recipe, tmp_path)
    with_tokenizer(tmp_path / "T", adds_bos=True)
    assert main(["rows", str(recipe)]) == 0
    assert "each text begins" not in capsys.readouterr().out


def test_documents_are_shown_before_they_are_packed(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = chat_recipe(tiny_recipe, tmp_path)
    assert main(["rows", str(recipe), "--documents", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    tokenizer = tokenizer_for(CHATML)
    assert len(lines) == 40
    for number, line in enumerate(lines):
        said = [token for token, bears in zip(line["ids"], line["labels"], strict=True) if bears]
        assert tokenizer.decode(said) == f"it is {number}<|im_end|>\n"


def test_the_marks_of_a_data_set_do_not_reach_the_terminal(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").mkdir()
    for number in range(30):
        (tmp_path / "text" / f"{number}.txt").write_text(f"a\x1b[31mred {number}\n" * 5)
    assert (
        main(
            ["rows", str(tiny_recipe(corpus="{name: text, path: text, tokens_per_row: 32, heldout_rows: 2}"))]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "\\x1b[31mred" in out and "\x1b" not in out


@pytest.mark.parametrize("words", [["--limit", "0"], ["--heldout", "--documents"]])
def test_what_cannot_be_shown_is_one_line(
    words: list[str], tiny_recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rows", str(tiny_recipe()), *words]) == 2
    assert capsys.readouterr().err.startswith("error: rows: ")


@pytest.mark.parametrize(("bos", "first"), [("null", True), ("true", True), ("false", False)])
def test_a_text_begins_as_the_tokenizer_begins_it_or_as_the_recipe_says(
    bos: str, first: bool, tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = with_tokenizer(tmp_path / "T", adds_bos=True)
    (tmp_path / "text").mkdir()
    for number in range(30):
        (tmp_path / "text" / f"{number}.txt").write_text(f"it is {number}\n" * 5)
    corpus = f"{{name: text, path: text, tokens_per_row: 32, heldout_rows: 2, bos: {bos}}}"
    recipe = tiny_recipe(corpus=corpus, teacher=f"{{name: torch, model: {teacher}}}")
    assert main(["rows", str(recipe), "--documents", "--json"]) == 0
    tokenizer = tokenizer_for(CHATML)
    for line in map(json.loads, capsys.readouterr().out.splitlines()):
        assert (line["ids"][0] == tokenizer.bos_token_id) == first
        assert line["labels"] == [False] + [True] * (len(line["ids"]) - 1)
        assert line["ids"].count(tokenizer.bos_token_id) == first
    assert main(["rows", str(recipe)]) == 0
    assert ("each text begins with id" in capsys.readouterr().out) == first


def test_a_cache_of_texts_without_the_bos_is_not_read_for_texts_with_it(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that was written before texts had it, and by a recipe that says nothing of it."""
    teacher = with_tokenizer(tmp_path / "T", adds_bos=True)
    (tmp_path / "text").mkdir()
    for number in range(30):
        (tmp_path / "text" / f"{number}.txt").write_text(f"it is {number}\n" * 5)
    corpus = "{name: text, path: text, tokens_per_row: 32, heldout_rows: 2, shards: cache}"
    recipe = str(tiny_recipe(corpus=corpus, teacher=f"{{name: torch, model: {teacher}}}"))
    with monkeypatch.context() as patch:
        patch.setattr("potstill.data.tokenizers.bos_ids", lambda tokenizer: [])
        assert main(["rows", recipe]) == 0
    assert main(["rows", recipe]) == 2
    assert "corpus.bos_ids was None when it was written" in capsys.readouterr().err


def test_a_bos_of_a_tokenizer_that_has_none_is_one_line(
    tiny_recipe: Recipe, capsys: pytest.CaptureFixture[str], corpus_folder: Path
) -> None:
    assert tiny_config().vocab_size == 258
    corpus = f"{{name: text, path: {corpus_folder}, bos: true}}"
    assert main(["rows", str(tiny_recipe(corpus=corpus))]) == 2
    assert "corpus.bos: " in capsys.readouterr().err
