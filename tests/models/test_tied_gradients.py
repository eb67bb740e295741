"""A tied embedding's gradient is added into the head's: autograd's sum, without a second buffer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from potstill.losses.objective import Objective
from potstill.models.causal_lm import CausalLM
from potstill.models.load import load_causal_lm
from potstill.models.student import Student
from potstill.training import distributed
from potstill.training.distributed import Ranks
from potstill.types import Batch

V, D, PAD = 258, 32, 1


def batches() -> list[Batch]:
    """Two micro-batches with repeated ids, the padding's among them."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(2):
        ids_BT = torch.randint(0, 12, (2, 8), generator=generator)
        ids_BT[0, 2] = PAD
        positions_BT = torch.arange(8).expand(2, 8)
        labels_N = ids_BT[:, 1:].flatten()
        places_N = (torch.arange(2)[:, None] * 8 + torch.arange(7)).flatten()
        found.append(Batch(torch.arange(2), ids_BT, positions_BT, places_N, labels_N))
    return found


class DenseStorages(TorchDispatchMode):
    """Counts the storages of V x D numbers that are allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.kept: list[torch.Tensor] = []  # alive, or an address would be reused
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            place = tensor.untyped_storage().data_ptr() if torch.is_tensor(tensor) else None
            if place is not None and tensor.shape == (V, D) and place not in before | self.known:
                self.known.add(place)
                self.kept.append(tensor)
                self.count += 1
        return out


def gradients(student: Student) -> tuple[dict[str, torch.Tensor], int]:
    storages = DenseStorages()
    for batch in batches():
        loss = student(batch, None)["loss"]
        with storages:
            (loss / 28).backward()
    return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}, storages.count


@pytest.mark.parametrize("tied", [True, False])
def test_the_sum_is_the_one_that_autograd_makes(tied: bool, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", with_tokenizer=False, tie_word_embeddings=tied)
    plain, in_place = (
        Student(load_causal_lm(folder), Objective(kd_weight=0, ce_weight=1, chunk=5)) for _ in range(2)
    )
    in_place.model.sum_tied_gradients_in_place()
    (expected, dense_by_autograd), (summed, dense) = gradients(plain), gradients(in_place)
    assert expected.keys() == summed.keys()
    for name, gradient in expected.items():
        assert torch.allclose(summed[name], gradient, rtol=1e-5, atol=1e-6), name
    assert dense == 0 < dense_by_autograd if tied else dense == dense_by_autograd


def test_training_enables_it_except_with_several_ranks_or_a_compiled_body(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DDP reduces the gradient before the embedding's part is in; a compiled body's graph has the embedding."""

    def hooks(ranks: Ranks, compiled: bool) -> int:
        student = Student(load_causal_lm(folder), Objective())
        student.model.compiled_body = student.model.hf.base_model if compiled else None
        for _ in range(2):  # `check` trains the student that it was given, too
            ranks.spread(student)
        return len(student.model.hf.get_input_embeddings()._forward_hooks)

    folder = make_model(tmp_path / "model", with_tokenizer=False)
    assert hooks(Ranks(), compiled=False) == 1
    assert hooks(Ranks(), compiled=True) == 0
    monkeypatch.setattr(distributed, "DistributedDataParallel", lambda student, **_: student)
    assert hooks(Ranks(world=2), compiled=False) == 0


def test_a_model_that_writes_into_its_embedded_rows_trains(tmp_path: Path) -> None:
    config = transformers.CTRLConfig(vocab_size=V, n_embd=D, dff=64, n_layer=2, n_head=4, n_positions=64)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    hf = load_causal_lm(tmp_path / "model").hf
    ids_BT = batches()[0].input_ids_BT
    expected = torch.autograd.grad(hf(input_ids=ids_BT, labels=ids_BT).loss, hf.transformer.w.weight)[0]
    CausalLM(hf, "ctrl").sum_tied_gradients_in_place()
    hf(input_ids=ids_BT, labels=ids_BT).loss.backward()
    assert torch.allclose(hf.transformer.w.weight.grad, expected, rtol=1e-5, atol=1e-6)


def test_frozen_weights_stay_without_a_gradient(tmp_path: Path) -> None:
    model = load_causal_lm(make_model(tmp_path / "model", with_tokenizer=False))
    model.sum_tied_gradients_in_place()
    weight_VD = model.head.weight_VD.requires_grad_(False)
    hidden_BTD = model.hidden(batches()[0].input_ids_BT)
    hidden_BTD.sum().backward()
    assert weight_VD.grad is None


def test_a_retained_graph_gives_its_gradients_twice(tmp_path: Path) -> None:
    student = Student(
        load_causal_lm(make_model(tmp_path / "model", with_tokenizer=False)), Objective(kd_weight=0)
    )
    loss, parameters = student(batches()[0], None)["loss"] * 0.25, list(student.parameters())
    once, twice = (torch.autograd.grad(loss, parameters, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
