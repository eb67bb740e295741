"""What a run saves is on the disk before it takes its name, and is what was saved when it is used."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from potstill import UserError, distill
from potstill.cli.main import main
from potstill.runs.run_dir import RunDir
from potstill.training import checkpoint

Recipe = Callable[..., Path]
TRAIN = "{steps: 6, rows_per_step: 4, lr: 1e-3, device: cpu, save_every: 2}"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, str]]:
    """Every fsync, rename and new folder under the run's folder, in order, by name."""
    seen: list[tuple[str, str]] = []
    fsync, rename, replace, mkdir = os.fsync, os.rename, os.replace, os.mkdir
    run = str(tmp_path / "run")

    def note(what: str, path: Any) -> None:
        if (name := os.fspath(path)).startswith(run):
            seen.append((what, name.removeprefix(run).lstrip("/")))

    def noting_fsync(descriptor: int) -> None:
        note("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def noting_rename(source: Any, target: Any, **more: Any) -> None:
        note("rename", target)
        rename(source, target, **more)

    def noting_replace(source: Any, target: Any, **more: Any) -> None:
        note("rename", target)
        replace(source, target, **more)

    def noting_mkdir(path: Any, *mode: Any, **more: Any) -> None:
        note("mkdir", path)
        mkdir(path, *mode, **more)

    monkeypatch.setattr(os, "mkdir", noting_mkdir)
    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "rename", noting_rename)
    monkeypatch.setattr(os, "replace", noting_replace)
    return seen


@pytest.fixture
def recipe(tiny_recipe: Recipe) -> Path:
    return tiny_recipe(train=TRAIN)


def test_everything_is_on_the_disk_before_it_takes_its_name_and_its_name_after(
    recipe: Path, tmp_path: Path, calls: list[tuple[str, str]]
) -> None:
    distill(recipe, out=tmp_path / "run")
    names = {path.name for path in (tmp_path / "run" / "student").iterdir()}
    for place, files in {
        "checkpoints/00000002": {"tensors.safetensors", "state.json", "manifest.json"},
        "student": names,
    }.items():
        at = calls.index(("rename", place))
        before = {name for what, name in calls[:at] if what == "fsync"}
        assert {f"{place}.new", *(f"{place}.new/{file}" for file in files)} <= before
        after = [name for what, name in calls[at + 1 :] if what == "fsync"]
        assert after[0] == os.path.dirname(place)
    assert calls[calls.index(("mkdir", "checkpoints")) + 1] == ("fsync", "")
    for name in ("status.json", "receipt.json", "inputs.json"):
        at = calls.index(("rename", name))
        assert calls[at - 1] == ("fsync", f"{name}.new") and calls[at + 1] == ("fsync", "")


def test_no_older_checkpoint_goes_before_the_new_one_is_read_back(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third is damaged as it takes its name: the two before it are there."""
    rename = Path.rename

    def damaging(self: Path, target: Path) -> Path:
        if target.name == "00000006":
            (self / "tensors.safetensors").write_bytes(b"\0" * 99)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", damaging)
    with pytest.raises(UserError, match="00000006: read back, the checkpoint is damaged"):
        distill(recipe, out=tmp_path / "run")
    found = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert found == ["00000002", "00000004", "00000006"]


def test_checkpoints_are_ordered_by_number(tmp_path: Path) -> None:
    for step in ("99999998", "100000000", "00000002"):
        (tmp_path / step).mkdir()
    found = checkpoint.Checkpoints(tmp_path, {}, print)._newest_first()
    assert [path.name for path in found] == ["100000000", "99999998", "00000002"]


@pytest.fixture
def finished(recipe: Path, tmp_path: Path) -> Path:
    return distill(recipe, out=tmp_path / "run").path


@pytest.fixture
def no_root(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """A path whose opening and listing the system refuses: who tests may be root, whom no mode stops."""

    def refuse(path: Path) -> None:
        scandir, io_open = os.scandir, Path.open

        def refused(at: Any) -> bool:
            return isinstance(at, str | os.PathLike) and os.fspath(at) == str(path)

        def scanning(at: Any = ".") -> Any:
            if refused(at):
                raise PermissionError(13, "Permission denied", str(at))
            return scandir(at)

        def opening(self: Path, *arguments: Any, **more: Any) -> Any:
            if refused(self):
                raise PermissionError(13, "Permission denied", str(self))
            return io_open(self, *arguments, **more)

        monkeypatch.setattr(os, "scandir", scanning)
        monkeypatch.setattr(Path, "open", opening)

    return refuse


@pytest.mark.parametrize(
    "unreadable",
    ["checkpoints", *(f"checkpoints/00000006/{name}" for name in ("manifest.json", *checkpoint.FILES))],
)
def test_what_cannot_be_read_is_neither_none_nor_deleted(
    recipe: Path, finished: Path, unreadable: str, no_root: Callable[[Path], None]
) -> None:
    RunDir(finished).set_status("stopped")
    no_root(finished / unreadable)
    with pytest.raises(
        UserError, match=rf"{unreadable}: cannot be read: Permission denied\. Make it readable"
    ):
        distill(recipe, out=finished, resume=True)
    assert sorted(os.listdir(finished / "checkpoints")) == ["00000004", "00000006"]


@pytest.mark.parametrize("path", ["", "status.json"])
@pytest.mark.parametrize("verb", ["show", "distill"])
def test_a_run_that_cannot_be_read_is_one_line(
    recipe: Path,
    finished: Path,
    path: str,
    verb: str,
    no_root: Callable[[Path], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    no_root(finished / path)
    command = ["show", str(finished)] if verb == "show" else ["distill", str(recipe), "--out", str(finished)]
    assert main([*command, *(["--resume"] if verb != "show" else [])]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "cannot be read: Permission denied" in line


def test_a_left_over_folder_that_cannot_be_removed_is_one_line(
    recipe: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RunDir(finished).set_status("stopped")
    (finished / "checkpoints" / "00000008.new").mkdir()

    def refusing(path: Any, *arguments: Any, **more: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=r"00000008\.new: left over"),
    ):
        patch.setattr(shutil, "rmtree", refusing)
        distill(recipe, out=finished, resume=True)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut off": (lambda s: os.truncate(s / "model.safetensors", 5000), r"student/model\.safetensors: damaged"),
    "a setting": (lambda s: (s / "config.json").write_text("{}"), r"student/config\.json: damaged"),
    "a file is gone": (lambda s: (s / "tokenizer.json").unlink(), r"student/tokenizer\.json: missing"),
    "all is gone": (shutil.rmtree, r"student: no such folder"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("state", ["finished", "stopped"])
def test_a_student_that_is_not_as_it_was_saved_is_not_taken_for_it(
    recipe: Path, finished: Path, damage: str, state: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, said = DAMAGE[damage]
    spoil(finished / "student")
    RunDir(finished).set_status(state)
    with pytest.raises(UserError, match=said):
        distill(recipe, out=finished, resume=True)
    assert main(["eval", str(finished)]) == 2
    assert "error: " in capsys.readouterr().err


def test_the_sums_of_a_student_are_those_that_sha256sum_reads(finished: Path) -> None:
    done = subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=finished / "student", check=True)
    assert done.returncode == 0
    output = RunDir(finished).receipt()["output"]
    assert set(output) == {path.name for path in (finished / "student").iterdir()} and "SHA256SUMS" in output
