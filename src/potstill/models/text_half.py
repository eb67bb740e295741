"""The text half of a multimodal checkpoint, as a causal LM of its own.

What reads images or sound is left out, and listed. The checkpoint is loaded whole, by the class that Transformers has
for it, so that no tensor can be missing or unknown; then the text half is taken, and must give the logits that the
whole model gives for a dozen tokens of text.
"""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers.initialization import no_init_weights

from potstill.errors import UserError, one_line
from potstill.io.safe_open import read_object
from potstill.models.causal_lm import TOLERANCE, CausalLM, relative_gap

WHOLE = (transformers.AutoModelForImageTextToText, transformers.AutoModelForMultimodalLM)
CARRIED = ("bos_token_id", "eos_token_id", "tie_word_embeddings")
"""Settings that the whole decides for its text half, where it has them."""
TEXT_MODELS: dict[str, dict[str, Any]] = {
    "qwen2_vl_text": {"model_type": "qwen2"},
    "qwen2_5_vl_text": {"model_type": "qwen2"},
    "qwen3_vl_text": {"model_type": "qwen3"},
    "qwen3_vl_moe_text": {"model_type": "qwen3_moe", "norm_topk_prob": True},
}
"""Text halves without a causal LM in Transformers, and the model that they are for text: their three rotary positions
of a token of text are one.
"""


def text_config(config: Any) -> Any:
    """The config of the text half; of a text model, its own."""
    text = config.get_text_config()
    if text is config or not isinstance(text, transformers.PretrainedConfig):
        return config
    text = copy.deepcopy(text)
    for name in CARRIED:
        value = getattr(config, name, None)
        # Ids that the vocabulary does not have are defaults of the whole's class.
        if value is not None and all(number < text.vocab_size for number in np.atleast_1d(value)):
            setattr(text, name, value)
    if text.model_type not in TEXT_MODELS:
        return text
    known = transformers.CONFIG_MAPPING[TEXT_MODELS[text.model_type]["model_type"]]().to_dict()
    settings = {name: value for name, value in text.to_dict().items() if name in known}
    settings["rope_parameters"].pop("mrope_section", None)
    return transformers.AutoConfig.for_model(**settings | TEXT_MODELS[text.model_type])


def has_more_than_text(path: Path, config: Any) -> bool:
    """Whether `config` is of the text half alone of a folder's checkpoint."""
    if not path.is_dir():
        return False
    settings = read_object(path / "config.json", "Take the config that came with the model.")
    return "text_config" in settings and settings.get("model_type") != config.model_type


def load_text_half(path: Path, config: Any, **options: Any) -> tuple[Any, Any, dict[str, int]]:
    """The causal LM, Transformers' report over the whole, and the number of tensors left out, by what they are in.

    Args:
        config: of the text half.
        options: of `from_pretrained`.

    Raises:
        UserError: no class for it, or a text half that gives other logits than the whole.
        Exception: whatever Transformers raises over a damaged checkpoint.
    """
    whole_config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    for auto in WHOLE:
        if type(whole_config) in auto._model_mapping:
            break
    else:
        raise UserError(f"{path}: Transformers has no class for a whole {whole_config.model_type}.")
    whole, report = auto.from_pretrained(path, config=whole_config, trust_remote_code=False, **options)
    decoder, head = whole.eval().get_decoder(), whole.get_output_embeddings()
    is_causal_lm = decoder.get_output_embeddings() is not None  # Llama 4
    config = copy.deepcopy(config)
    # Of two matrices the config never says that they are one: what is built from it would lose the second.
    is_tied = head.weight is decoder.get_input_embeddings().weight
    config.tie_word_embeddings = bool(config.tie_word_embeddings) and is_tied
    if "quantization_config" in options:
        hf = _adopted(path, config, decoder, head)
    else:
        hf = _copied(path, config, decoder, head)
    hf.generation_config = whole.generation_config
    _require_same(path, decoder if is_causal_lm else whole, hf)
    kept = {id(parameter) for module in (decoder, head) for parameter in module.parameters()}
    left_out = Counter(
        ".".join(name.split(".")[: 2 if name.startswith("model.") else 1])
        for name, parameter in whole.named_parameters()
        if id(parameter) not in kept
    )
    return hf.eval(), report, dict(sorted(left_out.items()))


def _copied(path: Path, config: Any, decoder: Any, head: nn.Module) -> Any:
    """A model of the config with the decoder's tensors, not copies of them."""
    with no_init_weights():
        hf = transformers.AutoModelForCausalLM.from_config(
            config, dtype=decoder.dtype, trust_remote_code=False
        )
    state = dict(decoder.state_dict())
    if decoder.get_output_embeddings() is None:
        names = {id(module): name for name, module in hf.named_modules()}
        place = names[id(CausalLM(hf, "").body)]
        state = {f"{place}.{name}": tensor for name, tensor in state.items()}
        for name, tensor in head.state_dict().items():
            state[f"{names[id(hf.get_output_embeddings())]}.{name}"] = tensor
    try:
        hf.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise UserError(
            f"{path}: its text half is no {config.model_type} of this config: {one_line(error)}"
        ) from error
    hf.tie_weights()
    return hf


def _adopted(path: Path, config: Any, decoder: Any, head: nn.Module) -> Any:
    """A model made of the decoder itself, whose packed matrices cannot be put into another."""
    if decoder.get_output_embeddings() is not None:
        return decoder
    with torch.device("meta"):
        hf = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    body = CausalLM(hf, "").body
    if type(decoder) is not type(body):
        raise UserError(
            f"{path}: the text half of a {type(decoder).__name__} cannot be loaded with fewer bits."
            " Set teacher.weights to full."
        )
    setattr(hf, next(name for name, module in hf.named_children() if module is body), decoder)
    hf.set_output_embeddings(head)
    return hf


@torch.no_grad()
def _require_same(path: Path, whole: Any, hf: Any) -> None:
    settings = whole.config.to_dict()
    special = [settings[name] for name in settings if name.endswith(("token_id", "token_index"))]
    ids = [number for number in range(whole.config.get_text_config().vocab_size) if number not in special]
    ids_BT = torch.tensor([ids[:12]], device=next(hf.parameters()).device)
    expected, actual = (model(input_ids=ids_BT, use_cache=False).logits.float() for model in (whole, hf))
    gap = relative_gap(actual, expected)
    if not gap <= TOLERANCE[hf.get_output_embeddings().weight.dtype]:
        raise UserError(
            f"{path}: the logits of its text half differ from those of the whole {whole.config.model_type} by"
            f" {gap:.2g} of their largest. It is more than a text model with other parts beside it; it cannot be"
            " used here."
        )
