"""Forward pass and loss of one training step, in the precision and by the engine of the recipe."""

from __future__ import annotations

import logging
from typing import Protocol

import torch
from torch import Tensor, nn

from fastgen.augment import Normaliser, jitter_views
from fastgen.config import TrainSettings
from fastgen.crops import NO_JITTER, JitterPolicy
from fastgen.losses import Loss
from fastgen.teacher import Teacher


class Forward(Protocol):
    """The part of a step that autograd sees."""

    def __call__(self, images_NCHW: Tensor, labels_B: Tensor, jitter_B4: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """uint8 images, labels, rows of jitter -> (mean loss, detached logits)."""
        ...


# torch's own; eight shapes are few for a resolution that grows.
DEFAULT_RECOMPILE_LIMIT = 8

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_forward(
    model: nn.Module,
    loss: Loss,
    teacher: Teacher | None,
    normalise: Normaliser,
    train: TrainSettings,
    device: torch.device,
    jitter: JitterPolicy = NO_JITTER,
    shapes: int = 2,
) -> Forward:
    """The part of a step that autograd sees, from stored pixels to the loss.

    Teacher and student are given the same normalised tensor: the same view, bit for bit.

    Args:
        model: the student (or patriarch), fp32 parameters, in train mode.
        loss: what it minimises.
        teacher: gives logits for the same images; None: labels alone.
        normalise: uint8 pixels -> the dtype of the step.
        train: names precision and engine.
        device: where all of it lives.
        jitter: what rows of jitter ask for; teacher and student see the jittered image.
        shapes: how many shapes of batches will come; engine compile compiles one of each.
    """
    rotate = jitter.rotation_degrees > 0
    dtype = DTYPES[train.precision]

    def forward(images_NCHW: Tensor, labels_B: Tensor, jitter_B4: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if jitter_B4 is not None:
            images_NCHW = jitter_views(images_NCHW, jitter_B4, rotate=rotate)
        inputs_NCHW = normalise(images_NCHW)
        teacher_logits_BC = None if teacher is None else teacher(inputs_NCHW)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits_BC = model(inputs_NCHW)
        return loss(logits_BC, labels_B, teacher_logits_BC), logits_BC.detach()

    if train.engine == "compile":
        # Where CUDA's compiler is installed and no GPU is, torch warns of it on every start.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        # Past its limit of compilations torch would go on in eager mode and only log it.
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        torch._dynamo.config.recompile_limit = max(DEFAULT_RECOMPILE_LIMIT, shapes)
        # Two batch sizes at most, the full and the last one, times the resolutions: static shapes make faster code.
        return torch.compile(forward, dynamic=False)
    return forward


def make_scaler(train: TrainSettings, device: torch.device) -> torch.amp.GradScaler:
    """Gradient scaling for fp16, a no-op otherwise; with fused SGD it never waits for the device."""
    return torch.amp.GradScaler(device.type, enabled=train.precision == "fp16")
