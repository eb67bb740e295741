"""Transformers without its notices and bars: what matters of them is refused by us."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator

import transformers


@contextlib.contextmanager
def quiet_panics() -> Iterator[None]:
    """The tokenizers library writes of a panic to the process's stderr itself, before it raises."""
    try:
        saved = os.dup(2)
    except OSError:  # there is no stderr to keep quiet
        yield
        return
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    gguf = logging.getLogger("gguf.gguf_reader")
    level = gguf.level
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    gguf.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # reading GGUF draws a bar that no switch turns off
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        gguf.setLevel(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
