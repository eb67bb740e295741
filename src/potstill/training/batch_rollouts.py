"""Rollouts behind the prompts of a batch, for a loop that has the batches of a collator and no recipe."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from potstill.data.completions import Completion, rollout_batch
from potstill.data.end_of_turn import answer_ends
from potstill.data.prompts import Prompt
from potstill.errors import UserError
from potstill.models.decoding import decoding_fault, uniforms
from potstill.models.load import longest_row
from potstill.models.student import Student
from potstill.recipe.sections_rollouts import PROMPT_TOKENS, RolloutsConfig
from potstill.training.engines import OwnEngine
from potstill.types import Batch, Teacher

NO_ROW = -1
"""The number of a row that is in no corpus."""
FIELDS = ("fraction", "max_new_tokens", "prompt_tokens", "temperature", "top_p", "top_k")
"""Of `RolloutsConfig`, those that have a meaning here."""


class BatchRollouts:
    """What the student writes behind the prompts of a batch, with its weights of the moment.

    A row is one document. Its prompt is what stands before its last answer, where its last labels begin; of text
    without turns, which has labels from its beginning, the first `config.prompt_tokens`. The answers bear loss, of
    which cross-entropy is no part (Agarwal et al. 2023, arXiv 2306.13649).

    Args:
        config: `fraction`, which `is_due` draws by, the lengths, and how to sample.
        tokenizer: whose end of turn and end of text end an answer; None: those that the models' configs name.
        ids: number of ids that student and teacher share, as `Student.match_ids` gives it.
        seed: of all random numbers.

    Raises:
        UserError: a teacher without targets for new text, a student that cannot decode, or a field that has no meaning
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
        for field in dataclasses.fields(config):
            if field.name not in FIELDS and (given := getattr(config, field.name)) != field.default:
                raise UserError(
                    f"rollouts.{field.name}: {given}: `potstill distill` alone has that. Leave it out."
                )
        if not teacher.reads_new_text:
            raise UserError(
                "rollouts: the teacher has no targets for text that the student writes. Give another, or no rollouts."
            )
        if (fault := decoding_fault(student.model)) is not None:
            raise UserError(f"rollouts: {student.model.name}: {fault}. Leave rollouts out.")
        named = set(student.model.ends)
        if teacher.model is not None:
            named &= teacher.model.ends
        self.student, self.config, self.seed = student, config, seed
        self.ends = answer_ends(tokenizer, named, ids)
        self.engine = OwnEngine(config, self.ends)
        limits = (longest_row(student.model.hf.config), teacher.max_length)
        self.longest = min((limit for limit in limits if limit is not None), default=None)
        """Tokens that both models can read; None: any number."""

    def is_due(self, step: int, number: int = 0) -> bool:
        """Whether the student writes micro-batch `number` of a step, drawn by the seed: the same on every rank and
        after a resume.
        """
        (drawn,) = uniforms(self.seed, f"step {step + 1}, micro-batch {number}", 1)
        return drawn < self.config.fraction

    def write(self, batch: Batch, step: int, first_row: int = 0) -> tuple[Batch, list[Completion]]:
        """A batch of what the student writes in the place of this one's answers, and that as completions.

        Left out are rows without a label and text that ends within its prompt; where none is left, the batch is the
        given one without labels.

        Args:
            step: of the optimizer, from 0.
            first_row: number of the batch's first row in its step. The same step and row have the same random numbers.

        Raises:
            UserError: a row of several documents or of more tokens than the models read, or a student that cannot be
                sampled from.
        """
        prompts = [
            (f"step {step + 1}, row {first_row + prompt.number}", prompt) for prompt in self._prompts(batch)
        ]
        if not prompts:
            return dataclasses.replace(batch.without_labels(), is_rollout=True), []
        with torch.no_grad(), self.student.on_grid():
            written = self.engine.write(self.student, prompts, self.seed, lambda: None)
        return rollout_batch(written, [NO_ROW] * len(written)), written

    def _prompts(self, batch: Batch) -> list[Prompt]:
        if batch.for_teacher is not None or batch.is_packed:
            what = "several documents" if batch.is_packed else "another text for its teacher"
            raise UserError(f"rollouts: a row has {what}. Give batches of one document a row.")
        T = batch.input_ids_BT.shape[1]
        prompts = []
        for row, ids_T in enumerate(batch.input_ids_BT.tolist()):
            length = self._prompt_length(batch.positions_N[batch.positions_N // T == row] % T)
            if not 0 < length < (T if batch.lengths_B is None else int(batch.lengths_B[row])):
                continue
            most = length + self.config.max_new_tokens
            if self.longest is not None and most > self.longest:
                raise UserError(
                    f"rollouts.max_new_tokens: {self.config.max_new_tokens} behind a prompt of {length} tokens, and the"
                    f" models read {self.longest}. Lower it, or leave out longer prompts."
                )
            source = None if batch.sources_B is None else int(batch.sources_B[row])
            prompts.append(Prompt(row, ids_T[:length], source=source))
        return prompts

    def _prompt_length(self, of_row: torch.Tensor) -> int:
        """Tokens before the last answer of a row with these supervised positions; 0: it has none."""
        if not len(of_row):
            return 0
        # The first label of an answer is behind a position without one.
        is_first = torch.ones_like(of_row, dtype=torch.bool)
        is_first[1:] = of_row.diff() > 1
        begins = int(of_row[is_first][-1])
        return begins + 1 if begins else self.config.prompt_tokens or PROMPT_TOKENS
