"""A GGUF file has every number of the student, under llama.cpp's name, order and type, or there is no file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from tokenizers import normalizers

from export.tiny_models import (
    EXPRESSIONS,
    KINDS,
    make_model,
    make_pieces,
    make_run,
    make_tokenizer,
    needs_llama_cpp,
)
from potstill.data.tokenizers import load_tokenizer
from potstill.errors import UserError
from potstill.export.export import export_run
from potstill.export.gguf_tokenizer import name_pre_tokenizer, texts_for
from potstill.models.causal_lm import CausalLM
from potstill.models.load import load_causal_lm
from potstill.models.pruning import cut
from potstill.models.stream_width import kept_of_stream, narrowed
from potstill.types import Batch

LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def export(tmp_path: Path, hf: Any, form: str, pre: str = "gpt-2") -> Path:
    run = make_run(tmp_path / "run", hf, make_tokenizer(pre))
    record = export_run(run.path, formats=[form], check=False).records[0]
    return run.path / record["file"]


def expected(hf: Any) -> dict[str, np.ndarray]:
    """Row by row: in llama, rows i and i + half of a head become its rows 2i and 2i + 1; Gemma's norms count from 0."""
    found, config = {}, hf.config
    is_gemma = config.model_type.startswith("gemma")
    layer_names = LAYER | (GEMMA if is_gemma else {})
    for name, parameter in hf.named_parameters():
        stem, suffix = name.rsplit(".", 1)
        if stem.endswith(".experts"):
            parts = {"gate_up_proj": ["gate", "up"], "down_proj": ["down"]}[suffix]
            split = np.split(parameter.detach().numpy(), len(parts), axis=1)
            layer = stem.split(".")[2]
            found |= {f"blk.{layer}.ffn_{p}_exps.weight": a for p, a in zip(parts, split, strict=True)}
            continue
        if stem in WHOLE:
            mine = WHOLE[stem]
        else:
            _, _, layer, part = stem.split(".", 3)
            mine = f"blk.{layer}.{layer_names[part]}"
        array = parameter.detach().numpy() + (is_gemma and mine.endswith("norm"))
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(
            mine.split(".")[-1]
        )
        if config.model_type in ("llama", "mistral") and heads:
            moved, size = np.empty_like(array), len(array) // heads
            for head in range(heads):
                for i in range(size // 2):
                    moved[head * size + 2 * i] = array[head * size + i]
                    moved[head * size + 2 * i + 1] = array[head * size + size // 2 + i]
            array = moved
        found[f"{mine}.{suffix}"] = array
    return found


def read(path: Path) -> dict[str, np.ndarray]:
    return {
        each.name: gguf.quants.dequantize(each.data, each.tensor_type).reshape(each.shape[::-1])
        for each in GGUFReader(path).tensors
    }


def metadata(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


@pytest.mark.parametrize(
    ("kind", "tied"), [(kind, tied) for kind in KINDS for tied in (True, False) if tied or kind != "gemma2"]
)
def test_every_tensor_equals_the_student_s(kind: str, tied: bool, tmp_path: Path) -> None:
    hf = make_model(kind, tie_word_embeddings=tied)
    written, wanted = read(export(tmp_path, hf, "f32")), expected(hf)
    assert written.keys() == wanted.keys()
    assert ("output.weight" in written) is not tied
    assert all(np.array_equal(written[name], wanted[name]) for name in wanted)


def test_biases_of_a_llama_are_moved_like_their_rows(tmp_path: Path) -> None:
    hf = make_model(attention_bias=True)
    written, wanted = read(export(tmp_path, hf, "f32")), expected(hf)
    assert "blk.0.attn_q.bias" in written and written.keys() == wanted.keys()
    assert all(np.array_equal(written[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_the_same_model_out_of_the_file(kind: str, tmp_path: Path) -> None:
    hf = make_model(kind).eval()
    other = load_causal_lm(export(tmp_path, hf, "f32", "qwen2")).hf
    ids = torch.randint(3, 340, (1, 250), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, hf(ids).logits, rtol=1e-5, atol=1e-5)


LLAMA3 = {
    "rope_theta": 5000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
LONGROPE = {"rope_theta": 5e3, "rope_type": "longrope", "original_max_position_embeddings": 64}
ROPES: list[tuple[str, dict[str, Any]]] = [
    ("llama", LLAMA3),
    ("qwen2", {"rope_theta": 5000.0, "rope_type": "linear", "factor": 4.0}),
    (
        "qwen3",
        {"rope_theta": 5e3, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ),
]


@pytest.mark.parametrize(("kind", "rope"), ROPES)
def test_a_scaled_rope_is_read_back_at_far_positions(kind: str, rope: dict[str, Any], tmp_path: Path) -> None:
    more = {"original_max_position_embeddings": 64} if kind == "phi3" else {}
    hf = make_model(kind, rope_parameters=dict(rope), max_position_embeddings=1024, **more).eval()
    other = load_causal_lm(export(tmp_path, hf, "f32")).hf
    read = other.config.rope_parameters
    assert {name: read[name] for name in hf.config.rope_parameters} == hf.config.rope_parameters
    assert other.model.rotary_emb.attention_scaling == pytest.approx(hf.model.rotary_emb.attention_scaling)
    for length in (60, 400):
        ids = torch.randint(3, 340, (1, length), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            torch.testing.assert_close(other(ids).logits, hf(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("warm_python")
def test_a_rope_whose_scaling_is_lost_fails_the_round_trip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("potstill.export.gguf_model._rope_factors", lambda _: {})
    rope = LLAMA3 | {"original_max_position_embeddings": 1000}  # no position of a short prompt is scaled much
    hf = make_model(rope_parameters=rope, max_position_embeddings=1024)
    run = make_run(tmp_path / "run", hf, make_tokenizer("gpt-2"))
    path = export_run(run.path, formats=["f16"]).records[0]["three_path"]["potstill"]
    assert path["status"] == "failed" and "nats after 1023 tokens" in path["why"]


@pytest.mark.parametrize("form", ["f16", "bf16", "q8_0", "q4_0"])
def test_matrices_are_rounded_as_their_type_says_and_vectors_are_not(form: str, tmp_path: Path) -> None:
    hf = make_model()
    written = read(export(tmp_path, hf, form))
    for name, array in expected(hf).items():
        blocks = array.reshape(-1, 32) if array.ndim == 2 else array
        if array.ndim == 1:
            assert np.array_equal(written[name], array)
        elif form in ("f16", "bf16"):
            dtype = torch.float16 if form == "f16" else torch.bfloat16
            assert np.array_equal(written[name], torch.from_numpy(array).to(dtype).float().numpy())
        else:
            kept_better = (
                form == "q8_0" or name == "token_embd.weight"
            )  # the logits' rows, of a tied embedding
            step = np.abs(blocks).max(axis=1, keepdims=True) / (127 if kept_better else 8)
            off = np.abs(written[name].reshape(-1, 32) - blocks) / step
            assert off.max() <= (0.57 if kept_better else 1.02)
            assert off.mean() > 0.1


def test_the_metadata_is_complete(tmp_path: Path) -> None:
    path = export(tmp_path, make_model(tie_word_embeddings=False), "f16", "smollm")
    found = metadata(path)
    expected = {
        "general.architecture": "llama",
        "general.name": "run",
        "general.file_type": 1,
        "llama.context_length": 256,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.block_count": 2,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 5000.0,
        "llama.vocab_size": 352,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
    }
    assert {name: found.get(name) for name in expected} == expected
    assert math.isclose(found["llama.attention.layer_norm_rms_epsilon"], 1e-6, rel_tol=1e-6)
    assert "<|im_start|>" in found["tokenizer.chat_template"]


@pytest.mark.parametrize("listed", [0, [0, 1], [1, 0, 5]])
def test_the_end_of_a_turn_has_its_key(listed: int | list[int], tmp_path: Path) -> None:
    """EOS ends a text, the chat template ends a turn with another token, and the configs need not list it."""
    tokenizer = make_tokenizer("smollm")
    tokenizer.eos_token = "<|endoftext|>"
    run = make_run(tmp_path / "run", make_model(eos_token_id=listed), tokenizer)
    record = export_run(run.path, formats=["f32"], check=False).records[0]
    found = metadata(run.path / record["file"])
    assert found["tokenizer.ggml.eos_token_id"] == 0 and found["tokenizer.ggml.eot_token_id"] == 2
    assert found.get("tokenizer.ggml.eom_token_id") == (None if listed == 0 else 1)


def test_the_metadata_of_windows(tmp_path: Path) -> None:
    found = metadata(export(tmp_path, make_model("gemma3"), "f32"))
    expected = {
        "general.architecture": "gemma3",
        "gemma3.attention.sliding_window": 40,
        "gemma3.attention.sliding_window_pattern": 2,
        "gemma3.rope.freq_base": 5000.0,
        "gemma3.rope.freq_base_swa": 100.0,
        "gemma3.rope.scaling.type": "linear",
        "gemma3.rope.scaling.factor": 4.0,
    }
    assert {name: found.get(name) for name in expected} == expected


@pytest.mark.parametrize("kind", ["gemma", "llama-2", "phi-3"])
def test_pieces_of_sentencepiece_have_scores(kind: str, tmp_path: Path) -> None:
    tokenizer = make_pieces(kind)
    run = make_run(tmp_path / "run", make_model("gemma3", eos_token_id=1, bos_token_id=2), tokenizer)
    record = export_run(run.path, formats=["f32"], check=False).records[0]
    found = metadata(run.path / record["file"])
    assert found["tokenizer.ggml.model"] == "llama" and "tokenizer.ggml.merges" not in found
    assert found["tokenizer.ggml.add_space_prefix"] is (kind != "gemma")
    assert found["general.name"] == ("phi-3 run" if kind == "phi-3" else "run")
    assert found["tokenizer.ggml.add_bos_token"] is True
    kinds = found["tokenizer.ggml.token_type"]
    assert kinds[:4] == [3, 3, 3, 2] and set(kinds[4:260]) == {6} and kinds[260:300] == [1] * 40
    scores = found["tokenizer.ggml.scores"]
    joined = [
        i for i, token in enumerate(found["tokenizer.ggml.tokens"][:330]) if i >= 260 and len(token) > 1
    ]
    assert [scores[i] for i in joined] == sorted((scores[i] for i in joined), reverse=True)
    texts = texts_for(tokenizer, 200)
    again = load_tokenizer(run.path / record["file"])
    same = [again(text)["input_ids"] == tokenizer(text)["input_ids"] for text in texts]
    assert kind != "gemma" or all(same)


def test_a_name_does_not_change_what_llama_cpp_makes_of_spaces(tmp_path: Path) -> None:
    run = make_run(tmp_path / "Phi3-cut", make_model(), make_tokenizer("gpt-2"))
    record = export_run(run.path, formats=["f32"], check=False).records[0]
    assert metadata(run.path / record["file"])["general.name"] == "Phi 3-cut"


def test_pieces_that_llama_cpp_would_split_otherwise_are_refused(tmp_path: Path) -> None:
    tokenizer = make_pieces()
    inner = tokenizer.backend_tokenizer
    inner.normalizer = normalizers.Sequence([normalizers.Lowercase(), inner.normalizer])
    run = make_run(tmp_path / "run", make_model("gemma3"), tokenizer)
    with pytest.raises(UserError, match=r"llama.cpp would split .* otherwise, by the scores of its pieces"):
        export_run(run.path, formats=["f32"], check=False)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_a_scaled_rope_is_in_the_metadata(kind: str, tmp_path: Path) -> None:
    rope = {"rope_theta": 5000.0, "rope_type": kind, "factor": 4.0}
    extra = {"original_max_position_embeddings": 64} if kind == "yarn" else {}
    found = metadata(export(tmp_path, make_model("qwen2", rope_parameters=rope | extra), "f32"))
    assert found["qwen2.rope.scaling.type"] == kind
    assert found["qwen2.rope.scaling.factor"] == 4.0
    assert found.get("qwen2.rope.scaling.original_context_length") == extra.get(
        "original_max_position_embeddings"
    )


def test_the_frequencies_of_llama_3_are_a_tensor(tmp_path: Path) -> None:
    written = read(export(tmp_path, make_model(rope_parameters=LLAMA3), "f32"))["rope_freqs.weight"]
    wanted = []
    for i in range(8):
        length = 2 * math.pi * 5000.0 ** (2 * i / 16)
        smooth = (128 / length - 1.0) / (4.0 - 1.0)
        between = 1 / ((1 - smooth) / 8.0 + smooth)
        wanted.append(1.0 if length < 128 / 4 else 8.0 if length > 128 / 1 else between)
    assert len({round(each, 3) for each in wanted}) > 2
    np.testing.assert_allclose(written, wanted, rtol=1e-5)


@needs_llama_cpp
def test_k_quants_follow_llama_cpp_s_mixture_and_rows_that_do_not_fit_are_recorded(tmp_path: Path) -> None:
    fits = {
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 8,
        "tie_word_embeddings": False,
    }
    hf = make_model(**fits)
    path = export(tmp_path, hf, "q4_k")
    types = {each.name: each.tensor_type.name for each in GGUFReader(path).tensors}
    more = {0, 3, 6, 7}  # the first and last eighth of the layers, and every third between
    for layer in range(8):
        for part in ("attn_v", "ffn_down"):
            assert types[f"blk.{layer}.{part}.weight"] == ("Q6_K" if layer in more else "Q4_K")
    assert (types["output.weight"], types["token_embd.weight"]) == ("Q6_K", "Q4_K")
    written = read(path)
    for name, array in expected(hf).items():
        off = np.linalg.norm(written[name] - array) / np.linalg.norm(array)
        assert off < {"Q4_K": 0.09, "Q6_K": 0.02, "Q8_0": 0.01, "F32": 1e-9}[types[name]]

    run = make_run(tmp_path / "narrow", make_model(), make_tokenizer("gpt-2"))
    record = export_run(run.path, formats=["q6_k"], check=False).records[0]
    assert record["tensor_types"] == {"F32": 5, "Q8_0": 15}
    assert {(each["wanted"], each["used"]) for each in record["other_types"]} == {("Q6_K", "Q8_0")}


def test_a_student_cut_to_a_width_of_no_whole_blocks_is_exported_all_the_same(tmp_path: Path) -> None:
    T = torch.arange(32)
    row = Batch(torch.zeros(1), T[None], T[None], T, T)
    narrow = cut(CausalLM(make_model(), "teacher"), [0, 1], 40, [row]).hf
    run = make_run(tmp_path / "run", narrow, make_tokenizer("gpt-2"))
    record = export_run(run.path, formats=["q8_0"], check=False).records[0]
    down = {f"blk.{layer}.ffn_down.weight" for layer in (0, 1)}
    assert {each["tensor"] for each in record["other_types"]} == down
    assert {(each["wanted"], each["used"], each["row"]) for each in record["other_types"]} == {
        ("Q8_0", "F16", 40)
    }
    path = run.path / record["file"]
    assert metadata(path)["llama.feed_forward_length"] == 40
    written, wanted = read(path), expected(narrow)
    assert all(np.array_equal(written[name], wanted[name].astype(np.float16)) for name in down)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3", "gemma3"])
def test_a_student_with_fewer_heads_has_their_length_in_its_file(kind: str, tmp_path: Path) -> None:
    """Of 64 hidden numbers and 2 heads a reader would make heads of 32."""
    narrow = fewer_heads(make_model(kind))
    path = export(tmp_path, narrow, "f32")
    keys = ("head_count", "head_count_kv", "key_length", "value_length")
    found = {name.partition(".attention.")[2]: value for name, value in metadata(path).items()}
    assert [found[key] for key in keys] == [2, 1, 16, 16]
    require_read_as_written(path, narrow)


def require_read_as_written(path: Path, narrow: Any) -> None:
    """Every tensor, and the logits of what Transformers makes of the file."""
    written, wanted = read(path), expected(narrow)
    assert all(np.array_equal(written[name], wanted[name]) for name in wanted)
    ids_BT = torch.arange(3, 27)[None]
    with torch.no_grad():
        ours, theirs = (hf.eval()(ids_BT).logits for hf in (narrow, load_causal_lm(path).hf))
    assert torch.allclose(ours, theirs, atol=1e-4)


def a_row() -> Batch:
    T = torch.arange(32)
    return Batch(torch.zeros(1), T[None], T[None], T, T)


def fewer_heads(hf: Any) -> Any:
    """One of two KV groups."""
    return cut(CausalLM(hf, "teacher"), [0, 1], None, [a_row()], kv_heads=1).hf


@needs_llama_cpp
@pytest.mark.usefixtures("warm_python")
def test_llama_cpp_reads_a_student_with_fewer_heads(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("qwen2")
    made = make_run(tmp_path / "run", fewer_heads(make_model(eos_token_id=tokenizer.eos_token_id)), tokenizer)
    records = export_run(made.path, formats=["f32"]).records
    assert [record["three_path"]["llama.cpp"]["status"] for record in records] == ["passed"]


def narrower_stream(hf: Any) -> Any:
    """48 of 64 channels."""
    model = CausalLM(hf, "student").eval()
    return narrowed(model, kept_of_stream(model, 48, [a_row()])).hf


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3", "gemma2", "gemma3"])
def test_a_student_with_a_narrower_stream_is_read_from_its_file(kind: str, tmp_path: Path) -> None:
    """Its heads are longer than its hidden size says; Gemma's embeddings are multiplied by another number."""
    narrow = narrower_stream(make_model(kind))
    path = export(tmp_path, narrow, "f32")
    prefix = metadata(path)["general.architecture"]
    keys = ("embedding_length", "attention.key_length", "attention.value_length")
    assert [metadata(path)[f"{prefix}.{key}"] for key in keys] == [48, 16, 16]
    require_read_as_written(path, narrow)


@needs_llama_cpp
@pytest.mark.usefixtures("warm_python")
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
def test_llama_cpp_reads_a_student_with_a_narrower_stream(kind: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer("qwen2")
    hf = narrower_stream(make_model(kind, eos_token_id=tokenizer.eos_token_id))
    made = make_run(tmp_path / "run", hf, tokenizer)
    records = export_run(made.path, formats=["f32"]).records
    assert [record["three_path"]["llama.cpp"]["status"] for record in records] == ["passed"]


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ({"kind": "olmo2"}, "olmo2: not one .*: llama, mistral, qwen2"),
        ({"hidden_act": "gelu"}, "its activation is 'gelu', not 'silu'"),
        (
            {"kind": "gemma3", "query_pre_attn_scalar": 32},
            "query_pre_attn_scalar is 32, and llama.cpp takes 16",
        ),
        (
            {"kind": "gemma3", "attn_logit_softcapping": 50.0},
            "attn_logit_softcapping is 50.0, .* never has one",
        ),
        (
            {"kind": "gemma3", "final_logit_softcapping": 30.0},
            "final_logit_softcapping is 30.0, .* never has one",
        ),
        (
            {"kind": "gemma2", "attn_logit_softcapping": None},
            "attn_logit_softcapping is None, .* always has one",
        ),
        ({"kind": "mistral", "sliding_window": 64}, "sliding_window is 64, and llama.cpp computes without"),
        ({"kind": "phi3", "sliding_window": 64}, "sliding_window is 64, and llama.cpp computes without"),
        (
            {"kind": "qwen3_moe", "norm_topk_prob": False},
            "norm_topk_prob is False, and llama.cpp computes with True",
        ),
        ({"kind": "qwen3_moe", "mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]"),
        (
            {"kind": "gemma3", "layer_types": ["full_attention", "sliding_attention"]},
            "layer_types is full sliding: llama.cpp knows a full layer every so many",
        ),
        ({"mlp_bias": True}, r"tensor model.layers.0.mlp.gate_proj.bias"),
        (
            {"rope_parameters": {"rope_theta": 5000.0, "rope_type": "dynamic", "factor": 2.0}},
            "rope_type 'dynamic'",
        ),
        (
            {
                "rope_parameters": {
                    "rope_theta": 5e3,
                    "rope_type": "yarn",
                    "factor": 2.0,
                    "attention_factor": 0.5,
                }
            },
            "rope_parameters has attention_factor",
        ),
        (
            {"kind": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "layer_types has sliding_attention",
        ),
    ],
)
def test_a_model_that_the_format_cannot_hold_is_refused_in_one_line(
    what: dict[str, Any], error: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=error) as caught:
        export(tmp_path, make_model(**what), "f32")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "exports").exists()


def test_a_number_too_large_for_the_type_leaves_no_file(tmp_path: Path) -> None:
    hf = make_model()
    hf.model.layers[1].mlp.up_proj.weight.data[3, 4] = 70_000.0
    hf.model.layers[1].mlp.down_proj.weight.data *= 1e-6
    with pytest.raises(UserError, match=r"blk.1.ffn_up.weight: 70000 is more than F16 holds"):
        export(tmp_path, hf, "f16")
    assert list((tmp_path / "run" / "exports").iterdir()) == []


def test_k_quants_without_llama_cpp_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("potstill.export.gguf_model.importlib.util.find_spec", lambda _: None)
    hf = make_model(hidden_size=256)
    with pytest.raises(UserError, match=r"need llama.cpp's quantiser: pip install 'potstill\[gguf\]'"):
        export(tmp_path, hf, "q4_k")
    assert not (tmp_path / "run" / "exports").exists()


@pytest.mark.parametrize("pre", EXPRESSIONS)
def test_a_pre_tokenizer_is_known_by_how_it_splits(pre: str) -> None:
    assert name_pre_tokenizer("tokenizer", make_tokenizer(pre)) == pre
