"""HumanEval of a model (Chen et al. 2021): controls, completions, verdicts, and a score with its interval.

    humaneval.samples.jsonl  the settings, then a line for each sample: raw completion, program, verdict
    humaneval.json           the result, once every sample has a verdict; or why there is none

Every evaluation first judges the published solutions, which must all pass, and empty functions, which must
all fail; without that there is no score. An evaluation that was killed goes on from its whole lines.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from potstill.data.tokenizers import load_tokenizer, vocab_of
from potstill.errors import UserError, one_line
from potstill.evals.humaneval_problems import (
    STOPS,
    Judge,
    Problem,
    base_prompt,
    chat_prompt,
    digest,
    end_of_turn,
    is_whole,
    parsed,
    program_of,
    read_problems,
    read_tests,
)
from potstill.evals.pass_at_k import RESULT, scored
from potstill.evals.sandbox.sandbox import Sandbox, SandboxRefused
from potstill.io.hashing import file_sha256
from potstill.io.safe_open import opened, parse_json
from potstill.models import generate
from potstill.models.causal_lm import CausalLM
from potstill.models.generate import Ask, Completion, InferenceFailed
from potstill.models.load import choose_device, choose_dtype, load_causal_lm, local_copy, weights_sha256
from potstill.runs.run_dir import RunDir, environment, write_whole

TASK_VERSION = "potstill-humaneval-1"
"""Changes with whatever changes a score: prompts, stops, extraction, judging."""
SAMPLES = "humaneval.samples.jsonl"
PROGRESS_S = 20.0

Note = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is asked for. Temperature 0 is greedy; `prompt` auto is chat where there is a chat template."""

    prompt: str = "auto"
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    batch_rows: int = 32
    seed: int = 0
    limit: int | None = None
    """Only the first problems: a subset, whose share is no score of HumanEval."""
    data: Path | None = None
    extra_tests: Path | None = None
    workers: int = 2
    dtype: str = "float32"
    device: str = "auto"

    def __post_init__(self) -> None:
        least = {"samples": 1, "max_new_tokens": 1, "batch_rows": 1, "workers": 1, "temperature": 0}
        mistakes = [
            f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least {low}."
            for name, low in least.items()
            if not low <= getattr(self, name) < 10**6
        ]
        if self.limit is not None and self.limit < 1:
            mistakes.append(f"--limit {self.limit}: must be at least 1.")
        if not 0 < self.top_p <= 1:
            mistakes.append(f"--top-p {self.top_p}: must be above 0 and at most 1.")
        if self.prompt not in ("auto", "base", "chat"):
            mistakes.append(f"--prompt {self.prompt}: is not one of auto, base, chat.")
        if self.temperature == 0 and self.top_p < 1:
            mistakes.append(
                f"--top-p {self.top_p}: says nothing without --temperature; greedy takes the top."
            )
        if self.temperature == 0 and self.samples > 1:
            mistakes.append(f"--samples {self.samples}: greedy samples are all the same. Give --temperature.")
        if mistakes:
            raise UserError(*mistakes)


def evaluate(source: str | Path, out: Path, options: Options, note: Note = lambda _: None) -> dict[str, Any]:
    """Every problem answered and judged; the result is also in `out`.

    Raises:
        UserError: what the user can mend; a control that failed; other settings than `out` was begun with.
    """
    every = read_problems(options.data)
    problems = every[: options.limit]
    extra = {} if options.extra_tests is None else read_tests(options.extra_tests, problems)
    try:
        sandbox = Sandbox()
    except SandboxRefused as refused:
        raise UserError(
            f"humaneval: no sandbox here, so nothing was run: {refused.why}. See docs/sandbox.md."
        ) from refused
    with sandbox, ThreadPoolExecutor(options.workers) as pool:
        answer = _load(source, options, note)
        record = _record(every, problems, answer, sandbox.tier)
        samples = _Samples(out, record)
        note(f"humaneval: {len(problems)} problems, {answer.kind} prompts, sandbox {sandbox.tier}")
        judge = Judge(sandbox, pool, extra)
        controls = judge.controls(problems)
        note(f"controls: published solutions {controls['canonical']}, empty {controls['empty']}")
        with samples.begun():
            result: dict[str, Any] = {
                "model": str(source),
                "settings": record,
                "extra_tests": None if options.extra_tests is None else str(options.extra_tests),
                "completions_found": len(samples.lines),
                "controls": controls,
            }
            try:
                told = _answer_all(problems, answer, judge, samples)
            except InferenceFailed as failed:
                result |= {"status": "inference_failed", "why": str(failed)}
            else:
                result |= {"status": "finished", "generation": told}
                tasks, lines = [problem.task_id for problem in problems], [*samples.lines.values()]
                result |= scored(tasks, lines, [*extra], whole=len(problems) == len(every))
            result["environment"] = environment()
            write_whole(out / RESULT, (json.dumps(result, indent=2) + "\n").encode())
    return result


def _load(source: str | Path, options: Options, note: Note) -> _Answering:
    path = local_copy(source)
    tokenizer = load_tokenizer(path)
    device = choose_device(options.device)
    model = load_causal_lm(path, dtype=choose_dtype(options.dtype), device=device)
    vocab = vocab_of(tokenizer, model.vocab_size)
    model.mask_from(vocab.known)
    kind = options.prompt
    if kind == "auto":
        kind = "chat" if getattr(tokenizer, "chat_template", None) else "base"
    if kind == "chat" and not getattr(tokenizer, "chat_template", None):
        raise UserError(f"{source}: its tokenizer has no chat template. Use --prompt base.")
    settings = generate.make_settings(
        model,
        tokenizer,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        end_ids=end_of_turn(tokenizer) if kind == "chat" else (),
    )
    return _Answering(model, tokenizer, settings, kind, options, note, vocab.fingerprint)


def _record(
    every: Sequence[Problem], problems: Sequence[Problem], answer: _Answering, tier: str
) -> dict[str, Any]:
    """All that a sample depends on: two files of samples with the same record may be joined."""
    options = answer.options
    return {
        "task": TASK_VERSION,
        "problems": len(problems),
        "data_sha256": digest(every),
        "extra_tests_sha256": None if options.extra_tests is None else file_sha256(options.extra_tests),
        "weights_sha256": weights_sha256(answer.model),
        "tokenizer_sha256": answer.tokenizer_sha256,
        "prompt": answer.kind,
        "samples": options.samples,
        "seed": options.seed,
        "stops": list(STOPS) if answer.kind == "base" else ["a closed fence around the function"],
        "batch_rows": options.batch_rows,
        "device": answer.model.device.type,
        "sandbox": tier,
        "torch": torch.__version__,
        **generate.read_back(answer.settings, answer.model),
    }


class _Samples:
    """The lines of `humaneval.samples.jsonl`, of which a kill can cut off the last."""

    def __init__(self, out: Path, record: dict[str, Any]) -> None:
        """Reads what is there, and writes nothing yet.

        Raises:
            UserError: it is damaged, or was begun with other settings.
        """
        self._out, self.path, self._lock = out, out / SAMPLES, threading.Lock()
        self._record = record
        self.lines: dict[tuple[str, int], dict[str, Any]] = {}
        self._read()

    @contextlib.contextmanager
    def begun(self) -> Iterator[None]:
        """Meanwhile no other process writes here."""
        try:
            self._out.mkdir(parents=True, exist_ok=True)
            lock = RunDir(self._out).locked()
        except OSError as error:
            raise UserError(
                f"{self._out}: cannot be written: {error.strerror}. Give --out another folder."
            ) from error
        with lock:
            self._read()
            self.write_whole()
            (self._out / RESULT).unlink(missing_ok=True)  # a score stands only beside what it was made of
            yield

    def _read(self) -> None:
        if not os.path.lexists(self.path):
            return
        record = self._record
        with opened(self.path, "samples", "Give --out another folder.") as file:
            raw = file.read().split(b"\n")[:-1]
        try:
            lines = [parse_json(line) for line in raw]
            began = lines[0]["settings"] if lines else record
            found = {(line["task_id"], int(line["sample"])): line for line in lines[1:] if line["verdict"]}
            differing = [name for name in {**began, **record} if began.get(name) != record.get(name)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.path}: damaged: {one_line(error)} Remove it, or give --out another."
            ) from error
        if differing:
            shown = [f"{n} ({began.get(n)!r:.80} -> {record.get(n)!r:.80})" for n in differing[:6]]
            raise UserError(
                f"{self.path}: begun with other settings: {', '.join(shown)}. Give --out another folder."
            )
        self.lines = found

    def add(self, line: dict[str, Any]) -> None:
        """Called by several threads."""
        try:
            with self._lock, open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                self.lines[line["task_id"], line["sample"]] = line
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written: {error.strerror}. Make room, then go on."
            ) from error

    def write_whole(self) -> None:
        """In the order of problems, so that two files of the same run may be compared."""
        ordered = sorted(self.lines, key=lambda key: (int(key[0].rpartition("/")[2]), key[1]))
        header = {"settings": self._record, "settings_sha256": _sha256(self._record)}
        content = [header, *(self.lines[key] for key in ordered)]
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in content).encode())


@dataclass(frozen=True)
class _Answering:
    """Asks of problems, and completions of asks."""

    model: CausalLM
    tokenizer: Any
    settings: GenerationConfig
    kind: str
    options: Options
    note: Note
    tokenizer_sha256: str

    def ask(self, problem: Problem, sample: int) -> Ask:
        text = chat_prompt(problem, self.tokenizer) if self.kind == "chat" else base_prompt(problem)
        # A template writes its own special tokens. A tokenizer may also close what it reads.
        ids = self.tokenizer(text, add_special_tokens=self.kind == "base")["input_ids"]
        while self.kind == "base" and len(ids) > 1 and ids[-1] in self.settings.eos_token_id:
            ids.pop()
        return Ask(f"{problem.task_id} sample {sample}", ids, is_whole(problem, self.kind))

    def complete(self, asks: Sequence[Ask]) -> list[Completion]:
        try:
            return generate.complete(self.model, self.tokenizer, self.settings, asks, self.options.seed)
        except (InferenceFailed, UserError):
            raise
        except Exception as error:  # whatever a model fails with, it is no wrong answer
            raise InferenceFailed(
                f"{asks[0].name} and its batch: {type(error).__name__}: {one_line(error)}"
            ) from error


def _answer_all(
    problems: Sequence[Problem], answer: _Answering, judge: Judge, samples: _Samples
) -> dict[str, Any]:
    """Complete what has no line yet; verdicts come, and are written, while the next batch is completed.

    A batch is always made of the same rows, also after a kill: how rows are padded moves their last digits.
    """
    asked = [(answer.ask(p, n), p, n) for p in problems for n in range(answer.options.samples)]
    asked.sort(key=lambda one: len(one[0].prompt_ids))  # stable: neighbours need little padding
    size, tokens, seconds, told = answer.options.batch_rows, 0, 0.0, time.perf_counter()
    verdicts: list[Future[None]] = []
    for start in range(0, len(asked), size):
        batch = asked[start : start + size]
        missing = [(p.task_id, n) not in samples.lines for _, p, n in batch]
        if not any(missing):
            continue
        begun = time.perf_counter()
        done = answer.complete([ask for ask, *_ in batch])
        seconds += time.perf_counter() - begun
        tokens += sum(completion.tokens for completion in done)
        for (_, problem, sample), completion, is_missing in zip(batch, done, missing, strict=True):
            if is_missing:
                line = _line(problem, sample, answer.kind, completion)
                verdicts.append(judge.pool.submit(_judge_line, judge, problem, line, samples))
        if time.perf_counter() - told > PROGRESS_S:
            told = time.perf_counter()
            answer.note(f"{start + len(batch)}/{len(asked)} completions, {tokens / seconds:.0f} tokens/s")
    for verdict in verdicts:
        verdict.result()
    samples.write_whole()
    if not any(line["completion"].strip() for line in samples.lines.values()):
        raise InferenceFailed("every completion is empty")
    return {
        "tokens": sum(line["tokens"] for line in samples.lines.values()),
        "seconds": round(seconds, 3),
        "tokens_per_s": round(tokens / seconds, 2) if seconds else None,
        "threads": torch.get_num_threads(),
    }


def _line(problem: Problem, sample: int, kind: str, completion: Completion) -> dict[str, Any]:
    program = program_of(problem, kind, completion.text)
    return {
        "task_id": problem.task_id,
        "sample": sample,
        "prompt": kind,
        "completion": completion.text,
        "tokens": completion.tokens,
        "finish": completion.finish,
        "program": program,
        "parses": parsed(program) is not None,
    }


def _judge_line(judge: Judge, problem: Problem, line: dict[str, Any], samples: _Samples) -> None:
    for prefix in ("", "extra_") if judge.has_extra(problem) else ("",):
        verdict = judge(problem, line["program"], extra=bool(prefix))
        line |= {f"{prefix}verdict": verdict.status, f"{prefix}passed": verdict.passed}
        line |= {f"{prefix}detail": verdict.detail, f"{prefix}cpu_s": round(verdict.cpu_s, 3)}
    samples.add(line)


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
