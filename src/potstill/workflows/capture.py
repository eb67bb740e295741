"""`potstill capture`: a recipe's teacher asked once, for every run that learns from it.

What it will take is told before anything is written, what it is worth is measured before it is called done.
"""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

from potstill.build.setup import Cast, assemble
from potstill.errors import UserError
from potstill.io.safe_open import read_object
from potstill.io.terminal import Display, clock, size
from potstill.preflight.auto import settled
from potstill.preflight.plan import available
from potstill.recipe import load as recipes
from potstill.recipe import sections
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
from potstill.teachers.capture_rows import Captured, capture_shard
from potstill.teachers.hf import TorchTeacher
from potstill.teachers.stored import OF_CORPUS
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
    if loaded.teacher.name != "torch":
        raise UserError(
            f"{recipe}: teacher.name: {loaded.teacher.name} has no targets to capture. Give a teacher of name"
            " torch."
        )
    require_kind(loaded, recipe)
    cast = assemble(settled(loaded, display.note), display.note)
    teacher, held = cast.teacher, cast.corpus.heldout
    assert isinstance(teacher, TorchTeacher)
    settings = settings_of(cast, _begun(out))
    shards = settings["shards"]
    mine = range((number - 1) * shards // parts, number * shards // parts)
    _tell(settings, cast, out, mine, display)
    writer = StoreWriter.open(out, settings)
    with writer.exclusive(mine, first=number == 1):
        if number == 1:
            writer.write_head(teacher.model.head)
            writer.write_tokenizer(cast.tokenizer)
            writer.write(
                out / HELDOUT,
                lambda file: capture_shard(
                    file, teacher, held, range(len(held)), HELDOUT_CODEC, 0, loaded.capture.rows_per_batch
                ),
            )
        _capture_shards(cast, settings, writer, mine, display)
        if number == 1 and not (out / CERTIFICATE).exists():
            display.note("certificate: on the held-out rows")
            seed = settings["kind"].get("seed", 0)
            found = certificate(cast.student, teacher, held, codec_of(settings), seed)
            asked = {**cast.origin, "weights_sha256": cast.student.weights_sha256()}
            write_json(out / CERTIFICATE, found | {"student": asked})
    return read_manifest(out) if writer.finish() else None


def require_kind(recipe: Recipe, where: Path) -> None:
    """What a training from such targets would refuse, refused before they are captured."""
    if recipe.capture.name == "sampled" and recipe.objective.divergence.name != "forward_kl":
        raise UserError(
            f"{where}: capture.name: sampled targets are unbiased for forward_kl alone, and"
            f" objective.divergence is {recipe.objective.divergence.name}. Set capture.name: hidden."
        )


def settings_of(cast: Cast, begun: Json | None) -> Json:
    """All that the targets depend on, and how they are kept. `begun` is that of a capture that goes on."""
    asked, teacher, ids = cast.recipe.capture, cast.teacher, cast.shared.ids
    assert isinstance(teacher, TorchTeacher) and isinstance(cast.recipe.teacher, sections.TorchTeacher)
    numbers = _row_numbers(cast)
    kind = {name: value for name, value in dataclasses.asdict(asked).items() if not name.startswith("rows")}
    temperature = None if asked.name == "hidden" else cast.recipe.objective.temperature
    if asked.name == "topk":
        kind["k"] = min(asked.k or k_of(asked.bytes_per_position or 0, ids, asked.dtype), ids)
    if asked.name == "sampled" and asked.threshold is None:
        known = (begun or {}).get("kind")
        wanted = asked.bytes_per_position or DEFAULT_BYTES
        if isinstance(known, dict) and known.get("bytes_per_position") == asked.bytes_per_position:
            kind["threshold"] = known.get("threshold")
        kind["threshold"] = kind["threshold"] or _found_threshold(cast, wanted)
    rows, each = cast.corpus.train, asked.rows_per_shard or max(64, -(-len(numbers) // MOST_SHARDS))
    positions = sum(int(rows.supervised_per_row[rows.kept[number]]) for number in numbers)
    model, head = teacher.model, teacher.model.head
    return {
        "schema": SCHEMA,
        "kind": kind,
        "temperature": temperature,
        "teacher": {
            "source": cast.recipe.teacher.model,
            "weights_sha256": teacher.weights_sha256(),
            "dtype": cast.recipe.teacher.dtype,
            "architecture": type(model.hf).__name__,
            **(
                {}
                if teacher.choice.is_full
                else {"weights": teacher.choice.weights, "backend": teacher.choice.backend}
            ),
        },
        "vocabulary": {"size": teacher.vocab_size, "ids": ids},
        "head": {"scale": head.scale, "softcap": head.softcap, "width": head.weight_VD.shape[1]},
        "corpus": {name: cast.corpus.manifest[name] for name in (*OF_CORPUS, "fingerprint", "train_rows")},
        "rows": len(numbers),
        "runs": _runs(numbers),
        "rows_per_batch": asked.rows_per_batch,
        "rows_per_shard": each,
        "shards": -(-len(numbers) // each),
        "positions": positions,
    }


def _runs(numbers: list[int]) -> list[list[int]]:
    """Rising numbers as first and last of each gapless run."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return runs


def _tell(settings: Json, cast: Cast, out: Path, mine: range, display: Display) -> None:
    """What will be written, and where; UserError where the disk has no room for it."""
    ids, width = settings["vocabulary"]["ids"], settings["head"]["width"]
    each = planned_bytes(settings["kind"], ids, width)
    held = 4 * width * cast.corpus.manifest["heldout_positions"]
    head = cast.teacher.model.head.weight_VD.nbytes if isinstance(cast.teacher, TorchTeacher) else 0
    once, rows = held + head, each * settings["positions"]
    _, free = available(cast.recipe, out)
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


def _row_numbers(cast: Cast) -> list[int]:
    plan, order = cast.recipe.train, cast.corpus.order(cast.recipe.train.seed)
    if cast.recipe.capture.rows == "all":
        return list(range(len(cast.corpus.train)))
    return sorted({row for step in range(plan.steps) for row in order.rows(step, plan.rows_per_step)})


def _capture_shards(cast: Cast, settings: Json, writer: StoreWriter, mine: range, display: Display) -> None:
    teacher, numbers, codec = cast.teacher, _row_numbers(cast), codec_of(settings)
    assert isinstance(teacher, TorchTeacher)
    each, seed = settings["rows_per_shard"], settings["kind"].get("seed", 0)
    todo = set(writer.missing(mine))
    left = sum(len(numbers[n * each : (n + 1) * each]) for n in todo)
    started, done = time.perf_counter(), 0

    def on_row(one: Captured) -> None:
        nonlocal done
        done += 1
        if done % 16 == 0 or done == left:
            seconds = time.perf_counter() - started
            rate = done * cast.recipe.corpus.tokens_per_row / seconds
            display.note(
                f"{done}/{left} rows, {rate:.0f} tokens/s, {clock(seconds / done * (left - done))} left"
            )

    for shard in mine:
        rows = numbers[shard * each : (shard + 1) * each]
        writer.write(
            writer.files.shard(shard),
            lambda file, rows=rows: capture_shard(  # type: ignore[misc]
                file, teacher, cast.corpus.train, rows, codec, seed, settings["rows_per_batch"], on_row
            ),
        )


def _found_threshold(cast: Cast, wanted: float) -> float:
    """On the first held-out rows: nothing of it depends on what is captured already."""
    held, tokens = cast.corpus.heldout, cast.recipe.corpus.tokens_per_row
    batch = held.batch(range(min(len(held), max(LOOKED_AT // tokens, 1)))).to(cast.device)
    assert isinstance(cast.teacher, TorchTeacher)
    targets = cast.teacher.targets(batch)
    head, T = cast.teacher.model.head, cast.recipe.objective.temperature
    return threshold_of(wanted, targets.hidden_NE, head, T)


def _begun(out: Path) -> Json | None:
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
