"""A multimodal checkpoint is read as the causal LM of its text half, and what is left out is listed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_tokenizer
from export.tiny_models import make_run
from export.tiny_models import make_tokenizer as make_bpe_tokenizer
from multimodal import TEXT_PLACES, make_multimodal
from safetensors.torch import load_file, save_file

from potstill import TorchTeacher, UserError, distill
from potstill.cli.main import main
from potstill.export.export import export_run
from potstill.models.load import load_causal_lm, load_config

Recipe = Callable[..., Path]
IDS_BT = torch.arange(2, 66).reshape(2, 32)


def logits(hf: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = hf.eval()(input_ids=IDS_BT, use_cache=False).logits
    return found


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("gemma3", "gemma3_text"),
        ("llava", "llama"),
        ("mistral3", "mistral"),
        ("qwen2_5_vl", "qwen2"),
        ("qwen3_vl", "qwen3"),
        ("qwen3_vl_moe", "qwen3_moe"),
        ("llama4", "llama4_text"),
    ],
)
def test_the_text_half_has_the_logits_of_the_whole_and_is_saved_as_a_causal_lm(
    tmp_path: Path, kind: str, text: str
) -> None:
    folder = make_multimodal(tmp_path / "whole", kind)
    model = load_causal_lm(folder)
    whole = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    # Llama 4's whole of Transformers 5.24 fails without an image; its text half is a model of its own there.
    expected = logits(whole.language_model if kind == "llama4" else whole)
    assert torch.equal(model.head(model.hidden(IDS_BT)), expected)

    files = load_file(folder / "model.safetensors")
    if kind == "qwen2_5_vl":
        left_out = [name for name in files if name.startswith("visual.")]
    else:
        left_out = [name for name in files if not name.startswith(TEXT_PLACES)]
    assert sum(model.left_out.values()) == len(left_out) > 0
    assert not any("language" in place or "head" in place for place in model.left_out)

    model.save(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["model_type"] == text and config["architectures"] == [type(model.hf).__name__]
    assert not {"text_config", "vision_config"} & config.keys()
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(saved), expected)
    assert load_causal_lm(tmp_path / "saved").left_out == {}


def test_a_run_lists_what_is_left_out_of_teacher_and_student(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [make_multimodal(tmp_path / kind, kind) for kind in ("gemma3", "llava")]
    for folder in folders:
        make_tokenizer().save_pretrained(folder)
    teacher = f"{{name: torch, model: {folders[0]}}}"
    for number, student in enumerate(
        ("{name: cut, layers: 1}", f"{{name: checkpoint, model: {folders[1]}}}")
    ):
        recipe = tiny_recipe(teacher=teacher, student=student)
        out = tmp_path / f"run{number}"
        assert main(["distill", str(recipe), "--out", str(out), "train.steps=2"]) == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if "tensors are left out: " in line]
        receipt = json.loads((out / "receipt.json").read_text())
        assert receipt["teacher"]["left_out"] == {"model.multi_modal_projector": 2, "model.vision_tower": 32}
        assert "34 tensors are left out: model.multi_modal_projector (2), model.vision_tower (32)" in lines[0]
        if number == 0:
            assert len(lines) == 1 and "left_out" not in receipt["student"]
            config = json.loads((out / "student" / "config.json").read_text())
            assert (config["model_type"], config["num_hidden_layers"]) == ("gemma3_text", 1)
        else:
            assert len(lines) == 2
            assert receipt["student"]["left_out"] == {
                "model.multi_modal_projector": 4,
                "model.vision_tower": 23,
            }


def test_plan_reads_the_text_half_alone(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_multimodal(tmp_path / "gemma3", "gemma3")
    make_tokenizer().save_pretrained(folder)
    assert main(["plan", str(tiny_recipe(teacher=f"{{name: torch, model: {folder}}}")), "--json"]) == 0
    weights = sum(p.numel() for p in load_causal_lm(folder).hf.parameters())
    planned = json.loads(capsys.readouterr().out)["teacher"]
    assert 4 * weights <= planned < 4 * weights + 4096


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda t: t.pop("vision_tower.embeddings.patch_embedding.weight"), "not in the checkpoint"),
        (lambda t: t.pop("language_model.model.norm.weight"), "not in the checkpoint"),
        (lambda t: t.update(audio_tower=torch.ones(3)), "not in its config, first audio_tower"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused(
    tmp_path: Path, spoil: Callable[[dict[str, torch.Tensor]], Any], error: str
) -> None:
    folder = make_multimodal(tmp_path / "m", "gemma3")
    tensors = load_file(folder / "model.safetensors")
    spoil(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=error):
        load_causal_lm(folder)


def test_a_text_half_that_is_another_model_alone_is_refused(tmp_path: Path) -> None:
    """Aya Vision's whole does not scale its logits, as Cohere's causal LM does."""
    with pytest.raises(UserError, match=r"text half differ from those of the whole aya_vision by 0\.\d+"):
        load_causal_lm(make_multimodal(tmp_path / "m", "aya_vision"))


def test_another_config_than_the_checkpoint_s_is_refused(tmp_path: Path) -> None:
    folder = make_multimodal(tmp_path / "m", "llava")
    config = load_config(folder)
    config.intermediate_size = 48
    with pytest.raises(UserError, match="its text half is no llama of this config"):
        load_causal_lm(folder, config=config)


def test_fewer_bits_of_a_text_half(tmp_path: Path) -> None:
    """Packed matrices stay where they are, so that the text half must be a model of its own in Transformers."""
    pytest.importorskip("torchao", reason="torchao is not installed; not run")
    for kind in ("gemma3", "llama4"):
        folder = make_multimodal(tmp_path / kind, kind)
        load_causal_lm(folder).save(tmp_path / f"{kind}-text")
        packed, alone = (
            TorchTeacher.for_inference(each, device="cpu", weights="int8")
            for each in (folder, tmp_path / f"{kind}-text")
        )
        assert packed.model.left_out and packed.weights_sha256() == alone.weights_sha256()
        assert torch.equal(packed.logits_per_position(IDS_BT), alone.logits_per_position(IDS_BT))
    with pytest.raises(UserError, match="Qwen2_5_VLTextModel cannot be loaded with fewer bits"):
        TorchTeacher.for_inference(
            make_multimodal(tmp_path / "q", "qwen2_5_vl"), device="cpu", weights="int8"
        )


def test_ends_and_ties_are_those_of_the_whole(tmp_path: Path) -> None:
    """Gemma 3 has its ends beside the text half; a whole that is not tied has a head of its own."""
    folder = make_multimodal(
        tmp_path / "m",
        "gemma3",
        {"tie_word_embeddings": True},
        eos_token_id=[0, 5],
        tie_word_embeddings=False,
    )
    model = load_causal_lm(folder)
    assert model.hf.config.eos_token_id == [0, 5] and not model.hf.config.tie_word_embeddings
    head, embedding = model.hf.get_output_embeddings().weight, model.hf.get_input_embeddings().weight
    assert not torch.equal(head, embedding)
    model.save(tmp_path / "saved")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "saved").eos_token_id == [0, 5]
    whole = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(saved), logits(whole))


def test_a_head_is_tied_where_the_whole_ties_it(tmp_path: Path) -> None:
    folder = make_multimodal(
        tmp_path / "m", "llava", {"tie_word_embeddings": False}, tie_word_embeddings=True
    )
    hf = load_causal_lm(folder).hf
    assert hf.config.tie_word_embeddings
    assert hf.get_output_embeddings().weight is hf.get_input_embeddings().weight


def test_a_balancing_loss_that_transformers_lacks_is_refused(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Llama 4 has a coefficient for it in its config, and no loss."""
    folder = make_multimodal(tmp_path / "m", "llama4", {"output_router_logits": True})
    make_tokenizer().save_pretrained(folder)
    student = f"{{name: checkpoint, model: {folder}}}"
    assert main(["distill", str(tiny_recipe(student=student)), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "balancing loss of a llama4_text does not exist in Transformers" in error


def test_the_ropes_of_gemma_3_are_written_for_older_readers(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """Transformers 4 reads one base for each kind of layer; 5 reads the same folder as it was."""
    ropes = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    folder = make_multimodal(tmp_path / "m", "gemma3", {"rope_parameters": ropes})
    make_tokenizer().save_pretrained(folder)
    recipe = tiny_recipe(teacher=f"{{name: torch, model: {folder}}}", student="{name: cut, layers: 2}")
    recipe.write_text(recipe.read_text() + "allow_identical: true\n")
    run = distill(recipe, out=tmp_path / "run", overrides=["train.steps=1", "train.lr=1e-9"])
    config = json.loads((run.student / "config.json").read_text())
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (5e5, 2e4)
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    student = transformers.AutoModelForCausalLM.from_pretrained(run.student)
    whole = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    assert torch.allclose(logits(student), logits(whole), atol=1e-4)


def test_a_gguf_file_of_a_text_half_is_read_with_equal_logits(tmp_path: Path) -> None:
    folder = make_multimodal(
        tmp_path / "m", "llava", {"vocab_size": 352, "bos_token_id": 1, "eos_token_id": 2}
    )
    model = load_causal_lm(folder)
    run = make_run(tmp_path / "run", model.hf, make_bpe_tokenizer("gpt-2"))
    record = export_run(run.path, formats=["f32"], check=False).records[0]
    read = load_causal_lm(run.path / record["file"])
    assert torch.allclose(logits(read.hf), logits(model.hf), atol=1e-4)
