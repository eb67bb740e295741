"""What `potstill show` says of a run: what came out first, on lines that fit the terminal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from potstill.cli.main import main

FINISHED = Path(__file__).parent.parent / "data" / "v1" / "finished"
EXPORT = {
    "format": "q8_0",
    "file": "exports/gguf/x-Q8_0.gguf",
    "bytes": 10,
    "metadata": {f"key.{n}": "v" * 50 for n in range(300)},
    "three_path": {"transformers": {"status": "passed"}, "llama.cpp": {"status": "failed", "why": "w" * 900}},
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FINISHED, tmp_path / "run"))


@pytest.fixture
def shown(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    def show(*words: str, columns: int = 80, **receipt: Any) -> list[str]:
        monkeypatch.setenv("COLUMNS", str(columns))
        kept = json.loads((run / "receipt.json").read_text())
        (run / "receipt.json").write_text(json.dumps(kept | receipt))
        capsys.readouterr()
        assert main(["show", str(run), *words]) == 0
        return capsys.readouterr().out.splitlines()

    return show


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_what_came_out_is_first_and_no_line_is_longer_than_the_terminal(
    shown: Callable[..., list[str]], columns: int
) -> None:
    lines = shown(columns=columns, exports=[EXPORT], check_red=["memory"], check={"memory": "m" * 5000})
    assert max(map(len, lines)) <= columns
    assert len(lines) < 60
    heldout = next(n for n, line in enumerate(lines) if line.split()[:2] == ["held-out", "rows"])
    (student,) = [n for n, line in enumerate(lines) if line.startswith("student: ")]
    warnings = [n for n, line in enumerate(lines) if line.startswith("warning: ")]
    assert heldout < 8 and heldout < student < min(warnings) and len(warnings) == 2
    assert lines[heldout + 1].split()[0].startswith("heldout/kl")
    assert any("memory" in line for line in lines) and any("round trip" in line for line in lines)


def test_best_is_the_saved_student_s_and_a_rate_has_none(run: Path, shown: Callable[..., list[str]]) -> None:
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in metrics if "heldout/loss" in line]
    # A later one is nearer to the teacher, and was not saved.
    last = {**evaluations[-1], "heldout/loss": 9.0, "heldout/kl": 0.001}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*metrics, last]))
    best = json.loads((run / "receipt.json").read_text())["heldout_best"]
    rows = {line.split()[0]: line.split()[1:] for line in shown() if "/" in line.split()[0]}
    assert rows["heldout/kl"][1:] == [f"{best['heldout/kl']:.6g}", "0.001"]
    assert len(rows["train/lr"]) == 2
    as_json = json.loads("\n".join(shown("--json")))
    assert as_json["metrics"]["heldout/kl"]["best"] == best["heldout/kl"]
    assert as_json["metrics"]["train/lr"].keys() == {"first", "last"}


def test_the_receipt_is_printed_whole_where_it_is_asked_for(
    run: Path, shown: Callable[..., list[str]]
) -> None:
    lines = shown("--receipt", exports=[EXPORT])
    assert json.loads("\n".join(lines)) == json.loads((run / "receipt.json").read_text())


def test_what_makes_a_result_worthless_is_a_warning(shown: Callable[..., list[str]]) -> None:
    lines = shown(student_is_of_step=0, steps_left_out=[3, 4], uncommitted_changes=True, columns=200)
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert len(warnings) == 3 and "untouched" in warnings[0] and "2 steps" in warnings[1]


@pytest.mark.parametrize("odd", [None, 5, "x", [1], {"a": None}])
def test_a_receipt_that_somebody_edited_is_shown_all_the_same(
    shown: Callable[..., list[str]], run: Path, odd: Any
) -> None:
    names = json.loads((run / "receipt.json").read_text())
    assert len(shown(**{name: odd for name in names}, exports=odd, evaluations=odd)) > 5


def test_a_run_without_a_receipt_is_shown(shown: Callable[..., list[str]], run: Path) -> None:
    shown()
    (run / "receipt.json").unlink()
    shutil.rmtree(run / "student", ignore_errors=True)
    assert main(["show", str(run)]) == 0
