"""Transformers without its notices and bars: what matters of them is refused by us."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator

import transformers


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
