"""ResNet for 32x32 images (He, Zhang, Ren, Sun, "Deep residual learning", CVPR 2016, section 4.2).

6n + 2 layers: a 3x3 convolution, three stages of n basic blocks with 16, 32 and 64 channels, mean
over the plane, one linear layer. Shortcuts are the identity, with zeros for the added channels
(option A), so they have no parameters.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Downsample = Literal["strided", "pooled"]
STAGE_CHANNELS = (16, 32, 64)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch-norm around a shortcut.

    Args:
        in_channels, out_channels: equal but for the first block of a stage.
        stride: 2 halves the plane, in the first convolution and by sub-sampling in the shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.stride = stride
        self.added_channels = out_channels - in_channels

    def forward(self, x_NCHW: Tensor) -> Tensor:
        shortcut = x_NCHW if self.stride == 1 else x_NCHW[:, :, :: self.stride, :: self.stride]
        if self.added_channels:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.added_channels))
        out = self.relu(self.bn1(self.conv1(x_NCHW)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + shortcut)


class CifarResNet(nn.Module):
    """The network.

    Args:
        depth: 6n + 2.
        classes: number of outputs.
        in_channels: of the images.
        downsample: `strided` halves the plane with the first convolution of stages 2 and 3, as the
            source does; `pooled` averages 2x2 pixels after stages 1 and 2, as arXiv 1805.05551
            words it.
    """

    def __init__(self, depth: int, classes: int, in_channels: int = 3, downsample: Downsample = "strided") -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        if depth != 6 * blocks + 2 or blocks < 1:
            raise ValueError(f"depth = {depth}: must be 6n + 2")
        self.conv1 = nn.Conv2d(in_channels, STAGE_CHANNELS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(STAGE_CHANNELS[0])
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(STAGE_CHANNELS[0], STAGE_CHANNELS[0], blocks, "none")
        self.layer2 = _stage(STAGE_CHANNELS[0], STAGE_CHANNELS[1], blocks, downsample)
        self.layer3 = _stage(STAGE_CHANNELS[1], STAGE_CHANNELS[2], blocks, downsample)
        self.fc = nn.Linear(STAGE_CHANNELS[2], classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, classes)."""
        out = self.relu(self.bn1(self.conv1(x_NCHW)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.fc(out.mean((2, 3)))


def _stage(in_channels: int, out_channels: int, blocks: int, downsample: str) -> nn.Sequential:
    stride = 2 if downsample == "strided" else 1
    first = BasicBlock(in_channels, out_channels, stride)
    rest = [BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)]
    pool = [nn.AvgPool2d(2)] if downsample == "pooled" else []
    return nn.Sequential(*pool, first, *rest)
