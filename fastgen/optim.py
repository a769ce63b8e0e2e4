"""Parameter groups and SGD."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

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


def set_lr(optimizer: torch.optim.Optimizer, lr: float | Tensor) -> None:
    """Sets the learning rate of every group: a number, or an fp32 tensor () on the device."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its state, for a checkpoint: learning rates as numbers, wherever they are kept."""
    state = optimizer.state_dict()
    groups = [group | {"lr": float(group["lr"])} for group in state["param_groups"]]
    return {**state, "param_groups": groups}
