"""What a run needs to let the student write: prompts, the ids that end an answer, and held-out answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from potstill.build.corpus import teacher_tokenizer
from potstill.build.resolve import Resolved
from potstill.data import packing
from potstill.data.completions import Completion, CompletionRows, from_file
from potstill.data.end_of_turn import answer_ends, end_of_turn
from potstill.data.mixing import MixedCorpus
from potstill.data.prompts import MixedPrompts, Prompt, Prompts
from potstill.errors import UserError
from potstill.models.causal_lm import CausalLM
from potstill.models.decoding import decoding_fault
from potstill.recipe.load import Recipe
from potstill.recipe.sections_data import CorpusConfig
from potstill.recipe.sections_rollouts import PROMPT_TOKENS, RolloutsConfig
from potstill.training.sampling import write
from potstill.types import Teacher

HELDOUT_COUNTS = ("heldout_rows", "heldout_tokens", "heldout_positions")
HELDOUT_SEED = 0
"""Of the answers to held-out prompts: the same for every seed of a run, so that their results can be compared."""


@dataclass(frozen=True)
class RolloutSetup:
    config: RolloutsConfig
    prompts: Prompts | MixedPrompts
    heldout: list[Prompt]
    """Of held-out documents: what the student writes behind them is measured at every evaluation."""
    ends: frozenset[int]

    def described(self) -> dict[str, Any]:
        """For the receipt."""
        counts = {"prompts": len(self.prompts), "prompts_too_long": self.prompts.too_long}
        return dataclasses.asdict(self.config) | counts | {"ends": sorted(self.ends)}


def require_rollouts(recipe: Recipe) -> None:
    """UserError for a run on prompts in which the student writes nothing."""
    if recipe.corpus.is_prompts and recipe.rollouts is None:
        raise UserError("rollouts: missing: prompts have no answers to train on. Add rollouts: {}.")


def set_up_rollouts(
    resolved: Resolved,
    corpus: packing.Corpus,
    tokenizer: Any | None,
    teacher: Teacher,
    model: CausalLM,
    ids: int,
    note: Callable[[str], None],
) -> RolloutSetup | None:
    """None where the student writes no row.

    Args:
        ids: number of ids shared by teacher and student.

    Raises:
        UserError: no prompt that fits, a teacher that cannot grade new text, or answers that the two end otherwise.
    """
    recipe = resolved.recipe
    config = recipe.rollouts
    if config is None or config.fraction == 0:
        return None
    if not teacher.reads_new_text:
        raise UserError(
            f"rollouts: teacher {resolved.teacher.label} has no targets for text that the student writes. Name another"
            " teacher, or leave rollouts out."
        )
    if (fault := decoding_fault(model)) is not None:
        raise UserError(
            f"rollouts: {model.name}: {fault}. Leave rollouts out: it cannot write by itself here."
        )
    _require_one_template(resolved, tokenizer)
    longest = recipe.corpus.tokens_per_row - config.max_new_tokens
    prompts, heldout = _prompts(recipe, corpus, longest)
    for line in prompts.notes():
        note(f"rollouts: {line}")
    ends = _ends(resolved, tokenizer, teacher, model, ids, note)
    share = "all" if config.fraction == 1 else f"{config.fraction:g}"
    to = " or ".join([*(_named(tokenizer, end) for end in sorted(ends)), f"{config.max_new_tokens} tokens"])
    note(
        f"rollouts: {share} of a step's rows are written by the student, behind {len(prompts)} prompts, to {to}"
    )
    return RolloutSetup(config, prompts, heldout, ends)


def _prompts(
    recipe: Recipe, corpus: packing.Corpus, longest: int
) -> tuple[Prompts | MixedPrompts, list[Prompt]]:
    """Those to train on, and the first held-out ones; of a mix, of each source by its kind."""
    assert recipe.rollouts is not None
    tokens = recipe.rollouts.prompt_tokens or min(PROMPT_TOKENS, longest)
    if not corpus.parts:
        prompts = Prompts(corpus.train, recipe.corpus.prompt, tokens, longest)
        return prompts, _first_heldout(corpus, recipe.corpus, tokens, longest, "held-out")
    of_each, heldout = dict[str, Prompts](), list[Prompt]()
    for name, part in recipe.corpus.parts.items():
        of_each[name] = Prompts(corpus.parts[name].train, part.prompt, tokens, longest, f"training {name}")
        heldout += _first_heldout(corpus.parts[name], part, tokens, longest, f"held-out {name}")
    return MixedPrompts(of_each, corpus.shares), heldout


def _first_heldout(
    corpus: packing.Corpus, config: CorpusConfig, tokens: int, longest: int, name: str
) -> list[Prompt]:
    """As many as there are held-out rows."""
    prompts = Prompts(corpus.heldout, config.prompt, tokens, longest, name)
    return [prompts[number] for number in range(min(len(prompts), config.heldout_rows))]


def with_answers(
    corpus: packing.Corpus,
    rollouts: RolloutSetup,
    teacher: Teacher,
    ids: int,
    note: Callable[[str], None],
    kept: Path | None,
    beat: Callable[[], None],
) -> packing.Corpus:
    """A corpus of prompts alone, whose held-out rows are what the teacher answers to the held-out prompts.

    Args:
        kept: the file of a run that has them already.

    Raises:
        UserError: the file is damaged, or of other prompts.
    """
    if kept is None:
        written = answers_of(teacher, rollouts.heldout, rollouts, ids, beat)
    elif (found := from_file(kept, rollouts.heldout)) is None:
        raise UserError(f"{kept}: missing, damaged, or of other prompts. Start a new run.")
    else:
        written = found
    ended = sum(each.ended for each in written)
    note(
        f"rollouts: the student is measured on the teacher's answers to {len(written)} held-out prompts; {ended} end,"
        f" the others are cut off after {rollouts.config.max_new_tokens} tokens"
    )
    if not isinstance(corpus, MixedCorpus):
        return _with_heldout(corpus, written)
    of = {
        name: _with_heldout(part, [each for each in written if each.prompt.source == number])
        for number, (name, part) in enumerate(corpus.of.items())
    }
    whole = _with_heldout(corpus, written)
    sources = {
        name: about | {count: of[name].manifest[count] for count in HELDOUT_COUNTS}
        for name, about in corpus.manifest["sources"].items()
    }
    return dataclasses.replace(whole, of=of, manifest=whole.manifest | {"sources": sources})


C = TypeVar("C", bound=packing.Corpus)


def _with_heldout(corpus: C, written: Sequence[Completion]) -> C:
    heldout = CompletionRows(written)
    heldout.first_row = len(corpus.train)
    counts = zip(HELDOUT_COUNTS, (len(heldout), len(heldout.ids), heldout.supervised), strict=True)
    return dataclasses.replace(corpus, heldout=heldout, manifest=corpus.manifest | dict(counts))


def answers_of(
    teacher: Teacher,
    prompts: Sequence[Prompt],
    rollouts: RolloutSetup,
    ids: int,
    beat: Callable[[], None] = lambda: None,
) -> list[Completion]:
    """What the teacher writes behind its own version of these prompts, sampled at temperature 1."""
    plain = RolloutsConfig(max_new_tokens=rollouts.config.max_new_tokens)
    named = [
        (f"held-out prompt {n}", dataclasses.replace(prompt, ids=prompt.for_teacher or prompt.ids))
        for n, prompt in enumerate(prompts)
    ]
    written = write(teacher.decoder(ids), named, plain, rollouts.ends, HELDOUT_SEED, beat)
    return [dataclasses.replace(each, prompt=prompt) for each, prompt in zip(written, prompts, strict=True)]


def _ends(
    resolved: Resolved,
    tokenizer: Any | None,
    teacher: Teacher,
    model: CausalLM,
    ids: int,
    note: Callable[[str], None],
) -> frozenset[int]:
    """Ids that end an answer: those that rows of this corpus end with, and those that both models' configs name.

    Raises:
        UserError: the teacher ends its answers with another token, so that it would grade the student's as an error.
    """
    named = set(model.ends)
    if teacher.model is not None and (alone := sorted(named - teacher.model.ends)):
        shown = ", ".join(_named(tokenizer, end) for end in alone)
        note(
            f"rollouts: ends that the student's config names and the teacher's does not do not count: {shown}"
        )
        named -= set(alone)
    own = None if tokenizer is None else teacher_tokenizer(resolved)
    if own is not None:
        is_chat = _is_chat(resolved.recipe, tokenizer)
        of_student, of_teacher = (_last(each, is_chat) for each in (tokenizer, own))
        if of_student != of_teacher:
            raise UserError(
                f"rollouts: answers of the student end with {_named(tokenizer, of_student)} (corpus.tokenizer), and the"
                f" teacher's with {_named(own, of_teacher)}: it would never teach the student to stop. Leave"
                " corpus.tokenizer out, so that the student is asked and ends as the teacher does."
            )
    return answer_ends(tokenizer, named, ids)


def _is_chat(recipe: Recipe, tokenizer: Any) -> bool:
    """Whether prompts, of a mix those of any source, are rendered by the chat template."""

    def is_chat(config: CorpusConfig) -> bool:
        said = getattr(config, "chat", None)
        is_by_default = config.prompt == "question" or bool(tokenizer.chat_template)
        return config.prompt != "beginning" and (is_by_default if said is None else bool(said))

    return any(is_chat(config) for config in recipe.corpus.each)


def _require_one_template(resolved: Resolved, tokenizer: Any | None) -> None:
    """UserError for prompts out of conversations, which both models would read by the student's template."""
    has_chats = any(config.prompt == "question" for config in resolved.recipe.corpus.each)
    own = teacher_tokenizer(resolved) if has_chats else None
    if own is not None and tokenizer is not None and own.chat_template not in (None, tokenizer.chat_template):
        raise UserError(
            "rollouts: the teacher has another chat template than corpus.tokenizer, and prompts of a chat corpus are"
            " rendered by one. Set corpus.name: prompts, whose prompts each model reads by its own, or leave"
            " corpus.tokenizer out."
        )


def _last(tokenizer: Any, is_chat: bool) -> int | None:
    turn = end_of_turn(tokenizer) if is_chat else None
    end: int | None = tokenizer.eos_token_id
    return end if turn is None else turn


def _named(tokenizer: Any | None, end: int | None) -> str:
    if end is None:
        return "nothing"
    return f"id {end}" if tokenizer is None else repr(tokenizer.convert_ids_to_tokens(end))
