"""Which library runs a teacher's layers, and with weights of how many bits: a table, and an override.

The first row that serves what is asked is taken; `teacher.backend` names another. What the row was taken for
is said when the teacher is loaded and kept in the receipt.
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
    name: str
    weights: tuple[str, ...]
    """Widths that it serves, as `teacher.weights` names them."""
    files: tuple[str, ...]
    """`folder` stands for a hub id too."""
    devices: tuple[str, ...]
    module: str | None
    """What it imports beyond the dependencies."""
    extra: str | None
    """The extra of potstill that installs it."""

    def lacks(self, weights: str, files: str, device: str) -> str | None:
        """What it does not serve, in words; None where it serves all."""
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
    backend: str
    weights: str
    reason: str

    def told(self) -> str:
        return f"{self.backend} runs it ({self.reason})"

    @property
    def is_full(self) -> bool:
        return self.weights == FULL


def choose(path: Path, weights: str, backend: str, device: torch.device) -> Choice:
    """The row of the table for a teacher.

    Args:
        path: folder or GGUF file.
        weights: full, int8, int4 or stored.
        backend: auto, or the name of a row.

    Raises:
        UserError: no row serves these three together, or the named one does not, or is not installed.
    """
    files = "gguf" if path.suffix == ".gguf" else "folder"
    asked = (weights, files, device.type)
    rows = [row for row in BACKENDS if backend in ("auto", row.name)]
    serving = [row for row in rows if row.lacks(*asked) is None]
    if not serving:
        advice = ADVICE.get((weights, files)) or ELSEWHERE
        if backend == "auto":
            raise UserError(
                f"teacher.weights: {weights} of a {_called(files)} on {device.type}: no backend serves it."
                f" {advice}"
            )
        if weights not in rows[0].weights:
            advice = f"Set teacher.weights: {rows[0].weights[0]}, or teacher.backend: auto."
        raise UserError(f"teacher.backend: {backend} does not serve {rows[0].lacks(*asked)}. {advice}")
    row = serving[0]
    if row.module is not None and importlib.util.find_spec(row.module) is None:
        others = [other.name for other in BACKENDS if other is not row and other.lacks(*asked) is None]
        instead = f", or set teacher.backend: {others[0]}" if others else ", or set teacher.weights: full"
        raise UserError(
            f"teacher.weights: {weights} is run by {row.module}, which is not installed."
            f" pip install 'potstill[{row.extra}]'{instead}."
        )
    why = "as teacher.backend says" if backend != "auto" else "the first of the table"
    return Choice(row.name, weights, f"{why}: {weights} weights of a {_called(files)} on {device.type}")


def _called(files: str) -> str:
    return {"folder": "folder of safetensors", "gguf": "GGUF file"}[files]
