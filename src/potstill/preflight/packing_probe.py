"""Whether a model would keep packed documents apart, before it is loaded: measured on a small random copy of it."""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
import transformers

from potstill.errors import UserError
from potstill.io.silence import quiet_transformers
from potstill.models.causal_lm import CausalLM, refuse_packing
from potstill.models.load import num_weights, without_data
from potstill.models.pruning import PER_LAYER, cut_config

FEW_IDS = 64
MOST_WEIGHTS = 50_000_000
"""Of a copy. A model with larger layers is probed once it is loaded."""

_known: dict[str, str | None] = {}
"""By config: a plan that does not fit is made again for every change that it suggests."""


def require_packing(config: Any, name: str) -> None:
    """UserError where documents packed in a row would see each other in a model of this config. Passes where that
    takes a copy with weights and none is small enough.

    Args:
        name: of the model, for the message.
    """
    key = f"{type(config)} {json.dumps(config.to_dict(), sort_keys=True, default=str)}"
    if key not in _known:
        # By the signature of the model, whatever its size; else by a copy.
        signature = without_data(config, torch.float32, torch.device("meta"), name).packing_fault
        _known[key] = signature or _fault_of_copy(config)
    if (fault := _known[key]) is not None:
        refuse_packing(name, fault)


def _fault_of_copy(config: Any) -> str | None:
    """Of a random model of the config with the first layer of each kind and few ids."""
    try:
        config = copy.deepcopy(config)
        text = config.get_text_config()
        lists = [value for name in PER_LAYER if isinstance(value := getattr(text, name, None), list)]
        kinds = [str(kind) for kind in zip(*lists, strict=False)] or [""]
        first = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
        try:
            config = cut_config(config, first, text.num_hidden_layers)
        except UserError:  # the kind of a layer follows from its number
            config = cut_config(config, range(max(first) + 1), text.num_hidden_layers)
        text = config.get_text_config()
        text.vocab_size = FEW_IDS
        for special in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(text, special, 0)
        if num_weights(config) > MOST_WEIGHTS:
            return None
        with quiet_transformers(), torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model = CausalLM(
                transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False), "copy"
            ).eval()
            return model.find_packing_fault()
    except Exception:  # a config that cannot be made small
        return None
