"""Configs of another hidden size, and which dimensions of which tensors the residual stream goes through.

Those are the ones that differ between the models of two configs that differ in nothing but the hidden size; neither
allocates a weight. No names of any family are needed for it.
"""

from __future__ import annotations

import copy
from typing import Any

from potstill.errors import UserError, one_line
from potstill.models.load import plain_config, shapes_of

ADVICE = "Leave hidden_size out."
WIDEST_INNER = 4
"""GPT-2's MLPs have so many times the hidden size, where its config names no number."""


def set_hidden_size(config: Any, hidden_size: int) -> Any:
    """The config with so many channels in the residual stream, and all else as it was; it is changed.

    Raises:
        UserError: as many as there are or more, or a config that cannot have them.
    """
    text = config.get_text_config()
    before = text.hidden_size
    if not 1 <= hidden_size < before:
        raise UserError(
            f"student.hidden_size: {hidden_size} channels of the residual stream cannot be kept of the teacher's"
            f" {before}. Give 1 to {before - 1}, or leave hidden_size out to keep all."
        )
    _pin(text)
    if (error := _refusal(config, hidden_size)) is not None:
        near = next((less for less in range(hidden_size, 0, -1) if _refusal(config, less) is None), None)
        advice = ADVICE if near is None else f"Give another number, such as {near}, or leave hidden_size out."
        raise UserError(
            f"student.hidden_size: the config of a {text.model_type} cannot have {hidden_size} of {before} channels:"
            f" {one_line(error)} {advice}"
        )
    text.hidden_size = hidden_size
    return config


def stream_dims(config: Any, narrow: Any) -> dict[str, int]:
    """By the name of each tensor that the residual stream goes through, which of its dimensions it is.

    Args:
        narrow: the same config with another hidden size: see `set_hidden_size`.

    Raises:
        UserError: a model in which other dimensions follow the hidden size.
    """
    whole = plain_config(config)
    text, kind = whole.get_text_config(), narrow.get_text_config().model_type
    before, after = text.hidden_size, narrow.get_text_config().hidden_size
    _pin(text)
    try:
        ours, theirs = shapes_of(narrow), shapes_of(whole)
    except Exception as error:  # what Transformers raises over a config that fits no model
        raise UserError(
            f"student.hidden_size: Transformers builds no {kind} with a hidden size of {after}: {one_line(error)}"
            f" {ADVICE}"
        ) from error
    dims = dict[str, int]()
    for name, shape in theirs.items():
        other = ours.get(name, ())
        differ = [at for at, (a, b) in enumerate(zip(shape, other, strict=False)) if a != b]
        if len(other) != len(shape) or [(shape[at], other[at]) for at in differ] not in (
            [],
            [(before, after)],
        ):
            raise UserError(
                f"student.hidden_size: {name} of a {kind} is {_size(shape)} with a hidden size of {before} and"
                f" {_size(other)} with {after}, so that more than the residual stream follows it. {ADVICE}"
            )
        dims |= {name: differ[0]} if differ else {}
    return dims


def _pin(text: Any) -> None:
    """Name what would follow the hidden size else: the length of a head, and GPT-2's channels."""
    heads = getattr(text, "num_attention_heads", None)
    if isinstance(heads, int) and not getattr(text, "head_dim", None):
        text.head_dim = text.hidden_size // heads
    if getattr(text, "n_inner", text) is None:
        text.n_inner = WIDEST_INNER * text.hidden_size


def _refusal(config: Any, hidden_size: int) -> Exception | None:
    """What a saved config of this hidden size does not pass; None: it does."""
    tried = copy.deepcopy(config)
    try:
        tried.get_text_config().hidden_size = hidden_size
        type(tried).from_dict(tried.to_dict())
    except Exception as error:  # each config has checks of its own
        return error
    return None


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "nothing"
