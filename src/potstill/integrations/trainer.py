"""Distillation by a Hugging Face `Trainer`: its loop, checkpoints and arguments, the objective of potstill."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from potstill.data.collated import COLUMNS, to_batch
from potstill.errors import UserError
from potstill.integrations.evaluating import EvaluatingTrainer, means
from potstill.integrations.forward import let_in
from potstill.integrations.logged import StepMeans
from potstill.integrations.supported import require_apart, require_supported, require_whole
from potstill.losses.objective import Objective, require_finite
from potstill.models.causal_lm import CausalLM
from potstill.models.student import Student
from potstill.recipe.sections_rollouts import RolloutsConfig
from potstill.training.batch_rollouts import BatchRollouts
from potstill.types import Batch, Teacher

BATCH = "potstill_batch"


class DistillTrainer(EvaluatingTrainer):
    """A `transformers.Trainer` whose loss is the objective.

    The gradient of an optimizer step is that of the sum over all its supervised positions, of all micro-batches and
    ranks, divided once by their number. Batches are those of any collator: see `to_batch`. Logged are `loss`, `kd` and
    `ce` of a step's positions, and of held-out ones `eval_kl`, `eval_ce`, `eval_agreement` and the rest of
    `Objective.measure`. One process, DDP, and FSDP by accelerate. The teacher is whole on each rank, and no part of a
    checkpoint.

    With `rollouts` the student writes that fraction of the micro-batches before each step, behind the prompts of the
    data set: see `BatchRollouts`. Logged of them are `rollout_tokens` and `rollout_ended`, the length of an answer and
    the share that ended.

    Args:
        model: a Transformers causal LM or a `PeftModel` of one, the student.
        args: those of the `Trainer`; with bf16, the products of the head are in bfloat16, too.
        teacher: any teacher; one in this process is moved to the device of the student.
        objective: None: `Objective()`.
        rollouts: None: all rows are the data set's.
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
        rollouts: RolloutsConfig | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, args, **options)
        require_supported(self, options)
        self.model_accepts_loss_kwargs = False  # positions are counted here
        self.compute_metrics = means
        self._logged = StepMeans(self.accelerator)
        objective = objective or Objective()
        if self.accelerator.mixed_precision == "bf16" and objective.matmul_dtype is None:
            objective = dataclasses.replace(objective, matmul_dtype=torch.bfloat16)
        self.teacher, self.student = teacher, Student(CausalLM.of(model), objective)
        require_apart(self.student, teacher)
        if teacher.model is not None and teacher.model.device != self.args.device:
            teacher.model.to(self.args.device)
        self.ids = self.student.match_ids(teacher, self.processing_class)
        let_in(model)
        self.rollouts = None
        if rollouts is not None and rollouts.fraction:
            require_whole(self)
            self.rollouts = BatchRollouts(
                self.student, teacher, rollouts, self.processing_class, self.ids, self.args.seed
            )

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor]:
        """The micro-batches of a step with what the objective reads, and the positions of the step on all ranks."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [self._batch(inputs, number) for number, inputs in enumerate(samples)]
        samples = [{**inputs, BATCH: batch} for inputs, batch in zip(samples, batches, strict=True)]
        own = [
            sum(len(each.positions_N) for each in batches if each.is_rollout is is_own)
            for is_own in (False, True)
        ]
        of_corpus, of_student = self.accelerator.reduce(torch.tensor(own, device=device), "sum")
        positions = of_corpus + of_student
        if samples and not positions:
            raise UserError(f"step {self.state.global_step + 1}: no position bears loss. Look at its labels.")
        if samples:
            self._logged.begin(positions, of_corpus)
        return samples, positions

    def _batch(self, inputs: dict[str, Any], number: int) -> Batch:
        """Micro-batch `number` of the step that follows, the student's own where it is its turn."""
        batch, step, args = to_batch(inputs, self.ids), self.state.global_step, self.args
        if self.rollouts is None or not self.rollouts.is_due(step, number):
            return batch
        first_row = (number * args.world_size + args.process_index) * args.per_device_train_batch_size
        with self.accelerator.autocast():
            batch, written = self.rollouts.write(batch, step, first_row)
        self._logged.add_answers(written)
        return batch

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
        if num_items_in_batch is not None:
            self._logged.add(terms)
        # Ranks average their gradients, and the sum is meant.
        loss = terms["loss"] * (self.accelerator.num_processes / positions)
        return (loss, terms) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # of training, not of an evaluation
            logs |= self._logged.read()
        super().log(logs, start_time)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in COLUMNS if name not in self._signature_columns]
