"""A model's files, verified before any library opens them: a Hugging Face folder or a GGUF file.

Refused by name: what is missing, damaged or contradicts itself, and pickles, which can run code. Called by
`load` before Transformers, and for shapes and hashes alone.
"""

from __future__ import annotations

import hashlib
import math
import os
import reprlib
from pathlib import Path
from typing import Any

from potstill.io.hashing import file_sha256
from potstill.io.safe_open import FETCH_AGAIN, printable_name, read_object, refuse, require_plain
from potstill.models.gguf_files import MODEL_IS, check_gguf, require_layers
from potstill.models.safetensors_files import Shape, check_safetensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
NO_PICKLE = "a pickle can run code; convert to safetensors"
# Beside config.json; Transformers takes a damaged one of some of them for a missing one.
SETTINGS = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
INTEGERS = {"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"}


def check_model_files(source: Path) -> None:
    """Refuse a folder or GGUF file that is not a whole model, by the file at fault."""
    if os.path.isdir(source):
        require_plain(source, FETCH_AGAIN)
        if "config.json" not in (names := _names(source)):
            needs = f"a Hugging Face folder needs config.json; found: {_listed(names)}"
            refuse(source, f"not a model: {needs}", MODEL_IS)
        config = read_object(source / "config.json", FETCH_AGAIN)
        if not (config.get("model_type") or config.get("architectures")):
            what = "neither model_type nor architectures is set"
            refuse(source / "config.json", what, "Take the config that came with the model.")
        for name in SETTINGS:
            if os.path.lexists(source / name):
                read_object(source / name, FETCH_AGAIN)
        _require_floats(source, config)
    if not tensor_shapes(source):
        refuse(source, "its weight files hold 0 tensors")
    if not os.path.isdir(source):
        if source.suffix != ".gguf":
            refuse(source, f"a GGUF file whose name ends in '{source.suffix}'", "Let it end in .gguf.")
        require_layers(source)


def tensor_shapes(source: Path) -> dict[str, Shape]:
    """Shape of every tensor in PyTorch's order, from the verified headers of a folder or a GGUF file."""
    if not os.path.isdir(source):
        return {name: shape[::-1] for name, (_, shape) in check_gguf(source).tensors.items()}
    shapes: dict[str, Shape] = {}
    file_of: dict[str, str] = {}
    for file, indexed in _weight_files(source).items():
        tensors = check_safetensors(source / file)
        if missing := sorted(indexed - tensors.keys()):
            count = f"{len(missing)} of {len(indexed)} tensors that {INDEX} says it has are missing"
            refuse(source / file, f"{count}, first {printable_name(missing[0])}")
        for name, (_, shape) in tensors.items():
            if name in file_of:
                refuse(source, f"tensor {printable_name(name)} is both in {file_of[name]} and in {file}")
            file_of[name], shapes[name] = file, shape
    return shapes


def dtype_of_files(source: Path) -> str | None:
    """`float32`, `bfloat16` or `float16`: what most weights of a folder or a GGUF file have; None for another type."""
    return FLOATS.get(type_of_weights(source))


def type_of_weights(source: Path) -> str:
    """The files' own name for the type of most weights, such as BF16 or Q4_0."""
    count = weights_by_type(source)
    return max(count, key=count.__getitem__, default="")


def only_dtype_of_files(source: Path) -> str | None:
    """As `dtype_of_files`, where all weights have it; None where they have several types, or another one."""
    types = list(weights_by_type(source))
    return FLOATS.get(types[0]) if len(types) == 1 else None


def weights_by_type(source: Path) -> dict[str, int]:
    """How many weights of a folder or a GGUF file there are of each type, by the files' own name for it."""
    count: dict[str, int] = {}
    if os.path.isdir(source):
        headers = [check_safetensors(source / file) for file in _weight_files(source)]
    else:
        headers = [check_gguf(source).tensors]
    for type_, shape in (tensor for header in headers for tensor in header.values()):
        count[type_] = count.get(type_, 0) + math.prod(shape)
    return count


def folder_sha256(source: Path) -> str:
    """A file's sha256; for a folder, that of the lines `name sha256` of its config and weights, sorted."""
    if not os.path.isdir(source):
        return file_sha256(source)
    names = sorted(["config.json", *_weight_files(source)])
    lines = "".join(f"{name} {file_sha256(source / name)}\n" for name in names)
    return hashlib.sha256(lines.encode()).hexdigest()


def bytes_of_weights(source: Path) -> int:
    """Of a GGUF file, or of the weight files of a folder."""
    files = [source / name for name in _weight_files(source)] if os.path.isdir(source) else [source]
    return sum(file.stat().st_size for file in files)


def _require_floats(folder: Path, config: dict[str, Any]) -> None:
    """Integers are weights only where the config says how they were quantised: Transformers casts others."""
    for file in _weight_files(folder) if "quantization_config" not in config else ():
        for name, (dtype, _) in check_safetensors(folder / file).items():
            if name.endswith(".weight") and dtype in INTEGERS:
                refuse(folder / file, f"tensor {printable_name(name)} is of integers ({dtype})")


def _weight_files(folder: Path) -> dict[str, set[str]]:
    """File name -> tensors that the index lists for it; a single file wins, as in Transformers."""
    names = _names(folder)
    if SINGLE in names:
        return {SINGLE: set()}
    if INDEX not in names:
        pickles = [name for name in names if name.endswith(PICKLES)]
        what = f"only {pickles[0]}: {NO_PICKLE}" if pickles else f"no weights; found: {_listed(names)}"
        refuse(folder, what, f"Needed: {SINGLE}, or {INDEX} and its shards.")
    index = folder / INDEX
    weight_map = read_object(index, FETCH_AGAIN).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        refuse(index, "weight_map is not a table of tensor name to file")
    shards: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        # A path such as ../x would open a file that is not part of the model.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            where = f"tensor {printable_name(name)} is listed in {reprlib.repr(file)}"
            refuse(index, f"{where}, not the name of a .safetensors file beside it")
        shards.setdefault(file, set()).add(name)
    if missing := sorted(shards.keys() - set(names)):
        count = f"{len(missing)} of {len(shards)} shards"
        refuse(folder, f"{count} named by {INDEX} are missing, first {printable_name(missing[0])}")
    return dict(sorted(shards.items()))


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        refuse(folder, f"cannot be read: {error.strerror}", "Change its permissions or copy it.")


def _listed(names: list[str]) -> str:
    more = [f"and {len(names) - 8} more"] if len(names) > 8 else []
    return ", ".join([*map(printable_name, names[:8]), *more]) or "nothing"
