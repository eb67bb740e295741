"""From a resolved recipe to the objects of a run, in five stages: files, corpus, teacher, student, match.

Ordered by price: files are verified before a library opens them, the corpus is read before a model is loaded.
Nothing but `corpus.shards` is written here, and what is refused leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from potstill.build.corpus import make_corpus
from potstill.build.resolve import Resolved
from potstill.build.vocabulary import Shared, match_vocabularies
from potstill.data import packing, token_cache, tokenizers
from potstill.data.decontamination import summary
from potstill.errors import UserError
from potstill.io.cpu_matmul import matmul_with, return_freed_memory
from potstill.losses.objective import Objective
from potstill.models.causal_lm import CausalLM
from potstill.models.compile import compile_body, require_compiler
from potstill.models.load import longest_row
from potstill.models.lora import LoraLM, require_peft
from potstill.models.pruning import cut, ffn_width_of
from potstill.models.student import Student, from_checkpoint, from_config
from potstill.recipe.load import Recipe
from potstill.registry import entries
from potstill.types import Divergence, Teacher

CALIBRATION_ROWS = 8
"""Training rows on which the channels of an MLP are ranked."""
Note = Callable[[str], None]


@dataclass(frozen=True)
class RunSetup:
    """Everything a run needs, built from its recipe."""

    resolved: Resolved
    corpus: packing.Corpus
    tokenizer: Any | None
    teacher: Teacher
    student: Student
    origin: dict[str, Any]
    """Where the student's weights came from."""
    shared: Shared

    @property
    def recipe(self) -> Recipe:
        return self.resolved.recipe

    @property
    def device(self) -> torch.device:
        return self.resolved.device


@contextlib.contextmanager
def process_of(recipe: Recipe) -> Iterator[None]:
    """What a recipe asks of the process, while the block runs: which library multiplies matrices on the CPU.
    That freed memory goes back to the system at once cannot be taken back.
    """
    if recipe.train.return_memory:
        return_freed_memory()
    with matmul_with(recipe.train.matmul):
        yield


def set_up(resolved: Resolved, note: Note, beat: Callable[[], None] = lambda: None) -> RunSetup:
    """Make what the recipe names.

    Args:
        note: told what was made, a line each.
        beat: called with each document, a sign of life for whoever waits.

    Raises:
        UserError: whatever is wrong with the recipe's files, models and corpus together.
    """
    recipe = resolved.recipe
    verify_files(resolved, note)
    corpus, tokenizer = read_corpus(resolved, note, beat)
    teacher = load_teacher(resolved, tokenizer, note)
    # After the teacher: what a library draws while it loads must not move the student's random weights.
    torch.manual_seed(recipe.train.seed)
    model, origin = make_student(resolved, teacher, corpus.train)
    if recipe.lora is not None:
        # Around the cut model, so that names of adapters are those of the student's layers.
        model = LoraLM(model, recipe.lora)
        origin |= {"lora": model.described()}
    shared = match(resolved, teacher, model, origin, corpus, tokenizer, note)
    # After the ids are matched: padded ones are masked in the head, which a compiled body does not contain.
    student = make_trainable(recipe, model, teacher)
    numel, lora = sum(p.numel() for p in model.parameters()), origin.get("lora")
    trained = f", of adapters {lora['trainable_weights'] / 1e6:.3g} M alone trained" if lora else ""
    note(f"student: {origin['name']}, {numel / 1e6:.1f} M parameters{trained}")
    return RunSetup(resolved, corpus, tokenizer, teacher, student, origin, shared)


def verify_files(resolved: Resolved, note: Note) -> None:
    """The machine has what the recipe asks for, and every checkpoint is whole."""
    recipe, device = resolved.recipe, resolved.device
    if recipe.lora is not None:
        require_peft()
    chosen = "" if recipe.train.device != "auto" else " (auto: CUDA where there is a device, else the CPU)"
    note(f"device: {device}{chosen}")
    if recipe.train.compile:
        require_compiler(device)
    for files in resolved.checkpoints:
        files.verify()


def read_corpus(
    resolved: Resolved, note: Note, beat: Callable[[], None]
) -> tuple[packing.Corpus, Any | None]:
    """Packed rows, and the tokenizer that read them."""
    recipe = resolved.recipe
    shards = recipe.corpus.shards
    if shards is not None and not token_cache.is_whole(shards):
        note(f"corpus: read once, into {shards}")
    corpus, tokenizer = make_corpus(resolved, beat)
    corpus.order(recipe.train.seed).rows(0, recipe.train.rows_per_step)  # refuses more than it can give
    counts = corpus.manifest
    note(
        f"corpus: {counts['documents']} documents, {counts['tokens']} tokens; rows of"
        f" {recipe.corpus.tokens_per_row}: {len(corpus.train)} to train on, {len(corpus.heldout)} held out"
    )
    if counts["decontamination"] is not None:
        note(f"decontamination: {summary(counts['decontamination'])}")
    if recipe.eval.sample_prompt is not None and tokenizer is None:
        raise UserError("eval.sample_prompt: no tokenizer reads it. Set corpus.tokenizer, or null.")
    return corpus, tokenizer


def load_teacher(resolved: Resolved, tokenizer: Any | None, note: Note) -> Teacher:
    """The teacher, whose token list is the corpus's."""
    label = resolved.teacher.label
    teacher = resolved.teacher.load(resolved.recipe.corpus.tokens_per_row)
    backend = teacher.describe().get("runs_on")
    by = "" if backend is None else f"; {backend['backend']} runs it ({backend['reason']})"
    note(f"teacher: {label}, vocabulary of {teacher.vocab_size}{by}")
    if tokenizer is not None and teacher.vocab.tokens is not None:
        in_corpus = tokenizers.vocab_of(tokenizer, teacher.vocab_size)
        tokenizers.require_same(teacher.vocab, in_corpus, label, "corpus")
    return teacher


def make_student(
    resolved: Resolved, teacher: Teacher, rows: packing.PackedRows
) -> tuple[CausalLM, dict[str, Any]]:
    """The model, and where its weights came from."""
    source, config, device = resolved.student, resolved.student.config, resolved.device
    if config.name != "cut":
        teacher.confirm()
    if config.name == "checkpoint":
        assert source.files is not None
        model = from_checkpoint(config.model, device, source.files.config)
        return model, {"name": "checkpoint", "model": config.model}
    if config.name == "config":
        assert source.files is not None
        seed = resolved.recipe.train.seed
        model = from_config(config.model, device, source.files.config)
        return model, {"name": "config", "model": config.model, "seed": seed}
    whole, where = teacher.to_cut_from()
    total, keep = whole.hf.config.get_text_config().num_hidden_layers, source.layers_kept
    origin = {"name": "cut", "from": where, "layers_kept": list(keep), "of": total}
    if config.ffn_width is not None:
        origin |= {"ffn_width": config.ffn_width, "of_ffn_width": ffn_width_of(whole.hf.config)}
    few = [rows.batch([row]) for row in range(min(CALIBRATION_ROWS, len(rows)))]
    return cut(whole, keep, config.ffn_width, few), origin


def match(
    resolved: Resolved,
    teacher: Teacher,
    model: CausalLM,
    origin: dict[str, Any],
    corpus: packing.Corpus,
    tokenizer: Any | None,
    note: Note,
) -> Shared:
    """Teacher, student and corpus mean the same by an id, and none is asked for more than it was made for."""
    recipe, counts = resolved.recipe, corpus.manifest
    in_corpus = None if tokenizer is None else tokenizers.vocab_of(tokenizer, teacher.vocab_size)
    shared = match_vocabularies(resolved, teacher, in_corpus, model, origin)
    order, plan = corpus.order(recipe.train.seed), recipe.train
    wanted = (row for step in range(plan.steps) for row in order.rows(step, plan.rows_per_step))
    teacher.require_fits(counts, recipe.objective, shared.ids, wanted)
    for difference in shared.differences:
        note(f"warning: {difference}")
    tokens = recipe.corpus.tokens_per_row
    require_length(longest_row(model.hf.config), model.name, "corpus.tokens_per_row", tokens)
    require_length(teacher.max_length, f"teacher {resolved.teacher.label}", "corpus.tokens_per_row", tokens)
    if recipe.eval.sample_prompt is not None and tokenizer is not None:
        sampled = len(tokenizer(recipe.eval.sample_prompt)["input_ids"]) + recipe.eval.sample_tokens
        require_length(longest_row(model.hf.config), model.name, "eval.sample_tokens", sampled)
    return shared


def make_trainable(recipe: Recipe, model: CausalLM, teacher: Teacher) -> Student:
    """The student with its objective, and both models compiled where the recipe says so."""
    for each in (model, teacher.model):
        if recipe.train.compile and each is not None and not each.is_packed:
            compile_body(each)
    if recipe.train.activation_checkpointing:
        model.checkpoint_activations(selective=recipe.train.activation_checkpointing == "selective")
    precision = torch.bfloat16 if recipe.train.precision == "bfloat16" else None
    return Student(model, make_objective(recipe, precision), precision)


def make_objective(recipe: Recipe, matmul_dtype: torch.dtype | None) -> Objective:
    config = recipe.objective
    options = {k: v for k, v in dataclasses.asdict(config.divergence).items() if k != "name"}
    divergence: Divergence = partial(entries("divergence")[config.divergence.name], **options)
    return Objective(
        divergence,
        config.kd_weight,
        config.ce_weight,
        config.temperature,
        config.positions_at_once,
        matmul_dtype,
        config.engine,
        recipe.train.compile,
    )


def require_length(longest: int | None, name: str, field: str, tokens: int) -> None:
    """UserError for more tokens than a model was made for."""
    if longest is not None and tokens > longest:
        raise UserError(
            f"{field}: {tokens} tokens, {name} was made for {longest} at most. Set it to {longest} or less."
        )
