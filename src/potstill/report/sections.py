"""Disagreement with the teacher, HumanEval and comparisons, as the plain values that the report shows."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from potstill.io.safe_open import read_object
from potstill.report.charts import grouped, intervals
from potstill.runs.run_dir import READABLE, read_lines
from potstill.runs.summary import best_evaluation

BINS = (0.05, 0.2, 0.5, 1.0, 2.0, 4.0)
"""Nats at which the color of a token changes: k0 below the first, k6 from the last on."""
WORST = 12
ANSWERS = 8
"""Of a task that are shown: half of them incorrect ones."""
Rows = Sequence[Sequence[Mapping[str, Any]]]


class Estimate(NamedTuple):
    mean: float
    low: float
    high: float


def disagreement(measured: Mapping[str, Any] | str, overall_kl: float | None) -> dict[str, Any] | str:
    """Held-out text with KL(teacher || student) at each token, or one sentence that says why there is none.

    Args:
        overall_kl: the mean over all held-out rows, of which the page shows a few.
    """
    if isinstance(measured, str):
        return f"{measured[:1].upper()}{measured[1:].rstrip('.')}."
    tokens = [token for row in measured["rows"] for token in row if "kl" in token]
    if not tokens:
        return "Not run: no held-out token bears loss."
    differ = sum(token["teacher"][0][0] != token["student"][0][0] for token in tokens)
    edges = ["0", *(f"{limit:g}" for limit in BINS)]
    numbers = count()
    return {
        "positions": grouped(len(tokens)),
        "mean_kl": f"{measured['mean_kl']:.3f}",
        "bounds": f"Figures of the teacher are {measured['held_out']}." if measured.get("held_out") else "",
        "mean_of_all": "" if overall_kl is None else f" ({overall_kl:.3f} over all held-out rows)",
        "first_choices_differ": f"{differ} tokens ({100 * differ / len(tokens):.1f} %)",
        "legend": [*(f"{a}–{b}" for a, b in pairwise(edges)), f"{edges[-1]} and more"],
        "rows": [
            [
                {"text": token["text"], "number": next(numbers), "class": _token_class(token)}
                if "kl" in token
                else {"text": token["text"], "number": None}
                for token in row
            ]
            for row in measured["rows"]
        ],
        "tokens": tokens,
        "worst": _worst(measured["rows"]),
    }


def sources(of_receipt: Mapping[str, Any], metrics: Sequence[Mapping[str, float]]) -> list[dict[str, str]]:
    """What each source of a mix was of the rows read, and its held-out figures, first and of the saved student."""
    best = best_evaluation(metrics)

    def moved(name: str) -> str:
        values = [line[name] for line in metrics if name in line]
        return f"{values[0]:.3f} → {best.get(name, values[-1]):.3f}" if values else "–"

    return [
        {
            "name": name,
            "asked": f"{100 * part['weight']:.2f} %",
            "read": f"{100 * part['share_read']:.2f} %" if "share_read" in part else "–",
            "rows": grouped(part["rows_read"]) if "rows_read" in part else "–",
            "times": f"{part['times_read']:.2g}" if "times_read" in part else "–",
        }
        | {metric: moved(f"heldout/{name}/{metric}") for metric in ("ce", "kl", "agreement")}
        for name, part in of_receipt.items()
    ]


def _token_class(token: Mapping[str, Any]) -> str:
    """None is infinite: the student rules out what the teacher does not."""
    kl = token["kl"]
    bin_number = len(BINS) if kl is None else sum(kl >= limit for limit in BINS)
    return f"t k{bin_number}{'' if token['text'].strip() else ' w'}"


def _worst(rows: Rows) -> list[dict[str, Any]]:
    """The tokens where the models are furthest apart, as a table that needs no pointer and no script."""
    places = [(row, at) for row in rows for at, token in enumerate(row) if "kl" in token]

    def kl(place: tuple[Sequence[Mapping[str, Any]], int]) -> float:
        value = place[0][place[1]]["kl"]
        return math.inf if value is None else float(value)

    places.sort(key=kl, reverse=True)
    return [
        {
            "kl": f"{kl((row, at)):.2f}",
            "before": _marked("".join(token["text"] for token in row[max(at - 8, 0) : at])[-28:]),
            "text": _marked_token(row[at]["text"]),
            "choices": [
                (_marked_token(text), f"{100 * share:.0f}\u00a0%")
                for _, text, share in (row[at]["teacher"][0], row[at]["student"][0])
            ],
        }
        for row, at in places[:WORST]
    ]


def _marked(text: str) -> str:
    return text.replace("\n", "↵").replace("\t", "→")


def _marked_token(text: str) -> str:
    """Also marks the spaces of a token that is nothing else."""
    shown = _marked(text)
    return shown if shown.strip() else shown.replace(" ", "␣")


def by_prompt(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry a prompt of `eval.sample_prompts`, with what was written at each evaluation."""
    texts: dict[str, list[tuple[int, str]]] = {}
    for line in samples:
        for one in line.get("samples", []):
            texts.setdefault(str(one["prompt"]), []).append((line["step"], str(one["text"])))
    return [{"prompt": prompt, "texts": written} for prompt, written in texts.items()]


def pass_at_1(folder: Path) -> tuple[str | None, str]:
    """(percent, interval) of a run's first HumanEval score, or (None, why there is none)."""
    results = _results(folder)
    for _, result, _ in results:
        if score := _score(result):
            return f"{100 * score['value']:.1f}", _interval(score)
    return None, "no score" if results else "not run"


def scores(evals: Path) -> dict[str, float]:
    """pass@1 and the accuracy of each task that was run whole, from 0 to 1."""
    found = {}
    for _, result, _ in _results(evals / "humaneval"):
        if "HumanEval pass@1" not in found and (score := _score(result)):
            found["HumanEval pass@1"] = float(score["value"])
    for path in sorted(evals.glob("task-*/result.json")) if evals.is_dir() else []:
        accuracy = read_object(path, READABLE).get("accuracy")
        if isinstance(accuracy, dict):
            found[path.parent.name] = float(accuracy["value"])
    return found


def humaneval(folder: Path) -> list[dict[str, Any]]:
    """Each result there, with every problem's verdict and completion."""
    return [_problems(name, result, samples) for name, result, samples in _results(folder)]


def tasks(folder: Path) -> list[dict[str, Any]]:
    """Each result of a task with a verifier there, with a few of its answers, incorrect ones first."""
    shown = []
    for path in sorted(folder.glob("task-*/result.json")) if folder.is_dir() else []:
        result, lines = read_object(path, READABLE), path.with_name("answers.jsonl")
        answers = read_lines(lines) if result.get("status") == "finished" and lines.is_file() else []
        answers.sort(
            key=lambda line: line.get("verdict") == "correct"
        )  # stable: in the order of the questions
        wrong = sum(line.get("verdict") != "correct" for line in answers)
        few = answers[: min(wrong, ANSWERS // 2)] + answers[wrong:][: ANSWERS // 2]
        settings = {name: value for name, value in result.items() if not name.endswith("_by_question")}
        shown.append(
            {
                "name": path.parent.name,
                "sentence": _accuracy(result),
                "answers": few,
                "settings": list(flat(settings)),
            }
        )
    return shown


def _accuracy(result: Mapping[str, Any]) -> str:
    """A task's accuracy in words, or why there is none."""
    of = result.get("accuracy")
    if not isinstance(of, dict):
        why = result.get("why", "no reason was recorded")
        return f"No accuracy: {result.get('status', 'unknown')}: {why}."
    score = f"; mean score {result['mean_score']:.3f}" if "mean_score" in result else ""
    ended = ", ".join(f"{name} {n}" for name, n in sorted(result.get("finishes", {}).items()))
    return (
        f"Accuracy {100 * of['value']:.1f} %, {_interval(of)} ({of['interval']}), of {result['questions']} questions"
        f" and {result['answers']} answers{score}. Answers ended by: {ended}."
    )


def _results(folder: Path) -> list[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
    """(name, result, samples) of each NAME.json, with the lines of its NAME.samples.jsonl."""
    results = []
    for path in sorted(folder.glob("*.json")) if os.path.isdir(folder) else []:
        lines = path.with_suffix(".samples.jsonl")
        samples = read_lines(lines) if os.path.lexists(lines) else []
        samples = [line for line in samples if "task_id" in line]  # the first line has the settings
        results.append((path.stem, read_object(path, READABLE), samples))
    return results


def _score(result: Mapping[str, Any]) -> dict[str, Any] | None:
    scores = result.get("scores")
    score = scores.get("pass@1") if isinstance(scores, dict) else None
    return score if isinstance(score, dict) else None


def _interval(score: Mapping[str, Any]) -> str:
    return f"95 % interval {100 * score['low']:.1f}–{100 * score['high']:.1f} %"


def _verdict(result: Mapping[str, Any]) -> str:
    """The score in words, or why there is none."""
    if score := _score(result):
        return f"pass@1 {100 * score['value']:.1f} %, {_interval(score)}"
    if subset := result.get("subset"):
        return (
            f"{subset['samples_passed']} of {subset['samples']} samples pass, of a subset of"
            f" {subset['problems']} problems, which is no score of HumanEval"
        )
    if result.get("status") == "not_judged":
        return "no score: not judged yet"
    return f"no score: {result.get('status', 'unknown')}: {result.get('why', 'no reason was recorded')}"


def _problems(name: str, result: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    key = hashlib.sha256(json.dumps([name, result], sort_keys=True).encode()).hexdigest()[:8]
    verdicts = [str(sample.get("verdict", "none") or "not judged") for sample in samples]
    known = sorted({*verdicts})
    counts = ", ".join(f"{verdict} {verdicts.count(verdict)}" for verdict in known) or "no samples kept"
    if cut := result.get("cut_in_thought"):
        counts += f"; {cut} answers cut in their thought"
    problems = []
    for number, (sample, verdict) in enumerate(zip(samples, verdicts, strict=True)):
        task, passed = str(sample["task_id"]), sample.get("passed") is True
        problems.append(
            {
                "task": task,
                "number": task.split("/")[-1],
                "anchor": f"he-{key}-{number}",
                "verdict": verdict,
                "passed": passed,
                "class": "pass" if passed else "other" if verdict != "failed" else "",
                "detail": sample.get("detail") or "",
                "completion": sample.get("completion", ""),
                "program": sample.get("program", ""),
            }
        )
    settings = {n: value for n, value in result.items() if n != "passed_by_problem"}  # the grid has them
    return {
        "name": name,
        "sentence": f"{_verdict(result)}; {counts}.",
        "samples": problems,
        "verdicts": known,
        "settings": list(flat(settings)),
    }


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and values of a JSON object, in words."""
    words = {True: "yes", False: "no", None: "none"}
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            yield f"{prefix}{name}", " ".join(map(str, value)) or "none"
        else:
            yield f"{prefix}{name}", words[value] if value is None or isinstance(value, bool) else str(value)


def comparison(result: Mapping[str, Any]) -> dict[str, Any]:
    """The arms under one budget: the sentence that they support, a row and an interval for each."""
    arms = [arm for arm in result.get("arms", []) if isinstance(arm, dict)]
    names = [str(arm.get("name", "?")) for arm in arms]
    metrics = list(dict.fromkeys(name for arm in arms for name in arm.get("metrics", {})))
    estimates = [[_estimate(arm.get("metrics", {}).get(metric)) for metric in metrics] for arm in arms]
    shown = ("arms", "sentence", "warnings", "differences")
    return {
        "sentence": result.get("sentence", ""),
        "warnings": result.get("warnings", []),
        "metrics": metrics,
        "arms": [
            {
                "name": name,
                "steps": arm.get("steps", "–"),
                "seconds": arm.get("training_seconds", "–"),
                "estimates": row,
            }
            for name, arm, row in zip(names, arms, estimates, strict=True)
        ],
        "charts": [
            intervals(
                metric.removeprefix("heldout/"),
                [(n, row[i]) for n, row in zip(names, estimates, strict=True)],
            )
            for i, metric in enumerate(metrics)
        ],
        "differences": [{"shown": False} | one for one in result.get("differences", [])],
        "settings": list(flat({name: value for name, value in result.items() if name not in shown})),
    }


def _estimate(value: Any) -> Estimate | None:
    """A metric of an arm; a number alone is an interval of no width."""
    if isinstance(value, dict) and "mean" in value:
        mean = float(value["mean"])
        return Estimate(mean, float(value.get("low", mean)), float(value.get("high", mean)))
    return Estimate(*(float(value),) * 3) if isinstance(value, int | float) else None
