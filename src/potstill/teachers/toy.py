"""Tiny teachers whose distributions are known exactly: for tests, and for trying a recipe without a model.

`FixtureTeacher` puts its mass on the actual next token. `TableTeacher` is a first-order Markov chain, so that a
student can be compared with the true distribution. Both refuse the shapes and types that a real teacher refuses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import one_hot

from potstill.errors import UserError, one_line
from potstill.losses.targets import HiddenTargets
from potstill.models.safetensors_files import check_safetensors
from potstill.recipe.sections_models import FixtureTeacherConfig, TableTeacherConfig
from potstill.teachers.base import BaseTeacher, Part, TeacherSource
from potstill.types import Batch, Vocab

PEAK = 10.0
"""The fixture's logit of the next token; every other id has 0."""


def require_ids(teacher: str, input_ids_BT: Tensor) -> Tensor:
    """input_ids_BT as int64; UserError for another shape or type."""
    ids_BT = as_tensor(teacher, "input_ids", input_ids_BT)
    if ids_BT.ndim != 2 or ids_BT.is_floating_point() or ids_BT.dtype == torch.bool:
        raise UserError(
            f"teacher {teacher}: input_ids have shape {list(ids_BT.shape)} and type {ids_BT.dtype}."
            " Give whole numbers of shape [rows, tokens]."
        )
    return ids_BT.to(torch.int64)


def as_tensor(teacher: str, name: str, value: object) -> Tensor:
    """The value as a tensor; UserError where it cannot be one, such as rows of several lengths."""
    try:
        return torch.as_tensor(value)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise UserError(
            f"teacher {teacher}: {name} cannot be a tensor: {one_line(error)}"
            " Give whole numbers of shape [rows, tokens]; pad rows of several lengths, with a mask."
        ) from error


def require_last(teacher: str, ids_BT: Tensor) -> None:
    """UserError for rows without tokens, which have no last position."""
    if ids_BT.shape[1] == 0:
        raise UserError(
            f"teacher {teacher}: input_ids have shape {list(ids_BT.shape)}: no last position. Give at"
            " least one token a row."
        )


class FixtureTeacher(BaseTeacher):
    """Logit 10 at the token that follows, 0 elsewhere; at a row's last position, 10 at that position's own token.

    Deterministic and stateless. An id outside of the vocabulary counts as id 0.
    """

    label = "fixture"

    def __init__(self, vocab_size: int) -> None:
        if vocab_size < 1:
            raise UserError(f"teacher fixture: vocab_size is {vocab_size}. Give at least 1.")
        self.vocab = Vocab(size=vocab_size)

    def logits_for_batch(self, input_ids_BT: Tensor) -> Tensor:
        ids_BT = require_ids("fixture", input_ids_BT)
        require_last("fixture", ids_BT)
        return peaked(self._known(ids_BT[:, -1]), self.vocab_size)

    def logits_per_position(self, input_ids_BT: Tensor) -> Tensor:
        return peaked(self._next_ids(require_ids("fixture", input_ids_BT)), self.vocab_size)

    def targets(self, batch: Batch) -> HiddenTargets:
        """The `hidden state` of a position is the id of the next token, of which `peaked` makes logits."""
        next_N = self._next_ids(batch.input_ids_BT).flatten()[batch.positions_N]
        return HiddenTargets(next_N, partial(peaked, vocab_size=self.vocab_size))

    def _next_ids(self, ids_BT: Tensor) -> Tensor:
        return self._known(torch.cat([ids_BT[:, 1:], ids_BT[:, -1:]], dim=1))

    def _known(self, ids: Tensor) -> Tensor:
        return torch.where((ids >= 0) & (ids < self.vocab_size), ids, 0)


def peaked(ids: Tensor, vocab_size: int) -> Tensor:
    """float32 logits [..., V] of ids [...]: PEAK at each id, 0 elsewhere."""
    return one_hot(ids, vocab_size).to(torch.float32) * PEAK


class TableTeacher(BaseTeacher):
    """The next token depends on the current one alone: logits_VV[i] are the logits after token i."""

    label = "table"

    def __init__(self, logits_VV: Tensor) -> None:
        self.logits_VV = logits_VV
        shape = list(logits_VV.shape)
        if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
            raise UserError(
                f"teacher table: logits have shape {shape}. Give a square table [vocabulary, vocabulary]."
            )
        if not self.logits_VV.is_floating_point() or not bool(torch.isfinite(self.logits_VV).all()):
            raise UserError(
                f"teacher table: logits of type {self.logits_VV.dtype} must be finite floating-point numbers."
            )
        self.vocab = Vocab(size=shape[0])

    @classmethod
    def load(cls, path: Path) -> TableTeacher:
        """From a safetensors file with one tensor, `logits` [V, V].

        Raises:
            UserError: other tensors, another shape, or values that are not finite.
        """
        names = check_safetensors(path)
        if list(names) != ["logits"]:
            raise UserError(
                f"{path}: holds {', '.join(names) or 'nothing'}, wanted one tensor `logits` [V, V]."
            )
        logits_VV = load_file(path)["logits"]
        try:
            return cls(logits_VV.float() if logits_VV.is_floating_point() else logits_VV)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def logits_for_batch(self, input_ids_BT: Tensor) -> Tensor:
        ids_BT = self._require_known(input_ids_BT)
        require_last("table", ids_BT)
        return self.logits_VV[ids_BT[:, -1]]

    def logits_per_position(self, input_ids_BT: Tensor) -> Tensor:
        return self.logits_VV[self._require_known(input_ids_BT)]

    def targets(self, batch: Batch) -> HiddenTargets:
        return HiddenTargets(batch.input_ids_BT.flatten()[batch.positions_N], self._rows)

    def fingerprint(self, recorded: Mapping[str, str] | None = None) -> dict[str, str]:
        return {"teacher": hashlib.sha256(self.logits_VV.numpy().tobytes()).hexdigest()}

    @cached_property
    def _tables(self) -> dict[torch.device, Tensor]:
        return {}

    def _rows(self, ids_N: Tensor) -> Tensor:
        table_VV = self._tables.setdefault(ids_N.device, self.logits_VV.to(ids_N.device))
        return table_VV[ids_N]

    def _require_known(self, input_ids_BT: Tensor) -> Tensor:
        ids_BT = require_ids("table", input_ids_BT)
        require_known("table", ids_BT, self.vocab_size)
        return ids_BT


def require_known(teacher: str, ids_BT: Tensor, vocab_size: int) -> None:
    """UserError for an id outside of the vocabulary."""
    if ids_BT.numel() and not (int(ids_BT.min()) >= 0 and int(ids_BT.max()) < vocab_size):
        worst = int(ids_BT.max()) if int(ids_BT.max()) >= vocab_size else int(ids_BT.min())
        raise UserError(f"teacher {teacher}: id {worst} is outside the vocabulary of {vocab_size} ids.")


class FixtureSource(TeacherSource):
    """`teacher.name: fixture`."""

    config: FixtureTeacherConfig

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def load(self, tokens_per_row: int) -> FixtureTeacher:
        return FixtureTeacher(self.config.vocab_size)

    def double(self, part: Part) -> FixtureTeacher:
        return FixtureTeacher(self.config.vocab_size)


class TableSource(TeacherSource):
    """`teacher.name: table`."""

    config: TableTeacherConfig

    @cached_property
    def _table(self) -> TableTeacher:
        return TableTeacher.load(Path(self.config.path))

    @property
    def vocab_size(self) -> int:
        return self._table.vocab_size

    def load(self, tokens_per_row: int) -> TableTeacher:
        return self._table

    def plan_key(self) -> Any:
        return check_safetensors(Path(self.config.path))

    def double(self, part: Part) -> TableTeacher:
        ((_, (size, _)),) = check_safetensors(Path(self.config.path)).values()
        return TableTeacher(torch.zeros(size, size, device=self.device))
