"""Convolution, sum and ReLU as one module, and which operator of this machine each of them runs.

Shapes: N images, C channels, H rows, W columns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, fx, nn

Variant = Literal["plain", "cudnn", "onednn"]

TIMED_ROUNDS, CALLS_A_ROUND = 9, 5
# Far above any rounding (three of bf16 are 2^-7 of the largest value), far below a wrong result.
WRONG = 2.0**-5


class FusedConv(nn.Module):
    """relu(conv(x)) or relu(conv(x) + residual), by PyTorch's three operators or by one fused one.

    Channels-last in, channels-last out, in the convolution's device and dtype; no gradients.

    Found on one CPU with AVX-512 (torch 2.14): in fp32 oneDNN's fused 3x3 convolutions give the bits of the plain
    operators, and 1x1 ones over 256 channels and more sum in another order. In bf16 those without a residual
    give the same bits; those with one round once where the plain operators round twice.

    Attributes:
        conv: the convolution, with the batch-norm folded in.
        variant: what runs: `plain`; `cudnn`: torch.cudnn_convolution_relu and _add_relu; `onednn`:
            torch.ops.mkldnn._convolution_pointwise, with weights reordered once.
        may_overwrite: nothing reads the residual afterwards, so `onednn` adds into its memory, which saves
            a pass over it.
    """

    def __init__(self, conv: nn.Conv2d, may_overwrite: bool = False) -> None:
        super().__init__()
        if isinstance(conv.padding, str):
            raise TypeError(f"FusedConv: padding = {conv.padding}: must be numbers")
        self.conv = conv
        self.padding = conv.padding
        self.may_overwrite = may_overwrite
        self.variant: Variant = "plain"
        self._packed_weight: Tensor | None = None

    def use(self, variant: Variant) -> None:
        """Sets the variant; the weights have to be where and what they will stay."""
        conv = self.conv
        self.variant = variant
        # Opaque to all but oneDNN: neither parameter nor buffer, and not to be copied, moved or cast.
        self._packed_weight = None
        if variant == "onednn":
            self._packed_weight = torch.ops.mkldnn._reorder_convolution_weight(
                conv.weight.detach(), self.padding, conv.stride, conv.dilation, conv.groups
            )

    def forward(self, x_NCHW: Tensor, residual_NCHW: Tensor | None = None) -> Tensor:
        """(N, C, H, W) and the shape of the result, if any -> the result."""
        if self.variant == "cudnn":
            return self._cudnn(x_NCHW, residual_NCHW)
        if self.variant == "onednn":
            return self._onednn(x_NCHW, residual_NCHW)
        return self._plain(x_NCHW, residual_NCHW)

    def _plain(self, x_NCHW: Tensor, residual_NCHW: Tensor | None) -> Tensor:
        out: Tensor = self.conv(x_NCHW)
        if residual_NCHW is not None:
            # Only what has the result's shape can be added in place.
            out = out.add_(residual_NCHW) if residual_NCHW.shape == out.shape else out + residual_NCHW
        return out.relu_()

    def _cudnn(self, x_NCHW: Tensor, residual_NCHW: Tensor | None) -> Tensor:
        conv = self.conv
        geometry = (conv.stride, self.padding, conv.dilation, conv.groups)
        if residual_NCHW is None:
            return torch.cudnn_convolution_relu(x_NCHW, conv.weight, conv.bias, *geometry)
        return torch.cudnn_convolution_add_relu(x_NCHW, conv.weight, residual_NCHW, 1.0, conv.bias, *geometry)

    def _onednn(self, x_NCHW: Tensor, residual_NCHW: Tensor | None) -> Tensor:
        conv, weight = self.conv, self._packed_weight
        geometry = (conv.bias, self.padding, conv.stride, conv.dilation, conv.groups)
        mkldnn = torch.ops.mkldnn
        out: Tensor
        if residual_NCHW is None:
            out = mkldnn._convolution_pointwise(x_NCHW, weight, *geometry, "relu", [], "")
        elif self.may_overwrite:
            out = mkldnn._convolution_pointwise_(residual_NCHW, x_NCHW, weight, *geometry, "add", 1.0, "relu", [], None)
        else:
            out = mkldnn._convolution_pointwise(x_NCHW, residual_NCHW, weight, *geometry, "add", 1.0, "relu", [], None)
        return out


@dataclass(frozen=True)
class LayerChoice:
    """What one FusedConv runs, and why.

    Attributes:
        layer: its name in the network.
        variant: what it runs.
        fused_ms, plain_ms: median time of one call; None where it was not timed.
        why: `timed`, `not timed`, or what speaks against the fused operator.
    """

    layer: str
    variant: Variant
    fused_ms: float | None
    plain_ms: float | None
    why: str


@torch.no_grad()
def choose_variants(network: fx.GraphModule, images_shape: Sequence[int], *, timed: bool) -> tuple[LayerChoice, ...]:
    """Lets each `FusedConv` run its fused operator where there is one that works and, if timed, is faster.

    The fused operator of this device is first tried on the layer's real shapes: one that refuses or
    whose result is wrong is not taken, and the choice says so. Some of cuDNN's are much slower than the
    plain three (pytorch#68506), hence the clock; equal layers are timed once. A choice by the clock may
    differ from run to run, and with it the rounding: take `timed=False` where runs have to repeat.

    torch calls both of cuDNN's fused operators with `deterministic = false` whatever has been asked for,
    so in deterministic mode they are not taken.

    Found on the same CPU, with one thread and with two: an image's fp32 logits have the same bits in batches of 80,
    128 and 512 (ResNet-20), fused, plain or unfolded; alone in its batch it has others, in all three. oneDNN
    promises none of it.

    Args:
        network: what `fuse` gave, frozen, on its device, in its dtype, channels-last. It must not be moved,
            cast or copied afterwards.
        images_shape: N, C, H, W of a batch; other sizes of batch work afterwards, too.
        timed: choose by the clock; otherwise fused wherever it works.

    Returns:
        One record a layer, in the order of the network.
    """
    layers = {name: module for name, module in network.named_modules() if isinstance(module, FusedConv)}
    for layer in layers.values():
        layer.use("plain")
    cases = _cases(network, layers, images_shape)
    found: dict[tuple[object, ...], LayerChoice] = {}
    choices = []
    for name, case in cases.items():
        known = found.get(case.key)
        choice = _choose(name, case, timed) if known is None else known
        found[case.key] = choice
        case.layer.use(choice.variant)
        choices.append(LayerChoice(name, choice.variant, choice.fused_ms, choice.plain_ms, choice.why))
    return tuple(choices)


class _Case(NamedTuple):
    """A layer and the shapes that it sees."""

    layer: FusedConv
    x_shape: torch.Size
    residual_shape: torch.Size | None

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for layers that cost the same."""
        conv = self.layer.conv
        geometry = (conv.weight.shape, conv.stride, conv.padding, conv.dilation, conv.groups, conv.bias is None)
        return (self.x_shape, self.residual_shape, self.layer.may_overwrite, *geometry)


def _cases(network: fx.GraphModule, layers: dict[str, FusedConv], images_shape: Sequence[int]) -> dict[str, _Case]:
    """Runs the network once and notes the shapes, in the order of the calls."""
    cases: dict[str, _Case] = {}

    def note(name: str, layer: FusedConv) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            cases[name] = _Case(layer, inputs[0].shape, inputs[1].shape if len(inputs) > 1 else None)

        return hook

    hooks = [layer.register_forward_pre_hook(note(name, layer)) for name, layer in layers.items()]
    weight = next(network.parameters())
    network(_channels_last(torch.zeros(*images_shape, dtype=weight.dtype, device=weight.device)))
    for hook in hooks:
        hook.remove()
    return cases


def _choose(name: str, case: _Case, timed: bool) -> LayerChoice:
    fused, why = _fused_variant(case)
    if fused == "plain":
        return LayerChoice(name, "plain", None, None, why)
    trouble = _trouble(case, fused)
    if trouble:
        return LayerChoice(name, "plain", None, None, trouble)
    if not timed:
        return LayerChoice(name, fused, None, None, "not timed")
    fused_ms, plain_ms = _time_both(case, fused)
    return LayerChoice(name, fused if fused_ms <= plain_ms else "plain", fused_ms, plain_ms, "timed")


def _fused_variant(case: _Case) -> tuple[Variant, str]:
    """The fused operator for this layer on its device and in its dtype; `plain` and the reason where there is none."""
    weight = case.layer.conv.weight
    if weight.is_cuda:
        if torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic:
            return "plain", "cuDNN's fused operators do not promise the same bits"
        takes = torch.backends.cudnn.is_available() and torch.backends.cudnn.enabled
        takes = takes and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
        return ("cudnn", "") if takes else ("plain", f"cuDNN does not take {weight.dtype} here")
    if weight.device.type != "cpu" or not _onednn_takes(weight.dtype):
        return "plain", f"oneDNN does not take {weight.dtype} here"
    if case.residual_shape is not None and case.layer.conv.groups > 1:
        # torch would run the plain three under that name.
        return "plain", "oneDNN fuses no sum with a grouped convolution"
    return "onednn", ""


def _onednn_takes(dtype: torch.dtype) -> bool:
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


def _inputs(case: _Case) -> tuple[Tensor, Tensor | None]:
    """Random values of the layer's shapes, the same each time."""
    weight = case.layer.conv.weight
    generator = torch.Generator(weight.device).manual_seed(0)

    def draw(shape: torch.Size) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=weight.dtype, device=weight.device)
        return _channels_last(values)

    return draw(case.x_shape), None if case.residual_shape is None else draw(case.residual_shape)


def _trouble(case: _Case, fused: Variant) -> str:
    """What speaks against the fused operator when it is tried; empty if nothing does."""
    layer = case.layer
    layer.use("plain")
    expected_NCHW = layer(*_inputs(case))
    if case.residual_shape not in (None, expected_NCHW.shape):
        return "the sum broadcasts"
    layer.use(fused)
    try:
        layer(*_inputs(case))
        # cuDNN is given memory that nobody has filled as a summand with the factor 0; were it to multiply
        # what stands there, this not-a-number would show.
        inputs = _inputs(case)
        torch.full_like(expected_NCHW, torch.nan)
        found_NCHW = layer(*inputs)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return f"refused: {str(error).splitlines()[0]}"
    finally:
        layer.use("plain")
    wrong_by = float((found_NCHW.float() - expected_NCHW.float()).abs().max())
    size = float(expected_NCHW.abs().max())
    return "" if wrong_by <= WRONG * size else f"wrong by {wrong_by:.1e} beside values of {size:.1e}"


def _time_both(case: _Case, fused: Variant) -> tuple[float, float]:
    """Median milliseconds of a fused and of a plain call, measured in turns."""
    inputs = _inputs(case)
    times: dict[Variant, list[float]] = {fused: [], "plain": []}
    # The first round warms up: cuDNN looks for its fastest algorithm there.
    for timed_round in range(TIMED_ROUNDS + 1):
        for variant, taken in times.items():
            case.layer.use(variant)
            ms = _call_ms(lambda: case.layer(*inputs), inputs[0].device)
            if timed_round:
                taken.append(ms)
    case.layer.use("plain")
    return statistics.median(times[fused]), statistics.median(times["plain"])


def _call_ms(call: Callable[[], Tensor], device: torch.device) -> float:
    """Milliseconds of one call among several in a row, on the device's clock where it has one."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(CALLS_A_ROUND):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / CALLS_A_ROUND
    began = time.perf_counter()
    for _ in range(CALLS_A_ROUND):
        call()
    return 1e3 * (time.perf_counter() - began) / CALLS_A_ROUND


def _channels_last(values_NCHW: Tensor) -> Tensor:
    return values_NCHW.contiguous(memory_format=torch.channels_last)
