"""Count live storages while a step runs on fake tensors: the part of `plan` that is about PyTorch."""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from potstill.losses.fused import Block
from potstill.losses.objective import Objective
from potstill.preflight.known_outputs import KnownOutputs
from potstill.types import Batch, Head, Targets


def _grouped_mm(a: Tensor, b: Tensor, offsets: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """The output shape of a mixture of experts' matrix product: PyTorch's own rule accepts bfloat16 alone."""
    if a.ndim == 2 and b.ndim == 2:
        assert offsets is not None
        return a.new_empty(len(offsets), a.shape[0], b.shape[1])
    rows = a.shape[1] if b.ndim == 2 else a.shape[-2]
    return a.new_empty(*(a.shape[:1] if a.ndim == b.ndim else ()), rows, b.shape[-1])


class Answers(TorchFunctionMode):
    """`tolist` of a fake tensor, which has no data: ones, for the loop, which reads row numbers and finite flags."""

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return [1] * args[0].numel() if func is Tensor.tolist else func(*args, **kwargs or {})


LARGEST_KEPT = 32 * 2**20
"""Bytes of the largest block that glibc takes from its heap: `DEFAULT_MMAP_THRESHOLD_MAX` of its malloc. What is larger
is mapped by itself, and given back when it is freed."""


class MemoryTracker(TorchDispatchMode):
    """Bytes of every live storage, by the part of the run that allocated it: now, and at the peak of their sum."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase = self.peak_phase = "loading"
        self.libraries = 0
        self.now: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self.largest: Counter[str] = Counter()
        self.on_heap = self.on_heap_at_peak = 0
        """Bytes in storages that glibc takes from its heap."""
        self._peak = 0
        self._known = KnownOutputs()
        self._making = "activations"
        self._owner: weakref.WeakKeyDictionary[Any, list[str]] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:  # `item()`: what lets the loop go on
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        grouped = func is torch.ops.aten._grouped_mm.default
        with torch._C.DisableTorchFunction():  # `Answers` need not see what is asked here
            out = _grouped_mm(*args, **kwargs or {}) if grouped else self._known(func, args, kwargs or {})
            self._track_all(out)
        return out

    def _track_all(self, out: Any) -> None:
        if isinstance(out, Tensor):
            self.track(out)
            return
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.track(leaf)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Inside the block, what is allocated counts as `name`."""
        before = self._making
        self.switch(name)
        yield
        self.switch(before)

    def switch(self, name: str) -> None:
        """From now on, what is allocated counts as `name`."""
        self._making = name

    def gradient(self, parameter: Tensor) -> None:
        """A parameter's gradient is complete: its storage, so far an activation, now counts as a gradient."""
        assert parameter.grad is not None
        owner = self._owner[parameter.grad.untyped_storage()]
        size = parameter.grad.untyped_storage().nbytes()
        self.now[owner[0]] -= size
        owner[0] = "gradients"
        self._add("gradients", size)

    def track(self, tensor: Tensor) -> None:
        """Count the tensor's storage until it is freed; a view of a known one adds nothing."""
        storage = tensor.untyped_storage()
        if storage in self._owner:
            return
        owner, size = [self._making], storage.nbytes()
        self._owner[storage] = owner
        self.on_heap += size if size <= LARGEST_KEPT else 0
        # The list, not its entry: `gradient` may change the owner before the storage is freed.
        weakref.finalize(storage, self._forget, owner, size).atexit = False
        self._add(owner[0], size)

    def _forget(self, owner: list[str], size: int) -> None:
        self.now[owner[0]] -= size
        self.on_heap -= size if size <= LARGEST_KEPT else 0

    def _add(self, part: str, size: int) -> None:
        self.now[part] += size
        self.largest[part] = max(self.largest[part], self.now[part])
        total = sum(self.now.values())
        if total > self._peak:
            self._peak, self.at_peak, self.peak_phase = total, Counter(self.now), self.phase
            self.on_heap_at_peak = self.on_heap


@dataclass(frozen=True)
class WatchedObjective(Objective):
    """The objective, whose allocations count as `loss_chunk`. All chunks but the last are alike, so that three
    of them stand for any number.
    """

    part: Callable[[str], AbstractContextManager[None]] = dataclasses.field(kw_only=True)

    def __call__(
        self,
        hidden_ND: Tensor,
        head: Head,
        labels_N: Tensor,
        targets: Targets | None,
        *,
        checked: bool = True,
    ) -> dict[str, Tensor]:
        with self.part("loss_chunk"):
            return super().__call__(hidden_ND, head, labels_N, targets, checked=checked)

    def measure(self, hidden_ND: Tensor, head: Head, labels_N: Tensor, targets: Targets) -> dict[str, Tensor]:
        with self.part("loss_chunk"):
            return super().measure(hidden_ND, head, labels_N, targets)

    def _parts(self, positions: int) -> list[slice]:
        if positions <= 3 * self.chunk:
            return super()._parts(positions)
        starts = (0, self.chunk, (positions - 1) // self.chunk * self.chunk)
        return [slice(start, start + self.chunk) for start in starts]

    def _each_of(self, block: Block, blocks: int) -> Block:
        """Of the blocks of a chunk, too, all but the last are alike. The first and the last two are computed; of those
        between, what is kept of each until the chunk is done is allocated.
        """
        number, kept = 0, (torch.empty(0),) * 2

        def few(*args: Any) -> tuple[Tensor, Tensor]:
            nonlocal number, kept
            number += 1
            if 1 < number < blocks - 1:
                ce_C = torch.empty_like(kept[0])
                return ce_C, ce_C if kept[1] is kept[0] else torch.empty_like(kept[1])
            kept = block(*args)
            return kept

        return few


NAMED_ROWS = 32
"""Row numbers of a fake batch at most: a batch may have billions, and each becomes a Python object."""


@dataclass(frozen=True)
class FakeRows:
    """Rows whose every position bears loss: the most memory that a corpus can take."""

    tokens_per_row: int
    num_rows: int

    def __len__(self) -> int:
        return self.num_rows

    def batch(self, rows: Sequence[int]) -> Batch:
        B, T = len(rows), self.tokens_per_row
        rows_B = torch.zeros(min(B, NAMED_ROWS), dtype=torch.int64)
        ids_BT = torch.zeros(B, T, dtype=torch.int64)
        positions_N = torch.zeros(B * T, dtype=torch.int64)
        return Batch(rows_B, ids_BT, ids_BT.clone(), positions_N, positions_N.clone())


@dataclass(frozen=True)
class FakeData:
    """`types.Data` of fake rows."""

    rows: FakeRows
    rows_per_step: int
    rows_per_micro_batch: int
    before_step: Callable[[], None] = lambda: None
    """Takes the memory in which the student writes its rows."""

    fixed = True

    def step(self, step: int) -> list[Batch]:
        self.before_step()
        rows, size = range(self.rows_per_step), self.rows_per_micro_batch  # a billion rows take no memory
        return [self.rows.batch(rows[i : i + size]) for i in range(0, len(rows), size)]

    def epoch(self, step: int) -> int:
        return 0

    def figures(self, step: int) -> dict[str, float]:
        return {}
