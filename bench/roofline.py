"""What the loss block must cost on a GPU at least, on paper: operations and bytes, counted and not measured.

The block of `bench/scaling.py`, forward and backward in bfloat16 on the shape that Liger publishes figures of, is run
on tensors without content: PyTorch says which operations it asks for, and each reads its arguments and writes its
results once, as separate kernels do. Of what torch.compile fuses the least is counted: both models' logits read
twice, for their sums and for the gradient, which is written once. Summing the head's gradient over chunks is not
between a chunk's products, and stays.

    python bench/roofline.py
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import scaling
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

PUBLISHED = scaling.Case(N=8192, V=128_256, D=2048, E=4096)
"""As in `gpu_arms.py`, which needs what a run needs."""
CARDS = {"H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12)}
"""bfloat16 products and bytes of memory a second, as the maker says."""
PRODUCTS = {"mm", "addmm", "addmm_", "bmm"}
WIDTH = 2  # bytes of a bfloat16


class Bytes(TorchDispatchMode):
    """Bytes that operations read and write, of products, of what has the shape of a head, and of the rest."""

    def __init__(self, case: scaling.Case) -> None:
        super().__init__()
        self.head, self.moved = (case.V, case.D), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        name = func.overloadpacket.__name__
        if not func.is_view and not (name == "copy_" and _same_place(*args[:2])):
            is_of_head = any(tuple(tensor.shape) == self.head for tensor in tensors)
            kind = "products" if name in PRODUCTS else "head" if is_of_head else "logits"
            self.moved[kind] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


def _same_place(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Copying a tensor onto itself, as `x[:n] += y` does at its end, moves nothing."""
    places = [(t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride()) for t in (one, other)]
    return places[0] == places[1]


def counted(case: scaling.Case) -> tuple[int, Counter[str]]:
    """FLOPs of the products, and bytes by kind."""
    run = scaling.loss_block(case, scaling.tensors(case, "meta", torch.bfloat16))
    with FlopCounterMode(display=False) as flops:
        run()
    with Bytes(case) as bytes_:
        run()
    return flops.get_total_flops(), bytes_.moved


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, nargs="+", default=[256, 1024, 2048])
    options = parser.parse_args()
    case = PUBLISHED
    print(f"N {case.N}, V {case.V}, D {case.D}, E {case.E}: {case.flops / 1e12:.1f} TFLOP needed\n")
    cards = [f"{name}, ms" for name in CARDS]
    print(f"| on paper | TFLOP | GB: products | head's gradient | logits | {' | '.join(cards)} |")
    print("|---" * (5 + len(cards)) + "|")
    for chunk in options.chunks:
        flops, moved = counted(replace(case, chunk=chunk))
        for name, logits in (("", moved["logits"]), (", compiled", 5 * case.N * case.V * WIDTH)):
            rest = moved["head"] + logits
            # Large products hide their own traffic; what stands between them is bound by memory.
            seconds = [
                max(flops / peak, moved["products"] / speed) + rest / speed for peak, speed in CARDS.values()
            ]
            gb = [f"{count / 1e9:.1f}" for count in (moved["products"], moved["head"], logits)]
            figures = [f"{flops / 1e12:.1f}", *gb, *(f"{1000 * s:.1f}" for s in seconds)]
            print(f"| ours, chunk {chunk}{name} | {' | '.join(figures)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
