"""The student's objective beside a stored teacher, of which each row keeps M classes and their probabilities.

What the kept classes leave, r = 1 - sum_m T_m, is one outcome of its own, "any other class", for teacher and student:

    KL = sum_m T_m ln(T_m / P_m) + r ln(r / R),  R = sum of P_j over the classes that are not kept
    L = (1-lambda) CE(y, p) + lambda t^2 KL,  P = softmax(z/t)
    dL/dz_j = (1-lambda) (p_j - [j=y]) + lambda t (P_j - T_j)          j kept
              (1-lambda) (p_j - [j=y]) + lambda t (P_j - r P_j / R)    j not kept

so that the student shapes its own tail. Probabilities were taken at the temperature t. Source: arXiv 1805.05551 v1,
Eqn (4), for the dense form; truncating a teacher without such a bucket is biased (Anshumann et al., arXiv 2503.16870).
The plain reference is `losses.distill_topm`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.rows import (
    DTYPES,
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


@triton.jit
def load_kept(classes, probabilities, row, M: tl.constexpr, BLOCK: tl.constexpr):
    """fp32 (BLOCK,): the kept probabilities at their classes; bool (BLOCK,): which are kept; and their sum."""
    cols = tl.arange(0, BLOCK)
    t = tl.zeros((BLOCK,), tl.float32)
    kept = cols < 0
    for m in range(M):
        at = cols == tl.load(classes + row.to(tl.int64) * M + m).to(tl.int32)
        t = tl.where(at, tl.load(probabilities + row.to(tl.int64) * M + m).to(tl.float32), t)
        kept = kept | at
    total = tl.sum(t, 0)
    # Rounded probabilities may add up to a little more than 1.
    excess = tl.maximum(total, 1.0)
    return t / excess, kept, total / excess


# Slices of an epoch's labels come with every alignment; each would be compiled anew in the middle of a training.
@triton.jit(do_not_specialize_on_alignment=["labels"])
def distill_topm_kernel(
    logits,
    labels,
    classes,
    probabilities,
    scale,
    rows,
    gradient,
    count,
    teacher_weight,
    temperature,
    weight,
    C: tl.constexpr,
    M: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    SOFT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    """One row. SOFT: whether the temperature is another one than 1."""
    row = tl.program_id(0)
    z = load_row(logits, row, C, STRIDE, BLOCK)
    t, kept, t_total = load_kept(classes, probabilities, row, M, BLOCK)
    label = tl.load(labels + row)
    cross_entropy, z_label, p, first, log_total = cross_entropy_row(z, label, BLOCK)
    soft_z, soft_p, soft_first, soft_log_total = soften_row(z, p, first, log_total, temperature, SOFT)
    # 0 ln 0 is 0.
    of_student = tl.where(t > 0.0, soft_z - soft_first, 0.0) - soft_log_total
    divergence = tl.sum(t * (tl.log(tl.where(t > 0.0, t, 1.0)) - of_student), 0)
    # The tail has its own maximum: as a difference to 1, or beside the kept classes, it would vanish.
    tail_p, tail_first, tail_log_total = softmax_row(tl.where(kept, float("-inf"), soft_z))
    log_tail = tail_first + tail_log_total - soft_first - soft_log_total
    residual = tl.maximum(1.0 - t_total, 0.0)
    divergence += residual * (tl.log(tl.where(residual > 0.0, residual, 1.0)) - log_tail)

    target = tl.where(kept, t, residual * tail_p)
    loss = (1.0 - teacher_weight) * cross_entropy + teacher_weight * temperature * temperature * divergence
    g = (1.0 - teacher_weight) * minus_one_hot(p, label, BLOCK)
    g += teacher_weight * temperature * (soft_p - target)
    store_row(rows, row, count, loss, log_total, z, label, z_label, C, BLOCK)
    store_gradient(gradient, row, g, weight, scale, C, BLOCK, HAS_SCALE)


def launch(
    logits_BC: Tensor,
    labels_B: Tensor,
    classes_BM: Tensor,
    probabilities_BM: Tensor,
    teacher_weight: float,
    temperature: float,
    scale: Tensor | None,
    weight: float,
    rows_4B: Tensor,
    gradient_BC: Tensor,
) -> None:
    """Fills rows_4B and gradient_BC; see `distill_topm_rows`."""
    launch_rows(
        distill_topm_kernel,
        logits_BC,
        [labels_B, classes_BM, probabilities_BM],
        scale,
        (rows_4B, gradient_BC),
        (teacher_weight, temperature, weight),
        M=classes_BM.shape[1],
        SOFT=temperature != 1,
    )


@torch.library.custom_op("fastgen::distill_topm", mutates_args=())
def distill_topm_rows(
    logits_BC: Tensor,
    labels_B: Tensor,
    classes_BM: Tensor,
    probabilities_BM: Tensor,
    teacher_weight: float,
    temperature: float,
    scale: Tensor | None,
    weight: float,
) -> tuple[Tensor, Tensor]:
    """The objective of every row, and its gradient.

    Args:
        logits_BC: fp16, bf16 or fp32; rows contiguous, any stride between them.
        labels_B: int64, in 0..C-1; another one makes its loss NaN.
        classes_BM: int16, int32 or int64, the classes that the teacher keeps, no two alike in a row; M < C.
        probabilities_BM: fp16, bf16 or fp32, the teacher's at this temperature.
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
    require_rows(logits_BC, labels_B)
    _require_kept(logits_BC, classes_BM, probabilities_BM)
    rows_4B, gradient_BC = empty_rows(logits_BC)
    launch(
        logits_BC,
        labels_B,
        classes_BM,
        probabilities_BM,
        teacher_weight,
        temperature,
        scale,
        weight,
        rows_4B,
        gradient_BC,
    )
    return rows_4B, gradient_BC


def _require_kept(logits_BC: Tensor, classes_BM: Tensor, probabilities_BM: Tensor) -> None:
    kept = classes_BM.shape[1] if classes_BM.ndim == 2 else 0
    if len(classes_BM) != len(logits_BC) or classes_BM.shape != probabilities_BM.shape:
        raise ValueError(
            f"classes {tuple(classes_BM.shape)} and probabilities {tuple(probabilities_BM.shape)} of "
            f"{len(logits_BC)} rows: give (B, M) of both"
        )
    if not 1 <= kept < logits_BC.shape[1]:
        raise ValueError(f"M = {kept} of {logits_BC.shape[1]} classes: keep fewer, or use the dense `distill_rows`")
    if not classes_BM.is_contiguous() or not probabilities_BM.is_contiguous():
        raise ValueError("the kept classes and probabilities are not contiguous")
    if classes_BM.dtype not in (torch.int16, torch.int32, torch.int64) or probabilities_BM.dtype not in DTYPES:
        raise ValueError(f"classes are {classes_BM.dtype}, probabilities {probabilities_BM.dtype}: see the docstring")


complete(distill_topm_rows)


def distill_topm(
    logits_BC: Tensor,
    labels_B: Tensor,
    classes_BM: Tensor,
    probabilities_BM: Tensor,
    teacher_weight: float,
    temperature: float = 1.0,
) -> Tensor:
    """Mean objective, fp32 (), differentiable once; see `distill_topm_rows` and `losses.distill_topm`."""
    rows_4B, _ = distill_topm_rows(
        logits_BC,
        labels_B,
        classes_BM,
        probabilities_BM,
        teacher_weight,
        temperature,
        None,
        unit_weight(logits_BC.dtype, temperature),
    )
    return rows_4B[LOSS].mean()
