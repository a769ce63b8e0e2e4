"""How many operators do a loss, a teacher and a whole training step issue? Counted, not timed: a CPU is enough.

python -m benchmarks.opcount [--model=resnet20]

The rule of counting is that of `benchmarks.operators`. Losses and steps run on fake tensors, which have shapes and no
values: Triton is not run, and its operators are seen all the same. Teachers really run, as oneDNN's fused operators
know no fake tensors. All of it is counted on CPU tensors; on a GPU other libraries stand behind the same operators.
Making batches is the loader's, and counted only where it is part of a graph; the meter has had no operators of its own
since it keeps what a step gives.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.common import RESULTS, Floor, append_rows, facts_line, machine_facts, require
from benchmarks.opcount_steps import CPU, FACTS, PRECISION, ROWS, StepKind, count_bare, count_steps, network_of
from benchmarks.operators import RULE, Count, OperatorCounter
from benchmarks.rigs import PATRIARCH, STUDENT
from fastgen.arguments import Arguments
from fastgen.errors import command
from fastgen.grade import make_grade
from fastgen.models import MODELS
from fastgen.networks import PHOTO_MODELS
from fastgen.plan import Objective
from fastgen.step import DTYPES
from fastgen.tables import new_table, print_table
from fastgen.teacher import Teacher, make_teacher

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
# Every kernel in use, the teacher asked in each step.
MOST_OF_STEP = ("resnet20", StepKind("student", "triton", "triton", "fused").name, 160)


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
    fused = make_teacher(network_of(model), CPU, torch.float32, "fused", shape=shape)
    return {
        "eager": network_of(model).eval(),
        "folded": make_teacher(network_of(model), CPU, torch.float32),
        "fused": fused,
    }


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
    of_teacher = Floor(f"operators of the fused {model} teacher, over eager", fused / eager, share, True)
    model, step, most = MOST_OF_STEP
    operators = found.get(("step", model, step), torch.nan)
    return [*of_losses, of_teacher, Floor(f"operators of a {model} step: {step}", operators, most, True)]


def report(counts: Sequence[Count]) -> None:
    """Prints a table of each part."""
    for part, precision in dict.fromkeys((count.part, count.precision) for count in counts):
        chosen = [count for count in counts if count.part == part]
        phases = [phase for phase in PHASES if any(count.by_phase.get(phase) for count in chosen)]
        breaks = ["graph breaks"] if part == "step" else []
        headings = (part, *phases, "all", *breaks)
        table = new_table(f"operators of a {part}, {precision}", headings, (part, *breaks), wrap=True)
        for count in chosen:
            name = f"{count.model} {count.case}" if part == "teacher" else count.case
            numbers = [f"{count.by_phase.get(phase, 0):g}" for phase in phases]
            table.add_row(name, *numbers, f"{count.operators:g}", *([count.graph_breaks or "-"] if breaks else []))
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
    counts = [
        *count_losses(), *count_teachers(), *count_bare(arguments.model), *count_steps(arguments.model),
    ]  # fmt: skip
    report(counts)
    append_rows(arguments.results / "opcount.csv", result_rows(counts))
    for floor in floors(counts):
        print(floor.line())
    require(floors(counts))


def _parse(words: Sequence[str]) -> Any:
    parser = Arguments("benchmarks.opcount", "Counts the operators of losses, teachers and training steps.")
    cifar = [name for name in MODELS if name not in PHOTO_MODELS]
    parser.add_argument("--model", default="resnet20", choices=cifar, help="whose step is counted, on 32 pixels")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of opcount.csv")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(command(main, sys.argv[1:]))
