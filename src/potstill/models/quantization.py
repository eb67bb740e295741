"""Weights of 8 and 4 bits: torchao or bitsandbytes quantise the layers' matrices while Transformers loads.

Embeddings, norms and the head keep their dtype, so that logits are computed as for any other teacher.
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
    """The quantisation config for Transformers.

    Args:
        weights: `int8`: one scale per row; `int4`: NormalFloat with one scale for 64 weights (Dettmers et al.
            2023, arXiv 2305.14314).
        dtype: that products are computed in.

    Raises:
        UserError: torchao cannot be imported.
    """
    if library == "bitsandbytes":  # it logs a cast in every product
        logging.getLogger(library).setLevel(logging.ERROR)
    if library == "torchao":
        try:
            with quiet_process(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about kernels for devices that this machine does not have
                from torchao.quantization import Int8WeightOnlyConfig
        except Exception as error:  # another version, or one for another PyTorch
            raise UserError(
                f"teacher.weights: int8: torchao cannot be imported: {one_line(error)}"
            ) from error
        return transformers.TorchAoConfig(Int8WeightOnlyConfig())
    if weights == "int8":
        # No outlier threshold: columns above it are computed apart, and which ones depends on all of a batch,
        # so that one document would change another's numbers.
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def keep_layout(hf: Any) -> Any:
    """Keep 4-bit matrices as they were made, so that they hash alike on every machine, and are faster.

    On some CPUs bitsandbytes would repack them at their first product, with scales rounded to bfloat16, and
    in another order after `state_dict`.
    """
    for module in hf.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return hf


def parts_of(tensor: Tensor) -> list[Tensor]:
    """The plain tensors in a quantised one: weights, scales, zero points; of a plain tensor, itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in parts_of(getattr(tensor, name))]


def weight_bytes(model: CausalLM) -> int:
    """Bytes of all weights of the model, scales included."""
    return sum(part.nbytes for _, tensor in model.weights() for part in parts_of(tensor))


class PackedLinear(nn.Module):
    """Stands for a quantised matrix in `potstill plan`: allocates what it holds and what it unpacks."""

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
    """Replace the linear layers of a model by `PackedLinear`, head excepted.

    Args:
        weights: int8, int4, or stored: llama.cpp maps the file into memory, and the head is read besides.
        file_bytes: size of that file.
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
