"""Rollouts: training data that the student writes with its weights of the moment, for the teacher to grade.

A step's rows are sampled before the step and written whole to `rollouts/`, so that a step that is taken again, after a
kill or a rollback, has the same ones. Random numbers are a function of the seed, the step and the row. Prefixes are
held fixed: no gradient goes through the sampling (Agarwal et al. 2023, arXiv 2306.13649).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

from potstill.data.completions import Completion, as_file, figures, from_file, rollout_batch
from potstill.data.fixed import FixedRows
from potstill.data.prompts import MixedPrompts, Prompt, Prompts
from potstill.errors import UserError
from potstill.io.atomic import write_whole
from potstill.models.student import Student
from potstill.recipe.sections_rollouts import RolloutsConfig
from potstill.training.distributed import ALONE, Ranks
from potstill.training.engines import Engine, gap
from potstill.types import Batch


class Rollouts:
    """`Data` of which a share is written by the student, and the rest is the corpus's."""

    fixed = False

    def __init__(
        self,
        student: Student,
        prompts: Prompts | MixedPrompts,
        fixed: FixedRows,
        config: RolloutsConfig,
        engine: Engine,
        first_number: int,
        folder: Path | None = None,
        ranks: Ranks = ALONE,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            fixed: the corpus's rows, for the whole of a step.
            engine: what samples.
            first_number: of a step's first own row, in the order of its file: the corpus's rows have those before it.
            folder: where a step's rows are kept; None: nowhere, for a trial.
        """
        self.student, self.prompts, self.config, self.engine = student, prompts, config, engine
        self.first_number, self.folder, self.ranks, self.beat = first_number, folder, ranks, beat
        rows = fixed.rows_per_step
        self.per_step = config.rows_of(rows)
        """Rows of a step that the student writes."""
        self.corpus = dataclasses.replace(fixed, rows_per_step=rows - self.per_step)
        self.size = fixed.micro_batch_size
        self.seed = fixed.order.seed
        self.order = prompts.order(self.seed)
        self._block: tuple[int, list[Completion]] | None = None
        self._figures: dict[int, dict[str, float]] = {}

    def step(self, step: int) -> list[Batch]:
        batches = self.corpus.pack(self.corpus.rows(step)) if self.corpus.rows_per_step else []
        completions = self._completions(step)
        self._figures = {step: figures(completions) | self._figures.pop(step, {})}
        kept = [(self.first_number + number, each) for number, each in enumerate(completions)]
        if self.config.truncated == "mask" and (batches or any(each.ended for each in completions)):
            kept = [(number, each) for number, each in kept if each.ended]
        # Rows of similar length together: the shorter of a micro-batch are padded.
        kept.sort(key=lambda pair: -len(pair[1].ids))
        for at in range(0, len(kept), self.size):
            numbers, own = zip(*kept[at : at + self.size], strict=True)
            batches.append(rollout_batch(own, numbers))
        return batches

    def epoch(self, step: int) -> int:
        return self.order.epoch(step, self.per_step) if self.per_step else self.corpus.epoch(step)

    def figures(self, step: int) -> dict[str, float]:
        """Of a step's completions, with the seconds where they were written in it; and of the corpus's own rows."""
        of_corpus = self.corpus.figures(step) if self.corpus.rows_per_step else {}
        return self._figures.get(step, {}) | of_corpus

    def _completions(self, step: int) -> list[Completion]:
        """Those of one step, out of the block that was written at once."""
        if not self.per_step:
            return []
        first = step - step % self.config.every
        if self._block is None or self._block[0] != first:
            self._block = (first, self._read(first) or self._write(first, step))
        at = (step - first) * self.per_step
        return self._block[1][at : at + self.per_step]

    def _write(self, first: int, step: int) -> list[Completion]:
        """The completions of a block of steps, each rank its share, whole in the folder before they are used."""
        if step > first and self.folder is not None:
            raise UserError(
                f"{self._path(first)}: missing or damaged, and the rows of steps {first + 1} to"
                f" {first + self.config.every} cannot be written again: the student has been trained since. Delete the"
                " newest of checkpoints/ to resume from the one before, or start a new run."
            )
        started = time.perf_counter()
        prompts, ranks = self._prompts_of(first), self.ranks
        # Each layer in shards is gathered by all ranks together, so that all have to decode the same.
        is_shared = ranks.parallel == "ddp"
        mine = prompts[ranks.rank :: ranks.world] if is_shared else prompts
        with self.student.on_grid():
            written = self.engine.write(self.student, mine, self.seed, self.beat)
            more = self._gap(written, step) if self.engine.is_other else {}
        if is_shared:
            of_ranks = ranks.gather([(number, ranks.rank, each) for number, each in enumerate(written)])
            completions = [each for _, _, each in sorted(of_ranks, key=lambda entry: entry[:2])]
        else:
            completions = ranks.broadcast(written)
        self.ranks.on_first(lambda: self._keep(first, completions))
        seconds = time.perf_counter() - started
        tokens = sum(len(each.new) for each in completions)
        speed = {"speed/rollout_s": seconds, "speed/rollout_tokens_per_s": tokens / seconds}
        self._figures[step] = speed | more
        return completions

    def _gap(self, written: list[Completion], step: int) -> dict[str, float]:
        """Of another engine, before what it wrote is kept.

        Raises:
            UserError: it is wider than the recipe allows.
        """
        apart = gap(self.student, written, self.beat)
        if apart > self.config.max_engine_gap:
            raise UserError(
                f"step {step + 1}: the engine's log-probabilities of what it wrote are {apart:.3g} nats from the"
                f" trainer's, above rollouts.max_engine_gap ({self.config.max_engine_gap:g}): it samples from another"
                " model. Raise the limit, or set rollouts.engine: transformers."
            )
        return {"rollout/engine_gap": apart}

    def _prompts_of(self, first: int) -> list[tuple[str, Prompt]]:
        steps = range(first, first + self.config.every)
        numbers = [(step, row) for step in steps for row in range(self.per_step)]
        order = [index for step in steps for index in self.order.rows(step, self.per_step)]
        return [
            (f"step {step + 1}, row {row}", self.prompts[index])
            for (step, row), index in zip(numbers, order, strict=True)
        ]

    def _path(self, first: int) -> Path | None:
        return None if self.folder is None else self.folder / f"{first + 1:08d}.safetensors"

    def _keep(self, first: int, completions: list[Completion]) -> None:
        path = self._path(first)
        if path is None:
            return
        path.parent.mkdir(exist_ok=True)
        write_whole(path, as_file(completions, {"seed": self.seed, "step": first + 1}))
        if self.config.keep:
            for old in sorted(path.parent.glob("*.safetensors"))[: -self.config.keep]:
                old.unlink()

    def _read(self, first: int) -> list[Completion] | None:
        """What a run wrote before it was stopped. None where it is not there, or not of these prompts: then it is
        written again, which gives the same.
        """
        path, prompts = self._path(first), [prompt for _, prompt in self._prompts_of(first)]
        found = None
        if path is not None and self.ranks.is_first and path.exists():
            found = from_file(path, prompts)
        return self.ranks.broadcast(found)
