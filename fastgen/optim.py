"""Parameter groups and SGD."""

from __future__ import annotations

import torch
from torch import nn

from fastgen.config import TrainSettings


def make_optimizer(model: nn.Module, train: TrainSettings) -> torch.optim.SGD:
    """SGD in its fused form: one call for all parameters, and no wait for the host under fp16.

    Weight decay is on all parameters, as in the paper's baselines, unless
    `train.decay_norm_and_bias` is false: then on tensors of two or more dimensions alone.
    """
    parameters = list(model.parameters())
    decayed = [p for p in parameters if train.decay_norm_and_bias or p.ndim > 1]
    exempt = [p for p in parameters if not train.decay_norm_and_bias and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": train.weight_decay}]
    if exempt:
        groups.append({"params": exempt, "weight_decay": 0.0})
    optimizer = torch.optim.SGD(groups, lr=train.lr, momentum=train.momentum, nesterov=train.nesterov, fused=True)
    if train.momentum > 0:
        # torch leaves the buffers uninitialised where the first fp16 step overflows and is skipped. From
        # zeros the first step is the same: momentum * 0 + gradient.
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
