"""Held-out figures of a `DistillTrainer`: means over positions, whatever the batches and ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer

from potstill.data.collated import to_batch
from potstill.errors import UserError
from potstill.losses.objective import MEASURES
from potstill.models.student import Student
from potstill.types import Batch, Targets, Teacher, answer


class EvaluatingTrainer(Trainer):  # type: ignore[misc]  # Transformers is not typed
    """A `Trainer` that asks its teacher, too."""

    student: Student
    teacher: Teacher
    ids: int
    """Shared by both."""

    def _within(self, model: nn.Module, function: Callable[[Batch, Targets], Any], batch: Batch) -> Any:
        """The function of a batch and the teacher's targets, inside of the wrapped model's forward."""
        are_packed = batch.is_packed
        self.student.model.use_rows(are_packed)
        self.teacher.use_rows(are_packed)
        batch = batch.to(self.args.device)
        return model(within=partial(function, batch, answer(self.teacher, batch)))

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, Tensor, Tensor]:
        """Of each row, the sums over its positions of what is measured, and their number."""
        batch = to_batch(inputs, self.ids)
        with torch.no_grad():
            values = self._within(model, self.student.per_position, batch)
        B, T = batch.input_ids_BT.shape
        row_of_N = (batch.positions_N // T).to(self.args.device)
        values_NM = torch.stack([values[name] for name in MEASURES], 1)
        sums_BM = values_NM.new_zeros(B, len(MEASURES)).index_add_(0, row_of_N, values_NM)
        return None, sums_BM, row_of_N.bincount(minlength=B)

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        found = super().evaluation_loop(*args, **options)
        if not (self.is_in_train or self.is_fsdp_enabled):
            # Accelerate would take the model for wrapped, and a `train` that follows leave ranks to themselves.
            self.model.__dict__.pop("_is_accelerate_prepared", None)
        return found


def means(found: EvalPrediction) -> dict[str, float]:
    """Of held-out positions, once those of all ranks and batches have been gathered."""
    positions = int(np.sum(found.label_ids))
    if not positions:
        raise UserError("eval_dataset: no position bears loss. Look at its labels.")
    sums_M = np.asarray(found.predictions, dtype=np.float64).sum(0)
    return dict(zip(MEASURES, (sums_M / positions).tolist(), strict=True))
