"""Transformers without its notices and bars: what matters of them is refused by us."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator

import transformers

TALKERS = ("gguf.gguf_reader", "torch.utils._pytree")
"""Of arrays that it skips; of classes that torchao registers."""

_heard: list[int] = []
"""What stderr is outside, while `quiet_process` keeps it quiet."""


@contextlib.contextmanager
def quiet_process() -> Iterator[None]:
    """Nothing on stderr, whoever writes: the tokenizers library tells there of a panic before it raises,
    torchao of each kernel that this machine has no device for.
    """
    try:
        saved = os.dup(2)
    except OSError:  # there is no stderr to keep quiet
        yield
        return
    _heard.append(saved)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        _heard.remove(saved)
        os.close(saved)


def speak() -> None:
    """End the quiet: for who stops the process, from a signal or another thread, and has to say so."""
    if _heard:
        os.dup2(_heard[0], 2)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    talkers = [logging.getLogger(name) for name in TALKERS]
    levels = [logger.level for logger in talkers]
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for logger in talkers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # reading GGUF draws a bar that no switch turns off
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        for logger, level in zip(talkers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
