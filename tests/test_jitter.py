"""Rotation and colour shift on the device: against Pillow's rotation and plain sums; how rows come to them."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastgen.augment import Normaliser, jitter_views
from fastgen.crops import JitterPolicy, ShiftCrop
from fastgen.data.resident import ResidentLoader
from fastgen.data.split import Split
from fastgen.grade import plain
from fastgen.step import make_forward, make_prepare
from fastgen.views import training_views

CPU = torch.device("cpu")


def smooth(height, width, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.BICUBIC))


def as_batch(pixels_HWC):
    return torch.from_numpy(pixels_HWC.copy()).permute(2, 0, 1)[None].contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [(48, 48), (40, 64), (64, 31)])
@pytest.mark.parametrize("degrees", [0.0, 10.0, -10.0, 33.0, 90.0])
def test_rotation_is_pillows(size, degrees):
    pixels = smooth(*size)
    turned = jitter_views(as_batch(pixels), torch.tensor([[degrees, 0, 0, 0]]), rotate=True)[0].permute(1, 2, 0).numpy()
    expected = np.asarray(Image.fromarray(pixels).rotate(degrees, Image.BILINEAR)).astype(float)
    # Pillow has no partly covered pixels: it takes those on the rim whole or not at all. Elsewhere it rounds to whole
    # levels, and its fixed-point places are off by 2^-16 of a pixel a column.
    inside = np.asarray(Image.new("L", size[::-1], 255).rotate(degrees, Image.BILINEAR)) == 255
    inside[1:-1, 1:-1] &= inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
    inside[[0, -1]] = inside[:, [0, -1]] = False
    assert inside.mean() > 0.2
    assert np.abs(turned - expected)[inside].max() <= 1.1


def test_what_comes_from_outside_is_black():
    white = torch.full((1, 3, 40, 40), 255, dtype=torch.uint8)
    turned = jitter_views(white, torch.tensor([[45.0, 0, 0, 0]]), rotate=True)
    assert turned[0, :, 0, 0].tolist() == [0, 0, 0]
    assert turned[0, :, 20, 20].tolist() == [255, 255, 255]


@pytest.mark.parametrize("rotate", [False, True])
def test_shifts_are_added_to_their_channels_and_cut(rotate):
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    jitter = torch.tensor([[0.0, 20, -20, 3.5], [0, 0, 0, 0], [0, -255, 255, 0], [0, 1, 2, 3], [0, -0.5, 0.5, 0]])
    result = jitter_views(images, jitter, rotate=rotate)
    expected = (images.double() + jitter[:, 1:, None, None].double()).clamp(0, 255)
    # Weights of a turn by 0 degrees are 0 and 1 but for the rounding of coordinates of up to 8 pixels: 2^-24 * 8 * 255.
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=2e-3 if rotate else 2e-5)
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_one_channel_takes_the_first_shift():
    grey = torch.full((2, 1, 4, 4), 100, dtype=torch.uint8)
    result = jitter_views(grey, torch.tensor([[0.0, 5, 50, 90], [0, -5, 0, 0]]), rotate=False)
    assert result[:, 0, 0, 0].tolist() == [105, 95]


def test_each_image_is_turned_by_its_own_angle():
    images = torch.cat([as_batch(smooth(32, 32, seed)) for seed in range(3)])
    jitter = torch.tensor([[5.0, 1, 2, 3], [-7, 4, 5, 6], [0, 0, 0, 0]])
    together = jitter_views(images, jitter, rotate=True)
    for n in range(3):
        alone = jitter_views(images[n : n + 1], jitter[n : n + 1], rotate=True)
        torch.testing.assert_close(together[n : n + 1], alone, rtol=0, atol=1e-3)


def test_teacher_and_student_see_the_jittered_view():
    seen = {}

    class Student(torch.nn.Module):
        def forward(self, images_NCHW):
            seen["student"] = images_NCHW
            return images_NCHW.mean((2, 3))

    def teacher(images_NCHW):
        seen["teacher"] = images_NCHW
        return images_NCHW.mean((2, 3))

    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    jitter = torch.tensor([[9.0, 10, -10, 5]] * 4)
    normalise = Normaliser((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), CPU, torch.float32)
    prepare = make_prepare(normalise, JitterPolicy(rotation_degrees=10))
    forward = make_forward(Student(), plain(lambda z, y, v: (z - v).sum()), teacher, prepare)
    forward(images, torch.zeros(4, dtype=torch.int64), jitter)
    assert torch.equal(seen["student"], seen["teacher"])
    assert torch.equal(seen["student"], normalise(jitter_views(images, jitter, rotate=True)))


def test_the_resident_loader_hands_out_the_rows_of_its_samples():
    split = Split(np.zeros((10, 4, 4, 3), np.uint8), np.arange(10), np.arange(10))
    policy = ShiftCrop(4, 4, 1, flip=True, jitter=JitterPolicy(5, 7))
    views = training_views(split.ids, policy, 0, 0, 0)
    for batch in ResidentLoader(split, 1, CPU).batches(views, 4):
        np.testing.assert_array_equal(batch.jitter, views.jitter[batch.ids])
