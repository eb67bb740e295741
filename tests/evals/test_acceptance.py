"""How often a teacher accepts a student's drafts: what is expected of distributions, and what is counted."""

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
from potstill.build.resolve import resolve
from potstill.build.setup import set_up
from potstill.evals import acceptance, speed, speed_worker


@pytest.mark.parametrize("rows_per_batch", [1, 3, 100])
def test_what_is_expected_is_the_overlap_of_the_two_distributions(
    tiny_recipe: Callable[..., Path], rows_per_batch: int
) -> None:
    setup = set_up(resolve(load_recipe(tiny_recipe(objective="{chunk: 7}"))), lambda text: None)
    rows = setup.corpus.heldout
    batch = rows.batch(range(len(rows)))
    inputs = {"input_ids": batch.input_ids_BT, "position_ids": batch.position_ids_BT, "use_cache": False}
    shares = []
    for model in (setup.student.model, setup.teacher.model):
        assert model is not None
        with torch.no_grad():
            logits_NV = model.hf(**inputs).logits.flatten(0, 1)[batch.positions_N].double().numpy()
        odds_NV = np.exp(logits_NV - logits_NV.max(-1, keepdims=True))
        shares.append(odds_NV / odds_NV.sum(-1, keepdims=True))
    overlap_N = np.minimum(*shares).sum(-1)
    setup.student.train()
    found = acceptance.expected(setup.student, setup.teacher, rows, rows_per_batch)
    assert found == {"mean": pytest.approx(overlap_N.mean(), abs=1e-6), "positions": len(batch.positions_N)}
    assert 0.1 < found["mean"] < 0.9 and setup.student.training


def constant(folder: Path, seed: int) -> np.ndarray[Any, Any]:
    """A model in the folder whose next token has one distribution, whatever came before; returns it."""
    make_model(folder, seed=seed, tie_word_embeddings=False, num_hidden_layers=1)
    hf: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        embedding_VD = hf.get_input_embeddings().weight
        embedding_VD.copy_(embedding_VD[:1].expand_as(embedding_VD))
        hf.get_output_embeddings().weight.mul_(0.3)
        hf.save_pretrained(folder)
        share_TV = hf(torch.tensor([[5, 9, 200]])).logits[0].double().softmax(-1).numpy()
    assert np.abs(share_TV[0] - share_TV[-1]).max() < 1e-5
    return np.asarray(share_TV[0])


def asked(teacher: Path, student: Path, prompts: int = 4, new_tokens: int = 40) -> dict[str, Any]:
    ids = [[number + 2, 7, 8] for number in range(prompts)]
    common = {"threads": 1, "device": "cpu", "dtype": "float32", "new_tokens": new_tokens}
    return common | {"prompts": ids, "teacher": str(teacher), "student": str(student)}


def test_what_is_counted_is_what_the_distributions_say(tmp_path: Path) -> None:
    """The share of drafts that are accepted is sum min(p, q), which is the same at every position here."""
    overlap = float(np.minimum(constant(tmp_path / "t", 1), constant(tmp_path / "s", 2)).sum())
    pair = speed_worker.Speculative(asked(tmp_path / "t", tmp_path / "s"))
    counts = [pair.measure() for _ in range(25)]
    total = {name: sum(one[name] for one in counts) for name in acceptance.COUNTS}
    assert 0.2 < overlap < 0.8 and total["judged"] > 500
    error = math.sqrt(overlap * (1 - overlap) / total["judged"])
    assert abs(total["accepted"] / total["judged"] - overlap) < 4 * error
    assert total["accepted"] < total["judged"] < total["drafted"]
    assert total["rounds"] + total["accepted"] == total["new_tokens"] == 25 * 40


def test_a_student_that_is_its_teacher_has_every_draft_accepted(teacher_folder: Path) -> None:
    found = acceptance.measured(asked(teacher_folder, teacher_folder, prompts=2, new_tokens=12))
    assert isinstance(found, dict)
    assert found["rate"] == 1.0 and found["accepted"] == found["drafted"] == found["judged"]
    assert found["new_tokens"] == 24 and found["drafted_at_once"] == 4
    # Of 12 tokens: two rounds of four drafts and one more token, and a last round of one draft and one more.
    assert found["rounds"] == 6 and found["tokens_per_round"] == 4.0
    assert found["low"] < 1.0 == found["high"] and found["peak_memory_bytes"] > 2**20


@pytest.mark.soak
def test_a_model_that_cannot_be_loaded_is_not_run_and_the_other_is(
    teacher_folder: Path, tmp_path: Path
) -> None:
    request = {"prompt": [3, 4, 5], "new_tokens": 4, "threads": 1, "device": "cpu", "dtype": "float32"}
    gone, there = (
        speed.Model("transformers", request | {"model": str(place)})
        for place in (tmp_path / "none", teacher_folder)
    )
    speed.measure([gone, there], 3)
    assert str(gone.figures()).startswith("not run: ") and str(tmp_path / "none") in str(gone.figures())
    figures = there.figures()
    assert isinstance(figures, dict) and figures["repeats"] == 3
    assert figures["parameters"] == sum(
        p.numel() for p in transformers.AutoModelForCausalLM.from_pretrained(teacher_folder).parameters()
    )
    assert [one["prefill_tokens"] for one in there.measured] == [3] * 3
    assert [one["decoded_tokens"] for one in there.measured] == [3] * 3  # the first comes out of the prompt
    assert speed.ratios(student=there, teacher=gone) == {}


def test_figures_are_medians_and_ratios_are_within_a_round() -> None:
    def model(factor: float) -> speed.Model:
        found = speed.Model("transformers", {})
        found.measured = [
            {
                "prefill_tokens": 100,
                "prefill_s": factor * busy,
                "first_token_s": 2 * factor * busy,
                "decoded_tokens": 30,
                "decoding_s": 3 * factor * busy,
            }
            for busy in (1.0, 5.0, 2.0)
        ]
        return found

    teacher, student = model(1.0), model(0.25)
    figures = teacher.figures()
    assert isinstance(figures, dict)
    assert figures["prefill_tokens_per_s"] == {"median": 50.0, "low": 20.0, "high": 100.0}
    assert figures["decoding_tokens_per_s"] == {"median": 5.0, "low": 2.0, "high": 10.0}
    assert figures["first_token_s"] == {"median": 4.0, "low": 2.0, "high": 10.0}
    found = speed.ratios(
        student=student, teacher=teacher
    )  # what the machine did beside it is in none of them
    assert found["decoding_tokens_per_s"] == {"median": 4.0, "low": 4.0, "high": 4.0}
    assert found["first_token_s"] == {"median": 0.25, "low": 0.25, "high": 0.25}
