"""Ranks: the processes of one run that torchrun started. One process is a world of one, where nothing here
does anything. Of the other files `checkpoint.py` and `step.py` know that a tensor may lie in shards.

Every rank builds the whole student from the same recipe and takes its share of each step's micro-batches. All
come to the same decision (stop, best, a refused step), because it is made of numbers that are summed over
ranks or broadcast by the first, which alone writes. DDP keeps a whole student on each rank, FSDP2
(`fully_shard`; Zhao et al. 2023) a share of weights, gradients and moments. Both average gradients over
ranks, and the loop multiplies by their number.
"""

from __future__ import annotations

import contextlib
import datetime
import inspect
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from potstill.errors import RankError, UserError, one_line
from potstill.models.causal_lm import CausalLM
from potstill.models.student import Student
from potstill.types import Batch

Parallel = Literal["ddp", "fsdp"]
TIMEOUT = datetime.timedelta(minutes=30)  # for a rank that is slower; one that ended is noticed at once
CPU = torch.device("cpu")
_LONG_ACTS = itertools.count()  # every rank counts alike, so that each act has a key of its own
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    rank: int = 0
    world: int = 1
    parallel: Parallel = "ddp"
    device: torch.device = CPU

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def described(self) -> dict[str, Any]:
        """For the receipt."""
        if self.world == 1:
            return {"world": 1}
        return {"world": self.world, "parallel": self.parallel, "backend": dist.get_backend()}

    def share(self, batches: Sequence[Batch]) -> list[Batch]:
        """This rank's of a step's micro-batches, as many on each: the last may be one without labels."""
        mine = list(batches[self.rank :: self.world])
        if len(mine) * self.world < len(batches) or not mine:
            mine.append(batches[0].without_labels())
        return mine

    def parallelize(self, student: Student) -> Callable[..., Any]:
        """What to call for a forward in the place of `student`, whose weights may now lie in shards."""
        student.sum_over_ranks = self.sum
        if self.world == 1:
            student.model.sum_tied_gradients_in_place()
            return student
        if self.parallel == "ddp":
            parameters = inspect.signature(DistributedDataParallel).parameters
            is_new = "forward_sync_buffers" in parameters  # the name from PyTorch 2.13 on
            unsynced: dict[str, Any] = {"forward_sync_buffers" if is_new else "broadcast_buffers": False}
            return DistributedDataParallel(student, **unsynced)
        mesh = init_device_mesh(self.device.type, (self.world,))
        # Layers first: the call on the root takes what no other has taken.
        for layer in layers_of(student):
            fully_shard(layer, mesh=mesh)
        fully_shard(student, mesh=mesh)
        student.model.in_shards = True
        # Whatever runs first becomes the root and sets up the others. That is an evaluation, which calls
        # `measure` and not `forward`: unregistered, it would start at a layer, and the layer be the root.
        register_fsdp_forward_method(student, "measure")
        register_fsdp_forward_method(student, "expert_counts")
        register_fsdp_forward_method(student, "decode")
        return student

    def shard_teacher(self, model: CausalLM) -> None:
        """Its layers in shards; what is not of a layer stays whole on each rank."""
        if self.world > 1:
            mesh = init_device_mesh(self.device.type, (self.world,))
            for layer in layers_of(model):
                fully_shard(layer, mesh=mesh)
            model.in_shards = True

    def no_sync_before_last(
        self, forward: Callable[..., Any], is_last: bool
    ) -> contextlib.AbstractContextManager[None]:
        """DDP exchanges gradients once a step: in the backward of its last micro-batch. FSDP has no room for
        whole gradients, and reduces them in every backward.
        """
        if isinstance(forward, DistributedDataParallel) and not is_last:
            return forward.no_sync()
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def gathered(self, module: nn.Module) -> Iterator[None]:
        """Inside, every rank has every weight, as a single process has. Every rank must enter."""
        sharded = [part for part in module.modules() if isinstance(part, FSDPModule)]
        for part in sharded:
            part.unshard()
        try:
            yield
        finally:
            for part in sharded:
                part.reshard()

    def sum(self, tensor: Tensor) -> Tensor:
        """A tensor over ranks, on its device; integers exactly."""
        if self.world == 1:
            return tensor
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        return tensor

    def total(self, sums: dict[str, float]) -> dict[str, float]:
        """Over ranks, in float64."""
        if self.world == 1:
            return sums
        values = torch.tensor(list(sums.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(values)
        return dict(zip(sums, values.tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        return bool(self.total({"flag": float(flag)})["flag"])

    def broadcast(self, value: T) -> T:
        """The first rank's value, on all of them."""
        if self.world == 1:
            return value
        values = [value if self.is_first else None]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]  # type: ignore[return-value]

    def gather(self, values: Sequence[T]) -> list[T]:
        """All ranks' values, those of the first before those of the second; every rank must call it."""
        if self.world == 1:
            return list(values)
        of_ranks: list[list[T]] = [[] for _ in range(self.world)]
        dist.all_gather_object(of_ranks, list(values))
        return [value for of_rank in of_ranks for value in of_rank]

    def on_first(self, act: Callable[[], object]) -> None:
        """Done by the first while the others wait. Its UserError is raised on all, so that they end alike."""
        mistakes: tuple[str, ...] = ()
        if self.is_first:
            try:
                act()
            except UserError as error:
                if self.world == 1:
                    raise
                mistakes = error.mistakes
        if mistakes := self.broadcast(mistakes):
            raise UserError(*mistakes)

    def on_first_for_long(self, act: Callable[[], object]) -> None:
        """Done by the first, however long it takes. The others look every second whether it is done: in a collective
        they would give up after `TIMEOUT`.
        """
        if self.world == 1:
            act()
            return
        store, done = dist.distributed_c10d._get_default_store(), f"potstill/first/{next(_LONG_ACTS)}"
        if self.is_first:
            try:
                act()
            finally:
                store.set(done, "")
        else:
            while not store.check([done]):
                time.sleep(1.0)
        dist.barrier()


ALONE = Ranks()


@contextlib.contextmanager
def process_group(parallel: Parallel, device: torch.device) -> Iterator[Ranks]:
    """The ranks that torchrun started, or a world of one.

    Raises:
        UserError: another rank ended in the middle; reported by one of those that are left.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    ranks = Ranks(dist.get_rank(), world, parallel, device)
    try:
        yield ranks
        dist.barrier()  # the group is not taken down while another rank still works
    except RankError as error:
        error.is_reported = _is_first_report()
        raise
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        lost = RankError(
            f"rank {ranks.rank} of {world}: another rank has ended: {one_line(error):.200}"
            " Start the same command again with --resume: it goes on from the last checkpoint."
        )
        lost.is_reported = _is_first_report()
        raise lost from error
    finally:
        dist.destroy_process_group()


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may lie in shards. Every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_as(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, laid out as `like` is."""
    if isinstance(like, DTensor) and tensor.ndim:
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return tensor


def _is_lost(error: RuntimeError) -> bool:
    message = str(error).lower()
    return isinstance(error, dist.DistBackendError | dist.DistNetworkError) or any(
        word in message for word in ("connection closed", "connection reset", "timed out", "gloo")
    )


def _is_first_report() -> bool:
    """Whether no other rank has reported it. Where the group's store is gone: better twice than never."""
    try:
        return int(dist.distributed_c10d._get_default_store().add("potstill/lost", 1)) == 1
    except RuntimeError:
        return True


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The longest list of modules in it: a transformer's layers."""
    stacks = [list(part) for part in module.modules() if isinstance(part, nn.ModuleList)]
    return max(stacks, key=len, default=[])
