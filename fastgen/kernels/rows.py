"""What the loss kernels share: one program a row of logits, which it keeps in registers.

Everything is fp32 from the load on. A row beyond C classes is -inf, which is probability 0 and ranks last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from fastgen.kernels.runtime import launched_on

# The rows of `rows_4B`.
LOSS, CONFIDENCE, TOP1, TOP5 = range(4)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def load_row(logits, row, C: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    """fp32 (BLOCK,): a row of logits. C and the stride are constants, or loads are not 128 bits wide."""
    cols = tl.arange(0, BLOCK)
    return tl.load(logits + row.to(tl.int64) * STRIDE + cols, mask=cols < C, other=float("-inf")).to(tl.float32)


@triton.jit
def softmax_row(z):
    """Probabilities, the largest value and ln(sum of exp of the differences to it)."""
    first = tl.max(z, 0)
    e = tl.exp(z - first)
    total = tl.sum(e, 0)
    return e / total, first, tl.log(total)


@triton.jit
def at_index(values, index, BLOCK: tl.constexpr):
    """values[index]."""
    return tl.sum(tl.where(tl.arange(0, BLOCK) == index, values, 0.0), 0)


@triton.jit
def rank_of(z, label, z_label, BLOCK: tl.constexpr):
    """How many classes stand before the label; among equals the lower class does."""
    cols = tl.arange(0, BLOCK)
    before = (z > z_label) | ((z == z_label) & (cols < label))
    return tl.sum(before.to(tl.int32), 0)


@triton.jit
def cross_entropy_row(z, label, BLOCK: tl.constexpr):
    """-ln p at the label, the logit there, and what `softmax_row` gives."""
    p, first, log_total = softmax_row(z)
    z_label = at_index(z, label, BLOCK)
    return log_total - (z_label - first), z_label, p, first, log_total


@triton.jit
def minus_one_hot(p, label, BLOCK: tl.constexpr):
    """The gradient of -ln p at the label."""
    return p - (tl.arange(0, BLOCK) == label).to(tl.float32)


@triton.jit
def soften_row(z, p, first, log_total, temperature, SOFT: tl.constexpr):
    """z / temperature and its softmax, as `softmax_row` gives it; without SOFT what is known already."""
    if SOFT:
        z = z / temperature
        p, first, log_total = softmax_row(z)
    return z, p, first, log_total


@triton.jit
def store_row(rows, row, count, loss, log_total, z, label, z_label, C: tl.constexpr, BLOCK: tl.constexpr):
    """Writes loss, p_a1, top-1 hit and top-5 hit of a row into rows_4B; a label that is no class makes the loss NaN."""
    rank = rank_of(z, label, z_label, BLOCK)
    tl.store(rows + row, tl.where((label >= 0) & (label < C), loss, float("nan")))
    tl.store(rows + count + row, tl.exp(-log_total))
    tl.store(rows + 2 * count + row, (rank < 1).to(tl.float32))
    tl.store(rows + 3 * count + row, (rank < 5).to(tl.float32))


@triton.jit
def store_gradient(gradient, row, g, weight, scale, C: tl.constexpr, BLOCK: tl.constexpr, HAS_SCALE: tl.constexpr):
    """Writes a row of the gradient, times a number and times one that only the device knows, in its dtype."""
    cols = tl.arange(0, BLOCK)
    if HAS_SCALE:
        weight = weight * tl.load(scale)
    tl.store(gradient + row.to(tl.int64) * C + cols, (g * weight).to(gradient.dtype.element_ty), mask=cols < C)


def launch_rows(
    kernel: Any,
    logits_BC: Tensor,
    inputs: Sequence[Tensor],
    scale: Tensor | None,
    outputs: tuple[Tensor, Tensor],
    numbers: Sequence[float],
    **constants: int,
) -> None:
    """Launches a loss kernel: a program for each row.

    Args:
        kernel: (logits, *inputs, scale, rows, gradient, count, *numbers, constants that all of them have and its own).
        logits_BC: see the operators.
        inputs: labels, and what else the kernel reads.
        scale: fp32 (), or None.
        outputs: rows_4B and gradient_BC, which are filled.
        numbers: the objective's, and the gradient's weight.
        constants: the kernel's own.
    """
    count, classes = logits_BC.shape
    if count == 0:
        return
    with launched_on(logits_BC):
        kernel[(count,)](
            logits_BC,
            *inputs,
            scale,
            *outputs,
            count,
            *numbers,
            C=classes,
            STRIDE=logits_BC.stride(0),
            BLOCK=block_of(classes),
            HAS_SCALE=scale is not None,
            num_warps=warps_of(classes),
            **constants,
        )


def unit_weight(dtype: torch.dtype, temperature: float = 1.0) -> float:
    """Weight under which gradients of single rows are stored for autograd: a power of two, which is exact.

    They lie in [-t, t] for a temperature t above 1, and fp16 loses what is below 2^-24 or above 2^16.
    """
    if dtype != torch.float16:
        return 1.0
    return 2.0 ** (12 - max(0, math.ceil(math.log2(temperature))))


def block_of(classes: int) -> int:
    """Elements that a program holds."""
    return triton.next_power_of_2(classes)


def warps_of(classes: int) -> int:
    """A warp holds 512 classes, 16 values a lane.

    Of what was compiled for sm_90, two warps at C = 1000 issue a fifth fewer instructions than four, and one needs so
    many registers that it spills (benchmarks/NOTES.md). Times on a GPU are not measured yet.
    """
    return max(1, min(8, block_of(classes) // 512))


def require_rows(logits_BC: Tensor, labels_B: Tensor, teacher_logits_BC: Tensor | None = None) -> None:
    """Refuses what the kernels would read wrongly.

    Raises:
        ValueError: shapes, dtypes or strides are not those that the docstrings promise.
    """
    if logits_BC.ndim != 2 or labels_B.shape != logits_BC.shape[:1] or labels_B.dtype != torch.int64:
        raise ValueError(
            f"logits {tuple(logits_BC.shape)} and labels {tuple(labels_B.shape)} {labels_B.dtype}: "
            "give (B, C) and int64 (B,)"
        )
    for name, tensor in (("logits", logits_BC), ("the teacher's logits", teacher_logits_BC)):
        if tensor is None:
            continue
        if tensor.shape != logits_BC.shape or tensor.device != logits_BC.device:
            raise ValueError(f"{name} are {tuple(tensor.shape)} on {tensor.device}: give both alike")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} are {tensor.dtype}: give fp16, bf16 or fp32")
        if tensor.stride(1) != 1:
            raise ValueError(f"{name} have stride {tensor.stride(1)} between classes: give rows that are contiguous")


def empty_rows(logits_BC: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of a loss kernel: rows_4B fp32, gradient_BC dense in the logits' dtype."""
    rows_4B = logits_BC.new_empty((4, logits_BC.shape[0]), dtype=torch.float32)
    return rows_4B, torch.empty_like(logits_BC, memory_format=torch.contiguous_format)


# An operator without a derivative of its own: differentiating twice raises instead of being wrong.
@torch.library.custom_op("fastgen::scale_rows", mutates_args=())
def scale_rows(gradient_BC: Tensor, factor_B: Tensor, weight: float) -> Tensor:
    """gradient_BC[b] * factor_B[b] * weight, computed in fp32, in the gradient's dtype."""
    return (gradient_BC.float() * (factor_B * weight)[:, None]).to(gradient_BC.dtype)


@scale_rows.register_fake
def _(gradient_BC: Tensor, factor_B: Tensor, weight: float) -> Tensor:
    return torch.empty_like(gradient_BC)


def complete(op: CustomOpDef) -> None:
    """Tells torch of a loss operator's shapes, and that its gradient_BC is the derivative of rows_4B[LOSS].

    Args:
        op: (logits_BC, ..., scale, weight) -> (rows_4B, gradient_BC). The other rows are numbers to look at: no
            gradient flows from them.
    """

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *_, ctx.scale, ctx.weight = inputs
        ctx.others = len(inputs) - 1
        ctx.save_for_backward(output[1])

    def backward(ctx: Any, grad_rows_4B: Tensor, grad_gradient_BC: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.scale is not None:
            raise RuntimeError("a scaled gradient is handed to torch.autograd.backward, not differentiated")
        (gradient_BC,) = ctx.saved_tensors
        factor_B = grad_rows_4B[LOSS].contiguous()
        return scale_rows(gradient_BC, factor_B, 1 / ctx.weight), *(ctx.others * [None])

    op.register_fake(lambda logits_BC, *others: empty_rows(logits_BC))
    op.register_autograd(backward, setup_context=keep)
