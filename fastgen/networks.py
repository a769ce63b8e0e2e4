"""What is known of each network by its name, before any of them is built. No torch.

`models.build_model` builds them. Besides there are all of torchvision and timm, as `torchvision/NAME` and `timm/NAME`:
of these nothing is known here but how a name must look.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from fastgen.errors import UserError

LIBRARIES = ("torchvision", "timm")
LIBRARY_NAME = re.compile(rf"({'|'.join(LIBRARIES)})/([A-Za-z0-9_]+)")


@dataclass(frozen=True)
class Traits:
    """What recipes must know of a network.

    Attributes:
        photographs: made for them: its stem halves the plane twice.
        grey: takes images of one channel.
        pooled: has `model.downsample=pooled`.
        memory_efficient: has `model.memory_efficient`.
        stride_px: side of what it reduces to a single pixel, over which batch-norms of one image have no variance;
            None: that is found out when it is tried.
    """

    photographs: bool = False
    grey: bool = True
    pooled: bool = False
    memory_efficient: bool = False
    stride_px: int | None = None


# Both halve the plane twice.
_CIFAR_RESNET = Traits(pooled=True, stride_px=4)
_CIFAR_DENSENET = Traits(memory_efficient=True, stride_px=4)
# Three channels in, and the plane halved five times.
_PHOTO_RESNET = Traits(photographs=True, grey=False, stride_px=32)

NETWORKS: dict[str, Traits] = {
    "resnet8": _CIFAR_RESNET,
    "resnet20": _CIFAR_RESNET,
    "resnet32": _CIFAR_RESNET,
    "resnet44": _CIFAR_RESNET,
    "resnet56": _CIFAR_RESNET,
    "resnet74": _CIFAR_RESNET,
    "resnet92": _CIFAR_RESNET,
    "resnet110": _CIFAR_RESNET,
    "densenet100": _CIFAR_DENSENET,
    "densenet190": _CIFAR_DENSENET,
    "resnet18": _PHOTO_RESNET,
    "resnet34": _PHOTO_RESNET,
    "resnet50": _PHOTO_RESNET,
    "se_resnet18": _PHOTO_RESNET,
}
PHOTO_MODELS = tuple(name for name, traits in NETWORKS.items() if traits.photographs)

_OF_LIBRARY = {
    # timm's builder takes any number of channels, torchvision's takes colours.
    "timm": Traits(),
    "torchvision": Traits(grey=False),
}


def traits_of(name: str) -> Traits:
    """What is known of a network; whether a library has one of this name is for `models.build_model` to find.

    Raises:
        UserError: it is neither one of ours nor LIBRARY/NAME.
    """
    if name in NETWORKS:
        return NETWORKS[name]
    library, _ = library_and_name(name)
    if library is None:
        raise UserError(
            f"model.name = {name}: there is no such network{did_you_mean(name, list(NETWORKS))}: give one of "
            f"{', '.join(NETWORKS)}, or torchvision/NAME or timm/NAME"
        )
    return _OF_LIBRARY[library]


def library_and_name(name: str) -> tuple[str, str] | tuple[None, str]:
    """`timm/resnet18` -> ("timm", "resnet18"); a network of ours -> (None, its name)."""
    found = LIBRARY_NAME.fullmatch(name)
    return (found[1], found[2]) if found else (None, name)


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """`, did you mean ...` with the nearest names, or nothing where none is near."""
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.6)
    return f", did you mean {' or '.join(near)}?" if near else ""
