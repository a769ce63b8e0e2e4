"""Epochs -> steps -> learning rate: pure functions, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from fastgen.config import TrainSettings


@dataclass(frozen=True)
class Schedule:
    """Length of a training and its learning rate at each step.

    Attributes:
        steps_per_epoch: the last one may hold fewer images than the others.
        total_steps: of the whole training of one generation.
        milestone_steps: first step of each lower learning rate.
    """

    steps_per_epoch: int
    total_steps: int
    milestone_steps: tuple[int, ...]
    initial_lr: float
    lr_factor: float

    def lr(self, step: int) -> float:
        """Learning rate of the given step, counted from 0 over the whole training."""
        passed = sum(step >= milestone for milestone in self.milestone_steps)
        return self.initial_lr * self.lr_factor**passed


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
    milestones = tuple(round(fraction * total_steps) for fraction in train.lr_milestones)
    return Schedule(steps_per_epoch, total_steps, milestones, train.lr, train.lr_factor)
