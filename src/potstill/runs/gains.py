"""What a run has gained, in words: `profile.json` as rows and sentences for the terminal, the report and the card."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from potstill.errors import UserError, one_line
from potstill.io.terminal import aligned, short, size
from potstill.runs.run_dir import RunDir

FIGURES = {
    "prefill_tokens_per_s": "prefill, tokens/s",
    "decoding_tokens_per_s": "decoding, tokens/s",
    "first_token_s": "first token after, s",
}
Profile = Mapping[str, Any]


class Row(NamedTuple):
    group: str
    """Runtime and type of the weights; empty for sizes."""
    what: str
    teacher: str
    student: str
    ratio: str
    """Student to teacher; `–` where one of them was not measured."""

    @property
    def name(self) -> str:
        return f"{self.group}: {self.what}" if self.group else self.what


def profile_of(run: RunDir) -> dict[str, Any]:
    """The run's profile; empty where nothing was measured, or that of another student.

    Raises:
        UserError: damaged.
    """
    profile = run.profile()
    if not profile or profile.get("of") != run.receipt().get("output"):
        return {}
    try:
        lines(profile)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise UserError(
            f"{run.path / 'profile.json'}: damaged: {one_line(error)}. Remove it, or profile the run again."
        ) from error
    return profile


def rows(profile: Profile, with_spread: bool = True) -> list[Row]:
    """A row for each figure that at least one model has."""
    of = {who: one if isinstance(one, dict) else {} for who, one in profile["models"].items()}
    found = [
        _row("", "parameters", {who: one.get("parameters") for who, one in of.items()}, short),
        _row("", "weights on disk", {who: one.get("bytes") for who, one in of.items()}, size),
    ]
    same_type = {speed["weights"]: speed.get("teacher_bytes") for speed in _measured(profile)}
    for export in profile["exports"]:
        sizes = {"teacher": same_type.get(export["format"]), "student": export["bytes"]}
        of_what = "exported folder" if export["format"] == "hf" else f"in {export['format']}"
        found.append(_row("", f"weights, {of_what}", sizes, size))
    for speed in _measured(profile):
        found += _of_speed(speed, _spread if with_spread else _median)
    return found


def _measured(profile: Profile) -> list[Mapping[str, Any]]:
    return [speed for speed in profile["speeds"] if "why" not in speed]


def _of_speed(speed: Mapping[str, Any], shown: Callable[[Mapping[str, float]], str]) -> Iterator[Row]:
    figures = {who: one if isinstance(one := speed[who], dict) else {} for who in ("teacher", "student")}
    if not any(figures.values()):
        return
    group = f"{speed['runtime']}, {speed['weights']}"
    for key, title in FIGURES.items():
        teacher, student = (shown(one[key]) if one else "–" for one in figures.values())
        ratio = speed["ratios"].get(key)
        # Without its spread a ratio that may be above or below 1 would read as a finding.
        how = _spread if ratio and _holds_one(ratio) else shown
        yield Row(group, title, teacher, student, how(ratio) if ratio else "–")
    peaks = {who: one.get("peak_memory_bytes") for who, one in figures.items()}
    loading = any(one.get("with_loading") for one in figures.values())
    yield _row(group, f"peak memory{', with loading' if loading else ''}", peaks, size)


def _row(group: str, what: str, values: Mapping[str, int | None], shown: Callable[[int], str]) -> Row:
    known, own = values["teacher"], values["student"]
    ratio = f"{own / known:.3g}" if known and own else "–"
    teacher, student = ("–" if value is None else shown(value) for value in (known, own))
    return Row(group, what, teacher, student, ratio)


def _holds_one(ratio: Mapping[str, float]) -> bool:
    """Whether its spread has ratios on both sides of 1."""
    return ratio["low"] <= 1 <= ratio["high"]


def _spread(of: Mapping[str, float]) -> str:
    return f"{_median(of)} [{_number(of['low'])}, {_number(of['high'])}]"


def _median(of: Mapping[str, float]) -> str:
    return _number(of["median"])


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def sentences(profile: Profile, with_spread: bool = True) -> Iterator[str]:
    """What was accepted, under which conditions all of it was measured, and what was not run."""
    yield from acceptance(profile)
    yield conditions(profile, f" [{profile['spread']}]" if with_spread else "")
    for what, why in not_run(profile):
        yield f"Not run: {'; '.join(what)}: {why.rstrip('.')}."


def sentences_for_others(profile: Profile) -> Iterator[str]:
    """The same without reasons, which name folders of this machine."""
    yield from acceptance(profile)
    yield conditions(profile, f" [{profile['spread']}]")
    if names := [name for what, _ in not_run(profile) for name in what]:
        yield f"Not run: {'; '.join(names)}."


def acceptance(profile: Profile) -> Iterator[str]:
    """Of the student as the teacher's draft model."""
    expected, measured = profile["acceptance"]["expected"], profile["acceptance"]["measured"]
    if isinstance(expected, dict):
        yield (
            f"As the teacher's draft model: expected acceptance {expected['mean']:.4f}, the mean of 1 - total variation"
            f" over {expected['positions']:,} held-out positions at temperature 1."
        )
    if isinstance(measured, dict):
        interval = f"[{measured['low']:.4f}, {measured['high']:.4f}] ({measured['interval']})"
        yield (
            f"Speculative decoding in Transformers, {measured['drafted_at_once']} drafts at once:"
            f" {measured['accepted']} of {measured['judged']} judged drafts accepted, {measured['rate']:.4f}"
            f" {interval}; {measured['tokens_per_round']:.3g} tokens a round,"
            f" {_spread(measured['speedup'])} times as fast as the teacher alone."
        )


def conditions(profile: Profile, spread: str) -> str:
    settings, machine = profile["settings"], profile["machine"]
    versions = {speed[who]["version"] for speed in _measured(profile) for who in _run_in(speed)}
    device = "" if machine["device"] == "cpu" else f", {machine['device']}"
    threads = f"{settings['threads']} thread{'' if settings['threads'] == 1 else 's'}"
    return (
        f"Medians of {_repeats(profile)} in turns{spread}:"
        f" {settings['prompt_tokens']} tokens of prompt ({settings['prompt']}) and {settings['new_tokens']} new ones,"
        f" {threads} of {machine['processor']}{device}; {', '.join(sorted(versions))}; {_dates(profile)}."
    )


def _dates(profile: Profile) -> str:
    """When the repeats were measured."""
    dates = sorted({date for speed in _measured(profile) for date in speed.get("dates", [])}) or [
        profile["date"]
    ]
    return f"from {dates[0]} to {dates[-1]}" if len(dates) > 1 else str(dates[0])


def _repeats(profile: Profile) -> str:
    """How many there are of each figure, and of how many profiles; by runtime where these differ."""
    counts: dict[str, list[str]] = {}
    for speed in _measured(profile):
        if not (run_in := _run_in(speed)):
            continue
        repeats = speed[run_in[0]].get("repeats", profile["settings"]["repeats"])
        profiles = len(speed.get("dates", [""]))
        of = f" of {profiles} profiles" if profiles > 1 else ""
        counts.setdefault(f"{repeats} repeats{of}", []).append(f"{speed['runtime']}, {speed['weights']}")
    if len(counts) < 2:
        return next(iter(counts), f"{profile['settings']['repeats']} repeats")
    return " and ".join(f"{count} ({'; '.join(names)})" for count, names in counts.items())


def _run_in(speed: Mapping[str, Any]) -> list[str]:
    return [who for who in ("teacher", "student") if isinstance(speed[who], dict)]


def not_run(profile: Profile) -> list[tuple[list[str], str]]:
    """Each reason once, behind what it is of."""
    reasons: dict[str, list[str]] = {}

    def add(what: str, value: Any) -> None:
        if isinstance(value, str):
            reasons.setdefault(value.removeprefix("not run: "), []).append(what)

    for who, model in profile["models"].items():
        add(who, model)
    for speed in profile["speeds"]:
        name = f"{speed['runtime']}{', ' + speed['weights'] if speed['weights'] else ''}"
        for key in ("why",) if "why" in speed else ("teacher", "student"):
            add(name if key == "why" else f"{name}, {key}", speed[key])
    add("expected acceptance", profile["acceptance"]["expected"])
    add("speculative decoding", profile["acceptance"]["measured"])
    return [(what, why) for why, what in reasons.items()]


def lines(profile: Profile, with_spread: bool = True) -> list[str]:
    """For the terminal: a table, whose rows begin with blanks, and sentences."""
    of = rows(profile, with_spread)
    table = aligned(["", "teacher", "student", "ratio"], [[f"  {row.what}", *row[2:]] for row in of])
    title, *others = table.splitlines()
    found, group = [title], ""
    for row, line in zip(of, others, strict=True):
        if row.group != group:
            found.append(f"  {row.group}")
            group = row.group
        found.append(line)
    return [*found, *sentences(profile, with_spread)]
