"""The teacher: the generation before, frozen, in eval mode, seeing the student's own view."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx, nn

from fastgen.compiling import compiled
from fastgen.errors import UserError
from fastgen.folding import fold, fuse
from fastgen.fused_conv import LayerChoice, choose_variants
from fastgen.layout import channels_last
from fastgen.working_copy import WorkingCopy

# Prepared images (B, C, H, W) -> logits (B, classes), without gradient.
Teacher = Callable[[Tensor], Tensor]
TeacherEngine = Literal["folded", "fused", "compile", "plain"]
# How far a traced network may be from its own, beside its largest logit: roundings of folding are far smaller, and a
# trace that took the wrong way is far off.
TRACE_ERROR = 1e-2


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
    checked: bool = False,
) -> FrozenTeacher:
    """A frozen copy-free teacher with its batch-norms folded into the convolutions before them.

    The folded network equals the unfolded one in eval mode up to rounding of the weights.

    Args:
        model: with its weights loaded; it is changed and must not be used for anything else.
        device: where it runs.
        dtype: of its weights and of the images that it is given.
        engine: `folded`: plain PyTorch, which torch.compile takes as part of a step; `fused`: sums and ReLUs joined
            with the convolutions before them, by operators of cuDNN or oneDNN; `compile`: torch.compile of the folded;
            `plain`: the network as it is, in the arithmetic of a training step.
        shape: (B, C, H, W) of the images that it will be given most; `fused` tries its operators on it.
        timed: `fused`: take in each layer what is faster on a GPU; False: fused wherever it works, so that runs repeat.
        shapes: `compile`: how many shapes of batches will come.
        checked: compare the folded network with its own on two images of that shape, for networks that are not ours:
            torch.fx keeps to one way where a forward pass branches without its knowing.

    Returns:
        Function of normalised images (B, C, H, W) that gives logits (B, classes) without gradient.

    Raises:
        UserError: torch.fx cannot trace the network, or traces another one.
    """
    model.eval().requires_grad_(False)
    if engine == "plain":
        return FrozenTeacher(WorkingCopy(channels_last(model.to(device)), dtype).network, engine)
    network = _folded(model, engine)
    if checked and shape is not None:
        _require_the_same(network, model, shape, engine)
    network = channels_last(network.to(device, dtype))
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


def _folded(model: nn.Module, engine: TeacherEngine) -> fx.GraphModule:
    try:
        return fold(model)[0]
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # Tracing runs the network's own code on what are no tensors, which fails in every way.
        raise UserError(
            f"teacher.engine = {engine}: torch.fx cannot trace {type(model).__name__} ({first_line(error)}): set "
            "teacher.engine=plain"
        ) from error


@torch.no_grad()
def _require_the_same(network: nn.Module, model: nn.Module, shape: Sequence[int], engine: TeacherEngine) -> None:
    """Compares a folded network with the one that it was made of, in eval mode and fp32."""
    weight = next(model.parameters())
    images_NCHW = torch.randn((2, *shape[1:]), generator=torch.Generator().manual_seed(0)).to(weight.device)
    expected_BC, found_BC = model(images_NCHW), network(images_NCHW)
    if (found_BC - expected_BC).abs().max() > TRACE_ERROR * expected_BC.abs().max():
        raise UserError(
            f"teacher.engine = {engine}: as torch.fx traces {type(model).__name__}, it computes something else: set "
            "teacher.engine=plain"
        )


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
