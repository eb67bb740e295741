"""`corpus.shards`: a corpus kept as token shards, written at its first reading, memory-mapped from then on.

Tokens go from the reader through files into the folder, and a run maps it: memory does not grow with the
corpus. What the shards were made of is compared at each start, by hash, without a tokenizer having to read it
again: the source files, the recipe's section, the tokenizer, the evaluation's texts. The folder is whole or
not there. Called by `corpora`.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from potstill.data.memmap import BEARS, ID, PLACE, mapped
from potstill.data.packing import HELDOUT, TRAIN, Corpus, PackedRows
from potstill.data.tokenizers import behaviour_sha256
from potstill.errors import UserError
from potstill.io.atomic import SUMS, alone, listed, require_whole, seal, writing
from potstill.io.hashing import file_sha256
from potstill.io.safe_open import read_object
from potstill.types import Vocab

SCHEMA = 2
MANIFEST = "corpus.json"
BEGUN = "potstill-shards"  # there before anything else: what lies beside it is ours to remove
PARTS = ("ids", "bears", "starts", "kept")
WHOLE = {MANIFEST, *(f"{split}.{part}" for split in (TRAIN, HELDOUT) for part in PARTS)}
OURS = WHOLE | {BEGUN, SUMS, f"{SUMS}.new", *(f"documents.{part}" for part in PARTS)}
AGAIN = "Remove the folder to have it written again, or name another in corpus.shards."

Json = dict[str, Any]


def made_of(asked: Any, tokenizer: Any | None, vocabulary: Vocab, against: list[Json] | None) -> Json:
    """All beside the source files that the rows depend on. `against`: the evaluation's texts, by file."""
    section = {name: value for name, value in asdict(asked).items() if name != "shards"}
    if against is not None:  # the texts count, and not where they lie
        section["decontaminate"].pop("against")
        against = [{name: text[name] for name in ("sha256", "texts")} for text in against]
    said = {
        "schema": SCHEMA,
        "corpus": section,
        "tokenizer": {
            "vocabulary": vocabulary.fingerprint,
            "behaviour": None if tokenizer is None else behaviour_sha256(tokenizer),
        },
        "evaluation": against,
    }
    return dict(json.loads(json.dumps(said)))


def kept(asked: Any, said: Json, build: Callable[[Path], Corpus], beat: Callable[[], None]) -> Corpus:
    """The corpus in `asked.shards`; `build` makes it in a folder where it is not there yet. Of several
    processes that would write it one does, and the others wait, which `beat` is told, and read.

    Raises:
        UserError: shards of something else, damaged, of files that changed; a folder with other things in it.
    """
    folder = Path(asked.shards)
    inner, outer = (Path(os.path.realpath(path)) for path in (folder, asked.origin))
    if inner.is_relative_to(outer):
        raise UserError(
            f"corpus.shards: {folder} lies in corpus.path, whose files are read. Name another folder."
        )
    with writing(folder):
        made = [each for each in (folder, *folder.parents) if not each.exists()]
    _require_ours(folder, names := _names(folder))
    if SUMS not in names:
        try:
            with alone(folder / BEGUN, beat):
                _require_ours(folder, names := _names(folder))
                if SUMS not in names:
                    _write(folder, names, said, build)
        except BaseException:
            for each in made:
                with contextlib.suppress(OSError):  # another's are in it
                    each.rmdir()
            raise
    return _read(folder, asked, said)


def is_whole(folder: str | Path) -> bool:
    """Whether there are shards: a start would read them and not its corpus."""
    return (Path(folder) / SUMS).exists()


def _names(folder: Path) -> set[str]:
    return {entry.name for entry in listed(folder)}


def _require_ours(folder: Path, names: set[str]) -> None:
    """UserError where a folder without shards has something in it that is not what a killed start left."""
    whole = {MANIFEST, SUMS} <= names
    if foreign := sorted(set() if whole else names - OURS if BEGUN in names else names):
        raise UserError(
            f"corpus.shards: {folder} holds other things, {foreign[0]} for one. Name another folder."
        )


def _write(folder: Path, names: set[str], said: Json, build: Callable[[Path], Corpus]) -> None:
    """Under the lock. What is removed is what a killed start of ours has left."""
    try:
        with writing(folder):
            for name in names - {BEGUN}:
                (folder / name).unlink()
            _finish(folder, build(folder), said)
        seal(folder)
    except BaseException:
        for name in sorted(_names(folder) & OURS, key=BEGUN.__eq__):  # that one last
            (folder / name).unlink(missing_ok=True)
        raise


def _finish(folder: Path, corpus: Corpus, said: Json) -> None:
    for name, rows in _splits(corpus):
        rows.starts.astype(PLACE).tofile(folder / f"{name}.starts")
        rows.kept.astype(PLACE).tofile(folder / f"{name}.kept")
    found = {name: corpus.manifest[name] for name in ("tokens", "train_tokens", "heldout_tokens")}
    if found["train_tokens"] + found["heldout_tokens"] != found["tokens"]:
        raise AssertionError(f"{folder}: tokens were lost on the way: {found}")
    (folder / MANIFEST).write_text(json.dumps({"made_of": said, "manifest": corpus.manifest}, indent=1))


def _splits(corpus: Corpus) -> tuple[tuple[str, PackedRows], ...]:
    return (TRAIN, corpus.train), (HELDOUT, corpus.heldout)


def _read(folder: Path, asked: Any, said: Json) -> Corpus:
    kept = read_object(folder / MANIFEST, AGAIN)
    for name, was, now in _differences(kept.get("made_of"), said):
        raise UserError(f"{folder}: {name} was {was!r:.80} when it was written, is {now!r:.80}. {AGAIN}")
    require_whole(folder, None, AGAIN, WHOLE)
    manifest = kept["manifest"]
    _require_same_files(folder, asked.sources(manifest["files"]), manifest["files"])
    train, heldout = (_rows(folder, name, asked.tokens_per_row) for name in (TRAIN, HELDOUT))
    heldout.first_row = len(train)
    return Corpus(train, heldout, manifest)


def _rows(folder: Path, name: str, tokens_per_row: int) -> PackedRows:
    ids, bears = mapped(folder / f"{name}.ids", ID), mapped(folder / f"{name}.bears", BEARS)
    rows = PackedRows(ids, mapped(folder / f"{name}.starts", PLACE), bears, tokens_per_row)
    rows.kept = mapped(folder / f"{name}.kept", PLACE)
    return rows


def _differences(was: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The leaves that differ, by dotted name."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in sorted(was.keys() | now.keys()):
            yield from _differences(was.get(key), now.get(key), f"{name}.{key}".lstrip("."))
    elif was != now:
        yield name or MANIFEST, was, now


def _require_same_files(folder: Path, now: list[Path], files: list[Json]) -> None:
    """UserError where a source file came, went or changed."""
    was = {str(file["path"]): file["sha256"] for file in files}
    for path in now:
        if str(path) not in was:
            raise UserError(f"{folder}: {path} was not there when it was written. {AGAIN}")
        if (found := file_sha256(path)) != was.pop(str(path)):
            raise UserError(f"{folder}: {path} has changed since: its sha256 is now {found[:12]}…. {AGAIN}")
    if was:
        raise UserError(f"{folder}: {next(iter(was))} was read when it was written, and is gone. {AGAIN}")
