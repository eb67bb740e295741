"""An MLP cut to fewer channels is the sum over those that are kept, the most important ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import make_model

from potstill import load_recipe
from potstill.build import setup
from potstill.build.resolve import resolve
from potstill.errors import UserError
from potstill.models.causal_lm import CausalLM
from potstill.models.load import load_causal_lm
from potstill.models.matrix_inputs import most_important
from potstill.models.pruning import cut, cut_config, ffn_width_of, kept_channels
from potstill.types import Batch

WIDTH, HIDDEN, NARROW = 64, 32, 40


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def gelu(z: np.ndarray) -> np.ndarray:
    return z * np.vectorize(lambda x: (1 + math.erf(x / math.sqrt(2))) / 2)(z)


def gelu_by_tanh(z: np.ndarray) -> np.ndarray:
    return z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2


def families() -> dict[str, tuple[Any, list[str], str, Callable[[np.ndarray], np.ndarray]]]:
    """A config, the matrices into the channels (the gate first), the one out of them, the activation."""
    common: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.3,
    }
    grouped = common | {"num_key_value_heads": 2}
    older: dict[str, Any] = {
        "vocab_size": 64,
        "n_embd": HIDDEN,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "n_inner": WIDTH,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "initializer_range": 0.3,
    }
    gated, up = ["gate_proj", "up_proj"], "down_proj"
    return {
        "llama": (
            transformers.LlamaConfig(**grouped, mlp_bias=True),
            gated,
            up,
            lambda z: z * sigmoid(z),
        ),
        "gemma3": (
            transformers.Gemma3TextConfig(**grouped, head_dim=8, sliding_window=4),
            gated,
            up,
            gelu_by_tanh,
        ),
        "phi3": (transformers.Phi3Config(**grouped), ["gate_up_proj"], up, lambda z: z * sigmoid(z)),
        "nemotron": (
            transformers.NemotronConfig(**grouped, mlp_bias=True),
            ["up_proj"],
            up,
            lambda z: np.maximum(z, 0) ** 2,
        ),
        "gpt_neox": (transformers.GPTNeoXConfig(**common), ["dense_h_to_4h"], "dense_4h_to_h", gelu),
        "phi": (transformers.PhiConfig(**grouped), ["fc1"], "fc2", gelu_by_tanh),
        "gpt2": (transformers.GPT2Config(**older), ["c_fc"], "c_proj", gelu_by_tanh),
        "gptj": (transformers.GPTJConfig(**older, rotary_dim=4), ["fc_in"], "fc_out", gelu_by_tanh),
    }


def made(folder: Path, config: Any) -> CausalLM:
    torch.manual_seed(0)
    hf = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if name.endswith("bias"):  # zeros would hide one that is left out
                parameter.normal_(std=0.5)
    hf.save_pretrained(folder)
    return load_causal_lm(folder)


def some_rows(rows: int = 3, length: int = 24) -> list[Batch]:
    """One a batch; their first tokens bear no loss, and so do not count."""
    generator = torch.Generator().manual_seed(2)
    positions_N = torch.arange(5, length)
    place_BT = torch.arange(length)[None]
    return [
        Batch(
            torch.tensor([row]),
            torch.randint(3, 64, (1, length), generator=generator),
            place_BT,
            positions_N,
            positions_N,
        )
        for row in range(rows)
    ]


def layers_of(model: CausalLM) -> list[Any]:
    return list(next(m for m in model.hf.modules() if isinstance(m, torch.nn.ModuleList)))


@pytest.mark.parametrize("family", families())
def test_an_mlp_is_the_sum_over_its_kept_channels(family: str, tmp_path: Path) -> None:
    config, into, out, act = families()[family]
    teacher = made(tmp_path / "teacher", config)
    seen: dict[int, list[np.ndarray]] = {0: [], 2: []}
    for layer, inputs in seen.items():  # of the MLP, which numpy goes on from
        layers_of(teacher)[layer].mlp.register_forward_pre_hook(
            lambda _, args, inputs=inputs: inputs.append(args[0][0].double().numpy())
        )
    student = cut(teacher, [0, 2], NARROW, some_rows()).eval()
    for inputs in seen.values():
        del inputs[3:]  # after the rows of calibration come those on which the cut compares its layers
    for number, layer in ((0, 0), (1, 2)):
        mlp = layers_of(teacher)[layer].mlp
        x_ND = np.concatenate([x_TD[5:] for x_TD in seen[layer]])
        rows_CD, biases_C = [], []
        for module in (getattr(mlp, name) for name in into):
            weight = module.weight.double().detach().numpy()
            weight = weight.T if family == "gpt2" else weight
            halves = len(weight) // WIDTH
            rows_CD += np.split(weight, halves)
            bias = getattr(module, "bias", None)
            biases_C += [np.zeros(WIDTH)] * halves if bias is None else [bias.double().detach().numpy()]
        down = getattr(mlp, out)
        down_CD = down.weight.double().detach().numpy()
        down_CD = down_CD if family == "gpt2" else down_CD.T
        z = [x_ND @ row_CD.T + bias_C for row_CD, bias_C in zip(rows_CD, biases_C, strict=True)]
        value_NC = act(z[0]) * (z[1] if len(z) == 2 else 1.0)
        added_NCD = value_NC[:, :, None] * down_CD
        importance_C = np.sqrt((added_NCD**2).sum(2).mean(0))
        kept = sorted(np.argsort(-importance_C)[:NARROW])
        assert kept != list(range(NARROW))
        expected_ND = added_NCD[:, kept].sum(1)
        if getattr(down, "bias", None) is not None:
            expected_ND += down.bias.double().detach().numpy()
        with torch.no_grad():
            actual_ND = layers_of(student)[number].mlp(torch.tensor(x_ND, dtype=torch.float32)[None])[0]
        np.testing.assert_allclose(actual_ND.numpy(), expected_ND, rtol=1e-4, atol=1e-4)

    assert ffn_width_of(student.hf.config) == NARROW
    student.save(tmp_path / "student")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    ids_BT = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        memory_BTV, disk_BTV = (hf(input_ids=ids_BT, use_cache=False).logits for hf in (student.hf, again))
    assert torch.equal(memory_BTV, disk_BTV)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_cut_to_the_full_width_is_the_teacher_bit_for_bit(family: str, tmp_path: Path) -> None:
    teacher = made(tmp_path / "teacher", families()[family][0])
    student = cut(teacher, [0, 1, 2], WIDTH)
    teacher_state = teacher.hf.state_dict()
    assert student.hf.state_dict().keys() == teacher_state.keys()
    assert all(torch.equal(tensor, teacher_state[name]) for name, tensor in student.hf.state_dict().items())
    assert student.hf.config.to_dict() == cut(teacher, [0, 1, 2]).hf.config.to_dict()


def test_channels_that_add_nothing_are_dropped_first(tmp_path: Path) -> None:
    """Whole numbers and ReLU: sums are exact in any order, so the outputs are equal to the bit."""
    teacher = load_causal_lm(make_model(tmp_path / "teacher", hidden_act="relu", mlp_bias=True))
    generator = torch.Generator().manual_seed(0)
    lost = {}
    for number, layer in enumerate(layers_of(teacher)):
        mlp = layer.mlp
        for parameter in mlp.parameters():
            signs = torch.randint(2, parameter.shape, generator=generator) * 2 - 1
            parameter.data.copy_(signs * torch.randint(1, 3, parameter.shape, generator=generator))
        gate, up, down = torch.randperm(WIDTH, generator=generator)[:24].split(8)
        for rows, dead in ((mlp.gate_proj, gate), (mlp.up_proj, up)):
            rows.weight.data[dead], rows.bias.data[dead] = 0.0, 0.0
        mlp.down_proj.weight.data[:, down] = 0.0
        lost[number] = {*gate.tolist(), *up.tolist(), *down.tolist()}
    student = cut(teacher, [1, 2], NARROW, some_rows())
    x_ND = torch.randint(-3, 4, (9, HIDDEN), generator=generator).float()
    for number, layer in enumerate((1, 2)):
        narrow, wide = layers_of(student)[number].mlp, layers_of(teacher)[layer].mlp
        kept = [channel for channel in range(WIDTH) if channel not in lost[layer]]
        assert torch.equal(narrow.up_proj.weight, wide.up_proj.weight[kept])
        assert torch.equal(narrow(x_ND), wide(x_ND))
        assert not torch.equal(
            layers_of(cut(teacher, [1, 2], NARROW - 1, some_rows()))[number].mlp(x_ND), wide(x_ND)
        )


def test_of_equally_important_channels_the_first_are_kept() -> None:
    assert most_important(torch.tensor([1.0, 2.0, 1.0, 3.0, 1.0]), 4).tolist() == [0, 1, 2, 3]


def test_a_width_that_is_impossible_is_refused(tmp_path: Path) -> None:
    llama = families()["llama"][0]
    for width in (0, WIDTH + 1, -1):
        with pytest.raises(UserError, match=rf"ffn_width: {width} channels .* 64\."):
            cut_config(llama, [0], 3, width)
    with pytest.raises(UserError, match=r"ffn_width: 9999 channels .* the teacher's 128\."):
        cut_config(transformers.GPT2Config(n_embd=HIDDEN), [0], 12, 9999)
    with pytest.raises(UserError, match=r"ffn_width: .* falcon .*intermediate_size, n_inner"):
        cut_config(transformers.FalconConfig(), [0], 32, 8)
    with pytest.raises(UserError, match=r"intermediate_size of a gemma3n_text is \[.*not one number"):
        cut_config(transformers.Gemma3nTextConfig(), [0], 35, 8)
    experts = transformers.MixtralConfig(**llama.to_diff_dict() | {"mlp_bias": None}, num_local_experts=2)
    with pytest.raises(UserError, match=r"ffn_width: model\.layers\.0\.mlp .*experts, gate"):
        cut(made(tmp_path / "experts", experts), [0], 8, some_rows())


def test_a_recipe_ranks_channels_on_its_first_training_rows(
    tiny_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[torch.Tensor] = []

    def noted(teacher: CausalLM, keep: Any, width: int, batches: list[Batch]) -> Any:
        given.extend(batch.input_ids_BT for batch in batches)
        return kept_channels(teacher, keep, width, batches)

    monkeypatch.setattr(setup, "kept_channels", noted)
    recipe = load_recipe(tiny_recipe(student="{name: cut, layers: 2, ffn_width: 48, repair: false}"))
    built = setup.set_up(resolve(recipe), lambda note: None)
    assert torch.equal(torch.cat(given), built.corpus.train.batch(range(8)).input_ids_BT)
