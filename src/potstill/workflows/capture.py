"""`potstill capture`: a recipe's teacher asked once, for every run that learns from it.

What it will take is told before anything is written, what it is worth is measured before it is called done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from pathlib import Path
from typing import Any

from potstill.build.resolve import resolve
from potstill.build.setup import RunSetup, process_of, set_up
from potstill.errors import UserError
from potstill.io.safe_open import read_object
from potstill.io.terminal import Display, clock, size
from potstill.losses.targets import HiddenTargets
from potstill.models.causal_lm import CausalLM
from potstill.preflight.auto import settle
from potstill.preflight.plan import available
from potstill.recipe import load as recipes
from potstill.recipe.load import Recipe
from potstill.store.codecs import DEFAULT_BYTES, k_of, planned_bytes, threshold_of
from potstill.store.layout import (
    CAPTURE,
    CERTIFICATE,
    HEAD,
    HELDOUT,
    HELDOUT_CODEC,
    SCHEMA,
    Files,
    codec_of,
)
from potstill.store.reader import read_manifest
from potstill.store.shards import AGAIN
from potstill.store.writer import StoreWriter, write_json
from potstill.teachers.backends import FULL
from potstill.teachers.capture_rows import Captured, capture_shard
from potstill.teachers.stored import OF_CORPUS
from potstill.types import Teacher
from potstill.workflows.capture_fidelity import certificate

MOST_SHARDS = 1000  # where the recipe does not say how many rows a file has
LOOKED_AT = 2048  # held-out positions that a threshold is found on
Json = dict[str, Any]


def capture(recipe: Path, overrides: list[str], out: Path, part: str | None, display: Display) -> Json | None:
    """Write the recipe's targets into `out`, or go on with it; the manifest where all is there now.

    Args:
        part: `I/N`, the I-th of N ranges of shards; None: all, or by torchrun each process its own.

    Raises:
        UserError: nothing is written unless the recipe is sound and the disk has room.
    """
    loaded = recipes.load(recipe, overrides)
    number, parts = _part(part)
    require_capturable(loaded, recipe)
    resolved = resolve(loaded)
    if resolved.teacher.model_config is None:
        raise UserError(
            f"{recipe}: teacher.name: {loaded.teacher.registered_name} has no targets to capture. Give a teacher of"
            " name torch."
        )
    resolved = settle(resolved, display.note)
    with process_of(resolved.recipe):
        setup = set_up(resolved, display.note)
        with contextlib.closing(setup.teacher):
            return _capture(setup, out, number, parts, display)


def _capture(setup: RunSetup, out: Path, number: int, parts: int, display: Display) -> Json | None:
    """The `number`-th of so many parts of the store."""
    teacher, held, rows_per_batch = setup.teacher, setup.corpus.heldout, setup.recipe.capture.rows_per_batch
    head = _model(teacher).head
    settings = settings_of(setup, _recorded(out))
    shards = settings["shards"]
    mine = range((number - 1) * shards // parts, number * shards // parts)
    _announce(settings, setup, out, mine, display)
    writer = StoreWriter.open(out, settings)
    with writer.exclusive(mine, first=number == 1):
        if number == 1:
            writer.write_head(head)
            writer.write_tokenizer(setup.tokenizer)
            writer.write(
                out / HELDOUT,
                lambda file: capture_shard(
                    file, teacher, held, range(len(held)), HELDOUT_CODEC, 0, rows_per_batch
                ),
            )
        _capture_shards(setup, settings, writer, mine, display)
        if number == 1 and not (out / CERTIFICATE).exists():
            display.note("certificate: on the held-out rows")
            seed = settings["kind"].get("seed", 0)
            figures = certificate(setup.student, teacher, held, codec_of(settings), seed)
            student = {**setup.origin, "weights_sha256": setup.student.weights_sha256()}
            write_json(out / CERTIFICATE, figures | {"student": student})
    return read_manifest(out) if writer.finish() else None


def require_capturable(recipe: Recipe, where: Path) -> None:
    """What a training from such targets would refuse, refused before they are captured."""
    if recipe.capture.name == "sampled" and recipe.objective.divergence.name != "forward_kl":
        raise UserError(
            f"{where}: capture.name: sampled targets are unbiased for forward_kl alone, and"
            f" objective.divergence is {recipe.objective.divergence.name}. Set capture.name: hidden."
        )


def settings_of(setup: RunSetup, recorded: Json | None) -> Json:
    """All that the targets depend on, and how they are kept. `recorded` is that of a capture that goes on."""
    config, ids, corpus = setup.recipe.capture, setup.shared.ids, setup.corpus
    numbers = _row_numbers(setup)
    rows, each = corpus.train, config.rows_per_shard or max(64, -(-len(numbers) // MOST_SHARDS))
    head = _model(setup.teacher).head
    return {
        "schema": SCHEMA,
        "kind": _kind(setup, recorded),
        "temperature": None if config.name == "hidden" else setup.recipe.objective.temperature,
        "teacher": _teacher(setup),
        "vocabulary": {"size": setup.teacher.vocab_size, "ids": ids},
        "head": {"scale": head.scale, "softcap": head.softcap, "width": head.weight_VD.shape[1]},
        "corpus": {name: corpus.manifest[name] for name in (*OF_CORPUS, "fingerprint", "train_rows")},
        "rows": len(numbers),
        "runs": _runs(numbers),
        "rows_per_batch": config.rows_per_batch,
        "rows_per_shard": each,
        "shards": -(-len(numbers) // each),
        "positions": sum(int(rows.supervised_per_row[rows.kept[number]]) for number in numbers),
    }


def _kind(setup: RunSetup, recorded: Json | None) -> Json:
    """How a position's targets are kept, with nothing left to choose."""
    config, ids = setup.recipe.capture, setup.shared.ids
    kind = {name: value for name, value in dataclasses.asdict(config).items() if not name.startswith("rows")}
    if config.name == "topk":
        kind["k"] = min(config.k or k_of(config.bytes_per_position or 0, ids, config.dtype), ids)
    if config.name == "sampled" and config.threshold is None:
        before = (recorded or {}).get("kind")
        if isinstance(before, dict) and before.get("bytes_per_position") == config.bytes_per_position:
            kind["threshold"] = before.get("threshold")
        wanted = config.bytes_per_position or DEFAULT_BYTES
        kind["threshold"] = kind["threshold"] or _find_threshold(setup, wanted)
    return kind


def _teacher(setup: RunSetup) -> Json:
    """Whose targets they are."""
    teacher = setup.teacher
    described, model = teacher.describe(), _model(teacher)
    backend = described["runs_on"]
    bits = {} if backend["weights"] == FULL else {name: backend[name] for name in ("weights", "backend")}
    return {
        "source": described["source"],
        "weights_sha256": teacher.weights_sha256(),
        "dtype": str(model.head.weight_VD.dtype).removeprefix("torch."),
        "architecture": type(model.hf).__name__,
        **bits,
    }


def _model(teacher: Teacher) -> CausalLM:
    assert teacher.model is not None  # `capture` refuses others
    return teacher.model


def _runs(numbers: list[int]) -> list[list[int]]:
    """Rising numbers as first and last of each gapless run."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return runs


def _announce(settings: Json, setup: RunSetup, out: Path, mine: range, display: Display) -> None:
    """What will be written, and where; UserError where the disk has no room for it."""
    ids, width = settings["vocabulary"]["ids"], settings["head"]["width"]
    each = planned_bytes(settings["kind"], ids, width)
    held = 4 * width * setup.corpus.manifest["heldout_positions"]
    once, rows = held + _model(setup.teacher).head.weight_VD.nbytes, each * settings["positions"]
    _, free = available(setup.recipe, out)
    kind = ", ".join(f"{name} {value}" for name, value in settings["kind"].items() if value is not None)
    display.note(
        f"targets: {kind}; {settings['positions']} positions of {settings['rows']} rows, about {each:.3g}"
        f" bytes each; with held-out rows and head {size(int(once + rows))} into {out}, {size(free)} free"
    )
    files = [Files(out).shard(number) for number in mine] + [out / HEAD, out / HELDOUT]
    there = sum(file.stat().st_size for file in files if file.exists())
    needed = int(rows * len(mine) / settings["shards"]) + (0 if mine.start else once) - there
    if needed > free:
        raise UserError(
            f"{out}: {size(needed)} are needed and {size(free)} free. Make room, or capture fewer."
        )


def _row_numbers(setup: RunSetup) -> list[int]:
    plan, order = setup.recipe.train, setup.corpus.order(setup.recipe.train.seed)
    if setup.recipe.capture.rows == "all":
        return list(range(len(setup.corpus.train)))
    return sorted({row for step in range(plan.steps) for row in order.rows(step, plan.rows_per_step)})


def _capture_shards(
    setup: RunSetup, settings: Json, writer: StoreWriter, mine: range, display: Display
) -> None:
    teacher, numbers, codec = setup.teacher, _row_numbers(setup), codec_of(settings)
    each, seed = settings["rows_per_shard"], settings["kind"].get("seed", 0)
    todo = set(writer.missing(mine))
    left = sum(len(numbers[n * each : (n + 1) * each]) for n in todo)
    started, done = time.perf_counter(), 0

    def on_row(one: Captured) -> None:
        nonlocal done
        done += 1
        if done % 16 == 0 or done == left:
            seconds = time.perf_counter() - started
            rate = done * setup.recipe.corpus.tokens_per_row / seconds
            display.note(
                f"{done}/{left} rows, {rate:.0f} tokens/s, {clock(seconds / done * (left - done))} left"
            )

    for shard in mine:
        rows = numbers[shard * each : (shard + 1) * each]
        writer.write(
            writer.files.shard(shard),
            lambda file, rows=rows: capture_shard(  # type: ignore[misc]
                file, teacher, setup.corpus.train, rows, codec, seed, settings["rows_per_batch"], on_row
            ),
        )


def _find_threshold(setup: RunSetup, wanted: float) -> float:
    """On the first held-out rows: nothing of it depends on what is captured already."""
    held, tokens = setup.corpus.heldout, setup.recipe.corpus.tokens_per_row
    batch = held.batch(range(min(len(held), max(LOOKED_AT // tokens, 1)))).to(setup.device)
    targets = setup.teacher.targets(batch)
    assert isinstance(targets, HiddenTargets)
    return threshold_of(
        wanted, targets.hidden_NE, _model(setup.teacher).head, setup.recipe.objective.temperature
    )


def _recorded(out: Path) -> Json | None:
    place = out / CAPTURE
    return read_object(place, AGAIN) if place.exists() else None


def _part(part: str | None) -> tuple[int, int]:
    if part is None:  # one of those that torchrun started, or all
        part = f"{int(os.environ.get('RANK', '0')) + 1}/{os.environ.get('WORLD_SIZE', '1')}"
    words = part.split("/")
    if len(words) == 2 and all(word.isdecimal() for word in words):
        number, parts = map(int, words)
        if 1 <= number <= parts:
            return number, parts
    raise UserError(f"--part: {part!r} is not I/N with I from 1 to N, such as 2/4.")
