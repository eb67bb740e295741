"""Batches as collators of Transformers make them, and `Batch`, which has shifted already: from one to the other.

A collator gives `labels` beside `input_ids`, one for each token, -100 where a token bears no loss. The label of a token
belongs to the position before it. `to_batch` shifts once, so that nobody shifts by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.data import Dataset

from potstill.errors import UserError
from potstill.types import Batch, Rows

NO_LOSS = -100
"""What a label is where its token bears no loss."""
COLUMNS = ("input_ids", "attention_mask", "labels", "shift_labels", "position_ids", "rows")
"""What is read of a batch."""
DOCUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""What collators for flash attention add to `position_ids`, and says the same."""
UNREAD = (*DOCUMENTS, "token_type_ids", "special_tokens_mask", "length", "num_items_in_batch")


def to_batch(inputs: Mapping[str, Any], vocab_size: int) -> Batch:
    """A batch of a collator as a `Batch` on the CPU; `Batch.to` moves it.

    Padding may be on either side: rows are moved to the left, and what is behind them is padding that nothing sees.
    The first token of a row, of a document and after padding follows nothing: its label bears no loss. A batch may have
    no supervised position at all.

    Args:
        inputs: int64 `input_ids` [B, T] and, of the same shape, `labels`, -100 where a token bears no loss;
            `attention_mask`, 1 for a token and 0 for padding; `position_ids`, also [1, T], which restart at 0 with
            every document of a row; `shift_labels`, which takes the place of `labels` and is the next token of each
            position already. Int64 `rows` [B] are the numbers of rows in a corpus, for a store.
        vocab_size: number of ids that the student has.

    Raises:
        UserError: a key that the student would not see, other shapes, an id or label beyond the vocabulary, a label at
            padding, padding between tokens, or positions that neither go on nor restart.
    """
    _require_known(inputs)
    ids_BT = _tensor(inputs, "input_ids")
    if ids_BT.ndim != 2 or ids_BT.numel() == 0:
        raise UserError(f"batch: input_ids has shape {list(ids_BT.shape)}, wanted [rows, tokens].")
    (B, T), name = ids_BT.shape, "shift_labels" if inputs.get("shift_labels") is not None else "labels"
    given_BT = _like(inputs, name, ids_BT)
    mask_BT = _mask(inputs, ids_BT)
    at_padding = (given_BT != NO_LOSS) & ~mask_BT
    if name == "shift_labels":  # the last of the padding on the left is before a token
        at_padding[:, :-1] &= ~mask_BT[:, 1:]
    if bool(at_padding.any()):
        _refuse_at(at_padding, f"{name} is not {NO_LOSS} where attention_mask is 0", "Set it to -100 there.")

    first_B, lengths_B = mask_BT.int().argmax(1), mask_BT.sum(1)
    places_T = torch.arange(T)
    if bool((holes := mask_BT != _within(places_T - first_B[:, None], lengths_B)).any()):
        _refuse_at(holes, "attention_mask is 0 between tokens", "Pad at the ends of a row alone.")
    moved_BT = (places_T + first_B[:, None]) % T
    kept_BT = _within(places_T.expand(B, T), lengths_B)
    ids_BT = ids_BT.gather(1, moved_BT).masked_fill(~kept_BT, 0)
    next_BT = given_BT.gather(1, moved_BT)
    if name == "labels":
        next_BT = torch.cat([next_BT[:, 1:], torch.full((B, 1), NO_LOSS)], 1)
    position_ids_BT = _positions(inputs, moved_BT, kept_BT)
    next_BT = next_BT.masked_fill(~kept_BT, NO_LOSS)
    # What begins a document follows nothing.
    next_BT[:, :-1] = next_BT[:, :-1].masked_fill(position_ids_BT[:, 1:] == 0, NO_LOSS)
    positions_N = (next_BT.flatten() != NO_LOSS).nonzero()[:, 0]
    labels_N = next_BT.flatten()[positions_N]
    _require_ids("input_ids", ids_BT, vocab_size)
    _require_ids(name, given_BT[given_BT != NO_LOSS], vocab_size)
    rows_B = torch.full((B,), -1) if inputs.get("rows") is None else _tensor(inputs, "rows")
    if rows_B.shape != (B,):
        raise UserError(f"batch: rows has shape {list(rows_B.shape)}, wanted [{B}], a number for each row.")
    return Batch(rows_B, ids_BT, position_ids_BT, positions_N, labels_N, lengths_B)


class RowsDataset(Dataset[dict[str, Tensor]]):
    """Packed rows, such as `Corpus.train`, as a map-style dataset; with Transformers' `default_data_collator`, what
    `to_batch` makes of its batches is `Rows.batch` of the same rows.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        batch = self.rows.batch([row])
        if batch.for_teacher is not None:
            raise UserError(
                f"row {row}: its teacher reads another text than the student. Use the corpus itself."
            )
        ids_T = batch.input_ids_BT[0]
        next_T = torch.full_like(ids_T, NO_LOSS).index_copy(0, batch.positions_N, batch.labels_N)
        length = len(ids_T) if batch.lengths_B is None else int(batch.lengths_B[0])
        return {
            "input_ids": ids_T,
            "attention_mask": (torch.arange(len(ids_T)) < length).long(),
            "position_ids": batch.position_ids_BT[0],
            # And not `labels`: the label of a row's last position may be the first token of the next row.
            "shift_labels": next_T,
            "rows": batch.rows_B[0],
        }


def _require_known(inputs: Mapping[str, Any]) -> None:
    for name, value in inputs.items():
        is_zero = name == "token_type_ids" and not bool(torch.as_tensor(value).any())
        if value is None or name in COLUMNS or (name in UNREAD and name != "token_type_ids") or is_zero:
            continue
        raise UserError(
            f"batch: {name!r:.60} is no input of a distilled model, which reads {', '.join(COLUMNS)}. Leave it out."
        )
    if inputs.get("labels") is None and inputs.get("shift_labels") is None:
        raise UserError(
            "batch: it has no labels. Take a collator that makes them, -100 where a token bears no loss."
        )
    if inputs.get("position_ids") is None and (found := [name for name in DOCUMENTS if name in inputs]):
        raise UserError(
            f"batch: it has {found[0]} and no position_ids. Add them, restarting with each document."
        )


def _tensor(inputs: Mapping[str, Any], name: str) -> Tensor:
    """On the CPU, int64."""
    if inputs.get(name) is None:
        raise UserError(f"batch: it has no {name}.")
    tensor = torch.as_tensor(inputs[name]).cpu()
    if tensor.is_floating_point() or tensor.is_complex():
        raise UserError(f"batch: {name} is of type {tensor.dtype}, wanted whole numbers.")
    return tensor.long()


def _like(inputs: Mapping[str, Any], name: str, ids_BT: Tensor) -> Tensor:
    tensor = _tensor(inputs, name)
    if name == "position_ids" and tensor.shape == (1, ids_BT.shape[1]):
        tensor = tensor.expand_as(ids_BT)
    if tensor.shape != ids_BT.shape:
        raise UserError(f"batch: {name} has shape {list(tensor.shape)}, input_ids {list(ids_BT.shape)}.")
    return tensor


def _mask(inputs: Mapping[str, Any], ids_BT: Tensor) -> Tensor:
    if inputs.get("attention_mask") is None:
        return torch.ones_like(ids_BT, dtype=torch.bool)
    mask_BT = _like(inputs, "attention_mask", ids_BT)
    if bool((other := (mask_BT != 0) & (mask_BT != 1)).any()):
        _refuse_at(
            other,
            f"attention_mask is {int(mask_BT[other][0])}, wanted 0 or 1",
            "Tell documents by position_ids.",
        )
    return mask_BT.bool()


def _within(places_BT: Tensor, lengths_B: Tensor) -> Tensor:
    return (places_BT >= 0) & (places_BT < lengths_B[:, None])


def _positions(inputs: Mapping[str, Any], moved_BT: Tensor, kept_BT: Tensor) -> Tensor:
    """position_ids_BT of rows that begin at the left; padding is a document of its own."""
    places_BT = torch.arange(moved_BT.shape[1]).expand_as(moved_BT)
    positions_BT = places_BT
    if inputs.get("position_ids") is not None:
        positions_BT = _like(inputs, "position_ids", moved_BT).gather(1, moved_BT)
        before_BT = torch.cat([torch.full_like(positions_BT[:, :1], -1), positions_BT[:, :-1]], 1)
        is_next_BT = (positions_BT == 0) | ((positions_BT == before_BT + 1) & (places_BT > 0))
        if bool((wrong := ~is_next_BT & kept_BT).any()):
            _refuse_at(
                wrong,
                f"position_ids is {int(positions_BT[wrong][0])} behind {int(before_BT[wrong][0])}",
                "Let them go on by 1, and restart at 0 with each document.",
            )
    return torch.where(kept_BT, positions_BT, places_BT - kept_BT.sum(1, keepdim=True))


def _require_ids(name: str, ids: Tensor, vocab_size: int) -> None:
    if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < vocab_size):
        wrong = int(ids.max()) if int(ids.max()) >= vocab_size else int(ids.min())
        raise UserError(
            f"batch: {name} has {wrong}, and the student has the ids from 0 to {vocab_size - 1}. Use its tokenizer."
        )


def _refuse_at(where_BT: Tensor, what: str, todo: str) -> NoReturn:
    row, token = where_BT.nonzero()[0].tolist()
    raise UserError(f"batch: row {row}, token {token}: {what}. {todo}")
