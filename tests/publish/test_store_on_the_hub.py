"""A store of targets is pushed to a Hub on this machine and pulled again, as plain files, byte for byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from potstill.cli.main import main
from publish.hub import Hub
from publish.lab import TOKEN

REPO = "me/targets"


@pytest.fixture
def store(tiny_recipe: Callable[..., Path], tmp_path: Path) -> Path:
    path = tmp_path / "store"
    assert main(["capture", str(tiny_recipe()), "capture.rows_per_shard=64", "--out", str(path)]) == 0
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_a_pushed_store_is_pulled_unchanged(
    store: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["store", "push", str(store), "--repo", REPO, "--private"]) == 0
    assert hub.repos[REPO].private
    assert main(["store", "pull", str(tmp_path / "back"), "--repo", REPO]) == 0
    assert contents(tmp_path / "back") == contents(store)
    capsys.readouterr()
    assert main(["store", "push", str(store), "--repo", REPO, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == len(contents(store))
    assert len(hub.repos[REPO].messages) == 2  # the second push found everything there


def test_a_damaged_store_is_not_pushed_and_a_damaged_download_is_reported(
    store: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = store / "00000.safetensors"
    sound = shard.read_bytes()
    shard.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    assert main(["store", "push", str(store), "--repo", REPO]) == 2
    assert "00000.safetensors: damaged" in capsys.readouterr().err
    assert hub.requests == []
    shard.write_bytes(sound)
    assert main(["store", "push", str(store), "--repo", REPO]) == 0
    hub.corrupts = "00000.safetensors"
    shutil.rmtree(store)
    assert main(["store", "pull", str(store), "--repo", REPO]) == 2
    assert "00000.safetensors: damaged" in capsys.readouterr().err


def test_a_missing_repository_is_one_line(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["store", "pull", str(tmp_path / "back"), "--repo", "me/nothing"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "me/nothing" in error and TOKEN not in error


def test_flags_go_with_their_verbs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", "verify", str(tmp_path), "--repo", REPO]) == 2
    assert main(["store", "push", str(tmp_path)]) == 2
    assert main(["store", "merge", str(tmp_path)]) == 2
    assert main(["store", "pull", str(tmp_path), str(tmp_path), "--repo", REPO]) == 2
    assert capsys.readouterr().err.count("\n") == 4
