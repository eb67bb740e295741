"""Data sets of the hub: by name, revision, subset and split, streamed into the token cache, one commit for ever."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cut_off import cut_off
from publish.hub import Hub, Repo, Tree, loopback
from publish.lab import TOKEN, point_at
from refusals import refusal

import potstill
from potstill.cli.main import main
from potstill.publish.licenses import license_of
from potstill.recipe.load import load

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

Recipe = Callable[..., Path]
NAME = "me/texts"
LINES = [f"the cat number {number} sat on the mat and looked at the dog" for number in range(60)]
CARD = """---
configs:
- config_name: plain
  default: true
  data_files: [{{split: train, path: plain/*.parquet}}, {{split: test, path: plain-test.parquet}}]
- config_name: other
  data_files: [{{split: train, path: other.parquet}}]
dataset_info:
- config_name: plain
  splits: [{{name: train, num_examples: {examples}}}]
---
"""


def table(lines: list[str], column: str = "text") -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.table({column: lines, "length": [len(line) for line in lines]}), file)
    return file.getvalue()


def json_lines(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def tree(lines: list[str], examples: int = 60) -> Tree:
    """Two files of a split, another split, and another subset."""
    return {
        "README.md": CARD.format(examples=examples).encode(),
        "plain/0.parquet": table(lines[:30]),
        "plain/1.parquet": table(lines[30:]),
        "plain-test.parquet": table([f"test {line}" for line in lines]),
        "other.parquet": table([f"other {line}" for line in lines], "body"),
    }


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import HfFileSystem, constants

    with loopback(TOKEN) as hub:
        point_at(hub, monkeypatch)
        for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
            monkeypatch.setattr(constants, name, 30)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        HfFileSystem.clear_instance_cache()
        repo = hub.repos[f"datasets/{NAME}"] = Repo(private=False)
        repo.tags["v1"] = repo.commit(tree(LINES), "first")
        repo.commit(tree([f"newer {line}" for line in LINES]), "second")
        yield hub


@pytest.fixture
def with_template(teacher_folder: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(teacher_folder, tmp_path / "with_template"))
    (folder / "chat_template.jinja").write_text(
        "{% for each in messages %}{{ each['role'] }}: {{ each['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return folder


def corpus(more: str = "", path: str = NAME, name: str = "hf") -> str:
    return f"{{name: {name}, path: {path}, tokens_per_row: 32, heldout_rows: 2, shards: tokens{more}}}"


def documents(recipe: Path, capsys: pytest.CaptureFixture[str], *more: str) -> list[str]:
    """What `rows --documents` prints of each, without the marks."""
    assert main(["rows", str(recipe), "--documents", "--limit", "99", *more]) == 0
    lines = capsys.readouterr().out.replace("⟦", "").replace("⟧", "").splitlines()
    return [line for line in lines if not line.startswith("---")]


def test_name_revision_subset_and_split_choose_the_records(
    hub: Hub, tiny_recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    def begin(more: str = "", path: str = NAME) -> str:
        return documents(tiny_recipe(corpus=corpus(more, path)), capsys)[0]

    assert begin(", split: train").startswith("newer the cat number 0 ")
    assert begin(", split: train", f"{NAME}@v1").startswith("the cat number 0 ")
    assert begin(", split: test", f"{NAME}@v1").startswith("test the cat number 0 ")
    assert begin(", subset: other, column: body").startswith("other newer the cat number 0 ")


def test_a_run_reads_the_hub_once_and_its_resume_has_the_commit_it_was_started_with(
    hub: Hub,
    tiny_recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    repo = hub.repos[f"datasets/{NAME}"]
    commit = repo.head
    train = "{steps: 4, rows_per_step: 2, lr: 1e-3, device: cpu, save_every: 1}"
    recipe = tiny_recipe(corpus=corpus(", split: train"), train=train)
    cut_off(recipe, tmp_path / "run", 2, monkeypatch)
    repo.commit(tree(["moved on"] * 60), "third")
    hub.requests.clear()
    run = potstill.distill(recipe, out=tmp_path / "run", resume=True)
    assert not [request for request in hub.requests if "datasets" in request.path]
    assert run.receipt()["commits"] == {f"datasets/{NAME}@main": commit}
    assert json.loads((run.path / "corpus.json").read_text())["reading"]["dataset"] == {
        "name": NAME,
        "commit": commit,
        "subset": "plain",
        "split": "train",
        "records": 60,
    }
    assert main(["eval", str(run.path)]) == 0
    assert not [request for request in hub.requests if "/resolve/" in request.path]
    again = tmp_path / "again"
    line = refusal(["distill", str(recipe), "--out", str(again)], capsys, again)
    assert "corpus.path was" in line and commit[:8] in line


def test_prompts_of_the_hub_are_read_at_every_start_and_are_of_one_commit(
    hub: Hub, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(
        corpus=f"{{name: prompts, path: {NAME}, field: text, split: train, tokens_per_row: 128, heldout_rows: 2}}",
        rollouts="{max_new_tokens: 4}",
    )
    whole = potstill.distill(recipe, out=tmp_path / "whole")
    cut_off(recipe, tmp_path / "run", 2, monkeypatch)
    hub.repos[f"datasets/{NAME}"].commit(tree([f"newest {line}" for line in LINES]), "third")
    again = potstill.distill(recipe, out=tmp_path / "run", resume=True)
    assert again.receipt()["student"] == whole.receipt()["student"]
    assert again.receipt()["commits"] == whole.receipt()["commits"]


def test_more_records_than_the_card_says_are_read(
    hub: Hub, tiny_recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    stale = hub.repos["datasets/me/stale"] = Repo(private=False)
    stale.commit(tree(LINES, examples=50), "a card of before")
    assert len(documents(tiny_recipe(corpus=corpus(", split: train", "me/stale")), capsys)) == 60


def test_the_first_records_and_no_more(
    hub: Hub, tiny_recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(corpus=corpus(", split: train, records: 7"))
    assert len(documents(recipe, capsys)) == 7
    assert not [request for request in hub.requests if request.path.endswith("1.parquet")]


def test_conversations_of_a_data_set(
    hub: Hub, tiny_recipe: Recipe, with_template: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [
        {"role": "user", "content": "how is the cat"},
        {"role": "assistant", "content": "the cat is well"},
    ]
    repo = hub.repos["datasets/me/chats"] = Repo(private=False)
    repo.commit({"train.jsonl": json_lines([{"messages": turns}] * 40)}, "chats")
    recipe = tiny_recipe(corpus=corpus(f", tokenizer: {with_template}", "me/chats", "chat"))
    assert any("the cat is well" in line for line in documents(recipe, capsys))


@pytest.mark.parametrize(
    ("more", "path", "said"),
    [
        ("", NAME, "corpus.split: me/texts@COMMIT has the splits train, test; the recipe names none."),
        (", split: dev", NAME, "has the splits train, test; the recipe names 'dev'."),
        (", subset: third", NAME, "Set corpus.subset."),
        (", split: train, column: body", NAME, "no column 'body'; found text, length. Set corpus.column."),
        (", split: train", "me/none", "corpus.path: me/none@main: no such file or folder here"),
        (", split: train", f"{NAME}@v9", "no revision 'v9'. Name a branch, tag or commit of me/texts."),
        (
            ", split: train",
            "me/short",
            "59 records were read, and its card says 60. Set corpus.records to 59",
        ),
        (", split: train, records: 70", "me/short", "59 records were read, and its card says 60."),
        (", split: train", "me/bad", "the data set cannot be read on"),
    ],
)
def test_what_the_hub_does_not_have_is_one_line(
    hub: Hub,
    tiny_recipe: Recipe,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: str,
    path: str,
    said: str,
) -> None:
    short = hub.repos["datasets/me/short"] = Repo(private=False)
    short.commit(tree(LINES[:59]), "one is missing")
    bad = hub.repos["datasets/me/bad"] = Repo(private=False)
    whole = tree(LINES)
    cut = whole["plain/1.parquet"]
    bad.commit(whole | {"plain/1.parquet": cut[:200] + bytes(200) + cut[400:]}, "a damaged file")
    recipe = tiny_recipe(corpus=corpus(more, path))
    line = refusal(["distill", str(recipe), "--out", str(tmp_path / "run")], capsys, tmp_path / "run")
    assert said.replace("COMMIT", hub.repos[f"datasets/{NAME}"].head) in line
    assert not (recipe.parent / "tokens").exists()


def test_the_license_is_that_of_the_data_set_and_not_of_a_model_of_its_name(
    hub: Hub,
) -> None:
    data = hub.repos[f"datasets/{NAME}"]
    data.commit(data.tree("main") | {"README.md": b"---\nlicense: cc-by-4.0\n---\n"}, "license")
    model = hub.repos[NAME] = Repo(private=False)
    model.commit({"README.md": b"---\nlicense: mit\n---\n"}, "a model")
    assert license_of(NAME, "data")["license"] == "cc-by-4.0"
    assert license_of(NAME)["license"] == "mit"


def test_a_plan_does_not_know_how_much_there_is(
    hub: Hub, tiny_recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    train = "{epochs: 3, rows_per_step: 4, lr: 1e-3, warmup: 30, save_every: 10, device: cpu}"
    recipe = str(tiny_recipe(corpus=corpus(", split: train"), train=train))
    assert main(["plan", recipe]) == 0
    assert "corpus: on the hub; how many tokens it has is not known" in capsys.readouterr().out
    assert main(["plan", recipe, "--measure"]) == 0  # reads it
    capsys.readouterr()
    assert main(["plan", recipe]) == 0
    assert "is not known" not in capsys.readouterr().out
    hub.requests.clear()
    assert main(["plan", recipe, "--measure"]) == 0
    assert not [request for request in hub.requests if "/resolve/" in request.path]


def test_what_an_earlier_load_left_is_not_taken_for_the_commit(
    hub: Hub,
    tiny_recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    datasets.load_dataset(NAME, split="train", verification_mode="no_checks")
    commit = hub.repos[f"datasets/{NAME}"].tags["v1"]
    recipe = tiny_recipe(corpus=corpus(", split: train", f"{NAME}@{commit}"))
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    line = refusal(["distill", str(recipe), "--out", str(tmp_path / "run")], capsys, tmp_path / "run")
    assert f"{NAME}@{commit}: the data set cannot be opened: " in line


def test_without_a_folder_for_its_tokens_it_is_refused(
    hub: Hub, tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(corpus=corpus(", split: train").replace(", shards: tokens", ""))
    line = refusal(["distill", str(recipe), "--out", str(tmp_path / "run")], capsys, tmp_path / "run")
    assert "corpus.shards: name a folder." in line


def test_files_are_not_selected_from(
    tiny_recipe: Recipe, tmp_path: Path, with_template: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, path in (("chat", tmp_path), ("hf", tmp_path)):
        for more, field in ((", subset: a", "subset"), (", records: 3", "records")):
            more = f"{more}, tokenizer: {with_template}"
            recipe = tiny_recipe(corpus=corpus(more, str(path), name).replace(", shards: tokens", ""))
            line = refusal(["distill", str(recipe), "--out", str(tmp_path / "run")], capsys, tmp_path / "run")
            assert f"corpus.{field}: {path} is no data set of the hub." in line


def test_a_recipe_keeps_the_name_that_was_given(tiny_recipe: Recipe) -> None:
    assert load(tiny_recipe(corpus=corpus(path=f"{NAME}@v1"))).corpus.origin == f"{NAME}@v1"
