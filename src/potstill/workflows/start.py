"""Where a run begins or goes on: its folder, and every choice that the recipe leaves to `auto`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from potstill.build.resolve import Resolved, notes_on_types, pin, resolve, settle_types
from potstill.errors import UserError
from potstill.io.cpu_matmul import choose_product_dtype
from potstill.io.terminal import Display
from potstill.models.load import choose_device
from potstill.preflight.auto import (
    as_recorded,
    as_started,
    choose_backend,
    choose_chunk,
    with_chunk,
    with_matmul,
    with_types_of,
)
from potstill.recipe import load as recipes
from potstill.recipe.load import Recipe
from potstill.runs.places import default_path, newest_path, places
from potstill.runs.run_dir import RunDir
from potstill.runs.summary import state_of
from potstill.training.distributed import Ranks

Json = dict[str, Any]
Resume = bool | Literal["auto"]
"""Whether a run goes on. auto: where there is one of the same recipe; else it is a new one."""


@dataclass(frozen=True)
class Start:
    """Where a run is or will be, with every choice that the recipe left to `auto` settled."""

    path: Path
    resolved: Resolved
    recipe_text: bytes
    chunk: Json
    run: RunDir | None
    """The run to resume; None for a new one."""


def start(
    recipe: Recipe,
    name: str,
    text: bytes,
    out: Path | None,
    resume: Resume,
    display: Display,
    ranks: Ranks,
) -> Start:
    """A run that goes on, or a new one.

    Args:
        name: of the recipe, after which its runs are called where `out` is not given.
        text: the recipe as it was written.

    Raises:
        UserError: no run of this recipe to go on with, or a folder that is not free.
    """
    if resume == "auto":
        place = ranks.broadcast(_place_of_same(recipe, name, text, out))
    else:
        place = ranks.broadcast(out or newest_path(name)) if resume else None
    if place is not None:
        return start_resumed(recipe, place, text)
    if out is None and not resume and ranks.is_first:
        _name_unfinished(recipe, name, text, display)
    return _start_new(recipe, ranks.broadcast(out or default_path(name)), text, display, ranks)


def _place_of_same(recipe: Recipe, name: str, text: bytes, out: Path | None) -> Path | None:
    """The run that `--resume auto` goes on with; None where there is none."""
    if out is not None:
        return out if os.path.lexists(out) and not RunDir.is_free(out) else None
    return next((path for path in places(name) if _is_of(recipe, path, text)), None)


def _name_unfinished(recipe: Recipe, name: str, text: bytes, display: Display) -> None:
    """Say that a run of the same recipe is not finished, and how it goes on: it may have been meant."""
    for path in places(name):
        state = state_of(RunDir(path))
        if state in ("stopped", "interrupted", "failed") and _is_of(recipe, path, text):
            display.warn(
                f"{path}: a run of this recipe that is not finished ({state}). The same command with"
                f" --resume --out {path} goes on with it; this is a new run."
            )
            return


def _is_of(recipe: Recipe, path: Path, text: bytes) -> bool:
    """Whether a folder has a run of this recipe. A damaged one is of none."""
    try:
        start_resumed(recipe, path, text)
    except UserError:
        return False
    return True


def _start_new(recipe: Recipe, path: Path, text: bytes, display: Display, ranks: Ranks) -> Start:
    """A new run: the folder must be free."""
    ranks.on_first(lambda: RunDir.require_free(path))
    recipe = _with_types(recipe, display.note, ranks)
    # A branch may move between two ranks' look-ups.
    resolved = resolve(recipe, commits=ranks.broadcast(pin(recipe, {})[1]))
    # Ranks may differ in free memory and processor, but all must use the same chunk and backend.
    chunk = ranks.broadcast(choose_chunk(resolved, display.note))
    backend = ranks.broadcast(choose_backend(resolved, display.note))
    settled = with_matmul(with_chunk(resolved.recipe, chunk.used), backend)
    return Start(path, resolved.with_recipe(settled), text, chunk.as_dict(), None)


def _with_types(recipe: Recipe, note: Callable[[str], None], ranks: Ranks) -> Recipe:
    """The recipe with the types of products that it leaves to `auto`: one choice for all ranks."""
    dtype, why = ranks.broadcast(choose_product_dtype(choose_device(recipe.train.device)))
    for line in notes_on_types(recipe, dtype, why):
        note(line)
    return settle_types(recipe, dtype)


def start_resumed(recipe: Recipe, path: Path, text: bytes) -> Start:
    """A resumed run: schedule and data are functions of the recipe, so the recipe must be the same, and each model of
    the commit that the run started with.
    """
    run = RunDir.open(path)
    commits, recorded = run.commits(), as_recorded(recipes.load(run.resolved))
    resolved = resolve(with_types_of(recipe, recorded), commits=commits)
    if not commits:  # an earlier version of potstill recorded none
        recorded, _ = pin(recorded, resolved.commits)
    recipe = as_started(resolved.recipe, recorded, run.corpus().get("train_rows"))
    before, now = (_flat(dataclasses.asdict(of.without_places())) for of in (recorded, recipe))
    require_equal(before, now, "recipe", run)
    return Start(run.path, resolved.with_recipe(recipe), text, {}, run)


def require_same_corpus(manifest: dict[str, Any], run: RunDir) -> None:
    """Compares with `corpus.json`, written at the start, so that it also protects a run without a checkpoint."""

    def by_file(corpus: dict[str, Any]) -> dict[str, Any]:
        """Flat, one entry a file, so that the error names the file that differs."""
        sources = corpus.get("sources", {})
        decontamination = corpus.get("decontamination") or {}
        files = [*corpus["files"], *decontamination.get("against", [])]
        counts = {name: value for name, value in decontamination.items() if not isinstance(value, list)}
        others = {name: value for name, value in corpus.items() if name not in ("sources", "files")}
        found = _flat(others | {"decontamination": counts})
        # Of a mix each file is under its source alone: two may read the same one.
        found |= {} if sources else {file["path"]: file["sha256"][:12] for file in files}
        found |= {"files": len(corpus["files"])}
        for source, part in sources.items():
            own = by_file(part)
            found |= {f"{n} of source {source}" if "/" in n else f"sources.{source}.{n}": own[n] for n in own}
        return found

    recorded = {"layout": "stream"} | run.corpus()  # of a time when there was nothing else
    require_equal(by_file(recorded), by_file(manifest), "corpus", run)


def require_equal(recorded: dict[str, Any], now: dict[str, Any], what: str, run: RunDir) -> None:
    differing = sorted(name for name in recorded | now if recorded.get(name) != now.get(name))
    if differing:
        shown = [f"{name} ({recorded.get(name)!r} -> {now.get(name)!r})" for name in differing[:8]]
        more = [f"and {len(differing) - 8} more"] if differing[8:] else []
        raise UserError(
            f"{run.path}: started with another {what}: {', '.join([*shown, *more])}."
            " Resume with the same one, or start a new run."
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys, and places in lists of mappings, joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
            value = {str(number): each for number, each in enumerate(value)}
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
