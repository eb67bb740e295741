"""A device that this machine does not have: what `potstill plan --device h100` plans for."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from potstill.build.resolve import Resolved, resolve, settle_types
from potstill.errors import UserError
from potstill.io.cpu_matmul import ProductDtype
from potstill.recipe.load import Recipe

MEMORY_GB = {
    "t4": 16,
    "v100": 16,
    "v100-32gb": 32,
    "a10": 24,
    "a10g": 24,
    "l4": 24,
    "rtx3090": 24,
    "rtx4090": 24,
    "rtx5090": 32,
    "a6000": 48,
    "l40s": 48,
    "a100-40gb": 40,
    "a100": 80,
    "h100": 80,
    "h200": 141,
    "b200": 180,
}
"""The vendor's size in 10^9 bytes: a little less than what CUDA reports of these, and its own context takes some."""
WITHOUT_BFLOAT16 = ("t4", "v100", "v100-32gb")
UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}


@dataclass(frozen=True)
class OtherDevice:
    """A device by its name, and the bytes of its memory."""

    name: str
    is_cuda: bool
    memory_bytes: int

    @property
    def product_dtype(self) -> ProductDtype:
        """What `auto` chooses there."""
        return "float32" if self.name in WITHOUT_BFLOAT16 or not self.is_cuda else "bfloat16"


def other_device(name: str | None, memory: str | None, recipe: Recipe) -> OtherDevice | None:
    """The device of `--device` and `--device-memory`; None where neither is given.

    Raises:
        UserError: a name or a size that is none, or a device whose memory is not known.
    """
    if name is None and memory is None:
        return None
    name = (name or ("cpu" if recipe.train.device == "cpu" else "cuda")).lower().replace("_", "-")
    if name not in (*MEMORY_GB, "cuda", "cpu"):
        raise UserError(
            f"--device: {name} is not known. Give cuda or cpu with --device-memory, or one of"
            f" {', '.join(MEMORY_GB)}."
        )
    if memory is None and name not in MEMORY_GB:
        raise UserError(f"--device: the memory of {name} is not known. Add --device-memory, such as 80GiB.")
    num_bytes = MEMORY_GB[name] * 10**9 if memory is None else _bytes_of(memory)
    return OtherDevice(name, name != "cpu", num_bytes)


def resolve_for(recipe: Recipe, other: OtherDevice) -> Resolved:
    """The recipe for another device. Its step is traced with the kernels of this machine's CPU."""
    settled = settle_types(recipe, other.product_dtype)
    resolved = resolve(replace(settled, train=replace(settled.train, device="cpu")))
    return replace(resolved, asked=recipe, planned_type="cuda" if other.is_cuda else "cpu")


def _bytes_of(text: str) -> int:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([kmgt]?)(i?)b?", text.strip().lower())
    num_bytes = 0
    if match:
        base = 2 ** UNITS[match[2]] if match[3] else 10 ** (3 * (UNITS[match[2]] // 10))
        num_bytes = int(float(match[1]) * base)
    if num_bytes < 2**20:
        raise UserError(
            f"--device-memory: {text!r} is no size of a device's memory. Write, say, 80GiB or 80GB."
        )
    return num_bytes
