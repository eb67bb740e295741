"""LoRA (Hu et al. 2021, section 4.1): a matrix W stays as it is, and what is trained is B A beside it.

    y = W x + alpha / rank * B A x        A is random and B is 0 at first, so that the student begins as W

Gradients, optimizer moments and checkpoints are of A and B alone. What is saved, hashed and compared is the
plain model with W + alpha / rank * B A in W's place; it is made of copies, one matrix at a time, so that the
weights in training keep every bit. peft makes and runs the adapters, an extra; nothing else here imports it.
"""

from __future__ import annotations

import json
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

ADAPTER = "default"  # peft's own name of the only one
REACHED_LATE = ".lora_A."
"""In the name of a tensor whose gradient goes through B and is 0 in the first step."""


def require_peft() -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise UserError(
            f"student.lora: peft cannot be imported: {one_line(error)} Run: pip install 'potstill[lora]'."
        ) from error
    module: ModuleType = peft
    return module


class LoraLM(CausalLM):
    """A causal LM of which only adapters are trained. To all that does not train it, it is the merged model.

    Args:
        model: loses its own weights to this one, frozen.

    Raises:
        UserError: peft is not there, or `asked.targets` names no linear layer of the body.
    """

    def __init__(self, model: CausalLM, asked: LoraConfig) -> None:
        peft = require_peft()
        super().__init__(model.hf, model.name)
        self.asked = asked
        targets = _targets(model, asked.targets)
        stored_input_first = isinstance(model.hf.get_submodule(targets[0]), Conv1D)
        self.config = peft.LoraConfig(
            r=asked.rank,
            lora_alpha=asked.alpha,
            lora_dropout=asked.dropout,
            target_modules=targets,
            fan_in_fan_out=stored_input_first,
            task_type="CAUSAL_LM",
        )
        # First on no device: peft moves an adapter to where its matrix is, and one without data, as the plan
        # has it, cannot be moved.
        with unset_fake_temporarily():
            peft.inject_adapter_in_model(self.config, model.hf, ADAPTER, low_cpu_mem_usage=True)
        for layer in _layers(model.hf).values():
            for part in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]):
                like = {"dtype": part.weight.dtype, "device": layer.weight.device}
                part.weight = nn.Parameter(torch.empty(part.weight.shape, **like))
            layer.reset_lora_parameters(ADAPTER, True)
        self.train(model.training)

    @property
    def adapters(self) -> dict[str, Tensor]:
        """What is trained."""
        return {name: p for name, p in self.hf.named_parameters() if p.requires_grad}

    def described(self) -> dict[str, Any]:
        """For the receipt: what was asked for and what came of it."""
        trained = self.adapters.values()
        return {
            "rank": self.asked.rank,
            "alpha": self.asked.alpha,
            "dropout": self.asked.dropout,
            "targets": self.asked.targets,
            "matrices": len(trained) // 2,
            "trainable_weights": sum(tensor.numel() for tensor in trained),
        }

    def weights(self, *, remove_duplicate: bool = True) -> Iterator[tuple[str, Tensor]]:
        named = self.named_parameters(remove_duplicate=remove_duplicate)
        return _merged(self, ((name, self._read(parameter)) for name, parameter in named))

    def state(self) -> dict[str, Tensor]:
        """The merged model's state dict. Only matrices with adapters are copies, in main memory."""
        return dict(_merged(self.hf, super().state().items()))

    def save_adapter(self, folder: Path) -> None:
        """A and B alone, as peft's `PeftModel.from_pretrained(base, folder)` reads them."""
        folder.mkdir(parents=True)
        tensors = {
            f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": self._read(tensor).cpu().contiguous()
            for name, tensor in self.adapters.items()
        }
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        said = self.config.to_dict() | {"inference_mode": True}
        said = {name: sorted(value) if isinstance(value, set) else value for name, value in said.items()}
        text = json.dumps(said, indent=2, sort_keys=True) + "\n"
        (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def _layers(model: nn.Module) -> dict[str, Any]:
    """peft's, around the linear layers that have adapters."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


@torch.no_grad()
def _merged(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `model` without its adapters, by their names without peft's, in the order of these."""
    layers, found = _layers(model), []
    for name, tensor in tensors:
        owner, _, rest = name.rpartition(".base_layer.")
        if owner in layers:
            found.append((f"{owner}.{rest}", tensor, layers[owner] if rest == "weight" else None))
        elif not any(part.startswith("lora_") for part in name.split(".")):
            found.append((name, tensor, None))
    for name, tensor, layer in sorted(found, key=lambda each: each[0]):
        yield name, tensor if layer is None else _with_adapter(tensor, layer)


def _with_adapter(weight: Tensor, layer: Any) -> Tensor:
    delta: Tensor = layer.get_delta_weight(ADAPTER)
    # -0.0 + 0.0 is 0.0: before the first step each bit is the base's, and so is the hash.
    return (weight + delta).cpu() if bool(delta.any()) else weight


def _targets(model: CausalLM, asked: list[str]) -> list[str]:
    """Full names of the linear layers that are meant; never the head, which the loss applies itself."""
    body, head = model.hf.base_model, model.hf.get_output_embeddings()
    names = {id(module): name for name, module in model.hf.named_modules()}
    linear = sorted(
        names[id(module)]
        for module in body.modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    )
    ends = sorted({name.rpartition(".")[2] for name in linear})
    found: set[str] = set()
    for target in asked:
        meant = [name for name in linear if target == ALL_LINEAR or f".{name}".endswith(f".{target}")]
        if not meant:
            raise UserError(
                f"student.lora.targets: no linear layer in the body of {type(model.hf).__name__} is called"
                f" {target!r:.60}. There are {', '.join(ends)}; or take {ALL_LINEAR}."
            )
        found.update(meant)
    return sorted(found)
