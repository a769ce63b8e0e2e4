"""Networks of torchvision and timm by name, as their own constructors initialise them.

fastgen's rule of initialisation is written for convolutions, batch-norms and linear layers. Other networks have
parameters of many kinds (class tokens, layer scales, tables of positions) whose first values are part of their design
and stand in their constructors alone; so there they are left. Constructors draw from torch's global generator, which is
lent to them, seeded, and given back as it was: the weights depend on the seed, and on the library's version.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastgen.errors import UserError
from fastgen.extras import install_line
from fastgen.networks import did_you_mean

# What a constructor cannot do is told in these ways.
REFUSALS = (TypeError, ValueError, AssertionError, RuntimeError, NotImplementedError, KeyError)


def require_known(library: str, name: str) -> None:
    """Checks that the library is installed and has a classifier of this name.

    Raises:
        UserError: it is not, or has none.
    """
    names = _timm().list_models() if library == "timm" else _torchvision_names()
    if name not in names:
        near = did_you_mean(name, names) or f"; {library} has {len(names)}"
        raise UserError(f"model.name = {library}/{name}: {library} has no network of this name{near}")


def library_model(library: str, name: str, classes: int, in_channels: int, seed: int) -> nn.Module:
    """The network with fresh fp32 weights, on the CPU.

    Args:
        library, name: of the network.
        classes: number of outputs.
        in_channels: of the images; torchvision's networks take three.
        seed: of the weights.

    Raises:
        UserError: the library is not installed, has no such network, or cannot make it so.
    """
    require_known(library, name)
    make = _timm_maker(name, classes, in_channels) if library == "timm" else _torchvision_maker(name, classes)
    # No GPU's generator is asked for: all weights are drawn on the CPU, and `manual_seed` would seed GPUs, too.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), warnings.catch_warnings():
        # GoogLeNet's and Inception's are about how slow their first values are to draw.
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(seed)
        try:
            return make()
        except REFUSALS as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f"model.name = {library}/{name}: cannot be made for {classes} classes and {in_channels} channels: "
                f"{reason[0]}"
            ) from error


def _torchvision_names() -> list[str]:
    import torchvision

    # Of this module alone: its others are of detection, segmentation, video and quantised networks.
    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def _torchvision_maker(name: str, classes: int) -> Callable[[], nn.Module]:
    import torchvision

    return lambda: torchvision.models.get_model(name, weights=None, num_classes=classes)


def _timm_maker(name: str, classes: int, in_channels: int) -> Callable[[], nn.Module]:
    timm = _timm()
    return lambda: timm.create_model(name, pretrained=False, num_classes=classes, in_chans=in_channels)


def _timm() -> Any:
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise UserError(f"networks timm/NAME need timm, which is not installed: {install_line('timm')}") from None
    return timm
