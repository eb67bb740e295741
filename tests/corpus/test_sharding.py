"""Token shards are the corpus that memory would hold, or they are refused by name."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_corpus, make_model, make_tokenizer

from potstill import UserError, cli, corpora
from potstill.corpora import make_corpus as read_corpus
from potstill.corpus import rows
from potstill.corpus.readers import Document, Reading
from potstill.recipe import Recipe, parse
from potstill.types import Vocab

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, and the same texts in four forms."""
    place = tmp_path_factory.mktemp("shards")
    make_model(place / "teacher", with_tokenizer=False)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(place / "teacher")
    make_corpus(place / "text")
    texts = [file.read_text() for file in sorted((place / "text").iterdir())]
    (place / "lines.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    talks = [[{"role": "user", "content": "say"}, {"role": "assistant", "content": text}] for text in texts]
    (place / "chat.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    ids = [[*tokenizer(text)["input_ids"], 0] for text in texts]
    np.concatenate([np.array(each, np.uint16) for each in ids]).tofile(place / "ids.bin")
    return place


CORPORA = {
    "text": "name: text, path: text",
    "jsonl": "name: jsonl, path: lines.jsonl",
    "chat": "name: chat, path: chat.jsonl",
    "tokens": "name: tokens, path: ids.bin, dtype: uint16",
}


def recipe_of(lab: Path, corpus: str, shards: Path | None = None, more: str = "") -> Recipe:
    kept = "" if shards is None else f", shards: {shards}"
    return parse(
        f"corpus: {{{corpus}, tokens_per_row: 32, heldout_rows: 4{kept}{more}}}\n"
        "teacher: {name: torch, model: teacher}\n"
        "student: {name: cut, layers: 2}\n"
        "train: {steps: 3, rows_per_step: 4, lr: 1e-3, device: cpu}\n",
        where="recipe",
        folder=lab,
    )


def assert_same(one: rows.Corpus, other: rows.Corpus) -> None:
    assert one.manifest == other.manifest
    for a, b in ((one.train, other.train), (one.heldout, other.heldout)):
        assert len(a) == len(b) and a.first_row == b.first_row and a.supervised == b.supervised
        ours, theirs = a.batch(range(len(a))), b.batch(range(len(b)))
        for name in ("rows_B", "input_ids_BT", "position_ids_BT", "positions_N", "labels_N"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


@pytest.mark.parametrize("kind", CORPORA)
def test_shards_are_the_corpus_that_memory_would_hold(
    kind: str, lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_memory, _ = read_corpus(recipe_of(lab, CORPORA[kind]))
    with_shards = recipe_of(lab, CORPORA[kind], tmp_path / "kept")
    first, _ = read_corpus(with_shards)
    assert_same(in_memory, first)

    def no_more(*args: object) -> Any:
        raise AssertionError("read again")

    monkeypatch.setattr(corpora, "read_documents", no_more)
    again, _ = read_corpus(with_shards)
    assert_same(in_memory, again)
    assert not list(tmp_path.glob("kept.*"))


def test_a_run_over_shards_is_the_run_over_memory(
    tiny_recipe: Callable[..., Path], corpus_folder: Path, tmp_path: Path
) -> None:
    losses = []
    for name, more in (
        ("memory", ""),
        ("first", f", shards: {tmp_path / 'kept'}"),
        ("again", f", shards: {tmp_path / 'kept'}"),
    ):
        corpus = f"{{name: text, path: {corpus_folder}, tokens_per_row: 32, heldout_rows: 4{more}}}"
        recipe = tiny_recipe(f"{name}.yaml", corpus=corpus)
        assert cli.main(["distill", str(recipe), "--out", str(tmp_path / name)]) == 0
        receipt = json.loads((tmp_path / name / "receipt.json").read_text())
        losses.append((receipt["corpus_fingerprint"], receipt["student"]["weights_sha256_end"]))
    assert losses[0] == losses[1] == losses[2]


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    def documents(count: int) -> Iterator[Document]:
        generator = np.random.default_rng(0)
        for number in range(count):
            yield Document(str(number), generator.integers(0, 1000, 10_000).astype(np.uint32))

    def peak(count: int, folder: Path | None) -> int:
        tracemalloc.start()
        try:
            rows.build(
                Reading(documents(count)),
                tokens_per_row=256,
                heldout_rows=4,
                vocab=Vocab(1000),
                folder=folder,
            )
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = tmp_path / "few", tmp_path / "many"
    few.mkdir(), many.mkdir()
    tokens = 10_000 * (400 - 50)
    # Of a row its count of labels and its number are kept: 16 bytes for 256 tokens, a few copies of them.
    assert peak(400, many) - peak(50, few) < tokens * 0.5
    assert peak(400, None) - peak(50, None) > tokens * 5


def test_a_kill_leaves_nothing_that_is_taken_for_whole(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(lab, CORPORA["text"], tmp_path / "kept")
    (tmp_path / "kept.new").mkdir()  # what a kill -9 leaves
    (tmp_path / "kept.new" / "documents.ids").write_bytes(b"half")
    with monkeypatch.context() as patch:
        pack = rows.pack

        def cut_off(*args: Any) -> Any:
            if args[-1] == rows.TRAIN:
                raise KeyboardInterrupt
            return pack(*args)

        patch.setattr(rows, "pack", cut_off)
        with pytest.raises(KeyboardInterrupt):
            read_corpus(recipe)
    assert list(tmp_path.iterdir()) == []
    assert_same(read_corpus(recipe)[0], read_corpus(recipe_of(lab, CORPORA["text"]))[0])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (lambda kept: flip(kept / "train.ids"), "train.ids: damaged: its sha256"),
    "a file cut short": (
        lambda kept: (kept / "train.bears").write_bytes((kept / "train.bears").read_bytes()[:-5]),
        "train.bears: damaged",
    ),
    "a file that is gone": (lambda kept: (kept / "heldout.ids").unlink(), "heldout.ids: missing"),
    "no sums": (lambda kept: (kept / "SHA256SUMS").unlink(), "holds no token shards"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_shards_are_refused(what: str, lab: Path, tmp_path: Path) -> None:
    recipe = recipe_of(lab, CORPORA["text"], tmp_path / "kept")
    read_corpus(recipe)
    damage, said = DAMAGE[what]
    damage(tmp_path / "kept")
    with pytest.raises(UserError, match=said):
        read_corpus(recipe)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (", exclude: ['000.txt']", r"corpus.exclude was \[\] when it was written, is \['000.txt'\]"),
        (", decontaminate: {against: [lines.jsonl], action: list}", "corpus.decontaminate"),
        (", tokenizer: other", "corpus.tokenizer was None"),
    ],
)
def test_another_recipe_does_not_take_them(more: str, said: str, lab: Path, tmp_path: Path) -> None:
    other = make_tokenizer()
    other.save_pretrained(lab / "other")
    read_corpus(recipe_of(lab, CORPORA["text"], tmp_path / "kept"))
    with pytest.raises(UserError, match=said):
        read_corpus(recipe_of(lab, CORPORA["text"], tmp_path / "kept", more))


def test_source_files_that_changed_came_or_went_are_refused(lab: Path, tmp_path: Path) -> None:
    texts = make_corpus(tmp_path / "text")
    corpus = f"name: text, path: {texts}"
    recipe = recipe_of(lab, corpus, tmp_path / "kept")
    read_corpus(recipe)
    first, content = texts / "000.txt", (texts / "000.txt").read_text()
    first.write_text(content + "!")
    with pytest.raises(UserError, match=r"000.txt has changed since.*Remove the folder"):
        read_corpus(recipe)
    first.unlink()
    with pytest.raises(UserError, match=r"000.txt was read when it was written, and is gone"):
        read_corpus(recipe)
    first.write_text(content)
    (texts / "new.txt").write_text("more")
    with pytest.raises(UserError, match=r"new.txt was not there when it was written"):
        read_corpus(recipe)


def test_a_file_in_the_way_and_several_writers_are_one_line(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"corpus.shards: .*file is no folder"):
        recipe_of(lab, CORPORA["text"], tmp_path / "file")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="several processes would write it at once"):
        read_corpus(recipe_of(lab, CORPORA["text"], tmp_path / "kept"))


def test_an_evaluation_s_texts_count_and_not_where_they_lie(lab: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere.jsonl"
    copy.write_text((lab / "lines.jsonl").read_text())

    def read(against: Path, texts: str) -> rows.Corpus:
        more = f", decontaminate: {{against: [{against}], action: list}}"
        return read_corpus(recipe_of(lab, CORPORA[texts], tmp_path / "kept", more))[0]

    assert_same(read(lab / "lines.jsonl", "text"), read(copy, "text"))
    copy.write_text(copy.read_text().replace("the", "The", 1))
    with pytest.raises(UserError, match="evaluation was"):
        read(copy, "text")
