"""LoRA (Hu et al. 2021, section 4.1): a matrix W stays frozen, and B A beside it is trained.

    y = W x + alpha / rank * B A x        A starts random and B at 0, so that the student starts as W

Gradients, optimizer moments and checkpoints are of A and B alone. What is saved, hashed and compared is the
plain model with W + alpha / rank * B A in place of W, made of copies, one matrix at a time, so that the
weights in training keep every bit. The adapters are those of peft, an extra that only this file imports.

The experts of a mixture are matrices in one parameter. peft adds B A to each of them for the time of a forward,
so that a layer's merged experts are alive until its backward; recompute the layers where that does not fit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers.pytorch_utils import Conv1D

from potstill.errors import UserError, one_line
from potstill.models.causal_lm import CausalLM
from potstill.recipe.sections_models import ALL_LINEAR, LoraConfig

ADAPTER = "default"  # peft's name for the only one
REACHED_LATE = ".lora_A."
"""In the names of tensors whose gradient goes through B, so that it is 0 in the first step."""


def require_peft() -> ModuleType:
    """peft, or a UserError that says how to install it."""
    try:
        import peft
    except ImportError as error:
        raise UserError(
            f"student.lora: peft cannot be imported: {one_line(error)} Run: pip install 'potstill[lora]'."
        ) from error
    module: ModuleType = peft
    return module


class LoraLM(CausalLM):
    """A causal LM of which only adapters are trained. To others its weights are the merged ones.

    Args:
        model: its weights are taken over, frozen; it is of no use afterwards.
        config: the recipe's section.
        base: name and revision of the model, as the adapter's files name what it is for.

    Raises:
        UserError: peft is not installed, or `config.targets` names no linear layer of the body.
    """

    def __init__(
        self, model: CausalLM, config: LoraConfig, base: tuple[str | None, str | None] = (None, None)
    ) -> None:
        peft = require_peft()
        super().__init__(model.hf, model.name)
        self.config, self.base = config, base
        linear, experts = _targets(model, config)
        self.peft_config = peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=linear,
            target_parameters=experts or None,
            fan_in_fan_out=any(isinstance(model.hf.get_submodule(name), Conv1D) for name in linear[:1]),
            task_type="CAUSAL_LM",
        )
        # First on the meta device, then on that of its matrix: peft would move an adapter there, and a fake
        # tensor, as `potstill plan` traces with, cannot be moved.
        with unset_fake_temporarily():
            peft.inject_adapter_in_model(self.peft_config, model.hf, ADAPTER, low_cpu_mem_usage=True)
        for name, layer in _layers(model.hf).items():
            matrix = getattr(layer.get_base_layer(), name.rpartition(".")[2])
            for part in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]):
                like = {"dtype": part.weight.dtype, "device": matrix.device}
                part.weight = nn.Parameter(torch.empty(part.weight.shape, **like))
            layer.reset_lora_parameters(ADAPTER, True)
        self.train(model.training)

    @property
    def adapters(self) -> dict[str, Tensor]:
        """Everything that is trained, by peft's names."""
        return {name: p for name, p in self.hf.named_parameters() if p.requires_grad}

    def described(self) -> dict[str, Any]:
        """For the receipt: the configuration, how many matrices have adapters, and which of the body's have none."""
        layers, embeddings = (
            _layers(self.hf),
            (self.hf.get_input_embeddings(), self.hf.get_output_embeddings()),
        )
        of_embeddings = {id(module.weight) for module in embeddings}
        matrices = {
            name: p.numel()
            for name, p in _plain(self.hf.named_parameters())
            if p.ndim > 1 and id(p) not in of_embeddings and not name.endswith("bias")
        }
        without = [name for name in matrices if name not in layers]
        return {
            "rank": self.config.rank,
            "alpha": self.config.alpha,
            "dropout": self.config.dropout,
            "targets": self.config.targets,
            "matrices": sum(getattr(layer, "num_experts", 1) for layer in layers.values()),
            "trainable_weights": sum(tensor.numel() for tensor in self.adapters.values()),
            "share_without_adapter": sum(matrices[name] for name in without) / sum(matrices.values()),
            "without_adapter": sorted({re.sub(r".*\.\d+\.", "", name) for name in without}),
        }

    def require_compilable(self) -> None:
        """UserError for adapters of fused experts: peft makes a class of its own of them in every forward, each of
        which would be compiled anew.
        """
        if self.peft_config.target_parameters:
            raise UserError(
                "train.compile: is true, and fused experts have adapters (student.lora), which cannot be compiled."
                " Set it to false, or name linear layers in student.lora.targets."
            )

    def weights(self, *, remove_duplicate: bool = True) -> Iterator[tuple[str, Tensor]]:
        named = self.named_parameters(remove_duplicate=remove_duplicate)
        return _merged(self, ((name, self._read(parameter)) for name, parameter in named))

    def state(self) -> dict[str, Tensor]:
        """The merged model's state dict. Only matrices with adapters are copied, to main memory."""
        return dict(_merged(self.hf, super().state().items()))

    def save_adapter(self, folder: Path) -> None:
        """Write A and B alone, for peft's `PeftModel.from_pretrained(base, folder)`."""
        folder.mkdir(parents=True)
        tensors = {
            f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": self._read(tensor).cpu().contiguous()
            for name, tensor in self.adapters.items()
        }
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        base = dict(zip(("base_model_name_or_path", "revision"), self.base, strict=True))
        fields = self.peft_config.to_dict() | {"inference_mode": True} | base
        # Sets have no order: two saves of one adapter are to be equal byte for byte.
        fields = {name: sorted(value) if isinstance(value, set) else value for name, value in fields.items()}
        text = json.dumps(fields, indent=2, sort_keys=True) + "\n"
        (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def _layers(model: nn.Module) -> dict[str, Any]:
    """The modules that peft put around matrices, by the names that the matrices have without peft. Around a module
    with several of them, as that of fused experts, it puts one for each, nested.
    """
    return {
        f"{name.replace('.base_layer', '')}.{getattr(module, 'parameter_name', 'weight')}": module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


def _plain(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """All but the adapters, by the names that they have without peft."""
    for name, tensor in tensors:
        if not any(part.startswith("lora_") for part in name.split(".")):
            yield name.replace(".base_layer", ""), tensor


@torch.no_grad()
def _merged(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the merged model, by the names that they have without peft, in the order of names."""
    layers = _layers(model)
    for name, tensor in sorted(_plain(tensors), key=lambda entry: entry[0]):
        yield name, _with_adapter(tensor, layers[name]) if name in layers else tensor


def _with_adapter(weight: Tensor, layer: Any) -> Tensor:
    delta: Tensor = layer.get_delta_weight(ADAPTER)
    # A delta of 0 is not added, as -0.0 + 0.0 is 0.0: before the first step the hash is the base model's.
    return (weight + delta).cpu() if bool(delta.any()) else weight


def _targets(model: CausalLM, config: LoraConfig) -> tuple[list[str], list[str]]:
    """Full names of the linear layers and of the fused experts' parameters that `config.targets` name; never the
    head, which the loss applies itself.
    """
    body, head = model.body, model.hf.get_output_embeddings()
    names = {id(module): name for name, module in model.hf.named_modules()}
    linear = sorted(
        names[id(module)]
        for module in body.modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    )
    # [experts, n, m]: a matrix for each expert of a mixture, in one parameter. PyTorch's own modules have other
    # parameters of three dimensions: convolutions.
    experts = sorted(
        f"{names[id(module)]}.{name}"
        for module in body.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and not type(module).__module__.startswith("torch.nn")
    )
    ends = sorted({name.rpartition(".")[2] for name in (*linear, *experts)})
    chosen: set[str] = set()
    for target in config.targets:
        matching = {
            name for name in (*linear, *experts) if target == ALL_LINEAR or f".{name}".endswith(f".{target}")
        }
        if not matching:
            raise UserError(
                f"student.lora.targets: no linear layer in the body of {type(model.hf).__name__} is called"
                f" {target!r:.60}. It has {', '.join(ends)}; {ALL_LINEAR} is all of them."
            )
        if config.dropout:  # an adapter of fused experts is added to them before their input is known
            matching -= set(experts)
        if not matching:
            raise UserError(
                f"student.lora.dropout: is {config.dropout:g}, and adapters of {target!r:.60}, the matrices of fused"
                " experts, have none. Set it to 0."
            )
        chosen |= matching
    return [name for name in linear if name in chosen], [name for name in experts if name in chosen]
