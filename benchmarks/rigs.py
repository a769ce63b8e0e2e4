"""What is timed and checked of the trainer: its steps, put together from one case without a recipe."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastgen.augment import Normaliser
from fastgen.config import TrainSettings
from fastgen.crops import ShiftCrop
from fastgen.data.batch import Batch, Loader
from fastgen.data.cifar import read_cifar
from fastgen.data.facts import DATASETS, Facts
from fastgen.data.split import Split
from fastgen.distributed import ALONE, Group
from fastgen.engines import Engine, Plant, make_engine
from fastgen.errors import UserError
from fastgen.grade import make_grade
from fastgen.laws import eta_for_confidence
from fastgen.learner import make_learner
from fastgen.meters import Meter, Tally
from fastgen.models import build_model, initialise
from fastgen.models.norm_act import fuse_norm_act
from fastgen.networks import PHOTO_MODELS
from fastgen.plan import Objective
from fastgen.step import DTYPES, EngineName
from fastgen.supply import Supply, supply_images
from fastgen.teacher import Teacher, make_teacher
from fastgen.views import EpochViews, training_views

Precision = Literal["fp32", "bf16", "fp16"]
Kernels = Literal["torch", "triton"]

ENGINES: tuple[EngineName, ...] = ("eager", "compile", "graph")


class Way(NamedTuple):
    """How a step is run; `kernels` and `batchnorm` as the recipe's settings of that name."""

    engine: EngineName
    kernels: Kernels = "torch"
    batchnorm: Kernels = "torch"

    @property
    def name(self) -> str:
        """One word."""
        fused = [part for part in ("kernels", "batchnorm") if getattr(self, part) == "triton"]
        return "+".join([self.engine, *fused])

    @property
    def words(self) -> tuple[str, ...]:
        """On the command line of `fastgen.train`."""
        return tuple(f"--train.{name}={value}" for name, value in self._asdict().items())


PLAIN_WAYS = tuple(Way(engine) for engine in ENGINES)
# On a GPU; the interpreter says nothing about time.
FUSED_WAYS = tuple(Way(engine, "triton", batchnorm) for engine in ENGINES for batchnorm in ("torch", "triton"))
PATRIARCH = Objective(eta=eta_for_confidence(0.6, 5), k=5)
STUDENT = Objective(teacher_weight=0.6)
LR = 0.1

IMAGENET = DATASETS["imagenet"]
# Squares of one size in memory, as a loader of photographs would make them.
PHOTOS = Facts(1000, 3, 224, 224, 0, 0, 0, True, IMAGENET.mean, IMAGENET.std)
# Batches that an epoch's length is a multiple of: of a graph's steps and of a look ahead.
GROUP = 8
# Groups in an epoch: enough that the views of an epoch, which are drawn at its start, do not count.
GROUPS, GROUPS_OF_PHOTOS = 4, 1


@dataclass(frozen=True)
class Case:
    """What all candidates of one measurement share.

    Attributes:
        model: name of the network.
        batch_size: images in a step.
        precision: of the step.
        facts: of the data set.
        split: the training images.
        device: where it runs.
        kernels, batchnorm, graph_steps: as the recipe's settings of that name.
    """

    model: str
    batch_size: int
    precision: Precision
    facts: Facts
    split: Split
    device: torch.device
    kernels: Kernels = "torch"
    batchnorm: Kernels = "torch"
    graph_steps: int = 8

    def run_by(self, way: Way) -> Case:
        """The same case, with this way's kernels."""
        return replace(self, kernels=way.kernels, batchnorm=way.batchnorm)

    def settings(self, engine: EngineName) -> TrainSettings:
        """Settings of the trainer; whatever is not named here is its default."""
        return TrainSettings(
            epochs=1,
            batch_size=self.batch_size,
            precision=self.precision,
            engine=engine,
            lr=LR,
            weight_decay=1e-4,
            kernels=self.kernels,
            batchnorm=self.batchnorm,
            graph_steps=self.graph_steps,
        )

    @property
    def crop(self) -> ShiftCrop:
        """The data set's standard augmentation."""
        return ShiftCrop(self.facts.height_px, self.facts.width_px, self.facts.pad_px, self.facts.flip)

    def normaliser(self, dtype: torch.dtype) -> Normaliser:
        """Pixels -> what the network sees."""
        return Normaliser(self.facts.mean, self.facts.std, self.device, dtype)


@dataclass
class Rig:
    """A training with all that its steps need, put together as the trainer does, over epochs without end.

    Attributes:
        tallies: of the steps, which are taken as they are asked for.
        meter: of all of them.
        steps: that were taken.
    """

    tallies: Iterator[Tally]
    meter: Meter = field(default_factory=Meter)
    steps: int = 0
    _wanted: int = 0

    def step(self) -> None:
        """One step of the trainer. Where its engine takes several at once, the first call takes them for the next."""
        self._wanted += 1
        if self.steps < self._wanted:
            tally = next(self.tallies)
            self.meter.add(self.steps, tally)
            self.steps += tally.count

    def require_finite(self) -> None:
        """Raises ValueError where a loss was not finite: the time of such steps means nothing."""
        bad_step = self.meter.read().first_bad_step
        if bad_step is not None:
            raise ValueError(f"the loss was not finite at step {bad_step}")


def make_rig(
    case: Case,
    engine: EngineName,
    objective: Objective,
    loader: Loader,
    *,
    lr: float = LR,
    init_seed: int = 0,
    whole_epochs: bool = False,
    group: Group = ALONE,
) -> Rig:
    """The trainer's steps for one generation, on images of the loader.

    A student's teacher is a network with other initial weights, whose batch-norms know the images.

    Args:
        case: what is trained.
        engine: of the recipe.
        objective: of the generation.
        loader: of the case's split.
        lr: of every step.
        init_seed: of the student's, or patriarch's, weights.
        whole_epochs: see `rig_of`.
        group: the processes that train together.
    """
    teacher = None
    if objective.teacher_weight:
        teacher = _teacher(case, next(endless_batches(loader, case)))
    supply = supply_of(case, loader, teacher)
    return rig_of(case, engine, objective, supply, lr=lr, init_seed=init_seed, whole_epochs=whole_epochs, group=group)


def supply_of(case: Case, loader: Loader, teacher: Teacher | None) -> Supply:
    """The loader's batches, with a teacher that is asked within the step, as `fastgen.supply` puts them together."""
    normalise = case.normaliser(DTYPES[case.precision])
    return replace(supply_images(loader, "resident", normalise, fused=case.kernels == "triton"), live_teacher=teacher)


def rig_of(
    case: Case,
    engine: EngineName,
    objective: Objective,
    supply: Supply,
    *,
    lr: float = LR,
    init_seed: int = 0,
    whole_epochs: bool = False,
    group: Group = ALONE,
) -> Rig:
    """The trainer's steps on what is supplied.

    Args:
        whole_epochs: with the batches at an epoch's end that are smaller, or too few for a program; else they are left
            out, so that all steps count alike.
        group: the processes that train together.
    """
    train = case.settings(engine)
    model = fresh_network(case, init_seed).train()
    if case.batchnorm == "triton":
        model = fuse_norm_act(model)
    grade = make_grade(objective, fused=case.kernels == "triton")
    learner = make_learner(model, grade, supply.live_teacher, supply.prepare, train, case.device, group=group)
    samples = len(case.split)
    if not whole_epochs:
        samples -= samples % (case.batch_size * (case.graph_steps if engine == "graph" else 1))
    facts = case.facts
    sizes = {min(case.batch_size, samples), samples % case.batch_size} - {0}
    shapes = [(size, facts.height_px, facts.width_px) for size in sorted(sizes)]
    plant = Plant(learner, supply, train, samples, shapes, facts.channels, False, case.device, group.share)
    return Rig(_endless_tallies(case, make_engine(plant), samples, lr))


def _endless_tallies(case: Case, engine: Engine, samples: int, lr: float) -> Iterator[Tally]:
    steps = -(-samples // case.batch_size)
    for epoch in itertools.count():
        yield from engine.epoch(_views(case, epoch, samples), 0, [lr] * steps)


def _views(case: Case, epoch: int, samples: int) -> EpochViews:
    views = training_views(case.split.ids, case.crop, data_seed=0, generation=0, epoch=epoch)
    return replace(views, order=views.order[:samples])


def fresh_network(case: Case, init_seed: int) -> nn.Module:
    """The case's network with fresh weights, channels-last, on the device."""
    model = initialise(build_model(case.model, case.facts.classes, case.facts.channels, "strided"), init_seed)
    return model.to(case.device).to(memory_format=torch.channels_last)


@torch.no_grad()
def calibrate(model: nn.Module, images_NCHW: Tensor) -> nn.Module:
    """Lets batch-norms take the statistics of a batch, so that an untrained network's logits have a sane size."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            # A cumulative mean: one batch sets it.
            module.momentum = None
    model.train()(images_NCHW)
    return model.eval()


def _teacher(case: Case, batch: Batch) -> Teacher:
    model = calibrate(fresh_network(case, init_seed=1), case.normaliser(torch.float32)(batch.images_NCHW))
    return make_teacher(model, case.device, DTYPES[case.precision])


def endless_batches(loader: Loader, case: Case) -> Iterator[Batch]:
    """Batches of one epoch after the other; the smaller last one is left out, so that all steps count alike."""
    samples = len(case.split) - len(case.split) % case.batch_size
    for epoch in itertools.count():
        yield from loader.batches(_views(case, epoch, samples), case.batch_size)


def ways_on(device: torch.device) -> tuple[Way, ...]:
    """How a step can be run there."""
    return (*PLAIN_WAYS, *FUSED_WAYS) if device.type == "cuda" else PLAIN_WAYS


def timed_ways(device: torch.device, model: str = "") -> tuple[Way, ...]:
    """Those whose time says something: a graph that is not captured is only another order of the same work.

    Of photo networks one graph alone is timed: each holds the activations of a whole step for itself.
    """
    if device.type != "cuda":
        return tuple(way for way in ways_on(device) if way.engine != "graph")
    plain_graphs = ("graph", "graph+kernels") if model in PHOTO_MODELS else ()
    return tuple(way for way in ways_on(device) if way.name not in plain_graphs)


def case_of(
    model: str,
    batch_size: int,
    precision: Precision,
    device: torch.device,
    images_from: Path | None,
    groups: int = GROUPS,
) -> tuple[Case, str]:
    """The case of a network, and what its images are: `cifar100` or `random`. Their number is a multiple of 8 batches.

    Args:
        images_from: folder above the official CIFAR-100 files; None: random images.
        groups: of 8 batches, at most; of photographs there are GROUPS_OF_PHOTOS.

    Raises:
        UserError: a folder of CIFAR-100 for a network of photographs, or too large a batch for it.
    """
    photos = model in PHOTO_MODELS
    facts = PHOTOS if photos else DATASETS["cifar100"]
    group = batch_size * GROUP
    if images_from is None:
        split = random_split(facts, group * (GROUPS_OF_PHOTOS if photos else groups))
        return Case(model, batch_size, precision, facts, split, device), "random"
    if photos:
        raise UserError(f"--images_from holds pictures of 32 pixels, {model} is for 224: leave it out")
    whole = read_cifar("cifar100", images_from)[0]
    count = group * min(groups, len(whole) // group)
    if not count:
        raise UserError(f"--batch_size={batch_size}: {GROUP} of them are more than the {len(whole)} images")
    # They are in no order: the first are as good as any.
    return Case(model, batch_size, precision, facts, whole.at(np.arange(count)), device), "cifar100"


def random_split(facts: Facts, count: int, seed: int = 0) -> Split:
    """Random pixels under random labels; never zeros, which some hardware multiplies faster."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (count, facts.height_px, facts.width_px, facts.channels), dtype=np.uint8)
    return Split(pixels, random.integers(0, facts.classes, count), np.arange(count, dtype=np.int64))


def hush_compiler() -> None:
    """Silences torch.compile's advice on fp32 matrix products: this benchmark measures what the recipe asks for."""
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
