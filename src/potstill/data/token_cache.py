"""`corpus.shards`: a corpus as packed token files, written when it is first read, memory-mapped from then on.

Tokens go from the reader through files into the folder, and a run maps them: memory does not grow with the
corpus. What the cache was made of is compared by hash at each start, without tokenizing again: source files,
the recipe's section, the tokenizer, the evaluation texts. The folder is whole or not there.
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
from potstill.io.atomic import SUMS, listed, require_whole, seal, writing
from potstill.io.hashing import file_sha256
from potstill.io.locks import LOCK, locked
from potstill.io.safe_open import read_object
from potstill.types import Vocab

SCHEMA = 2
MANIFEST = "corpus.json"
MARKER = "potstill-shards"  # written first: files of ours beside it may be removed
PARTS = ("ids", "bears", "starts", "kept")
WHOLE = {MANIFEST, *(f"{split}.{part}" for split in (TRAIN, HELDOUT) for part in PARTS)}
OURS = WHOLE | {MARKER, LOCK, SUMS, f"{SUMS}.new", *(f"documents.{part}" for part in PARTS)}
AGAIN = "Remove the folder to have it written again, or name another in corpus.shards."

Json = dict[str, Any]


def provenance(
    config: Any, tokenizer: Any | None, vocabulary: Vocab, bos_ids: list[int], against: list[Json] | None
) -> Json:
    """Everything but the source files that the rows depend on.

    Args:
        bos_ids: what stands before each text.
        against: the evaluation texts, by file.
    """
    # What a corpus is called in a mix, and how often it is read there, changes none of its rows.
    left_out = ("shards", "source", "weight")
    section = {name: value for name, value in asdict(config).items() if name not in left_out}
    # Older caches mention none of these: their rows are end to end, and their texts have nothing in front.
    for name in ("bos", "packing", "whole_documents"):
        del section[name]
    for name in ("subset", "records"):
        if section.get(name, ...) is None:
            del section[name]
    for name in ("skip_refused", "split_files"):
        if not section.get(name, True):
            del section[name]
    if config.layout != "stream":
        section["layout"] = config.layout
    if bos_ids:
        section["bos_ids"] = bos_ids
    if against is not None:  # their content counts, and not their paths
        section["decontaminate"].pop("against")
        against = [{name: text[name] for name in ("sha256", "texts")} for text in against]
    made_of = {
        "schema": SCHEMA,
        "corpus": section,
        "tokenizer": {
            "vocabulary": vocabulary.fingerprint,
            "behaviour": None if tokenizer is None else behaviour_sha256(tokenizer),
        },
        "evaluation": against,
    }
    if (
        config.plugin_file is not None
    ):  # its code decides what the documents are, as files do for a built-in corpus
        made_of["plugin"] = file_sha256(config.plugin_file)
    return dict(json.loads(json.dumps(made_of)))


def load_or_build(
    config: Any, made_of: Json, build: Callable[[Path], Corpus], heartbeat: Callable[[], None]
) -> Corpus:
    """The corpus in `config.shards`; where there is none yet, `build` writes it into that folder.

    Of several processes at once one writes; the others wait, calling `heartbeat`, and then read.

    Raises:
        UserError: the cache is of something else, damaged, or of files that have changed since; the folder
            holds other things.
    """
    folder = Path(config.shards)
    if (path := getattr(config, "path", None)) is not None and os.path.isabs(path):  # not on the hub
        inner, outer = (Path(os.path.realpath(place)) for place in (folder, path))
        if inner.is_relative_to(outer):
            raise UserError(
                f"corpus.shards: {folder} lies in corpus.path, all of which is read. Name another folder."
            )
    with writing(folder):
        made = [each for each in (folder, *folder.parents) if not each.exists()]
    _require_ours(folder, names := _names(folder))
    if SUMS not in names:
        try:
            with locked(folder, on_wait=heartbeat):
                _require_ours(folder, names := _names(folder))
                if SUMS not in names:
                    _write(folder, names, made_of, build)
        except BaseException:
            for each in made:
                with contextlib.suppress(OSError):  # not empty: another process uses it
                    each.rmdir()
            raise
    return _read(folder, config, made_of)


def is_whole(folder: str | Path) -> bool:
    """Whether the cache is complete, so that a start reads it instead of the corpus."""
    return (Path(folder) / SUMS).exists()


def count_tokens(folder: str | Path) -> float:
    """Of a complete cache."""
    return sum((Path(folder) / f"{split}.ids").stat().st_size for split in (TRAIN, HELDOUT)) / ID.itemsize


def _names(folder: Path) -> set[str]:
    return {entry.name for entry in listed(folder)}


def _require_ours(folder: Path, names: set[str]) -> None:
    """Refuse a folder that holds anything but a cache, or what a killed start left of one."""
    is_cache = {MANIFEST, SUMS} <= names
    if foreign := sorted(set() if is_cache else names - OURS if MARKER in names else names - {LOCK}):
        raise UserError(
            f"corpus.shards: {folder} holds other things, {foreign[0]} for one. Name another folder."
        )


def _write(folder: Path, names: set[str], made_of: Json, build: Callable[[Path], Corpus]) -> None:
    """Under the lock. Removes what a killed start left; leaves nothing when it fails."""
    try:
        with writing(folder):
            (folder / MARKER).touch()
            for name in names - {MARKER, LOCK}:
                (folder / name).unlink()
            _finish(folder, build(folder), made_of)
        seal(folder, leave_out={LOCK})
    except BaseException:
        for name in sorted((_names(folder) & OURS) - {LOCK}, key=MARKER.__eq__):  # the marker last
            (folder / name).unlink(missing_ok=True)
        raise


def _finish(folder: Path, corpus: Corpus, made_of: Json) -> None:
    for name, rows in _splits(corpus):
        rows.starts.astype(PLACE).tofile(folder / f"{name}.starts")
        rows.kept.astype(PLACE).tofile(folder / f"{name}.kept")
    counts = {name: corpus.manifest[name] for name in ("tokens", "train_tokens", "heldout_tokens")}
    if counts["train_tokens"] + counts["heldout_tokens"] != counts["tokens"]:
        raise AssertionError(f"{folder}: tokens were lost on the way: {counts}")
    (folder / MANIFEST).write_text(json.dumps({"made_of": made_of, "manifest": corpus.manifest}, indent=1))


def _splits(corpus: Corpus) -> tuple[tuple[str, PackedRows], ...]:
    return (TRAIN, corpus.train), (HELDOUT, corpus.heldout)


def _read(folder: Path, config: Any, made_of: Json) -> Corpus:
    recorded = read_object(folder / MANIFEST, AGAIN)
    for name, was, now in _differences(recorded.get("made_of"), made_of):
        raise UserError(f"{folder}: {name} was {was!r:.80} when it was written, is {now!r:.80}. {AGAIN}")
    require_whole(folder, None, AGAIN, WHOLE)
    manifest = recorded["manifest"]
    _require_same_files(folder, config.files_now(manifest["files"]), manifest["files"])
    train, heldout = (_rows(folder, name, config) for name in (TRAIN, HELDOUT))
    heldout.first_row = len(train)
    return Corpus(train, heldout, manifest)


def _rows(folder: Path, name: str, config: Any) -> PackedRows:
    ids, bears = mapped(folder / f"{name}.ids", ID), mapped(folder / f"{name}.bears", BEARS)
    starts = mapped(folder / f"{name}.starts", PLACE)
    rows = PackedRows(ids, starts, bears, config.tokens_per_row, config.layout)
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
    """Refuse source files that were added, removed or changed."""
    was = {str(file["path"]): file["sha256"] for file in files}
    for path in now:
        if str(path) not in was:
            raise UserError(f"{folder}: {path} was not there when it was written. {AGAIN}")
        if (sha256 := file_sha256(path)) != was.pop(str(path)):
            raise UserError(f"{folder}: {path} has changed since: its sha256 is now {sha256[:12]}…. {AGAIN}")
    if was:
        raise UserError(f"{folder}: {next(iter(was))} was read when it was written, and is gone. {AGAIN}")
