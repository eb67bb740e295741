"""Students that are mixtures of experts: the balancing loss that their config asks for, and the use of experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from potstill.errors import UserError, one_line
from potstill.losses.balance import balance, expert_counts
from potstill.models.causal_lm import CausalLM

COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")
"""Names of Transformers for it; the second is JetMoe's."""


@dataclass(frozen=True)
class Routing:
    """How the routers of a mixture are trained."""

    top_k: int
    """Experts that a token is sent to."""
    coefficient: float | None
    """Of the balancing loss; None: the config asks for none (`output_router_logits` is false, or the coefficient
    0), and how the experts are used is logged alone.
    """

    def terms(
        self,
        routers: list[Tensor],
        counted_M: Tensor,
        counts_LX: Tensor | None = None,
        sum_over_ranks: Callable[[Tensor], Tensor] = lambda counts_LX: counts_LX,
    ) -> dict[str, Tensor]:
        """`expert_counts` [L, X] of these tokens and, where there is a coefficient, their part of the `router_loss`.

        Args:
            counts_LX: of the whole step; None: these are all the tokens of it that this rank has.
        """
        own_LX = expert_counts(routers, counted_M, self.top_k)
        if self.coefficient is None:
            return {"expert_counts": own_LX}
        whole_LX = sum_over_ranks(own_LX) if counts_LX is None else counts_LX
        return {
            "expert_counts": own_LX,
            "router_loss": balance(routers, counted_M, whole_LX, self.top_k),
        }


def routing_of(model: CausalLM) -> Routing | None:
    """None for a model without experts, or one whose routers are not known here and whose config asks for no loss.

    Raises:
        UserError: the config asks for a loss that is not the one of `losses.balance`, by the model's own figure on a
            dozen tokens.
    """
    hf, config = model.hf, model.hf.config.get_text_config()
    is_balanced = bool(getattr(config, "output_router_logits", False))
    coefficient = _coefficient(hf)
    if coefficient is None:
        if is_balanced and _coefficient(config):
            raise _unknown_loss(model, "does not exist in Transformers.")
        return None
    routing = Routing(
        getattr(hf, "num_experts_per_tok", 1), float(coefficient) or None if is_balanced else None
    )
    # Recording inside a compiled body would make it another graph, for figures alone.
    if routing.coefficient is None and model.compiled_body is not None:
        return None
    if isinstance(next(hf.parameters()), FakeTensor):  # a plan, without numbers to compare
        return routing if is_balanced else None
    what = _difference(model, routing)
    if what and is_balanced:
        raise _unknown_loss(model, what)
    return routing if what == "" else None


@torch.no_grad()
def _difference(model: CausalLM, routing: Routing) -> str | None:
    """What is other in the loss that the model itself gives; empty where nothing is, None without routers."""
    ids_BT = torch.arange(12, device=model.device).reshape(2, 6) % model.vocab_size
    was_training = model.training
    model.eval()  # some routers add noise while they are trained
    try:
        out = model.hf(input_ids=ids_BT, use_cache=False, output_router_logits=True)
        if not out.router_logits:
            return None
        counts_LX = expert_counts(out.router_logits, counted_M := ids_BT.flatten() >= 0, routing.top_k)
        ours = float(balance(out.router_logits, counted_M, counts_LX, routing.top_k))
        expected = float(out.aux_loss)
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        return f"cannot be computed: {one_line(error)}"
    finally:
        model.train(was_training)
    is_equal = abs(ours - expected) <= 1e-3 * abs(expected)
    return "" if is_equal else f"is {expected:.4g} on a dozen tokens, by the formula known here {ours:.4g}."


def _coefficient(owner: Any) -> float | None:
    """Its coefficient; None where it has none."""
    return next((value for name in COEFFICIENTS if (value := getattr(owner, name, None)) is not None), None)


def _unknown_loss(model: CausalLM, what: str) -> UserError:
    config: Any = model.hf.config.get_text_config()
    return UserError(
        f"{model.name}: output_router_logits is true in its config, and the balancing loss of a {config.model_type}"
        f" {what} Set output_router_logits to false there, to train without it."
    )
