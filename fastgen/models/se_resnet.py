"""Squeeze-and-Excitation on ResNet-18 (Hu, Shen, Sun, "Squeeze-and-excitation networks", CVPR 2018): what arXiv
1805.05551 compares its generations with on ILSVRC2012.

torchvision's ResNet-18, under its names, with a gate before each sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

REDUCTION = 16
UNITS = (2, 2, 2, 2)


class Gate(nn.Module):
    """Weighs each channel of an image by what the means of all its channels say: Eqn (2) to (4) of the source.

    s = sigmoid(W2 relu(W1 z)), with z the means over the plane; W1 has C / 16 rows, and neither has a bias.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, channels // REDUCTION, bias=False)
        self.excite = nn.Linear(channels // REDUCTION, channels, bias=False)
        self.relu, self.sigmoid = nn.ReLU(inplace=True), nn.Sigmoid()

    def forward(self, x_NCHW: Tensor) -> Tensor:
        weight_NC = self.sigmoid(self.excite(self.relu(self.squeeze(x_NCHW.mean((2, 3))))))
        return x_NCHW * weight_NC[:, :, None, None]


class GatedBlock(nn.Module):
    """A basic block whose last batch-norm goes through a gate before it is added to the shortcut.

    Args:
        in_channels, channels, stride: as those of torchvision's blocks, which its ResNet makes.
        downsample: of the shortcut; None: the identity.
        groups, base_width, dilation, norm_layer: ResNet-18 leaves them as they are.
    """

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        if (groups, base_width, dilation) != (1, 64, 1):
            raise ValueError("a block of two 3x3 convolutions has no groups, no other width and no dilation")
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = norm_layer(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = norm_layer(channels)
        self.se = Gate(channels)
        self.downsample = downsample

    def forward(self, x_NCHW: Tensor) -> Tensor:
        shortcut = x_NCHW if self.downsample is None else self.downsample(x_NCHW)
        out = self.relu(self.bn1(self.conv1(x_NCHW)))
        return self.relu(self.se(self.bn2(self.conv2(out))) + shortcut)


def se_resnet18(classes: int) -> nn.Module:
    """The network: (N, 3, H, W) -> logits (N, classes)."""
    from torchvision.models.resnet import ResNet

    made: Any = ResNet(GatedBlock, list(UNITS), num_classes=classes)
    network: nn.Module = made
    return network
