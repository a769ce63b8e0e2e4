"""augment.py and the loaders: the same pixels as a plain numpy pad, crop and flip of each image."""

import numpy as np
import pytest
import torch

from fastgen.augment import Normaliser, Windows, crop_and_flip
from fastgen.crops import ShiftCrop
from fastgen.data.facts import DATASETS
from fastgen.data.resident import ResidentLoader
from fastgen.data.split import Split
from fastgen.data.synthetic import SyntheticLoader
from fastgen.views import EpochViews, evaluation_views, training_views

CPU = torch.device("cpu")


def random_split(images, height, width, channels, seed=0):
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (images, height, width, channels), dtype=np.uint8)
    # Ids with gaps, as in a part of a data set, and labels that tell them.
    ids = np.sort(random.choice(10 * images, images, replace=False)).astype(np.int64)
    return Split(pixels, ids % 7, ids)


def plain_view(image_HWC, pad, row):
    top, left, height, width, flip = row
    padded = np.zeros((image_HWC.shape[0] + 2 * pad, image_HWC.shape[1] + 2 * pad, image_HWC.shape[2]), np.uint8)
    padded[pad : pad + image_HWC.shape[0], pad : pad + image_HWC.shape[1]] = image_HWC
    view = padded[top + pad : top + pad + height, left + pad : left + pad + width]
    return (view[:, ::-1] if flip else view).transpose(2, 0, 1)


def require_channels_last(images_NCHW):
    """Pixels of one image lie as H, W, C; strides of dimensions of size 1 mean nothing."""
    _, channels, height, width = images_NCHW.shape
    assert images_NCHW.is_contiguous(memory_format=torch.channels_last)
    if channels > 1 and min(height, width) > 1:
        assert images_NCHW.stride()[1:] == (1, width * channels, channels)


def require_same(batches, split, views, batch_size, pad, first_batch=0):
    order = views.order[first_batch * batch_size :]
    assert [len(batch.labels) for batch in batches] == [
        min(batch_size, len(order) - start) for start in range(0, len(order), batch_size)
    ]
    places = iter(order)
    for batch in batches:
        assert batch.images_NCHW.dtype == torch.uint8
        require_channels_last(batch.images_NCHW)
        for image_CHW, label, id_ in zip(batch.images_NCHW, batch.labels, batch.ids, strict=True):
            place = next(places)
            assert id_ == split.ids[place]
            assert label == split.labels[place]
            np.testing.assert_array_equal(image_CHW, plain_view(split.images_NHWC[place], pad, views.table[place]))


@pytest.mark.parametrize(
    ("shape", "pad", "batch_size", "first_batch"),
    [
        ((50, 32, 32, 3), 4, 16, 0),  # last batch of 2
        ((50, 32, 32, 3), 4, 16, 2),  # stopped in the middle of an epoch
        ((50, 32, 32, 3), 4, 16, 3),  # only the partial batch is left
        ((48, 8, 8, 1), 1, 16, 0),  # one channel, no partial batch
        ((10, 8, 8, 3), 0, 4, 1),  # no padding
        ((7, 5, 9, 3), 3, 100, 0),  # not square, one batch larger than the set
        ((1, 8, 8, 3), 2, 4, 0),  # one sample
        ((6, 4, 4, 2), 6, 1, 0),  # more padding than image: crops that see nothing of it
    ],
)
def test_resident_batches_equal_plain_crops(shape, pad, batch_size, first_batch):
    split = random_split(*shape)
    policy = ShiftCrop(shape[1], shape[2], pad, flip=True)
    for epoch in range(2):
        views = training_views(split.ids, policy, 3, 1, epoch)
        loader = ResidentLoader(split, pad, CPU)
        assert len(loader) == shape[0]
        require_same(list(loader.batches(views, batch_size, first_batch)), split, views, batch_size, pad, first_batch)


def test_every_corner_and_both_flips_of_one_image():
    pad, split = 2, random_split(1, 6, 7, 3)
    rows = [(top, left, 6, 7, flip) for top in range(-2, 3) for left in range(-2, 3) for flip in (0, 1)]
    windows = Windows(torch.from_numpy(split.images_NHWC), pad)
    images = crop_and_flip(windows, torch.zeros(len(rows), dtype=torch.int64), torch.tensor(rows))
    require_channels_last(images)
    for image, row in zip(images, rows, strict=True):
        np.testing.assert_array_equal(image, plain_view(split.images_NHWC[0], pad, row))
    assert len({image.numpy().tobytes() for image in images}) == len(rows)


def test_evaluation_sees_the_stored_pixels():
    split = random_split(11, 8, 8, 3)
    views = evaluation_views(split.ids, ShiftCrop(8, 8, 4, flip=True))
    batches = list(ResidentLoader(split, 4, CPU).batches(views, 4))
    shown = torch.cat([batch.images_NCHW for batch in batches]).numpy()
    np.testing.assert_array_equal(shown.transpose(0, 2, 3, 1), split.images_NHWC)
    np.testing.assert_array_equal(torch.cat([batch.ids for batch in batches]), split.ids)


def test_a_batch_stays_as_it_was():
    split = random_split(8, 8, 8, 3)
    before = split.images_NHWC.copy()
    loader = ResidentLoader(split, 1, CPU)
    views = training_views(split.ids, ShiftCrop(8, 8, 1, flip=True), 0, 0, 0)
    first, second = loader.batches(views, 4)
    first.images_NCHW.zero_()
    second.images_NCHW.zero_()
    require_same(list(loader.batches(views, 4)), split, views, 4, 1)
    np.testing.assert_array_equal(split.images_NHWC, before)


@pytest.mark.parametrize("dataset", sorted(DATASETS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_normaliser_equals_fp64(dataset, dtype):
    facts = DATASETS[dataset]
    images = torch.arange(256, dtype=torch.uint8).repeat(2, facts.channels, 1, 1)
    result = Normaliser(facts.mean, facts.std, CPU, dtype)(images)
    mean, std = (np.array(values)[None, :, None, None] for values in (facts.mean, facts.std))
    expected = (images.numpy() / 255 - mean) / std
    # Scale, shift, product and sum are rounded at most at the size of pixel * scale or of shift, both below 4; then
    # one rounding to the dtype: 2^-8 relative in bf16, 2^-11 in fp16.
    fp32 = 4 * 4 * 2.0**-24
    last = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    assert result.dtype == dtype
    np.testing.assert_allclose(result.double().numpy(), expected, rtol=last, atol=fp32)


def test_normaliser_keeps_channels_last_and_the_image():
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8).to(memory_format=torch.channels_last)
    before = images.clone()
    result = Normaliser((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), CPU, torch.float32)(images)
    require_channels_last(result)
    assert torch.equal(images, before)


def test_normalised_training_set_has_mean_zero_and_spread_one():
    """The facts are of the data they are used on: digits are at hand everywhere."""
    from fastgen.data.digits import read_digits

    facts = DATASETS["digits"]
    train, _, _ = read_digits()
    images = torch.from_numpy(train.images_NHWC).permute(0, 3, 1, 2)
    result = Normaliser(facts.mean, facts.std, CPU, torch.float32)(images).double()
    # The facts are rounded to 4 decimals, an error of 0.5e-4 / std.
    assert abs(result.mean().item()) < 2e-4
    assert abs(result.std().item() - 1) < 2e-4


@pytest.mark.parametrize(("samples", "batch_size", "first_batch"), [(50, 16, 0), (50, 16, 3), (5, 16, 0), (32, 16, 1)])
def test_synthetic_loader_keeps_the_contract(samples, batch_size, first_batch):
    facts = DATASETS["cifar100"]
    ids = np.arange(samples)
    views = training_views(ids, ShiftCrop(32, 32, 4, flip=True), 0, 0, 0)
    loader = SyntheticLoader(samples, facts, CPU)
    batches = list(loader.batches(views, batch_size, first_batch))
    assert len(loader) == samples
    np.testing.assert_array_equal(torch.cat([batch.ids for batch in batches]), views.order[first_batch * batch_size :])
    for batch in batches:
        assert batch.images_NCHW.shape == (len(batch.ids), 3, 32, 32)
        assert batch.labels.shape == batch.ids.shape
        assert batch.images_NCHW.dtype == torch.uint8
        require_channels_last(batch.images_NCHW)
    # The same random images in every step, of all values, with labels of all classes.
    full = max(batches, key=lambda batch: len(batch.ids))
    assert torch.equal(batches[-1].images_NCHW, full.images_NCHW[: len(batches[-1].ids)])
    # The mean of n uniform bytes is 127.5 with a spread of 73.9 / sqrt(n).
    spread = 73.9 / full.images_NCHW.numel() ** 0.5
    assert abs(full.images_NCHW.double().mean().item() - 127.5) < 5 * spread
    assert full.labels.min() >= 0
    assert full.labels.max() < facts.classes
    again = next(iter(SyntheticLoader(samples, facts, CPU).batches(views, batch_size)))
    assert torch.equal(again.images_NCHW[: len(batches[0].ids)], batches[0].images_NCHW)


def test_synthetic_batches_are_as_large_as_they_are_asked_for():
    """Evaluation asks for larger batches than training: every sample must be counted all the same."""
    views = EpochViews(np.arange(300), np.zeros((300, 5), np.int32), 8, 8)
    loader = SyntheticLoader(300, DATASETS["digits"], CPU)
    for batch in loader.batches(views, 200):
        assert len(batch.images_NCHW) == len(batch.labels) == len(batch.ids)
