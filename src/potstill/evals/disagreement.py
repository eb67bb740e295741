"""Where a student disagrees with its teacher: held-out text, token by token, with both models' first choices.

Every value is of the next-token distribution at the position before the token: how far apart the two models
were when they predicted it, and what each would have predicted instead.

kl               KL(teacher || student) at temperature 1, nats
ce, teacher_ce   each model's cross-entropy with the actual token, nats
entropy, teacher_entropy   the entropy of each model's distribution, nats
student, teacher           each model's first choices: id, text, probability

Of a teacher that gives few ids of each distribution, what is of it or of both is over these and one class for all
others: lower bounds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from potstill.losses.divergences import forward_kl
from potstill.losses.targets import SparseTargets
from potstill.models.student import Student
from potstill.types import Batch, Rows, Targets, Teacher, answer

Token = dict[str, Any]
CHOICES = 3


@torch.no_grad()
def disagreement(
    student: Student, teacher: Teacher, rows: Rows, tokens: int, tokenizer: Any | None = None
) -> list[list[Token]]:
    """At most `tokens` held-out tokens, in rows spread evenly over `rows`; each with its text and values.

    A token without a prediction, such as the first of a document, has only its text. Logits exist for one
    chunk of one row at a time.
    """
    was_training = student.training
    student.eval()
    try:
        pieces: list[list[Token]] = []
        per_row = rows.batch([0]).input_ids_BT.shape[1]
        count = min(len(rows), -(-tokens // per_row))
        for number in range(count):
            batch = _first(rows.batch([number * len(rows) // count]), min(per_row, tokens - number * per_row))
            pieces.append(_row(student, teacher, batch.to(student.model.device), tokenizer))
    finally:
        student.train(was_training)
    return pieces


def _first(batch: Batch, tokens: int) -> Batch:
    """The first tokens of a batch of one row. Causal models do not look ahead, so no value changes."""
    kept_N = batch.positions_N < tokens
    return Batch(
        batch.rows_B,
        batch.input_ids_BT[:, :tokens],
        batch.position_ids_BT[:, :tokens],
        batch.positions_N[kept_N],
        batch.labels_N[kept_N],
        sources_B=batch.sources_B,
    )


def _row(student: Student, teacher: Teacher, batch: Batch, tokenizer: Any | None) -> list[Token]:
    ids = batch.input_ids_BT[0].tolist()
    positions, labels = batch.positions_N.tolist(), batch.labels_N.tolist()
    if positions and positions[-1] == len(ids) - 1:  # the last position's label is not in the input
        ids.append(labels[-1])
    row: list[Token] = [{"id": id, "text": _text(tokenizer, ids[:at], id)} for at, id in enumerate(ids)]
    targets = answer(teacher, batch)
    for part, logits_CV in student.logits(batch):
        found = _values(logits_CV.log_softmax(-1), targets[part], batch.labels_N[part])
        for position, values in zip(positions[part], found, strict=True):
            for model in ("student", "teacher"):
                values[model] = [
                    [id, _text(tokenizer, ids[: position + 1], id), p] for id, p in values[model]
                ]
            row[position + 1] |= values
    return row


def _values(student_CV: Tensor, targets: Targets, labels_C: Tensor) -> list[Token]:
    """The values of each position of a chunk; choices are (id, probability)."""
    student_CS, teacher_CS = targets.on_support(student_CV, 1.0)
    columns: dict[str, list[Any]] = {"kl": forward_kl(student_CS, teacher_CS).tolist()}
    sparse = targets if isinstance(targets, SparseTargets) else None
    classes_C = labels_C if sparse is None else sparse.classes_of(labels_C)
    for model, prefix, logp_CS, of_C, ids_CK in (
        ("student", "", student_CV, labels_C, None),
        ("teacher", "teacher_", teacher_CS, classes_C, None if sparse is None else sparse.ids_NK),
    ):
        columns[f"{prefix}ce"] = (-logp_CS.gather(-1, of_C[:, None]).squeeze(-1)).tolist()
        columns[f"{prefix}entropy"] = torch.special.entr(logp_CS.exp()).sum(-1).tolist()
        known_CK = logp_CS if ids_CK is None else logp_CS[:, : ids_CK.shape[1]]
        best = known_CK.topk(min(CHOICES, known_CK.shape[-1]))
        best_ids = best.indices if ids_CK is None else ids_CK.gather(-1, best.indices)
        columns[model] = [
            [(id, p) for id, p in zip(ids, probabilities, strict=True) if id >= 0]
            for ids, probabilities in zip(best_ids.tolist(), best.values.exp().tolist(), strict=True)
        ]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _text(tokenizer: Any | None, before: list[int], id: int) -> str:
    """The text that a token adds. Decoded alone, a SentencePiece token would lose its leading space."""
    if tokenizer is None:
        return f"[{id}]"

    def decoded(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    first, both = decoded(before[-1:]), decoded([*before[-1:], id])
    return both.removeprefix(first) if both.startswith(first) else decoded([id])
