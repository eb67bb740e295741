"""`potstill write`: a corpus that the teacher writes, by answering the prompts of another.

The folder has `corpus.jsonl`, to which a batch of prompts is appended at a time; `progress.json`, which says how many
bytes of it are whole; and at the end `receipt.json`. A run that was killed goes on where the last whole batch ended,
with the same answers as if it had not been: an answer's random numbers come from the seed, the prompt and the sample.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import io
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from potstill.build.corpus import open_source, teacher_tokenizer
from potstill.build.resolve import Resolved, resolve
from potstill.build.setup import process_of
from potstill.data.completions import Completion
from potstill.data.end_of_turn import ends_of
from potstill.data.prompts import Prompt
from potstill.data.readers import Reading
from potstill.data.readers.prompts import Asked, Selection, asked
from potstill.data.tokenizers import behaviour_sha256
from potstill.errors import UserError, one_line
from potstill.io.atomic import write_whole, writing
from potstill.io.hashing import file_sha256
from potstill.io.locks import locked
from potstill.io.safe_open import read_object
from potstill.io.terminal import Display
from potstill.models.decoding import Decode
from potstill.preflight.auto import note_types, settle
from potstill.recipe import load as recipes
from potstill.recipe.load import Recipe
from potstill.recipe.sections_data import OF_A_SOURCE
from potstill.recipe.sections_rollouts import WriteConfig
from potstill.runs.run_dir import code, environment
from potstill.training.sampling import write
from potstill.types import Teacher

CORPUS, PROGRESS, RECEIPT = "corpus.jsonl", "progress.json", "receipt.json"
Json = dict[str, Any]


@dataclass
class _Progress:
    of: Json
    """What the answers depend on: another of these makes another corpus."""
    prompts: int = 0
    """Prompts that have been answered."""
    size: int = 0
    """Of the corpus's file: what is behind them was not whole."""
    counts: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    digest: Any = field(default_factory=hashlib.sha256)
    """Of these bytes."""

    def as_json(self) -> bytes:
        return json.dumps(vars(self) | {"digest": self.digest.hexdigest()}).encode()


def write_corpus(
    recipe: str | Path, overrides: Sequence[str] = (), out: Path | None = None, display: Display | None = None
) -> Json:
    """Have the recipe's teacher answer the prompts of its corpus, and write the answers as a corpus.

    Args:
        recipe: a YAML file; its student is not loaded.
        overrides: `a.b=value`.
        out: a folder that does not exist yet, or one of the same recipe, which goes on; default `written/NAME`.

    Returns:
        The receipt.

    Raises:
        UserError: a corpus without prompts, a folder of another recipe, or whatever keeps the teacher from loading.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("write: runs in one process. Start it without torchrun.")
    display, path = display or Display(quiet=True), Path(recipe)
    loaded, out = recipes.load(path, overrides), out or Path("written") / path.stem
    if loaded.corpus.prompt == "beginning":
        raise UserError(
            f"corpus.name: {loaded.corpus.registered_name} has no questions for the teacher to answer. Set it to"
            " prompts or chat."
        )
    if loaded.corpus.decontaminate is not None:
        raise UserError(
            "corpus.decontaminate: write compares nothing. Leave it out here, and set it in the recipe that trains on"
            " what was written."
        )
    if loaded.write.max_new_tokens >= loaded.corpus.tokens_per_row:
        raise UserError(
            f"write.max_new_tokens: {loaded.write.max_new_tokens} tokens leave no room for a prompt in rows of"
            f" {loaded.corpus.tokens_per_row}. Lower it, or raise corpus.tokens_per_row."
        )
    if out.exists() and not (out.is_dir() and ((out / PROGRESS).exists() or not any(out.iterdir()))):
        raise UserError(f"{out}: exists already, and no corpus was started there. Give another --out.")
    with locked(out):
        note_types(resolved := resolve(loaded), display.note, trains=False)
        return _write(settle(resolved, display.note), out, display)


def _write(resolved: Resolved, out: Path, display: Display) -> Json:
    recipe = resolved.recipe
    config = recipe.write
    for files in resolved.teacher.checkpoints:
        files.verify()
    source = open_source(resolved)
    tokenizer = teacher_tokenizer(resolved) or source.tokenizer
    with (
        process_of(recipe),
        contextlib.closing(resolved.teacher.load(recipe.corpus.tokens_per_row)) as teacher,
    ):
        ends = _ends(teacher, tokenizer, source.vocabulary.size)
        if not teacher.reads_new_text:
            raise UserError(
                f"teacher.name: {recipe.teacher.registered_name} cannot answer: it reads no new text."
            )
        if not ends and config.truncated == "drop":
            raise UserError(
                f"write.truncated: teacher {resolved.teacher.label} has no token that ends an answer, so that each is"
                " cut off. Set it to keep."
            )
        decode = teacher.decoder(source.vocabulary.size)
        progress = _started(out, _identity(recipe, teacher, tokenizer, out))
        if (out / RECEIPT).exists():
            display.note(f"{out}: finished already")
            return read_object(out / RECEIPT, "a receipt")
        reading = Reading(iter(()))
        batches = _batches(recipe, tokenizer, source.bos_ids, reading, progress)
        with writing(out / CORPUS), (out / CORPUS).open("ab") as file:
            file.truncate(progress.size)
            for batch in batches:
                started = time.perf_counter()
                data = _answered(batch, decode, tokenizer, ends, recipe, progress)
                teacher.require_unchanged()
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                progress.digest.update(data)
                progress.prompts += len(batch)
                progress.size = file.tell()
                progress.seconds += time.perf_counter() - started
                write_whole(out / PROGRESS, progress.as_json())
                display.note(_said(progress))
        return _finish(resolved, out, progress, reading, teacher, tokenizer, ends)


def _answered(
    batch: Sequence[Asked],
    decode: Decode,
    tokenizer: Any,
    ends: frozenset[int],
    recipe: Recipe,
    progress: _Progress,
) -> bytes:
    """The lines of a batch of prompts."""
    config = recipe.write
    named = [
        (f"prompt {progress.prompts + number}, sample {sample}", Prompt(number, each.ids))
        for number, each in enumerate(batch)
        for sample in range(config.samples)
        if len(each.ids) + config.max_new_tokens <= recipe.corpus.tokens_per_row
    ]
    written = write(decode, named, config, ends, config.seed)
    progress.counts["too_long"] += len(batch) - len({each.prompt.number for each in written})
    return "".join(_lines(batch, written, tokenizer, config, progress.counts)).encode()


def _batches(
    recipe: Recipe, tokenizer: Any, bos_ids: list[int], reading: Reading, progress: _Progress
) -> Iterator[list[Asked]]:
    """Prompts that are to be answered yet, in batches."""
    corpus: Any = recipe.corpus
    selection = Selection(
        field=corpus.field,
        context=getattr(corpus, "context", None),
        date=datetime.date.fromisoformat(corpus.date),
        split=corpus.split,
        subset=corpus.subset,
        count=corpus.records,
        skip_refused=corpus.skip_refused,
    )
    is_chat = getattr(corpus, "chat", None)
    is_chat = bool(tokenizer.chat_template) if is_chat is None else is_chat
    prompts: Iterator[Asked] = itertools.islice(
        asked(corpus.path, tokenizer, selection, is_chat, reading), progress.prompts, None
    )
    if not is_chat:  # a template writes its own
        prompts = (dataclasses.replace(each, ids=[*bos_ids, *each.ids]) for each in prompts)
    while batch := list(itertools.islice(prompts, recipe.write.prompts_at_once)):
        yield batch


def _lines(
    batch: Sequence[Asked],
    written: Sequence[Completion],
    tokenizer: Any,
    config: WriteConfig,
    counts: Counter[str],
) -> Iterator[str]:
    """A line of JSON for each answer that is kept; the others are counted."""
    samples: Counter[int] = Counter()
    for each in written:
        number = each.prompt.number
        sample, samples[number] = samples[number], samples[number] + 1
        new = each.new[:-1] if each.ended else each.new
        counts["answers"] += 1
        counts["tokens"] += len(each.new)
        if not each.ended and config.truncated == "drop":
            counts["truncated"] += 1
            continue
        text = tokenizer.decode(new, clean_up_tokenization_spaces=False)
        if len(new) < config.min_new_tokens or not text.strip():
            counts["too_short"] += 1
            continue
        counts["kept"] += 1
        record = dict(batch[number].record)
        if "messages" in record:
            record["messages"] = [*record["messages"], {"role": "assistant", "content": text}]
        else:
            record["text"] += text
        yield json.dumps(record | {"of": batch[number].where, "sample": sample}, ensure_ascii=False) + "\n"


def _ends(teacher: Teacher, tokenizer: Any, ids: int) -> frozenset[int]:
    """Ids that end an answer: the tokenizer's and its template's, and those that the teacher's config names."""
    named = set() if teacher.model is None else teacher.model.ends
    return frozenset(end for end in {*ends_of(tokenizer), *named} if end < ids)


def _identity(recipe: Recipe, teacher: Teacher, tokenizer: Any, out: Path) -> Json:
    """What the answers depend on; `out` may have a part of them."""
    before = _read_progress(out) if (out / PROGRESS).exists() else {}
    recorded = before.get("of", {}).get("teacher", {})
    corpus, given = dataclasses.asdict(recipe.corpus), dataclasses.asdict(recipe.write)
    for name in OF_A_SOURCE:  # `write` has no mix
        del corpus[name]
    files = {str(path): file_sha256(path) for path in recipe.corpus.files_now([])}
    reader = {"tokens": behaviour_sha256(tokenizer), "template": str(tokenizer.chat_template)}
    of_teacher = teacher.fingerprint(recorded) | {"dtype": getattr(recipe.teacher, "dtype", None)}
    return {"corpus": corpus, "prompts": files, "tokenizer": reader, "write": given, "teacher": of_teacher}


def _started(out: Path, of: Json) -> _Progress:
    """What there is of the same corpus.

    Raises:
        UserError: it is another one, or damaged.
    """
    of = json.loads(json.dumps(of))
    if not (out / PROGRESS).exists():
        progress = _Progress(of)
        write_whole(out / PROGRESS, progress.as_json())
        return progress
    found = _read_progress(out)
    differing = sorted(name for name in of if found.get("of", {}).get(name) != of[name])
    if differing:
        raise UserError(
            f"{out}: was started with another {' and '.join(differing)}. Give another --out, or the same recipe again."
        )
    try:
        prompts, size, seconds = found["prompts"], found["size"], found["seconds"]
        progress = _Progress(of, prompts, size, Counter(found["counts"]), seconds)
        with (out / CORPUS).open("rb") if size else io.BytesIO() as file:
            progress.digest.update(file.read(size))
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(f"{out}: damaged: {one_line(error)}. Delete it, and start again.") from error
    if progress.digest.hexdigest() != found.get("digest"):
        raise UserError(
            f"{out / CORPUS}: damaged: not what {PROGRESS} says. Delete the folder, and start again."
        )
    return progress


def _read_progress(out: Path) -> Json:
    return read_object(out / PROGRESS, "the progress of a corpus")


def _said(progress: _Progress) -> str:
    counts, seconds = progress.counts, max(progress.seconds, 1e-9)
    return (
        f"{progress.prompts} prompts, {counts['kept']} of {counts['answers']} answers kept"
        f"  {counts['tokens'] / seconds:.0f} tok/s"
    )


def _finish(
    resolved: Resolved,
    out: Path,
    progress: _Progress,
    reading: Reading,
    teacher: Teacher,
    tokenizer: Any,
    ends: frozenset[int],
) -> Json:
    counts = progress.counts
    if not counts["kept"]:
        for name in (CORPUS, PROGRESS):  # of no use
            (out / name).unlink()
        why = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in sorted(counts.items()))
        raise UserError(
            f"{out}: not one answer to {progress.prompts} prompts is kept ({why}). Raise write.max_new_tokens, or set"
            " write.truncated: keep."
        )
    recipe, commit, of_teacher = resolved.recipe, code(), teacher.fingerprint(progress.of["teacher"])
    receipt = {
        "corpus": {"file": CORPUS, "bytes": progress.size, "sha256": file_sha256(out / CORPUS)},
        "prompts": progress.prompts,
        **{
            name: counts[name] for name in ("answers", "kept", "truncated", "too_short", "too_long", "tokens")
        },
        "prompts_refused": reading.counts.get("prompts_refused", 0),
        "settings": dataclasses.asdict(recipe.write),
        "ends": {str(end): tokenizer.convert_ids_to_tokens(end) for end in sorted(ends)},
        "read": reading.files,
        "teacher": {"name": recipe.teacher.registered_name} | teacher.describe() | of_teacher,
        "commits": dict(resolved.commits),
        "seconds": round(progress.seconds, 3),
        "commit": commit["commit"] or "not a git checkout",
        "uncommitted_changes": bool(commit["diff"]),
        "environment": environment(),
    }
    write_whole(out / RECEIPT, json.dumps(receipt, indent=2).encode())
    return receipt
