"""The laws of tolerance: what confidence a weight asks for, and how it rises over generations.

Pure arithmetic without torch. Notation of arXiv 1805.05551 v1: K classes enter the score
difference, eta weighs it against the cross-entropy (Eqn 3), lambda weighs the teacher (Eqn 4).
"""

from __future__ import annotations

from collections.abc import Sequence


def eta_for_confidence(confidence: float, k: int) -> float:
    """Weight of the score-difference term whose minimiser has the given top-1 confidence.

    Inverse of `confidence_for_eta` at full share: eta = (K-1) / ((K-1) + K u). Confidence 1 asks
    for no tolerance and gives 0, plain cross-entropy, although every eta <= (K-1)/(2K-1) would do.

    Args:
        confidence: u, the wanted probability of the first class, in [1/K, 1].
        k: K, the number of classes in the score difference, at least 2.

    Returns:
        eta in [0, (K-1)/K].

    Raises:
        ValueError: K or the confidence is out of its range.
    """
    if k < 2:
        raise ValueError(f"k = {k}: the score difference needs at least 2 classes")
    if not 1 / k <= confidence <= 1:
        raise ValueError(f"confidence = {confidence}: must lie in [1/k, 1] = [{1 / k:.4g}, 1]")
    if confidence == 1:
        return 0.0
    return (k - 1) / ((k - 1) + k * confidence)


def confidence_for_eta(eta: float, k: int, topk_share: float = 1.0) -> float:
    """Top-1 confidence of the minimiser of Eqn (3): u = (1-eta) / (eta (1 + s/(K-1))), at most 1.

    Args:
        eta: weight of the score difference, in [0, 1].
        k: K, at least 2.
        topk_share: s, the share of the mass beside the first class that lies in classes 2..K.
            The paper's law has s = 1; a trained network keeps some of the mass elsewhere.
    """
    if eta == 0:
        return 1.0
    return min(1.0, (1 - eta) / (eta * (1 + topk_share / (k - 1))))


def smoothed_confidence(smoothing: float, classes: int) -> float:
    """Confidence of the minimiser under label smoothing: 1 - eps (C-1)/C.

    Args:
        smoothing: eps.
        classes: C.
    """
    return 1 - smoothing * (classes - 1) / classes


def ideal_confidence(
    confidence: float, teacher_weight: float | Sequence[float], generation: int, teachers: int = 1
) -> float:
    """Confidence of the exact minimisers along the generations: f_g = 1 - lambda_g (1 - f_{g-1}).

    With one lambda this is f_g = 1 - lambda^g (1 - f_0): each student minimises Eqn (4) with
    (1-lambda) onehot + lambda teacher. It holds at temperature 1 and for a network that fits its
    training set.

    Args:
        confidence: f_0 of the patriarch.
        teacher_weight: lambda of every student, or one value for each student 1..G.
        generation: g, 0 for the patriarch.
        teachers: how many generations before it teach each student, by their mean: then f_{g-1} is the mean of theirs.
    """
    weights = teacher_weight if isinstance(teacher_weight, Sequence) else [teacher_weight] * generation
    ideals = [confidence]
    for weight in weights[:generation]:
        taught_by = ideals[-teachers:]
        ideals.append(1 - weight * (1 - sum(taught_by) / len(taught_by)))
    return ideals[-1]
