"""A run's student as a Hugging Face folder and as GGUF files, each read back by the programs that run them.

Nothing is guessed: an architecture or a pre-tokenizer that is not listed here is refused before anything is
written, and a file takes its name only when it is whole. What was written, and the result of each round trip,
goes into the run's receipt under `exports`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from potstill.data.end_of_turn import ends_of
from potstill.data.tokenizers import load_tokenizer
from potstill.errors import UserError, one_line
from potstill.export.dtype import AUTO, cast_folder, settle_dtype
from potstill.export.gguf_architectures import require_known
from potstill.export.gguf_model import FILES, require_quantiser, write_gguf
from potstill.export.gguf_tokenizer import TokenList, token_list
from potstill.export.roundtrip import Reference, check_paths, not_run
from potstill.io.atomic import SUMS, write_whole
from potstill.io.hashing import file_sha256
from potstill.models.causal_lm import CausalLM
from potstill.models.load import load_causal_lm
from potstill.models.model_files import dtype_of_files, folder_sha256
from potstill.models.ollama import MODELFILE, modelfile
from potstill.models.portable import (
    GENERATION,
    MORE_TEMPLATES,
    add_ends,
    write_generation_config,
    write_portable_config,
)
from potstill.runs.run_dir import RunDir

Record = dict[str, Any]
QUANTIZE = tuple(FILES)
FORMATS = ("hf", *QUANTIZE)
"""`hf` is the folder; each other name is a GGUF file of that type."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What `export_run` wrote: the records that it put into the receipt, in the order of `formats`."""

    out: Path
    records: list[Record]


def export_run(
    run: Path,
    out: Path | None = None,
    formats: Sequence[str] = ("hf", "f16"),
    *,
    dtype: str = AUTO,
    check: bool = True,
    note: Callable[[str], None] = lambda _: None,
) -> Exported:
    """The run's best student in each of `formats`, in `out`; default `RUN/exports`.

    Args:
        run: a finished run.
        formats: of `FORMATS`. An existing export of the same format is replaced.
        dtype: of the folder's weights, a key of `DTYPES`; `auto`: that of the files that the student started from.
        check: read each back on three paths; otherwise these are recorded as not run.

    Raises:
        UserError: the run is not finished, or its student is not the receipt's; an unknown format,
            architecture or pre-tokenizer; a missing quantiser. Nothing is left half-written.
    """
    formats = list(dict.fromkeys(formats))
    if unknown := [name for name in formats if name not in FORMATS]:
        # llama.cpp's names of mixtures of types, such as Q4_K_M, begin with that of their chief one.
        meant = next((name for name in FORMATS if unknown[0].lower().startswith(name)), None)
        hint = f" Did you mean {meant}?" if meant else ""
        raise UserError(f"export: no format {unknown[0]!r}.{hint} Known: {', '.join(FORMATS)}.")
    run_dir = RunDir.open(run)
    with run_dir.locked():
        return _export(run_dir, out or run_dir.exports, formats, dtype, check, note)


def verdict(record: Record) -> Literal["passed", "failed", "not run"]:
    """A record's three paths in one word: `failed` if one did, `not run` if none ran, else `passed`."""
    statuses = {path["status"] for path in record["three_path"].values()}
    return "failed" if "failed" in statuses else "passed" if "passed" in statuses else "not run"


def _export(
    run: RunDir,
    out: Path,
    formats: Sequence[str],
    dtype: str,
    check: bool,
    note: Callable[[str], None],
) -> Exported:
    receipt = run.receipt()
    _require_finished(run, receipt)
    run.whole_student()
    dtype = settle_dtype(dtype, receipt)
    note(f"export: reading {run.student}")
    model, tokenizer = load_causal_lm(run.student), load_tokenizer(run.student)
    model.name = str(run.student)
    tokens = None
    if gguf_types := [form for form in formats if form != "hf"]:
        require_known(model)
        require_quantiser(model, gguf_types)
        configs = [model.hf.generation_config, model.hf.config]
        tokens = token_list(str(run.student), tokenizer, model.hf.config.vocab_size, configs)
    if check:
        note("export: what the student itself answers, to compare with")
    reference = Reference.of(model, tokenizer) if check else None
    student_sha256, records = folder_sha256(run.student), []
    for number, form in enumerate(formats, start=1):
        note(f"{form}: writing, {number} of {len(formats)}")
        if tokens is None or form == "hf":
            record = _write_folder(run, out, model, ends_of(tokenizer), dtype)
        else:
            record = _write_gguf(run, out, form, model, tokens, _inherited_license(receipt))
        record |= {"student_sha256": student_sha256}
        place = run.path / record["file"]
        rounding = f", {record['dtype']}" if form == "hf" else ""
        note(f"{form}: {place}, {record['bytes'] / 2**20:.1f} MiB{rounding}")
        if reference is None:
            paths = not_run("was not asked for")
        else:
            written = reference.of_written(model, place, form, dtype)
            paths = check_paths(form, place, written, note)
        records.append(record | {"three_path": paths})
        others = [other for other in receipt.get("exports", []) if other["format"] != form]
        receipt["exports"] = [*others, records[-1]]
        run.write_receipt(receipt)
    if files := [run.path / record["file"] for record in records if record["format"] != "hf"]:
        write_whole(files[0].with_name(MODELFILE), modelfile(files, run.student).encode())
    return Exported(out, records)


def _require_finished(run: RunDir, receipt: dict[str, Any]) -> None:
    if not receipt or not run.student.is_dir():
        state = run.status().get("state", "unknown")
        raise UserError(
            f"{run.path}: {state}, without {'a student' if receipt else 'a receipt'}: nothing to export."
            " Let the run finish first: potstill distill --resume."
        )


def _write_folder(run: RunDir, out: Path, model: CausalLM, ends: list[int], dtype: str) -> Record:
    place = out / "hf"
    with _replacing(place) as fresh:
        _copy_student(run.student, fresh, model)
        add_ends(fresh, ends)
        if dtype != dtype_of_files(fresh):
            cast_folder(fresh, dtype)
    return {"format": "hf", "file": _recorded(run, place), "dtype": dtype} | _folder_record(place)


def _write_gguf(
    run: RunDir, out: Path, form: str, model: CausalLM, tokens: TokenList, license_id: str | None
) -> Record:
    name = run.path.resolve().name
    place = out / f"{name}-{FILES[form][2]}.gguf"
    with _replacing(place) as fresh:
        contents = write_gguf(model, tokens, fresh, form, name, license_id)
    record = {"format": form, "file": _recorded(run, place), "sha256": file_sha256(place)}
    return record | {"bytes": place.stat().st_size} | contents


def _recorded(run: RunDir, place: Path) -> str:
    """Relative to the run, which may be moved with what is in it. Elsewhere absolute: the next command may be started
    in another folder.
    """
    place, inside = place.resolve(), run.path.resolve()
    return str(place.relative_to(inside) if place.is_relative_to(inside) else place)


@contextmanager
def _replacing(place: Path) -> Iterator[Path]:
    """A path beside `place` to write to; what was at `place` is removed only when the new one is whole."""
    fresh, old = place.with_name(place.name + ".new"), place.with_name(place.name + ".old")
    try:
        for stale in (fresh, old):
            _remove(stale)
        place.parent.mkdir(parents=True, exist_ok=True)
        yield fresh
        if os.path.lexists(place):
            place.rename(old)
        fresh.rename(place)
        _remove(old)
    except BaseException as error:
        _remove(fresh)
        if os.path.lexists(old) and not os.path.lexists(place):
            old.rename(place)
        if isinstance(error, OSError):
            reason = error.strerror or one_line(error)
            raise UserError(
                f"{place}: cannot be written: {reason}. Make room, or give --out another folder."
            ) from error
        raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _copy_student(student: Path, to: Path, model: CausalLM) -> None:
    """Byte for byte, with a generation config where there was none. The sums go into the record instead."""
    to.mkdir()
    for file in sorted(student.iterdir()):
        if file.is_file() and file.name != SUMS:
            shutil.copyfile(file, to / file.name)
    more = student / MORE_TEMPLATES
    if more.is_dir():  # of an earlier version: `write_portable_config` puts them elsewhere
        shutil.copytree(more, to / MORE_TEMPLATES)
    if not (to / GENERATION).exists():
        write_generation_config(model.hf.generation_config, to)
    write_portable_config(to)


def _folder_record(folder: Path) -> Record:
    hashes = {file.name: file_sha256(file) for file in sorted(folder.iterdir())}
    sizes = {name: (folder / name).stat().st_size for name in hashes}
    lines = "".join(f"{name} {digest}\n" for name, digest in hashes.items())
    return {
        "sha256": hashlib.sha256(lines.encode()).hexdigest(),
        "bytes": sum(sizes.values()),
        "files": {name: {"sha256": hashes[name], "bytes": sizes[name]} for name in hashes},
    }


def _inherited_license(receipt: dict[str, Any]) -> str | None:
    """The licence of teacher and student base, where it is the same one."""
    parents = {each["license"] for role, each in receipt.get("licences", {}).items() if role != "data"}
    return parents.pop() if len(parents) == 1 else None
