"""How fast is a training step, beside a bare PyTorch loop? All candidates in one process, in turns.

python -m benchmarks.step [--model=resnet20 --batch_size=128 --precision=bf16 --rounds=20]

`bare` is what anybody would write: one batch held in memory, plain SGD, cross-entropy, autocast,
channels-last. The others are the trainer's own step, with data, views, normalisation, meter and
learning rate, for a tolerant patriarch and for a student with its teacher, by each engine.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import nn

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
from benchmarks.rigs import (
    LR,
    PATRIARCH,
    STUDENT,
    Case,
    Way,
    fresh_network,
    hush_compiler,
    make_rig,
    random_split,
    timed_ways,
)
from fastgen.arguments import Arguments, at_least_one
from fastgen.data.batch import Loader
from fastgen.data.cifar import read_cifar
from fastgen.data.facts import DATASETS
from fastgen.data.resident import ResidentLoader
from fastgen.errors import command
from fastgen.models import MODELS
from fastgen.step import DTYPES
from fastgen.tables import print_table

BARE = "bare"

# The goals on a CPU (bf16, channels-last, ResNet-20, batch 128).
FLOORS_OVER_BARE = {"eager patriarch": 1.0, "compile patriarch": 1.2}
FLOOR_STUDENT_OVER_PATRIARCH = 0.78


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


def _loaders(case: Case) -> dict[Way, Loader]:
    """The data set in the device's memory, once for all ways that can share it."""
    made = {
        kernels: ResidentLoader(case.split, case.facts.pad_px, case.device, kernels=kernels == "triton")
        for kernels in {way.kernels for way in timed_ways(case.device)}
    }
    return {way: made[way.kernels] for way in timed_ways(case.device)}


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
