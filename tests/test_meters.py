"""Losses and hits of an epoch: summed one by one, whenever they are read."""

import math

import pytest
import torch

from fastgen.meters import Meter, Tally


def tally(*losses, images=4, hits=1):
    return Tally(
        tuple(range(len(losses))),
        (images,) * len(losses),
        tuple(torch.tensor(loss) for loss in losses),
        tuple(torch.tensor(hits) for _ in losses),
    )


def test_means_are_over_the_images():
    meter = Meter()
    meter.add(0, tally(8.0))
    meter.add(1, tally(2.0, 6.0, images=2, hits=2))
    reading = meter.read()
    assert (reading.images, reading.loss, reading.accuracy, reading.first_bad_step) == (8, 2.0, 5 / 8, None)
    meter.reset()
    assert meter.read().images == 0


def test_it_does_not_matter_when_it_is_read():
    generator = torch.Generator().manual_seed(0)
    losses = (torch.rand(60, generator=generator, dtype=torch.float64) * 100).tolist()
    at_once, often = Meter(), Meter()
    for step, loss in enumerate(losses):
        at_once.add(step, tally(loss))
        often.add(step, tally(loss))
        if step % 7 == 0:
            state = often.state()
            often = Meter()
            often.restore(state)
    assert at_once.read() == often.read()
    assert at_once.state() == often.state()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_loss_that_is_not_finite_is_named(bad):
    meter = Meter()
    meter.add(10, tally(1.0, 2.0))
    meter.add(12, tally(1.0, bad, 1.0, bad))
    assert meter.read().first_bad_step == 13
    meter.add(16, tally(bad))
    assert meter.read().first_bad_step == 13


def test_parts_of_a_step_belong_to_it():
    parts = Tally((0, 0), (3, 1), (torch.tensor(1.0), torch.tensor(math.nan)), (torch.tensor(0), torch.tensor(1)))
    assert parts.count == 1
    joined = Tally.of([parts, tally(1.0), parts])
    assert joined.steps == (0, 0, 1, 2, 2)
    assert joined.images == (3, 1, 4, 3, 1)
    assert joined.count == 3
    assert len(joined.loss_sums) == len(joined.correct) == 1
    torch.testing.assert_close(
        joined.loss_sums[0], torch.tensor([1.0, math.nan, 1.0, 1.0, math.nan], dtype=torch.float64), equal_nan=True
    )
    assert joined.correct[0].tolist() == [0, 1, 1, 0, 1]
    meter = Meter()
    meter.add(5, joined)
    assert meter.read().first_bad_step == 5


def test_kernels_hits_in_floating_point_stay_whole():
    meter = Meter()
    meter.add(0, Tally((0,), (3,), (torch.tensor(1.5),), (torch.tensor(2.0),)))
    assert meter.state() == {"images": 3, "loss_sum": 1.5, "correct": 2}
