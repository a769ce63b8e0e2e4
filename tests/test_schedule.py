"""schedule.py: milestones fall where the paper has them, whatever the length of the run."""

import pytest

from fastgen.config import TrainSettings
from fastgen.schedule import make_schedule


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
