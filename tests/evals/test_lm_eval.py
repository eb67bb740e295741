"""lm-eval on a model of ours: a task's number is the one made by hand, and what cannot run is one line."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
import types
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from scripted import ids_of
from tokenizers.processors import TemplateProcessing

from potstill.cli.main import main
from potstill.data.chats import templates
from potstill.data.tokenizers import load_tokenizer
from potstill.evals import lm_eval
from potstill.evals.lm_eval import LmEvalSettings, evaluate, table_rows
from potstill.evals.subject import Subject
from potstill.models.load import load_causal_lm
from potstill.recipe.sections_evaluation import LmEvalConfig
from potstill.runs.run_dir import RunDir

ABSENT = importlib.util.find_spec("lm_eval") is None
needs_lm_eval = pytest.mark.skipif(ABSENT, reason="lm-eval: the package is not installed; not run")
# Warnings of that library's own.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("alone")]
DOCUMENTS = [
    {"query": "The cat sat on the", "choices": [" mat", " moon"], "gold": 0},
    {"query": "Birds", "choices": [" sing", " bark"], "gold": 1},
    {"query": "1 2 3", "choices": [" 4", " 9"], "gold": 0},
    {"query": "Salt and", "choices": [" bread", " stone"], "gold": 1},
    {"query": "Rain", "choices": [" falls", " flies"], "gold": 0},
]
TASK = """
task: cats
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: query
doc_to_target: gold
doc_to_choice: choices
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 3.0}}
"""


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets are kept in a folder of the test's."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    if "datasets" in sys.modules:
        monkeypatch.setattr(sys.modules["datasets"].config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of tasks. Only they are known, as reading lm-eval's own thousands takes half a minute, and the machine
    is not described, which takes seconds.
    """
    if not ABSENT:
        import lm_eval.evaluator
        import lm_eval.tasks

        own = partial(lm_eval.tasks.TaskManager, include_defaults=False)
        monkeypatch.setattr(lm_eval.tasks, "TaskManager", own)
        monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda storage: None)
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "cats.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    (folder / "cats.yaml").write_text(TASK.format(data=data))
    (folder / "texts.yaml").write_text(ROLLING.format(data=data))
    certain = (
        TASK.format(data=data)
        .replace("task: cats", "task: certain")
        .replace("{metric: acc, ", "{metric: brier_score, ")
    )
    (folder / "certain.yaml").write_text(certain.replace(", aggregation: mean, higher_is_better: true", ""))
    unsafe = TASK.format(data=data).replace("task: cats", "task: runs_code")
    (folder / "runs_code.yaml").write_text(unsafe + "unsafe_code: true\n")
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("lm_eval") / "tiny", seed=4)


ROLLING = """
task: texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: query
metric_list: [{{metric: byte_perplexity}}]
metadata: {{version: 1.0}}
"""
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def errors(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in captured.err and captured.out == ""
    return line


def likelier(folder: Path, document: dict[str, Any], known: int) -> int:
    """The choice with the higher log-probability, by one plain forward of each."""
    model, scores = load_causal_lm(folder), []
    for choice in document["choices"]:
        before, ids = ids_of(document["query"]), ids_of(document["query"] + choice)
        with torch.no_grad():
            logp = model.hf(torch.tensor([ids])).logits[0, :, :known].double().log_softmax(-1)
        scores.append(sum(float(logp[at - 1, ids[at]]) for at in range(len(before), len(ids))))
    return int(scores[1] > scores[0])


@needs_lm_eval
def test_a_task_of_ones_own_gives_the_number_made_by_hand(
    model: Path, tasks: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    flags = [
        "--lm-eval",
        "cats",
        "--lm-eval-tasks",
        tasks,
        "--batch-rows",
        "3",
        "--seed",
        "5",
        "--out",
        str(out),
    ]
    assert main(["eval", str(model), *flags, "--json"]) == 0
    printed = capsys.readouterr().out
    right = [likelier(model, document, 258) == document["gold"] for document in DOCUMENTS]
    assert 0 < sum(right) < len(right)
    result = json.loads((out / "result.json").read_text())
    assert json.loads(printed[printed.index("{") :]) == result
    assert result["results"]["cats"]["acc,none"] == pytest.approx(sum(right) / len(right))
    assert result["versions"] == {"cats": 3.0}
    assert result["configs"]["cats"]["doc_to_text"] == "query"
    assert (result["whole"], result["n-samples"]["cats"]["effective"]) == (True, 5)
    assert (result["batch_rows"], result["config"]["random_seed"]) == (3, 5)
    assert len(result["weights_sha256"]) == 64 and result["lm_eval"]
    assert main(["eval", str(model), *flags]) == 0
    assert f"cats acc {sum(right) / 5:.4f} ±" in " ".join(capsys.readouterr().out.split())


@needs_lm_eval
def test_ids_that_mean_nothing_have_no_probability_there_either(tasks: str, tmp_path: Path) -> None:
    """A padded id with a large logit at some positions would change which choice is likelier."""
    folder = make_model(tmp_path / "padded", seed=4, vocab_size=300, tie_word_embeddings=False)
    loaded = load_causal_lm(folder)
    with torch.no_grad():
        loaded.hf.lm_head.weight[258:] *= 12
    loaded.hf.save_pretrained(folder)
    right = [likelier(folder, document, 258) == document["gold"] for document in DOCUMENTS]
    padded = [likelier(folder, document, 300) == document["gold"] for document in DOCUMENTS]
    assert right != padded
    result = evaluate(folder, LmEvalSettings(tasks=("cats",), lm_eval_tasks=Path(tasks)), tmp_path / "out")
    assert result["results"]["cats"]["acc,none"] == pytest.approx(sum(right) / 5)
    assert sum(right) != sum(padded)


@needs_lm_eval
def test_a_runs_result_is_in_the_run_and_a_subset_is_marked_as_one(
    model: Path, tasks: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    RunDir(run).replace_student(lambda place: make_model(place, seed=4))
    (run / "resolved.yaml").write_text("{}\n")
    assert main(["eval", str(run), "--lm-eval", "cats", "--lm-eval-tasks", tasks, "--limit", "2"]) == 0
    assert "only the first documents of each task" in capsys.readouterr().out
    result = json.loads((run / "evals" / "lm-eval" / "result.json").read_text())
    assert (result["whole"], result["n-samples"]["cats"]["effective"]) == (False, 2)


@needs_lm_eval
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lm-eval", "cat"], "has no task 'cat'"),
        (["--lm-eval", "cats,"], "has no task ''."),
        (
            ["--lm-eval", "runs_code"],
            "runs_code which is marked as unsafe",
        ),
        (["--lm-eval", "cats", "--lm-eval-tasks", "nowhere"], "--lm-eval-tasks nowhere: "),
        (["--lm-eval", "cats", "--limit", "0"], "--limit 0: "),
        (["--lm-eval", "cats", "--batch-rows", "0"], "--batch-rows 0: "),
        (["--lm-eval", "cats", "--samples", "3"], "--samples: has no effect with --lm-eval"),
        (["--lm-eval", "cats", "--recipe", "a.yaml"], "--lm-eval: "),
    ],
)
def test_what_cannot_run_is_one_line_and_leaves_nothing(
    flags: list[str],
    message: str,
    model: Path,
    tasks: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = [] if "--lm-eval-tasks" in flags else ["--lm-eval-tasks", tasks]
    assert main(["eval", str(model), *flags, *own, "--out", str(tmp_path / "out")]) == 2
    assert message in errors(capsys)
    assert not (tmp_path / "out").exists()


# ---- what prompts begin with, and the chat template ---------------------------------------------------------


def reader(
    folder: Path,
    around: str = "$A",
    template: str | None = None,
    turn_ends: bool = True,
    tags: tuple[str, ...] = (),
) -> Path:
    """A tiny model whose tokenizer puts `around` about a text, and that ends where a turn does, or a text."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", *tags], special_tokens=True)
    known = ("<eos>", "<s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=around, special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in known]
    )
    tokenizer.chat_template = template
    make_model(folder, seed=4, vocab_size=len(tokenizer), eos_token_id=260 if turn_ends else 0)
    tokenizer.save_pretrained(folder)
    return folder


BOS = 258


def by_hand(folder: Path, before: list[int], rolling: bool = False, chat: bool = False) -> float:
    """Brier score of the choices, or perplexity of a byte of the queries: one plain forward of each."""
    tokenizer, model = load_tokenizer(folder), load_causal_lm(folder)

    def logp(context: str, target: str) -> float:
        parts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (context, target)]
        ids = [*before, *parts[0], *parts[1]]
        with torch.no_grad():
            logp = model.hf(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return sum(float(logp[at - 1, ids[at]]) for at in range(len(ids) - len(parts[1]), len(ids)))

    if rolling:
        queries = [str(document["query"]) for document in DOCUMENTS]
        return math.exp(-sum(logp("", query) for query in queries) / sum(map(len, queries)))
    scores = []
    for document in DOCUMENTS:
        prompt = document["query"]
        if chat:
            turn = [{"role": "user", "content": prompt}]
            prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        p = torch.tensor([logp(prompt, choice) for choice in document["choices"]]).softmax(-1)
        scores.append(2 * float(1 - p[document["gold"]]) ** 2)
    return sum(scores) / len(scores)


def measured(folder: Path, tasks: str, task: str, out: Path, **settings: Any) -> dict[str, Any]:
    config = LmEvalSettings(tasks=(task,), lm_eval_tasks=Path(tasks), **settings)
    result = evaluate(folder, config, out)
    (value,) = [
        v for n, v in result["results"][task].items() if n in ("brier_score,none", "byte_perplexity,none")
    ]
    return result | {"value": value}


@needs_lm_eval
@pytest.mark.parametrize(
    ("around", "given", "before"),
    [
        ("$A", None, []),
        ("<s> $A", None, [BOS]),
        ("<s> $A <eos>", None, [BOS]),
        ("$A <eos>", None, []),
        ("<s> $A", False, []),
        ("$A", True, [BOS]),
        ("$A <eos>", True, [BOS]),
    ],
)
def test_bos_stands_where_the_tokenizer_or_the_config_puts_it(
    around: str, given: bool | None, before: list[int], tasks: str, tmp_path: Path
) -> None:
    """And nothing stands behind a prompt."""
    folder = reader(tmp_path / "model", around)
    result = measured(folder, tasks, "certain", tmp_path / "out", add_bos_token=given)
    assert result["value"] == pytest.approx(by_hand(folder, before), rel=1e-4)
    assert by_hand(folder, []) != pytest.approx(by_hand(folder, [BOS]), rel=1e-2)
    assert (result["add_bos_token"], result["apply_chat_template"]) == (bool(before), False)
    added = "<s> added before it" if before else "nothing added before it"
    assert result["prompts"] == f"plain text, no chat template (the model has none), {added}"
    assert table_rows(result)[-1] == ["prompts", "", result["prompts"]]


@needs_lm_eval
@pytest.mark.parametrize("around", ["$A", "<s> $A"])
def test_a_whole_text_has_one_bos_that_is_not_scored(around: str, tasks: str, tmp_path: Path) -> None:
    folder = reader(tmp_path / "model", around)
    result = measured(folder, tasks, "texts", tmp_path / "out")
    assert result["prefix_token_id"] == BOS
    assert result["value"] == pytest.approx(by_hand(folder, [BOS], rolling=True), rel=1e-4)


@needs_lm_eval
@pytest.mark.parametrize(
    ("template", "turn_ends", "given", "chat", "why"),
    [
        (TEMPLATE, True, None, True, "the model ends a turn with <|im_end|>"),
        (TEMPLATE, False, None, False, "a base model: it ends with <eos>, a turn with <|im_end|>"),
        (TEMPLATE, False, True, True, "as given"),
        (TEMPLATE, True, False, False, "as given"),
        (TEMPLATE.replace("<|im_end|>", ""), False, None, True, "the model has one"),
        (None, True, None, False, "the model has none"),
    ],
)
def test_a_chat_model_is_prompted_by_its_template_and_a_base_model_is_not(
    template: str | None,
    turn_ends: bool,
    given: bool | None,
    chat: bool,
    why: str,
    tasks: str,
    tmp_path: Path,
) -> None:
    """The template writes every special token: the tokenizer's BOS comes before plain texts alone."""
    folder = reader(tmp_path / "model", "<s> $A", template, turn_ends)
    result = measured(folder, tasks, "certain", tmp_path / "out", apply_chat_template=given)
    assert result["value"] == pytest.approx(by_hand(folder, [] if chat else [BOS], chat=chat), rel=1e-4)
    assert (result["apply_chat_template"], result["add_bos_token"]) == (chat, not chat)
    assert f"({why})" in result["prompts"]


@needs_lm_eval
@pytest.mark.parametrize("tags", [("</think>",), ()])
def test_of_a_model_that_thinks_lm_eval_scores_the_answer(
    tags: tuple[str, ...], tasks: str, tmp_path: Path
) -> None:
    template = TEMPLATE.replace("assistant\n", "assistant\n<think>\n</think>\n")
    folder = reader(tmp_path / "model", template=template, tags=tags)
    result = measured(folder, tasks, "certain", tmp_path / "out")
    assert result["think_end_token"] == (261 if tags else "</think>")
    plain = measured(folder, tasks, "certain", tmp_path / "plain", apply_chat_template=False)
    assert plain["think_end_token"] is None


@needs_lm_eval
def test_bos_and_template_are_flags_and_fields_and_in_the_receipts_figures(
    tasks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = reader(tmp_path / "model", "<s> $A", TEMPLATE)
    flags = ["--lm-eval", "certain", "--lm-eval-tasks", tasks, "--out", str(tmp_path / "out")]
    shown = {}
    for given in ([], ["--no-apply-chat-template"], ["--no-apply-chat-template", "--no-add-bos-token"]):
        assert main(["eval", str(folder), *flags, *given]) == 0
        captured = capsys.readouterr()
        result = json.loads((tmp_path / "out" / "result.json").read_text())
        assert f"certain; {result['prompts']}" in captured.err
        assert f"prompts {result['prompts']}" in " ".join(captured.out.split())
        shown[len(given)] = (result["apply_chat_template"], result["add_bos_token"])
    assert shown == {0: (True, False), 1: (False, True), 2: (False, False)}

    own = lm_eval._settings_of
    monkeypatch.setattr(
        lm_eval, "_settings_of", lambda *a, **o: replace(own(*a, **o), lm_eval_tasks=Path(tasks))
    )
    subject = Subject(folder, tmp_path / "again", "cpu", None, lambda line: None)
    config = LmEvalConfig(tasks=["certain"], apply_chat_template=False, add_bos_token=False)
    figures = config.run(subject)
    assert (figures["apply_chat_template"], figures["add_bos_token"]) == (False, False)
    assert figures["certain/brier_score,none"] == pytest.approx(by_hand(folder, []), rel=1e-4)


@needs_lm_eval
@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--add-bos-token", "lm-eval: add_bos_token: the tokenizer of"),
        ("--apply-chat-template", "lm-eval: apply_chat_template: the tokenizer of"),
    ],
)
def test_bos_or_a_template_that_the_model_does_not_have_is_one_line(
    flag: str, message: str, model: Path, tasks: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--lm-eval", "cats", "--lm-eval-tasks", tasks, "--out", str(tmp_path / "out")]
    assert main(["eval", str(model), *flags, flag]) == 2
    assert message in errors(capsys)
    assert not (tmp_path / "out").exists()


@needs_lm_eval
def test_a_chat_template_that_fails_is_one_line(
    tasks: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = reader(tmp_path / "model", template="{{ raise_exception('only tools') }}")
    flags = ["--lm-eval", "cats", "--lm-eval-tasks", tasks, "--out", str(tmp_path / "out")]
    assert main(["eval", str(folder), *flags]) == 2
    line = errors(capsys)
    assert "lm-eval: the model's chat template fails: " in line
    assert line.endswith("Use --no-apply-chat-template.")


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
FOR_A_LONG_PROMPT = f"{{% if messages[0]['content'] | length > 15 %}}{ENDLESS}{{% endif %}}"


@needs_lm_eval
def test_a_chat_template_that_takes_too_long_or_too_much_for_a_task_is_one_line(
    tasks: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain for the short conversation that is tried first."""
    monkeypatch.setattr(templates, "SECONDS", 2)
    folder = reader(tmp_path / "model", template=TEMPLATE + FOR_A_LONG_PROMPT)
    flags = ["--lm-eval", "certain", "--lm-eval-tasks", tasks, "--out", str(tmp_path / "out")]
    assert main(["eval", str(folder), *flags]) == 2
    assert re.search(
        "a task's prompt: the chat template of .* took more than .* Use --no-apply-chat", errors(capsys)
    )


@needs_lm_eval
def test_a_template_without_a_system_turn_gets_prompts_without_it(tmp_path: Path) -> None:
    refusing = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    )
    reading = lm_eval._Reading(
        load_tokenizer(reader(tmp_path / "model", template=refusing)), False, None, True, None, ""
    )
    system, asked, begun = (
        {"role": role, "content": role[0] * 3} for role in ("system", "user", "assistant")
    )
    lm = types.SimpleNamespace()
    with lm_eval._rendered_within_limits(lm, reading):
        assert lm.apply_chat_template([system, asked]) == lm.apply_chat_template([asked])
        assert lm.apply_chat_template([asked]).endswith("assistant\n")
        assert lm.apply_chat_template([system, asked, begun], add_generation_prompt=False).endswith("aaa")


@needs_lm_eval
def test_the_tokenizer_that_others_use_is_left_as_it_is(tasks: str, tmp_path: Path) -> None:
    """It is read once a process, and lm-eval gives it a pad token."""
    folder = reader(tmp_path / "model", "<s> $A <eos>")
    before = load_tokenizer(folder)("a")["input_ids"]
    measured(folder, tasks, "certain", tmp_path / "out")
    assert load_tokenizer(folder)("a")["input_ids"] == before == [BOS, *ids_of("a"), 0]


def test_without_the_package_the_error_names_the_command_that_installs_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else find(name, *a)
    )
    assert main(["eval", str(model), "--lm-eval", "hellaswag", "--out", str(tmp_path / "out")]) == 2
    assert errors(capsys).endswith("pip install 'potstill[lm-eval]'")
    assert not (tmp_path / "out").exists()


@pytest.mark.soak
@needs_lm_eval
def test_lm_evals_own_tasks_are_known() -> None:
    lm_eval.require(LmEvalConfig(tasks=["arc_easy"]))


def test_a_flag_of_lm_eval_is_refused_without_it(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(model), "--lm-eval-tasks", "folder"]) == 2
    assert "--lm-eval-tasks: has no effect without --lm-eval." in errors(capsys)
    assert main(["eval", str(model), "--no-add-bos-token"]) == 2
    assert "--add-bos-token: has no effect without --lm-eval." in errors(capsys)


def test_two_benchmarks_at_once_are_refused(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["eval", str(model), "--humaneval", "--lm-eval", "cats"])
    assert refused.value.code == 2
    assert "not allowed with argument" in capsys.readouterr().err


def test_a_table_has_each_metric_with_its_standard_error() -> None:
    result = {
        "results": {
            "cats": {
                "alias": "cats",
                "acc,none": 0.25,
                "acc_stderr,none": 0.125,
                "em,strict": 1.0,
                "em_stderr,strict": "N/A",
            }
        },
        "whole": True,
    }
    assert table_rows(result) == [["cats", "acc", "0.2500 ± 0.1250"], ["cats", "em (strict)", "1.0000"]]
