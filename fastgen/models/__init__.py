"""Networks by name: one literal table, and the initialisation that all of them share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastgen.models.resnet_cifar import CifarResNet

Builder = Callable[..., nn.Module]
IMAGE_CHANNELS = 3


def _cifar_resnet(depth: int) -> Builder:
    def build(**settings: Any) -> nn.Module:
        return CifarResNet(depth, **settings)

    return build


def _torchvision_resnet(name: str) -> Builder:
    def build(classes: int, in_channels: int, downsample: str) -> nn.Module:
        if in_channels != IMAGE_CHANNELS or downsample != "strided":
            raise ValueError(f"{name} takes {IMAGE_CHANNELS} channels and downsample = strided")
        # Here and not above: its import takes a second that runs on small images do without.
        import torchvision

        return torchvision.models.get_model(name, weights=None, num_classes=classes)

    return build


MODELS: dict[str, Builder] = {
    "resnet8": _cifar_resnet(8),
    "resnet20": _cifar_resnet(20),
    "resnet32": _cifar_resnet(32),
    "resnet44": _cifar_resnet(44),
    "resnet56": _cifar_resnet(56),
    "resnet74": _cifar_resnet(74),
    "resnet92": _cifar_resnet(92),
    "resnet110": _cifar_resnet(110),
    "resnet18": _torchvision_resnet("resnet18"),
    "resnet34": _torchvision_resnet("resnet34"),
    "resnet50": _torchvision_resnet("resnet50"),
}


def build_model(name: str, classes: int, in_channels: int, downsample: str) -> nn.Module:
    """A network with fp32 parameters that are not initialised yet, on the CPU, channels-last."""
    # Built without memory first, so that no constructor draws from torch's global generator.
    with torch.device("meta"):
        model = MODELS[name](classes=classes, in_channels=in_channels, downsample=downsample)
    return model.to_empty(device="cpu").to(memory_format=torch.channels_last)


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> nn.Module:
    """Draws fresh weights on the CPU from a generator of its own, the same for every device.

    Convolutions: normal with variance 2 / fan-out (He et al., ICCV 2015). Batch-norm: scale 1,
    shift 0. Linear: uniform within 1 / sqrt(fan-in), weights and bias, as PyTorch does by default.

    Raises:
        TypeError: the network holds a module with parameters of another kind.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            nn.init.uniform_(module.weight, -bound, bound, generator=generator)
            nn.init.uniform_(module.bias, -bound, bound, generator=generator)
        elif list(module.parameters(recurse=False)):
            raise TypeError(f"no initialisation is written for {type(module).__name__}")
    return model


def parameter_count(model: nn.Module) -> int:
    """Number of trained values."""
    return sum(parameter.numel() for parameter in model.parameters())
