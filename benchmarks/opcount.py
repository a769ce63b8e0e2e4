"""How many operators do a loss, a teacher and a whole training step issue? Counted, not timed: a CPU is enough.

python -m benchmarks.opcount [--model=resnet20]

The rule: every operator counts that torch's dispatcher runs below autograd and autocast, once, whatever it launches,
but for views and other changes of metadata alone (operators whose result is an input's memory that they do not write
to, and _unsafe_view), pure allocations (empty and its like), and marks for the profiler. So an operator of fastgen's
counts once: a loss kernel is one launch, batchnorm_act two launches forward and two backward; some of torch's own are
two launches and more (slice_backward fills and copies).

Losses and steps run on fake tensors, which have shapes and no values: Triton is not run, and its operators are seen all
the same. Teachers really run, as oneDNN's fused operators know no fake tensors. All of it is counted on CPU tensors; on
a GPU other libraries stand behind the same operators. Making batches is left out: it is the loader's.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed, Unsupported
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import RESULTS, Floor, append_rows, facts_line, machine_facts, require
from benchmarks.step import LR, PATRIARCH, STUDENT, Case, fresh_network, random_split
from fastgen.arguments import Arguments
from fastgen.data.batch import Batch
from fastgen.data.facts import DATASETS
from fastgen.errors import command
from fastgen.grade import Graded, make_grade
from fastgen.meters import Meter, Stopwatch
from fastgen.models import MODELS
from fastgen.models.norm_act import fuse_norm_act
from fastgen.optim import make_optimizer
from fastgen.plan import Objective
from fastgen.step import DTYPES, Forward, make_forward, make_prepare, make_scaler
from fastgen.tables import print_table
from fastgen.teacher import Teacher, make_teacher
from fastgen.trainer import Training, take_step

Kernels = Literal["torch", "triton"]

CPU = torch.device("cpu")
FACTS = DATASETS["cifar100"]
ROWS = 128
PRECISION: Literal["bf16"] = "bf16"
PHASES = ("forward", "backward", "meter", "optimizer")

OBJECTIVES = {
    "tolerant": PATRIARCH,
    "distill t=1": STUDENT,
    "distill t=4": Objective(teacher_weight=STUDENT.teacher_weight, temperature=4.0),
}
# Network -> side of the images that its teacher is shown; the number of operators does not depend on it.
TEACHERS_PX = {"resnet20": 32, "resnet18": 64}

MOST_OPERATORS_OF_FUSED_LOSS = 2
MOST_OF_FUSED_TEACHER = ("resnet20", 0.5)

ALLOCATIONS = ("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided")
RULE = "counted: operators of the dispatcher that are no views, no pure allocations and no marks for the profiler"


class OperatorCounter(TorchDispatchMode):
    """Counts the operators that run inside its `with`, phase by phase.

    Attributes:
        phase: to which the next operators are charged.
        names: how often each operator was seen, by phase and name.
    """

    def __init__(self, phase: str = "forward") -> None:
        super().__init__()
        self.phase = phase
        self.names: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if is_work(func):
            self.names[self.phase, str(func)] += 1
        return func(*args, **(kwargs or {}))

    @property
    def by_phase(self) -> dict[str, int]:
        """Operators of each phase."""
        sums: Counter[str] = Counter()
        for (phase, _), count in self.names.items():
            sums[phase] += count
        return dict(sums)


def is_work(func: OpOverload) -> bool:
    """Whether an operator counts; the module's docstring says the rule."""
    if func.namespace in ("prim", "profiler"):
        return False
    name = func._schema.name.split("::")[1]
    only_metadata = func.is_view or name == "_unsafe_view"
    return not only_metadata and not (func.namespace == "aten" and name in ALLOCATIONS)


@dataclass(frozen=True)
class Count:
    """Operators of one case.

    Attributes:
        part: `loss`, `teacher` or `step`.
        model: the network; for losses none.
        case: what was counted.
        precision: of the arithmetic.
        by_phase: operators of each phase.
        graph_breaks: of the step's forward pass: `0`, or why torch.compile cannot take it whole; None: not asked.
    """

    part: str
    model: str
    case: str
    precision: str
    by_phase: Mapping[str, int]
    graph_breaks: str | None = None

    @property
    def operators(self) -> int:
        """All of them."""
        return sum(self.by_phase.values())


class _EndOfNetwork(torch.autograd.Function):
    """Logits of a network that ends here: what takes their gradient, and adds no operator of its own."""

    @staticmethod
    def forward(ctx: Any, logits_BC: Tensor) -> Tensor:
        return logits_BC.view_as(logits_BC)

    @staticmethod
    def backward(ctx: Any, gradient_BC: Tensor) -> None:
        return None


def count_losses() -> Iterator[Count]:
    """From logits to their gradient, with loss and hits for the meter, in plain PyTorch and fused."""
    for name, objective in OBJECTIVES.items():
        for fused in (False, True):
            by_phase = _count_loss(objective, fused)
            yield Count("loss", "", f"{name} {'fused' if fused else 'eager'}", PRECISION, by_phase)


def _count_loss(objective: Objective, fused: bool) -> dict[str, int]:
    grade, dtype = make_grade(objective, fused=fused), DTYPES[PRECISION]
    with FakeTensorMode():
        leaf_BC = torch.zeros(ROWS, FACTS.classes, dtype=dtype, requires_grad=True)
        labels_B = torch.zeros(ROWS, dtype=torch.int64)
        teacher_BC = torch.zeros(ROWS, FACTS.classes, dtype=dtype) if objective.teacher_weight else None
        logits_BC = _EndOfNetwork.apply(leaf_BC)
        with OperatorCounter() as counter:
            graded = grade(logits_BC, labels_B, teacher_BC, None)
            counter.phase = "backward"
            torch.autograd.backward(graded.root, graded.gradient)
    return counter.by_phase


def count_teachers() -> Iterator[Count]:
    """A teacher's pass: the network in eval mode, with its batch-norms folded, and with its operators fused.

    In fp32, where there are no casts: autocast would cast the plain network's weights on every pass.
    """
    for model, side_px in TEACHERS_PX.items():
        shape = (2, FACTS.channels, side_px, side_px)
        images_NCHW = torch.zeros(shape).contiguous(memory_format=torch.channels_last)
        for name, teacher in _teachers(model, shape).items():
            with torch.no_grad(), OperatorCounter() as counter:
                teacher(images_NCHW)
            yield Count("teacher", model, name, "fp32", counter.by_phase)


def _teachers(model: str, shape: tuple[int, ...]) -> dict[str, Teacher]:
    fused = make_teacher(_network(model), CPU, torch.float32, "fused", shape=shape)
    return {
        "eager": _network(model).eval(),
        "folded": make_teacher(_network(model), CPU, torch.float32),
        "fused": fused,
    }


def _network(model: str) -> nn.Module:
    return fresh_network(_case(model), init_seed=0)


def _case(model: str) -> Case:
    return Case(model, ROWS, PRECISION, FACTS, random_split(FACTS, 1), CPU)


@dataclass(frozen=True)
class StepKind:
    """A way to take a training step.

    Attributes:
        role: patriarch or student.
        kernels, batchnorm: as in a recipe; with kernels the loader has normalised the images.
        table: whether the teacher's logits come from a label table; else the folded teacher is asked in the step.
    """

    role: Literal["patriarch", "student"]
    kernels: Kernels = "torch"
    batchnorm: Kernels = "torch"
    table: bool = False

    @property
    def name(self) -> str:
        """To print."""
        teacher = f", {'table' if self.table else 'folded'}" if self.role == "student" else ""
        return f"{self.role}{teacher}, kernels={self.kernels}, batchnorm={self.batchnorm}"

    @property
    def asks_teacher(self) -> bool:
        """Whether a teacher runs within the step."""
        return self.role == "student" and not self.table


STEPS = (
    StepKind("patriarch"),
    StepKind("student"),
    StepKind("patriarch", "triton"),
    StepKind("student", "triton"),
    StepKind("patriarch", "triton", "triton"),
    StepKind("student", "triton", "triton"),
    StepKind("student", "triton", "triton", table=True),
)


class _MarkingMeter(Meter):
    """Tells the counter where a step is: after the backward pass comes the meter, then the optimizer."""

    def __init__(self, counter: OperatorCounter) -> None:
        super().__init__(CPU)
        self._counter = counter

    def add(self, step: int, images: int, loss_sum: Tensor, correct: Tensor) -> None:
        self._counter.phase = "meter"
        super().add(step, images, loss_sum, correct)
        self._counter.phase = "optimizer"


def count_steps(model: str, kinds: Sequence[StepKind] = STEPS) -> Iterator[Count]:
    """The trainer's own step, eager, and the graph breaks that torch.compile would find in its forward pass."""
    for kind in kinds:
        parts = _network_and_teacher(model, kind)
        breaks = graph_breaks(_forward(model, kind, *parts), _batch(kind))
        yield Count("step", model, kind.name, PRECISION, _count_step(model, kind, *parts), breaks)


def _network_and_teacher(model: str, kind: StepKind) -> tuple[nn.Module, Teacher | None]:
    network = _network(model).train()
    if kind.batchnorm == "triton":
        network = fuse_norm_act(network)
    return network, make_teacher(_network(model), CPU, DTYPES[PRECISION]) if kind.asks_teacher else None


def _count_step(model: str, kind: StepKind, network: nn.Module, teacher: Teacher | None) -> dict[str, int]:
    counter, mode = OperatorCounter(), FakeTensorMode()
    with FakeCopyMode(mode):
        network, teacher = copy.deepcopy((network, teacher))
    with mode:
        train = _case(model).settings("eager")
        forward = _marking(_forward(model, kind, network, teacher), counter)
        optimizer, scaler = make_optimizer(network, train), make_scaler(train, CPU)
        training = Training(network, optimizer, scaler, _MarkingMeter(counter), Stopwatch(CPU))
        batch = _batch(kind)
        # The first step may set things up.
        take_step(training, forward, batch, LR)
        counter.names.clear()
        with counter:
            take_step(training, forward, batch, LR)
    return counter.by_phase


def _marking(forward: Forward, counter: OperatorCounter) -> Forward:
    def marked(
        images_NCHW: Tensor,
        labels_B: Tensor,
        jitter_B4: Tensor | None = None,
        teacher_logits_BC: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Graded:
        counter.phase = "forward"
        graded = forward(images_NCHW, labels_B, jitter_B4, teacher_logits_BC, scale)
        counter.phase = "backward"
        return graded

    return marked


def _forward(model: str, kind: StepKind, network: nn.Module, teacher: Teacher | None) -> Forward:
    case = _case(model)
    grade = make_grade(PATRIARCH if kind.role == "patriarch" else STUDENT, fused=kind.kernels == "triton")
    prepare = make_prepare(case.normaliser(DTYPES[PRECISION]))
    return make_forward(network, grade, teacher, prepare, case.settings("eager"), CPU)


def _batch(kind: StepKind) -> Batch:
    dtype = DTYPES[PRECISION]
    shape = (ROWS, FACTS.channels, FACTS.height_px, FACTS.width_px)
    images_NCHW = torch.zeros(shape, dtype=torch.uint8 if kind.kernels == "torch" else dtype)
    numbers_B = torch.zeros(ROWS, dtype=torch.int64)
    logits_BC = torch.zeros(ROWS, FACTS.classes, dtype=dtype) if kind.table else None
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
        compiled(batch.images_NCHW, batch.labels, batch.jitter, batch.teacher_logits_BC)
    except BackendCompilerFailed as error:
        if isinstance(error.inner_exception, _WholeGraphError):
            return "0"
        raise
    except Unsupported as error:
        return str(error).splitlines()[0]
    finally:
        torch.compiler.reset()
    return "it was not traced"


def floors(counts: Sequence[Count]) -> list[Floor]:
    """What the counts must keep to; a count that is not there does not pass."""
    found = {(count.part, count.model, count.case): float(count.operators) for count in counts}
    most = MOST_OPERATORS_OF_FUSED_LOSS
    of_losses = [
        Floor(f"operators of the fused loss {name}", found.get(("loss", "", f"{name} fused"), torch.nan), most, True)
        for name in OBJECTIVES
    ]
    model, share = MOST_OF_FUSED_TEACHER
    eager, fused = (found.get(("teacher", model, name), torch.nan) for name in ("eager", "fused"))
    return [*of_losses, Floor(f"operators of the fused {model} teacher, over eager", fused / eager, share, True)]


def report(counts: Sequence[Count]) -> None:
    """Prints a table of each part."""
    for part, precision in dict.fromkeys((count.part, count.precision) for count in counts):
        chosen = [count for count in counts if count.part == part]
        phases = [phase for phase in PHASES if any(count.by_phase.get(phase) for count in chosen)]
        breaks = ["graph breaks"] if part == "step" else []
        table = Table(title=f"operators of a {part}, {precision}", box=box.SIMPLE_HEAD, title_justify="left")
        for heading in (part, *phases, "all", *breaks):
            table.add_column(heading, justify="left" if heading in (part, *breaks) else "right")
        for count in chosen:
            name = f"{count.model} {count.case}" if part == "teacher" else count.case
            numbers = [str(count.by_phase.get(phase, 0)) for phase in phases]
            table.add_row(name, *numbers, str(count.operators), *([count.graph_breaks or "-"] if breaks else []))
        print_table(table)


def result_rows(counts: Sequence[Count]) -> list[dict[str, Any]]:
    """One row a count, for opcount.csv."""
    machine = machine_facts(CPU)
    return [
        {
            **machine,
            "part": count.part,
            "model": count.model,
            "case": count.case,
            "precision": count.precision,
            "operators": count.operators,
            **{phase: count.by_phase.get(phase, 0) for phase in PHASES},
            "graph_breaks": count.graph_breaks,
        }
        for count in counts
    ]


def main(words: Sequence[str]) -> None:
    """The command."""
    arguments = _parse(words)
    print(facts_line(CPU))
    print(f"{RULE}; steps are of {arguments.model}")
    counts = [*count_losses(), *count_teachers(), *count_steps(arguments.model)]
    report(counts)
    append_rows(arguments.results / "opcount.csv", result_rows(counts))
    for floor in floors(counts):
        print(floor.line())
    require(floors(counts))


def _parse(words: Sequence[str]) -> Any:
    parser = Arguments("benchmarks.opcount", "Counts the operators of losses, teachers and training steps.")
    cifar = [name for name in MODELS if name not in ("resnet18", "resnet34", "resnet50")]
    parser.add_argument("--model", default="resnet20", choices=cifar, help="whose step is counted, on 32 pixels")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of opcount.csv")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(command(main, sys.argv[1:]))
