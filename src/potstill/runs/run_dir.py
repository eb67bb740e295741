"""The run directory: a self-describing folder, readable without potstill. Only this file knows its layout.

    recipe.yaml       as given, byte for byte
    resolved.yaml     every default filled in
    code.diff         uncommitted changes of the code that ran
    environment.json  versions, machine, command line, chosen chunk size, commits of models and data sets on the hub
    corpus.json       files with hashes, counts, fingerprint
    inputs.json       sha256 of weights, model settings, plug-ins: what --resume compares
    layers.json       what each of the teacher's layers is worth, where that chose the student's; absent otherwise
    folds.json        what left-out layers did, folded into the student: the effect of each fold; absent otherwise
    folds.safetensors the weights that this changed and which channels of the residual stream are kept, which
                      --resume takes
    metrics.jsonl     one object per step or evaluation
    samples.jsonl     what the student wrote at each evaluation, and the teacher at step 0; absent without
                      eval.sample_prompts
    faults.jsonl      steps whose update the guard refused, with reason and rows; absent if there were none
    profile.json      sizes, speeds, memory and acceptance of teacher and student, of `potstill profile`
    disagreement.json where student and teacher disagree, measured for the first report
    report.html       the page of `potstill report`
    stall.txt         stack traces of all threads when a deadline of the guard passed
    receipt.json      what was actually run, read back from the objects that ran it
    status.json       beginning | running | stopped | finished | failed, and why
    student/          the best student, a Hugging Face folder with checksums of its files
    exports/          the student in other formats, such as GGUF; recorded in the receipt
    evals/humaneval/  result and samples of `potstill eval RUN --humaneval`
    evals/lm-eval/    result of `potstill eval RUN --lm-eval`
    adapter/          the trained adapter of a LoRA student, in peft's format
    checkpoints/      the last two training states, for --resume
    .lock             held while a process writes here

Files are replaced atomically; `metrics.jsonl`, `samples.jsonl` and `faults.jsonl` are appended to, one line at a time.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from potstill.errors import UserError, one_line
from potstill.io.atomic import flush, listed, repair_folder, replace_folder, require_whole, writing
from potstill.io.atomic import write_whole as write_whole
from potstill.io.locks import locked
from potstill.io.safe_open import KeyTwice, object_of, opened, parse_json, read_object

if TYPE_CHECKING:
    from torch import Tensor

READABLE = "the run's other files are still readable."
LAYERS = "layers.json"
FOLDS = "folds.json"
FOLDED = "folds.safetensors"
ANSWERED = "heldout.safetensors"
FOLD_KEYS = {"layer", "left_out", "kl_before", "kl_after", "ridge"}
REFIT_KEYS = FOLD_KEYS - {"layer", "left_out"}
REFITS = ("refit_heads", "refit")
"""What of a repair is done before the gaps, in this order; each may be missing."""
STREAM_REFITS = ("refit_norms", "refit_stream")
"""The same, after the residual stream was narrowed."""
LIBRARIES = ("potstill", "torch", "transformers", "tokenizers", "safetensors", "gguf", "numpy", "pydantic")


def repair_steps(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a repair has done before the residual stream was narrowed, one step after the other: see `RunDir.folds`."""
    return [*_refits(table, REFITS), *table.get("folds", [])]


def stream_steps(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What it has done behind that."""
    return _refits(table, STREAM_REFITS)


def _refits(table: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    return [table[name] for name in names if table.get(name) is not None]


@dataclass(frozen=True)
class RunDir:
    path: Path
    listeners: list[Callable[[int, dict[str, float]], None]] = field(
        default_factory=list, compare=False, repr=False
    )
    """Called with each line of `metrics.jsonl` after it is written."""

    @classmethod
    def create(
        cls,
        path: Path,
        *,
        recipe: bytes,
        resolved: str,
        corpus: dict[str, Any],
        inputs: dict[str, str] | None = None,
        chunk: dict[str, Any] | None = None,
        commits: dict[str, str] | None = None,
        layers: dict[str, Any] | None = None,
        folds: tuple[dict[str, Any], dict[str, Tensor]] | None = None,
        answers: bytes | None = None,
        source: dict[str, str] | None = None,
    ) -> RunDir:
        """Make the folder, and write what is known before the first step.

        Args:
            source: of `code`, where it has been asked already.

        Raises:
            UserError: the folder exists, or cannot be made.
        """
        cls.require_free(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{path}: the run directory cannot be made: {error.strerror}. Give --out another folder."
            ) from error
        run = cls(path)
        # First: marks a folder that a kill left half made as ours, so that the same command can start over in it.
        run.set_status("beginning")
        write_whole(path / "recipe.yaml", recipe)
        write_whole(path / "code.diff", (source or code())["diff"].encode())
        run._write_json("environment.json", environment() | {"chunk": chunk or {}, "commits": commits or {}})
        run._write_json("corpus.json", corpus)
        run._write_json("inputs.json", inputs or {})
        if layers is not None:
            run._write_json(LAYERS, layers)
        if folds is not None:
            run._write_json(FOLDS, folds[0])
            from safetensors.torch import save  # which imports PyTorch; listing runs needs none

            write_whole(path / FOLDED, save(folds[1]))
        if answers is not None:
            write_whole(path / ANSWERED, answers)
        # Last: `open` takes any folder that has it for a complete run.
        write_whole(path / "resolved.yaml", resolved.encode())
        run.set_status("running")
        return run

    @staticmethod
    def require_free(path: Path) -> None:
        """UserError unless `path` does not exist, is empty, or was left half made by `create`."""
        if why := _why_impossible(path):
            raise UserError(f"{path}: the run directory cannot be made: {why}. Give --out another folder.")
        exists = os.path.lexists(path)
        if exists and not (path.is_dir() and (not listed(path) or _creation_was_interrupted(path))):
            what, todo = _unfinished(path), ""
            if what:
                what, todo = f" with an unfinished run ({what})", "Add --resume to go on with it, or give"
            raise UserError(
                f"{path}: already exists{what}, and a run is never overwritten. {todo or 'Give'} --out another folder."
            )

    @classmethod
    def is_free(cls, path: Path) -> bool:
        """Whether `create` would take the folder."""
        try:
            cls.require_free(path)
        except UserError:
            return False
        return True

    @classmethod
    def open(cls, path: Path) -> RunDir:
        if os.path.isdir(path) and _creation_was_interrupted(path):
            raise UserError(
                f"{path}: interrupted before training started, so there is nothing to resume."
                " Start it again without --resume."
            )
        if not os.path.isfile(path / "resolved.yaml"):
            raise UserError(
                f"{path}: not a run directory: it has no resolved.yaml. Give the folder that distill printed."
            )
        return cls(path)

    @property
    def student(self) -> Path:
        return self.path / "student"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def heldout_answers(self) -> Path | None:
        """What the teacher answered to held-out prompts; None for a run on other rows."""
        return self.path / ANSWERED if (self.path / ANSWERED).exists() else None

    @property
    def rollouts(self) -> Path:
        """What the student wrote, a file a step."""
        return self.path / "rollouts"

    @property
    def exports(self) -> Path:
        return self.path / "exports"

    @property
    def resolved(self) -> Path:
        return self.path / "resolved.yaml"

    @property
    def evals(self) -> Path:
        return self.path / "evals"

    def log(self, step: int, metrics: dict[str, float]) -> None:
        line = json.dumps({"step": step, **metrics}) + "\n"
        self._append("metrics.jsonl", line)  # before the listeners: the run directory is the record
        for listener in self.listeners:
            listener(step, metrics)

    def log_samples(
        self, step: int, texts: Mapping[str, str], by_teacher: Mapping[str, str] | None = None
    ) -> None:
        """What the student, and at step 0 the teacher, wrote behind each prompt of `eval.sample_prompts`."""
        known = by_teacher or {}
        samples = [
            {"prompt": prompt, "text": text} | ({"teacher": known[prompt]} if prompt in known else {})
            for prompt, text in texts.items()
        ]
        self._append("samples.jsonl", json.dumps({"step": step, "samples": samples}) + "\n")

    def samples(self) -> list[dict[str, Any]]:
        """One entry an evaluation, complete lines only; empty where nothing is sampled."""
        path = self.path / "samples.jsonl"
        return read_lines(path) if os.path.lexists(path) else []

    def log_fault(self, step: int, what: str, rows: Sequence[Mapping[str, Any]] = ()) -> None:
        """`rows`: the rows that are unusable on their own, each with its number and figures."""
        self._append("faults.jsonl", json.dumps({"step": step, "what": what, "rows": [*rows]}) + "\n")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run's lock; a second process is refused, not queued."""

        tries = iter(range(2))

        def refuse() -> None:
            # Once more after a moment: who lists runs or finds one finished holds the lock for an instant.
            if next(tries):
                raise UserError(
                    f"{self.path}: another process is at work on this run. Wait for it, or stop it."
                )

        with locked(self.path, on_wait=refuse):
            yield

    def flush(self) -> None:
        """fsync the metrics, before a checkpoint is saved: after a power cut, none may be newer than its log."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            with writing(path):
                flush(path)

    def rewind_faults(self, step: int, left_out: list[int]) -> None:
        """Drop the faults after `step`, which a resumed run meets again, but for steps already left out."""
        path = self.path / "faults.jsonl"
        if not os.path.lexists(path):
            return
        with opened(path, "faults", READABLE) as file:
            lines = file.read().split(b"\n")[:-1]
        kept = [line for line in lines if _step_of(line, path) <= step or _step_of(line, path) in left_out]
        write_whole(path, b"".join(line + b"\n" for line in kept))

    def rewind(self, step: int, evaluated: int) -> None:
        """Drop steps after `step` and evaluations after `evaluated`: a resumed run logs them again."""
        kept = [
            line
            for line in self.metrics()
            if line["step"] <= (evaluated if any(name.startswith("heldout/") for name in line) else step)
        ]
        content = "".join(json.dumps(line) + "\n" for line in kept)
        write_whole(self.path / "metrics.jsonl", content.encode())
        if samples := self.samples():
            kept_samples = "".join(json.dumps(line) + "\n" for line in samples if line["step"] <= evaluated)
            write_whole(self.path / "samples.jsonl", kept_samples.encode())

    def metrics(self) -> list[dict[str, float]]:
        """Every complete line; a kill can truncate the last one."""
        path = self.path / "metrics.jsonl"
        if not os.path.lexists(path):
            return []
        with opened(path, "metrics", READABLE) as file:
            lines = file.read().split(b"\n")[:-1]
        return [_metrics_of(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]

    def faults(self) -> list[dict[str, Any]]:
        """The steps whose update the guard refused; complete lines only."""
        path = self.path / "faults.jsonl"
        return read_lines(path) if os.path.lexists(path) else []

    def replace_student(self, save: Callable[[Path], None]) -> None:
        """`save` fills a folder beside the old student, which replaces it once it is complete."""
        replace_folder(self.student, save)

    def replace_adapter(self, save: Callable[[Path], None]) -> None:
        replace_folder(self.adapter, save)

    def repair(self) -> None:
        """Recover from a kill inside `replace_student` or `replace_adapter`."""
        for folder in (self.student, self.adapter):
            repair_folder(folder)

    def whole_student(self, todo: str = "Put it back from a copy, or start a new run.") -> Path:
        """The student's folder, after checking every file; UserError where one is missing or damaged."""
        # Before that, a receipt may be older than the student: the run was killed between the two and resumed.
        is_finished = self.status().get("state") == "finished"
        require_whole(self.student, self.receipt().get("output") if is_finished else None, todo)
        return self.student

    def write_receipt(self, receipt: dict[str, Any]) -> None:
        self._write_json("receipt.json", receipt)

    def corpus(self) -> dict[str, Any]:
        return self._read_json("corpus.json")

    def write_answers(self, answers: dict[str, list[str]]) -> None:
        """Add answers to held-out prompts, by who wrote them: `prompt`, `teacher`, `before` and `after` training."""
        self._write_json("answers.json", self.answers() | answers)

    def answers(self) -> dict[str, list[str]]:
        """`answers.json`; empty where the student wrote no rows."""
        return self._read_json("answers.json") if (self.path / "answers.json").exists() else {}

    def layers(self) -> dict[str, Any] | None:
        """`layers.json`: `models.layer_harm.Harm` as an object; None where no rule measured layers."""
        return self._read_json(LAYERS) if (self.path / LAYERS).exists() else None

    def folds(self) -> dict[str, Any] | None:
        """`folds.json`: `models.repair.Repair` as an object; None where no student was repaired.

        Raises:
            UserError: damaged.
        """
        if not (self.path / FOLDS).exists():
            return None
        table = self._read_json(FOLDS)
        folds = table.get("folds")
        refits = _refits(table, (*REFITS, *STREAM_REFITS))
        steps = [*refits, *(folds if isinstance(folds, list) else [None])]
        is_whole = all(
            isinstance(step, dict)
            and step.keys() == (REFIT_KEYS if number < len(refits) else FOLD_KEYS)
            and all(isinstance(step[name], float) for name in ("kl_before", "kl_after"))
            for number, step in enumerate(steps)
        )
        if not is_whole or "why_not" not in table:
            raise UserError(f"{self.path / FOLDS}: damaged: not what a repair has done. {READABLE}")
        return table

    def folded(self) -> dict[str, Tensor]:
        """The matrices that a repair changed.

        Raises:
            UserError: damaged.
        """
        from safetensors.torch import load_file

        try:
            return load_file(self.path / FOLDED)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.path / FOLDED}: damaged: {one_line(error)} Start a new run.") from error

    def inputs(self) -> dict[str, Any]:
        return self._read_json("inputs.json")

    def chunk(self) -> dict[str, Any]:
        chunk: dict[str, Any] = self._read_json("environment.json").get("chunk", {})
        return chunk

    def commits(self) -> dict[str, str]:
        """The commit of each model on the hub, by the name that the recipe had for it."""
        commits: dict[str, str] = self._read_json("environment.json").get("commits", {})
        return commits

    def receipt(self) -> dict[str, Any]:
        return self._read_json("receipt.json")

    def disagreement(self) -> dict[str, Any]:
        return self._read_json("disagreement.json")

    def write_disagreement(self, disagreement: dict[str, Any]) -> None:
        self._write_json("disagreement.json", disagreement)

    def profile(self) -> dict[str, Any]:
        """`profile.json`; empty where nothing was measured."""
        return self._read_json("profile.json")

    def write_profile(self, profile: dict[str, Any]) -> None:
        self._write_json("profile.json", profile)

    def write_stacks(self, stacks: str) -> Path:
        write_whole(self.path / "stall.txt", stacks.encode())
        return self.path / "stall.txt"

    def set_status(self, state: str, why: str = "") -> None:
        self._write_json("status.json", {"state": state, **({"why": why} if why else {})})

    def status(self) -> dict[str, Any]:
        return self._read_json("status.json")

    def _append(self, name: str, line: str) -> None:
        with writing(self.path / name), open(self.path / name, "a", encoding="utf-8") as file:
            file.write(line)

    def _write_json(self, name: str, value: Any) -> None:
        write_whole(self.path / name, _as_json(value))

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            return read_object(path, READABLE) if os.path.lexists(path) else {}
        except UserError as error:
            raise UserError(str(error).replace(f"{path}: ", f"{path}: damaged: ", 1)) from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file, complete lines only; a kill can truncate the last one."""
    with opened(path, "JSON lines", READABLE) as file:
        lines = file.read().split(b"\n")[:-1]
    return [object_of(line, f"{path}:{number}", READABLE) for number, line in enumerate(lines, start=1)]


def _metrics_of(line: bytes, where: str) -> dict[str, float]:
    try:
        parsed = parse_json(line)
    except ValueError as error:
        problem = str(error) if isinstance(error, KeyTwice) else f"not a line of JSON: {error}"
        raise UserError(f"{where}: damaged: {problem}. Remove the line; {READABLE}") from error
    metrics = parsed if isinstance(parsed, dict) else {"the line": parsed}
    not_a_number = next((name for name, value in metrics.items() if not _is_number(value)), None)
    if not_a_number is not None or type(metrics.get("step")) is not int:
        problem = "no integer `step`" if not_a_number is None else f"{not_a_number:.60} is not a number"
        raise UserError(f"{where}: damaged: {problem}. Remove the line; {READABLE}")
    return metrics


def _step_of(line: bytes, path: Path) -> int:
    try:
        parsed = parse_json(line)
    except ValueError as error:
        raise UserError(
            f"{path}: damaged: not a line of JSON: {error}. Remove the line; {READABLE}"
        ) from error
    step = parsed.get("step") if isinstance(parsed, dict) else None
    if type(step) is not int:
        raise UserError(f"{path}: damaged: a line has no integer `step`. Remove the line; {READABLE}")
    return step


def _is_number(value: object) -> bool:
    # `type() is`, not isinstance: a bool is an int. Python parses integers that no float and no chart can hold.
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _why_impossible(path: Path) -> str:
    """Why the system cannot have such a path; empty where it can."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8, and some libraries cannot write there"
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, ValueError) as error:
        return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return ""


def _unfinished(path: Path) -> str:
    """The state of the run there that `--resume` would go on with; empty where there is none."""
    with contextlib.suppress(UserError):
        state = RunDir(path).status().get("state")
        if (path / "resolved.yaml").is_file() and state != "finished":
            return str(state)
    return ""


def _creation_was_interrupted(path: Path) -> bool:
    """Whether a kill ended `RunDir.create` there, before there was a run."""
    names = {entry.name for entry in listed(path)}
    if "resolved.yaml" in names or "status.json" not in names:
        return names == {"status.json.new"}  # killed while the first file was being written
    with opened(path / "status.json", "JSON", READABLE) as file:
        return file.read(100) == _as_json({"state": "beginning"})


def _as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def environment() -> dict[str, Any]:
    """Versions, machine and command line. Environment variables are left out: they hold secrets."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "libraries": {name: _version(name) for name in LIBRARIES},
    }


def code() -> dict[str, str]:
    """Commit and uncommitted changes of the checkout that potstill runs from; empty for a wheel."""
    package = Path(__file__).resolve().parent.parent
    commit = _git(package, "rev-parse", "HEAD").strip()
    # A wheel may lie inside somebody else's checkout (.venv/…), whose commit says nothing about potstill.
    tracked = commit and _git(package, "ls-files", "--error-unmatch", "__init__.py")
    if not tracked:
        return {"commit": "", "diff": ""}
    untracked = _git(package, "ls-files", "--others", "--exclude-standard", ".").splitlines()
    header = "".join(f"untracked, not in this diff: {name}\n" for name in untracked)
    return {"commit": commit, "diff": header + _git(package, "diff", "HEAD")}


def _git(folder: Path, *arguments: str) -> str:
    try:
        command = ["git", "-C", str(folder), *arguments]
        completed = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return completed.stdout if completed.returncode == 0 else ""


@functools.cache
def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
