"""Several teachers: each for its own sources of a mixed corpus, or all of them on every row, weighted.

By source, a position's distribution is that of the teacher of its row. Weighted, it is the mean of the distributions:
log sum_i w_i p_i, of which a temperature makes a softer one as of any other teacher's logits.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from potstill.data.tokenizers import require_same
from potstill.errors import UserError
from potstill.losses.targets import HiddenTargets, SparseTargets
from potstill.models.decoding import Decode, Row
from potstill.models.source import ModelFiles
from potstill.recipe.sections_mixture import MixtureTeacherConfig
from potstill.teachers.base import BaseTeacher, Part, TeacherSource, source_of
from potstill.types import Batch, Finding, Targets, Teacher, answer

if TYPE_CHECKING:
    from potstill.build.setup import RunSetup

NO_SOURCES = "each teaches its sources (teaches), and the corpus has none. Use corpus.name: mix, or give each a weight."


class Members:
    """The teachers of a mixture, all in memory, or the one that was asked last. Threads may share one.

    A teacher elsewhere takes no memory here, and stays: another thread may be asking it.

    Args:
        load: makes a teacher.
    """

    def __init__(self, load: Sequence[Callable[[], Teacher]], all_at_once: bool) -> None:
        self._load, self.all_at_once = load, all_at_once
        self._loaded: dict[int, Teacher] = {}
        self._prepare: list[Callable[[Teacher], Any]] = []
        self._lock, self._is_closed = threading.RLock(), False

    def __len__(self) -> int:
        return len(self._load)

    def __getitem__(self, number: int) -> Teacher:
        with self._lock:
            if self._is_closed:  # a thread that asks ahead must not load one that nobody closes
                raise UserError("teacher mixture: it was closed.")
            if number not in self._loaded:
                for other in [] if self.all_at_once else list(self._loaded):
                    if not self._loaded[other].is_elsewhere:
                        self._loaded.pop(other).close()
                teacher = self._load[number]()
                for prepare in self._prepare:
                    prepare(teacher)
                self._loaded[number] = teacher
            return self._loaded[number]

    def turns(self) -> Iterator[int]:
        """Every number once, that of a teacher in memory first."""
        return iter(sorted(range(len(self)), key=lambda number: not self.has(number)))

    def has(self, number: int) -> bool:
        """Whether it is in memory, or needs none."""
        return number in self._loaded

    def each(self, prepare: Callable[[Teacher], Any]) -> None:
        """Call `prepare` with each that is in memory, and with every other once it is loaded."""
        for teacher in self._loaded.values():
            prepare(teacher)
        self._prepare.append(prepare)

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            while self._loaded:
                self._loaded.popitem()[1].close()


class MixtureTeacher(BaseTeacher):
    """Several teachers as one. `MixtureSource.load` makes it."""

    label = "mixture"

    def __init__(self, config: MixtureTeacherConfig, members: Members, device: torch.device) -> None:
        self.config, self.members, self.device = config, members, device
        self.labels = [each.teacher.label for each in config.teachers]
        self.weights = config.shares
        """Of each teacher, where all answer for every row; None: each has its own rows."""
        self.reads_new_text = True
        self._teacher_of: list[int] = []
        """Where each has its own sources, the number of each source's teacher."""
        self._about: list[dict[str, Any]] = []
        self._fingerprints: list[dict[str, str]] = []
        self._kinds: list[tuple[int | None, bool, bool]] = []
        lengths: list[int] = []
        for number in range(len(members)):
            teacher = members[number]
            self._add(teacher, self.labels[number])
            if teacher.max_length is not None:
                lengths.append(teacher.max_length)
        self.max_length = min(lengths, default=None)
        self._require_one_kind()
        members.each(self._give_note)

    def _give_note(self, teacher: Teacher) -> None:
        teacher.note = lambda line: self.note(line)  # which is set later than this is called

    def _add(self, teacher: Teacher, label: str) -> None:
        if not self._about:
            self.vocab = teacher.vocab
        else:
            require_same(self.vocab, teacher.vocab, f"teacher {self.labels[0]}", f"teacher {label}")
        self.reads_new_text = self.reads_new_text and teacher.reads_new_text
        self._about.append({"name": label, **teacher.describe()})
        self._fingerprints.append(teacher.fingerprint())
        self._kinds.append((teacher.ids_known, teacher.is_elsewhere, teacher.reads_on_cpu))

    def _require_one_kind(self) -> None:
        known, elsewhere, on_cpu = zip(*self._kinds, strict=True)
        few = [label for label, ids in zip(self.labels, known, strict=True) if ids is not None]
        self.is_elsewhere, self.reads_on_cpu = any(elsewhere), any(on_cpu)
        if few and len(few) < len(known):
            raise UserError(
                f"teacher.teachers: {', '.join(few)} gives few ids of each distribution, and others give all: figures"
                " of the two cannot be added up. Use teachers of one kind."
            )
        if few and self.weights is not None:
            raise UserError(
                f"teacher.teachers: weighted teachers need whole distributions, and {few[0]} gives few ids of each."
                " Give each its own sources (teaches), or run it in this process."
            )
        self.ids_known = min(ids for ids in known if ids is not None) if few else None

    def targets(self, batch: Batch) -> Targets:
        """Of each position those of its row's teacher, or the weighted mean of all.

        Raises:
            UserError: rows of no source; or whatever a teacher raises.
        """
        if self.weights is not None:
            return self._weighted(batch)
        if batch.sources_B is None:
            raise UserError(f"teacher mixture: rows {batch.rows_B.tolist()} are of no source that it knows.")
        numbers = [self._teacher_of[source] for source in batch.sources_B.tolist()]
        found: dict[int, tuple[Targets, Tensor]] = {}
        for number in self.members.turns():
            rows = [b for b, of in enumerate(numbers) if of == number]
            if rows:
                own, at_N = _rows_of(batch, rows)
                found[number] = self._ask(number, own), at_N
        parts, places = zip(*found.values(), strict=True)
        return _joined(parts, torch.cat([at_N.to(self.device) for at_N in places]))

    def logits_per_position(self, input_ids_BT: Tensor) -> Tensor:
        """logits_BTV of a weighted mixture: the logarithms of the mean distributions."""
        if self.weights is None:
            return super().logits_per_position(input_ids_BT)
        logits = [self.members[n].logits_per_position(input_ids_BT) for n in range(len(self.members))]
        return _mean(logits, self.weights)

    def decoder(self, ids: int) -> Decode:
        """Each source's prompts are answered by its teacher.

        Raises:
            UserError: the teachers have their own sources, and no mix of sources was given to `require_fits`.
        """
        if self.weights is not None:
            return super().decoder(ids)
        if not self._teacher_of:
            raise UserError(f"teacher.teachers: {NO_SOURCES}")

        def decode(settings: GenerationConfig, rows: Sequence[Row], beat: Callable[[], None]) -> None:
            for number in self.members.turns():
                own = [
                    row for row in rows if row.source is not None and self._teacher_of[row.source] == number
                ]
                if own:
                    self.members[number].decoder(ids)(settings, own, beat)

        return decode

    def share_ids(self, ids: int) -> int:
        shared = [ids]
        self.members.each(lambda teacher: shared.append(teacher.share_ids(ids)))
        return max(shared)

    def use_rows(self, are_packed: bool) -> None:
        self.members.each(lambda teacher: teacher.use_rows(are_packed))

    def require_fits(self, corpus: Mapping[str, Any], objective: Any, ids: int, rows: Iterable[int]) -> None:
        if self.weights is None:
            self._teacher_of = self._teachers_of(corpus)
        for number in self.members.turns():
            self.members[number].require_fits(corpus, objective, ids, rows)

    def describe(self) -> dict[str, Any]:
        how = [
            {"teaches": list(each.teaches or ())} if self.weights is None else {"weight": weight}
            for each, weight in zip(self.config.teachers, self.weights or self.labels, strict=True)
        ]
        teachers = [about | more for about, more in zip(self._about, how, strict=True)]
        bounds = next((about["held_out"] for about in self._about if "held_out" in about), None)
        sources = ", ".join(str(about.get("source") or about["name"]) for about in self._about)
        return {"source": sources, "teachers": teachers, **({} if bounds is None else {"held_out": bounds})}

    def fingerprint(self, recorded: Mapping[str, str] | None = None) -> dict[str, str]:
        """Those of all teachers, by number."""
        found: dict[str, str] = {}
        for number, known in enumerate(self._fingerprints):
            prefix = f"teacher-{number}/"
            before = {
                name.removeprefix(prefix): value
                for name, value in (recorded or {}).items()
                if name.startswith(prefix)
            }
            own = self.members[number].fingerprint(before) if self.members.has(number) else known
            found |= {f"{prefix}{name}": value for name, value in own.items()}
        return found

    def checks(self, setup: RunSetup, student_kl: float) -> Iterator[Finding]:
        """Those of each teacher, and that of its packing, which is made of one model in this process by itself."""
        for number in self.members.turns():
            model = self.members[number].model
            if model is not None and setup.recipe.corpus.packing:
                tokens = setup.recipe.corpus.tokens_per_row
                fault = model.find_packing_fault(tokens)
                figure = fault or f"a document in a row of {tokens} tokens is what it is alone"
                advice = "Set corpus.packing: false, or corpus.tokens_per_row lower"
                yield Finding(f"packing of {self.labels[number]}", figure, fault is None, advice)
            for finding in self.members[number].checks(setup, student_kl):
                yield replace(finding, name=f"{finding.name} of {self.labels[number]}")

    def require_unchanged(self) -> None:
        for number in self.members.turns():
            if self.members.has(number):
                self.members[number].require_unchanged()

    def close(self) -> None:
        self.members.close()

    def _ask(self, number: int, batch: Batch) -> Targets:
        # `answer` has given this teacher what it is to read already.
        return answer(self.members[number], batch.to(self.device))

    def _weighted(self, batch: Batch) -> HiddenTargets:
        parts: list[HiddenTargets | None] = [None] * len(self.members)
        for number in self.members.turns():
            targets = self._ask(number, batch)
            assert isinstance(targets, HiddenTargets)  # `_require_one_kind` refuses others
            parts[number] = targets
        assert self.weights is not None
        return _weighted([part for part in parts if part is not None], self.weights)

    def _teachers_of(self, corpus: Mapping[str, Any]) -> list[int]:
        """The number of each source's teacher; UserError where a source has none, or a teacher no source."""
        sources = corpus.get("sources")
        if not sources:
            raise UserError(f"teacher.teachers: {NO_SOURCES}")
        of = {name: number for number, each in enumerate(self.config.teachers) for name in each.teaches or ()}
        for name in [
            *(name for name in sources if name not in of),
            *(name for name in of if name not in sources),
        ]:
            what = "is taught by no teacher" if name in sources else "is no source of the corpus"
            raise UserError(
                f"teacher.teachers: {name} {what}; its sources are {', '.join(sources)}. Each belongs to one teacher."
            )
        return [of[name] for name in sources]


def _weighted(parts: Sequence[HiddenTargets], weights: Sequence[float]) -> HiddenTargets:
    """Targets of the mean distribution: of an index, the logarithms of the mean there."""

    def head(index_C: Tensor) -> Tensor:
        return _mean([part.head(part.hidden_NE[index_C]) for part in parts], weights)

    return HiddenTargets(torch.arange(len(parts[0]), device=parts[0].hidden_NE.device), head)


def _mean(logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """log sum_i w_i softmax(logits_i)."""
    mean: Tensor | None = None
    for one, weight in zip(logits, weights, strict=True):
        term = one.log_softmax(-1) + math.log(weight)
        mean = term if mean is None else torch.logaddexp(mean, term)
    assert mean is not None
    return mean


@dataclass(frozen=True)
class _PartedHead:
    """The logits of positions whose hidden states are those of different models: of an index, the row of its part."""

    parts: Sequence[HiddenTargets]
    part_N: Tensor
    place_N: Tensor
    """In its part."""

    def __call__(self, index_C: Tensor) -> Tensor:
        part_C, place_C = self.part_N[index_C], self.place_N[index_C]
        logits_CV: Tensor | None = None
        for number, part in enumerate(self.parts):
            at_P = (part_C == number).nonzero()[:, 0]
            if not len(at_P):
                continue
            logits_PV = part.head(part.hidden_NE[place_C[at_P]])
            if len(at_P) == len(index_C):
                return logits_PV
            if logits_CV is None:
                logits_CV = logits_PV.new_empty(len(index_C), logits_PV.shape[-1])
            logits_CV[at_P] = logits_PV
        assert logits_CV is not None
        return logits_CV


def _joined(parts: Sequence[Targets], at_N: Tensor) -> Targets:
    """Targets of disjoint sets of positions as one.

    Args:
        at_N: of the positions of all parts, one part after the other, their places in the whole.
    """
    from_N = torch.argsort(at_N)
    hidden = [part for part in parts if isinstance(part, HiddenTargets)]
    if len(hidden) == len(parts):
        counts = torch.tensor([len(part) for part in parts], device=at_N.device)
        part_N = torch.repeat_interleave(torch.arange(len(parts), device=at_N.device), counts)
        place_N = torch.arange(len(at_N), device=at_N.device) - (counts.cumsum(0) - counts)[part_N]
        return HiddenTargets(
            torch.arange(len(at_N), device=at_N.device), _PartedHead(hidden, part_N[from_N], place_N[from_N])
        )
    sparse = [part for part in parts if isinstance(part, SparseTargets)]
    if len(sparse) < len(parts) or len({(part.has_bucket, part.temperature) for part in sparse}) > 1:
        raise UserError(
            "teacher mixture: its teachers give targets of different kinds. Use stores of one kind and temperature."
        )
    whole = SparseTargets.joined(sparse)
    entropy_N = None if whole.entropy_N is None else whole.entropy_N[from_N]
    return replace(whole, ids_NK=whole.ids_NK[from_N], logp_NK=whole.logp_NK[from_N], entropy_N=entropy_N)


def _rows_of(batch: Batch, rows: Sequence[int]) -> tuple[Batch, Tensor]:
    """Some rows as a batch of their own, and the places of its positions in the whole."""
    T, device = batch.input_ids_BT.shape[1], batch.positions_N.device
    at_b = torch.tensor(rows)
    on_device = at_b.to(device)
    number_B = torch.full((len(batch.rows_B),), -1, device=device)
    number_B[on_device] = torch.arange(len(rows), device=device)
    number_N = number_B[batch.positions_N // T]
    at_N = (number_N >= 0).nonzero()[:, 0]
    other = None if batch.for_teacher is None else _rows_of(batch.for_teacher, rows)[0]
    own = Batch(
        batch.rows_B[at_b],
        batch.input_ids_BT[on_device],
        batch.position_ids_BT[on_device],
        number_N[at_N] * T + batch.positions_N[at_N] % T,
        batch.labels_N[at_N],
        None if batch.lengths_B is None else batch.lengths_B[on_device],
        batch.is_rollout,
        other,
        None if batch.sources_B is None else batch.sources_B[at_b],
    )
    return own, at_N


class MixtureSource(TeacherSource):
    """`teacher.name: mixture`: the sources of its teachers."""

    config: MixtureTeacherConfig
    lacks_tokenizer = "a tokenizer's files beside each teacher"

    def __init__(self, config: MixtureTeacherConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self.members = [source_of(each.teacher, device) for each in config.teachers]

    @property
    def vocab_size(self) -> int:
        return max(member.vocab_size for member in self.members)

    @property
    def checkpoints(self) -> list[ModelFiles]:
        return [files for member in self.members for files in member.checkpoints]

    @property
    def tokenizers(self) -> list[Path]:
        return [path for member in self.members for path in member.tokenizers]

    @property
    def inputs(self) -> dict[str, Path]:
        """Under the role of each teacher, `teacher-0` for the first."""
        return {
            f"teacher-{number}{role.removeprefix('teacher')}": path
            for number, member in enumerate(self.members)
            for role, path in member.inputs.items()
        }

    def load(self, tokens_per_row: int) -> MixtureTeacher:
        load = [lambda member=member: member.load(tokens_per_row) for member in self.members]
        members = Members(load, self.config.in_memory == "all")
        try:
            return MixtureTeacher(self.config, members, self.device)
        except BaseException:
            members.close()
            raise

    def plan_key(self) -> Any:
        return self.config.in_memory, self.config.shares, [member.plan_key() for member in self.members]

    def double(self, part: Part) -> Teacher:
        doubles = [member.double(part) for member in self.members]
        return MixtureDouble(self.config, doubles, self.device)

    def close(self) -> None:
        super().close()
        for member in self.members:
            member.close()


class MixtureDouble(BaseTeacher):
    """The stand-in of a mixture, for a plan: as much memory as all teachers take, or the largest of them."""

    def __init__(self, config: MixtureTeacherConfig, doubles: list[Teacher], device: torch.device) -> None:
        if config.in_memory == "one":
            doubles = [max(doubles, key=_weight_bytes)]
        self.doubles, self.vocab, self.shares = doubles, doubles[0].vocab, config.shares

    def targets(self, batch: Batch) -> Targets:
        # Of a step all of whose rows are of one source; the other teachers' targets take no memory then.
        found = [double.targets(batch) for double in (self.doubles if self.shares else self.doubles[:1])]
        whole = [targets for targets in found if isinstance(targets, HiddenTargets)]
        return _weighted(whole, self.shares) if self.shares and len(whole) == len(self.shares) else found[0]

    def share_ids(self, ids: int) -> int:
        return max(double.share_ids(ids) for double in self.doubles)

    def use_rows(self, are_packed: bool) -> None:
        for double in self.doubles:
            double.use_rows(are_packed)


def _weight_bytes(teacher: Teacher) -> int:
    return 0 if teacher.model is None else sum(weight.nbytes for weight in teacher.model.parameters())
