"""Data sets of the Hugging Face hub, streamed: a record is read, tokenized and forgotten.

Nothing of a data set is stored but its tokens, in `corpus.shards`; the recipe's data set is one commit of it, and an
exact resume reads those tokens and not the hub.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from potstill.data.readers.reading import Reading, import_extra, require_column
from potstill.errors import UserError, one_line
from potstill.io.hub import dataset_id, why_not
from potstill.io.silence import quiet_process


def hub_dataset(path: str | Path) -> tuple[str, str] | None:
    """`owner/name` and the revision of a data set on the hub; None for a file or folder, whose path is absolute."""
    return dataset_id(path) if isinstance(path, str) else None


def pinned(path: str) -> str:
    """`owner/name@COMMIT`, the commit that the revision is now; a path as it is.

    Raises:
        UserError: there is no such data set or revision, or the hub cannot be asked.
    """
    on_hub = hub_dataset(path)
    if on_hub is None or re.fullmatch("[0-9a-f]{40}", on_hub[1]):
        return path
    from huggingface_hub import HfApi

    name, revision = on_hub
    try:
        return f"{name}@{HfApi().dataset_info(name, revision=revision).sha}"
    except Exception as error:  # a network fails in many ways
        raise UserError(
            f"{path}: no such file or folder here, and not to be had from the hub:"
            f" {why_not(error, name, revision, 'data set')}"
        ) from error


def records(
    path: str,
    reading: Reading,
    subset: str | None,
    split: str | None,
    count: int | None,
    column: str | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each record of the split as a mapping, with its place; with `column`, of that one alone.

    Args:
        path: `owner/name@COMMIT`.
        reading: gets what was read.
        subset: of a data set that has several; None is the only one, or the one that its card calls the default.
        split: of the subset; its only one needs no name.
        count: only the first so many records.

    Raises:
        UserError: there is no such subset, split or column, or the data set cannot be read to its end.
    """
    data, chosen = _opened(path, subset, split)
    if column is not None and data.column_names is not None:
        require_column(Path(path), column, data.column_names)
        data = data.select_columns([column])

    def each() -> Iterator[tuple[str, dict[str, Any]]]:
        number, where = 0, path
        try:
            for record in itertools.islice(data, count):
                where = f"{path}:{number}"
                if column is not None:
                    require_column(Path(where), column, list(record))
                number += 1
                yield where, record
        except UserError:
            raise
        except Exception as error:  # a damaged file or a lost connection raises many things
            raise UserError(f"{where}: the data set cannot be read on: {one_line(error)}") from error
        _require_all(path, data, chosen, number, count)
        name, commit = hub_dataset(path) or (path, "")
        reading.counts["dataset"] = {
            "name": name,
            "commit": commit,
            "subset": data.info.config_name,
            "split": chosen,
            "records": number,
        }

    return each()


def refuse_selection(path: str | Path, subset: str | None, count: int | None) -> None:
    """UserError where a recipe selects of files what can be selected of a data set on the hub alone."""
    for field, value in (("subset", subset), ("records", count)):
        if value is not None:
            raise UserError(f"corpus.{field}: {path} is no data set of the hub. Set it to null.")


def splits_of(path: str, subset: str | None = None) -> list[str]:
    """Names of a data set's splits; UserError as in `records`."""
    return list(_splits(path, subset))


def _splits(path: str, subset: str | None) -> Any:
    """By name."""
    datasets = import_extra("datasets")
    name, revision = hub_dataset(path) or ("", "")
    if os.path.isdir(name):
        raise UserError(
            f"corpus.path: the folder {os.path.abspath(name)} has the data set's name and would be read instead."
            " Start in another folder."
        )
    try:
        with quiet_process():
            builder = datasets.load_dataset_builder(name, subset, revision=revision)
            if ".packaged_modules.cache." in type(builder).__module__:
                # Where the hub does not answer, the library takes any revision that it once stored.
                raise ConnectionError("the hub does not answer")
            return builder.as_streaming_dataset()
    except ValueError as error:  # of several subsets none is named, or another; or its files are no data set
        advice = " Set corpus.subset." if "config" in str(error).lower() else ""
        raise UserError(f"{path}: {one_line(error)}{advice}") from error
    except Exception as error:
        raise UserError(
            f"{path}: the data set cannot be opened: {why_not(error, name, revision, 'data set')}"
        ) from error


def _opened(path: str, subset: str | None, split: str | None) -> tuple[Any, str]:
    """The split, and its name."""
    splits = _splits(path, subset)
    chosen = next(iter(splits)) if split is None and len(splits) == 1 else split
    if chosen is None or chosen not in splits:
        given = "none" if split is None else repr(split)
        raise UserError(f"corpus.split: {path} has the splits {', '.join(splits)}; the recipe names {given}.")
    return splits[chosen], chosen


def _require_all(path: str, data: Any, split: str, number: int, count: int | None) -> None:
    """Refuse fewer records than the data set's card says: a stream that ends early trains on a part, silently."""
    described = (data.info.splits or {}).get(split)
    expected = described.num_examples if described is not None else None
    if not number:
        raise UserError(f"{path}: the split {split!r} has no record. Name another in corpus.split.")
    if expected and number < min(expected, count or expected):
        raise UserError(
            f"{path}: {number} records were read, and its card says {expected}. Set corpus.records to {number} if that"
            " is all there is."
        )
