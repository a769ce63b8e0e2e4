"""Epochs -> steps -> learning rate, and the resolution of each epoch: pure functions, no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastgen.config import DataSettings, TrainSettings

RESOLUTION_STEP_PX = 32


@dataclass(frozen=True)
class Schedule:
    """Length of a training and its learning rate at each step.

    Attributes:
        steps_per_epoch: the last one may hold fewer images than the others.
        total_steps: of the whole training of one generation.
        warmup_steps: over which the rate grows to `lr_peak`.
        shape: what follows: `steps`, `cosine` or `triangular`.
        milestone_steps: first step of each lower learning rate, for `steps`.
        lr_peak: the learning rate after the warm-up.
        lr_factor: of each milestone.
    """

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    shape: str
    milestone_steps: tuple[int, ...]
    lr_peak: float
    lr_factor: float

    def lr(self, step: int) -> float:
        """Learning rate of the given step, counted from 0 over the whole training.

        The first step of a warm-up of W steps has 1/W of the peak, the last one all of it, as has the first step after
        it; cosine and triangle would reach 0 one step after the last.
        """
        if step < self.warmup_steps:
            return self.lr_peak * (step + 1) / self.warmup_steps
        if self.shape == "steps":
            return self.lr_peak * self.lr_factor ** sum(step >= milestone for milestone in self.milestone_steps)
        share = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return self.lr_peak * ((1 + math.cos(math.pi * share)) / 2 if self.shape == "cosine" else 1 - share)


def make_schedule(train: TrainSettings, images: int) -> Schedule:
    """Turns fractions of the run into steps.

    A milestone falls on the start of an epoch where the fraction gives one: the paper's 82 and
    123 of 164 epochs are 0.5 and 0.75. Elsewhere it is rounded to the nearest step.

    Args:
        train: settings of the training.
        images: number of training images.
    """
    steps_per_epoch = -(-images // train.batch_size)
    total_steps = train.epochs * steps_per_epoch
    return Schedule(
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        warmup_steps=round(train.warmup_epochs * steps_per_epoch),
        shape=train.lr_schedule,
        milestone_steps=tuple(round(fraction * total_steps) for fraction in train.lr_milestones),
        lr_peak=train.lr,
        lr_factor=train.lr_factor,
    )


def resolution_px(data: DataSettings, epochs: int, epoch: int) -> int:
    """Side of the training views in an epoch: grows in a straight line between the ends of the ramp.

    In between it is the multiple of 32 pixels nearest to the line; before and after, what the recipe says.

    Args:
        data: settings of the data.
        epochs: of the whole training.
        epoch: counted from 0.
    """
    first, last = data.start_resolution_px or data.resolution_px, data.resolution_px
    begin, end = (share * epochs for share in data.resolution_ramp)
    if epoch >= end:
        return last
    if epoch <= begin:
        return first
    side = first + (last - first) * (epoch - begin) / (end - begin)
    low, high = sorted((first, last))
    return min(max(RESOLUTION_STEP_PX * round(side / RESOLUTION_STEP_PX), low), high)
