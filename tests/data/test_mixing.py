"""A mix of corpora: exact shares of every step, each source's epochs, and what is measured and recorded per source."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS, make_model, make_tokenizer

from potstill import distill, load_recipe
from potstill.build.corpus import make_corpus
from potstill.build.resolve import resolve
from potstill.cli.main import main
from potstill.data.mixing import MixedCorpus, MixedOrder
from potstill.data.packing import Corpus
from potstill.data.shares import Shares
from potstill.models.student import Student
from potstill.preflight.checks import Checked
from potstill.runs.run_dir import RunDir
from potstill.workflows.distill import evaluate

Recipe = Callable[..., Path]
SIZES = {"code": 60, "prose": 20, "notes": 9}
WEIGHTS = {"code": "0.5", "prose": "0.3", "notes": "0.2"}


def texts(folder: Path, name: str, count: int) -> None:
    draw = random.Random(name)
    (folder / name).mkdir()
    for number in range(count):
        words = " ".join(draw.choice(WORDS) for _ in range(30))
        (folder / name / f"{number:03}.txt").write_text(f"{name} {number} {words}")


@pytest.fixture
def mix(tiny_recipe: Recipe, tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a recipe of three sources; `sources` has YAML of a source's further fields by name."""
    for name, count in SIZES.items():
        texts(tmp_path, name, count)

    def write(corpus: str = "", sources: dict[str, str] | None = None, **sections: str) -> Path:
        listed = ", ".join(
            f"{{source: {name}, weight: {weight}, name: text, path: {name}{(sources or {}).get(name, '')}}}"
            for name, weight in WEIGHTS.items()
        )
        own = f"tokens_per_row: 32, heldout_rows: 3{corpus}"
        return tiny_recipe(corpus=f"{{name: mix, {own}, sources: [{listed}]}}", **sections)

    return write


@pytest.fixture
def corpus(mix: Recipe) -> MixedCorpus:
    made = corpus_of(mix())
    assert isinstance(made, MixedCorpus)
    return made


def corpus_of(recipe: Path) -> Corpus:
    return make_corpus(resolve(load_recipe(recipe)))[0]


def refused(
    recipe: Path, capsys: pytest.CaptureFixture[str], *overrides: str, verb: str = "rows"
) -> list[str]:
    assert main([verb, str(recipe), *overrides]) == 2
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


def assert_exact(counts: list[tuple[int, ...]], weights: list[Fraction], rows_per_step: int) -> None:
    """`counts`: of each step. Floor or ceiling in each, and less than one row away over any number of steps."""
    shares = [rows_per_step * weight / sum(weights) for weight in weights]
    so_far = [0] * len(weights)
    for step, of_step in enumerate(counts, 1):
        assert sum(of_step) == rows_per_step
        so_far = [before + count for before, count in zip(so_far, of_step, strict=True)]
        for count, total, share in zip(of_step, so_far, shares, strict=True):
            assert math.floor(share) <= count <= math.ceil(share)
            assert abs(total - step * share) < 1


# --- which rows a step has


@pytest.mark.parametrize("rows_per_step", [1, 2, 3, 7, 10])
def test_every_step_has_its_exact_share_of_each_source(corpus: MixedCorpus, rows_per_step: int) -> None:
    order = corpus.order(7)
    counts = []
    for step in range(60):
        found = Counter(corpus.source_of(row) for row in order.rows(step, rows_per_step))
        counts.append(tuple(found[name] for name in WEIGHTS))
    assert_exact(counts, [Fraction(weight) for weight in WEIGHTS.values()], rows_per_step)
    if rows_per_step == 10:
        assert set(counts) == {(5, 3, 2)}


def test_shares_are_exact_for_any_weights() -> None:
    """The first cases are those in which each simpler rule of `shares.py` goes wrong."""
    draw = random.Random(0)
    cases = [([6, 7, 2, 2, 2], 6), ([1, 5, 8], 3), ([2, 2, 3, 1], 7), ([3, 3, 3, 4, 4], 4)]
    for _ in range(150):
        weights = [draw.randint(1, draw.choice([3, 30])) for _ in range(draw.randint(1, 7))]
        cases.append((weights, draw.randint(1, 12)))
    for weights, rows in cases:
        exact = [Fraction(weight) for weight in weights]
        shares = Shares(exact, rows)
        before = [shares.before(step) for step in range(min(shares.period + 2, 150))]
        of_steps = [tuple(b - a for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(before)]
        assert_exact(of_steps, exact, rows)


def test_a_step_is_a_function_of_its_number_whatever_was_asked_before() -> None:
    weights = [Fraction("0.123457"), Fraction("0.3"), Fraction("0.576543")]
    in_order, at_once = Shares(weights, 7), Shares(weights, 7)
    for step in range(3000):
        last = in_order.before(step)
    assert at_once.before(2999) == last
    assert at_once.before(700) == in_order.before(700)


def test_every_epoch_of_a_source_is_all_its_rows_once_in_another_order(corpus: MixedCorpus) -> None:
    order, read = corpus.order(3), {name: Counter[int]() for name in WEIGHTS}
    for step in range(300):
        for row in order.rows(step, 5):
            read[corpus.source_of(row)][row] += 1
        for of_source, of_train in zip(read.values(), corpus.train.ranges, strict=True):
            epochs = of_source.total() // len(of_train)
            times = [of_source[row] for row in of_train]
            assert set(times) <= {epochs, epochs + 1}
    assert min(read["notes"].values()) == 9
    notes, rows = order._orders[2], len(corpus.parts["notes"].train)
    first, second = ([notes.row(epoch * rows + at) for at in range(rows)] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == [*range(rows)] and first != second
    assert order.rows(4, 5) != corpus.order(4).rows(4, 5)


def test_micro_batches_have_rows_of_several_sources(corpus: MixedCorpus) -> None:
    """Ten micro-batches of two rows: in blocks, at most one could have rows of two sources in each step."""
    mixed = 0
    for step in range(20):
        for batch in corpus.steps(1, 10, 2).step(step):
            mixed += len({corpus.source_of(int(row)) for row in batch.rows_B}) > 1
    assert mixed > 40


def test_a_row_of_a_mix_is_the_row_of_its_source(corpus: MixedCorpus, tmp_path: Path) -> None:
    rows, of = corpus.train, list(corpus.parts)
    chosen = [0, len(rows) - 1, rows.ends[0] - 1, rows.ends[0], rows.ends[1]]
    batch = rows.batch(chosen)
    assert batch.rows_B.tolist() == chosen
    for row, one in zip(chosen, batch.split(), strict=True):
        part, own = rows.place(row)
        assert corpus.source_of(row) == of[part]
        alone = corpus.parts[of[part]].train.batch([own])
        for name in ("input_ids_BT", "position_ids_BT", "positions_N", "labels_N", "lengths_B"):
            assert torch.equal(getattr(one, name), getattr(alone, name))
    held = corpus.heldout.batch(range(len(corpus.heldout)))
    assert held.rows_B.tolist() == list(range(len(rows), len(rows) + 9))
    assert [corpus.source_of(row) for row in held.rows_B.tolist()] == [n for n in WEIGHTS for _ in range(3)]


def test_a_source_alone_has_the_rows_that_it_has_in_a_mix(
    corpus: MixedCorpus, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    section = "{name: text, path: prose, tokens_per_row: 32, heldout_rows: 3}"
    assert corpus_of(tiny_recipe(corpus=section)).fingerprint == corpus.parts["prose"].fingerprint


def test_the_first_rows_in_proportion_are_of_all_sources(corpus: MixedCorpus) -> None:
    rows = corpus.in_proportion.batch(range(10)).rows_B.tolist()
    assert Counter(corpus.source_of(row) for row in rows) == {"code": 5, "prose": 3, "notes": 2}
    assert len(set(rows)) == 10


def test_a_document_that_one_source_holds_out_is_in_no_training_row_of_another(
    tiny_recipe: Recipe, tmp_path: Path
) -> None:
    texts(tmp_path, "code", 40)
    texts(tmp_path, "more", 30)
    for path in (tmp_path / "code").glob("*.txt"):
        (tmp_path / "more" / f"of_{path.name}").write_text(path.read_text())
    sources = (
        "{source: a, weight: 1, name: text, path: code, heldout_rows: 12},"
        " {source: b, weight: 1, name: text, path: more, heldout_rows: 1}"
    )
    made = corpus_of(
        tiny_recipe(corpus=f"{{name: mix, tokens_per_row: 32, heldout_rows: 3, sources: [{sources}]}}")
    )
    documents = {}
    for name, part in made.parts.items():
        for split, rows in (("train", part.train), ("heldout", part.heldout)):
            numbers = {number for row in range(len(rows)) for number in rows.documents_of(row)}
            ends = [*rows.starts[1:], len(rows.ids)]
            documents[name, split] = {
                rows.ids[rows.starts[number] : ends[number]].tobytes() for number in numbers
            }
    held = {name: documents[name, "heldout"] for name in made.parts}
    assert not held["a"] & documents["b", "train"] and not held["b"] & documents["a", "train"]
    dropped = [part["rows_dropped_as_held_out"] for part in made.manifest["sources"].values()]
    assert sum(dropped) == made.manifest["rows_dropped_as_held_out"] > 0
    assert made.manifest["train_rows"] == len(made.train)


# --- a whole run


def test_a_run_measures_and_records_every_source(mix: Recipe, tmp_path: Path) -> None:
    recipe = mix(train="{steps: 6, rows_per_step: 5, lr: 1e-2, device: cpu, rows_per_micro_batch: 2}")
    run = distill(recipe, out=tmp_path / "run")
    sources, corpus, receipt = run.receipt()["sources"], run.corpus(), run.receipt()
    assert {name: part["weight"] for name, part in sources.items()} == {
        "code": 0.5,
        "prose": 0.3,
        "notes": 0.2,
    }
    counts = dict.fromkeys(WEIGHTS, 0)
    made = corpus_of(recipe)
    for step in range(6):
        for row in made.order(0).rows(step, 5):
            counts[made.source_of(row)] += 1
    assert {name: part["rows_read"] for name, part in sources.items()} == counts
    assert counts == {"code": 15, "prose": 9, "notes": 6}
    for name, part in sources.items():
        assert part["share_read"] == counts[name] / 30
        assert part["times_read"] == counts[name] / corpus["sources"][name]["train_rows"]
        assert part["fingerprint"] == corpus["sources"][name]["fingerprint"]
    last = [line for line in run.metrics() if "train/loss" in line][-1]
    assert last["train/notes/epochs"] == sources["notes"]["times_read"]
    first, *_, end = corpus["sources"].values()
    assert first["rows"][0] == 0 and end["rows"][1] == corpus["train_rows"] == first["heldout_rows_at"][0]

    # Each source's figures are those of a run on its held-out rows alone, and the total is of all positions.
    best, positions = receipt["heldout_best"], {n: p["heldout_positions"] for n, p in sources.items()}
    for metric in ("ce", "kl", "agreement", "teacher_ce"):
        mean = sum(best[f"heldout/{n}/{metric}"] * positions[n] for n in positions) / sum(positions.values())
        assert best[f"heldout/{metric}"] == pytest.approx(mean, rel=1e-5)
    alone = dataclasses.replace(load_recipe(recipe), corpus=load_recipe(recipe).corpus.parts["prose"])
    measured = evaluate(alone, run.student)
    for metric in ("ce", "kl", "agreement"):
        assert best[f"heldout/prose/{metric}"] == pytest.approx(measured[f"heldout/{metric}"], rel=1e-4)
    assert len({round(best[f"heldout/{name}/kl"], 6) for name in WEIGHTS}) == 3


def test_a_run_stopped_and_resumed_reads_the_same_rows(mix: Recipe, tmp_path: Path) -> None:
    recipe = mix(train="{steps: 6, rows_per_step: 5, lr: 1e-2, device: cpu, save_every: 2}")
    whole = distill(recipe, out=tmp_path / "whole")
    cut_off = distill(recipe, out=tmp_path / "cut")
    for place in sorted(cut_off.checkpoints.iterdir())[1:]:
        for file in place.iterdir():
            file.unlink()
        place.rmdir()
    (cut_off.path / "receipt.json").unlink()
    cut_off.set_status("stopped")
    resumed = distill(recipe, out=tmp_path / "cut", resume=True)
    weights = [run.receipt()["student"]["weights_sha256_end"] for run in (whole, resumed)]
    assert weights[0] == weights[1]


def test_a_changed_file_is_named_with_its_source_on_resume(
    mix: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = mix()
    run = distill(recipe, out=tmp_path / "run")
    run.set_status("stopped")
    changed = tmp_path / "prose" / "004.txt"
    changed.write_text(changed.read_text() + " changed")
    assert main(["distill", str(recipe), "--resume", "--out", str(run.path)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{changed} of source prose (" in error and "started with another corpus" in error
    assert "003.txt" not in error
    assert (
        main(["distill", str(recipe), "corpus.sources.1.weight=0.4", "--resume", "--out", str(run.path)]) == 2
    )
    assert "corpus.sources.1.weight (0.3 -> 0.4)" in capsys.readouterr().err


def test_epochs_are_of_all_rows_together(mix: Recipe, tmp_path: Path) -> None:
    recipe = mix(train="{epochs: 0.1, rows_per_step: 5, lr: 1e-2, device: cpu}")
    run = distill(recipe, out=tmp_path / "run")
    assert run.receipt()["steps"] == math.ceil(Fraction("0.1") * run.corpus()["train_rows"] / 5)


def test_a_source_that_is_read_over_and_over_is_named_before_the_run(
    mix: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = mix(train="{steps: 20, rows_per_step: 40, lr: 1e-2, device: cpu}")
    assert main(["check", str(recipe), "--json"]) == 0
    captured = capsys.readouterr()
    findings = {each["name"]: each for each in json.loads(captured.out)}
    made = corpus_of(recipe)
    rows = {name: len(part.train) for name, part in made.parts.items()}
    read = {name: 20 * 40 * float(weight) / rows[name] for name, weight in WEIGHTS.items()}
    found = findings["sources"]
    assert found["numbers"] == pytest.approx(read) and found["ok"]
    assert read["notes"] > 4 > min(read.values())
    assert f"source notes is exhausted {read['notes']:.1f} times" in found["figure"]
    assert f"warning: corpus: source notes is exhausted {read['notes']:.1f} times" in captured.err
    calm = [name for name, times in read.items() if times < 4]
    assert not any(f"{name} is exhausted" in found["figure"] for name in calm)
    assert main(["check", str(recipe), "train.steps=4", "--json"]) == 0
    findings = {each["name"]: each for each in json.loads(capsys.readouterr().out)}
    assert "exhausted" not in findings["sources"]["figure"]


def test_one_corpus_has_no_finding_about_sources(
    tiny_recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(tiny_recipe()), "--json"]) == 0
    assert "sources" not in {each["name"] for each in json.loads(capsys.readouterr().out)}


# --- caches, stores, other commands


def test_each_source_has_its_own_cache_that_it_shares_with_the_corpus_alone(
    mix: Recipe, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    in_memory = corpus_of(mix()).fingerprint
    for _ in range(2):
        made = corpus_of(mix(corpus=", shards: cache"))
        assert made.fingerprint == in_memory
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == sorted(WEIGHTS)
    alone = "{name: text, path: prose, tokens_per_row: 32, heldout_rows: 3, shards: cache/prose}"
    before = (tmp_path / "cache/prose/corpus.json").stat().st_mtime_ns
    assert corpus_of(tiny_recipe(corpus=alone)).fingerprint == made.parts["prose"].fingerprint
    assert (tmp_path / "cache/prose/corpus.json").stat().st_mtime_ns == before


def test_a_store_of_a_mix_teaches_as_the_teacher_does(mix: Recipe, tmp_path: Path) -> None:
    sections = {
        "student": f"{{name: checkpoint, model: {tmp_path / 'student'}}}",
        "capture": "{name: hidden}",
    }

    make_model(tmp_path / "student", seed=3, num_hidden_layers=2)
    recipe = mix(**sections)
    assert main(["capture", str(recipe), "--out", str(tmp_path / "store")]) == 0
    live = distill(recipe, out=tmp_path / "live")
    stored = distill(
        recipe, overrides=[f"teacher={{name: store, path: {tmp_path / 'store'}}}"], out=tmp_path / "stored"
    )
    for name in ("heldout/kl", "heldout/notes/kl", "heldout/code/ce"):
        ours, theirs = (run.receipt()["heldout_last"][name] for run in (stored, live))
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_rows_are_shown_with_their_source(mix: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rows", str(mix()), "--limit", "3"]) == 0
    out = capsys.readouterr().out
    assert [f" of {name}: 32 tokens" in out for name in WEIGHTS] == [True] * 3
    assert "code: 50 % of each step; 60 documents; " in out
    assert main(["rows", str(mix()), "--json", "--heldout"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert Counter(line["source"] for line in lines) == dict.fromkeys(WEIGHTS, 3)
    assert main(["rows", str(mix()), "--documents", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert Counter(line["source"] for line in lines) == SIZES


def test_every_source_is_decontaminated_and_the_counts_are_added_up(
    mix: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leak = "one two three four five six seven eight nine ten eleven twelve"
    (tmp_path / "leak.txt").write_text(leak)
    for name in ("code", "notes"):
        (tmp_path / name / "leaks.txt").write_text(f"some of it: {leak}")
    made = corpus_of(mix(corpus=", decontaminate: {against: [leak.txt]}"))
    of_each = {n: part["decontamination"]["documents_hit"] for n, part in made.manifest["sources"].items()}
    assert of_each == {"code": 1, "prose": 0, "notes": 1}
    total = made.manifest["decontamination"]
    assert (total["documents_hit"], total["documents"]) == (2, sum(SIZES.values()) + 2)
    assert {Path(hit["document"]).parent.name for hit in total["first_hits"]} == {"code", "notes"}


def test_the_plan_counts_all_sources(mix: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from potstill.preflight.plan_disk import corpus_bytes, corpus_tokens, shards_bytes

    recipe = load_recipe(mix(corpus=", shards: cache"))
    size = sum(path.stat().st_size for name in SIZES for path in (tmp_path / name).iterdir())
    assert corpus_tokens(recipe) == pytest.approx(size / 3.5)
    assert shards_bytes(recipe) == int(5 * size / 3.5) > 0
    in_memory = load_recipe(mix())
    assert corpus_bytes(in_memory, 0) == int(5 * size / 3.5) and shards_bytes(in_memory) == 0


def test_the_report_has_a_table_of_the_sources(mix: Recipe, tmp_path: Path) -> None:
    run = distill(mix(), out=tmp_path / "run")
    assert main(["report", str(run.path), "--no-models"]) == 0
    page = (run.path / "report.html").read_text()
    assert "Sources of the mix" in page and '<th scope="row">prose</th><td class="n">30.00 %</td>' in page
    notes = [line["heldout/notes/kl"] for line in run.metrics() if "heldout/notes/kl" in line]
    assert f"{notes[0]:.3f} → {notes[-1]:.3f}" in page


def test_conversations_and_texts_mix(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A source keeps the defaults of its kind: whole conversations, texts end to end."""
    from cli.test_rows import chat_recipe

    recipe = chat_recipe(tiny_recipe, tmp_path)
    texts(tmp_path, "prose", 40)
    sources = "{source: chats, weight: 1, name: chat, path: c.jsonl}, {source: prose, weight: 3, name: text, path: prose}"
    given = f"corpus={{name: mix, tokens_per_row: 64, heldout_rows: 2, sources: [{sources}]}}"
    assert main(["rows", str(recipe), given, "--json"]) == 0
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in captured.out.splitlines()]
    assert all(all(row["labels"][1:]) for row in rows if row["source"] == "prose" and not row["begins"])
    assert not any(all(row["labels"][1:]) for row in rows if row["source"] == "chats")
    assert "chats: 1 of 41 conversations have no token to learn" in captured.err
    assert main(["rows", str(recipe), given, "--limit", "2"]) == 0


# --- what is refused


@pytest.mark.parametrize(
    ("corpus", "mistake"),
    [
        ("sources: []", "corpus.sources: a list of 0, wanted 1 or more entries."),
        ("heldout_rows: 2", "corpus.sources: missing."),
        ("sources: [{A}, {A}]", "corpus.sources.1.source: 'a' is also the name of corpus.sources.0."),
        ("sources: [{A, weight: 0}]", "corpus.sources.0.weight: 0 must be greater than 0."),
        ("sources: [{A, weight: -1}]", "corpus.sources.0.weight: -1 must be greater than 0."),
        ("sources: [{A, weight: null}]", "corpus.sources.0.weight: missing. Every source of a mix needs it."),
        ("sources: [{A, source: null}]", "corpus.sources.0.source: missing."),
        ("sources: [{A, source: ../b}]", "corpus.sources.0.source: '../b' is not a short name."),
        ("sources: [{A}, {B, pth: 3}]", "corpus.sources.1.pth: unknown key for text. Did you mean corpus.sources.1.path?"),
        ("sources: [{A}, {B, path: nowhere}]", "corpus.sources.1.path: no file or folder "),
        ("sources: [{A}, {B, name: mix}]", "corpus.sources.1.name: no source of a mix called 'mix'."),
        ("sources: [{A}, {B, name: prompts}]", "corpus.sources.1.name: prompts have no answers, and rows of text have"),
        ("sources: [{A, tokens_per_row: 16}]", "corpus.sources.0.tokens_per_row: 16, and corpus.tokens_per_row is 32: "),
        ("sources: [{A, packing: false}]", "corpus.sources.0.packing: false, and corpus.packing is true: "),
        ("weight: 1, sources: [{A}]", "corpus.weight: is of a source of corpus.name: mix alone."),
    ],
)  # fmt: skip
def test_a_mistake_of_a_mix_is_one_line(
    tiny_recipe: Recipe,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    corpus: str,
    mistake: str,
) -> None:
    texts(tmp_path, "code", 20)
    given = yaml_of(corpus)
    recipe = tiny_recipe(corpus=f"{{name: mix, tokens_per_row: 32, {given}}}")
    (error,) = refused(recipe, capsys)
    assert f": {mistake}" in error


def yaml_of(text: str) -> str:
    """With A and B as whole sources, whose fields a source of `text` replaces."""
    for name in "AB":
        whole = {"source": name.lower(), "weight": "1", "name": "text", "path": "code"}
        while f"{{{name}" in text:
            start = text.index(f"{{{name}")
            end = text.index("}", start)
            more = [each.split(": ") for each in text[start + 2 : end].strip(", ").split(", ") if each]
            fields = ", ".join(f"{key}: {value}" for key, value in (whole | dict(more)).items())
            text = f"{text[:start]}{{ {fields}}}{text[end + 1 :]}"
    return text


def test_a_source_with_too_little_text_is_named_and_nothing_is_written(
    mix: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in sorted((tmp_path / "notes").iterdir())[1:]:
        path.unlink()
    (error,) = refused(mix(), capsys, "--out", str(tmp_path / "run"), verb="distill")
    assert error.startswith("error: corpus.sources.2 (notes): corpus: one document, of ")
    assert not (tmp_path / "run").exists()
    recipe = mix(corpus=", shards: cache")
    (error,) = refused(recipe, capsys, "--out", str(tmp_path / "run"), verb="distill")
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache/notes").exists()


def test_a_step_of_far_more_rows_than_a_source_has_names_the_source(
    mix: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (error,) = refused(mix(), capsys, "train.rows_per_step=60000000", verb="distill")
    assert "train.rows_per_step: 60000000 rows in a step, 30000000 of source code, which has " in error


def test_a_weight_outside_of_a_mix_is_refused(
    tiny_recipe: Recipe, corpus_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (error,) = refused(tiny_recipe(corpus=f"{{name: text, path: {corpus_folder}, weight: 2}}"), capsys)
    assert "corpus.weight: is of a source of corpus.name: mix alone. Leave it out." in error


def test_the_names_of_a_run_s_metrics_are_the_same_at_every_evaluation(mix: Recipe, tmp_path: Path) -> None:
    run: RunDir = distill(mix(), out=tmp_path / "run")
    names: list[set[Any]] = [{name for name in line if name.startswith("heldout/")} for line in run.metrics()]
    evaluations = [each for each in names if each]
    assert len(evaluations) == 3 and evaluations[0] == evaluations[1] == evaluations[2]


def test_the_student_goes_on_from_every_source_in_its_share(mix: Recipe, tmp_path: Path) -> None:
    """Of ten rows a step six are its own, behind prompts that are the beginnings of texts of each source."""
    from safetensors.torch import load_file

    recipe = mix(
        rollouts="{fraction: 0.6, max_new_tokens: 4, prompt_tokens: 6}",
        train="{steps: 5, rows_per_step: 10, lr: 1e-3, device: cpu}",
    )
    run = distill(recipe, out=tmp_path / "run")
    counts = []
    tokenizer = make_tokenizer()
    for step in range(1, 6):
        tensors = load_file(run.rollouts / f"{step:08d}.safetensors")
        lengths = (tensors["prompt_lengths"] + tensors["completion_lengths"]).tolist()
        rows = [tokenizer.decode(row[:5]) for row in tensors["ids"].split(lengths)]
        counts.append(tuple(sum(name.startswith(row[:4]) for row in rows) for name in WEIGHTS))
    assert_exact(counts, [Fraction(weight) for weight in WEIGHTS.values()], 6)
    assert run.receipt()["rollouts"]["prompts"] == sum(
        part["train_documents"] for part in run.corpus()["sources"].values()
    )
    # The receipt counts what was read of the corpus: four rows a step.
    assert {n: part["rows_read"] for n, part in run.receipt()["sources"].items()} == {
        "code": 10,
        "prose": 6,
        "notes": 4,
    }


def test_a_store_serves_a_run_with_other_weights(mix: Recipe, tmp_path: Path) -> None:
    recipe = mix(student="{name: cut, layers: 2, rule: first_last, repair: false}", capture="{name: hidden}")
    assert main(["capture", str(recipe), "--out", str(tmp_path / "store")]) == 0
    overrides = [f"teacher={{name: store, path: {tmp_path / 'store'}}}", "corpus.sources.0.weight=3"]
    run = distill(recipe, overrides=overrides, out=tmp_path / "run")
    assert run.receipt()["sources"]["code"]["weight"] == pytest.approx(3 / 3.5)


def test_the_model_card_has_the_share_the_license_and_the_figures_of_every_source(
    mix: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prose" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    run = distill(mix(train="{steps: 4, rows_per_step: 10, lr: 1e-2, device: cpu}"), out=tmp_path / "run")
    command = ["publish", str(run.path), "--repo", "me/small", "--dry-run", "--allow-regression"]
    assert main([*command, "publish.teacher_license=apache-2.0"]) == 2
    errors = capsys.readouterr().err
    assert "license of the data (code)" in errors and "license of the data (notes)" in errors
    assert "(prose)" not in errors
    assert main([*command, "publish.teacher_license=apache-2.0", "publish.data_license=cc0-1.0"]) == 0
    (card,) = [path.read_text() for path in run.path.rglob("README.md")]
    part, best = run.receipt()["sources"]["prose"], run.receipt()["heldout_best"]
    assert f"| prose | 30.00 % (30.00 % read) | 12 | {part['times_read']:.2g} times | cc0-1.0 |" in card
    assert f"| {best['heldout/prose/kl']:.4f} |" in card


def test_rows_of_a_step_that_the_guard_left_out_are_not_counted_as_read(
    mix: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, forward, rows = list[int](), Student.forward, MixedOrder.rows
    read: dict[int, list[int]] = {}

    def noting(self: MixedOrder, step: int, rows_per_step: int) -> list[int]:
        steps.append(step)
        read[step] = rows(self, step, rows_per_step)
        return read[step]

    def spoiled(self: Student, batch: Any, targets: Any) -> dict[str, torch.Tensor]:
        terms = forward(self, batch, targets)
        return terms | {"loss": terms["loss"] * (math.nan if steps[-1] == 2 else 1.0)}

    monkeypatch.setattr(
        "potstill.workflows.distill.require_sound", lambda setup, place, note: Checked("not planned", [])
    )
    monkeypatch.setattr(MixedOrder, "rows", noting)
    monkeypatch.setattr(Student, "forward", spoiled)
    train = "{steps: 5, rows_per_step: 3, lr: 1e-3, device: cpu}"
    run = distill(mix(train=train, guard="{policy: skip}"), out=tmp_path / "run")
    assert run.receipt()["steps_left_out"] == [3]
    made = corpus_of(mix())
    counts = Counter(made.source_of(row) for step in (0, 1, 3, 4) for row in read[step])
    assert {name: part["rows_read"] for name, part in run.receipt()["sources"].items()} == counts
