"""A residual stream cut to fewer channels is the model whose norms see and give these alone."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from cut_off import cut_off
from test_layer_harm import logits_ND, rows
from test_repair import kl
from torch import Tensor

from potstill import UserError, distill, load_causal_lm, load_recipe
from potstill.build.resolve import resolve
from potstill.cli.main import main
from potstill.models import refit as refitting
from potstill.models.causal_lm import CausalLM
from potstill.models.load import num_weights, plain_config
from potstill.models.refit import set_weights
from potstill.models.stream_config import set_hidden_size, stream_dims
from potstill.models.stream_refit import refit_stream
from potstill.models.stream_width import kept_of_stream, narrowed
from potstill.types import Batch

Recipe = Callable[..., Path]
HIDDEN, KEPT = 32, 16
SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"tie_word_embeddings": True, "attention_bias": True},
    "Llama, untied": {"tie_word_embeddings": False},
    "Mistral": {"sliding_window": None},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Gemma": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "Gemma3Text": {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "Phi3": {},
    "Olmo2": {},
    "Nemotron": {},
    "Phi": {},
    "Granite": {"embedding_multiplier": 3.0},
    "Cohere": {},
    "Mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
}
RMS = [name for name in FAMILIES if name not in ("Nemotron", "Phi", "Cohere", "Mixtral")]
"""Their norms divide by a mean square, which channels of zeros change by a factor alone. (Mixtral's experts do not run
in float64.)"""


def logits_of(model: CausalLM, batch: Batch) -> Tensor:
    return logits_ND(copy.deepcopy(model.hf).eval(), batch)


def make(family: str, **changes: Any) -> CausalLM:
    torch.manual_seed(0)
    kind = family.partition(",")[0]
    config = getattr(transformers, f"{kind}Config")(**SHAPE | FAMILIES.get(family, {}) | changes)
    hf = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if name.endswith("bias") or parameter.ndim == 1:  # ones and zeros would hide an order
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return CausalLM(hf.eval(), family)


def with_half_empty(model: CausalLM, factor: float = 0.0) -> tuple[CausalLM, list[int]]:
    """Half of the channels are zero everywhere, or so many times what they were; the others."""
    filled = sorted(torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(3))[:KEPT].tolist())
    empty = sorted({*range(HIDDEN)} - {*filled})
    for name, tensor in model.hf.named_parameters():
        if "embed_tokens" in name:
            tensor.data[:, empty] *= factor
        elif any(part in name for part in ("o_proj.", "down_proj.")):
            tensor.data[empty] *= factor
    return model, filled


def by_hand(teacher: CausalLM, count: int) -> list[int]:
    """The channels by what the norms give, in numpy, norm by norm and position by position."""
    seen: list[list[np.ndarray]] = []
    hooks = []
    norms: Any = [
        module for name, module in teacher.hf.named_modules() if name.endswith(("layernorm", "model.norm"))
    ]
    assert len(norms) == 7
    for norm in norms:
        seen.append([])
        hooks.append(norm.register_forward_hook(lambda _, a, out, at=seen[-1]: at.append(out[0].numpy())))
    with torch.no_grad():
        for batch in rows(4):
            teacher.hidden(batch.input_ids_BT, batch.position_ids_BT)
    for hook in hooks:
        hook.remove()
    importance = np.zeros(HIDDEN)
    for outputs in seen:
        of = [np.abs(y_TD[b.positions_N.numpy()]) for y_TD, b in zip(outputs, rows(4), strict=True)]
        importance += np.concatenate(of).astype(np.float64).mean(0)
    return sorted(np.argsort(-importance)[:count].tolist())


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_is_its_tensors_sliced_by_hand(tied: bool, tmp_path: Path) -> None:
    teacher = make("Llama", tie_word_embeddings=tied)
    keep_K = kept_of_stream(teacher, KEPT, rows(4))
    assert keep_K.tolist() == by_hand(teacher, KEPT) != [*range(KEPT)]
    student = narrowed(teacher, keep_K)

    config = transformers.LlamaConfig(
        **SHAPE | {"hidden_size": KEPT, "head_dim": 8, "tie_word_embeddings": tied, "attention_bias": True}
    )
    golden: Any = transformers.LlamaForCausalLM(config).eval()
    state, k = teacher.hf.state_dict(), keep_K
    into, out = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")
    for name, tensor in golden.state_dict().items():
        whole, part = state[name], name.split(".")[-2]
        if part in into:
            sliced = whole if name.endswith("bias") else whole[:, k]
        elif part in out or "norm" in part:
            sliced = whole[k]
        else:
            assert part in ("embed_tokens", "lm_head")
            sliced = whole[:, k]
        tensor.copy_(sliced)
    assert all(
        torch.equal(tensor, golden.state_dict()[name]) for name, tensor in student.hf.state_dict().items()
    )
    assert torch.equal(logits_of(student, rows()[0]), logits_ND(golden, rows()[0]))
    embedding, head = student.hf.get_input_embeddings().weight, student.hf.get_output_embeddings().weight
    assert (embedding is head) == tied
    assert num_weights(student.hf.config) == sum(p.numel() for p in student.hf.parameters())
    student.save(tmp_path / "student")
    again = load_causal_lm(tmp_path / "student")
    assert again.hf.config.head_dim == 8
    assert torch.equal(logits_ND(again.hf, rows()[0]), logits_ND(golden, rows()[0]))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_is_its_teacher_whose_norms_see_these_channels_alone(family: str, tmp_path: Path) -> None:
    """Of each norm, by a narrow one of the family's own; the others' channels are read as zeros."""
    teacher = make(family)
    keep_K = kept_of_stream(teacher, KEPT, rows(4))
    assert keep_K.tolist() != [*range(KEPT)]
    student = narrowed(teacher, keep_K)
    assert student.hf.config.hidden_size == KEPT

    whole: Any = copy.deepcopy(teacher.hf)
    ours = dict(student.hf.named_modules())
    for name, module in whole.named_modules():
        is_norm = "norm" in name.rpartition(".")[2] and module.weight.shape == (HIDDEN,)
        if is_norm and "q_norm" not in name and "k_norm" not in name:
            own: Any = copy.deepcopy(ours[name])
            own.weight.data = module.weight.data[keep_K]  # what it was before it made up for anything

            def alone(x: Tensor, own: Any = own) -> Tensor:
                return torch.zeros_like(x).index_copy(-1, keep_K, own(x[..., keep_K]))

            module.forward = alone
    embedding = whole.get_input_embeddings()
    embedded = embedding.forward
    is_kept_D = torch.zeros(HIDDEN, dtype=torch.bool)
    is_kept_D[keep_K] = True
    embedding.forward = lambda ids: embedded(ids) * is_kept_D
    student.save(tmp_path / "student")
    again = load_causal_lm(tmp_path / "student")
    for batch in rows():
        given = {"input_ids": batch.input_ids_BT, "position_ids": batch.position_ids_BT, "use_cache": False}
        with torch.no_grad():
            expected, actual, saved = (hf(**given).logits for hf in (whole, student.hf, again.hf))
        assert float((expected - actual).abs().max()) < 1e-4 * float(expected.abs().max())
        assert torch.equal(actual, saved)


@pytest.mark.parametrize("family", RMS)
def test_channels_that_are_empty_go_first_and_cost_nothing(family: str) -> None:
    """Once the norms make up for the mean square of fewer channels; before that it is another model."""
    teacher, filled = with_half_empty(make(family))
    keep_K = kept_of_stream(teacher, KEPT, rows(4))
    assert keep_K.tolist() == filled
    student = narrowed(teacher, keep_K)
    norms, _, weights = refit_stream(teacher, teacher, student, keep_K, rows(12), rows(14)[12:], print)
    judged = rows(14)[12:]
    before = kl(teacher, student, judged)
    assert norms.kl_before == pytest.approx(before, rel=1e-3) and before > 0.01
    assert norms.ridge is not None and norms.kl_after < 1e-4
    set_weights(student, weights)
    assert kl(teacher, student, judged) < 1e-4


@pytest.mark.parametrize("family", ["Llama, untied", "Qwen3"])
def test_what_other_channels_gave_is_fitted_as_by_a_solver(family: str) -> None:
    """Numpy's least squares with the ridge as rows of its own; and the KL falls, as of whole models."""
    teacher, filled = with_half_empty(make(family), 0.1)
    keep_K = kept_of_stream(teacher, KEPT, rows(4))
    assert keep_K.tolist() == filled
    bare, student = narrowed(teacher, keep_K), narrowed(teacher, keep_K)
    judged, state = rows(14)[12:], {name: t.clone() for name, t in student.hf.state_dict().items()}
    norms, matrices, weights = refit_stream(teacher, teacher, student, keep_K, rows(12), judged, print)
    assert all(torch.equal(tensor, state[name]) for name, tensor in student.hf.state_dict().items())
    assert norms.ridge is not None and matrices.ridge in refitting.RIDGES
    assert norms.kl_before == pytest.approx(kl(teacher, bare, judged), rel=1e-3)
    assert norms.kl_before > norms.kl_after == pytest.approx(matrices.kl_before, rel=1e-6)
    set_weights(student, weights)
    assert matrices.kl_after < matrices.kl_before
    assert matrices.kl_after == pytest.approx(kl(teacher, student, judged), rel=1e-3)

    kept = keep_K.tolist()
    for norm, readers in {
        "model.layers.1.input_layernorm": ["q_proj", "v_proj"],
        "model.norm": ["lm_head"] if family == "Llama, untied" else [],
    }.items():
        x_ND = inputs_of(teacher, norm)
        weight_D = teacher.hf.get_parameter(f"{norm}.weight").detach().double().numpy()
        factor = weights[f"{norm}.weight"].double().numpy() / weight_D[kept]
        np.testing.assert_allclose(factor, factor[0], rtol=1e-5)
        rms = [np.sqrt((x**2).mean(1, keepdims=True)) for x in (x_ND, x_ND[:, kept])]
        wide_ND, bare_NK = x_ND / rms[0] * weight_D, x_ND[:, kept] / rms[1] * weight_D[kept]
        best = (wide_ND[:, kept] * bare_NK).sum() / (bare_NK**2).sum()
        assert factor[0] == pytest.approx(best, rel=1e-4)
        m_NK = best * bare_NK
        ridge = matrices.ridge * np.mean((m_NK**2).sum(0))
        for reader in readers:
            name = "lm_head.weight" if reader == "lm_head" else f"model.layers.1.self_attn.{reader}.weight"
            wide_RD = teacher.hf.get_parameter(name).detach().double().numpy()
            left = np.concatenate([m_NK, np.sqrt(ridge) * np.eye(len(kept))])
            right = np.concatenate([wide_ND @ wide_RD.T, np.sqrt(ridge) * wide_RD[:, kept].T])
            expected_RK = np.linalg.lstsq(left, right, rcond=None)[0].T
            found = weights[name].double().numpy()
            assert np.abs(found - expected_RK).max() < 1e-4 * np.abs(expected_RK).max()


def inputs_of(model: CausalLM, norm: str) -> np.ndarray:
    seen: list[np.ndarray] = []
    hook = model.hf.get_submodule(norm).register_forward_pre_hook(
        lambda _, args: seen.append(args[0][0].double().numpy())
    )
    with torch.no_grad():
        for batch in rows(12):
            model.hidden(batch.input_ids_BT, batch.position_ids_BT)
    hook.remove()
    return np.concatenate(seen)


def test_norms_that_raise_the_kl_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = make("Gemma2")
    keep_K = kept_of_stream(teacher, KEPT, rows(4))
    student = narrowed(teacher, keep_K)
    scores = iter([1.0, 2.0, 1.0, 1.0, 1.0])
    monkeypatch.setattr("potstill.models.stream_refit.kl_of", lambda *given: next(scores))
    norms, matrices, weights = refit_stream(teacher, teacher, student, keep_K, rows(4), rows(6)[4:], print)
    assert (norms.ridge, matrices.ridge, weights) == (None, None, {})


@pytest.mark.parametrize(
    ("family", "changes", "found"),
    [
        (
            "GPT2",
            {"num_key_value_heads": None},
            r"transformer\.h\.0\.attn\.c_attn\.weight of a gpt2 is 32 x 96",
        ),
        ("GPTNeoX", {}, r"query_key_value\.weight of a gpt_neox is 96 x 32"),
        ("StableLm", {}, r"q_proj\.weight of a stablelm is 32 x 32 .* 16 x 16"),
        ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}, r"of a opt is 32 x 32 .* 16 x 16"),
    ],
)
def test_a_model_in_which_more_follows_the_hidden_size_is_refused_by_name(
    family: str, changes: dict[str, Any], found: str
) -> None:
    teacher = make(family, **changes)
    for refused in (
        lambda: narrowed(teacher, torch.arange(16)),
        lambda: kept_of_stream(teacher, 16, rows(2)),
    ):
        with pytest.raises(UserError, match=rf"student\.hidden_size: .*{found}.* Leave hidden_size out\."):
            refused()


def test_a_model_that_reads_the_stream_otherwise_is_refused_by_name() -> None:
    """A matrix beside the norms whose numbers follow the width, as no shape shows."""
    teacher = make("Llama")
    gain = teacher.hf.config.hidden_size / 100
    layer: Any = teacher.hf.model.layers[1]
    layer.mlp.register_forward_hook(lambda module, args, output: output * gain)
    with pytest.raises(UserError, match=r"hidden_size: LlamaForCausalLM with 16 channels .* differ by"):
        narrowed(teacher, torch.arange(16))


def test_a_hidden_size_that_is_impossible_is_refused() -> None:
    config = make("Llama").hf.config
    for size in (0, HIDDEN, HIDDEN + 1, -1):
        with pytest.raises(UserError, match=rf"hidden_size: {size} channels .* teacher's 32\. Give 1 to 31"):
            set_hidden_size(plain_config(config), size)
    # Transformers would not load it again.
    with pytest.raises(UserError, match=r"hidden_size: the config of a llama cannot have 23 .*such as 20,"):
        set_hidden_size(plain_config(config), 23)
    assert set_hidden_size(plain_config(make("Qwen3").hf.config), 23).hidden_size == 23


def test_all_that_the_stream_goes_through_is_found_by_shape() -> None:
    """Of a model whose other sizes are its hidden size, too."""
    config = make("Llama", intermediate_size=32, vocab_size=32, num_hidden_layers=1).hf.config
    dims = stream_dims(config, set_hidden_size(plain_config(config), 16))
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    assert dims == {
        "model.embed_tokens.weight": 1,
        "lm_head.weight": 1,
        "model.norm.weight": 0,
        "model.layers.0.input_layernorm.weight": 0,
        "model.layers.0.post_attention_layernorm.weight": 0,
        **{f"{attention}.{name}_proj.weight": 1 for name in "qkv"},
        f"{attention}.o_proj.weight": 0,
        f"{attention}.o_proj.bias": 0,
        f"{mlp}.gate_proj.weight": 1,
        f"{mlp}.up_proj.weight": 1,
        f"{mlp}.down_proj.weight": 0,
    }


@pytest.mark.parametrize("repair", [True, False])
def test_a_run_records_it_and_goes_on_with_it(
    repair: bool, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_recipe(
        student=f"{{name: cut, layers: 3, ffn_width: 48, kv_heads: 1, hidden_size: 24, repair: {repair}}}",
        train="{steps: 4, rows_per_step: 2, lr: 1e-3, device: cpu, save_every: 2}",
    )
    whole, again = (distill(path, out=tmp_path / name) for name in ("whole", "again"))
    settled, receipt = load_recipe(whole.resolved).student, whole.receipt()["student"]
    assert (settled.hidden_size, settled.kv_heads, len(settled.keep)) == (24, 1, 3)
    assert (receipt["hidden_size"], receipt["of_hidden_size"]) == (24, 32)
    assert len(receipt["stream_channels_sha256"]) == 64
    trained = load_causal_lm(whole.student).hf
    assert trained.config.hidden_size == 24
    planned = num_weights(resolve(load_recipe(path)).student.model_config)
    assert planned == sum(p.numel() for p in trained.parameters())
    if repair:
        table = whole.folds()
        assert table is not None and receipt["repair"] == table
        assert table["refit_norms"]["kl_after"] <= table["refit_norms"]["kl_before"]
        assert table["refit_stream"]["kl_before"] == pytest.approx(table["refit_norms"]["kl_after"])
        numbers = whole.folded()["stream_channels"].tolist()
        text = ",".join(map(str, numbers)).encode()
        assert len(numbers) == 24 and hashlib.sha256(text).hexdigest() == receipt["stream_channels_sha256"]
    cut_off(path, tmp_path / "cut", 3, monkeypatch)
    with monkeypatch.context() as patch:
        if repair:  # nothing is chosen or fitted again
            patch.setattr("potstill.build.narrow.kept_of_stream", None)
            patch.setattr("potstill.build.narrow.refit_stream", None)
        distill(path, out=tmp_path / "cut", resume=True)
    for run in (again.path, tmp_path / "cut"):
        state = load_causal_lm(run / "student").hf.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in trained.state_dict().items())
    assert main(["report", str(whole.path)]) == 0
    page = (whole.path / "report.html").read_text()
    assert ("a narrower residual stream" in page) == repair


def test_adapters_of_a_student_with_a_narrower_stream(tiny_recipe: Recipe, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="the extra lora is not installed; not run")
    path = tiny_recipe(train="{steps: 2, rows_per_step: 2, lr: 1e-3, device: cpu}")
    lora = "student={name: cut, keep: [0, 1, 3], hidden_size: 24, repair: false, lora: {rank: 2}}"
    adapted = distill(load_recipe(path, [lora]), out=tmp_path / "lora")
    assert load_causal_lm(adapted.student).hf.config.hidden_size == 24
    named = json.loads((adapted.adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named.endswith("cut to layers 0, 1, 3 with a hidden size of 24 of 32")


@pytest.mark.parametrize("given", ["fraction: 0.5", "weights: 9000"])
def test_beside_a_size_it_is_refused(given: str, tiny_recipe: Recipe) -> None:
    with pytest.raises(UserError, match=r"student\.hidden_size: (fraction|weights) chooses"):
        load_recipe(tiny_recipe(student=f"{{name: cut, {given}, hidden_size: 16}}"))


def test_the_size_of_named_layers_is_that_of_the_narrow_ones(tiny_recipe: Recipe, tmp_path: Path) -> None:
    student = "{name: cut, keep: [0, 1, 2, 3], weights: 23000, hidden_size: %d, repair: false}"
    train = "{steps: 1, rows_per_step: 2, lr: 1e-3, device: cpu}"
    run = distill(tiny_recipe(student=student % 16, train=train), out=tmp_path / "narrow")
    assert sum(p.numel() for p in load_causal_lm(run.student).hf.parameters()) < 23000
    with pytest.raises(UserError, match=r"student\.keep: these layers have .* 23,000"):
        distill(tiny_recipe(student=student % 28, train=train), out=tmp_path / "wide")
