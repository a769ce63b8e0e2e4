"""The teacher: the generation before, frozen, in eval mode, seeing the student's own view."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastgen.compiling import compiled
from fastgen.folding import fold, fuse
from fastgen.fused_conv import LayerChoice, choose_variants

# Prepared images (B, C, H, W) -> logits (B, classes), without gradient.
Teacher = Callable[[Tensor], Tensor]
TeacherEngine = Literal["folded", "fused", "compile"]


@dataclass(frozen=True)
class FrozenTeacher:
    """A teacher that was made of a trained network.

    Attributes:
        network: runs it.
        engine: how.
        layers: of engine `fused`: what each convolution runs.
        members: how many networks it is the mean prediction of.
    """

    network: Teacher
    engine: TeacherEngine
    layers: tuple[LayerChoice, ...] = ()
    members: int = 1

    def __call__(self, images_NCHW: Tensor) -> Tensor:
        """Normalised images (B, C, H, W) -> logits (B, classes)."""
        # Not inference_mode: its tensors may not enter the student's loss.
        with torch.no_grad():
            return self.network(images_NCHW)

    @property
    def how(self) -> str:
        """For the record."""
        mean = f"mean of {self.members}, " if self.members > 1 else ""
        if not self.layers:
            return f"{mean}{self.engine}"
        counts = Counter(layer.variant for layer in self.layers)
        variants = ", ".join(f"{count} {variant}" for variant, count in sorted(counts.items()))
        return f"{mean}{self.engine} ({variants})"


def make_teacher(
    model: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    engine: TeacherEngine = "folded",
    *,
    shape: Sequence[int] | None = None,
    timed: bool = True,
    shapes: int = 2,
) -> FrozenTeacher:
    """A frozen copy-free teacher with its batch-norms folded into the convolutions before them.

    The folded network equals the unfolded one in eval mode up to rounding of the weights.

    Args:
        model: with its weights loaded; it is changed and must not be used for anything else.
        device: where it runs.
        dtype: of its weights and of the images that it is given.
        engine: `folded`: plain PyTorch, which torch.compile takes as part of a step; `fused`: sums and ReLUs joined
            with the convolutions before them, by operators of cuDNN or oneDNN; `compile`: torch.compile of the folded.
        shape: (B, C, H, W) of the images that it will be given most; `fused` tries its operators on it.
        timed: `fused`: take in each layer what is faster on a GPU; False: fused wherever it works, so that runs repeat.
        shapes: `compile`: how many shapes of batches will come.

    Returns:
        Function of normalised images (B, C, H, W) that gives logits (B, classes) without gradient.
    """
    model.eval().requires_grad_(False)
    network, _ = fold(model)
    network = network.to(device, dtype).to(memory_format=torch.channels_last)
    if engine == "compile":
        return FrozenTeacher(compiled(network, shapes), engine)
    if engine == "folded":
        return FrozenTeacher(network, engine)
    if shape is None:
        raise ValueError("engine fused needs the shape of a batch, to try its operators on")
    # By the clock on a GPU alone: a CPU's runs repeat bit for bit, and a choice by the clock would not.
    layers = choose_variants(fuse(network), shape, timed=timed and device.type == "cuda")
    return FrozenTeacher(network, engine, layers)


def mean_teacher(teachers: Sequence[FrozenTeacher]) -> FrozenTeacher:
    """An ensemble as one teacher: its "logits" are the logarithm of the mean softmax, as arXiv 1805.05551 ensembles.

    Args:
        teachers: one or more, by one engine; of one that one is given back.

    Returns:
        Function of normalised images that gives ln mean_m softmax(logits_m), in the dtype of the members' logits.
    """
    if len(teachers) == 1:
        return teachers[0]
    first = teachers[0]
    layers = tuple(layer for teacher in teachers for layer in teacher.layers)

    def network(images_NCHW: Tensor) -> Tensor:
        logits = [teacher.network(images_NCHW) for teacher in teachers]
        log_p = torch.stack([each.float().log_softmax(1) for each in logits])
        return (log_p.logsumexp(0) - math.log(len(teachers))).to(logits[0].dtype)

    return FrozenTeacher(network, first.engine, layers, len(teachers))
