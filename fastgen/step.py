"""Forward pass and loss of one training step, in the precision and by the engine of the recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from fastgen.augment import Normaliser, jitter_views
from fastgen.compiling import compiled
from fastgen.config import TrainSettings
from fastgen.crops import NO_JITTER, JitterPolicy
from fastgen.data.batch import Lesson
from fastgen.grade import Grade, Graded
from fastgen.lipschitz import lipschitz_term, norms_term
from fastgen.teacher import Teacher

# Images of a batch, uint8 or normalised already, and their rows of jitter or None -> what the network sees.
Prepare = Callable[[Tensor, Tensor | None], Tensor]


class Forward(Protocol):
    """The part of a step that autograd sees."""

    def __call__(
        self,
        images_NCHW: Tensor,
        labels_B: Tensor,
        jitter_B4: Tensor | None = None,
        lesson: Lesson | None = None,
        scale: Tensor | None = None,
    ) -> Graded:
        """A batch, or a part of one -> its loss, hits and where backpropagation begins.

        Args:
            images_NCHW: uint8, or normalised already.
            labels_B: int64.
            jitter_B4: what shall be done to each uint8 image.
            lesson: what the teacher says, where it was asked before; None: it is asked now, if there is one.
            scale: what the mean loss is multiplied with before backpropagation; None: 1.
        """
        ...


EngineName = Literal["eager", "compile", "graph"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_forward(
    network: nn.Module,
    grade: Grade,
    teacher: Teacher | None,
    prepare: Prepare,
    engine: EngineName = "eager",
    shapes: int = 2,
    lipschitz_weight: float = 0.0,
) -> Forward:
    """The part of a step that autograd sees, from stored pixels to the loss.

    Teacher and student are given the same normalised tensor: the same view, bit for bit.

    Args:
        network: the student (or patriarch) in the dtype of the step, in train mode; see `working_copy`.
        grade: by what it minimises.
        teacher: gives logits for the same images; None: labels alone, or logits that come with the batch.
        prepare: from `make_prepare`, in the dtype of the step.
        engine: of the recipe.
        shapes: how many shapes of batches will come; engine compile compiles one of each.
        lipschitz_weight: of `lipschitz_term`, which is counted in the loss, and its batch-norms' part differentiated;
            the rest is `lipschitz.add_weights_gradient`'s. Needs a plain grade.
    """

    def forward(
        images_NCHW: Tensor,
        labels_B: Tensor,
        jitter_B4: Tensor | None = None,
        lesson: Lesson | None = None,
        scale: Tensor | None = None,
    ) -> Graded:
        inputs_NCHW = prepare(images_NCHW, jitter_B4)
        if teacher is not None and lesson is None:
            lesson = teacher(inputs_NCHW)
        graded = grade(network(inputs_NCHW), labels_B, lesson, scale)
        return _smoothed(graded, network, lipschitz_weight, len(labels_B)) if lipschitz_weight else graded

    if engine == "compile":
        return compiled(forward, shapes)
    return forward


def _smoothed(graded: Graded, network: nn.Module, weight: float, images: int) -> Graded:
    """With the Lipschitz term. Parts of a batch are weighed by their images, so over all of them it counts once."""
    with torch.no_grad():
        whole = weight * lipschitz_term(network)
    of_norms = norms_term(network)
    root = graded.root if of_norms is None else graded.root + weight * of_norms
    return graded._replace(loss_sum=graded.loss_sum + whole.double() * images, root=root)


def make_prepare(normalise: Normaliser, jitter: JitterPolicy = NO_JITTER) -> Prepare:
    """What stands between a loader's images and the network: jitter, then normalisation.

    Args:
        normalise: pixels -> the dtype of the step.
        jitter: what rows of jitter ask for.
    """
    rotate = jitter.rotation_degrees > 0

    def prepare(images_NCHW: Tensor, jitter_B4: Tensor | None) -> Tensor:
        if images_NCHW.dtype != torch.uint8:
            return images_NCHW
        if jitter_B4 is None:
            return normalise(images_NCHW)
        return normalise(jitter_views(images_NCHW, jitter_B4, rotate=rotate))

    return prepare


def make_scaler(train: TrainSettings, device: torch.device) -> torch.amp.GradScaler:
    """Gradient scaling for fp16, a no-op otherwise; with fused SGD it never waits for the device."""
    return torch.amp.GradScaler(device.type, enabled=train.precision == "fp16")
