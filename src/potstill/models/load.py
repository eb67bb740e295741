"""Load a checkpoint completely or refuse it: a Hugging Face folder, a hub id, or a GGUF file, as a
Transformers model.

Transformers fills what a checkpoint lacks with random numbers and a warning, and drops what its config does
not mention. Both are refused here, with the tensor named. Files are verified before a library opens them;
code that comes with a checkpoint is never run.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.initialization import no_init_weights

from potstill.errors import UserError, one_line
from potstill.io.gguf_library import quick_gguf
from potstill.io.safe_open import opened, read_object, require_plain
from potstill.io.silence import quiet_transformers
from potstill.models.causal_lm import CausalLM
from potstill.models.gguf_config import complete, require_known_tensors
from potstill.models.gguf_files import require_layers
from potstill.models.hub import local_copy
from potstill.models.model_files import check_model_files, tensor_shapes
from potstill.models.probes import require_finite, settle_ties
from potstill.models.quantization import keep_layout, parts_of
from potstill.models.text_half import has_more_than_text, load_text_half, text_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "token_embd.weight",
    "lm_head.weight",
    "transformer.word_embeddings.weight",  # Falcon, BLOOM
    "backbone.embeddings.weight",  # Mamba
)
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
MAX_LAYERS = 1024
"""A bound on configs, which may be damaged; the deepest models in use have fewer than 200."""
WIDTHS = ("vocab_size", "hidden_size", "n_embd", "d_model")
"""Transformers makes a model without weights of a 0."""
GENERATION = "generation_config.json"
ANOTHER_CONFIG = "Give a config.json that Transformers knows."
MAX_SIZE_RATIO = 2
"""Of a config's weights to the checkpoint's; below 1 where a file has tied weights twice."""


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one; an explicit device is used or refused, never replaced by another.

    With several processes on a machine, `auto` and `cuda` are a device for each.

    Raises:
        UserError: no device of that name on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and (local := os.environ.get("LOCAL_RANK")) is not None:
        name = f"cuda:{local}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device: {name} is not one of auto, cpu, cuda, cuda:N.") from error
    count = torch.cuda.device_count()
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= count):
        raise UserError(
            f"device: is {name}, and this machine has {count} CUDA device(s). Set device: cpu, or run on a"
            " machine that has it."
        )
    return device


def choose_dtype(name: str | torch.dtype) -> torch.dtype:
    """The dtype of that name; UserError for one that models are not loaded in."""
    dtype = DTYPES.get(name) if isinstance(name, str) else name
    if dtype is None or dtype not in DTYPES.values():
        raise UserError(f"dtype: {name} is not one of {', '.join(DTYPES)}.")
    return dtype


def vocab_size_of(path: Path) -> int:
    """Rows of the embedding, from the headers of the checkpoint alone; UserError where it has none."""
    sizes = [shape[0] for name, shape in tensor_shapes(path).items() if name.endswith(EMBEDDINGS)]
    if not sizes:
        raise UserError(f"{path}: no token embedding among its tensors. A causal language model is needed.")
    return max(sizes)


def load_config(source: str | Path) -> Any:
    """The Transformers config of a config.json, of a folder with one, of a hub id, or of a GGUF file.

    That of a GGUF file has what Transformers leaves out of it: see `gguf_config.complete`; of a multimodal model it
    is that of its text half.
    """
    path = local_copy(source)
    settings = _check_config(path)
    is_gguf = path.suffix == ".gguf"
    place, options = (path.parent, {"gguf_file": path.name}) if is_gguf else (path, {})
    try:
        with quiet_transformers(), quick_gguf():
            config = transformers.AutoConfig.from_pretrained(place, trust_remote_code=False, **options)
            config = complete(path, config) if is_gguf else text_config(config)
    except UserError:
        raise
    except Exception as error:  # Transformers raises anything over a damaged config
        why = _why(error, settings)
        raise UserError(f"{path}: not a model config: {why} {ANOTHER_CONFIG}") from error
    _require_ends(path, config, _text_config_of(path, config).vocab_size)
    return config


def no_model_of(config: Any, error: Exception) -> str:
    """What Transformers raised over a config of which it could make no causal LM, on one line."""
    try:
        settings = config.to_diff_dict()
    except Exception:  # over a damaged config, that too
        settings = {}
    return f"no causal LM can be made of its config: {_why(error, settings)}"


def _why(error: BaseException, settings: Mapping[str, Any]) -> str:
    """A library's words; of a division by zero also the settings that are 0, which it does not name."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ZeroDivisionError):
        cause = cause.__cause__ or cause.__context__
    zeros = [f"{name} is 0" for name, value in settings.items() if type(value) is int and value == 0]
    zeros = [] if cause is None else sorted(zero for zero in zeros if "_id " not in zero)  # an id may be 0
    return ": ".join([*([", ".join(zeros)] if zeros else []), one_line(error)])


def _text_config_of(where: str | Path, config: Any) -> Any:
    """The config of the text model. Refused: a text model's config with a section that would be taken for it."""
    try:
        text = config.get_text_config()
    except ValueError as error:  # it has several
        raise UserError(f"{where}: not a model config: {one_line(error)} {ANOTHER_CONFIG}") from error
    if not isinstance(text, transformers.PretrainedConfig):
        section = next(name for name, value in vars(config).items() if value is text)
        raise UserError(
            f"{where}: not a model config: {section} is in a config of {config.model_type}, which has none."
            " Take the config that came with the model."
        )
    if type(ids := getattr(text, "vocab_size", None)) is not int:
        what = f"vocab_size of {config.model_type} is {ids!r:.60}, no number of tokens"
        raise UserError(f"{where}: not a model config: {what}. A causal language model is needed.")
    return text


def _require_ends(path: Path, config: Any, ids: int) -> None:
    """UserError for an end of text that the model has no logits for: it would never stop."""
    ends = [(path.name if path.is_file() else "config.json", getattr(config, "eos_token_id", None))]
    if (path / GENERATION).is_file():
        ends.append((GENERATION, read_object(path / GENERATION, ANOTHER_CONFIG).get("eos_token_id")))
    for file, value in ends:
        for end in value if isinstance(value, list) else [value]:
            if end is not None and not (type(end) is int and 0 <= end < ids):
                raise UserError(
                    f"{path}: {file}: eos_token_id is {end!r:.60}, and the model has ids from 0 to"
                    f" {ids - 1}: it would never stop. Set it to the id of the token that ends a text."
                )


def num_weights(config: Any) -> int:
    """Number of weights of a model of this config, without allocating one.

    Raises:
        Exception: whatever Transformers raises over a config that fits no causal LM.
    """
    return sum(parameter.numel() for parameter in on_meta(config).parameters())


def shapes_of(config: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a model of this config, by name, without allocating one; see `num_weights`."""
    return {name: tuple(tensor.shape) for name, tensor in on_meta(config).state_dict().items()}


def on_meta(config: Any) -> Any:
    """A model of this config without numbers; see `num_weights`."""
    with quiet_transformers(), torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _check_config(path: Path) -> dict[str, Any]:
    """Refuse numbers that would make Transformers build endless layers, or NaN, before it reads them.

    Returns:
        The settings; none of a GGUF file.
    """
    advice = ANOTHER_CONFIG
    if path.suffix == ".gguf":
        require_layers(path)
        return {}
    if os.path.isdir(path):
        require_plain(path, "Remove it.")
        path = path / "config.json"
    with opened(path, "a config", advice) as file:
        if file.read(4) == b"GGUF":
            raise UserError(f"{path}: a GGUF file. Let its name end in .gguf.")
    config = read_object(path, advice)
    for inside in (config, config.get("text_config")):
        for name, value in inside.items() if isinstance(inside, dict) else ():
            if name in LAYERS and value is not None and not (type(value) is int and 1 <= value <= MAX_LAYERS):
                raise UserError(
                    f"{path}: not a model config: {name} is {value!r:.60}, not from 1 to {MAX_LAYERS}."
                    f" {advice}"
                )
            if name in WIDTHS and type(value) is int and value < 1:
                raise UserError(f"{path}: not a model config: {name} is {value}, not 1 or more. {advice}")
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{path}: not a model config: {name} is {value}, no number. {advice}")
    return config


def load_causal_lm(
    source: str | Path,
    *,
    config: Any = None,
    own_config: Any = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quantisation: Any = None,
) -> CausalLM:
    """A model with every tensor of the checkpoint and no other; its two halves are probed. Of a multimodal
    checkpoint the text half: see `text_half`.

    Args:
        source: a folder, a hub id or a GGUF file.
        config: what the checkpoint must be: a config, its dictionary, or a path. Default: its own.
        own_config: the checkpoint's config, where it has been read already.
        dtype: of the weights in memory.
        quantisation: a Transformers quantisation config for the matrices of the layers.

    Raises:
        UserError: files missing, truncated or not a model; a tensor that only one of config and checkpoint
            has, or that has another shape in each.
    """
    path = local_copy(source)
    # From cheap to dear, and each before a library would act on it: files before any is parsed, shapes before
    # weights are allocated. Only then is the model loaded, and what Transformers filled or dropped refused.
    check_model_files(path)
    own_config = load_config(path) if own_config is None else copy.deepcopy(own_config)
    config = own_config if config is None else _as_config(config, own_config)
    _require_same_vocabulary(path, config)
    _require_same_size(path, config)
    try:
        with quiet_transformers(), quick_gguf():
            options: dict[str, Any] = (
                {"gguf_file": path.name} if path.suffix == ".gguf" else {"use_safetensors": True}
            )
            if quantisation is not None:  # packed on the device where it stays: packed matrices do not move
                options |= {"quantization_config": quantisation, "device_map": {"": device}}
            options |= {"dtype": dtype, "output_loading_info": True}
            options["ignore_mismatched_sizes"] = True  # so that the report names them, for `_require_whole`
            if has_more_than_text(path, config):
                hf, report, left_out = load_text_half(path, config, **options)
            else:
                place = path.parent if path.suffix == ".gguf" else path
                left_out = {}
                hf, report = transformers.AutoModelForCausalLM.from_pretrained(
                    place, config=config, trust_remote_code=False, **options
                )
    except UserError:
        raise
    except Exception as error:  # Transformers raises anything over a damaged checkpoint
        raise UserError(f"{path}: Transformers cannot load it: {one_line(error)}") from error
    _require_whole(path, report)
    settle_ties(hf)
    hf = as_plain(hf).to(device) if quantisation is None else keep_layout(hf)
    model = CausalLM(hf, name=str(source)).eval()
    model.is_packed, model.left_out = quantisation is not None, left_out
    require_finite(model)
    model.probe()
    return model


def as_plain(hf: Any) -> Any:
    """A model read from GGUF has ordinary tensors but is flagged as quantised, and could not be saved."""
    if getattr(hf, "hf_quantizer", None) is not None:
        hf.hf_quantizer = None
        hf.is_quantized = False
        hf.config = plain_config(hf.config)
    return hf


def longest_row(config: Any) -> int | None:
    """Tokens of the longest row that a model of this config takes; None where it does not say."""
    longest: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return longest


def without_data(config: Any, dtype: torch.dtype, device: torch.device, name: str) -> CausalLM:
    """The model of a config on PyTorch's fake tensors: shapes without data."""
    try:
        with no_init_weights(), device:
            hf = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        hf.tie_weights()
    except Exception as error:  # Transformers raises anything over a config that fits no causal LM
        raise UserError(f"{name}: {no_model_of(config, error)}") from error
    return CausalLM(hf, name)


def plain_config(config: Any) -> Any:
    """A copy of the config without the quantisation that a GGUF file leaves in it."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def weights_sha256(model: CausalLM) -> str:
    """sha256 over names, dtypes, shapes and bytes of every parameter; a tied tensor counts once."""
    digest = hashlib.sha256()
    for name, tensor in model.weights():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        for part in parts_of(tensor.detach()):
            digest.update(part.cpu().contiguous().view(torch.uint8).reshape(-1).numpy().data)
    return digest.hexdigest()


def _as_config(config: Any, own: Any) -> Any:
    if isinstance(config, str | Path):
        return load_config(config)
    if isinstance(config, transformers.PretrainedConfig):
        return config
    if not isinstance(config, dict):
        raise UserError(f"config: {config!r:.60} is not a config. Give one, its dictionary or a path.")
    try:
        config = type(own).from_dict(config)
    except Exception as error:  # Transformers raises anything over a damaged config
        raise UserError(
            f"config: not a model config: {one_line(error)} Give the checkpoint's own."
        ) from error
    _text_config_of("config", config)
    return config


def _require_same_vocabulary(path: Path, config: Any) -> None:
    expected = config.get_text_config().vocab_size
    for name, shape in tensor_shapes(path).items():
        if name.endswith(EMBEDDINGS) and shape[0] != expected:
            raise UserError(
                f"{path}: tensor {name} has {shape[0]} rows, its config says vocab_size {expected}."
                " Config and checkpoint have drifted apart; take both from one model."
            )


def _require_same_size(path: Path, config: Any) -> None:
    """Refuse a damaged width before it is allocated: Transformers fills with random numbers what a checkpoint
    lacks, and reports it only afterwards. What it leaves out of a GGUF file it does not report at all.
    """
    if getattr(config, "quantization_config", None) is not None and path.suffix != ".gguf":
        return  # its files pack several weights into one number
    available = sum(math.prod(shape) for shape in tensor_shapes(path).values())
    try:
        hf = on_meta(config)
    except Exception as error:  # Transformers raises anything over a config that fits no causal LM
        raise UserError(f"{path}: {no_model_of(config, error)}") from error
    described = sum(parameter.numel() for parameter in hf.parameters())
    if described > MAX_SIZE_RATIO * available:
        raise UserError(
            f"{path}: its config describes {described} weights, its files hold {available}."
            " Config and checkpoint have drifted apart; take both from one model."
        )
    if path.suffix == ".gguf":
        require_known_tensors(path, hf)


def _require_whole(path: Path, report: dict[str, Any]) -> None:
    for name, stored, expected in sorted(report["mismatched_keys"])[:1]:
        raise UserError(
            f"{path}: tensor {name} is {list(stored)} in the checkpoint and {list(expected)} by its config."
            " Config and checkpoint have drifted apart; take both from one model."
        )
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"{path}: {len(missing)} tensor(s) of the config are not in the checkpoint, first {missing[0]}."
            " The model would be partly random; take the whole checkpoint."
        )
    if extra := sorted(report["unexpected_keys"]):
        raise UserError(
            f"{path}: {len(extra)} tensor(s) of the checkpoint are not in its config, first {extra[0]}."
            " The model would be partly loaded; take config and checkpoint from one model."
        )
