"""A teacher's distributions on few ids, as the objective reads them: from a store, or from an API.

Two forms, by what is known of the other ids:

bucket   the ids' own probabilities and, in one last class, all the rest, on both sides: every divergence
         stays a divergence, and a lower bound of the full one.
sampled  an unbiased estimate of the full distribution, whose rows sum to one on these ids; the student's side
         is its own log-probability there, not renormalised. Forward KL alone is linear in the teacher, so
         for it alone the gradient is unbiased. `entropy_N` makes its value unbiased, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from potstill.errors import UserError
from potstill.types import moved


@dataclass(frozen=True, slots=True)
class HiddenTargets:
    """The teacher's final hidden states, and the head that makes logits of them, a slice at a time. S = V.

    They hold for every temperature and every divergence: nothing of the distribution is left out.
    """

    hidden_NE: Tensor
    """In the teacher's dtype."""
    head: Callable[[Tensor], Tensor]
    """hidden_NE to logits_NV: a `Head`, or a function of one's own."""

    def __len__(self) -> int:
        return len(self.hidden_NE)

    def __getitem__(self, positions: slice) -> HiddenTargets:
        return HiddenTargets(self.hidden_NE[positions], self.head)

    def on_support(self, student_logp_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            logits_NV = self.head(self.hidden_NE)
            teacher_logp_NV = torch.log_softmax(logits_NV / temperature, dim=-1)
        return student_logp_NV, teacher_logp_NV

    def beyond_support(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class SparseTargets:
    """An id of -1 fills up a position that has fewer."""

    ids_NK: Tensor
    """int64."""
    logp_NK: Tensor
    """float32; -inf where the id is -1."""
    temperature: float
    """Of the softmax that the probabilities come from."""
    has_bucket: bool
    """Whether what the probabilities lack to one is a class of its own."""
    entropy_N: Tensor | None = None
    """The full distribution's own, in nats."""

    def __len__(self) -> int:
        return len(self.ids_NK)

    def __getitem__(self, positions: slice) -> SparseTargets:
        entropy_N = None if self.entropy_N is None else self.entropy_N[positions]
        return replace(
            self, ids_NK=self.ids_NK[positions], logp_NK=self.logp_NK[positions], entropy_N=entropy_N
        )

    def to(self, device: torch.device) -> SparseTargets:
        entropy_N = None if self.entropy_N is None else moved(self.entropy_N, device)
        ids_NK, logp_NK = moved(self.ids_NK, device), moved(self.logp_NK, device)
        return replace(self, ids_NK=ids_NK, logp_NK=logp_NK, entropy_N=entropy_N)

    def require_temperature(self, temperature: float) -> None:
        if temperature != self.temperature:
            raise UserError(
                f"targets: made at temperature {self.temperature}, asked at {temperature}. They keep too few"
                f" ids to change it. Set objective.temperature: {self.temperature}, or take a teacher in"
                " memory or a store of hidden states."
            )

    def on_support(self, student_logp_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        self.require_temperature(temperature)
        is_id_NK = self.ids_NK >= 0
        ids_NK = self.ids_NK.clamp_min(0)
        student_NK = student_logp_NV.gather(-1, ids_NK).masked_fill(~is_id_NK, -math.inf)
        logp_NK = self.logp_NK.to(student_NK.dtype)
        if not self.has_bucket:
            return student_NK, logp_NK
        # The rest is summed over its own ids: 1 minus the kept would be noise where they are nearly all.
        taken_NV = torch.zeros_like(student_logp_NV).scatter_add_(-1, ids_NK, is_id_NK.to(logp_NK.dtype))
        rest_N = _logsumexp(student_logp_NV.masked_fill(taken_NV > 0, -math.inf))
        known_N = logp_NK.exp().sum(-1)
        # Where all ids are kept, what the sum lacks to one is rounding.
        has_rest_N = (known_N < 1) & ~rest_N.isneginf()
        tail_N = torch.where(has_rest_N, (1 - known_N).log(), -math.inf)
        return torch.cat([student_NK, rest_N[:, None]], -1), torch.cat([logp_NK, tail_N[:, None]], -1)

    def over_all_ids(self, slope_NS: Tensor, student_logp_NS: Tensor, q_NV: Tensor) -> Tensor:
        """slope_NV: what moves the rest's log-probability moves its ids by their share of it."""
        ids_NK, is_id_NK = self.ids_NK.clamp_min(0), (self.ids_NK >= 0).to(q_NV.dtype)
        of_kept_NK, of_rest_N1 = slope_NS[:, :-1], slope_NS[:, -1:]
        share_N1 = (of_rest_N1 / student_logp_NS[:, -1:].exp()).masked_fill(of_rest_N1 == 0, 0.0)
        taken_NV = torch.zeros_like(q_NV).scatter_add_(-1, ids_NK, is_id_NK)
        slope_NV = (q_NV * share_N1).masked_fill_(taken_NV > 0, 0.0)
        return slope_NV.scatter_add_(-1, ids_NK, of_kept_NK * is_id_NK)

    def beyond_support(self) -> Tensor | None:
        """What forward KL on the support lacks of the one over the whole vocabulary, on average, per
        position: the estimate's entropy minus the full distribution's. It carries no gradient.
        """
        return None if self.entropy_N is None else self._entropy_of_ids() - self.entropy_N

    def entropy(self) -> Tensor:
        """Of the full distributions where it is known, else of what is kept of them, per position."""
        return self._entropy_of_ids() if self.entropy_N is None else self.entropy_N

    def _entropy_of_ids(self) -> Tensor:
        p_NK = self.logp_NK.exp()
        return -(p_NK * self.logp_NK.masked_fill(p_NK == 0, 0.0)).sum(-1)


def _logsumexp(logp_NV: Tensor) -> Tensor:
    """-inf where every entry is, with a gradient of 0 and not NaN."""
    nothing_N = logp_NV.isneginf().all(-1)
    return logp_NV.masked_fill(nothing_N[:, None], 0.0).logsumexp(-1).masked_fill(nothing_N, -math.inf)
