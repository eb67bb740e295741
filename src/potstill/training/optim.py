"""AdamW in two groups, and the rate as a function of the step: nothing that a resume must restore."""

from __future__ import annotations

import math

import torch
from torch import nn

from potstill.recipe.sections_training import TrainConfig


def make_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) with decay for matrices and none for vectors (norms, biases).

    Plain SGD is for comparing gradients: AdamW is blind to their scale.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if train.optimizer == "sgd":
        return torch.optim.SGD(trainable, lr=train.lr, weight_decay=train.weight_decay)
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=train.lr, betas=(train.beta1, train.beta2), fused=True)


def lr_at(step: int, train: TrainConfig) -> float:
    """Linear from lr/warmup to lr over `warmup` steps, then a half cosine down to lr * final_lr_ratio."""
    if step < train.warmup:
        return train.lr * (step + 1) / train.warmup
    progress = (step - train.warmup) / max(train.num_steps - 1 - train.warmup, 1)
    floor = train.final_lr_ratio
    return train.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> float:
    """Set the rate of every group, and return what the optimizer now says it is: that number is logged.

    Of groups that say different ones, the one that is furthest off.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    return max(rates(optimizer), key=lambda found: abs(found - lr))


def rates(optimizer: torch.optim.Optimizer) -> list[float]:
    """The rate of each group of parameters."""
    return [float(group["lr"]) for group in optimizer.param_groups]
