"""Gradient accumulation: the parts' gradients add up to those of the whole batch."""

import pytest
import torch
from torch import nn

from fastgen.data.batch import Batch
from fastgen.distributed import ALONE
from fastgen.grade import plain
from fastgen.gradients import Reducer
from fastgen.learner import Learner
from fastgen.meters import Meter
from fastgen.shapes import part_bounds
from fastgen.working_copy import WorkingCopy


def learner_of(model, forward, accumulate_steps):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    working = WorkingCopy(model, torch.float32)
    reducer = Reducer(forward, working, ALONE)
    return Learner(model, working, optimizer, scaler, reducer, ALONE, accumulate_steps)


def batch_of(count):
    generator = torch.Generator().manual_seed(count)
    images = torch.randn(count, 3, 2, 2, generator=generator, dtype=torch.float64)
    return Batch(images, torch.randint(0, 5, (count,), generator=generator), torch.arange(count), torch.randn(count, 4))


def step(count, accumulate_steps):
    """(weights after one step, reading of the meter, images of each forward pass)"""
    torch.manual_seed(0)
    model = nn.Linear(12, 5).double()
    meter, passes = Meter(), []

    def forward(images, labels, jitter=None, teacher_logits=None, scale=None):
        passes.append(len(images))
        assert len(jitter) == len(images)
        logits = model(images.flatten(1))
        return plain(lambda z, y, v: nn.functional.cross_entropy(z, y))(logits, labels, None, scale)

    meter.add(0, learner_of(model, forward, accumulate_steps).step(batch_of(count), 0.1))
    return model.weight.detach(), meter.read(), passes


@pytest.mark.parametrize(("count", "parts"), [(8, 2), (7, 3), (5, 5), (3, 8), (1, 4), (128, 3)])
def test_parts_give_the_step_of_the_whole_batch(count, parts):
    whole, reading, _ = step(count, 1)
    split, split_reading, passes = step(count, parts)
    # fp64 sums of up to 128 terms in another order.
    torch.testing.assert_close(split, whole, rtol=1e-12, atol=1e-13)
    assert split_reading.loss == pytest.approx(reading.loss, rel=1e-12)
    assert (split_reading.images, split_reading.accuracy) == (reading.images, reading.accuracy)
    assert sum(passes) == count
    assert len(passes) == min(parts, count)
    assert max(passes) - min(passes) <= 1


def test_bounds_leave_no_part_empty():
    for images in range(1, 40):
        for parts in range(1, 12):
            bounds = part_bounds(images, parts)
            assert bounds[0] == 0
            assert bounds[-1] == images
            assert bounds == sorted(set(bounds))
            assert len(bounds) - 1 == min(images, parts)
