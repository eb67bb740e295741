"""The teacher's next-token distributions, as the objective reads them: `types.Targets` in its two forms.

`HiddenTargets` are exact: hidden states, and the head that makes logits of them. `SparseTargets` are few ids
of each distribution, from a store or an API, and differ in what is known of the other ids:

bucket   the probabilities of K ids, and all others as one more class, on both sides: every divergence stays a
         divergence, and is a lower bound of the full one (data-processing inequality).
sampled  an unbiased estimate of the full distribution, whose rows sum to one on these ids; the student's side
         is its own log-probability there, not renormalised. Only forward KL is linear in the teacher, so
         only its gradient is unbiased. With `entropy_N` its value is unbiased, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

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
    """K ids per position, of the full V. S = K, or K + 1 with a bucket."""

    ids_NK: Tensor
    """int64, padded with -1 where a position has fewer."""
    logp_NK: Tensor
    """Log-probabilities, float32; -inf where the id is -1."""
    temperature: float
    """Of the softmax that the probabilities come from: too few ids are known to change it."""
    has_bucket: bool
    """Whether the probability of all other ids is a class of its own."""
    entropy_N: Tensor | None = None
    """Entropy of the full distributions, in nats."""

    def __len__(self) -> int:
        return len(self.ids_NK)

    def __getitem__(self, positions: slice) -> SparseTargets:
        entropy_N = None if self.entropy_N is None else self.entropy_N[positions]
        return replace(
            self, ids_NK=self.ids_NK[positions], logp_NK=self.logp_NK[positions], entropy_N=entropy_N
        )

    @classmethod
    def joined(cls, parts: Sequence[SparseTargets]) -> SparseTargets:
        """Those of one set of positions after the other, all of one kind and temperature."""
        K = max(part.ids_NK.shape[1] for part in parts)
        widths = [K - part.ids_NK.shape[1] for part in parts]
        ids_NK = torch.cat([F.pad(p.ids_NK, (0, w), value=-1) for w, p in zip(widths, parts, strict=True)])
        logp_NK = torch.cat(
            [F.pad(p.logp_NK, (0, w), value=-torch.inf) for w, p in zip(widths, parts, strict=True)]
        )
        entropies = [part.entropy_N for part in parts if part.entropy_N is not None]
        entropy_N = torch.cat(entropies) if entropies else None
        return replace(parts[0], ids_NK=ids_NK, logp_NK=logp_NK, entropy_N=entropy_N)

    def to(self, device: torch.device) -> SparseTargets:
        entropy_N = None if self.entropy_N is None else moved(self.entropy_N, device)
        ids_NK, logp_NK = moved(self.ids_NK, device), moved(self.logp_NK, device)
        return replace(self, ids_NK=ids_NK, logp_NK=logp_NK, entropy_N=entropy_N)

    def require_temperature(self, temperature: float) -> None:
        """UserError for another temperature than that of the targets."""
        if temperature != self.temperature:
            raise UserError(
                f"objective.temperature: is {temperature}, and the targets are of temperature"
                f" {self.temperature}. Set it to {self.temperature}, or use a teacher in memory or a store of"
                " hidden states."
            )

    def on_support(self, student_logp_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        self.require_temperature(temperature)
        is_id_NK = self.ids_NK >= 0
        ids_NK = self.ids_NK.clamp_min(0)
        student_NK = student_logp_NV.gather(-1, ids_NK).masked_fill(~is_id_NK, -math.inf)
        logp_NK = self.logp_NK.to(student_NK.dtype)
        if not self.has_bucket:
            return student_NK, logp_NK
        # The student's bucket is summed over its own ids: one minus the K known would be rounding noise where
        # they are nearly all.
        taken_NV = torch.zeros_like(student_logp_NV).scatter_add_(-1, ids_NK, is_id_NK.to(logp_NK.dtype))
        rest_N = _logsumexp(student_logp_NV.masked_fill(taken_NV > 0, -math.inf))
        known_N = logp_NK.exp().sum(-1)
        # Where the K ids are the whole vocabulary, what their sum lacks to one is rounding, and no bucket.
        has_rest_N = (known_N < 1) & ~rest_N.isneginf()
        tail_N = torch.where(has_rest_N, (1 - known_N).log(), -math.inf)
        return torch.cat([student_NK, rest_N[:, None]], -1), torch.cat([logp_NK, tail_N[:, None]], -1)

    def over_all_ids(self, grad_logq_NS: Tensor, student_logp_NS: Tensor, q_NV: Tensor) -> Tensor:
        """grad_logq_NV: the derivative by the bucket's log-probability goes to its ids, each by its share.

        Args:
            grad_logq_NS: by the log-probabilities that `on_support` returned, the bucket last.
            student_logp_NS: those log-probabilities.
            q_NV: the student's probabilities of all ids.
        """
        ids_NK, is_id_NK = self.ids_NK.clamp_min(0), (self.ids_NK >= 0).to(q_NV.dtype)
        of_ids_NK, of_bucket_N1 = grad_logq_NS[:, :-1], grad_logq_NS[:, -1:]
        # An empty bucket has probability 0 and no derivative: 0 / 0 is 0 here.
        share_N1 = (of_bucket_N1 / student_logp_NS[:, -1:].exp()).masked_fill(of_bucket_N1 == 0, 0.0)
        taken_NV = torch.zeros_like(q_NV).scatter_add_(-1, ids_NK, is_id_NK)
        grad_logq_NV = (q_NV * share_N1).masked_fill_(taken_NV > 0, 0.0)
        # Padding points to id 0, and adds 0 there.
        return grad_logq_NV.scatter_add_(-1, ids_NK, of_ids_NK * is_id_NK)

    def beyond_support(self) -> Tensor | None:
        """nats_N to add to forward KL on the support, so that its mean over draws is the full one: the
        entropy of the estimate minus that of the full distribution. None where that is unknown; no gradient.
        """
        return None if self.entropy_N is None else self._entropy_of_ids() - self.entropy_N

    def classes_of(self, ids_N: Tensor) -> Tensor:
        """Index on the support of each position's id: the bucket's where it is not one of the K."""
        assert self.has_bucket  # of sampled targets an id that was not drawn has no class
        is_it_NK = self.ids_NK == ids_N[:, None]
        return torch.where(is_it_NK.any(-1), is_it_NK.int().argmax(-1), self.ids_NK.shape[1])

    def entropy(self) -> Tensor:
        """nats_N: of the full distributions where it is known, else of the probabilities that are."""
        return self._entropy_of_ids() if self.entropy_N is None else self.entropy_N

    def _entropy_of_ids(self) -> Tensor:
        p_NK = self.logp_NK.exp()
        return -(p_NK * self.logp_NK.masked_fill(p_NK == 0, 0.0)).sum(-1)


def _logsumexp(logp_NV: Tensor) -> Tensor:
    """-inf where every entry is, with a gradient of 0 and not NaN."""
    nothing_N = logp_NV.isneginf().all(-1)
    return logp_NV.masked_fill(nothing_N[:, None], 0.0).logsumexp(-1).masked_fill(nothing_N, -math.inf)
