"""schedule.py: milestones fall where the paper has them, whatever the length of the run."""

import itertools
import math

import numpy as np
import pytest

from fastgen.config import DataSettings, TrainSettings
from fastgen.schedule import make_schedule, resolution_px


def schedule_of(images=50_000, **settings):
    return make_schedule(TrainSettings(**{"epochs": 164, "batch_size": 128, "lr": 0.1} | settings), images)


def test_the_papers_milestones_are_epoch_starts():
    schedule = schedule_of()
    assert schedule.steps_per_epoch == 391
    assert schedule.total_steps == 164 * 391
    assert schedule.milestone_steps == (82 * 391, 123 * 391)


@pytest.mark.parametrize(
    ("step", "lr"),
    [
        (0, 0.1),
        (82 * 391 - 1, 0.1),
        (82 * 391, 0.01),
        (123 * 391 - 1, 0.01),
        (123 * 391, 0.001),
        (164 * 391 - 1, 0.001),
    ],
)
def test_learning_rate_on_each_side_of_a_milestone(step, lr):
    assert schedule_of().lr(step) == pytest.approx(lr, rel=1e-14)


@pytest.mark.parametrize(
    ("images", "batch_size", "steps"), [(50_000, 128, 391), (128, 128, 1), (129, 128, 2), (5, 128, 1), (6, 1, 6)]
)
def test_the_last_batch_of_an_epoch_may_be_smaller(images, batch_size, steps):
    assert schedule_of(images, batch_size=batch_size).steps_per_epoch == steps


@pytest.mark.parametrize("epochs", [2, 4, 20, 60, 200])
def test_a_shorter_run_is_the_same_schedule_scaled(epochs):
    schedule = schedule_of(epochs=epochs)
    assert schedule.milestone_steps == (round(epochs * 391 * 0.5), round(epochs * 391 * 0.75))
    rates = [schedule.lr(step) for step in range(schedule.total_steps)]
    assert rates.count(0.1) == schedule.total_steps // 2
    assert rates == sorted(rates, reverse=True)


def test_a_fraction_that_is_no_epoch_start_is_the_nearest_step():
    # 3 epochs of 3 steps: 0.5 -> 4.5 -> 4 (Python rounds half to even), 0.75 -> 6.75 -> 7.
    assert schedule_of(3, epochs=3, batch_size=1).milestone_steps == (4, 7)


def test_milestones_and_factor_of_the_recipe_are_used():
    schedule = schedule_of(10, epochs=10, batch_size=10, lr=1.0, lr_milestones=(0.2, 0.4, 0.9), lr_factor=0.5)
    assert [schedule.lr(step) for step in range(10)] == [1, 1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 0.25, 0.125]


def test_without_milestones_the_rate_stays():
    schedule = schedule_of(lr_milestones=())
    assert schedule.lr(0) == schedule.lr(schedule.total_steps - 1) == 0.1


def test_warmup_grows_by_equal_steps_to_the_peak():
    schedule = schedule_of(1280, epochs=10, lr=2.0, warmup_epochs=1.5)
    assert schedule.warmup_steps == 15
    np.testing.assert_allclose([schedule.lr(step) for step in range(15)], 2.0 * np.arange(1, 16) / 15, rtol=1e-14)
    assert schedule.lr(15) == 2.0


@pytest.mark.parametrize(("shape", "middle"), [("cosine", (1 + math.cos(math.pi / 2)) / 2), ("triangular", 0.5)])
def test_cosine_and_triangle_fall_to_nothing(shape, middle):
    schedule = schedule_of(1280, epochs=12, lr=2.0, lr_schedule=shape, warmup_epochs=2)
    rates = [schedule.lr(step) for step in range(schedule.total_steps)]
    assert max(rates) == rates[20] == rates[19] == 2.0
    assert rates[70] == pytest.approx(2.0 * middle, rel=1e-12)
    assert all(earlier > later > 0 for earlier, later in itertools.pairwise(rates[20:]))
    # One step more and the triangle would be at 0.
    if shape == "triangular":
        np.testing.assert_allclose(np.diff(rates[20:]), -2.0 / 100, rtol=1e-9)
        assert rates[-1] == pytest.approx(2.0 / 100)


def test_the_papers_photograph_schedule():
    """Learning rate 0.6, a tenth of it after 30, 60 and 90 of 100 epochs of 1,252 steps."""
    schedule = schedule_of(1_281_167, epochs=100, batch_size=1024, lr=0.6, lr_milestones=(0.3, 0.6, 0.9))
    assert schedule.steps_per_epoch == 1252
    for epoch, rate in ((0, 0.6), (29, 0.6), (30, 0.06), (59, 0.06), (60, 0.006), (90, 0.0006), (99, 0.0006)):
        assert schedule.lr(epoch * 1252) == pytest.approx(rate, rel=1e-12)
        assert schedule.lr(epoch * 1252 + 1251) == pytest.approx(rate, rel=1e-12)


def sides(epochs, **settings):
    data = DataSettings(dataset="imagenet", backend="folder", **settings)
    return [resolution_px(data, epochs, epoch) for epoch in range(epochs)]


def test_one_resolution_is_kept():
    assert sides(5, resolution_px=224) == [224] * 5


def test_resolution_grows_along_the_ramp_in_multiples_of_32():
    grown = sides(88, start_resolution_px=160, resolution_px=192, resolution_ramp=(65 / 88, 76 / 88))
    assert grown[:66] == [160] * 66
    assert grown[76:] == [192] * 12
    # From the middle of the ramp on 192 is the nearer multiple.
    assert grown[66:76] == [160] * 5 + [192] * 5
    assert sides(9, start_resolution_px=96, resolution_px=224, resolution_ramp=(0, 1))[::4] == [96, 160, 224]


def test_odd_ends_of_the_ramp_are_kept_and_not_passed():
    grown = sides(21, start_resolution_px=100, resolution_px=150, resolution_ramp=(0.25, 0.75))
    assert grown[0] == 100
    assert grown[-1] == 150
    assert sorted(set(grown)) == [100, 128, 150]
    assert grown == sorted(grown)


def test_resolution_may_fall():
    assert sides(4, start_resolution_px=192, resolution_px=128, resolution_ramp=(0.5, 0.5)) == [192, 192, 128, 128]
