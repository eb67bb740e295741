"""Weights of 8 and 4 bits: Transformers hands the layers' matrices to torchao or bitsandbytes while it loads.

Embeddings, norms and the head keep their type, so that logits are made as of any other teacher.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from potstill.errors import UserError, one_line
from potstill.io.silence import quiet_process
from potstill.models.causal_lm import CausalLM

NF4_BLOCK = 64


def quantisation(library: str, weights: str, dtype: torch.dtype) -> Any:
    """What Transformers is told. `int8`: one scale a row; `int4`: NormalFloat (Dettmers et al. 2023,
    arXiv:2305.14314), one scale for 64 numbers.
    """
    if library == "bitsandbytes":  # it tells of a cast in every product
        logging.getLogger(library).setLevel(logging.ERROR)
    if library == "torchao":
        try:
            with quiet_process(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of kernels for devices that are not here
                from torchao.quantization import Int8WeightOnlyConfig
        except Exception as error:  # another version, or one for another PyTorch
            raise UserError(
                f"teacher.weights: int8: torchao cannot be imported: {one_line(error)}"
            ) from error
        return transformers.TorchAoConfig(Int8WeightOnlyConfig())
    if weights == "int8":
        # Above the threshold whole columns leave the product: one document would be computed with another's.
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def keep_layout(hf: Any) -> Any:
    """bitsandbytes would write 4-bit matrices anew at their first product on some CPUs, scales rounded to
    bfloat16 and of another order after `state_dict`. As they are they hash alike everywhere, and are faster.
    """
    for module in hf.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return hf


def parts_of(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a quantised one is made of: numbers, scales, zero points; or the tensor."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in parts_of(getattr(tensor, name))]


def weight_bytes(model: CausalLM) -> int:
    """Of all that the model keeps, scales included."""
    return sum(part.nbytes for _, tensor in model.weights() for part in parts_of(tensor))


class PackedLinear(nn.Module):
    """A matrix of fewer bits without its numbers, for `potstill plan`: what it holds, and what it unpacks."""

    def __init__(self, linear: nn.Linear, nbytes: int) -> None:
        super().__init__()
        self.shape, self.dtype = linear.weight.shape, linear.weight.dtype
        self.packed = _empty(nbytes, linear.weight.device)
        self.bias = linear.bias

    def forward(self, input_BTD: Tensor) -> Tensor:
        return F.linear(
            input_BTD, torch.empty(self.shape, dtype=self.dtype, device=input_BTD.device), self.bias
        )


def pack_for_plan(model: CausalLM, weights: str, file_bytes: int) -> None:
    """What a model made of its config holds with weights of int8, int4, or stored in a file of so many bytes:
    llama.cpp maps it into memory, and the head alone is read beside it.
    """
    head = model.hf.get_output_embeddings()
    linears = [
        (module, name, child)
        for module in model.hf.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.Linear) and child is not head
    ]
    whole = sum(linear.weight.numel() for *_, linear in linears)
    for module, name, linear in linears:
        numel, rows = linear.weight.numel(), linear.out_features
        each = {
            "int8": numel + 4 * rows,
            "int4": numel // 2 + 4 * (numel // NF4_BLOCK),
            "stored": file_bytes * numel // whole,
        }
        setattr(module, name, PackedLinear(linear, each[weights]))


def _empty(nbytes: int, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.empty(nbytes, dtype=torch.uint8, device=device), requires_grad=False)
