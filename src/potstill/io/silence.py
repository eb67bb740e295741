"""Libraries without their notices and progress bars: what matters of these is an error of ours."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator

import transformers

NOISY_LOGGERS = ("gguf.gguf_reader", "torch.utils._pytree")
"""They warn of arrays that the reader skips, and of classes that torchao registers."""

_saved_stderr: list[int] = []
"""Copies of stderr, while `quiet_process` has it redirected."""


@contextlib.contextmanager
def quiet_process() -> Iterator[None]:
    """Nothing on stderr, not from native code either: the tokenizers library prints a panic there before it
    raises, torchao each kernel that this machine has no device for.
    """
    try:
        saved = os.dup(2)
    except OSError:  # no stderr
        yield
        return
    _saved_stderr.append(saved)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        _saved_stderr.remove(saved)
        os.close(saved)


def restore_stderr() -> None:
    """End `quiet_process` early: for a signal handler or thread that ends the process and must print why."""
    if _saved_stderr:
        os.dup2(_saved_stderr[0], 2)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    loggers = [logging.getLogger(name) for name in NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the bar of the GGUF reader has no switch
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
