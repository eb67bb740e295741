"""A vocabulary with a padded end, on whichever side, is the vocabulary without it: no flag, exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import make_model, make_tokenizer
from refusals import refusal
from safetensors.torch import load_file

from potstill import UserError, distill, load_recipe
from potstill.build.resolve import resolve
from potstill.build.setup import RunSetup, set_up
from potstill.cli.main import main
from potstill.evals.heldout import heldout
from potstill.models.generate import greedy_text
from potstill.preflight.checks import vocabulary_is_shared
from potstill.teachers.hf import TorchTeacher

Recipe = Callable[..., Path]
KNOWN = 258


def padded(folder: Path, to: Path, extra: int, value: float = 3.0) -> Path:
    """The same model with `extra` rows more, loud ones: unmasked they would take most of the probability."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(KNOWN + extra, mean_resizing=False)
    with torch.no_grad():
        for embedding in {model.get_input_embeddings(), model.get_output_embeddings()}:
            embedding.weight[KNOWN:] = value * embedding.weight[7]
    model.save_pretrained(to)
    make_tokenizer().save_pretrained(to)
    return to


@pytest.fixture
def pair(tmp_path: Path, teacher_folder: Path) -> dict[str, Path]:
    student = make_model(tmp_path / "student", seed=3, num_hidden_layers=2)
    return {
        "teacher": teacher_folder,
        "padded teacher": padded(teacher_folder, tmp_path / "padded teacher", 62),
        "student": student,
        "padded student": padded(student, tmp_path / "padded student", 6),
    }


def setup_of(tiny_recipe: Recipe, teacher: Path, student: Path) -> RunSetup:
    sections = {
        "teacher": f"{{name: torch, model: {teacher}}}",
        "student": f"{{name: checkpoint, model: {student}}}",
    }
    return set_up(resolve(load_recipe(tiny_recipe(**sections))), lambda text: None)


COMBINATIONS = [
    ("padded teacher", "student"),
    ("teacher", "padded student"),
    ("padded teacher", "padded student"),
]


@pytest.mark.parametrize(("teacher", "student"), COMBINATIONS)
def test_loss_gradient_and_evaluation_are_those_of_the_pair_without_padding(
    tiny_recipe: Recipe, pair: dict[str, Path], teacher: str, student: str
) -> None:
    plain = setup_of(tiny_recipe, pair["teacher"], pair["student"])
    ours = setup_of(tiny_recipe, pair[teacher], pair[student])
    assert ours.shared.ids == KNOWN
    assert ours.shared.masked_in_teacher == (62 if teacher.startswith("padded") else 0)
    assert ours.shared.masked_in_student == (6 if student.startswith("padded") else 0)
    found = []
    for setup in (plain, ours):
        batch = setup.corpus.train.batch([0, 1])
        loss = setup.student(batch, setup.teacher.targets(batch))["loss"]
        loss.backward()
        embedding = setup.student.model.hf.get_output_embeddings().weight.grad
        found.append(
            (loss, embedding[:KNOWN], heldout(setup.student, setup.teacher, setup.corpus.heldout, 4))
        )
        assert not embedding[KNOWN:].any()
    (loss, grad, metrics), (our_loss, our_grad, our_metrics) = found
    torch.testing.assert_close(our_loss, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(our_grad, grad, rtol=1e-5, atol=1e-6)
    assert our_metrics == pytest.approx(metrics, rel=1e-5)


def test_the_loss_is_that_of_an_independent_computation(tiny_recipe: Recipe, pair: dict[str, Path]) -> None:
    """Float64 numpy, over the known ids alone."""
    setup = setup_of(tiny_recipe, pair["padded teacher"], pair["padded student"])
    batch = setup.corpus.train.batch([0])

    def logp(folder: Path) -> np.ndarray:
        hf = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            logits = hf(
                input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False
            ).logits
        known = logits[0].double().numpy()[batch.positions_N.numpy(), :KNOWN]
        return np.asarray(
            known
            - np.log(np.exp(known - known.max(1, keepdims=True)).sum(1, keepdims=True))
            - known.max(1, keepdims=True)
        )

    teacher, student = logp(pair["padded teacher"]), logp(pair["padded student"])
    ce = -student[np.arange(len(student)), batch.labels_N.numpy()].sum()
    kd = (np.exp(teacher) * (teacher - student)).sum()
    sums = setup.student(batch, setup.teacher.targets(batch))
    assert float(sums["ce"]) == pytest.approx(ce, rel=1e-5)
    assert float(sums["kd"]) == pytest.approx(kd, rel=1e-4)


def test_extra_ids_have_probability_zero_in_the_teacher_s_own_logits(
    tiny_recipe: Recipe, pair: dict[str, Path]
) -> None:
    setup = setup_of(tiny_recipe, pair["padded teacher"], pair["student"])
    assert isinstance(setup.teacher, TorchTeacher)
    ids_BT = torch.tensor([[5, 9, 100]])
    for logits in (setup.teacher.logits_for_batch(ids_BT), setup.teacher.logits_per_position(ids_BT)):
        assert logits.shape[-1] == setup.teacher.vocab_size == KNOWN + 62
        assert bool((logits.softmax(-1)[..., KNOWN:] == 0).all()) and bool(
            logits[..., :KNOWN].isfinite().all()
        )


def test_no_extra_id_is_generated_here_or_by_transformers_from_what_is_saved(
    tiny_recipe: Recipe, pair: dict[str, Path], tmp_path: Path
) -> None:
    recipe = tiny_recipe(
        teacher=f"{{name: torch, model: {pair['padded teacher']}}}",
        student=f"{{name: checkpoint, model: {pair['padded student']}}}",
        eval="{sample_prompt: the cat, sample_tokens: 12}",
    )
    loud = transformers.AutoModelForCausalLM.from_pretrained(pair["padded student"])
    prompt = torch.tensor([make_tokenizer()("the cat")["input_ids"]])
    assert int(loud.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=1).max()) >= KNOWN
    run = distill(recipe, out=tmp_path / "run")
    assert run.receipt()["vocabulary"] == {
        "ids": KNOWN,
        "masked_in_teacher": 62,
        "masked_in_student": 6,
        "differences": [],
    }
    saved = transformers.AutoModelForCausalLM.from_pretrained(run.student)
    assert int(saved.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=1).max()) < KNOWN
    setup = setup_of(tiny_recipe, pair["padded teacher"], pair["padded student"])
    assert greedy_text(setup.student.model, setup.tokenizer, "the cat", 12)
    assert len(load_file(run.student / "model.safetensors")["model.embed_tokens.weight"]) == KNOWN + 6


def test_a_cut_student_of_a_padded_teacher_and_one_of_another_width(
    tiny_recipe: Recipe, pair: dict[str, Path], tmp_path: Path
) -> None:
    teacher = f"{{name: torch, model: {pair['padded teacher']}}}"
    setup = set_up(resolve(load_recipe(tiny_recipe(teacher=teacher))), lambda text: None)
    assert (setup.shared.ids, setup.shared.masked_in_student) == (KNOWN, 62)
    config = json.loads((pair["student"] / "config.json").read_text())
    for size, ids in ((KNOWN, KNOWN), (KNOWN + 30, KNOWN)):
        (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": size}))
        student = f"{{name: config, model: {tmp_path / 'config.json'}}}"
        setup = set_up(resolve(load_recipe(tiny_recipe(teacher=teacher, student=student))), lambda text: None)
        assert (setup.shared.ids, setup.shared.masked_in_student) == (ids, size - ids)
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 200}))
    with pytest.raises(
        UserError, match=r"has logits for 200 of the 258 tokens.* the first without is id 200"
    ):
        set_up(resolve(load_recipe(tiny_recipe(teacher=teacher, student=student))), lambda text: None)


def test_a_student_without_a_tokenizer_and_of_another_width_is_refused(
    tiny_recipe: Recipe, pair: dict[str, Path], tmp_path: Path
) -> None:
    student = make_model(tmp_path / "bare", with_tokenizer=False, vocab_size=300)
    with pytest.raises(UserError, match=r"has logits for 258 ids and .*bare for 300"):
        setup_of(tiny_recipe, pair["teacher"], student)


def test_a_token_shard_may_not_hold_an_id_of_the_padded_end(
    tiny_recipe: Recipe, pair: dict[str, Path], tmp_path: Path
) -> None:
    ids = np.arange(4000, dtype=np.uint16) % KNOWN
    ids[1234] = KNOWN + 3
    ids.tofile(tmp_path / "shard.bin")
    corpus = f"{{name: tokens, path: {tmp_path / 'shard.bin'}, dtype: uint16, tokens_per_row: 32, heldout_rows: 4}}"
    recipe = tiny_recipe(corpus=corpus, teacher=f"{{name: torch, model: {pair['padded teacher']}}}")
    with pytest.raises(UserError, match=f"{KNOWN + 3}.*{KNOWN}"):
        set_up(resolve(load_recipe(recipe)), lambda text: None)


@pytest.mark.parametrize(("teacher", "student"), COMBINATIONS)
def test_the_check_of_a_padded_pair_is_sound(
    tiny_recipe: Recipe, pair: dict[str, Path], teacher: str, student: str
) -> None:
    recipe = tiny_recipe(
        teacher=f"{{name: torch, model: {pair[teacher]}}}",
        student=f"{{name: checkpoint, model: {pair[student]}}}",
    )
    assert main(["check", str(recipe)]) == 0


def told(recipe: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The warnings of a try of one step, and the same in the line of the check."""
    assert main(["distill", str(recipe), "--smoke", "1"]) == 0
    lines = capsys.readouterr().err.splitlines()
    return [line.removeprefix("warning: ") for line in lines if line.startswith("warning: ")]


def test_what_the_tokenizers_differ_in_is_told_with_its_effect_and_the_line_that_settles_it(
    tiny_recipe: Recipe, teacher_folder: Path, pair: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    student = pair["student"]
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "a", "bos_token": "b", "pad_token": "c"})
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(student)
    sections = {"student": f"{{name: checkpoint, model: {student}}}"}
    found = told(tiny_recipe(**sections), capsys)
    wanted = {
        "EOS token: the teacher has id 0 ('<eos>'), the student id": "may not stop",
        "BOS token: the teacher has none, the student id": "prompts start differently",
        "PAD token: the teacher has id 1 ('<pad>'), the student id": "padded differently",
        "chat templates of teacher and student differ": "conversations are written with",
        "3 tokens are added ones": "takes it whole",
    }
    for line, (begin, effect) in zip(found, wanted.items(), strict=True):
        assert line.startswith(begin) and effect in line
        assert line.endswith(f"corpus.tokenizer: {student} takes the student's.")
    corpus = tiny_recipe(**sections).read_text().splitlines()[0].removeprefix("corpus: ")
    sections["corpus"] = corpus.replace("}", f", tokenizer: {teacher_folder}}}")
    settled = f"settled by corpus.tokenizer: {teacher_folder}, which reads the corpus"
    assert all(settled in line for line in told(tiny_recipe(**sections), capsys))


@pytest.mark.parametrize("bare", ["student", "teacher", "both"])
def test_lists_that_were_not_compared_are_no_lists_that_agree(
    bare: str, tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same number of ids says nothing of what they mean."""
    models = {
        who: make_model(tmp_path / who, seed=seed, with_tokenizer=bare not in (who, "both"))
        for seed, who in enumerate(("teacher", "student"))
    }
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    recipe = tiny_recipe(
        teacher=f"{{name: torch, model: {models['teacher']}}}",
        student=f"{{name: checkpoint, model: {models['student']}}}",
    )
    corpus = recipe.read_text().replace(
        "tokens_per_row", f"tokenizer: {tmp_path / 'tokenizer'}, tokens_per_row"
    )
    recipe.write_text(corpus)
    found = told(recipe, capsys)
    for who, line in zip(["teacher", "student"] if bare == "both" else [bare], found, strict=True):
        assert line.startswith(f"token lists not compared: the {who} ")
        assert line.endswith(f"files in {who}.model settles it.")
    setup = set_up(resolve(load_recipe(recipe)), lambda text: None)
    assert "token lists not compared" in vocabulary_is_shared(setup).figure


def test_an_end_that_is_padding_is_refused_because_it_is_never_generated(
    tiny_recipe: Recipe, pair: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.json", "generation_config.json"):
        path = pair["padded teacher"] / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": KNOWN + 2}))
    recipe = tiny_recipe(teacher=f"{{name: torch, model: {pair['padded teacher']}}}")
    line = refusal(["distill", str(recipe), "--out", str(tmp_path / "run")], capsys, tmp_path / "run")
    assert "eos_token_id" in line and f"id {KNOWN + 2}" in line and f"0 to {KNOWN - 1}" in line
