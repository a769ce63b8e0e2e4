"""The teacher: the generation before, frozen, in eval mode, seeing the student's own view."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

Teacher = Callable[[Tensor], Tensor]


def make_teacher(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Teacher:
    """A frozen copy-free teacher with its batch-norms folded into the convolutions before them.

    Folding and casting once takes a fifth off the teacher's cost; the folded network equals the
    unfolded one in eval mode up to rounding of the weights.

    Args:
        model: with its weights loaded; it is changed and must not be used for anything else.
        device: where it runs.
        dtype: of its weights and of the images that it is given.

    Returns:
        Function of normalised images (B, C, H, W) that gives logits (B, classes) without gradient.
    """
    model.eval().requires_grad_(False)
    fold_batchnorm(model)
    model = model.to(device, dtype).to(memory_format=torch.channels_last)

    def teach(images_NCHW: Tensor) -> Tensor:
        # Not inference_mode: its tensors may not enter the student's loss.
        with torch.no_grad():
            logits_BC: Tensor = model(images_NCHW)
        return logits_BC

    return teach


def fold_batchnorm(model: nn.Module) -> int:
    """Folds every batch-norm into the convolution whose output it takes, in place.

    The pairs are those that torchvision's and our ResNets name alike: `conv1` and `bn1` of one
    module, or neighbours in a Sequential. A batch-norm that stands before its convolution stays.

    Returns:
        Number of folded pairs.
    """
    folded = 0
    for parent in list(model.modules()):
        for conv_name, bn_name in _pairs(parent):
            conv, bn = getattr(parent, conv_name), getattr(parent, bn_name)
            setattr(parent, conv_name, fuse_conv_bn_eval(conv, bn))
            setattr(parent, bn_name, nn.Identity())
            folded += 1
    return folded


def _pairs(parent: nn.Module) -> list[tuple[str, str]]:
    children = dict(parent.named_children())
    names = list(children)
    candidates = [(name, name.replace("conv", "bn")) for name in names if name.startswith("conv")]
    if isinstance(parent, nn.Sequential):
        candidates += itertools.pairwise(names)
    return [
        (conv, bn)
        for conv, bn in candidates
        if isinstance(children.get(conv), nn.Conv2d) and isinstance(children.get(bn), nn.BatchNorm2d)
    ]
