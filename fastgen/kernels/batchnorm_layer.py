"""The kernels of `batchnorm_act` as operators of torch, and as a layer in nn.BatchNorm2d's place."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor, nn

from fastgen.kernels.batchnorm_act import (
    empty_parts,
    launch_backward,
    launch_forward,
    reduce_split,
    rows_of,
    statistics_split,
)
from fastgen.models.norm_act import batchnorm_act as reference

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def require_images(x_NCHW: Tensor, **others: Tensor | None) -> None:
    """Refuses what the kernels would read wrongly.

    Raises:
        ValueError: x is not fp16, bf16 or fp32, not dense in channels-last memory, or has a single value per channel;
            or another tensor is not like x.
    """
    if x_NCHW.ndim != 4 or x_NCHW.dtype not in DTYPES:
        raise ValueError(f"x is {tuple(x_NCHW.shape)} {x_NCHW.dtype}: give (N, C, H, W) in fp16, bf16 or fp32")
    if rows_of(x_NCHW) < 2:
        raise ValueError(f"x is {tuple(x_NCHW.shape)}: batch-norm needs two values per channel or more to train")
    for name, tensor in {"x": x_NCHW, **others}.items():
        if tensor is None:
            continue
        if tensor.shape != x_NCHW.shape or tensor.dtype != x_NCHW.dtype or tensor.device != x_NCHW.device:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, "
                f"x {tuple(x_NCHW.shape)} {x_NCHW.dtype} on {x_NCHW.device}: give both alike"
            )
        if not tensor.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(f"{name} has strides {tensor.stride()}: give dense channels-last memory")


@overload
def _dense(tensor_NCHW: Tensor) -> Tensor: ...
@overload
def _dense(tensor_NCHW: Tensor | None) -> Tensor | None: ...
def _dense(tensor_NCHW: Tensor | None) -> Tensor | None:
    """A single image in channels-last memory; all else as it is, for `require_images` to judge."""
    if tensor_NCHW is None or tensor_NCHW.ndim != 4 or len(tensor_NCHW) != 1:
        return tensor_NCHW
    # Of one image torch sees no layout in the strides: slices, pads and 1x1 convolutions give (C, H, W) in memory.
    # One copy of each that comes so, in the operators, as a compiler's strides may differ from those that are met.
    return tensor_NCHW.contiguous(memory_format=torch.channels_last)


def require_channels(x_NCHW: Tensor, **vectors: Tensor) -> None:
    """Refuses parameters and statistics that the kernels would read wrongly.

    Raises:
        ValueError: one is not contiguous fp32 (C,) on x's device.
    """
    for name, vector in vectors.items():
        fits = vector.shape == x_NCHW.shape[1:2] and vector.dtype == torch.float32 and vector.is_contiguous()
        if not fits or vector.device != x_NCHW.device:
            raise ValueError(
                f"{name} is {tuple(vector.shape)} {vector.dtype} on {vector.device}: "
                f"give contiguous fp32 ({x_NCHW.shape[1]},) on {x_NCHW.device}"
            )


RUNNING = ("running_mean_C", "running_var_C", "batches_tracked")


# torch lets no operator that changes its arguments have a derivative, so this one has none: `_Link` adds it.
@torch.library.custom_op("fastgen::batchnorm_act", mutates_args=RUNNING)
def forward_op(
    x_NCHW: Tensor,
    residual_NCHW: Tensor | None,
    weight_C: Tensor,
    bias_C: Tensor,
    running_mean_C: Tensor,
    running_var_C: Tensor,
    batches_tracked: Tensor,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """max(0, batch-norm(x) [+ residual]), and what the backward pass needs.

    Args:
        x_NCHW: fp16, bf16 or fp32, dense channels-last; a single image may have any strides.
        residual_NCHW: like x, or None.
        weight_C, bias_C: fp32.
        running_mean_C, running_var_C: fp32, changed: (1 - momentum) of the old and momentum of the new, the
            variance with divisor R - 1.
        batches_tracked: int64 (), grows by one.

    Returns:
        y_NCHW: like x.
        saved_2C: fp32; the batch's mean and 1 / sqrt(variance + eps).

    Raises:
        ValueError: shapes, dtypes or strides do not fit.
    """
    x_NCHW, residual_NCHW = _dense(x_NCHW), _dense(residual_NCHW)
    require_images(x_NCHW, residual=residual_NCHW)
    require_channels(x_NCHW, weight=weight_C, bias=bias_C, running_mean=running_mean_C, running_var=running_var_C)
    y_NCHW, saved_2C = _forward_outputs(x_NCHW)
    launch_forward(
        x_NCHW,
        residual_NCHW,
        weight_C,
        bias_C,
        running_mean_C,
        running_var_C,
        batches_tracked,
        momentum,
        eps,
        empty_parts(x_NCHW, statistics_split(x_NCHW)),
        y_NCHW,
        saved_2C,
    )
    return y_NCHW, saved_2C


@forward_op.register_fake
def _(x_NCHW: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _forward_outputs(x_NCHW)


def _empty_like(x_NCHW: Tensor) -> Tensor:
    return torch.empty_like(x_NCHW, memory_format=torch.channels_last)


def _forward_outputs(x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_like(x_NCHW), x_NCHW.new_empty((2, x_NCHW.shape[1]), dtype=torch.float32)


@torch.library.custom_op("fastgen::batchnorm_act_backward", mutates_args=())
def backward_op(
    dy_NCHW: Tensor, x_NCHW: Tensor, y_NCHW: Tensor | None, weight_C: Tensor, bias_C: Tensor, saved_2C: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `forward_op`.

    Args:
        dy_NCHW, x_NCHW: of the same dtype, dense channels-last.
        y_NCHW: the output where a residual was added, else None.
        saved_2C: as `forward_op` gave it.

    Returns:
        dx_NCHW, dresidual_NCHW (without values where y is None), dweight_C, dbias_C.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.
    """
    dy_NCHW, x_NCHW, y_NCHW = _dense(dy_NCHW), _dense(x_NCHW), _dense(y_NCHW)
    require_images(x_NCHW, dy=dy_NCHW, y=y_NCHW)
    require_channels(x_NCHW, weight=weight_C, bias=bias_C)
    dx_NCHW, dz_NCHW, dweight_C, dbias_C = _backward_outputs(x_NCHW, y_NCHW)
    launch_backward(
        dy_NCHW,
        x_NCHW,
        y_NCHW,
        weight_C,
        bias_C,
        saved_2C,
        empty_parts(x_NCHW, reduce_split(x_NCHW)),
        None if y_NCHW is None else dz_NCHW,
        dx_NCHW,
        dweight_C,
        dbias_C,
    )
    return dx_NCHW, dz_NCHW, dweight_C, dbias_C


@backward_op.register_fake
def _(
    dy_NCHW: Tensor, x_NCHW: Tensor, y_NCHW: Tensor | None, weight_C: Tensor, bias_C: Tensor, saved_2C: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _backward_outputs(x_NCHW, y_NCHW)


def _backward_outputs(x_NCHW: Tensor, y_NCHW: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dz_NCHW = x_NCHW.new_empty(0) if y_NCHW is None else _empty_like(x_NCHW)
    dweight_C, dbias_C = (x_NCHW.new_empty(x_NCHW.shape[1], dtype=torch.float32) for _ in range(2))
    return _empty_like(x_NCHW), dz_NCHW, dweight_C, dbias_C


class _Link(torch.autograd.Function):
    """The identity on y, whose backward pass is that of `forward_op`, which computed y."""

    @staticmethod
    def forward(
        x_NCHW: Tensor,
        residual_NCHW: Tensor | None,
        weight_C: Tensor,
        bias_C: Tensor,
        y_NCHW: Tensor,
        saved_2C: Tensor,
    ) -> Tensor:
        return y_NCHW.view_as(y_NCHW)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x_NCHW, residual_NCHW, weight_C, bias_C, y_NCHW, saved_2C = inputs
        ctx.has_residual = residual_NCHW is not None
        ctx.save_for_backward(x_NCHW, y_NCHW if ctx.has_residual else None, weight_C, bias_C, saved_2C)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_NCHW: Tensor) -> tuple[Tensor | None, ...]:
        # A gradient may come in any layout, after a mean over the plane with strides of 0: the one copy, if any.
        dy_NCHW = dy_NCHW.contiguous(memory_format=torch.channels_last)
        dx_NCHW, dz_NCHW, dweight_C, dbias_C = backward_op(dy_NCHW, *ctx.saved_tensors)
        return dx_NCHW, dz_NCHW if ctx.has_residual else None, dweight_C, dbias_C, None, None


def batchnorm_act(
    x_NCHW: Tensor,
    residual_NCHW: Tensor | None,
    weight_C: Tensor,
    bias_C: Tensor,
    running_mean_C: Tensor,
    running_var_C: Tensor,
    batches_tracked: Tensor,
    momentum: float,
    eps: float,
) -> Tensor:
    """y of `forward_op`, differentiable once by x, residual, weight and bias."""
    constants = [None if t is None else t.detach() for t in (x_NCHW, residual_NCHW, weight_C, bias_C)]
    y_NCHW, saved_2C = forward_op(*constants, running_mean_C, running_var_C, batches_tracked, momentum, eps)
    return _Link.apply(x_NCHW, residual_NCHW, weight_C, bias_C, y_NCHW, saved_2C)


class BatchNormAct2d(nn.BatchNorm2d):
    """Batch-norm, then the residual's addition if one is given, then ReLU.

    Parameters, buffers and their names are those of nn.BatchNorm2d. Training runs the kernels, evaluation plain torch.

    Raises:
        ValueError: no parameters, no running statistics, or no momentum (torch's cumulative average): the kernels
            are written for what networks for images use.
    """

    # None in the base class where `_require_common` refuses.
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        _require_common(self)

    @classmethod
    def sharing(cls, norm: nn.BatchNorm2d) -> BatchNormAct2d:
        """One with the very parameters and buffers of `norm`."""
        _require_common(norm)
        fused = cls(norm.num_features, norm.eps, norm.momentum, device="meta")
        fused.weight, fused.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers():
            setattr(fused, name, buffer)
        return fused.train(norm.training)

    def forward(self, x_NCHW: Tensor, residual_NCHW: Tensor | None = None) -> Tensor:
        """(N, C, H, W) dense channels-last, for N = 1 in any layout -> the same shape."""
        mean_C, var_C = self.running_mean, self.running_var
        if not self.training:
            return reference(
                x_NCHW, residual_NCHW, self.weight, self.bias, mean_C, var_C, False, self.momentum, self.eps
            )
        tracked, momentum = self.num_batches_tracked, self.momentum
        return batchnorm_act(x_NCHW, residual_NCHW, self.weight, self.bias, mean_C, var_C, tracked, momentum, self.eps)


def _require_common(norm: nn.BatchNorm2d) -> None:
    if not norm.affine or not norm.track_running_stats or norm.momentum is None:
        raise ValueError(f"{norm}: give one with affine, track_running_stats and a momentum")
