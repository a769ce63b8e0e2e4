"""Networks by name: one literal table, the initialisation that all of it share, and the libraries' own networks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastgen.config import ModelSettings
from fastgen.data.facts import Facts
from fastgen.layout import channels_last
from fastgen.models.densenet_cifar import CifarDenseNet
from fastgen.models.resnet_cifar import CifarResNet
from fastgen.networks import NETWORKS, library_and_name

# (classes=, in_channels=, downsample=, memory_efficient=) -> the network
Builder = Callable[..., nn.Module]


def _cifar_resnet(depth: int) -> Builder:
    def build(classes: int, in_channels: int, downsample: Any, memory_efficient: bool) -> nn.Module:
        return CifarResNet(depth, classes, in_channels, downsample)

    return build


def _cifar_densenet(depth: int, growth: int) -> Builder:
    def build(classes: int, in_channels: int, downsample: str, memory_efficient: bool) -> nn.Module:
        return CifarDenseNet(depth, growth, classes, in_channels, memory_efficient)

    return build


def _torchvision_resnet(name: str) -> Builder:
    def build(classes: int, in_channels: int, downsample: str, memory_efficient: bool) -> nn.Module:
        # Here and not above: its import takes a second that runs on small images do without.
        import torchvision

        return torchvision.models.get_model(name, weights=None, num_classes=classes)

    return build


def _se_resnet18(classes: int, in_channels: int, downsample: str, memory_efficient: bool) -> nn.Module:
    from fastgen.models.se_resnet import se_resnet18

    return se_resnet18(classes)


MODELS: dict[str, Builder] = {
    "resnet8": _cifar_resnet(8),
    "resnet20": _cifar_resnet(20),
    "resnet32": _cifar_resnet(32),
    "resnet44": _cifar_resnet(44),
    "resnet56": _cifar_resnet(56),
    "resnet74": _cifar_resnet(74),
    "resnet92": _cifar_resnet(92),
    "resnet110": _cifar_resnet(110),
    "densenet100": _cifar_densenet(100, 12),
    "densenet190": _cifar_densenet(190, 40),
    "resnet18": _torchvision_resnet("resnet18"),
    "resnet34": _torchvision_resnet("resnet34"),
    "resnet50": _torchvision_resnet("resnet50"),
    "se_resnet18": _se_resnet18,
}


def network_of(settings: ModelSettings, facts: Facts) -> nn.Module:
    """The network that a recipe names, for weights that come from a file: see `build_model`."""
    return build_model(
        settings.name, facts.classes, facts.channels, settings.downsample, memory_efficient=settings.memory_efficient
    )


def fresh_network(settings: ModelSettings, facts: Facts, seed: int) -> nn.Module:
    """The network that a recipe names, on the CPU, channels-last, with the first weights that a seed gives.

    Those of our table by `initialise`, those of a library by its own rule: see `library`.

    Raises:
        UserError: the library is not installed, has no such network, or cannot make it.
    """
    library, name = library_and_name(settings.name)
    if library is None:
        return initialise(network_of(settings, facts), seed)
    return _of_library(library, name, facts.classes, facts.channels, seed)


def build_model(
    name: str, classes: int, in_channels: int, downsample: str = "strided", *, memory_efficient: bool = False
) -> nn.Module:
    """A network with fp32 parameters that are not initialised yet, on the CPU, channels-last.

    Args:
        name: of our table, or LIBRARY/NAME.
        classes: number of outputs.
        in_channels: of the images.
        downsample, memory_efficient: see `config.ModelSettings`.

    Raises:
        UserError: the library is not installed, has no such network, or cannot make it.
        ValueError: our network has no such form.
    """
    library, own_name = library_and_name(name)
    if library is not None:
        # Not without memory: some of its buffers are computed when it is made, and are in no file of weights.
        return _of_library(library, own_name, classes, in_channels, 0)
    traits = NETWORKS[name]
    if not traits.grey and in_channels != 3:
        raise ValueError(f"{name} takes 3 channels")
    if (downsample != "strided" and not traits.pooled) or (memory_efficient and not traits.memory_efficient):
        raise ValueError(f"{name} has no form downsample = {downsample}, memory_efficient = {memory_efficient}")
    # Built without memory first, so that no constructor draws from torch's global generator.
    with torch.device("meta"):
        model = MODELS[name](
            classes=classes, in_channels=in_channels, downsample=downsample, memory_efficient=memory_efficient
        )
    return channels_last(model.to_empty(device="cpu"))


def _of_library(library: str, name: str, classes: int, in_channels: int, seed: int) -> nn.Module:
    from fastgen.models.library import library_model

    return channels_last(library_model(library, name, classes, in_channels, seed))


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> nn.Module:
    """Draws fresh weights on the CPU from a generator of its own, the same for every device.

    Convolutions: normal with variance 2 / fan-out (He et al., ICCV 2015). Batch-norm: scale 1,
    shift 0. Linear: uniform within 1 / sqrt(fan-in), weights and bias, as PyTorch does by default.

    For the networks of our table; those of libraries have rules of their own (`fresh_network`).

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
            if module.bias is not None:
                nn.init.uniform_(module.bias, -bound, bound, generator=generator)
        elif list(module.parameters(recurse=False)):
            raise TypeError(f"no initialisation is written for {type(module).__name__}")
    return model


def parameter_count(model: nn.Module) -> int:
    """Number of trained values."""
    return sum(parameter.numel() for parameter in model.parameters())
