"""The student's objective beside a dense teacher: loss, gradient, hits and p_a1 in one pass.

    L = (1-lambda) CE(y, p) + lambda t^2 KL(T || P),  P = softmax(z/t), T = softmax(v/t)
    dL/dz_j = (1-lambda) (p_j - [j=y]) + lambda t (P_j - T_j)

Source: arXiv 1805.05551 v1, Eqn (4), at t = 1; the temperature is Hinton, Vinyals, Dean, 2015. The plain reference is
`losses.distill`.
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
    soften_row,
    softmax_row,
    store_gradient,
    store_row,
    unit_weight,
)


# Slices of an epoch's labels come with every alignment; each would be compiled anew in the middle of a training.
@triton.jit(do_not_specialize_on_alignment=["labels"])
def distill_kernel(
    logits,
    labels,
    teacher,
    scale,
    rows,
    gradient,
    count,
    teacher_weight,
    temperature,
    weight,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    TEACHER_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    SOFT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    """One row. SOFT: whether the temperature is another one than 1."""
    row = tl.program_id(0)
    z = load_row(logits, row, C, STRIDE, BLOCK)
    v = load_row(teacher, row, C, TEACHER_STRIDE, BLOCK)
    label = tl.load(labels + row)
    cross_entropy, z_label, p, first, log_total = cross_entropy_row(z, label, BLOCK)
    soft_z, soft_p, soft_first, soft_log_total = soften_row(z, p, first, log_total, temperature, SOFT)
    if SOFT:
        v = v / temperature
    t, t_first, t_log_total = softmax_row(v)
    # 0 ln 0 is 0: beyond C, and where the teacher's probability is 0, nothing is added.
    of_teacher = tl.where(t > 0.0, v - t_first, 0.0) - t_log_total
    of_student = tl.where(t > 0.0, soft_z - soft_first, 0.0) - soft_log_total
    divergence = tl.sum(t * (of_teacher - of_student), 0)

    loss = (1.0 - teacher_weight) * cross_entropy + teacher_weight * temperature * temperature * divergence
    g = (1.0 - teacher_weight) * minus_one_hot(p, label, BLOCK) + teacher_weight * temperature * (soft_p - t)
    store_row(rows, row, count, loss, log_total, z, label, z_label, C, BLOCK)
    store_gradient(gradient, row, g, weight, scale, C, BLOCK, HAS_SCALE)


def launch(
    logits_BC: Tensor,
    labels_B: Tensor,
    teacher_logits_BC: Tensor,
    teacher_weight: float,
    temperature: float,
    scale: Tensor | None,
    weight: float,
    rows_4B: Tensor,
    gradient_BC: Tensor,
) -> None:
    """Fills rows_4B and gradient_BC; see `distill_rows`."""
    launch_rows(
        distill_kernel,
        logits_BC,
        [labels_B, teacher_logits_BC],
        scale,
        (rows_4B, gradient_BC),
        (teacher_weight, temperature, weight),
        TEACHER_STRIDE=teacher_logits_BC.stride(0),
        SOFT=temperature != 1,
    )


@torch.library.custom_op("fastgen::distill", mutates_args=())
def distill_rows(
    logits_BC: Tensor,
    labels_B: Tensor,
    teacher_logits_BC: Tensor,
    teacher_weight: float,
    temperature: float,
    scale: Tensor | None,
    weight: float,
) -> tuple[Tensor, Tensor]:
    """The objective of every row, and its gradient.

    Args:
        logits_BC: fp16, bf16 or fp32; rows contiguous, any stride between them.
        labels_B: int64, in 0..C-1; another one makes its loss NaN.
        teacher_logits_BC: of any of those dtypes; no gradient flows into it.
        teacher_weight: lambda, in [0, 1].
        temperature: t, above 0.
        scale: fp32 (), on the device; None: 1.
        weight: gradients are multiplied by weight * scale before they are rounded.

    Returns:
        rows_4B: fp32; loss, p_a1, and whether the label ranks first and among the first five.
        gradient_BC: weight * scale * d loss_b / d logits_bc, in the logits' dtype.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    require_rows(logits_BC, labels_B, teacher_logits_BC)
    rows_4B, gradient_BC = empty_rows(logits_BC)
    launch(
        logits_BC,
        labels_B,
        teacher_logits_BC,
        teacher_weight,
        temperature,
        scale,
        weight,
        rows_4B,
        gradient_BC,
    )
    return rows_4B, gradient_BC


complete(distill_rows)


def distill(
    logits_BC: Tensor, labels_B: Tensor, teacher_logits_BC: Tensor, teacher_weight: float, temperature: float = 1.0
) -> Tensor:
    """Mean objective of the batch, fp32 (), differentiable once; see `distill_rows` and `losses.distill`."""
    rows_4B, _ = distill_rows(
        logits_BC,
        labels_B,
        teacher_logits_BC.detach(),
        teacher_weight,
        temperature,
        None,
        unit_weight(logits_BC.dtype, temperature),
    )
    return rows_4B[LOSS].mean()
