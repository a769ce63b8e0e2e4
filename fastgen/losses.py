"""The objectives in plain PyTorch: the CPU's path, and the reference that every kernel must equal.

Shapes: B rows, C classes. Softmax, ranking and sums are fp32 whatever the logits' dtype (fp64 stays
fp64). Source: Yang, Xie, Qiao, Yuille, arXiv 1805.05551 v1, Eqns (3) and (4); the AAAI 2019 version
swaps the meaning of eta and lambda.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.laws import eta_for_confidence, ideal_confidence
from fastgen.plan import Objective
from fastgen.truncation import Kept, kept_probabilities

__all__ = [
    "Loss",
    "distill",
    "distill_topm",
    "eta_for_confidence",
    "ideal_confidence",
    "make_loss",
    "rank",
    "tolerant",
]

# (logits, labels, what the teacher says: its logits, some of its classes, or None) -> mean loss
Loss = Callable[[Tensor, Tensor, Tensor | Kept | None], Tensor]


def tolerant(logits_BC: Tensor, labels_B: Tensor, eta: float, k: int) -> Tensor:
    """Objective of the tolerant patriarch: (1-eta) CE(y, p) + eta [p_a1 - mean(p_a2 .. p_aK)].

    a_1 is the class that the network ranks first, not the label.

    Args:
        logits_BC: fp16, bf16, fp32 or fp64.
        labels_B: int64.
        eta: weight of the score difference, in [0, 1]; 0 is plain cross-entropy.
        k: K, number of classes in the score difference, 2..C; not looked at where eta is 0.

    Returns:
        Mean over the batch, fp32 (fp64 for fp64 logits).
    """
    logits_BC = _at_least_fp32(logits_BC)
    log_p_BC = logits_BC.log_softmax(dim=1)
    cross_entropy = F.nll_loss(log_p_BC, labels_B)
    if eta == 0:
        return cross_entropy
    p_ranked_BK = log_p_BC.gather(1, rank(logits_BC, k)).exp()
    score_difference = p_ranked_BK[:, 0].mean() - p_ranked_BK[:, 1:].mean()
    return (1 - eta) * cross_entropy + eta * score_difference


def rank(logits_BC: Tensor, k: int) -> Tensor:
    """The K classes of each row with the largest logits, in falling order; among equals the lowest class is first.

    Args:
        logits_BC: fp32 or fp64.
        k: K, 1..C.

    Returns:
        int64 (B, K).
    """
    # Ranked on logits: where probabilities underflow to equal zeros, logits still differ.
    # torch.topk promises no order among equals, a stable sort does.
    return logits_BC.detach().sort(dim=1, descending=True, stable=True).indices[:, :k]


def distill(
    logits_BC: Tensor, labels_B: Tensor, teacher_logits_BC: Tensor, teacher_weight: float, temperature: float = 1.0
) -> Tensor:
    """Objective of a student: (1-lambda) CE(y, p) + lambda t^2 KL(teacher^(1/t) || p^(1/t)).

    At temperature t = 1 this is Eqn (4); t^2 keeps the gradient's size (Hinton, Vinyals, Dean, 2015).

    Args:
        logits_BC: fp16, bf16, fp32 or fp64.
        labels_B: int64.
        teacher_logits_BC: any of the same dtypes; no gradient flows into it.
        teacher_weight: lambda, in [0, 1].
        temperature: above 0.

    Returns:
        Mean over the batch, fp32 (fp64 for fp64 logits).
    """
    logits_BC = _at_least_fp32(logits_BC)
    teacher_logits_BC = teacher_logits_BC.detach().to(logits_BC.dtype)
    student_log_BC = F.log_softmax(logits_BC / temperature, dim=1)
    teacher_log_BC = F.log_softmax(teacher_logits_BC / temperature, dim=1)
    divergence = F.kl_div(student_log_BC, teacher_log_BC, reduction="batchmean", log_target=True)
    return (1 - teacher_weight) * F.cross_entropy(logits_BC, labels_B) + teacher_weight * temperature**2 * divergence


def distill_topm(
    logits_BC: Tensor,
    labels_B: Tensor,
    classes_BM: Tensor,
    probabilities_BM: Tensor,
    teacher_weight: float,
    temperature: float = 1.0,
) -> Tensor:
    """`distill` beside a teacher of which M classes a row are stored; the rest of its mass is one outcome.

    KL = sum_m T_m ln(T_m / P_m) + r ln(r / R): r is what the kept classes leave of the teacher, R the student's
    probability of all other classes. Where rounded probabilities add up to more than 1 they are divided by their sum.

    Args:
        logits_BC: fp16, bf16, fp32 or fp64.
        labels_B: int64.
        classes_BM: int, the kept classes, no two alike in a row; M < C.
        probabilities_BM: the teacher's, softmax at this temperature.
        teacher_weight: lambda, in [0, 1].
        temperature: t, above 0.

    Returns:
        Mean over the batch, fp32 (fp64 for fp64 logits).
    """
    logits_BC = _at_least_fp32(logits_BC)
    kept_BM = classes_BM.long()
    target_BM = probabilities_BM.to(logits_BC.dtype)
    target_BM = target_BM / target_BM.sum(1, keepdim=True).clamp(min=1)
    residual_B = (1 - target_BM.sum(1)).clamp(min=0)
    student_log_BC = F.log_softmax(logits_BC / temperature, dim=1)
    tail_log_B = student_log_BC.scatter(1, kept_BM, -math.inf).logsumexp(1)
    outcomes_BO = torch.cat([student_log_BC.gather(1, kept_BM), tail_log_B[:, None]], 1)
    targets_BO = torch.cat([target_BM, residual_B[:, None]], 1)
    divergence = F.kl_div(outcomes_BO, targets_BO, reduction="batchmean")
    return (1 - teacher_weight) * F.cross_entropy(logits_BC, labels_B) + teacher_weight * temperature**2 * divergence


def make_loss(objective: Objective) -> Loss:
    """The function that a generation minimises."""

    weight, temperature = objective.teacher_weight, objective.temperature

    def loss(logits_BC: Tensor, labels_B: Tensor, lesson: Tensor | Kept | None) -> Tensor:
        if lesson is None:
            return tolerant(logits_BC, labels_B, objective.eta, objective.k)
        if isinstance(lesson, Kept):
            p_BM = kept_probabilities(lesson.log_p_BN, logits_BC.shape[1], temperature)
            return distill_topm(logits_BC, labels_B, lesson.classes_BM, p_BM, weight, temperature)
        return distill(logits_BC, labels_B, lesson, weight, temperature)

    return loss


def _at_least_fp32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
