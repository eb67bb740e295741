"""What a `DistillTrainer` logs of the steps since its last log, over all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from potstill.data.completions import Completion


class StepMeans:
    """`kd` and `ce`, means over the positions of each step, averaged over steps. Of the answers that the student wrote,
    their mean length and the share that ended.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._clear()

    def _clear(self) -> None:
        self._kd = self._ce = torch.zeros((), device=self._accelerator.device)
        self._kd_steps, self._ce_steps = 0, 0
        self._answers, self._tokens, self._ended = 0, 0, 0

    def begin(self, positions: Tensor, of_corpus: Tensor) -> None:
        """A step of so many positions on all ranks, and of so many of them whose labels are the corpus's: on those
        alone falls cross-entropy.
        """
        self._positions, self._of_corpus = positions, of_corpus
        self._kd_steps += 1
        self._ce_steps += int(of_corpus > 0)

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """The sums of a micro-batch of the step."""
        self._kd = self._kd + terms["kd"].detach() / self._positions
        if "ce" in terms:
            # Labels of a rollout alone leave the corpus's micro-batches without a position.
            self._ce = self._ce + terms["ce"].detach() / self._of_corpus.clamp_min(1)

    def add_answers(self, written: Sequence[Completion]) -> None:
        self._answers += len(written)
        self._tokens += sum(len(each.new) for each in written)
        self._ended += sum(each.ended for each in written)

    def read(self) -> dict[str, float]:
        """On every rank, which all have to ask; from here on, those of later steps."""
        if not self._kd_steps:
            return {}
        own = [self._kd, self._ce, self._answers, self._tokens, self._ended]
        sums = torch.stack([torch.as_tensor(each, device=self._accelerator.device).float() for each in own])
        kd, ce, answers, tokens, ended = self._accelerator.reduce(sums, "sum").tolist()
        means = {"kd": kd / self._kd_steps}
        if self._ce_steps:
            means["ce"] = ce / self._ce_steps
        if answers:
            means |= {"rollout_tokens": tokens / answers, "rollout_ended": ended / answers}
        self._clear()
        return means
