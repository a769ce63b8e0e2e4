"""How fast is a training step, beside a bare PyTorch loop? All candidates in one process, in turns.

python -m benchmarks.step [--model=resnet20 --batch_size=128 --precision=bf16 --rounds=20]

`bare` is what anybody would write: one batch held in memory, plain SGD, cross-entropy, autocast, channels-last; `bare
compile`, `bare student`, `timm` and others stand in `benchmarks.baselines`. The rest is the trainer's own step, with
data, views, normalisation, meter and learning rate, for a tolerant patriarch and for a student with its teacher, by
each engine, and on a GPU with each set of kernels.

MFU: FLOPs of the model's step (of a student's: with its teacher's forward pass) a second, over those of a large matrix
product in this process. Of roofline: the time that `benchmarks.roofline` counts, operator by operator at this
machine's copy and product rates, over the time measured.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.baselines import BASELINES, missing
from benchmarks.baselines import baselines as all_baselines
from benchmarks.ceilings import Ceilings
from benchmarks.ceilings import measure as measure_ceilings
from benchmarks.common import (
    RESULTS,
    Spread,
    Step,
    Timings,
    append_rows,
    choose,
    columns,
    facts_line,
    machine_facts,
    time_interleaved,
)
from benchmarks.rigs import PATRIARCH, STUDENT, Case, Way, case_of, hush_compiler, make_rig, timed_ways
from benchmarks.roofline import floor_seconds, model_flops_per_image, step_work
from fastgen.arguments import Arguments, at_least_one
from fastgen.data.batch import Loader
from fastgen.data.resident import ResidentLoader
from fastgen.errors import UserError, command
from fastgen.models import MODELS, build_model
from fastgen.step import DTYPES
from fastgen.tables import new_table, print_table

BARE, BARE_STUDENT = "bare", "bare student"
PATRIARCH_ROLE, STUDENT_ROLE = "patriarch", "student"
ROLES = {PATRIARCH_ROLE: PATRIARCH, STUDENT_ROLE: STUDENT}
CEILING_ROUNDS = 5
# Of 8 batches: about an epoch of CIFAR at a batch of 128, so that caches are met as in a training.
GROUPS_IN_AN_EPOCH = 48

# The goals on a CPU (bf16, channels-last, ResNet-20, batch 128).
FLOORS_OVER_BARE = {"eager patriarch": 1.0, "compile patriarch": 1.2}
FLOOR_STUDENT_OVER_PATRIARCH = 0.78


@dataclass(frozen=True)
class Roof:
    """What a step cannot be faster than on this machine, and what its multiplications are worth.

    Attributes:
        floor_seconds: of a step, operator by operator at the machine's own rates, with batch-norm, sum and ReLU fused.
        flops: of a step's model: forward, backward, and the teacher's forward pass where it is asked.
        matmul_flops_per_second: of this machine, in the step's precision.
    """

    floor_seconds: float
    flops: float
    matmul_flops_per_second: float

    def share_of_roofline(self, seconds: float) -> float:
        """The floor over what was measured."""
        return self.floor_seconds / seconds

    def mfu(self, seconds: float) -> float:
        """Model FLOPs a second over those of a large matrix product."""
        return self.flops / seconds / self.matmul_flops_per_second


@dataclass(frozen=True)
class Measured:
    """What was measured of a case.

    Attributes:
        case: what all candidates share.
        timings: of a step, by candidate.
        roofs: by role.
    """

    case: Case
    timings: Timings
    roofs: Mapping[str, Roof]

    @property
    def names(self) -> list[str]:
        """Of the candidates."""
        return list(self.timings.seconds_per_step)

    def images_per_second(self, name: str) -> float:
        """Images that the student, or patriarch, learned from."""
        return self.case.batch_size / self.seconds(name)

    def seconds(self, name: str) -> float:
        """Of a step, median."""
        return self.timings.ms_per_step(name).median / 1e3

    def roof(self, name: str) -> Roof:
        """Of the candidate's role."""
        return self.roofs[STUDENT_ROLE if is_student(name) else PATRIARCH_ROLE]

    def over_bare(self, name: str) -> Spread:
        """Speed over the bare loop."""
        return self.timings.speed_ratio(name, BARE)

    def over_bare_of_role(self, name: str) -> Spread | None:
        """Speed over the bare loop of the same role, where that was measured."""
        base = BARE_STUDENT if is_student(name) else BARE
        return self.timings.speed_ratio(name, base) if base in self.timings.seconds_per_step else None

    def over_patriarch(self, name: str) -> Spread | None:
        """A student's speed over the patriarch's by the same way."""
        if not is_student(name):
            return None
        way = name.removesuffix(STUDENT_ROLE).strip()
        base = next(base for base in (f"{way} {PATRIARCH_ROLE}", way) if base in self.timings.seconds_per_step)
        return self.timings.speed_ratio(name, base)


def is_student(name: str) -> bool:
    """Whether a candidate has a teacher."""
    return name.endswith(STUDENT_ROLE)


def measure(
    case: Case, *, rounds: int, steps_per_round: int, until: float = math.inf, chosen: Collection[str] | None = None
) -> Measured:
    """Times the baselines, and every way as patriarch and as student.

    Args:
        case: what all of them train.
        rounds, steps_per_round, until: see `time_interleaved`.
        chosen: baselines that are wanted beside the bare loop; None: all that run here.

    Raises:
        ValueError: the loss of a candidate was not finite.
    """
    # What an earlier case compiled counts against Dynamo's limit, past which it falls back to eager.
    torch.compiler.reset()
    ceilings = measure_ceilings(case.device, precisions=[case.precision], rounds=CEILING_ROUNDS)
    roofs = {role: roof_of(case, ceilings, teacher=role == STUDENT_ROLE) for role in ROLES}
    baselines: dict[str, Step] = {
        name: step for name, step in all_baselines(case).items() if chosen is None or name == BARE or name in chosen
    }
    rigs = {
        f"{way.name} {role}": make_rig(case.run_by(way), way.engine, objective, loader)
        for role, objective in ROLES.items()
        for way, loader in _loaders(case).items()
    }
    steps = {**baselines, **{name: rig.step for name, rig in rigs.items()}}
    timings = time_interleaved(steps, case.device, rounds=rounds, steps_per_round=steps_per_round, until=until)
    for rig in rigs.values():
        rig.require_finite()
    return Measured(case, timings, roofs)


def roof_of(case: Case, ceilings: Ceilings, *, teacher: bool) -> Roof:
    """The roof of a step, with a teacher that is asked in it or without."""
    model = build_model(case.model, case.facts.classes, case.facts.channels, "strided")
    shape = (case.batch_size, case.facts.channels, case.facts.height_px, case.facts.width_px)
    works = step_work(model, shape, DTYPES[case.precision].itemsize, "bnrelu", teacher)
    products = ceilings.matmul_flops_per_second[case.precision].median
    floor = floor_seconds(works, ceilings.copy_bytes_per_second.median, products)
    return Roof(floor, case.batch_size * model_flops_per_image(model, shape, teacher), products)


def _loaders(case: Case) -> dict[Way, Loader]:
    """The data set in the device's memory, once for all ways that can share it."""
    made = {
        kernels: ResidentLoader(case.split, case.facts.pad_px, case.device, kernels=kernels == "triton")
        for kernels in {way.kernels for way in timed_ways(case.device, case.model)}
    }
    return {way: made[way.kernels] for way in timed_ways(case.device, case.model)}


def result_rows(measured: Measured, steps_per_round: int, images: str) -> list[dict[str, Any]]:
    """One row a candidate, for step.csv."""
    case, timings = measured.case, measured.timings
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
            **columns("ms_per_step", timings.ms_per_step(name), 4),
            "images_per_second": round(measured.images_per_second(name), 1),
            **columns("speed_over_bare", measured.over_bare(name), 4),
            **columns("speed_over_patriarch", measured.over_patriarch(name), 4),
            **columns("speed_over_bare_of_role", measured.over_bare_of_role(name), 4),
            "mfu": round(measured.roof(name).mfu(measured.seconds(name)), 4),
            "share_of_roofline": round(measured.roof(name).share_of_roofline(measured.seconds(name)), 4),
        }
        for name in measured.names
    ]


def report(measured: Measured) -> None:
    """Prints the table, what was not measured, and each floor beside what was."""
    case, timings = measured.case, measured.timings
    title = f"{case.model}, batch {case.batch_size}, {case.precision}, {timings.rounds} rounds; median (quartiles)"
    headings = (
        "step", "ms", "images/s", "over bare of its role", "student over patriarch", "MFU", "of roofline",
    )  # fmt: skip
    table = new_table(title, headings, wrap=True)
    for name in measured.names:
        of_role, over_patriarch = measured.over_bare_of_role(name), measured.over_patriarch(name)
        roof, seconds = measured.roof(name), measured.seconds(name)
        table.add_row(
            name,
            timings.ms_per_step(name).text(2),
            f"{measured.images_per_second(name):,.0f}",
            of_role.text(3) if of_role else "",
            over_patriarch.text(3) if over_patriarch else "",
            f"{roof.mfu(seconds):.1%}",
            f"{roof.share_of_roofline(seconds):.1%}",
        )
    print_table(table)
    for name, why in missing(case).items():
        print(f"{name}: {why}")
    for line in floor_lines(measured):
        print(line)


def floor_lines(measured: Measured) -> list[str]:
    """A line for each floor of a CPU: what is asked for, what was measured, met or missed."""
    lines = []
    for name, floor in FLOORS_OVER_BARE.items():
        lines.append(_floor_line(f"{name} over bare", floor, measured.over_bare(name)))
    for name in measured.names:
        ratio = measured.over_patriarch(name)
        if ratio is not None and name not in BASELINES:
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
    case, images = case_of(
        arguments.model, arguments.batch_size, arguments.precision, device, arguments.images_from, GROUPS_IN_AN_EPOCH
    )
    if device.type == "cuda" and arguments.steps_per_round % case.graph_steps:
        raise UserError(
            f"--steps_per_round={arguments.steps_per_round}: a graph holds {case.graph_steps} steps: give a multiple"
        )
    print(facts_line(device))
    chosen = None if arguments.baselines == "all" else ()
    measured = measure(case, rounds=arguments.rounds, steps_per_round=arguments.steps_per_round, chosen=chosen)
    report(measured)
    append_rows(arguments.results / "step.csv", result_rows(measured, arguments.steps_per_round, images))


def _parse(words: Sequence[str]) -> Any:
    parser = Arguments("benchmarks.step", "Times the trainer's step beside a bare PyTorch loop.")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--model", default="resnet20", choices=list(MODELS))
    parser.add_argument("--batch_size", type=at_least_one, default=128, help="images in a step")
    parser.add_argument("--precision", default="bf16", choices=list(DTYPES))
    parser.add_argument("--rounds", type=at_least_one, default=20, help="rounds that are kept")
    parser.add_argument("--steps_per_round", type=at_least_one, default=8, help="of each candidate")
    parser.add_argument(
        "--baselines", default="all", choices=["all", "bare"], help="what is measured beside the trainer"
    )
    parser.add_argument("--device", default=default, choices=["cpu", "cuda"])
    parser.add_argument("--images_from", type=Path, help="folder above the official CIFAR-100 files; default: random")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of step.csv")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(command(main, sys.argv[1:]))
