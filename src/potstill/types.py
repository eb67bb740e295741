"""The types that all packages share, and the legend of tensor shapes.

    B rows of a micro-batch          T tokens of a row          N loss-bearing positions, flat over B * T
    D student width                  E teacher width            V vocabulary ids that both models share
    K ids kept per position          C positions of one chunk   S support that a divergence sees: V if dense

A tensor's name ends in its shape: `hidden_ND`, `labels_N`. Lists and scalars carry no suffix.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from potstill.build.setup import RunSetup
    from potstill.models.causal_lm import CausalLM
    from potstill.models.decoding import Decode

ALIGNED = 64
"""Rows of a head's matrix product are a multiple of it: 128 bytes in bfloat16."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch. The corpus has decided which positions bear loss, and what their next tokens are."""

    rows_B: Tensor
    """int64, numbers of the rows in the corpus; not an input of the model, so it stays on the CPU."""
    input_ids_BT: Tensor
    """int64."""
    position_ids_BT: Tensor
    """int64, restarts at 0 with every document: attention does not cross documents."""
    positions_N: Tensor
    """int64, indices into the flat B * T of positions whose next token bears loss. Made on the CPU, since finding
    them on a device would wait for it.
    """
    labels_N: Tensor
    """int64, the next tokens."""
    lengths_B: Tensor | None = None
    """int64, tokens of each row before its padding; None: no row is padded."""
    is_rollout: bool = False
    """Whether the student wrote the labels itself: then no cross-entropy falls on them."""
    for_teacher: Batch | None = None
    """What the teacher reads in its place: other prompts, with the same labels in the same order. None: the same."""
    sources_B: Tensor | None = None
    """int64, the number of the source of a mix that each row is of; on the CPU. None: there is one corpus."""

    @property
    def counted_M(self) -> Tensor:
        """bool, flat over B * T: tokens of the rows that have a label, without padding. The routers of a mixture of
        experts are balanced over them, and not over a row that fills up a rank's share of a step.
        """
        B, T = self.input_ids_BT.shape
        device = self.positions_N.device
        counted_B = torch.zeros(B, dtype=torch.bool, device=device).index_fill(0, self.positions_N // T, True)
        counted_BT = counted_B[:, None].expand(B, T)
        if self.lengths_B is not None:
            counted_BT = counted_BT & (torch.arange(T, device=device) < self.lengths_B[:, None])
        return counted_BT.flatten()

    @property
    def is_packed(self) -> bool:
        """Whether a row holds several documents. Waits for the device of the batch."""
        T = self.input_ids_BT.shape[1]
        is_start_BT = self.position_ids_BT == 0
        if self.lengths_B is not None:
            is_start_BT = is_start_BT & (torch.arange(T, device=is_start_BT.device) < self.lengths_B[:, None])
        return bool((is_start_BT.sum(1) > 1).any())

    def to(self, device: torch.device | str) -> Batch:
        """On the device, all that is an input of a model."""
        values = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("rows_B", "sources_B")
        }
        inputs: dict[str, Any] = {
            name: moved(value, device) for name, value in values.items() if isinstance(value, Tensor)
        }
        inputs["for_teacher"] = None if self.for_teacher is None else self.for_teacher.to(device)
        return replace(self, **inputs)

    def without_labels(self) -> Batch:
        """The same tokens, of which none bears loss."""
        other = None if self.for_teacher is None else self.for_teacher.without_labels()
        return replace(self, positions_N=self.positions_N[:0], labels_N=self.labels_N[:0], for_teacher=other)

    def split(self) -> Iterator[Batch]:
        """Each row as a batch of its own, as if it had been packed alone."""
        num_tokens = self.input_ids_BT.shape[1]
        row_of_N = self.positions_N // num_tokens
        of_teacher = [None] * len(self.input_ids_BT) if self.for_teacher is None else self.for_teacher.split()
        for b, for_teacher in enumerate(of_teacher):
            own_N = row_of_N == b
            yield Batch(
                self.rows_B[b : b + 1],
                self.input_ids_BT[b : b + 1],
                self.position_ids_BT[b : b + 1],
                self.positions_N[own_N] - b * num_tokens,
                self.labels_N[own_N],
                None if self.lengths_B is None else self.lengths_B[b : b + 1],
                self.is_rollout,
                for_teacher,
                None if self.sources_B is None else self.sources_B[b : b + 1],
            )


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on the device. A copy to CUDA does not wait, which requires pinned memory."""
    to_cuda = torch.device(device).type == "cuda"
    if to_cuda and tensor.device.type == "cpu" and type(tensor) is Tensor:  # a fake tensor cannot be pinned
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=to_cuda)


@dataclass(frozen=True, slots=True)
class Head:
    """The output head of a language model: hidden states to logits. A teacher's targets include its own."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    """Multiplies the logits: Cohere's logit_scale, Granite's 1 / logits_scaling."""
    softcap: float | None = None
    """softcap * tanh(logits / softcap), after the scale: Gemma 2."""
    known: int | None = None
    """Number of ids that have a token, where the matrix has more rows: the padding gets no logits. None: all."""

    @property
    def num_ids(self) -> int:
        """V."""
        return len(self.weight_VD) if self.known is None else self.known

    @property
    def num_rows(self) -> int:
        """Rows of the matrix that are multiplied: `num_ids`, rounded up to a multiple of 64 where there are as many,
        so that each row of logits is aligned to 16 bytes. Unaligned, CUDA's tensor cores are slow or unused.
        """
        return min(-(-self.num_ids // ALIGNED) * ALIGNED, len(self.weight_VD))

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        """logits_NV in float32 (float64 stays float64)."""
        return self.finish((hidden_ND @ self.weight_VD[: self.num_rows].T)[..., : self.num_ids])

    def finish(self, product_NV: Tensor) -> Tensor:
        """logits_NV of a matrix product: bias, scale and softcap, in float32 whatever the type of the product."""
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
        """Both log-distributions on a common support, (student_logp_NS, teacher_logp_NS).

        The probabilities of a row sum to one. Of sampled targets only their expectation does, and the student's are
        its own at the sampled ids.
        """
        ...

    def beyond_support(self) -> Tensor | None:
        """nats_N to add to a divergence on the support to get the full one, without gradient; None: nothing."""
        ...


@dataclass(frozen=True)
class Vocab:
    """The vocabulary of a model. `tokens` is None for one without a tokenizer."""

    size: int
    """Width of the model's logits; a tokenizer may know fewer ids."""
    tokens: tuple[str, ...] | None = None
    eos_id: int | None = None
    bos_id: int | None = None
    pad_id: int | None = None
    chat_template: str | None = None
    added: frozenset[int] = frozenset()
    """Ids that are matched in a text before it is split: control tokens, and others added to the list."""

    @property
    def known(self) -> int:
        """Number of ids that have a token; the logits may be padded beyond them."""
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
    """A model that gives next-token logits. Shapes are checked on every call."""

    @property
    def vocab_size(self) -> int:
        """Width of the logits, padding included."""
        ...

    def logits_for_batch(self, input_ids_BT: Tensor) -> Tensor:
        """logits_BV at the last position of each row."""
        ...

    def logits_per_position(self, input_ids_BT: Tensor) -> Tensor:
        """logits_BTV at every position; for tests and small inputs only."""
        ...


@dataclass(frozen=True)
class Finding:
    """The result of one check of `potstill check`: its name, a figure, and whether a run may go on."""

    name: str
    figure: str
    ok: bool
    advice: str = ""
    """What to do if it failed."""
    numbers: dict[str, Any] = field(default_factory=dict)
    """The figure in machine-readable form."""
    ends_run: bool = True
    """Whether `distill` refuses the run if it failed. Otherwise it warns: the run is what the recipe says, and is
    unlikely to be worth its time.
    """

    @property
    def problem(self) -> str:
        """A failed check in one line."""
        return f"check: {self.name}: {self.figure}. {self.advice}"


@runtime_checkable
class Teacher(TeacherLogitsProvider, Protocol):
    """A model to distil from. The training loop calls `targets`, which never materialises [N, V].

    A model in memory, targets on disk and a server all have this interface, and no caller distinguishes them. A
    teacher derives from `teachers.base.BaseTeacher`, which has a default for all but `vocab` and `targets`.
    """

    @property
    def vocab(self) -> Vocab:
        """Its tokens, which must be the student's and the corpus's."""
        ...

    @property
    def max_length(self) -> int | None:
        """Longest row that it supports, in tokens; None: any."""
        ...

    @property
    def model(self) -> CausalLM | None:
        """Its model in this process, which a student may be cut from; None where it is elsewhere, or there is none."""
        ...

    @property
    def reads_new_text(self) -> bool:
        """Whether it has targets for any tokens, or only for the rows of one corpus."""
        ...

    @property
    def reads_on_cpu(self) -> bool:
        """Whether `targets` takes its batch on the CPU, as where targets are read from a disk or a network."""
        ...

    @property
    def is_elsewhere(self) -> bool:
        """Whether another machine or process computes its targets, so that this one can ask for them ahead."""
        ...

    @property
    def ids_known(self) -> int | None:
        """Ids of each held-out distribution whose probabilities are known; the others are one class, so that
        divergences are lower bounds. None: all are known.
        """
        ...

    note: Callable[[str], None]
    """Called with a line for whoever watches the run; `set_up` sets it."""

    @property
    def is_sharded(self) -> bool:
        """Whether each of several processes keeps a part of every layer."""
        ...

    @property
    def backend(self) -> Mapping[str, str] | None:
        """What runs its layers in this process: `backend`, `weights` and `reason`; None where nothing does."""
        ...

    def targets(self, batch: Batch) -> Targets:
        """The next-token distributions at the batch's N positions, in the order of `positions_N`."""
        ...

    def decoder(self, ids: int) -> Decode:
        """What adds tokens to rows, written by this teacher from the first `ids` ids: `models.decoding.decode` of it.

        Raises:
            UserError: it cannot write.
        """
        ...

    def use_rows(self, are_packed: bool) -> None:
        """Learn whether rows hold several documents; UserError where it cannot keep these apart."""
        ...

    def share_ids(self, ids: int) -> int:
        """Give probability 0 to the ids from `ids` on, which the student does not have; returns the number of ids
        that its targets are over, which is larger where it cannot mask them.
        """
        ...

    def require_fits(self, corpus: Mapping[str, Any], objective: Any, ids: int, rows: Iterable[int]) -> None:
        """Require that it has targets for this run.

        Args:
            corpus: the corpus's manifest.
            objective: the recipe's section of that name.
            ids: number of ids shared with the student.
            rows: the training rows of the run, in order; lazy, and as long as the run.

        Raises:
            UserError: it has no targets for such a run.
        """
        ...

    def to_cut_from(self) -> tuple[CausalLM, str]:
        """The model to cut a student from, in full precision, and its path or hub id; UserError where it has none."""
        ...

    def confirm(self) -> None:
        """UserError where the recipe describes another teacher than this one; not called where `to_cut_from` is."""
        ...

    def require_unchanged(self) -> None:
        """`teachers.base.TeacherChanged` where one elsewhere is not what it was when it was opened; it is asked."""
        ...

    def describe(self) -> dict[str, Any]:
        """What the terminal, the receipt and the model card say of it, as JSON."""
        ...

    def fingerprint(self, recorded: Mapping[str, str] | None = None) -> dict[str, str]:
        """What --resume compares, by name; training must not change it.

        Args:
            recorded: the fingerprint of a run that is resumed. What differs from it by rounding alone, as answers of
                a server do, is given as it is recorded.
        """
        ...

    def weights_sha256(self) -> str | None:
        """Hash of the model that computes its targets, or that has computed them; None where there is none."""
        ...

    def checks(self, setup: RunSetup, student_kl: float) -> Iterator[Finding]:
        """Checks of its own for `potstill check`; `student_kl` is the KL of the untrained student to it, in nats per
        position.
        """
        ...

    def activity(self) -> str:
        """What it is doing, for a progress line; empty: nothing that is worth a word."""
        ...

    def close(self) -> None:
        """Release what is not memory: processes, connections."""
        ...


def answer(teacher: Teacher, batch: Batch) -> Targets:
    """The teacher's targets for a batch that may be on any device, asked where and for what the teacher reads."""
    read = batch if batch.for_teacher is None else batch.for_teacher
    return teacher.targets(read.to("cpu") if teacher.reads_on_cpu else read)


class Divergence(Protocol):
    """A divergence of two log-distributions: nats_N, one value per position."""

    def __call__(self, student_logp_NS: Tensor, teacher_logp_NS: Tensor) -> Tensor: ...


class Rows(Protocol):
    """Packed rows with random access."""

    def __len__(self) -> int: ...

    def batch(self, rows: Sequence[int]) -> Batch: ...


class Data(Protocol):
    """Training data, one optimizer step after the other. Steps count from 0.

    The loop calls `step` once for each step that it takes, in order, and alike on every rank. A step that is taken
    again, after a resume or a rollback, must have the same rows: a checkpoint has its number and nothing else.
    """

    @property
    def fixed(self) -> bool:
        """Whether a step's rows do not depend on the student, so that the loop may prepare them during the step
        before. False where the student generates them: then `step` is called after that step's update.
        """
        ...

    def step(self, step: int) -> list[Batch]:
        """The micro-batches of all ranks, on the CPU, with at least one labelled position among them."""
        ...

    def epoch(self, step: int) -> int:
        """Logged as `train/epoch`."""
        ...

    def figures(self, step: int) -> dict[str, float]:
        """What else is to be logged of a step's rows, under whole names; called after `step`."""
        ...
