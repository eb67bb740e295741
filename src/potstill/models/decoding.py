"""The decoding loop: rows over one key-value cache, from which a row is removed once it ends.

Transformers' `generate` keeps every row until the last one ends, pads every prompt to the longest, and silently
applies whatever the model's own generation config contains (a repetition penalty, a top-k). Here prompts of similar
length are read together and their caches joined, and one settings object drives the loop.
"""

from __future__ import annotations

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer

from potstill.errors import one_line
from potstill.models.causal_lm import CausalLM

SIMILAR = 0.8
"""Prompts that are read together are at least so long, as a share of the longest of them."""


PROBE_TOKENS = 12
MAX_GAP, MAX_GAP_ROUNDED = 0.02, 0.5
"""Nats that decoding with a cache may differ by, in float32 and in fewer bits."""


class InferenceFailed(Exception):
    """The model produced nothing that could be used."""


@dataclass
class Row(ABC):
    """One prompt, and what has been decoded behind it. A subclass says in `add` when it ends."""

    name: str
    """Of the row in messages and, with the seed, what its random numbers come from."""
    prompt_ids: list[int]
    max_new: int
    uniforms: list[float]
    """One number from [0, 1) a token; empty where decoding is greedy."""
    new: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    """Log-probability of each new token under the model itself, at temperature 1 and with nothing cut off."""
    finish: str = ""
    """Why it ended; empty while it goes on."""
    source: int | None = None
    """The number of the source of a mix that the prompt is of."""

    @abstractmethod
    def add(self, token: int) -> None:
        """Keep a token, and set `finish` where it is the last."""


Decode = Callable[[GenerationConfig, Sequence[Row], Callable[[], None]], None]
"""`decode` of some model: settings, rows, and what is called as a sign of life."""


def uniforms(seed: int, name: str, count: int) -> list[float]:
    """The random numbers of a row: a function of these alone, whatever else is in the batch."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return list(torch.rand(count, generator=generator, dtype=torch.float64).tolist())


@torch.no_grad()
def decode(
    model: CausalLM,
    settings: GenerationConfig,
    rows: Sequence[Row],
    beat: Callable[[], None] = lambda: None,
) -> None:
    """Add tokens to every row until it ends. The model is put into eval mode meanwhile.

    What is sampled depends on the logits and on a row's own numbers, not on the rest of the batch.

    Args:
        beat: called with every token, a sign of life for a watchdog.

    Raises:
        InferenceFailed: a logit is not finite, or the model keeps no cache.
    """
    was_training = model.hf.training  # which a loop of one's own may have set behind the back of `model`
    model.eval()
    try:
        _decode(model, settings, [row for row in rows if not row.finish], beat)
    finally:
        model.train(was_training)


def _decode(model: CausalLM, settings: GenerationConfig, live: list[Row], beat: Callable[[], None]) -> None:
    if not live:
        return
    body = _Body(model, settings.pad_token_id)
    live, cache, mask_BT, hidden_BD = body.read_prompts(live)
    while live:
        beat()
        next_B = choose(model.logits(hidden_BD), settings, live, model.known)
        for row, token in zip(live, next_B.tolist(), strict=True):
            row.add(token)
        kept = [i for i, row in enumerate(live) if not row.finish]
        if not kept:
            return
        if len(kept) < len(live):
            kept_B = torch.tensor(kept, dtype=torch.long, device=next_B.device)
            live = [live[i] for i in kept]
            mask_BT, next_B = mask_BT[kept_B], next_B[kept_B]
            cache.batch_select_indices(kept_B)
        mask_BT = F.pad(mask_BT, (0, 1), value=1)
        cache, hidden_BD = body.read(next_B[:, None], mask_BT, cache, live[0].name)


@dataclass
class _Probe(Row):
    def add(self, token: int) -> None:
        self.new.append(token)
        self.finish = "length" if len(self.new) >= self.max_new else ""


@torch.no_grad()
def decoding_fault(model: CausalLM) -> str | None:
    """Why what the model decodes with a cache is not what it computes without one; None: it is.

    Two rows of prompts of unequal length, of which one ends earlier: models with a recurrent state may read the
    padding, or have a cache from which a row cannot be removed.
    """
    if not model.keeps_cache:
        return "it keeps no cache"
    ids_BT = model.some_ids(2, PROBE_TOKENS).tolist()
    rows = [
        _Probe("a probe", ids_BT[0], 4, uniforms(0, "long", 4)),
        _Probe("a probe", ids_BT[1][: PROBE_TOKENS - 2], 2, uniforms(0, "short", 2)),
    ]
    settings = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0)
    try:
        decode(model, settings, rows)
    except (InferenceFailed, RuntimeError, AttributeError, ValueError, TypeError, IndexError) as error:
        why = one_line(error).rstrip(".")
        return f"{type(model.hf).__name__} does not decode two rows of unequal length: {why:.200}"
    was_training = model.training
    model.eval()
    gap = 0.0
    for row in rows:
        whole_BT = torch.tensor([[*row.prompt_ids, *row.new]], device=model.device)
        logp_TV = model.logits(model.hidden(whole_BT)[0]).log_softmax(-1)
        first = len(row.prompt_ids) - 1
        gaps = (abs(float(logp_TV[first + n, token]) - row.logps[n]) for n, token in enumerate(row.new))
        gap = max(gap, *gaps)
    model.train(was_training)
    if gap > (MAX_GAP if model.hf.dtype in (torch.float32, torch.float64) else MAX_GAP_ROUNDED):
        return f"in {type(model.hf).__name__} a token decoded with a cache is {gap:.2g} nats from the same one without"
    return None


class _Body:
    """A model's body with a cache. Transformers calls it `cache` since 5.24 and warns about the old name."""

    def __init__(self, model: CausalLM, pad_id: int) -> None:
        self.model, self.pad_id = model, pad_id
        parameters = inspect.signature(model.body.forward).parameters
        self.cache_name = "cache" if "cache" in parameters else "past_key_values"
        self.takes_positions = "position_ids" in parameters

    def read(self, ids_BT: Tensor, mask_BT: Tensor, cache: Any, name: str) -> tuple[Any, Tensor]:
        """The cache with these tokens in it, and hidden_BD of the last one. `mask_BT` is as long as the cache will be,
        with 0 where a row is padded, on its left.
        """
        positions_BT = (mask_BT.cumsum(1) - 1).clamp_min(0)[:, -ids_BT.shape[1] :]
        out = self.model.body(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            use_cache=True,
            **{self.cache_name: cache},
            **({"position_ids": positions_BT} if self.takes_positions else {}),
        )
        cache = getattr(out, self.cache_name, None)
        if cache is None:
            raise InferenceFailed(f"{name}: {type(self.model.hf).__name__} keeps no key-value cache")
        return cache, out.last_hidden_state[:, -1]

    def read_prompts(self, rows: Sequence[Row]) -> tuple[list[Row], Any, Tensor, Tensor]:
        """The rows, the longest prompt first, with the cache, the mask and the last hidden states of all of them.

        Prompts of similar length are read together, and their caches joined where these are plain tensors. Others,
        sliding windows among them, would be joined wrongly: then all are read together, padded to the longest.
        """
        rows = sorted(rows, key=lambda row: -len(row.prompt_ids))
        parts = []
        for group in similar(rows):
            cache, mask_BT, hidden_BD = self._read_padded(group)
            if len(group) == len(rows):
                return rows, cache, mask_BT, hidden_BD
            if not _is_joinable(cache):
                return rows, *self._read_padded(rows)
            parts.append((cache, mask_BT, hidden_BD))
        caches, masks, hidden = zip(*parts, strict=True)
        length = masks[0].shape[1]
        joined = caches[0]
        for number, layer in enumerate(joined.layers):
            if layer.get_seq_length() == 0:  # a layer that reads another one's
                continue
            for name in ("keys", "values"):
                of_groups = [getattr(cache.layers[number], name) for cache in caches]
                longer = [F.pad(part, (0, 0, length - part.shape[-2], 0)) for part in of_groups]
                setattr(layer, name, torch.cat(longer))
        mask_BT = torch.cat([F.pad(mask, (length - mask.shape[1], 0)) for mask in masks])
        return rows, joined, mask_BT, torch.cat(hidden)

    def _read_padded(self, rows: Sequence[Row]) -> tuple[Any, Tensor, Tensor]:
        prompts, length = [row.prompt_ids for row in rows], len(rows[0].prompt_ids)
        ids_BT = torch.tensor([[self.pad_id] * (length - len(ids)) + ids for ids in prompts])
        mask_BT = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts])
        ids_BT, mask_BT = ids_BT.to(self.model.device), mask_BT.to(self.model.device)
        cache, hidden_BD = self.read(ids_BT, mask_BT, None, rows[0].name)
        return cache, mask_BT, hidden_BD


def _is_joinable(cache: Any) -> bool:
    layers = getattr(cache, "layers", ())
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def similar(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows, the longest prompt first, in groups of prompts of `SIMILAR` length."""
    groups: list[list[Row]] = []
    for row in rows:
        if groups and len(row.prompt_ids) >= SIMILAR * len(groups[-1][0].prompt_ids):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def choose(
    logits_BV: Tensor, settings: GenerationConfig, live: Sequence[Row], known: int | None = None
) -> Tensor:
    """The next token of each row, which also gets its log-probability. Overwrites the logits of suppressed ids.

    Args:
        known: ids that mean something, where there are logits of more; those of the others are not looked at.

    Raises:
        InferenceFailed: a logit is not finite.
    """
    finite_B = torch.isfinite(logits_BV[:, :known]).all(-1)
    if not bool(finite_B.all()):
        row = live[int(finite_B.int().argmin())]
        raise InferenceFailed(f"{row.name}: logits are not finite after {len(row.new)} new tokens")
    if settings.suppress_tokens:
        logits_BV[:, settings.suppress_tokens] = -torch.inf
    total_B = logits_BV.logsumexp(-1)
    next_B = _drawn(logits_BV, _warpers(settings), live) if settings.do_sample else logits_BV.argmax(-1)
    logps_B = logits_BV.gather(-1, next_B[:, None])[:, 0] - total_B
    for row, logp in zip(live, logps_B.tolist(), strict=True):
        row.logps.append(logp)
    return next_B


def _drawn(logits_BV: Tensor, warpers: LogitsProcessorList, live: Sequence[Row]) -> Tensor:
    """Inverse transform sampling, from each row's own numbers."""
    warped_BV = warpers(logits_BV.new_zeros(len(live), 0).long(), logits_BV)
    cumulated_BV = warped_BV.double().softmax(-1).cumsum(-1)
    uniform_B1 = cumulated_BV.new_tensor([[row.uniforms[len(row.new)]] for row in live])
    drawn_B = torch.searchsorted(cumulated_BV, uniform_B1 * cumulated_BV[:, -1:], right=True)[:, 0]
    return drawn_B.clamp_max(logits_BV.shape[1] - 1)


def _warpers(settings: GenerationConfig) -> LogitsProcessorList:
    """In the order of Transformers' own."""
    warpers = LogitsProcessorList()
    if settings.do_sample and settings.temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(float(settings.temperature)))
    if settings.do_sample and settings.top_k:
        warpers.append(TopKLogitsWarper(settings.top_k))
    if settings.do_sample and settings.top_p < 1.0:
        warpers.append(TopPLogitsWarper(settings.top_p))
    return warpers
