"""Datasets of Hugging Face's library, one document a record: those that `save_to_disk` wrote, or the hub's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from potstill.data.readers import hub
from potstill.data.readers.reading import (
    Reading,
    add_file,
    import_extra,
    require_column,
    string_field,
    tokenize,
)
from potstill.errors import UserError, one_line
from potstill.io.safe_open import require_file, require_plain

REMOVE = "Leave it out, or name another in corpus.path."


def read(
    path: str | Path,
    tokenizer: Any,
    split: str | None = None,
    column: str = "text",
    subset: str | None = None,
    count: int | None = None,
) -> Reading:
    """One document a record; see `records`."""
    reading = Reading(iter(()))
    drop_nulls = f'dataset.filter(lambda record: record["{column}"] is not None).save_to_disk(FOLDER)'
    texts = (
        (where, string_field(where, record, column, drop_nulls))
        for where, record in records(path, reading, split, column, subset, count)
    )
    reading.documents = tokenize(texts, tokenizer)
    return reading


def is_dataset(path: str | Path) -> bool:
    """Whether it is on the hub, or `save_to_disk` wrote the folder."""
    saved = any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json"))
    return saved or hub.hub_dataset(path) is not None


def records(
    path: str | Path,
    reading: Reading,
    split: str | None,
    column: str | None = None,
    subset: str | None = None,
    count: int | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each record of the split as a mapping, with its place; with `column`, of that one alone. The dataset is opened at
    once, and read as the records are taken.

    Args:
        split: the only one needs no name.
        subset, count: of a data set on the hub, see `hub.records`.
    """
    if isinstance(path, str) and hub.hub_dataset(path) is not None:
        return hub.records(path, reading, subset, split, count, column)
    hub.refuse_selection(path, subset, count)
    datasets, path = import_extra("datasets"), Path(path)
    _require_plain(path)
    try:
        data = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a dataset that save_to_disk wrote: {one_line(error)}") from error
    described, folder = [], path
    if isinstance(data, datasets.DatasetDict):
        chosen = next(iter(data)) if split is None and len(data) == 1 else split
        if chosen not in data:
            given = "none" if split is None else repr(split)
            raise UserError(
                f"corpus.split: {path} has the splits {', '.join(data)}; the recipe names {given}."
            )
        data, described, folder = data[chosen], [path / "dataset_dict.json"], path / str(chosen)
    elif split is not None:
        raise UserError(f"corpus.split: {path} is one dataset without splits; the recipe names {split!r}.")
    if column is not None:
        require_column(path, column, data.column_names)
        data = data.select_columns([column])

    def each() -> Iterator[tuple[str, dict[str, Any]]]:
        # state.json lists the data files; what `.map()` caches beside them is not data.
        described.extend(folder / name for name in ("state.json", "dataset_info.json"))
        for file in (*described, *(Path(each["filename"]) for each in data.cache_files)):
            add_file(file, reading)
        where = str(path)
        try:
            for number, record in enumerate(data):
                where = f"{path}:{number}"
                yield where, record
        except UserError:
            raise
        except Exception as error:  # a damaged table raises many things, and only once it is read
            raise UserError(f"{where}: not a readable dataset: {one_line(error)}") from error

    return each()


def _require_plain(path: Path) -> None:
    """Refuse what the library would wait for without end: a FIFO, a device or a file of the kernel's."""
    if not os.path.isdir(path):
        require_file(path, REMOVE)
        return
    require_plain(path, REMOVE)
    for split in sorted(path.iterdir()):
        if split.is_dir():
            require_plain(split, REMOVE)
