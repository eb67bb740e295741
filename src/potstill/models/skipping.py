"""Run a model without some of its layers, or from the middle on."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor


@contextlib.contextmanager
def skipping(
    layers: Sequence[Any], first: int, known: Tensor, beside: tuple[Any, ...] | None, out: Container[int] = ()
) -> Iterator[None]:
    """Inside the block, layers up to `first` are not computed: it gives `known`, a hidden_BTD, whatever it gets. Of the
    layers above it those in `out` pass on what they get.

    Args:
        beside: what a layer gives behind its hidden states, in one tuple with them; None: they are no tuple.
    """
    for number, layer in enumerate(layers):
        if number <= first or number in out:
            layer.forward = partial(_passed_on, beside, known if number == first else None)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)  # the class's own is back


def beside(output: Any) -> tuple[Any, ...] | None:
    """What a layer gave behind its hidden states: see `skipping`."""
    return output[1:] if isinstance(output, tuple) else None


def _passed_on(beside: tuple[Any, ...] | None, known: Tensor | None, *args: Any, **kwargs: Any) -> Any:
    """In the place of a layer's forward: its input, or what it is known to give."""
    hidden = (args[0] if args else kwargs["hidden_states"]) if known is None else known
    return hidden if beside is None else (hidden, *beside)
