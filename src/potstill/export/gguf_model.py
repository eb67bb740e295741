"""A student as one GGUF file: the tensors under llama.cpp's names, in its order and types, and its metadata.

Rows that a block type cannot hold get one that can, and the record lists them. K-quants are llama.cpp's own
quantiser's.
"""

from __future__ import annotations

import copy
import ctypes
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType
from torch import Tensor

from potstill.errors import UserError
from potstill.export.gguf_architectures import architecture_of, refuse, write_shape
from potstill.export.gguf_tokenizer import TokenList
from potstill.models.causal_lm import CausalLM
from potstill.models.gguf_config import head_dim
from potstill.models.gguf_files import check_gguf
from potstill.models.gguf_rope import FREQS, LONG, SHORT

Type = GGMLQuantizationType
FILES = {
    "f32": (Type.F32, LlamaFileType.ALL_F32, "F32"),
    "f16": (Type.F16, LlamaFileType.MOSTLY_F16, "F16"),
    "bf16": (Type.BF16, LlamaFileType.MOSTLY_BF16, "BF16"),
    "q8_0": (Type.Q8_0, LlamaFileType.MOSTLY_Q8_0, "Q8_0"),
    "q4_0": (Type.Q4_0, LlamaFileType.MOSTLY_Q4_0, "Q4_0"),
    "q4_k": (Type.Q4_K, LlamaFileType.MOSTLY_Q4_K_M, "Q4_K_M"),
    "q6_k": (Type.Q6_K, LlamaFileType.MOSTLY_Q6_K, "Q6_K"),
}
"""Type of the matrices, file type in the metadata, and the part of the file's name."""
K_QUANTS = (Type.Q4_K, Type.Q6_K)
FALLBACK = {Type.Q4_K: Type.Q8_0, Type.Q6_K: Type.Q8_0}
"""For rows that are not whole blocks of 256. llama.cpp's own quantiser takes Q5_0 for Q4_K, which loses more:
0.062 nats against 0.023 on the demo's student, whose rows are 576 wide."""


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor as the file holds it, its rows in the file's order."""

    name: str
    hf_name: str
    """Transformers' name; empty for a tensor that it computes."""
    tensor: Tensor
    type: GGMLQuantizationType
    preferred: GGMLQuantizationType
    """What it would have been, had its rows been whole blocks of that type."""
    num_heads: int | None = None
    """Of rows that are reordered within each head; None where the order is Transformers'."""
    offset: float = 0.0
    """Of the file's numbers from Transformers'."""
    half: int | None = None
    """Which half of Transformers' tensor it is, of each expert's rows; None: the whole."""

    @property
    def num_bytes(self) -> int:
        block, block_bytes = GGML_QUANT_SIZES[self.type]
        return self.tensor.numel() // int(block) * int(block_bytes)


def write_gguf(
    model: CausalLM, tokens: TokenList, path: Path, quantize: str, name: str, license_id: str | None
) -> dict[str, Any]:
    """Write the file and read its header back; returns the file's part of the export record.

    Raises:
        UserError: a number that is not finite, or too large for the type.
    """
    config = model.hf.config
    tensors = list(_file_tensors(model, quantize))
    writer = GGUFWriter(path, architecture_of(config).name)
    try:
        _write_metadata(
            writer,
            model.hf,
            quantize,
            tokens.model_name(name),
            license_id,
            sum(each.tensor.numel() for each in tensors),
        )
        tokens.write(writer)
        for each in tensors:
            writer.add_tensor_info(
                each.name, tuple(each.tensor.shape), np.dtype(np.float32), each.num_bytes, raw_dtype=each.type
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for each in tensors:
            writer.write_tensor_data(quantised(each.name, each.tensor, each.type))
        writer.flush()
    finally:
        writer.close()
    info = check_gguf(path)
    types = [type_ for type_, _ in info.tensors.values()]
    return {
        "architecture": info.architecture,
        "pre_tokenizer": tokens.pre,
        "license": license_id,
        "tensor_types": {type_: types.count(type_) for type_ in sorted(set(types))},
        "other_types": [
            {
                "tensor": each.name,
                "wanted": each.preferred.name,
                "used": each.type.name,
                "row": each.tensor.shape[-1],
            }
            for each in tensors
            if each.type != each.preferred
        ],
        "remarks": tokens.remarks,
    }


def require_quantiser(model: CausalLM, quantize: list[str]) -> None:
    """Refuse K-quants without llama.cpp's quantiser, before anything is written."""
    if any(each.type in K_QUANTS for each_type in quantize for each in _file_tensors(model, each_type)):
        _llama_cpp_quantiser()


def tensor_types(model: CausalLM, quantize: str) -> dict[str, GGMLQuantizationType]:
    """The type of each parameter in the file, by Transformers' names."""
    return {each.hf_name: each.type for each in _file_tensors(model, quantize) if each.hf_name}


def _write_metadata(
    writer: GGUFWriter, hf: Any, quantize: str, name: str, license_id: str | None, num_weights: int
) -> None:
    writer.add_type("model")
    writer.add_name(name)
    writer.add_size_label(gguf.size_label(num_weights, num_weights, 0, 0))
    if license_id is not None:
        writer.add_license(license_id)
    writer.add_file_type(FILES[quantize][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    write_shape(writer, hf)


def _file_tensors(model: CausalLM, quantize: str) -> Iterator[FileTensor]:
    """Every tensor once: a tied head has no `output.weight`, and llama.cpp uses the embedding."""
    config = model.hf.config
    known, layers = architecture_of(config), config.num_hidden_layers
    names = gguf.get_tensor_name_map(known.number, layers)
    parameters = dict(model.hf.named_parameters())
    tied = "lm_head.weight" not in parameters
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for factors, tensor in _rope_factors(model).items():
        yield FileTensor(factors, "", tensor, Type.F32, Type.F32)
    for hf_name, half, tensor in _halves(parameters):
        name = _name(names, hf_name, half)
        part = (name or "").removesuffix(".bias").split(".")[-1]
        if name is None or (name.endswith(".bias") and part not in known.biases):
            refuse(f"{model.name}: {config.model_type}", f"tensor {hf_name} has no name in a GGUF file")
        num_heads = heads.get(name.split(".")[-2]) if known.pairs else None
        if num_heads is not None:
            tensor = _interleaved(tensor, num_heads, 2)
        offset = known.norm_offset if name.endswith("norm.weight") else 0.0
        if offset:
            tensor = tensor + offset
        preferred = _preferred_type(name, tensor, quantize, tied, layers)
        row_type = _type_for_row(tensor.shape[-1], preferred)
        yield FileTensor(name, hf_name, tensor, row_type, preferred, num_heads, offset, half)


def _halves(parameters: dict[str, Tensor]) -> Iterator[tuple[str, int | None, Tensor]]:
    """The parameters; gates and up projections of experts, which Transformers has in one tensor, apart."""
    for name, parameter in parameters.items():
        if name.endswith("experts.gate_up_proj"):
            yield from (
                (name, half, tensor) for half, tensor in enumerate(parameter.detach().chunk(2, dim=1))
            )
        else:
            yield name, None, parameter.detach()


def _name(names: gguf.TensorNameMap, hf_name: str, half: int | None) -> str | None:
    if half is not None:
        return f"blk.{hf_name.split('.')[2]}.{('ffn_gate_exps', 'ffn_up_exps')[half]}.weight"
    name: str | None = names.get_name(hf_name, (".weight", ".bias"))
    return f"{name}.weight" if name and name.endswith("_exps") else name


def _interleaved(tensor: Tensor, num_heads: int, parts: int) -> Tensor:
    """The rows of each head cut into `parts` runs of equal length, and these interleaved.

    Two runs turn Transformers' halves into the pairs that llama.cpp's llama rotates together; as many runs as
    half a head has rows turn them back.
    """
    run_length = tensor.shape[0] // num_heads // parts
    return tensor.reshape(num_heads, parts, run_length, *tensor.shape[1:]).transpose(1, 2).flatten(0, 2)


def as_written(model: CausalLM, path: Path, quantize: str) -> Any:
    """The Transformers model with the file's own weights: what the rounding of its types alone changes."""
    hf = copy.deepcopy(model.hf)
    parameters = dict(hf.named_parameters())
    written = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for each in _file_tensors(model, quantize):
        if each.hf_name:
            stored = written[each.name]
            array = gguf.quants.dequantize(stored.data, stored.tensor_type)
            tensor = torch.from_numpy(np.array(array, dtype=np.float32)).reshape(each.tensor.shape)
            if each.num_heads is not None:
                tensor = _interleaved(tensor, each.num_heads, tensor.shape[0] // each.num_heads // 2)
            target = parameters[each.hf_name].data
            target = target if each.half is None else target.chunk(2, dim=1)[each.half]
            target.copy_(tensor - each.offset)
    return hf


def _rope_factors(model: CausalLM) -> dict[str, Tensor]:
    """What each frequency is divided by: of LongRoPE as the config has it, of llama3's rule as the model has it."""
    config = model.hf.config
    rope = config.rope_parameters or {}
    if rope.get("rope_type") == "longrope":
        return {LONG: torch.tensor(rope["long_factor"]), SHORT: torch.tensor(rope["short_factor"])}
    if rope.get("rope_type") != "llama3":
        return {}
    rotary = model.hf.model.rotary_emb
    if rotary.attention_scaling != 1.0:
        refuse(f"{model.name}: llama", f"its rope scales attention by {rotary.attention_scaling}")
    width = head_dim(config)
    plain = rope["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    return {FREQS: (plain / rotary.inv_freq.double().cpu()).float()}


def _preferred_type(
    name: str, tensor: Tensor, quantize: str, tied: bool, layers: int
) -> GGMLQuantizationType:
    """llama.cpp's mixture of types: the head, and half of the value and down projections, get more bits."""
    if tensor.ndim == 1 or name.endswith("ffn_gate_inp.weight"):
        return Type.F32
    wanted = FILES[quantize][0]
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        # llama.cpp has Q6_K here for Q4_0 too, but Q4_0 must not need more than the gguf package.
        return {Type.Q4_K: Type.Q6_K, Type.Q4_0: Type.Q8_0}.get(wanted, wanted)
    if wanted is Type.Q4_K and name.endswith((".attn_v.weight", ".ffn_down.weight", ".ffn_down_exps.weight")):
        layer, eighth = int(name.split(".")[1]), layers // 8
        if layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2:
            return Type.Q6_K
    return wanted


def _type_for_row(row: int, preferred: GGMLQuantizationType) -> GGMLQuantizationType:
    for each in (preferred, FALLBACK.get(preferred, Type.F16), Type.F16):
        if row % GGML_QUANT_SIZES[each][0] == 0:
            return each
    raise AssertionError("F16 holds rows of any length")


def quantised(name: str, tensor: Tensor, to: GGMLQuantizationType) -> np.ndarray[Any, Any]:
    """The tensor in that type; the bytes of whole blocks where it is a block type."""
    array = np.ascontiguousarray(tensor.float().cpu().numpy())
    if not np.isfinite(array).all():
        refuse(name, f"{int((~np.isfinite(array)).sum())} of its {array.size} numbers are not finite")
    largest = float(np.abs(array).max(initial=0.0))
    if to is Type.F16 and largest > float(np.finfo(np.float16).max):
        raise UserError(f"{name}: {largest:.6g} is more than F16 holds, 65504. Use bf16 or f32.")
    if to in K_QUANTS:
        return _by_llama_cpp(array, to)
    blocks: np.ndarray[Any, Any] = gguf.quants.quantize(array, to)
    return blocks


def _by_llama_cpp(array: np.ndarray[Any, Any], to: GGMLQuantizationType) -> np.ndarray[Any, Any]:
    block, block_bytes = GGML_QUANT_SIZES[to]
    row = array.shape[-1]
    num_rows = array.size // row
    out = np.empty((num_rows, row // block * block_bytes), dtype=np.uint8)
    written = _llama_cpp_quantiser()(int(to), array.ctypes.data, out.ctypes.data, 0, num_rows, row, None)
    if written != out.nbytes:
        raise AssertionError(f"llama.cpp's quantiser wrote {written} bytes, not {out.nbytes}")
    return out


def _llama_cpp_quantiser() -> Any:
    """`ggml_quantize_chunk` of the shared library in xllamacpp's wheel.

    Its arguments are type, source, destination, first row, rows, columns and importance matrix; it returns
    the number of bytes written.
    """
    todo = "Q4_K and Q6_K need llama.cpp's quantiser: pip install 'potstill[gguf]'. Or use q4_0 or q8_0."
    spec = importlib.util.find_spec("xllamacpp")
    places = map(Path, (spec.submodule_search_locations or ()) if spec else ())
    libraries = [file for place in places for file in sorted(place.glob("xllamacpp*.so"))]
    if not libraries:
        raise UserError(f"xllamacpp: not installed. {todo}")
    try:
        quantize_chunk = ctypes.CDLL(os.fspath(libraries[0])).ggml_quantize_chunk
    except (OSError, AttributeError) as error:
        raise UserError(f"{libraries[0]}: has no quantiser: {error}. {todo}") from error
    int64, pointer = ctypes.c_int64, ctypes.c_void_p
    quantize_chunk.restype = ctypes.c_size_t
    quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, int64, int64, int64, pointer]
    return quantize_chunk
