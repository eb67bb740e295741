"""The model that is trained. Its forward computes the loss, so that DDP, FSDP and torch.compile wrap a plain
module.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn

from potstill.data.end_of_turn import ends_of
from potstill.data.tokenizers import require_same, vocab_of
from potstill.errors import UserError, one_line
from potstill.io.silence import quiet_transformers
from potstill.losses.balance import expert_counts
from potstill.losses.objective import Objective, require_labels
from potstill.models.causal_lm import CausalLM
from potstill.models.decoding import Row, decode
from potstill.models.experts import routing_of
from potstill.models.load import (
    load_causal_lm,
    load_config,
    no_model_of,
    num_weights,
    weights_sha256,
)
from potstill.models.lora import LoraLM
from potstill.models.portable import add_ends, write_portable_config
from potstill.types import Batch, Targets, Teacher, Vocab


class WeightGrid(Protocol):
    """Rounds a model's weights for a while: `export.grid.Grid`."""

    def applied(self, model: CausalLM) -> contextlib.AbstractContextManager[None]: ...


class Student(nn.Module):
    """A causal LM and its objective.

        student = Student(from_checkpoint("path/to/model", device), Objective())
        student(batch, teacher.targets(batch))["loss"].backward()

    Args:
        model: with weights in float32; gradients and the softmax stay in float32, too.
        autocast: dtype of the body's matrix products; None: that of the weights, or of a `torch.autocast` around it.
    """

    def __init__(self, model: CausalLM, objective: Objective, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.autocast = autocast
        self.routing = routing_of(model)
        """Of a mixture of experts; None for another model."""
        self.sum_over_ranks: Callable[[Tensor], Tensor] = lambda counts_LX: counts_LX
        self.grid: WeightGrid | None = None
        """Of a student that is trained to be quantised."""

    def forward(
        self, batch: Batch, targets: Targets | None, counts_LX: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Sums over the batch's N positions, in nats: `loss` with a gradient, `ce`, and `kd` with targets. Of a
        mixture of experts also `Routing.terms`. Of a rollout, whose labels the student wrote itself, the loss has no
        cross-entropy: it would learn to repeat itself. `rollout_nll` takes the place of `ce`, and `rollout_kd` is `kd`.

        Nothing waits for the device: the caller checks labels on the CPU before (`require_labels`), and the
        sums once it reads them.

        Args:
            counts_LX: how often each expert is chosen in the whole step; None: the batch is all that this rank
                has of it.
        """
        if self.routing is None:
            hidden_ND, routed = self.hidden_ND(batch), {}
        else:
            with self.model.recording_routers() as routers:
                hidden_ND = self.hidden_ND(batch)
            routed = self.routing.terms(routers, batch.counted_M, counts_LX, self.sum_over_ranks)
        objective = replace(self.objective, ce_weight=0.0) if batch.is_rollout else self.objective
        terms = objective(hidden_ND, self.model.head, batch.labels_N, targets, checked=False)
        if batch.is_rollout:
            terms |= {"rollout_nll": terms.pop("ce"), "rollout_kd": terms["kd"]}
        return routed | terms

    def on_grid(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the weights are those of the quantised student, where it is trained for one."""
        return contextlib.nullcontext() if self.grid is None else self.grid.applied(self.model)

    @property
    def router_coefficient(self) -> float:
        """What `router_loss` is multiplied by; 0 without one."""
        return 0.0 if self.routing is None else self.routing.coefficient or 0.0

    def router_term(self, terms: dict[str, Tensor]) -> Tensor | float:
        """What a micro-batch's terms add to the loss of its step, which is a mean."""
        return self.router_coefficient * terms.get("router_loss", 0.0)

    @torch.no_grad()
    def expert_counts(self, batch: Batch) -> Tensor:
        """counts_LX of the batch's tokens: see `losses.balance`."""
        assert self.routing is not None
        with self.model.recording_routers() as routers:
            self.hidden_ND(batch)
        return expert_counts(routers, batch.counted_M, self.routing.top_k)

    def match_ids(self, teacher: Teacher, tokenizer: Any | None = None) -> int:
        """Require that an id is the same token for both models, and give those that only one of them has probability 0;
        returns the number of ids, 0 to that number, that both have.

        Args:
            tokenizer: the student's; None: its ids can be compared by their number alone.

        Raises:
            UserError: token lists that differ, or another number of ids.
        """
        size, name = self.model.vocab_size, self.model.name
        own = Vocab(size=size) if tokenizer is None else vocab_of(tokenizer, size)
        ids = teacher.share_ids(require_same(teacher.vocab, own, "the teacher", name))
        if size < ids:
            raise UserError(
                f"{name}: has logits for {size} ids, the teacher for {ids}. Give it at least as many."
            )
        self.model.mask_from(ids)
        return ids

    def require_labels(self, batch: Batch) -> None:
        """UserError for a label that is not an id of this student. For a batch on the CPU."""
        require_labels(batch.labels_N, self.model.head.num_ids)

    @torch.no_grad()
    def decode(self, settings: Any, rows: Sequence[Row], beat: Callable[[], None] = lambda: None) -> None:
        """Add tokens to rows until they end, in the autocast dtype: see `decoding.decode`."""
        with self._autocast():
            decode(self.model, settings, rows, beat)

    def _autocast(self) -> contextlib.AbstractContextManager[None]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.model.device.type, dtype=self.autocast)

    @torch.no_grad()
    def measure(self, batch: Batch, targets: Targets) -> dict[str, Tensor]:
        """Sums over the batch's N positions for a held-out evaluation: see `Objective.measure`."""
        return self.objective.measure(self.hidden_ND(batch), self.model.head, batch.labels_N, targets)

    @torch.no_grad()
    def per_position(self, batch: Batch, targets: Targets) -> dict[str, Tensor]:
        """The same for each of the N positions: see `Objective.per_position`."""
        return self.objective.per_position(self.hidden_ND(batch), self.model.head, batch.labels_N, targets)

    @torch.no_grad()
    def logits(self, batch: Batch) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the batch's positions, a chunk at a time, with their logits_CV in float32."""
        yield from self.objective.logits(self.hidden_ND(batch), self.model.head)

    def hidden_ND(self, batch: Batch) -> Tensor:
        """Final hidden states at the batch's N positions, in the autocast dtype."""
        with self._autocast():
            hidden_BTD = self.model.hidden(batch.input_ids_BT, batch.position_ids_BT)
        return hidden_BTD.flatten(0, 1)[batch.positions_N]

    def weights_sha256(self) -> str:
        return weights_sha256(self.model)

    def save(self, folder: Path, tokenizer: Any | None) -> None:
        """Write a Hugging Face folder that `AutoModelForCausalLM.from_pretrained` loads with equal logits, and that
        ends where rows of this tokenizer end: see `ends_of`.

        Raises:
            UserError: it cannot be written.
        """
        with writing_model(folder):
            self.model.save(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
                add_ends(folder, [end for end in ends_of(tokenizer) if end < self.model.head.num_ids])
            write_portable_config(folder)

    def save_adapter(self, folder: Path) -> None:
        """Write the adapters alone, in the format of peft."""
        assert isinstance(self.model, LoraLM)
        with writing_model(folder):
            self.model.save_adapter(folder)


@contextlib.contextmanager
def writing_model(folder: Path) -> Iterator[None]:
    """What the libraries raise where a model cannot be written, as a UserError."""
    try:
        with quiet_transformers():
            yield
    except Exception as error:
        # The tokenizers library raises a bare Exception where it cannot write; a subclass of it is a bug.
        if not (isinstance(error, OSError | SafetensorError) or type(error) is Exception):
            raise
        raise UserError(f"{folder}: the model cannot be written: {one_line(error)} Make room.") from error


def from_checkpoint(source: str | Path, device: torch.device, own_config: Any = None) -> CausalLM:
    """A student from a checkpoint, in float32 whatever its dtype: small updates vanish in bfloat16.

    `own_config` is the checkpoint's, where it has been read already.
    """
    model = load_causal_lm(source, own_config=own_config, dtype=torch.float32, device=device)
    model.name = f"student {source}"
    return model


def from_config(source: str | Path, device: torch.device, config: Any = None) -> CausalLM:
    """A student with random weights, from torch's global generator, which the caller seeds.

    Args:
        config: that of `source`, where it has been read already.

    Raises:
        UserError: a config of no causal LM, or of one that does not fit into memory.
    """
    config = load_config(source) if config is None else copy.deepcopy(config)
    try:
        _require_memory(source, num_weights(config))
        hf = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=False
        )
    except UserError:
        raise
    except Exception as error:  # Transformers raises anything over a config that fits no causal LM
        raise UserError(f"student.model: {source}: {no_model_of(config, error)}") from error
    model = CausalLM(hf.to(device), name=f"student {source}")
    model.probe()
    return model


def _require_memory(source: str | Path, count: int) -> None:
    """Linux grants an allocation beyond its memory, and then kills the process without a message."""
    needed, available = 4 * count, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > available:
        raise UserError(
            f"student.model: {source}: its config describes {count} weights of {needed / 2**30:.1f} GiB, this"
            f" machine has {available / 2**30:.1f} GiB of memory. Give a config of a smaller model."
        )
