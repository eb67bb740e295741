"""Tasks with a verifier: what is right is counted as right and nothing else is, and what cannot be trusted is refused."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import make_model, make_tokenizer
from scripted import TOKENIZER, scripted

from potstill.cli.main import main
from potstill.errors import UserError
from potstill.evals import runtimes, tasks
from potstill.evals.calibration import calibration
from potstill.evals.intervals import student_t, wilson
from potstill.evals.subject import Subject
from potstill.evals.task_matching import last_number, matches
from potstill.evals.task_sources import VerifierFailed, open_task, require_controls
from potstill.models import generate
from potstill.models.generate import Completion, InferenceFailed
from potstill.recipe.load import dump, load, parse_task
from potstill.recipe.load import parse as load_text
from potstill.recipe.sections_evaluation import TaskConfig, labelled

needs_gym = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None,
    reason="the extra tasks is not installed; not run",
)
SUMS = [(1, 2), (3, 4), (20, 22), (5, 0)]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Run = Callable[..., dict[str, Any]]


def write(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    return write(tmp_path / "sums.jsonl", [{"q": f"{a}+{b}?", "a": a + b} for a, b in SUMS])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tasks") / "plain", seed=4)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model(tmp_path_factory.mktemp("tasks") / "chat", seed=4, with_tokenizer=False)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return make_model(folder, seed=4, with_tokenizer=False, vocab_size=260)


@pytest.fixture
def run(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """`potstill eval MODEL --task … --json`: its result, with the lines of its answers."""

    def evaluate(
        fields: str, *flags: str, of: Path = model, code: int = 0, out: str = "out"
    ) -> dict[str, Any]:
        place = tmp_path / out
        arguments = [
            "eval",
            str(of),
            "--task",
            fields,
            "--out",
            str(place),
            "--device",
            "cpu",
            "--json",
            *flags,
        ]
        assert main(arguments) == code, capsys.readouterr().err
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        if code == 0:
            result["lines"] = [*map(json.loads, (place / tasks.ANSWERS).read_text().splitlines())]
        return result

    return evaluate


@pytest.fixture
def refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """The lines of an evaluation that is refused."""

    def lines(fields: str, *flags: str, of: Path = model) -> list[str]:
        out = tmp_path / "refused"
        assert main(["eval", str(of), "--task", fields, "--out", str(out), *flags]) == 2
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err and captured.out == "" and not out.exists()
        return [
            line.removeprefix("error: ") for line in captured.err.splitlines() if line.startswith("error: ")
        ]

    return lines


LOGP = math.log(0.5)
"""Of every answer that `writes` gives."""


def writes(monkeypatch: pytest.MonkeyPatch, answer: Callable[[int, int], str]) -> list[str]:
    """Replace generation by `answer(question, sample)`, cut where the request stops. Returns the prompts' texts."""
    prompts: list[str] = []

    def complete(model: Any, tokenizer: Any, settings: Any, requests: Any, *_: Any) -> list[Completion]:
        completions = []
        for request in requests:
            _, number, _, sample = request.name.split(" ")
            prompts.append(tokenizer.decode(request.prompt_ids))
            text = answer(int(number), int(sample))
            whole = next((n for n in range(len(text)) if request.should_stop(text[:n])), None)
            completions.append(
                Completion(text, len(text), "eos", LOGP)
                if whole is None
                else Completion(text[:whole], whole, "stop", LOGP)
            )
        return completions

    monkeypatch.setattr(generate, "complete", complete)
    return prompts


def fields_of(path: Path, **others: Any) -> str:
    return json.dumps({"source": "jsonl", "path": str(path), "question": "q", "answer": "a"} | others)


# ---- from questions to an accuracy ------------------------------------------------------------------------


def test_the_accuracy_of_a_model_that_knows_some_answers_is_counted_by_hand(
    sums: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the real loop: two right, one wrong, and one right one that the limit cuts."""
    said = {0: " 3", 1: " 7 apples", 2: " 41", 3: " " + "5" * 40}
    prompts = [f"Question: {a}+{b}?\nAnswer:" for a, b in SUMS]
    table = {prompt: said[number] for number, prompt in enumerate(prompts)}
    monkeypatch.setattr(runtimes, "load_tokenizer", lambda path: TOKENIZER)
    monkeypatch.setattr(runtimes, "load_causal_lm", lambda *_, **__: scripted(table))
    result = run(fields_of(sums, match="number", max_new_tokens=20))
    low, high = wilson(2, 4)
    assert result["accuracy"] == {"value": 0.5, "low": low, "high": high, "interval": "Wilson, 95 %"}
    assert result["correct_by_question"] == [1, 1, 0, 0] and result["questions"] == 4
    assert result["finishes"] == {"eos": 3, "length": 1}
    assert result["verdicts"] == {"correct": 2, "incorrect": 2}
    assert result["controls"] == {"empty": "0/4", "expected": "4/4"}
    settings = result["settings"]
    assert (settings["do_sample"], settings["temperature"], settings["max_new_tokens"]) == (False, 0.0, 20)
    first = result["lines"][1]
    assert {
        name: first[name] for name in ("question", "expected", "text", "judged", "verdict", "finish")
    } == {
        "question": "3+4?",
        "expected": "7",
        "text": " 7 apples",
        "judged": "7 apples",
        "verdict": "correct",
        "finish": "eos",
    }


def test_an_answer_s_probability_is_that_of_its_tokens_in_one_forward_pass(
    sums: Path, run: Run, model: Path
) -> None:
    result = run(fields_of(sums, max_new_tokens=2, temperature=0.7, samples=12))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    reference = transformers.AutoModelForCausalLM.from_pretrained(model)
    compared = 0
    for line in result["lines"]:
        prompt = tokenizer(f"Question: {line['question']}\nAnswer:")["input_ids"]
        answer = tokenizer(line["text"])["input_ids"]
        if line["finish"] != "length" or len(answer) != line["tokens"]:
            continue  # its text is not all of its tokens
        compared += 1
        logits_TV = reference(torch.tensor([[*prompt, *answer]])).logits[0].detach().log_softmax(-1)
        nats = sum(float(logits_TV[len(prompt) - 1 + n, token]) for n, token in enumerate(answer))
        assert line["probability"] == pytest.approx(math.exp(nats), rel=1e-3)
    assert compared


def test_calibration_is_that_of_its_definitions() -> None:
    found = calibration([0.9, 0.8, 0.85, 1.0, 0.0], [True, False, True, True, False])
    # Bins: 0.8 and 0.85, half of them right; 0.9 and 1.0, all right; 0.0, none right.
    assert found["probability"] == pytest.approx(0.71)
    assert found["brier"] == pytest.approx((0.01 + 0.64 + 0.0225) / 5)
    assert found["ece"] == pytest.approx((2 * abs(0.825 - 0.5) + 2 * abs(0.95 - 1)) / 5)


def test_greedy_runs_are_equal_and_sampled_ones_repeat_with_their_seed(sums: Path, run: Run) -> None:
    def texts(out: str, *flags: str, **fields: Any) -> list[str]:
        result = run(fields_of(sums, max_new_tokens=8, stop=[], **fields), *flags, out=out)
        return [line["text"] for line in result["lines"]]

    assert texts("1") == texts("2")
    sampled = {"temperature": 1.0, "samples": 3}
    assert texts("3", **sampled) == texts("4", **sampled) and len(set(texts("3", **sampled))) > 4
    assert texts("3", **sampled) != texts("5", seed=1, **sampled)
    assert texts("5", seed=1, **sampled) == texts("6", "--seed", "1", **sampled)
    assert texts("7", top_p=0.01, **sampled)[::3] == texts("1")  # the likeliest token alone is greedy


def test_a_finished_result_is_read_and_one_of_other_settings_is_made_again(
    sums: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes(monkeypatch, lambda number, _: str(sum(SUMS[number])))
    assert run(fields_of(sums))["accuracy"]["value"] == 1.0
    prompts = writes(monkeypatch, lambda *_: "no")
    assert run(fields_of(sums))["accuracy"]["value"] == 1.0 and prompts == []
    assert run(fields_of(sums, max_new_tokens=7))["accuracy"]["value"] == 0.0 and len(prompts) == 4
    write(sums, [{"q": "1+1?", "a": 2}])
    assert run(fields_of(sums))["questions"] == 1


def test_an_interval_over_several_samples_is_over_the_questions(
    sums: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes(monkeypatch, lambda number, sample: str(sum(SUMS[number])) if sample < number else "no")
    result = run(fields_of(sums, samples=4, temperature=0.5))
    assert result["correct_by_question"] == [0, 1, 2, 3] and result["answers"] == 16
    assert result["accuracy"]["value"] == 6 / 16
    assert result["accuracy"]["interval"] == "bootstrap over problems, 95 %"


def test_the_interval_of_questions_that_resemble_each_other_is_over_what_they_share(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty questions about four passages, of which one's are all answered."""
    about = [n % 4 for n in range(20)]
    path = write(tmp_path / "q.jsonl", [{"q": f"{n}?", "a": n, "of": ["p", about[n]]} for n in range(20)])
    writes(monkeypatch, lambda number, _: str(number) if number % 4 == 0 else "no")
    apart, found = run(fields_of(path)), run(fields_of(path, cluster="of"))
    assert found["cluster_by_question"] == about and "cluster_by_question" not in apart
    assert found["settings"]["cluster"] == "of" and "cluster" not in apart["settings"]
    accuracy = found["accuracy"]
    assert accuracy["value"] == 0.25 and accuracy["interval"] == "Wilson over 4 clusters, 95 %"
    assert (accuracy["low"], accuracy["high"]) == pytest.approx(wilson(3 / 4, 3, student_t(3)))


# ---- every field changes what happens ----------------------------------------------------------------------


def test_what_is_expected_cannot_reach_the_prompt(
    sums: Path, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = write(tmp_path / "other.jsonl", [{"q": f"{a}+{b}?", "a": f"{a * b + 777}"} for a, b in SUMS])
    prompts = writes(monkeypatch, lambda *_: "no")
    run(fields_of(sums), out="1")
    first = [*prompts]
    run(fields_of(other), out="2")
    assert prompts == first * 2 and not any("777" in prompt for prompt in prompts)
    assert sorted(first) == sorted(f"Question: {a}+{b}?\nAnswer:" for a, b in SUMS)


def test_a_chat_model_is_asked_by_its_template(
    sums: Path, run: Run, chat_model: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = writes(monkeypatch, lambda *_: "3\nno\n")
    result = run(fields_of(sums, size=1), of=chat_model)
    user = "<|im_start|>user\n1+2?<|im_end|>\n<|im_start|>assistant\n"
    assert prompts == [user] and result["settings"]["apply_chat_template"] is True
    assert result["lines"][0]["judged"] == "3\nno"  # a line break ends nothing in a chat
    run(fields_of(sums, size=1, system="Be terse.", prompt="Add: {question} {a}"), of=chat_model, out="2")
    system = "<|im_start|>system\nBe terse.<|im_end|>\n"
    assert prompts[1:] == [system + user.replace("1+2?", "Add: 1+2? {a}")]
    plain = run(fields_of(sums, size=1, apply_chat_template=False), of=chat_model, out="3")
    assert prompts[2:] == ["Question: 1+2?\nAnswer:"] and plain["lines"][0]["judged"] == "3"


@pytest.mark.parametrize(
    ("fields", "text", "judged"),
    [
        ({}, "\n 3\nBecause", "3"),
        ({"stop": [";", "."]}, " 3\nor 4. No; yes", "3\nor 4"),
        ({"stop": []}, " 3\n4\n", "3\n4"),
        ({"extract": r"\d"}, "1 or 2 or three", "2"),
        ({"extract": r"<answer>(.*?)</answer>", "stop": []}, "<answer>1</answer> <answer>\n3 </answer>", "3"),
        ({"extract": "=(.*)"}, "no sign", ""),
        ({}, "<think>\n2?\nno</think>\n3\nand", "3"),
        ({}, "<think>2</think><think>9", None),
        ({}, "3<|im_end|>4", "3"),
    ],
)
def test_what_of_an_answer_is_judged(
    sums: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
    text: str,
    judged: str | None,
) -> None:
    writes(monkeypatch, lambda *_: text)
    result = run(fields_of(sums, size=1, **fields))
    (line,) = result["lines"]
    assert line["judged"] == judged and (line["verdict"] == "correct") == (judged == "3")
    if judged is None:
        assert line["verdict"] == "cut in thought" and result["cut_in_thought"] == 1
    if judged == "":
        assert line["verdict"] == "empty"


@pytest.mark.parametrize(
    ("match", "expected", "right", "wrong"),
    [
        ("exact", " Paris ", ["Paris", "Paris "], ["paris", "Paris.", "in Paris", "Pari"]),
        (
            "number",
            "#### 1,234.50",
            ["It is 1234.5.", "1,234.50", "2469/2"],
            ["1234", "-1234.5", "1234.5 or 2"],
        ),
        ("number", "-3", ["x = -3", "\u22123.0", "(-3)"], ["3", "5-3", "none"]),
        ("regex", "yes|yeah", ["yes", " yeah "], ["yes, I think", "no", "oh yes"]),
    ],
)
def test_what_matches(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    match: str,
    expected: str,
    right: list[str],
    wrong: list[str],
) -> None:
    answers = [*right, *wrong]
    file = write(tmp_path / "q.jsonl", [{"q": f"{n}?", "a": expected} for n in range(len(answers))])
    writes(monkeypatch, lambda number, _: answers[number])
    result = run(fields_of(file, match=match))
    assert result["correct_by_question"] == [1] * len(right) + [0] * len(wrong)
    assert ("expected" in result["controls"]) == (match != "regex")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42),
        ("5-3", 3),
        ("10 - 3", 3),
        ("x = +5", 5),
        ("1,2,3", 3),
        ("1,234,567.", 1234567),
        ("1\u202f234", 1234),
        ("-.5", Fraction(-1, 2)),
        ("3/4", Fraction(3, 4)),
        ("-1 1/2", Fraction(-3, 2)),
        (r"\boxed{2\frac{1}{2}}", Fraction(5, 2)),
        (r"-\frac{1}{2}", Fraction(-1, 2)),
        ("2.5e-2", Fraction(1, 40)),
        ("50%", 50),
        ("2024-05-06", 6),
        ("1/2/2024", 2024),
        ("1/0", 0),
        ("12km of H2O", 12),
        ("none", None),
        ("9" * 5000, None),
        ("1e999999999", None),
    ],
)
def test_the_last_number_of_a_text(text: str, value: Any) -> None:
    assert last_number(text) == value
    assert matches(f"so {text}", text, "number") == (value is not None)


@needs_gym
def test_fields_of_reasoning_gym_change_its_questions(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def questions(**fields: Any) -> list[str]:
        task = open_task(TaskConfig(source="reasoning_gym", **({"task": "chain_sum", "size": 3} | fields)))
        return [question.text for question in task.questions]

    assert questions() == questions() and len(questions(size=None)) == 100 and len(questions(size=5)) == 5
    assert questions(seed=1) != questions() != questions(task="lcm")
    assert questions(options={"max_digits": 1}) != questions()


# ---- what is refused ---------------------------------------------------------------------------------------


def test_all_mistakes_of_a_task_are_reported_at_once(refused: Callable[..., list[str]]) -> None:
    given = "{source: jsonl, task: x, options: {a: 1}, question: q, prompt: hi, extract: '(', samples: 2, top_p: 2.0, sizee: 3}"
    assert refused(given) == [
        "--task: task: it is of source reasoning_gym, not of jsonl. Leave it out.",
        "--task: options: it is of source reasoning_gym, not of jsonl. Leave it out.",
        "--task: path: missing. Source jsonl needs it.",
        "--task: answer: missing. Source jsonl needs it.",
        "--task: samples: 2: at temperature 0 all samples are the same. Set a temperature above 0.",
        "--task: top_p: 2.0: at temperature 0 it has no effect. Set a temperature above 0.",
        "--task: prompt: 'hi' has no {question}, so that no question would be asked. Write it in.",
        "--task: extract: '(' is not a regular expression: missing ), unterminated subpattern at position 0. Correct it.",
        "--task: top_p: 2.0 must be 1 or less.",
        "--task: sizee: unknown key for task. Did you mean size?",
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{source: gym}", "--task: source: 'gym' is not one of reasoning_gym, jsonl."),
        ("{task: chain_sum}", "--task: source: missing. evaluation task needs it."),
        ("[1]", "--task: a list is no task. Give {source: …, …}, or a reasoning-gym task's name."),
        ("{source: reasoning_gym}", "--task: task: missing. Source reasoning_gym needs it."),
        (
            "{source: reasoning_gym, task: x, match: exact}",
            "--task: match: it is of source jsonl, not of reasoning_gym.",
        ),
        ("{source: jsonl, path: no.jsonl, question: q, answer: a}", "--task: path: no file or folder"),
        ("{source: jsonl, path: ., question: q, answer: q}", "--task: answer: question names the same field"),
        (
            "{source: jsonl, path: ., question: q, answer: a, cluster: q}",
            "--task: cluster: it is the question or",
        ),
        ("{source: reasoning_gym, task: x, size: 0}", "--task: size: 0 must be 1 or more."),
        (
            "{source: reasoning_gym, task: x, system: s, apply_chat_template: false}",
            "--task: system: it needs a chat",
        ),
    ],
)
def test_a_task_that_cannot_be(refused: Callable[..., list[str]], given: str, message: str) -> None:
    (line,) = refused(given)
    assert line.startswith(message)


def test_flags_of_other_evaluations_are_refused(sums: Path, refused: Callable[..., list[str]]) -> None:
    (line,) = refused(fields_of(sums), "--limit", "3")
    assert line == "--limit: has no effect with --task. Leave it out."
    (line,) = refused(fields_of(sums), "--batch-rows", "0")
    assert line == "--batch-rows 0: must be at least 1."


@pytest.mark.parametrize(
    ("record", "fields", "message"),
    [
        ({"q": "1?", "b": 1}, {}, ":2: no field 'a', but q, b. Name it in answer."),
        ({"q": "1?", "b": 1}, {"question": "x"}, ":1: no field 'x', but q, a. Name it in question."),
        ({"q": "1?", "a": None}, {}, ":2: a is None, not a text. Correct it, or leave the line out."),
        ({"q": " ", "a": 1}, {}, ":2: q is ' ', not a text. Correct it, or leave the line out."),
        (
            {"q": "1?", "a": 1},
            {"cluster": "c"},
            ":1: no field 'c', but q, a. Name it in cluster.",
        ),
        ({"q": "1?", "a": 1, "c": None}, {"cluster": "c"}, ":2: c is None, and no cluster. Correct it"),
        ({"q": "1?", "a": 1, "c": " "}, {"cluster": "c"}, ":2: c is ' ', and no cluster. Correct it"),
        (
            {"q": "1?", "a": 1, "c": 1},
            {"cluster": "c", "size": 1},
            ": cluster: the first 1 questions have one and the same 'c': nothing is known of others",
        ),
        (
            {"q": "1?", "a": 1},
            {"match": "regex"},
            ":2: a is 1, not a text. Correct it, or leave the line out.",
        ),
        (
            {"q": "1?", "a": "none"},
            {"match": "number"},
            ":2: a is 'none', without a number. Set match: exact.",
        ),
        (
            {"q": "1?", "a": "(1"},
            {"match": "regex"},
            ":2: a is '(1', not a regular expression: missing ), unterminated",
        ),
        (
            {"q": "1?", "a": "1?"},
            {"match": "regex"},
            ":2: control failed: an empty answer is accepted where '1?'",
        ),
        (
            {"q": "1?", "a": "1\n2"},
            {},
            r":2: control failed: the expected answer '1\n2' ends at '1', which is no right",
        ),
    ],
)
def test_a_file_that_cannot_be_asked(
    tmp_path: Path,
    refused: Callable[..., list[str]],
    record: dict[str, Any],
    fields: dict[str, Any],
    message: str,
) -> None:
    first = {"q": "0?", "a": "0"} | ({"c": 0} if "c" in record else {})
    file = write(tmp_path / "q.jsonl", [first, record])
    (line,) = refused(fields_of(file, **fields))
    assert line.startswith(f"{file}{message}")


def test_a_file_without_questions(tmp_path: Path, refused: Callable[..., list[str]]) -> None:
    file = write(tmp_path / "empty.jsonl", [])
    assert refused(fields_of(file)) == [f"{file}: no questions. Give JSON lines with the fields q and a."]


def test_a_stop_in_an_expected_answer_is_mended_by_another_stop(
    tmp_path: Path, run: Run, monkeypatch: Any
) -> None:
    file = write(tmp_path / "q.jsonl", [{"q": "1?", "a": "1\n2"}])
    writes(monkeypatch, lambda *_: " 1\n2\n\nmore")
    assert run(fields_of(file, stop=["\n\n"]))["accuracy"]["value"] == 1.0


def test_what_needs_a_chat_template_is_refused_without_one(
    sums: Path, refused: Callable[..., list[str]], model: Path
) -> None:
    for field, value in (("apply_chat_template", True), ("system", "s")):
        (line,) = refused(fields_of(sums, **{field: value}))
        assert line.startswith(f"task: {field}: the tokenizer of {model} has no chat template.")


@needs_gym
@pytest.mark.parametrize(
    ("given", "messages"),
    [
        ("chain_summ", ["task: reasoning-gym {version} has no task 'chain_summ'. Did you mean chain_sum?"]),
        (
            "{source: reasoning_gym, task: chain_sum, options: {max_digitz: 3, size: 2}}",
            [
                "task: options.max_digitz: chain_sum has no such option. Did you mean max_digits?",
                "task: options.size: it is a field of its own. Set size beside options.",
            ],
        ),
        (
            "{source: reasoning_gym, task: chain_sum, options: {max_digits: 0}}",
            [
                "task: options: chain_sum refuses {'max_digits': 0}: max_digits must be >= min_digits. Correct them."
            ],
        ),
        (
            "graph_color",
            [
                "task: graph_color: question 0: its expected answer is None, so that no control could show that the"
                " verifier accepts right ones. Choose another task."
            ],
        ),
    ],
)
def test_what_reasoning_gym_cannot_ask(
    refused: Callable[..., list[str]], given: str, messages: list[str]
) -> None:
    from importlib.metadata import version

    assert refused(given) == [message.replace("{version}", version("reasoning-gym")) for message in messages]


def test_a_missing_extra_is_one_line(
    refused: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("potstill.evals.task_sources.importlib.util.find_spec", lambda name: None)
    assert refused("chain_sum") == [
        "task: the package reasoning-gym is not installed. Run: pip install 'potstill[tasks]'"
    ]


# ---- reasoning-gym's own verifiers -------------------------------------------------------------------------


@needs_gym
@pytest.mark.parametrize("name", ["chain_sum", "spell_backward", "number_sorting", "list_functions"])
def test_a_task_of_reasoning_gym_is_judged_by_its_own_verifier(
    name: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import reasoning_gym

    config = TaskConfig(source="reasoning_gym", task=name, size=12, seed=3)
    task = open_task(config)
    expected = [question.expected for question in task.questions]
    half = [text if number % 2 else f"{text} or so" for number, text in enumerate(expected)]
    writes(monkeypatch, lambda number, _: half[number])
    given = {"source": "reasoning_gym", "task": name, "size": 12, "seed": 3, "stop": []}
    result = run(json.dumps(given))
    assert result["controls"] == {"empty": "0/12", "expected": "12/12"}
    library = reasoning_gym.create_dataset(name, size=12, seed=3)
    scores = [
        library.score_answer(answer, question.entry)
        for question, answer in zip(task.questions, half, strict=True)
    ]
    assert [line["score"] for line in result["lines"]] == [min(score, 1.0) for score in scores]
    assert result["correct_by_question"] == [int(score == 1) for score in scores]
    assert sum(scores[1::2]) == 6 and result["mean_score"] == pytest.approx(sum(scores) / 12)
    if name == "spell_backward":  # it adds up letters, and to more than 1 for a wrong answer
        assert max(scores) > 1 and result["correct"] == 6


@needs_gym
def test_a_verifier_that_runs_answers_is_refused_and_runs_none(
    refused: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Two kinds: `eval` of its own, and a parser of sympy that calls `exec`."""
    for name in ("n_queens", "countdown"):
        (line,) = refused(name)
        assert line.startswith(
            f"task: {name}: question 0: the verifier of {name} runs an answer as Python, by e"
        )
        task = open_task(TaskConfig(source="reasoning_gym", task=name, size=1))
        trace = tmp_path / name
        with pytest.raises(UserError, match="runs an answer as Python"):
            task.score(task.questions[0], f"open({str(trace)!r}, 'w')")
        assert not trace.exists()
    assert eval("1 + 1") == 2  # it is whole again


@needs_gym
def test_an_answer_at_which_a_verifier_fails_is_incorrect(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    writes(monkeypatch, lambda number, _: "a duck")
    result = run(
        "{source: reasoning_gym, task: prime_factorization, size: 2}"
    )  # it reads numbers without a check
    assert result["verdicts"] == {"incorrect": 2}
    assert result["lines"][0]["detail"].startswith("the verifier fails at it: ValueError: invalid literal")


@needs_gym
def test_what_a_verifier_prints_is_not_in_the_result(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    writes(monkeypatch, lambda *_: "Move disk 1 from Peg 1 to Peg 99")
    assert run("{source: reasoning_gym, task: tower_of_hanoi, size: 1, stop: []}")["correct"] == 0


class Wrong:
    """A task whose verifier has a fault."""

    expects_answers = True

    def __init__(self, task: Any, score: Callable[[str], float]) -> None:
        self.questions, self.of = task.questions, score

    def probe(self) -> None:
        pass

    def score(self, question: Any, answer: str) -> float:
        return self.of(answer)


def test_a_verifier_that_refuses_the_expected_or_accepts_the_empty_gives_no_accuracy(sums: Path) -> None:
    task = open_task(parse_task(fields_of(sums), where="x", folder=Path(), given={}))
    assert require_controls(task) == {"empty": "0/4", "expected": "4/4"}

    def fails(answer: str) -> float:
        raise VerifierFailed("no")

    with pytest.raises(
        UserError, match=r"sums.jsonl:2: control failed: the expected answer '7' gets a score of 0"
    ):
        require_controls(Wrong(task, lambda answer: float(answer != "7" and answer != "")))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"sums.jsonl:1: control failed: an empty answer is accepted"):
        require_controls(Wrong(task, lambda answer: 1.0))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="gets a score of 0, not 1"):
        require_controls(Wrong(task, fails))  # type: ignore[arg-type]


@needs_gym
def test_questions_that_are_others_each_time_are_refused(
    refused: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from reasoning_gym.arithmetic.chain_sum import ChainSumDataset

    made, clock = ChainSumDataset.__getitem__, iter(range(10**6))

    def unseeded(self: Any, number: int) -> Any:
        return made(self, number + next(clock))

    monkeypatch.setattr(ChainSumDataset, "__getitem__", unseeded)
    (line,) = refused("chain_sum")
    assert line.startswith("task: chain_sum: question 0: it is another one each time, whatever the seed")


@needs_gym
def test_making_questions_leaves_the_shared_generators_as_they_were() -> None:
    random.seed(987)
    np.random.seed(987)
    before = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    for name in ("list_functions", "pool_matrix"):
        open_task(TaskConfig(source="reasoning_gym", task=name, size=2))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # type: ignore[index, union-attr]


# ---- failed inference, receipts ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failure", "why"),
    [
        (InferenceFailed("NaN"), "NaN"),
        (ValueError("odd shape"), "question 0 sample 0 and its batch: ValueError: odd"),
    ],
)
def test_failed_inference_is_no_accuracy(
    sums: Path, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failure: Exception, why: str
) -> None:
    writes(monkeypatch, lambda *_: "3")
    run(fields_of(sums))

    def failing(*_: Any) -> Any:
        raise failure

    monkeypatch.setattr(generate, "complete", failing)
    result = run(fields_of(sums, max_new_tokens=3), code=2)
    assert (
        result["status"] == "inference_failed" and "accuracy" not in result and result["why"].startswith(why)
    )
    assert json.loads((tmp_path / "out" / tasks.RESULT).read_text())["status"] == "inference_failed"
    writes(monkeypatch, lambda *_: " ")
    assert run(fields_of(sums), code=2)["why"] == "every answer is empty"


def test_a_recipe_has_the_accuracy_in_its_receipt(
    tiny_recipe: Callable[..., Path], sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes(monkeypatch, lambda number, _: "3" if number == 0 else "no")
    task = fields_of(sums, name="task")
    recipe = tiny_recipe(evaluations=f"[{task}, {task}]")
    assert main(["distill", str(recipe), "--out", str(tmp_path / "run")]) == 0
    receipt = json.loads((tmp_path / "run" / "receipt.json").read_text())["evaluations"]
    result = json.loads((tmp_path / "run" / "evals" / "task-sums" / tasks.RESULT).read_text())
    low, high = wilson(1, 4)
    assert (
        receipt["task-sums"]
        == receipt["task-sums-1"]
        == {
            "accuracy/value": 0.25,
            "accuracy/low": low,
            "accuracy/high": high,
            "calibration/probability": pytest.approx(0.5),
            "calibration/brier": pytest.approx(0.25),
            "calibration/ece": pytest.approx(0.25),
            "finish/eos": 4,
            "questions": 4,
            "questions_sha256": result["settings"]["questions_sha256"],
        }
    )


@pytest.mark.parametrize("verb", ["distill", "check"])
def test_a_task_that_cannot_be_asked_is_refused_before_the_run(
    tiny_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    file = write(tmp_path / "q.jsonl", [{"q": "1?", "a": ".*"}])
    recipe = tiny_recipe(evaluations=f"[{fields_of(file, name='task', match='regex')}]")
    out = [] if verb == "check" else ["--out", str(tmp_path / "run")]
    assert main([verb, str(recipe), *out]) == 2
    assert "control failed: an empty answer is accepted" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    recipe = tiny_recipe(evaluations="[{name: task, source: jsonl, task: x}]", train="{steps: 1, zzz: 1}")
    assert main([verb, str(recipe), *out]) == 2
    lines = capsys.readouterr().err
    assert "evaluations.0.task: it is of source reasoning_gym" in lines and "train.zzz" in lines


def test_failed_inference_leaves_its_reason_in_the_receipt(
    sums: Path, model: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    writes(monkeypatch, lambda *_: "")
    config = parse_task(fields_of(sums), where="x", folder=Path(), given={})
    with pytest.raises(
        UserError, match=r"task-sums: inference failed, there is no accuracy: every answer is empty"
    ):
        config.run(Subject(model, tmp_path / "out", "cpu", None, lambda line: None))


def test_the_recipe_of_the_page_loads(tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "tasks.md"
    (block,) = re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)
    write(tmp_path / "questions.jsonl", [{"question": "1+1?", "answer": 2}])
    recipe = tiny_recipe()
    recipe.write_text(recipe.read_text() + block)
    gym, file = load(recipe).evaluations
    assert gym == TaskConfig(
        source="reasoning_gym", task="chain_sum", size=200, options={"max_digits": 2}, seed=7
    )
    assert isinstance(file, TaskConfig) and file.path == str(tmp_path / "questions.jsonl")
    assert load_text(dump(load(recipe)), where="dumped", folder=tmp_path).evaluations == [gym, file]


OWN = """
from dataclasses import dataclass
from typing import Literal
from potstill import EvaluationConfig, register

@register("evaluation")
@dataclass(frozen=True, kw_only=True)
class OwnConfig(EvaluationConfig):
    name: Literal["own"] = "own"
    low: int = 0
    high: int = 1

    @classmethod
    def mistakes(cls, given):
        if given.get("low", 0) > given.get("high", 1):
            yield "low", "it is above high. Lower it."

    @property
    def label(self):
        return f"own-{self.low}"

    def run(self, subject):
        return {"low": self.low, "place": subject.out.name}
"""


def test_a_plug_in_names_its_results_and_says_which_fields_do_not_go_together(
    tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(OWN)
    recipe = tiny_recipe(
        plugins="[own.py]", evaluations="[{name: own, low: 2}, {name: own, low: 1, high: x}]"
    )
    with pytest.raises(UserError) as refused:
        load(recipe)
    assert [mistake.removeprefix(f"{recipe}: ") for mistake in refused.value.mistakes] == [
        "evaluations.0.low: it is above high. Lower it.",
        "evaluations.1.high: 'x' is not a whole number.",
    ]
    recipe = tiny_recipe(plugins="[own.py]", evaluations="[own, {name: own, low: 1}]")
    assert main(["distill", str(recipe), "--out", str(tmp_path / "run")]) == 0
    receipt = json.loads((tmp_path / "run" / "receipt.json").read_text())["evaluations"]
    assert receipt == {
        "own-0": {"low": 0, "place": "own-0"},
        "own-1": {"low": 1, "place": "own-1"},
    }


def test_evaluations_have_names_of_their_own() -> None:
    one = TaskConfig(source="reasoning_gym", task="chain_sum")
    two = TaskConfig(source="jsonl", path="/data/my set.v2.jsonl.gz", question="q", answer="a")
    assert [*labelled([one, two, one])] == ["task-chain_sum", "task-my-set", "task-chain_sum-2"]
