"""The rope of a GGUF file as Transformers' `rope_parameters`: base, scaling keys and tensors of factors.

llama.cpp divides the frequency of each pair of dimensions by a factor of a tensor and by `rope.scaling.factor`,
mixes the scaled and the unscaled by YaRN's ramp (Peng et al. 2023, arXiv 2309.00071) for that type, and
multiplies sines and cosines by an attention factor. Far positions are wrong without any of these, near ones
look right.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from potstill.models.gguf_files import GGUFModel

FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
BASE = 10_000.0
"""Where a file names none."""
KEPT = ("partial_rotary_factor", "mrope_section", "mrope_interleaved", "truncate")
BETAS = {"beta_fast": "rope.scaling.yarn_beta_fast", "beta_slow": "rope.scaling.yarn_beta_slow"}
MUST_BE_1 = ("rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor")
READ = {
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
    "rope.scaling.finetuned",
    "rope.scaling.yarn_log_multiplier",
    *BETAS.values(),
    *MUST_BE_1,
}
"""The keys that are looked at here."""
TOLERANCE = 1e-5
"""Relative, of a factor: the file has float32, computed from a frequency and its reciprocal."""


def rope_parameters(file: GGUFModel, before: dict[str, Any], turned: int) -> dict[str, Any]:
    """Those of the file.

    Args:
        before: what the config says without the file's scaling.
        turned: the dimensions of a head that are turned, twice the number of factors.

    Raises:
        UserError: a scaling that Transformers has no parameters for, with the key or tensor.
    """
    base = file.get("rope.freq_base", BASE)
    scaling = _scaling(file, base, turned)
    kept = {name: before[name] for name in KEPT if name in before}
    if scaling["rope_type"] != "yarn":
        kept.pop("truncate", None)
    return kept | {"rope_theta": base} | scaling


def _scaling(file: GGUFModel, base: float, turned: int) -> dict[str, Any]:
    kind = file.get("rope.scaling.type", "linear")  # llama.cpp's default, where there is a factor alone
    if kind not in ("none", "linear", "yarn", "longrope"):
        file.refuse(f"rope.scaling.type is {kind!r:.60}, which is unknown here")
    stated = file.get("rope.scaling.factor") or file.get("rope.scale_linear") or 1.0
    factor = 1.0 if kind == "none" else stated
    attention = file.get("rope.scaling.attn_factor", 1.0)
    original = file.get("rope.scaling.original_context_length") or file.get("context_length")
    freqs, long, short = (_factors(file, name, turned) for name in (FREQS, LONG, SHORT))
    if kind == "yarn":
        if freqs or long or short:
            file.refuse(f"rope.scaling.type is yarn, and {FREQS if freqs else LONG} scales as well")
        return _yarn(file, factor, original, attention)
    if long or short:
        if freqs or not (long and short):
            file.refuse(
                f"its rope has {', '.join(each for each in (FREQS, LONG, SHORT) if file.numbers(each))}"
            )
        return _longrope(
            [factor * each for each in short], [factor * each for each in long], original, attention
        )
    for key, none in (("rope.scaling.attn_factor", 1.0), (MUST_BE_1[0], 0.0)):
        if (value := file.get(key, none)) not in (none, -1.0):  # -1: llama.cpp's default
            file.refuse(f"{key} is {value}, with a rope of type {kind}")
    divisors = factor * np.array(freqs or [1.0] * (turned // 2))
    if np.allclose(divisors, divisors[0], rtol=TOLERANCE):
        every = factor if freqs is None else float(divisors[0])
        return {"rope_type": "linear", "factor": every} if every != 1.0 else {"rope_type": "default"}
    every = divisors.tolist()
    return _llama3(divisors, base, turned) or _longrope(every, every, file.get("context_length"), 1.0)


def _factors(file: GGUFModel, tensor: str, turned: int) -> list[float] | None:
    factors = file.numbers(tensor)
    if factors is not None and not (
        len(factors) == turned // 2 and all(0 < each < math.inf for each in factors)
    ):
        file.refuse(f"{tensor} has {len(factors)} numbers, not {turned // 2} above 0")
    return factors


def _yarn(file: GGUFModel, factor: float, original: int, attention: float) -> dict[str, Any]:
    for key in MUST_BE_1:
        if (value := file.get(key, 1.0)) not in (1.0, -1.0):  # -1: llama.cpp's default
            file.refuse(f"{key} is {value}, not 1")

    def scale(multiplier: float) -> float:
        return 0.1 * multiplier * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    scaling |= {name: value for name, key in BETAS.items() if (value := file.get(key)) is not None}
    multiplier = file.get("rope.scaling.yarn_log_multiplier") or 0.0
    if multiplier or attention != 1.0:  # by default both sides take scale(1)
        attention *= scale(1.0) / (scale(multiplier) if multiplier else 1.0)
        scaling["attention_factor"] = float(attention)
    return scaling


def _longrope(short: list[float], long: list[float], original: int, attention: float) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "original_max_position_embeddings": original,
        "attention_factor": float(attention),
    }


def _llama3(divisors: np.ndarray[Any, Any], base: float, turned: int) -> dict[str, Any] | None:
    """The parameters of Llama 3's rule that give these divisors, None where it gives others.

    The rule scales wavelengths above a whole original context, none below a quarter of it, and is linear in
    the frequency between: one divisor from there tells the original context.
    """
    wavelength = 2 * math.pi * base ** (np.arange(0, turned, 2) / turned)
    factor = round(float(divisors.max()), 3)
    smooth = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    between = np.flatnonzero((smooth > 1e-3) & (smooth < 1 - 1e-3))
    if not len(between):
        return None
    original = round(float(((3 * smooth + 1) * wavelength)[between[0]]))
    smooth = np.clip((original / wavelength - 1) / 3, 0, 1)
    if not np.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=TOLERANCE):
        return None
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }
