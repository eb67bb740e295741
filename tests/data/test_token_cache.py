"""Token shards are the corpus that memory would hold, or they are refused by name."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import make_corpus, make_model, make_tokenizer

from potstill import UserError, distill
from potstill.build.corpus import make_corpus as read_corpus
from potstill.build.resolve import resolve
from potstill.cli import main
from potstill.data import packing
from potstill.data.readers import Document, Reading
from potstill.data.token_cache import MARKER
from potstill.recipe.load import Recipe, parse
from potstill.runs.run_dir import RunDir
from potstill.types import Vocab

datasets = pytest.importorskip("datasets", reason="the data extra is not installed; not run")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, and the same texts in six forms."""
    place = tmp_path_factory.mktemp("shards")
    make_model(place / "teacher", with_tokenizer=False)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(place / "teacher")
    make_corpus(place / "text")
    texts = [file.read_text() for file in sorted((place / "text").iterdir())]
    (place / "lines.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pq.write_table(pa.table({"text": texts}), place / "table.parquet")
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(place / "hf"), num_shards=2)
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
    "parquet": "name: parquet, path: table.parquet",
    "hf": "name: hf, path: hf",
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


def assert_same(one: packing.Corpus, other: packing.Corpus) -> None:
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
    in_memory, _ = read_corpus(resolve(recipe_of(lab, CORPORA[kind])))
    with_shards = recipe_of(lab, CORPORA[kind], tmp_path / "kept")
    first, _ = read_corpus(resolve(with_shards))
    assert_same(in_memory, first)

    def no_more(*args: object) -> Any:
        raise AssertionError("read again")

    monkeypatch.setattr(type(with_shards.corpus), "read", no_more)
    again, _ = read_corpus(resolve(with_shards))
    assert_same(in_memory, again)


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
        assert main.main(["distill", str(recipe), "--out", str(tmp_path / name)]) == 0
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
            packing.build(
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
    recipe, kept = recipe_of(lab, CORPORA["text"], tmp_path / "kept"), tmp_path / "kept"
    kept.mkdir()
    for name in (MARKER, "train.ids"):
        (kept / name).write_bytes(b"half")  # what a kill -9 leaves
    with monkeypatch.context() as patch:
        pack = packing.pack

        def cut_off(*args: Any) -> Any:
            if packing.TRAIN in args[4:]:
                raise KeyboardInterrupt
            return pack(*args)

        patch.setattr(packing, "pack", cut_off)
        with pytest.raises(KeyboardInterrupt):
            read_corpus(resolve(recipe))
    assert list(kept.iterdir()) == []
    assert_same(read_corpus(resolve(recipe))[0], read_corpus(resolve(recipe_of(lab, CORPORA["text"])))[0])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def halve(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def lose_line(path: Path, name: str) -> None:
    path.write_text("".join(line for line in path.read_text().splitlines(True) if name not in line))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (lambda kept: flip(kept / "train.ids"), "train.ids: damaged: its sha256"),
    "a file cut short": (
        lambda kept: (kept / "train.bears").write_bytes((kept / "train.bears").read_bytes()[:-5]),
        "train.bears: damaged",
    ),
    "a file that is gone": (lambda kept: (kept / "heldout.ids").unlink(), "heldout.ids: missing"),
    "a list of sums cut short": (
        lambda kept: (kept / "SHA256SUMS").write_text((kept / "SHA256SUMS").read_text()[:-9]),
        "SHA256SUMS: damaged: it has no line for train.starts",
    ),
    "a file cut in half that the list of sums has lost": (
        lambda kept: (halve(kept / "heldout.bears"), lose_line(kept / "SHA256SUMS", "heldout.bears")),
        "SHA256SUMS: damaged: it has no line for heldout.bears",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_shards_are_refused(what: str, lab: Path, tmp_path: Path) -> None:
    recipe = recipe_of(lab, CORPORA["text"], tmp_path / "kept")
    read_corpus(resolve(recipe))
    damage, said = DAMAGE[what]
    damage(tmp_path / "kept")
    with pytest.raises(UserError, match=said):
        read_corpus(resolve(recipe))


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
    read_corpus(resolve(recipe_of(lab, CORPORA["text"], tmp_path / "kept")))
    with pytest.raises(UserError, match=said):
        read_corpus(resolve(recipe_of(lab, CORPORA["text"], tmp_path / "kept", more)))


def test_a_tokenizer_that_reads_otherwise_with_the_same_list_does_not_take_them(
    lab: Path, tmp_path: Path
) -> None:
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    recipe = recipe_of(lab, CORPORA["text"], tmp_path / "kept", f", tokenizer: {tmp_path / 'tokenizer'}")
    read_corpus(resolve(recipe))
    file = tmp_path / "tokenizer" / "tokenizer.json"
    said = json.loads(file.read_text())
    said["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(said))
    with pytest.raises(UserError, match=r"tokenizer\.behaviour was '"):
        read_corpus(resolve(recipe))


def test_a_tokenizer_written_in_python_has_its_shards_too(lab: Path, tmp_path: Path) -> None:
    words = sorted({word for file in (lab / "text").iterdir() for word in file.read_text().split()})
    (tmp_path / "vocab.txt").write_text("\n".join(["<cls>", "<pad>", "<eos>", "<unk>", *words, "<mask>"]))
    tokenizer = transformers.EsmTokenizer(str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained(tmp_path / "esm")
    recipe = recipe_of(lab, CORPORA["text"], tmp_path / "kept", f", tokenizer: {tmp_path / 'esm'}")
    assert_same(read_corpus(resolve(recipe))[0], read_corpus(resolve(recipe))[0])
    settings = tmp_path / "esm" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"split_special_tokens": True}))
    with pytest.raises(UserError, match=r"tokenizer\.behaviour was '"):
        read_corpus(resolve(recipe))


def test_of_a_dataset_its_state_counts_and_what_map_leaves_beside_it_does_not(
    lab: Path, tmp_path: Path
) -> None:
    shutil.copytree(lab / "hf", tmp_path / "hf")
    recipe = recipe_of(lab, f"name: hf, path: {tmp_path / 'hf'}", tmp_path / "kept")
    whole = read_corpus(resolve(recipe))[0]
    datasets.load_from_disk(str(tmp_path / "hf")).map(lambda record: {"text": record["text"].upper()})
    assert list((tmp_path / "hf").glob("cache-*.arrow"))
    assert_same(read_corpus(resolve(recipe))[0], whole)
    state = tmp_path / "hf" / "state.json"
    said = json.loads(state.read_text())
    state.write_text(json.dumps(said | {"_data_files": said["_data_files"][:1]}))
    with pytest.raises(UserError, match=r"state\.json has changed since"):
        read_corpus(resolve(recipe))


def test_source_files_that_changed_came_or_went_are_refused(lab: Path, tmp_path: Path) -> None:
    texts = make_corpus(tmp_path / "text")
    corpus = f"name: text, path: {texts}"
    recipe = recipe_of(lab, corpus, tmp_path / "kept")
    read_corpus(resolve(recipe))
    first, content = texts / "000.txt", (texts / "000.txt").read_text()
    first.write_text(content + "!")
    with pytest.raises(UserError, match=r"000.txt has changed since.*Remove the folder"):
        read_corpus(resolve(recipe))
    first.unlink()
    with pytest.raises(UserError, match=r"000.txt was read when it was written, and is gone"):
        read_corpus(resolve(recipe))
    first.write_text(content)
    (texts / "new.txt").write_text("more")
    with pytest.raises(UserError, match=r"new.txt was not there when it was written"):
        read_corpus(resolve(recipe))


def test_of_two_starts_at_once_one_writes_and_the_other_reads(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second comes while the first is in the middle of its reading, and gives signs of life."""
    recipe, begun, builds = recipe_of(lab, CORPORA["text"], tmp_path / "kept"), threading.Event(), []
    beats: list[int] = []
    read = type(recipe.corpus).read

    def slowly(*given: Any) -> Any:
        builds.append(threading.get_ident())
        reading = read(*given)

        def documents() -> Iterator[Document]:
            for number, document in enumerate(reading.documents):
                if number == 20:
                    begun.set()
                    time.sleep(0.5)
                yield document

        return dataclasses.replace(reading, documents=documents())

    monkeypatch.setattr(type(recipe.corpus), "read", slowly)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(read_corpus, resolve(recipe))
        assert begun.wait(30)
        second = pool.submit(read_corpus, resolve(recipe), lambda: beats.append(len(builds)))
        assert_same(first.result()[0], second.result()[0])
    assert len(builds) == 1 and beats
    monkeypatch.undo()
    in_memory, shards = (
        read_corpus(resolve(recipe_of(lab, CORPORA["text"])))[0],
        read_corpus(resolve(recipe))[0],
    )
    assert_same(in_memory, shards)


def test_tokens_that_would_be_lost_on_the_way_are_noticed(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = packing.pack

    def losing(documents: Any, numbers: Any, *rest: Any) -> Any:
        return pack(documents, numbers[:-1] if packing.TRAIN in rest[1:] else numbers, *rest)

    monkeypatch.setattr(packing, "pack", losing)
    with pytest.raises(AssertionError, match="tokens were lost on the way"):
        read_corpus(resolve(recipe_of(lab, CORPORA["text"], tmp_path / "kept")))
    assert not (tmp_path / "kept").exists()


def test_what_is_the_user_s_stays(lab: Path, tmp_path: Path) -> None:
    mine = [tmp_path / name / "mine" for name in ("kept.new", "kept.old", "other")]
    for file in mine:
        file.parent.mkdir()
        file.write_text("precious")
    read_corpus(resolve(recipe_of(lab, CORPORA["text"], tmp_path / "kept")))
    with pytest.raises(UserError, match="other holds other things, mine for one"):
        read_corpus(resolve(recipe_of(lab, CORPORA["text"], tmp_path / "other")))
    for names in (("corpus.json", "train.ids"), ("SHA256SUMS", "model.safetensors")):  # of our names
        folder = tmp_path / names[0]
        folder.mkdir()
        mine += [folder / name for name in names]
        for name in names:
            (folder / name).write_text("precious")
        with pytest.raises(UserError, match=f"{names[0]} holds other things"):
            read_corpus(resolve(recipe_of(lab, CORPORA["text"], folder)))
    assert [file.read_text() for file in mine] == ["precious"] * 7


def test_places_that_cannot_be_are_one_line(lab: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"corpus\.shards: .*file is not a folder"):
        recipe_of(lab, CORPORA["text"], tmp_path / "file")
    texts = make_corpus(tmp_path / "text")
    with pytest.raises(UserError, match=r"corpus.shards: .*tok lies in corpus.path"):
        read_corpus(resolve(recipe_of(lab, f"name: text, path: {texts}", texts / "tok")))
    with pytest.raises(UserError, match=r"corpus.shards: / holds other things"):
        read_corpus(resolve(recipe_of(lab, CORPORA["text"], Path("/"))))
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    with pytest.raises(UserError, match=r"loop.*(Too many levels|File exists)"):
        read_corpus(resolve(recipe_of(lab, CORPORA["text"], loop / "kept")))
    empty = tmp_path / "empty.jsonl"
    empty.write_text("{}\n")
    with pytest.raises(UserError, match="'text' is missing"):
        read_corpus(
            resolve(recipe_of(lab, f"name: jsonl, path: {empty}", tmp_path / "made" / "on" / "the way"))
        )
    assert not (tmp_path / "made").exists()
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    linked = recipe_of(lab, CORPORA["text"], tmp_path / "link")
    assert_same(read_corpus(resolve(linked))[0], read_corpus(resolve(linked))[0])
    assert (tmp_path / "disk" / "SHA256SUMS").exists()


def test_a_run_goes_on_over_shards_of_its_rows(
    tiny_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = "{steps: 4, rows_per_step: 4, lr: 1e-3, device: cpu, save_every: 2}"
    recipe, out, kept = tiny_recipe(train=train), tmp_path / "run", f"corpus.shards={tmp_path / 'kept'}"
    log = RunDir.log

    def dying(run: RunDir, step: int, metrics: dict[str, float]) -> None:
        if step == 3:
            raise KeyboardInterrupt
        log(run, step, metrics)

    whole = distill(recipe, out=tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunDir, "log", dying)
        distill(recipe, out=out)
    gone_on = distill(recipe, overrides=[kept], resume=True, out=out)
    ends = [run.receipt()["student"]["weights_sha256_end"] for run in (whole, gone_on)]
    assert ends[0] == ends[1]


def test_an_evaluation_s_texts_count_and_not_where_they_lie(lab: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere.jsonl"
    copy.write_text((lab / "lines.jsonl").read_text())

    def read(against: Path, texts: str) -> packing.Corpus:
        more = f", decontaminate: {{against: [{against}], action: list}}"
        return read_corpus(resolve(recipe_of(lab, CORPORA[texts], tmp_path / "kept", more)))[0]

    assert_same(read(lab / "lines.jsonl", "text"), read(copy, "text"))
    copy.write_text(copy.read_text().replace("the", "The", 1))
    with pytest.raises(UserError, match="evaluation was"):
        read(copy, "text")
