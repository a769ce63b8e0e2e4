"""What is known of each data set: written once, here, and needed before any file is opened."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Facts:
    """Facts of a data set.

    Attributes:
        classes: number of classes; 0: as many as its files tell.
        channels: of every image.
        height_px, width_px: of every image; 0: they differ.
        train_images, test_images: how many there are; 0: as many as its files tell.
        pad_px: zeros around an image from which the standard augmentation crops.
        flip: whether the mirrored image is of the same class (a mirrored digit is not).
        mean, std: of each channel over the training set, in units of the full range 0..1.
    """

    classes: int
    channels: int
    height_px: int
    width_px: int
    train_images: int
    test_images: int
    pad_px: int
    flip: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]


DATASETS: dict[str, Facts] = {
    "cifar100": Facts(100, 3, 32, 32, 50_000, 10_000, 4, True, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "cifar10": Facts(10, 3, 32, 32, 50_000, 10_000, 4, True, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    # Mean and deviation as everyone uses them for ILSVRC2012 since torchvision's first examples.
    "imagenet": Facts(0, 3, 0, 0, 0, 0, 0, True, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "digits": Facts(10, 1, 8, 8, 1_442, 355, 1, False, (0.3052,), (0.3760,)),
}
