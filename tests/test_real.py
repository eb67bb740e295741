"""Claims about real models, on the real one: SmolLM2-135M-Instruct over the source of the standard library."""

from __future__ import annotations

import copy
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from potstill.data import packing, readers
from potstill.evals.heldout import heldout
from potstill.losses.objective import Objective
from potstill.models.causal_lm import CausalLM
from potstill.models.pruning import cut
from potstill.models.student import Student, from_checkpoint

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def corpus(real_teacher: Any) -> packing.Corpus:
    reading = readers.text.read(Path(sysconfig.get_path("stdlib")) / "json", real_teacher.tokenizer, ["*.py"])
    return packing.build(reading, tokens_per_row=128, heldout_rows=3, vocab=real_teacher.vocab)


def test_the_kl_of_a_student_equal_to_its_teacher_is_zero_and_its_ce_is_the_library_s_loss(
    real_teacher: Any, corpus: packing.Corpus
) -> None:
    same = Student(CausalLM(copy.deepcopy(real_teacher.model.hf), "student"), Objective(chunk=64))
    found = heldout(same, real_teacher, corpus.heldout, rows_per_batch=2)
    assert abs(found["heldout/kl"]) < 1e-6 and abs(found["heldout/kd"]) < 1e-6
    assert found["heldout/agreement"] == 1.0
    assert found["heldout/ce"] == pytest.approx(found["heldout/teacher_ce"], abs=1e-5)

    batch = corpus.heldout.batch(range(len(corpus.heldout)))
    labels_BT = torch.full_like(batch.input_ids_BT, -100)
    labels_BT.view(-1)[batch.positions_N] = batch.labels_N
    with torch.no_grad():
        logits_BTV = same.model.hf(
            input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False
        ).logits
        library = same.model.hf.loss_function(
            logits=logits_BTV, labels=None, shift_labels=labels_BT, vocab_size=logits_BTV.shape[-1]
        )
        by_hand = F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=-100)
    assert found["heldout/ce"] == pytest.approx(float(library), abs=1e-4)
    assert found["heldout/ce"] == pytest.approx(float(by_hand), abs=1e-4)
    assert 1.0 < found["heldout/ce"] < 4.0


def test_a_cut_student_saved_and_loaded_has_the_same_held_out_numbers(
    real_teacher: Any, corpus: packing.Corpus, tmp_path: Path
) -> None:
    student = Student(cut(real_teacher.model, [0, 1, 28, 29]), Objective(chunk=64))
    student.model.probe()
    student.save(tmp_path / "student", real_teacher.tokenizer)
    again = Student(from_checkpoint(tmp_path / "student", torch.device("cpu")), Objective(chunk=100))
    one = heldout(student, real_teacher, corpus.heldout, rows_per_batch=3)
    two = heldout(again, real_teacher, corpus.heldout, rows_per_batch=1)
    assert two == pytest.approx(one, abs=1e-5)
    assert one["heldout/kl"] > 1


def test_the_tokenizer_of_a_gguf_file_survives_saving(real_teacher: Any, tmp_path: Path) -> None:
    from potstill.data.tokenizers import load_tokenizer, require_same, vocab_of

    real_teacher.tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    require_same(real_teacher.vocab, vocab_of(again, real_teacher.vocab_size), "teacher", "saved")
    text = "def f(x):\n\treturn {'é': [x, 1_000]}  # naïve ☃ <|im_end|>\n"
    assert again(text)["input_ids"] == real_teacher.tokenizer(text)["input_ids"]
