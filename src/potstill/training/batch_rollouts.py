"""Rollouts behind the prompts of a batch, for a loop that has the batches of a collator and no recipe."""

from __future__ import annotations

from typing import Any

import torch

from potstill.data.completions import Completion, rollout_batch
from potstill.data.end_of_turn import ends_of
from potstill.data.prompts import Prompt
from potstill.errors import UserError
from potstill.models.decoding import decoding_fault
from potstill.models.student import Student
from potstill.recipe.sections_rollouts import RolloutsConfig
from potstill.training.engines import OwnEngine
from potstill.types import Batch, Teacher

NO_ROW = -1
"""The number of a row that is in no corpus."""


class BatchRollouts:
    """What the student writes behind the prompts of a batch, with its weights of the moment.

    A row is one document. Its prompt is what stands before its last answer, which is where its last labels begin; or
    its first `config.prompt_tokens`, where that is set, as text without turns has labels everywhere. The answers bear
    loss, of which the cross-entropy has no part (Agarwal et al. 2023, arXiv 2306.13649).

    Args:
        config: `fraction`, of which `is_due` is made, lengths and sampling; one engine, the student itself, and one
            sampling a step.
        ids: number of ids that student and teacher share, as `Student.match_ids` gives it.
        seed: of the random numbers, which are also of a step and a row.

    Raises:
        UserError: a teacher without targets for new text, a student that cannot decode, or a field that has no place
            here.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        config: RolloutsConfig,
        tokenizer: Any | None,
        ids: int,
        seed: int = 0,
    ) -> None:
        if not teacher.reads_new_text:
            raise UserError(
                "rollouts: the teacher has no targets for text that the student writes. Give another, or no rollouts."
            )
        if (fault := decoding_fault(student.model)) is not None:
            raise UserError(f"rollouts: {student.model.name}: {fault}. Leave rollouts out.")
        if config.every != 1 or config.engine != "transformers":
            field = "every" if config.every != 1 else "engine"
            raise UserError(
                f"rollouts.{field}: {getattr(config, field)}: `potstill distill` alone has that. Leave it out."
            )
        named = set(student.model.ends)
        if teacher.model is not None:
            named &= teacher.model.ends
        self.student, self.config, self.seed = student, config, seed
        self.ends = frozenset(
            end for end in {*(ends_of(tokenizer) if tokenizer else ()), *named} if end < ids
        )
        self.engine = OwnEngine(config, self.ends)

    def is_due(self, number: int) -> bool:
        """Whether the student writes micro-batch `number`, from 0: so that of any first n its share of micro-batches,
        rounded down, is.
        """
        return self.config.rows_of(number + 1) > self.config.rows_of(number)

    def write(self, batch: Batch, step: int, first_row: int = 0) -> tuple[Batch, list[Completion]]:
        """A batch of what the student writes in the place of this one's answers, and that as completions. Without
        answers that `max_new_tokens` cut off, where `config.truncated` says so, and others are left.

        Args:
            step: of the optimizer, from 0.
            first_row: number of the batch's first row in its step. The same step and row have the same random numbers.

        Raises:
            UserError: a row of several documents, without a prompt or without an answer; a student that cannot be
                sampled from.
        """
        prompts = [
            (f"step {step + 1}, row {first_row + row}", prompt)
            for row, prompt in enumerate(self._prompts(batch))
        ]
        with torch.no_grad(), self.student.on_grid():
            written = self.engine.write(self.student, prompts, self.seed, lambda: None)
        kept = [each for each in written if each.ended] if self.config.truncated == "mask" else written
        kept = kept or written
        return rollout_batch(kept, [NO_ROW] * len(kept)), written

    def _prompts(self, batch: Batch) -> list[Prompt]:
        if batch.for_teacher is not None or batch.is_packed:
            what = "several documents" if batch.is_packed else "another text for its teacher"
            raise UserError(f"rollouts: a row has {what}. Give batches of one document a row.")
        T = batch.input_ids_BT.shape[1]
        prompts = []
        for row, ids_T in enumerate(batch.input_ids_BT.tolist()):
            of_row = batch.positions_N[batch.positions_N // T == row] % T
            if not len(of_row):
                raise UserError(
                    f"rollouts: row {row} of the batch has no label, so there is no answer to replace."
                )
            # The answer that ends last: its first label is behind a position without one.
            is_first = torch.ones_like(of_row, dtype=torch.bool)
            is_first[1:] = of_row.diff() > 1
            length = self.config.prompt_tokens or int(of_row[is_first][-1]) + 1
            end = T if batch.lengths_B is None else int(batch.lengths_B[row])
            if length >= end:
                raise UserError(
                    f"rollouts.prompt_tokens: {length}, and row {row} of the batch has {end} tokens: nothing is behind"
                    " its prompt."
                )
            prompts.append(Prompt(row, ids_T[:length]))
        return prompts
