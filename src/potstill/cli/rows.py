"""The verb `rows`: what a recipe trains on, as it is trained on."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from potstill.cli.overrides import add_overrides
from potstill.errors import UserError
from potstill.io.terminal import Display, printable

SHOWN = 4
"""Rows, where --limit says nothing and people look."""
BOLD, PLAIN = "\x1b[1;32m", "\x1b[0m"


def add_flags(rows: argparse.ArgumentParser) -> None:
    rows.add_argument("recipe", type=Path, metavar="RECIPE")
    add_overrides(rows)
    rows.add_argument("--heldout", action="store_true", help="the held-out rows instead of those to train on")
    rows.add_argument(
        "--documents", action="store_true", help="the documents as they are read, before they are packed"
    )
    rows.add_argument(
        "--limit", type=int, metavar="N", help=f"at most so many; default {SHOWN}, and all with --json"
    )


def run_rows(options: argparse.Namespace, display: Display) -> None:
    if options.limit is not None and options.limit < 1:
        raise UserError(f"rows: --limit is {options.limit}; give a number from 1 on.")
    if options.heldout and options.documents:
        raise UserError(
            "rows: --documents come before rows are held out. Leave out one of --heldout and --documents."
        )
    from potstill.recipe.load import load

    recipe = load(options.recipe, options.overrides)
    from potstill.build.corpus import make_corpus, open_source
    from potstill.build.resolve import resolve
    from potstill.data.decontamination import summary
    from potstill.data.packing import about_documents

    resolved = resolve(recipe)
    limit = options.limit if options.limit or options.json else SHOWN
    with contextlib.closing(resolved.teacher):
        if options.documents:
            source, config = open_source(resolved), resolved.recipe.corpus
            for name, part in (config.parts or {"": config}).items():
                reading = source.read(part)
                shown = itertools.islice(_of_documents(reading, name), limit)
                count = _print(options, display, source.tokenizer, shown)
                if limit is None or count < limit:  # all were read, and counted
                    counts: dict[str, Any] = {"reading": reading.counts}
                    for line in about_documents({"sources": {name: counts}} if name else counts):
                        (display.note if options.json else display.result)(line)
            return
        corpus, tokenizer = make_corpus(resolved)
    _print(options, display, tokenizer, itertools.islice(_of_rows(corpus, options.heldout), limit))
    manifest, say = corpus.manifest, display.note if options.json else display.result
    say(
        f"{manifest['documents']} documents; {len(corpus.train)} rows to train on, {len(corpus.heldout)} held out;"
        f" {manifest['train_positions']} tokens bear loss"
        if not resolved.recipe.corpus.is_prompts
        else f"{manifest['documents']} prompts, {len(corpus.train)} of them to train on; what the student writes behind"
        " them bears loss, and not what is marked here"
    )
    for name, part in manifest.get("sources", {}).items():
        say(
            f"{name}: {100 * part['weight']:.4g} % of each step; {part['documents']} documents; {part['train_rows']}"
            f" rows to train on, {part['heldout_rows']} held out; {part['train_positions']} tokens bear loss"
        )
    for line in about_documents(manifest):
        say(line)
    if dropped := manifest["rows_dropped_as_held_out"]:
        say(f"{dropped} rows are left out of training: they are held out")
    used = manifest["train_tokens"] + manifest["heldout_tokens"]
    if (unused := manifest["tokens"] - used) > 0 and not dropped:
        say(
            f"{unused} of {manifest['tokens']} tokens are in no row: of documents on the held-out side beyond"
            " corpus.heldout_rows, and of ends that fill no row"
        )
    if manifest["decontamination"] is not None:
        say(summary(manifest["decontamination"]))


Shown = tuple[str, str, list[int], list[bool], list[int], int | None]
"""Title, source in a mix, ids, whether each bears loss, where documents begin, and the label behind the last id: where
a row ends inside of a document, its last position is taught the id that the next row begins with.
"""


def _of_documents(reading: Any, source: str) -> Iterator[Shown]:
    for document in reading.documents:
        ids = document.ids.tolist()
        labels = [True] * len(ids) if document.labels is None else document.labels.tolist()
        yield (
            document.source,
            source,
            ids,
            [False, *labels[1:]],
            [],
            None,
        )  # the first has nothing that it could follow from


def _of_rows(corpus: Any, heldout: bool) -> Iterator[Shown]:
    """Of a mix, one row of each source by turns, so that the first few are of all of them."""
    rows = corpus.heldout if heldout else corpus.train
    parts = [range(len(rows))] if not corpus.parts else rows.ranges
    by_turns = itertools.chain.from_iterable(itertools.zip_longest(*parts))
    for row in (row for row in by_turns if row is not None):
        batch = rows.batch([row])
        length = int(batch.lengths_B[0])
        ids, labels = batch.input_ids_BT[0, :length].tolist(), [False] * (length + 1)
        for position in batch.positions_N.tolist():  # of each the label is the next token
            labels[position + 1] = True
        begins = (batch.position_ids_BT[0, 1:length] == 0).nonzero()[:, 0] + 1
        following = int(batch.labels_N[-1]) if labels.pop() else None
        source = corpus.source_of(int(batch.rows_B[0]))
        title = f"row {row} of {source}" if source else f"row {row}"
        yield title, source, ids, labels, begins.tolist(), following


def _print(options: argparse.Namespace, display: Display, tokenizer: Any, shown: Iterator[Shown]) -> int:
    """Prints them; returns how many there were."""
    count = 0
    for title, source, ids, labels, begins, following in shown:
        count += 1
        if options.json:
            row = {"ids": ids, "labels": labels, "begins": begins, "next": following}
            row |= {"source": source} if source else {}
            display.result(json.dumps(row))
            continue
        head = f"--- {title}: {len(ids)} tokens, {sum(labels)} bear loss"
        if following is not None:
            head += ", and the first of the next row, which is shown"
            ids, labels = [*ids, following], [*labels, True]
        display.result(head)
        display.result(_as_text(tokenizer, ids, labels, begins))
    return count


def _as_text(tokenizer: Any, ids: Sequence[int], labels: Sequence[bool], begins: Sequence[int]) -> str:
    """Tokens that bear loss in green on a terminal, in brackets elsewhere; a line between documents."""
    marks = (BOLD, PLAIN) if sys.stdout.isatty() else ("⟦", "⟧")
    pieces: list[tuple[int, str]] = []
    for key, run in itertools.groupby(
        range(len(ids)), key=lambda at: (sum(b <= at for b in begins), labels[at])
    ):
        part = [ids[at] for at in run]
        if pieces and pieces[-1][0] != key[0]:
            pieces.append((key[0], "\n|\n"))
        text = " ".join(map(str, part)) if tokenizer is None else tokenizer.decode(part)
        text = printable(text)
        pieces.append((key[0], f"{marks[0]}{text}{marks[1]}" if key[1] else text))
    return "".join(text for _, text in pieces)
