"""views.py: the generator against its published answers, rows that depend on their sample alone, uniform draws."""

import numpy as np
import pytest

from fastgen.crops import ShiftCrop
from fastgen.philox import philox4x32
from fastgen.selection import class_balanced, holdout_split
from fastgen.views import evaluation_views, training_views

POLICY = ShiftCrop(height_px=32, width_px=32, pad_px=4, flip=True)
IDS = np.arange(50_000, dtype=np.int64)


# Known answers of Random123 (kat_vectors, philox4x32 10).
@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter, key, answer):
    words = np.array([[int(word, 16) for word in counter.split()]], np.uint32)
    k0, k1 = (int(word, 16) for word in key.split())
    assert [f"{word:08x}" for word in philox4x32(words, (k0, k1))[0]] == answer.split()


def test_philox_of_many_counters_is_that_of_each():
    counters = np.random.default_rng(0).integers(0, 2**32, (3, 5, 4), dtype=np.uint32)
    together = philox4x32(counters, (7, 11))
    for place in np.ndindex(3, 5):
        np.testing.assert_array_equal(together[place], philox4x32(counters[place], (7, 11)))


def test_a_row_is_written_down():
    """The stream itself is a contract: runs resume under later versions, and other backends must show the same view."""
    views = training_views(np.array([0, 1, 49_999]), POLICY, data_seed=0, generation=0, epoch=0)
    # Counter (id, epoch 0, generation 0, crop stream 1), key 0; a corner is floor(word * 9 / 2^32) - 4.
    for row, sample in zip(views.table, (0, 1, 49_999), strict=True):
        words = philox4x32(np.array([sample, 0, 0, 1], np.uint32), (0, 0))
        expected = [int(words[0]) * 9 // 2**32 - 4, int(words[1]) * 9 // 2**32 - 4, 32, 32, int(words[2]) >> 31]
        assert row.tolist() == expected


def test_every_coordinate_has_its_word_of_the_counter_and_key():
    """The seed's 64 bits are the key, low word first; epoch and generation are counter words 1 and 2."""
    seed, generation, epoch = 0x0123456789ABCDEF, 3, 17
    views = training_views(np.array([42]), POLICY, seed, generation, epoch)
    words = philox4x32(np.array([42, epoch, generation, 1], np.uint32), (0x89ABCDEF, 0x01234567))
    assert views.table[0, :2].tolist() == [int(word) * 9 // 2**32 - 4 for word in words[:2]]


@pytest.mark.parametrize("chosen", ["first half", "every seventh", "one", "shuffled"])
def test_a_row_depends_on_its_sample_alone(chosen):
    whole = training_views(IDS, POLICY, 5, 1, 2)
    some = {
        "first half": IDS[:25_000],
        "every seventh": IDS[::7],
        "one": IDS[31_415:31_416],
        "shuffled": np.random.default_rng(1).permutation(IDS),
    }[chosen]
    part = training_views(some, POLICY, 5, 1, 2)
    np.testing.assert_array_equal(part.table, whole.table[some])
    # The order too: samples that stay keep their sequence.
    staying = whole.order[np.isin(whole.order, some)]
    np.testing.assert_array_equal(some[part.order], staying)


def test_order_is_a_permutation():
    order = training_views(IDS, POLICY, 0, 0, 0).order
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), IDS)
    assert not np.array_equal(order, IDS)


@pytest.mark.parametrize("other", [(0, 0, 1), (0, 1, 0), (1, 0, 0), (2**32, 0, 0), (2**63 - 1, 0, 0)])
def test_epoch_generation_and_seed_change_order_and_views(other):
    ids = IDS[:2000]
    one, two = training_views(ids, POLICY, 0, 0, 0), training_views(ids, POLICY, *other)
    # Two independent permutations agree in 1 place on average; more than 10 has a chance of 1e-8.
    assert (one.order == two.order).sum() <= 10
    # Two independent rows agree with a chance of 1/162: 12 of 2000 on average.
    assert (one.table == two.table).all(1).sum() <= 40


def test_coordinates_do_not_stand_in_for_each_other():
    tables = [training_views(IDS[:500], POLICY, *c).table for c in [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)]]
    for one in range(4):
        for two in range(one):
            assert (tables[one] == tables[two]).all(1).mean() < 0.1


def test_the_same_coordinates_give_the_same_views():
    one, two = training_views(IDS, POLICY, 9, 2, 3), training_views(IDS, POLICY, 9, 2, 3)
    np.testing.assert_array_equal(one.order, two.order)
    np.testing.assert_array_equal(one.table, two.table)


def require_uniform(counts):
    """Chi-square has mean df and variance 2 df: within 5 standard deviations, and not too even either."""
    counts = np.asarray(counts)
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    chi_square = ((counts - expected) ** 2 / expected).sum()
    spread = np.sqrt(2 * freedom)
    assert max(freedom - 5 * spread, 0) <= chi_square <= freedom + 5 * spread


def test_corners_and_flips_are_uniform_together():
    table = training_views(IDS, POLICY, 0, 0, 0).table
    cells = (table[:, 0] + 4) * 18 + (table[:, 1] + 4) * 2 + table[:, 4]
    require_uniform(np.bincount(cells, minlength=162))


def test_views_of_one_sample_are_uniform_over_epochs():
    rows = np.concatenate([training_views(IDS[7:8], POLICY, 0, 0, epoch).table for epoch in range(2000)])
    require_uniform(np.bincount((rows[:, 0] + 4) * 9 + rows[:, 1] + 4, minlength=81))
    require_uniform(np.bincount(rows[:, 4], minlength=2))


def test_places_in_the_order_are_uniform_and_independent_of_views():
    views = training_views(IDS, POLICY, 0, 0, 0)
    place = np.empty(len(IDS), np.int64)
    place[views.order] = np.arange(len(IDS))
    early = place * 10 // len(IDS)
    require_uniform(np.bincount(early * 10 + IDS * 10 // len(IDS), minlength=100))
    require_uniform(np.bincount(early * 9 + views.table[:, 0] + 4, minlength=90))


@pytest.mark.parametrize("pad", [0, 1, 4])
def test_corners_reach_the_whole_padding_and_no_further(pad):
    table = training_views(IDS, ShiftCrop(8, 12, pad, flip=False), 0, 0, 0).table
    for column in (0, 1):
        assert sorted(set(table[:, column].tolist())) == list(range(-pad, pad + 1))
    assert (table[:, 2:] == (8, 12, 0)).all()


def test_without_flip_the_crops_stay_the_same():
    with_flip = training_views(IDS, POLICY, 0, 0, 0).table
    without = training_views(IDS, ShiftCrop(32, 32, 4, flip=False), 0, 0, 0).table
    np.testing.assert_array_equal(with_flip[:, :4], without[:, :4])
    assert with_flip[:, 4].any()


def test_evaluation_shows_every_whole_image_once_in_order():
    views = evaluation_views(np.array([9, 4, 7]), ShiftCrop(8, 12, 2, flip=True))
    assert views.order.tolist() == [0, 1, 2]
    assert views.table.tolist() == [[0, 0, 8, 12, 0]] * 3


@pytest.fixture
def labels():
    return np.random.default_rng(0).permutation(np.arange(1000) % 10)


@pytest.mark.parametrize("count", [10, 100, 997, 13])
def test_class_balanced_takes_the_first_of_each_class(labels, count):
    positions = class_balanced(labels, count, 10)
    assert len(positions) == count
    assert (np.diff(positions) > 0).all()
    for label in range(10):
        wanted = count // 10 + (label < count % 10)
        np.testing.assert_array_equal(positions[labels[positions] == label], np.flatnonzero(labels == label)[:wanted])


def test_class_balanced_refuses_what_a_class_does_not_have(labels):
    with pytest.raises(ValueError, match="class 0 has 100 images, 101 are wanted"):
        class_balanced(labels, 1001, 10)


@pytest.mark.parametrize("count", [10, 200, 105])
def test_holdout_is_balanced_disjoint_and_complete(labels, count):
    ids = np.arange(1000)
    kept, held = holdout_split(ids, labels, count, 10)
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, held])), ids)
    assert len(held) == count
    assert np.ptp(np.bincount(labels[held], minlength=10)) <= 1
    assert (np.diff(kept) > 0).all()
    assert (np.diff(held) > 0).all()


def test_holdout_is_drawn_and_not_the_first_of_each_class(labels):
    _, held = holdout_split(np.arange(1000), labels, 200, 10)
    # 200 draws out of 1000: the mean position is 499.5 with a spread of 289 / sqrt(200) = 20.
    assert abs(held.mean() - 499.5) < 100
    assert not np.array_equal(held, class_balanced(labels, 200, 10))


def test_a_smaller_holdout_is_part_of_a_larger_one(labels):
    small, large = (set(holdout_split(np.arange(1000), labels, count, 10)[1].tolist()) for count in (100, 300))
    assert small < large


def test_holdout_follows_the_ids_not_the_positions(labels):
    ids, mixed = np.arange(1000), np.random.default_rng(2).permutation(1000)
    _, held = holdout_split(ids, labels, 200, 10)
    _, held_of_mixed = holdout_split(ids[mixed], labels[mixed], 200, 10)
    assert set(mixed[held_of_mixed].tolist()) == set(held.tolist())
