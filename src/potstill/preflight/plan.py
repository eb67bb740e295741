"""The memory, disk and time that a run will need, before it is started: `potstill plan`.

The memory of a step does not come from formulas: `fake_step` runs the step on fake tensors.

On the CPU the peak is that of the process, with its libraries (this process as it is now), the tokenizer and the
rows. On CUDA it is that of the device's allocator, which has none of these.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from potstill.build.resolve import Resolved
from potstill.build.setup import require_length
from potstill.errors import UserError
from potstill.models.load import choose_device, longest_row
from potstill.preflight.fake_step import Traced, resident_bytes, trace
from potstill.preflight.packing_probe import require_packing
from potstill.preflight.plan_disk import (
    TOKENIZER_FILE_BYTES_PER_ID,
    corpus_bytes,
    corpus_tokens,
    planned_steps,
    shards_bytes,
)
from potstill.preflight.rollouts import rollout_disk_bytes
from potstill.recipe.load import Recipe
from potstill.store.codecs import planned_bytes
from potstill.training.checkpoint import CHECKPOINTS_KEPT


@dataclass(frozen=True)
class Plan:
    """Bytes alive at the moment of the peak, by part of the memory; the parts sum to `peak_bytes`."""

    device: str
    phase: str
    """What runs at the peak."""
    teacher: int
    student: int
    gradients: int
    optimizer: int
    activations: int
    loss_chunk: int
    """Logits of a chunk, their gradients, and the head's gradient that is computed with them."""
    store: int
    """Targets read from disk; 0 with a teacher in memory."""
    corpus: int
    """Rows and tokenizer, estimated from the size of the files; 0 on CUDA."""
    libraries: int
    """This process, before anything is loaded; 0 on CUDA."""
    allocator: int
    """Freed blocks that glibc does not return, see KEPT_BY_GLIBC; 0 with train.return_memory, and on CUDA."""
    largest: dict[str, int]
    """The largest size of each part at any time: parts do not peak together."""
    student_disk_bytes: int
    checkpoint_disk_bytes: int
    shards_disk_bytes: int
    """Of `corpus.shards`, estimated from the size of the files; 0 where they exist already."""
    disk_bytes: int
    """What the run leaves behind, shards included."""
    disk_peak_bytes: int
    """With the student and the checkpoint that are written before older ones are deleted; or while the shards are
    written, when every token exists twice.
    """
    time_s: float | None
    """None where no step was measured."""
    rollout_time_s: float | None = None
    """What of it the student writes; None where none was measured, or it writes nothing."""

    @property
    def parts(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in PARTS}

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())

    def as_dict(self) -> dict[str, Any]:
        """For machine-readable output."""
        return {"peak_bytes": self.peak_bytes, **dataclasses.asdict(self)}

    def fits(self, memory_bytes: int, disk_bytes: int) -> bool:
        return self.peak_bytes <= memory_bytes and self.disk_peak_bytes <= disk_bytes


TRACED = ("teacher", "student", "gradients", "optimizer", "activations", "loss_chunk", "store")
PARTS = (*TRACED, "corpus", "libraries", "allocator")
KEPT_BY_GLIBC = 0.3
"""As a share of the tensors alive at the peak that are of at most 32 MiB: larger ones go back to the system."""
MOST_POSITIONS, LONGEST_ROW = 2**36, 2**22
"""Of a micro-batch: with more, sizes in bytes overflow 64 bits."""


def plan(resolved: Resolved, *, is_set_up: bool = False) -> Plan:
    """Plan a run by tracing its step.

    Whatever this process holds now counts as libraries: call it before a run loads anything.

    Args:
        resolved: the recipe and its model sources.
        is_set_up: everything is loaded and no step has been taken. Rows and tokenizer are then measured instead
            of estimated, and count with the libraries.

    Raises:
        UserError: a student that cannot be cut from its teacher, or sizes that no machine has.
    """
    traced = _plan(resolved)
    if not is_set_up or traced.libraries == 0:
        return traced
    return dataclasses.replace(
        traced, corpus=0, libraries=max(traced.libraries - traced.teacher - traced.student, 0)
    )


def available(recipe: Recipe, folder: Path) -> tuple[int, int]:
    """Bytes of memory that a run may take on its device, and bytes free on the disk of `folder`."""
    device = choose_device(recipe.train.device)
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    disk = os.statvfs(existing)
    free_disk = disk.f_bavail * disk.f_frsize
    # What this process holds already is added: the plan counts it, too, or it will be freed.
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) + torch.cuda.memory_reserved(device), free_disk
    return min(_system_left(), _container_left()) + resident_bytes(), free_disk


def _system_left() -> int:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    lines = meminfo.read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def _container_left(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes below a container's memory limit. Its file cache does not count: the kernel can free it."""
    try:
        limit = int((group / "memory.max").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such files, or the limit reads `max`
        return sys.maxsize
    return max(limit - int(stat["anon"]), 0)


def _plan(resolved: Resolved) -> Plan:
    recipe = resolved.recipe
    _require_countable(resolved)  # before the trace, which would overflow
    if recipe.corpus.packing:
        for name, config in _models(resolved):
            require_packing(config, name)
    traced = trace(resolved)
    vocab_size = resolved.student.model_config.get_text_config().vocab_size
    on_cpu = resolved.device_type == "cpu"
    train = recipe.train
    # The whole model even with LoRA: adapters are merged into it.
    saved = 4 * traced.weights + TOKENIZER_FILE_BYTES_PER_ID * vocab_size
    checkpoint = traced.checkpoint
    written = planned_steps(recipe) // train.save_every if train.save_every else 0
    written += recipe.guard.policy == "rollback"  # the state before the first step
    # At least one, whatever save_every says: a signal saves one.
    at_once = min(max(written, 1), CHECKPOINTS_KEPT + 1)
    shards = shards_bytes(recipe)
    rollouts = rollout_disk_bytes(recipe, planned_steps(recipe))
    peak = shards + max(2 * saved + min(at_once, CHECKPOINTS_KEPT) * checkpoint, saved + at_once * checkpoint)
    return Plan(
        device=resolved.planned_type or str(resolved.device),
        phase=traced.phase,
        **{part: traced.at_peak[part] for part in TRACED},
        corpus=corpus_bytes(recipe, _tokenizer_ids(resolved)) if on_cpu else 0,
        libraries=traced.libraries if on_cpu else 0,
        allocator=_kept_by_allocator(traced, recipe) if on_cpu else 0,
        largest={part: traced.largest[part] for part in TRACED},
        student_disk_bytes=saved,
        checkpoint_disk_bytes=checkpoint,
        shards_disk_bytes=shards,
        disk_bytes=shards + saved + min(written, CHECKPOINTS_KEPT) * checkpoint + rollouts,
        disk_peak_bytes=max(2 * shards, peak) + rollouts,
        time_s=None,
    )


def _tokenizer_ids(resolved: Resolved) -> int:
    """About how many ids the loaded tokenizer has."""
    config = resolved.teacher_config if resolved.student.is_cut else resolved.student.model_config
    return int((config or resolved.student.model_config).get_text_config().vocab_size)


def _models(resolved: Resolved) -> list[tuple[str, Any]]:
    """Name and config of the models that this process would run."""
    configs = (("teacher", resolved.teacher_config), ("student", resolved.student.model_config))
    return [(name, config) for name, config in configs if config is not None]


def _require_countable(resolved: Resolved) -> None:
    """UserError for rows longer than a model supports, and for sizes that no machine could address."""
    recipe = resolved.recipe
    rows, tokens = recipe.train.micro_batch_rows, recipe.corpus.tokens_per_row
    for name, config in _models(resolved):
        require_length(longest_row(config), name, "corpus.tokens_per_row", tokens)
    if rows * tokens > MOST_POSITIONS or tokens > LONGEST_ROW:
        raise UserError(
            f"train.rows_per_micro_batch: {rows} rows of {tokens} tokens at once are {rows * tokens}"
            " positions, more than any memory holds. Set it to 1, and corpus.tokens_per_row to what the"
            " models were made for."
        )


def _kept_by_allocator(traced: Traced, recipe: Recipe) -> int:
    if recipe.train.return_memory or platform.libc_ver()[0] != "glibc":
        return 0
    return int(KEPT_BY_GLIBC * traced.on_heap)


def capture_size(resolved: Resolved) -> dict[str, float | None] | None:
    """The size of what `potstill capture` would write for the training rows, with tokens estimated from the size
    of the files, None where nobody knows; None for a teacher whose hidden states are not in this process.
    """
    recipe, config = resolved.recipe, resolved.teacher.model_config
    if config is None:
        return None
    teacher, student = config.get_text_config(), resolved.student.model_config.get_text_config()
    ids = min(teacher.vocab_size, student.vocab_size)
    each = planned_bytes(dataclasses.asdict(recipe.capture), ids, teacher.hidden_size)
    tokens, train = corpus_tokens(recipe), recipe.train
    if recipe.capture.rows == "steps" and (tokens is not None or train.steps is not None):
        read = planned_steps(recipe) * train.rows_per_step * recipe.corpus.tokens_per_row
        tokens = read if tokens is None else min(tokens, read)
    if tokens is None:
        return {"bytes_per_position": each, "tokens": None, "bytes": None}
    return {"bytes_per_position": each, "tokens": int(tokens), "bytes": int(each * tokens)}
