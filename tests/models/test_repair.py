"""What left-out layers did, folded into the layer before them: exact where a linear map can be, and never worse."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from cut_off import assert_goes_on_without, cut_off
from safetensors.torch import load_file, save_file
from test_layer_harm import FAMILIES, SMALL, logits_ND, make, rows
from torch import Tensor

from potstill import UserError, distill
from potstill.build import repair as build_repair
from potstill.build import setup
from potstill.build.resolve import resolve
from potstill.cli.main import main
from potstill.models import repair as repairing
from potstill.models.causal_lm import CausalLM
from potstill.models.pruning import cut, stack_of
from potstill.models.repair import Repair, fold_gaps
from potstill.recipe.load import load
from potstill.types import Batch

Recipe = Callable[..., Path]


def kl(teacher: CausalLM, student: CausalLM, batches: list[Batch]) -> float:
    """In float64, of models that are whole."""
    total, count = 0.0, 0
    for batch in batches:
        p, q = (
            logits_ND(copy.deepcopy(model.hf).eval(), batch).log_softmax(-1) for model in (teacher, student)
        )
        total += float((p.exp() * (p - q)).sum())
        count += len(batch.positions_N)
    return total / count


def folded(
    teacher: CausalLM, keep: list[int], fitted: list[Batch], judged: list[Batch]
) -> tuple[CausalLM, Repair]:
    student = cut(teacher, keep)
    before = {name: tensor.clone() for name, tensor in student.hf.state_dict().items()}
    stack = stack_of(teacher)[0].removesuffix(".")
    repair = fold_gaps(teacher, student, stack, keep, fitted, judged, lambda text: None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.hf.state_dict().items())
    assert student.hf.training and not any("forward" in vars(module) for module in student.hf.modules())
    repair.apply(student)
    return student, repair


def written_by(layer: Any, names: tuple[str, ...]) -> list[Any]:
    return [module for name, module in layer.named_modules() if name.rpartition(".")[2] in names]


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"gemma2"}))
def test_the_kl_falls_and_is_that_of_whole_models(family: str) -> None:
    teacher, fitted, judged = make(family, spread=0.1), rows(12), rows(14)[12:]
    bare = cut(teacher, [0, 3, 4])
    student, repair = folded(teacher, [0, 3, 4], fitted, judged)
    (fold,) = repair.folds
    assert (fold.layer, fold.left_out) == (0, [1, 2])
    assert fold.kl_before == pytest.approx(kl(teacher, bare, judged), rel=1e-4)
    assert fold.kl_after == pytest.approx(kl(teacher, student, judged), rel=1e-4)
    assert fold.kl_after < fold.kl_before and fold.ridge is not None
    # Nothing else is changed, and a copy with the kept matrices is the same student.
    changed = [
        name
        for name, tensor in student.hf.state_dict().items()
        if not torch.equal(tensor, bare.hf.state_dict()[name])
    ]
    assert [*repair.weights] == changed and len(changed) == 1
    repair.apply(bare)
    assert all(
        torch.equal(tensor, bare.hf.state_dict()[name]) for name, tensor in student.hf.state_dict().items()
    )


def test_least_squares_are_those_of_a_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    """The change of one gap against numpy's least squares over the stacked positions and the ridge."""
    monkeypatch.setattr(repairing, "RIDGES", (0.5,))
    teacher, fitted, judged = make("llama", spread=0.1), rows(3), rows(5)[3:]
    student, repair = folded(teacher, [0, 1, 4], fitted, judged)
    bare, seen = cut(teacher, [0, 1, 4]), {}
    layers = {"y": bare.hf.model.layers[1], "h": teacher.hf.model.layers[3]}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, a, out, name=name: seen.setdefault(name, []).append(out))
    bare.hf.model.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda _, a: seen.setdefault("m", []).append(a[0])
    )
    with torch.no_grad():
        for batch in fitted:
            for model in (bare, teacher):
                model.hidden(batch.input_ids_BT, batch.position_ids_BT)
    y, h, m = (torch.cat(seen[name]).flatten(0, 1).double().numpy() for name in ("y", "h", "m"))
    weight = 1 / np.linalg.norm(h, axis=-1, keepdims=True)
    x, r = m * weight, (h - y) * weight
    ridge = 0.5 * np.mean(np.sum(x * x, axis=0))
    stacked = np.concatenate([x, np.sqrt(ridge) * np.eye(x.shape[1])])
    change, *_ = np.linalg.lstsq(stacked, np.concatenate([r, np.zeros((x.shape[1], r.shape[1]))]), rcond=None)
    expected = bare.hf.model.layers[1].mlp.down_proj.weight.detach().numpy() + change.T
    (got,) = repair.weights.values()
    assert repair.folds[0].ridge == 0.5
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(student.hf.model.layers[1].mlp.down_proj.weight, got)


def test_a_layer_that_adds_what_an_mlp_before_it_could_have_added_is_made_up_for_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The layer that is left out adds a linear map of the activations before it, so that nothing is lost."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, intermediate_size=16, initializer_range=0.1)
    teacher = CausalLM(transformers.AutoModelForCausalLM.from_config(config).eval(), "llama")
    first, second = teacher.hf.model.layers[1], teacher.hf.model.layers[2]
    change = torch.randn(32, 16) * 0.3
    activations: list[Tensor] = []
    first.mlp.down_proj.register_forward_pre_hook(lambda _, args: activations.append(args[0]))
    second.forward = lambda hidden, *args, **kwargs: hidden + activations.pop() @ change.T  # type: ignore[method-assign]
    fitted, judged = rows(24), rows(28)[24:]
    stack = "model.layers"
    monkeypatch.setattr(repairing, "RIDGES", (1e-6,))
    plain = CausalLM(transformers.AutoModelForCausalLM.from_config(config).eval(), "plain")
    plain.hf.load_state_dict(teacher.hf.state_dict())
    student = cut(plain, [0, 1, 3, 4])
    repair = fold_gaps(teacher, student, stack, [0, 1, 3, 4], fitted, judged, print)
    (fold,) = repair.folds
    assert fold.kl_before > 1e-3 and fold.kl_after < 1e-3 * fold.kl_before


def test_a_fit_that_does_not_lower_the_kl_is_left() -> None:
    teacher = make("llama", spread=0.1)
    for module in written_by(teacher.hf.model.layers[2], FAMILIES["llama"][1]):
        torch.nn.init.zeros_(module.weight)
    fitted, judged = rows(6), rows(8)[6:]
    student, repair = folded(teacher, [0, 1, 3, 4], fitted, judged)
    (fold,) = repair.folds  # nothing is lacking, so nothing is better
    assert fold.ridge is None and fold.kl_before == fold.kl_after == pytest.approx(0, abs=1e-6)
    assert not repair.weights
    bare = cut(teacher, [0, 1, 3, 4]).hf.state_dict()
    assert all(torch.equal(tensor, bare[name]) for name, tensor in student.hf.state_dict().items())


def test_several_gaps_are_folded_from_the_bottom_and_padding_is_not_read() -> None:
    teacher, judged = make("llama", spread=0.1), rows(14)[12:]
    student, repair = folded(teacher, [0, 2, 4], rows(12), judged)
    assert [(fold.layer, fold.left_out) for fold in repair.folds] == [(0, [1]), (2, [3])]
    assert repair.folds[1].kl_before == repair.folds[0].kl_after
    assert repair.folds[1].kl_after == pytest.approx(kl(teacher, student, judged), rel=1e-4)
    padded = []
    for batch in rows(12):
        ids = torch.cat([batch.input_ids_BT, torch.randint(61, (1, 8))], 1)
        places = torch.cat([batch.position_ids_BT, torch.arange(8)[None]], 1)
        padded.append(Batch(batch.rows_B, ids, places, batch.positions_N, batch.labels_N, torch.tensor([24])))
    _, of_padded = folded(teacher, [0, 2, 4], padded, judged)
    for name, weight in repair.weights.items():
        torch.testing.assert_close(of_padded.weights[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("keep", "count", "why"),
    [
        ([0, 1, 2, 3, 4], 2, "no layer was left out behind a kept one"),
        ([2, 3, 4], 2, "no layer was left out behind a kept one"),
        ([0, 4], 0, "too few training rows"),
    ],
)
def test_where_nothing_can_be_folded_it_is_said(keep: list[int], count: int, why: str) -> None:
    _student, repair = folded(make("llama"), keep, rows(2), rows(count))
    assert repair == Repair([], {}, why)


def test_a_layer_that_normalises_what_its_mlp_gives_is_left() -> None:
    teacher = make("gemma2")
    bare = cut(teacher, [0, 3, 4]).hf.state_dict()
    student, repair = folded(teacher, [0, 3, 4], rows(2), rows(4)[2:])
    assert repair.why_not == "its layers do not add what their MLPs give to the stream as it is"
    assert all(torch.equal(tensor, bare[name]) for name, tensor in student.hf.state_dict().items())


def test_an_mlp_that_is_not_known_is_left() -> None:
    torch.manual_seed(0)
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "num_key_value_heads": 2}
    config = transformers.MixtralConfig(**SMALL, **experts, intermediate_size=16)
    teacher = CausalLM(transformers.AutoModelForCausalLM.from_config(config).eval(), "mixtral")
    _, repair = folded(teacher, [0, 3, 4], rows(2), rows(4)[2:])
    assert repair.why_not == "the MLPs of MixtralForCausalLM are of a kind that is not known here"
    assert not repair.weights


# ---- a run ------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tiny_recipe: Recipe) -> Path:
    return tiny_recipe(
        student="{name: cut, keep: [0, 3], repair: true}",
        train="{steps: 4, rows_per_step: 2, lr: 1e-3, save_every: 2, device: cpu}",
    )


def test_a_run_starts_from_the_repaired_student_and_keeps_what_was_folded(
    recipe: Path, tmp_path: Path
) -> None:
    run = distill(recipe, out=tmp_path / "run")
    table, weights = run.folds(), run.folded()
    assert table is not None
    (fold,) = table["folds"]
    assert fold["left_out"] == [1, 2] and fold["kl_after"] < fold["kl_before"]
    assert [*weights] == ["model.layers.0.mlp.down_proj.weight"]
    assert run.receipt()["student"]["repair"] == table
    bare = distill(recipe, overrides=["student.repair=false"], out=tmp_path / "bare")
    assert bare.folds() is None and "repair" not in bare.receipt()["student"]
    first, second = (each.metrics()[0]["heldout/kl"] for each in (run, bare))
    assert first < second


def test_the_report_has_the_kl_after_each_fold(recipe: Path, tmp_path: Path) -> None:
    run = distill(recipe, out=tmp_path / "run")
    assert main(["report", str(run.path), "--no-models"]) == 0
    table, page = run.folds(), (run.path / "report.html").read_text()
    assert table is not None
    for number, value in enumerate((table["folds"][0]["kl_before"], table["folds"][0]["kl_after"])):
        assert f"<title>gap {number}: {value:.4g}</title>" in page


def test_a_resumed_run_takes_what_was_folded_and_fits_nothing_again(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_goes_on_without(recipe, tmp_path, monkeypatch, build_repair, "fold_gaps")


DAMAGE = {
    "gone": r"folds\.safetensors: damaged",
    "cut short": r"folds\.safetensors: damaged",
    "of another student": r"another input: student",
    "other numbers": r"another input: student",
    "no table": r"folds\.json: damaged",
    "an empty fold": r"folds\.json: damaged",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_resumed_run_whose_folds_are_damaged_is_one_line(
    damage: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_off(recipe, tmp_path / "run", 3, monkeypatch)
    file = tmp_path / "run" / "folds.safetensors"
    weights = load_file(file)
    (name,) = weights
    if damage == "gone":
        file.unlink()
    elif damage == "cut short":
        file.write_bytes(file.read_bytes()[:-8])
    elif damage == "of another student":
        save_file({name: weights[name][1:].contiguous()}, file)
    elif damage == "other numbers":
        save_file({name: weights[name] * 1.001}, file)
    else:
        table = {"why_not": None} | ({} if damage == "no table" else {"folds": [{}]})
        file.with_suffix(".json").write_text(json.dumps(table))
    with pytest.raises(UserError, match=DAMAGE[damage]):
        distill(recipe, out=tmp_path / "run", resume=True)


def test_ranks_take_the_first_s_matrices(recipe: Path) -> None:
    other = Repair([], {"model.layers.1.mlp.down_proj.weight": torch.full((32, 64), 0.5)})

    def agreed(value: Any) -> Any:
        return other if isinstance(value, Repair) else value

    made = setup.set_up(resolve(load(recipe)), print, agreed=agreed)
    with contextlib.closing(made.teacher):
        first, second = (layer.mlp.down_proj.weight for layer in made.student.model.hf.model.layers)
        assert bool((second == 0.5).all()) and made.repair is other
        # What this rank would have folded is not there.
        uncut, _ = made.teacher.to_cut_from()
        assert torch.equal(first, uncut.hf.model.layers[0].mlp.down_proj.weight)
