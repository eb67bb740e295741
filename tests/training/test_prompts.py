"""Prompts: out of records, conversations and texts, each model's by its own template, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer

from potstill import UserError, distill, load_recipe
from potstill.build.corpus import open_source
from potstill.build.resolve import resolve
from potstill.build.setup import RunSetup, set_up
from potstill.data.prompts import Prompts
from potstill.teachers.hf import TorchTeacher
from potstill.training.rollouts import Rollouts

Recipe = Callable[..., Path]
PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
OTHER = "{% for m in messages %}#{{ m.role }}:{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}#assistant:{% endif %}"
QUESTIONS = [f"what is {a} and {b}?" for a in range(6) for b in range(4)]


def with_template(folder: Path, template: str | None, **changes: Any) -> Path:
    make_model(folder, with_tokenizer=False, **changes)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def prompts(tiny_recipe: Recipe, tmp_path: Path) -> Callable[..., Path]:
    """A recipe with a corpus of these records, whose models have these templates."""

    def write(
        records: list[dict[str, Any]],
        template: str | None = PLAIN,
        corpus: str = "",
        of_student: str | None = None,
        **sections: str,
    ) -> Path:
        path = lines(tmp_path / "prompts.jsonl", records)
        teacher = with_template(tmp_path / "teacher", template)
        if of_student is not None:
            student = with_template(tmp_path / "student", of_student, seed=5)
            corpus += f", tokenizer: {student}"
            sections.setdefault("student", f"{{name: checkpoint, model: {student}}}")
        given = {
            "corpus": f"{{name: prompts, path: {path}, tokens_per_row: 80, heldout_rows: 3{corpus}}}",
            "teacher": f"{{name: torch, model: {teacher}}}",
            "rollouts": "{max_new_tokens: 6}",
            "eval": "{every: 2}",
        }
        return tiny_recipe(**given | sections)

    return write


def built(recipe: Path, *overrides: str) -> tuple[RunSetup, Rollouts]:
    setup = set_up(resolve(load_recipe(recipe, overrides)), lambda text: None)
    data = setup.data()
    assert isinstance(data, Rollouts)
    return setup, data


def text_of(ids: list[int]) -> str:
    text: str = make_tokenizer().decode(ids)
    return text


def texts(setup: RunSetup) -> list[str]:
    found = setup.rollouts
    assert found is not None
    asked = [found.prompts[number] for number in range(len(found.prompts))] + found.heldout
    return sorted(text_of(prompt.ids) for prompt in asked)


@pytest.mark.parametrize(
    "shape",
    [
        lambda q: {"prompt": q},
        lambda q: {"question": q, "answer": "never seen"},
        lambda q: {"instruction": q, "output": "never seen"},
        lambda q: {"prompt": [{"role": "user", "content": q}]},
        lambda q: {
            "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "never seen"}]
        },
        lambda q: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": "never seen"}]},
        lambda q: {"messages": json.dumps([{"role": "user", "content": q}])},
        lambda q: {"messages": [{"role": "user", "content": q}, {"role": "model", "content": "never seen"}]},
        lambda q: {
            "conversations": [{"from": "user", "value": q}, {"from": "chatgpt", "value": "never seen"}]
        },
    ],
)
def test_a_record_of_any_shape_is_the_question_in_the_template(
    shape: Callable[[str], dict[str, Any]], prompts: Callable[..., Path]
) -> None:
    setup, _ = built(prompts([shape(question) for question in QUESTIONS]))
    assert texts(setup) == sorted(f"[user]{question}<eos>[assistant]" for question in QUESTIONS)


def test_data_beside_an_instruction_is_part_of_the_question(prompts: Callable[..., Path]) -> None:
    setup, _ = built(
        prompts([{"instruction": q, "input": f"data {n}", "output": "no"} for n, q in enumerate(QUESTIONS)])
    )
    asked = (f"[user]{question}\n\ndata {n}<eos>[assistant]" for n, question in enumerate(QUESTIONS))
    assert texts(setup) == sorted(asked)


def test_the_turns_before_and_the_system_are_there(prompts: Callable[..., Path]) -> None:
    def turns(question: str) -> list[dict[str, str]]:
        spoken = (("user", "hi"), ("assistant", "yes"), ("user", question), ("assistant", "no"))
        return [{"role": role, "content": content} for role, content in spoken]

    setup, _ = built(prompts([{"messages": turns(q), "system": "be kind"} for q in QUESTIONS]))
    head = "[system]be kind<eos>[user]hi<eos>[assistant]yes<eos>"
    assert texts(setup) == sorted(f"{head}[user]{question}<eos>[assistant]" for question in QUESTIONS)


def test_without_a_template_a_prompt_is_its_text(prompts: Callable[..., Path]) -> None:
    records = [{"q": question} for question in QUESTIONS]
    setup, _ = built(prompts(records, template=None, corpus=", field: q"))
    assert texts(setup) == sorted(QUESTIONS)
    setup, _ = built(prompts(records, corpus=", field: q, chat: false"))
    assert texts(setup) == sorted(QUESTIONS)


def test_the_teacher_reads_its_own_template_and_the_same_completion(
    prompts: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it read the student's, a public reproduction was 0.29 nats a token off."""
    setup, data = built(prompts([{"prompt": q} for q in QUESTIONS], template=OTHER, of_student=PLAIN))
    read: list[Any] = []
    targets = TorchTeacher.targets
    monkeypatch.setattr(
        TorchTeacher, "targets", lambda self, batch: read.append(batch) or targets(self, batch)
    )
    (batch,) = data.step(0)
    from potstill.types import answer

    assert len(answer(setup.teacher, batch)) == len(batch.positions_N)
    (given,) = read
    assert torch.equal(given.labels_N, batch.labels_N)
    for own, other in zip(batch.split(), given.split(), strict=True):
        (asked, written), (asked_too, written_too) = (
            (ids[: int(row.positions_N[0]) + 1], ids[int(row.positions_N[0]) + 1 : int(row.lengths_B[0])])
            for row, ids in ((each, each.input_ids_BT[0].tolist()) for each in (own, other))
        )
        assert written == written_too == own.labels_N.tolist()
        assert text_of(asked).replace("[user]", "#user:").replace("[assistant]", "#assistant:") == text_of(
            asked_too
        )
    # What it is measured on is read the same way.
    held = setup.corpus.heldout.batch(range(3))
    assert held.for_teacher is not None and torch.equal(held.for_teacher.labels_N, held.labels_N)
    assert not torch.equal(held.for_teacher.input_ids_BT[0, :6], held.input_ids_BT[0, :6])


def test_a_context_is_the_teacher_s_alone(prompts: Callable[..., Path]) -> None:
    records: list[dict[str, Any]] = [{"prompt": q, "hint": f"say {n}"} for n, q in enumerate(QUESTIONS)]
    del records[0]["hint"]
    setup, data = built(prompts(records, corpus=", context: hint"))
    assert setup.rollouts is not None
    assert not any("say" in text for text in texts(setup))
    asked = [setup.rollouts.prompts[n] for n in range(len(setup.rollouts.prompts))] + setup.rollouts.heldout
    for prompt in asked:
        question = text_of(prompt.ids)[len("[user]") : -len("<eos>[assistant]")]
        number = QUESTIONS.index(question)
        if number == 0:
            assert prompt.for_teacher is None
        else:
            assert prompt.for_teacher is not None
            assert text_of(prompt.for_teacher) == f"[user]say {number}\n\n{question}<eos>[assistant]"
    assert any(batch.for_teacher is not None for batch in data.step(0))


def test_held_out_prompts_are_answered_by_the_teacher_once(
    prompts: Callable[..., Path], tmp_path: Path
) -> None:
    """The same rows for every seed, disjoint from those to train on."""
    recipe = prompts([{"prompt": q} for q in QUESTIONS])
    (one, _), (two, _) = built(recipe), built(recipe, "train.seed=1")
    for setup in (one, two):
        assert len(setup.corpus.heldout) == 3
    first, second = (setup.corpus.heldout.batch(range(3)) for setup in (one, two))
    assert torch.equal(first.input_ids_BT, second.input_ids_BT)
    assert one.rollouts is not None
    held = {tuple(prompt.ids) for prompt in one.rollouts.heldout}
    assert not held & {tuple(one.rollouts.prompts[n].ids) for n in range(len(one.rollouts.prompts))}
    run = distill(recipe, out=tmp_path / "run")
    assert [line["step"] for line in run.metrics() if "heldout/kl" in line] == [0, 2, 4]


def test_prompts_of_a_conversation_are_all_before_its_last_answer(
    tiny_recipe: Recipe, tmp_path: Path
) -> None:
    teacher = with_template(tmp_path / "teacher", PLAIN)
    turns = [("user", "hi"), ("assistant", "yes"), ("user", "and {}?"), ("assistant", "no")]
    path = lines(
        tmp_path / "chats.jsonl",
        [{"messages": [{"role": r, "content": c.format(n)} for r, c in turns]} for n in range(60)],
    )
    setup, data = built(
        tiny_recipe(
            corpus=f"{{name: chat, path: {path}, tokens_per_row: 80, heldout_rows: 3}}",
            teacher=f"{{name: torch, model: {teacher}}}",
            rollouts="{max_new_tokens: 6, fraction: 0.5}",
        )
    )
    assert all(
        text.startswith("[user]hi<eos>[assistant]yes<eos>[user]and ") and text.endswith("?<eos>[assistant]")
        for text in texts(setup)
    )
    given, own = data.step(0)
    assert not given.is_rollout and own.is_rollout


def test_prompts_of_a_text_are_its_first_tokens(tiny_recipe: Recipe) -> None:
    setup, _ = built(tiny_recipe(rollouts="{max_new_tokens: 6, prompt_tokens: 5}"))
    starts = {
        path.read_text()[:5] for path in Path(load_recipe(setup_path(tiny_recipe)).corpus.path).iterdir()
    }  # type: ignore[attr-defined]
    assert set(texts(setup)) <= starts


def setup_path(tiny_recipe: Recipe) -> Path:
    return tiny_recipe("again.yaml")


def test_prompts_that_do_not_fit_are_left_out_and_counted(prompts: Callable[..., Path]) -> None:
    records = [{"prompt": q} for q in QUESTIONS] + [{"prompt": "x" * 70}]
    setup, _ = built(prompts(records))
    assert setup.rollouts is not None
    held = Prompts(setup.corpus.train, "whole", 0, 74)
    assert held.too_long + len([t for t in texts(setup) if "xxx" in t]) <= 1
    assert not any("xxx" in text for text in texts(setup))
    if held.too_long:
        assert "1 of" in next(held.notes())


@pytest.mark.parametrize("teacher", ["table", "plugin"])
def test_a_teacher_of_any_kind_grades_and_answers(
    teacher: str, prompts: Callable[..., Path], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file({"logits": torch.randn(258, 258)}, tmp_path / "table.safetensors")
    sections = {"teacher": f"{{name: table, path: {tmp_path / 'table.safetensors'}}}"}
    if teacher == "plugin":
        (tmp_path / "own.py").write_text(PLUGIN)
        sections = {"teacher": "{name: uniform}", "plugins": f"[{tmp_path / 'own.py'}]"}
    folder = with_template(tmp_path / "other", PLAIN)
    run = distill(
        prompts(
            [{"prompt": q} for q in QUESTIONS],
            corpus=f", tokenizer: {folder}",
            student=f"{{name: checkpoint, model: {folder}}}",
            **sections,
        ),
        out=tmp_path / "run",
    )
    assert run.receipt()["steps"] == 4


PLUGIN = """
from dataclasses import dataclass
from typing import Literal

import torch

from potstill.losses.targets import HiddenTargets
from potstill.recipe.sections_models import TeacherConfig
from potstill.registry import register
from potstill.teachers.base import BaseTeacher
from potstill.types import Vocab


class Uniform(BaseTeacher):
    def __init__(self):
        self.vocab = Vocab(size=258)

    def targets(self, batch):
        return HiddenTargets(batch.input_ids_BT.flatten()[batch.positions_N], self._logits)

    def logits_per_position(self, input_ids_BT):
        return self._logits(input_ids_BT)

    def _logits(self, ids):
        return torch.nn.functional.one_hot((ids + 1) % 258, 258).float() * 3


@register("teacher")
@dataclass(frozen=True, kw_only=True)
class UniformConfig(TeacherConfig):
    name: Literal["uniform"] = "uniform"

    def load(self, device):
        return Uniform()
"""


# What is refused


@pytest.mark.parametrize(
    ("records", "corpus", "message"),
    [
        ([{"text": "x"}], "", r"prompts.jsonl:1.*no prompt; the record has text"),
        ([{"prompt": "x"}], ", field: ask", r"prompts.jsonl:1.*no 'ask'"),
        ([{"prompt": ""}], "", r"prompts.jsonl:1.*neither a text nor"),
        ([{"prompt": 5}], "", r"prompts.jsonl:1.*neither a text nor"),
        ([{"prompt": [{"role": "assistant", "content": "a"}]}], "", r"prompts.jsonl:1"),
        ([{"prompt": "x"}], ", context: hint", r"corpus.context: not one of 1 records"),
        ([{"prompt": "x", "hint": 3}], ", context: hint", r"prompts.jsonl:1.*'hint' is 3, not a text"),
        ([{"text": "x"}], ", skip_refused: true", r"all of 1 prompts are refused"),
        ([{"prompt": [{"role": "user", "content": "q"}]}], ", chat: false", r"a list of messages"),
        ([{"prompt": "q"}], "", r"corpus: one document, of 19 tokens"),
        (
            [{"prompt": "x" * 75}] * 1 + [{"prompt": f"{n}" * 76} for n in range(9)],
            "",
            r"not one prompt.*longer than 74",
        ),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(
    records: list[dict[str, Any]], corpus: str, message: str, prompts: Callable[..., Path]
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        built(prompts(records, corpus=corpus))
    assert len(caught.value.mistakes) == 1 and "\n" not in str(caught.value)


def test_an_empty_file_is_refused(prompts: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"not one record with a prompt"):
        built(prompts([]))


def test_a_conversation_that_two_templates_write_is_refused(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """Prompts of a chat corpus are rendered once: the teacher would read the student's template."""
    teacher, student = (
        with_template(tmp_path / "teacher", OTHER),
        with_template(tmp_path / "student", PLAIN, seed=5),
    )
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    others = ([{"role": "user", "content": f"say {n}"}, *said[1:]] for n in range(60))
    path = lines(tmp_path / "chats.jsonl", [{"messages": [*said, *each]} for each in others])
    recipe = tiny_recipe(
        corpus=f"{{name: chat, path: {path}, tokens_per_row: 80, heldout_rows: 3, tokenizer: {student}}}",
        teacher=f"{{name: torch, model: {teacher}}}",
        student=f"{{name: checkpoint, model: {student}}}",
        rollouts="{max_new_tokens: 6}",
    )
    with pytest.raises(UserError, match=r"rollouts: the teacher has another chat template"):
        built(recipe)


def test_the_teacher_s_tokenizer_is_read_for_prompts_alone(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """Whoever names `corpus.tokenizer` may do so since the teacher's cannot be read."""
    own = with_template(tmp_path / "own", PLAIN)
    recipe = load_recipe(tiny_recipe(), [f"corpus.tokenizer={own}"])
    assert open_source(resolve(recipe)).teacher_tokenizer is None


def test_an_end_that_the_teacher_does_not_know_is_none(prompts: Callable[..., Path], tmp_path: Path) -> None:
    student = make_model(tmp_path / "own", seed=5, eos_token_id=[0, 70])
    setup, _ = built(
        prompts([{"prompt": q} for q in QUESTIONS], student=f"{{name: checkpoint, model: {student}}}")
    )
    assert setup.rollouts is not None and setup.rollouts.ends == {0}


def test_held_out_answers_are_kept_with_the_run(prompts: Callable[..., Path], tmp_path: Path) -> None:
    recipe = prompts([{"prompt": q} for q in QUESTIONS])
    run = distill(recipe, out=tmp_path / "run")
    assert run.heldout_answers is not None
    resolved = resolve(load_recipe(recipe))
    setup = set_up(resolved, lambda text: None, answers=run.heldout_answers)
    fresh = set_up(resolved, lambda text: None)
    kept, made = (each.corpus.heldout.batch(range(3)).input_ids_BT for each in (setup, fresh))
    assert torch.equal(kept, made)
    run.heldout_answers.write_bytes(run.heldout_answers.read_bytes()[:-2] + b"xx")
    with pytest.raises(UserError, match=r"heldout.safetensors: missing, damaged"):
        set_up(resolved, lambda text: None, answers=run.heldout_answers)


def test_models_that_end_an_answer_otherwise_are_refused(prompts: Callable[..., Path]) -> None:
    other = OTHER.replace("<eos>", "<pad>")
    with pytest.raises(UserError, match=r"answers of the student end with '<eos>'.*teacher's with '<pad>'"):
        built(prompts([{"prompt": q} for q in QUESTIONS], template=other, of_student=PLAIN))


def test_prompts_without_rollouts_are_refused(prompts: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"rollouts: missing: prompts have no answers"):
        set_up(resolve(load_recipe(prompts([{"prompt": "q"}]), ["rollouts=null"])), lambda text: None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollouts.fraction=0.5"], r"rollouts.fraction.* 0.5 leaves rows to the corpus"),
        (["compare={}"], r"compare.* plain training needs answers"),
        (["corpus.shards=here"], r"corpus.shards"),
        (["corpus.whole_documents=true"], r"corpus.whole_documents"),
    ],
)
def test_prompts_have_no_other_use(overrides: list[str], message: str, prompts: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(prompts([{"prompt": q} for q in QUESTIONS]), overrides)
