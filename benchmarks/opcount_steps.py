"""How many operators does a training step issue? The steps of `opcount`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed, Unsupported
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from benchmarks.baselines import bare_student_loop, fused_sgd
from benchmarks.operators import Count, OperatorCounter
from benchmarks.rigs import LR, PATRIARCH, STUDENT, Case, Kernels, fresh_network, random_split
from fastgen.augment import Normaliser
from fastgen.crops import TABLE_COLUMNS, Int64
from fastgen.data.batch import Batch, Columns, Lesson
from fastgen.data.facts import DATASETS
from fastgen.distributed import ALONE
from fastgen.engines import GraphEngine, Plant
from fastgen.grade import Graded, make_grade
from fastgen.gradients import Reducer
from fastgen.kernels.views import execute_views
from fastgen.learner import Learner
from fastgen.lessons import LookAhead
from fastgen.meters import Meter, Tally
from fastgen.models.norm_act import fuse_norm_act
from fastgen.optim import make_optimizer
from fastgen.plan import Objective
from fastgen.step import DTYPES, Forward, make_forward, make_prepare, make_scaler
from fastgen.supply import Supply
from fastgen.teacher import Teacher, make_teacher
from fastgen.views import WHOLE, EpochViews, Share, training_views
from fastgen.working_copy import WorkingCopy

CPU = torch.device("cpu")
FACTS = DATASETS["cifar100"]
ROWS = 128
PRECISION: Literal["bf16"] = "bf16"


def network_of(model: str) -> nn.Module:
    """The network, fresh."""
    return fresh_network(_case(model), init_seed=0)


def _case(model: str) -> Case:
    return Case(model, ROWS, PRECISION, FACTS, random_split(FACTS, 1), CPU)


@dataclass(frozen=True)
class StepKind:
    """A way to take a training step.

    Attributes:
        role: patriarch or student.
        kernels, batchnorm: as in a recipe; with kernels the loader has normalised the images.
        teacher: its engine, or a label table.
        graph_steps: of engine graph, with the views of the batches, and the teacher asked for all at once; its count is
            that of one step. 0: engine eager, on a batch that is there.
    """

    role: Literal["patriarch", "student"]
    kernels: Kernels = "torch"
    batchnorm: Kernels = "torch"
    teacher: Literal["folded", "fused", "table"] = "folded"
    graph_steps: int = 0

    @property
    def name(self) -> str:
        """To print."""
        teacher = f", {self.teacher}" if self.role == "student" else ""
        engine = f", one of {self.graph_steps} in a graph" if self.graph_steps else ""
        return f"{self.role}{teacher}, kernels={self.kernels}, batchnorm={self.batchnorm}{engine}"

    @property
    def objective(self) -> Objective:
        """Of the role."""
        return PATRIARCH if self.role == "patriarch" else STUDENT


STEPS = (
    StepKind("patriarch"),
    StepKind("student"),
    StepKind("patriarch", "triton"),
    StepKind("student", "triton"),
    StepKind("patriarch", "triton", "triton"),
    StepKind("student", "triton", "triton"),
    StepKind("student", "triton", "triton", "fused"),
    StepKind("student", "triton", "triton", "table"),
    StepKind("patriarch", "triton", "triton", graph_steps=8),
    StepKind("student", "triton", "triton", "fused", graph_steps=8),
)


class _MarkingCopy(WorkingCopy):
    """Tells the counter where a step is: after the gradients are collected comes the optimizer."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, counter: OperatorCounter) -> None:
        super().__init__(model, dtype)
        self._counter = counter

    def refresh(self) -> None:
        self._counter.phase = "forward"
        super().refresh()

    def collect(self) -> None:
        super().collect()
        self._counter.phase = "optimizer"


def count_steps(model: str, kinds: Sequence[StepKind] = STEPS) -> Iterator[Count]:
    """The trainer's own step, eager, and the graph breaks that torch.compile would find in its forward pass."""
    for kind in kinds:
        network, teacher = _network_and_teacher(model, kind)
        copy_ = WorkingCopy(network, DTYPES[PRECISION])
        live = teacher if kind.teacher == "folded" else None
        breaks = graph_breaks(_forward(model, kind, copy_.network, live), _batch(kind, with_logits=live is None))
        yield Count("step", model, kind.name, PRECISION, _count_step(model, kind, network, teacher), breaks)


def count_bare(model: str) -> Iterator[Count]:
    """A plain PyTorch loop with an unfolded teacher under autocast, with PyTorch's default SGD and its fused one."""
    for name, optimizer in (("default SGD", torch.optim.SGD), ("fused SGD", fused_sgd)):
        loop = bare_student_loop(replace(_case(model), split=random_split(FACTS, ROWS)), optimizer)
        loop.step()
        with OperatorCounter() as counter:
            loss = loop.loss()
            counter.phase = "backward"
            loop.learn(loss)
        # SGD is part of what is called here.
        yield Count("step", model, f"bare student, {name}", PRECISION, counter.by_phase)


def _network_and_teacher(model: str, kind: StepKind) -> tuple[nn.Module, Teacher | None]:
    network = network_of(model).train()
    if kind.batchnorm == "triton":
        network = fuse_norm_act(network)
    if kind.role == "patriarch" or kind.teacher == "table":
        return network, None
    shape = (ROWS, FACTS.channels, FACTS.height_px, FACTS.width_px)
    return network, make_teacher(network_of(model), CPU, DTYPES[PRECISION], kind.teacher, shape=shape)


def _count_step(model: str, kind: StepKind, network: nn.Module, teacher: Teacher | None) -> dict[str, float]:
    counter, mode = OperatorCounter(), FakeTensorMode()
    if teacher is not None and kind.teacher == "fused":
        teacher = _stand_in(teacher, counter)
    with FakeCopyMode(mode):
        network = copy.deepcopy(network)
        teacher = copy.deepcopy(teacher) if kind.teacher == "folded" else teacher
    with mode:
        take = _taker(model, kind, network, teacher, counter)
        # The first time may set things up.
        take()
        counter.names.clear()
        counter.phase = "forward"
        with counter:
            steps = take()
    return {phase: count / steps for phase, count in counter.by_phase.items()}


def _stand_in(teacher: Teacher, counter: OperatorCounter) -> Teacher:
    """Counts what the teacher issues, without running it: oneDNN's operators know no fake tensors."""
    shape = (ROWS, FACTS.channels, FACTS.height_px, FACTS.width_px)
    images_NCHW = torch.zeros(shape, dtype=DTYPES[PRECISION]).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), OperatorCounter() as real:
        teacher(images_NCHW)

    def stand_in(images_NCHW: Tensor) -> Tensor:
        counter.names.update(real.names)
        return torch.empty((len(images_NCHW), FACTS.classes), dtype=images_NCHW.dtype)

    return stand_in


def _taker(
    model: str, kind: StepKind, network: nn.Module, teacher: Teacher | None, counter: OperatorCounter
) -> Callable[[], int]:
    """Takes a step, or those of a program; tells how many."""
    train = replace(_case(model).settings("eager"), graph_steps=max(1, kind.graph_steps))
    working = _MarkingCopy(network, DTYPES[PRECISION], counter)
    live = teacher if kind.teacher == "folded" else None
    forward = _marking(_forward(model, kind, working.network, live), counter)
    reducer = Reducer(forward, working, ALONE)
    learner = Learner(network, working, make_optimizer(network, train), make_scaler(train, CPU), reducer)
    prepare = make_prepare(_case(model).normaliser(DTYPES[PRECISION]))
    source = _FakeSource(_case(model).normaliser(DTYPES[PRECISION]))
    ahead = None
    if teacher is not None and live is None:
        ahead = LookAhead(source, teacher, prepare, max(1, kind.graph_steps), FACTS.classes)
    if kind.graph_steps:
        return _program(counter, Plant(
            learner, Supply(source, lambda batch: batch, prepare, None, "", None, source, ahead), train,
            ROWS * kind.graph_steps, [], FACTS.channels, False, CPU,
        ))  # fmt: skip
    batch = _batch(kind, with_logits=kind.role == "student" and teacher is None)

    def step() -> int:
        return _metered([learner.step(batch if ahead is None else ahead.taught(batch), LR)], counter)

    return step


def _metered(tallies: Iterable[Tally], counter: OperatorCounter) -> int:
    """Keeps what steps came to, as the trainer does; tells how many steps they were."""
    meter, steps = Meter(), 0
    for tally in tallies:
        counter.phase = "meter"
        meter.add(steps, tally)
        steps += tally.count
        counter.phase = "forward"
    return steps


def _program(counter: OperatorCounter, plant: Plant) -> Callable[[], int]:
    engine = GraphEngine(plant)
    views = training_views(np.arange(plant.samples), _case("resnet20").crop, data_seed=0, generation=0, epoch=0)
    return lambda: _metered(engine.epoch(views, 0, [LR] * plant.train.graph_steps), counter)


class _FakeSource:
    """What a resident loader is with kernels, on tensors without memory."""

    def __init__(self, normalise: Normaliser) -> None:
        self._normalise = normalise
        self._blank: dict[str, Tensor] = {}
        self._images_NHWC = torch.zeros((1, FACTS.height_px, FACTS.width_px, FACTS.channels), dtype=torch.uint8)

    def __len__(self) -> int:
        return 1

    def batches(
        self, views: EpochViews, batch_size: int, first_batch: int = 0, share: Share = WHOLE
    ) -> Iterator[Batch]:
        """There are none by themselves."""
        return iter(())

    def columns(self, views: EpochViews, positions: Int64) -> dict[str, Tensor]:
        """Looked up once an epoch; `empty`, which does not count."""
        return {name: torch.empty_like(column) for name, column in self._blank.items()}

    def execute(self, columns: Columns) -> Batch:
        """One operator, which gathers, crops, flips and normalises."""
        positions, normalise = columns["positions"], self._normalise
        images_NCHW = execute_views(
            self._images_NHWC, positions, columns["rows"], normalise.scale_C, normalise.shift_C, normalise.dtype
        )
        return Batch(images_NCHW, columns["labels"], columns["ids"])

    def blank(self, count: int, jitter: bool) -> dict[str, Tensor]:
        """See `DeviceSource.blank`."""
        numbers = torch.zeros(count, dtype=torch.int64)
        rows = torch.zeros((count, len(TABLE_COLUMNS)), dtype=torch.int32)
        self._blank = {"positions": numbers, "rows": rows, "labels": numbers.clone(), "ids": numbers.clone()}
        return self._blank


def _marking(forward: Forward, counter: OperatorCounter) -> Forward:
    def marked(
        images_NCHW: Tensor,
        labels_B: Tensor,
        jitter_B4: Tensor | None = None,
        lesson: Lesson | None = None,
        scale: Tensor | None = None,
    ) -> Graded:
        counter.phase = "forward"
        graded = forward(images_NCHW, labels_B, jitter_B4, lesson, scale)
        counter.phase = "backward"
        return graded

    return marked


def _forward(model: str, kind: StepKind, network: nn.Module, teacher: Teacher | None) -> Forward:
    case = _case(model)
    grade = make_grade(kind.objective, fused=kind.kernels == "triton")
    return make_forward(network, grade, teacher, make_prepare(case.normaliser(DTYPES[PRECISION])))


def _batch(kind: StepKind, *, with_logits: bool) -> Batch:
    dtype = DTYPES[PRECISION]
    shape = (ROWS, FACTS.channels, FACTS.height_px, FACTS.width_px)
    images_NCHW = torch.zeros(shape, dtype=torch.uint8 if kind.kernels == "torch" else dtype)
    numbers_B = torch.zeros(ROWS, dtype=torch.int64)
    logits_BC = torch.zeros(ROWS, FACTS.classes, dtype=dtype) if with_logits else None
    return Batch(images_NCHW.contiguous(memory_format=torch.channels_last), numbers_B, numbers_B, None, logits_BC)


class _WholeGraphError(Exception):
    """torch.compile has reached its backend: it has the whole function as one graph."""


def graph_breaks(forward: Callable[..., Any], batch: Batch) -> str:
    """`0` where torch.compile takes the forward pass whole, else why it does not; nothing is compiled or run."""

    def stop(graph: Any, inputs: Any) -> Any:
        raise _WholeGraphError

    # What was traced before counts against Dynamo's limit.
    torch.compiler.reset()
    try:
        compiled = torch.compile(forward, fullgraph=True, dynamic=False, backend=stop)
        compiled(batch.images_NCHW, batch.labels, batch.jitter, batch.lesson)
    except BackendCompilerFailed as error:
        if isinstance(error.inner_exception, _WholeGraphError):
            return "0"
        raise
    except Unsupported as error:
        return str(error).splitlines()[0]
    finally:
        torch.compiler.reset()
    return "it was not traced"
