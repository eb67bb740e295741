"""Batches of Transformers' collators: shifted once, on whichever side they are padded, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_tokenizer, tiny_config
from transformers import DataCollatorForLanguageModeling, DataCollatorWithFlattening, default_data_collator

from potstill import Batch, CausalLM, RowsDataset, Student, TorchTeacher, UserError, prepare, to_batch
from potstill.losses import Objective

V = 258
TEXTS = [[11, 12, 13, 14, 15], [21, 22], [31, 32, 33]]


def rows_of(batch: Batch) -> list[dict[int, tuple[list[int], int]]]:
    """Of each row, what each supervised position has read of its own document, and its label."""
    T, rows = batch.input_ids_BT.shape[1], [dict[int, tuple[list[int], int]]() for _ in batch.input_ids_BT]
    for position, label in zip(batch.positions_N.tolist(), batch.labels_N.tolist(), strict=True):
        b, t = divmod(position, T)
        start = t - int(batch.position_ids_BT[b, t])
        rows[b][t] = (batch.input_ids_BT[b, start : t + 1].tolist(), label)
    return rows


def all_of(ids: list[int]) -> list[tuple[list[int], int]]:
    return [(ids[: t + 1], ids[t + 1]) for t in range(len(ids) - 1)]


@pytest.mark.parametrize("side", ["right", "left"])
def test_every_token_but_the_first_is_a_label_of_the_position_before_it(side: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.padding_side = side
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    inputs = collate([{"input_ids": ids} for ids in TEXTS])
    assert inputs["attention_mask"][1].tolist() == ([1, 1, 0, 0, 0] if side == "right" else [0, 0, 0, 1, 1])
    batch = to_batch(inputs, V)
    assert [list(row.values()) for row in rows_of(batch)] == [all_of(ids) for ids in TEXTS]
    assert batch.lengths_B is not None and batch.lengths_B.tolist() == [5, 2, 3]
    assert not batch.is_packed
    assert batch.position_ids_BT[1].tolist() == [0, 1, 0, 1, 2]  # padding is a document of its own


def test_padding_on_both_sides_and_a_pad_that_is_no_id_are_the_row_without_them() -> None:
    ids = torch.tensor([[-1, -1, 7, 8, 9, 999]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 0]])
    labels = torch.tensor([[-100, -100, 7, -100, 9, -100]])
    batch = to_batch({"input_ids": ids, "attention_mask": mask, "labels": labels}, V)
    assert rows_of(batch) == [{1: ([7, 8], 9)}]  # 7 follows nothing
    assert batch.input_ids_BT.tolist() == [[7, 8, 9, 0, 0, 0]]


def test_the_loss_of_a_padded_batch_is_that_of_its_rows_alone() -> None:
    torch.manual_seed(0)
    hf = transformers.AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=2))
    teacher = TorchTeacher.of(transformers.AutoModelForCausalLM.from_config(tiny_config()))
    student = Student(CausalLM.of(hf), Objective(chunk=3))

    def sums(inputs: dict[str, Any]) -> dict[str, float]:
        batch = to_batch(inputs, V)
        return {name: float(value.detach()) for name, value in student(batch, teacher.targets(batch)).items()}

    alone = [sums({"input_ids": torch.tensor([ids]), "labels": torch.tensor([ids])}) for ids in TEXTS]
    tokenizer = make_tokenizer()
    for side in ("left", "right"):
        tokenizer.padding_side = side
        inputs = DataCollatorForLanguageModeling(tokenizer, mlm=False)([{"input_ids": ids} for ids in TEXTS])
        for name, value in sums(inputs).items():
            assert value == pytest.approx(sum(of_row[name] for of_row in alone), rel=1e-5), (side, name)
    # And the cross-entropy is that of Transformers, which shifts by itself.
    theirs = [hf(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss.item() for ids in TEXTS]
    for loss, ids, own in zip(theirs, TEXTS, alone, strict=True):
        assert own["ce"] == pytest.approx(loss * (len(ids) - 1), rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}])
def test_documents_of_a_padding_free_collator_stay_apart(options: dict[str, bool]) -> None:
    inputs = DataCollatorWithFlattening(**options)([{"input_ids": ids} for ids in TEXTS])
    batch = to_batch(inputs, V)
    assert list(rows_of(batch)[0].values()) == [pair for ids in TEXTS for pair in all_of(ids)]
    assert batch.is_packed
    # A label at a document's first token, which such collators leave out, is no position of the one before it.
    whole = {
        "input_ids": inputs["input_ids"],
        "labels": inputs["input_ids"],
        "position_ids": inputs["position_ids"],
    }
    assert torch.equal(to_batch(whole, V).positions_N, batch.positions_N)


def test_labels_that_are_shifted_already_are_taken_as_they_are() -> None:
    ids = torch.tensor([TEXTS[0]])
    shifted = torch.tensor([[12, -100, 14, 15, 99]])
    batch = to_batch({"input_ids": ids, "labels": ids, "shift_labels": shifted}, V)
    assert {t: label for t, (_, label) in rows_of(batch)[0].items()} == {0: 12, 2: 14, 3: 15, 4: 99}
    # Of a row that is padded on the left, the last of the padding is in front of a token, and reads nothing.
    left = {"input_ids": torch.tensor([[1, 5, 6]]), "attention_mask": torch.tensor([[0, 1, 1]])}
    assert rows_of(to_batch(left | {"shift_labels": torch.tensor([[5, 6, -100]])}, V)) == [{0: ([5], 6)}]


def test_a_batch_without_a_supervised_position_has_none() -> None:
    ids = torch.tensor([[3, 4]])
    nothing = to_batch({"input_ids": ids, "labels": torch.full_like(ids, -100)}, V)
    all_padding = to_batch(
        {"input_ids": ids, "labels": torch.full_like(ids, -100), "attention_mask": 0 * ids}, V
    )
    assert len(nothing.positions_N) == len(all_padding.positions_N) == 0
    assert all_padding.lengths_B is not None and all_padding.lengths_B.tolist() == [0]


GOOD: dict[str, Any] = {
    "input_ids": torch.tensor([[5, 6, 7], [8, 9, 1]]),
    "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    "labels": torch.tensor([[-100, 6, 7], [-100, 9, -100]]),
}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"labels": torch.tensor([[5, 6], [8, 9]])}, ["labels", "[2, 2]", "[2, 3]"]),
        ({"labels": None}, ["labels", "-100"]),
        ({"input_ids": torch.tensor([5, 6, 7])}, ["input_ids", "[3]"]),
        ({"input_ids": torch.zeros(0, 3, dtype=torch.long)}, ["input_ids", "[0, 3]"]),
        ({"input_ids": torch.ones(2, 3)}, ["input_ids", "float32"]),
        ({"labels": torch.tensor([[-100, 6, 258], [-100, 9, -100]])}, ["labels", "258", "257"]),
        ({"labels": torch.tensor([[-100, 6, -1], [-100, 9, -100]])}, ["labels", "-1", "257"]),
        ({"input_ids": torch.tensor([[5, 6, 300], [8, 9, 1]])}, ["input_ids", "300", "257"]),
        ({"labels": torch.tensor([[-100, 6, 7], [-100, 9, 1]])}, ["labels", "row 1, token 2", "-100"]),
        (
            {"attention_mask": torch.tensor([[1, 0, 1], [1, 1, 0]]), "labels": torch.full((2, 3), -100)},
            ["row 0, token 1"],
        ),
        ({"attention_mask": torch.tensor([[1, 1, 2], [1, 1, 0]])}, ["attention_mask", "2", "0 or 1"]),
        (
            {"attention_mask": torch.ones(2, 1, 3, 3, dtype=torch.long)},
            ["attention_mask", "[2, 1, 3, 3]", "[2, 3]"],
        ),
        (
            {"position_ids": torch.tensor([[0, 1, 3], [0, 1, 2]])},
            ["position_ids", "row 0, token 2", "3", "1"],
        ),
        ({"position_ids": torch.tensor([[4, 5, 6], [0, 1, 2]])}, ["position_ids", "row 0, token 0", "4"]),
        ({"position_ids": torch.zeros(3, 2, 3, dtype=torch.long)}, ["position_ids", "[3, 2, 3]"]),
        ({"rows": torch.tensor([1])}, ["rows", "[1]", "[2]"]),
        ({"pixel_values": torch.zeros(2)}, ["pixel_values"]),
        ({"token_type_ids": torch.tensor([[0, 1, 0], [0, 0, 0]])}, ["token_type_ids"]),
        ({"cu_seq_lens_q": torch.tensor([0, 2, 3])}, ["cu_seq_lens_q", "position_ids"]),
    ],
)
def test_what_would_be_read_wrongly_is_refused_in_one_line(changes: dict[str, Any], told: list[str]) -> None:
    assert len(to_batch(GOOD, V).positions_N) == 3
    with pytest.raises(UserError) as refused:
        to_batch(GOOD | changes, V)
    (line,) = refused.value.mistakes
    assert "\n" not in line and [word for word in told if word not in line] == []


@pytest.mark.parametrize("packing", ["true", "false"])
def test_rows_of_a_corpus_come_through_a_collator_as_they_are(
    tiny_recipe: Callable[..., Path], packing: str
) -> None:
    setup = prepare(tiny_recipe(), [f"corpus.packing={packing}"])
    for split in (setup.corpus.train, setup.corpus.heldout):
        rows = range(len(split) - 1, -1, -1)
        data = RowsDataset(split)
        assert len(data) == len(split)
        back = to_batch(default_data_collator([data[row] for row in rows]), V)
        batch = split.batch(rows)
        for name in ("rows_B", "input_ids_BT", "position_ids_BT", "positions_N", "labels_N", "lengths_B"):
            assert torch.equal(getattr(back, name), getattr(batch, name)), name
        assert batch.is_packed == (packing == "true")
