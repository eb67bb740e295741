"""A student cut from its teacher has the chosen layers and no others; impossible cuts are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_model
from safetensors.torch import load_file, save_file

from potstill.errors import UserError
from potstill.models.causal_lm import CausalLM
from potstill.models.load import load_causal_lm
from potstill.models.pruning import cut, layers_to_keep


@pytest.mark.parametrize(
    ("total", "count", "rule", "kept"),
    [
        (30, 15, "first_last", [0, 1, 2, 3, 4, 5, 6, 7, 23, 24, 25, 26, 27, 28, 29]),
        (30, 21, "first_last", [*range(11), *range(20, 30)]),
        (4, 1, "first_last", [0]),
        (4, 4, "first_last", [0, 1, 2, 3]),
        (9, 5, "even", [0, 2, 4, 6, 8]),
        (30, 1, "even", [0]),
        (12, 12, "even", list(range(12))),
    ],
)
def test_each_rule_keeps_its_layers(total: int, count: int, rule: str, kept: list[int]) -> None:
    assert layers_to_keep(total, count, rule) == kept


@pytest.mark.parametrize("count", [0, 5, -1])
def test_an_impossible_number_of_layers_is_refused(count: int) -> None:
    with pytest.raises(UserError, match=f"{count} layers cannot be kept of the teacher's 4"):
        layers_to_keep(4, count, "first_last")


@pytest.mark.parametrize("keep", [[], [1, 0], [0, 0], [0, 4], [-1, 2]])
def test_an_impossible_list_of_layers_is_refused(teacher_folder: Path, keep: list[int]) -> None:
    with pytest.raises(UserError, match="rising layer numbers of the teacher's 4"):
        cut(load_causal_lm(teacher_folder), keep)


def families() -> dict[str, Any]:
    common = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    grouped = common | {"num_key_value_heads": 2, "pad_token_id": 0}
    return {
        "llama, tied": transformers.LlamaConfig(**grouped, tie_word_embeddings=True),
        "llama, untied": transformers.LlamaConfig(**grouped, tie_word_embeddings=False),
        "gpt2": transformers.GPT2Config(
            vocab_size=64, n_embd=32, n_layer=4, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
        ),
        "gpt_neox": transformers.GPTNeoXConfig(**common),
        "gemma3, layers of two types": transformers.Gemma3TextConfig(
            **grouped, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"] * 2
        ),
    }


@pytest.mark.parametrize("family", families())
def test_a_cut_student_is_the_teacher_with_its_other_layers_skipped(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(families()[family]).save_pretrained(tmp_path / "teacher")
    teacher = load_causal_lm(tmp_path / "teacher")
    student = cut(teacher, [0, 3]).eval()
    ids_BT = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))

    layers = next(m for m in teacher.hf.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 4)
    skipped = [_Skip() if i in (1, 2) else layer for i, layer in enumerate(layers)]
    with torch.no_grad():
        student_BTV = student.head(student.hidden(ids_BT))
        for i, layer in enumerate(skipped):
            layers[i] = layer
        expected_BTV = teacher.hf(input_ids=ids_BT, use_cache=False).logits
    assert torch.equal(student_BTV, expected_BTV)


def test_layers_whose_scale_is_their_number_give_under_another_number_what_they_gave(tmp_path: Path) -> None:
    config = families()["gpt2"]
    config.scale_attn_by_inverse_layer_idx = True
    config.initializer_range = 0.5  # scores large enough that their scale matters
    torch.manual_seed(0)
    teacher = CausalLM(transformers.AutoModelForCausalLM.from_config(config), "teacher").eval()
    student = cut(teacher, [0, 3]).eval()
    ids_BT = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        student_BTV = student.head(student.hidden(ids_BT))
        teacher.hf.transformer.h[1] = teacher.hf.transformer.h[2] = _Skip()
        expected_BTV = teacher.hf(input_ids=ids_BT, use_cache=False).logits
    assert (student_BTV - expected_BTV).abs().max() <= 1e-5 * expected_BTV.abs().max()


def test_layers_that_depend_on_their_number_are_refused_under_another(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.DiffLlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    teacher = CausalLM(transformers.AutoModelForCausalLM.from_config(config), "teacher").eval()
    cut(teacher, [0, 1])
    with pytest.raises(UserError, match=r"layer 3 of DiffLlamaForCausalLM .* % of what it adds"):
        cut(teacher, [0, 3])


def test_a_head_that_is_not_tied_although_the_config_says_so_is_cut_and_saved_with_it(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m", tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    embedding_VD = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = torch.randn(embedding_VD.shape, generator=torch.Generator().manual_seed(1))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True

    teacher = load_causal_lm(folder)
    student = cut(teacher, range(4))
    ids_BT = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    expected_BTV = teacher.hf(ids_BT).logits
    assert torch.equal(student.eval().hf(ids_BT).logits, expected_BTV)
    student.save(tmp_path / "student")
    assert json.loads((tmp_path / "student/config.json").read_text())["tie_word_embeddings"] is False
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert torch.equal(saved(ids_BT).logits, expected_BTV)


class _Skip(torch.nn.Module):
    def forward(self, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        return hidden


def test_a_student_shares_no_memory_with_its_teacher_and_keeps_its_ties(teacher_folder: Path) -> None:
    teacher = load_causal_lm(teacher_folder)
    student = cut(teacher, [0, 3])
    addresses = {p.data_ptr() for p in teacher.parameters()}
    assert not addresses & {p.data_ptr() for p in student.parameters()}
    hf = student.hf
    assert hf.get_output_embeddings().weight.data_ptr() == hf.get_input_embeddings().weight.data_ptr()
    assert all(p.dtype == torch.float32 and p.requires_grad for p in student.parameters())


def test_a_model_without_one_stack_of_layers_is_refused(tmp_path: Path) -> None:
    model = load_causal_lm(make_model(tmp_path / "m"))
    model.hf.model.layers = torch.nn.ModuleList(list(model.hf.model.layers)[:3])
    with pytest.raises(UserError, match="has 0 stacks of 4 layers"):
        cut(CausalLM(model.hf, "x"), [0])


def test_a_stack_that_cannot_be_shortened_is_refused() -> None:
    """Gemma 3n: later layers use the caches of earlier ones, which a cut removes."""
    config = transformers.Gemma3nTextConfig(
        vocab_size=64,
        vocab_size_per_layer_input=64,
        hidden_size=32,
        hidden_size_per_layer_input=8,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_kv_shared_layers=2,
        activation_sparsity_pattern=[0.95, 0.95, 0.0, 0.0],
        layer_types=["sliding_attention", "full_attention"] * 2,
        laurel_rank=4,
        altup_num_inputs=2,
    )
    teacher = CausalLM(transformers.AutoModelForCausalLM.from_config(config), "teacher")
    with pytest.raises(UserError, match=r"Gemma3nForCausalLM cannot be cut to layers \[0, 3\]"):
        cut(teacher, [0, 3])
