"""The ground floor: the few types that every wing speaks in, and the legend of their shapes.

    B sequences in a micro-batch     T tokens in a sequence     N loss-bearing positions, flat over B * T
    D student width                  E teacher width            V vocabulary ids both models share
    K ids kept per position          C positions of one chunk   S support a divergence sees: V if dense

A tensor's name ends in its shape: `hidden_ND`, `labels_N`. Lists and scalars carry no suffix.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from potstill.build.setup import RunSetup
    from potstill.models.causal_lm import CausalLM

ALIGNED = 64  # numbers: 128 bytes in bfloat16


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch. Which positions bear loss, and what their next token is, was decided by the corpus."""

    rows_B: Tensor
    """int64, corpus rows: a name and no input, it stays on the CPU."""
    input_ids_BT: Tensor
    """int64."""
    position_ids_BT: Tensor
    """int64, restarts at 0 with every document: attention stays inside one."""
    positions_N: Tensor
    """int64 into the flat B*T: places whose next token bears loss. Made on the CPU: no device sync."""
    labels_N: Tensor
    """int64, that next token."""

    def to(self, device: torch.device | str) -> Batch:
        inputs = (moved(getattr(self, f.name), device) for f in fields(self)[1:])
        return Batch(self.rows_B, *inputs)


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """On the device; to CUDA without a wait, which takes pinned memory. A fake tensor has none to pin."""
    to_cuda = torch.device(device).type == "cuda"
    if to_cuda and tensor.device.type == "cpu" and type(tensor) is Tensor:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=to_cuda)


@dataclass(frozen=True, slots=True)
class Head:
    """The last step of a language model, hidden states to logits; also what a teacher hands over."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    """Multiplies the logits: Cohere's logit_scale, Granite's 1 / logits_scaling."""
    softcap: float | None = None
    """softcap * tanh(logits / softcap), after the scale: Gemma 2."""
    known: int | None = None
    """Ids that mean something, where fewer than rows: the padded end of a vocabulary has no logits."""

    @property
    def num_ids(self) -> int:
        """V."""
        return len(self.weight_VD) if self.known is None else self.known

    @property
    def num_rows(self) -> int:
        """Rows that a product is made with: `num_ids`, or up to 63 more where there are any, so that each row
        of logits begins at a whole 16 bytes. On CUDA tensor cores are slow, or not used, where it does not.
        """
        return min(-(-self.num_ids // ALIGNED) * ALIGNED, len(self.weight_VD))

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        """logits_NV in float32 (float64 stays float64)."""
        return self.finish((hidden_ND @ self.weight_VD[: self.num_rows].T)[..., : self.num_ids])

    def finish(self, product_NV: Tensor) -> Tensor:
        """What comes after the matmul: bias, scale, softcap, in float32 whatever the matmul ran in."""
        logits_NV = product_NV.to(torch.promote_types(product_NV.dtype, torch.float32))
        if self.bias_V is not None:
            logits_NV = logits_NV + self.bias_V[: self.num_ids]
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap is not None:
            logits_NV = self.softcap * torch.tanh(logits_NV / self.softcap)
        return logits_NV


class Targets(Protocol):
    """The teacher's next-token distributions at a batch's N positions."""

    def __len__(self) -> int: ...

    def __getitem__(self, positions: slice) -> Targets: ...

    def on_support(self, student_logp_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Both log-distributions on ids they share, (student_logp_NS, teacher_logp_NS); rows sum to one, or
        the teacher's estimates one that does and the student's is its own there.
        """
        ...

    def beyond_support(self) -> Tensor | None:
        """What a divergence on such ids lacks of the full one, nats_N, no gradient; None where nothing."""
        ...


@dataclass(frozen=True)
class Vocab:
    """What the ids of a model mean. `tokens` is None for a model that came without a tokenizer."""

    size: int
    """Width of the model's logits; a tokenizer may know fewer ids."""
    tokens: tuple[str, ...] | None = None
    eos_id: int | None = None
    bos_id: int | None = None
    pad_id: int | None = None
    chat_template: str | None = None
    added: frozenset[int] = frozenset()
    """Ids that are cut out of a text before it is split: control tokens and others added to the list."""

    @property
    def known(self) -> int:
        """Ids that mean something: those of the list, which logits may outnumber."""
        return self.size if self.tokens is None else min(self.size, len(self.tokens))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the token list and the special ids."""
        digest = hashlib.sha256(f"{self.size} {self.eos_id} {self.bos_id} {self.pad_id}\n".encode())
        for token in self.tokens or ():
            digest.update(token.encode("utf-8", "surrogatepass") + b"\0")
        digest.update((self.chat_template or "").encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


@runtime_checkable
class TeacherLogitsProvider(Protocol):
    """Whoever can answer "which token next?". Shapes are checked on every call."""

    @property
    def vocab_size(self) -> int: ...

    def logits_for_batch(self, input_ids_BT: Tensor) -> Tensor:
        """logits_BV at the last position of each row."""
        ...

    def logits_per_position(self, input_ids_BT: Tensor) -> Tensor:
        """logits_BTV; for tests and small inputs only."""
        ...


@dataclass(frozen=True)
class Finding:
    """One check of `potstill check`: what was looked at, the figure, and whether a run may go on."""

    name: str
    figure: str
    ok: bool
    advice: str = ""
    """What to do where it failed."""
    numbers: dict[str, Any] = field(default_factory=dict)
    """The figure for machines."""


@runtime_checkable
class Teacher(TeacherLogitsProvider, Protocol):
    """What can also teach: `targets` is what the loop calls, and never makes [N, V].

    A model in memory, targets on disk and a server are the same thing to everyone else: nobody asks which of them a
    teacher is. `teachers.base.BaseTeacher` has a default for all but `vocab` and `targets`.
    """

    @property
    def vocab(self) -> Vocab: ...

    @property
    def max_length(self) -> int | None:
        """Tokens of the longest row that it reads; None: any."""
        ...

    @property
    def model(self) -> CausalLM | None:
        """Its weights in this process: what a student may be cut from. None: they are elsewhere, or there are none."""
        ...

    @property
    def reads_new_text(self) -> bool:
        """Whether it answers for any tokens, or only for rows that it has answered for before."""
        ...

    @property
    def reads_on_cpu(self) -> bool:
        """Whether `targets` wants its batch on the CPU: what it answers with is read from a disk or a network."""
        ...

    @property
    def is_sharded(self) -> bool:
        """Whether each of several processes is to keep a part of every layer."""
        ...

    def targets(self, batch: Batch) -> Targets: ...

    def share_ids(self, ids: int) -> int:
        """Take notice that ids from `ids` on mean nothing to the student, and give them probability 0; returns how
        many ids its targets are over.
        """
        ...

    def require_fits(self, corpus: Mapping[str, Any], objective: Any, ids: int, rows: Iterable[int]) -> None:
        """UserError where it cannot answer for this run: `corpus` is the manifest, `objective` the recipe's section,
        `ids` the shared ones, `rows` the training rows that will be asked for.
        """
        ...

    def to_cut_from(self) -> tuple[CausalLM, str]:
        """The model whose layers a student is cut from, in full precision, and where it lies; UserError where there is
        none.
        """
        ...

    def confirm(self) -> None:
        """UserError where the recipe says of it what is not true; called where no student is cut from it."""
        ...

    def describe(self) -> dict[str, Any]:
        """For the terminal, the receipt and the model card."""
        ...

    def fingerprint(self) -> dict[str, str]:
        """What --resume compares, by name; the same after training as before."""
        ...

    def weights_sha256(self) -> str | None:
        """Of the model that answers, or that answered once; None where there is none."""
        ...

    def checks(self, setup: RunSetup, student_kl: float) -> Iterator[Finding]:
        """Its own lines of `potstill check`; `student_kl` is the student's distance from it before training, in nats
        per position.
        """
        ...

    def close(self) -> None:
        """Let go of what is not memory: processes, connections."""
        ...


class Divergence(Protocol):
    """A function of two distributions, one value per position in nats."""

    def __call__(self, student_logp_NS: Tensor, teacher_logp_NS: Tensor) -> Tensor: ...


class Rows(Protocol):
    """Packed rows with random access: resuming needs only the step number."""

    def __len__(self) -> int: ...

    def batch(self, rows: Sequence[int]) -> Batch: ...


class Order(Protocol):
    """Which rows a step takes: a pure function of the seed and the step, so that nothing has to be saved."""

    def rows(self, step: int, rows_per_step: int) -> list[int]: ...

    def epoch(self, step: int, rows_per_step: int) -> int: ...
