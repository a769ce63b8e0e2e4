"""A few tiny images, a loader of them and a teacher, for tests of its labels."""

from __future__ import annotations

import numpy as np
import torch

from fastgen.augment import Normaliser
from fastgen.crops import ShiftCrop
from fastgen.data.split import Split
from fastgen.label_store import StoreKind
from fastgen.models import build_model, initialise
from fastgen.step import DTYPES, make_prepare
from fastgen.teacher import make_teacher
from fastgen.truncation import Truncation
from fastgen.views import training_views

CPU = torch.device("cpu")
CROP = ShiftCrop(height_px=8, width_px=6, pad_px=1, flip=True)
COUNT, CLASSES = 20, 10
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


def tiny_split():
    """COUNT random images in CLASSES classes."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (COUNT, CROP.height_px, CROP.width_px, 3), dtype=np.uint8)
    return Split(pixels, random.integers(0, CLASSES, COUNT), 100 + np.arange(COUNT))


def tiny_prepare(precision="fp32", crop=CROP):
    """Pixels -> what a network of this precision sees."""
    return make_prepare(Normaliser(MEAN, STD, CPU, DTYPES[precision]), crop.jitter)


def tiny_teacher(precision="fp32", engine="folded"):
    """A frozen network, untrained."""
    model = initialise(build_model("resnet8", CLASSES, 3, "strided"), 1)
    return make_teacher(model, CPU, DTYPES[precision], engine, shape=(4, 3, CROP.height_px, CROP.width_px))


def tiny_store_kind(teacher="0123456789abcdef"):
    """A label store of three of the ten classes."""
    return StoreKind(
        teacher=teacher, images="images", count=COUNT, crop=CROP, pixels="stored", mean=MEAN, std=STD,
        precision="fp32", engine="folded", truncation=Truncation(10, 3, "fp16"),
    )  # fmt: skip


def epoch_of(split, epoch=0, crop=CROP):
    """Views of an epoch of generation 1 under data seed 3."""
    return training_views(split.ids, crop, data_seed=3, generation=1, epoch=epoch)
