"""A Hugging Face causal language model as two halves: a body that gives hidden states, a head that gives
logits.

The loss works on hidden states and a head, so that logits exist a chunk at a time; that is only right if the
two halves are the model. Two probes say so when a model is loaded, instead of a list of architectures: the
head applied to the hidden states is the model's own logits, and a packed row is its documents run alone. Each
takes a fraction of a second, each refuses a fault that is silent otherwise. Teachers and students are both
made of this.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import masking_utils

from potstill.errors import UserError, one_line
from potstill.types import Head

# Of a layer's operators those that are most of its work.
KEPT = re.compile(r"aten\.(mm|bmm|addmm|baddbmm|_grouped_mm|_scaled_dot_product_\w+)\.")
# Of the largest magnitude compared: what two orders of summation in the same precision may differ by.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# Of hidden states, by positions that do not begin again: far above what a random student makes of rounding.
SHIFTED = 1e-3


class CausalLM(nn.Module):
    """`hf` is any Transformers causal LM; `name` is what error messages call it."""

    def __init__(self, hf: Any, name: str) -> None:
        super().__init__()
        self.hf = hf
        self.name = name
        self.known: int | None = None
        """Ids that mean something, where the logits have more: see `Head.known`."""
        self.in_shards = False
        """Weights are put together from shards when they are needed: whoever keeps one keeps a copy."""
        self.is_packed = False
        """Its layers' weights are of fewer bits, in a library's own form."""
        self.compiled_body: Callable[..., Any] | None = None
        """In the place of `hf.base_model`: see `compiled`. No module, or its weights would have two names."""

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.hf.parameters()).device
        return device

    @property
    def vocab_size(self) -> int:
        """Width of the logits, a padded end included."""
        return len(self.head.weight_VD)

    def weights(self, *, remove_duplicate: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Every weight under its name, as `save` writes them, in the order of their names."""
        for name, parameter in sorted(self.named_parameters(remove_duplicate=remove_duplicate)):
            yield name, self._read(parameter)
        if self.is_packed:  # bitsandbytes keeps its scales beside the parameters
            parameters = {name for name, _ in self.hf.named_parameters(remove_duplicate=False)}
            for name, value in sorted(self.hf.state_dict().items()):
                if name not in parameters and isinstance(value, Tensor):
                    yield f"hf.{name}", value

    def _read(self, parameter: Tensor) -> Tensor:
        return parameter.detach().clone() if self.in_shards else parameter.detach()

    def state(self) -> dict[str, Tensor]:
        """What a state dict has; asking for one would put weights back into shards."""
        read: dict[int, Tensor] = {}  # of a tied tensor one copy: it is saved once
        found = {}
        for name, parameter in self.hf.named_parameters(remove_duplicate=False):
            found[name] = read.setdefault(id(parameter), self._read(parameter))
        for place, module in self.hf.named_modules():
            for name, buffer in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:
                    found[f"{place}.{name}" if place else name] = buffer
        return found

    def save(self, folder: Path) -> None:
        """A folder that `AutoModelForCausalLM.from_pretrained` loads with equal logits."""
        self.hf.save_pretrained(folder, state_dict=self.state())

    def checkpoint_activations(self, *, selective: bool = False) -> None:
        """Chen et al. 2016: each layer's inside is computed again in the backward pass, not kept; where that
        is `selective`, all of it but matrix products and attention.
        """
        if not self.hf.supports_gradient_checkpointing:
            raise UserError(
                f"train.activation_checkpointing: {type(self.hf).__name__} cannot compute its layers again."
                " Set it to false."
            )
        older = self.hf.gradient_checkpointing_enable  # its name before Transformers 5.2x
        again = {"context_fn": partial(create_selective_checkpoint_contexts, _kept)} if selective else {}
        getattr(self.hf, "activation_checkpointing_enable", older)({"use_reentrant": False, **again})

    def sum_tied_gradients_in_place(self) -> None:
        """Have `backward` add a tied embedding's gradient, which has few rows, into the head's: autograd
        would make a second one of that size and add the two. `torch.autograd.grad` then lacks it.
        """
        embedding = self.hf.get_input_embeddings()
        is_plain = type(embedding) is nn.Embedding and not embedding.scale_grad_by_freq
        is_tied = is_plain and embedding.weight is self.hf.get_output_embeddings().weight
        # On CUDA such a sum has another order each time; and what is compiled holds the embedding, too.
        is_apt = is_tied and self.device.type == "cpu" and self.compiled_body is None
        if is_apt and _sum_in_place not in embedding._forward_hooks.values():  # a student may train twice
            embedding.register_forward_hook(_sum_in_place)

    def mask_from(self, known: int) -> None:
        """Give ids from `known` on probability exactly 0: in loss, evaluation, logits and generation, and in
        what Transformers generates from the saved model.
        """
        if known < self.vocab_size:
            self.known = known
            generation = self.hf.generation_config = copy.deepcopy(self.hf.generation_config)
            padding = range(known, self.vocab_size)
            generation.suppress_tokens = sorted({*(generation.suppress_tokens or ()), *padding})

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """As wide as the model's own, float32; -inf where an id means nothing."""
        logits_NV = self.head(hidden_ND)
        return F.pad(logits_NV, (0, self.vocab_size - logits_NV.shape[-1]), value=-math.inf)

    def hidden(
        self, input_ids_BT: Tensor, position_ids_BT: Tensor | None = None, mask_BT: Tensor | None = None
    ) -> Tensor:
        """Final hidden states, hidden_BTD, after the last norm.

        Positions that restart at 0 mark documents, and attention stays inside each. Transformers honours
        that only with no cache and no attention mask; `mask_BT` is therefore for padded rows of one
        document, never packed ones.
        """
        inputs: dict[str, Any] = {"input_ids": input_ids_BT, "use_cache": False}
        if position_ids_BT is not None:
            inputs["position_ids"] = position_ids_BT
        if mask_BT is not None:
            inputs["attention_mask"] = mask_BT
        is_packed = position_ids_BT is not None and mask_BT is None
        with taken_as_packed() if is_packed and is_queued(self.device) else contextlib.nullcontext():
            body = self.compiled_body or self.hf.base_model
            hidden_BTD: Tensor = body(**inputs).last_hidden_state
        return hidden_BTD

    @property
    def head(self) -> Head:
        """The output embedding, with the scale and softcap that this architecture puts on its logits."""
        out = self.hf.get_output_embeddings()
        config = self.hf.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0
        divisor = getattr(config, "logits_scaling", None) or 1.0
        return Head(
            weight_VD=out.weight,
            bias_V=getattr(out, "bias", None),
            scale=float(scale) / float(divisor),
            softcap=getattr(config, "final_logit_softcapping", None),
            known=self.known,
        )

    def probe(self) -> None:
        """Refuse a model whose halves are not the model. Runs in eval mode, without gradients."""
        was_training = self.training
        self.eval()
        with torch.no_grad():
            if self.hf.get_output_embeddings() is None:
                raise UserError(
                    f"{self.name}: {type(self.hf).__name__} has no output head. A causal LM is needed."
                )
            try:
                self._probe_head()
                self._probe_packing()
            except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
                raise UserError(
                    f"{self.name}: {type(self.hf).__name__} fails on a dozen tokens: {one_line(error)}"
                    " Its config does not describe a model that runs."
                ) from error
        self.train(was_training)

    def _probe_head(self) -> None:
        ids_BT = self._some_ids(2, 6)
        own_BTV = self.hf(input_ids=ids_BT, use_cache=False).logits.float()
        ours_BTV = self.head(self.hidden(ids_BT))
        if ours_BTV.shape != own_BTV.shape:
            raise UserError(
                f"{self.name}: head(hidden) has shape {list(ours_BTV.shape)}, its own logits"
                f" {list(own_BTV.shape)}. The model's head is not one matrix over the vocabulary; it cannot"
                " be used here."
            )
        if not bool(torch.isfinite(own_BTV).all()):
            raise UserError(
                f"{self.name}: its logits are not finite. Its weights are damaged; take another copy."
            )
        gap = _relative_gap(ours_BTV, own_BTV)
        if not gap <= self._tolerance():
            raise UserError(
                f"{self.name}: head(hidden) of {type(self.hf).__name__} differs from its own logits by"
                f" {gap:.2g} of their largest. The model transforms its logits in a way that is not known"
                " here; it cannot be used."
            )

    def _probe_packing(self) -> None:
        if "position_ids" not in inspect.signature(self.hf.base_model.forward).parameters:
            raise UserError(
                f"{self.name}: {type(self.hf).__name__} takes no position_ids, so documents packed in a row"
                " would see each other. Use another architecture."
            )
        first, second = 5, 7
        ids_BT = self._some_ids(2, first + second)
        ids_BT[1, first:] = ids_BT[0, first:]  # two rows, different first documents, the same second one
        positions_T = torch.cat([torch.arange(first), torch.arange(second)]).to(ids_BT.device)
        packed_BTD = self.hidden(ids_BT, positions_T.expand(2, -1))[:, first:].float()
        alone_BTD = self.hidden(ids_BT[:1, first:]).float()
        leak = _relative_gap(packed_BTD[1], packed_BTD[0])
        gap = _relative_gap(packed_BTD[0], alone_BTD[0])
        # A leak is sharp: masked attention weights are exactly 0, so nothing of the first document may
        # arrive.
        if not leak <= min(self._tolerance(), 1e-6):
            raise UserError(
                f"{self.name}: in {type(self.hf).__name__} a packed document differs by {leak:.2g} when its"
                " neighbour changes. Documents see each other; the model cannot be used."
            )
        if not gap <= max(10 * self._tolerance(), SHIFTED):
            raise UserError(
                f"{self.name}: in {type(self.hf).__name__} a packed document differs from the same one alone"
                f" by {gap:.2g}, whatever its neighbour is. Its positions do not begin again at 0; the model"
                " cannot be used."
            )

    def _some_ids(self, rows: int, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.vocab_size, (rows, length), generator=generator).to(self.device)

    def _tolerance(self) -> float:
        return TOLERANCE[self.hf.get_output_embeddings().weight.dtype]


def _sum_in_place(embedding: nn.Embedding, inputs: tuple[Tensor], embedded_BTD: Tensor) -> Tensor:
    """A forward hook: autograd ends at the embedded rows, and their gradient goes on from there by hand."""
    ids_M, weight_VD = inputs[0].flatten(), embedding.weight
    if not (weight_VD.requires_grad and embedded_BTD.requires_grad):
        return embedded_BTD

    def add(grad_BTD: Tensor) -> None:
        grad_MD = grad_BTD.flatten(0, -2)
        if embedding.padding_idx is not None:  # which is never trained
            grad_MD = grad_MD.masked_fill((ids_M == embedding.padding_idx)[:, None], 0)
        if weight_VD.grad is None:
            weight_VD.grad = torch.zeros_like(weight_VD)
        weight_VD.grad.index_add_(0, ids_M, grad_MD)

    leaf_BTD = embedded_BTD.detach().requires_grad_()
    leaf_BTD.register_hook(add)  # type: ignore[no-untyped-call]
    return leaf_BTD.clone()  # a model may write into it, which none may into a leaf


def _kept(context: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if KEPT.match(str(op)) else CheckpointPolicy.PREFER_RECOMPUTE


def _relative_gap(ours: Tensor, reference: Tensor) -> float:
    return float((ours - reference).abs().max() / reference.abs().max().clamp_min(1e-30))


def is_queued(device: torch.device) -> bool:
    """Whether work on the device is queued, so that whoever asks for a number waits for all of it."""
    return device.type == "cuda"


@contextlib.contextmanager
def taken_as_packed() -> Iterator[None]:
    """Transformers asks the device whether a document begins inside any row, and waits, to do without a mask
    where none does. Rows are packed, so the answer is yes; where it is no, a mask says the same.
    """
    asking = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = documents
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = asking


def documents(position_ids: Tensor) -> Tensor:
    """The number of each position's document in its row. (Transformers' name for the argument.)"""
    before_B1 = position_ids[:, :1] - 1
    return (torch.diff(position_ids, prepend=before_B1, dim=-1) != 1).cumsum(-1)
