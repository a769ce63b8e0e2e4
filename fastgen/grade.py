"""What a batch's logits are worth: loss, hits, and where backpropagation begins. Plain PyTorch, or fused kernels.

Plain: backpropagation begins at the loss. Fused: one kernel has computed the gradient of the logits already, so it
begins there, and no operator is spent on the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastgen.consistency import Means
from fastgen.data.batch import Kept, Lesson, Remembered
from fastgen.losses import Loss, make_loss
from fastgen.plan import Objective
from fastgen.truncation import kept_probabilities


class Graded(NamedTuple):
    """Of a batch, or of a part of one; `torch.autograd.backward(root, gradient)` completes it.

    Attributes:
        loss_sum: (), over the samples, without gradient.
        correct: (), samples whose label ranks first.
        root: where backpropagation begins.
        gradient: what it begins with; None: 1.
    """

    loss_sum: Tensor
    correct: Tensor
    root: Tensor
    gradient: Tensor | None


# (logits (B, C), labels (B,), what the teacher says or None, what the mean loss is multiplied with or None) -> Graded
Grade = Callable[[Tensor, Tensor, Lesson | None, Tensor | None], Graded]


def make_grade(objective: Objective, *, fused: bool = False, means: Means | None = None) -> Grade:
    """Grades by a generation's objective.

    Args:
        objective: of the generation.
        fused: by the Triton kernels, which differ from plain PyTorch by rounding alone.
        means: of earlier predictions, where the objective has a consistency term.

    Raises:
        ValueError: there is no kernel for it, or means lack.
    """
    if fused and not objective.fused:
        raise ValueError(f"there is no kernel for {objective}")
    if bool(objective.consistency_weight) != (means is not None):
        raise ValueError("means belong to a consistency term, and to nothing else")
    if means is not None:
        return plain(_consistent(make_loss(objective), means))
    return _fused(objective) if fused else plain(make_loss(objective))


def _consistent(of_labels: Loss, means: Means) -> Loss:
    def loss(logits_BC: Tensor, labels_B: Tensor, lesson: Lesson | None) -> Tensor:
        if not isinstance(lesson, Remembered):
            raise TypeError("a batch does not know where the means of its predictions are")
        term = means.term(logits_BC.float().softmax(1), lesson.rows_B)
        return of_labels(logits_BC, labels_B, None) + term

    return loss


def plain(loss: Loss) -> Grade:
    """Grades by a mean loss in plain PyTorch."""

    def grade(logits_BC: Tensor, labels_B: Tensor, lesson: Lesson | None, scale: Tensor | None) -> Graded:
        mean = loss(logits_BC, labels_B, lesson)
        correct = (logits_BC.detach().argmax(1) == labels_B).sum()
        gradient = None if scale is None else scale.to(mean.dtype)
        # In fp64: compiled, a product with 1 would be the mean itself, and that output would lose its gradient.
        return Graded(mean.detach().double() * len(labels_B), correct, mean, gradient)

    return grade


def _fused(objective: Objective) -> Grade:
    from fastgen.kernels.distill import distill_rows
    from fastgen.kernels.distill_topm import distill_topm_rows
    from fastgen.kernels.rows import LOSS, TOP1
    from fastgen.kernels.tolerant import tolerant_rows

    wanted = objective.teacher_weight, objective.temperature

    def grade(logits_BC: Tensor, labels_B: Tensor, lesson: Lesson | None, scale: Tensor | None) -> Graded:
        z_BC, weight = logits_BC.detach(), 1 / len(labels_B)
        scale = None if scale is None else scale.to(torch.float32)
        if lesson is None:
            rows_4B, gradient_BC = tolerant_rows(z_BC, labels_B, objective.eta, objective.k, scale, weight)
        elif isinstance(lesson, Remembered):
            raise TypeError("there is no kernel of the consistency term")
        elif isinstance(lesson, Kept):
            p_BM = kept_probabilities(lesson.log_p_BN, z_BC.shape[1], objective.temperature)
            rows_4B, gradient_BC = distill_topm_rows(z_BC, labels_B, lesson.classes_BM, p_BM, *wanted, scale, weight)
        else:
            rows_4B, gradient_BC = distill_rows(z_BC, labels_B, lesson, *wanted, scale, weight)
        sums_4 = rows_4B.sum(1)
        return Graded(sums_4[LOSS], sums_4[TOP1], logits_BC, gradient_BC)

    return grade
