"""Memory and disk of a corpus, estimated from the size of its files: the part of a plan that is not traced."""

from __future__ import annotations

from pathlib import Path

from potstill.data import token_cache
from potstill.data.readers import files_of
from potstill.recipe.load import Recipe

BYTES_PER_TOKEN_OF_TEXT = 3.5  # SmolLM2's tokenizer on Python source; tokenizers of prose take more bytes
ROW_BYTES_PER_TOKEN = 5  # uint32 id and bool label, see data/packing.py
TOKENIZER_BYTES_PER_ID = 1300  # two loads of a tokenizer of 49,152 ids: 65 MiB resident
TOKENIZER_FILE_BYTES_PER_ID = 72  # its tokenizer.json


def corpus_tokens(recipe: Recipe) -> float:
    """Estimated from the size of its files; 0 for a corpus that has none, as on the hub."""
    config = recipe.corpus
    path = getattr(config, "path", None)
    if path is None or config.is_streamed:
        return 0.0
    files = files_of(Path(path), getattr(config, "include", ("*",)), getattr(config, "exclude", ()))
    size = sum(file.stat().st_size for file in files if file.exists())
    return size / {"uint16": 2.0, "uint32": 4.0}.get(getattr(config, "dtype", ""), BYTES_PER_TOKEN_OF_TEXT)


def planned_steps(recipe: Recipe) -> int:
    """The recipe's, or of its epochs an estimate; at least one."""
    train = recipe.train
    if train.steps is not None and train.epochs is None:
        return train.steps
    rows = max(int(corpus_tokens(recipe) / recipe.corpus.tokens_per_row), 1)
    return max(train.of_rows(rows).num_steps, 1)


def corpus_bytes(recipe: Recipe, vocab_size: int) -> int:
    """Memory of the rows and the tokenizer."""
    in_memory = 0 if recipe.corpus.shards else ROW_BYTES_PER_TOKEN  # pages of mapped shards can be evicted
    return int(corpus_tokens(recipe) * in_memory) + TOKENIZER_BYTES_PER_ID * vocab_size


def shards_bytes(recipe: Recipe) -> int:
    """Disk that `corpus.shards` will take; 0 where the recipe has none, or they exist already."""
    shards = recipe.corpus.shards
    is_to_write = shards is not None and not token_cache.is_whole(Path(shards))
    return int(corpus_tokens(recipe) * ROW_BYTES_PER_TOKEN) if is_to_write else 0
