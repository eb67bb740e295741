"""A checkpoint before its weights are loaded: where it lies, its config, its vocabulary, its tokenizer."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from potstill.data.tokenizers import has_tokenizer, load_tokenizer
from potstill.models.hub import local_copy
from potstill.models.load import load_config, vocab_size_of
from potstill.models.model_files import check_model_files, dtype_of_files


class ModelFiles:
    """Every file of a run's models is opened through one of these, and each at most once.

    Args:
        source: Hugging Face folder, hub id (the same commit for all files) or GGUF file.
    """

    def __init__(self, source: str | Path) -> None:
        self.source = str(source)
        self._is_verified = False

    @cached_property
    def path(self) -> Path:
        """On this machine; a hub id is fetched."""
        return local_copy(self.source)

    @cached_property
    def config(self) -> Any:
        """The Transformers config. From a GGUF file that takes seconds."""
        return load_config(self.path)

    @cached_property
    def vocab_size(self) -> int:
        """Width of its logits, from the header of its weights."""
        return vocab_size_of(self.path)

    @cached_property
    def tokenizer(self) -> Any | None:
        return load_tokenizer(self.path) if has_tokenizer(self.path) else None

    @property
    def dtype(self) -> str | None:
        """What most of its weights have: see `dtype_of_files`."""
        return dtype_of_files(self.path)

    @property
    def bytes_of_file(self) -> int:
        """Of a GGUF file; 0 for a folder."""
        return self.path.stat().st_size if self.path.is_file() else 0

    def verify(self) -> None:
        """UserError for files that are not a whole model, before a library opens them."""
        if self._is_verified:
            return
        check_model_files(self.path)
        self._is_verified = True
        if self.path.is_dir():  # of a GGUF file the config is read when it is needed
            _ = self.config
