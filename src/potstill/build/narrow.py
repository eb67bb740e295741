"""The residual stream of a cut student made narrower, once all else was cut and repaired."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor

from potstill.build.repair import fitted_and_judged
from potstill.models.causal_lm import CausalLM
from potstill.models.repair import Repair
from potstill.models.stream_refit import refit_stream
from potstill.models.stream_width import kept_of_stream, narrowed
from potstill.types import Batch, Rows

CHANNELS = "stream_channels"
"""Beside a repair's weights: numbers of the channels that are kept."""
T = TypeVar("T")


class Agree(Protocol):
    """What all ranks take for measured: what the first has."""

    def __call__(self, value: T) -> T: ...


def narrow_stream(
    uncut: CausalLM,
    model: CausalLM,
    hidden_size: int,
    ranked_on: Sequence[Batch],
    rows: Rows,
    note: Callable[[str], None],
    agreed: Agree,
    repair: Repair | None,
) -> tuple[CausalLM, dict[str, Any], Repair | None]:
    """The student with so many channels of its residual stream, what a receipt has of them, and its repair.

    Args:
        uncut: the teacher.
        model: the student, cut and repaired.
        ranked_on: training rows on which the channels are ranked.
        rows: training rows.
        agreed: see `build.setup.set_up`.
        repair: what was made up for before, or in the run that is resumed, this included; None: nothing is to be.
    """
    known = None if repair is None else repair.weights.get(CHANNELS)
    keep_K = agreed(kept_of_stream(model, hidden_size, ranked_on).cpu()) if known is None else known
    student = narrowed(model, keep_K.to(model.device))
    student.rows_are_packed = uncut.rows_are_packed
    if repair is not None and known is None:
        fitted, judged = fitted_and_judged(rows)
        weights: dict[str, Tensor] = {CHANNELS: keep_K}
        norms = matrices = None
        if any(len(batch.positions_N) for batch in judged):
            norms, matrices, fits = refit_stream(uncut, model, student, keep_K, fitted, judged, note)
            weights |= fits
        weights = repair.weights | weights
        repair = agreed(
            dataclasses.replace(repair, weights=weights, refit_norms=norms, refit_stream=matrices)
        )
    if repair is not None:
        repair.apply(student)
    numbers = ",".join(map(str, keep_K.tolist()))
    described = {
        "hidden_size": hidden_size,
        "of_hidden_size": model.hf.config.get_text_config().hidden_size,
        "stream_channels_sha256": hashlib.sha256(numbers.encode()).hexdigest(),
    }
    return student, described, repair
