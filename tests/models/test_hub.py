"""A model named `owner/name@revision`: one commit for all of its files, in the receipt, and again on --resume."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from conftest import make_model
from cut_off import cut_off
from publish.hub import Hub, Repo, Tree, loopback
from publish.lab import TOKEN, point_at
from refusals import refusal

import potstill
from potstill import UserError
from potstill.build.resolve import pin
from potstill.cli.main import main
from potstill.models.load import load_config, weights_sha256
from potstill.models.student import from_checkpoint
from potstill.runs.run_dir import RunDir

Recipe = Callable[..., Path]
NAME = "me/model"
RUN = "{steps: 2, rows_per_step: 2, lr: 1e-3, device: cpu, save_every: 1}"


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three states of one model, each with weights and a config of its own."""
    folder = tmp_path_factory.mktemp("states")
    return {
        name: make_model(folder / name, seed=seed, num_hidden_layers=2, rms_norm_eps=10.0**-seed)
        for seed, name in enumerate(("old", "new", "newest"), start=4)
    }


def push(repo: Repo, folder: Path) -> str:
    tree: Tree = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
    return repo.commit(tree, folder.name)


@pytest.fixture
def hub(trees: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A model whose main is `new`, and whose tag v1 is `old`. The cache is empty."""
    with loopback(TOKEN) as hub:
        point_at(hub, monkeypatch)
        for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
            monkeypatch.setattr(huggingface_hub.constants, name, 30)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        repo = hub.repos[NAME] = Repo(private=False)
        repo.tags["v1"] = push(repo, trees["old"])
        push(repo, trees["new"])
        yield hub


def weights_of(folder: Path) -> str:
    return weights_sha256(from_checkpoint(folder, "cpu"))  # type: ignore[arg-type]


def fetched(hub: Hub) -> set[str]:
    """The revisions of all files that were downloaded."""
    found = (re.match(rf"/{NAME}/resolve/([^/]+)/", request.path) for request in hub.requests)
    return {match[1] for match in found if match}


@pytest.mark.parametrize("revision", ["", "@v1", "@COMMIT"])
def test_a_revision_is_one_commit_for_everything_and_the_receipt_has_it(
    hub: Hub, trees: dict[str, Path], tiny_recipe: Recipe, tmp_path: Path, revision: str
) -> None:
    repo = hub.repos[NAME]
    commit, state = (repo.tags["v1"], "old") if revision else (repo.head, "new")
    source = NAME + revision.replace("COMMIT", commit)

    def moving(number: int, request: Any) -> None:  # while the first file is fetched, the branch moves on
        if f"/{NAME}/resolve/" in request.path and repo.messages[-1] != "newest":
            push(repo, trees["newest"])

    hub.before = moving
    student = f"{{name: checkpoint, model: {source}}}"
    corpus = (
        (tiny_recipe().read_text().split("\n")[0]).partition(": ")[2].replace("}", f", tokenizer: {source}}}")
    )
    recipe = tiny_recipe(
        corpus=corpus,
        teacher=f"{{name: torch, model: {source}}}",
        student=student,
        train=RUN,
        allow_identical="true",
    )
    run = potstill.distill(recipe, out=tmp_path / "run")
    assert repo.messages[-1] == "newest" and fetched(hub) == {commit}
    receipt = run.receipt()
    assert receipt["commits"] == {source if revision else f"{NAME}@main": commit}
    assert receipt["teacher"]["source"] == receipt["student"]["model"] == f"{NAME}@{commit}"
    assert receipt["teacher"]["weights_sha256"] == weights_of(trees[state])
    assert (
        json.loads((run.student / "config.json").read_text())["rms_norm_eps"]
        == {"old": 1e-4, "new": 1e-5}[state]
    )


def test_a_resumed_run_has_the_commit_that_it_was_started_with(
    hub: Hub,
    trees: dict[str, Path],
    tiny_recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    commit = hub.repos[NAME].head
    recipe = tiny_recipe(
        teacher=f"{{name: torch, model: {NAME}}}", student="{name: cut, layers: 1}", train=RUN
    )

    cut_off(recipe, tmp_path / "run", 2, monkeypatch)
    push(hub.repos[NAME], trees["newest"])
    other = ["distill", str(recipe), f"teacher.model={NAME}@v1", "--resume", "--out", str(tmp_path / "run")]
    line = refusal(other, capsys, tmp_path / "run")
    assert "teacher.model" in line and commit in line and hub.repos[NAME].tags["v1"] in line
    run = potstill.distill(recipe, out=tmp_path / "run", resume=True)
    assert run.receipt()["commits"] == {f"{NAME}@main": commit}
    assert run.receipt()["teacher"]["weights_sha256"] == weights_of(trees["new"])
    assert main(["eval", str(run.path)]) == 0  # with the run's commit, too
    assert hub.repos[NAME].head not in fetched(hub)


def test_a_run_that_recorded_no_commits_is_resumed(hub: Hub, tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        teacher=f"{{name: torch, model: {NAME}}}", student="{name: cut, layers: 1}", train=RUN
    )
    run = potstill.distill(recipe, out=tmp_path / "run")
    run.resolved.write_text(run.resolved.read_text().replace(f"{NAME}@{hub.repos[NAME].head}", NAME))
    environment = json.loads((run.path / "environment.json").read_text())
    del environment["commits"]
    (run.path / "environment.json").write_text(json.dumps(environment))
    assert potstill.distill(recipe, out=tmp_path / "run", resume=True).status()["state"] == "finished"


def test_all_arms_of_a_comparison_have_one_commit(
    hub: Hub, trees: dict[str, Path], tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from potstill.workflows import compare

    commit, distill = hub.repos[NAME].head, compare.distill

    def moving(*arguments: Any, **options: Any) -> RunDir:
        push(hub.repos[NAME], trees["newest"])
        return distill(*arguments, **options)

    monkeypatch.setattr(compare, "distill", moving)
    recipe = tiny_recipe(
        teacher=f"{{name: torch, model: {NAME}}}",
        student="{name: cut, layers: 1}",
        train=RUN,
        compare="{seeds: [0]}",
    )
    potstill.compare(recipe, out=tmp_path / "all")
    for arm in ("ce-0", "kd-0"):
        assert RunDir(tmp_path / "all" / arm).receipt()["teacher"]["source"] == f"{NAME}@{commit}"
    monkeypatch.setattr(compare, "distill", distill)
    assert potstill.compare(recipe, out=tmp_path / "all", resume=True) == tmp_path / "all"


def test_a_store_records_the_commit_and_is_continued_with_it(
    hub: Hub, trees: dict[str, Path], tiny_recipe: Recipe, tmp_path: Path
) -> None:
    commit = hub.repos[NAME].head
    recipe = tiny_recipe(
        teacher=f"{{name: torch, model: {NAME}}}", student="{name: cut, layers: 1}", train=RUN
    )
    store = ["capture", str(recipe), "--out", str(tmp_path / "store")]
    assert main(store) == 0
    push(hub.repos[NAME], trees["newest"])
    assert main(store) == 0
    assert (
        json.loads((tmp_path / "store" / "manifest.json").read_text())["teacher"]["source"]
        == f"{NAME}@{commit}"
    )
    stored = ["teacher={name: store, path: " + str(tmp_path / "store") + "}"]
    run = potstill.distill(recipe, overrides=stored, out=tmp_path / "run")
    assert run.receipt()["teacher"]["source"] == f"{NAME}@{commit}" and fetched(hub) == {commit}


PLUGIN = """{future}
from dataclasses import dataclass
from typing import Literal
from potstill.recipe.fields import ModelSource
from potstill.recipe.sections_models import TeacherConfig
from potstill.registry import register


@register("teacher")
@dataclass(frozen=True, kw_only=True)
class OwnTeacherConfig(TeacherConfig):
    name: Literal["own"] = "own"
    base: ModelSource
    other: ModelSource | None = None
    title: str = "me/model"
"""


@pytest.mark.parametrize("future", ["", "from __future__ import annotations"])
def test_a_plug_in_s_models_are_pinned_too(
    hub: Hub, tiny_recipe: Recipe, tmp_path: Path, future: str
) -> None:
    (tmp_path / "own.py").write_text(PLUGIN.format(future=future))
    teacher = f"{{name: own, base: {NAME}, other: {NAME}@v1}}"
    loaded = potstill.load_recipe(tiny_recipe(teacher=teacher, plugins="[own.py]"))
    config: Any = pin(loaded, {})[0].teacher
    new, old = hub.repos[NAME].head, hub.repos[NAME].tags["v1"]
    assert (config.base, config.other, config.title) == (f"{NAME}@{new}", f"{NAME}@{old}", NAME)


def test_without_a_network_what_is_cached_is_read_by_every_name_that_fetched_it(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, old = hub.repos[NAME].head, hub.repos[NAME].tags["v1"]
    names = {
        NAME: 1e-5,
        f"{NAME}@main": 1e-5,
        f"{NAME}@v1": 1e-4,
        f"{NAME}@{new}": 1e-5,
        f"{NAME}@{old}": 1e-4,
    }
    for name in (NAME, f"{NAME}@v1"):
        load_config(name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name, eps in names.items():
        assert load_config(name).rms_norm_eps == eps
    with pytest.raises(UserError, match=r"me/model@v2: .* HF_HUB_OFFLINE is set"):
        load_config(f"{NAME}@v2")


@pytest.mark.parametrize(
    ("field", "source", "expected"),
    [
        ("teacher.model", f"{NAME}@v7", "'v7'"),
        ("teacher.model", f"{NAME}@refs/pr/7", "'refs/pr/7'"),
        ("teacher.model", f"{NAME}@{'0' * 40}", "0" * 40),
        ("teacher.model", "me/nothing", "no such model"),
        ("corpus.tokenizer", f"{NAME}@v7", "'v7'"),
        ("corpus.tokenizer", "me/nothing", "no such model"),
    ],
)
def test_a_name_that_the_hub_does_not_have_is_one_line_of_whole_sentences(
    hub: Hub, tiny_recipe: Recipe, tmp_path: Path, capsys: Any, field: str, source: str, expected: str
) -> None:
    command = ["distill", str(tiny_recipe()), f"{field}={source}", "--out", str(tmp_path / "run")]
    line = refusal(command, capsys, tmp_path / "run")
    assert field in line and source in line and expected in line
    assert not re.search(r"[^.!?…:,] (Check|Name|Ask|Please|Make)\b", line)


def test_a_hub_that_fails_is_one_line_of_whole_sentences(
    hub: Hub, tiny_recipe: Recipe, tmp_path: Path, capsys: Any
) -> None:
    hub.before = lambda number, request: "500"
    line = refusal(["plan", str(tiny_recipe()), f"teacher.model={NAME}"], capsys, tmp_path / "run")
    assert "500" in line and line.endswith(" Check the name, the network and HF_TOKEN.")
    assert not re.search(r"[^.!?…:,] (Check|For|An)\b", line)


@pytest.mark.parametrize("folder", ["home/model@v1", "a@b/c/model"])
def test_a_folder_with_an_at_sign_is_a_folder(
    trees: dict[str, Path], tiny_recipe: Recipe, tmp_path: Path, folder: str
) -> None:
    (tmp_path / folder).parent.mkdir(parents=True)
    (tmp_path / folder).symlink_to(trees["old"])
    recipe = tiny_recipe(teacher=f"{{name: torch, model: {folder}}}", student="{name: cut, layers: 1}")
    assert main(["plan", str(recipe)]) == 0


def test_an_adapter_names_its_base_on_the_hub_and_its_commit(
    hub: Hub, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    pytest.importorskip("peft", reason="the extra lora is not installed; not run")
    student = f"{{name: checkpoint, model: {NAME}, lora: {{rank: 2, targets: [q_proj]}}}}"
    recipe = tiny_recipe(
        student=student, teacher=f"{{name: torch, model: {NAME}}}", train=RUN, allow_identical="true"
    )
    run = potstill.distill(recipe, out=tmp_path / "run")
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == NAME and config["revision"] == hub.repos[NAME].head
