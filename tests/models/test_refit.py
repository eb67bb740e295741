"""Channels that were left out, made up for by the kept ones: against numpy, and never worse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model
from cut_off import cut_off
from test_layer_harm import make, rows
from test_repair import kl
from torch import Tensor

from potstill import UserError, distill, load_causal_lm, load_recipe
from potstill.models import refit as refitting
from potstill.models.causal_lm import CausalLM
from potstill.models.pruning import cut, kept_channels, stack_of
from potstill.models.refit import Refit, refit_channels, set_weights
from potstill.types import Batch

Recipe = Callable[..., Path]
KEEP = [0, 1, 3, 4]


def refitted(
    teacher: CausalLM, fitted: list[Batch], judged: list[Batch], width: int = 30
) -> tuple[CausalLM, CausalLM, Refit, dict[str, Tensor], dict[int, Tensor]]:
    """The bare cut, the refitted one, what was done, the matrices, and the channels."""
    channels = kept_channels(teacher, KEEP, width, rows(4))
    bare, student = (cut(teacher, KEEP, width, channels=channels) for _ in range(2))
    stack = stack_of(teacher)[0].removesuffix(".")
    refit, weights = refit_channels(teacher, student, stack, channels, fitted, judged)
    ours, theirs = student.hf.state_dict(), bare.hf.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    set_weights(student, weights)
    assert student.hf.training == bare.hf.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in teacher.hf.modules())
    return bare, student, refit, weights, channels


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox"])
def test_the_kl_falls_and_is_that_of_whole_models(family: str) -> None:
    teacher, judged = make(family), rows(14)[12:]
    width = {"gpt2": 96}.get(family, 36)
    bare, student, refit, weights, _ = refitted(teacher, rows(12), judged, width)
    assert refit.ridge in refitting.RIDGES and refit.kl_after < refit.kl_before
    assert refit.kl_before == pytest.approx(kl(teacher, bare, judged), rel=1e-3)
    assert refit.kl_after == pytest.approx(kl(teacher, student, judged), rel=1e-3)
    changed = {
        name
        for name, tensor in student.hf.state_dict().items()
        if not torch.equal(tensor, bare.hf.state_dict()[name])
    }
    assert changed == set(weights) and len(changed) == len(KEEP)
    assert all(torch.equal(student.hf.get_parameter(name), weight) for name, weight in weights.items())


def test_the_matrix_is_that_of_a_solver() -> None:
    """Numpy's least squares with the ridge as rows of its own; two documents a row, and padding that is not read."""
    teacher = make("llama")
    fitted, judged = rows(6), rows(8)[6:]
    padded = fitted[0]
    T = padded.input_ids_BT.shape[1]
    fitted[0] = Batch(
        padded.rows_B,
        padded.input_ids_BT,
        padded.position_ids_BT,
        padded.positions_N[padded.positions_N < T - 6],
        padded.labels_N[padded.positions_N < T - 6],
        torch.tensor([T - 6]),
    )
    seen: dict[str, list[Any]] = {"m": [], "h": []}
    layer = teacher.hf.model.layers[3]
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen["m"].append(args[0][0])),
        layer.register_forward_hook(lambda _, args, out: seen["h"].append(out[0] if out.ndim == 3 else out)),
    ]
    ends = [T - 6, *[T] * 5]
    with torch.no_grad():
        for batch in fitted:
            teacher.hidden(batch.input_ids_BT, batch.position_ids_BT)
    for hook in hooks:
        hook.remove()
    m_NC, h_ND = (
        np.concatenate([x[:end].double().numpy() for x, end in zip(seen[name], ends, strict=True)])
        for name in ("m", "h")
    )
    _, _, refit, weights, channels = refitted(teacher, fitted, judged)
    assert refit.ridge is not None
    keep_K = channels[3].numpy()
    whole_DC = layer.mlp.down_proj.weight.detach().double().numpy()
    m_NC = m_NC / np.linalg.norm(h_ND, axis=1, keepdims=True)
    kept_NK = m_NC[:, keep_K]
    ridge = refit.ridge * np.mean(np.sum(kept_NK**2, axis=0))
    left = np.concatenate([kept_NK, np.sqrt(ridge) * np.eye(len(keep_K))])
    right = np.concatenate([m_NC @ whole_DC.T, np.sqrt(ridge) * whole_DC[:, keep_K].T])
    expected_KD = np.linalg.lstsq(left, right, rcond=None)[0]
    found = weights["model.layers.2.mlp.down_proj.weight"].double().numpy()
    assert np.abs(found - expected_KD.T).max() < 1e-5 * np.abs(expected_KD).max()


def test_sums_of_few_layers_at_once_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, judged = make("llama"), rows(8)[6:]
    at_once = refitted(teacher, rows(6), judged)[3]
    monkeypatch.setattr(refitting, "SUMS_BYTES", 1)
    one_by_one = refitted(teacher, rows(6), judged)[3]
    assert at_once.keys() == one_by_one.keys()
    assert all(torch.equal(weight, one_by_one[name]) for name, weight in at_once.items())


def test_a_fit_that_does_not_lower_the_kl_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refitting._LayerSums, "_add", worse)
    bare, student, refit, weights, _ = refitted(make("llama"), rows(6), rows(8)[6:])
    assert refit.ridge is None and not weights and refit.kl_after == refit.kl_before
    ours, theirs = student.hf.state_dict(), bare.hf.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def worse(self: Any, module: Any, args: Any, output: Any) -> None:
    self.inner_KK.diagonal().fill_(1.0)
    self.outer_KD.fill_(3.0)


def test_a_run_begins_with_it_and_goes_on_with_it(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = make_model(tmp_path / "five", num_hidden_layers=4, initializer_range=0.2)
    path = tiny_recipe(
        teacher=f"{{name: torch, model: {teacher}}}",
        student="{name: cut, keep: [0, 1, 3], ffn_width: 40}",
        train="{steps: 4, rows_per_step: 2, lr: 1e-3, device: cpu, save_every: 2}",
    )
    whole = distill(path, out=tmp_path / "whole")
    table, receipt = whole.folds(), whole.receipt()
    assert table is not None and table["refit"]["kl_after"] < table["refit"]["kl_before"]
    assert receipt["student"]["repair"]["refit"] == table["refit"]
    bare = distill(load_recipe(path, ["student.repair=false"]), out=tmp_path / "bare")
    assert receipt["heldout_first"]["heldout/kl"] < bare.receipt()["heldout_first"]["heldout/kl"]
    assert bare.folds() is None
    cut_off(path, tmp_path / "cut", 3, monkeypatch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("potstill.build.repair.refit_channels", None)  # nothing is fitted again
        distill(path, out=tmp_path / "cut", resume=True)
    ours, theirs = (
        load_causal_lm(folder / "student").hf.state_dict() for folder in (tmp_path / "cut", whole.path)
    )
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    (whole.path / "folds.json").write_text(json.dumps(table | {"refit": {"kl_before": 1.0}}))
    with pytest.raises(UserError, match="damaged"):
        whole.folds()
