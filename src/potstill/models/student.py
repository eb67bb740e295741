"""The model that learns. The loss runs inside its forward: sharding and compiling see an ordinary module."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn

from potstill.errors import UserError, one_line
from potstill.io.silence import quiet_transformers
from potstill.losses.objective import Objective, require_labels
from potstill.models.causal_lm import CausalLM
from potstill.models.load import (
    load_causal_lm,
    load_config,
    num_weights,
    weights_sha256,
    write_portable_config,
)
from potstill.models.lora import LoraLM
from potstill.types import Batch, Targets


class Student(nn.Module):
    """A causal LM and its objective.

    `autocast` is the dtype that the body's matmuls run in, None for the weights' own; weights, their
    gradients and the softmax stay in float32.
    """

    def __init__(self, model: CausalLM, objective: Objective, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.autocast = autocast

    def forward(self, batch: Batch, targets: Targets | None) -> dict[str, Tensor]:
        """Sums over the batch's N positions, in nats; `loss` carries the gradient.

        Nothing waits for the device: whoever calls looks at labels before, and at sums when it needs them.
        """
        hidden_ND = self.hidden_ND(batch)
        return self.objective(hidden_ND, self.model.head, batch.labels_N, targets, checked=False)

    def require_labels(self, batch: Batch) -> None:
        """UserError for a label that is no id of this student's; for a batch on the CPU."""
        require_labels(batch.labels_N, self.model.head.num_ids)

    @torch.no_grad()
    def measure(self, batch: Batch, targets: Targets) -> dict[str, Tensor]:
        """Sums over the batch's N positions for a held-out evaluation: loss, ce, kd, kl, agreement."""
        return self.objective.measure(self.hidden_ND(batch), self.model.head, batch.labels_N, targets)

    @torch.no_grad()
    def logits(self, batch: Batch) -> Iterator[tuple[slice, Tensor]]:
        """logits_CV at the batch's positions, a chunk at a time, as a held-out evaluation sees them."""
        yield from self.objective.logits(self.hidden_ND(batch), self.model.head)

    def hidden_ND(self, batch: Batch) -> Tensor:
        """Final hidden states at the batch's positions, what the head makes logits of."""
        with torch.autocast(self.model.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            hidden_BTD = self.model.hidden(batch.input_ids_BT, batch.position_ids_BT)
        return hidden_BTD.flatten(0, 1)[batch.positions_N]

    def weights_sha256(self) -> str:
        return weights_sha256(self.model)

    def save(self, folder: Path, tokenizer: Any | None) -> None:
        """A Hugging Face folder that `AutoModelForCausalLM.from_pretrained` loads with equal logits."""
        with _writing(folder):
            self.model.save(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            write_portable_config(folder)

    def save_adapter(self, folder: Path) -> None:
        """What LoRA trains, in peft's own format."""
        assert isinstance(self.model, LoraLM)
        with _writing(folder):
            self.model.save_adapter(folder)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        with quiet_transformers():
            yield
    except Exception as error:
        # The tokenizers library raises bare Exceptions where it cannot write.
        if not (isinstance(error, OSError | SafetensorError) or type(error) is Exception):
            raise
        raise UserError(f"{folder}: the student cannot be written: {one_line(error)} Make room.") from error


def from_checkpoint(source: str | Path, device: torch.device, own_config: Any = None) -> CausalLM:
    """Float32 weights, whatever the checkpoint holds: AdamW's small steps vanish in bfloat16.

    `own_config` is the checkpoint's, where it has been read already.
    """
    model = load_causal_lm(source, own_config=own_config, dtype=torch.float32, device=device)
    model.name = f"student {source}"
    return model


def from_config(source: str | Path, device: torch.device, config: Any = None) -> CausalLM:
    """Random weights, from torch's global generator: seed it before. `config` is that of `source`, where it
    has been read already.
    """
    config = load_config(source) if config is None else copy.deepcopy(config)
    try:
        _require_memory(source, num_weights(config))
        hf = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=False
        )
    except UserError:
        raise
    except Exception as error:  # Transformers raises what it likes over a config that fits no causal LM
        raise UserError(
            f"student.model: {source}: no causal LM can be made of this config: {one_line(error)}"
        ) from error
    model = CausalLM(hf.to(device), name=f"student {source}")
    model.probe()
    return model


def _require_memory(source: str | Path, count: int) -> None:
    """An allocation that the system grants and cannot keep ends the process without a word."""
    needed, there = 4 * count, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise UserError(
            f"student.model: {source}: its config describes {count} weights of {needed / 2**30:.1f} GiB, this"
            f" machine has {there / 2**30:.1f} GiB of memory. Give a config of a smaller model."
        )
