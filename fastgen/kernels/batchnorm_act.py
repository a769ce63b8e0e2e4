"""Training batch-norm, the residual's addition and ReLU in two launches forward and two backward.

    m = mean(x)    v = mean((x - m)^2)    xhat = (x - m) / sqrt(v + eps)
    y = max(0, weight xhat + bias [+ residual])

    dz = dy where y > 0, else 0    dresidual = dz    dbias = sum(dz)    dweight = sum(dz xhat)
    dx = weight / sqrt(v + eps) (dz - mean(dz) - xhat mean(dz xhat))

over the R = N H W positions of each of C channels. Sources: Ioffe, Szegedy, "Batch normalization", ICML 2015,
section 3 (its gradients of m and v, put into that of x, give the closed form); Chan, Golub, LeVeque, "Algorithms for
computing the sample variance", 1983: mean and M2 = sum((x - m)^2) of parts combine to those of the whole without the
cancellation of mean(x^2) - m^2. The plain reference is `models.norm_act.batchnorm_act`.

Channels-last memory is a matrix of R rows and C columns. A program takes TILE_C columns and a contiguous share of the
rows. The first launch of either pass writes P parts per channel, and every program of the second launch begins by
combining them all, always in the same order: no atomics, nothing that the host waits for, the same bits every time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.runtime import launched_on

# Elements of a tile and number of programs for large inputs. Compiled for sm_90 at 64 channels with WARPS warps no
# kernel spills, loads are 128 bits wide, and registers (at most 128, 128 and 80 a thread) leave room for 2, 2 and 3
# programs on each of 132 multiprocessors: all of them run at once. No time was measured yet.
STATISTICS_TILE, REDUCE_TILE, REDUCE_PROGRAMS = 8192, 4096, 256
STREAM_TILE, STREAM_PROGRAMS = 4096, 396
WARPS = 8
# 64 bytes of fp16: all of a memory transaction, and half the parts to combine that 64 columns would give.
MAX_TILE_C = 32
MOST_PARTS = 128


@triton.jit
def share_of(rows, share_rows):
    """First row of this program's share, int64 as offsets pass 2^31 elements, and its number of rows."""
    first = tl.program_id(1).to(tl.int64) * share_rows
    return first, tl.minimum(rows - first, share_rows).to(tl.int32)


@triton.jit
def columns_of(TILE_C: tl.constexpr):
    """Channels of this program."""
    return tl.program_id(0) * TILE_C + tl.arange(0, TILE_C)


@triton.jit
def tile_of(first, count, tile, C: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_C: tl.constexpr):
    """A tile of the share: where it starts, offsets (TILE_ROWS, TILE_C) from there, and which of them count."""
    r = tl.arange(0, TILE_ROWS)
    c = columns_of(TILE_C)
    inside = (r < count - tile * TILE_ROWS)[:, None] & (c < C)[None, :]
    return (first + tile * TILE_ROWS) * C, r[:, None] * C + c[None, :], inside


@triton.jit
def load_channels(values, C: tl.constexpr, TILE_C: tl.constexpr):
    """(1, TILE_C) of a vector over the channels."""
    c = columns_of(TILE_C)
    return tl.load(values + c, mask=c < C, other=0.0)[None, :]


@triton.jit
def load_parts(parts, shares, C: tl.constexpr, POW2_SHARES: tl.constexpr, TILE_C: tl.constexpr):
    """The two halves of parts_2PC, (POW2_SHARES, TILE_C) each, zeros beyond P."""
    p = tl.arange(0, POW2_SHARES)[:, None]
    c = columns_of(TILE_C)[None, :]
    there = (p < shares) & (c < C)
    at = parts + p * C + c
    return tl.load(at, mask=there, other=0.0), tl.load(at + shares * C, mask=there, other=0.0)


@triton.jit
def store_parts(parts, first_half, second_half, C: tl.constexpr, TILE_C: tl.constexpr):
    """Writes this program's row of both halves of parts_2PC."""
    c = columns_of(TILE_C)
    at = parts + tl.program_id(1) * C + c
    tl.store(at, first_half, mask=c < C)
    tl.store(at + tl.num_programs(1) * C, second_half, mask=c < C)


@triton.jit
def combine(counts, means, m2s, total):
    """Chan's formula for many disjoint parts (axis 0): their counts, means and M2s -> mean and M2 of the whole."""
    mean = tl.sum(counts * means, 0) / total
    # That sum is rounded at its own size, `total` means. What it lost is small, so adding it back loses nothing more.
    mean += tl.sum(counts * (means - mean[None, :]), 0) / total
    off = means - mean[None, :]
    return mean, tl.sum(m2s + counts * off * off, 0)


@triton.jit
def zero_below(values, z):
    """values where z > 0 or z is NaN: a broken network must stay visible, and max(0, NaN) would be 0."""
    return tl.where(z <= 0.0, 0.0, values)


@triton.jit
def statistics_kernel(x, parts, rows, share_rows, C: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_C: tl.constexpr):
    """Mean and M2 of a share: every place of the tile keeps its own (Welford, 1962), which are combined at the end."""
    first, count = share_of(rows, share_rows)
    mean = tl.zeros((TILE_ROWS, TILE_C), tl.float32)
    m2 = tl.zeros((TILE_ROWS, TILE_C), tl.float32)
    for tile in range(tl.cdiv(count, TILE_ROWS)):
        start, offsets, inside = tile_of(first, count, tile, C, TILE_ROWS, TILE_C)
        values = tl.load(x + start + offsets, mask=inside, other=0.0).to(tl.float32)
        weight = 1.0 / (tile + 1)
        delta = tl.where(inside, values - mean, 0.0)
        mean += delta * weight
        m2 += delta * delta * (1.0 - weight)
    # Row r of the tile took one value from every tile that is longer than r.
    seen = (count - tl.arange(0, TILE_ROWS) + TILE_ROWS - 1) // TILE_ROWS
    mean_c, m2_c = combine(seen.to(tl.float32)[:, None], mean, m2, count)
    store_parts(parts, mean_c, m2_c, C, TILE_C)


@triton.jit
def apply_kernel(
    x,
    residual,
    weight,
    bias,
    parts,
    y,
    saved,
    running_mean,
    running_var,
    batches_tracked,
    rows,
    part_rows,
    shares,
    share_rows,
    momentum,
    eps,
    C: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_C: tl.constexpr,
    POW2_SHARES: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Normalises, adds and clips a share; the programs of the first share also keep the statistics."""
    means, m2s = load_parts(parts, shares, C, POW2_SHARES, TILE_C)
    left = rows - tl.arange(0, POW2_SHARES) * part_rows
    counts = tl.maximum(tl.minimum(left, part_rows), 0).to(tl.float32)
    mean, m2 = combine(counts[:, None], means, m2s, rows)
    invstd = 1.0 / tl.sqrt_rn(m2 / rows + eps)
    if tl.program_id(1) == 0:
        c = columns_of(TILE_C)
        tl.store(saved + c, mean, mask=c < C)
        tl.store(saved + C + c, invstd, mask=c < C)
        old_mean = tl.load(running_mean + c, mask=c < C, other=0.0)
        old_var = tl.load(running_var + c, mask=c < C, other=0.0)
        tl.store(running_mean + c, (1.0 - momentum) * old_mean + momentum * mean, mask=c < C)
        tl.store(running_var + c, (1.0 - momentum) * old_var + momentum * (m2 / (rows - 1)), mask=c < C)
        if tl.program_id(0) == 0:
            tl.store(batches_tracked, tl.load(batches_tracked) + 1)
    first, count = share_of(rows, share_rows)
    scale = invstd[None, :] * load_channels(weight, C, TILE_C)
    shift = load_channels(bias, C, TILE_C)
    for tile in range(tl.cdiv(count, TILE_ROWS)):
        start, offsets, inside = tile_of(first, count, tile, C, TILE_ROWS, TILE_C)
        z = (tl.load(x + start + offsets, mask=inside, other=0.0).to(tl.float32) - mean[None, :]) * scale + shift
        if HAS_RESIDUAL:
            z += tl.load(residual + start + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + start + offsets, zero_below(z, z).to(y.dtype.element_ty), mask=inside)


@triton.jit
def reduce_kernel(
    dy,
    x,
    y,
    weight,
    bias,
    saved,
    dz,
    parts,
    rows,
    share_rows,
    C: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_C: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """sum(dz) and sum(dz xhat) of a share. With a residual y tells where dz is 0, and dz is written: it is its
    gradient. Without one the sign is computed from x, which is read anyway."""
    first, count = share_of(rows, share_rows)
    shift = load_channels(bias, C, TILE_C)
    mean = load_channels(saved, C, TILE_C)
    invstd = load_channels(saved + C, C, TILE_C)
    scale = invstd * load_channels(weight, C, TILE_C)
    sum_dz = tl.zeros((TILE_ROWS, TILE_C), tl.float32)
    sum_dzx = tl.zeros((TILE_ROWS, TILE_C), tl.float32)
    for tile in range(tl.cdiv(count, TILE_ROWS)):
        start, offsets, inside = tile_of(first, count, tile, C, TILE_ROWS, TILE_C)
        g = tl.load(dy + start + offsets, mask=inside, other=0.0).to(tl.float32)
        off = tl.load(x + start + offsets, mask=inside, other=0.0).to(tl.float32) - mean
        if HAS_RESIDUAL:
            g = zero_below(g, tl.load(y + start + offsets, mask=inside, other=0.0).to(tl.float32))
            tl.store(dz + start + offsets, g.to(dz.dtype.element_ty), mask=inside)
        else:
            g = zero_below(g, off * scale + shift)
        sum_dz += g
        sum_dzx += g * off
    store_parts(parts, tl.sum(sum_dz, 0), tl.sum(sum_dzx * invstd, 0), C, TILE_C)


@triton.jit
def input_gradient_kernel(
    dz,
    x,
    weight,
    bias,
    saved,
    parts,
    dx,
    dweight,
    dbias,
    rows,
    shares,
    share_rows,
    C: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_C: tl.constexpr,
    POW2_SHARES: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """dx of a share; the programs of the first share also write dweight and dbias. Without a residual dz is dy."""
    parts_dz, parts_dzx = load_parts(parts, shares, C, POW2_SHARES, TILE_C)
    sum_dz, sum_dzx = tl.sum(parts_dz, 0), tl.sum(parts_dzx, 0)
    if tl.program_id(1) == 0:
        c = columns_of(TILE_C)
        tl.store(dbias + c, sum_dz, mask=c < C)
        tl.store(dweight + c, sum_dzx, mask=c < C)
    first, count = share_of(rows, share_rows)
    shift = load_channels(bias, C, TILE_C)
    mean = load_channels(saved, C, TILE_C)
    invstd = load_channels(saved + C, C, TILE_C)
    scale = invstd * load_channels(weight, C, TILE_C)
    mean_dz = (sum_dz / rows)[None, :]
    mean_dzx = invstd * (sum_dzx / rows)[None, :]
    for tile in range(tl.cdiv(count, TILE_ROWS)):
        start, offsets, inside = tile_of(first, count, tile, C, TILE_ROWS, TILE_C)
        g = tl.load(dz + start + offsets, mask=inside, other=0.0).to(tl.float32)
        off = tl.load(x + start + offsets, mask=inside, other=0.0).to(tl.float32) - mean
        if not HAS_RESIDUAL:
            g = zero_below(g, off * scale + shift)
        result = scale * (g - mean_dz - off * mean_dzx)
        tl.store(dx + start + offsets, result.to(dx.dtype.element_ty), mask=inside)


class Split(NamedTuple):
    """How the matrix of R rows and C columns is dealt to programs."""

    tile_rows: int
    tile_c: int
    share_rows: int  # a multiple of tile_rows; the last share may be shorter
    shares: int

    @property
    def pow2_shares(self) -> int:
        """Length of a block that holds one value a share."""
        return triton.next_power_of_2(self.shares)

    def grid(self, channels: int) -> tuple[int, int]:
        """Programs of neighbouring columns are neighbours: they read the same lines of memory."""
        return triton.cdiv(channels, self.tile_c), self.shares


def split(x_NCHW: Tensor, tile: int, programs: int, most_shares: int) -> Split:
    """Depends on the shape alone and never on the device, or sums would differ between devices.

    Args:
        x_NCHW: its shape counts.
        tile: elements of a tile.
        programs: how many there are for a large input, about; for a small one each takes two tiles.
        most_shares: of the rows.
    """
    rows, channels = rows_of(x_NCHW), x_NCHW.shape[1]
    tile_c = min(MAX_TILE_C, triton.next_power_of_2(channels))
    tile_rows = tile // tile_c
    shares = max(1, min(most_shares, programs // triton.cdiv(channels, tile_c)))
    share_rows = max(2, triton.cdiv(triton.cdiv(rows, tile_rows), shares)) * tile_rows
    return Split(tile_rows, tile_c, share_rows, triton.cdiv(rows, share_rows))


def rows_of(x_NCHW: Tensor) -> int:
    """R = N H W."""
    return x_NCHW.numel() // x_NCHW.shape[1]


def statistics_split(x_NCHW: Tensor) -> Split:
    """Of `statistics_kernel`."""
    return split(x_NCHW, STATISTICS_TILE, REDUCE_PROGRAMS, MOST_PARTS)


def reduce_split(x_NCHW: Tensor) -> Split:
    """Of `reduce_kernel`."""
    return split(x_NCHW, REDUCE_TILE, REDUCE_PROGRAMS, MOST_PARTS)


def stream_split(x_NCHW: Tensor) -> Split:
    """Of `apply_kernel` and `input_gradient_kernel`."""
    return split(x_NCHW, STREAM_TILE, STREAM_PROGRAMS, STREAM_PROGRAMS)


def empty_parts(x_NCHW: Tensor, first_launch: Split) -> Tensor:
    """Scratch parts_2PC, fp32, that the first launch of a pass fills for the second."""
    return x_NCHW.new_empty((2, first_launch.shares, x_NCHW.shape[1]), dtype=torch.float32)


def launch_forward(
    x_NCHW: Tensor,
    residual_NCHW: Tensor | None,
    weight_C: Tensor,
    bias_C: Tensor,
    running_mean_C: Tensor,
    running_var_C: Tensor,
    batches_tracked: Tensor,
    momentum: float,
    eps: float,
    parts_2PC: Tensor,
    y_NCHW: Tensor,
    saved_2C: Tensor,
) -> None:
    """Fills the last three and updates the running statistics; see `forward_op`."""
    rows, channels = rows_of(x_NCHW), x_NCHW.shape[1]
    parts, stream = statistics_split(x_NCHW), stream_split(x_NCHW)
    with launched_on(x_NCHW):
        statistics_kernel[parts.grid(channels)](
            x_NCHW,
            parts_2PC,
            rows,
            parts.share_rows,
            C=channels,
            TILE_ROWS=parts.tile_rows,
            TILE_C=parts.tile_c,
            num_warps=WARPS,
        )
        apply_kernel[stream.grid(channels)](
            x_NCHW,
            residual_NCHW,
            weight_C,
            bias_C,
            parts_2PC,
            y_NCHW,
            saved_2C,
            running_mean_C,
            running_var_C,
            batches_tracked,
            rows,
            parts.share_rows,
            parts.shares,
            stream.share_rows,
            momentum,
            eps,
            C=channels,
            TILE_ROWS=stream.tile_rows,
            TILE_C=stream.tile_c,
            POW2_SHARES=parts.pow2_shares,
            HAS_RESIDUAL=residual_NCHW is not None,
            num_warps=WARPS,
        )


def launch_backward(
    dy_NCHW: Tensor,
    x_NCHW: Tensor,
    y_NCHW: Tensor | None,
    weight_C: Tensor,
    bias_C: Tensor,
    saved_2C: Tensor,
    parts_2PC: Tensor,
    dz_NCHW: Tensor | None,
    dx_NCHW: Tensor,
    dweight_C: Tensor,
    dbias_C: Tensor,
) -> None:
    """Fills the last five; see `backward_op`. Without a residual y and dz are None."""
    rows, channels = rows_of(x_NCHW), x_NCHW.shape[1]
    parts, stream = reduce_split(x_NCHW), stream_split(x_NCHW)
    with launched_on(x_NCHW):
        reduce_kernel[parts.grid(channels)](
            dy_NCHW,
            x_NCHW,
            y_NCHW,
            weight_C,
            bias_C,
            saved_2C,
            dz_NCHW,
            parts_2PC,
            rows,
            parts.share_rows,
            C=channels,
            TILE_ROWS=parts.tile_rows,
            TILE_C=parts.tile_c,
            HAS_RESIDUAL=dz_NCHW is not None,
            num_warps=WARPS,
        )
        input_gradient_kernel[stream.grid(channels)](
            dy_NCHW if dz_NCHW is None else dz_NCHW,
            x_NCHW,
            weight_C,
            bias_C,
            saved_2C,
            parts_2PC,
            dx_NCHW,
            dweight_C,
            dbias_C,
            rows,
            parts.shares,
            stream.share_rows,
            C=channels,
            TILE_ROWS=stream.tile_rows,
            TILE_C=stream.tile_c,
            POW2_SHARES=parts.pow2_shares,
            HAS_RESIDUAL=dz_NCHW is not None,
            num_warps=WARPS,
        )
