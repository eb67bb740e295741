"""What a person sees: plain lines on a pipe, a bar on a terminal, results alone on stdout."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from potstill.io.terminal import Display, clock, printable, size

METRICS = {
    "train/loss": 3.2149,
    "train/ce": 4.1,
    "train/kd": 3.1149,
    "train/lr": 3e-4,
    "train/grad_norm": 1.02,
    "train/positions": 1016,
    "train/epoch": 0,
    "speed/tokens_per_s": 168.2,
    "speed/step_s": 6.1,
}


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def piped(quiet: bool = False) -> tuple[Display, io.StringIO, io.StringIO]:
    out, err = io.StringIO(), io.StringIO()
    return Display(quiet, out=out, err=err), out, err


@pytest.fixture
def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> tuple[Display, Terminal]:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("NO_COLOR", raising=False)
    err = Terminal()
    return Display(out=io.StringIO(), err=err), err


def test_a_step_on_a_pipe_is_one_plain_line() -> None:
    display, out, err = piped()
    display.step_line(12, 40, METRICS, 151.0)
    assert err.getvalue() == (
        "step 12/40  loss 3.21  ce 4.10  kd 3.11  lr 3.0e-04  grad 1.02"
        "  positions 1016  168 tok/s  left 2:31\n"
    )
    assert out.getvalue() == ""


def test_small_figures_are_not_rounded_to_nothing() -> None:
    display, _, err = piped()
    display.step_line(1, 2, METRICS | {"train/loss": 0.0996, "train/kd": 0.0, "train/grad_norm": 3.2e-5}, 1.0)
    display.heldout_line(2, {"heldout/kl": 0.0000202, "heldout/agreement": 0.9996})
    assert "loss 0.10  ce 4.10  kd 0.00  lr" in err.getvalue() and "grad 3.2e-05" in err.getvalue()
    assert "kl 2.0e-05  agreement 0.9996" in err.getvalue()


def test_a_run_without_a_teacher_has_no_kd_column() -> None:
    display, _, err = piped()
    display.step_line(1, 2, {k: v for k, v in METRICS.items() if k != "train/kd"}, 1.0)
    assert "kd" not in err.getvalue()
    assert "ce 4.10  lr" in err.getvalue()


def test_a_held_out_line_names_every_metric_without_its_prefix() -> None:
    display, _, err = piped()
    display.heldout_line(20, {"heldout/ce": 3.5, "heldout/agreement": 0.25})
    assert err.getvalue() == "held out at step 20  ce 3.5000  agreement 0.2500\n"


def test_notes_and_warnings_go_to_stderr_and_results_to_stdout() -> None:
    display, out, err = piped()
    display.note("run: runs/x")
    display.warn("nothing got better.")
    display.result('{"a": 1}')
    assert err.getvalue() == "run: runs/x\nwarning: nothing got better.\n"
    assert out.getvalue() == '{"a": 1}\n'


def test_a_table_on_a_pipe_is_aligned_and_not_cut_to_a_width() -> None:
    display, out, err = piped()
    display.table("held-out [rows]", ["metric", "step 0"], [["ce", "10.25"], ["x" * 300, "1"]])
    first, header, row, long = err.getvalue().splitlines()
    assert first == "held-out [rows]"
    assert header == "  metric" + " " * 294 + "  step 0"
    assert row == "  ce" + " " * 298 + "   10.25"
    assert long == "  " + "x" * 300 + "       1"
    assert out.getvalue() == ""


def test_a_table_without_rows_shows_its_columns() -> None:
    display, _, err = piped()
    display.table("metrics", ["metric", "last"], [])
    assert err.getvalue() == "metrics\n  metric  last\n"


def test_every_mistake_is_one_line_that_drives_nothing() -> None:
    display, out, err = piped()
    display.error(["a.yaml: [bold]x[/bold]\n\x1b[31mred\u202e", "b" * 500])
    assert err.getvalue() == f"error: a.yaml: [bold]x[/bold]\\n\\x1b[31mred\\u202e\nerror: {'b' * 500}\n"
    assert out.getvalue() == ""


def test_quiet_drops_everything_but_errors() -> None:
    display, out, err = piped(quiet=True)
    display.step_line(1, 2, METRICS, 1.0)
    display.heldout_line(1, {"heldout/ce": 1.0})
    display.note("x")
    display.warn("x")
    display.table("t", ["a"], [["b"]])
    display.result("x")
    assert err.getvalue() == out.getvalue() == ""
    display.error(["x: y."])
    assert err.getvalue() == "error: x: y.\n"


def test_a_note_keeps_its_lines_and_loses_its_controls() -> None:
    display, _, err = piped()
    display.note("def f():\n\treturn 'é'\x1b]0;title\x07\r\x9b")
    assert err.getvalue() == "def f():\n\treturn 'é'\\x1b]0;title\\x07\\r\\x9b\n"


def test_a_stream_that_cannot_write_a_letter_gets_its_escape() -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    Display(out=out, err=io.StringIO()).result("é")
    assert raw.getvalue() == b"\\xe9\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (59.6, "1:00"),
        (187, "3:07"),
        (7387, "2:03:07"),
        (-3, "0:00"),
        (float("nan"), "?"),
        (float("inf"), "?"),
    ],
)
def test_time_left_is_told_in_minutes_and_hours(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_printable_leaves_letters_of_all_kinds_alone() -> None:
    assert printable("Straße 東京 🙂 a\u00a0b") == "Straße 東京 🙂 a\u00a0b"


def test_a_terminal_gets_a_bar_with_the_figures_and_the_cursor_back(
    on_a_terminal: tuple[Display, Terminal],
) -> None:
    display, err = on_a_terminal
    display.step_line(1, 2, METRICS, 3.0)
    display.note("a [red]note[/red] above the bar")
    assert "\x1b[?25l" in err.getvalue()
    assert "\x1b[?25h" not in err.getvalue()
    display.step_line(2, 2, METRICS, 0.0)
    assert err.getvalue().endswith("\x1b[?25h")
    assert "2/2" in err.getvalue()
    assert "loss 3.21  ce 4.10  kd 3.11" in err.getvalue()
    assert "a [red]note[/red] above the bar" in err.getvalue()


def test_an_error_closes_the_bar_before_it_is_told(on_a_terminal: tuple[Display, Terminal]) -> None:
    display, err = on_a_terminal
    display.step_line(1, 9, METRICS, 3.0)
    display.error(["step 2: the loss is nan."])
    assert err.getvalue().index("\x1b[?25h") < err.getvalue().index("error: step 2: the loss is nan.")


def test_a_table_on_a_terminal_reads_no_markup(on_a_terminal: tuple[Display, Terminal]) -> None:
    display, err = on_a_terminal
    display.table("[red]title[/red]", ["[b]metric[/b]", "last"], [["[i]ce[/i]", "1.5"]])
    shown = err.getvalue()
    assert [t for t in ("[red]title[/red]", "[b]metric[/b]", "[i]ce[/i]", "1.5") if t not in shown] == []


def test_a_dumb_terminal_is_written_to_like_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    err = Terminal()
    Display(out=io.StringIO(), err=err).step_line(1, 2, METRICS, 1.0)
    assert err.getvalue().startswith("step 1/2  loss 3.21")


def test_a_traceback_gives_the_cursor_back_and_a_pipe_never_imports_rich() -> None:
    program = """
import io, sys
from potstill.io.terminal import Display
Display(err=io.StringIO()).step_line(1, 2, {"train/loss": 1.0}, 1.0)
Display(err=io.StringIO()).table("t", ["a"], [["b"]])
print("rich" in sys.modules)
sys.stderr.isatty = lambda: True
Display(err=sys.stderr).step_line(1, 2, {"train/loss": 1.0}, 1.0)
raise RuntimeError("a bug")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "TERM": "xterm", "FORCE_COLOR": "1"},
    )
    assert done.stdout == "False\n"
    assert done.returncode == 1
    assert done.stderr.rindex("\x1b[?25h") > done.stderr.index("\x1b[?25l")


def test_a_size_is_told_in_the_unit_that_shows_it() -> None:
    told = {0: "0.0 KiB", 512: "0.5 KiB", 2**20: "1.00 MiB", 3 * 2**28: "768.00 MiB", 5 * 2**28: "1.25 GiB"}
    assert {number: size(number) for number in told} == told
