"""The report as other readers have it: by axe-core's rules no violation, on a phone no sideways scroll, on paper black
on white.

axe-core is the file `axe.min.js` of its npm package, which is not in this repository: `npm install --prefix tests
axe-core`, or the file's path in AXE_CORE.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import test_report
from browser import in_chromium, scheme
from test_report import finished as finished  # a fixture

from potstill.report.build import report
from potstill.runs.run_dir import RunDir

INSTALLED = Path(__file__).parent.parent / "node_modules" / "axe-core" / "axe.min.js"
LOOK = """async (frame) => {
  const page = frame.contentDocument, axe = frame.contentWindow.axe;
  page.querySelectorAll("details").forEach((details) => { details.open = true; });
  const found = await axe.run(page, { resultTypes: ["violations"] });
  return {
    width: frame.contentWindow.innerWidth,
    scroll: page.documentElement.scrollWidth,
    rules: found.passes.length,
    violations: found.violations.map((one) => `${one.id}: ${one.nodes[0].html.slice(0, 200)}`),
  };
}
"""
PROFILE: dict[str, Any] = {
    "format": 1,
    "date": "2026-11-30",
    "machine": {"processor": "a processor", "processors": 2, "device": "cpu"},
    "settings": {"threads": 2, "repeats": 3, "prompt_tokens": 8, "new_tokens": 4, "prompt": "held-out text"},
    "spread": "lowest, highest",
    "models": {
        "teacher": {"parameters": 200, "bytes": 800, "weights": "F32", "kind": "folder"},
        "student": {"parameters": 100, "bytes": 400, "weights": "F32", "kind": "folder"},
    },
    "exports": [{"format": "f16", "file": "x.gguf", "bytes": 200}],
    "acceptance": {"expected": {"mean": 0.5, "positions": 100}, "measured": "not run: one reason"},
}


def axe_core() -> str:
    place = Path(os.environ.get("AXE_CORE", INSTALLED))
    if not place.is_file():
        pytest.skip(f"axe-core: no file {place}; see the top of this file. The rules were not run")
    return place.read_text()


def with_everything(run: RunDir) -> RunDir:
    """Every section with something in it."""
    test_report.humaneval_of(run)
    task = run.evals / "task-sums"
    task.mkdir()
    accuracy = {"value": 0.5, "low": 0.1, "high": 0.9, "interval": "Wilson"}
    result = {
        "status": "finished",
        "accuracy": accuracy,
        "questions": 2,
        "answers": 2,
        "finishes": {"eos": 2},
    }
    (task / "result.json").write_text(json.dumps(result))
    verdicts = ("correct", "incorrect")
    answers = [
        {"verdict": v, "question": "q " * 60, "expected": "e", "text": "t", "finish": "eos"} for v in verdicts
    ]
    (task / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in answers))
    figure = {"median": 2.0, "low": 1.0, "high": 3.0}
    names = ("prefill_tokens_per_s", "decoding_tokens_per_s", "first_token_s")
    one = dict.fromkeys(names, figure) | {"version": "transformers 5", "peak_memory_bytes": 2**28}
    speed = {"runtime": "transformers", "weights": "float32", "teacher": one, "student": one}
    run.write_profile(
        PROFILE
        | {"of": run.receipt()["output"], "speeds": [speed | {"ratios": dict.fromkeys(names, figure)}]}
    )
    run.log_fault(3, "loss is nan")
    run.log_samples(0, {"the cat": "sat"}, {"the cat": "slept"})
    run.log_samples(6, {"the cat": "ran"})
    run.write_answers({"prompt": ["a dog"], "teacher": ["barked"], "before": ["mewed"], "after": ["barks"]})
    mix = {"weight": 0.5, "share_read": 0.5, "rows_read": 9, "times_read": 1.0}
    run.write_receipt(run.receipt() | {"sources": {"code": mix, "prose": mix}})
    return run


def comparison(folder: Path) -> Path:
    folder.mkdir()
    arms = [
        {"name": "untouched", "metrics": {"heldout/kl": 4.5, "pass@1": None}},
        {"name": "KD", "metrics": {"heldout/kl": {"mean": 1.25, "low": 1.125, "high": 1.5}}},
    ]
    difference = {
        "arm": "KD",
        "against": "untouched",
        "metric": "heldout/kl",
        "mean": -0.5,
        "low": -0.75,
        "high": -0.25,
    }
    found = {"sentence": "KD is ahead", "budget": {"seconds": 600}, "arms": arms, "warnings": ["unequal"]}
    found |= {"differences": [difference | {"shown": True, "ahead": "KD"}]}
    (folder / "comparison.json").write_text(json.dumps(found))
    return folder


def folders(kind: str, finished: Path, place: Path) -> list[Path]:
    run = with_everything(RunDir.open(Path(shutil.copytree(finished, place / "run"))))
    if kind == "unfinished":
        (run.path / "receipt.json").unlink()
        shutil.rmtree(run.student)
        run.set_status("running")
    if kind == "several runs":
        return [run.path, Path(shutil.copytree(run.path, place / "other"))]
    return [comparison(place / "comparison"), run.path] if kind == "comparison" else [run.path]


def looked_at(folder: Path, pages: list[Path], axe: str, name: str) -> list[dict[str, Any]]:
    """With the policy of a page, which admits no other script, taken out."""
    for page in pages:
        text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
        page.write_text(text.replace("</head>", '<script src="axe.js"></script></head>'))
    (folder / "axe.js").write_text(axe)
    names = tuple(page.name for page in pages)
    found, console = in_chromium(folder, LOOK, (360, 1200), scheme(name), pages=names, budget_ms=60_000)
    assert console == []
    return found


@pytest.mark.parametrize("name", ["light", pytest.param("dark", marks=pytest.mark.soak)])
def test_no_rule_of_axe_is_violated(name: str, finished: Path, tmp_path: Path) -> None:
    axe, pages = axe_core(), []
    for kind in ("one run", "several runs", "comparison", "unfinished"):
        pages.append(tmp_path / f"{kind.replace(' ', '-')}.html")
        (tmp_path / kind).mkdir()
        report(folders(kind, finished, tmp_path / kind), pages[-1], 48, kind == "one run", test_report.QUIET)
    found = looked_at(tmp_path, pages, axe, name)
    assert len(found) == 8
    for one in found:
        assert one["violations"] == [], one["page"]
        assert one["rules"] > 25 and one["scroll"] <= one["width"], one["page"]


def test_a_planted_violation_is_found(finished: Path, tmp_path: Path) -> None:
    """A faint colour, a heading that skips a level, a picture without words, a column without a name."""
    axe = axe_core()
    page = tmp_path / "page.html"
    report(folders("one run", finished, tmp_path), page, 48, False, test_report.QUIET)
    text = (
        page.read_text().replace("--soft: #5a6068", "--soft: #d0d0d0").replace("</h2>", "</h2><h5>deep</h5>")
    )
    text = re.sub(r' aria-label="[^"]*"', "", text).replace(">verdict</th>", "></th>")
    page.write_text(text)
    found = {
        one.split(":")[0]
        for width in looked_at(tmp_path, [page], axe, "light")
        for one in width["violations"]
    }
    assert {"color-contrast", "heading-order", "svg-img-alt", "empty-table-header"} <= found


def test_paper_is_light_whatever_the_screen_is(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    report([run], tmp_path / "page.html", 48, False, test_report.QUIET)
    look = """(frame) => {
      const sheet = frame.contentDocument.styleSheets[0];
      const rules = [...sheet.cssRules].filter((rule) => rule.media);
      const of = (word) => rules.filter((rule) => rule.media.mediaText.includes(word));
      return {
        width: frame.contentWindow.innerWidth,
        dark: of("prefers-color-scheme: dark").map((rule) => rule.media.mediaText),
        hidden: of("print").flatMap((rule) => [...rule.cssRules])
          .filter((rule) => rule.style.display === "none").map((rule) => rule.selectorText),
        paper: getComputedStyle(frame.contentDocument.body).backgroundColor,
      };
    }"""
    (found,), console = in_chromium(tmp_path, look, (800,), scheme("dark"))
    assert console == [] and found["paper"] != "rgb(252, 252, 250)"
    assert found["dark"] == ["screen and (prefers-color-scheme: dark)"]
    assert found["hidden"] == [".panel, .filter, nav"]
