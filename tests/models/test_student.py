"""The student on disk is the student in memory, and the loss in its forward is the loss of its logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from conftest import make_model, make_tokenizer, tiny_config

from potstill.errors import UserError
from potstill.losses.objective import Objective
from potstill.models.generate import greedy_text
from potstill.models.load import load_causal_lm
from potstill.models.student import Student, from_checkpoint, from_config

CPU = torch.device("cpu")


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_student_loads_anywhere_with_equal_logits(tmp_path: Path, tied: bool) -> None:
    model = from_checkpoint(make_model(tmp_path / "model", tie_word_embeddings=tied), CPU)
    Student(model, Objective()).save(tmp_path / "saved", make_tokenizer())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids_BT = torch.randint(0, 258, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again(ids_BT).logits, model.hf(ids_BT).logits)
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) is tied
    assert (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")("cat")["input_ids"]
        == make_tokenizer()("cat")["input_ids"]
    )


def test_an_older_transformers_finds_the_rope_base(tmp_path: Path) -> None:
    model = from_checkpoint(
        make_model(tmp_path / "model", rope_parameters={"rope_type": "default", "rope_theta": 77777.0}), CPU
    )
    Student(model, Objective()).save(tmp_path / "saved", None)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 77777.0
    assert load_causal_lm(tmp_path / "saved").hf.config.rope_parameters["rope_theta"] == 77777.0


def test_an_older_transformers_finds_the_rope_scaling(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 77777.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 128}
    model = from_checkpoint(make_model(tmp_path / "model", rope_parameters=rope), CPU)
    Student(model, Objective()).save(tmp_path / "saved", None)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert {**config["rope_scaling"], "rope_theta": config["rope_theta"]} == rope
    assert load_causal_lm(tmp_path / "saved").hf.config.rope_parameters == rope


def test_an_older_transformers_finds_a_tokenizer_class_that_it_has(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|side|>", "<|änd|>"]})
    model = from_checkpoint(make_model(tmp_path / "model"), CPU)
    Student(model, Objective()).save(tmp_path / "saved", tokenizer)
    config = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<|side|>", "<|änd|>"]
    assert "extra_special_tokens" not in config
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again.all_special_tokens == tokenizer.all_special_tokens
    assert again("a<|side|>b<|änd|>")["input_ids"] == tokenizer("a<|side|>b<|änd|>")["input_ids"]


def test_a_student_from_a_config_is_a_function_of_the_seed(tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path)
    hashes = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        hashes.append(Student(from_config(tmp_path, CPU), Objective()).weights_sha256())
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize(
    ("kind", "said"),
    [("ViT", "vit is None, no number of tokens. A causal language"), ("T5", "no causal LM can be made")],
)
def test_a_config_of_no_causal_lm_is_refused(kind: str, said: str, tmp_path: Path) -> None:
    getattr(transformers, f"{kind}Config")().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=said):
        from_config(tmp_path, CPU)


def test_one_changed_bit_changes_the_hash_of_the_weights(tmp_path: Path) -> None:
    student = Student(from_checkpoint(make_model(tmp_path / "m"), CPU), Objective())
    before = student.weights_sha256()
    with torch.no_grad():
        weight = student.model.hf.model.norm.weight
        weight[3] = torch.nextafter(weight[3], torch.tensor(9.0))
    assert student.weights_sha256() != before


def test_a_sample_is_greedy_and_repeats(tmp_path: Path) -> None:
    model = from_checkpoint(make_model(tmp_path / "m"), CPU)
    one = greedy_text(model, make_tokenizer(), "the cat", 8)
    assert one == greedy_text(model, make_tokenizer(), "the cat", 8)
    ids = make_tokenizer()("the cat", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        first = int(model.hf(ids).logits[0, -1].argmax())
    assert one.startswith(make_tokenizer().decode([first], skip_special_tokens=True))
