"""`potstill trim`: the recipe's teacher with a smaller vocabulary, as a model folder.

Of a small model the embeddings are much of the weights, and most of their rows are of tokens that one kind of text
never has. The tokens of the recipe's corpus stay, so that its rows are what they were; so do the bytes, with which any
other text is still written.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from potstill.build.corpus import open_source
from potstill.build.resolve import Resolved, resolve
from potstill.build.setup import read_corpus
from potstill.data import tokenizers
from potstill.data.end_of_turn import ends_of
from potstill.data.packing import Corpus
from potstill.data.trimmed_tokenizer import Trimmable
from potstill.errors import UserError
from potstill.io.atomic import seal, writing
from potstill.io.terminal import Display, short
from potstill.models.causal_lm import CausalLM
from potstill.models.load import load_causal_lm, num_weights, weights_sha256
from potstill.models.model_files import only_dtype_of_files
from potstill.models.portable import add_ends, write_json, write_portable_config
from potstill.models.source import ModelFiles
from potstill.models.student import writing_model
from potstill.models.trimmed_ids import named_ids, with_ids
from potstill.recipe import load as recipes
from potstill.recipe.sections_data import CorpusConfig

RECORD = "trimmed.json"
AT_ONCE = 1000
"""Documents that are tokenized in one call."""
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
        UserError: a teacher that is no model of this process or whose tokenizer is not BPE, a corpus that needs more
            tokens than `ids`, or one that the new tokenizer tokenizes differently. No folder is there then.
    """
    display, path = display or Display(quiet=True), Path(recipe)
    out = out or Path("trimmed") / path.stem
    if out.exists():
        raise UserError(f"{out}: exists already. Give another --out.")
    resolved = resolve(recipes.load(path, overrides))
    _require_text(resolved.recipe.corpus)
    files = _files_of(resolved)
    tokenizer = Trimmable(_tokenizer_of(resolved, files), files.vocab_size)
    _require_writable(out)
    corpus, _ = read_corpus(resolved, display.note, lambda: None)
    model = load_causal_lm(files.path, own_config=files.config, dtype=_dtype(files))
    used = {int(id_) for stream in _streams(corpus) for id_ in np.unique(stream)}
    keep = tokenizer.kept_ids(used | (named_ids(model) & tokenizer.tokens.keys()), ids)
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
    compared, documents = _write(out, trimmed, tokenizer, record, corpus)
    display.note(
        f"trim: {len(keep)} of {model.vocab_size} tokens, {short(after)} of {short(before)} weights; the corpus has"
        f" {len(used)} different ones, and {compared} of its {documents} documents could be compared and are tokenized"
        " as before"
    )
    if resolved.recipe.corpus.tokenizer is not None:
        display.note(
            "trim: corpus.tokenizer is in the folder, too; leave the field out where this is the teacher"
        )
    if resolved.recipe.corpus.is_prompts:
        display.note("trim: prompts have no answers: what models write to them has the tokens that are left")
    return record


def _require_writable(out: Path) -> None:
    """Before anything is read; no folder is made yet."""
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise UserError(f"{out}: cannot be written: {above} takes no files. Give another --out.")


def _write(
    out: Path, trimmed: CausalLM, tokenizer: Trimmable, record: Json, corpus: Corpus
) -> tuple[int, int]:
    """The folder, whole or not at all, once both tokenizers have tokenized the corpus: see `_compared`."""
    keep = record["kept"]
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}")
    try:
        with writing_model(scratch):
            trimmed.save(scratch)
            new = tokenizer.save(keep, scratch)
            add_ends(scratch, ends_of(new))
            write_portable_config(scratch)
            write_json(scratch / RECORD, record)
        compared = _compared(tokenizer.tokenizer, new, keep, corpus, record["of"])
        seal(scratch)
        with writing(out):
            scratch.rename(out)
        return compared
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _files_of(resolved: Resolved) -> ModelFiles:
    """The teacher's, verified; UserError for a teacher that is no model of this process."""
    if resolved.teacher.model_config is None:
        raise UserError(
            f"teacher.name: {resolved.teacher.config.registered_name} is no model of this process. Set it to torch and"
            " teacher.model to the files of the model to trim."
        )
    (files, *_) = resolved.teacher.checkpoints
    files.verify()
    return files


def _require_text(corpus: CorpusConfig) -> None:
    for part in corpus.each:
        if not part.needs_tokenizer:
            raise UserError(
                f"corpus.name: {part.registered_name} has ids of the whole vocabulary, which a smaller one does not"
                " fit. Give the text that they were made from."
            )


def _tokenizer_of(resolved: Resolved, files: ModelFiles) -> Any:
    """What reads the corpus, with the teacher's tokens; it goes into the folder.

    Raises:
        UserError: no tokenizer, or one with other tokens than the teacher's.
    """
    tokenizer = open_source(resolved).tokenizer
    if tokenizer is None:
        raise UserError(f"teacher.model: {files.source} has no tokenizer. Put its files beside the weights.")
    if files.tokenizer is not None:
        theirs, own = (tokenizers.vocab_of(each, files.vocab_size) for each in (files.tokenizer, tokenizer))
        tokenizers.require_same(theirs, own, f"teacher {files.source}", "corpus.tokenizer")
    return tokenizer


def _dtype(files: ModelFiles) -> torch.dtype:
    """That of the files where all weights have it, else float32, which has every number that they stand for."""
    stored = only_dtype_of_files(files.path)
    return torch.float32 if stored is None else getattr(torch, stored)


def _streams(corpus: Corpus) -> Iterator[NDArray[np.uint32]]:
    """The ids of each document: of both splits, of each source of a mix, and what only the teacher reads of prompts."""
    for part in (corpus.parts or {"": corpus}).values():
        for rows in (part.train, part.heldout):
            yield from np.split(rows.ids, rows.starts[1:])
            yield from (ids for ids in rows.for_teacher if ids is not None)


def _compared(old: Any, new: Any, keep: Sequence[int], corpus: Corpus, name: str) -> tuple[int, int]:
    """How many documents both tokenize alike, and how many there are.

    Not compared is one whose text, decoded and tokenized again, has tokens that were not kept: where it was cut inside
    a character, or spells a special token.

    Raises:
        UserError: a document that both tokenize differently, or none that can be compared.
    """
    number_of = {id_: number for number, id_ in enumerate(keep)}
    same = others = documents = 0
    for texts in _texts(old, _streams(corpus)):
        before, after = (each(texts, add_special_tokens=False)["input_ids"] for each in (old, new))
        for ids, found in zip(before, after, strict=True):
            documents += 1
            if number_of.keys() >= {*ids}:
                is_same = [number_of[id_] for id_ in ids] == found
                same, others = same + is_same, others + (not is_same)
    if others or not same:
        what = "tokenized differently" if others else "comparable"
        raise UserError(
            f"{name}: cannot be trimmed: with {len(keep)} tokens {others or 'none'} of {documents} documents of the"
            f" corpus are {what}. Use it with all of them."
        )
    return same, documents


def _texts(tokenizer: Any, streams: Iterable[NDArray[np.uint32]]) -> Iterator[list[str]]:
    """The documents' texts, some at a time."""
    texts: list[str] = []
    for ids in streams:
        texts.append(tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False))
        if len(texts) == AT_ONCE:
            yield texts
            texts = []
    if texts:
        yield texts
