"""The dtype of an exported folder: by default that of the files of the model that the student started from.

A run trains, evaluates and saves in float32, and its receipt has the figures of these weights. What is passed on has,
as the base's files, mostly bfloat16: half the bytes, and what other programs load by default.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from potstill.errors import UserError
from potstill.models.load import DTYPES
from potstill.models.portable import write_json

AUTO = "auto"
CHOICES = (AUTO, *DTYPES)


def settle_dtype(name: str, receipt: dict[str, Any]) -> str:
    """The dtype of that name; of `auto` the base's. Runs of earlier versions recorded none, and neither has a base of
    fewer bits: these stay as they were trained.

    Raises:
        UserError: another name.
    """
    if name not in CHOICES:
        raise UserError(f"--dtype: {name!r:.60} is not one of {', '.join(CHOICES)}. Give one of them.")
    trained = "float32"
    return name if name != AUTO else receipt.get("student", {}).get("base_dtype") or trained


def cast_folder(folder: Path, name: str) -> None:
    """Round every weight of a saved model, one file at a time.

    Raises:
        UserError: a weight is beyond what the dtype holds.
    """
    dtype = DTYPES[name]
    num_bytes = 0
    for file in sorted(folder.glob("*.safetensors")):
        tensors = {tensor: _cast(tensor, value, dtype) for tensor, value in load_file(file).items()}
        num_bytes += sum(value.nbytes for value in tensors.values())
        fresh = file.with_name(file.name + ".new")  # the old one is mapped into memory while it is read
        save_file(tensors, fresh, metadata={"format": "pt"})
        fresh.replace(file)
    for path, change in (("config.json", {"dtype": name}), ("model.safetensors.index.json", {})):
        if (folder / path).exists():
            content = json.loads((folder / path).read_text(encoding="utf-8"))
            if "metadata" in content and not change:
                content["metadata"]["total_size"] = num_bytes
            write_json(folder / path, content | change)


def rounded(hf: Any, name: str) -> Any:
    """A copy of the Transformers model that computes in float32 with weights as `cast_folder` writes them."""
    hf = copy.deepcopy(hf)
    with torch.no_grad():
        for value in hf.state_dict().values():
            if value.is_floating_point():
                value.copy_(value.to(DTYPES[name]))
    return hf


def _cast(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    if not value.is_floating_point():
        return value
    cast = value.to(dtype)
    if not bool(torch.isfinite(cast).all()):
        largest = float(value.abs().max())
        raise UserError(
            f"{name}: {largest:.6g} is more than {str(dtype).removeprefix('torch.')} holds,"
            f" {torch.finfo(dtype).max:.6g}. Give --dtype bfloat16 or float32."
        )
    return cast
