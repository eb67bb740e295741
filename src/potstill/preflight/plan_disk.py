"""Memory and disk of a corpus, estimated from the size of its files: the part of a plan that is not traced."""

from __future__ import annotations

from pathlib import Path

from potstill.data import token_cache
from potstill.data.readers import files_of
from potstill.recipe.fields import MAX_INT32
from potstill.recipe.load import Recipe
from potstill.recipe.sections_data import CorpusConfig

BYTES_PER_TOKEN_OF_TEXT = 3.5  # SmolLM2's tokenizer on Python source; tokenizers of prose take more bytes
ROW_BYTES_PER_TOKEN = 5  # uint32 id and bool label, see data/packing.py
TOKENIZER_BYTES_PER_ID = 1300  # two loads of a tokenizer of 49,152 ids: 65 MiB resident
TOKENIZER_FILE_BYTES_PER_ID = 72  # its tokenizer.json


def corpus_tokens(recipe: Recipe) -> float | None:
    """Estimated from the size of its files; 0 for a corpus that has none; None for one on the hub, whose size is known
    once its tokens are on this disk. Of a mix, those of all its sources.
    """
    tokens = [_tokens_of(part) for part in recipe.corpus.each]
    known = [each for each in tokens if each is not None]
    return sum(known) if len(known) == len(tokens) else None


def _tokens_of(config: CorpusConfig) -> float | None:
    path = getattr(config, "path", None)
    if config.is_streamed:
        folder = config.shards
        return (
            None if folder is None or not token_cache.is_whole(folder) else token_cache.count_tokens(folder)
        )
    if path is None:
        return 0.0
    files = files_of(Path(path), getattr(config, "include", ("*",)), getattr(config, "exclude", ()))
    size = sum(file.stat().st_size for file in files if file.exists())
    return size / {"uint16": 2.0, "uint32": 4.0}.get(getattr(config, "dtype", ""), BYTES_PER_TOKEN_OF_TEXT)


def planned_steps(recipe: Recipe) -> int:
    """The recipe's, at most; where it says epochs alone an estimate, from above where the corpus is not known."""
    train = recipe.train
    if train.steps is not None:
        return train.steps
    if (tokens := corpus_tokens(recipe)) is None:
        return MAX_INT32
    return max(train.steps_of(int(tokens / recipe.corpus.tokens_per_row)), 1)


def corpus_bytes(recipe: Recipe, vocab_size: int) -> int:
    """Memory of the rows and the tokenizer."""
    # Pages of mapped shards can be evicted.
    in_memory = sum(_tokens_of(part) or 0 for part in recipe.corpus.each if not part.shards)
    return int(in_memory * ROW_BYTES_PER_TOKEN) + TOKENIZER_BYTES_PER_ID * vocab_size


def shards_bytes(recipe: Recipe) -> int:
    """Disk that `corpus.shards` will take; 0 where the recipe has none, they exist already, or nobody knows."""
    to_write = [
        part
        for part in recipe.corpus.each
        if part.shards is not None and not token_cache.is_whole(Path(part.shards))
    ]
    return int(sum(_tokens_of(part) or 0 for part in to_write) * ROW_BYTES_PER_TOKEN)
