"""Two settings of the process: how it keeps freed memory, and which library multiplies matrices on the
CPU. And in which type a device multiplies fastest.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from potstill.errors import UserError

M_MMAP_THRESHOLD = -3  # malloc.h
CPUINFO = Path("/proc/cpuinfo")
LEAST_WORK = 2**24
"""Multiplications of a product that oneDNN is called for: with fewer, the call costs what it gains."""
LEAST_ROWS = 16

MatmulBackend = Literal["blas", "onednn"]
ProductDtype = Literal["float32", "bfloat16"]
BFLOAT16_FLAGS = ("amx_bf16", "avx512_bf16")
"""Instructions of a processor that multiply bfloat16 faster than float32, by Linux's names."""
BFLOAT16_CAPABILITY = (8, 0)
"""Of a GPU whose tensor cores have bfloat16."""

_override: list[torch.library.Library] = []
"""What is in force now. PyTorch forgets an override with the object that made it."""


def return_freed_memory() -> None:
    """Have glibc give a freed tensor's memory back to the system, as it does before it has seen many.

    From 128 KiB on a block is a mapping of its own, gone when it is freed; but each such free raises that
    limit, up to 32 MiB, and what is smaller stays in a heap that fragments. Fixed at its first value, the
    demo peaks at 3.51 GiB instead of 4.25, and its steps take a quarter longer (docs/log.md).
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 128 * 1024)


def choose_matmul(config: Literal["auto"] | MatmulBackend, device: torch.device) -> tuple[MatmulBackend, str]:
    """Which library multiplies float32 matrices on a CPU, `blas` or `onednn`, and why. PyTorch has both and
    calls MKL, which takes slower paths on processors that are not Intel's.

    A table and not a measurement, whose noise would decide the last bits of a run.
    """
    if config != "auto":
        return config, "as the recipe says"
    calls_mkl = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    if device.type == "cpu" and calls_mkl and _has_onednn() and _is_slow_with_mkl():
        return "onednn", "auto: faster than MKL on a processor of AMD's with AVX-512"
    return "blas", "auto: what PyTorch calls"


def choose_product_dtype(device: torch.device) -> tuple[ProductDtype, str]:
    """The type in which this device multiplies matrices fastest, and why. A table, as for `choose_matmul`: without such
    instructions a CPU converts each number, and is slower.
    """
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= BFLOAT16_CAPABILITY:
            return "bfloat16", f"auto: tensor cores of compute capability {capability[0]}.{capability[1]}"
        return "float32", "auto: no tensor cores for bfloat16"
    text = CPUINFO.read_text("utf-8", "replace") if CPUINFO.exists() else ""
    listed = next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
    found = next((flag for flag in BFLOAT16_FLAGS if flag in listed), None)
    if found is not None and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "bfloat16", f"auto: the processor has {found}"
    return "float32", "auto: the processor has no instructions for bfloat16"


def _has_onednn() -> bool:
    is_built: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return is_built and hasattr(torch.library, "get_kernel")


def _is_slow_with_mkl() -> bool:
    """Of those that were measured; of AMD's without AVX-512 none was."""
    text = CPUINFO.read_text("utf-8", "replace") if CPUINFO.exists() else platform.processor()
    return "AuthenticAMD" in text and torch.backends.cpu.get_cpu_capability() == "AVX512"


@contextlib.contextmanager
def matmul_with(backend: Literal["auto"] | MatmulBackend) -> Iterator[None]:
    """While the block runs, this process multiplies two float32 matrices on the CPU with that library; `auto`
    is `blas` where nothing was chosen. Afterwards it multiplies as before.

    Raises:
        UserError: oneDNN, where this build of PyTorch does not have it.
    """
    if backend == "onednn" and not _has_onednn():
        raise UserError(
            "train.matmul: onednn is not available in this build of PyTorch. Set train.matmul: blas."
        )
    before = matmul_backend()
    _switch(backend)
    try:
        yield
    finally:
        _switch(before)


def matmul_backend() -> MatmulBackend:
    """The library in use now."""
    return "onednn" if _override else "blas"


def _switch(backend: Literal["auto"] | MatmulBackend) -> None:
    if backend != "onednn":
        _override.clear()
    elif not _override:
        _override.append(_onednn())


def _onednn() -> torch.library.Library:
    linear = torch.ops.mkldnn._linear_pointwise.default
    plain_mm, plain_addmm = (torch.library.get_kernel(f"aten::{name}", "CPU") for name in ("mm", "addmm"))

    def mm(keys: Any, a_MK: Tensor, b_KN: Tensor) -> Any:
        if _gains(a_MK, b_KN):
            return linear(a_MK, b_KN.t(), None, "none", [], "")
        return plain_mm.call_boxed(keys, a_MK, b_KN)

    def addmm(keys: Any, bias: Tensor, a_MK: Tensor, b_KN: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
        is_bias = bias.ndim == 1 and bias.shape == b_KN.shape[1:] and bias.dtype == b_KN.dtype
        if is_bias and beta == alpha == 1 and _gains(a_MK, b_KN):
            return linear(a_MK, b_KN.t(), bias, "none", [], "")
        return plain_addmm.call_boxed(keys, bias, a_MK, b_KN, beta=beta, alpha=alpha)

    made = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")  # on purpose
        for name, kernel in (("mm", mm), ("addmm", addmm)):
            made.impl(name, kernel, "CPU", with_keyset=True, allow_override=True)  # type: ignore[no-untyped-call]
    return made


def _gains(a_MK: Tensor, b_KN: Tensor) -> bool:
    """Whether the product is one that oneDNN makes faster, of matrices that it takes as they lie."""
    if a_MK.ndim != 2 or b_KN.ndim != 2:
        return False  # PyTorch's own error names what is wrong with them
    (M, K), N = a_MK.shape, b_KN.shape[1]
    return (
        M * K * N >= LEAST_WORK
        and min(M, K, N) >= LEAST_ROWS
        and a_MK.dtype == b_KN.dtype == torch.float32
        and len(b_KN) == K
        and a_MK.is_contiguous()
        and (b_KN.is_contiguous() or b_KN.t().is_contiguous())
    )
