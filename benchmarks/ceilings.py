"""What can this machine do at best? The denominators of all other figures, to be measured in the same process.

python -m benchmarks.ceilings [--device=cuda --rounds=20]

- copy: bytes read and written a second, from one tensor to another, both far larger than the caches.
- matmul: FLOPs a second of a square matrix product, two a multiplication with its addition, of random numbers, as zeros
  draw less power and run at higher clocks. fp32 is what a recipe's fp32 is: without TF32.
- operator: seconds on the host from one call of an operator to the next, on a CPU tensor of one value.
- launch, on a GPU: the same operator on a GPU tensor of one value, called many times in a row: seconds on the host from
  one call to the next, and seconds until the device is done with all of them, over their number. The device cannot be
  done before the host: where the kernel is the shorter one, both are the host's.
- graph node, on a GPU: many of those kernels captured as a CUDA graph: seconds until the device is done with a replay,
  over their number; and seconds on the host until the call that replays the graph comes back.

All of them in turns. A processor's copy reads what it is about to overwrite, unless it is told not to: not counted.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.common import (
    RESULTS,
    Spread,
    Step,
    Timings,
    append_rows,
    choose,
    facts_line,
    machine_facts,
    spread,
    time_interleaved,
    wait_for,
)
from fastgen.arguments import Arguments, at_least_one
from fastgen.errors import command
from fastgen.step import DTYPES
from fastgen.tables import new_table, print_table

NOT_MEASURED = "not measured (no GPU)"
COPY, OPERATOR, LAUNCH, GRAPH = "copy", "operator", "launch", "graph"
MATMUL = {precision: f"matmul {precision}" for precision in DTYPES}
WARM_UP_CALLS = 3


@dataclass(frozen=True)
class Sizes:
    """How large the pieces are.

    Attributes:
        copy_bytes: of each of the two tensors.
        matmul_side: of the square matrices.
        operators: calls in a row on the host, of CPU tensors.
        launches: kernels in a row; fewer than a GPU queues (1,024), or the host would wait for it.
        graph_nodes: kernels of the CUDA graph.
        steps_per_round: copies, products and so on in one turn.
    """

    copy_bytes: int
    matmul_side: int
    operators: int = 1000
    launches: int = 500
    graph_nodes: int = 1000
    steps_per_round: int = 1


# fp16 products of a processor that has no instructions for them take seconds.
SIZES = {"cpu": Sizes(2**29, 1024), "cuda": Sizes(2**30, 8192, steps_per_round=10)}


@dataclass(frozen=True)
class Ceilings:
    """What a device can do at best; median and quartiles over the rounds.

    Attributes:
        copy_bytes_per_second: read and written.
        matmul_flops_per_second: by precision.
        operator_host_seconds: of a dispatched operator, on the host.
        launch_host_seconds, launch_device_seconds: of a kernel, launched by itself; None without a GPU.
        graph_node_device_seconds: of a kernel in a CUDA graph; None without a GPU.
        graph_replay_host_seconds: of the call that replays a graph; None without a GPU.
        sizes: with which it was measured.
        rounds: that were kept.
    """

    copy_bytes_per_second: Spread
    matmul_flops_per_second: Mapping[str, Spread]
    operator_host_seconds: Spread
    launch_host_seconds: Spread | None
    launch_device_seconds: Spread | None
    graph_node_device_seconds: Spread | None
    graph_replay_host_seconds: Spread | None
    sizes: Sizes
    rounds: int


def measure(
    device: torch.device,
    *,
    sizes: Sizes | None = None,
    precisions: Sequence[str] = tuple(DTYPES),
    rounds: int = 20,
    until: float = math.inf,
) -> Ceilings:
    """Measures a device, with torch's settings as they are; `common.choose` sets those of a recipe.

    Args:
        device: CPU or GPU.
        sizes: None: those of SIZES.
        precisions: of the matrix products.
        rounds: that are kept.
        until: see `time_interleaved`; the host's part of launches and replays is measured afterwards, all the same.
    """
    sizes = sizes or SIZES[device.type]
    issued = gpu_steps(device, sizes) if device.type == "cuda" else {}
    steps = {**cpu_and_gpu_steps(device, sizes, precisions), **issued}
    timings = time_interleaved(
        steps, device, rounds=rounds, steps_per_round=sizes.steps_per_round, warm_up_rounds=2, until=until
    )
    return ceilings_of(timings, time_on_host(issued, device, rounds) if issued else None, sizes)


def cpu_and_gpu_steps(device: torch.device, sizes: Sizes, precisions: Sequence[str] = tuple(DTYPES)) -> dict[str, Step]:
    """What is timed everywhere: a copy, a matrix product in each precision, a row of operators on the host."""
    generator = torch.Generator(device).manual_seed(0)
    products = {
        MATMUL[precision]: _product(sizes.matmul_side, DTYPES[precision], generator, device) for precision in precisions
    }
    operators = _row_of_operators(sizes.operators, torch.device("cpu"))
    return {COPY: _copy(sizes.copy_bytes, generator, device), **products, OPERATOR: operators}


def gpu_steps(device: torch.device, sizes: Sizes) -> dict[str, Step]:
    """What only a GPU has: a row of kernels, launched one by one and as a CUDA graph."""
    launches = _row_of_operators(sizes.launches, device)
    return {LAUNCH: launches, GRAPH: _captured(_row_of_operators(sizes.graph_nodes, device))}


def _copy(count_bytes: int, generator: torch.Generator, device: torch.device) -> Step:
    source = torch.rand(count_bytes // torch.float32.itemsize, generator=generator, device=device)
    target = torch.empty_like(source)

    def step() -> None:
        target.copy_(source)

    return step


def _product(side: int, dtype: torch.dtype, generator: torch.Generator, device: torch.device) -> Step:
    a, b = (torch.randn((side, side), generator=generator, device=device).to(dtype) for _ in range(2))
    result = torch.empty_like(a)

    def step() -> None:
        torch.mm(a, b, out=result)

    return step


def _row_of_operators(count: int, device: torch.device) -> Step:
    value = torch.ones(1, device=device)

    def step() -> None:
        for _ in range(count):
            # No arguments to convert, and one kernel.
            value.neg_()

    return step


@dataclass(frozen=True)
class _Replay:
    """A captured step.

    Attributes:
        graph: of its kernels.
        captured: the step, which keeps the tensors that the kernels write to.
    """

    graph: torch.cuda.CUDAGraph
    captured: Step

    def __call__(self) -> None:
        self.graph.replay()


def _captured(step: Step) -> _Replay:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # What is loaded on the first call has to be so before the capture; torch wants that on another stream.
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_CALLS):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return _Replay(graph, step)


def time_on_host(steps: Mapping[str, Step], device: torch.device, rounds: int) -> Timings:
    """Seconds until each step has been handed to an idle device, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            wait_for(device)
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    wait_for(device)
    return Timings({name: tuple(values) for name, values in seconds.items()})


def ceilings_of(timings: Timings, on_host: Timings | None, sizes: Sizes) -> Ceilings:
    """Rates and seconds a piece.

    Args:
        timings: of all steps, until the device was done with them.
        on_host: of what only a GPU has, until it was handed to the device; None without a GPU.
        sizes: of the steps.
    """
    flops = 2 * sizes.matmul_side**3
    return Ceilings(
        copy_bytes_per_second=_rate(timings, COPY, 2 * sizes.copy_bytes),
        matmul_flops_per_second={
            precision: _rate(timings, name, flops)
            for precision, name in MATMUL.items()
            if name in timings.seconds_per_step
        },
        operator_host_seconds=_seconds(timings, OPERATOR, sizes.operators),
        launch_host_seconds=_seconds(on_host, LAUNCH, sizes.launches) if on_host else None,
        launch_device_seconds=_seconds(timings, LAUNCH, sizes.launches) if on_host else None,
        graph_node_device_seconds=_seconds(timings, GRAPH, sizes.graph_nodes) if on_host else None,
        graph_replay_host_seconds=_seconds(on_host, GRAPH, 1) if on_host else None,
        sizes=sizes,
        rounds=timings.rounds,
    )


def _rate(timings: Timings, name: str, amount: int) -> Spread:
    return spread([amount / seconds for seconds in timings.seconds_per_step[name]])


def _seconds(timings: Timings, name: str, pieces: int) -> Spread:
    return spread([seconds / pieces for seconds in timings.seconds_per_step[name]])


class Line(NamedTuple):
    """One ceiling, to print and to keep.

    Attributes:
        ceiling: its name.
        unit: of the spread.
        size: of what was measured.
        size_unit: of the size.
        measured: None where there is no such thing on the device.
    """

    ceiling: str
    unit: str
    size: int
    size_unit: str
    measured: Spread | None


# Unit -> how it is shown: times what, under which name, with how many digits.
SHOWN = {"bytes/s": (1e-9, "GB/s", 1), "FLOP/s": (1e-9, "GFLOP/s", 1), "s": (1e6, "us", 3)}


def lines(ceilings: Ceilings) -> list[Line]:
    """All ceilings of a device, measured or not."""
    sizes = ceilings.sizes
    products = [
        Line(MATMUL[precision], "FLOP/s", sizes.matmul_side, "rows", rate)
        for precision, rate in ceilings.matmul_flops_per_second.items()
    ]
    return [
        Line(COPY, "bytes/s", sizes.copy_bytes, "bytes", ceilings.copy_bytes_per_second),
        *products,
        Line("operator, host", "s", sizes.operators, "in a row", ceilings.operator_host_seconds),
        Line("launch, host", "s", sizes.launches, "in a row", ceilings.launch_host_seconds),
        Line("launch, device", "s", sizes.launches, "in a row", ceilings.launch_device_seconds),
        Line("graph node, device", "s", sizes.graph_nodes, "nodes", ceilings.graph_node_device_seconds),
        Line("graph replay, host", "s", sizes.graph_nodes, "nodes", ceilings.graph_replay_host_seconds),
    ]


def report(ceilings: Ceilings) -> None:
    """Prints a line for each ceiling."""
    title = f"ceilings, {ceilings.rounds} rounds; median (quartiles)"
    table = new_table(title, ("ceiling", "measured", "unit", "with"), ("ceiling", "unit", "with"), wrap=True)
    for line in lines(ceilings):
        told, unit = _shown(line)
        table.add_row(line.ceiling, told, unit, f"{line.size:,} {line.size_unit}")
    print_table(table)


def _shown(line: Line) -> tuple[str, str]:
    scale, unit, digits = SHOWN[line.unit]
    found = line.measured
    if found is None:
        return NOT_MEASURED, ""
    return Spread(scale * found.median, scale * found.low, scale * found.high).text(digits), unit


def result_rows(ceilings: Ceilings, device: torch.device) -> list[dict[str, Any]]:
    """One row a measured ceiling, for ceilings.csv, in bytes, FLOPs and seconds; none for what was not measured."""
    machine = machine_facts(device)
    return [
        {
            **machine,
            "ceiling": line.ceiling,
            "unit": line.unit,
            "size": line.size,
            "size_unit": line.size_unit,
            "rounds": ceilings.rounds,
            "steps_per_round": ceilings.sizes.steps_per_round,
            "median": line.measured.median,
            "q25": line.measured.low,
            "q75": line.measured.high,
        }
        for line in lines(ceilings)
        if line.measured
    ]


def main(words: Sequence[str]) -> None:
    """The command."""
    arguments = _parse(words)
    device = choose(arguments.device)
    if device is None:
        print(NOT_MEASURED)
        return
    print(facts_line(device))
    ceilings = measure(device, rounds=arguments.rounds)
    report(ceilings)
    append_rows(arguments.results / "ceilings.csv", result_rows(ceilings, device))


def _parse(words: Sequence[str]) -> Any:
    parser = Arguments("benchmarks.ceilings", "Measures what this machine can do at best.")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=at_least_one, default=20, help="rounds that are kept")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of ceilings.csv")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(command(main, sys.argv[1:]))
