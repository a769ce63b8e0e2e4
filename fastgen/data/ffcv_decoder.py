"""FFCV's own native functions as a decoder: whole images, its fast and less exact inverse DCT, OpenCV's INTER_AREA."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch

from fastgen.data.beton import JPEG
from fastgen.data.decoder import Images, UInt8
from fastgen.errors import UserError
from fastgen.extras import install_line


class FfcvDecoder:
    """Decodes as FFCV's own loader does, under views that are given; a failure is told, not passed over.

    Raises:
        UserError: ffcv is not installed.
    """

    def __init__(self) -> None:
        self._decode = _compile()
        self._local = threading.local()

    def __call__(self, images: Images, images_NHWC: UInt8) -> int:
        """See `decoder.Decoder`."""
        status = np.zeros(len(images.rows), np.int32)
        stored = (images.content, images.begin, images.stored_bytes, images.modes, images.stored_sizes)
        self._decode(*stored, images.rows, images_NHWC, self._scratch(images), status)
        failed = np.flatnonzero(status)
        return int(failed[0]) if len(failed) else -1

    def _scratch(self, images: Images) -> UInt8:
        """Room for the largest whole image; raw pixels are read where they lie."""
        areas = images.stored_sizes.astype(np.int64).prod(axis=1)
        wanted = 3 * int(areas[images.modes == JPEG].max(initial=0))
        if not hasattr(self._local, "scratch") or len(self._local.scratch) < wanted:
            self._local.scratch = np.empty(wanted, np.uint8)
        scratch: UInt8 = self._local.scratch
        return scratch


@cache
def _compile() -> Callable[..., Any]:
    # Importing ffcv sets torch's threads to one, for the whole process.
    threads = torch.get_num_threads()
    try:
        from ffcv.libffcv import ctypes_imdecode, ctypes_resize
    except ImportError as error:
        raise UserError(
            f"data.beton_decoder = ffcv: ffcv cannot be imported ({error}): install the headers of OpenCV and "
            f"libjpeg-turbo (Debian: libopencv-dev libturbojpeg0-dev pkg-config), then {install_line('ffcv')}"
        ) from None
    finally:
        torch.set_num_threads(threads)
    from numba import njit

    @njit(nogil=True)
    def copy_window(image_HWC, top, left, target_HWC):  # type: ignore[no-untyped-def]
        """A window of the target's size; zeros where it reaches over the edge."""
        height, width = image_HWC.shape[0], image_HWC.shape[1]
        for y in range(target_HWC.shape[0]):
            for x in range(target_HWC.shape[1]):
                inside = 0 <= y + top < height and 0 <= x + left < width
                for channel in range(3):
                    target_HWC[y, x, channel] = image_HWC[y + top, x + left, channel] if inside else 0

    @njit(nogil=True)
    def mirror(image_HWC):  # type: ignore[no-untyped-def]
        width = image_HWC.shape[1]
        for y in range(image_HWC.shape[0]):
            for x in range(width // 2):
                for channel in range(3):
                    left = image_HWC[y, x, channel]
                    image_HWC[y, x, channel] = image_HWC[y, width - 1 - x, channel]
                    image_HWC[y, width - 1 - x, channel] = left

    @njit(nogil=True)
    def execute(image_HWC, row, target_HWC):  # type: ignore[no-untyped-def]
        top, left, rows_px, columns_px = row[0], row[1], row[2], row[3]
        if rows_px == target_HWC.shape[0] and columns_px == target_HWC.shape[1]:
            copy_window(image_HWC, top, left, target_HWC)
        else:
            ctypes_resize(
                0, image_HWC.ctypes.data, image_HWC.shape[0], image_HWC.shape[1],
                top, top + rows_px, left, left + columns_px,
                target_HWC.ctypes.data, target_HWC.shape[0], target_HWC.shape[1],
            )  # fmt: skip
        if row[4]:
            mirror(target_HWC)

    @njit(nogil=True)
    def decode(content, begin, stored_bytes, modes, stored_sizes, rows, images_NHWC, scratch, status):  # type: ignore[no-untyped-def]
        for n in range(len(rows)):
            source = content[begin[n] : begin[n] + stored_bytes[n]]
            height, width = np.int64(stored_sizes[n, 0]), np.int64(stored_sizes[n, 1])
            if modes[n] != JPEG:
                execute(source.reshape((height, width, 3)), rows[n], images_NHWC[n])
                continue
            pixels = scratch[: 3 * height * width]
            status[n] = ctypes_imdecode(
                source.ctypes.data, source.size, height, width, pixels.ctypes.data, height, width, 0, 0, 1, 1,
                False, False,
            )  # fmt: skip
            # Stock FFCV does not look, and goes on with the pixels of the image before.
            if status[n] == 0:
                execute(pixels.reshape((height, width, 3)), rows[n], images_NHWC[n])

    return decode
