"""A mix of prompts: each source's share of what the student writes, its teacher, its held-out answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
from conftest import WORDS, make_model, make_tokenizer
from cut_off import cut_off
from safetensors.torch import load_file

from potstill import distill, load_recipe
from potstill.build.resolve import resolve
from potstill.build.setup import RunSetup, set_up
from potstill.cli.main import main
from potstill.data.completions import CompletionRows

Recipe = Callable[..., Path]
COUNTS = {"maths": 12, "prose": 9}
TRAIN = "{steps: 4, rows_per_step: 4, lr: 1e-3, device: cpu, save_every: 2}"


def asked(name: str, count: int) -> list[str]:
    return [f"{name} {number} {WORDS[number % len(WORDS)]}" for number in range(count)]


def write_prompts(path: Path, prompts: list[str]) -> None:
    path.write_text("".join(json.dumps({"prompt": each}) + "\n" for each in prompts))


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    return {
        name: make_model(tmp_path / name, seed=seed) for seed, name in enumerate(("one", "other", "student"))
    }


@pytest.fixture
def mix(tiny_recipe: Recipe, tmp_path: Path, models: dict[str, Path]) -> Recipe:
    """A recipe of two files of prompts, three quarters and one quarter."""
    for name, count in COUNTS.items():
        write_prompts(tmp_path / f"{name}.jsonl", asked(name, count))

    def write(more: str = "", prose: str = "name: prompts", **sections: str) -> Path:
        sources = (
            "{source: maths, weight: 3, name: prompts, path: maths.jsonl}, "
            f"{{source: prose, weight: 1, {prose}, path: prose.jsonl}}"
        )
        whole = {
            "corpus": f"{{name: mix, tokens_per_row: 48, heldout_rows: 2, sources: [{sources}]{more}}}",
            "teacher": f"{{name: torch, model: {models['one']}}}",
            "student": f"{{name: checkpoint, model: {models['student']}}}",
            "rollouts": "{max_new_tokens: 5}",
            "train": TRAIN,
        }
        return tiny_recipe(**whole | sections)

    return write


def built(path: Path) -> RunSetup:
    return set_up(resolve(load_recipe(path)), lambda line: None)


def test_a_step_answers_prompts_of_each_source_in_its_share(mix: Recipe, tmp_path: Path) -> None:
    run = distill(mix(), out=tmp_path / "run")
    tokenizer = make_tokenizer()
    for step in range(1, 5):
        tensors = load_file(run.rollouts / f"{step:08d}.safetensors")
        lengths = (tensors["prompt_lengths"] + tensors["completion_lengths"]).tolist()
        names = [tokenizer.decode(row)[:5] for row in tensors["ids"].split(lengths)]
        assert sorted(names) == ["maths", "maths", "maths", "prose"]
    assert run.receipt()["rollouts"]["prompts"] == 10 + 7
    shares = {name: part["weight"] for name, part in run.receipt()["sources"].items()}
    assert shares == {"maths": 0.75, "prose": 0.25}


def test_held_out_figures_of_a_source_are_of_the_answers_to_its_prompts(mix: Recipe, tmp_path: Path) -> None:
    path = mix()
    setup = built(path)
    metrics = distill(path, out=tmp_path / "run").metrics()[0]
    corpus = setup.corpus
    assert isinstance(corpus.heldout, CompletionRows)
    assert {name: list(part) for name, part in corpus.heldout_parts.items()} == {
        "maths": [0, 1],
        "prose": [2, 3],
    }
    positions, summed = 0, 0.0
    for name, part in corpus.parts.items():
        rows = part.heldout
        assert isinstance(rows, CompletionRows)
        texts = [make_tokenizer().decode(each.prompt.ids) for each in rows.completions]
        assert {text[:5] for text in texts} == {name}
        assert corpus.manifest["sources"][name]["heldout_positions"] == rows.supervised
        positions += rows.supervised
        summed += rows.supervised * metrics[f"heldout/{name}/kl"]
        assert corpus.source_of(len(corpus.train) + corpus.heldout_parts[name][0]) == name
    assert corpus.heldout.supervised == positions
    assert summed / positions == pytest.approx(metrics["heldout/kl"], rel=1e-5)


def test_each_source_is_answered_and_graded_by_its_teacher(
    mix: Recipe, models: dict[str, Path], tmp_path: Path
) -> None:
    """Held-out answers are those of a run with that teacher alone: they have the same random numbers."""
    teachers = "{name: mixture, teachers: [" + ", ".join(
        f"{{teaches: [{source}], teacher: {{name: torch, model: {models[name]}}}}}"
        for source, name in (("maths", "one"), ("prose", "other"))
    )
    answers = {}
    for name, teacher in {
        "both": teachers + "]}",
        **{name: f"{{name: torch, model: {models[name]}}}" for name in ("one", "other")},
    }.items():
        setup = built(mix(teacher=teacher))
        assert isinstance(setup.corpus.heldout, CompletionRows)
        answers[name] = [each.new for each in setup.corpus.heldout.completions]
    assert answers["one"] != answers["other"]
    assert answers["both"] == answers["one"][:2] + answers["other"][2:]
    run = distill(mix(teacher=teachers + "]}"), out=tmp_path / "run")
    assert run.receipt()["steps"] == 4


def test_a_run_goes_on_with_the_same_answers(
    mix: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = mix()
    whole = distill(path, out=tmp_path / "whole")
    cut_off(path, tmp_path / "again", 3, monkeypatch)
    again = distill(path, out=tmp_path / "again", resume=True)
    assert again.receipt()["student"] == whole.receipt()["student"]
    for name in ("heldout/kl", "heldout/maths/kl", "heldout/prose/kl", "own/reverse_kl"):
        assert again.metrics()[-1][name] == whole.metrics()[-1][name]


@pytest.mark.parametrize("kind", ["name: prompts", "name: text"])
def test_a_prompt_that_another_source_holds_out_is_not_trained_on(
    kind: str, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    """Also of texts, whose rows are dropped for it."""
    path = "shared" if kind == "name: text" else "shared.jsonl"
    shared = [f"{text} " + " ".join(WORDS[:8]) for text in asked("shared", 12)]
    if kind == "name: text":
        (tmp_path / path).mkdir()
        for number, text in enumerate(shared):
            (tmp_path / path / f"{number}.txt").write_text(text)
        more = [f"{text} " + " ".join(WORDS[:8]) for text in asked("more", 12)]
        (tmp_path / "further").mkdir()
        for number, text in enumerate(shared + more):
            (tmp_path / "further" / f"{number}.txt").write_text(text)
        other = "further"
    else:
        write_prompts(tmp_path / path, shared)
        write_prompts(tmp_path / "further.jsonl", shared + asked("more", 12))
        other = "further.jsonl"
    sources = (
        f"{{source: a, weight: 1, {kind}, path: {path}}}, {{source: b, weight: 1, {kind}, path: {other}}}"
    )
    rollouts = "{max_new_tokens: 4}" if kind == "name: prompts" else "{max_new_tokens: 4, prompt_tokens: 12}"
    recipe = tiny_recipe(
        corpus=f"{{name: mix, tokens_per_row: 48, packing: false, heldout_rows: 3, sources: [{sources}]}}",
        rollouts=rollouts,
        train=TRAIN,
    )
    given = built(recipe).rollouts
    assert given is not None
    trained = {tuple(given.prompts[number].ids) for number in range(len(given.prompts))}
    held_out = {tuple(prompt.ids) for prompt in given.heldout}
    assert held_out and not trained & held_out


@pytest.mark.parametrize(
    ("more", "sections", "message"),
    [
        (
            "",
            {"prose": "name: text"},
            "corpus.sources.0.name: prompts have no answers, and rows of text have",
        ),
        ("", {"rollouts": "{fraction: 0.5}"}, "rollouts.fraction: 0.5 leaves rows to the corpus"),
        ("", {"rollouts": "null"}, "rollouts: missing: prompts have no answers to train on."),
        (", shards: cache", {}, "corpus.shards: is for rows of text"),
    ],
)
def test_what_prompts_cannot_be_mixed_with_is_one_line(
    more: str,
    sections: dict[str, str],
    message: str,
    mix: Recipe,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["distill", str(mix(more, **sections)), "--out", str(tmp_path / "run")]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert any(message in line for line in errors), errors
    assert not (tmp_path / "run").exists()


def test_prompts_are_neither_captured_nor_compared(
    mix: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb in ("capture", "compare"):
        assert main([verb, str(mix()), "--out", str(tmp_path / verb)]) == 2
        assert "prompts have no answers" in capsys.readouterr().err
        assert not (tmp_path / verb).exists()


def test_check_plan_and_rows_know_a_mix_of_prompts(mix: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(mix())]) == 2
    red = [line for line in capsys.readouterr().out.splitlines() if line.startswith("RED")]
    assert len(red) == 1 and "No answer ends within rollouts.max_new_tokens" in red[0]
    for verb in ("plan", "rows"):
        assert main([verb, str(mix())]) == 0, capsys.readouterr().err
    assert "what the student writes behind them bears loss" in " ".join(capsys.readouterr().out.split())


def test_shares_are_exact_over_a_run(mix: Recipe) -> None:
    given = built(mix()).rollouts
    assert given is not None
    order = given.prompts.order(0)
    counts = order.rows_read(9, 4)
    assert {name: Fraction(count, 36) for name, count in counts.items()} == {
        "maths": Fraction(3, 4),
        "prose": Fraction(1, 4),
    }
