"""The repeats of a run's earlier profiles, to which another profile adds its own.

The spread within some minutes is not that from one hour to the next; several profiles together have both. Only repeats
of the same measurement are added: the same files by their hashes, settings, versions and machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from potstill.evals.speed import RATES, Model, Note

SAME = ("format", "machine", "python", "libraries", "settings")
"""Parts of a profile that are the same in all whose repeats are added, but for the number of repeats."""
PEAK = "peak_memory_bytes"
Json = dict[str, Any]


def entries(known: Json, about: Json, note: Note) -> dict[tuple[str, str], Json]:
    """By runtime and type of the weights, what an earlier profile has measured as `about` says; none, with a note why,
    where it was measured otherwise.
    """
    if not known:
        return {}
    if difference := _difference(known, about):
        note(f"starting a new profile, without the earlier repeats: {difference}")
        return {}
    speeds = [one for one in _list(known.get("speeds")) if isinstance(one, dict)]
    return {(str(one.get("runtime")), str(one.get("weights"))): one for one in speeds}


def _difference(known: Json, about: Json) -> str:
    """The first part that is not the same, with both values; empty where all are."""
    for name in SAME:
        was, now = known.get(name), about[name]
        if not (isinstance(was, dict) and isinstance(now, dict)):
            if was != now:
                return f"{name} was {was!r:.80}, is {now!r:.80}"
            continue
        for key in sorted({*was, *now} - {"repeats"}):
            if was.get(key) != now.get(key):
                return f"{name}.{key} was {was.get(key)!r:.80}, is {now.get(key)!r:.80}"
    return ""


def is_better(earlier: Json, asked: Mapping[str, Model], sha256: Mapping[str, str]) -> bool:
    """Whether the earlier entry, of the same files, has a model that failed this time."""
    failed = [who for who in sha256 if asked[who].why]
    return earlier.get("sha256") == sha256 and any(isinstance(earlier.get(who), dict) for who in failed)


def add(earlier: Json, asked: Mapping[str, Model], sha256: Mapping[str, str]) -> list[str]:
    """Put the earlier repeats before the new ones, round by round, where both are of the same.

    Returns:
        When those were measured; empty where none were added.
    """
    measured = {who: model for who, model in asked.items() if not model.why}
    before = {who: one for who in asked if isinstance(one := earlier.get(who), dict)}
    rounds = {who: _repeats(one) for who, one in before.items()}
    dates = [date for date in _list(earlier.get("dates")) if isinstance(date, str)]
    is_same = earlier.get("sha256") == sha256 and before.keys() == measured.keys() and dates
    if not is_same or len(set(map(len, rounds.values()))) != 1:  # a ratio is of one round
        return []
    if any(before[who].get("version") != model.about["version"] for who, model in measured.items()):
        return []
    for who, model in measured.items():
        model.measured = rounds[who] + model.measured
        peaks = (one for one in (before[who].get(PEAK), model.memory.get(PEAK)) if isinstance(one, int))
        model.memory |= {PEAK: max(peaks)}
    return dates


def _repeats(one: Json) -> list[Json]:
    """Of a model's figures, where each repeat has what the rates are computed from; else none."""
    repeats = _list(one.get("measured"))
    try:
        is_whole = all(of(repeat) > 0 for repeat in repeats for of in RATES.values())
    except (TypeError, KeyError, ZeroDivisionError, ValueError):  # the file was edited
        return []
    return repeats if is_whole else []


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
