"""Which library runs a teacher's layers, for weights of how many bits: a table of backends, and an override.

The first backend that serves weights, file and device is chosen, unless `teacher.backend` names one. The choice
and its reason are reported when the teacher is loaded, and recorded in the receipt.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch

from potstill.errors import UserError

FULL = "full"


@dataclass(frozen=True)
class Backend:
    """A row of the table: a library, and what it serves."""

    name: str
    weights: tuple[str, ...]
    """Values of `teacher.weights` that it serves."""
    files: tuple[str, ...]
    """`folder`, which includes hub ids, or `gguf`."""
    devices: tuple[str, ...]
    module: str | None
    """The module that it needs; None for a dependency of potstill."""
    extra: str | None
    """The extra of potstill that installs the module."""

    def lacks(self, weights: str, files: str, device: str) -> str | None:
        """The first of the three that it does not serve, for a message; None where it serves all."""
        if weights not in self.weights:
            return f"teacher.weights: {weights}; it serves {' and '.join(self.weights)}"
        if files not in self.files:
            return f"a {_called(files)}; it reads a {' or a '.join(map(_called, self.files))}"
        if device not in self.devices:
            return f"the device {device}; it runs on {' and '.join(self.devices)}"
        return None


BACKENDS = (
    Backend("transformers", (FULL,), ("folder", "gguf"), ("cpu", "cuda"), None, None),
    Backend("torchao", ("int8",), ("folder",), ("cpu", "cuda"), "torchao", "quantised"),
    Backend("bitsandbytes", ("int4", "int8"), ("folder",), ("cpu", "cuda"), "bitsandbytes", "quantised"),
    Backend("llama_cpp", ("stored",), ("gguf",), ("cpu",), "xllamacpp", "gguf"),
)
ADVICE = {
    ("stored", "folder"): "Set teacher.weights: int8 or int4; stored is for a GGUF file.",
    ("int8", "gguf"): "Set teacher.weights: stored, or name the folder of its full weights.",
    ("int4", "gguf"): "Set teacher.weights: stored, or name the folder of its full weights.",
}
ELSEWHERE = "Set train.device: cpu, or another teacher.weights or .backend."


@dataclass(frozen=True)
class Choice:
    """The backend of a teacher, with the reason; its fields are the receipt's."""

    backend: str
    weights: str
    reason: str

    @property
    def is_full(self) -> bool:
        return self.weights == FULL


def choose(path: Path, weights: str, backend: str, device: torch.device) -> Choice:
    """Choose the backend of a teacher.

    Args:
        path: folder or GGUF file.
        weights: full, int8, int4 or stored.
        backend: auto, or the name of a backend.
        device: where it will run.

    Raises:
        UserError: no backend serves this combination, or the named one does not; or its library is not installed.
    """
    files = "gguf" if path.suffix == ".gguf" else "folder"
    request = (weights, files, device.type)
    rows = [row for row in BACKENDS if backend in ("auto", row.name)]
    serving = [row for row in rows if row.lacks(*request) is None]
    if not serving:
        advice = ADVICE.get((weights, files)) or ELSEWHERE
        if backend == "auto":
            raise UserError(
                f"teacher.weights: {weights} of a {_called(files)} on {device.type}: no backend serves it."
                f" {advice}"
            )
        if weights not in rows[0].weights:
            advice = f"Set teacher.weights: {rows[0].weights[0]}, or teacher.backend: auto."
        raise UserError(f"teacher.backend: {backend} does not serve {rows[0].lacks(*request)}. {advice}")
    row = serving[0]
    # The first is not passed over where its library is missing: what is installed must not change results.
    if row.module is not None and importlib.util.find_spec(row.module) is None:
        others = [other.name for other in BACKENDS if other is not row and other.lacks(*request) is None]
        instead = f", or set teacher.backend: {others[0]}" if others else ", or set teacher.weights: full"
        raise UserError(
            f"teacher.weights: {weights} needs {row.module}, which is not installed."
            f" Run pip install 'potstill[{row.extra}]'{instead}."
        )
    reason = "as teacher.backend says" if backend != "auto" else "the first of the table"
    return Choice(row.name, weights, f"{reason}: {weights} weights of a {_called(files)} on {device.type}")


def fewer_bits(path: Path, device_type: str) -> str | None:
    """The first of int8 and stored that a backend serves for these files there; None where none does."""
    files = "gguf" if path.suffix == ".gguf" else "folder"
    served = (
        weights
        for weights in ("int8", "stored")
        if any(row.lacks(weights, files, device_type) is None for row in BACKENDS)
    )
    return next(served, None)


def _called(files: str) -> str:
    return {"folder": "folder of safetensors", "gguf": "GGUF file"}[files]
