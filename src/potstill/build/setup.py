"""Build the objects of a run from its resolved recipe, in five stages: files, corpus, teacher, student, match.

The order is by cost: files are verified before a library opens them, and the corpus is read before a model is
loaded. Only `corpus.shards` is written here; a recipe that is refused leaves no other trace.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from potstill.build.corpus import make_corpus
from potstill.build.narrow import Agree, narrow_stream
from potstill.build.repair import repaired
from potstill.build.resolve import Resolved
from potstill.build.rollouts import RolloutSetup, require_rollouts, set_up_rollouts, with_answers
from potstill.build.vocabulary import Shared, match_vocabularies
from potstill.data import packing, token_cache, tokenizers
from potstill.data.decontamination import summary
from potstill.data.mixing import exhausted, in_words
from potstill.errors import UserError, one_line
from potstill.export.grid import Grid
from potstill.io.cpu_matmul import matmul_with, return_freed_memory
from potstill.losses.objective import Objective
from potstill.models.causal_lm import CausalLM
from potstill.models.compile import compile_body, require_compiler
from potstill.models.dialogue import is_chat
from potstill.models.frozen import freeze
from potstill.models.heads import heads_of
from potstill.models.hub import public_name
from potstill.models.layer_harm import RULES, Harm, calibration, choose_layers
from potstill.models.load import DTYPES, longest_row
from potstill.models.lora import LoraLM, require_peft
from potstill.models.pruning import cut, ffn_width_of, kept_channels, kept_groups, stack_of
from potstill.models.repair import Repair
from potstill.models.sizing import choose_size
from potstill.models.source import ModelFiles
from potstill.models.student import Student, from_checkpoint, from_config
from potstill.recipe.load import Recipe
from potstill.recipe.sections_models import CutStudentConfig
from potstill.registry import entries
from potstill.teachers.base import TeacherSource, refuse_cut
from potstill.training.distributed import ALONE, Ranks
from potstill.training.engines import engine_of
from potstill.training.rollouts import Rollouts
from potstill.types import Batch, Data, Divergence, Rows, Teacher

CALIBRATION_ROWS = 8
"""Training rows on which the channels of an MLP and the heads of an attention are ranked."""
LAYER_ROWS = 4
"""Training rows on which layers are left out."""
ROWS_LOOKED_AT = 1000
"""To find these among: behind long prompts a row may bear no loss where it is read."""
Note = Callable[[str], None]
"""Reports one line about what was built."""


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
    harm: Harm | None = None
    """What each layer is worth, where that was measured to choose them."""
    repair: Repair | None = None
    """What was folded into a cut student."""
    rollouts: RolloutSetup | None = None
    """What the student writes behind; None where it writes nothing."""

    @property
    def recipe(self) -> Recipe:
        return self.resolved.recipe

    @property
    def device(self) -> torch.device:
        return self.resolved.device

    def require_made_of(self, run: Path, fingerprint: object, teacher_sha256: object) -> None:
        """UserError unless corpus and teacher are those of the run: its corpus's fingerprint, and the hash of its
        teacher's weights, or None where that is not known.
        """
        if self.corpus.fingerprint != fingerprint:
            raise UserError(f"{run}: the corpus has changed since the run, and its held-out rows with it.")
        weights = self.teacher.weights_sha256()
        if teacher_sha256 is not None and weights is not None and weights != teacher_sha256:
            raise UserError(f"{run}: the recipe's teacher is not the run's: its weights have another sha256.")

    def data(
        self,
        ranks: Ranks = ALONE,
        folder: Path | None = None,
        beat: Callable[[], None] = lambda: None,
        rows_per_step: int | None = None,
    ) -> Data:
        """The training data, split so that each rank has a share of every step.

        Args:
            folder: where what the student writes is kept; None: nowhere.
            beat: called while it writes, a sign of life for a watchdog.
            rows_per_step: in place of the recipe's, for a trial.
        """
        config = self.recipe.train
        rows = rows_per_step or config.rows_per_step
        fixed = self.corpus.steps(config.seed, rows, config.micro_batch_rows, ranks.world)
        if self.rollouts is None:
            return fixed
        given, first = self.rollouts, len(self.corpus.train) + len(self.corpus.heldout)
        if given.config.engine == "vllm" and ranks.world > 1:
            raise UserError("rollouts.engine: vllm is for one process. Set it to transformers, or start one.")
        engine = engine_of(given.config, given.ends, self.recipe.corpus.tokens_per_row)
        kept = given.config.keeping_since(2 * config.save_every)
        return Rollouts(self.student, given.prompts, fixed, kept, engine, first, folder, ranks, beat)


@contextlib.contextmanager
def process_of(recipe: Recipe) -> Iterator[None]:
    """Inside the block the CPU's matrix products run on the recipe's BLAS backend.

    `train.return_memory` applies to the whole process and stays set after the block.
    """
    if recipe.train.return_memory:
        return_freed_memory()
    with matmul_with(recipe.train.matmul):
        yield


def set_up(
    resolved: Resolved,
    note: Note,
    beat: Callable[[], None] = lambda: None,
    agreed: Agree = lambda value: value,  # one process agrees with itself
    repair: Repair | None = None,
    answers: Path | None = None,
) -> RunSetup:
    """Build everything a run needs.

    Args:
        resolved: the recipe, with its device and model sources.
        note: called with one line for each object that was built, and for each warning.
        beat: called with every document that is read, a sign of life for a watchdog.
        agreed: what the first of several ranks has measured: sums differ by rounding, and choices by that.
        repair: of the run that is resumed: the same sums on another processor would make another student.
        answers: of a run on prompts that is resumed or measured: the file of what its held-out rows are.

    Raises:
        UserError: a damaged file, a missing library, or models and a corpus that do not fit each other.
    """
    open_teacher: Teacher | TeacherSource = resolved.teacher  # a plan may have loaded a plug-in's
    try:
        require_rollouts(resolved.recipe)
        verify_files(resolved, note)
        corpus, tokenizer = read_corpus(resolved, note, beat)
        resolved = with_steps(resolved, len(corpus.train), note)
        note_sources(resolved.recipe, corpus, note)
        if resolved.student.is_cut and resolved.teacher.layers_config is None:
            refuse_cut(resolved.teacher.config.registered_name)  # before it is loaded, or a server asked
        open_teacher = teacher = resolved.teacher.load(resolved.recipe.corpus.tokens_per_row)
        require_teacher(resolved, teacher, tokenizer, note)
        setup = _set_up_student(resolved, corpus, tokenizer, teacher, note, agreed, repair)
        return _with_rollouts(setup, note, beat, answers)
    except BaseException:
        open_teacher.close()  # nobody else has it yet
        raise


def _set_up_student(
    resolved: Resolved,
    corpus: packing.Corpus,
    tokenizer: Any | None,
    teacher: Teacher,
    note: Note,
    agreed: Agree,
    repair: Repair | None,
) -> RunSetup:
    recipe = resolved.recipe
    # After the teacher: random numbers drawn while a library loads it must not change the student's weights.
    torch.manual_seed(recipe.train.seed)
    made = make_student(resolved, teacher, corpus.in_proportion, note, agreed, repair)
    model, origin, harm = made.model, made.origin, made.harm
    if recipe.student.name == "cut":  # from now on the recipe names what was chosen
        chosen = (
            recipe.student
            if made.keep is None
            else recipe.student.with_layers(made.keep, made.ffn_width, made.kv_heads)
        )
        recipe = dataclasses.replace(recipe, student=dataclasses.replace(chosen, repair=chosen.is_repaired))
        resolved = resolved.with_recipe(recipe)
    model.use_rows(recipe.corpus.packing)
    _note_left_out(model, note)
    if recipe.lora is not None:
        # After the cut, so that adapters are named after the student's layers, not the teacher's.
        model = LoraLM(model, recipe.lora, base_of(origin))
        origin |= {"lora": model.described()}
    shared = match(resolved, teacher, model, origin, corpus, tokenizer, note)
    # After `match`, which masks padded ids in the head: the compiled body does not contain the head.
    trainable = make_trainable(recipe, model, teacher)
    numel, lora = sum(p.numel() for p in model.parameters()), origin.get("lora")
    trained = f", of adapters {lora['trainable_weights'] / 1e6:.3g} M alone trained" if lora else ""
    if lora and lora["without_adapter"]:
        share, names = lora["share_without_adapter"], lora["without_adapter"]
        more = f" and {len(names) - 4} more" if names[4:] else ""
        note(f"lora: {share:.2%} of the layers' weights have no adapter: {', '.join(names[:4])}{more}")
    balanced = (
        f", router loss with coefficient {weight:g}" if (weight := trainable.router_coefficient) else ""
    )
    note(f"student: {origin['name']}, {numel / 1e6:.1f} M parameters{trained}{balanced}")
    return RunSetup(resolved, corpus, tokenizer, teacher, trainable, origin, shared, harm, made.repair)


def _with_rollouts(setup: RunSetup, note: Note, beat: Callable[[], None], answers: Path | None) -> RunSetup:
    """With prompts and what answers them, where the student writes rows."""
    ids, teacher = setup.shared.ids, setup.teacher
    rollouts = set_up_rollouts(
        setup.resolved, setup.corpus, setup.tokenizer, teacher, setup.student.model, ids, note
    )
    corpus = setup.corpus
    if rollouts is not None and setup.recipe.corpus.is_prompts:
        corpus = with_answers(corpus, rollouts, teacher, ids, note, answers, beat)
    return dataclasses.replace(setup, corpus=corpus, rollouts=rollouts)


def with_steps(resolved: Resolved, num_rows: int, note: Note) -> Resolved:
    """With `train.epochs` as steps."""
    recipe = resolved.recipe
    train = recipe.train.of_rows(num_rows)
    if train.epochs is not None:
        note(f"steps: {train.num_steps}, {train.epochs:g} epochs of {num_rows} rows")
    return resolved.with_recipe(dataclasses.replace(recipe, train=train))


def times_read(recipe: Recipe, corpus: packing.Corpus) -> dict[str, float]:
    """How often the run reads each source of a mix; empty: it is one corpus, or the student writes all rows."""
    fixed = recipe.corpus_rows_per_step
    return corpus.order(recipe.train.seed).times_read(recipe.train.num_steps, fixed) if fixed else {}


def note_sources(recipe: Recipe, corpus: packing.Corpus, note: Note) -> None:
    if read := times_read(recipe, corpus):
        note(f"corpus: {in_words(read)}")
        for line in exhausted(read):
            note(f"warning: corpus: {line}")


def verify_files(resolved: Resolved, note: Note) -> None:
    """Require the libraries that the recipe needs, and verify every checkpoint."""
    recipe, device = resolved.recipe, resolved.device
    if recipe.lora is not None:
        require_peft()
    chosen = "" if recipe.train.device != "auto" else " (auto: CUDA where there is a device, else the CPU)"
    note(f"device: {device}{chosen}")
    if recipe.train.compile:
        require_compiler(device)
    # After the libraries: looking for a module is instant, reading a large checkpoint is not.
    for files in resolved.checkpoints:
        files.verify()


def read_corpus(
    resolved: Resolved, note: Note, beat: Callable[[], None]
) -> tuple[packing.Corpus, Any | None]:
    """The packed rows, and the tokenizer that encoded them."""
    recipe = resolved.recipe
    for part in recipe.corpus.each:
        if part.shards is not None and not token_cache.is_whole(part.shards):
            note(f"corpus: tokenized once, into {part.shards}")
    corpus, tokenizer = make_corpus(resolved, beat)
    corpus.order(recipe.train.seed).rows(0, recipe.train.rows_per_step)  # refuses a step of too many rows
    counts = corpus.manifest
    note(
        f"corpus: {counts['documents']} documents, {counts['tokens']} tokens; rows of"
        f" {recipe.corpus.tokens_per_row}: {len(corpus.train)} to train on, {len(corpus.heldout)} held out"
    )
    for name, part in counts.get("sources", {}).items():
        note(
            f"corpus: {name}: {100 * part['weight']:.4g} % of each step; {part['documents']} documents,"
            f" {part['tokens']} tokens; {part['train_rows']} rows to train on, {part['heldout_rows']} held out"
        )
    for each in packing.about_documents(counts):
        note(f"corpus: {each}")
    if counts["decontamination"] is not None:
        note(f"decontamination: {summary(counts['decontamination'])}")
    if (recipe.eval.sample_prompt is not None or recipe.eval.sample_prompts) and tokenizer is None:
        raise UserError("eval.sample_prompt: no tokenizer reads it. Set corpus.tokenizer, or null.")
    if (
        recipe.eval.sample_system is not None
        and recipe.eval.sample_prompt is None
        and not recipe.eval.sample_prompts
    ):
        raise UserError("eval.sample_system: there is no sample prompt for it to stand before. Leave it out.")
    is_turn = tokenizer is not None and is_chat(recipe.corpus.each, tokenizer)
    if recipe.eval.sample_system is not None and not is_turn:
        raise UserError(
            "eval.sample_system: a sample is no turn here: the corpus is not of conversations alone. Leave it out."
        )
    return corpus, tokenizer


def require_teacher(resolved: Resolved, teacher: Teacher, tokenizer: Any | None, note: Note) -> None:
    """Report the loaded teacher, and require that the corpus was encoded with its tokens."""
    label = resolved.teacher.label
    teacher.note = note
    teacher.use_rows(resolved.recipe.corpus.packing)
    backend = teacher.backend
    by = "" if backend is None else f"; {backend['backend']} runs it ({backend['reason']})"
    note(f"teacher: {label}, vocabulary of {teacher.vocab_size}{by}")
    if (bounds := teacher.describe().get("held_out")) is not None:
        note(f"teacher: held-out figures are {bounds}")
    if teacher.model is not None:
        _note_left_out(teacher.model, note)
    if tokenizer is not None and teacher.vocab.tokens is not None:
        in_corpus = tokenizers.vocab_of(tokenizer, teacher.vocab_size)
        tokenizers.require_same(teacher.vocab, in_corpus, label, "corpus")


def _note_left_out(model: CausalLM, note: Note) -> None:
    if model.left_out:
        parts = ", ".join(f"{name} ({count})" for name, count in model.left_out.items())
        total = sum(model.left_out.values())
        note(f"{model.name}: the text half of a multimodal model; {total} tensors are left out: {parts}")


@dataclass(frozen=True)
class NewStudent:
    """A student before training."""

    model: CausalLM
    origin: dict[str, Any]
    """Where its weights came from, for the receipt."""
    keep: Sequence[int] | None = None
    """The layers that a measurement chose."""
    ffn_width: int | None = None
    """Channels of each MLP; None: all."""
    kv_heads: int | None = None
    """KV groups of each attention; None: all."""
    harm: Harm | None = None
    repair: Repair | None = None


def make_student(
    resolved: Resolved,
    teacher: Teacher,
    rows: Rows,
    note: Note,
    agreed: Agree,
    repair: Repair | None,
) -> NewStudent:
    """Build the student's model; see `set_up`."""
    source, config, device = resolved.student, resolved.student.config, resolved.device
    # A cut student needs no confirmation: `to_cut_from` loads the named model and compares it. Nor does a saved one:
    # what its run was made of is in the receipt, and the captured model may be gone.
    if config.name != "cut" and not source.is_saved:
        teacher.confirm()
    if config.name == "checkpoint":
        assert source.files is not None
        model = from_checkpoint(config.model, device, source.files.config)
        left_out = {"left_out": model.left_out} if model.left_out else {}
        own = {"base_dtype": source.files.dtype} | left_out
        return NewStudent(model, {"name": "checkpoint", "model": config.model} | own)
    if config.name == "config":
        assert source.files is not None
        seed = resolved.recipe.train.seed
        model = from_config(config.model, device, source.files.config)
        dtype = str(source.files.config.dtype).removeprefix("torch.")
        own = {"base_dtype": dtype if dtype in DTYPES else None}
        return NewStudent(model, {"name": "config", "model": config.model, "seed": seed} | own)
    uncut, where = teacher.to_cut_from()
    uncut.rows_are_packed = resolved.recipe.corpus.packing
    total = uncut.hf.config.get_text_config().num_hidden_layers
    ranked_on = [rows.batch([row]) for row in range(min(CALIBRATION_ROWS, len(rows)))]
    harm = None
    if config.is_sized:
        harm = agreed(_sized(uncut, source.most_weights, rows, ranked_on, note))
    elif config.is_measured and config.layers != total:
        harm = agreed(_measured(uncut, config, rows, note))
    inside = harm if harm is not None and config.is_sized else config
    width, kv_heads = inside.ffn_width, inside.kv_heads
    try:
        keep = source.layers_kept if harm is None else harm.keep
        model, channels, groups = _cut(uncut, keep, width, kv_heads, ranked_on)
    except UserError as error:
        if harm is None or config.rule is not None or config.is_sized:
            raise
        note(f"student: not these layers, but those of first_last: {one_line(error)}")
        harm, keep = None, source.layers_kept
        model, channels, groups = _cut(uncut, keep, width, kv_heads, ranked_on)
    origin = {"name": "cut", "from": where, "layers_kept": list(keep), "of": total}
    origin |= {"base_dtype": dtype_of(where)}
    if width is not None:
        origin |= {"ffn_width": width, "of_ffn_width": ffn_width_of(uncut.hf.config)}
    if kv_heads is not None:
        origin |= {"kv_heads": kv_heads, "of_kv_heads": heads_of(uncut.hf.config).kv_heads}
    if not config.is_repaired:
        repair = None
    elif repair is None:
        repair = agreed(repaired(uncut, model, keep, channels, groups, rows, note))
    if repair is not None:
        repair.apply(model)
    if config.hidden_size is not None:
        model, stream, repair = narrow_stream(
            uncut, model, config.hidden_size, ranked_on, rows, note, agreed, repair
        )
        origin |= stream
    if config.weights is not None or config.fraction is not None:
        _require_size(model, config, source.most_weights)
    if repair is not None:
        origin |= {"repair": repair.as_dict()}
    return NewStudent(model, origin, keep if config.is_measured else None, width, kv_heads, harm, repair)


def _cut(
    uncut: CausalLM,
    keep: Sequence[int],
    width: int | None,
    kv_heads: int | None,
    ranked_on: Sequence[Batch],
) -> tuple[CausalLM, Mapping[int, Tensor], Mapping[int, Tensor]]:
    """The student, and which channels and KV groups it keeps, by the teacher's layer; empty: all."""
    channels = kept_channels(uncut, keep, width, ranked_on)
    groups = kept_groups(uncut, keep, kv_heads, ranked_on)
    model = cut(uncut, keep, width, channels=channels, kv_heads=kv_heads, groups=groups)
    return model, channels, groups


def _require_size(model: CausalLM, config: CutStudentConfig, most: int) -> None:
    """Of layers that a recipe names beside a size."""
    weights = sum(parameter.numel() for parameter in model.hf.parameters())
    if weights > most:
        size = f"weights: {config.weights}" if config.fraction is None else f"fraction: {config.fraction:g}"
        raise UserError(
            f"student.keep: these layers have {weights:,} weights, and student.{size} allows {most:,}. Leave one out."
        )


def _compared_on(rows: Rows) -> list[Batch]:
    """The first training rows that bear loss near their beginning, in one batch; none where there is no such row."""
    looked_at = range(min(len(rows), ROWS_LOOKED_AT))
    bear_loss = (row for row in looked_at if len(calibration(rows.batch([row])).positions_N))
    chosen = [*itertools.islice(bear_loss, LAYER_ROWS)]
    return [rows.batch(chosen)] if chosen else []


def _sized(uncut: CausalLM, most: int, rows: Rows, ranked_on: Sequence[Batch], note: Note) -> Harm:
    """Layers, channels and heads for a number of weights."""
    harm = choose_size(uncut, _compared_on(rows), ranked_on, most, note)
    width = "all channels" if harm.ffn_width is None else f"{harm.ffn_width} channels of each MLP"
    heads = "all heads" if harm.kv_heads is None else f"{harm.kv_heads} KV groups of each attention"
    note(
        f"student: layers {sorted(harm.left_out)} are left out, {width} and {heads} kept, KL {harm.kl:.3f} to the whole"
    )
    return harm


def _measured(uncut: CausalLM, config: CutStudentConfig, rows: Rows, note: Note) -> Harm | None:
    """What the layers are worth; None where that cannot be measured and the recipe has not asked for it."""
    stack = stack_of(uncut)[0].removesuffix(".")
    rule = config.rule or RULES[0]
    try:
        harm = choose_layers(uncut, stack, _compared_on(rows), config.layers or 0, rule, note)
    except UserError as error:
        if config.rule is not None:
            raise
        note(f"student: layers are chosen by first_last: {one_line(error)}")
        return None
    note(f"student: {rule} leaves out layers {sorted(harm.left_out)}, KL {harm.kl:.3f} to the whole")
    return harm


def dtype_of(source: str) -> str | None:
    """Of the files of the model that a student is cut from; None where it has none on this machine."""
    try:
        return ModelFiles(source).dtype
    except UserError:  # of a teacher that is no file, `source` is a name alone
        return None


def base_of(origin: Mapping[str, Any]) -> tuple[str, str | None]:
    """What adapters are for, as their files name it: a hub id and its commit, or the name of a folder or file."""
    if origin["name"] == "checkpoint":
        return public_name(origin["model"])
    # A cut is nowhere to be had: it is named so that nobody loads the whole model instead.
    kept = f"layers {', '.join(map(str, origin['layers_kept']))}"
    if "ffn_width" in origin:
        kept += f" with {origin['ffn_width']} of {origin['of_ffn_width']} channels"
    if "kv_heads" in origin:
        kept += f" with {origin['kv_heads']} of {origin['of_kv_heads']} KV groups"
    if "hidden_size" in origin:
        kept += f" with a hidden size of {origin['hidden_size']} of {origin['of_hidden_size']}"
    if "repair" in origin and Repair.of(origin["repair"], {}).has_changed:
        kept += " and repaired"
    return f"{public_name(origin['from'])[0]} cut to {kept}", None


def match(
    resolved: Resolved,
    teacher: Teacher,
    model: CausalLM,
    origin: dict[str, Any],
    corpus: packing.Corpus,
    tokenizer: Any | None,
    note: Note,
) -> Shared:
    """Require that teacher, student and corpus fit each other: vocabulary, rows of this run, and lengths."""
    recipe, counts = resolved.recipe, corpus.manifest
    in_corpus = None if tokenizer is None else tokenizers.vocab_of(tokenizer, teacher.vocab_size)
    shared = match_vocabularies(resolved, teacher, in_corpus, model, origin)
    order, train = corpus.order(recipe.train.seed), recipe.train
    rows = (row for step in range(train.num_steps) for row in order.rows(step, train.rows_per_step))
    # After the vocabularies: stored targets are over the ids that teacher and student share.
    teacher.require_fits(counts, recipe.objective, shared.ids, rows)
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
    """The student with its objective, and both models compiled where the recipe says so.

    Raises:
        UserError: weights to freeze that it does not have, a student that cannot be compiled, whose balancing loss is
            not known, or that has no GGUF file of `train.quantize`.
    """
    freeze(model, recipe.train.freeze)
    if recipe.train.compile and isinstance(model, LoraLM):
        model.require_compilable()
    for each in (model, teacher.model):
        if recipe.train.compile and each is not None and not each.is_packed:
            compile_body(each)
    if recipe.train.activation_checkpointing:
        model.checkpoint_activations(selective=recipe.train.activation_checkpointing == "selective")
    precision = torch.bfloat16 if recipe.train.precision == "bfloat16" else None
    student = Student(model, make_objective(recipe, precision), precision)
    if recipe.train.quantize is not None:
        student.grid = Grid.of(model, recipe.train.quantize)
    return student


def make_objective(recipe: Recipe, matmul_dtype: torch.dtype | None) -> Objective:
    """The recipe's loss; `matmul_dtype` is the type of the head's products, None: that of the weights."""
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
    """UserError for more tokens than the model supports; `longest` None is no limit."""
    if longest is not None and tokens > longest:
        raise UserError(
            f"{field}: {tokens} tokens, {name} was made for {longest} at most. Set it to {longest} or less."
        )
