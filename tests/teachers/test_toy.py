"""The exact doubles: what they answer is known in closed form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from potstill import FixtureTeacher, TableTeacher, UserError
from potstill.types import Batch, Teacher, TeacherLogitsProvider


def batch_of(ids_BT: torch.Tensor) -> Batch:
    rows, length = ids_BT.shape
    positions_BT = torch.arange(rows * length).view(rows, length)[:, :-1]
    return Batch(
        rows_B=torch.arange(rows),
        input_ids_BT=ids_BT,
        position_ids_BT=torch.arange(length).expand(rows, -1),
        positions_N=positions_BT.flatten(),
        labels_N=ids_BT[:, 1:].flatten(),
    )


def test_the_fixture_puts_ten_on_the_last_id_and_zero_elsewhere() -> None:
    logits_BV = FixtureTeacher(5).logits_for_batch(torch.tensor([[1, 3], [2, 0]]))
    assert logits_BV.tolist() == [[0, 0, 0, 10, 0], [10, 0, 0, 0, 0]]


def test_the_fixture_points_at_the_next_id_and_at_the_last_position_at_its_own() -> None:
    logits_BTV = FixtureTeacher(4).logits_per_position(torch.tensor([[1, 3, 2]]))
    assert logits_BTV.tolist() == [[[0, 0, 0, 10], [0, 0, 10, 0], [0, 0, 10, 0]]]


@pytest.mark.parametrize("outside", [4, 99, -1])
def test_an_id_outside_the_vocabulary_counts_as_zero(outside: int) -> None:
    teacher = FixtureTeacher(4)
    assert teacher.logits_for_batch(torch.tensor([[1, outside]])).tolist() == [[10, 0, 0, 0]]
    assert teacher.logits_per_position(torch.tensor([[1, outside]])).argmax(-1).tolist() == [[0, 0]]


def test_an_empty_batch_gives_an_empty_result() -> None:
    empty = torch.zeros(0, 3, dtype=torch.int64)
    assert FixtureTeacher(4).logits_for_batch(empty).shape == (0, 4)
    assert FixtureTeacher(4).logits_per_position(empty).shape == (0, 3, 4)


def test_two_calls_answer_the_same_and_leave_the_input_alone() -> None:
    ids_BT = torch.randint(0, 9, (3, 5), generator=torch.Generator().manual_seed(1))
    before, teacher = ids_BT.clone(), FixtureTeacher(9)
    assert torch.equal(teacher.logits_per_position(ids_BT), teacher.logits_per_position(ids_BT))
    assert torch.equal(ids_BT, before)


@pytest.mark.parametrize(
    "wrong", [torch.tensor([1, 2]), torch.tensor([[1.0, 2.0]]), torch.zeros(2, 2, 2, dtype=torch.int64)]
)
def test_another_shape_or_type_of_ids_is_refused_with_what_it_was(wrong: torch.Tensor) -> None:
    with pytest.raises(UserError, match=r"input_ids have shape \["):
        FixtureTeacher(5).logits_for_batch(wrong)
    with pytest.raises(UserError, match=r"input_ids have shape \["):
        TableTeacher(torch.zeros(5, 5)).logits_per_position(wrong)


def test_a_row_without_tokens_has_no_last_position() -> None:
    with pytest.raises(UserError, match=r"\[2, 0\]"):
        FixtureTeacher(5).logits_for_batch(torch.zeros(2, 0, dtype=torch.int64))


def test_the_doubles_are_teachers() -> None:
    for teacher in (FixtureTeacher(3), TableTeacher(torch.zeros(3, 3))):
        assert isinstance(teacher, TeacherLogitsProvider)
        assert isinstance(teacher, Teacher)
        assert teacher.vocab_size == teacher.vocab.size == 3


@pytest.mark.parametrize("kind", ["fixture", "table"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_targets_are_the_logits_at_the_batch_s_positions(kind: str, temperature: float) -> None:
    table_VV = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    teacher = FixtureTeacher(6) if kind == "fixture" else TableTeacher(table_VV)
    batch = batch_of(torch.randint(0, 6, (2, 5), generator=torch.Generator().manual_seed(3)))
    targets = teacher.targets(batch)
    expected_NV = teacher.logits_per_position(batch.input_ids_BT).flatten(0, 1)[batch.positions_N]
    student_NV = torch.zeros(8, 6)
    assert len(targets) == 8
    ours, logp = targets.on_support(student_NV, temperature)
    assert ours is student_NV
    assert torch.allclose(logp, torch.log_softmax(expected_NV / temperature, -1))
    assert torch.allclose(targets[2:5].on_support(student_NV[2:5], temperature)[1], logp[2:5])


def test_a_table_is_read_from_a_file_with_one_tensor(tmp_path: Path) -> None:
    table_VV = torch.randn(4, 4)
    save_file({"logits": table_VV}, tmp_path / "table.safetensors")
    assert torch.equal(TableTeacher.load(tmp_path / "table.safetensors").logits_VV, table_VV)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"logits": torch.zeros(3, 4)}, r"\[3, 4\]"),
        ({"other": torch.zeros(3, 3)}, "holds other, wanted one tensor `logits`"),
        ({"logits": torch.full((2, 2), float("nan"))}, "finite"),
    ],
)
def test_a_table_that_is_none_is_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    save_file(tensors, tmp_path / "table.safetensors")
    with pytest.raises(UserError, match=message):
        TableTeacher.load(tmp_path / "table.safetensors")


def test_a_truncated_table_is_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "table.safetensors"
    save_file({"logits": torch.zeros(4, 4)}, path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"table\.safetensors"):
        TableTeacher.load(path)


def test_an_id_that_the_table_does_not_know_is_refused() -> None:
    with pytest.raises(UserError, match="id 7 is outside the vocabulary of 4 ids"):
        TableTeacher(torch.zeros(4, 4)).logits_for_batch(torch.tensor([[1, 7]]))
