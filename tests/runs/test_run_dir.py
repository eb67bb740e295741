"""A run directory is whole at every instant, and never written over."""

from __future__ import annotations

from pathlib import Path

import pytest

from potstill.errors import UserError
from potstill.runs.places import default_path
from potstill.runs.run_dir import RunDir, code, environment
from potstill.runs.summary import summary


def new(path: Path) -> RunDir:
    return RunDir.create(path, recipe=b"a: 1  # mine\n", resolved="a: 1\n", corpus={"tokens": 3})


def test_the_recipe_is_kept_byte_for_byte(tmp_path: Path) -> None:
    run = new(tmp_path / "run")
    assert (run.path / "recipe.yaml").read_bytes() == b"a: 1  # mine\n"
    assert run.status() == {"state": "running"}


def test_a_folder_with_anything_in_it_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match="already exists"):
            new(taken)


def test_a_run_cut_off_at_its_begin_is_begun_anew_and_a_folder_like_it_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed() -> dict[str, str]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("potstill.runs.run_dir.environment", killed)
        new(tmp_path / "run")
    with pytest.raises(UserError, match=r"interrupted.*without --resume"):
        RunDir.open(tmp_path / "run")
    assert new(tmp_path / "run").status() == {"state": "running"}
    for status in ('{"state": "mine"}', "[]", ""):
        (tmp_path / "mine").mkdir(exist_ok=True)
        (tmp_path / "mine" / "status.json").write_text(status)
        with pytest.raises(UserError, match="already exists"):
            new(tmp_path / "mine")


def test_a_place_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be made: Not a directory"):
        new(tmp_path / "file" / "run")


def test_metrics_are_whole_lines_and_the_best_are_those_of_the_saved_student(tmp_path: Path) -> None:
    run = new(tmp_path / "run")
    for step, (kl, agreement, loss) in enumerate([(3.0, 0.1, 3.0), (1.5, 0.3, 1.0), (1.0, 0.4, 2.0)]):
        run.log(step, {"heldout/kl": kl, "heldout/agreement": agreement, "heldout/loss": loss})
        run.log(step, {"train/lr": 0.1 * step})
    assert [line["step"] for line in run.metrics()] == [0, 0, 1, 1, 2, 2]
    # Best is one student: the saved one, although a later one is nearer to the teacher.
    assert summary(run)["heldout/kl"] == {"first": 3.0, "best": 1.5, "last": 1.0}
    assert summary(run)["heldout/agreement"]["best"] == 0.3
    assert summary(run)["train/lr"] == {"first": 0.0, "last": 0.2}


def test_a_student_that_fails_to_save_leaves_the_one_before(tmp_path: Path) -> None:
    run = new(tmp_path / "run")

    def save(text: str) -> None:
        def fill(folder: Path) -> None:
            folder.mkdir()
            (folder / "weights").write_text(text)
            if text == "broken":
                raise OSError("disk full")

        run.replace_student(fill)

    save("first")
    with pytest.raises(OSError, match="disk full"):
        save("broken")
    assert (run.student / "weights").read_text() == "first"
    save("second")
    assert (run.student / "weights").read_text() == "second"
    assert {p.name for p in run.path.iterdir() if p.is_dir()} == {"student"}


@pytest.mark.parametrize("renamed", [1, 2])
def test_a_student_is_there_after_a_kill_between_the_two_names(tmp_path: Path, renamed: int) -> None:
    run = new(tmp_path / "run")
    for folder, text in ((run.student, "old"), (run.path / "student.new", "new")):
        folder.mkdir()
        (folder / "weights").write_text(text)
    run.student.rename(run.path / "student.old")
    if renamed == 2:
        (run.path / "student.new").rename(run.student)
    run.repair()
    assert (run.student / "weights").read_text() == ("old" if renamed == 1 else "new")
    assert {p.name for p in run.path.iterdir() if p.is_dir()} == {"student"}


def test_default_paths_count_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_path("demo") == Path("runs/demo")
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo-2").mkdir()
    assert default_path("demo") == Path("runs/demo-3")


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    run = new(tmp_path / "run")
    (run.path / "receipt.json").write_text('{"a": ')
    with pytest.raises(UserError, match=r"receipt\.json: damaged"):
        run.receipt()


def test_the_environment_names_versions_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_planted_secret")
    found = environment()
    assert found["libraries"]["torch"][0].isdigit()
    assert "hf_planted_secret" not in str(found)


def test_the_commit_is_that_of_the_checkout() -> None:
    assert len(code()["commit"]) in (0, 40)
