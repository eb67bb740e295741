"""`train.compile`: the bodies of both models through torch.compile, before the first step.

What runs is the model's own code, in fewer and larger kernels; results differ by rounding. Each shape is
compiled by itself, so that a kernel does not depend on which shapes came before it. Saving, generation and
the probes use the model as it is. A missing compiler is an error before the first step, not in it.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import shutil
from typing import Any

import torch

from potstill.errors import UserError
from potstill.models.causal_lm import CausalLM

COMPILERS = ("g++", "clang++")


def compile_body(model: CausalLM, backend: str = "inductor") -> None:
    """Set `model.compiled_body`. Other backends than inductor are for tests."""
    # Teacher and student may share their code: without this option, which not every PyTorch has, the shapes
    # of one would count towards the other's limit of recompilations.
    options: dict[str, Any] = {"isolate_recompiles": True}
    known = inspect.signature(torch.compile).parameters
    options = {name: value for name, value in options.items() if name in known}
    compiled = torch.compile(model.body, dynamic=False, backend=backend, **options)
    model.compiled_body = lambda **inputs: compiled(**inputs)  # type: ignore[no-untyped-call]


def require_compiler(device: torch.device) -> None:
    """UserError where inductor has nothing to compile with: Triton on CUDA, a C++ compiler on the CPU."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise UserError(
                "train.compile: on CUDA PyTorch compiles with Triton, which is not installed. Install triton,"
                " or set it to false."
            )
        return
    configured = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ([configured] if configured else COMPILERS)):
        raise UserError(
            f"train.compile: on the CPU PyTorch compiles with a C++ compiler, and there is no"
            f" {configured or ' or '.join(COMPILERS)}. Install one, or set it to false."
        )
