"""Views of photographs: crops drawn one at a time by plain arithmetic, their distribution, the way to stored pixels."""

import math

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from fastgen.crops import JitterPolicy, ResizedCrop, ShiftCrop, _exp
from fastgen.philox import philox4x32
from fastgen.shapes import part_bounds
from fastgen.views import (
    EpochViews,
    Share,
    batch_positions,
    evaluation_views,
    require_inside,
    to_stored,
    training_views,
)

KINDS = [(375, 500), (500, 375), (100, 900), (900, 100), (7, 5), (1, 1), (256, 256), (1, 4000), (2000, 3)]


def sizes_of(count):
    return np.array([KINDS[n % len(KINDS)] for n in range(count)], np.int32)


def words_of(sample, epoch, generation, stream, seed=0):
    return [int(w) for w in philox4x32(np.array([sample, epoch, generation, stream], np.uint32), (seed, 0))]


def crop_by_hand(sample, height, width, epoch, generation, seed, area=(0.08, 1.0), aspect=(3 / 4, 4 / 3)):
    """torchvision's algorithm with Python's own arithmetic."""
    for attempt in range(10):
        u = words_of(sample, epoch, generation, 16 + attempt, seed)
        target = height * width * (area[0] + u[0] / 2**32 * (area[1] - area[0]))
        log_aspect = math.log(aspect[0]) + u[1] / 2**32 * (math.log(aspect[1]) - math.log(aspect[0]))
        h = round(math.sqrt(target / math.exp(log_aspect)))
        w = round(math.sqrt(target * math.exp(log_aspect)))
        if 0 < w <= width and 0 < h <= height:
            return [u[2] * (height - h + 1) // 2**32, u[3] * (width - w + 1) // 2**32, h, w]
    h, w = height, width
    if width / height < aspect[0]:
        h = max(round(width / aspect[0]), 1)
    elif width / height > aspect[1]:
        w = max(round(height * aspect[1]), 1)
    return [(height - h) // 2, (width - w) // 2, h, w]


def test_every_row_is_what_plain_arithmetic_gives():
    count, seed, generation, epoch = 900, 12345, 2, 7
    ids, sizes = np.arange(1000, 1000 + count), sizes_of(count)
    views = training_views(ids, ResizedCrop(), seed, generation, epoch, sizes=sizes, resolution_px=224)
    for row, sample, (height, width) in zip(views.table.tolist(), ids.tolist(), sizes.tolist(), strict=True):
        assert row[:4] == crop_by_hand(sample, height, width, epoch, generation, seed)
        assert row[4] == words_of(sample, epoch, generation, 3, seed)[0] >> 31
    assert (views.height_px, views.width_px) == (224, 224)
    assert views.jitter is None


@pytest.mark.parametrize("some", [slice(0, 1), slice(40, 90), slice(None, None, -3)])
def test_a_row_depends_on_its_sample_alone(some):
    ids, sizes = np.arange(200_000, 200_400), sizes_of(400)
    policy = ResizedCrop(jitter=JitterPolicy(10, 20))
    whole = training_views(ids, policy, 1, 2, 3, sizes=sizes, resolution_px=64)
    part = training_views(ids[some], policy, 1, 2, 3, sizes=sizes[some], resolution_px=64)
    np.testing.assert_array_equal(part.table, whole.table[some])
    np.testing.assert_array_equal(part.jitter, whole.jitter[some])


def test_chunks_do_not_show(monkeypatch):
    from fastgen import crops, philox

    arguments = (np.arange(500), ResizedCrop(), 0, 0, 0)
    whole = training_views(*arguments, sizes=sizes_of(500), resolution_px=64).table
    monkeypatch.setattr(crops, "CHUNK", 7)
    monkeypatch.setattr(philox, "CHUNK", 5)
    np.testing.assert_array_equal(training_views(*arguments, sizes=sizes_of(500), resolution_px=64).table, whole)


@pytest.mark.parametrize("other", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_seed_generation_and_epoch_each_count(other):
    ids, sizes = np.arange(2000), np.full((2000, 2), 400, np.int32)
    policy = ResizedCrop(jitter=JitterPolicy(10, 20))
    one, two = (training_views(ids, policy, *where, sizes=sizes, resolution_px=64) for where in [(0, 0, 0), other])
    assert (one.table[:, :4] == two.table[:, :4]).all(axis=1).mean() < 0.01
    assert (one.table[:, 4] == two.table[:, 4]).mean() == pytest.approx(0.5, abs=0.06)
    assert (one.jitter == two.jitter).mean() < 0.01


@pytest.mark.parametrize("size", [(375, 500), (100, 900), (60, 45)])
def test_crops_are_distributed_as_torchvisions(size):
    """Kolmogorov-Smirnov on area, aspect and place; 5,000 draws each. The bound is passed by chance once in 10,000."""
    count = 5000
    sizes = np.tile(np.array(size, np.int32), (count, 1))
    ours = training_views(np.arange(count), ResizedCrop(), 3, 0, 0, sizes=sizes, resolution_px=224).table
    torch.manual_seed(0)
    image = torch.empty(1, *size)
    theirs = np.array([RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(count)])
    bound = math.sqrt(-0.5 * math.log(0.0001 / 2)) * math.sqrt(2 / count)
    for name, of in {
        "area": lambda t: t[:, 2] * t[:, 3],
        "aspect": lambda t: t[:, 3] / t[:, 2],
        "top": lambda t: (t[:, 0] + 0.5) / (size[0] - t[:, 2] + 1),
        "left": lambda t: (t[:, 1] + 0.5) / (size[1] - t[:, 3] + 1),
    }.items():
        mine, other = np.sort(of(ours)), np.sort(of(theirs))
        points = np.concatenate([mine, other])
        distance = (
            np.abs(np.searchsorted(mine, points, side="right") - np.searchsorted(other, points, side="right")).max()
            / count
        )
        assert distance < bound, name


def test_flips_are_half_and_can_be_left_out():
    arguments = (np.arange(4000), 0, 0, 0)
    sizes = sizes_of(4000)

    def flips(policy):
        return training_views(arguments[0], policy, *arguments[1:], sizes=sizes, resolution_px=32).table[:, 4]

    assert flips(ResizedCrop()).mean() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(4000))
    assert not flips(ResizedCrop(flip=False)).any()


def test_without_augmentation_training_sees_the_evaluations_views():
    ids, sizes = np.arange(100), sizes_of(100)
    policy = ResizedCrop(random=False, flip=False)
    train = training_views(ids, policy, 0, 0, 0, sizes=sizes, resolution_px=96)
    np.testing.assert_array_equal(train.table, evaluation_views(ids, policy, sizes=sizes, resolution_px=96).table)
    assert train.order.tolist() != list(range(100))


def test_evaluation_takes_the_centre_square():
    sizes = np.array([(256, 341), (500, 375), (1, 9), (8, 8)], np.int32)
    views = evaluation_views(np.arange(4), ResizedCrop(), sizes=sizes, resolution_px=224)
    # 224 of 256: seven eighths of the short side, halves to the even number.
    assert views.table.tolist() == [
        [16, 58, 224, 224, 0],
        [86, 23, 328, 328, 0],
        [0, 4, 1, 1, 0],
        [0, 0, 7, 7, 0],
    ]
    assert views.order.tolist() == [0, 1, 2, 3]


def test_pictures_need_sizes():
    with pytest.raises(ValueError, match="sizes"):
        training_views(np.arange(3), ResizedCrop(), 0, 0, 0)


def test_exponential_needs_no_library():
    x = np.linspace(-3.9, 3.9, 4001)
    ours, exact = _exp(x), np.array([math.exp(value) for value in x])
    # Two roundings of the series, times 32 by five squarings, which add 1 + 2 + 4 + 8 + 16 of their own.
    assert np.abs(ours / exact - 1).max() < (2 * 32 + 31) * 2**-53


def test_jitter_fills_its_ranges_evenly():
    count = 20_000
    policy = ResizedCrop(jitter=JitterPolicy(rotation_degrees=10, pixel_shift=20))
    jitter = training_views(np.arange(count), policy, 0, 0, 0, sizes=sizes_of(count), resolution_px=32).jitter
    assert jitter.dtype == np.float32
    for column, half in zip(jitter.T, (10, 20, 20, 20), strict=True):
        assert np.abs(column).max() <= half
        np.testing.assert_allclose(
            np.quantile(column, [0, 0.25, 0.5, 0.75, 1]) / half, [-1, -0.5, 0, 0.5, 1], atol=0.03
        )
    correlation = np.corrcoef(jitter.T) - np.eye(4)
    assert np.abs(correlation).max() < 5 / math.sqrt(count)


def test_jitter_of_small_images_leaves_their_crops_alone():
    ids = np.arange(50)
    plain = training_views(ids, ShiftCrop(8, 8, 1, flip=True), 0, 0, 0)
    jittered = training_views(ids, ShiftCrop(8, 8, 1, flip=True, jitter=JitterPolicy(5)), 0, 0, 0)
    np.testing.assert_array_equal(plain.table, jittered.table)
    assert jittered.jitter[:, 0].any()
    assert not jittered.jitter[:, 1:].any()


def edges_by_hand(begin, length, whole, stored):
    first, last = (math.floor(edge * stored / whole + 0.5) for edge in (begin, begin + length))
    first = min(first, stored - 1)
    return first, max(last - first, 1)


def test_the_way_to_stored_pixels_is_the_written_rule():
    sizes = sizes_of(900)
    random = np.random.default_rng(0)
    stored = np.maximum((sizes * random.uniform(0.1, 1.2, (900, 1))).astype(np.int32), 1)
    table = training_views(np.arange(900), ResizedCrop(), 0, 0, 0, sizes=sizes, resolution_px=64).table
    mapped = to_stored(table, sizes, stored)
    for row, new, (height, width), (stored_height, stored_width) in zip(
        table.tolist(), mapped.tolist(), sizes.tolist(), stored.tolist(), strict=True
    ):
        top, rows = edges_by_hand(row[0], row[2], height, stored_height)
        left, columns = edges_by_hand(row[1], row[3], width, stored_width)
        assert new == [top, left, rows, columns, row[4]]
    require_inside(EpochViews(np.arange(900), mapped, 64, 64), stored)


def test_the_way_to_pixels_of_the_same_size_changes_nothing():
    sizes = sizes_of(300)
    table = training_views(np.arange(300), ResizedCrop(), 0, 0, 0, sizes=sizes, resolution_px=64).table
    np.testing.assert_array_equal(to_stored(table, sizes, sizes), table)


@pytest.mark.parametrize(
    "row", [[-1, 0, 2, 2, 0], [0, 0, 11, 2, 0], [0, 3, 2, 18, 0], [0, 0, 0, 5, 0], [9, 19, 2, 1, 0], [0, 0, 5, -1, 0]]
)
def test_a_view_outside_its_picture_is_refused(row):
    sizes = np.array([(10, 20), (10, 20)], np.int32)
    good = [0, 0, 10, 20, 0]
    require_inside(EpochViews(np.arange(2), np.array([good, good], np.int32), 8, 8), sizes)
    with pytest.raises(ValueError, match="position 1 is not inside"):
        require_inside(EpochViews(np.arange(2), np.array([good, row], np.int32), 8, 8), sizes)


@pytest.mark.parametrize("order", [[0, 2], [-1, 0], [5, 1]])
def test_an_order_beyond_the_samples_is_refused(order):
    table = np.tile(np.array([0, 0, 5, 5, 0], np.int32), (2, 1))
    with pytest.raises(ValueError, match="2 samples were given"):
        require_inside(EpochViews(np.array(order), table, 8, 8), np.full((2, 2), 9, np.int32))


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (8, 4), (3, 8), (11, 5), (1, 1), (0, 3)])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_shares_of_all_ranks_are_the_batches(count, batch_size, world):
    order = np.random.default_rng(0).permutation(count)
    ranks = [list(batch_positions(order, batch_size, 0, Share(rank, world))) for rank in range(world)]
    batches = [order[begin : begin + batch_size] for begin in range(0, count, batch_size)]
    assert all(len(parts) == len(batches) for parts in ranks)
    for number, batch in enumerate(batches):
        parts = [ranks[rank][number] for rank in range(world)]
        np.testing.assert_array_equal(np.concatenate(parts), batch)
        lengths = [len(part) for part in parts]
        assert max(lengths) - min(lengths) <= 1
        # The same bounds as of the parts in which one process takes a batch: it can do what several do, bit for bit.
        ends = [0, *np.cumsum(lengths).tolist()]
        assert sorted(set(ends)) == part_bounds(len(batch), world)


def test_a_later_first_batch_is_the_rest():
    order = np.arange(23)[::-1]
    whole = list(batch_positions(order, 5))
    for first in range(6):
        rest = list(batch_positions(order, 5, first))
        assert [part.tolist() for part in rest] == [part.tolist() for part in whole[first:]]
