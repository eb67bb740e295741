"""The report of a run: everything measured is on it, nothing else, and it loads no other resource."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import browser
import pytest
from browser import in_chromium

from potstill import UserError, distill
from potstill.cli.main import main
from potstill.io.terminal import Display
from potstill.report.build import report
from potstill.report.charts import Series, chart, log_ticks, thinned, ticks
from potstill.report.page import RunReport, page
from potstill.runs.run_dir import RunDir

Recipe = Callable[..., Path]
PLANT = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
SECTIONS = [
    *("curves", "disagreement", "humaneval", "tasks", "arms"),
    *("checks", "memory", "guard", "samples", "receipt"),
]
QUIET = Display(quiet=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Path:
    """A run whose documents and prompt try to break out into markup."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text").mkdir()
    for number in range(40):
        (folder / "text" / f"{number}.txt").write_text(f"{PLANT} the cat sat on {number} mats\n" * 3)
    recipe = folder / "mine.yaml"
    sections = {
        "corpus": {"name": "text", "path": "text", "tokens_per_row": 64, "heldout_rows": 4},
        "teacher": {"name": "torch", "model": str(teacher_folder)},
        "student": {"name": "cut", "layers": 2},
        "train": {"steps": 6, "rows_per_step": 2, "lr": 1e-3, "device": "cpu"},
        "eval": {"every": 3, "sample_prompt": f"say {PLANT}", "sample_tokens": 4},
    }
    recipe.write_text(json.dumps(sections))
    return distill(recipe, out=folder / "a run").path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> RunDir:
    """A copy that a test may change."""
    return RunDir.open(Path(shutil.copytree(finished, tmp_path / "run")))


def page_of(*runs: RunDir, with_models: bool = False) -> str:
    out = runs[0].path.parent / "page.html"
    return report([run.path for run in runs], out, 48, with_models, QUIET).read_text()


class Elements(HTMLParser):
    """Names with attributes, the text of each section without tags, and what scripts and styles hold."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[tuple[str, str]] = []
        self.sections: dict[str, str] = {}
        self._section, self._open = "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag
        if tag == "section":
            self._section = dict(attrs).get("id") or "figures"

    def handle_data(self, data: str) -> None:
        if self._open in ("script", "style"):
            self.raw.append((self._open, data))
            self._open = ""
        else:
            self.sections[self._section] = self.sections.get(self._section, "") + data + " "


def test_every_section_is_there_with_what_the_run_measured(run: RunDir) -> None:
    text = page_of(run, with_models=True)
    found, receipt = Elements(text), run.receipt()
    assert [tag[1]["id"] for tag in found.tags if tag[0] == "section"] == SECTIONS
    for name, figure in receipt["check"].items():
        assert name in found.sections["checks"]
        assert figure in found.sections["checks"]
    assert f"{receipt['plan']['ratio']:.3f}" in found.sections["memory"]
    assert receipt["student"]["weights_sha256_end"] in found.sections["receipt"]
    assert receipt["samples"]["prompt"] in found.sections["samples"]
    assert f"{run.metrics()[-1]['heldout/kl']:.3f} " in found.sections[""]
    assert "Steps 6 of 6" in " ".join(found.sections[""].split())
    known = run.disagreement()
    assert known["positions"] > 40
    assert f"mean {known['mean_kl']:.3f} nats" in found.sections["disagreement"]
    assert (
        len([t for t in found.tags if t[1].get("class", "") and str(t[1]["class"]).startswith("t k")])
        == known["positions"]
    )


def test_the_figures_in_front_are_those_of_the_saved_student(run: RunDir) -> None:
    """The evaluation with the lowest loss, which is not the last."""
    lines = run.metrics()
    held = [line for line in lines if "heldout/kl" in line]
    for number, line in enumerate(held):
        line |= {"heldout/loss": abs(number - 1.0), "heldout/kl": 3.25 + number, "heldout/ce": 6.25 + number}
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = " ".join(Elements(page_of(run)).sections[""].split())
    assert len(held) == 3
    for label, value in (("KL to the teacher", "4.250"), ("Held-out CE", "7.250")):
        assert re.search(rf"{label} {value} nats saved student, step {held[1]['step']};", shown), shown


def test_what_was_not_run_is_shown_as_not_run(run: RunDir) -> None:
    """A run in its first steps: no receipt, no student, no benchmark, no memory in its metrics."""
    (run.path / "receipt.json").unlink()
    shutil.rmtree(run.student)
    run.set_status("running")
    lines = (run.path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run.path / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:20])  # the last is being written
    sections = Elements(page_of(run)).sections
    assert "running" in sections[""]
    assert "Memory GiB per step" in " ".join(sections["curves"].split())
    for name, expected in {
        "disagreement": "Not run: the run has no student yet.",
        "humaneval": "Not run.",
        "tasks": "Not run.",
        "arms": "Not run: give the folder",
        "checks": "this one is running",
        "memory": "this one is running",
        "guard": "None.",
        "samples": "this one is running",
        "receipt": "this one is running",
    }.items():
        assert expected in " ".join(sections[name].split()), name


def test_a_run_that_logged_nothing_yet_has_a_page(run: RunDir) -> None:
    (run.path / "metrics.jsonl").unlink()
    assert "No step is logged yet." in Elements(page_of(run)).sections["curves"]


def test_a_damaged_line_is_reported_with_its_place(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "train/ce": "low"}\n')
    number = len((run.path / "metrics.jsonl").read_text().splitlines())
    assert main(["report", str(run.path), "--no-models"]) == 2
    assert (
        f"{run.path / 'metrics.jsonl'}:{number}: damaged: train/ce is not a number" in capsys.readouterr().err
    )
    assert not (run.path / "report.html").exists()


def test_the_same_prompts_are_answered_side_by_side(run: RunDir) -> None:
    """A prompt of the recipe's, one of each evaluation and a held-out one; what somebody did not write is not run."""
    run.log_samples(0, {"the cat": "sat", "no teacher": "here"}, {"the cat": "slept"})
    run.log_samples(6, {"the cat": "ran", "no teacher": "there"})
    saved = {
        "student_is_of_step": 6,
        "samples": {"prompt": "say", "teacher": "a", "before": "b", "after": "c"},
    }
    run.write_receipt(run.receipt() | saved)
    run.write_answers({"prompt": ["a dog"], "teacher": ["barked"], "before": ["mewed"], "after": ["barks"]})
    shown = " ".join(Elements(page_of(run)).sections["samples"].split())
    for prompt, *texts in (
        ("say", "a", "b", "c"),
        ("the cat", "slept", "sat", "ran"),
        ("no teacher", "Not run.", "here", "there"),
        ("a dog", "barked", "mewed", "barks"),
    ):
        titles = ("Teacher", "Untouched student", "Student")
        pairs = " ".join(f"{title} {text}" for title, text in zip(titles, texts, strict=True))
        assert f"{prompt} {pairs}" in shown
    assert "At each evaluation: the cat Step 0 sat Step 6 ran" in shown


def test_refused_steps_are_listed(run: RunDir) -> None:
    run.log_fault(3, "loss is nan <b>")
    assert "3 loss is nan <b>" in " ".join(Elements(page_of(run)).sections["guard"].split())


def test_an_infinite_kl_is_shown_as_such_and_is_valid_json(run: RunDir) -> None:
    choices = [[1, "a", 1.0]]
    token = {
        "id": 1,
        "text": "a",
        "kl": None,
        "ce": None,
        "teacher_ce": 0.1,
        "entropy": 0.2,
        "teacher_entropy": 0.3,
    }
    rows = [[token | {"student": choices, "teacher": choices}]]
    text = page([RunReport(run, {"rows": rows, "mean_kl": float("inf")})], {})
    assert json.loads(Elements(text).raw[1][1])[0]["kl"] is None
    assert "mean inf nats" in text
    assert 'class="t k6"' in text


def planted(run: RunDir) -> str:
    """The page of a run with the planted markup wherever untrusted text can stand."""
    token = {
        "id": 1,
        "text": PLANT,
        "kl": 3.0,
        "ce": 1.0,
        "teacher_ce": 1.0,
        "entropy": 1.0,
        "teacher_entropy": 1.0,
    }
    choices = [[1, PLANT, 0.5], [2, "<!--", 0.3], [3, "\u202e", 0.1]]
    rows = [[{"id": 0, "text": PLANT}, token | {"student": choices, "teacher": choices}]]
    run.write_receipt(run.receipt() | {"check": {PLANT: PLANT}, "objective": PLANT, PLANT: PLANT})
    run.set_status("failed", PLANT)
    run.log_fault(2, PLANT)
    moved = run.path.rename(run.path.with_name(f"{PLANT.split('/')[0]}<script>x"))
    return page([RunReport(RunDir(moved), {"rows": rows, "mean_kl": 3.0})], {})


def test_untrusted_text_does_not_become_markup(run: RunDir) -> None:
    text = planted(run)
    found = Elements(text)
    assert [tag for tag, _ in found.raw] == ["style", "script", "script"]
    assert json.loads(found.raw[1][1])[0]["text"] == PLANT
    assert "img" not in {tag for tag, _ in found.tags}
    assert [name for _, attributes in found.tags for name in attributes if name.startswith("on")] == []
    for section in ("disagreement", "checks", "guard", "samples", "receipt"):
        assert PLANT in found.sections[section], section
    assert "\u202e" not in html.unescape(text)


def test_the_page_loads_nothing_and_its_security_policy_says_so(run: RunDir) -> None:
    text = page_of(run, with_models=True)
    found = Elements(text)
    for tag, attributes in found.tags:
        for name in ("src", "href", "data", "action", "srcset", "poster", "style"):
            value = attributes.get(name)
            assert value is None or value.startswith("#") or (tag, value) == ("link", "data:,"), (
                tag,
                name,
                value,
            )
    assert re.findall(r"https?:|@import|url\(", text) == []
    policy = next(a["content"] for t, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")
    for kind, content in (found.raw[0], found.raw[-1]):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in str(policy)
    assert str(policy).startswith("default-src 'none'; ")


def test_several_runs_are_told_apart_by_name_and_color(run: RunDir, tmp_path: Path) -> None:
    other = RunDir(Path(shutil.copytree(run.path, tmp_path / "other")))
    text = page_of(run, other)
    for name in ("run", "other"):
        assert len(re.findall(rf'<i class="swatch s\d"></i>{name}<', text)) >= 6
    assert {"line s0", "line s1"} <= {str(a.get("class")) for t, a in Elements(text).tags if t == "polyline"}
    alike = page(
        [
            RunReport(run, "not run"),
            RunReport(RunDir(Path(shutil.copytree(run.path, tmp_path / "x" / "run"))), "not run"),
        ],
        {},
    )
    assert f"{tmp_path}/x/run" in alike  # two folders of one name are told apart


def test_a_second_report_loads_no_model_and_another_student_is_measured(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = page_of(run, with_models=True)
    known = run.disagreement()

    def loaded(*args: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded")

    with monkeypatch.context() as patch:
        patch.setattr("potstill.build.setup.set_up", loaded)
        assert page_of(run, with_models=True) == first == page_of(run, with_models=False)
    (run.path / "disagreement.json").write_text("{")  # a cache that is damaged is none
    assert page_of(run, with_models=True) == first
    changed = bytearray((run.student / "model.safetensors").read_bytes())
    changed[-2] ^= 1
    (run.student / "model.safetensors").write_bytes(changed)
    assert "Not run: --no-models." in Elements(page_of(run)).sections["disagreement"]
    shown = Elements(page_of(run, with_models=True)).sections["disagreement"]
    assert "model.safetensors: damaged" in " ".join(shown.split()) and run.disagreement() == known
    run.write_receipt({**run.receipt(), "output": None})
    run.replace_student(lambda folder: shutil.copytree(run.student, folder) and None)
    page_of(run, with_models=True)
    assert run.disagreement()["of"]["student"] != known["of"]["student"]


@pytest.mark.parametrize("gone", ["teacher", "corpus", "receipt's teacher"])
def test_the_page_is_made_although_the_disagreement_can_no_longer_be_measured(gone: str, run: RunDir) -> None:
    text = run.resolved.read_text()
    if gone == "teacher":
        text = re.sub(r"model: .*", "model: /nowhere/teacher", text)
    elif gone == "corpus":
        text = text.replace("heldout_rows: 4", "heldout_rows: 3")
    else:
        run.write_receipt(run.receipt() | {"teacher": {"weights_sha256": "0" * 64}})
    run.resolved.write_text(text)
    shown = " ".join(Elements(page_of(run, with_models=True)).sections["disagreement"].split())
    wanted = {
        "teacher": "Not run: .*no file or folder /nowhere/teacher",
        "corpus": "Not run: .*the corpus has changed since the run",
        "receipt's teacher": "Not run: .*the recipe's teacher is not the run's",
    }
    assert re.search(wanted[gone], shown)
    assert run.disagreement() == {}


def humaneval_of(run: RunDir) -> None:
    """Three problems: one passed, one failed, one that the model did not answer."""
    folder = run.evals / "humaneval"
    folder.mkdir(parents=True)
    score = {"value": 1 / 3, "low": 0.061, "high": 0.792, "interval": "Wilson"}
    result = {"scores": {"pass@1": score}, "data_sha256": "ab" * 32, PLANT: {PLANT: [PLANT]}}
    (folder / "base.json").write_text(json.dumps(result))
    samples = [
        {"settings": {"prompt": "base"}},
        {"task_id": "HumanEval/0", "verdict": "passed", "passed": True, "program": "def f(): return 1"},
        {
            "task_id": "HumanEval/1",
            "verdict": "failed",
            "detail": PLANT,
            "program": PLANT,
            "completion": PLANT,
        },
        {"task_id": PLANT, "verdict": PLANT, "completion": "gone"},
    ]
    (folder / "base.samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))


def test_humaneval_is_shown_problem_by_problem(run: RunDir) -> None:
    humaneval_of(run)
    text = page_of(run)
    found = Elements(text)
    shown = " ".join(found.sections["humaneval"].split())
    assert "pass@1 33.3 %, 95 % interval 6.1–79.2 %" in shown
    assert "33.3 % 95 % interval" in " ".join(found.sections[""].split())
    assert "def f(): return 1" in shown
    assert shown.count(PLANT) >= 8
    assert "ab" * 32 in shown
    kinds = text[text.index('<ul class="cells">') :].split("<li")[1:4]
    assert [kind.startswith(' class="pass"') for kind in kinds] == [True, False, False]
    assert [kind.startswith(' class="other"') for kind in kinds] == [
        False,
        False,
        True,
    ]  # neither right nor wrong
    anchors = {a["id"] for t, a in found.tags if t == "details" and "id" in a}
    assert {f"#{a}" for a in anchors} == {a["href"] for t, a in found.tags if t == "a" and "title" in a}
    assert "img" not in {tag for tag, _ in found.tags}
    assert [tag for tag, _ in found.raw] == ["style", "script"]


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (
            {"status": "inference_failed", "why": "out of <memory>"},
            "no score: inference_failed: out of <memory>",
        ),
        (
            {"status": "finished", "subset": {"problems": 5, "samples": 5, "samples_passed": 2}},
            "2 of 5 samples pass, of a subset of 5 problems, which is no score of HumanEval",
        ),
        (
            {
                "status": "finished",
                "subset": {"problems": 5, "samples": 5, "samples_passed": 2},
                "cut_in_thought": 3,
            },
            "; 3 answers cut in their thought.",
        ),
    ],
)
def test_humaneval_without_a_score_has_no_number(result: dict[str, Any], expected: str, run: RunDir) -> None:
    humaneval_of(run)
    (run.evals / "humaneval" / "base.json").write_text(json.dumps(result))
    sections = Elements(page_of(run)).sections
    assert expected in " ".join(sections["humaneval"].split())
    assert "HumanEval pass@1 – no score" in " ".join(sections[""].split())


def test_a_task_is_shown_with_some_of_its_answers(run: RunDir) -> None:
    folder = run.evals / "task-sums"
    folder.mkdir(parents=True)
    of = {"value": 0.3, "low": 0.108, "high": 0.603, "interval": "Wilson, 95 %"}
    result = {
        "status": "finished",
        "accuracy": of,
        "mean_score": 0.345,
        "questions": 10,
        "answers": 10,
        "finishes": {"length": 3, "eos": 7},
        "correct_by_question": [1] * 10,
        "settings": {"questions_sha256": "cd" * 32},
    }
    (folder / "result.json").write_text(json.dumps(result))
    lines = [
        {
            "verdict": "correct" if number < 3 else "incorrect",
            "question": f"asked {number}, {PLANT}",
            "expected": PLANT,
            "text": PLANT,
            "finish": "eos",
        }
        for number in range(10)
    ]
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = Elements(page_of(run))
    shown = " ".join(found.sections["tasks"].split())
    assert (
        "Accuracy 30.0 %, 95 % interval 10.8–60.3 % (Wilson, 95 %), of 10 questions and 10 answers" in shown
    )
    assert "mean score 0.345. Answers ended by: eos 7, length 3." in shown and "cd" * 32 in shown
    assert [n for n in range(10) if f"asked {n}," in shown] == [0, 1, 2, 3, 4, 5, 6]
    assert PLANT in shown and "img" not in {tag for tag, _ in found.tags}
    failed = {"status": "inference_failed", "why": "logits are not finite"}
    (folder / "result.json").write_text(json.dumps(failed))
    shown = Elements(page_of(run)).sections["tasks"]
    assert "No accuracy: inference_failed: logits are not finite." in shown


def test_damaged_samples_are_reported_with_their_line(run: RunDir) -> None:
    humaneval_of(run)
    with (run.evals / "humaneval" / "base.samples.jsonl").open("a") as file:
        file.write("[1]\n")
    with pytest.raises(UserError, match=r"base\.samples\.jsonl:5: a JSON list, not an object"):
        page_of(run)


def test_a_comparison_has_its_sentence_its_table_and_its_intervals(tmp_path: Path) -> None:
    arms = [
        {"name": "untouched", "metrics": {"heldout/kl": 4.5, "pass@1": None}},
        {"name": PLANT, "metrics": {"heldout/kl": {"mean": 1.25, "low": 1.125, "high": 1.5}}},
    ]
    difference = {
        "arm": "kd",
        "against": PLANT,
        "metric": "heldout/kl",
        "mean": -0.5,
        "low": -0.75,
        "high": -0.25,
    }
    differences = [difference | {"shown": True, "ahead": PLANT}, difference | {"shown": False, "ahead": None}]
    differences.append(difference | {"metric": "heldout/ce", "shown": True, "ahead": "kd"})
    found = {"sentence": f"KD is ahead {PLANT}", "budget": {"seconds": 600}, "arms": arms}
    found |= {"warnings": [f"unequal {PLANT}"], "differences": differences}
    (tmp_path / "comparison.json").write_text(json.dumps(found))
    text = report([tmp_path], None, 48, False, QUIET).read_text()
    shown = " ".join(Elements(text).sections["arms"].split())
    assert f"KD is ahead {PLANT}" in shown
    assert "untouched – – 4.5 not run" in shown
    assert f"unequal {PLANT}" in shown
    assert f"heldout/kl -0.5 [-0.75, -0.25] {PLANT} ahead" in shown
    assert shown.count("not shown") == 1
    # Green is the arm of the row; where the one that it is held against is ahead, it has lost.
    assert '<span class="ok">kd ahead</span>' in text and text.count('<span class="red">') == 1
    assert "1.25 [1.125, 1.5]" in shown
    assert "budget.seconds 600" in shown
    whiskers = [a for t, a in Elements(text).tags if a.get("class") == "whisker s1"]
    assert re.search(r">4\.5 ▸<", text)  # an arm far off does not squeeze the others' intervals
    assert float(str(whiskers[0]["x2"])) - float(str(whiskers[0]["x1"])) > 100
    assert float(str(whiskers[0]["x1"])) < float(str(whiskers[0]["x2"]))
    assert [t for t, _ in Elements(text).tags if t == "img"] == []


def test_the_verb_prints_where_the_page_is(
    run: RunDir, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["report", str(run.path), "--no-models", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(run.path / "report.html")}
    assert main(["report", str(run.path), "--no-models", "--out", str(tmp_path / "x.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'x.html'}\n"
    for options, reason in {
        (str(tmp_path),): "not a run directory",
        (str(run.path), "--tokens", "0"): "--tokens 0: must be 1 or more",
        (str(run.path), "--out", str(tmp_path)): f"--out {tmp_path}: a folder",
        (str(run.path), "--out", str(tmp_path / "no" / "x.html")): f"there is no folder {tmp_path / 'no'}",
    }.items():
        assert main(["report", *options]) == 2
        assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (2.37, 7.45), (-3, 2), (1e-9, 3e-9), (5, 5), (0, 0), (20.3, 139)]
)
def test_ticks_are_round_and_enclose(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low and high <= found[-1]
    assert 2 <= len(found) <= 8
    assert float(f"{found[1] - found[0]:.1e}") == pytest.approx(found[1] - found[0])


def test_log_ticks_enclose() -> None:
    for low, high in ((2.2, 95.0), (1e-4, 3e3), (1.0, 100.0)):
        assert log_ticks(low, high)[0] <= low and high <= log_ticks(low, high)[-1]


def test_a_long_curve_keeps_its_spike_and_a_value_that_is_not_finite_is_counted() -> None:
    points = [(float(step), 1.0) for step in range(100_000)]
    points[77_777] = (77_777.0, 9.0)
    points[5] = (5.0, float("nan"))
    assert (77_777.0, 9.0) in thinned([p for p in points if p[1] == p[1]])
    drawn = chart("Loss", "nats", [Series("train", 0, "line", points)])
    assert len(drawn) < 20_000
    assert "1 values not finite" in drawn
    assert "none finite" in chart("Loss", "nats", [Series("train", 0, "line", points[5:6])])


LOOK = """(frame) => {
  const page = frame.contentDocument, one = { width: frame.contentWindow.innerWidth };
  one.scroll = page.documentElement.scrollWidth;
  one.title = page.title;
  one.panels = [...page.querySelectorAll(".reader")].map((reader) => {
    const panel = reader.querySelector(".panel"), tokens = [...reader.querySelectorAll(".t")];
    const send = (on, event) => { on.dispatchEvent(event); return panel.textContent; };
    const shown = { first: panel.textContent, stops: reader.querySelectorAll(".t[tabindex='0']").length };
    const at = (number) => tokens[Math.min(number, tokens.length - 1)];
    shown.hover = send(at(3), new PointerEvent("pointerover", { bubbles: true }));
    shown.touch = send(at(5), new MouseEvent("click", { bubbles: true }));
    at(5).focus();
    shown.key = send(at(5), new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true, cancelable: true }));
    shown.at = tokens.indexOf(page.activeElement);
    return shown;
  });
  one.tips = [...page.querySelectorAll(".chart svg:has(polyline)")].map((svg) => {
    svg.focus();
    svg.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true, cancelable: true }));
    return svg.parentElement.querySelector(".tip").innerText;
  });
  one.lists = [...page.querySelectorAll(".filter")].map((filter) => {
    const shown = () => [...page.querySelectorAll("details[data-verdict]")].map((details) => Number(!details.hidden)).join("");
    const input = filter.querySelector("input"), select = filter.querySelector("select"), seen = [shown()];
    select.value = "failed";
    select.dispatchEvent(new Event("change"));
    seen.push(shown());
    select.value = "";
    input.value = "RETURN 1";
    input.dispatchEvent(new Event("input"));
    return [...seen, shown(), filter.querySelector("output").textContent];
  });
  one.curves = [...page.querySelectorAll("polyline")].every((line) => line.getBoundingClientRect().width > 0);
  return one;
}
"""
WIDTHS = (360, 1400)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser_nothing_overflows_and_hover_touch_and_keys_fill_the_panel(
    scheme: str, run: RunDir
) -> None:
    humaneval_of(run)
    page_of(run, with_models=True)
    tokens = [token for row in run.disagreement()["rows"] for token in row if "kl" in token]
    found, console = in_chromium(run.path.parent, LOOK, WIDTHS, browser.scheme(scheme))
    assert console == []
    worst = max(tokens, key=lambda token: float(token["kl"]))
    for page_found, width in zip(found, WIDTHS, strict=True):
        assert page_found["width"] == width
        assert page_found["scroll"] <= width
        assert page_found["curves"]
        assert page_found["lists"] == [["111", "010", "100", "1 of 3"]]
        first = run.metrics()[0]
        assert page_found["tips"][0].split("\n\n") == ["step 0", f"held out {first['heldout/loss']:.4g}"]
        assert len(page_found["tips"]) == 9
        (panel,) = page_found["panels"]
        shown = {"first": worst, "hover": tokens[3], "touch": tokens[5], "key": tokens[6]}
        for way, token in shown.items():
            assert f"KL {token['kl']:.3f} nats" in panel[way], way
            assert panel[way].count("%") == 6, way  # three choices of each model
        assert panel["at"] == 6
        assert panel["stops"] == 1


def test_in_a_browser_planted_markup_does_nothing(run: RunDir) -> None:
    (run.path.parent / "page.html").write_text(planted(run), errors="backslashreplace")
    found, console = in_chromium(run.path.parent, LOOK, WIDTHS)
    assert console == []
    assert [one["title"] for one in found] == ["<<script>x"] * 2
    assert all(one["scroll"] <= one["width"] for one in found)
