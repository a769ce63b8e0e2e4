"""Trials of loaders and of training itself, on pictures that are made up."""

from __future__ import annotations

import importlib
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgen.doctor import advice
from fastgen.doctor.findings import Answer, Mark, Place
from fastgen.doctor.packages import checked_version, installed_version

if TYPE_CHECKING:
    from fastgen.data.decoder import Decoder, Images

PICTURE_PX = 48
DALI = ("nvidia-dali-cuda120", "nvidia-dali-cuda130")
# Of 255: FFCV's fast inverse DCT and other rounding, on a smooth picture.
PIXEL_TOLERANCE = 12


def native(place: Place) -> Answer:
    """fastgen's own decoder: compiles it and decodes a JPEG."""
    # Compiled for this trial, whatever the cache holds.
    os.environ["XDG_CACHE_HOME"] = str(place.scratch / "cache")
    from fastgen.data.native import NativeDecoder
    from fastgen.errors import UserError

    try:
        decoder = NativeDecoder()
    except UserError as error:
        reason = str(error).partition("native ")[2] or str(error)
        return Answer(Mark.BROKEN, reason.partition(": install gcc")[0], advice.system("g++", "libjpeg-dev"))
    return _decoded(decoder, Answer(Mark.OK, "compiles and decodes"))


def ffcv(place: Place) -> Answer:
    """FFCV: decodes a JPEG by its own functions."""
    importlib.import_module("ffcv")
    from fastgen.data.ffcv_decoder import FfcvDecoder

    return _decoded(FfcvDecoder(), checked_version("ffcv", "decodes"))


def dali_package() -> str:
    """The one of DALI's packages, which differ in CUDA's version, that is installed; or else the first."""
    return next((name for name in DALI if installed_version(name)), DALI[0])


def dali(place: Place) -> Answer:
    """NVIDIA DALI: decodes a JPEG on the CPU."""
    found = importlib.import_module("nvidia.dali")
    import numpy as np

    pipeline = found.Pipeline(1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        content = found.fn.external_source(name="content", ndim=1)
        pipeline.set_outputs(found.fn.decoders.image(content, device="cpu"))
    pipeline.build()
    jpeg, pixels_HWC = _picture()
    pipeline.feed_input("content", [np.frombuffer(jpeg, np.uint8)])
    return _compared(pipeline.run()[0].at(0), pixels_HWC, checked_version(dali_package(), "decodes on the CPU"))


def _picture() -> tuple[bytes, Any]:
    """A JPEG, and the pixels that Pillow decodes from it: uint8 (H, W, 3)."""
    import numpy as np
    from PIL import Image

    ramp = np.linspace(0, 255, PICTURE_PX, dtype=np.uint8)
    red, green = np.meshgrid(ramp, ramp)
    file = io.BytesIO()
    Image.fromarray(np.stack([red, green, red[::-1]], axis=2)).save(file, "JPEG", quality=95)
    return file.getvalue(), np.asarray(Image.open(file))


def _decoded(decoder: Decoder, answer: Answer) -> Answer:
    """The answer, where a whole picture comes out of the decoder as it should."""
    import numpy as np

    jpeg, pixels_HWC = _picture()
    images_NHWC = np.zeros((1, *pixels_HWC.shape), np.uint8)
    if decoder(_as_images(jpeg), images_NHWC) != -1:
        return Answer(Mark.BROKEN, "cannot decode a sound JPEG")
    return _compared(images_NHWC[0], pixels_HWC, answer)


def _as_images(jpeg: bytes) -> Images:
    import numpy as np

    from fastgen.data.beton import JPEG
    from fastgen.data.decoder import Images

    side = PICTURE_PX
    return Images(
        np.frombuffer(jpeg, np.uint8), np.array([0], np.int64), np.array([len(jpeg)], np.int64),
        np.array([JPEG], np.uint8), np.array([[side, side]], np.int32), np.array([[0, 0, side, side, 0]], np.int32),
    )  # fmt: skip


def _compared(found_HWC: Any, wanted_HWC: Any, answer: Answer) -> Answer:
    import numpy as np

    off = int(np.abs(np.asarray(found_HWC, np.int16) - wanted_HWC).max())
    if off > PIXEL_TOLERANCE:
        return Answer(Mark.BROKEN, f"decodes other pixels than Pillow: {off} of 255 apart")
    return answer


def training(place: Place) -> Answer:
    """Training: a patriarch and a student of one step each, by the command itself."""
    from data_prep import manifest
    from fastgen import train

    data = place.scratch / "data"
    for part in ("train", "val"):
        _write_pictures(data / part)
        manifest.main([f"--source={data / part}", f"--out={data / f'{part}.manifest'}"])
    recipe = place.scratch / "recipe.yaml"
    recipe.write_text(_RECIPE.format(data=data, run=place.scratch / "run"))
    train.main(["--cfg", str(recipe)])
    device = train_device()
    return Answer(Mark.OK, f"a patriarch and a student take a step on {device}", facts={"device": device})


def train_device() -> str:
    """`cuda` or `cpu`: where `run.device=auto` trains."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _write_pictures(folder: Path) -> None:
    jpeg, _ = _picture()
    for label in ("one", "other"):
        (folder / label).mkdir(parents=True)
        for number in range(4):
            (folder / label / f"{number}.jpg").write_bytes(jpeg)


_RECIPE = """
data: {{dataset: imagenet, backend: synthetic, root: {data}, resolution_px: 32}}
model: {{name: resnet8}}
train: {{epochs: 1, batch_size: 8}}
gen: {{generations: 1, k: 2}}
run: {{dir: {run}, nodes: {run}/nodes, eval_every_epochs: 0}}
dist: {{processes: 1}}
"""
