"""Benchmarks of the lm-eval library, on a model loaded and masked the way potstill loads every model.

    result.json  each task's metrics, version and settings; how prompts are written; lm-eval's version; the
                 model's hash

Tasks and their scores are defined by lm-eval. Code that ships with a model or a data set is never run, and
tasks that execute generated code are rejected, because lm-eval has no sandbox.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing

from potstill.data.chats.templates import DATE, ChatTemplate, TemplateRefused
from potstill.data.tokenizers import load_tokenizer, vocab_of
from potstill.errors import UserError, one_line
from potstill.evals.humaneval_problems import THOUGHT_ENDS, end_of_turn
from potstill.evals.subject import Subject
from potstill.models import generate
from potstill.models.causal_lm import CausalLM
from potstill.models.hub import local_copy, pinned
from potstill.models.load import choose_device, choose_dtype, load_causal_lm, weights_sha256
from potstill.recipe.sections_evaluation import LmEvalConfig
from potstill.runs.run_dir import environment, write_whole

RESULT = "result.json"
REPORTED = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better", "configs", "config")
"""The keys of lm-eval's own result that go into ours: scores, and every setting they depend on."""
IN_RECEIPT = ("add_bos_token", "apply_chat_template")
"""What a receipt has beside the metrics."""


@dataclass(frozen=True, kw_only=True)
class LmEvalSettings:
    tasks: tuple[str, ...]
    """Names of lm-eval's tasks, groups or tags."""
    lm_eval_tasks: Path | None = None
    """A folder of further tasks. Functions named in their YAML are imported and run."""
    batch_rows: int = 32
    limit: int | None = None
    """Only the first documents of each task; None is all."""
    add_bos_token: bool | None = None
    """Whether BOS stands before each text. None: what the tokenizer puts there; in a chat, what the template
    writes."""
    apply_chat_template: bool | None = None
    """Whether each prompt is a user's turn. None: if the model ends where its template ends a turn."""
    seed: int = 0
    dtype: str = "float32"
    device: str = "auto"

    def mistakes(self) -> dict[str, str]:
        """The fields that cannot be used, each with its problem."""
        counts = {"batch_rows": self.batch_rows, "limit": 1 if self.limit is None else self.limit}
        return {name: f"{value}: must be at least 1." for name, value in counts.items() if value < 1}


def evaluate(
    source: str | Path, config: LmEvalSettings, out: Path, note: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Run every task in this process. The result is returned, and written to `out`.

    Args:
        source: a model folder, a GGUF file or a hub id.

    Raises:
        UserError: lm-eval is not installed, has no such task, or fails on one.
    """
    if mistakes := config.mistakes():
        raise UserError(*(f"lm-eval: {name} {problem}" for name, problem in mistakes.items()))
    manager = _task_manager(config)
    source = pinned(str(source))
    path = local_copy(source)
    tokenizer = load_tokenizer(path)
    model = load_causal_lm(path, dtype=choose_dtype(config.dtype), device=choose_device(config.device))
    _mask_padding(model, vocab_of(tokenizer, model.vocab_size).known)
    reading = _reading_of(source, model, tokenizer, config)
    result: dict[str, Any] = {"model": str(source), "weights_sha256": weights_sha256(model)}
    result |= _run_tasks(model, reading, config, manager, note)
    result["environment"] = environment()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}. Give --out another folder.") from error
    text = json.dumps(result, indent=2, default=str)  # a task's settings may contain functions
    write_whole(out / RESULT, f"{text}\n".encode())
    plain: dict[str, Any] = json.loads(text)
    return plain


def require(config: LmEvalConfig) -> None:
    """Before a run: lm-eval is installed and has every task of a recipe's `evaluations: [{name: lm_eval, …}]`.

    Raises:
        UserError: it is not, or has not.
    """
    _task_manager(_settings_of(config, device="auto"))


def _settings_of(config: LmEvalConfig, device: str) -> LmEvalSettings:
    return LmEvalSettings(
        tasks=tuple(config.tasks),
        limit=config.limit,
        add_bos_token=config.add_bos_token,
        apply_chat_template=config.apply_chat_template,
        seed=config.seed,
        device=device,
    )


def of_subject(config: LmEvalConfig, subject: Subject) -> dict[str, float]:
    """A recipe's `evaluations: [{name: lm_eval, tasks: […]}]`: every metric of every task, standard errors
    too, and whether prompts had BOS and chat template.

    Raises:
        UserError: lm-eval is not installed, has no such task, or fails on one.
    """
    result = evaluate(subject.folder, _settings_of(config, subject.device), subject.out, subject.note)
    metrics = {
        f"{task}/{name}": value
        for task, metrics in result["results"].items()
        for name, value in metrics.items()
        if isinstance(value, float)
    }
    return metrics | {name: result[name] for name in IN_RECEIPT if name in result}


def _task_manager(config: LmEvalSettings) -> Any:
    """lm-eval's index of tasks, in which all of the requested ones exist."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-eval: the package is not installed. Run: pip install 'potstill[lm-eval]'")
    folder = config.lm_eval_tasks
    if folder is not None and not folder.is_dir():
        raise UserError(f"--lm-eval-tasks {folder}: no such folder. Give one with tasks as YAML files.")
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if folder is None else str(folder))
    if unknown := [task for task in config.tasks if task not in manager.task_index]:
        raise UserError(
            f"lm-eval: version {lm_eval.__version__} has no task {unknown[0]!r:.80}. `lm-eval ls tasks` lists them;"
            " `potstill eval` reads further ones from the folder of --lm-eval-tasks."
        )
    return manager


@dataclass(frozen=True)
class _Reading:
    """How the model's prompts are written."""

    tokenizer: Any
    """lm-eval's own: it may put other special tokens around a text, and is given a pad token."""
    add_bos_token: bool
    prefix_id: int | None
    """What stands before an empty text; None: lm-eval's choice."""
    apply_chat_template: bool
    think_end_token: int | str | None
    """In a chat, what stands before the last of it is not the answer."""
    why: str


def _reading_of(source: str | Path, model: CausalLM, tokenizer: Any, config: LmEvalSettings) -> _Reading:
    """What the config says, else what the model was trained to read.

    Raises:
        UserError: BOS or template is wanted, and there is none; or the template fails.
    """
    chat, why = _chat(source, model, tokenizer, config.apply_chat_template)
    before, after = _around(tokenizer)
    # Transformers, too, adds no token to the text of a template, which writes its own.
    add = config.add_bos_token if config.add_bos_token is not None else bool(before) and not chat
    if add and not before and tokenizer.bos_token_id is None:
        raise UserError(f"lm-eval: add_bos_token: the tokenizer of {source} has no BOS. Leave it out.")
    own, first = copy.deepcopy(tokenizer), before or [tokenizer.bos_token_id]
    if add and (after or not before):  # an EOS behind the prompt would be answered with another text
        names = own.convert_ids_to_tokens(first)
        own.backend_tokenizer.post_processor = TemplateProcessing(
            single=[*names, "$A"], special_tokens=[*zip(names, first, strict=True)]
        )
    return _Reading(
        own, add, before[-1] if before else None, chat, _end_of_thought(own) if chat else None, why
    )


def _chat(source: str | Path, model: CausalLM, tokenizer: Any, given: bool | None) -> tuple[bool, str]:
    """Whether prompts are a user's turn, and why."""
    template = getattr(tokenizer, "chat_template", None)
    if given and not template:
        raise UserError(f"lm-eval: apply_chat_template: the tokenizer of {source} has none. Leave it out.")
    if not template or given is not None:
        return bool(given), "as given" if template else "the model has none"
    turn_end = end_of_turn(tokenizer, ("lm-eval", "Use --no-apply-chat-template."))
    settings = generate.make_settings(model, tokenizer, max_new_tokens=1, temperature=0, top_p=1)
    ends, which = settings.eos_token_id, tokenizer.convert_ids_to_tokens(turn_end)
    if set(turn_end) <= set(ends):
        return True, f"the model ends a turn with {which[0]}" if which else "the model has one"
    names = ", ".join(map(str, tokenizer.convert_ids_to_tokens(ends)))
    return False, f"a base model: it ends with {names}, a turn with {which[0]}"


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after a text."""
    plain, full = (tokenizer("a b", add_special_tokens=which)["input_ids"] for which in (False, True))
    start = next(at for at in range(len(full)) if full[at : at + len(plain)] == plain)
    return full[:start], full[start + len(plain) :]


def _end_of_thought(tokenizer: Any) -> int | str | None:
    """The tag that ends a thought: the id of an added token, or its text in the template."""
    added = tokenizer.added_tokens_decoder.items()
    in_template = THOUGHT_ENDS.search(str(tokenizer.chat_template))
    text = in_template[0] if in_template else None
    return next((i for i, token in added if THOUGHT_ENDS.fullmatch(token.content)), text)


def _run_tasks(
    model: CausalLM, reading: _Reading, config: LmEvalSettings, manager: Any, note: Callable[[str], None]
) -> dict[str, Any]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    try:
        lm = HFLM(
            pretrained=model.hf,
            tokenizer=reading.tokenizer,
            batch_size=config.batch_rows,
            add_bos_token=reading.add_bos_token,
            prefix_token_id=reading.prefix_id,
            think_end_token=reading.think_end_token,
        )
        _score_no_bos(lm)
        described = _described(lm, reading)
        note(f"lm-eval {lm_eval.__version__}: {', '.join(config.tasks)}; {described['prompts']}")
        with _rendered_within_limits(lm, reading):
            values = lm_eval.simple_evaluate(
                model=lm,
                tasks=[*config.tasks],
                limit=config.limit,
                apply_chat_template=reading.apply_chat_template,
                fewshot_as_multiturn=reading.apply_chat_template,
                log_samples=False,
                task_manager=manager,
                confirm_run_unsafe_code=False,
                random_seed=config.seed,
                numpy_random_seed=config.seed,
                torch_random_seed=config.seed,
                fewshot_random_seed=config.seed,
            )
    except Exception as error:  # a task is a program, and its data set may have to be downloaded
        raise UserError(f"lm-eval: {','.join(config.tasks)}: it fails: {one_line(error)}") from error
    return {
        "lm_eval": lm_eval.__version__,
        "batch_rows": lm.batch_size,
        "whole": config.limit is None,
        **described,
        **{name: values[name] for name in REPORTED if name in values},
    }


def _score_no_bos(lm: Any) -> None:
    """In a whole text's likelihood: lm-eval puts its prefix before the text, so that a BOS would be there
    twice, and the second would be scored as a word.
    """
    rolling = lm.loglikelihood_rolling

    def without_bos(*arguments: Any, **options: Any) -> Any:
        added, lm.add_bos_token = lm.add_bos_token, False
        try:
            return rolling(*arguments, **options)
        finally:
            lm.add_bos_token = added

    lm.loglikelihood_rolling = without_bos


@contextlib.contextmanager
def _rendered_within_limits(lm: Any, reading: _Reading) -> Iterator[None]:
    """Inside the block a chat template, which is a program that came with the model, has the time and memory that it
    has for a corpus, and the same date every day.
    """
    if not reading.apply_chat_template:
        yield
        return
    with ChatTemplate(reading.tokenizer, DATE, "Use --no-apply-chat-template.") as template:

        def render(chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            where, prompt = "a task's prompt", add_generation_prompt
            try:
                return template.render(where, chat_history, prompt=prompt, goes_on=not prompt)
            except TemplateRefused:
                # A system's message, mostly. lm-eval leaves it out then, and its published scores are of that.
                without = [each for each in chat_history if each["role"] != "system"]
                return template.render(where, without, prompt=prompt, goes_on=not prompt)

        lm.apply_chat_template = render
        yield


def _described(lm: Any, reading: _Reading) -> dict[str, Any]:
    """How prompts are written, read back from lm-eval's object."""
    chat, bos = reading.apply_chat_template, bool(lm.add_bos_token)
    first = reading.tokenizer.decode(lm.tok_encode("a b")[:1]) if bos else "nothing"
    form = "chat template" if chat else "plain text, no chat template"
    return {
        "apply_chat_template": chat,
        "add_bos_token": bos,
        "prefix_token_id": lm.prefix_token_id,
        "think_end_token": lm.think_end_token,
        "prompts": f"{form} ({reading.why}), {first} added before it",
    }


def table_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """The metrics of every task as rows: task, metric, value with its standard error."""
    rows = []
    for task, metrics in result["results"].items():
        for name, value in metrics.items():
            metric, _, form = name.partition(",")
            if isinstance(value, float) and form and not metric.endswith("_stderr"):
                error = metrics.get(f"{metric}_stderr,{form}")
                spread = f" ± {error:.4f}" if isinstance(error, float) else ""
                rows.append(
                    [task, metric if form == "none" else f"{metric} ({form})", f"{value:.4f}{spread}"]
                )
    if "prompts" in result:
        rows.append(["prompts", "", result["prompts"]])
    if not result["whole"]:
        rows.append(["note", "", "only the first documents of each task: not the task's score"])
    return rows


def _mask_padding(model: CausalLM, known: int) -> None:
    """Give ids without a token probability 0 in the logits that lm-eval reads, too."""
    model.mask_from(known)

    def mask(module: Any, arguments: Any, output: Any) -> None:
        output.logits[..., known:] = -torch.inf

    model.hf.register_forward_hook(mask)
