"""Batch-norm whose statistics are those of the whole batch, whatever the number of processes.

torch's own on GPUs. It refuses the CPU, so there the same is done with plain operators: sums of x and of x^2's parts go
from process to process, and so do their gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def synchronise(model: nn.Module, device: torch.device) -> nn.Module:
    """Replaces every batch-norm by one that asks all processes; names and values of parameters and buffers stay.

    Args:
        model: with `nn.BatchNorm2d`; changed.
        device: where it will run.
    """
    if device.type == "cuda":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return converted
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = CpuSyncBatchNorm
    return model


class CpuSyncBatchNorm(nn.BatchNorm2d):
    """`nn.SyncBatchNorm` in plain operators, for any device; in eval mode `nn.BatchNorm2d`."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Normalises by mean and variance over the images of all processes.

        Args:
            x_NCHW: this process's part, floating point; statistics are taken in fp32 at least.
        """
        if not self.training:
            return super().forward(x_NCHW)
        x = x_NCHW.to(torch.promote_types(x_NCHW.dtype, torch.float32))
        count = _Sum.apply(torch.full((1,), float(x.numel() // x.shape[1]), dtype=x.dtype))
        mean_C = _Sum.apply(x.sum((0, 2, 3))) / count
        centred = x - mean_C[:, None, None]
        # In a second pass: the difference of two large sums would lose the digits that matter.
        variance_C = _Sum.apply(centred.square().sum((0, 2, 3))) / count
        self._note(mean_C.detach(), variance_C.detach(), count)
        scale_C = torch.rsqrt(variance_C + self.eps) * self.weight
        y = centred * scale_C[:, None, None] + self.bias[:, None, None]
        return y.to(x_NCHW.dtype)

    @torch.no_grad()
    def _note(self, mean_C: Tensor, variance_C: Tensor, count: Tensor) -> None:
        """Running statistics, as torch keeps them: with the unbiased variance."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            raise ValueError("a batch-norm without running statistics cannot be evaluated")
        self.num_batches_tracked += 1
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), share)
        unbiased_C = variance_C * (count / (count - 1))
        self.running_var.lerp_(unbiased_C.to(self.running_var.dtype), share)


class _Sum(torch.autograd.Function):
    """Sum over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        total = own.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total
