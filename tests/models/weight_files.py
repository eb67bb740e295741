"""Weight files for tests of those who read them: good ones by the libraries, wrong ones byte by byte."""

from __future__ import annotations

import json
import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from potstill.errors import UserError

MIB = 1 << 20

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}

ARRAYS = {
    "embed.weight": np.arange(24, dtype=np.float32).reshape(6, 4),
    "norm.weight": np.ones(4, dtype=np.float16),
    "steps": np.array(7, dtype=np.int64),
}


def refusal(check: Callable[[Path], Any], path: Path) -> str:
    with pytest.raises(UserError) as caught:
        check(path)
    text = str(caught.value)
    assert text.startswith(str(path.parent)), text
    assert "\n" not in text and text.isprintable() and len(text) < 1000, text
    return text


def make_safetensors(path: Path) -> Path:
    save_file(ARRAYS, path, metadata={"format": "pt"})
    return path


def with_header(path: Path, header: Any, data: bytes = b"", num_bytes: int | None = None) -> Path:
    """A safetensors file by its written layout, not by the library: so that it can be wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if num_bytes is None else num_bytes) + text + data)
    return path


def make_gguf(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_token_list(["<eos>", "a", "bé"])
    writer.add_array("tokenizer.ggml.token_type", [1, 1, 3])
    writer.add_tensor("token_embd.weight", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("output_norm.weight", np.ones(5, dtype=np.float32))
    packed = gguf.quants.quantize(np.ones((2, 64), dtype=np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.ffn_up.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def make_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    make_safetensors(folder / "model.safetensors")
    return folder


def make_sharded(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    weight_map = {}
    for number, (name, array) in enumerate(ARRAYS.items(), start=1):
        file = f"model-{number:05}-of-00003.safetensors"
        save_file({name: array}, folder / file)
        weight_map[name] = file
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


def peak_bytes(check: Callable[[], Any]) -> int:
    tracemalloc.start()
    try:
        check()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def flipped(whole: bytes, header_bytes: int, seed: int) -> list[bytes]:
    draw = random.Random(seed)
    copies = []
    for bit in draw.sample(range(8 * header_bytes), 300):
        copy = bytearray(whole)
        copy[bit // 8] ^= 1 << bit % 8
        copies.append(bytes(copy))
    return copies
