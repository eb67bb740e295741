"""What every teacher has: the defaults of the protocol, and what is known of a teacher before it is loaded.

A new kind of teacher is one file: a config class, a teacher derived from `BaseTeacher`, and, where it has files whose
sizes or tokenizers matter before anything is loaded, a source derived from `TeacherSource`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import Tensor

from potstill.errors import UserError
from potstill.losses.targets import HiddenTargets
from potstill.models.causal_lm import CausalLM
from potstill.models.source import ModelFiles
from potstill.recipe.sections_models import TeacherConfig
from potstill.registry import implementation
from potstill.types import Batch, Finding, Teacher, Vocab

if TYPE_CHECKING:
    from potstill.build.setup import RunSetup

Part = Callable[[str], AbstractContextManager[None]]
"""Of a plan: inside it, what is allocated counts as that part of the memory."""


class BaseTeacher:
    """The protocol `potstill.types.Teacher`, but for `vocab` and `targets`."""

    vocab: Vocab
    max_length: int | None = None
    model: CausalLM | None = None
    reads_new_text = True
    reads_on_cpu = False
    is_sharded = False
    label = "plugin"
    """What messages call it."""

    @property
    def vocab_size(self) -> int:
        """Width of its logits, a padded end included."""
        return self.vocab.size

    def logits_for_batch(self, input_ids_BT: Tensor) -> Tensor:
        """logits_BV at the last position of each row."""
        return self.logits_per_position(input_ids_BT)[:, -1]

    def logits_per_position(self, input_ids_BT: Tensor) -> Tensor:
        """logits_BTV; for tests and small inputs only."""
        raise UserError(f"teacher {self.label}: it answers for the rows of a corpus alone, by `targets`.")

    def share_ids(self, ids: int) -> int:
        return self.vocab_size

    def require_fits(self, corpus: Mapping[str, Any], objective: Any, ids: int, rows: Iterable[int]) -> None:
        pass

    def to_cut_from(self) -> tuple[CausalLM, str]:
        refuse_cut(self.label)

    def confirm(self) -> None:
        pass

    def describe(self) -> dict[str, Any]:
        return {}

    def fingerprint(self) -> dict[str, str]:
        return {}

    def weights_sha256(self) -> str | None:
        return None

    def checks(self, setup: RunSetup, student_kl: float) -> Iterator[Finding]:
        return iter(())

    def close(self) -> None:
        pass


class TeacherSource:
    """A teacher before its weights are loaded: what planning, checking and reading the corpus need to know.

    This is the one of a plug-in's teacher, which is loaded at the first question. Every answer is computed once.
    """

    def __init__(self, config: TeacherConfig, device: torch.device) -> None:
        self.config = config
        self.device = device

    @property
    def label(self) -> str:
        return self.config.label

    @cached_property
    def _loaded(self) -> Teacher:
        return self.config.load(self.device)

    @property
    def vocab_size(self) -> int:
        """Width of its logits, a padded end included."""
        return self._loaded.vocab_size

    @property
    def checkpoints(self) -> Sequence[ModelFiles]:
        """Models to verify before a library opens them; the tokenizer of the first that has one reads the corpus."""
        return ()

    @property
    def tokenizers(self) -> list[Path]:
        """Where a tokenizer that may read the corpus lies, the best first."""
        return [files.path for files in self.checkpoints]

    @property
    def lacks_tokenizer(self) -> str:
        """What to give it so that token lists can be compared."""
        return "a teacher of teacher.name: torch"

    @property
    def model_config(self) -> Any | None:
        """The Transformers config of the model that runs in this process; None where none does."""
        return None

    @property
    def layers_config(self) -> Any | None:
        """The Transformers config of the model whose layers a student may be cut from; None where there is none."""
        return self.model_config

    @property
    def inputs(self) -> dict[str, Path]:
        """Files and model folders whose hashes --resume compares, by role."""
        return {}

    def load(self, tokens_per_row: int) -> Teacher:
        """The teacher itself, ready to answer for rows of that length."""
        return self._loaded

    # --- for a plan, under PyTorch's fake tensors

    def plan_key(self) -> Any:
        """All that the memory of its double depends on."""
        return self.config

    part = "teacher"
    """Which part of a plan its memory is."""

    def double(self, part: Part) -> Teacher:
        """What holds as much memory as the teacher does, and answers at once."""
        return Uniform(self._loaded.vocab_size)

    def measured_double(self) -> Teacher | None:
        """Likewise, for what `checks` loads beside the teacher."""
        return None


class Uniform(BaseTeacher):
    """Every id alike: the double of a teacher whose memory is not this process's."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab = Vocab(size=vocab_size)

    def targets(self, batch: Batch) -> HiddenTargets:
        return HiddenTargets(batch.positions_N, lambda ids_N: torch.zeros(len(ids_N), self.vocab_size))


def source_of(config: TeacherConfig, device: torch.device) -> TeacherSource:
    """What is known of a recipe's teacher before it is loaded."""
    return cast("TeacherSource", implementation(config.source)(config, device))


def refuse_cut(name: str) -> NoReturn:
    raise UserError(f"student.name: cut needs a teacher with layers, and teacher.name is {name}.")
