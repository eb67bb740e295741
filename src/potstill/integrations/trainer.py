"""Distillation by a Hugging Face `Trainer`: its loop, checkpoints and arguments, the objective of potstill."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer, TrainingArguments

from potstill.data.collated import COLUMNS, to_batch
from potstill.errors import UserError
from potstill.integrations.forward import let_in
from potstill.integrations.supported import require_apart, require_supported
from potstill.losses.objective import MEASURES, Objective, require_finite
from potstill.models.causal_lm import CausalLM
from potstill.models.student import Student
from potstill.types import Batch, Targets, Teacher, answer

BATCH = "potstill_batch"


class DistillTrainer(Trainer):  # type: ignore[misc]  # Transformers is not typed
    """A `transformers.Trainer` whose loss is the objective.

    The gradient of an optimizer step is that of the sum over all its supervised positions, of all micro-batches and
    ranks, divided once by their number. Batches are those of any collator: see `to_batch`. Logged are `loss`, `kd` and
    `ce` of a step's positions, and of held-out ones `eval_kl`, `eval_ce`, `eval_agreement` and the rest of
    `Objective.measure`. One process, DDP, and FSDP by accelerate. The teacher is whole on each rank, and no part of a
    checkpoint.

    Args:
        model: a Transformers causal LM or a `PeftModel` of one, the student.
        args: those of the `Trainer`; with bf16, the products of the head are in bfloat16, too.
        teacher: any teacher; one in this process is moved to the device of the student.
        objective: None: `Objective()`.
        options: all others of `Trainer`. `processing_class` has the tokens that are compared with the teacher's.

    Raises:
        UserError: vocabularies that differ, or an argument that would change the loss or run it another way.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        args: TrainingArguments | None = None,
        *,
        teacher: Teacher,
        objective: Objective | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, args, **options)
        require_supported(self, options)
        self.model_accepts_loss_kwargs = False  # positions are counted here
        self.compute_metrics = _means
        self._sums, self._steps = torch.zeros(2, device=self.args.device), 0
        objective = objective or Objective()
        if self.accelerator.mixed_precision == "bf16" and objective.matmul_dtype is None:
            objective = dataclasses.replace(objective, matmul_dtype=torch.bfloat16)
        self.teacher, self.student = teacher, Student(CausalLM.of(model), objective)
        require_apart(self.student, teacher)
        if teacher.model is not None and teacher.model.device != self.args.device:
            teacher.model.to(self.args.device)
        self.ids = self.student.match_ids(teacher, self.processing_class)
        let_in(model)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor]:
        """The micro-batches of a step with what the objective reads, and the positions of the step on all ranks."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        samples = [{**inputs, BATCH: to_batch(inputs, self.ids)} for inputs in samples]
        own = sum(len(inputs[BATCH].positions_N) for inputs in samples)
        positions = self.accelerator.reduce(torch.tensor(own, device=device), "sum")
        if samples and not positions:
            raise UserError(f"step {self.state.global_step + 1}: no position bears loss. Look at its labels.")
        self._steps += bool(samples)
        return samples, positions

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        batch = inputs.get(BATCH) or to_batch(inputs, self.ids)
        positions = len(batch.positions_N) if num_items_in_batch is None else num_items_in_batch
        terms = self._within(model, self.student, batch)
        require_finite({name: float(value.detach()) for name, value in terms.items()}, len(batch.positions_N))
        # Ranks average their gradients, and the sum is meant.
        share = self.accelerator.num_processes / positions
        self._sums = self._sums + torch.stack([terms["kd"], terms["ce"]]).detach() * share
        loss = terms["loss"] * share
        return (loss, terms) if return_outputs else loss

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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._steps:  # of training: each rank has a share of the sums
            kd, ce = (self.accelerator.reduce(self._sums, "mean") / self._steps).tolist()
            logs |= {"kd": kd, "ce": ce}
            self._sums, self._steps = torch.zeros_like(self._sums), 0
        super().log(logs, start_time)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in COLUMNS if name not in self._signature_columns]


def _means(found: EvalPrediction) -> dict[str, float]:
    """Of held-out positions, once those of all ranks and batches have been gathered."""
    positions = int(np.sum(found.label_ids))
    if not positions:
        raise UserError("eval_dataset: no position bears loss. Look at its labels.")
    sums_M = np.asarray(found.predictions, dtype=np.float64).sum(0)
    return dict(zip(MEASURES, (sums_M / positions).tolist(), strict=True))
