"""lm-eval on a model of ours: a task's number is the one made by hand, and what cannot run is one line."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from scripted import ids_of

from potstill.cli.main import main
from potstill.evals.lm_eval import LmEvalSettings, evaluate, table_rows
from potstill.models.load import load_causal_lm
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
def tasks(tmp_path: Path) -> str:
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "cats.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    (folder / "cats.yaml").write_text(TASK.format(data=data))
    unsafe = TASK.format(data=data).replace("task: cats", "task: runs_code")
    (folder / "runs_code.yaml").write_text(unsafe + "unsafe_code: true\n")
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("lm_eval") / "tiny", seed=4)


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


def test_a_flag_of_lm_eval_is_refused_without_it(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(model), "--lm-eval-tasks", "folder"]) == 2
    assert "--lm-eval-tasks: has no effect without --lm-eval." in errors(capsys)


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
