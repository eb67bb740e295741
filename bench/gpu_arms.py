"""What `gpu.py` measures: pairs of models on a device, one step of every tool on them, the loss alone.

All arms of a pair have the same two models, first weights, rows and rates; a peer's loss (`peer_losses.py`)
runs in the plain loop of `step.py`. Peers are given our bodies, so that what differs is the loss and who
waits for the device. They know nothing of a padded end: they are given the rows that both heads have, whose
number is even and fast to multiply with, and their losses differ by what padding takes, 2e-3 nats at 7B.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peer_losses
import scaling
import step
import torch
from torch import Tensor
from torch.nn import functional as F

from potstill.build.resolve import resolve
from potstill.build.setup import make_objective, set_up
from potstill.data.fixed import FixedRows, Order
from potstill.data.tokenizers import require_same
from potstill.models.causal_lm import CausalLM
from potstill.models.compile import compile_body
from potstill.models.student import Student
from potstill.preflight.auto import MOST_POSITIONS
from potstill.recipe.load import Recipe, load
from potstill.recipe.sections_data import TokensCorpusConfig
from potstill.recipe.sections_models import CutStudentConfig, FixtureTeacherConfig
from potstill.recipe.sections_training import ObjectiveConfig, TrainConfig
from potstill.teachers.hf import TorchTeacher
from potstill.training.loop import Hooks, train
from potstill.types import Batch, Vocab

DEMO = Path(__file__).resolve().parent.parent / "src" / "potstill" / "demo.yaml"
WARM = 2  # steps that are not counted
SEVEN_B = {
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152_064,
}
HALF_B = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
}
SHARED = 151_665  # ids of Qwen2.5's list; both models' logits are wider
TINY = {
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "hidden_size": 32,
    "vocab_size": 1040,
}
TINY_STUDENT = {**TINY, "hidden_size": 16, "vocab_size": 1032, "tie_word_embeddings": True}
TINY_SHARED = 1031


@dataclass
class Pair:
    """Two models, and what is between them and a step."""

    teacher: TorchTeacher
    student: CausalLM
    rows: Any
    recipe: Recipe
    device: torch.device
    kept: dict[Any, Any] = field(default_factory=dict)
    """What is made once for all rounds, because the first use compiles it."""

    def __post_init__(self) -> None:
        self.first = {name: p.detach().cpu().clone() for name, p in self.student.named_parameters()}
        self.order = Order(len(self.rows), self.recipe.train.seed)

    def begin(self, compiled: bool) -> None:
        """From the first weights, with bodies compiled or not."""
        for name, parameter in self.student.named_parameters():
            parameter.detach().copy_(self.first[name])
            parameter.grad = None
        for model in (self.teacher.model, self.student):
            if compiled and model not in self.kept:
                compile_body(model)
                self.kept[model] = model.compiled_body
            model.compiled_body = self.kept[model] if compiled else None

    def batch(self, number: int) -> Batch:
        """All rows of a step."""
        found: Batch = self.rows.batch(self.order.rows(number, self.recipe.train.rows_per_step))
        return found

    def flops(self) -> int:
        """Of a step, as the models need them: each of a teacher's matrices once, of a student's three times,
        attention by half of its square, and both heads at the ids they share.
        """
        B, T = self.recipe.train.rows_per_step, self.recipe.corpus.tokens_per_row
        teacher, student = (_of_token(model.hf, T) for model in (self.teacher.model, self.student))
        heads = (self.teacher.model.head, self.student.head)
        E, D = (head.weight_VD.shape[1] for head in heads)
        N = len(self.batch(0).positions_N)
        return B * T * (teacher + 3 * student) + scaling.Case(N, heads[0].num_ids, D, E).flops


def _of_token(hf: Any, T: int) -> int:
    """FLOPs of a token's way through the body, forward."""
    config, embedding = hf.config, hf.get_input_embeddings().weight
    matrices = sum(p.numel() for p in hf.base_model.parameters() if p.ndim >= 2 and p is not embedding)
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return 2 * matrices + 2 * T * width * config.num_hidden_layers


@dataclass(frozen=True)
class RandomRows:
    """Of two documents each; every position is supervised."""

    ids: int
    T: int

    def __len__(self) -> int:
        return 2**16

    def batch(self, rows: list[int]) -> Batch:
        B, T, cut = len(rows), self.T, self.T // 3
        generator = torch.Generator().manual_seed(rows[0])
        ids = torch.randint(self.ids, (B, T + 1), generator=generator)
        places = torch.cat([torch.arange(cut), torch.arange(T - cut)])
        return Batch(
            torch.tensor(rows),
            ids[:, :-1].contiguous(),
            places.repeat(B, 1),
            torch.arange(B * T),
            ids[:, 1:].flatten(),
        )


def qwen(B: int, T: int, steps: int, device: torch.device, tiny: bool) -> Pair:
    """Qwen2.5-7B teaches Qwen2.5-0.5B, in shape: random weights, made on the device."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    models = []
    of_teacher, of_student = (TINY, TINY_STUDENT) if tiny else (SEVEN_B, HALF_B)
    for name, config, dtype in (
        ("teacher", of_teacher, torch.bfloat16),
        ("student", of_student, torch.float32),
    ):
        with device:
            hf = AutoModelForCausalLM.from_config(Qwen2Config(**config), dtype=dtype)
        models.append(CausalLM(hf.to(device), name))
    tokens = tuple(map(str, range(TINY_SHARED if tiny else SHARED)))
    ids = require_same(*(Vocab(model.vocab_size, tokens) for model in models), "teacher", "student")
    for model in models:
        model.mask_from(ids)
    recipe = Recipe(
        corpus=TokensCorpusConfig(path="", dtype="uint32", tokens_per_row=T),
        teacher=FixtureTeacherConfig(vocab_size=ids),
        student=CutStudentConfig(layers=1, rule="first_last", repair=False),
        objective=ObjectiveConfig(kd_weight=0.5, ce_weight=0.5, chunk=MOST_POSITIONS[device.type]),
        train=TrainConfig(steps=steps, rows_per_step=B, lr=1e-4, precision="bfloat16", save_every=0),
    )
    return Pair(TorchTeacher(models[0], None), models[1], RandomRows(ids, T), recipe, device)


def demo(B: int, T: int, steps: int, device: torch.device, tiny: bool, fields: Sequence[str] = ()) -> Pair:
    """The demo's own models and rows, or those of `fields`; UserError where its teacher is not installed."""
    given = [f"train.steps={steps}", f"train.rows_per_step={B}", f"corpus.tokens_per_row={T}"]
    given += ["teacher.dtype=bfloat16", "train.precision=bfloat16", f"train.device={device.type}"]
    given += ["objective.kd_weight=0.5", "objective.ce_weight=0.5", "corpus.include=[a*.py]"]
    given += [f"objective.chunk={MOST_POSITIONS[device.type]}"]  # what `auto` is where memory allows it
    setup = set_up(resolve(load(DEMO, [*given, *fields])), lambda text: None)
    assert isinstance(setup.teacher, TorchTeacher)
    return Pair(setup.teacher, setup.student.model, setup.corpus.train, setup.recipe, setup.device)


class Meter:
    """Of the steps after the warm-up the peak of memory, and how often the last one waited for the device.

    On the CPU there is neither.
    """

    def __init__(self, device: torch.device, steps: int) -> None:
        self.is_cuda, self.steps = device.type == "cuda", steps
        self.found: dict[str, Any] = {}
        self._closing = contextlib.ExitStack()
        self._said: list[warnings.WarningMessage] = []

    def before(self, number: int) -> None:
        """Step `number` begins; as many as there are steps, and the last one is done."""
        if not self.is_cuda:
            return
        if number == min(WARM, self.steps - 1):
            torch.cuda.reset_peak_memory_stats()
        if number == self.steps - 1:
            self._said = self._closing.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")
            self._closing.callback(torch.cuda.set_sync_debug_mode, "default")
            torch.cuda.set_sync_debug_mode("warn")
        if number == self.steps:
            self.close()
            self.found["waits"] = sum("synchronizing" in str(said.message) for said in self._said)
            self.found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            self.found["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30

    def close(self) -> None:
        self._closing.close()


def timed(run: Callable[[], None], device: torch.device, rounds: int) -> Iterator[float]:
    """Seconds of each; the first run is a warm-up."""
    run()
    for _ in range(rounds):
        if device.type == "cuda":
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()  # type: ignore[no-untyped-call]
            run()
            ended.record()  # type: ignore[no-untyped-call]
            ended.synchronize()  # type: ignore[no-untyped-call]
            yield began.elapsed_time(ended) / 1000  # type: ignore[no-untyped-call]
        else:
            started = time.perf_counter()
            run()
            yield time.perf_counter() - started


Run = Callable[[Pair, Meter], dict[str, Any]]
"""A few steps from the pair's first weights: losses and seconds of each."""


def ours(compiled: bool = False, engine: Any = "fused") -> Run:
    """The loop itself, and the loss block of its first batch by itself."""

    def run(pair: Pair, meter: Meter) -> dict[str, Any]:
        pair.begin(compiled)
        recipe = replace(
            pair.recipe,
            train=replace(pair.recipe.train, compile=compiled),
            objective=replace(pair.recipe.objective, engine=engine),
        )
        student = Student(pair.student, make_objective(recipe, torch.bfloat16), torch.bfloat16)
        lines: list[dict[str, float]] = []

        def note(number: int, metrics: dict[str, float]) -> None:
            lines.append(metrics)
            meter.before(number)

        meter.before(0)
        hooks = Hooks(lambda number: {"heldout/loss": math.inf}, note, lambda *_: None)
        plan = recipe.train
        data = FixedRows(pair.rows, pair.order, plan.rows_per_step, plan.micro_batch_rows)
        train(student, pair.teacher, data, recipe, hooks)
        alone = [*timed(loss_of(student, pair), pair.device, 3)]
        losses, seconds = ([line[name] for line in lines] for name in ("train/loss", "speed/step_s"))
        return {"losses": losses, "seconds": seconds, "loss_seconds": alone}

    return run


def loss_of(student: Student, pair: Pair) -> Callable[[], None]:
    batch = pair.batch(0).to(pair.device)
    targets = pair.teacher.targets(batch)
    with torch.no_grad():
        hidden_ND = student.hidden_ND(batch)
    hidden_ND.requires_grad_()

    def run() -> None:
        hidden_ND.grad = student.model.head.weight_VD.grad = None
        sums = student.objective(hidden_ND, student.model.head, batch.labels_N, targets, checked=False)
        (sums["loss"] / len(batch.labels_N)).backward()

    return run


class Seen:
    """What a peer sees of a model: hidden states, and rows of its head."""

    def __init__(self, hidden: Callable[[Any, Any], Tensor], weight_VD: Tensor) -> None:
        self._hidden, self._weight_VD = hidden, weight_VD

    def model(self, input_ids: Any, position_ids: Any, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self._hidden(input_ids, position_ids))

    def __call__(self, **inputs: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=F.linear(self.model(**inputs).last_hidden_state, self._weight_VD))

    def get_output_embeddings(self) -> SimpleNamespace:
        return SimpleNamespace(weight=self._weight_VD)


def peer(make: Callable[[], peer_losses.Loss], compiled: bool = False) -> Run:
    """`make` imports the peer; `compiled` says whether the bodies are."""

    def run(pair: Pair, meter: Meter) -> dict[str, Any]:
        pair.begin(compiled)
        loss = pair.kept[run] = pair.kept.get(run) or make()
        pair.student.train()
        plan = pair.recipe.train
        optimizer = step.make_adamw(plan, pair.student.hf, fused=True)
        models = (pair.student, pair.teacher.model)
        both = min(model.vocab_size for model in models)

        def of(numbered: tuple[int, Batch]) -> Any:
            number, batch = numbered
            meter.before(number)
            with torch.autocast(pair.device.type, torch.bfloat16):
                seen = (Seen(model.hidden, model.head.weight_VD[:both]) for model in models)
                return loss(*seen, batch.to(pair.device))

        items = [(number, pair.batch(number)) for number in range(plan.steps)]
        found = step.take_steps(plan, pair.student.hf, optimizer, items, of)
        meter.before(plan.steps)
        return found

    return run


ARMS: dict[str, Run] = {
    "ours": ours(),
    "ours, compiled": ours(compiled=True),
    "ours, reference": ours(engine="reference"),
    "plain": peer(lambda: peer_losses.on_logits(step.plain_loss)),
    "plain, compiled": peer(peer_losses.plain_compiled, compiled=True),
    "Liger JSD": peer(peer_losses.liger(True, 1024)),
    "Liger JSD, bodies compiled": peer(peer_losses.liger(True, 1024), compiled=True),
    "TRL generalized_jsd_loss": peer(peer_losses.trl_loss),
    "TRL DistillationTrainer's loss": peer(peer_losses.trl_chunked),
}
ONLY_KL = {"TRL DistillationTrainer's loss"}  # it has no cross-entropy: other losses, about the same work
PUBLISHED = scaling.Case(N=8192, V=128_256, D=2048, E=4096)
"""The shape that Liger gives figures of its JSD for."""


def losses_alone(tiny: bool, device: torch.device) -> tuple[scaling.Case, dict[str, Callable[[], Any]]]:
    """The shape, and what makes each way's forward and backward of it, in bfloat16."""
    case = scaling.Case(N=64, V=123, D=16, E=32) if tiny else PUBLISHED
    of = scaling.tensors(case, device, torch.bfloat16)
    teacher, student = (
        Seen(lambda *_, h=of[hidden]: h[None], of[weight])
        for hidden, weight in (("hidden_NE", "weight_VE"), ("hidden_ND", "weight_VD"))
    )
    empty = torch.empty(0, dtype=torch.int64)
    batch = Batch(empty, empty, empty, torch.arange(case.N, device=device), of["labels_N"])

    def of_peer(make: Callable[[], peer_losses.Loss]) -> Callable[[], Any]:
        def made() -> Callable[[], None]:
            loss = make()

            def run() -> None:
                of["hidden_ND"].grad = of["weight_VD"].grad = None
                with torch.autocast(device.type, torch.bfloat16):
                    value = loss(student, teacher, batch)
                value.backward()

            return run

        return made

    arms: dict[str, Callable[[], Any]] = {}
    for chunk in (16, 32) if tiny else (256, 1024, 2048):
        at = replace(case, chunk=chunk)
        arms[f"bare matmuls, chunk {chunk}"] = lambda at=at: scaling.bare_matmuls(at, of)
        arms[f"ours, chunk {chunk}"] = lambda at=at: scaling.loss_block(at, of)
        arms[f"ours, compiled, chunk {chunk}"] = lambda at=at: scaling.loss_block(at, of, compiled=True)
    arms["plain"] = of_peer(lambda: peer_losses.on_logits(step.plain_loss))
    arms["plain, compiled"] = of_peer(peer_losses.plain_compiled)
    arms["Liger JSD"] = of_peer(peer_losses.liger(True, 1024))
    arms["TRL DistillationTrainer's loss"] = of_peer(peer_losses.trl_chunked)
    return case, arms
