"""DenseNet-BC for 32x32 images (Huang, Liu, van der Maaten, Weinberger, "Densely connected convolutional networks",
CVPR 2017), as arXiv 1805.05551 uses it.

Three dense blocks of n units, depth 6n + 4: every unit reads all that was made before it in its block and adds k
channels. B: a 1x1 convolution narrows what a unit reads to 4k channels. C: a transition between blocks keeps half of
the channels. The first convolution gives 2k channels.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm
from torch.utils.checkpoint import checkpoint

BLOCKS = 3
BOTTLENECK = 4
COMPRESSION = 0.5


class DenseUnit(nn.Module):
    """bn-relu-conv 1x1, bn-relu-conv 3x3 on everything before it: k new channels.

    Args:
        in_channels: of all that it reads.
        growth: k.
        memory_efficient: while it trains, the joined input and its batch-norm are not kept for the backward pass but
            computed again there (Pleiss et al., "Memory-efficient implementation of DenseNets", arXiv 1707.06990): what
            is kept of a block grows with its depth and not with the square of it. The same operators on the same
            values, so the same bits; running statistics take in a batch once.
    """

    def __init__(self, in_channels: int, growth: int, memory_efficient: bool) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, BOTTLENECK * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(BOTTLENECK * growth)
        self.conv2 = nn.Conv2d(BOTTLENECK * growth, growth, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.memory_efficient = memory_efficient

    def forward(self, before: Sequence[Tensor]) -> Tensor:
        """Tensors (N, _, H, W) of the block so far -> (N, k, H, W)."""
        again = self.memory_efficient and self.training and torch.is_grad_enabled()
        narrow = self._narrow_computed_again(before) if again else self._narrow(*before)
        return self.conv2(self.relu(self.bn2(narrow)))

    def _narrow(self, *before: Tensor) -> Tensor:
        return self.conv1(self.relu(self.bn1(torch.cat(before, 1))))

    def _narrow_computed_again(self, before: Sequence[Tensor]) -> Tensor:
        passes = itertools.count()

        def narrow(*before: Tensor) -> Tensor:
            # A compiler sees one pass, and computes again what it needs of it: it notes statistics once by itself.
            if torch.compiler.is_compiling() or next(passes) == 0:
                return self._narrow(*before)
            return self.conv1(self.relu(_without_noting(self.bn1, torch.cat(before, 1))))

        # Nothing in it draws random numbers, whose state a captured step could not ask for.
        return checkpoint(narrow, *before, use_reentrant=False, preserve_rng_state=False)


def _without_noting(norm: nn.BatchNorm2d, x_NCHW: Tensor) -> Tensor:
    """The batch-norm's output; the batch is noted in copies of its running statistics, which nobody reads."""
    if not norm.training or norm.running_mean is None or norm.running_var is None:
        return norm(x_NCHW)
    mean_C, var_C = norm.running_mean.clone(), norm.running_var.clone()
    return batch_norm(x_NCHW, mean_C, var_C, norm.weight, norm.bias, training=True, eps=norm.eps)


class DenseBlock(nn.Module):
    """Units one after the other; the output is the block's input and all that they made."""

    def __init__(self, in_channels: int, units: int, growth: int, memory_efficient: bool) -> None:
        super().__init__()
        self.units = nn.ModuleList(
            DenseUnit(in_channels + number * growth, growth, memory_efficient) for number in range(units)
        )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        made = [x_NCHW]
        for unit in self.units:
            made.append(unit(made))
        return torch.cat(made, 1)


class Transition(nn.Sequential):
    """Fewer channels, and half the plane: bn-relu-conv 1x1, average of 2x2 pixels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.pool = nn.AvgPool2d(2)


class CifarDenseNet(nn.Module):
    """The network.

    Args:
        depth: 6n + 4.
        growth: k, channels that a unit adds.
        classes: number of outputs.
        in_channels: of the images.
        memory_efficient: see `DenseUnit`.
    """

    def __init__(
        self, depth: int, growth: int, classes: int, in_channels: int = 3, memory_efficient: bool = False
    ) -> None:
        super().__init__()
        units = (depth - 4) // (2 * BLOCKS)
        if depth != 2 * BLOCKS * units + 4 or units < 1:
            raise ValueError(f"depth = {depth}: must be 6n + 4")
        channels = 2 * growth
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        stages: list[nn.Module] = []
        for number in range(BLOCKS):
            if number:
                kept = int(channels * COMPRESSION)
                stages.append(Transition(channels, kept))
                channels = kept
            stages.append(DenseBlock(channels, units, growth, memory_efficient))
            channels += units * growth
        self.stages = nn.Sequential(*stages)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, classes)."""
        out = self.relu(self.bn(self.stages(self.conv(x_NCHW))))
        return self.fc(out.mean((2, 3)))
