"""From the names of a recipe to the objects they stand for: the one place that knows every teacher, corpus
and student.

Ordered by price: files are verified before a library opens them, the corpus is read before a model is
loaded. Nothing but `corpus.shards` is written here, and what is refused leaves nothing behind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from potstill.build.corpus import called, checkpoints, make_corpus
from potstill.data import packing, token_cache, tokenizers
from potstill.data.decontamination import told
from potstill.data.fixed import FixedRows
from potstill.errors import UserError
from potstill.io.cpu_matmul import multiply_by, return_freed_memory
from potstill.losses.objective import Objective
from potstill.models.causal_lm import CausalLM
from potstill.models.compile import compile_body, require_compiler
from potstill.models.load import choose_device, load_config, local_copy
from potstill.models.lora import LoraLM, require_peft
from potstill.models.pruning import cut, ffn_width_of, layers_to_keep
from potstill.models.safetensors_files import check_model_files
from potstill.models.student import Student, from_checkpoint, from_config
from potstill.recipe.load import Recipe
from potstill.registry import entries
from potstill.teachers.hf import TorchTeacher
from potstill.teachers.stored import StoredTeacher, captured_model
from potstill.teachers.toy import FixtureTeacher, TableTeacher
from potstill.types import Divergence, Teacher, Vocab

CALIBRATION_ROWS = 8  # of the training rows, which tell the channels of an MLP that matter


@dataclass(frozen=True)
class Shared:
    """The ids that teacher, student and corpus mean the same by, 0 to `ids` - 1."""

    ids: int
    masked_in_teacher: int
    """Ids after them that the teacher has logits for; their probability is 0."""
    masked_in_student: int
    differences: list[str]
    """What the tokenizers differ in beside their lists."""


@dataclass(frozen=True)
class Cast:
    """Everyone who plays in a run."""

    recipe: Recipe
    device: torch.device
    corpus: packing.Corpus
    tokenizer: Any | None
    teacher: Teacher
    student: Student
    origin: dict[str, Any]
    """Where the student's weights came from."""
    shared: Shared

    def data(self, world: int = 1) -> FixedRows:
        """What the loop trains on, cut so that each of `world` ranks has a share of every step."""
        plan = self.recipe.train
        return self.corpus.steps(plan.seed, plan.rows_per_step, plan.micro_batch_rows, world)


def assemble(
    recipe: Recipe,
    note: Callable[[str], None],
    saved_student: str | Path | None = None,
    beat: Callable[[], None] = lambda: None,
) -> Cast:
    """Make what the recipe names. `saved_student` takes the place of the recipe's student; `beat` is called
    with each document, for whoever waits for signs of life.
    """
    if recipe.train.return_memory:
        return_freed_memory()
    multiply_by(recipe.train.matmul)
    lora = recipe.lora if saved_student is None else None
    if lora is not None:
        require_peft()
    device = choose_device(recipe.train.device)
    chosen = "" if recipe.train.device != "auto" else " (auto: CUDA where there is a device, else the CPU)"
    note(f"device: {device}{chosen}")
    if recipe.train.compile:
        require_compiler(device)
    for source in checkpoints(recipe, saved_student):
        check_model_files(path := local_copy(source))
        if path.is_dir():  # reading the config of a GGUF file takes seconds, and loading it will do so anyway
            load_config(path)

    if recipe.corpus.shards is not None and not token_cache.is_whole(Path(recipe.corpus.shards)):
        note(f"corpus: read once, into {recipe.corpus.shards}")
    corpus, tokenizer = make_corpus(recipe, beat)
    corpus.order(recipe.train.seed).rows(0, recipe.train.rows_per_step)  # refuses more than it can give
    counts = corpus.manifest
    note(
        f"corpus: {counts['documents']} documents, {counts['tokens']} tokens; rows of"
        f" {recipe.corpus.tokens_per_row}: {len(corpus.train)} to train on, {len(corpus.heldout)} held out"
    )
    if counts["decontamination"] is not None:
        note(f"decontamination: {told(counts['decontamination'])}")
    teacher = make_teacher(recipe, device)
    by = f"; {teacher.choice.told()}" if isinstance(teacher, TorchTeacher) else ""
    note(f"teacher: {called(recipe.teacher)}, vocabulary of {teacher.vocab_size}{by}")
    in_corpus = None if tokenizer is None else tokenizers.vocab_of(tokenizer, teacher.vocab_size)
    if in_corpus is not None and teacher.vocab.tokens is not None:
        tokenizers.require_same(teacher.vocab, in_corpus, called(recipe.teacher), "corpus")

    require_sample(recipe, tokenizer)
    torch.manual_seed(recipe.train.seed)
    model, origin = make_student(recipe, teacher, corpus.train, device, saved_student)
    if lora is not None:
        model = LoraLM(model, lora)
        origin |= {"lora": model.described()}
    shared = match_vocabularies(recipe, teacher, in_corpus, model, origin)
    if isinstance(teacher, StoredTeacher):
        order, plan = corpus.order(recipe.train.seed), recipe.train
        asked = (row for step in range(plan.steps) for row in order.rows(step, plan.rows_per_step))
        teacher.require_fits(counts, recipe.objective, shared.ids, asked)
    for difference in shared.differences:
        note(f"warning: {difference}")
    for model_of_run in (model, *([teacher.model] if isinstance(teacher, TorchTeacher) else [])):
        field, tokens = "corpus.tokens_per_row", recipe.corpus.tokens_per_row
        require_length(model_of_run.hf.config, model_of_run.name, field, tokens)
        if recipe.train.compile and not model_of_run.is_packed:
            compile_body(model_of_run)
    if recipe.eval.sample_prompt is not None and tokenizer is not None:
        sampled = len(tokenizer(recipe.eval.sample_prompt)["input_ids"]) + recipe.eval.sample_tokens
        require_length(model.hf.config, model.name, "eval.sample_tokens", sampled)
    if recipe.train.activation_checkpointing:
        model.checkpoint_activations(selective=recipe.train.activation_checkpointing == "selective")
    precision = torch.bfloat16 if recipe.train.precision == "bfloat16" else None
    student = Student(model, make_objective(recipe, precision), precision)
    trained = f", of adapters {origin['lora']['trainable_weights'] / 1e6:.3g} M alone trained" if lora else ""
    numel = sum(p.numel() for p in model.parameters())
    note(f"student: {origin['name']}, {numel / 1e6:.1f} M parameters{trained}")
    return Cast(recipe, device, corpus, tokenizer, teacher, student, origin, shared)


def make_teacher(recipe: Recipe, device: torch.device) -> Teacher:
    asked = recipe.teacher
    match asked.name:
        case "torch":
            return TorchTeacher.for_inference(
                asked.model,
                device=device,
                dtype=asked.dtype,
                weights=asked.weights,
                backend=asked.backend,
                tokens=recipe.corpus.tokens_per_row,
            )
        case "table":
            return TableTeacher.load(Path(asked.path))
        case "store":
            return StoredTeacher.open(asked.path, device)
        case _:
            return FixtureTeacher(asked.vocab_size)


def make_student(
    recipe: Recipe,
    teacher: Teacher,
    read: packing.PackedRows,
    device: torch.device,
    saved: str | Path | None = None,
) -> tuple[CausalLM, dict[str, Any]]:
    """The model and where its weights came from."""
    asked = recipe.student
    if saved is not None:
        return from_checkpoint(saved, device), {"name": "checkpoint", "model": str(saved)}
    if isinstance(teacher, StoredTeacher) and recipe.teacher.model and asked.name != "cut":  # type: ignore[union-attr]
        captured_model(
            recipe.teacher, teacher, device
        )  # what a recipe names, a receipt repeats: it must be true
    if asked.name == "checkpoint":
        return from_checkpoint(asked.model, device), {"name": "checkpoint", "model": asked.model}
    if asked.name == "config":
        return from_config(asked.model, device), {
            "name": "config",
            "model": asked.model,
            "seed": recipe.train.seed,
        }
    if isinstance(teacher, StoredTeacher):
        teacher, source = captured_model(recipe.teacher, teacher, device)
    elif isinstance(teacher, TorchTeacher):
        source = str(recipe.teacher.model)  # type: ignore[union-attr]
        if not teacher.choice.is_full:
            teacher = TorchTeacher.for_inference(
                source, device=device, dtype=teacher.model.head.weight_VD.dtype
            )
    else:
        raise UserError(
            f"student.name: cut needs a teacher with layers, and teacher.name is {recipe.teacher.name}."
        )
    config = teacher.model.hf.config
    total = config.get_text_config().num_hidden_layers
    keep = asked.keep or layers_to_keep(total, asked.layers or 0, asked.rule)
    origin = {"name": "cut", "from": source, "layers_kept": list(keep), "of": total}
    if asked.ffn_width is not None:
        origin |= {"ffn_width": asked.ffn_width, "of_ffn_width": ffn_width_of(config)}
    few = [read.batch([row]) for row in range(min(CALIBRATION_ROWS, len(read)))]
    return cut(teacher.model, keep, asked.ffn_width, few), origin


def make_objective(recipe: Recipe, matmul_dtype: torch.dtype | None) -> Objective:
    asked = recipe.objective
    options = {k: v for k, v in dataclasses.asdict(asked.divergence).items() if k != "name"}
    divergence: Divergence = partial(entries("divergence")[asked.divergence.name], **options)
    return Objective(
        divergence,
        asked.kd_weight,
        asked.ce_weight,
        asked.temperature,
        asked.positions_at_once,
        matmul_dtype,
        asked.engine,
        recipe.train.compile,
    )


def match_vocabularies(
    recipe: Recipe, teacher: Teacher, corpus: Vocab | None, model: CausalLM, origin: dict[str, Any]
) -> Shared:
    """Mask what only one side has. Refused: a student that means other tokens than the teacher."""
    own = Vocab(size=model.vocab_size)
    if origin["name"] == "checkpoint" and tokenizers.has_tokenizer(path := local_copy(origin["model"])):
        own = tokenizers.vocab_of(tokenizers.load_tokenizer(path), model.vocab_size)
    elif origin["name"] != "checkpoint":  # cut or made for this run: its ids mean what we say they mean
        named = teacher.vocab if teacher.vocab.tokens is not None else corpus
        own = dataclasses.replace(named, size=model.vocab_size) if named is not None else own
    theirs = teacher.vocab
    if (
        theirs.tokens is None and corpus is not None
    ):  # a teacher without a tokenizer reads what the corpus wrote
        theirs = dataclasses.replace(corpus, size=theirs.size)
    ids = tokenizers.require_same(theirs, own, called(recipe.teacher), model.name)
    if corpus is not None:
        in_corpus = dataclasses.replace(corpus, size=model.vocab_size)
        ids = min(ids, tokenizers.require_same(in_corpus, own, "corpus.tokenizer", model.name))
    if isinstance(teacher, TorchTeacher):
        teacher.model.mask_from(ids)
    elif not isinstance(teacher, StoredTeacher):
        ids = teacher.vocab_size  # a fixture has no padded end
        if model.vocab_size < ids:
            raise UserError(
                f"{model.name} has logits for {model.vocab_size} ids and teacher {called(recipe.teacher)} for"
                f" {ids}. Token-level distillation needs one vocabulary; give the student as many."
            )
    model.mask_from(ids)
    differences = differences_beside_ids(recipe, teacher.vocab, corpus, own, origin)
    return Shared(ids, teacher.vocab_size - ids, model.vocab_size - ids, differences)


def differences_beside_ids(
    recipe: Recipe, teacher: Vocab, corpus: Vocab | None, student: Vocab, origin: dict[str, Any]
) -> list[str]:
    """What a list that is the same does not say, and that there was no list to compare."""
    found, asked = [], recipe.corpus.tokenizer
    taken = "reads the corpus and is saved with the student"
    if student.tokens and teacher.tokens:
        settled = (
            f"as it is, the teacher's {taken}; corpus.tokenizer: {origin.get('model')} takes the student's"
        )
        settled = f"settled by corpus.tokenizer: {asked}, which {taken}" if asked else settled
        found += tokenizers.special_differences(teacher, student, settled)
    if asked and corpus is not None and teacher.tokens:
        settled = f"corpus.tokenizer: {asked} {taken}; without this line the teacher's does"
        found += tokenizers.special_differences(teacher, corpus, settled, "corpus")
    missing = {}
    if not teacher.tokens:
        files = "a folder with its tokenizer's files in teacher.model"
        missing["teacher"] = files if recipe.teacher.name == "torch" else "a teacher of teacher.name: torch"
    if not student.tokens and origin["name"] == "checkpoint":
        missing["student"] = "a folder with its tokenizer's files in student.model"
    if corpus is None:
        missing["corpus"] = "its tokenizer in corpus.tokenizer"
    return found + tokenizers.not_compared(missing)


def require_sample(recipe: Recipe, tokenizer: Any | None) -> None:
    if recipe.eval.sample_prompt is not None and tokenizer is None:
        raise UserError("eval.sample_prompt: no tokenizer reads it. Set corpus.tokenizer, or null.")


def require_length(config: Any, name: str, field: str, tokens: int) -> None:
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and tokens > longest:
        raise UserError(
            f"{field}: {tokens} tokens, {name} was made for {longest} at most. Set it to {longest} or less."
        )
