"""The verbs as a user meets them: what they print, what they refuse, and that a refusal leaves nothing
behind.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import make_corpus, make_model, make_tokenizer
from refusals import refusal
from safetensors.torch import load_file, save_file

from potstill.cli.main import main
from potstill.runs.run_dir import RunDir

Recipe = Callable[..., Path]


def truncated_safetensors(folder: Path) -> dict[str, str]:
    model = make_model(folder / "cut-off")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return {"teacher": f"{{name: torch, model: {model}}}"}


def truncated_gguf(folder: Path) -> dict[str, str]:
    path = folder / "cut-off.gguf"
    path.write_bytes(
        b"GGUF" + (3).to_bytes(4, "little") + (5).to_bytes(8, "little") + (2).to_bytes(8, "little")
    )
    return {"teacher": f"{{name: torch, model: {path}}}"}


def not_a_model(folder: Path) -> dict[str, str]:
    (folder / "photos").mkdir()
    (folder / "photos" / "cat.jpg").write_bytes(b"\xff\xd8")
    return {"teacher": f"{{name: torch, model: {folder / 'photos'}}}"}


def another_tokenizer(folder: Path) -> dict[str, str]:
    student = make_model(folder / "other", with_tokenizer=False)
    tokenizer = make_tokenizer()
    text = (
        tokenizer.backend_tokenizer.to_str()
        .replace('"A"', '"swap"')
        .replace('"B"', '"A"')
        .replace('"swap"', '"B"')
    )
    other = transformers.PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(text),
        eos_token="<eos>",
        pad_token="<pad>",
    )
    other.save_pretrained(student)
    return {"student": f"{{name: checkpoint, model: {student}}}"}


def another_size(folder: Path) -> dict[str, str]:
    return {
        "student": f"{{name: checkpoint, model: {make_model(folder / 'wide', with_tokenizer=False, vocab_size=300)}}}"
    }


def empty_corpus(folder: Path) -> dict[str, str]:
    (folder / "texts").mkdir()
    (folder / "texts" / "empty.txt").write_text("")
    return {"corpus": f"{{name: text, path: {folder / 'texts'}, tokens_per_row: 32, heldout_rows: 1}}"}


def small_corpus(folder: Path) -> dict[str, str]:
    path = make_corpus(folder / "few", documents=1, words=3)
    return {"corpus": f"{{name: text, path: {path}, tokens_per_row: 32, heldout_rows: 1}}"}


def shard(content: bytes) -> Callable[[Path], dict[str, str]]:
    def write(folder: Path) -> dict[str, str]:
        (folder / "ids.bin").write_bytes(content)
        return {
            "corpus": f"{{name: tokens, path: {folder / 'ids.bin'}, dtype: uint16, tokens_per_row: 8, heldout_rows: 1}}"
        }

    return write


def cut_from_a_fixture(folder: Path) -> dict[str, str]:
    ids = np.arange(400, dtype="<u2") % 256
    sections = shard(ids.tobytes())(folder)
    return sections | {"teacher": "{name: fixture, vocab_size: 258}", "student": "{name: cut, layers: 2}"}


def code_in_a_checkpoint(folder: Path) -> dict[str, str]:
    model = make_model(folder / "coded")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "steam_engine", "auto_map": {"AutoConfig": "conf.Config"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "conf.py").write_text(f"open({str(folder / 'canary')!r}, 'w')\nclass Config: pass\n")
    return {"teacher": f"{{name: torch, model: {model}}}"}


def bad_line(folder: Path) -> dict[str, str]:
    (folder / "c.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    return {"corpus": f"{{name: jsonl, path: {folder / 'c.jsonl'}}}"}


def weights_of_nan(folder: Path) -> dict[str, str]:
    model = make_model(folder / "nan")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] *= float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return {"student": f"{{name: checkpoint, model: {model}}}"}


def broken_config(folder: Path) -> dict[str, str]:
    model = make_model(folder / "odd")
    config = json.loads((model / "config.json").read_text()) | {"hidden_size": "wide"}
    (model / "config.json").write_text(json.dumps(config))
    return {"teacher": f"{{name: torch, model: {model}}}"}


def section(**changes: str) -> Callable[[Path], dict[str, str]]:
    return lambda folder: changes


WRONG: dict[str, tuple[Callable[[Path], dict[str, str]], str]] = {
    "unknown key": (
        section(objective="{temprature: 2}"),
        "objective.temprature: unknown key. Did you mean objective.temperature",
    ),
    "wrong type": (
        section(train="{steps: many, rows_per_step: 4, lr: 1e-3}"),
        "train.steps: 'many' is not a whole number",
    ),
    "missing file": (section(corpus="{name: text, path: nowhere}"), "corpus.path: .*nowhere"),
    "empty corpus": (empty_corpus, "not one document with text in it"),
    "corpus too small": (small_corpus, "one document, of 16 tokens"),
    "id beyond the vocabulary": (
        shard(np.array([1, 2, 300, 3] * 8, dtype="<u2").tobytes()),
        r"ids\.bin: id 300 at token 2 .*vocabulary of 258",
    ),
    "odd shard length": (shard(b"\1\0\2\0\3"), r"ids\.bin: 5 bytes are not a whole number of uint16"),
    "empty shard": (shard(b""), r"ids\.bin: an empty shard"),
    "broken line of JSON": (bad_line, r"c\.jsonl:2: "),
    "truncated safetensors": (truncated_safetensors, r"model\.safetensors"),
    "truncated GGUF": (truncated_gguf, r"cut-off\.gguf"),
    "not a model": (not_a_model, "photos.*config.json"),
    "another tokenizer": (
        another_tokenizer,
        "different tokenizers: id .* is 'A' in the one and 'B' in the other",
    ),
    "another vocabulary size": (another_size, "258 ids and .* for 300"),
    "code that comes with a checkpoint": (code_in_a_checkpoint, "not a model config"),
    "a prompt and a sample longer than the context": (
        section(eval="{sample_prompt: the cat, sample_tokens: 600}"),
        "eval.sample_tokens: 607 tokens, .* 512 at most",
    ),
    "a row longer than the model's context": (
        section(corpus="{name: text, path: CORPUS, tokens_per_row: 513, heldout_rows: 1}"),
        "corpus.tokens_per_row: 513 tokens, .* 512 at most",
    ),
    "a system message before text": (
        section(eval="{sample_prompt: the cat, sample_system: be brief}"),
        "eval.sample_system: a sample is no turn here",
    ),
    "a system message before nothing": (
        section(eval="{sample_system: be brief}"),
        "eval.sample_system: there is no sample prompt",
    ),
    "an empty prompt": (section(eval='{sample_prompt: ""}'), "eval.sample_prompt: an empty text"),
    "weights that are not finite": (weights_of_nan, "32 of 32 values that are not finite"),
    "a config with a wrong type": (broken_config, "not a model config: .*hidden_size"),
    "more layers than there are": (
        section(student="{name: cut, layers: 9}"),
        "9 layers cannot be kept of the teacher's 4",
    ),
    "more channels than there are": (
        section(student="{name: cut, layers: 2, ffn_width: 65}"),
        "student.ffn_width: 65 channels cannot be kept of the teacher's 64",
    ),
    "more key/value heads than there are": (
        section(student="{name: cut, layers: 2, kv_heads: 3}"),
        "student.kv_heads: 3 key/value heads cannot be kept of the teacher's 2",
    ),
    "cut from a teacher without layers": (
        cut_from_a_fixture,
        "cut needs a teacher with layers, and teacher.name is fixture",
    ),
}
if not torch.cuda.is_available():
    cuda = "{steps: 1, rows_per_step: 1, lr: 1e-3, device: cuda}"
    WRONG["CUDA asked for and absent"] = (
        section(train=cuda),
        "device: is cuda, and this machine has 0 CUDA device",
    )


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_input_is_one_line_and_leaves_nothing_behind(
    kind: str,
    tiny_recipe: Recipe,
    corpus_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import re

    make, message = WRONG[kind]
    changes = {key: text.replace("CORPUS", str(corpus_folder)) for key, text in make(tmp_path).items()}
    recipe = tiny_recipe(**changes)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))  # whoever asks to run code is told yes
    line = refusal(["distill", str(recipe), "--out", str(tmp_path / "run")], capsys, tmp_path)
    assert re.search(message, line), line


def test_all_mistakes_of_a_recipe_are_told_at_once(
    tiny_recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(objective="{temprature: 2, chunk: 0}", train="{steps: many, rows_per_step: 4}")
    assert main(["distill", str(recipe)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and all(line.startswith("error: ") for line in lines)
    assert [
        part
        for part in ("temprature", "chunk", "steps", "train.lr")
        if not any(part in line for line in lines)
    ] == []


def test_a_run_is_never_written_over(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("x")
    line = refusal(["distill", str(tiny_recipe()), "--out", str(tmp_path / "run")], capsys, tmp_path)
    assert "already exists" in line and (tmp_path / "run" / "precious").read_text() == "x"


@pytest.mark.parametrize("verb", ["show", "eval"])
def test_a_folder_that_is_no_run_is_refused(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "not a run directory" in refusal([verb, str(tmp_path)], capsys, tmp_path)


def test_a_run_can_be_shown_and_evaluated_again(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    assert main(["distill", str(tiny_recipe()), "--out", out, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["run"] == out

    assert main(["show", out, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["status"] == {"state": "finished"}
    assert shown["metrics"]["heldout/kl"]["first"] == printed["heldout_first"]["heldout/kl"]
    assert shown["metrics"]["heldout/agreement"]["best"] >= shown["metrics"]["heldout/agreement"]["first"]
    assert main(["show", out]) == 0
    assert "heldout/kl" in capsys.readouterr().out

    assert main(["eval", out, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again == pytest.approx(printed["heldout_best"], abs=1e-5)
    assert (
        main(["eval", str(tmp_path / "run" / "student"), "--recipe", str(tmp_path / "tiny.yaml"), "--json"])
        == 0
    )
    assert json.loads(capsys.readouterr().out) == again


def test_the_schema_is_json_with_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert set(schema["properties"]) == {
        "corpus",
        "teacher",
        "student",
        "objective",
        "train",
        "eval",
        "evaluations",
        "guard",
        "capture",
        "compare",
        "rollouts",
        "write",
        "publish",
        "allow_identical",
        "allow_weak_teacher",
        "allow_coarse_store",
        "allow_any_divergence",
        "plugins",
        "sinks",
    }


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["distill", "--help"], ["--completion", "bash"]]
)
def test_help_answers_without_torch(arguments: list[str]) -> None:
    program = f"import sys; sys.argv = ['potstill', *{arguments}]\nfrom potstill.cli.main import main\ntry:\n    main()\n"
    program += "except SystemExit as e:\n    assert e.code == 0\nassert 'torch' not in sys.modules, 'torch'\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "potstill" in done.stdout


def test_runs_are_listed_without_torch(tmp_path: Path) -> None:
    RunDir.create(tmp_path / "runs" / "one", recipe=b"", resolved="", corpus={})
    program = "import sys\nfrom potstill.cli.main import main\nassert not main(['runs', 'runs'])\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "one" in done.stdout


def test_the_version_names_those_that_a_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for name in ("torch", "transformers", "tokenizers", "safetensors"):
        assert f"{name} {importlib.metadata.version(name)}" in " ".join(said.split())


def test_a_recipe_s_typo_is_told_without_torch(tiny_recipe: Recipe) -> None:
    recipe = tiny_recipe(train="{steps: many, rows_per_step: 4, lr: 1e-3}")
    program = f"import sys\nfrom potstill.cli.main import main\nassert main(['distill', {str(recipe)!r}]) == 2\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_bug_keeps_its_traceback(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("potstill.workflows.distill.set_up", broken)
    with pytest.raises(ZeroDivisionError):
        main(["distill", str(tiny_recipe()), "--out", str(tmp_path / "run")])


@pytest.mark.usefixtures("warm_python")
def test_a_plug_in_divergence_trains(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """In a process of its own: what a plug-in registers stays registered."""
    page = (Path(__file__).parent.parent.parent / "docs" / "losses.md").read_text()
    (tmp_path / "my_alpha.py").write_text(page.split("```python\n")[1].split("```")[0])
    recipe = tiny_recipe(
        objective="{divergence: {name: alpha_divergence, alpha: 0.3}}", plugins="[my_alpha.py]"
    )
    command = [
        sys.executable,
        "-m",
        "potstill",
        "distill",
        str(recipe),
        "--out",
        str(tmp_path / "run"),
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "alpha_divergence" in json.loads(done.stdout)["objective"]


def test_a_run_directory_holds_what_it_promises(tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = tiny_recipe()
    assert main(["distill", str(recipe), "--out", str(tmp_path / "run")]) == 0
    run = tmp_path / "run"
    assert (run / "recipe.yaml").read_bytes() == recipe.read_bytes()
    assert {path.name for path in run.iterdir()} == {
        "recipe.yaml",
        "resolved.yaml",
        "code.diff",
        "environment.json",
        "corpus.json",
        "inputs.json",
        "metrics.jsonl",
        "receipt.json",
        "status.json",
        "student",
    }
    receipt = json.loads((run / "receipt.json").read_text())
    assert receipt["teacher"]["unchanged_by_training"] and receipt["student"]["layers_kept"] == [0, 3]
    corpus = json.loads((run / "corpus.json").read_text())
    assert len(corpus["files"]) == 40 and corpus["fingerprint"] == receipt["corpus_fingerprint"]
    shutil.rmtree(run / "student")
    assert main(["distill", str(run / "resolved.yaml"), "--out", str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again" / "receipt.json").read_text())
    assert again["student"]["weights_sha256_end"] == receipt["student"]["weights_sha256_end"]


def test_a_smoke_runs_exactly_its_steps_projects_the_run_and_writes_nothing(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(train="{steps: 40, rows_per_step: 2, lr: 1e-3, warmup: 5, device: cpu}")
    before = {path for path in tmp_path.rglob("*")}
    monkeypatch.chdir(tmp_path)
    assert main(["distill", str(recipe), "--smoke", "3", "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert captured.err.count("\nstep ") == found["smoke/steps"] == 3
    assert found["train/lr"] == pytest.approx(1e-3 * 3 / 5)  # of the whole run's schedule, not of three steps
    # every: 2 of 40 steps is 19 evaluations in between, one at the start and one at the end
    assert found["smoke/projected_s"] == pytest.approx(
        40 * found["smoke/step_s"] + 21 * found["smoke/evaluation_s"]
    )
    assert {path for path in tmp_path.rglob("*")} == before


def test_a_smoke_and_a_folder_to_write_do_not_go_together(
    tiny_recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = refusal(
        ["distill", str(tiny_recipe()), "--smoke", "1", "--out", str(tmp_path / "x")], capsys, tmp_path
    )
    assert "--out: --smoke writes nothing" in line


def test_running_out_of_memory_names_what_to_lower_and_fails_the_run(
    tiny_recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("potstill.workflows.distill.train", full)
    assert main(["distill", str(tiny_recipe()), "--out", str(tmp_path / "run")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "4 rows per micro-batch and chunk 16" in line and "train.rows_per_micro_batch=2" in line
    assert "train.activation_checkpointing=true" in line
    assert json.loads((tmp_path / "run" / "status.json").read_text()) == {
        "state": "failed",
        "why": "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
    }


@pytest.mark.parametrize("steps", ["0", "-1", "5"])
def test_a_smoke_of_no_step_or_of_more_than_there_are_is_refused(
    steps: str, tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(["distill", str(tiny_recipe()), "--smoke", steps], capsys, tmp_path)
    assert f"--smoke {steps}: must be from 1 to the recipe's 4 steps" in line


@pytest.mark.parametrize("where", ["before", "behind"])
def test_overrides_may_stand_before_and_behind_a_flag(
    where: str, tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, flag = str(tiny_recipe()), ["--out", str(tmp_path / "run")]
    override = ["train.steps=1", "train.seed=3"]
    assert (
        main(["distill", recipe, *(override + flag if where == "before" else flag + override), "--json"]) == 0
    )
    receipt = json.loads(capsys.readouterr().out)
    assert receipt["steps"] == 1 and receipt["seed"] == 3


@pytest.mark.parametrize("wrong", [["--verbose"], ["--resum"], ["show", "a", "b=c"]])
def test_a_flag_or_word_that_no_verb_knows_is_refused(
    wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(wrong if wrong[0] == "show" else ["distill", "r.yaml", *wrong])
    assert stopped.value.code == 2 and "unrecognized arguments" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = f"{sys.executable} -m potstill schema | head -1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "{\n" and done.stderr == ""


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["distil", "r.yaml"], "Did you mean distill?"),
        (["train", "r.yaml"], "Did you mean distill?"),
        (["ls"], "Did you mean runs?"),
        (["distill", "r.yaml", "--steps", "5"], "is set by train.steps=5."),
        (["distill", "r.yaml", "--learning-rate=1e-3"], "is set by train.lr=1e-3."),
        (["distill", "--train.lr", "3", "r.yaml"], "is set by train.lr=3."),
        (["check", "r.yaml", "--seed", "5"], "is set by train.seed=5."),
        (["distill", "r.yaml", "--resum"], "Did you mean --resume?"),
        (["export", "x", "--quantise", "q4_k"], "Did you mean --quantize?"),
        (["distill", "r.yaml", "--zzz"], "unrecognized arguments: --zzz"),
        (["show", "x", "--steps", "5"], "unrecognized arguments: --steps 5"),
        (["zzz"], "invalid choice: 'zzz'"),
    ],
)
def test_a_mistyped_verb_or_flag_is_answered_with_what_it_is_called(
    words: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert hint in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("words", "missing"), [(["init", "a", "b"], "DATA"), (["distill"], "RECIPE")])
def test_only_what_is_missing_is_asked_for(
    words: list[str], missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(words)
    assert capsys.readouterr().err.endswith(f"required: {missing}\n")
