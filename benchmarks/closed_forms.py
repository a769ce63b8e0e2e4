"""The objectives, their gradients and the views again, in numpy, straight from the formulas.

An independent second writing, to measure the first one by: nothing of fastgen is in it. Everything
is fp64 and closed form, no automatic differentiation. Shapes: B rows, C classes, N images.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
UInt8 = npt.NDArray[np.uint8]


def tolerant(z_BC: Float64, labels_B: Int64, eta: float, k: int) -> tuple[Float64, Float64]:
    """L = (1-eta) CE + eta S with S = sum_j w_j p_j, w = 1 at rank 1, -1/(K-1) at ranks 2..K, 0 elsewhere.

    Its gradient is g_j = (1-eta) (p_j - q_j) + eta p_j (w_j - S), for q one-hot at the label. Ranks
    are by logit; among equals the lowest class comes first.

    Returns:
        loss of each row (B,), and its gradient (B, C).
    """
    rows = np.arange(len(z_BC))
    log_p_BC = log_softmax(z_BC)
    p_BC, q_BC = np.exp(log_p_BC), _one_hot(labels_B, z_BC.shape[1])
    ranked_BC = np.argsort(-z_BC, axis=1, kind="stable")
    w_BC = np.zeros_like(z_BC)
    if eta:
        w_BC[rows[:, None], ranked_BC[:, 1:k]] = -1 / (k - 1)
        w_BC[rows, ranked_BC[:, 0]] = 1
    s_B = (w_BC * p_BC).sum(1)
    loss_B = -(1 - eta) * log_p_BC[rows, labels_B] + eta * s_B
    return loss_B, (1 - eta) * (p_BC - q_BC) + eta * p_BC * (w_BC - s_B[:, None])


def distill(
    z_BC: Float64, labels_B: Int64, v_BC: Float64, teacher_weight: float, temperature: float
) -> tuple[Float64, Float64]:
    """L = (1-l) CE + l t^2 KL(softmax(v/t) || softmax(z/t)); g_j = (1-l) (p_j - q_j) + l t (p^t_j - v^t_j).

    Returns:
        loss of each row (B,), and its gradient (B, C).
    """
    rows = np.arange(len(z_BC))
    log_p_BC, q_BC = log_softmax(z_BC), _one_hot(labels_B, z_BC.shape[1])
    soft_student_BC, soft_teacher_BC = log_softmax(z_BC / temperature), log_softmax(v_BC / temperature)
    teacher_BC = np.exp(soft_teacher_BC)
    divergence_B = (teacher_BC * (soft_teacher_BC - soft_student_BC)).sum(1)
    loss_B = -(1 - teacher_weight) * log_p_BC[rows, labels_B] + teacher_weight * temperature**2 * divergence_B
    from_labels_BC = (1 - teacher_weight) * (np.exp(log_p_BC) - q_BC)
    return loss_B, from_labels_BC + teacher_weight * temperature * (np.exp(soft_student_BC) - teacher_BC)


def distill_topm(
    z_BC: Float64, labels_B: Int64, kept_BM: Int64, t_BM: Float64, teacher_weight: float, temperature: float
) -> tuple[Float64, Float64]:
    """As `distill`, with KL = sum_m t_m ln(t_m / P_m) + r ln(r / R), r = 1 - sum t, R = sum of P over the rest.

    Of a class that is not kept the gradient is l t (P_j - r P_j / R). Rounded t that add up to more than 1 are divided
    by their sum.

    Returns:
        loss of each row (B,), and its gradient (B, C).
    """
    rows = np.arange(len(z_BC))
    log_p_BC, log_soft_BC = log_softmax(z_BC), log_softmax(z_BC / temperature)
    t_BM = t_BM / np.maximum(t_BM.sum(1, keepdims=True), 1)
    r_B = np.maximum(1 - t_BM.sum(1), 0)
    rest_BC = np.ones_like(z_BC, bool)
    rest_BC[rows[:, None], kept_BM] = False
    # ln R by itself, from its own maximum: R may be smaller than any number.
    tail_BC = np.where(rest_BC, log_soft_BC, -np.inf)
    log_tail_B = tail_BC.max(1) + np.log(np.exp(tail_BC - tail_BC.max(1, keepdims=True)).sum(1))
    log_kept_BM = log_soft_BC[rows[:, None], kept_BM]
    ratio_BM = np.log(np.where(t_BM > 0, t_BM, 1)) - log_kept_BM
    divergence_B = (t_BM * ratio_BM).sum(1) + r_B * (np.log(np.where(r_B > 0, r_B, 1)) - log_tail_B)
    target_BC = np.where(rest_BC, r_B[:, None] * np.exp(tail_BC - log_tail_B[:, None]), 0)
    target_BC[rows[:, None], kept_BM] = t_BM
    loss_B = -(1 - teacher_weight) * log_p_BC[rows, labels_B] + teacher_weight * temperature**2 * divergence_B
    from_labels_BC = (1 - teacher_weight) * (np.exp(log_p_BC) - _one_hot(labels_B, z_BC.shape[1]))
    return loss_B, from_labels_BC + teacher_weight * temperature * (np.exp(log_soft_BC) - target_BC)


def rank_of_label(z_BC: Float64, labels_B: Int64) -> Int64:
    """How many classes stand before the label; among equal logits the lower class does."""
    order_BC = np.argsort(-z_BC, axis=1, kind="stable")
    return (order_BC == labels_B[:, None]).argmax(1).astype(np.int64)


def view(image_HWC: UInt8, row: Int32, pad_px: int) -> UInt8:
    """One row (top, left, height, width, flip) of the view table, executed on one image."""
    top, left, height, width, flip = (int(value) for value in row)
    height_px, width_px, channels = image_HWC.shape
    padded = np.zeros((height_px + 2 * pad_px, width_px + 2 * pad_px, channels), np.uint8)
    padded[pad_px : pad_px + height_px, pad_px : pad_px + width_px] = image_HWC
    crop = padded[top + pad_px : top + pad_px + height, left + pad_px : left + pad_px + width]
    return crop[:, ::-1] if flip else crop


def log_softmax(z_BC: Float64) -> Float64:
    """Logarithms of the rows' softmax."""
    shifted_BC = z_BC - z_BC.max(axis=1, keepdims=True)
    return shifted_BC - np.log(np.exp(shifted_BC).sum(axis=1, keepdims=True))


def _one_hot(labels_B: Int64, classes: int) -> Float64:
    return np.eye(classes)[labels_B]
