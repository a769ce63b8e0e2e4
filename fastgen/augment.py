"""Operations on image batches on the device: crop, flip, turn, shift colours, normalise. Pure functions.

Shapes: N samples, B of them in a batch, C channels, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

WORD_BYTES = 4


class Windows:
    """All crops of a set of images that keep the image's size, as one strided view without a copy.

    A pixel is kept as one 32-bit word, since gathering words takes half the time of gathering bytes:
    (H + 2 pad)(W + 2 pad) words an image.

    Args:
        images_NHWC: uint8, at most four channels.
        pad_px: zeros that are put around each image, so that a corner may lie in [-pad, pad].
    """

    def __init__(self, images_NHWC: Tensor, pad_px: int) -> None:
        height, width, self.channels = images_NHWC.shape[1:]
        if self.channels > WORD_BYTES:
            raise ValueError(f"{self.channels} channels do not fit into a word of {WORD_BYTES} bytes")
        self.pad_px = pad_px
        edges = (0, WORD_BYTES - self.channels, pad_px, pad_px, pad_px, pad_px)
        padded_NHW = F.pad(images_NHWC, edges).contiguous().view(torch.int32).squeeze(-1)
        # (N, 2 pad + 1, 2 pad + 1, H, W): element [n, top + pad, left + pad] is one crop.
        self.crops = padded_NHW.unfold(1, height, 1).unfold(2, width, 1)


def crop_and_flip(windows: Windows, positions: Tensor, rows: Tensor) -> Tensor:
    """Executes rows of the view table, for images that are not resampled.

    Args:
        windows: of the set.
        positions: int64 (B,), which images.
        rows: int64 (B, 5), their (top, left, height, width, flip); height and width are the
            image's own.

    Returns:
        uint8 (B, C, H, W) in channels-last memory, pixels as stored, zeros outside the image.
    """
    crops_BHW = windows.crops[positions, rows[:, 0] + windows.pad_px, rows[:, 1] + windows.pad_px]
    views_BHW = torch.where(rows[:, 4].bool()[:, None, None], crops_BHW.flip(2), crops_BHW)
    words_BHWC = views_BHW.view(torch.uint8).unflatten(2, (-1, WORD_BYTES))
    images_NCHW = words_BHWC[..., : windows.channels].permute(0, 3, 1, 2)
    return images_NCHW.contiguous(memory_format=torch.channels_last)


def jitter_views(images_NCHW: Tensor, jitter_B4: Tensor, *, rotate: bool) -> Tensor:
    """Turns each image around its centre and shifts its colour channels, as the rows say.

    Sampled bilinearly; what comes from outside the image is black. Values are cut to 0..255 and not rounded.

    Args:
        images_NCHW: uint8 (B, 3, H, W), or one channel, of which the first shift holds.
        jitter_B4: float32 (B, 4), `crops.JITTER_COLUMNS`: degrees, anticlockwise, and the shift of each channel.
        rotate: False where all angles are zero: nothing is resampled then.

    Returns:
        float32 (B, C, H, W) in channels-last memory.
    """
    images = images_NCHW.float()
    if rotate:
        images = F.grid_sample(images, _rotation_grid(images, jitter_B4[:, 0]), mode="bilinear", align_corners=False)
    shifts_BC = jitter_B4[:, 1 : 1 + images.shape[1]]
    shifted = (images + shifts_BC[:, :, None, None]).clamp(0, 255)
    return shifted.contiguous(memory_format=torch.channels_last)


def _rotation_grid(images_NCHW: Tensor, degrees_B: Tensor) -> Tensor:
    """Where each pixel of the turned image comes from, float32 (B, H, W, 2) in grid_sample's units of half sides."""
    height, width = images_NCHW.shape[2:]
    angle_B = degrees_B * (math.pi / 180)
    cos_B, sin_B, zero_B = angle_B.cos(), angle_B.sin(), torch.zeros_like(angle_B)
    # Rows are measured downwards: turning the content anticlockwise takes pixels from clockwise places.
    to_x = torch.stack([cos_B, -sin_B * (height / width), zero_B], dim=1)
    to_y = torch.stack([sin_B * (width / height), cos_B, zero_B], dim=1)
    return F.affine_grid(torch.stack([to_x, to_y], dim=1), list(images_NCHW.shape), align_corners=False)


class Normaliser:
    """Pixels 0..255 -> (pixel / 255 - mean) / std of each channel, as one multiply-add.

    Args:
        mean, std: of each channel, in units of the full range 0..1.
        device: where batches live.
        dtype: of the result; the arithmetic is fp32.

    Attributes:
        scale_C, shift_C: float32, on the device; the result is pixel * scale + shift.
        dtype: as above.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device, dtype: torch.dtype) -> None:
        std_C = torch.tensor(std, dtype=torch.float64)
        mean_C = torch.tensor(mean, dtype=torch.float64)
        self.scale_C = (1 / (255 * std_C)).float().to(device)
        self.shift_C = (-mean_C / std_C).float().to(device)
        self.dtype = dtype

    def __call__(self, images_NCHW: Tensor) -> Tensor:
        """uint8 or float32 (B, C, H, W) -> the same shape in channels-last memory, in the wanted dtype."""
        images_NHWC = images_NCHW.permute(0, 2, 3, 1)
        width_px = images_NHWC.shape[2]
        # Along a whole row of pixels: an inner loop over three channels is five times slower on a CPU.
        rows = images_NHWC.flatten(2).float()
        normalised = torch.addcmul(self.shift_C.repeat(width_px), rows, self.scale_C.repeat(width_px))
        return normalised.to(self.dtype).view(images_NHWC.shape).permute(0, 3, 1, 2)
