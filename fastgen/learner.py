"""What a training step changes, and the step itself: forward, backward, SGD."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.batchnorm_sync import synchronise
from fastgen.config import Recipe, TrainSettings
from fastgen.data.batch import Batch
from fastgen.data.facts import Facts
from fastgen.distributed import ALONE, Group
from fastgen.grade import Grade, make_grade
from fastgen.gradients import Reducer
from fastgen.layout import channels_last
from fastgen.lipschitz import add_weights_gradient
from fastgen.meters import Tally
from fastgen.models import fresh_network
from fastgen.optim import make_optimizer, optimizer_state, set_lr
from fastgen.plan import Generation
from fastgen.random_state import put_random_state, random_state
from fastgen.shapes import own_bounds, own_parts
from fastgen.step import DTYPES, Prepare, make_forward, make_scaler
from fastgen.supply import Supply
from fastgen.teacher import Teacher
from fastgen.working_copy import WorkingCopy


@dataclass(frozen=True)
class Learner:
    """A network under training.

    Attributes:
        model: fp32 weights; what is saved and evaluated.
        working: what a step runs.
        optimizer: of the model.
        scaler: of gradients, for fp16.
        reducer: has the forward pass of the working copy, and sums gradients over the processes.
        group: of the run.
        accumulate_steps: parts of a batch, of all processes together, whose gradients are added up.
        lipschitz_weight: of the Lipschitz term; 0: there is none.
        stream: on which its steps are to be captured; None: they are not.
    """

    model: nn.Module
    working: WorkingCopy
    optimizer: torch.optim.SGD
    scaler: torch.amp.GradScaler
    reducer: Reducer
    group: Group = ALONE
    accumulate_steps: int = 1
    lipschitz_weight: float = 0.0
    stream: torch.cuda.Stream | None = None

    def step(self, batch: Batch, lr: float | Tensor, images: int | None = None) -> Tally:
        """One step of SGD; nothing in it waits for the device.

        With accumulate_steps the batch passes in so many parts, whose gradients are added up, weighed by their images:
        the gradient of the whole batch's mean loss, but for batch-norm, which sees one part at a time. Several
        processes have at least one part each: two processes take the very step of one that accumulates two parts.

        Args:
            batch: whole, or this process's share of it.
            lr: a number; or fp32 (), on the device, which is read when the step runs.
            images: in the whole batch; None: this is all of it.

        Returns:
            what this process's share came to.
        """
        set_lr(self.optimizer, lr)
        # Here and not after the step: measured faster on a CPU (benchmarks/NOTES.md).
        self.optimizer.zero_grad()
        self.working.refresh()
        whole, device = len(batch.labels) if images is None else images, batch.labels.device
        parts, alone = self._parts(batch, whole), self.accumulate_steps == self.group.world == 1
        sizes, losses, correct = [], [], []
        for number, part in enumerate(parts, 1):
            size, last = len(part.labels), number == len(parts)
            scale = self._scale(None if alone else size / whole, device)
            forward = self.reducer.forward(last)
            graded = forward(part.images_NCHW, part.labels, part.jitter, part.lesson, scale)
            torch.autograd.backward(graded.root, graded.gradient)
            self.reducer.collect(last)
            sizes.append(size)
            losses.append(graded.loss_sum.detach())
            correct.append(graded.correct)
        if self.lipschitz_weight:
            one = torch.full((), self.lipschitz_weight, device=device)
            add_weights_gradient(self.model, self.scaler.scale(one))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return Tally((0,) * len(sizes), tuple(sizes), tuple(losses), tuple(correct))

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.model.parameters()).device

    def state(self) -> dict[str, Any]:
        """All that a step changes, for a checkpoint."""
        return {
            "model": self.model.state_dict(),
            "optimizer": optimizer_state(self.optimizer),
            "scaler": self.scaler.state_dict(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state` gave; not after a step was captured, which knows the tensors of before."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Whatever steps change inside is put back afterwards, in place, torch's generators too."""
        momenta = [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = [*self.model.parameters(), *self.model.buffers(), *momenta]
        with torch.no_grad():
            before, scaler = [tensor.clone() for tensor in tensors], self.scaler.state_dict()
        drawn = random_state(self.device)
        yield
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        self.scaler.load_state_dict(scaler)
        put_random_state(drawn)
        self.optimizer.zero_grad()

    def _parts(self, batch: Batch, images: int) -> Sequence[Batch]:
        bounds = own_bounds(images, self.accumulate_steps, self.group.share)
        return [batch] if len(bounds) == 2 else [batch[begin:end] for begin, end in itertools.pairwise(bounds)]

    def _scale(self, share: float | None, device: torch.device) -> Tensor | None:
        """What the mean loss of a part, or (None) of the whole batch, counts in the gradient; None: once."""
        if share is None and not self.scaler.is_enabled():
            return None
        # A tensor and not a number: compiled code has no constants then that change with the size of a part.
        return self.scaler.scale(torch.full((), 1.0 if share is None else share, dtype=torch.float64, device=device))


def make_learner(
    model: nn.Module,
    grade: Grade,
    teacher: Teacher | None,
    prepare: Prepare,
    train: TrainSettings,
    device: torch.device,
    shapes: int = 2,
    group: Group = ALONE,
    lipschitz_weight: float = 0.0,
) -> Learner:
    """Puts a training step together.

    Args:
        model: fp32, on the device, channels-last, in train mode.
        grade, teacher, prepare, shapes: see `make_forward`.
        train: settings of the training.
        device: where all of it lives.
        group: of the run.
        lipschitz_weight: see `make_forward`.
    """
    working = WorkingCopy(model, DTYPES[train.precision])
    forward = make_forward(working.network, grade, teacher, prepare, train.engine, shapes, lipschitz_weight)
    stream = torch.cuda.Stream() if train.engine == "graph" and device.type == "cuda" else None
    reducer = Reducer(forward, working, group, own_parts(train.accumulate_steps, group.share), stream)
    optimizer, scaler = make_optimizer(model, train), make_scaler(train, device)
    return Learner(model, working, optimizer, scaler, reducer, group, train.accumulate_steps, lipschitz_weight, stream)


def new_learner(
    recipe: Recipe,
    facts: Facts,
    generation: Generation,
    supply: Supply,
    device: torch.device,
    shapes: int,
    group: Group = ALONE,
) -> Learner:
    """A generation before its first step, as its recipe wants it.

    Args:
        recipe: names network, engine, kernels and precision.
        facts: of the data set.
        generation: gives initial weights and objective.
        supply: of its batches: knows the teacher, and what the network sees.
        device: where all of it lives.
        shapes: see `make_forward`.
        group: of the run.
    """
    model = fresh_network(recipe.model, facts, generation.init_seed)
    model = channels_last(model.to(device)).train()
    if recipe.train.batchnorm == "triton":
        from fastgen.models.norm_act import fuse_norm_act

        model = fuse_norm_act(model)
    if recipe.dist.batchnorm == "synchronised" and group.world > 1:
        model = synchronise(model, device)
    objective = generation.objective
    grade = make_grade(objective, fused=recipe.train.kernels == "triton", means=supply.means)
    teacher, prepare, weight = supply.live_teacher, supply.prepare, objective.lipschitz_weight
    return make_learner(model, grade, teacher, prepare, recipe.train, device, shapes, group, weight)
