"""The sections `objective`, `train`, `eval`, `guard`, `compare` and `publish`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Interval, MinLen
from pydantic import WithJsonSchema

from potstill.errors import UserError
from potstill.recipe.fields import (
    DEVICE,
    MAX_INT32,
    BelowOne,
    Chunk,
    Config,
    Count,
    CountOrZero,
    HubId,
    LicenseId,
    Positive,
    PositiveOrZero,
    Seed,
    check,
    require_device,
)
from potstill.recipe.plugins import Registered, divergence


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Config):
    divergence: Annotated[Any, Registered("divergence", short=True)] = field(
        default_factory=lambda: divergence("forward_kl")
    )
    """Divergence of the student from the teacher: its name, or {name, options}."""
    kd_weight: PositiveOrZero = 0.9
    """Weight of the divergence from the teacher."""
    ce_weight: PositiveOrZero = 0.1
    """Weight of the cross-entropy with the corpus's next tokens, always at temperature 1."""
    temperature: Annotated[float, Interval(gt=0, le=1e3)] = 1.0
    """Divides both models' logits in the divergence, which is multiplied by its square (Hinton et al. 2015)."""
    chunk: Chunk = "auto"
    """Positions whose logits exist at once: memory, and results by rounding alone. auto: chosen from the free
    memory before the run starts, and kept with it."""
    engine: Literal["fused", "reference"] = "fused"
    """fused: loss and gradient in closed form, except for divergences of your own; reference: gradients by
    autograd, the same up to rounding, and slower."""

    @property
    def positions_at_once(self) -> int:
        """The chunk; for `auto`, which `preflight/auto.py` resolves before a run, the best value on a CPU."""
        return 256 if self.chunk == "auto" else self.chunk


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    steps: Count | None = None
    """Optimizer steps; with epochs, too, at most so many."""
    epochs: Positive | None = None
    """How often the training rows are read, 1.5 for one and a half times; null: as often as the steps need."""
    rows_per_step: Count
    """Rows of one optimizer step, over all micro-batches."""
    rows_per_micro_batch: Count | None = None
    """Rows in memory at once; null: all of a step. It need not divide rows_per_step: memory, not results."""
    lr: Positive
    """Peak learning rate, reached after the warm-up."""
    warmup: CountOrZero = 0
    """Steps over which the learning rate rises, at most steps."""
    final_lr_ratio: Annotated[float, Interval(ge=0, le=1)] = 0.1
    """Learning rate of the last step, as a fraction of lr."""
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    """How the learning rate falls after the warm-up: a half cosine, a line, or not before the last steps (wsd:
    warm-up, stable, decay, by 1 - sqrt; Hu et al. 2024, Hägele et al. 2024)."""
    decay: Annotated[float, Interval(gt=0, le=1)] = 0.2
    """Share of the steps after the warm-up over which wsd lowers the learning rate."""
    optimizer: Literal["adamw", "muon", "sgd"] = "adamw"
    """Update rule. muon: for the layers' matrices, with AdamW's size of updates, and AdamW for the rest."""
    ema: BelowOne | None = None
    """Decay, per step, of an exponential moving average of the weights, which evaluations use and the student is
    saved with; it is lower in the first steps. null: the weights as they are."""
    freeze: list[Annotated[str, MinLen(1)]] = field(default_factory=list)
    """Weights of the student that are not trained, by their names in Transformers; * stands for any characters. Frozen
    embeddings (`*embed_tokens*`) keep tokens that the corpus does not have."""
    weight_decay: PositiveOrZero = 0.1
    """Decay of the matrices: each step subtracts lr * weight_decay * weight."""
    beta1: BelowOne = 0.9
    """AdamW's decay rate of the mean gradient, per step."""
    beta2: BelowOne = 0.95
    """AdamW's decay rate of the mean squared gradient, per step."""
    momentum: BelowOne = 0.95
    """Muon's decay rate of the mean gradient, per step."""
    clip: Positive | None = 1.0
    """Gradient clipping: largest norm over all parameters; null: no limit."""
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    """Type of the student's matrix products; its weights stay float32. auto: bfloat16 where the device has
    instructions for it. The choice is kept with the run."""
    quantize: Literal["q8_0", "q4_0", "q4_k", "q6_k"] | None = None
    """Train the student for a GGUF file of this type: each step and held-out evaluation runs on the weights as the
    file will hold them, and the unrounded ones are updated and saved. null: not quantised."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With several processes, by torchrun: each keeps the whole student (ddp), or a part of its weights,
    gradients and moments (fsdp). One process: no difference."""
    activation_checkpointing: Literal[False, True, "selective"] = False
    """Keep one hidden state a layer and recompute the rest in the backward pass: memory, not results. `selective`
    also keeps the outputs of matrix products and attention: it saves less memory and recomputes less."""
    compile: bool = False
    """Run both models' layers, and on CUDA the loss between its matrix products, through torch.compile: faster
    steps after a slow first one, the same results up to rounding. Needs Triton on CUDA, else a C++ compiler."""
    return_memory: bool = False
    """Return freed memory to the system at once: less memory and slower steps on the CPU, same results."""
    matmul: Literal["auto", "blas", "onednn"] = "auto"
    """BLAS backend of float32 matrix products on a CPU: speed, and results by rounding alone. blas: PyTorch's own;
    auto: oneDNN where that is MKL on AMD with AVX-512, else blas. The choice is kept with the run."""
    save_every: CountOrZero = 500
    """Steps between checkpoints, of which two are kept; 0: only when a signal stops the run."""
    device: Annotated[str, check(require_device), WithJsonSchema({"type": "string", "pattern": DEVICE})] = (
        "auto"
    )
    """auto, cpu, cuda or cuda:N; auto: CUDA where there is a device, else the CPU."""
    seed: Seed = 0
    """Seed of the order of rows and of random weights."""

    @property
    def micro_batch_rows(self) -> int:
        """Rows in memory at once."""
        return self.rows_per_micro_batch or self.rows_per_step

    @property
    def num_steps(self) -> int:
        """The steps, once they are known: see `of_rows`."""
        assert self.steps is not None, "epochs are steps once the corpus is read"
        return self.steps

    def steps_of(self, num_rows: int) -> int:
        """The steps that a corpus of this many training rows takes; the last may read rows of the next epoch."""
        most = self.steps or MAX_INT32
        if self.epochs is None:
            return most
        # In fractions: 0.7 epochs of 10 rows are 7 rows, and 0.7 * 10 is more than 7.
        return min(most, math.ceil(Fraction(str(self.epochs)) * num_rows / self.rows_per_step))

    def of_rows(self, num_rows: int) -> TrainConfig:
        """With the steps that its epochs are; the same once more changes nothing.

        Raises:
            UserError: fewer steps than the warm-up.
        """
        if self.epochs is None:
            return self
        steps = self.steps_of(num_rows)
        if self.warmup > steps:
            raise UserError(
                f"train.warmup: {self.warmup} steps of warm-up in a run of {steps}, {self.epochs:g} epochs of"
                f" {num_rows} rows. Lower it, or raise train.epochs."
            )
        return dataclasses.replace(self, steps=steps)


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Config):
    every: CountOrZero = 0
    """Steps between held-out evaluations; 0: only at the start and at the end."""
    sample_prompt: Annotated[str, MinLen(1)] | None = None
    """Text that the student continues before and after training, and the teacher once, or, where the corpus is of
    conversations, a user's turn that they answer; null: none."""
    sample_prompts: list[Annotated[str, MinLen(1)]] = field(default_factory=list)
    """The same at every held-out evaluation, kept in samples.jsonl; the teacher's at the first alone."""
    sample_system: Annotated[str, MinLen(1)] | None = None
    """Where the corpus is of conversations, the system message before each of these prompts; null: none."""
    sample_tokens: Count = 48
    """Longest continuation, in tokens."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig(Config):
    policy: Literal["stop", "skip", "rollback"] = "stop"
    """What a loss or gradient that is not finite, or a loss above the ceiling, leads to: the run stops, or the step
    is skipped, or the run goes back to its last checkpoint and skips the step on the way."""
    loss_ceiling: Positive | None = None
    """Highest plausible loss, in nats per position; null: five times that of a uniform guess."""
    first_step_s: Positive = 1800.0
    """Deadline of the first step, in seconds; when it passes, stack traces are written and the run ends."""
    stall_s: Positive = 1800.0
    """Deadline of every later step, evaluation batch and checkpoint, likewise."""


def _seeds(value: list[int], folder: Path) -> list[int]:
    if len(set(value)) < len(value):
        raise UserError(f"{value} lists a seed twice. List each once.")
    return value


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Config):
    budget: Literal["time", "steps"] = "time"
    """What all arms have in common: training time, converted to steps by timing trial steps; or steps."""
    seeds: Annotated[list[Seed], MinLen(1), check(_seeds)] = field(default_factory=lambda: [0, 1, 2])
    """Seeds that every arm is run with; each replaces train.seed."""
    corrected_steps: CountOrZero = 0
    """Steps of plain training of the teacher, before it teaches an additional arm, whose budget pays for them; 0:
    no such arm."""
    corrected_lr: Positive = 2e-5
    """Learning rate of those steps."""
    humaneval_tokens: CountOrZero = 0
    """Run greedy HumanEval on every arm's student, with completions of at most so many tokens; 0: not run."""


@dataclass(frozen=True, kw_only=True)
class PublishConfig(Config):
    teacher: HubId | None = None
    """Hub id of the teacher for the model card, where the recipe names a file or folder."""
    student: HubId | None = None
    """Hub id of the model that the student started from, likewise; a cut student's is the teacher's."""
    data: Annotated[str, MinLen(1)] | None = None
    """What the corpus is, in a few words for the card."""
    teacher_license: LicenseId | None = None
    """License of the teacher; null: read from its own files."""
    student_license: LicenseId | None = None
    """License of the model that the student started from; null: read from its own files."""
    data_license: LicenseId | None = None
    """License of the corpus; null: read from its own files."""
    license: LicenseId | None = None
    """License of the student; null: the one that teacher, starting model and corpus require."""
