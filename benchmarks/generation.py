"""Images/s of each generation, and what a student costs beside the patriarch: the figure that the project goes by.

python -m benchmarks.generation [--model=resnet20 --engine=graph --teacher=fused --generations=5 --images_from=DIR]
python -m benchmarks.generation --process --cfg rcp/c100_r20_gen.yaml [--section.key=value ...]

Without --process the steps of all generations are timed in one process, in turns, beside plain eager PyTorch and, for
networks of photographs, timm. Images are those that a network learns from: what its teacher sees besides is not
counted. Networks are untrained; each generation has initial weights of its own, its teacher those of the one before.
Otherwise students are alike: generations 1, 2, .. repeat one measurement. Images lie on the device, photographs as
random squares of 224 pixels: what a loader gives is asked by `benchmarks.feed`. Rows of a label table are random
numbers, and making it is not timed. Rows go to results/generation.csv.

With --process a recipe is trained from nothing by `fastgen.train`, in a process and folders of its own, which are
deleted afterwards. Everything counts: what each generation is charged with, and in all the seconds from the start of
the process to its end; compilers' caches of this machine may be warm. Rows go to results/generation_process.csv.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch

from benchmarks import generation_process
from benchmarks.baselines import BASELINES, bare_step, bare_student_loop, fused_sgd
from benchmarks.common import (
    RESULTS,
    Floor,
    Spread,
    Step,
    Timings,
    append_rows,
    choose,
    columns,
    facts_line,
    machine_facts,
    positive_minutes,
    time_interleaved,
)
from benchmarks.generation_floors import EAGER, GOALS, SMOKE, TIMM, Goal, NotMeasured, Role, smoke, tell_floors
from benchmarks.rigs import PATRIARCH, STUDENT, Case, Kernels, Rig, Way, case_of, hush_compiler, rig_of, supply_of
from benchmarks.step import GROUPS_IN_AN_EPOCH
from benchmarks.teacher import freeze, make_table, teaching_network
from fastgen.arguments import Arguments, at_least_one
from fastgen.data.resident import ResidentLoader
from fastgen.errors import MachineError, UserError, command
from fastgen.models import MODELS
from fastgen.networks import PHOTO_MODELS
from fastgen.step import DTYPES, EngineName
from fastgen.supply import Supply
from fastgen.tables import new_table, print_table
from fastgen.teacher import TeacherEngine

Teaching = Literal["folded", "fused", "compile", "table"]
GENERATION = "generation"
PROCESS = "--process"


class Defaults(NamedTuple):
    """What is taken where the command line is silent."""

    engine: EngineName
    kernels: Kernels
    batchnorm: Kernels
    teacher: TeacherEngine
    batch_size: int
    steps_per_round: int


ON_GPU = Defaults("graph", "triton", "triton", "fused", 128, 64)
# Not as graphs: each generation would hold activations of its own, and launches are a small part of such a step.
ON_GPU_PHOTOS = Defaults("eager", "triton", "triton", "fused", 1024, 16)
ON_GPU_RESNET50 = ON_GPU_PHOTOS._replace(batch_size=256)
ON_CPU = Defaults("eager", "torch", "torch", "folded", 128, 4)
ON_CPU_PHOTOS = ON_CPU._replace(batch_size=16, steps_per_round=1)


@dataclass(frozen=True)
class Setup:
    """How the generations are run.

    Attributes:
        generations: students after the patriarch.
        way: of every step.
        teacher: engine of the students' teachers, or a label table.
        look_ahead_batches: that a teacher sees at once.
    """

    generations: int
    way: Way
    teacher: Teaching
    look_ahead_batches: int = 1

    @property
    def teacher_work(self) -> str:
        """A student's share of teacher work, in words."""
        if self.teacher == "table":
            return "table: 0 in a step; --process charges for making it"
        if self.look_ahead_batches > 1:
            return f"{self.teacher}, asked ahead: once for {self.look_ahead_batches} steps"
        return f"{self.teacher}, asked {'in' if self.teacher == 'folded' else 'before'} each step"

    def require_sound(self, case: Case, steps_per_round: int) -> None:
        """Checks what must hold between the settings.

        Raises:
            UserError: it does not.
        """
        way, ahead = self.way, self.look_ahead_batches
        if case.device.type != "cuda" and "triton" in (way.kernels, way.batchnorm):
            raise UserError("--kernels=triton, --batchnorm=triton need a GPU: the interpreter says nothing about time")
        if self.teacher == "table" and case.model in PHOTO_MODELS:
            raise UserError("--teacher=table: crops of photographs are resampled, too many to label all: name another")
        if self.teacher == "table" and ahead > 1:
            raise UserError("--look_ahead_batches has no say with --teacher=table: leave one of them out")
        graphs = way.engine == "graph"
        whole, batches = ("a program", case.graph_steps) if graphs else ("an epoch", len(case.split) // case.batch_size)
        if batches % ahead:
            raise UserError(f"--look_ahead_batches={ahead}: {whole} holds {batches} batches: give a divisor of them")
        taken, at_once = ("a program", case.graph_steps) if graphs else ("a look ahead", ahead)
        if steps_per_round % at_once:
            raise UserError(f"--steps_per_round={steps_per_round}: {taken} is of {at_once} steps: give a multiple")


@dataclass(frozen=True)
class Measured:
    """Steps of all generations and baselines.

    Attributes:
        case: the shared facts.
        setup: of the generations.
        timings: by candidate: `generation 0`, `generation 1`, .., and the baselines' own names.
        missing: baselines that could not be run: name -> why.
    """

    case: Case
    setup: Setup
    timings: Timings
    missing: Mapping[str, str]

    def images_per_second(self, name: str) -> float:
        """Of the median step."""
        return 1e3 * self.case.batch_size / self.timings.ms_per_step(name).median

    def over(self, name: str, base: str) -> Spread | None:
        """How many times as fast, round by round; None where the base was not measured."""
        return self.timings.speed_ratio(name, base) if base in self.timings.seconds_per_step else None

    def generations(self, role: Role) -> list[str]:
        """Names of all generations of a role."""
        names = self.timings.seconds_per_step
        return [name for name in names if name.startswith(GENERATION) and role_of(name) == role]


def name_of(generation: int) -> str:
    """Its name among the candidates."""
    return f"{GENERATION} {generation}"


def role_of(name: str) -> Role:
    """Of a candidate."""
    return "patriarch" if name in (name_of(0), EAGER["patriarch"], TIMM["patriarch"]) else "student"


def measure(case: Case, setup: Setup, *, rounds: int, steps_per_round: int, until: float = math.inf) -> Measured:
    """Times the steps of all generations and baselines in turns.

    Args:
        case: by the setup's way.
        setup: sound.
        rounds, steps_per_round, until: see `time_interleaved`.

    Raises:
        MachineError: the GPU's memory is too small for all of them.
        ValueError: a loss was not finite.
    """
    # What an earlier case compiled counts against Dynamo's limit; all generations share their code.
    torch.compiler.reset()
    limit = max(torch._dynamo.config.recompile_limit, 2 * (setup.generations + 1))
    try:
        with torch._dynamo.config.patch(recompile_limit=limit):
            rigs = make_generations(case, setup)
            baselines, missing = make_baselines(case)
            steps = {name: rig.step for name, rig in rigs.items()} | baselines
            timings = time_interleaved(steps, case.device, rounds=rounds, steps_per_round=steps_per_round, until=until)
    except torch.OutOfMemoryError as full:
        raise MachineError(
            "the GPU's memory is too small for all networks at once: lower --batch_size or --generations "
            f"({str(full).splitlines()[0]})"
        ) from None
    for rig in rigs.values():
        rig.require_finite()
    return Measured(case, setup, timings, missing)


def make_generations(case: Case, setup: Setup) -> dict[str, Rig]:
    """The trainer's steps of every generation, by name, on the same images in the device's memory."""
    loader = ResidentLoader(case.split, case.facts.pad_px, case.device, kernels=case.kernels == "triton")
    engine = setup.way.engine
    rigs = {name_of(0): rig_of(case, engine, PATRIARCH, supply_of(case, loader, None))}
    for generation, supply in enumerate(student_supplies(case, setup, loader), 1):
        rigs[name_of(generation)] = rig_of(case, engine, STUDENT, supply, init_seed=generation)
    return rigs


def student_supplies(case: Case, setup: Setup, loader: ResidentLoader) -> list[Supply]:
    """Batches and teacher of each student: a network with the initial weights of the generation before."""
    images, ahead = supply_of(case, loader, None), setup.look_ahead_batches
    if setup.teacher == "table":
        # Random numbers for one student are as good as for another.
        return [images.with_table(make_table(case))] * setup.generations
    networks = (teaching_network(case, loader, init_seed) for init_seed in range(setup.generations))
    teachers = [freeze(case, network, setup.teacher, ahead) for network in networks]
    return [images.with_teacher(teacher, ahead, case.facts.classes) for teacher in teachers]


def make_baselines(case: Case) -> tuple[dict[str, Step], dict[str, str]]:
    """Steps of the baselines by name, and of those that cannot be run here why."""
    student = bare_student_loop(case, fused_sgd).step
    steps = {EAGER["patriarch"]: bare_step(case, fused_sgd), EAGER["student"]: student}
    if case.model not in PHOTO_MODELS:
        return steps, {}
    missing = {name: why for name in TIMM.values() if (why := BASELINES[name].why_not(case)) is not None}
    return steps | {name: BASELINES[name].make(case) for name in TIMM.values() if name not in missing}, missing


def floors(measured: Measured) -> list[Floor | NotMeasured]:
    """All goals of the network that was measured, each with its figure or with why there is none."""
    return [_floor(measured, goal) for goal in GOALS if goal.model == measured.case.model]


def _floor(measured: Measured, goal: Goal) -> Floor | NotMeasured:
    why = _why_not(measured, goal)
    if why is not None:
        return NotMeasured(f"{goal.what}, asked at least {goal.asked:,g}", why)
    names = measured.generations(goal.role)
    if goal.over is None:
        figure = min(measured.images_per_second(name) for name in names)
    else:
        figure = min(measured.timings.speed_ratio(name, goal.over[goal.role]).median for name in names)
    return Floor(goal.what, figure, goal.asked)


def _why_not(measured: Measured, goal: Goal) -> str | None:
    case, engine = measured.case, measured.setup.way.engine
    if case.device.type != "cuda":
        return "no GPU"
    if case.precision == "fp32":
        return "fp32; it is asked of 16 bits"
    if goal.engine not in (None, engine):
        return f"engine {engine}"
    if goal.batch_size not in (None, case.batch_size):
        return f"batch {case.batch_size}"
    return measured.missing.get(goal.over[goal.role]) if goal.over else None


def report(measured: Measured) -> None:
    """Prints the table, and what was not measured."""
    case, setup, timings = measured.case, measured.setup, measured.timings
    title = (
        f"{case.model}, {case.facts.height_px} px, batch {case.batch_size}, {case.precision}, {setup.way.name}, "
        f"{timings.rounds} rounds; median (quartiles)"
    )
    table = new_table(title, ("step", "ms", "images/s", "over generation 0", "over eager", "over timm"))
    for name in timings.seconds_per_step:
        role = role_of(name)
        ratios = [measured.over(name, base) for base in (name_of(0), EAGER[role], TIMM[role])]
        told = ("-" if ratio is None else ratio.text(2) for ratio in ratios)
        table.add_row(name, timings.ms_per_step(name).text(2), f"{measured.images_per_second(name):,.0f}", *told)
    print_table(table)
    print(f"teacher of generation 0: none; of each student: {setup.teacher_work}")
    for name, why in measured.missing.items():
        print(f"{name}: not measured ({why})")
    if setup.generations > 1:
        print("students differ in their weights and their teachers' alone: they repeat one measurement")
    if smoke(setup.way.engine, case.device):
        print(SMOKE)


def result_rows(measured: Measured, images: str, steps_per_round: int) -> list[dict[str, Any]]:
    """One row a candidate, for generation.csv; baselines leave empty what is the trainer's alone."""
    case, setup, timings = measured.case, measured.setup, measured.timings
    shared = {
        **machine_facts(case.device),
        "model": case.model,
        "image_px": case.facts.height_px,
        "images": images,
        "batch_size": case.batch_size,
        "precision": case.precision,
        "rounds": timings.rounds,
        "steps_per_round": steps_per_round,
    }
    trainers = {
        **setup.way._asdict(),
        "smoke_run": smoke(setup.way.engine, case.device),
        "teacher": setup.teacher,
        "look_ahead_batches": setup.look_ahead_batches,
    }
    rows = []
    for name in timings.seconds_per_step:
        role, own = role_of(name), name.startswith(GENERATION)
        work = setup.teacher_work if role == "student" else "none"
        rows.append({
            **shared,
            "candidate": name,
            "role": role,
            **(trainers if own else dict.fromkeys(trainers) | {"engine": "eager"}),
            "teacher_work": work if own else None,
            **columns("ms_per_step", timings.ms_per_step(name), 4),
            "images_per_second": round(measured.images_per_second(name), 1),
            **columns("speed_over_generation_0", measured.over(name, name_of(0)), 4),
            **columns("speed_over_eager", measured.over(name, EAGER[role]), 4),
            **columns("speed_over_timm", measured.over(name, TIMM[role]), 4),
        })  # fmt: skip
    return rows


def main(words: Sequence[str]) -> None:
    """The command."""
    if PROCESS in words:
        generation_process.main([word for word in words if word != PROCESS])
        return
    arguments = _parse(words)
    device = choose(arguments.device)
    if device is None:
        print("not measured (no GPU)")
        return
    hush_compiler()
    for name, value in defaults(arguments.model, device)._asdict().items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    way, steps_per_round = Way(arguments.engine, arguments.kernels, arguments.batchnorm), arguments.steps_per_round
    setup = Setup(arguments.generations, way, arguments.teacher, arguments.look_ahead_batches)
    chosen = (arguments.model, arguments.batch_size, arguments.precision, device, arguments.images_from)
    # About as long as CIFAR-100's: the trainer draws views beside its steps, here they fall into few of the rounds.
    case, images = case_of(*chosen, GROUPS_IN_AN_EPOCH)
    setup.require_sound(case, steps_per_round)
    print(facts_line(device))
    print(f"{images} images; {way.name}, teacher {setup.teacher}; {steps_per_round} steps a round", flush=True)
    until = time.monotonic() + 60 * arguments.minutes
    measured = measure(case.run_by(way), setup, rounds=arguments.rounds, steps_per_round=steps_per_round, until=until)
    report(measured)
    append_rows(arguments.results / "generation.csv", result_rows(measured, images, steps_per_round))
    tell_floors(floors(measured))


def defaults(model: str, device: torch.device) -> Defaults:
    """For a network on a device."""
    if device.type != "cuda":
        return ON_CPU_PHOTOS if model in PHOTO_MODELS else ON_CPU
    if model == "resnet50":
        return ON_GPU_RESNET50
    return ON_GPU_PHOTOS if model in PHOTO_MODELS else ON_GPU


def _parse(words: Sequence[str]) -> Any:
    parser = Arguments("benchmarks.generation", "Images/s of every generation: steps in turns, or a whole process.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    by_device = "default by network and device"
    parser.add_argument(PROCESS, action="store_true", help="another command: time a recipe's training; see its --help")
    parser.add_argument("--model", default="resnet20", choices=list(MODELS))
    parser.add_argument("--batch_size", type=at_least_one, help=f"images in a step; {by_device}")
    parser.add_argument("--precision", default="bf16", choices=list(DTYPES))
    parser.add_argument("--generations", type=at_least_one, default=5, help="students after the patriarch")
    parser.add_argument("--engine", choices=get_args(EngineName), help=by_device)
    parser.add_argument("--kernels", choices=get_args(Kernels), help=by_device)
    parser.add_argument("--batchnorm", choices=get_args(Kernels), help=by_device)
    parser.add_argument("--teacher", choices=get_args(Teaching), help=by_device)
    parser.add_argument("--look_ahead_batches", type=at_least_one, default=1, help="that a teacher sees at once")
    parser.add_argument("--rounds", type=at_least_one, default=20, help="rounds that are kept")
    parser.add_argument("--steps_per_round", type=at_least_one, help=f"steps of each in a round; {by_device}")
    parser.add_argument("--minutes", type=positive_minutes, default=8.0, help="after it no kept round is begun")
    parser.add_argument("--device", default=device, choices=["cpu", "cuda"])
    parser.add_argument("--images_from", type=Path, help="folder above the official CIFAR-100 files; default: random")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of generation.csv")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(command(main, sys.argv[1:]))
