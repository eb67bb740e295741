"""Divergences per position, and the objective that sums them over positions with gradients.

The names below are what a program may rely on; docs/python-api.md shows them in loops. They are fetched on first use:
a recipe names divergences without importing torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from potstill.registry import implementation

if TYPE_CHECKING:
    from potstill.losses.divergences import forward_kl as forward_kl
    from potstill.losses.divergences import jsd as jsd
    from potstill.losses.divergences import reverse_kl as reverse_kl
    from potstill.losses.divergences import skew_kl as skew_kl
    from potstill.losses.divergences import tvd as tvd
    from potstill.losses.objective import Objective as Objective
    from potstill.losses.targets import HiddenTargets as HiddenTargets
    from potstill.losses.targets import SparseTargets as SparseTargets
    from potstill.types import Divergence as Divergence
    from potstill.types import Head as Head
    from potstill.types import Targets as Targets

_HOMES = {
    "Divergence": "potstill.types",
    "Head": "potstill.types",
    "HiddenTargets": "potstill.losses.targets",
    "Objective": "potstill.losses.objective",
    "SparseTargets": "potstill.losses.targets",
    "Targets": "potstill.types",
    "forward_kl": "potstill.losses.divergences",
    "jsd": "potstill.losses.divergences",
    "reverse_kl": "potstill.losses.divergences",
    "skew_kl": "potstill.losses.divergences",
    "tvd": "potstill.losses.divergences",
}
__all__ = [
    "Divergence",
    "Head",
    "HiddenTargets",
    "Objective",
    "SparseTargets",
    "Targets",
    "forward_kl",
    "jsd",
    "reverse_kl",
    "skew_kl",
    "tvd",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'potstill.losses' has no attribute {name!r}")
    return implementation(f"{_HOMES[name]}:{name}")


def __dir__() -> list[str]:
    return [*__all__]
