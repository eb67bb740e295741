"""How often a teacher accepts what a student drafts for it: speculative decoding (Leviathan et al. 2023, arXiv
2211.17192).

A draft of q is accepted by p with probability sum_v min(p(v), q(v)) = 1 - total variation (their corollary 3.6): a mean
over held-out text says what to expect, and speculative decoding in Transformers what comes of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from potstill.evals import speed
from potstill.evals.intervals import wilson
from potstill.losses.divergences import tvd
from potstill.models.student import Student
from potstill.types import Batch, Rows, Teacher, answer

PROMPTS = 8
"""Held-out prompts of speculative decoding."""
COUNTS = ("rounds", "drafted", "judged", "accepted", "new_tokens")


@torch.no_grad()
def expected(student: Student, teacher: Teacher, rows: Rows, rows_per_batch: int) -> dict[str, Any]:
    """The mean over all held-out positions, at temperature 1 and in eval mode, with the weights as saved."""
    total, positions = 0.0, 0
    was_training = student.training
    student.eval()
    try:
        for start in range(0, len(rows), rows_per_batch):
            batch = rows.batch(range(start, min(start + rows_per_batch, len(rows))))
            batch = batch.to(student.model.device)
            targets = answer(teacher, batch)
            for part, logits_CV in student.logits(batch):
                student_CS, teacher_CS = targets[part].on_support(logits_CV.log_softmax(-1), 1.0)
                total += float((1 - tvd(student_CS, teacher_CS)).double().sum())
            positions += len(batch.positions_N)
    finally:
        student.train(was_training)
    return {"mean": total / positions, "positions": positions}


def measured(request: Mapping[str, Any]) -> dict[str, Any] | str:
    """Speculative decoding of the request's prompts, one a round: what was drafted, judged and accepted, and the time
    beside that of the teacher alone; or `not run: why`.

    A draft behind the first that is refused is never judged, so the rate is accepted / judged.
    """
    model = speed.Model("speculative", request)
    speed.measure([model], len(request["prompts"]), warm_up=False)
    if model.why:
        return f"not run: {model.why}"
    counts = {name: sum(one[name] for one in model.measured) for name in COUNTS}
    if not (counts["judged"] and counts["rounds"]):
        return "not run: this version of Transformers does not say what it drafted and accepted"
    low, high = wilson(counts["accepted"], counts["judged"])
    return {
        "rate": counts["accepted"] / counts["judged"],
        "low": low,
        "high": high,
        "interval": "Wilson, 95 %",
        **model.about,
        **counts,
        "tokens_per_round": counts["new_tokens"] / counts["rounds"],
        "speedup": speed.spread([one["alone_s"] / one["drafted_s"] for one in model.measured]),
    } | model.memory


def prompts_of(rows: Rows, count: int, tokens: int) -> list[list[int]]:
    """The beginnings of held-out documents, from rows spread evenly: at most `tokens` ids each."""
    picked = range(min(count, len(rows)))
    return [next(_documents(rows.batch([number * len(rows) // len(picked)])))[:tokens] for number in picked]


def text_of(rows: Rows, tokens: int) -> list[int]:
    """So many ids of held-out documents, one behind the other and over again where they are too few."""
    ids: list[int] = []
    for number in range(len(rows)):
        for document in _documents(rows.batch([number])):
            ids += document
        if len(ids) >= tokens:
            break
    return (ids * (tokens // len(ids) + 1))[:tokens]


def _documents(batch: Batch) -> Iterator[list[int]]:
    """Those of a row, without its padding."""
    length = batch.input_ids_BT.shape[1] if batch.lengths_B is None else int(batch.lengths_B[0])
    ids, places = batch.input_ids_BT[0, :length].tolist(), batch.position_ids_BT[0, :length].tolist()
    starts = [at for at, place in enumerate(places) if at == 0 or place == 0]
    for start, end in zip(starts, [*starts[1:], length], strict=True):
        yield ids[start:end]
