"""How many images/s do several small networks make together on one device, as repeats and sweeps side by side would?

python -m benchmarks.side_by_side [--networks=1,2,4,8 --model=resnet20 --role=student --by=both]

Two ways. `streams`: all networks in one process, each with CUDA graphs, a stream and memory of its own; one thread goes
round and queues a graph of each. `processes`: each network in a process of its own; on a CPU they share the cores, on a
GPU they need NVIDIA's MPS to run at the same time. The ways and numbers of networks take turns, round by round; those
whose turn it is not do nothing, but hold their memory. The total of a round is set beside that of one network alone, by
the same way in the same round.

On a CPU this wants a quiet machine: threads wait for each other in every operator, so where something else keeps a core
busy, one network on all cores can fall far behind several on a core each, and the ratio says nothing.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch

from benchmarks.common import (
    RESULTS,
    Spread,
    append_rows,
    choose,
    columns,
    facts_line,
    machine_facts,
    spread,
    time_interleaved,
)
from benchmarks.networks import ROLES, Race, Setup
from benchmarks.networks_processes import in_processes, mps_pipe, sharing_line
from benchmarks.networks_streams import MOST_NETWORKS, Streams
from benchmarks.rigs import Kernels
from fastgen.arguments import Arguments, at_least_one
from fastgen.data.facts import DATASETS
from fastgen.errors import UserError, command
from fastgen.models import MODELS
from fastgen.networks import PHOTO_MODELS
from fastgen.step import DTYPES
from fastgen.tables import new_table, print_table

# Lets so many networks take steps for so many seconds.
Way = Callable[[int, float], Race]

STREAMS, PROCESSES = "streams", "processes"
# Streams that share one of the connections to the GPU, by default 8, wait for each other.
CONNECTIONS_KEY, CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS", "32"


class Side(NamedTuple):
    """A way, and how many networks."""

    way: str
    networks: int


@dataclass(frozen=True)
class Measured:
    """Races by side, one a round; round r of all sides belongs together."""

    seconds: float
    races: Mapping[Side, Sequence[Race]]

    def total(self, side: Side) -> Spread:
        """Images/s of all networks together."""
        return spread(self._totals(side))

    def over_alone(self, side: Side) -> Spread:
        """How many times as many as one network alone makes, by the same way in the same round."""
        pairs = zip(self._totals(side), self._totals(Side(side.way, 1)), strict=True)
        return spread([total / alone for total, alone in pairs])

    def of_each(self, side: Side) -> Spread:
        """Images/s of a network, over all of them and all rounds."""
        return spread([images / self.seconds for race in self.races[side] for images in race.images])

    def _totals(self, side: Side) -> list[float]:
        return [sum(race.images) / self.seconds for race in self.races[side]]


def measure(
    ways: Mapping[str, Way], counts: Sequence[int], device: torch.device, *, seconds: float, rounds: int
) -> Measured:
    """Lets all ways and numbers of networks take turns.

    Args:
        counts: of networks, 1 among them.
        seconds: of a turn.
        rounds: that are kept, after one that is dropped.
    """
    races: dict[Side, list[Race]] = {Side(way, networks): [] for way in ways for networks in counts}

    def turn(side: Side) -> None:
        races[side].append(ways[side.way](side.networks, seconds))

    turns = {f"{side.networks} {side.way}": partial(turn, side) for side in races}
    time_interleaved(turns, device, rounds=rounds, steps_per_round=1, warm_up_rounds=1)
    return Measured(seconds, {side: of_side[1:] for side, of_side in races.items()})


def result_rows(setup: Setup, measured: Measured, device: torch.device) -> list[dict[str, Any]]:
    """One row a side, for side_by_side.csv."""
    machine, mps = machine_facts(device), mps_pipe().exists() if device.type == "cuda" else None
    rows = []
    for side, races in measured.races.items():
        peak = races[-1].peak
        rows.append(
            {
                **machine,
                "model": setup.model,
                "image_px": setup.facts.height_px,
                "batch_size": setup.batch_size,
                "precision": setup.precision,
                "engine": setup.engine,
                "kernels": setup.kernels,
                "batchnorm": setup.batchnorm,
                "role": setup.role,
                "way": side.way,
                "networks": side.networks,
                "threads_each": races[-1].threads,
                "mps": mps,
                "rounds": len(races),
                "seconds_per_round": measured.seconds,
                **columns("images_per_second", measured.total(side), 1),
                **columns("over_alone", measured.over_alone(side), 4),
                **columns("images_per_second_of_each", measured.of_each(side), 1),
                "peak_allocated_mb": None if peak is None else round(peak.allocated_mb, 1),
                "peak_reserved_mb": None if peak is None else round(peak.reserved_mb, 1),
            }
        )
    return rows


def report(setup: Setup, measured: Measured) -> None:
    """Prints the table."""
    rounds = len(next(iter(measured.races.values())))
    title = (
        f"{setup.model} {setup.role}, batch {setup.batch_size}, {setup.precision}, {setup.engine}, kernels "
        f"{setup.kernels}, batch-norm {setup.batchnorm}; {rounds} rounds of {measured.seconds:g} s; median (quartiles)"
    )
    memory = ("MB allocated", "MB reserved") if setup.device == "cuda" else ()
    headings = ("networks", "way", "images/s", "over one alone", "images/s of each", *memory)
    table = new_table(title, headings, ("way",), wrap=True)
    for side, races in measured.races.items():
        table.add_row(
            str(side.networks),
            side.way,
            measured.total(side).text(0),
            measured.over_alone(side).text(3),
            measured.of_each(side).text(0),
            *[f"{megabytes:,.0f}" for megabytes in races[-1].peak or ()],
        )
    print_table(table)


def main(words: Sequence[str]) -> None:
    """The command."""
    arguments = _parse(words)
    # CUDA reads it when it starts, here and in the processes.
    os.environ.setdefault(CONNECTIONS_KEY, CONNECTIONS)
    device = choose(arguments.device)
    if device is None:
        print("not measured (no GPU)")
        return
    setup = _setup(arguments)
    print(facts_line(device), flush=True)
    with ExitStack() as held:
        ways: dict[str, Way] = {}
        if arguments.by != PROCESSES and device.type == "cpu":
            print(f"{STREAMS}: not measured (no GPU)", flush=True)
        elif arguments.by != PROCESSES:
            print(f"{STREAMS}: {CONNECTIONS_KEY}={os.environ[CONNECTIONS_KEY]}", flush=True)
            ways[STREAMS] = Streams(setup, device, arguments.networks).race
        if arguments.by != STREAMS:
            print(sharing_line(arguments.networks, device), flush=True)
            ways[PROCESSES] = held.enter_context(in_processes(setup, max(arguments.networks))).race
        if not ways:
            return
        measured = measure(ways, arguments.networks, device, seconds=arguments.seconds, rounds=arguments.rounds)
    report(setup, measured)
    append_rows(arguments.results / "side_by_side.csv", result_rows(setup, measured, device))


def _setup(arguments: Any) -> Setup:
    """What the command line asks for; UserError for kernels without a GPU, or too large a batch for the images."""
    for key in ("kernels", "batchnorm"):
        if arguments.device == "cpu" and getattr(arguments, key) == "triton":
            raise UserError(f"--{key}=triton is timed on an NVIDIA GPU alone: leave it out with --device=cpu")
    facts = DATASETS["cifar100"]
    setup = Setup(
        arguments.model, arguments.batch_size, arguments.precision, arguments.role, facts, facts.train_images,
        arguments.device, arguments.kernels, arguments.batchnorm,
    )  # fmt: skip
    if setup.images_at_once > setup.images:
        raise UserError(
            f"--batch_size={setup.batch_size}: {setup.images_at_once} images are taken at once, and there are "
            f"{setup.images}"
        )
    return setup


def network_counts(text: str) -> tuple[int, ...]:
    """Type of --networks: whole numbers with commas between, no two alike; in order, and 1 among them in any case."""
    counts = [at_least_one(part) for part in text.split(",")]
    if len({*counts}) < len(counts):
        raise argparse.ArgumentTypeError(f"'{text}' names a number twice")
    if max(counts) > MOST_NETWORKS:
        raise argparse.ArgumentTypeError(f"{max(counts)} is above {MOST_NETWORKS}")
    return tuple(sorted({1, *counts}))


def positive_seconds(text: str) -> float:
    """Type of --seconds."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is no time above 0")
    return value


def _parse(words: Sequence[str]) -> Any:
    parser = Arguments("benchmarks.side_by_side", "Times several small networks side by side on one device.")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    cifar = [name for name in MODELS if name not in PHOTO_MODELS]
    parser.add_argument(
        "--networks", type=network_counts, default="1,2,4,8", help=f"how many, 1 to {MOST_NETWORKS}; 1 is always taken"
    )
    parser.add_argument("--model", default="resnet20", choices=cifar)
    parser.add_argument("--batch_size", type=at_least_one, default=128, help="images in a step of each network")
    parser.add_argument("--precision", default="bf16", choices=list(DTYPES))
    parser.add_argument("--role", default="patriarch", choices=list(ROLES))
    parser.add_argument("--by", default="both", choices=[STREAMS, PROCESSES, "both"])
    parser.add_argument("--kernels", default="torch", choices=get_args(Kernels), help="as train.kernels")
    parser.add_argument("--batchnorm", default="torch", choices=get_args(Kernels), help="as train.batchnorm")
    parser.add_argument("--seconds", type=positive_seconds, default=5.0, help="of each turn")
    parser.add_argument("--rounds", type=at_least_one, default=5, help="rounds that are kept, after one that is not")
    parser.add_argument("--device", default=default, choices=["cpu", "cuda"])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of side_by_side.csv")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(command(main, sys.argv[1:]))
