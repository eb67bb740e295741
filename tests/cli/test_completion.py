"""The completion scripts, as the shells themselves run them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from potstill.cli.completion import SHELLS
from potstill.cli.main import main


def printed(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["--completion", shell])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.fixture
def in_bash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed; not run")
    (tmp_path / "completion").write_text(printed("bash", capsys))
    (tmp_path / "my recipe.yaml").touch()
    (tmp_path / "runs").mkdir()
    return tmp_path


def offered(folder: Path, *words: str) -> list[str]:
    """What bash offers for the last word, by the function that it has registered for potstill."""
    program = (
        'source ./completion; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
        'function=$(complete -p potstill | sed "s/.* -F \\([^ ]*\\) .*/\\1/"); '
        '"$function" potstill "${COMP_WORDS[COMP_CWORD]}"; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    command = ["bash", "--norc", "-c", program, "bash", "potstill", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split("\n")[:-1]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["dis"], ["distill"]),
        (["--comp"], ["--completion"]),
        (["--completion", "f"], ["fish"]),
        (["distill", "my"], ["my recipe.yaml"]),
        (["distill", "r.yaml", "--sm"], ["--smoke"]),
        (["distill", "r.yaml", "train.lr"], ["train.lr="]),
        (["distill", "r.yaml", "--out", "ru"], ["runs"]),
        (["distill", "r.yaml", "--resume", "objective.temp"], ["objective.temperature="]),
        (["distill", "r.yaml", "train.lr", "=", "1e-3", "train.step"], ["train.steps="]),
        (["eval", "ru"], ["runs"]),
        (["eval", "runs", "--max-new"], ["--max-new-tokens"]),
        (["store", "ver"], ["verify"]),
        (["publish", "runs", "--re"], ["--repo"]),
    ],
)
def test_bash_completes(in_bash: Path, words: list[str], found: list[str]) -> None:
    assert offered(in_bash, *words) == found


def test_nothing_is_offered_for_what_no_verb_has(in_bash: Path) -> None:
    assert offered(in_bash, "show", "runs", "--smo") == [""]


@pytest.mark.parametrize("shell", SHELLS)
def test_each_script_is_of_its_shell_and_parses_there(
    shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(shell, capsys)
    words = ("distill", "max-new-tokens", "train.lr=", "verify")
    assert [word for word in words if word not in text] == []
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not on this machine; not run")
    (tmp_path / "script").write_text(text)
    done = subprocess.run([shell, "-n", str(tmp_path / "script")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_shell_that_is_not_known_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--completion", "csh"])
    assert ended.value.code == 2 and "fish" in capsys.readouterr().err
