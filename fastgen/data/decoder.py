"""What decoders of .beton images are given and give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

UInt8 = npt.NDArray[np.uint8]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Images:
    """Stored images with the view that is wanted of each; arrays of B rows are contiguous.

    Attributes:
        content: uint8, memory that holds the images.
        begin, stored_bytes: int64 (B,), where each lies in it.
        modes: uint8 (B,), beton.JPEG or beton.RAW.
        stored_sizes: int32 (B, 2), height and width.
        rows: int32 (B, 5) of the view table, in pixels of the stored image: inside it, unless the view has the
            output's size and the image is raw, where zeros stand for what lies outside.
    """

    content: UInt8
    begin: Int64
    stored_bytes: Int64
    modes: UInt8
    stored_sizes: Int32
    rows: Int32


class Decoder(Protocol):
    """Executes views; may be called by several threads at once, and does not hold Python's lock meanwhile."""

    def __call__(self, images: Images, images_NHWC: UInt8) -> int:
        """Fills uint8 (B, H, W, 3).

        Returns:
            -1, or the row of the first image that could not be decoded.
        """
        ...
