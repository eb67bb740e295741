"""A model with fewer ids: the rows of its embedding and head that belong to them, and all else as it was."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from potstill.errors import UserError, one_line
from potstill.models.causal_lm import CausalLM, relative_gap
from potstill.models.load import plain_config, shapes_of
from potstill.models.portable import ids_of
from potstill.models.probes import TOLERANCE

TOKENS = 64
"""Of the row on which both models are compared."""
NEVER_WRITTEN = ("suppress_tokens", "begin_suppress_tokens")
"""Lists of ids in a generation config, which are no reason to keep them."""


def named_ids(model: CausalLM) -> set[int]:
    """The ids that its config and its generation config name: they must stay."""
    text = model.hf.config.get_text_config()
    named = {
        id_
        for config in (model.hf.config, text, model.hf.generation_config)
        for field in _fields(config)
        for id_ in ids_of(getattr(config, field))
    }
    return {id_ for id_ in named if 0 <= id_ < model.vocab_size}


@torch.no_grad()
def with_ids(model: CausalLM, keep: Sequence[int]) -> CausalLM:
    """The model with these ids alone, numbered in their order; every tensor is a copy, and ties are kept.

    Raises:
        UserError: a model in which more depends on the ids than the rows of its embedding and head.
    """
    new_id = {id_: number for number, id_ in enumerate(keep)}
    config = plain_config(model.hf.config)
    for each in {id(each): each for each in (config, config.get_text_config())}.values():
        _renumber(each, new_id)
    keep_V = torch.tensor(keep, device=model.device)
    try:
        dims = _dims_of_ids(model.hf.config, len(keep))
        config.get_text_config().vocab_size = len(keep)
        hf = transformers.AutoModelForCausalLM.from_config(
            config, dtype=model.hf.dtype, trust_remote_code=False
        )
        state = {
            name: tensor.index_select(dims[name], keep_V) if name in dims else tensor
            for name, tensor in model.state().items()
        }
        hf.load_state_dict(state, strict=True)
    except (ValueError, TypeError, RuntimeError, LookupError, ArithmeticError, AttributeError) as error:
        raise UserError(
            f"{model.name}: {type(model.hf).__name__} cannot be made with {len(keep)} of its ids: {one_line(error)}"
            " Use it with all."
        ) from error
    hf.generation_config = copy.deepcopy(model.hf.generation_config)
    _renumber(hf.generation_config, new_id)
    trimmed = CausalLM(hf.to(model.device), name=model.name).eval()
    trimmed.probe()
    _require_same(model, trimmed, keep_V)
    return trimmed


def _require_same(model: CausalLM, trimmed: CausalLM, keep_V: Tensor) -> None:
    """UserError unless both give the same logits for the ids that both have."""
    longest = getattr(model.hf.config.get_text_config(), "max_position_embeddings", None) or TOKENS
    ids_BT = trimmed.some_ids(1, min(TOKENS, longest))
    was_training = model.training
    model.eval()
    logits_TV = model.logits(model.hidden(keep_V[ids_BT])[0])[:, keep_V]
    model.train(was_training)
    gap = relative_gap(trimmed.logits(trimmed.hidden(ids_BT)[0]), logits_TV)
    if not gap <= TOLERANCE:
        raise UserError(
            f"{model.name}: {type(model.hf).__name__} with {len(keep_V)} of its ids gives other logits for them, by"
            f" {gap:.1e} of the largest, so that more depends on ids than its embedding and head. Use it with all."
        )


def _dims_of_ids(config: Any, ids: int) -> dict[str, int]:
    """By name, which dimension of a tensor the ids are: the one that another number of them changes."""
    before = config.get_text_config().vocab_size
    shapes = []
    for count in (before, ids):
        own = plain_config(config)
        _renumber(own.get_text_config(), {})
        own.get_text_config().vocab_size = count
        shapes.append(shapes_of(own))
    dims = dict[str, int]()
    for name, shape in shapes[0].items():
        differ = [
            at for at, pair in enumerate(zip(shape, shapes[1][name], strict=True)) if pair[0] != pair[1]
        ]
        if len(differ) > 1:
            raise ValueError(f"{name} has {len(differ)} dimensions that follow the ids.")
        dims |= {name: differ[0]} if differ else {}
    return dims


def _fields(config: Any) -> list[str]:
    """Those that name an id or several."""
    return [
        name
        for name, value in vars(config).items()
        if name.endswith("_token_id") and value is not None and all(type(id_) is int for id_ in ids_of(value))
    ]


def _renumber(config: Any, new_id: Mapping[int, int]) -> None:
    """Ids that are not kept are no longer named."""
    for field in (*_fields(config), *NEVER_WRITTEN):
        value = getattr(config, field, None)
        if value is not None:
            left = [new_id[id_] for id_ in ids_of(value) if id_ in new_id]
            setattr(config, field, left if isinstance(value, list) and left else next(iter(left), None))
    if words := getattr(config, "bad_words_ids", None):
        left_words = [[new_id[id_] for id_ in word] for word in words if new_id.keys() >= {*word}]
        config.bad_words_ids = left_words or None
