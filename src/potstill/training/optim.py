"""The optimizer, the rate as a function of the step, and the average of the weights.

What a resume must restore lies in the optimizer's state: moments, and the average beside them. Rates and the
average's decay are functions of the step, and need no saving.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Muon, Optimizer

from potstill.errors import UserError
from potstill.recipe.sections_training import TrainConfig
from potstill.training.distributed import layers_of

ROUNDING = 1e-9
"""Of a fraction of the steps; a root would show it."""
AVERAGE = "average"
"""Its name in the optimizer's state of a parameter."""


class MuonWithAdamW(Optimizer):
    """Two of PyTorch's optimizers as one, with one list of groups and one state: what sets rates, saves and restores
    need not know of it.
    """

    def __init__(self, muon: Muon, adamw: AdamW) -> None:
        self.parts = (muon, adamw)
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for part in self.parts:
            part.state, part.param_groups = self.state, [next(groups) for _ in part.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None, "each part would call it"
        for part in self.parts:
            part.step()  # type: ignore[no-untyped-call]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()


def make_optimizer(model: nn.Module, train: TrainConfig) -> Optimizer:
    """The recipe's optimizer over what is trainable, with the decay of the average in its groups.

    Raises:
        UserError: Muon, and no matrix of a layer is trained.
    """
    optimizer = _make_optimizer(model, train)
    for group in optimizer.param_groups:
        group["ema"] = train.ema
    return optimizer


def _make_optimizer(model: nn.Module, train: TrainConfig) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019) with decay for matrices and none for vectors (norms, biases).

    Muon (Jordan et al. 2024) is for the matrices of the layers alone, with AdamW for the rest: embeddings, head,
    vectors, and stacks of experts' matrices, which PyTorch's Muon does not take. Its updates have the size of
    AdamW's (Liu et al. 2025, arXiv 2502.16982), so that one learning rate serves both.

    Plain SGD is for comparing gradients: AdamW is blind to their scale.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if train.optimizer == "sgd":
        return SGD(trainable, lr=train.lr, weight_decay=train.weight_decay)
    in_layers = {id(p) for layer in layers_of(model) for p in layer.parameters() if p.ndim == 2}
    orthogonal = [p for p in trainable if train.optimizer == "muon" and id(p) in in_layers]
    rest = [p for p in trainable if train.optimizer != "muon" or id(p) not in in_layers]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = AdamW(groups, lr=train.lr, betas=(train.beta1, train.beta2), fused=True)
    if train.optimizer == "adamw":
        return adamw
    if not orthogonal:
        raise UserError(
            "train.optimizer: muon is for matrices of layers, and none is trained. Set it to adamw."
        )
    decay, adjust = train.weight_decay, "match_rms_adamw"
    muon = Muon(orthogonal, lr=train.lr, weight_decay=decay, momentum=train.momentum, adjust_lr_fn=adjust)
    return MuonWithAdamW(muon, adamw)


def moments_like(optimizer: Optimizer) -> Iterator[dict[str, Tensor]]:
    """What the optimizer keeps of each of its parameters, in their order, once it has stepped: tensors of those
    shapes and types, by name.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = {} if group["ema"] is None else {AVERAGE: parameter}
            if "betas" in group:
                yield moments | {"exp_avg": parameter, "exp_avg_sq": parameter, "step": torch.zeros(())}
            elif "ns_steps" in group:
                yield moments | {"momentum_buffer": parameter}
            else:
                yield moments


def lr_at(step: int, train: TrainConfig) -> float:
    """Linear from lr/warmup to lr over `warmup` steps, then by `train.schedule` down to lr * final_lr_ratio, which the
    last step has.
    """
    if step < train.warmup:
        return train.lr * (step + 1) / train.warmup
    after = train.num_steps - 1 - train.warmup
    progress = min((step - train.warmup) / max(after, 1), 1.0)
    floor = train.final_lr_ratio
    return train.lr * (floor + (1 - floor) * _height(progress, train))


def _height(progress: float, train: TrainConfig) -> float:
    """From 1 to 0 as `progress` goes from 0 to 1."""
    if train.schedule == "linear":
        return 1 - progress
    if train.schedule == "wsd":
        of_decay = 1 - (1 - progress) / train.decay
        return 1 - math.sqrt(of_decay) if of_decay > ROUNDING else 1.0
    return 0.5 * (1 + math.cos(math.pi * progress))


def set_lr(optimizer: Optimizer, lr: float) -> float:
    """Set the rate of every group, and return what the optimizer now says it is: that number is logged.

    Of groups that say different ones, the one that is furthest off.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    return max(rates(optimizer), key=lambda found: abs(found - lr))


def rates(optimizer: Optimizer) -> list[float]:
    """The rate of each group of parameters."""
    return [float(group["lr"]) for group in optimizer.param_groups]


@torch.no_grad()
def update_average(optimizer: Optimizer, step: int) -> None:
    """After the update of `step`, counted from 0, and before the gradients go: move the average of each parameter
    towards its value, where the recipe asks for one.

    It begins with the value after the first update, and forgets faster in the beginning: its decay is
    (1 + step) / (10 + step) until that reaches `train.ema`.
    """
    for group in optimizer.param_groups:
        if group["ema"] is None:
            continue
        decay = min(group["ema"], (1 + step) / (10 + step))
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if AVERAGE in state:
                state[AVERAGE].lerp_(parameter, 1 - decay)
            elif parameter.grad is not None:
                state[AVERAGE] = parameter.detach().clone()


@contextlib.contextmanager
def averaged(optimizer: Optimizer) -> Iterator[None]:
    """Inside, the parameters have their averages' values; those without an average, their own."""
    pairs = [(parameter, state[AVERAGE]) for parameter, state in optimizer.state.items() if AVERAGE in state]
    _swap(pairs)
    try:
        yield
    finally:
        _swap(pairs)


@torch.no_grad()
def _swap(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """In place: FSDP holds the very storage of its shards."""
    for one, other in pairs:
        kept = one.clone()
        one.copy_(other)
        other.copy_(kept)
