"""How fast is a training step, beside a bare PyTorch loop? All candidates in one process, in turns.

python -m benchmarks.step [--model=resnet20 --batch_size=128 --precision=bf16 --rounds=20]

`bare` is what anybody would write: one batch held in memory, plain SGD, cross-entropy, autocast,
channels-last. The others are the trainer's own step, with data, views, normalisation, meter and
learning rate, for a tolerant patriarch and for a student with its teacher, by each engine.
"""

from __future__ import annotations

import itertools
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

from benchmarks.common import (
    RESULTS,
    Spread,
    Step,
    Timings,
    append_rows,
    choose,
    facts_line,
    machine_facts,
    time_interleaved,
)
from fastgen.arguments import Arguments, at_least_one
from fastgen.augment import Normaliser
from fastgen.config import TrainSettings
from fastgen.crops import ShiftCrop
from fastgen.data.batch import Batch, Loader
from fastgen.data.cifar import read_cifar
from fastgen.data.facts import DATASETS, Facts
from fastgen.data.resident import ResidentLoader
from fastgen.data.split import Split
from fastgen.errors import command
from fastgen.grade import make_grade
from fastgen.laws import eta_for_confidence
from fastgen.meters import Meter, Stopwatch
from fastgen.models import MODELS, build_model, initialise
from fastgen.models.norm_act import fuse_norm_act
from fastgen.optim import make_optimizer
from fastgen.plan import Objective
from fastgen.step import DTYPES, Forward, make_forward, make_prepare, make_scaler
from fastgen.tables import print_table
from fastgen.teacher import Teacher, make_teacher
from fastgen.trainer import Training, take_step
from fastgen.views import training_views

Engine = Literal["eager", "compile"]
Precision = Literal["fp32", "bf16", "fp16"]
Kernels = Literal["torch", "triton"]

BARE = "bare"
ENGINES: tuple[Engine, ...] = ("eager", "compile")


class Way(NamedTuple):
    """How a step is run; `kernels` and `batchnorm` as the recipe's settings of that name."""

    engine: Engine
    kernels: Kernels = "torch"
    batchnorm: Kernels = "torch"

    @property
    def name(self) -> str:
        """One word."""
        fused = [part for part in ("kernels", "batchnorm") if getattr(self, part) == "triton"]
        return "+".join([self.engine, *fused])


PLAIN_WAYS = tuple(Way(engine) for engine in ENGINES)
# On a GPU; the interpreter says nothing about time.
FUSED_WAYS = tuple(Way(engine, "triton", batchnorm) for engine in ENGINES for batchnorm in ("torch", "triton"))
PATRIARCH = Objective(eta=eta_for_confidence(0.6, 5), k=5)
STUDENT = Objective(teacher_weight=0.6)
LR = 0.1

# The goals on a CPU (bf16, channels-last, ResNet-20, batch 128).
FLOORS_OVER_BARE = {"eager patriarch": 1.0, "compile patriarch": 1.2}
FLOOR_STUDENT_OVER_PATRIARCH = 0.78


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
        kernels, batchnorm: as the recipe's settings of that name.
    """

    model: str
    batch_size: int
    precision: Precision
    facts: Facts
    split: Split
    device: torch.device
    kernels: Kernels = "torch"
    batchnorm: Kernels = "torch"

    def run_by(self, way: Way) -> Case:
        """The same case, with this way's kernels."""
        return replace(self, kernels=way.kernels, batchnorm=way.batchnorm)

    def settings(self, engine: Engine) -> TrainSettings:
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
        )

    @property
    def crop(self) -> ShiftCrop:
        """The data set's standard augmentation."""
        return ShiftCrop(self.facts.height_px, self.facts.width_px, self.facts.pad_px, self.facts.flip)

    def normaliser(self, dtype: torch.dtype) -> Normaliser:
        """Pixels -> what the network sees."""
        return Normaliser(self.facts.mean, self.facts.std, self.device, dtype)


@dataclass(frozen=True)
class Rig:
    """A training with all that its step needs, put together as the trainer does."""

    training: Training
    forward: Forward
    batches: Iterator[Batch]

    def step(self, lr: float = LR) -> None:
        """One step of the trainer on the next batch."""
        take_step(self.training, self.forward, next(self.batches), lr)

    def require_finite(self) -> None:
        """Raises ValueError where a loss was not finite: the time of such steps means nothing."""
        bad_step = self.training.meter.read().first_bad_step
        if bad_step is not None:
            raise ValueError(f"the loss was not finite at step {bad_step}")


def make_rig(case: Case, engine: Engine, objective: Objective, loader: Loader, init_seed: int = 0) -> Rig:
    """The trainer's step for one generation, on images of the loader.

    A student's teacher is a network with other initial weights, whose batch-norms know the images.
    """
    train, device = case.settings(engine), case.device
    model = fresh_network(case, init_seed).train()
    if case.batchnorm == "triton":
        model = fuse_norm_act(model)
    teacher = None
    if objective.teacher_weight:
        teacher = _teacher(case, next(endless_batches(loader, case)))
    normalise = case.normaliser(DTYPES[case.precision])
    if case.kernels == "triton" and isinstance(loader, ResidentLoader):
        loader = loader.normalised(normalise)
    batches = endless_batches(loader, case)
    grade = make_grade(objective, fused=case.kernels == "triton")
    forward = make_forward(model, grade, teacher, make_prepare(normalise), train, device)
    training = Training(
        model, make_optimizer(model, train), make_scaler(train, device), Meter(device), Stopwatch(device)
    )
    return Rig(training, forward, batches)


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
    for epoch in itertools.count():
        views = training_views(case.split.ids, case.crop, data_seed=0, generation=0, epoch=epoch)
        for batch in loader.batches(views, case.batch_size):
            if len(batch.labels) == case.batch_size:
                yield batch


def bare_step(case: Case) -> Step:
    """The bare loop. Nothing of fastgen's trainer is in it, only the network is the same."""
    dtype, device = DTYPES[case.precision], case.device
    model = fresh_network(case, init_seed=0).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, nesterov=True, weight_decay=1e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    pixels_NHWC = torch.from_numpy(case.split.images_NHWC[: case.batch_size]).to(device)
    images_NCHW = (pixels_NHWC.float() / 127.5 - 1).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    labels_B = torch.from_numpy(case.split.labels[: case.batch_size]).to(device)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = nn.functional.cross_entropy(model(images_NCHW), labels_B)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def measure(case: Case, *, rounds: int, steps_per_round: int, until: float = math.inf) -> Timings:
    """Times the bare loop and every engine as patriarch and as student.

    Raises:
        ValueError: the loss of a candidate was not finite.
    """
    # What an earlier case compiled counts against Dynamo's limit, past which it falls back to eager.
    torch.compiler.reset()
    rigs = {
        f"{way.name} {role}": make_rig(case.run_by(way), way.engine, objective, loader)
        for role, objective in (("patriarch", PATRIARCH), ("student", STUDENT))
        for way, loader in _loaders(case).items()
    }
    steps: dict[str, Step] = {BARE: bare_step(case), **{name: rig.step for name, rig in rigs.items()}}
    timings = time_interleaved(steps, case.device, rounds=rounds, steps_per_round=steps_per_round, until=until)
    for rig in rigs.values():
        rig.require_finite()
    return timings


def ways_on(device: torch.device) -> tuple[Way, ...]:
    """How a step can be run there."""
    return (*PLAIN_WAYS, *FUSED_WAYS) if device.type == "cuda" else PLAIN_WAYS


def _loaders(case: Case) -> dict[Way, Loader]:
    """The data set in the device's memory, once for all ways that can share it."""
    made = {
        kernels: ResidentLoader(case.split, case.facts.pad_px, case.device, kernels=kernels == "triton")
        for kernels in {way.kernels for way in ways_on(case.device)}
    }
    return {way: made[way.kernels] for way in ways_on(case.device)}


def result_rows(case: Case, timings: Timings, steps_per_round: int, images: str) -> list[dict[str, Any]]:
    """One row a candidate, for step.csv."""
    machine = machine_facts(case.device)
    return [
        {
            **machine,
            "model": case.model,
            "image_px": case.facts.height_px,
            "images": images,
            "batch_size": case.batch_size,
            "precision": case.precision,
            "candidate": name,
            "rounds": timings.rounds,
            "steps_per_round": steps_per_round,
            **_columns("ms_per_step", timings.ms_per_step(name), 4),
            "images_per_second": round(_images_per_second(case, timings, name), 1),
            **_columns("speed_over_bare", timings.speed_ratio(name, BARE), 4),
            **_columns("speed_over_patriarch", _over_patriarch(timings, name), 4),
        }
        for name in timings.seconds_per_step
    ]


def _columns(name: str, value: Spread | None, digits: int) -> dict[str, float | None]:
    if value is None:
        return {f"{name}_median": None, f"{name}_q25": None, f"{name}_q75": None}
    median, low, high = (round(number, digits) for number in (value.median, value.low, value.high))
    return {f"{name}_median": median, f"{name}_q25": low, f"{name}_q75": high}


def _images_per_second(case: Case, timings: Timings, name: str) -> float:
    return 1e3 * case.batch_size / timings.ms_per_step(name).median


def _over_patriarch(timings: Timings, name: str) -> Spread | None:
    engine, _, role = name.partition(" ")
    return timings.speed_ratio(name, f"{engine} patriarch") if role == "student" else None


def report(case: Case, timings: Timings) -> None:
    """Prints the table, and each floor beside what was measured."""
    title = f"{case.model}, batch {case.batch_size}, {case.precision}, {timings.rounds} rounds; median (quartiles)"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for heading in ("step", "ms", "images/s", "speed over bare", "student over patriarch"):
        table.add_column(heading, justify="left" if heading == "step" else "right")
    for name in timings.seconds_per_step:
        over_patriarch = _over_patriarch(timings, name)
        table.add_row(
            name,
            timings.ms_per_step(name).text(2),
            f"{_images_per_second(case, timings, name):,.0f}",
            timings.speed_ratio(name, BARE).text(3),
            over_patriarch.text(3) if over_patriarch else "",
        )
    print_table(table)
    for line in floor_lines(timings):
        print(line)


def floor_lines(timings: Timings) -> list[str]:
    """A line for each floor: what is asked for, what was measured, met or missed."""
    lines = []
    for name, floor in FLOORS_OVER_BARE.items():
        lines.append(_floor_line(f"{name} over bare", floor, timings.speed_ratio(name, BARE)))
    for name in timings.seconds_per_step:
        ratio = _over_patriarch(timings, name)
        if ratio is not None:
            lines.append(_floor_line(f"{name} over patriarch", FLOOR_STUDENT_OVER_PATRIARCH, ratio))
    return lines


def _floor_line(what: str, floor: float, ratio: Spread) -> str:
    verdict = "met" if ratio.median >= floor else "MISSED"
    return f"floor {floor:.2f}  {what}: {ratio.text(3)}  {verdict}"


def random_split(facts: Facts, count: int, seed: int = 0) -> Split:
    """Random pixels under random labels; never zeros, which some hardware multiplies faster."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (count, facts.height_px, facts.width_px, facts.channels), dtype=np.uint8)
    return Split(pixels, random.integers(0, facts.classes, count), np.arange(count, dtype=np.int64))


def hush_compiler() -> None:
    """Silences torch.compile's advice on fp32 matrix products: this benchmark measures what the recipe asks for."""
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")


def main(words: Sequence[str]) -> None:
    """The command."""
    arguments = _parse(words)
    device = choose(arguments.device)
    if device is None:
        print("not measured (no GPU)")
        return
    hush_compiler()
    facts = DATASETS["cifar100"]
    if arguments.images_from:
        split, images = read_cifar("cifar100", arguments.images_from)[0], "cifar100"
    else:
        split, images = random_split(facts, facts.train_images), "random"
    case = Case(arguments.model, arguments.batch_size, arguments.precision, facts, split, device)
    print(facts_line(device))
    timings = measure(case, rounds=arguments.rounds, steps_per_round=arguments.steps_per_round)
    rows = result_rows(case, timings, arguments.steps_per_round, images)
    report(case, timings)
    append_rows(arguments.results / "step.csv", rows)


def _parse(words: Sequence[str]) -> Any:
    parser = Arguments("benchmarks.step", "Times the trainer's step beside a bare PyTorch loop.")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--model", default="resnet20", choices=list(MODELS))
    parser.add_argument("--batch_size", type=at_least_one, default=128, help="images in a step")
    parser.add_argument("--precision", default="bf16", choices=list(DTYPES))
    parser.add_argument("--rounds", type=at_least_one, default=20, help="rounds that are kept")
    parser.add_argument("--steps_per_round", type=at_least_one, default=6, help="steps of each candidate in a round")
    parser.add_argument("--device", default=default, choices=["cpu", "cuda"])
    parser.add_argument("--images_from", type=Path, help="folder above the official CIFAR-100 files; default: random")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of step.csv")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(command(main, sys.argv[1:]))
