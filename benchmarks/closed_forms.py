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


def tolerant(z_BC: Float64, labels_B: Int64, eta: float, k: int) -> tuple[float, Float64]:
    """L = (1-eta) CE + eta S with S = sum_j w_j p_j, w = 1 at rank 1, -1/(K-1) at ranks 2..K, 0 elsewhere.

    Its gradient is g_j = (1-eta) (p_j - q_j) + eta p_j (w_j - S), for q one-hot at the label. Ranks
    are by logit; among equals the lowest class comes first.

    Returns:
        mean loss of the rows, and the mean's gradient (B, C).
    """
    rows = np.arange(len(z_BC))
    log_p_BC = _log_softmax(z_BC)
    p_BC, q_BC = np.exp(log_p_BC), _one_hot(labels_B, z_BC.shape[1])
    ranked_BC = np.argsort(-z_BC, axis=1, kind="stable")
    w_BC = np.zeros_like(z_BC)
    w_BC[rows[:, None], ranked_BC[:, 1:k]] = -1 / (k - 1)
    w_BC[rows, ranked_BC[:, 0]] = 1
    s_B = (w_BC * p_BC).sum(1)
    loss_B = -(1 - eta) * log_p_BC[rows, labels_B] + eta * s_B
    gradient_BC = (1 - eta) * (p_BC - q_BC) + eta * p_BC * (w_BC - s_B[:, None])
    return float(loss_B.mean()), gradient_BC / len(z_BC)


def distill(
    z_BC: Float64, labels_B: Int64, v_BC: Float64, teacher_weight: float, temperature: float
) -> tuple[float, Float64]:
    """L = (1-l) CE + l t^2 KL(softmax(v/t) || softmax(z/t)); g_j = (1-l) (p_j - q_j) + l t (p^t_j - v^t_j).

    Returns:
        mean loss of the rows, and the mean's gradient (B, C).
    """
    rows = np.arange(len(z_BC))
    log_p_BC, q_BC = _log_softmax(z_BC), _one_hot(labels_B, z_BC.shape[1])
    soft_student_BC, soft_teacher_BC = _log_softmax(z_BC / temperature), _log_softmax(v_BC / temperature)
    teacher_BC = np.exp(soft_teacher_BC)
    divergence_B = (teacher_BC * (soft_teacher_BC - soft_student_BC)).sum(1)
    loss_B = -(1 - teacher_weight) * log_p_BC[rows, labels_B] + teacher_weight * temperature**2 * divergence_B
    from_labels_BC = (1 - teacher_weight) * (np.exp(log_p_BC) - q_BC)
    from_teacher_BC = teacher_weight * temperature * (np.exp(soft_student_BC) - teacher_BC)
    return float(loss_B.mean()), (from_labels_BC + from_teacher_BC) / len(z_BC)


def view(image_HWC: UInt8, row: Int32, pad_px: int) -> UInt8:
    """One row (top, left, height, width, flip) of the view table, executed on one image."""
    top, left, height, width, flip = (int(value) for value in row)
    height_px, width_px, channels = image_HWC.shape
    padded = np.zeros((height_px + 2 * pad_px, width_px + 2 * pad_px, channels), np.uint8)
    padded[pad_px : pad_px + height_px, pad_px : pad_px + width_px] = image_HWC
    crop = padded[top + pad_px : top + pad_px + height, left + pad_px : left + pad_px + width]
    return crop[:, ::-1] if flip else crop


def _log_softmax(z_BC: Float64) -> Float64:
    shifted_BC = z_BC - z_BC.max(axis=1, keepdims=True)
    return shifted_BC - np.log(np.exp(shifted_BC).sum(axis=1, keepdims=True))


def _one_hot(labels_B: Int64, classes: int) -> Float64:
    return np.eye(classes)[labels_B]
