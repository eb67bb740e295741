"""A function that runs inside of a model's forward, where DDP and FSDP have its weights ready, that of the head too."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn


def let_in(model: nn.Module) -> None:
    """From now on `model(within=f)` returns f(), called inside of the forward of model and of what is wrapped around
    it; every other call is as it was.
    """
    forward = model.forward
    # An object that no wrapper looks into: FSDP would cast tensors among the arguments, the teacher's head too.
    model.forward = functools.update_wrapper(functools.partial(_forward, forward), forward)


def _forward(
    forward: Callable[..., Any], *args: Any, within: Callable[[], Any] | None = None, **inputs: Any
) -> Any:
    return forward(*args, **inputs) if within is None else within()
