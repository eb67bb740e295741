"""How much memory a run has taken."""

from __future__ import annotations

import resource

import torch


def peak_gib(device: torch.device) -> float:
    """Peak so far in GiB: of the device's allocator on CUDA, of the process elsewhere (Linux counts KiB)."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)
