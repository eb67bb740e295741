"""A run that is not finished is found again: by the same command, by `latest`, and in the table of `potstill runs`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cut_off import Killed, cut_off
from refusals import refusal

from potstill import distill
from potstill.cli.main import main
from potstill.runs.places import default_path, link_latest, newest_path
from potstill.runs.run_dir import RunDir
from potstill.training.watchdog import Watchdog

Recipe = Callable[..., Path]
TRAIN = "{steps: 4, rows_per_step: 4, lr: 1e-3, device: cpu, save_every: 2}"


@pytest.fixture
def recipe(tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe in a folder of its own, where `runs/` will be."""
    monkeypatch.chdir(tmp_path)
    return tiny_recipe(train=TRAIN)


def steps_of(folder: Path) -> list[float]:
    return [line["step"] for line in RunDir(folder).metrics() if "train/loss" in line]


def table(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["runs", *arguments, "--json"]) == 0
    lines: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return lines


def test_one_command_starts_goes_on_and_is_done(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["distill", str(recipe), "--resume", "auto"]
    stopping = Watchdog.stepped

    def killed(self: Watchdog) -> None:
        stopping(self)
        if (folder := Path("runs/tiny")).exists() and len(steps_of(folder)) == 3:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Watchdog, "stepped", killed)
        main(command)
    # After step 3 was logged, or before: the checkpoint is that of step 2.
    assert Path("runs/tiny/checkpoints/00000002").exists()
    assert main(command) == 0
    assert main(command) == 0  # finished: no other run starts
    assert steps_of(Path("runs/tiny")) == [1, 2, 3, 4]
    assert [entry.name for entry in Path("runs").iterdir() if not entry.is_symlink()] == ["tiny"]
    assert main([*command, "train.steps=2"]) == 0  # another recipe
    assert steps_of(Path("runs/tiny-2")) == [1, 2] and len(steps_of(Path("runs/tiny"))) == 4
    # Each by the recipe that it has, not by its number.
    assert main(command) == 0 and not Path("runs/tiny-3").exists()


def test_auto_takes_the_folder_that_is_given(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["distill", str(recipe), "--resume", "auto", "--out", "mine"]
    cut_off(recipe, tmp_path / "mine", 3, monkeypatch)
    other = refusal([*command, "train.lr=0.01"], capsys, tmp_path)
    assert "train.lr (0.001 -> 0.01)" in other
    assert main(command) == 0
    assert steps_of(tmp_path / "mine") == [1, 2, 3, 4] and not Path("runs").exists()
    assert main(["distill", str(recipe), "--resume=auto", "--out", "new", "train.steps=1"]) == 0
    assert steps_of(tmp_path / "new") == [1]


def test_a_bare_resume_may_be_followed_by_an_override(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["distill", str(recipe), "train.lr=0.01", "train.steps=2"]) == 0
    assert main(["distill", str(recipe), "--resume", "train.lr=0.01", "train.steps=2"]) == 0
    assert [entry.name for entry in Path("runs").iterdir() if not entry.is_symlink()] == ["tiny"]


def test_an_unfinished_run_of_the_same_recipe_is_named_with_the_way_on(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cut_off(recipe, Path("runs/tiny"), 3, monkeypatch)
    assert "--resume" in refusal(["distill", str(recipe), "--out", "runs/tiny"], capsys, tmp_path)
    assert main(["distill", str(recipe), "train.steps=1"]) == 0
    assert "warning: runs/" not in capsys.readouterr().err, "it is of another recipe"
    assert main(["distill", str(recipe)]) == 0
    (named,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: runs/")]
    assert named.startswith("warning: runs/tiny: ") and "--resume --out runs/tiny " in named
    assert steps_of(Path("runs/tiny-3")) == [1, 2, 3, 4]
    assert main(["distill", str(recipe), "--resume", "--out", "runs/tiny"]) == 0
    assert main(["distill", str(recipe)]) == 0
    assert "warning: runs/" not in capsys.readouterr().err, "all are finished"
    # Of a finished one the refusal has no way on.
    assert "--resume" not in refusal(["distill", str(recipe), "--out", "runs/tiny"], capsys, tmp_path)


def test_a_comparison_goes_on_by_the_same_command(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", str(recipe), "compare={budget: steps, seeds: [0]}", "train.steps=2"]
    log = RunDir.log

    def killed(self: RunDir, step: int, metrics: dict[str, float]) -> None:
        log(self, step, metrics)
        if self.path.name == "kd-0" and step == 1:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunDir, "log", killed)
        main([*command, "--resume", "auto"])
    ce = (Path("runs/tiny/ce-0") / "receipt.json").read_bytes()
    assert {line["run"]: line["state"] for line in table(capsys)} == {
        "runs/tiny/ce-0": "finished",
        "runs/tiny/kd-0": "failed",
    }
    assert main([*command, "--out", "runs/tiny"]) == 2 and "--resume" in capsys.readouterr().err
    assert main([*command, "--resume", "auto"]) == 0
    assert (Path("runs/tiny/ce-0") / "receipt.json").read_bytes() == ce
    assert os.readlink("runs/latest") == "tiny" and not Path("runs/tiny-2").exists()
    assert main([*command, "--resume", "auto", "train.lr=0.01"]) == 0
    assert Path("runs/tiny-2/kd-0").exists()


def test_latest_is_the_run_that_was_started_last(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        distill(recipe, overrides=["train.steps=1"], out=Path("runs") / name)
        assert Path("runs/latest").resolve() == Path("runs", name).resolve()
    distill(recipe, overrides=["train.steps=1"], out=Path("elsewhere/c"))
    assert os.readlink("runs/latest") == "b" and not Path("elsewhere/latest").exists()
    assert newest_path("latest") == Path("runs/latest") and default_path("latest") == Path("runs/latest-2")
    assert main(["show", "runs/latest"]) == 0

    def no_links(*_: Any, **__: Any) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(Path, "symlink_to", no_links)
    distill(recipe, overrides=["train.steps=1"], out=Path("runs/c"))
    assert os.readlink("runs/latest") == "b"
    assert sorted(os.listdir("runs")) == ["a", "b", "c", "latest"]


def test_latest_takes_nobody_s_place_and_survives_two_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/latest").mkdir(parents=True)
    link_latest(Path("runs/a"))
    assert os.listdir("runs") == ["latest"] and not Path("runs/latest").is_symlink()
    Path("runs/latest").rmdir()
    replace = os.replace

    def another_first(source: Path, target: Path) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            link_latest(Path("runs/other"))
        assert os.readlink("runs/latest") == "other"
        replace(source, target)

    monkeypatch.setattr(os, "replace", another_first)
    link_latest(Path("runs/mine"))
    assert os.readlink("runs/latest") == "mine" and os.listdir("runs") == ["latest"]


def test_names_are_counted_on_from_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert newest_path("x") == default_path("x") == Path("runs/x")
    for name in ("x", "x-2", "x-10", "x-1", "x-y", "xx-11"):
        Path("runs", name).mkdir(parents=True)
    assert newest_path("x") == Path("runs/x-10") and default_path("x") == Path("runs/x-11")
    shutil.rmtree("runs/x")  # no gap is filled: the newest would not be the last any more
    assert newest_path("x") == Path("runs/x-10") and default_path("x") == Path("runs/x-11")


def test_the_table_has_every_run_and_a_damaged_one_is_a_line(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert table(capsys) == []
    done = distill(recipe, out=Path("runs/done"))
    cut_off(recipe, Path("runs/failed"), 3, monkeypatch)
    for name in ("at-work", "killed", "stopped", "no-json", "no-recipe", "bad-metrics"):
        shutil.copytree("runs/failed", Path("runs", name))
    for name in ("at-work", "killed"):
        RunDir(Path("runs", name)).set_status("running")
    RunDir(Path("runs/stopped")).set_status("stopped", "by a signal after step 3; --resume continues")
    Path("runs/no-json/status.json").write_text("{")
    Path("runs/no-recipe/resolved.yaml").unlink()
    Path("runs/bad-metrics/metrics.jsonl").write_text('{"step": "three"}\n')
    Path("runs/notes").mkdir()
    with RunDir(Path("runs/at-work")).locked():
        lines = {Path(line["run"]).name: line for line in table(capsys)}
    assert {name: line["state"] for name, line in lines.items()} == {
        "done": "finished",
        "failed": "failed",
        "at-work": "running",
        "killed": "interrupted",
        "stopped": "stopped",
        "no-json": "damaged",
        "no-recipe": "damaged",
        "bad-metrics": "damaged",
    }
    assert (lines["failed"]["step"], lines["failed"]["steps"], lines["done"]["step"]) == (3, 4, 4)
    assert lines["failed"]["why"].startswith("Killed")
    best = min(
        (line for line in done.metrics() if "heldout/loss" in line), key=lambda line: line["heldout/loss"]
    )
    assert lines["done"]["kl"] == best["heldout/kl"] and lines["no-json"]["kl"] is None
    assert lines["done"]["bytes"] == sum(p.lstat().st_size for p in done.path.rglob("*") if p.is_file())
    assert 0 <= lines["done"]["age_s"] < 600
    assert [line["run"] for line in table(capsys, "runs/done")] == ["runs/done"]

    monkeypatch.setenv("COLUMNS", "80")
    assert main(["runs"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 + len(lines) and max(map(len, printed)) <= 80
    assert all(sum(name in line.split()[0] for line in printed) == 1 for name in lines)
    assert main(["runs", "nowhere"]) == 2


def test_a_look_at_runs_keeps_no_process_from_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock of another's look is gone a moment later; a lock that stays is a process at work."""
    run = RunDir(tmp_path)
    from potstill.errors import UserError
    from potstill.io import locks

    with locks.locked(tmp_path), pytest.raises(UserError, match="another process"), run.locked():
        pass
    look = locks.locked(tmp_path)
    look.__enter__()
    monkeypatch.setattr("potstill.io.locks.time.sleep", lambda _: look.__exit__(None, None, None))
    with run.locked():
        assert locks.is_locked(tmp_path)
    assert not locks.is_locked(tmp_path)
