"""`potstill trim`: the recipe's teacher with fewer tokens, as a model folder.

Of a small model the embeddings are much of the weights, and most of their rows are of tokens that one kind of text
never has. The tokens of the recipe's corpus stay, so that its rows are what they were; so do the bytes, with which any
other text is still written.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from potstill.build.corpus import make_corpus
from potstill.build.resolve import Resolved, resolve
from potstill.build.setup import read_corpus
from potstill.data.end_of_turn import ends_of
from potstill.data.packing import Corpus, PackedRows
from potstill.data.trimmed_tokenizer import kept_ids, save_trimmed
from potstill.errors import UserError
from potstill.io.atomic import replace_folder
from potstill.io.silence import quiet_transformers
from potstill.io.terminal import Display, short
from potstill.models.causal_lm import CausalLM
from potstill.models.load import load_causal_lm, num_weights, weights_sha256
from potstill.models.portable import add_ends, write_json, write_portable_config
from potstill.models.source import ModelFiles
from potstill.models.trimmed_ids import named_ids, with_ids
from potstill.recipe import load as recipes

RECORD = "trimmed.json"
Json = dict[str, Any]


def trim(
    recipe: str | Path,
    ids: int,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    display: Display | None = None,
) -> Json:
    """Write the recipe's teacher with at most so many tokens into a folder.

    Args:
        recipe: a YAML file; its student is not loaded.
        ids: the most tokens to keep.
        overrides: `a.b=value`.
        out: a folder that does not exist yet; default `trimmed/NAME`.

    Returns:
        What was kept, as in the folder's `trimmed.json`.

    Raises:
        UserError: a teacher that is no model of this process or whose tokenizer is not BPE, a corpus with more tokens,
            or one that the new tokenizer reads otherwise. Nothing is written then.
    """
    display, path = display or Display(quiet=True), Path(recipe)
    out = out or Path("trimmed") / path.stem
    if out.exists():
        raise UserError(f"{out}: exists already. Give another --out.")
    resolved = resolve(recipes.load(path, overrides))
    if resolved.teacher.model_config is None:
        raise UserError(
            f"teacher.name: {resolved.teacher.config.registered_name} is no model of this process, which alone can be"
            " trimmed. Set it to torch, and teacher.model to its files."
        )
    (files, *_) = resolved.teacher.checkpoints
    files.verify()
    if files.tokenizer is None:
        raise UserError(f"teacher.model: {files.source} has no tokenizer. Put its files beside the weights.")
    corpus, _ = read_corpus(resolved, display.note, lambda: None)
    model = load_causal_lm(files.path, own_config=files.config, dtype=_dtype(files))
    used = {int(id_) for rows in _rows(corpus) for id_ in np.unique(rows.ids)}
    keep = kept_ids(files.tokenizer, used | named_ids(model), ids)
    trimmed = with_ids(model, keep)
    before, after = num_weights(model.hf.config), num_weights(trimmed.hf.config)
    record = {
        "of": files.source,
        "weights_sha256": weights_sha256(model),
        "corpus_fingerprint": corpus.fingerprint,
        "tokens_of_the_corpus": len(used),
        "weights": {"before": before, "after": after},
        "ids": {"before": model.vocab_size, "after": len(keep)},
        "kept": keep,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_folder(out, lambda folder: _save(folder, trimmed, files, keep, record, resolved, corpus))
    display.note(
        f"trim: {len(keep)} of {model.vocab_size} ids, {short(after)} of {short(before)} weights; the corpus has"
        f" {len(used)} different tokens and is read as before"
    )
    return record


def _dtype(files: ModelFiles) -> torch.dtype:
    """That of the files; of a GGUF file float32, which has every number that its blocks stand for."""
    stored = getattr(torch, files.dtype or "", None) if files.path.is_dir() else None
    return stored if isinstance(stored, torch.dtype) else torch.float32


def _rows(corpus: Corpus) -> Iterator[PackedRows]:
    """Of both splits, and of each source of a mix."""
    for part in (corpus.parts or {"": corpus}).values():
        yield part.train
        yield part.heldout


def _save(
    folder: Path,
    trimmed: CausalLM,
    files: ModelFiles,
    keep: list[int],
    record: Json,
    resolved: Resolved,
    corpus: Corpus,
) -> None:
    with quiet_transformers():  # its bar of shards
        trimmed.save(folder)
    tokenizer = save_trimmed(files.tokenizer, keep, folder)
    add_ends(folder, ends_of(tokenizer))
    write_portable_config(folder)
    write_json(folder / RECORD, record)
    recipe = resolved.recipe
    read = dataclasses.replace(recipe.corpus, tokenizer=str(folder), shards=None)
    again, _ = make_corpus(dataclasses.replace(resolved, recipe=dataclasses.replace(recipe, corpus=read)))
    kept_V = np.array(keep, dtype=np.uint32)
    own, new = _documents(corpus), _documents(again, kept_V)
    if others := (own - new).total():
        raise UserError(
            f"{files.source}: cannot be trimmed: with {len(keep)} tokens its tokenizer reads {others} of"
            f" {own.total()} documents of the corpus otherwise. Use it with all of them."
        )


def _documents(corpus: Corpus, kept_V: NDArray[np.uint32] | None = None) -> Counter[bytes]:
    """How often each document occurs, by the hash of its ids: the ids decide which are held out, and their order.

    Args:
        kept_V: of a trimmed tokenizer: what its ids were.
    """
    return Counter(
        hashlib.sha256((ids if kept_V is None else kept_V[ids]).tobytes()).digest()
        for rows in _rows(corpus)
        for ids in np.split(rows.ids, rows.starts[1:])
    )
