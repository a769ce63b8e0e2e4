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

import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

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
from benchmarks.losses_cases import (
    CASES,
    SHAPES,
    SMALL_CASES,
    Call,
    Case,
    Errors,
    Inputs,
    Output,
    candidates,
    draw,
    errors,
)  # fmt: skip
from benchmarks.rigs import hush_compiler
from fastgen.arguments import Arguments, at_least_one
from fastgen.errors import Stopped, UserError, command
from fastgen.step import DTYPES
from fastgen.tables import new_table, print_table

WARM_UP_CALLS = 3

FLOOR_SHAPES = SHAPES[:2]
FUSED_OVER_EAGER, FUSED_OVER_COMPILE = 5.0, 1.0
# Of the loss, which is fp32 whatever the logits are; sums of 8192 x 1000 numbers lose a little.
LOSS_ERROR = 1e-5


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
    timed = ("us", "GB/s", "speed over eager", "speed over compile") if timings else ()
    headings = ("candidate", *timed, "error of loss", "of gradient")
    table = new_table(f"{case.name}: {told}", headings, wrap=True)
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
