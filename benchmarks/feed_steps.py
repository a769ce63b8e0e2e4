"""Steps of `benchmarks.feed`: the trainer's, of a recipe, on one batch that is held on the device."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from benchmarks.rigs import Rig, calibrate
from fastgen.augment import Normaliser
from fastgen.config import Recipe
from fastgen.consistency import Means
from fastgen.crops import JITTER_COLUMNS, TABLE_COLUMNS, Int64
from fastgen.data import build_loader
from fastgen.data.batch import Batch, Columns, Loader, usable_cores
from fastgen.data.split import Dataset
from fastgen.distributed import ALONE, Group
from fastgen.engines import Plant, make_engine
from fastgen.learner import new_learner
from fastgen.meters import Tally
from fastgen.models import fresh_network
from fastgen.plan import Generation
from fastgen.shapes import part_shapes
from fastgen.step import DTYPES
from fastgen.supply import Supply, supply_images
from fastgen.teacher import FrozenTeacher, make_teacher
from fastgen.truncation import LOG_P, Labels, truncation
from fastgen.views import WHOLE, EpochViews, Share, batch_positions

# Backends that decode with workers.
WITH_WORKERS = ("ffcv", "dali", "folder")


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        recipe: resolved.
        dataset: its data.
        device: where it runs.
        views: of an epoch, at the smallest side of the run.
        generations: by role: the patriarch and, where the recipe has one, the first student.
    """

    recipe: Recipe
    dataset: Dataset
    device: torch.device
    views: EpochViews
    generations: Mapping[str, Generation]

    @property
    def side_px(self) -> tuple[int, int]:
        """Height and width of the views."""
        return self.views.height_px, self.views.width_px

    @property
    def batch_size(self) -> int:
        """Images in a full batch."""
        return min(self.recipe.train.batch_size, len(self.dataset.train))

    @property
    def workers(self) -> int | None:
        """That decode; None: images are in memory, and the recipe's own process brings them along."""
        data = self.recipe.data
        return (data.workers or usable_cores()) if data.backend in WITH_WORKERS else None

    @property
    def program_steps(self) -> int:
        """Steps that are launched together, from batches that are made on the device."""
        train = self.recipe.train
        return train.graph_steps if train.engine == "graph" and self.recipe.data.backend == "resident" else 1

    @property
    def steps_at_once(self) -> int:
        """Steps that are launched, or whose teacher is asked, together."""
        return math.lcm(self.program_steps, self.recipe.teacher.look_ahead_batches)

    def part(self, images: int) -> EpochViews:
        """The first images of the epoch."""
        return replace(self.views, order=self.views.order[:images])


class Held:
    """A loader, and source of programs, whose batches lie on the device already: the steps have it to themselves.

    Args:
        batch: as many samples as are ever asked for at once.
        samples: that an epoch pretends to have.
    """

    def __init__(self, batch: Batch, samples: int) -> None:
        self._batch = batch
        self._samples = samples

    def __len__(self) -> int:
        return self._samples

    def batches(
        self, views: EpochViews, batch_size: int, first_batch: int = 0, share: Share = WHOLE
    ) -> Iterator[Batch]:
        """See `Loader.batches`; what the views say has no say."""
        for positions in batch_positions(views.order, batch_size, first_batch, share):
            yield self._batch[: len(positions)]

    def columns(self, views: EpochViews, positions: Int64) -> dict[str, Tensor]:
        """See `DeviceSource.columns`."""
        return self.blank(len(positions), jitter=False)

    def execute(self, columns: Columns) -> Batch:
        """See `DeviceSource.execute`: no work."""
        return self._batch[: len(columns["labels"])]

    def blank(self, count: int, jitter: bool) -> dict[str, Tensor]:
        """See `DeviceSource.blank`."""
        return {"labels": self._batch.labels[:1].repeat(count)}


def supply_of(case: Case) -> Supply:
    """The recipe's images, as the trainer would have them."""
    recipe, dataset = case.recipe, case.dataset
    loader = build_loader(recipe, dataset, dataset.train, case.device)
    normalise = Normaliser(dataset.facts.mean, dataset.facts.std, case.device, DTYPES[recipe.train.precision])
    fused = recipe.train.kernels == "triton"
    return supply_images(loader, recipe.data.backend, normalise, dataset.crop.jitter, fused=fused)


def make_rig(case: Case, supply: Supply, generation: Generation, steps: int) -> Rig:
    """The trainer's steps for a generation, on one batch that is held on the device; the learning rate is 0.

    Args:
        supply: see `supply_of`.
        steps: of an epoch, whole programs.
    """
    recipe, facts, size = case.recipe, case.dataset.facts, case.batch_size
    batch, jitter = held_batch(case, supply.loader), case.dataset.crop.jitter.active
    supply = _held(supply, batch, steps * size)
    if generation.role == "student":
        supply = _taught(case, supply, batch)
    supply = remembering(case, supply, generation, steps * size, ALONE)
    shapes = len(part_shapes(recipe, case.dataset))
    learner = new_learner(recipe, facts, generation, supply, case.device, shapes)
    batch_shapes = [(size, *case.side_px)]
    engine = make_engine(
        Plant(learner, supply, recipe.train, steps * size, batch_shapes, facts.channels, jitter, case.device)
    )
    table = np.zeros((steps * size, len(TABLE_COLUMNS)), np.int32)
    drawn = np.zeros((steps * size, len(JITTER_COLUMNS)), np.float32) if jitter else None
    views = EpochViews(np.arange(steps * size), table, *case.side_px, drawn)
    if supply.means is not None:
        supply.means.begin(0, views)

    def tallies() -> Iterator[Tally]:
        for _ in itertools.count():
            yield from engine.epoch(views, 0, [0.0] * steps)

    return Rig(tallies())


def remembering(case: Case, supply: Supply, generation: Generation, samples: int, group: Group) -> Supply:
    """The supply with means of earlier predictions, where the objective has a consistency term; nothing is begun.

    Args:
        generation: whose steps are taken.
        samples: of an epoch.
        group: processes that tell each other anything.
    """
    objective, train = generation.objective, case.recipe.train
    if not objective.consistency_weight:
        return supply
    return supply.with_means(
        Means(samples, case.dataset.facts.classes, train, objective, case.device, group), case.device
    )


def held_batch(case: Case, loader: Loader) -> Batch:
    """A full batch as the loader gives it, as often as a program takes steps."""
    (batch,) = loader.batches(case.part(case.batch_size), case.batch_size)
    count = case.program_steps
    images_NCHW = torch.cat([batch.images_NCHW] * count).contiguous(memory_format=torch.channels_last)
    jitter = None if batch.jitter is None else batch.jitter.repeat(count, 1)
    return Batch(images_NCHW, batch.labels.repeat(count), batch.ids.repeat(count), jitter)


def _held(supply: Supply, batch: Batch, samples: int) -> Supply:
    held = Held(batch, samples)
    return replace(supply, loader=held, source=None if supply.source is None else held)


def _taught(case: Case, supply: Supply, batch: Batch) -> Supply:
    """The held batches with the recipe's way to ask a teacher; labels of a table, or of a store, are held with them."""
    teacher, settings = _teacher(case, supply, batch[: case.batch_size]), case.recipe.teacher
    if settings.labels == "live":
        return supply.with_teacher(teacher, settings.look_ahead_batches, case.dataset.facts.classes)
    labels: Labels = {LOG_P: teacher(supply.prepare(batch.images_NCHW, batch.jitter))}
    if settings.labels == "store":
        cut = truncation(case.dataset.facts.classes, settings.store_classes, settings.store_dtype)
        labels = cut(labels[LOG_P])

    def dress(raw: Batch) -> Batch:
        return supply.dress(raw).taught({name: column[: len(raw.labels)] for name, column in labels.items()})

    taught = _held(supply, batch.taught(labels), len(supply.loader))
    return replace(taught, dress=dress)


def _teacher(case: Case, supply: Supply, batch: Batch) -> FrozenTeacher:
    """An untrained network, whose batch-norms know the images."""
    recipe, facts, seed = case.recipe, case.dataset.facts, case.generations["patriarch"].init_seed
    network = fresh_network(recipe.model, facts, seed).to(case.device).to(memory_format=torch.channels_last)
    return make_teacher(
        calibrate(network, supply.prepare(batch.images_NCHW, batch.jitter).float()),
        case.device,
        DTYPES[recipe.train.precision],
        recipe.teacher.engine,
        shape=(case.batch_size * recipe.teacher.look_ahead_batches, facts.channels, *case.side_px),
        timed=not recipe.run.deterministic,
    )
