"""How fast are loss and gradient of a batch: plain PyTorch, torch.compile, and the fused kernels?

python -m benchmarks.losses [--minutes=8]                         # needs a GPU
TRITON_INTERPRET=1 python -m benchmarks.losses --device=cpu       # no times: do the candidates compute the same?

One call goes from logits to the mean loss and the gradient of the logits, in fp16 times a loss scale, as in training.
The fused kernels count hits and p_a1 besides; the others are not asked to. A candidate's calls on all copies of the
inputs are captured as one CUDA graph, so no time is the host's; candidates are replayed in turns. The copies together
are larger than the cache, as far as `MOST_COPIES` allows: small batches stay in the cache, as they do in training, and
the table says so.

Bytes are those that must move: logits and what is known of the teacher read, the gradient written, and 12 a row for
label and loss. GB/s are these bytes over the time, for candidates that move more of them, too.

Shapes: B rows, C classes, M kept ones.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from benchmarks import closed_forms
from benchmarks.common import (
    RESULTS,
    Floor,
    Spread,
    Step,
    Timings,
    append_rows,
    choose,
    facts_line,
    machine_facts,
    positive_minutes,
    require,
    time_interleaved,
    wait_for,
)
from benchmarks.rigs import PATRIARCH, hush_compiler
from fastgen import losses
from fastgen.arguments import Arguments, at_least_one
from fastgen.errors import Stopped, UserError, command
from fastgen.step import DTYPES
from fastgen.tables import print_table

Precision = Literal["bf16", "fp16"]
Teacher = Literal["none", "dense", "stored"]
# Logits, labels, and what is known of the teacher -> mean loss.
PlainLoss = Callable[..., Tensor]

TEACHER_WEIGHT = 0.6
KEPT = 16
# What torch.amp.GradScaler begins with: without it most of an fp16 gradient would be zeros.
FP16_SCALE = 2.0**16
SHAPES = ((1024, 1000), (128, 100), (8192, 1000))
SMALL_SHAPES = ((3, 100), (5, 40))
PRECISIONS: tuple[Precision, ...] = ("bf16", "fp16")
CANDIDATES = ("eager", "compile", "fused")

LABEL_AND_LOSS_BYTES = 12
# Several times the 50 MB of an H200's second-level cache.
ROTATION_BYTES = 128e6
MOST_COPIES = 64
WARM_UP_CALLS = 3

FLOOR_SHAPES = SHAPES[:2]
FUSED_OVER_EAGER, FUSED_OVER_COMPILE = 5.0, 1.0
# Of the loss, which is fp32 whatever the logits are; sums of 8192 x 1000 numbers lose a little.
LOSS_ERROR = 1e-5


class Objective(NamedTuple):
    """What is computed of the logits.

    Attributes:
        teacher: none, its logits, or M classes a row and their probabilities.
        temperature: of the teacher.
    """

    teacher: Teacher
    temperature: float = 1.0


OBJECTIVES = {
    "tolerant": Objective("none"),
    "distill t=1": Objective("dense"),
    "distill t=4": Objective("dense", 4.0),
    f"distill_topm M={KEPT}": Objective("stored"),
}


@dataclass(frozen=True)
class Case:
    """One table: an objective on logits of one shape and dtype."""

    objective: str
    rows: int
    classes: int
    precision: Precision

    @property
    def name(self) -> str:
        """To print."""
        return f"{self.objective}, ({self.rows}, {self.classes}) {self.precision}"

    @property
    def bytes_read(self) -> int:
        """Of logits and teacher."""
        of_logits = self.rows * self.classes * DTYPES[self.precision].itemsize
        # A class is int16, a probability fp16.
        of_teacher = {"none": 0, "dense": of_logits, "stored": self.rows * KEPT * 4}
        return of_logits + of_teacher[OBJECTIVES[self.objective].teacher]

    @property
    def bytes_moved(self) -> int:
        """That any way to compute it moves at least."""
        gradient = self.rows * self.classes * DTYPES[self.precision].itemsize
        return self.bytes_read + gradient + LABEL_AND_LOSS_BYTES * self.rows

    @property
    def copies(self) -> int:
        """Inputs that are taken in turn."""
        return min(MOST_COPIES, math.ceil(ROTATION_BYTES / self.bytes_read))

    @property
    def rotation(self) -> str:
        """What is said of them."""
        megabytes = self.copies * self.bytes_read / 1e6
        cached = ", WITHIN THE CACHE" if self.copies * self.bytes_read < ROTATION_BYTES else ""
        return f"{self.copies} inputs of {megabytes:.1f} MB together in turn{cached}"


# In the order of their worth: what the floors are about comes first.
CASES = tuple(
    Case(objective, *shape, precision)
    for shape, precision, objective in itertools.product(SHAPES, PRECISIONS, OBJECTIVES)
)
SMALL_CASES = tuple(
    Case(objective, *shape, precision)
    for shape, precision, objective in itertools.product(SMALL_SHAPES, PRECISIONS, OBJECTIVES)
)


@dataclass(frozen=True)
class Inputs:
    """Of one call.

    Attributes:
        z_BC: logits.
        labels_B: int64.
        teacher: nothing, (v_BC,), or (classes_BM, probabilities_BM).
        scale: fp32 (), what the gradient is multiplied with; None: 1.
    """

    z_BC: Tensor
    labels_B: Tensor
    teacher: tuple[Tensor, ...]
    scale: Tensor | None


# -> mean loss, fp32 (), and its gradient times the scale, in the logits' dtype.
Output = tuple[Tensor, Tensor]
Call = Callable[[Inputs], Output]


def draw(case: Case, device: torch.device, seed: int) -> Inputs:
    """Random logits three wide, never zeros, and random labels."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype, objective = DTYPES[case.precision], OBJECTIVES[case.objective]

    def logits() -> Tensor:
        values_BC = torch.randn((case.rows, case.classes), generator=generator, device=device)
        return (3 * values_BC).to(dtype)

    z_BC, v_BC = logits(), logits()
    labels_B = torch.randint(case.classes, (case.rows,), generator=generator, device=device)
    scale = torch.full((), FP16_SCALE, device=device) if case.precision == "fp16" else None
    teacher: dict[Teacher, tuple[Tensor, ...]] = {"none": (), "dense": (v_BC,)}
    if objective.teacher == "stored":
        top = (v_BC.float() / objective.temperature).softmax(1).topk(KEPT, dim=1)
        teacher["stored"] = (top.indices.to(torch.int16), top.values.half())
    return Inputs(z_BC, labels_B, teacher[objective.teacher], scale)


def candidates(case: Case, device: torch.device) -> dict[str, Call]:
    """Everything that computes the case's objective, by name."""
    plain = plain_loss(OBJECTIVES[case.objective])
    # On a CPU nothing is timed: what inductor would make of it there has no say.
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(plain, dynamic=False, fullgraph=True, backend=backend)
    fused = fused_call(OBJECTIVES[case.objective])
    return dict(zip(CANDIDATES, (differentiated(plain), differentiated(compiled), fused), strict=True))


def plain_loss(objective: Objective) -> PlainLoss:
    """The reference in plain PyTorch."""
    weight, temperature = TEACHER_WEIGHT, objective.temperature
    if objective.teacher == "none":
        return lambda z, labels: losses.tolerant(z, labels, PATRIARCH.eta, PATRIARCH.k)
    if objective.teacher == "dense":
        return lambda z, labels, v: losses.distill(z, labels, v, weight, temperature)
    return lambda z, labels, kept, t: losses.distill_topm(z, labels, kept, t, weight, temperature)


def differentiated(loss: PlainLoss) -> Call:
    """A loss and, by autograd, its gradient."""

    def call(inputs: Inputs) -> Output:
        z_BC = inputs.z_BC.detach().requires_grad_()
        mean = loss(z_BC, inputs.labels_B, *inputs.teacher)
        (gradient_BC,) = torch.autograd.grad(mean, z_BC, inputs.scale)
        return mean.detach(), gradient_BC

    return call


def fused_call(objective: Objective) -> Call:
    """The kernel, as the trainer uses it: its gradient is finished, autograd has no part in it."""
    from fastgen.kernels.distill import distill_rows
    from fastgen.kernels.distill_topm import distill_topm_rows
    from fastgen.kernels.rows import LOSS
    from fastgen.kernels.tolerant import tolerant_rows

    kernel = {"none": tolerant_rows, "dense": distill_rows, "stored": distill_topm_rows}[objective.teacher]
    of_teacher = (TEACHER_WEIGHT, objective.temperature)
    settings = (PATRIARCH.eta, PATRIARCH.k) if objective.teacher == "none" else of_teacher

    def call(inputs: Inputs) -> Output:
        weight = 1 / len(inputs.labels_B)
        rows_4B, gradient_BC = kernel(inputs.z_BC, inputs.labels_B, *inputs.teacher, *settings, inputs.scale, weight)
        return rows_4B[LOSS].mean(), gradient_BC

    return call


class Errors(NamedTuple):
    """Distance to fp64: of the mean loss, relative; of the gradient, the largest over the largest gradient."""

    loss: float
    gradient: float


def errors(case: Case, inputs: Inputs, output: Output) -> Errors:
    """How far an output is from the closed form in fp64."""
    objective = OBJECTIVES[case.objective]
    z_BC, labels_B = inputs.z_BC.double().cpu().numpy(), inputs.labels_B.cpu().numpy()
    of_teacher = TEACHER_WEIGHT, objective.temperature
    if objective.teacher == "none":
        loss_B, gradient_BC = closed_forms.tolerant(z_BC, labels_B, PATRIARCH.eta, PATRIARCH.k)
    elif objective.teacher == "dense":
        loss_B, gradient_BC = closed_forms.distill(
            z_BC, labels_B, inputs.teacher[0].double().cpu().numpy(), *of_teacher
        )
    else:
        kept_BM, t_BM = inputs.teacher[0].long().cpu().numpy(), inputs.teacher[1].double().cpu().numpy()
        loss_B, gradient_BC = closed_forms.distill_topm(z_BC, labels_B, kept_BM, t_BM, *of_teacher)
    expected_BC = gradient_BC * (1.0 if inputs.scale is None else inputs.scale.item()) / case.rows
    found_BC = output[1].double().cpu().numpy()
    of_loss = abs(output[0].item() - loss_B.mean()) / abs(loss_B.mean())
    return Errors(float(of_loss), float(abs(found_BC - expected_BC).max() / abs(expected_BC).max()))


@dataclass(frozen=True)
class Result:
    """What is known of a case.

    Attributes:
        errors: of each candidate.
        timings: seconds for all copies, by candidate; None on a CPU.
    """

    case: Case
    errors: Mapping[str, Errors]
    timings: Timings | None

    def microseconds(self, name: str) -> Spread:
        """Of one call."""
        assert self.timings is not None
        ms = self.timings.ms_per_step(name)
        return Spread(*(1e3 * value / self.case.copies for value in (ms.median, ms.low, ms.high)))

    def gigabytes_per_second(self, name: str) -> float:
        """Bytes that must move, over the time."""
        return self.case.bytes_moved / self.microseconds(name).median / 1e3


@dataclass(frozen=True)
class Captured:
    """A candidate's calls on all copies.

    Attributes:
        replay: does them again.
        outputs: where their results lie.
    """

    replay: Step
    outputs: Sequence[Output]


def capture(call: Call, copies: Sequence[Inputs]) -> Captured:
    """All calls as one CUDA graph. Outputs are kept, so that each call writes to memory of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # What is compiled, or chosen by trial, has to be so before the capture; torch wants that on another stream.
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_CALLS):
            call(copies[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [call(inputs) for inputs in copies]
    return Captured(graph.replay, outputs)


def time_case(case: Case, device: torch.device, rounds: int, replays: int, until: float) -> Result:
    """Captures every candidate, replays them in turns, and looks at what the last replay left.

    Args:
        case: to be measured.
        device: a GPU.
        rounds: that are kept.
        replays: of each candidate in a round.
        until: see `time_interleaved`.
    """
    torch.compiler.reset()
    copies = [draw(case, device, seed) for seed in range(case.copies)]
    captured = {name: capture(call, copies) for name, call in candidates(case, device).items()}
    steps = {name: one.replay for name, one in captured.items()}
    timings = time_interleaved(steps, device, rounds=rounds, steps_per_round=replays, until=until)
    wait_for(device)
    # Of the last copy: a graph that had skipped calls would show.
    found = {name: errors(case, copies[-1], one.outputs[-1]) for name, one in captured.items()}
    return Result(case, found, timings)


def compare_case(case: Case, device: torch.device) -> Result:
    """Errors alone, each candidate called once."""
    torch.compiler.reset()
    inputs = draw(case, device, seed=0)
    found = {name: errors(case, inputs, call(inputs)) for name, call in candidates(case, device).items()}
    return Result(case, found, None)


def floors(result: Result) -> list[Floor]:
    """What must hold of a case: errors of every candidate, and how much faster the fused kernel is."""
    case = result.case
    # One unit in the last place of the largest gradient: the interpreter cuts bf16 off where a GPU rounds.
    of_gradient = torch.finfo(DTYPES[case.precision]).eps
    found = [
        Floor(f"{case.name}: error of the loss, all candidates", _worst(result, 0), LOSS_ERROR, at_most=True),
        Floor(f"{case.name}: error of the gradient, all candidates", _worst(result, 1), of_gradient, at_most=True),
    ]
    if result.timings is None or (case.rows, case.classes) not in FLOOR_SHAPES:
        return found
    for base, asked in (("eager", FUSED_OVER_EAGER), ("compile", FUSED_OVER_COMPILE)):
        ratio = result.timings.speed_ratio("fused", base).median
        found.append(Floor(f"{case.name}: speed of fused over {base}", ratio, asked))
    return found


def _worst(result: Result, column: int) -> float:
    values = [error[column] for error in result.errors.values()]
    return math.nan if any(map(math.isnan, values)) else max(values)


def report(result: Result) -> None:
    """Prints the case's table, and its floors."""
    case, timings = result.case, result.timings
    told = f"{timings.rounds} rounds, {case.rotation}; median (quartiles)" if timings else "not timed"
    table = Table(title=f"{case.name}: {told}", box=box.SIMPLE_HEAD, title_justify="left")
    timed = ("us", "GB/s", "speed over eager", "speed over compile") if timings else ()
    for heading in ("candidate", *timed, "error of loss", "of gradient"):
        table.add_column(heading, justify="left" if heading == "candidate" else "right")
    for name, error in result.errors.items():
        times: list[str] = []
        if timings:
            ratios = (timings.speed_ratio(name, base).text(2) for base in ("eager", "compile"))
            times = [result.microseconds(name).text(2), f"{result.gigabytes_per_second(name):,.0f}", *ratios]
        table.add_row(name, *times, f"{error.loss:.1e}", f"{error.gradient:.1e}")
    print_table(table)
    for floor in floors(result):
        print(floor.line(), flush=True)


def result_rows(result: Result, device: torch.device, replays: int) -> list[dict[str, Any]]:
    """One row a candidate, for losses.csv; none where nothing was timed."""
    if result.timings is None:
        return []
    case, timings, machine = result.case, result.timings, machine_facts(device)
    rows = []
    for name, error in result.errors.items():
        spreads = {"us": result.microseconds(name)}
        spreads |= {f"speed_over_{base}": timings.speed_ratio(name, base) for base in ("eager", "compile")}
        columns = {
            f"{column}_{part}": round(value, 4)
            for column, found in spreads.items()
            for part, value in (("median", found.median), ("q25", found.low), ("q75", found.high))
        }
        rows.append(
            {
                **machine,
                "objective": case.objective,
                "rows": case.rows,
                "classes": case.classes,
                "precision": case.precision,
                "candidate": name,
                "rounds": timings.rounds,
                "replays_per_round": replays,
                "copies": case.copies,
                "bytes_moved": case.bytes_moved,
                "gb_per_second": round(result.gigabytes_per_second(name), 1),
                **columns,
                "loss_error": error.loss,
                "gradient_error": error.gradient,
            }
        )
    return rows


def run(cases: Sequence[Case], measure: Callable[[Case], Result], deadline: float) -> Iterator[Result | Floor]:
    """Measures case after case; one that breaks, or finds no time, is a floor that does not hold."""
    for case in cases:
        if time.monotonic() > deadline:
            print(f"NOT MEASURED  {case.name}: the time is up; give more --minutes")
            yield Floor(f"{case.name}: not measured", math.nan, 0)
            continue
        try:
            yield measure(case)
        except Stopped:
            raise
        except Exception:  # noqa: BLE001 (told in full, and counted as failed)
            print(f"{case.name}: broke off\n{traceback.format_exc()}", flush=True)
            yield Floor(f"{case.name}: broke off", math.nan, 0)


def main(words: Sequence[str]) -> None:
    """The command."""
    arguments = _parse(words)
    device = choose(arguments.device)
    if device is None:
        print("not measured (no GPU)")
        return
    hush_compiler()
    timed = device.type == "cuda"
    if not timed:
        _require_interpreter()
    deadline = time.monotonic() + 60 * arguments.minutes
    print(facts_line(device))

    def measure(case: Case) -> Result:
        if timed:
            return time_case(case, device, arguments.rounds, arguments.replays, deadline)
        return compare_case(case, device)

    found: list[Floor] = []
    for result in run(CASES if timed else SMALL_CASES, measure, deadline):
        if isinstance(result, Floor):
            found.append(result)
            continue
        report(result)
        append_rows(arguments.results / "losses.csv", result_rows(result, device, arguments.replays))
        found += floors(result)
    require(found)


def _require_interpreter() -> None:
    from fastgen.kernels.runtime import interpreted

    if not interpreted():
        raise UserError("--device=cpu compares by Triton's interpreter: set TRITON_INTERPRET=1 in the environment")


def _parse(words: Sequence[str]) -> Any:
    parser = Arguments("benchmarks.losses", "Times loss and gradient: plain, compiled, fused. Needs a GPU.")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: errors alone, on small shapes")
    parser.add_argument("--minutes", type=positive_minutes, default=8.0, help="no new case is begun after this time")
    parser.add_argument("--rounds", type=at_least_one, default=20, help="rounds that are kept")
    parser.add_argument("--replays", type=at_least_one, default=20, help="of each candidate in a round")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of losses.csv")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(command(main, sys.argv[1:]))
