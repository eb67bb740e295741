"""Ranks: the processes of one run that torchrun started. One process is a world of one, where nothing here
does anything; beside this file only `checkpoint.py` sees that a tensor may lie in shards.

Every rank makes the whole student from the same recipe, takes its share of each step's micro-batches, and
comes to every decision (stop, best, a refused step) with the others: what it is made of is summed over ranks
or told by the first. The first alone writes. DDP keeps a whole student on each rank, FSDP2 (`fully_shard`;
Zhao et al. 2023) a share of weights, gradients and moments; both average gradients over ranks, of which the
loop makes a sum again.
"""

from __future__ import annotations

import contextlib
import datetime
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from potstill.errors import OfOneRank, UserError, one_line
from potstill.models.causal_lm import CausalLM
from potstill.models.student import Student
from potstill.types import Batch

Kind = Literal["ddp", "fsdp"]
PATIENCE = datetime.timedelta(minutes=30)  # for a rank that is slower; one that ended is noticed at once
CPU = torch.device("cpu")
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    rank: int = 0
    world: int = 1
    kind: Kind = "ddp"
    device: torch.device = CPU

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def described(self) -> dict[str, Any]:
        """For the receipt."""
        if self.world == 1:
            return {"world": 1}
        return {"world": self.world, "parallel": self.kind, "backend": dist.get_backend()}

    def share(self, batches: Sequence[Batch]) -> list[Batch]:
        """This rank's of a step's micro-batches, as many on each: the last may be one without labels."""
        mine = list(batches[self.rank :: self.world])
        if len(mine) * self.world < len(batches) or not mine:
            first = batches[0]
            mine.append(replace(first, positions_N=first.positions_N[:0], labels_N=first.labels_N[:0]))
        return mine

    def rows_at_once(self, micro_batch_rows: int, rows_per_step: int) -> int:
        """Rows of a micro-batch, so that every rank has one."""
        return min(micro_batch_rows, -(-rows_per_step // self.world))

    def spread(self, student: Student) -> Callable[..., Any]:
        """What to call for a step in the place of `student`, whose weights may now lie in shards."""
        if self.world == 1:
            student.model.sum_tied_gradients_in_place()
            return student
        if self.kind == "ddp":
            known = inspect.signature(DistributedDataParallel).parameters
            is_new = "forward_sync_buffers" in known  # the name from PyTorch 2.13 on
            unsynced: dict[str, Any] = {"forward_sync_buffers" if is_new else "broadcast_buffers": False}
            return DistributedDataParallel(student, **unsynced)
        mesh = init_device_mesh(self.device.type, (self.world,))
        for layer in _layers(student):
            fully_shard(layer, mesh=mesh)
        fully_shard(student, mesh=mesh)
        student.model.in_shards = True
        # The root must be the first that is run, and the first is an evaluation.
        register_fsdp_forward_method(student, "measure")
        return student

    def spread_teacher(self, model: CausalLM) -> None:
        """Its layers in shards; what is not of a layer stays whole on each rank."""
        if self.world > 1:
            mesh = init_device_mesh(self.device.type, (self.world,))
            for layer in _layers(model):
                fully_shard(layer, mesh=mesh)
            model.in_shards = True

    def until_last(self, step: Callable[..., Any], is_last: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients are exchanged once a step: in the backward of the last micro-batch."""
        if isinstance(step, DistributedDataParallel) and not is_last:
            return step.no_sync()
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def whole(self, module: nn.Module) -> Iterator[None]:
        """Inside, every weight is there as in a single process. Every rank must go in."""
        sharded = [part for part in module.modules() if isinstance(part, FSDPModule)]
        for part in sharded:
            part.unshard()
        try:
            yield
        finally:
            for part in sharded:
                part.reshard()

    def total(self, sums: dict[str, float]) -> dict[str, float]:
        """Over ranks, in float64."""
        if self.world == 1:
            return sums
        values = torch.tensor(list(sums.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(values)
        return dict(zip(sums, values.tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        return bool(self.total({"flag": float(flag)})["flag"])

    def first_says(self, value: T) -> T:
        """What the first rank has; others have theirs replaced."""
        if self.world == 1:
            return value
        told = [value if self.is_first else None]
        dist.broadcast_object_list(told, src=0, device=self.device)
        return told[0]  # type: ignore[return-value]

    def only_first(self, act: Callable[[], object]) -> None:
        """Done by the first while the others wait. Its UserError is then everyone's."""
        said: tuple[str, ...] = ()
        if self.is_first:
            try:
                act()
            except UserError as error:
                if self.world == 1:
                    raise
                said = error.mistakes
        if said := self.first_says(said):
            raise UserError(*said)


ALONE = Ranks()


@contextlib.contextmanager
def started(kind: Kind, device: torch.device) -> Iterator[Ranks]:
    """The ranks that torchrun started, or a world of one.

    Raises:
        UserError: another rank ended in the middle; told by one of those that are left.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    ranks = Ranks(dist.get_rank(), world, kind, device)
    try:
        yield ranks
        dist.barrier()
    except OfOneRank as error:
        error.is_told = _claims()
        raise
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        lost = OfOneRank(
            f"rank {ranks.rank} of {world}: another rank has ended: {one_line(error):.200}"
            " Start the same command again with --resume: it goes on from the last checkpoint."
        )
        lost.is_told = _claims()
        raise lost from error
    finally:
        dist.destroy_process_group()


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may lie in shards; every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_as(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, laid out as `like` is."""
    if isinstance(like, DTensor) and tensor.ndim:
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return tensor


def _is_lost(error: RuntimeError) -> bool:
    said = str(error).lower()
    return isinstance(error, dist.DistBackendError | dist.DistNetworkError) or any(
        word in said for word in ("connection closed", "connection reset", "timed out", "gloo")
    )


def _claims() -> bool:
    """Whether this rank is the first to say it, where ranks can still be asked."""
    try:
        return int(dist.distributed_c10d._get_default_store().add("potstill/lost", 1)) == 1
    except RuntimeError:
        return True


def _layers(module: nn.Module) -> list[nn.Module]:
    """The longest list of modules in it: a transformer's layers."""
    stacks = [list(part) for part in module.modules() if isinstance(part, nn.ModuleList)]
    return max(stacks, key=len, default=[])
