"""Base classes of teachers: the teacher itself, and what is known of it before its weights are loaded.

A new teacher is one file: a config class, a teacher derived from `BaseTeacher` and, if planning or the corpus need
something of its files before they are loaded, a source derived from `TeacherSource`. See docs/extending.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import Tensor

from potstill.errors import UserError
from potstill.losses.targets import HiddenTargets
from potstill.models.causal_lm import CausalLM
from potstill.models.decoding import Decode
from potstill.models.source import ModelFiles
from potstill.recipe.sections_models import TeacherConfig
from potstill.registry import implementation
from potstill.teachers.decoding import decoder_of
from potstill.types import Batch, Finding, Teacher, Vocab

if TYPE_CHECKING:
    from potstill.build.setup import RunSetup

Part = Callable[[str], AbstractContextManager[None]]
"""Context manager of a plan: what is allocated inside it counts as that part of the memory."""


class TeacherChanged(UserError):
    """A teacher elsewhere is another one than it was when it was opened."""


class BaseTeacher:
    """Base of every teacher: defaults for all of the protocol `potstill.types.Teacher` but `vocab` and `targets`.

    A subclass sets `vocab`, and implements

        def targets(self, batch: Batch) -> Targets

    which returns the next-token distributions at the positions `batch.positions_N`, in their order: for hidden states
    and a head, `potstill.losses.targets.HiddenTargets`. The batch is on the device of the run, or on the CPU if
    `reads_on_cpu`. Errors that the user can correct are a `UserError`; others end the run with the step and the rows.
    """

    vocab: Vocab
    """Its tokens; `Vocab(size=V)` without a tokenizer."""
    max_length: int | None = None
    """Longest row that it supports, in tokens; None: any."""
    model: CausalLM | None = None
    """Its model in this process, if it is one."""
    reads_new_text = True
    """Whether it has targets for any tokens, or only for the rows of one corpus."""
    reads_on_cpu = False
    """Whether `targets` takes its batch on the CPU."""
    is_elsewhere = False
    """Whether another machine or process computes its targets, so that this one can ask for them ahead."""
    ids_known: int | None = None
    """Ids of each held-out distribution whose probabilities are known, if not all are: the others are one class, and
    divergences are lower bounds.
    """
    is_sharded = False
    backend: Mapping[str, str] | None = None
    """Whether each of several processes keeps a part of every layer."""
    label = "plugin"
    """Its name in messages."""
    note: Callable[[str], None] = staticmethod(lambda line: None)
    """Called with a line for whoever watches the run, possibly by another thread; `set_up` sets it."""

    @property
    def vocab_size(self) -> int:
        """V: width of its logits, padding included."""
        return self.vocab.size

    def logits_for_batch(self, input_ids_BT: Tensor) -> Tensor:
        """logits_BV at the last position of each row."""
        return self.logits_per_position(input_ids_BT)[:, -1]

    def logits_per_position(self, input_ids_BT: Tensor) -> Tensor:
        """logits_BTV at every position; for tests and small inputs only.

        Raises:
            UserError: by default; training needs `targets` alone.
        """
        raise UserError(
            f"teacher {self.label}: it has no logits of new text, only `targets` for rows of a corpus."
        )

    def decoder(self, ids: int) -> Decode:
        """With a cache where its model has a sound one, else by reading each row again for every token."""
        return decoder_of(cast("Teacher", self), ids)

    def use_rows(self, are_packed: bool) -> None:
        """Its model in this process keeps the documents of a row apart."""
        if self.model is not None:
            self.model.use_rows(are_packed)

    def share_ids(self, ids: int) -> int:
        """Masks nothing: its targets are over all of its ids, and the student must have as many."""
        return self.vocab_size

    def require_fits(self, corpus: Mapping[str, Any], objective: Any, ids: int, rows: Iterable[int]) -> None:
        """Fits every run."""

    def to_cut_from(self) -> tuple[CausalLM, str]:
        """UserError: it has no layers to cut a student from."""
        refuse_cut(self.label)

    def confirm(self) -> None:
        """Nothing to confirm."""

    def require_unchanged(self) -> None:
        """What is in this process does not change by itself."""

    def describe(self) -> dict[str, Any]:
        """For the terminal, the receipt and the model card, as JSON."""
        return {}

    def fingerprint(self, recorded: Mapping[str, str] | None = None) -> dict[str, str]:
        """What --resume compares, by name: hashes of what its targets depend on. Empty: a change goes unnoticed."""
        return {}

    def weights_sha256(self) -> str | None:
        """Hash of its weights; None where it has none."""
        return None

    def checks(self, setup: RunSetup, student_kl: float) -> Iterator[Finding]:
        """No checks of its own."""
        return iter(())

    def activity(self) -> str:
        """Nothing that is worth a word in a progress line."""
        return ""

    def close(self) -> None:
        """Release what is not memory: processes, connections."""


class TeacherSource:
    """A teacher before its weights are loaded: what a plan, the checks and the corpus need to know of it.

    This default serves a plug-in without a source of its own: the teacher is loaded when first needed, and once. A
    subclass reads its files instead; `TeacherConfig.source` names it as `module:name`. Every member may raise
    UserError, for a file that is missing or damaged.
    """

    def __init__(self, config: TeacherConfig, device: torch.device) -> None:
        self.config = config
        """The recipe's section `teacher`."""
        self.device = device
        """Where the teacher will be."""
        self._teachers: list[Teacher] = []
        """The teacher once it is loaded: a list, which copies of this object share."""

    @property
    def label(self) -> str:
        """Its name in messages."""
        return self.config.label

    def _loaded(self) -> Teacher:
        if not self._teachers:
            self._teachers.append(self.config.load(self.device))
        return self._teachers[0]

    def close(self) -> None:
        """Close a teacher that was loaded for a plan, where no run follows whose end would close it."""
        while self._teachers:
            self._teachers.pop().close()

    @property
    def vocab_size(self) -> int:
        """V: width of its logits, padding included."""
        declared = getattr(self.config, "vocab_size", None)
        return declared if isinstance(declared, int) else self._loaded().vocab_size

    @property
    def checkpoints(self) -> Sequence[ModelFiles]:
        """Models to verify before a library opens them."""
        return ()

    @property
    def tokenizers(self) -> list[Path]:
        """Folders or GGUF files whose tokenizer may encode the corpus, in order of preference; the first that has
        one is used.
        """
        return [files.path for files in self.checkpoints]

    @property
    def lacks_tokenizer(self) -> str:
        """What the user has to add so that token lists can be compared; ends a warning."""
        return "a teacher of teacher.name: torch"

    @property
    def model_config(self) -> Any | None:
        """The Transformers config of the model that runs in this process; None where none does."""
        return None

    @property
    def layers_config(self) -> Any | None:
        """The Transformers config of the model whose layers a student may be cut from; None where there is none."""
        return self.model_config

    captures: tuple[str, ...] = ()
    """Kinds of store, by `capture.name`, that its targets can be kept in; empty: none."""

    @property
    def inputs(self) -> dict[str, Path]:
        """Files and model folders whose hashes --resume compares, by role, such as `teacher`."""
        return {}

    def load(self, tokens_per_row: int) -> Teacher:
        """The teacher on `device`, ready for rows of up to that many tokens.

        Raises:
            UserError: it cannot be loaded.
        """
        return self._loaded()

    # For a plan, which runs on PyTorch's fake tensors: no weights, only their memory.

    part = "teacher"
    """The part of a plan that its memory counts as: `teacher` or `store`."""

    def plan_key(self) -> Any:
        """Everything that the memory of `double` depends on; compared by its repr. Called before the fake tensors are
        in force, so that nothing is loaded under them.
        """
        return self.config, self.vocab_size

    def double(self, part: Part) -> Teacher:
        """A stand-in that takes as much memory as the teacher, with targets of the same shapes and types."""
        return Uniform(self.vocab_size)

    def measured_double(self) -> Teacher | None:
        """A stand-in for the model that `checks` loads besides the teacher; None where it loads none."""
        return None

    def fewer_bits(self, device_type: str) -> str | None:
        """The value of `teacher.weights` with fewer bits that can be had on such a device; None where none can."""
        return None


class Uniform(BaseTeacher):
    """A uniform distribution: the stand-in for a teacher that takes no memory of this process."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab = Vocab(size=vocab_size)

    def targets(self, batch: Batch) -> HiddenTargets:
        return HiddenTargets(batch.positions_N, lambda ids_N: torch.zeros(len(ids_N), self.vocab_size))


def source_of(config: TeacherConfig, device: torch.device) -> TeacherSource:
    """The source of a recipe's teacher, of the class that its config names."""
    return cast("TeacherSource", implementation(config.source)(config, device))


def refuse_cut(name: str) -> NoReturn:
    """UserError: a student cannot be cut from the teacher `name`."""
    raise UserError(f"student.name: cut needs a teacher with layers, and teacher.name is {name}.")
