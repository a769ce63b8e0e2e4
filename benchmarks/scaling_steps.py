"""What `benchmarks.scaling` trains: a recipe's batch, shared out or multiplied, and the trainer's steps of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from benchmarks.feed_steps import WITH_WORKERS, Case, Held, remembering
from benchmarks.rigs import Rig, calibrate, random_split
from fastgen.config import Recipe
from fastgen.data import open_dataset
from fastgen.data.batch import Batch, Loader, usable_cores
from fastgen.data.facts import DATASETS
from fastgen.data.split import Dataset, make_dataset
from fastgen.distributed import ALONE, Group
from fastgen.engines import Plant, make_engine
from fastgen.errors import UserError
from fastgen.learner import new_learner
from fastgen.meters import Tally
from fastgen.models import fresh_network, network_of
from fastgen.plan import Generation, make_plan
from fastgen.pulse import Pulse, Wish
from fastgen.recipe import read_recipe
from fastgen.schedule import resolution_px
from fastgen.shapes import own_size, part_shapes
from fastgen.step import DTYPES
from fastgen.supply import Supply
from fastgen.teacher import FrozenTeacher, make_teacher
from fastgen.views import Share

# strong: the recipe's batch is shared out; weak: each process has a batch of this size; one: a process by itself.
Mode = Literal["one", "strong", "weak"]
NOTHING_ASKED = Wish(0, False)


@dataclass(frozen=True)
class Setup:
    """What is trained.

    Attributes:
        recipe: of one process.
        dataset: whole.
        generation: whose steps are taken.
        images: what they are, in a word.
    """

    recipe: Recipe
    dataset: Dataset
    generation: Generation
    images: str


def read_setup(words: Sequence[str], role: str, *, random: bool) -> Setup:
    """Reads recipe and images.

    Args:
        words: `--cfg RECIPE --section.key=value ...`.
        role: `patriarch` or `student`.
        random: whether images are random, of the size and number of the recipe's data set.

    Raises:
        UserError: the recipe or its data is wrong, or there is nothing in it to measure.
    """
    recipe = read_recipe(words)
    _require_steps(recipe)
    dataset = _random_dataset(recipe) if random else open_dataset(recipe)
    plan = make_plan(recipe, dataset.train_hash, None, dataset.pixels)
    generation = next((one for one in plan if one.role == role), None)
    if generation is None:
        raise UserError(f"--role={role}: the recipe has none: give --role=patriarch, or gen.generations above 0")
    images = "random" if random or recipe.data.backend == "synthetic" else recipe.data.dataset
    return Setup(recipe, dataset, generation, images)


def scaled(recipe: Recipe, mode: Mode, processes: int) -> Recipe:
    """The recipe with the batch of all processes; in weak scaling each of them does what one alone does."""
    if mode != "weak":
        return recipe
    train = recipe.train
    whole = {name: getattr(train, name) * processes for name in ("batch_size", "accumulate_steps")}
    return replace(recipe, train=replace(train, **whole))


def cut(setup: Setup, mode: Mode, processes: int) -> tuple[Recipe, Dataset]:
    """The recipe of all processes, and so many images that all steps of an epoch are alike.

    Raises:
        UserError: there are too few images for a step of all processes, or a process would have none.
    """
    recipe, dataset = scaled(setup.recipe, mode, processes), setup.dataset
    at_once = _steps_at_once(recipe)
    unit = recipe.train.batch_size * at_once
    count = len(dataset.train) // unit * unit
    if not count:
        raise UserError(
            f"{mode} scaling, {processes} process{'es' if processes > 1 else ''}: {at_once} batches of "
            f"{recipe.train.batch_size} images are taken at once, and there are {len(dataset.train)} images: lower "
            "train.batch_size or --processes"
        )
    if count < len(dataset.train):
        dataset = replace(dataset, train=dataset.train.at(np.arange(count)))
    # Refuses what no network could be trained on.
    part_shapes(recipe, dataset, Share(0, processes))
    return recipe, dataset


def case_of(setup: Setup, mode: Mode, group: Group, device: torch.device) -> Case:
    """What one of the processes takes its share of. Where views grow over the run they are of the smallest side."""
    recipe, dataset = cut(setup, mode, group.world)
    generation, epochs = setup.generation, recipe.train.epochs
    side_px = min(resolution_px(recipe.data, epochs, epoch) for epoch in range(epochs))
    views = dataset.training_views(generation.data_seed, generation.index, 0, side_px)
    return Case(_with_own_workers(recipe, group.local_world), dataset, device, views, {generation.role: generation})


def alone(setup: Setup, case: Case) -> Case:
    """What one process by itself trains on the same images: the recipe's batch, and all workers."""
    return replace(case, recipe=setup.recipe)


def taught(case: Case, supply: Supply, share: Share) -> Callable[[Supply], Supply]:
    """Gives batches of a share their teacher: an untrained network whose batch-norms know the images, or none.

    Args:
        supply: of the case, for images to know.
    """
    if "student" not in case.generations:
        return lambda images: images
    teacher, recipe = teacher_of(case, supply, share), case.recipe
    return lambda images: images.with_teacher(teacher, recipe.teacher.look_ahead_batches, case.dataset.facts.classes)


def teacher_of(case: Case, supply: Supply, share: Share) -> FrozenTeacher:
    """An untrained network whose batch-norms know the images."""
    (generation,) = case.generations.values()
    recipe, facts, dtype = case.recipe, case.dataset.facts, DTYPES[case.recipe.train.precision]
    ahead = recipe.teacher.look_ahead_batches
    # Other weights than the student's.
    network = fresh_network(recipe.model, facts, generation.init_seed ^ 1)
    network = network.to(case.device).to(memory_format=torch.channels_last)
    batch = _first_batch(case, supply.loader, share)
    network = calibrate(network, supply.prepare(batch.images_NCHW, batch.jitter).float())
    shape = (own_size(case.batch_size, share) * ahead, facts.channels, *case.side_px)
    timed = not recipe.run.deterministic
    return make_teacher(network, case.device, dtype, recipe.teacher.engine, shape=shape, timed=timed)


def held(case: Case, supply: Supply, share: Share) -> Supply:
    """Batches that lie on the device already: the first one's share, as often as a program takes steps."""
    batch, count = _first_batch(case, supply.loader, share), case.program_steps
    images_NCHW = torch.cat([batch.images_NCHW] * count).contiguous(memory_format=torch.channels_last)
    jitter = None if batch.jitter is None else batch.jitter.repeat(count, 1)
    whole = Batch(images_NCHW, batch.labels.repeat(count), batch.ids.repeat(count), jitter)
    loader = Held(whole, len(case.dataset.train))
    return replace(supply, loader=loader, source=None if supply.source is None else loader)


def make_rig(case: Case, supply: Supply, group: Group, *, summed: bool = True) -> Rig:
    """The trainer's steps of a process, over the same epoch without end; the learning rate is 0.

    Args:
        case: of all processes.
        supply: of this one's batches, with their teacher.
        group: all processes; to be called in all of them at once where `summed`.
        summed: whether processes tell each other anything: gradients, sums of batch-norms, wishes. Without it each
            takes the very same share of the batch, in the same parts and weighed alike; its batch-norms are torch's
            own, which on a CPU are faster than synchronised ones by more than the sums.
    """
    recipe, facts, dataset = case.recipe, case.dataset.facts, case.dataset
    (generation,) = case.generations.values()
    shapes, told = len(part_shapes(recipe, dataset, group.share)), group if summed else ALONE
    supply = remembering(case, supply, generation, len(dataset.train), told)
    learner = new_learner(recipe, facts, generation, supply, case.device, shapes, told)
    # By its group a learner knows the parts and what they weigh; whom it tells its gradients was decided above.
    learner = replace(learner, group=group)
    samples, jitter = len(dataset.train), dataset.crop.jitter.active
    batch_shapes = [(case.batch_size, *case.side_px)]
    engine = make_engine(
        Plant(learner, supply, recipe.train, samples, batch_shapes, facts.channels, jitter, case.device, group.share)
    )
    steps = samples // case.batch_size
    if supply.means is not None:
        supply.means.begin(0, case.views)

    def tallies() -> Iterator[Tally]:
        pulse = Pulse(told)
        while True:
            for tally in engine.epoch(case.views, 0, [0.0] * steps):
                pulse.beat(NOTHING_ASKED)
                yield tally

    return Rig(tallies())


def gradient_bytes(case: Case) -> int:
    """What a step sums over the processes: fp32, whatever the precision of the step."""
    recipe, facts = case.recipe, case.dataset.facts
    network = network_of(recipe.model, facts)
    return sum(weight.numel() for weight in network.parameters()) * torch.float32.itemsize


def _require_steps(recipe: Recipe) -> None:
    if recipe.run.dry or recipe.gen.only is not None:
        raise UserError("run.dry and gen.only have no say here, nothing is trained: leave them out")
    if recipe.dist.processes is not None:
        raise UserError("dist.processes has no say here: give --processes instead, and --dist.processes=null")
    if recipe.teacher.labels != "live":
        raise UserError(
            f"teacher.labels = {recipe.teacher.labels}: nothing is trained here that could fill one: set live"
        )


def _random_dataset(recipe: Recipe) -> Dataset:
    """Random images under random labels, as many as there are in the data set whose facts they have."""
    facts = DATASETS[recipe.data.dataset]
    if not facts.height_px or recipe.data.backend == "ffcv":
        raise UserError("random images are of one size and in memory: name the folder of the recipe's with data.root")
    train, test = random_split(facts, facts.train_images), random_split(facts, facts.classes, seed=1)
    return make_dataset(recipe.data, facts, train, test, tuple(map(str, range(facts.classes))))


def _steps_at_once(recipe: Recipe) -> int:
    """As `Case.steps_at_once`, before there is a case."""
    programs = recipe.train.engine == "graph" and recipe.data.backend == "resident"
    return math.lcm(recipe.train.graph_steps if programs else 1, recipe.teacher.look_ahead_batches)


def _with_own_workers(recipe: Recipe, processes: int) -> Recipe:
    """Processes of one machine share its cores, as they do in the trainer."""
    if recipe.data.backend not in WITH_WORKERS or recipe.data.workers is not None:
        return recipe
    return replace(recipe, data=replace(recipe.data, workers=max(1, usable_cores() // processes)))


def _first_batch(case: Case, loader: Loader, share: Share) -> Batch:
    (batch,) = loader.batches(case.part(case.batch_size), case.batch_size, 0, share)
    return batch
