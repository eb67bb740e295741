"""Text from a model: a sample for the eye, before and after training. Greedy, so that it repeats exactly."""

from __future__ import annotations

from typing import Any

import torch

from potstill.models.causal_lm import CausalLM


@torch.no_grad()
def complete(model: CausalLM, tokenizer: Any, prompt: str, max_new_tokens: int) -> str:
    """What the model writes after `prompt`, prompt excluded; at most `max_new_tokens` tokens, or up to its
    EOS.
    """
    was_training = model.training
    model.eval()
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    ids_BT = model.hf.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    model.train(was_training)
    text: str = tokenizer.decode(ids_BT[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text
