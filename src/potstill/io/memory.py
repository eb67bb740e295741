"""How much memory a run has taken."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import torch

OF_PROCESS = Path("/proc/self")


def peak_gib(device: torch.device) -> float:
    """Peak so far in GiB: of the device's allocator on CUDA, of the process elsewhere (Linux counts KiB)."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)


def forget_peak(device: torch.device) -> bool:
    """Let `peak_bytes` count from here on; False where the system cannot, and it counts from the process's start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        (OF_PROCESS / "clear_refs").write_text("5")  # proc(5): resets the peak resident set size
    except OSError:
        return False
    return True


def peak_bytes(device: torch.device) -> int:
    """Peak since `forget_peak`: of the device's allocator on CUDA, of the process's resident pages elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB$", (OF_PROCESS / "status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return 1024 * (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
