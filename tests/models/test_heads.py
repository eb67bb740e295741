"""Attention heads cut with their KV groups: what is left is the teacher with columns set to zero."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import make_model
from cut_off import cut_off
from test_layer_harm import logits_ND, rows
from test_repair import kl
from torch import Tensor

from potstill import UserError, distill, load_causal_lm, load_recipe
from potstill.build.resolve import resolve
from potstill.cli.main import main
from potstill.models import refit as refitting
from potstill.models import sizing
from potstill.models.causal_lm import CausalLM
from potstill.models.load import num_weights
from potstill.models.pruning import cut, cut_config, kept_groups, require_heads, stack_of
from potstill.models.refit import Refit, refit_heads, set_weights
from potstill.models.sizing import choose_size
from potstill.types import Batch

Recipe = Callable[..., Path]
SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "Llama": ({"attention_bias": True}, "o_proj"),
    "Mistral": ({"sliding_window": None}, "o_proj"),
    "Qwen2": ({}, "o_proj"),
    "Qwen3": ({"head_dim": 8}, "o_proj"),
    "Gemma": ({"head_dim": 8}, "o_proj"),
    "Gemma3Text": ({"head_dim": 8, "sliding_window": 8}, "o_proj"),
    "Phi3": ({}, "o_proj"),
    "Phi": ({}, "dense"),
}
"""What its config has of its own, and the matrix out of its attention."""
KEPT = 2


def actual_of(student: CausalLM, batch: Batch) -> Tensor:
    return logits_ND(copy.deepcopy(student.hf).eval(), batch)


def make(family: str, **changes: Any) -> CausalLM:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SHAPE | FAMILIES.get(family, ({}, ""))[0] | changes)
    hf = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if (
                name.endswith("bias") or "q_norm" in name or "k_norm" in name
            ):  # ones and zeros would hide an order
                parameter.normal_(std=0.5)
    return CausalLM(hf.eval(), family)


def by_hand(teacher: CausalLM, out: str, count: int) -> dict[int, list[int]]:
    """The groups of each layer by the length of what each adds, position by position, in numpy."""
    layers: Any = teacher.hf.get_submodule(stack_of(teacher)[0].removesuffix("."))
    kept = {}
    for number, layer in enumerate(layers):
        matrix, seen = getattr(layer.self_attn, out), list[np.ndarray]()
        hook = matrix.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][0].numpy()))
        with torch.no_grad():
            for batch in rows(4):
                teacher.hidden(batch.input_ids_BT, batch.position_ids_BT)
        hook.remove()
        x_NC = np.concatenate([x[batch.positions_N] for x, batch in zip(seen, rows(4), strict=True)])
        weight_DC = matrix.weight.detach().double().numpy()
        added = [
            x_g.astype(np.float64) @ w_g.T
            for x_g, w_g in zip(np.split(x_NC, 4, axis=1), np.split(weight_DC, 4, axis=1), strict=True)
        ]
        importance = [np.sqrt((added_ND**2).sum(1).mean()) for added_ND in added]
        kept[number] = sorted(np.argsort(importance)[::-1][:count].tolist())
    return kept


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_is_its_teacher_with_the_columns_of_other_heads_set_to_zero(
    family: str, tmp_path: Path
) -> None:
    teacher, out = make(family), FAMILIES[family][1]
    kept = by_hand(teacher, out, KEPT)
    assert any(kept[number] != [0, 1] for number in (0, 2))
    student = cut(teacher, [0, 2], None, rows(4), kv_heads=KEPT)

    whole: Any = copy.deepcopy(teacher.hf)
    layers = whole.get_submodule(stack_of(teacher)[0].removesuffix("."))
    for number in (0, 2):
        matrix = getattr(layers[number].self_attn, out)
        width = matrix.weight.shape[1] // 4
        for group in {0, 1, 2, 3} - {*kept[number]}:
            matrix.weight.data[:, group * width : (group + 1) * width] = 0
    layers[1].forward = lambda hidden_states, *args, **kwargs: hidden_states
    for batch in rows():
        expected, actual = logits_ND(whole, batch), actual_of(student, batch)
        assert float((expected - actual).abs().max()) < 1e-4 * float(expected.abs().max())

    config, before = student.hf.config, teacher.hf.config
    assert (config.num_key_value_heads, config.num_attention_heads) == (2, 4)
    assert config.head_dim == (getattr(before, "head_dim", None) or 4)
    assert num_weights(config) == sum(p.numel() for p in student.hf.parameters())
    student.save(tmp_path / "student")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert torch.allclose(logits_ND(again.eval(), rows()[0]), actual_of(student, rows()[0]), atol=1e-5)


def test_all_heads_are_the_teacher_bit_for_bit() -> None:
    teacher = make("Llama")
    student = cut(teacher, [0, 1, 2], None, rows(2), kv_heads=4)
    state = teacher.hf.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in student.hf.state_dict().items())
    assert student.hf.config.to_dict() == cut(teacher, [0, 1, 2]).hf.config.to_dict()


@pytest.mark.parametrize(
    ("family", "changes", "found"),
    [
        ("Olmo2", {}, "self_attn has k_norm, k_proj, o_proj, q_norm"),  # norms over all heads
        ("GptOss", {"head_dim": 4, "num_local_experts": 2}, "self_attn has .*sinks"),
        ("GPTNeoX", {}, "attention has dense, query_key_value"),
        ("StableLm", {}, "StableLmForCausalLM does not keep heads of 4"),
        ("GPT2", {"num_key_value_heads": None}, "config of a gpt2 has None for num_key_value_heads"),
        ("DeepseekV3", {"first_k_dense_replace": 3}, "self_attn has .*kv_b_proj"),
    ],
)
def test_an_attention_that_cannot_lose_heads_is_refused_by_name(
    family: str, changes: dict[str, Any], found: str
) -> None:
    teacher = make(family, **changes)
    for refused in (
        lambda: cut(teacher, [0, 1], None, rows(2), kv_heads=2),
        lambda: require_heads(teacher.hf.config, 2),
    ):
        with pytest.raises(UserError, match=rf"student\.kv_heads: .*{found}.* Leave kv_heads out\."):
            refused()


def test_a_number_that_is_impossible_is_refused() -> None:
    config = make("Llama").hf.config
    for count in (0, 5, -1):
        with pytest.raises(
            UserError, match=rf"kv_heads: {count} key/value heads .* teacher's 4\. Give 1 to 4\."
        ):
            cut_config(config, [0], 3, None, count)
    # 6 query heads, of which a hidden size of 32 is no multiple: Transformers would not load it again.
    with pytest.raises(UserError, match=r"kv_heads: the config of a llama cannot have 3 of 4 .*multiple"):
        cut_config(config, [0], 3, None, 3)
    assert cut_config(make("Qwen3").hf.config, [0], 3, None, 3).num_attention_heads == 6


def refitted(teacher: CausalLM) -> tuple[CausalLM, CausalLM, Refit, dict[str, Tensor], dict[int, Tensor]]:
    """The bare cut, the refitted one, what was done, the matrices, and the groups."""
    groups = kept_groups(teacher, [0, 2], KEPT, rows(4))
    bare, student = (cut(teacher, [0, 2], kv_heads=KEPT, groups=groups) for _ in range(2))
    stack = stack_of(teacher)[0].removesuffix(".")
    refit, weights = refit_heads(teacher, student, stack, groups, rows(12), rows(14)[12:])
    assert all(
        torch.equal(tensor, bare.hf.state_dict()[name]) for name, tensor in student.hf.state_dict().items()
    )
    set_weights(student, weights)
    return bare, student, refit, weights, groups


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_what_other_heads_gave_is_fitted_as_by_a_solver(family: str) -> None:
    """Numpy's least squares with the ridge as rows of its own; and the KL falls, as of whole models."""
    teacher, out = make(family), FAMILIES[family][1]
    layer: Any = teacher.hf.model.layers[2]
    matrix = getattr(layer.self_attn, out)
    seen: dict[str, list[np.ndarray]] = {"m": [], "h": []}
    hooks = [
        matrix.register_forward_pre_hook(lambda _, args: seen["m"].append(args[0][0].double().numpy())),
        layer.register_forward_hook(
            lambda _, args, output: seen["h"].append(
                (output if isinstance(output, Tensor) else output[0])[0].double().numpy()
            )
        ),
    ]
    with torch.no_grad():
        for batch in rows(12):
            teacher.hidden(batch.input_ids_BT, batch.position_ids_BT)
    for hook in hooks:
        hook.remove()
    bare, student, refit, weights, groups = refitted(teacher)
    judged = rows(14)[12:]
    assert refit.ridge in refitting.RIDGES and refit.kl_after < refit.kl_before
    assert refit.kl_before == pytest.approx(kl(teacher, bare, judged), rel=1e-3)
    assert refit.kl_after == pytest.approx(kl(teacher, student, judged), rel=1e-3)

    m_NC, h_ND = (np.concatenate(seen[name]) for name in ("m", "h"))
    m_NC = m_NC / np.linalg.norm(h_ND, axis=1, keepdims=True)
    width = m_NC.shape[1] // 4
    columns = [group * width + at for group in groups[2].tolist() for at in range(width)]
    whole_DC, kept_NK = matrix.weight.detach().double().numpy(), m_NC[:, columns]
    ridge = refit.ridge * np.mean(np.sum(kept_NK**2, axis=0))
    left = np.concatenate([kept_NK, np.sqrt(ridge) * np.eye(len(columns))])
    right = np.concatenate([m_NC @ whole_DC.T, np.sqrt(ridge) * whole_DC[:, columns].T])
    expected_DK = np.linalg.lstsq(left, right, rcond=None)[0].T
    names = [f"model.layers.{place}.self_attn.{out}.weight" for place in (0, 1)]
    assert sorted(weights) == names
    found = weights[names[1]].double().numpy()
    assert np.abs(found - expected_DK).max() < 1e-5 * np.abs(expected_DK).max()


def without_a_group(folder: Path, group: int = 0) -> Path:
    """A teacher of four KV groups of which one adds nothing in any layer."""
    make_model(folder, num_attention_heads=8, num_key_value_heads=4, initializer_range=0.2)
    teacher = load_causal_lm(folder)
    for layer in teacher.hf.model.layers:
        for spare in (group, group + 1):
            layer.self_attn.o_proj.weight.data[:, spare * 8 : (spare + 1) * 8] = 0
    teacher.hf.save_pretrained(folder)
    return folder


def test_a_size_takes_heads_where_they_cost_least(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two groups that add nothing go first, at no KL; the run names them, and goes on with them."""
    folder = without_a_group(tmp_path / "teacher")
    whole = num_weights(load_causal_lm(folder).hf.config)
    saved = 4 * 2 * (8 + 4 + 4 + 8) * 32
    path = tiny_recipe(
        teacher=f"{{name: torch, model: {folder}}}",
        student=f"{{name: cut, weights: {whole - saved}, repair: false}}",
        train="{steps: 4, rows_per_step: 2, lr: 1e-3, device: cpu, save_every: 2}",
        allow_identical="true",
    )
    run = distill(path, out=tmp_path / "run")
    settled, table = load_recipe(run.resolved).student, run.layers()
    assert table is not None and (settled.keep, settled.ffn_width, settled.kv_heads) == (
        [0, 1, 2, 3],
        None,
        2,
    )
    # Of three groups there are six query heads, and 32 is no multiple of six.
    assert [(move["kind"], move["kv_heads"], move["weights"]) for move in table["moves"]] == [
        ("heads", 2, whole - saved)
    ]
    assert table["kl"] == pytest.approx(0, abs=1e-6) and table["kv_heads"] == 2
    student = run.receipt()["student"]
    assert (student["kv_heads"], student["of_kv_heads"]) == (2, 4)
    assert run.receipt()["heldout_first"]["heldout/kl"] == pytest.approx(0, abs=1e-5)
    trained = load_causal_lm(run.student)
    assert sum(p.numel() for p in trained.hf.parameters()) == whole - saved
    assert main(["report", str(run.path)]) == 0
    cut_off(path, tmp_path / "cut", 3, monkeypatch)
    monkeypatch.setattr("potstill.build.setup.choose_size", None)  # nothing is measured again
    distill(path, out=tmp_path / "cut", resume=True)
    ours, theirs = (load_causal_lm(of / "student").hf.state_dict() for of in (tmp_path / "cut", run.path))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize(("family", "left"), [("Llama", 2), ("Qwen3", 3)])
def test_a_size_knows_the_kl_of_a_student_with_fewer_heads(
    family: str, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the student that is cut, which has fewer heads and not masked ones."""
    monkeypatch.setattr(sizing, "_spared", lambda *given: None)
    monkeypatch.setattr(sizing._Shape, "know_channels", lambda shape: "")
    teacher = make(family)
    chosen = choose_size(teacher, rows(), rows(4), num_weights(teacher.hf.config) - 1, print)
    assert ([move["kind"] for move in chosen.moves], chosen.kv_heads) == (["heads"], left)
    student = cut(teacher, [0, 1, 2], None, rows(4), kv_heads=left)
    assert chosen.kl == pytest.approx(kl(teacher, student, rows()), rel=1e-3)


def test_a_model_that_cannot_lose_heads_loses_the_rest() -> None:
    model, told = make("Olmo2"), list[str]()
    chosen = choose_size(model, rows(), rows(4), num_weights(model.hf.config) - 1, told.append)
    assert chosen.kv_heads is None and [move["kind"] for move in chosen.moves] != ["heads"]
    assert any("no attention loses heads" in line and "q_norm" in line for line in told)


def test_a_run_repairs_it_goes_on_with_it_and_adapts_it(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = make_model(tmp_path / "four", num_attention_heads=8, num_key_value_heads=4)
    path = tiny_recipe(
        teacher=f"{{name: torch, model: {teacher}}}",
        student="{name: cut, keep: [0, 1, 3], ffn_width: 48, kv_heads: 2}",
        train="{steps: 4, rows_per_step: 2, lr: 1e-3, device: cpu, save_every: 2}",
    )
    whole = distill(path, out=tmp_path / "whole")
    table, receipt = whole.folds(), whole.receipt()
    assert table is not None and table["refit_heads"]["kl_after"] < table["refit_heads"]["kl_before"]
    assert table["refit"]["kl_before"] == pytest.approx(table["refit_heads"]["kl_after"], rel=1e-6)
    assert receipt["student"]["repair"]["refit_heads"] == table["refit_heads"]
    assert load_recipe(whole.resolved).student.kv_heads == 2
    planned = num_weights(resolve(load_recipe(path)).student.model_config)
    assert planned == sum(p.numel() for p in load_causal_lm(whole.student).hf.parameters())
    cut_off(path, tmp_path / "cut", 3, monkeypatch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("potstill.build.repair.refit_heads", None)  # nothing is fitted again
        distill(path, out=tmp_path / "cut", resume=True)
    ours, theirs = (load_causal_lm(of / "student").hf.state_dict() for of in (tmp_path / "cut", whole.path))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert main(["report", str(whole.path)]) == 0


def test_adapters_of_a_student_with_fewer_heads(tiny_recipe: Recipe, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="the extra lora is not installed; not run")
    teacher = make_model(tmp_path / "four", num_attention_heads=8, num_key_value_heads=4)
    path = tiny_recipe(
        teacher=f"{{name: torch, model: {teacher}}}",
        train="{steps: 2, rows_per_step: 2, lr: 1e-3, device: cpu}",
    )
    lora = "student={name: cut, keep: [0, 1, 3], kv_heads: 2, repair: false, lora: {rank: 2}}"
    adapted = distill(load_recipe(path, [lora]), out=tmp_path / "lora")
    config = load_causal_lm(adapted.student).hf.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 4)
    named = json.loads((adapted.adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == "four cut to layers 0, 1, 3 with 2 of 4 KV groups"
