"""pass@k: the unbiased estimator, with confidence intervals over the problems.

An interval covers the uncertainty from having few problems, not from sampling: a greedy run repeats exactly
and still has one.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from potstill.errors import UserError, one_line
from potstill.evals.intervals import clustered, means_of, wilson
from potstill.io.safe_open import read_object

RESAMPLES = 10_000
RESULT = "humaneval.json"
KS = (1, 5, 10, 100)
TEST_SETTINGS = (
    *("task", "data_sha256", "problems", "prompt"),
    *("temperature", "top_p", "max_new_tokens"),
)
"""Settings that two results must share to be comparable."""


@dataclass(frozen=True)
class Score:
    """A share of problems with its 95 % interval; `interval` names the method."""

    value: float
    low: float
    high: float
    interval: str


@dataclass(frozen=True)
class Comparison:
    """The second result minus the first, problem by problem.

    `gained` problems passed more often in the second, `lost` in the first.
    """

    difference: float
    low: float
    high: float
    gained: int
    lost: int
    problems: int


def pass_at_k(n: int, passed: int, k: int) -> float:
    """Probability that one of k samples passes, drawn without replacement from n of which `passed` do.

    1 - C(n - passed, k) / C(n, k): unbiased for every k up to n (Chen et al. 2021, equation 1), where
    1 - (1 - passed / n)^k is not.
    """
    if not (1 <= k <= n and 0 <= passed <= n):
        raise ValueError(f"pass@{k} of {passed} passed in {n}: k must be from 1 to n")
    return 1.0 - math.comb(n - passed, k) / math.comb(n, k)


def scores(passed: Sequence[int], n: int, clusters: Sequence[int] | None = None) -> dict[str, Score]:
    """pass@k for the usual k up to n; each problem has n samples, of which `passed` passed.

    The interval is Wilson's for one sample per problem, else a bootstrap over problems. Where problems resemble each
    other it is Wilson's for as many independent ones as say what they do, `clustered`.

    Args:
        clusters: the number of each problem's cluster.
    """
    by_k = {}
    for k in (k for k in KS if k <= n):
        each = [pass_at_k(n, count, k) for count in passed]
        value = sum(each) / len(each)
        if clusters is not None:
            shares_G, sizes_G = means_of(each, clusters)
            how = f"Wilson over {len(sizes_G)} clusters, 95 %"
            by_k[f"pass@{k}"] = Score(value, *clustered(shares_G, sizes_G), how)
        elif n == 1 or value in (0.0, 1.0):  # resampling equal values would give an interval of width 0
            by_k[f"pass@{k}"] = Score(value, *wilson(round(sum(each)), len(each)), "Wilson, 95 %")
        else:
            by_k[f"pass@{k}"] = Score(value, *_bootstrap(each), "bootstrap over problems, 95 %")
    return by_k


def summarize(
    tasks: Sequence[str], lines: Sequence[Mapping[str, Any]], extra: Sequence[str], whole: bool
) -> dict[str, Any]:
    """Scores, counts and notes. A subset has a pass rate, and nothing that is called pass@1.

    Args:
        tasks: ids of the problems.
        lines: one per sample, the same number for each task.
        extra: the tasks that have extra tests.
        whole: whether `tasks` is all of HumanEval.
    """
    samples = len(lines) // len(tasks)
    passed = dict.fromkeys(tasks, 0)
    passed_extra = {task: 0 for task in tasks if task in extra}
    for line in lines:
        passed[line["task_id"]] += line["passed"]
        if line["task_id"] in passed_extra:
            passed_extra[line["task_id"]] += line["passed"] and line["extra_passed"]

    def table(counts: dict[str, int]) -> dict[str, Any]:
        by_k = scores([*counts.values()], samples)
        return {name: dataclasses.asdict(score) for name, score in by_k.items()}

    summary: dict[str, Any] = {"passed_by_problem": passed}
    if whole:
        summary["scores"] = table(passed)
    else:
        summary["subset"] = {
            "problems": len(passed),
            "samples": len(lines),
            "samples_passed": sum(passed.values()),
        }
    if passed_extra:
        summary["with_extra_tests"] = {
            "problems": len(passed_extra),
            "samples_passed": sum(passed_extra.values()),
        }
        if whole and len(passed_extra) == len(passed):
            summary["with_extra_tests"]["scores"] = table(passed_extra)
    ended = sorted(line["task_id"] for line in lines if line["finish"] == "context")
    summary["programs_that_parse"] = sum(line["parses"] for line in lines) / len(lines)
    summary["verdicts"] = dict(Counter(line["verdict"] for line in lines))
    summary["finishes"] = dict(Counter(line["finish"] for line in lines))
    summary["notes"] = [f"the model's context ended the completion of {task}" for task in ended]
    if cut := sum(line["cut_in_thought"] for line in lines):
        summary["cut_in_thought"] = cut
        summary["notes"].append(
            f"{cut} of {len(lines)} answers were cut in their thought and judged as no answer:"
            " raise --max-new-tokens"
        )
    return summary


def table_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """A finished result as rows of a table."""

    def with_interval(score: dict[str, Any]) -> str:
        interval = f"{score['low']:.1%} to {score['high']:.1%}, {score['interval']}"
        return f"{score['value']:.1%} ({interval})"

    settings, extra = result["settings"], result.get("with_extra_tests", {})
    rows = [[name, with_interval(score)] for name, score in result.get("scores", {}).items()]
    if "subset" in result:
        subset = result["subset"]
        passed = f"{subset['samples_passed']} of {subset['samples']} samples passed"
        rows.append(["subset, no score", passed])
    if extra:
        rows.append(["extra tests passed too", f"{extra['samples_passed']} on {extra['problems']} problems"])
        rows += [
            [f"{name} with extra tests", with_interval(score)]
            for name, score in extra.get("scores", {}).items()
        ]
    rows.append(["verdicts", ", ".join(f"{n} {v}" for v, n in sorted(result["verdicts"].items()))])
    rows.append(
        ["programs that parse", f"{result['programs_that_parse']:.1%} of {sum(result['verdicts'].values())}"]
    )
    controls = result["controls"]
    rows.append(["controls", f"published {controls['canonical']}, empty {controls['empty']}"])
    sampling = f"temperature {settings['temperature']}, top-p {settings['top_p']}"
    method = sampling if settings["do_sample"] else "greedy"
    rows.append(["settings", f"{settings['prompt']} prompts, {method}, {settings['samples']} per problem"])
    rows += [["note", note] for note in result["notes"]]
    return rows


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Comparison:
    """Paired bootstrap of two results on the same problems; each value is a share of samples that passed.

    Resampling the differences keeps the problems' difficulty, which both results share, out of the interval
    (Efron & Tibshirani 1993, chapter 8).
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} problems: must be equal and above 0")
    differences = [two - one for one, two in zip(first, second, strict=True)]
    return Comparison(
        sum(differences) / len(differences),
        *_bootstrap(differences),
        gained=sum(d > 0 for d in differences),
        lost=sum(d < 0 for d in differences),
        problems=len(differences),
    )


def compare(first: Path, second: Path) -> Comparison:
    """Two HumanEval results, the second minus the first.

    Args:
        first, second: `humaneval.json` files, or the folders they are in.

    Raises:
        UserError: a result is not finished, or the two are not of the same test and problems.
    """
    (one, one_test), (two, two_test) = _shares(first), _shares(second)
    if differing := [name for name in one_test if one_test[name] != two_test[name]]:
        name = differing[0]
        raise UserError(
            f"{second}: its {name} is {two_test[name]!s:.80}, that of {first} is {one_test[name]!s:.80}."
            " They are different tests. Evaluate both with the same settings."
        )
    return paired_difference([*one.values()], [two[task] for task in one])


def _shares(path: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Each problem's share of samples that passed, and the settings that define the test."""
    file = path / RESULT if path.is_dir() else path
    result = read_object(file, f"Give a {RESULT}.")
    if result.get("status") != "finished":
        raise UserError(f"{file}: {result.get('status', 'no HumanEval result')!s:.60}. Nothing to compare.")
    try:
        settings, passed = result["settings"], result["passed_by_problem"]
        shares = {task: count / settings["samples"] for task, count in passed.items()}
        return shares, {name: settings[name] for name in TEST_SETTINGS}
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{file}: damaged: {one_line(error)} Give a {RESULT}.") from error


def _bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """95 % percentile interval of the mean; the same for the same values."""
    array = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(0).integers(len(array), size=(RESAMPLES, len(array)))
    low, high = np.quantile(array[picks].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)
