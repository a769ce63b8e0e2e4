"""Batches of a set that lies in the device's memory: gathered, cropped, flipped and normalised in one launch.

    out[b, c, y, x] = a_c images[n_b, y + top_b, x' + left_b, c] + s_c,  x' = x, or W - 1 - x where the view is flipped

An image is 0 outside, before it is normalised. The plain references are `augment.crop_and_flip` and
`augment.Normaliser`, whose scale and shift are a and s.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.crops import TABLE_COLUMNS
from fastgen.kernels.runtime import launched_on

NORMALISED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Of the view table, `crops.TABLE_COLUMNS`.
TOP, LEFT, FLIP = (tl.constexpr(TABLE_COLUMNS.index(name)) for name in ("top", "left", "flip"))
COLUMNS = tl.constexpr(len(TABLE_COLUMNS))

# A lane holds 8 values: 16-bit ones are stored 128 bits at a time. An image of CIFAR is three blocks without a rest.
LARGEST_BLOCK, ELEMENTS_OF_WARP = 1024, 256


# Positions and rows are parts of an epoch's: a kernel for each of their alignments would be compiled in mid-training.
@triton.jit(do_not_specialize_on_alignment=["positions", "rows"])
def views_kernel(
    images,
    positions,
    rows,
    scale,
    shift,
    out,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    NORMALISE: tl.constexpr,
):
    """A block of one view. Offsets inside an image fit into 32 bits; those of images, and of views, need 64."""
    view = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y, x, c = element // (W * C), element // C % W, element % C

    row = rows + view * COLUMNS
    y += tl.load(row + TOP)
    x = tl.where(tl.load(row + FLIP) != 0, W - 1 - x, x) + tl.load(row + LEFT)
    inside = (y >= 0) & (y < H) & (x >= 0) & (x < W)
    stored = element < H * W * C
    image = images + tl.load(positions + view) * (H * W * C)
    pixel = tl.load(image + (y * W + x) * C + c, mask=inside & stored, other=0)
    if NORMALISE:
        pixel = tl.fma(pixel.to(tl.float32), tl.load(scale + c), tl.load(shift + c))
    tl.store(out + view * (H * W * C) + element, pixel.to(out.dtype.element_ty), mask=stored)


def launch(
    images_NHWC: Tensor,
    positions_B: Tensor,
    rows_B5: Tensor,
    scale_C: Tensor | None,
    shift_C: Tensor | None,
    out_BCHW: Tensor,
) -> None:
    """Fills out_BCHW, from `empty_views`; see `execute_views`. Nothing is checked."""
    count = len(positions_B)
    if count == 0:
        return
    _, height, width, channels = images_NHWC.shape
    elements = height * width * channels
    block = min(LARGEST_BLOCK, triton.next_power_of_2(elements))
    with launched_on(images_NHWC):
        views_kernel[(count, triton.cdiv(elements, block))](
            images_NHWC,
            positions_B,
            rows_B5,
            scale_C,
            shift_C,
            out_BCHW,
            H=height,
            W=width,
            C=channels,
            BLOCK=block,
            NORMALISE=scale_C is not None,
            num_warps=max(1, block // ELEMENTS_OF_WARP),
        )


def empty_views(images_NHWC: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """(count, C, H, W) in channels-last memory, for `launch` to fill."""
    _, height, width, channels = images_NHWC.shape
    return torch.empty(
        (count, channels, height, width),
        dtype=dtype,
        device=images_NHWC.device,
        memory_format=torch.channels_last,
    )


# An operator without a derivative: pixels are integers, and nobody trains the scale.
@torch.library.custom_op("fastgen::views", mutates_args=())
def execute_views(
    images_NHWC: Tensor,
    positions_B: Tensor,
    rows_B5: Tensor,
    scale_C: Tensor | None,
    shift_C: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Executes rows of the view table, for images that are not resampled.

    Normalised pixels are computed in fp32 with one rounding, in Triton's interpreter with two; what is off by that is
    at most 2^-24 (|pixel * scale| + |result|). Then they are rounded to the dtype.

    Args:
        images_NHWC: uint8, dense; the whole set.
        positions_B: int64, which images, in 0..N-1: on the device nobody checks it.
        rows_B5: int32, contiguous; their (top, left, height, width, flip). Height and width are the image's own and
            not looked at; the corner may lie anywhere.
        scale_C, shift_C: fp32, `Normaliser.scale_C` and `shift_C`; None, both: pixels as stored.
        dtype: fp16, bf16 or fp32; uint8 for pixels as stored.

    Returns:
        (B, C, H, W) in channels-last memory.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    _require_rows(images_NHWC, positions_B, rows_B5)
    require_normalisation(images_NHWC, scale_C, shift_C, dtype)
    out_BCHW = empty_views(images_NHWC, len(positions_B), dtype)
    launch(images_NHWC, positions_B, rows_B5, scale_C, shift_C, out_BCHW)
    return out_BCHW


@execute_views.register_fake
def _(
    images_NHWC: Tensor,
    positions_B: Tensor,
    rows_B5: Tensor,
    scale_C: Tensor | None,
    shift_C: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return empty_views(images_NHWC, positions_B.shape[0], dtype)


def _require_rows(images_NHWC: Tensor, positions_B: Tensor, rows_B5: Tensor) -> None:
    if images_NHWC.ndim != 4 or images_NHWC.dtype != torch.uint8 or not images_NHWC.is_contiguous():
        raise ValueError(
            f"images are {tuple(images_NHWC.shape)} {images_NHWC.dtype}: give uint8 (N, H, W, C) in dense memory"
        )
    count = len(positions_B)
    if positions_B.shape != (count,) or positions_B.dtype != torch.int64 or not positions_B.is_contiguous():
        raise ValueError(f"positions are {tuple(positions_B.shape)} {positions_B.dtype}: give int64 (B,), contiguous")
    if rows_B5.shape != (count, len(TABLE_COLUMNS)) or rows_B5.dtype != torch.int32 or not rows_B5.is_contiguous():
        raise ValueError(
            f"rows are {tuple(rows_B5.shape)} {rows_B5.dtype}: give int32 ({count}, {len(TABLE_COLUMNS)}), contiguous"
        )
    if not images_NHWC.device == positions_B.device == rows_B5.device:
        raise ValueError(
            f"images, positions and rows are on {images_NHWC.device}, {positions_B.device}, {rows_B5.device}: "
            "give one device"
        )


def require_normalisation(
    images_NHWC: Tensor, scale_C: Tensor | None, shift_C: Tensor | None, dtype: torch.dtype
) -> None:
    """Refuses a normalisation that the kernel would read wrongly; see `execute_views`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    if scale_C is None or shift_C is None:
        if scale_C is not shift_C or dtype != torch.uint8:
            raise ValueError(f"{dtype} needs a scale and a shift: give both, or neither and torch.uint8")
        return
    if dtype not in NORMALISED_DTYPES:
        raise ValueError(f"normalised images cannot be {dtype}: give fp16, bf16 or fp32")
    for name, tensor in (("scale", scale_C), ("shift", shift_C)):
        if tensor.shape != images_NHWC.shape[3:] or tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}: give fp32 ({images_NHWC.shape[3]},)")
        if tensor.device != images_NHWC.device:
            raise ValueError(f"{name} is on {tensor.device}: give it on {images_NHWC.device}, where the images are")
