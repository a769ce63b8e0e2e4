"""Operations on image batches on the device: crop, flip, normalise. Pure functions.

Shapes: N samples, B of them in a batch, C channels, H x W pixels.
"""

from __future__ import annotations

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


class Normaliser:
    """Pixels 0..255 -> (pixel / 255 - mean) / std of each channel, as one multiply-add.

    Args:
        mean, std: of each channel, in units of the full range 0..1.
        device: where batches live.
        dtype: of the result; the arithmetic is fp32.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device, dtype: torch.dtype) -> None:
        std_C = torch.tensor(std, dtype=torch.float64)
        mean_C = torch.tensor(mean, dtype=torch.float64)
        self._scale_C = (1 / (255 * std_C)).float().to(device)
        self._shift_C = (-mean_C / std_C).float().to(device)
        self._dtype = dtype

    def __call__(self, images_NCHW: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> the same shape in channels-last memory, in the wanted dtype."""
        images_NHWC = images_NCHW.permute(0, 2, 3, 1)
        width_px = images_NHWC.shape[2]
        # Along a whole row of pixels: an inner loop over three channels is five times slower on a CPU.
        rows = images_NHWC.flatten(2).float()
        normalised = torch.addcmul(self._shift_C.repeat(width_px), rows, self._scale_C.repeat(width_px))
        return normalised.to(self._dtype).view(images_NHWC.shape).permute(0, 3, 1, 2)
