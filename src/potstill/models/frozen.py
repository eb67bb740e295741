"""Weights that are not trained."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from potstill.errors import UserError
from potstill.models.causal_lm import CausalLM


def freeze(model: CausalLM, patterns: Sequence[str]) -> None:
    """Take the gradient from every weight whose name in Transformers matches a pattern. A weight that is tied has both
    names.

    Raises:
        UserError: a pattern that matches no name, or patterns that leave nothing to train.
    """
    named = dict(model.hf.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        matched = [name for name in named if fnmatchcase(name, pattern)]
        if not matched:
            raise UserError(
                f"train.freeze: {pattern!r} matches no weight of {model.name}, whose names are like"
                f" {', '.join([*named][:3])}. Correct it."
            )
        for name in matched:
            named[name].requires_grad_(False)
    if patterns and not any(weight.requires_grad for weight in named.values()):
        raise UserError("train.freeze: nothing is left to train. Freeze less.")
