"""`potstill capture` and what follows it, as a user meets them: by the command line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_corpus, make_model
from refusals import refusal
from safetensors.torch import load_file, save_file

from potstill.cli.main import main
from potstill.losses.targets import HiddenTargets
from potstill.runs.run_dir import RunDir
from potstill.store.layout import MANIFEST
from potstill.store.reader import Store
from potstill.teachers.hf import TorchTeacher
from potstill.types import Batch

Recipe = Callable[..., Path]
CAPTURE = "{name: sampled, threshold: 0.05, rows_per_shard: 16}"
HIDDEN = "{name: hidden, dtype: float32, rows_per_shard: 16}"
TOPK = "{name: topk, k: 8, rows_per_shard: 16}"


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smaller than elsewhere: 60 rows, four shards of 16."""
    return make_corpus(tmp_path_factory.mktemp("corpora") / "text", documents=16)


def capture(recipe: Path, out: Path, *more: str) -> Path:
    assert main(["capture", str(recipe), "--out", str(out), *more]) == 0
    return out


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def shards(path: Path) -> dict[str, bytes]:
    return {name: data for name, data in content(path).items() if name[0].isdigit() and "safe" in name}


def from_store(path: Path, more: str = "") -> str:
    return f"{{name: store, path: {path}{more}}}"


def metrics(run: Path) -> list[dict[str, float]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    timed = ("speed/", "memory/", "time")
    return [
        {name: value for name, value in json.loads(line).items() if not name.startswith(timed)}
        for line in lines
    ]


def assert_alike(run: Path, other: Path, within: float) -> None:
    ours, theirs = metrics(run), metrics(other)
    assert len(ours) == len(theirs)
    for one, two in zip(ours, theirs, strict=True):
        assert one == pytest.approx(two, rel=within, abs=within)


# --- one changed line


def test_a_run_from_hidden_states_is_the_live_run(tiny_recipe: Recipe, tmp_path: Path) -> None:
    store = capture(tiny_recipe(capture=HIDDEN), tmp_path / "store")
    assert main(["distill", str(tiny_recipe()), "--out", str(tmp_path / "live")]) == 0
    stored = tiny_recipe("stored.yaml", teacher=from_store(store))
    assert main(["distill", str(stored), "--out", str(tmp_path / "stored")]) == 0
    assert_alike(tmp_path / "stored", tmp_path / "live", 1e-6)

    ours, theirs = (RunDir.open(tmp_path / name).receipt() for name in ("stored", "live"))
    assert ours["student"]["weights_sha256_start"] == theirs["student"]["weights_sha256_start"]
    assert ours["teacher"]["weights_sha256"] == theirs["teacher"]["weights_sha256"]
    assert ours["teacher"]["source"] == theirs["teacher"]["source"]
    assert ours["teacher"]["unchanged_by_training"] is True
    manifest = Store(store).manifest
    assert ours["teacher"]["store"] == {
        name: manifest[name] for name in ("kind", "temperature", "bytes_per_position", "certificate")
    }
    weights = [load_file(tmp_path / name / "student" / "model.safetensors") for name in ("stored", "live")]
    assert all(torch.allclose(one, weights[1][name], atol=1e-5) for name, one in weights[0].items())


def test_a_run_from_samples_learns_nearly_the_same(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """And its held-out rows are measured against the teacher itself, so they agree before the first step."""
    store = capture(tiny_recipe(), tmp_path / "store", "capture.threshold=0.01")
    assert main(["distill", str(tiny_recipe()), "--out", str(tmp_path / "live")]) == 0
    stored = tiny_recipe("stored.yaml", teacher=from_store(store))
    assert main(["distill", str(stored), "--out", str(tmp_path / "stored")]) == 0
    ours, theirs = metrics(tmp_path / "stored"), metrics(tmp_path / "live")
    assert ours[0] == pytest.approx(theirs[0], abs=1e-6)
    assert ours[-1]["heldout/kl"] == pytest.approx(theirs[-1]["heldout/kl"], rel=0.01)
    assert ours[-1] != theirs[-1]


@pytest.mark.parametrize("kind", [CAPTURE, TOPK])
def test_verbs_take_a_store_for_a_teacher(
    tiny_recipe: Recipe, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tempered = "{chunk: 16, temperature: 2.0}"
    store = capture(tiny_recipe(objective=tempered, capture=kind), tmp_path / "store")
    recipe, run = tiny_recipe("s.yaml", objective=tempered, teacher=from_store(store)), tmp_path / "run"
    capsys.readouterr()
    assert main(["plan", "--json", str(recipe)]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["teacher"] == 0 and planned["largest"]["store"] > 258 * 32 * 4
    assert main(["check", str(recipe)]) == 0
    assert "between positions" in capsys.readouterr().out
    assert main(["distill", str(recipe), "--smoke", "1"]) == 0
    assert not run.exists()
    assert main(["distill", str(recipe), "--out", str(run)]) == 0
    for verb in ("report", "show", "eval"):
        assert main([verb, str(run)]) == 0


def cut_off(recipe: Path, run: Path) -> None:
    """A run that stopped after its second step, as a signal would have it."""
    from potstill.training import loop

    real, taken = loop.lr_at, []

    def stop(step: int, plan: Any) -> float:
        taken.append(step)
        if len(taken) > 2:
            raise KeyboardInterrupt
        return real(step, plan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "lr_at", stop)
        code = main(["distill", str(recipe), "--out", str(run)])
    assert code != 0 and (run / "checkpoints").exists()


def test_a_run_goes_on_with_its_store_and_not_with_another(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every = "{steps: 4, rows_per_step: 4, lr: 1e-3, device: cpu, save_every: 1}"
    store = capture(tiny_recipe(capture=CAPTURE), tmp_path / "store")
    recipe = tiny_recipe("stored.yaml", teacher=from_store(store), train=every)
    assert main(["distill", str(recipe), "--out", str(tmp_path / "whole")]) == 0
    run, other = tmp_path / "run", tmp_path / "other"
    cut_off(recipe, run)
    shutil.copytree(run, other)
    assert main(["distill", str(recipe), "--out", str(run), "--resume"]) == 0
    assert metrics(run) == metrics(tmp_path / "whole")

    shutil.rmtree(store)
    capture(tiny_recipe(capture=CAPTURE), store, "capture.seed=1")
    capsys.readouterr()
    line = refusal(["distill", str(recipe), "--out", str(other), "--resume"], capsys, store)
    assert "teacher/manifest.json" in line


def test_a_model_of_other_weights_is_refused(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = capture(tiny_recipe(capture=TOPK), tmp_path / "store")
    other = make_model(tmp_path / "other", seed=1)
    recipe = tiny_recipe("stored.yaml", teacher=from_store(store, f", model: {other}"))
    capsys.readouterr()
    line = refusal(["distill", str(recipe), "--out", str(tmp_path / "run")], capsys, tmp_path)
    assert "does not fit this recipe: teacher: captured from" in line and "Name the model" in line


# --- what is written


FIELDS = {
    "sampled": (
        "{name: sampled, threshold: 0.05}",
        {"threshold": "0.1", "seed": "1", "rows_per_shard": "16", "rows": "steps"},
    ),
    "topk": (
        "{name: topk, k: 8}",
        {"k": "7", "dtype": "float32", "rows_per_shard": "16", "rows": "steps"},
    ),
    "hidden": (
        "{name: hidden}",
        {"dtype": "int8", "rows_per_batch": "1", "rows_per_shard": "16", "rows": "steps"},
    ),
}


@pytest.mark.parametrize("kind", FIELDS)
def test_every_field_changes_what_is_written(tiny_recipe: Recipe, tmp_path: Path, kind: str) -> None:
    section, fields = FIELDS[kind]
    recipe = tiny_recipe(capture=section)
    as_it_is = shards(capture(recipe, tmp_path / "as-it-is"))
    assert as_it_is == shards(capture(recipe, tmp_path / "again"))
    for field, value in fields.items():
        more = [f"capture.{field}={value}"]
        if field == "rows_per_batch":
            more.append("capture.dtype=float32")
            as_it_is = shards(capture(recipe, tmp_path / "exact", "capture.dtype=float32"))
        out = capture(recipe, tmp_path / field, *more)
        assert shards(out) != as_it_is or Store(out).manifest["rows_per_batch"] == 1, field
        if field == "rows_per_shard":
            assert len(shards(out)) == 4 and len(as_it_is) == 1
        if field == "rows":
            assert Store(out).manifest["rows"] == 16


@pytest.mark.parametrize("wanted", [16, 32])
def test_bytes_per_position_are_what_was_asked_for(tiny_recipe: Recipe, tmp_path: Path, wanted: int) -> None:
    corpus = make_corpus(tmp_path / "long", documents=40)
    text = f"{{name: text, path: {corpus}, tokens_per_row: 256, heldout_rows: 4}}"
    for kind in (
        f"{{name: sampled, bytes_per_position: {wanted}}}",
        f"{{name: topk, bytes_per_position: {wanted}}}",
    ):
        out = capture(tiny_recipe(corpus=text, capture=kind), tmp_path / kind[7:10])
        manifest = Store(out).manifest
        files = sum(len(data) for data in shards(out).values())
        assert manifest["bytes_per_position"] == round(files / manifest["positions"], 3)
        # Ids of top-k come whole, the largest number that fits.
        assert 0.88 * wanted <= manifest["bytes_per_position"] <= 1.05 * wanted


def test_what_it_will_take_is_told_before_and_is_what_it_took(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = capture(tiny_recipe(capture=HIDDEN), tmp_path / "store")
    told = capsys.readouterr().err
    assert "positions of 60 rows, about 128 bytes each; with held-out rows and head" in told
    whole = float(told.split("held-out rows and head ")[1].split(" KiB")[0]) * 1024
    taken = sum(len(data) for name, data in content(out).items() if name.endswith(".safetensors"))
    assert whole == pytest.approx(taken, rel=0.05)


def test_the_plan_of_a_recipe_says_what_a_capture_would_take(
    tiny_recipe: Recipe, corpus_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = sum(file.stat().st_size for file in corpus_folder.iterdir()) / 3.5
    for section, each in (
        ("{bytes_per_position: 24}", 24),
        ("{threshold: 0.1}", 5 + 12 + 9),
        ("{name: topk, k: 300}", 258 * (2 + 9 / 8)),
        ("{name: topk, bytes_per_position: 10}", 3 * (2 + 9 / 8)),
        ("{name: hidden, dtype: int8}", 32 + 2),
    ):
        recipe = tiny_recipe(capture=section)
        assert main(["plan", "--json", str(recipe)]) == 0
        told = json.loads(capsys.readouterr().out)["capture"]
        assert told["bytes_per_position"] == pytest.approx(each, abs=0.15)
        assert told["bytes"] == pytest.approx(told["bytes_per_position"] * tokens, abs=each)
    steps = tiny_recipe(capture="{name: hidden, rows: steps}", train="{steps: 2, rows_per_step: 3, lr: 1e-3}")
    assert main(["plan", str(steps)]) == 0
    wanted = (
        "`potstill capture` would store hidden targets: 12.0 KiB, 64 bytes for each of about 192 tokens\n"
    )
    assert wanted in capsys.readouterr().out
    store = capture(tiny_recipe(capture=TOPK), tmp_path / "store")
    capsys.readouterr()
    assert main(["plan", "--json", str(tiny_recipe(teacher=from_store(store)))]) == 0
    assert json.loads(capsys.readouterr().out)["capture"] is None


def test_a_disk_without_room_is_refused_before_anything_is_written(
    tiny_recipe: Recipe,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe, out = tiny_recipe(capture=HIDDEN), tmp_path / "store"
    monkeypatch.setattr("potstill.workflows.capture.available", lambda *_: (10**9, 150_000))
    line = refusal(["capture", str(recipe), "--out", str(out)], capsys, tmp_path)
    assert "are needed and 146.5 KiB free. Make room" in line and not out.exists()
    for part in ("1/4", "2/4"):  # of which each has room
        assert main(["capture", str(recipe), "--out", str(out), "--part", part]) == 0
    assert main(["capture", str(recipe), "--out", str(out)]) == 0  # what is there needs no room


@pytest.mark.parametrize(
    "sections, said",
    [
        ({"teacher": "{name: fixture, vocab_size: 258}"}, "teacher.name: fixture has no targets to capture"),
        ({"objective": "{divergence: reverse_kl}"}, "unbiased only for forward_kl"),
        ({"capture": "{name: topk}"}, "neither k nor bytes_per_position"),
        ({"capture": "{name: topk, k: 3, bytes_per_position: 9}"}, "k and bytes_per_position are both given"),
        ({"capture": "{threshold: 0.1, bytes_per_position: 9}"}, "threshold and bytes_per_position are both"),
        ({"capture": "{bytes_per_position: 4}"}, "one id of 258 takes 6.12. Set it higher"),
        ({"capture": "{name: topk, bytes_per_position: 2}"}, "one id of 258 takes 3.12. Set it higher"),
        ({"capture": "{threshold: 0.00001}"}, "capture.threshold"),
        ({"capture": "{dtype: int8}"}, "capture.dtype"),
    ],
)
def test_what_cannot_be_captured_is_refused(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], sections: Any, said: str
) -> None:
    recipe = tiny_recipe(**{"student": "{name: cut, layers: 2}"} | sections)
    line = refusal(["capture", str(recipe), "--out", str(tmp_path / "store")], capsys, tmp_path)
    assert said in line


def test_a_table_or_a_store_is_no_teacher_to_capture(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"logits": torch.zeros(258, 258)}, tmp_path / "table.safetensors")
    store = capture(tiny_recipe(capture=TOPK), tmp_path / "store")
    capsys.readouterr()
    for teacher in ("{name: table, path: table.safetensors}", from_store(store)):
        recipe = tiny_recipe(teacher=teacher)
        line = refusal(["capture", str(recipe), "--out", str(tmp_path / "more")], capsys, tmp_path)
        assert "has no targets to capture. Give a teacher of name torch" in line


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b", "1/2/3", "-1/2", ""])
def test_a_part_that_is_none_is_refused(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    line = refusal(
        ["capture", str(tiny_recipe()), f"--part={part}", "--out", str(tmp_path / "x")], capsys, tmp_path
    )
    assert "is not I/N with I from 1 to N" in line


def test_hidden_states_that_are_not_finite_are_refused(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = TorchTeacher.targets

    def broken(self: TorchTeacher, batch: Batch) -> HiddenTargets:
        found = real(self, batch)
        if 20 in batch.rows_B.tolist():
            found.hidden_NE[-1, 3] = torch.nan
        return found

    monkeypatch.setattr(TorchTeacher, "targets", broken)
    out = tmp_path / "store"
    assert main(["capture", str(tiny_recipe(capture=CAPTURE)), "--out", str(out)]) == 2
    assert "hidden states are not finite in rows [16, 17, 18," in capsys.readouterr().err
    assert (out / "00000.safetensors").exists() and not (out / "00001.safetensors").exists()


# --- cut off and gone on with


class Killed(BaseException):
    """What no handler takes for its own."""


def killed_at(number: int, torn: float | None, recipe: Path, out: Path) -> bool:
    """Capture until the `number`-th file takes its name; what it was written to is cut to a part."""
    replace, calls = os.replace, [0]

    def die(source: Any, target: Any) -> None:
        calls[0] += 1
        if calls[0] == number:
            if torn is not None:
                os.truncate(source, int(os.path.getsize(source) * torn))
            else:
                replace(source, target)
            raise Killed
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", die)
        try:
            main(["capture", str(recipe), "--out", str(out)])
        except Killed:
            return True
    return False


def test_a_capture_that_was_killed_goes_on_to_the_same_store(tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(capture=CAPTURE)
    whole = content(capture(recipe, tmp_path / "whole"))
    for number in (1, 3, 4, 7, 13, 14):
        out = tmp_path / f"cut-{number}"
        assert killed_at(number, 0.6 if number % 2 else None, recipe, out)
        assert not (out / MANIFEST).exists() or number == 14
        if number == 7:
            assert killed_at(2, 0.1, recipe, out), "and once more"
        capture(recipe, out)
        assert content(out) == whole, number


def test_a_whole_store_is_not_captured_again(tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe, out = tiny_recipe(capture=CAPTURE), tmp_path / "store"
    whole = content(capture(recipe, out))
    times = {name: (out / name).stat().st_mtime_ns for name in whole if name != MANIFEST}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("potstill.workflows.capture.capture_shard", None)
        patch.setattr("potstill.workflows.capture.certificate", None)
        capture(recipe, out)
    assert content(out) == whole
    assert times == {name: (out / name).stat().st_mtime_ns for name in whole if name != MANIFEST}


@pytest.mark.parametrize(
    "change, named",
    [
        ("capture.threshold=0.1", "another kind.threshold: 0.05, not 0.1"),
        ("capture.seed=3", "another kind.seed: 0, not 3"),
        ("capture.rows=steps", "another positions: "),
        ("capture.rows_per_batch=4", "another rows_per_batch: 8, not 4"),
        ("capture.rows_per_shard=8", "another rows_per_shard: 16, not 8"),
        ("objective.temperature=2.0", "another temperature: 1.0, not 2.0"),
        ("teacher.dtype=bfloat16", "another teacher.dtype: 'float32', not 'bfloat16'"),
        ("corpus.tokens_per_row=16", "another corpus.fingerprint: "),
    ],
)
def test_a_capture_does_not_go_on_with_other_settings(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, named: str
) -> None:
    recipe, out = tiny_recipe(capture=CAPTURE), tmp_path / "store"
    capture(recipe, out, "--part", "1/4")
    capsys.readouterr()
    line = refusal(["capture", str(recipe), change, "--out", str(out)], capsys, tmp_path)
    assert named in line


def test_a_capture_of_other_settings_of_its_kind_is_named_too(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = capture(tiny_recipe(capture="{bytes_per_position: 24}"), tmp_path / "store")
    for section, named in (
        ("{bytes_per_position: 20}", "another kind.bytes_per_position: 24.0, not 20.0"),
        (HIDDEN, "another kind."),
    ):
        capsys.readouterr()
        line = refusal(["capture", str(tiny_recipe(capture=section)), "--out", str(out)], capsys, tmp_path)
        assert named in line


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"kind": 3}'])
def test_a_damaged_beginning_is_one_line(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "capture.json").write_text(text)
    recipe = tiny_recipe(capture="{bytes_per_position: 24}")
    line = refusal(["capture", str(recipe), "--out", str(tmp_path / "store")], capsys, tmp_path)
    assert "store" in line


# --- parts, and the verbs of a store


def test_parts_are_the_whole_whoever_wrote_them(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(capture=CAPTURE)
    whole = content(capture(recipe, tmp_path / "whole"))
    one_folder = tmp_path / "one"
    for part in ("2/2", "1/2"):
        capture(recipe, one_folder, "--part", part)
    assert content(one_folder) == whole

    parts = [capture(recipe, tmp_path / part[0], "--part", part) for part in ("1/3", "2/3", "3/3")]
    assert not any((part / MANIFEST).exists() for part in parts)
    out = str(tmp_path / "merged")
    capsys.readouterr()
    assert main(["store", "merge", *map(str, parts[:2]), "--out", out]) == 2
    assert "2 shards are missing: merge the other parts, too" in capsys.readouterr().err
    assert main(["store", "merge", str(parts[2]), "--out", out]) == 0
    assert content(Path(out)) == whole


def test_a_teacher_may_lie_elsewhere_on_the_machine_of_another_part(
    tiny_recipe: Recipe, teacher_folder: Path, tmp_path: Path
) -> None:
    recipe, out = tiny_recipe(capture=CAPTURE), str(tmp_path / "merged")
    moved = f"teacher.model={shutil.copytree(teacher_folder, tmp_path / 'moved')}"
    parts = [
        str(capture(recipe, tmp_path / "1", "--part", "1/2")),
        str(capture(recipe, tmp_path / "2", "--part", "2/2", moved)),
    ]
    assert main(["store", "merge", *parts, "--out", out]) == 0
    assert main(["store", "verify", out]) == 0
    one_folder = capture(recipe, tmp_path / "one", "--part", "1/2")
    capture(recipe, one_folder, "--part", "2/2", moved)
    assert main(["store", "verify", str(one_folder)]) == 0


def test_more_parts_than_shards_are_the_whole_too(tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(capture="{threshold: 0.05, rows_per_shard: 40}")  # two shards
    whole = content(capture(recipe, tmp_path / "whole"))
    for number in (3, 1, 4, 2):
        capture(recipe, tmp_path / "parts", "--part", f"{number}/4")
    assert content(tmp_path / "parts") == whole


def test_a_store_is_shown_and_verified(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(capture(tiny_recipe(capture=CAPTURE), tmp_path / "store"))
    assert "bytes per position" in capsys.readouterr().out
    assert main(["store", "show", out]) == 0
    shown = capsys.readouterr().out
    assert '"threshold": 0.05' in shown and "gradient_cosine" in shown and 'sha256": [' not in shown
    table = shown.partition("certificate  ")[2]
    assert "gradient_cosine" in table and max(map(len, table.splitlines())) < 60
    assert main(["store", "show", "--json", out]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rows"] == 60 and told["certificate"]["positions"] == 128 and "files" not in told
    assert told["certificate"]["student"]["name"] == "cut"  # whose gradient it was
    assert main(["store", "verify", out]) == 0
    assert capsys.readouterr().out == f"{out}: sound, to the last byte\n"

    shard = tmp_path / "store" / "00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x55")
    assert main(["store", "verify", out]) == 2
    told_of = capsys.readouterr()
    assert told_of.out == f"{out}: 1 flaw\n"
    assert told_of.err.startswith(f"error: {shard}: damaged: block 0 is not what was written.")
    assert main(["store", "verify", "--json", out]) == 2
    assert len(json.loads(capsys.readouterr().out)[out]) == 1


@pytest.mark.parametrize(
    "arguments", [["merge", "x"], ["verify", "x", "--out", "y"], ["show", "x"], ["verify", "x"]]
)
def test_a_verb_of_a_store_without_one_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(["store", *arguments], capsys, tmp_path)
