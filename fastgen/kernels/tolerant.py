"""The tolerant patriarch's objective: loss, gradient, hits and p_a1 in one pass over the logits.

    L = (1-eta) CE(y, p) + eta S,  S = sum_j w_j p_j,  w = 1 at rank 1, -1/(K-1) at ranks 2..K, 0 elsewhere
    dL/dz_j = (1-eta) (p_j - [j=y]) + eta p_j (w_j - S)

Source: Yang, Xie, Qiao, Yuille, arXiv 1805.05551 v1, Eqn (3); the derivative follows from
dp_i/dz_j = p_i ([i=j] - p_j). Ranks are by logit, the lowest class first among equals. The plain reference is
`losses.tolerant`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.rows import (
    LOSS,
    complete,
    cross_entropy_row,
    empty_rows,
    launch_rows,
    load_row,
    minus_one_hot,
    require_rows,
    store_gradient,
    store_row,
    unit_weight,
)


# Slices of an epoch's labels come with every alignment; each would be compiled anew in the middle of a training.
@triton.jit(do_not_specialize_on_alignment=["labels"])
def tolerant_kernel(
    logits,
    labels,
    scale,
    rows,
    gradient,
    count,
    eta,
    weight,
    C: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    """One row. K = 0: cross-entropy alone."""
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    z = load_row(logits, row, C, STRIDE, BLOCK)
    label = tl.load(labels + row)
    loss, z_label, p, _, log_total = cross_entropy_row(z, label, BLOCK)
    g = minus_one_hot(p, label, BLOCK)
    if K > 0:
        w = tl.zeros((BLOCK,), tl.float32)
        left = z
        for k in range(K):
            best = tl.argmax(left, 0, tie_break_left=True)
            # Where fewer than K logits are above -inf, argmax comes back to a class that is ranked already.
            chosen = (cols == best) & (w == 0.0)
            w = tl.where(chosen, tl.where(k == 0, 1.0, -1.0 / (K - 1)), w)
            left = tl.where(chosen, float("-inf"), left)
        s = tl.sum(w * p, 0)
        loss = (1.0 - eta) * loss + eta * s
        g = (1.0 - eta) * g + eta * p * (w - s)
    store_row(rows, row, count, loss, log_total, z, label, z_label, C, BLOCK)
    store_gradient(gradient, row, g, weight, scale, C, BLOCK, HAS_SCALE)


def launch(
    logits_BC: Tensor,
    labels_B: Tensor,
    eta: float,
    k: int,
    scale: Tensor | None,
    weight: float,
    rows_4B: Tensor,
    gradient_BC: Tensor,
) -> None:
    """Fills rows_4B and gradient_BC; see `tolerant_rows`."""
    outputs, numbers = (rows_4B, gradient_BC), (eta, weight)
    launch_rows(tolerant_kernel, logits_BC, [labels_B], scale, outputs, numbers, K=k if eta else 0)


@torch.library.custom_op("fastgen::tolerant", mutates_args=())
def tolerant_rows(
    logits_BC: Tensor, labels_B: Tensor, eta: float, k: int, scale: Tensor | None, weight: float
) -> tuple[Tensor, Tensor]:
    """The objective of every row, and its gradient.

    Args:
        logits_BC: fp16, bf16 or fp32; rows contiguous, any stride between them.
        labels_B: int64, in 0..C-1; another one makes its loss NaN.
        eta: weight of the score difference, in [0, 1]; 0 is plain cross-entropy.
        k: K, 2..C; not looked at where eta is 0.
        scale: fp32 (), on the device; None: 1.
        weight: gradients are multiplied by weight * scale before they are rounded.

    Returns:
        rows_4B: fp32; loss, p_a1, and whether the label ranks first and among the first five.
        gradient_BC: weight * scale * d loss_b / d logits_bc, in the logits' dtype.

    Raises:
        ValueError: shapes, dtypes or K do not fit.
    """
    require_rows(logits_BC, labels_B)
    if eta and not 2 <= k <= logits_BC.shape[1]:
        raise ValueError(f"k = {k}: give 2 to {logits_BC.shape[1]}, the number of classes")
    rows_4B, gradient_BC = empty_rows(logits_BC)
    launch(logits_BC, labels_B, eta, k, scale, weight, rows_4B, gradient_BC)
    return rows_4B, gradient_BC


complete(tolerant_rows)


def tolerant(logits_BC: Tensor, labels_B: Tensor, eta: float, k: int) -> Tensor:
    """Mean objective of the batch, fp32 (), differentiable once; see `tolerant_rows` and `losses.tolerant`."""
    rows_4B, _ = tolerant_rows(logits_BC, labels_B, eta, k, None, unit_weight(logits_BC.dtype))
    return rows_4B[LOSS].mean()
