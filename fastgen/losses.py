"""The objectives in plain PyTorch: the CPU's path, and the reference that every kernel must equal.

Shapes: B rows, C classes. Softmax, ranking and sums are fp32 whatever the logits' dtype (fp64 stays
fp64). Source: Yang, Xie, Qiao, Yuille, arXiv 1805.05551 v1, Eqns (3) and (4); the AAAI 2019 version
swaps the meaning of eta and lambda. Other patriarchs name their own.

A generation has a term of the labels (`tolerant` and what may stand in its place) and, where it is taught, one of the
teacher: (1 - lambda) labels + lambda teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.data.batch import Kept, Lesson, Remembered
from fastgen.laws import confidence_for_eta, eta_for_confidence, ideal_confidence
from fastgen.plan import Objective
from fastgen.truncation import kept_probabilities

__all__ = [
    "Loss",
    "confidence_penalty",
    "distill",
    "distill_topm",
    "eta_for_confidence",
    "ideal_confidence",
    "label_smoothing",
    "make_loss",
    "rank",
    "tolerant",
    "tolerant_adaptive",
]

# (logits, labels, what the teacher says: its logits, some of its classes, or None) -> mean loss
Loss = Callable[[Tensor, Tensor, Lesson | None], Tensor]
# (logits, labels) -> mean loss
LabelTerm = Callable[[Tensor, Tensor], Tensor]


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


def tolerant_adaptive(logits_BC: Tensor, labels_B: Tensor, confidence: float, k: int, mass: float) -> Tensor:
    """The tolerant objective with a K for each sample: mean of (1-eta_i) CE_i + eta_i [p_a1 - mean(p_a2 .. p_aKi)].

    K_i is the number of first-ranked classes that together have the mass, at least 2 and at most K; eta_i is
    `eta_for_confidence` at K_i, so that all samples aim at one confidence. No gradient flows through either. What arXiv
    1805.05551 leaves to future work; the rule is this project's own.

    Args:
        logits_BC: fp16, bf16, fp32 or fp64.
        labels_B: int64.
        confidence: u, in [1/2, 1).
        k: most classes in a score difference, 2..C.
        mass: in (0, 1).

    Returns:
        Mean over the batch, fp32 (fp64 for fp64 logits).
    """
    logits_BC = _at_least_fp32(logits_BC)
    log_p_BC = logits_BC.log_softmax(dim=1)
    p_ranked_BK = log_p_BC.gather(1, rank(logits_BC, k)).exp()
    # No cumsum: on a GPU torch has none for run.deterministic.
    earlier_KK = torch.ones(k, k, dtype=torch.bool, device=logits_BC.device).tril(-1)
    before_BK = (p_ranked_BK.detach()[:, None] * earlier_KK).sum(2)
    k_B = (before_BK < mass).sum(1).clamp(min=2).to(logits_BC.dtype)
    eta_B = (k_B - 1) / ((k_B - 1) + k_B * confidence)
    others_BK = torch.arange(k, device=logits_BC.device)[None] < k_B[:, None]
    others_BK[:, 0] = False
    difference_B = p_ranked_BK[:, 0] - (p_ranked_BK * others_BK).sum(1) / (k_B - 1)
    cross_entropy_B = F.nll_loss(log_p_BC, labels_B, reduction="none")
    return ((1 - eta_B) * cross_entropy_B + eta_B * difference_B).mean()


def label_smoothing(logits_BC: Tensor, labels_B: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy to (1 - eps) onehot + eps / C (Szegedy et al., "Rethinking the Inception architecture", CVPR 2016).

    Args:
        logits_BC: fp16, bf16, fp32 or fp64.
        labels_B: int64.
        smoothing: eps, in [0, 1).

    Returns:
        Mean over the batch, fp32 (fp64 for fp64 logits).
    """
    return F.cross_entropy(_at_least_fp32(logits_BC), labels_B, label_smoothing=smoothing)


def confidence_penalty(logits_BC: Tensor, labels_B: Tensor, entropy_weight: float) -> Tensor:
    """CE(y, p) - beta H(p), H being the entropy in nats (Pereyra et al., arXiv 1701.06548, ICLR 2017 workshop).

    Args:
        logits_BC: fp16, bf16, fp32 or fp64.
        labels_B: int64.
        entropy_weight: beta, 0 or more.

    Returns:
        Mean over the batch, fp32 (fp64 for fp64 logits).
    """
    log_p_BC = _at_least_fp32(logits_BC).log_softmax(dim=1)
    entropy_B = -(log_p_BC.exp() * log_p_BC).sum(1)
    return F.nll_loss(log_p_BC, labels_B) - entropy_weight * entropy_B.mean()


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
    divergence = _divergence(logits_BC, teacher_logits_BC, temperature)
    return (1 - teacher_weight) * F.cross_entropy(logits_BC, labels_B) + teacher_weight * temperature**2 * divergence


def _divergence(logits_BC: Tensor, teacher_logits_BC: Tensor, temperature: float) -> Tensor:
    teacher_logits_BC = teacher_logits_BC.detach().to(logits_BC.dtype)
    student_log_BC = F.log_softmax(logits_BC / temperature, dim=1)
    teacher_log_BC = F.log_softmax(teacher_logits_BC / temperature, dim=1)
    return F.kl_div(student_log_BC, teacher_log_BC, reduction="batchmean", log_target=True)


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
    divergence = _divergence_topm(logits_BC, classes_BM, probabilities_BM, temperature)
    return (1 - teacher_weight) * F.cross_entropy(logits_BC, labels_B) + teacher_weight * temperature**2 * divergence


def _divergence_topm(logits_BC: Tensor, classes_BM: Tensor, probabilities_BM: Tensor, temperature: float) -> Tensor:
    kept_BM = classes_BM.long()
    target_BM = probabilities_BM.to(logits_BC.dtype)
    target_BM = target_BM / target_BM.sum(1, keepdim=True).clamp(min=1)
    residual_B = (1 - target_BM.sum(1)).clamp(min=0)
    student_log_BC = F.log_softmax(logits_BC / temperature, dim=1)
    tail_log_B = student_log_BC.scatter(1, kept_BM, -math.inf).logsumexp(1)
    outcomes_BO = torch.cat([student_log_BC.gather(1, kept_BM), tail_log_B[:, None]], 1)
    targets_BO = torch.cat([target_BM, residual_B[:, None]], 1)
    return F.kl_div(outcomes_BO, targets_BO, reduction="batchmean")


def make_loss(objective: Objective) -> Loss:
    """The function that a generation minimises."""

    weight, temperature, of_labels = objective.teacher_weight, objective.temperature, _label_term(objective)

    def loss(logits_BC: Tensor, labels_B: Tensor, lesson: Lesson | None) -> Tensor:
        logits_BC = _at_least_fp32(logits_BC)
        if lesson is None:
            return of_labels(logits_BC, labels_B)
        if isinstance(lesson, Kept):
            p_BM = kept_probabilities(lesson.log_p_BN, logits_BC.shape[1], temperature)
            divergence = _divergence_topm(logits_BC, lesson.classes_BM, p_BM, temperature)
        elif isinstance(lesson, Remembered):
            raise TypeError("of earlier predictions no teacher's term is made")
        else:
            divergence = _divergence(logits_BC, lesson, temperature)
        return (1 - weight) * of_labels(logits_BC, labels_B) + weight * temperature**2 * divergence

    return loss


def _label_term(objective: Objective) -> LabelTerm:
    if objective.smoothing:
        return lambda logits_BC, labels_B: label_smoothing(logits_BC, labels_B, objective.smoothing)
    if objective.entropy_weight:
        return lambda logits_BC, labels_B: confidence_penalty(logits_BC, labels_B, objective.entropy_weight)
    if objective.k_mass:
        confidence = confidence_for_eta(objective.eta, objective.k)
        return lambda logits_BC, labels_B: tolerant_adaptive(
            logits_BC, labels_B, confidence, objective.k, objective.k_mass
        )
    return lambda logits_BC, labels_B: tolerant(logits_BC, labels_B, objective.eta, objective.k)


def _at_least_fp32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
