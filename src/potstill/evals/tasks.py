"""Questions with a verifier: controls, answers, verdicts, and an accuracy with its interval.

    answers.jsonl  one line per answer: question, expected answer, text, what of it was judged, verdict
    result.json    the result, or why there is none; written last

Every evaluation first gives the verifier the expected answers, all of which it must accept, and empty ones, none of
which it may; otherwise there is no accuracy. A prompt is made of a question's text alone.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from potstill.data.chats.templates import DATE, ChatTemplate
from potstill.errors import UserError
from potstill.evals.calibration import calibration
from potstill.evals.humaneval_problems import LEFTOVER, answer_of, end_of_turn, opens_thought, thought_ids
from potstill.evals.intervals import Values, means_of
from potstill.evals.pass_at_k import scores
from potstill.evals.runtimes import Placement, Runtime, completed, open_runtime
from potstill.evals.subject import Subject
from potstill.evals.task_sources import (
    Question,
    Task,
    VerifierFailed,
    digest,
    open_task,
    require_controls,
)
from potstill.io.safe_open import read_object
from potstill.models import generate
from potstill.models.generate import Completion, InferenceFailed, Request
from potstill.models.hub import pinned
from potstill.recipe.sections_evaluation import QUESTION, TaskConfig
from potstill.runs.run_dir import environment, write_whole

TASK_VERSION = "potstill-task-1"
"""To be changed together with anything that changes an accuracy: prompts, stops, what is judged, verdicts."""
RESULT, ANSWERS = "result.json", "answers.jsonl"
PLAIN, LINE_BREAK = f"Question: {QUESTION}\nAnswer:", "\n"
"""Prompt and end of an answer of a model without a chat template."""
CORRECT, CUT = "correct", "cut in thought"
"""Verdicts; the others are `incorrect` and `empty`, of which nothing is left to be judged."""
PROGRESS_S = 20.0

Note = Callable[[str], None]


def evaluate(
    source: str | Path,
    config: TaskConfig,
    out: Path,
    note: Note = lambda _: None,
    placement: Placement | None = None,
) -> dict[str, Any]:
    """Ask every question and judge every answer. The result is returned, and written to `out`.

    Its `status` is `finished`, or `inference_failed` with the reason under `why` and no accuracy. A finished result of
    the same settings is not made again.

    Args:
        source: a model folder, a GGUF file or a hub id.

    Raises:
        UserError: the user's mistake, or a failed control.
    """
    task = open_task(config)
    require_controls(task)
    placement = placement or Placement()
    student = _load(pinned(str(source)), config, placement)
    controls = require_controls(task, student.judged_part)
    settings = json.loads(json.dumps(_settings(task, student)))
    if (earlier := _finished(out, settings)) is not None:
        note(f"{config.label}: as {out / RESULT} has it")
        return earlier
    note(f"{config.label}: {len(task.questions)} questions, {student.described_prompts}")
    _make_folder(out)
    result: dict[str, Any] = {
        "model": str(source),
        "task": config.label,
        "settings": settings,
        "controls": controls,
    }
    try:
        lines, generation = _answers(task, student, placement.batch_rows, note)
    except InferenceFailed as failed:
        result |= {"status": "inference_failed", "why": str(failed)}
    else:
        _write(out / ANSWERS, "".join(json.dumps(line) + "\n" for line in lines))
        result |= {"status": "finished", **_summary(task, lines, config), "generation": generation}
    _write(out / RESULT, json.dumps(result | {"environment": environment()}, indent=2) + "\n")
    return result


def require(config: TaskConfig) -> None:
    """Before a run: the questions are there, and their verifier passes its controls.

    Raises:
        UserError: as of `evaluate`.
    """
    require_controls(open_task(config))


def of_subject(config: TaskConfig, subject: Subject) -> dict[str, Any]:
    """A recipe's `evaluations: [{name: task, …}]`: accuracy and what it depends on.

    Raises:
        UserError: as of `evaluate`, or inference failed.
    """
    result = _of_subject(config, subject)
    figures = {f"accuracy/{name}": value for name, value in result["accuracy"].items() if name != "interval"}
    figures |= {name: result[name] for name in ("mean_score", "cut_in_thought") if name in result}
    figures |= {f"calibration/{name}": value for name, value in result.get("calibration", {}).items()}
    figures |= {f"finish/{name}": count for name, count in result["finishes"].items()}
    if "cluster_by_question" in result:
        figures["clusters"] = len(set(result["cluster_by_question"]))
    return figures | {
        "questions": result["questions"],
        "questions_sha256": result["settings"]["questions_sha256"],
    }


def accuracy_by_unit(config: TaskConfig, subject: Subject) -> tuple[Values, Values]:
    """The share of correct answers to each question, or cluster of them, and the questions of each.

    Raises:
        UserError: as of `of_subject`.
    """
    result = _of_subject(config, subject)
    shares = [count / config.samples for count in result["correct_by_question"]]
    return means_of(shares, result.get("cluster_by_question", range(len(shares))))


def _of_subject(config: TaskConfig, subject: Subject) -> dict[str, Any]:
    result = evaluate(subject.folder, config, subject.out, subject.note, Placement(device=subject.device))
    if result["status"] != "finished":
        raise UserError(f"{config.label}: inference failed, there is no accuracy: {result['why']}")
    return result


@dataclass(frozen=True)
class _Student:
    """A model, how it is asked, and which part of what it writes is its answer."""

    runtime: Runtime
    generation: GenerationConfig
    config: TaskConfig
    is_chat: bool
    opens_thought: bool
    """Whether the chat template opens a thought where the assistant's turn starts."""

    @property
    def prompt(self) -> str:
        return self.config.prompt or (QUESTION if self.is_chat else PLAIN)

    @property
    def stops(self) -> list[str]:
        if self.config.stop is not None:
            return self.config.stop
        return [] if self.is_chat else [LINE_BREAK]

    @property
    def described_prompts(self) -> str:
        return "chat template" if self.is_chat else "plain text"

    def requests(self, questions: Sequence[str]) -> list[list[int]]:
        """The prompt of each question, as ids. They are made of these texts and the settings alone.

        Raises:
            UserError: the chat template fails.
        """
        texts = [self.prompt.replace(QUESTION, text) for text in questions]
        if self.is_chat:
            system = self.config.system
            before = [] if system is None else [{"role": "system", "content": system}]
            with ChatTemplate(self.runtime.tokenizer, DATE, "Set apply_chat_template: false.") as template:
                texts = [
                    template.render(
                        f"task: question {number}", [*before, {"role": "user", "content": text}], prompt=True
                    )
                    for number, text in enumerate(texts)
                ]
        ends = self.generation.eos_token_id
        return [self.runtime.prompt_ids(text, self.is_chat, ends) for text in texts]

    def answer(self, text: str) -> str | None:
        """The answer in what was written: after the last thought, up to the first stop. None if cut in a thought."""
        after = answer_of(text, self.opens_thought)
        return None if after is None else self.judged_part(after)

    def judged_part(self, answer: str) -> str:
        """An answer up to its first stop; line breaks before its first word end nothing."""
        answer = LEFTOVER.split(answer.lstrip(), maxsplit=1)[0]
        ends = [at for stop in self.stops if (at := answer.find(stop)) >= 0]
        return answer[: min(ends, default=None)].strip()

    def is_whole(self, text: str) -> bool:
        """Whether an answer so far has all that will be judged."""
        after = answer_of(text, self.opens_thought)
        if after is None:
            return False
        after = after.lstrip()
        return LEFTOVER.search(after) is not None or any(stop in after for stop in self.stops)


def _load(source: str, config: TaskConfig, placement: Placement) -> _Student:
    runtime = open_runtime(source, placement)
    tokenizer = runtime.tokenizer
    has_template = bool(getattr(tokenizer, "chat_template", None))
    is_chat = has_template if config.apply_chat_template is None else config.apply_chat_template
    if is_chat and not has_template:
        raise UserError(
            f"task: apply_chat_template: the tokenizer of {source} has no chat template. Leave it out."
        )
    if config.system is not None and not is_chat:
        raise UserError(
            f"task: system: the tokenizer of {source} has no chat template. Write it into prompt."
        )
    words = ("task", "Set apply_chat_template: false.")
    generation = generate.make_settings(
        runtime.model,
        tokenizer,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        end_ids=end_of_turn(tokenizer, words) if is_chat else (),
    )
    in_thought = is_chat and opens_thought(tokenizer)
    return _Student(runtime, generation, config, is_chat, in_thought)


def _settings(task: Task, student: _Student) -> dict[str, Any]:
    """Everything that an answer and its verdict depend on, read back from the objects that make them."""
    config = student.config
    return {
        "task": TASK_VERSION,
        "source": config.source,
        "name": config.task if config.source == "reasoning_gym" else Path(str(config.path)).name,
        **task.describe(),
        "questions": len(task.questions),
        "questions_sha256": digest(task.questions),
        "apply_chat_template": student.is_chat,
        "prompt_opens_thought": student.opens_thought,
        "prompt": student.prompt,
        "system": config.system,
        "stop": student.stops,
        "extract": config.extract,
        "samples": config.samples,
        "seed": config.seed,
        **student.runtime.describe(),
        **generate.describe_settings(student.generation, student.runtime.model),
    }


def _finished(out: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result in `out`, where it is one of these settings."""
    with contextlib.suppress(UserError):
        result = read_object(out / RESULT, "It is made again.")
        if result.get("status") == "finished" and result.get("settings") == settings:
            return result
    return None


def _answers(
    task: Task, student: _Student, batch_rows: int, note: Note
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A line for each answer, in the order of the questions, and what generation took."""
    prompts = student.requests([question.text for question in task.questions])
    shown = thought_ids(student.runtime.tokenizer)
    todo = [
        (number, sample, Request(f"question {number} sample {sample}", prompt, student.is_whole, shown))
        for number, prompt in enumerate(prompts)
        for sample in range(student.config.samples)
    ]
    todo.sort(key=lambda item: len(item[2].prompt_ids))  # similar lengths need little padding
    size, lines, started = batch_rows, [], time.perf_counter()
    noted = started
    for start in range(0, len(todo), size):
        batch = todo[start : start + size]
        completions = completed(
            student.runtime,
            student.generation,
            [request for *_, request in batch],
            student.config.seed,
        )
        for (number, sample, _), completion in zip(batch, completions, strict=True):
            question = task.questions[number]
            lines.append({"number": number, "sample": sample, **_judge(task, student, question, completion)})
        if time.perf_counter() - noted > PROGRESS_S:
            noted = time.perf_counter()
            note(f"{start + len(batch)}/{len(todo)} answers")
    if not any(line["text"].strip() for line in lines):
        raise InferenceFailed("every answer is empty")
    seconds, tokens = time.perf_counter() - started, sum(line["tokens"] for line in lines)
    lines.sort(key=lambda line: (line["number"], line["sample"]))
    return lines, {"tokens": tokens, "seconds": round(seconds, 3), "threads": torch.get_num_threads()}


def _judge(task: Task, student: _Student, question: Question, completion: Completion) -> dict[str, Any]:
    """An answer's line. Correct is what the verifier gives a score of 1, and nothing else."""
    answer, score, detail = student.answer(completion.text), 0.0, ""
    if answer is None:
        verdict = CUT
    else:
        answer = _extracted(answer, student.config.extract)
        verdict = "empty"
    if answer:
        try:
            score = task.score(question, answer)
            verdict = CORRECT if score == 1 else "incorrect"
        except VerifierFailed as failed:  # the verifier accepts what it expects, so this is not it
            verdict, detail = "incorrect", f"the verifier fails at it: {failed}"
    return {
        "question": question.text,
        "expected": question.expected,
        "text": completion.text,
        "judged": answer,
        "score": min(score, 1.0),
        "verdict": verdict,
        "detail": detail,
        "finish": completion.finish,
        "tokens": completion.tokens,
        "probability": math.exp(completion.logp),
    }


def _extracted(answer: str, pattern: str | None) -> str:
    """What the pattern's last match holds; its first group, where it has one. Empty where nothing matches."""
    if pattern is None:
        return answer
    found = list(re.finditer(pattern, answer, re.DOTALL))
    return str(found[-1][1 if found[-1].re.groups else 0] or "").strip() if found else ""


def _summary(task: Task, lines: Sequence[Mapping[str, Any]], config: TaskConfig) -> dict[str, Any]:
    correct = [0] * len(task.questions)
    for line in lines:
        correct[line["number"]] += line["verdict"] == CORRECT
    clusters = _clusters(task.questions)
    summary: dict[str, Any] = {
        "accuracy": asdict(scores(correct, config.samples, clusters)["pass@1"]),
        "questions": len(correct),
        "answers": len(lines),
        "correct": sum(correct),
        "correct_by_question": correct,
        "verdicts": dict(Counter(line["verdict"] for line in lines)),
        "finishes": dict(Counter(line["finish"] for line in lines)),
        "calibration": calibration(
            [line["probability"] for line in lines], [line["verdict"] == CORRECT for line in lines]
        ),
    }
    if clusters is not None:
        summary["cluster_by_question"] = clusters
    if config.source == "reasoning_gym":  # of a file, a score is 0 or 1
        summary["mean_score"] = sum(line["score"] for line in lines) / len(lines)
    if cut := summary["verdicts"].get(CUT, 0):
        summary["cut_in_thought"] = cut
    return summary


def _clusters(questions: Sequence[Question]) -> list[int] | None:
    """The number of each question's cluster, in the order of their first questions; None where they have none."""
    number_of = {name: number for number, name in enumerate(dict.fromkeys(q.cluster for q in questions))}
    return None if None in number_of else [number_of[question.cluster] for question in questions]


def described_settings(settings: Mapping[str, Any]) -> str:
    """Questions, prompts and decoding of a result in one line."""
    how = "greedy"
    if settings.get("do_sample"):
        how = f"temperature {settings.get('temperature')}, top-p {settings.get('top_p')}"
    prompts = "chat prompts" if settings.get("apply_chat_template") else "plain prompts"
    return (
        f"{settings.get('questions')} questions, {prompts}, {how}, {settings.get('samples')} per question, seed"
        f" {settings.get('seed')}, at most {settings.get('max_new_tokens')} tokens"
    )


def table_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """A finished result as rows of a table."""
    of, finishes = result["accuracy"], result["finishes"]
    rows = [["accuracy", f"{of['value']:.1%} ({of['low']:.1%} to {of['high']:.1%}, {of['interval']})"]]
    if "mean_score" in result:
        rows.append(["mean score", f"{result['mean_score']:.4f}"])
    if of_answers := result.get("calibration"):
        gap = f"Brier score {of_answers['brier']:.3f}, calibration error {of_answers['ece']:.3f}"
        rows.append(["own probability", f"{of_answers['probability']:.1%} in the mean; {gap}"])
    rows.append(["verdicts", ", ".join(f"{n} {name}" for name, n in sorted(result["verdicts"].items()))])
    rows.append(["ended by", ", ".join(f"{name} {n}" for name, n in sorted(finishes.items()))])
    controls = result["controls"].items()
    rows.append(["controls", ", ".join(f"{name} answers {passed} correct" for name, passed in controls)])
    rows.append(["settings", described_settings(result["settings"])])
    if "cut_in_thought" in result:
        cut = f"{result['cut_in_thought']} of {result['answers']} answers were cut in their thought"
        rows.append(["note", f"{cut} and are incorrect: raise max_new_tokens"])
    return rows


def _make_folder(out: Path) -> None:
    """A result that is there is of other answers: it goes before they do."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / RESULT).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}. Give --out another folder.") from error


def _write(path: Path, text: str) -> None:
    write_whole(path, text.encode())
