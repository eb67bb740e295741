"""`potstill profile`: what a run has gained. Sizes, speeds and memory of teacher and student on this machine, and how
often the teacher accepts what the student drafts.

What cannot be measured is `not run: why` in its place, and the rest is measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.util
import json
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from potstill.build.resolve import Resolved, resolve
from potstill.build.setup import process_of, read_corpus, set_up
from potstill.data.tokenizers import load_tokenizer
from potstill.errors import UserError
from potstill.evals import acceptance, speed_again
from potstill.evals.speed import SPREAD, Model, Note, measure, ratios
from potstill.export.gguf_architectures import require_known
from potstill.export.gguf_model import require_quantiser, write_gguf
from potstill.export.gguf_tokenizer import token_list
from potstill.export.roundtrip import NO_LLAMA_CPP
from potstill.io import machine
from potstill.models.hub import local_copy
from potstill.models.load import choose_device, load_causal_lm, load_config, longest_row, num_weights
from potstill.models.model_files import bytes_of_weights, folder_sha256, type_of_weights
from potstill.recipe import load as recipes
from potstill.runs.run_dir import RunDir, environment
from potstill.types import Rows

FORMAT = 2
"""Of `profile.json`; raised when its content changes, or how it is measured."""
NOT_WHOLE = "not run: the targets of a store are no whole distributions of the teacher"
FEWEST_REPEATS, FEWEST_NEW = 3, 2
SEED = 0
Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ProfileSettings:
    threads: int | None = None
    """Of a model; None: as many as PyTorch takes."""
    repeats: int = 11
    prompt_tokens: int = 128
    new_tokens: int = 32
    device: str = "auto"
    dtype: str = "auto"
    """Of the weights in Transformers; `auto`: float32 on a CPU, bfloat16 on a GPU."""

    def mistakes(self) -> dict[str, str]:
        """What is wrong with each, by name."""
        known = machine.processors()
        fewest = {"repeats": FEWEST_REPEATS, "prompt_tokens": 1, "new_tokens": FEWEST_NEW}
        found = {
            name: f"{getattr(self, name)}: must be {least} or more."
            for name, least in fewest.items()
            if getattr(self, name) < least
        }
        if self.threads is not None and not 1 <= self.threads <= known:
            found["threads"] = f"{self.threads}: must be from 1 to {known}, the processors of this machine."
        return found


@dataclass(frozen=True)
class _Heldout:
    """What is read of the run's held-out text."""

    ids: list[int]
    """The prompt of each measurement of speed."""
    source: str
    """Where it is from."""
    prompts: list[list[int]]
    """Of speculative decoding."""
    expected: Json | str


def profile(
    path: Path, settings: ProfileSettings, note: Note = lambda line: None, *, fresh: bool = False
) -> Json:
    """Measure a finished run's student beside its teacher, and write RUN/profile.json.

    Args:
        fresh: without the repeats of the run's earlier profiles, which are else kept where they are of the same files,
            settings, versions and machine.

    Raises:
        UserError: no finished run there, or a student that is not the receipt's; settings that its models cannot have.
    """
    if mistakes := settings.mistakes():
        raise UserError(*(f"{name}: {problem}" for name, problem in mistakes.items()))
    run = RunDir.open(path)
    state = run.status().get("state", "unknown")
    if state != "finished":
        raise UserError(
            f"{path}: the run is {state}, not finished. Continue it with --resume, then profile it."
        )
    with run.locked():
        run.whole_student()
        found = _Profiled(run, settings, note, {} if fresh else _earlier(run, note)).measured()
        run.write_profile(found)
        return found


def _earlier(run: RunDir, note: Note) -> Json:
    """The run's profile; empty where it is damaged."""
    try:
        return run.profile()
    except UserError as error:
        note(f"starting a new profile: {error.mistakes[0]}")
        return {}


class _Profiled:
    """A run while it is measured."""

    def __init__(self, run: RunDir, settings: ProfileSettings, note: Note, known: Json) -> None:
        self.run, self.settings, self.note, self.known = run, settings, note, known
        self.device = choose_device(settings.device)
        auto = "bfloat16" if self.device.type == "cuda" else "float32"
        self.dtype = auto if settings.dtype == "auto" else settings.dtype
        self.threads = settings.threads or torch.get_num_threads()
        self.resolved, self.teacher = self._resolved()
        """The recipe with the saved student, and the teacher's files; of either, why there is none."""
        self._require_context()
        self.date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.earlier: dict[tuple[str, str], Json] = {}
        """By runtime and type of the weights: the entry of a profile to whose repeats those of this one are added."""

    def measured(self) -> Json:
        held = self._heldout()
        about = self._about(held)
        self.earlier = speed_again.entries(self.known, about, self.note)
        request = {
            "prompt": held.ids,
            "new_tokens": self.settings.new_tokens,
            "threads": self.threads,
            "device": str(self.device),
            "dtype": self.dtype,
        }
        self.note(f"transformers: {self.settings.repeats} repeats, in turns")
        speeds = [self._beside("transformers", self.dtype, request, self.run.student, self.teacher)]
        speeds += self._in_llama_cpp(request)
        drafted = self._drafted(held, request)
        return about | {
            "spread": SPREAD,
            "models": {
                "teacher": self.teacher if isinstance(self.teacher, str) else _model_of(self.teacher),
                "student": _model_of(self.run.student),
            },
            "exports": [
                {"format": form, "file": place.name, "bytes": bytes_of_weights(place)}
                for form, place in self._exported().items()
            ],
            "speeds": speeds,
            "acceptance": {"expected": held.expected, "measured": drafted},
        }

    def _about(self, held: _Heldout) -> Json:
        """What is measured, how and where."""
        prompt = hashlib.sha256(json.dumps(held.ids).encode()).hexdigest()
        host = hashlib.sha256(platform.node().encode()).hexdigest()[:12]  # a name says more than it has to
        of = environment()
        return {
            "format": FORMAT,
            "date": self.date,
            "of": self.run.receipt().get("output"),
            "machine": machine.described(self.device) | {"host": host},
            "python": of["python"],
            "libraries": of["libraries"],
            "settings": self._settings() | {"prompt": held.source, "prompt_sha256": prompt},
        }

    def _settings(self) -> Json:
        own = dataclasses.asdict(self.settings)
        return own | {"threads": self.threads, "device": str(self.device), "dtype": self.dtype}

    def _resolved(self) -> tuple[Resolved | str, Path | str]:
        try:
            recipe = recipes.load(self.run.resolved)
            train = dataclasses.replace(recipe.train, device=self.settings.device)
            recipe = dataclasses.replace(recipe, train=train)
            resolved = resolve(recipe, saved_student=self.run.student)
            if resolved.teacher.layers_config is None:
                name = recipe.teacher.registered_name
                return resolved, f"not run: a teacher of teacher.name: {name} is no model of this process"
            for files in resolved.teacher.checkpoints:
                files.verify()
            return resolved, self._files_of_the_runs(resolved)
        except UserError as error:
            why = f"not run: {error.mistakes[0]}"
            return why, why

    def _files_of_the_runs(self, resolved: Resolved) -> Path:
        """The teacher's files; of stored targets those of the captured model.

        Raises:
            UserError: they have other weights than the run had: their figures would be another model's.
        """
        recorded = self.run.receipt().get("teacher", {}).get("weights_sha256")
        with contextlib.closing(resolved.teacher.load(resolved.recipe.corpus.tokens_per_row)) as teacher:
            found = teacher.weights_sha256()
            if resolved.teacher.model_config is None:
                path = local_copy(teacher.to_cut_from()[1])
            else:
                path = resolved.teacher.checkpoints[0].path
        if None not in (found, recorded) and found != recorded:
            raise UserError(
                f"{path}: its weights are not those that the run had (sha256 {found:.12}, not {recorded:.12}). Put that"
                " model back."
            )
        return path

    def _require_context(self) -> None:
        asked = self.settings.prompt_tokens + self.settings.new_tokens
        for who, place in (("student", self.run.student), ("teacher", self.teacher)):
            longest = None if isinstance(place, str) else longest_row(load_config(place))
            if longest is not None and asked > longest:
                raise UserError(
                    f"{self.run.path}: {self.settings.prompt_tokens} tokens of prompt and"
                    f" {self.settings.new_tokens} new ones: the {who} takes {longest} in all. Lower"
                    " --prompt-tokens or --new-tokens."
                )

    def _heldout(self) -> _Heldout:
        """With the run's held-out rows; where they cannot be read, a prompt of random ids."""
        try:
            if isinstance(self.resolved, str):
                raise UserError(self.resolved.removeprefix("not run: "))
            with process_of(self.resolved.recipe):
                is_whole = self.resolved.teacher.model_config is not None
                if isinstance(self.teacher, str) or not is_whole:
                    corpus, _ = read_corpus(self.resolved, self.note, lambda: None)
                    why = self.teacher if isinstance(self.teacher, str) else NOT_WHOLE
                    return self._read(corpus.heldout, why)
                return self._with_expected(self.resolved)
        except UserError as error:
            why = f"not run: {error.mistakes[0]}"
        vocabulary = load_config(self.run.student).get_text_config().vocab_size
        generator = torch.Generator().manual_seed(SEED)
        ids_T = torch.randint(vocabulary, (self.settings.prompt_tokens,), generator=generator)
        return _Heldout(ids_T.tolist(), "random ids", [], why)

    def _with_expected(self, resolved: Resolved) -> _Heldout:
        self.note("acceptance: student and teacher on the held-out rows")
        setup = set_up(resolved, lambda line: None, answers=self.run.heldout_answers)
        with contextlib.closing(setup.teacher):
            recorded = self.run.receipt().get("teacher", {}).get("weights_sha256")
            setup.require_made_of(self.run.path, self.run.corpus().get("fingerprint"), recorded)
            rows, size = setup.corpus.heldout, setup.recipe.train.micro_batch_rows
            with _threads(self.threads):
                expected = acceptance.expected(setup.student, setup.teacher, rows, size)
        return self._read(rows, expected)

    def _read(self, rows: Rows, expected: Json | str) -> _Heldout:
        tokens = self.settings.prompt_tokens
        prompts = acceptance.prompts_of(rows, acceptance.PROMPTS, tokens)
        return _Heldout(acceptance.text_of(rows, tokens), "held-out text", prompts, expected)

    def _in_llama_cpp(self, request: Json) -> list[Json]:
        """An entry for each GGUF file of the student, beside the teacher in the same type; a teacher that is a GGUF
        file of another type has one for itself.
        """
        exported = {form: place for form, place in self._exported().items() if form != "hf"}
        why = f"no GGUF file of the student: potstill export {self.run.path} writes one"
        if importlib.util.find_spec("xllamacpp") is None:
            exported, why = {}, NO_LLAMA_CPP
        if not exported:
            return [{"runtime": "llama.cpp", "weights": None, "why": f"not run: {why}"}]
        request = request | {"device": "cpu"}
        entries = []
        for form, place in exported.items():
            self.note(f"llama.cpp, {form}: {self.settings.repeats} repeats, in turns")
            with tempfile.TemporaryDirectory(prefix="potstill-profile-") as folder:
                teacher = self._teacher_as(form, Path(folder) / f"teacher-{form}.gguf")
                entries.append(self._beside("llama.cpp", form, request, place, teacher))
        if isinstance(self.teacher, Path) and self.teacher.is_file():
            own = type_of_weights(self.teacher).lower()
            if own not in exported:
                why = f"not run: no GGUF file of the student in {own}"
                entries.append(self._beside("llama.cpp", own, request, why, self.teacher))
        return entries

    def _beside(
        self, kind: str, weights: str, request: Json, student: Path | str, teacher: Path | str
    ) -> Json:
        """Figures, bytes and ratios of both, each a model's files or why there are none."""
        models = {"teacher": teacher, "student": student}
        asked = {
            who: Model(kind, request | {"model": str(place)}, why=_why(place))
            for who, place in models.items()
        }
        measure([model for model in asked.values() if not model.why], self.settings.repeats)
        files = {who: place for who, place in models.items() if isinstance(place, Path)}
        sha256 = {who: folder_sha256(place) for who, place in files.items()}
        earlier = self.earlier.get((kind, weights), {})
        if speed_again.is_better(earlier, asked, sha256):
            why = "; ".join(f"{who}: {asked[who].why}" for who in files if asked[who].why)
            self.note(f"{kind}, {weights}: kept as it was in the earlier profile, since this time {why}")
            return earlier
        dates = [*speed_again.add(earlier, asked, sha256), self.date]
        if len(dates) > 1:
            self.note(
                f"{kind}, {weights}: with the repeats of {len(dates) - 1} earlier (--fresh leaves them out)"
            )
        figures: Json = {who: model.figures() for who, model in asked.items()}
        sizes = {f"{who}_bytes": bytes_of_weights(place) for who, place in files.items()}
        of = {"runtime": kind, "weights": weights, "dates": dates, "sha256": sha256}
        return of | figures | sizes | {"ratios": ratios(**asked)}

    def _exported(self) -> dict[str, Path]:
        """The exports of this very student that are still there, by format."""
        records = self.run.receipt().get("exports", [])
        student = folder_sha256(self.run.student) if records else ""
        places = {
            record["format"]: self.run.path / record["file"]
            for record in records
            if record["student_sha256"] == student
        }
        return {form: place for form, place in places.items() if place.exists()}

    def _teacher_as(self, form: str, place: Path) -> Path | str:
        """A GGUF file of the teacher in this type, or why there is none."""
        if isinstance(self.teacher, str):
            return self.teacher
        self.note(f"llama.cpp, {form}: writing the teacher in this type")
        try:
            _write_as(self.teacher, place, form)
        except UserError as error:
            return f"not run: {error.mistakes[0]}"
        return place

    def _drafted(self, held: _Heldout, request: Json) -> Json | str:
        """Speculative decoding of held-out prompts, where both models have the same ids."""
        if isinstance(self.teacher, str):
            return self.teacher
        if not held.prompts:
            return str(held.expected)
        self.note(f"speculative decoding: {len(held.prompts)} held-out prompts")
        own = {"prompts": held.prompts, "teacher": str(self.teacher), "student": str(self.run.student)}
        return acceptance.measured(request | own)


def _write_as(source: Path, place: Path, form: str) -> None:
    model, tokenizer = load_causal_lm(source), load_tokenizer(source)
    require_known(model)
    require_quantiser(model, [form])
    configs = [model.hf.generation_config, model.hf.config]
    tokens = token_list(str(source), tokenizer, model.hf.config.vocab_size, configs)
    write_gguf(model, tokens, place, form, "teacher", None)


def _model_of(place: Path) -> Json:
    config = load_config(place)
    return {
        "parameters": num_weights(config),
        "bytes": bytes_of_weights(place),
        "weights": type_of_weights(place),
        "kind": "folder" if place.is_dir() else "GGUF",
    }


def _why(place: Path | str) -> str:
    """Why there are no files; empty where there are."""
    return place.removeprefix("not run: ") if isinstance(place, str) else ""


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    own = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(own)
