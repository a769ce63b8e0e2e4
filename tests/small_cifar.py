"""CIFAR-100's binary files with few images, of random pixels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from fastgen.data.cifar import LAYOUTS, Layout

TRAIN_IMAGES, TEST_IMAGES = 600, 200


def small_layouts() -> dict[str, Layout]:
    """What `fastgen.data.cifar.LAYOUTS` says of files that hold as few images."""
    parts = {
        "binary_train": TRAIN_IMAGES, "binary_test": TEST_IMAGES, "python_train": TRAIN_IMAGES,
        "python_test": TEST_IMAGES,
    }  # fmt: skip
    return {
        name: replace(
            layout,
            **{
                key: tuple((file, images // len(getattr(layout, key))) for file, _ in getattr(layout, key))
                for key, images in parts.items()
            },
        )
        for name, layout in LAYOUTS.items()
    }


def write_small_cifar100(root: Path) -> Path:
    """Writes `cifar-100-binary/` into a folder, with 6 training and 2 test images of each of 100 classes."""
    folder = root / "cifar-100-binary"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name, images in (("train.bin", TRAIN_IMAGES), ("test.bin", TEST_IMAGES)):
        records = random.integers(0, 256, (images, 2 + 3072), dtype=np.uint8)
        fine = random.permutation(np.arange(images) % 100)
        records[:, 0], records[:, 1] = fine // 5, fine
        (folder / name).write_bytes(records.tobytes())
    (folder / "fine_label_names.txt").write_text("".join(f"class_{number}\n" for number in range(100)))
    return root
