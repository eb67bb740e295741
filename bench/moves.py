"""What does each move towards a size cost? Every student that is tried, with its KL, and the held-out KL of the chosen.

    python bench/moves.py src/potstill/demo.yaml --fraction 0.5 [--without-heads]

The student is cut and not repaired; nats per position.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from potstill import load_recipe
from potstill.build.resolve import resolve
from potstill.build.setup import set_up
from potstill.evals.heldout import heldout
from potstill.models import sizing
from potstill.models.layer_harm import Without


class Shown(Without):
    """Prints what it measures of narrow layers."""

    def kl(self, out: Sequence[int], ffn_width: int | None = None, kv_heads: int | None = None) -> float:
        kl = super().kl(out, ffn_width, kv_heads)
        if len(out) > 1 or ffn_width or kv_heads:
            kept = f"{ffn_width or 'all'} channels, {kv_heads or 'all'} KV groups"
            print(f"  tried without layers {[*out]}, {kept}: KL {kl:.4f}", flush=True)
        return kl


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--fraction", type=float, required=True, help="of the teacher's weights")
    parser.add_argument("--without-heads", action="store_true", help="layers and channels alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizing.Without = Shown  # type: ignore[misc]
    if options.without_heads:
        sizing._Shape.know_heads = lambda shape: "switched off"  # type: ignore[method-assign]
    fields = [f"student.fraction={options.fraction}", "student.repair=false"]
    setup = set_up(resolve(load_recipe(options.recipe, fields)), lambda text: print(text, flush=True))
    found = heldout(setup.student, setup.teacher, setup.corpus.heldout, 1)
    print({name: round(value, 4) for name, value in found.items()})


if __name__ == "__main__":
    main()
