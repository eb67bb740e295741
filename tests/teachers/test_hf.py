"""A real teacher answers as the library's own forward does, or refuses by name."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import packaging.version
import pytest
import torch
import transformers
from conftest import make_model, tiny_config
from safetensors.torch import load_file, save_file

from potstill import CudaTrainerTeacher, TorchTeacher, UserError
from potstill.models.causal_lm import CausalLM
from potstill.models.load import vocab_size_of
from potstill.types import Batch, Teacher

NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")


def ids(rows: int, length: int, vocabulary: int = 258) -> torch.Tensor:
    return torch.randint(
        0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(rows * 100 + length)
    )


def own_logits(folder: Path, ids_BT: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        return hf(input_ids=ids_BT).logits.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_the_library_s_own(teacher_folder: Path, dtype: torch.dtype) -> None:
    teacher, ids_BT = TorchTeacher.for_inference(teacher_folder, device="cpu", dtype=dtype), ids(3, 17)
    own_BTV = own_logits(teacher_folder, ids_BT, dtype)
    assert (teacher.logits_per_position(ids_BT) - own_BTV).abs().max() <= 1e-6
    assert (teacher.logits_for_batch(ids_BT) - own_BTV[:, -1]).abs().max() <= 1e-6


@pytest.mark.parametrize("family", ["GPT2", "Gemma2", "Cohere", "Granite", "Qwen3", "GPTNeoX"])
def test_logits_are_the_library_s_own_in_families_that_scale_or_cap_them(tmp_path: Path, family: str) -> None:
    common = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    special = {
        "GPT2": {
            "vocab_size": 64,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        "Gemma2": common
        | {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 2.0, "initializer_range": 0.5},
        "Qwen3": common | {"num_key_value_heads": 2, "head_dim": 8},
        "Granite": common | {"num_key_value_heads": 2, "logits_scaling": 3.0},
    }
    config = getattr(transformers, f"{family}Config")(
        **special.get(family, common | {"pad_token_id": 0, "eos_token_id": 1})
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    teacher, ids_BT = TorchTeacher.for_inference(tmp_path / "model", device="cpu"), ids(2, 9, 64)
    assert (
        teacher.logits_per_position(ids_BT) - own_logits(tmp_path / "model", ids_BT, torch.float32)
    ).abs().max() <= 1e-6


def test_a_batch_equals_its_rows_and_padding_on_either_side_changes_nothing(teacher_folder: Path) -> None:
    teacher = TorchTeacher.for_inference(teacher_folder, device="cpu")
    ids_BT = ids(3, 12)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, 8:] = 0  # padded on the right
    mask_BT[2, :5] = 0  # padded on the left
    batched_BV = teacher.logits_for_batch(ids_BT, mask_BT)
    for row in range(3):
        alone = teacher.logits_for_batch(ids_BT[row : row + 1, mask_BT[row].bool()])
        assert (batched_BV[row] - alone[0]).abs().max() <= 1e-5
    other_BT = torch.where(mask_BT.bool(), ids_BT, 5)
    assert (teacher.logits_for_batch(other_BT, mask_BT) - batched_BV).abs().max() <= 1e-6


def test_it_is_a_teacher_frozen_and_in_eval_mode(teacher_folder: Path) -> None:
    teacher = TorchTeacher.for_inference(teacher_folder, device="cpu")
    assert isinstance(teacher, Teacher)
    assert (
        teacher.vocab_size == 258 and teacher.vocab.tokens is not None and teacher.vocab.tokens[0] == "<eos>"
    )
    assert not teacher.model.training and not any(p.requires_grad for p in teacher.model.parameters())
    assert not teacher.logits_for_batch(ids(1, 3)).requires_grad


def test_an_empty_batch_gives_an_empty_result(teacher_folder: Path) -> None:
    teacher, empty = (
        TorchTeacher.for_inference(teacher_folder, device="cpu"),
        torch.zeros(0, 4, dtype=torch.int64),
    )
    assert teacher.logits_for_batch(empty).shape == (0, 258)
    assert teacher.logits_per_position(empty).shape == (0, 4, 258)


def test_wrong_ids_are_refused_before_the_model_sees_them(teacher_folder: Path) -> None:
    teacher = TorchTeacher.for_inference(teacher_folder, device="cpu")
    with pytest.raises(UserError, match="id 258 is outside the vocabulary of 258"):
        teacher.logits_per_position(torch.tensor([[0, 258]]))
    with pytest.raises(UserError, match=r"shape \[2\]"):
        teacher.logits_for_batch(torch.tensor([0, 1]))
    with pytest.raises(UserError, match="all padding"):
        teacher.logits_for_batch(torch.tensor([[0, 1]]), torch.tensor([[0, 0]]))


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def reconfigure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


FAULTS = {
    "a tensor is missing": (
        lambda f: rewrite(f, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        "not in the checkpoint, first model.layers.1.mlp.up_proj.weight",
    ),
    "the config wants fewer layers": (
        lambda f: reconfigure(f, num_hidden_layers=3),
        "not in its config, first model.layers.3",
    ),
    "the config wants more layers": (
        lambda f: reconfigure(f, num_hidden_layers=5),
        "not in the checkpoint, first model.layers.4",
    ),
    "the vocabulary differs": (
        lambda f: reconfigure(f, vocab_size=260),
        "model.embed_tokens.weight has 258 rows, its config says vocab_size 260",
    ),
    "a width differs": (
        lambda f: reconfigure(f, intermediate_size=48),
        r"is \[.*64.*\] in the checkpoint and \[.*48.*\] by its config",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "an unknown architecture": (lambda f: reconfigure(f, model_type="steam_engine"), "steam_engine"),
    "truncated weights": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
        "model.safetensors",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_that_is_not_whole_is_refused_naming_both_sides(
    teacher_folder: Path, tmp_path: Path, fault: str
) -> None:
    plant, message = FAULTS[fault]
    shutil.copytree(teacher_folder, tmp_path / "model")
    plant(tmp_path / "model")
    with pytest.raises(UserError, match=message):
        TorchTeacher.for_inference(tmp_path / "model", device="cpu")


def test_a_config_given_beside_the_checkpoint_must_be_its_own(teacher_folder: Path) -> None:
    assert TorchTeacher.for_inference(teacher_folder, tiny_config(), device="cpu").vocab_size == 258
    with pytest.raises(UserError, match="has 258 rows, its config says vocab_size 300"):
        TorchTeacher.for_inference(teacher_folder, tiny_config(vocab_size=300), device="cpu")


@pytest.mark.parametrize("source", ["no/such/place/at-all", "./nowhere"])
def test_a_path_that_is_not_there_is_refused(source: str) -> None:
    with pytest.raises(UserError, match="no such"):
        TorchTeacher.for_inference(source, device="cpu")


def test_a_hub_id_that_cannot_be_fetched_is_one_line() -> None:
    with pytest.raises(UserError, match="potstill/no-such-model@main: no such folder here") as caught:
        TorchTeacher.for_inference("potstill/no-such-model", device="cpu")
    assert "\n" not in str(caught.value)


@NO_CUDA
def test_cuda_asked_for_and_absent_is_refused_and_never_runs_on_the_cpu(teacher_folder: Path) -> None:
    with pytest.raises(UserError, match=r"device: .*cuda.* 0 CUDA device"):
        TorchTeacher.for_inference(teacher_folder, device="cuda")
    with pytest.raises(UserError, match=r"device: .*cuda.* 0 CUDA device"):
        CudaTrainerTeacher.for_inference(teacher_folder, tiny_config())


def test_the_cuda_teacher_runs_on_nothing_else(teacher_folder: Path) -> None:
    with pytest.raises(UserError, match="on CUDA alone"):
        CudaTrainerTeacher.for_inference(teacher_folder, device="cpu")


def test_a_model_whose_documents_see_each_other_is_refused(tmp_path: Path) -> None:
    config = transformers.OPTConfig(
        vocab_size=64,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "opt")
    teacher = TorchTeacher.for_inference(tmp_path / "opt", device="cpu")
    places_BT = torch.arange(4).repeat(2)[None]
    batch = Batch(torch.tensor([0]), ids(1, 8, 64), places_BT, torch.arange(7), torch.arange(7))
    with pytest.raises(UserError, match=r"corpus.packing: .* packed document .* neighbour"):
        teacher.targets(batch)
    teacher.model.rows_are_packed = False
    assert len(teacher.targets(batch)) == 7


def test_a_model_whose_positions_go_on_across_documents_is_refused() -> None:
    """Nothing of the neighbour arrives, so the words must not say that it does."""
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    torch.manual_seed(0)
    model = CausalLM(transformers.AutoModelForCausalLM.from_config(config), "teacher gpt2")
    model.probe()
    places = model.hf.transformer.wpe
    places.forward = lambda ids_BT: places.weight[: ids_BT.shape[-1]]
    model.probe()
    assert re.search(r"by 0\.\d+, whatever its neighbour is", model.packing_fault or "")


def small(family: str, **more: Any) -> Any:
    common = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.AutoConfig.for_model(family, **common | more)


# Transformers learnt to keep packed documents of Falcon's apart in 5.24.
FALCON = (
    ""
    if packaging.version.parse(transformers.__version__) >= packaging.version.parse("5.24")
    else "neighbour"
)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (small("falcon", bos_token_id=0, eos_token_id=0), FALCON),
        (small("bloom", n_layer=2, n_head=4), "BloomForCausalLM takes no position_ids"),
        (small("mamba", state_size=4), "MambaForCausalLM takes no position_ids"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_a_family_is_taken_or_refused_for_what_it_lacks(config: Any, said: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert vocab_size_of(tmp_path) == 64
    own_BTV, ids_BT = own_logits(tmp_path, ids(3, 17, 64), torch.float32), ids(3, 17, 64)
    teacher = TorchTeacher.for_inference(tmp_path, device="cpu")
    assert (teacher.logits_per_position(ids_BT) - own_BTV).abs().max() <= 1e-6
    with pytest.raises(UserError, match=said) if said else contextlib.nullcontext():
        teacher.model.require_packing()


@pytest.mark.parametrize(("apart", "is_taken"), [(3e-4, True), (3e-3, False)])
def test_a_model_that_makes_much_of_rounding_is_taken(
    teacher_folder: Path, apart: float, is_taken: bool
) -> None:
    """Random layers by the dozen make 1e-4 of it between a document in a row and the same one alone."""
    model = TorchTeacher.for_inference(teacher_folder, device="cpu").model
    packed = 12  # tokens of the probe's rows
    model.hf.model.norm.register_forward_hook(
        lambda module, given, out: out * (1 + apart) if out.shape[1] == packed else out
    )
    model.probe()
    assert (model.packing_fault is None) == is_taken
    assert is_taken or "whatever its neighbour is" in str(model.packing_fault)


def test_a_head_that_is_not_known_is_refused(teacher_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = transformers.LlamaForCausalLM.forward

    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = plain(self, *args, **kwargs)
        output.logits = output.logits * 1.01
        return output

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", scaled)
    with pytest.raises(
        UserError, match=r"head\(hidden\) of LlamaForCausalLM differs from its own logits by 0.0099"
    ):
        TorchTeacher.for_inference(teacher_folder, device="cpu")


@pytest.mark.real
def test_the_real_gguf_teacher_answers_as_the_library_does(real_teacher: Any) -> None:
    ids_BT = real_teacher.tokenizer("def add(a, b):\n    return a", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        own_BTV = real_teacher.model.hf(input_ids=ids_BT, use_cache=False).logits
    assert (real_teacher.logits_per_position(ids_BT) - own_BTV).abs().max() <= 1e-6 * own_BTV.abs().max()
    assert real_teacher.tokenizer.decode([int(real_teacher.logits_for_batch(ids_BT).argmax())]).strip() == "+"


def test_a_sharded_folder_loads_whole(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder)
    shutil.rmtree(folder)
    hf.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert TorchTeacher.for_inference(folder, device="cpu").vocab_size == 258
    next(iter(sorted(folder.glob("*.safetensors")))).unlink()
    with pytest.raises(UserError, match="safetensors"):
        TorchTeacher.for_inference(folder, device="cpu")
