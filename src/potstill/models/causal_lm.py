"""A Hugging Face causal language model as two halves: a body that returns hidden states, and a head that
makes logits of them.

The loss works on hidden states and a head, so that logits exist a chunk at a time; that is only right if the
two halves are the model. Instead of a list of architectures, two probes test it when a model is loaded: the
head applied to the hidden states gives the model's own logits, and a packed row gives what its documents give
alone. Each takes a fraction of a second and refuses a fault that would otherwise be silent. Teachers and
students are both made of this.
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
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import GenerationConfig, masking_utils

from potstill.errors import UserError, one_line
from potstill.models.portable import write_generation_config
from potstill.models.rope import document_numbers, per_document_rope
from potstill.types import Head

# Selective checkpointing saves the results of these: most of a layer's work, and few of its tensors.
SAVED_OPS = re.compile(r"aten\.(mm|bmm|addmm|baddbmm|_grouped_mm|_scaled_dot_product_\w+)\.")
# Relative to the largest magnitude: what two orders of summation in one precision may differ by.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# Relative difference of hidden states at wrong positions: far above what rounding makes in a random student.
MIN_SHIFT = 1e-3


class CausalLM(nn.Module):
    """`hf` is any Transformers causal LM; `name` is what error messages call it."""

    keeps_cache = True
    """Whether its body decodes token by token with a key-value cache."""

    def __init__(self, hf: Any, name: str) -> None:
        super().__init__()
        self.hf = hf
        self.name = name
        self.known: int | None = None
        """Ids that mean something, where the logits have more: see `Head.known`."""
        self.in_shards = False
        """FSDP gathers the weights when they are needed and frees them again: to keep one, copy it."""
        self.is_packed = False
        """Its layers have weights of fewer bits, in the form of a quantisation library."""
        self.compiled_body: Callable[..., Any] | None = None
        """Called in place of `body`: see `compile`. A function, as a module would name its weights twice."""
        self.rows_are_packed = True
        """False where every row is one document, padded at its end: then no model needs to keep any apart."""
        self.packing_fault: str | None = None
        """Why documents packed in a row would not be kept apart; None: they are. `probe` measures it."""
        if not self._takes_positions():
            self.packing_fault = f"{type(hf).__name__} takes no position_ids"
        self.left_out: dict[str, int] = {}
        """Number of tensors of a multimodal checkpoint that are not of its text half, by what they are in."""
        per_document_rope(hf)
        self._routers: list[Tensor] | None = None

    @classmethod
    def of(cls, hf: Any, name: str = "model") -> CausalLM:
        """A Transformers causal LM that is in memory already, or what is inside a `PeftModel`, once it is probed.

        Raises:
            UserError: see `probe`; or adapters of the head, which the loss applies itself.
        """
        whole = hf.get_base_model() if hasattr(hf, "get_base_model") else hf
        if hasattr(whole.get_output_embeddings(), "lora_A"):
            raise UserError(
                f"{name}: its head has an adapter, which the loss does not see. Leave lm_head without."
            )
        model = cls(whole, name)
        model.training = hf.training
        if model.device.type != "meta":
            model.probe()
        return model

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.hf.parameters()).device
        return device

    @property
    def body(self) -> Any:
        """The model without its head."""
        base = self.hf.base_model  # the model itself where its class names another part: Llama 4's text half
        return base if base is not self.hf else getattr(self.hf, "model", base)

    def _takes_positions(self) -> bool:
        return "position_ids" in inspect.signature(self.body.forward).parameters

    @property
    def vocab_size(self) -> int:
        """Width of the logits, a padded end included."""
        return len(self.head.weight_VD)

    def weights(self, *, remove_duplicate: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Every weight by name, in the order of names, as `save` writes them."""
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
        """The model's state dict, without calling `state_dict`, which would shard the weights again."""
        copies: dict[int, Tensor] = {}  # one of a tied tensor, so that it is saved once
        state = {}
        for name, parameter in self.hf.named_parameters(remove_duplicate=False):
            state[name] = copies.setdefault(id(parameter), self._read(parameter))
        for place, module in self.hf.named_modules():
            for name, buffer in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:
                    state[f"{place}.{name}" if place else name] = buffer
        return state

    def save(self, folder: Path) -> None:
        """A folder that `AutoModelForCausalLM.from_pretrained` loads with equal logits."""
        own = self.hf.generation_config
        # Transformers refuses to save flags that have no effect together, as published models have them.
        self.hf.generation_config = GenerationConfig()
        try:
            self.hf.save_pretrained(folder, state_dict=self.state())
        finally:
            self.hf.generation_config = own
        write_generation_config(own, folder)

    def checkpoint_activations(self, *, selective: bool = False) -> None:
        """Recompute the inside of each layer in the backward pass (Chen et al. 2016, arXiv 1604.06174).

        Args:
            selective: save the results of matrix products and attention, and recompute the rest.

        Raises:
            UserError: an architecture that does not support it.
        """
        if not self.hf.supports_gradient_checkpointing:
            raise UserError(
                f"train.activation_checkpointing: {type(self.hf).__name__} cannot recompute its layers."
                " Set it to false."
            )
        context = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if selective else {}
        older = self.hf.gradient_checkpointing_enable  # its name before Transformers 5.2x
        # Not reentrant: reentrant checkpoints run without a graph, so they take no selective policy and train
        # nothing where the layer's input needs no gradient, as with a frozen embedding.
        getattr(self.hf, "activation_checkpointing_enable", older)({"use_reentrant": False, **context})

    def sum_tied_gradients_in_place(self) -> None:
        """Have `backward` add a tied embedding's gradient, which has few rows, into the head's in place.

        Autograd would make a second dense [V, D] and add the two. `torch.autograd.grad` does not see the
        embedding's part, so that this is for training with `backward` only.
        """
        embedding = self.hf.get_input_embeddings()
        is_plain = type(embedding) is nn.Embedding and not embedding.scale_grad_by_freq
        is_tied = is_plain and embedding.weight is self.hf.get_output_embeddings().weight
        # On CUDA `index_add_` sums in another order each time; a compiled body's graph has the embedding.
        is_possible = is_tied and self.device.type == "cpu" and self.compiled_body is None
        # Once, though a student may be trained twice: a second hook would add the gradient again.
        if is_possible and _sum_in_place not in embedding._forward_hooks.values():
            embedding.register_forward_hook(_sum_in_place)

    @property
    def ends(self) -> set[int]:
        """The ids that its config and its generation config name as the end of a text."""
        named = (self.hf.generation_config.eos_token_id, self.hf.config.get_text_config().eos_token_id)
        return {id_ for ids in named for id_ in (ids if isinstance(ids, list) else [ids]) if id_ is not None}

    def mask_from(self, known: int) -> None:
        """Give all ids from `known` on probability 0: in loss, evaluation, logits and generation, and in what
        Transformers generates from the saved model.
        """
        if known < self.vocab_size:
            self.known = known
            generation = self.hf.generation_config = copy.deepcopy(self.hf.generation_config)
            padding = range(known, self.vocab_size)
            generation.suppress_tokens = sorted({*(generation.suppress_tokens or ()), *padding})

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """logits_NV in float32, as wide as the model's own; -inf for ids beyond `known`."""
        logits_NV = self.head(hidden_ND)
        return F.pad(logits_NV, (0, self.vocab_size - logits_NV.shape[-1]), value=-math.inf)

    def hidden(
        self, input_ids_BT: Tensor, position_ids_BT: Tensor | None = None, mask_BT: Tensor | None = None
    ) -> Tensor:
        """Final hidden states after the last norm, hidden_BTD in the dtype of the body.

        Args:
            position_ids_BT: restart at 0 with each document, and attention stays inside it. Transformers
                honours that only without a cache and without an attention mask.
            mask_BT: for padded rows of one document each, never for packed ones.

        Raises:
            UserError: packed rows, and a model that cannot keep their documents apart.
        """
        position_ids_BT = self.row_positions(position_ids_BT)
        inputs: dict[str, Any] = {"input_ids": input_ids_BT, "use_cache": False}
        if position_ids_BT is not None:
            inputs["position_ids"] = position_ids_BT
        if mask_BT is not None:
            inputs["attention_mask"] = mask_BT
        is_packed = position_ids_BT is not None and mask_BT is None
        with (
            assuming_packed_rows() if is_packed and is_asynchronous(self.device) else contextlib.nullcontext()
        ):
            body = self.compiled_body or self.body
            if self._routers is None:
                outputs = body(**inputs)
            else:
                outputs = body(**inputs, output_router_logits=True)
                self._routers.extend(outputs.router_logits)
        hidden_BTD: Tensor = outputs.last_hidden_state
        return hidden_BTD

    @contextlib.contextmanager
    def recording_routers(self) -> Iterator[list[Tensor]]:
        """Inside, `hidden` adds the logits_MX of each layer's router to the list, M = B * T tokens, X experts. For a
        model that has a `Routing`.
        """
        routers: list[Tensor] = []
        self._routers = routers
        try:
            yield routers
        finally:
            self._routers = None

    def row_positions(self, position_ids_BT: Tensor | None) -> Tensor | None:
        """The positions to pass with rows of the corpus; None where the model has to count them itself.

        A model that cannot keep documents apart can read rows of one document: what is padded after it is not seen
        from it.
        """
        if position_ids_BT is None or self.packing_fault is None:
            return position_ids_BT
        if self.rows_are_packed:
            self.require_packing()
        return None

    def use_rows(self, are_packed: bool) -> None:
        """Learn whether rows hold several documents; UserError where it cannot keep these apart."""
        self.rows_are_packed = are_packed
        if are_packed:
            self.require_packing()

    def require_packing(self) -> None:
        """UserError where documents packed in a row would not be kept apart."""
        if self.packing_fault is not None:
            refuse_packing(self.name, self.packing_fault)

    @property
    def head(self) -> Head:
        """The output embedding, with the scale and softcap that this architecture applies to its logits."""
        out = self.hf.get_output_embeddings()
        config = self.hf.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0
        divisor = getattr(config, "logits_scaling", None) or 1.0
        return Head(
            weight_VD=out.weight,
            bias_V=getattr(out, "bias", None),
            scale=float(scale) / float(divisor),
            softcap=getattr(config, "final_logit_softcapping", None)
            or getattr(config, "logits_soft_cap", None),
            known=self.known,
        )

    def probe(self) -> None:
        """Refuse a model whose halves are not the model (`UserError`), and find out whether it keeps packed documents
        apart (`packing_fault`). In eval mode, without gradients.
        """
        was_training = self.training
        self.eval()
        with torch.no_grad():
            if self.hf.get_output_embeddings() is None:
                raise UserError(
                    f"{self.name}: {type(self.hf).__name__} has no output head. A causal LM is needed."
                )
            try:
                self._probe_head()
                self.packing_fault = self.packing_fault or self.find_packing_fault()
            except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
                raise UserError(
                    f"{self.name}: {type(self.hf).__name__} fails on a dozen tokens: {one_line(error)}"
                    " Its config does not describe a model that runs."
                ) from error
        self.train(was_training)

    def _probe_head(self) -> None:
        ids_BT = self.some_ids(2, 6)
        expected_BTV = self.hf(input_ids=ids_BT, use_cache=False).logits.float()
        logits_BTV = self.head(self.hidden(ids_BT))
        if logits_BTV.shape != expected_BTV.shape:
            raise UserError(
                f"{self.name}: head(hidden) has shape {list(logits_BTV.shape)}, its own logits"
                f" {list(expected_BTV.shape)}. The model's head is not one matrix over the vocabulary; it"
                " cannot be used here."
            )
        if not bool(torch.isfinite(expected_BTV).all()):
            raise UserError(
                f"{self.name}: its logits are not finite. Its weights are damaged; take another copy."
            )
        gap = relative_gap(logits_BTV, expected_BTV)
        if not gap <= self.tolerance():
            raise UserError(
                f"{self.name}: head(hidden) of {type(self.hf).__name__} differs from its own logits by"
                f" {gap:.2g} of their largest. The model transforms its logits in an unknown way; it"
                " cannot be used here."
            )

    def find_packing_fault(self, tokens: int = 12) -> str | None:
        """What tells a document packed in a row of that many tokens from the same document alone; None: nothing."""
        first = max(tokens * 5 // 12, 1)
        ids_BT = self.some_ids(2, tokens)
        ids_BT[1, first:] = ids_BT[0, first:]  # two rows, different first documents, the same second one
        positions_T = torch.cat([torch.arange(first), torch.arange(tokens - first)]).to(ids_BT.device)
        packed_BTD = self.hidden(ids_BT, positions_T.expand(2, -1))[:, first:].float()
        alone_BTD = self.hidden(ids_BT[:1, first:]).float()
        leak = relative_gap(packed_BTD[1], packed_BTD[0])
        gap = relative_gap(packed_BTD[0], alone_BTD[0])
        family = type(self.hf).__name__
        # The tolerance is tight: masked attention weights are exactly 0, so that nothing of the first
        # document may arrive.
        if not leak <= min(self.tolerance(), 1e-6):
            return f"in {family} a packed document differs by {leak:.2g} when its neighbour changes"
        if not gap <= max(10 * self.tolerance(), MIN_SHIFT):
            return (
                f"in {family} a packed document differs from the same one alone by {gap:.2g}, whatever its"
                " neighbour is"
            )
        return None

    def some_ids(self, rows: int, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.vocab_size, (rows, length), generator=generator).to(self.device)

    def tolerance(self) -> float:
        return TOLERANCE[self.hf.get_output_embeddings().weight.dtype]


def refuse_packing(name: str, fault: str) -> NoReturn:
    """UserError for packed rows and a model that has this fault."""
    raise UserError(
        f"corpus.packing: {name}: {fault}, so documents in one row would see each other. Set it to false: one"
        " document a row."
    )


def _sum_in_place(embedding: nn.Embedding, inputs: tuple[Tensor], embedded_BTD: Tensor) -> Tensor:
    """A forward hook: the graph ends at the embedded rows, whose gradient a hook adds to the weight's."""
    ids_M, weight_VD = inputs[0].flatten(), embedding.weight
    if not (weight_VD.requires_grad and embedded_BTD.requires_grad):
        return embedded_BTD

    def add(grad_BTD: Tensor) -> None:
        grad_MD = grad_BTD.flatten(0, -2)
        if embedding.padding_idx is not None:  # its row is never trained, as in nn.Embedding
            grad_MD = grad_MD.masked_fill((ids_M == embedding.padding_idx)[:, None], 0)
        # Whichever part comes first makes it: autograd accumulates the head's into what is there, too.
        if weight_VD.grad is None:
            weight_VD.grad = torch.zeros_like(weight_VD)
        weight_VD.grad.index_add_(0, ids_M, grad_MD)

    leaf_BTD = embedded_BTD.detach().requires_grad_()
    leaf_BTD.register_hook(add)  # type: ignore[no-untyped-call]
    return leaf_BTD.clone()  # some models write into their embedded rows, which autograd forbids on a leaf


def _policy(context: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if SAVED_OPS.match(str(op)) else CheckpointPolicy.PREFER_RECOMPUTE


def relative_gap(actual: Tensor, reference: Tensor) -> float:
    return float((actual - reference).abs().max() / reference.abs().max().clamp_min(1e-30))


def is_asynchronous(device: torch.device) -> bool:
    """Whether work on the device is queued, so that reading one number waits for all of it."""
    return device.type == "cuda"


@contextlib.contextmanager
def assuming_packed_rows() -> Iterator[None]:
    """Keep Transformers from reading on the device whether any document starts inside a row, which waits.

    It does so to leave out the mask where none does. Rows here are packed, so that one usually does; where
    none does, the mask changes nothing.
    """
    original = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = document_numbers
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original
