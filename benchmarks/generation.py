"""Images/s of each generation, and what a student costs beside the patriarch: the figure that the project goes by.

python -m benchmarks.generation [--model=resnet20 --engine=graph --teacher=fused --generations=5 --images_from=DIR]
python -m benchmarks.generation --process --cfg rcp/c100_r20_gen.yaml [--section.key=value ...]

Without --process the steps of all generations are timed in one process, in turns, beside plain eager PyTorch and, for
networks of photographs, timm. Images are those that a network learns from: what its teacher sees besides is not
counted. The networks are untrained. Students differ in their teachers' weights alone, so generations 1, 2, .. repeat
one measurement with other networks. Images lie on the device, photographs as random squares of 224 pixels: what a
loader gives is asked by `benchmarks.feed`. Rows of a label table are random numbers, and making it is not timed.

With --process a recipe is trained from nothing by `fastgen.train`, in a process and folders of its own, which are
deleted afterwards. Everything counts: what each generation is charged with, and in all the seconds from the start of
the process to its end; compilers' caches of this machine may be warm. Rows of both go to results/generation.csv.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich import box
from rich.table import Table

from benchmarks.baselines import BASELINES
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
    require,
    time_interleaved,
)
from benchmarks.rigs import (
    ENGINES,
    PATRIARCH,
    STUDENT,
    Case,
    Kernels,
    Rig,
    Way,
    calibrate,
    case_of,
    endless_batches,
    fresh_network,
    hush_compiler,
    rig_of,
    supply_of,
)
from benchmarks.step import GROUPS_IN_AN_EPOCH
from benchmarks.teacher import make_table
from benchmarks.time_to_accuracy import train
from fastgen.arguments import Arguments, at_least_one
from fastgen.config import Recipe
from fastgen.data.batch import Batch, Loader
from fastgen.data.facts import DATASETS
from fastgen.data.resident import ResidentLoader
from fastgen.device import choose_device
from fastgen.errors import MachineError, UserError, command
from fastgen.labels import LabelTable
from fastgen.lessons import LookAhead, TableLoader, TableSource
from fastgen.models import MODELS
from fastgen.nodes import Node, read_json
from fastgen.recipe import help_text, parse_words, read_recipe
from fastgen.repeat import split_words
from fastgen.rules import PHOTO_MODELS
from fastgen.step import DTYPES, EngineName
from fastgen.supply import Supply
from fastgen.tables import print_table
from fastgen.teacher import FrozenTeacher, TeacherEngine, make_teacher

Teaching = Literal["folded", "fused", "compile", "table"]
Role = Literal["patriarch", "student"]

TEACHINGS: tuple[Teaching, ...] = ("folded", "fused", "compile", "table")
KERNELS: tuple[Kernels, ...] = ("torch", "triton")
# Each beside a network of the same role; of the patriarch with the faster of torch's optimizers.
EAGER: dict[Role, str] = {"patriarch": "bare fused sgd", "student": "bare student"}
TIMM: dict[Role, str] = {"patriarch": "timm", "student": "timm student"}
PROCESS = "--process"
# What `--process` makes itself.
PLACES = ("run.dir", "run.nodes")
SMOKE = "SMOKE RUN: on a CPU programs are not captured; these times say nothing of engine graph"
PHASES = ("warm_up", "labels", "views", "evaluate", "save")


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


class Goal(NamedTuple):
    """What is asked of a network on an NVIDIA GPU.

    Attributes:
        role: whose generations; the slowest of them counts.
        over: baselines that its speed is asked over, by role; None: its images/s are asked for.
        engine, batch_size: of the runs of which it is asked; None: of all.
    """

    model: str
    role: Role
    asked: float
    over: Mapping[Role, str] | None = None
    engine: EngineName | None = None
    batch_size: int | None = None

    @property
    def what(self) -> str:
        """To print."""
        whose = "generation 0" if self.role == "patriarch" else "the slowest student"
        if self.over is None:
            return f"{self.model}: images/s of {whose}"
        by = f" by engine {self.engine}, batch {self.batch_size}," if self.engine else ""
        return f"{self.model}: speed of {whose}{by} over {self.over[self.role]}"


# In 16 bits.
GOALS = (
    Goal("resnet20", "patriarch", 4.0, over=EAGER, engine="graph", batch_size=128),
    Goal("resnet18", "patriarch", 22_000),
    Goal("resnet18", "student", 18_500),
    Goal("resnet50", "patriarch", 5_500),
    *(Goal(model, role, 1.3, over=TIMM) for model in ("resnet18", "resnet50") for role in TIMM),
)
# Of a whole process: CIFAR-100, ResNet-20, so many epochs and students.
PROCESS_EPOCHS, PROCESS_STUDENTS, PROCESS_SECONDS = 164, 5, 600.0


@dataclass(frozen=True)
class NotMeasured:
    """A floor that a run says nothing about."""

    what: str
    why: str

    def line(self) -> str:
        """As it is printed."""
        return f"{self.what}: not measured ({self.why})"


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
    def asks_within(self) -> bool:
        """Whether the teacher is a part of the student's step."""
        return self.teacher == "folded" and self.look_ahead_batches == 1

    @property
    def teacher_work(self) -> str:
        """A student's share of teacher work, in words."""
        if self.teacher == "table":
            return "table: 0 in a step; --process charges for making it"
        if self.asks_within:
            return "folded, asked in each step"
        if self.look_ahead_batches == 1:
            return f"{self.teacher}, asked before each step"
        return f"{self.teacher}, asked ahead: once for {self.look_ahead_batches} steps"

    def steps_at_once(self, case: Case) -> int:
        """Steps that are taken, or whose teacher is asked, together."""
        return case.graph_steps if self.way.engine == "graph" else self.look_ahead_batches

    def work_of(self, role: Role) -> str:
        """Teacher work of a generation, in words."""
        return self.teacher_work if role == "student" else "none"


def role_of(generation: int) -> Role:
    """Of a generation's number."""
    return "student" if generation else "patriarch"


def name_of(generation: int) -> str:
    """Its name among the candidates."""
    return f"generation {generation}"


@dataclass(frozen=True)
class Measured:
    """Steps of all generations and baselines.

    Attributes:
        case: the shared facts.
        setup: of the generations.
        timings: by candidate: `name_of` each generation, and the baselines' own names.
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
        return [name_of(g) for g in range(self.setup.generations + 1) if role_of(g) == role]


def require_sound(case: Case, setup: Setup, steps_per_round: int) -> None:
    """Checks what must hold between the settings.

    Raises:
        UserError: it does not.
    """
    way, ahead, at_once = setup.way, setup.look_ahead_batches, setup.steps_at_once(case)
    if case.device.type != "cuda" and "triton" in (way.kernels, way.batchnorm):
        raise UserError("--kernels=triton and --batchnorm=triton need a GPU: the interpreter says nothing about time")
    if setup.teacher == "table" and case.model in PHOTO_MODELS:
        raise UserError("--teacher=table: crops of photographs are resampled, and too many to label all: name another")
    if setup.teacher == "table" and ahead > 1:
        raise UserError("--look_ahead_batches has no say with --teacher=table: leave one of them out")
    batches = at_once if way.engine == "graph" else len(case.split) // case.batch_size
    if batches % ahead:
        what = "a program" if way.engine == "graph" else "an epoch"
        raise UserError(f"--look_ahead_batches={ahead}: {what} holds {batches} batches: give a divisor of them")
    if steps_per_round % at_once:
        what = "a program" if way.engine == "graph" else "a look ahead"
        raise UserError(f"--steps_per_round={steps_per_round}: {what} is of {at_once} steps: give a multiple of them")


def measure(case: Case, setup: Setup, *, rounds: int, steps_per_round: int, until: float = math.inf) -> Measured:
    """Times the steps of all generations and baselines in turns.

    Args:
        case: by the setup's way.
        setup: of the generations.
        rounds, steps_per_round, until: see `time_interleaved`.

    Raises:
        UserError: settings do not go together.
        MachineError: the GPU's memory is too small for all of them.
        ValueError: a loss was not finite.
    """
    require_sound(case, setup, steps_per_round)
    # What an earlier case compiled counts against Dynamo's limit; all generations share their code.
    torch.compiler.reset()
    limit = max(torch._dynamo.config.recompile_limit, 2 * (setup.generations + 1))
    names = [*EAGER.values(), *(TIMM.values() if case.model in PHOTO_MODELS else ())]
    found = {name: BASELINES[name].why_not(case) for name in names}
    missing = {name: why for name, why in found.items() if why is not None}
    try:
        with torch._dynamo.config.patch(recompile_limit=limit):
            rigs = make_generations(case, setup)
            steps: dict[str, Step] = {name: rig.step for name, rig in rigs.items()}
            steps |= {name: BASELINES[name].make(case) for name in names if name not in missing}
            timings = time_interleaved(steps, case.device, rounds=rounds, steps_per_round=steps_per_round, until=until)
    except torch.OutOfMemoryError as full:
        raise MachineError(
            f"{len(names) + setup.generations + 1} networks at once are too many for the GPU's memory: lower "
            f"--batch_size or --generations ({str(full).splitlines()[0]})"
        ) from None
    for rig in rigs.values():
        rig.require_finite()
    return Measured(case, setup, timings, missing)


def make_generations(case: Case, setup: Setup) -> dict[str, Rig]:
    """The trainer's steps of every generation, by name, on the same images in the device's memory."""
    loader = ResidentLoader(case.split, case.facts.pad_px, case.device, kernels=case.kernels == "triton")
    table = make_table(case) if setup.teacher == "table" and setup.generations else None
    engine = setup.way.engine
    rigs = {name_of(0): rig_of(case, engine, PATRIARCH, supply_of(case, loader, None))}
    for generation in range(1, setup.generations + 1):
        supply = student_supply(case, setup, loader, table, teacher_seed=generation)
        rigs[name_of(generation)] = rig_of(case, engine, STUDENT, supply)
    return rigs


def student_supply(
    case: Case, setup: Setup, loader: ResidentLoader, table: LabelTable | None, teacher_seed: int
) -> Supply:
    """Batches and teacher of a student, put together as `fastgen.supply` does."""
    if table is not None:
        return with_table(supply_of(case, loader, None), table)
    teacher = _teacher(case, setup, loader, teacher_seed)
    if setup.asks_within:
        return supply_of(case, loader, teacher)
    return with_look_ahead(supply_of(case, loader, None), teacher, setup.look_ahead_batches, case.facts.classes)


def with_table(supply: Supply, table: LabelTable) -> Supply:
    """The same batches with logits of a table."""
    loader = TableLoader(supply.loader, table)
    source = None if supply.source is None else TableSource(supply.source, table)
    return replace(supply, loader=loader, source=source, dress=lambda batch: loader.dress(supply.dress(batch)))


def with_look_ahead(supply: Supply, teacher: FrozenTeacher, batches: int, classes: int) -> Supply:
    """The same batches with logits of a teacher that is asked before the step."""
    ahead = LookAhead(supply.loader, teacher, supply.prepare, batches, classes)

    def dress(batch: Batch) -> Batch:
        return ahead.dress(supply.dress(batch))

    return replace(supply, loader=ahead, dress=dress, ahead=ahead)


def _teacher(case: Case, setup: Setup, loader: Loader, seed: int) -> FrozenTeacher:
    if setup.teacher == "table":
        raise ValueError("a table asks no teacher")
    images_NCHW = next(endless_batches(loader, case)).images_NCHW
    network = calibrate(fresh_network(case, seed), case.normaliser(torch.float32)(images_NCHW))
    facts = case.facts
    shape = (setup.look_ahead_batches * case.batch_size, facts.channels, facts.height_px, facts.width_px)
    return make_teacher(network, case.device, DTYPES[case.precision], setup.teacher, shape=shape)


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
    if not measured.generations(goal.role):
        return "no students"
    return measured.missing.get(goal.over[goal.role]) if goal.over else None


def tell_floors(found: Sequence[Floor | NotMeasured]) -> None:
    """Prints a line for each floor.

    Raises:
        FloorMissed: one that was measured does not hold.
    """
    for floor in found:
        print(floor.line())
    if not found:
        print("no floor is asked of this network")
    require([floor for floor in found if isinstance(floor, Floor)])


def smoke(engine: EngineName, device: torch.device) -> bool:
    """Whether it is only seen to run: on a CPU a program is not captured, and its time says nothing."""
    return engine == "graph" and device.type != "cuda"


def report(measured: Measured) -> None:
    """Prints the table, and what was not measured."""
    case, setup, timings = measured.case, measured.setup, measured.timings
    title = (
        f"{case.model}, {case.facts.height_px} px, batch {case.batch_size}, {case.precision}, {setup.way.name}, "
        f"{timings.rounds} rounds; median (quartiles)"
    )
    timm = bool(set(TIMM.values()) & set(timings.seconds_per_step))
    headings = ("step", "ms", "images/s", "over generation 0", "over eager", *(["over timm"] if timm else []))
    rows = []
    for name in timings.seconds_per_step:
        role = _role_of_candidate(name)
        bases = (name_of(0), EAGER[role], *([TIMM[role]] if timm else []))
        ratios = [measured.over(name, base) for base in bases]
        told = ("-" if ratio is None else ratio.text(2) for ratio in ratios)
        rows.append((name, timings.ms_per_step(name).text(2), f"{measured.images_per_second(name):,.0f}", *told))
    _print_rows(title, headings, rows)
    print(f"teacher of generation 0: none; of each student: {setup.teacher_work}")
    for name, why in measured.missing.items():
        print(f"{name}: not measured ({why})")
    if setup.generations > 1:
        print("students differ in their teachers' weights alone: they repeat one measurement with other networks")
    if smoke(setup.way.engine, case.device):
        print(SMOKE)


def _role_of_candidate(name: str) -> Role:
    if name.startswith("generation "):
        return role_of(int(name.rpartition(" ")[2]))
    return "student" if name in (EAGER["student"], TIMM["student"]) else "patriarch"


COLUMNS = (
    "mode", "recipe", "overrides", "model", "image_px", "images", "batch_size", "precision", "engine", "smoke_run",
    "kernels", "batchnorm", "teacher", "look_ahead_batches", "candidate", "role", "teacher_work", "rounds",
    "steps_per_round",
    *(f"ms_per_step_{part}" for part in ("median", "q25", "q75")), "images_per_second",
    *(f"speed_over_{base}_{part}" for base in ("generation_0", "eager", "timm") for part in ("median", "q25", "q75")),
    "node", "passes", "student_images", "train_images_per_second", "train_speed_over_generation_0",
    "wall_images_per_second", "wall_speed_over_generation_0", "train_seconds",
    *(f"{phase}_seconds" for phase in PHASES), "wall_seconds",
)  # fmt: skip


def _row(machine: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A row of generation.csv; what a mode does not know is left empty."""
    unknown = values.keys() - set(COLUMNS)
    if unknown:
        raise ValueError(f"no columns: {', '.join(sorted(unknown))}")
    return {**machine, **dict.fromkeys(COLUMNS), **values}


def result_rows(measured: Measured, images: str, steps_per_round: int) -> list[dict[str, Any]]:
    """One row a candidate."""
    case, setup, machine = measured.case, measured.setup, machine_facts(measured.case.device)
    shared = {
        "mode": "steps",
        "model": case.model,
        "image_px": case.facts.height_px,
        "images": images,
        "batch_size": case.batch_size,
        "precision": case.precision,
        "rounds": measured.timings.rounds,
        "steps_per_round": steps_per_round,
    }
    of_generations = {
        "engine": setup.way.engine,
        "smoke_run": smoke(setup.way.engine, case.device),
        "kernels": setup.way.kernels,
        "batchnorm": setup.way.batchnorm,
        "teacher": setup.teacher,
        "look_ahead_batches": setup.look_ahead_batches,
    }
    rows = []
    for name in measured.timings.seconds_per_step:
        role = _role_of_candidate(name)
        own = name in (*measured.generations("patriarch"), *measured.generations("student"))
        facts = {**of_generations, "teacher_work": setup.work_of(role)} if own else {"engine": "eager"}
        figures = {
            **columns("ms_per_step", measured.timings.ms_per_step(name), 4),
            "images_per_second": round(measured.images_per_second(name), 1),
            **columns("speed_over_generation_0", measured.over(name, name_of(0)), 4),
            **columns("speed_over_eager", measured.over(name, EAGER[role]), 4),
            **columns("speed_over_timm", measured.over(name, TIMM[role]), 4),
        }
        rows.append(_row(machine, {**shared, **facts, "candidate": name, "role": role, **figures}))
    return rows


@dataclass(frozen=True)
class Trained:
    """What a generation of a whole process was charged with.

    Attributes:
        images: that it learned from, over all epochs.
        train_seconds: of its steps, with their batches and the teacher's passes.
        seconds: of everything else, by phase; `evaluate` with the final measurement.
        wall_seconds: all of it.
    """

    generation: int
    role: str
    node: str
    images: int
    train_seconds: float
    seconds: Mapping[str, float]
    wall_seconds: float

    @property
    def train_images_per_second(self) -> float:
        """Over the steps."""
        return self.images / self.train_seconds

    @property
    def wall_images_per_second(self) -> float:
        """Over everything."""
        return self.images / self.wall_seconds


@dataclass(frozen=True)
class Whole:
    """A recipe that was trained from nothing.

    Attributes:
        recipe: resolved.
        cfg: its file.
        overrides: `section.key=value` as given.
        train_images: of an epoch.
        generations: in order.
        seconds: from the start of the process to its end.
    """

    recipe: Recipe
    cfg: Path
    overrides: tuple[str, ...]
    train_images: int
    generations: tuple[Trained, ...]
    seconds: float

    @property
    def images(self) -> int:
        """That all generations learned from."""
        return sum(generation.images for generation in self.generations)

    @property
    def images_per_second(self) -> float:
        """With everything counted."""
        return self.images / self.seconds

    @property
    def passes(self) -> float:
        """Over the training set, of all generations together."""
        return self.images / self.train_images

    @property
    def outside_seconds(self) -> float:
        """That no generation is charged with: start and end of the process, reading the data."""
        return self.seconds - sum(generation.wall_seconds for generation in self.generations)


def read_process_recipe(words: Sequence[str]) -> Recipe:
    """Reads the recipe of `--process`.

    Raises:
        UserError: it is wrong, or would not be trained from nothing.
    """
    given = parse_words(words).overrides
    for key in PLACES:
        if key in given:
            raise UserError(f"--{key}={given[key]}: a process is timed in folders of its own: leave it out")
    recipe = read_recipe(words)
    if recipe.run.dry:
        raise UserError("run.dry: there is nothing to time in a plan: leave it out")
    if recipe.gen.only is not None:
        raise UserError(f"gen.only = {recipe.gen.only}: all generations are trained, from nothing: leave it out")
    return recipe


def train_whole(words: Sequence[str]) -> Whole:
    """Trains a recipe in a process of its own, in fresh folders.

    Args:
        words: `--cfg` and overrides.

    Raises:
        UserError: the recipe is wrong.
        Stopped: a signal came; nothing is kept.
        TrainingFailed: the training ended with an error, which it told.
    """
    recipe, line = read_process_recipe(words), parse_words(words)
    with tempfile.TemporaryDirectory(prefix="fastgen-generation-") as temporary:
        run = Path(temporary) / "run"
        began = time.monotonic()
        train([*words, f"--run.dir={run}", f"--run.nodes={Path(temporary) / 'nodes'}"])
        seconds = time.monotonic() - began
        results = read_json(run / "results.json")
        generations = tuple(_trained(run, row) for row in results["generations"])
    overrides = tuple(f"{key}={text}" for key, text in line.overrides.items() if key != "data.root")
    return Whole(recipe, line.cfg, overrides, results["train_images"], generations, seconds)


def _trained(run: Path, row: Mapping[str, Any]) -> Trained:
    training = Node(run / f"generation_{row['generation']}").facts()["training"]
    # The final measurement is no part of the node's seconds, and is charged to the generation all the same.
    seconds = {phase: training["seconds"].get(phase, 0.0) for phase in PHASES} | {"evaluate": row["eval_seconds"]}
    clocks = row["train_seconds"], seconds, row["wall_seconds"]
    return Trained(row["generation"], row["role"], row["node"], training["images"], *clocks)


def process_floor(whole: Whole, device: torch.device) -> Floor | NotMeasured:
    """The floor of a whole process, or why this one says nothing about it."""
    recipe = whole.recipe
    what = (
        f"seconds of the whole process (cifar100, resnet20, {PROCESS_EPOCHS} epochs, {PROCESS_STUDENTS} students), "
        "everything counted"
    )
    asked = ("cifar100", "resnet20", PROCESS_EPOCHS, PROCESS_STUDENTS, DATASETS["cifar100"].train_images)
    found = (
        recipe.data.dataset, recipe.model.name, recipe.train.epochs, recipe.gen.generations, whole.train_images,
    )  # fmt: skip
    if device.type != "cuda":
        return NotMeasured(f"{what}, asked at most {PROCESS_SECONDS:g}", "no GPU")
    if found != asked or recipe.data.backend == "synthetic":
        return NotMeasured(f"{what}, asked at most {PROCESS_SECONDS:g}", "another recipe")
    return Floor(what, whole.seconds, PROCESS_SECONDS, at_most=True)


def report_process(whole: Whole) -> None:
    """Prints the speeds and the seconds of each generation, and the whole."""
    first = whole.generations[0]
    speeds, seconds = [], []
    for one in whole.generations:
        name = f"{one.generation} {one.role}"
        ratios = (
            one.train_images_per_second / first.train_images_per_second,
            one.wall_images_per_second / first.wall_images_per_second,
        )
        of_train, of_wall = (f"{speed:,.0f}" for speed in (one.train_images_per_second, one.wall_images_per_second))
        speeds.append((name, of_train, f"{ratios[0]:.3f}", of_wall, f"{ratios[1]:.3f}"))
        clocks = (one.train_seconds, *(one.seconds[phase] for phase in PHASES), one.wall_seconds)
        seconds.append((name, *(f"{clock:,.1f}" for clock in clocks)))
    headings = ("generation", "in training", "over generation 0", "all charged", "over generation 0")
    _print_rows(f"{whole.cfg.stem}: student images/s", headings, speeds)
    _print_rows(f"{whole.cfg.stem}: seconds", ("generation", "train", *PHASES, "all"), seconds)
    print(
        f"whole process: {whole.seconds:,.1f} s with everything counted, {whole.images:,} student images, "
        f"{whole.passes:g} passes over the data: {whole.images_per_second:,.0f} images/s; "
        f"{whole.outside_seconds:,.1f} s of it outside of the generations (start, reading the data, end)"
    )


def _print_rows(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == headings[0] else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    print_table(table)


def process_rows(whole: Whole, device: torch.device) -> list[dict[str, Any]]:
    """One row a generation, and one of the whole."""
    recipe, machine, first = whole.recipe, machine_facts(device), whole.generations[0]
    shared = {
        "mode": "process",
        "recipe": whole.cfg.name,
        "overrides": " ".join(whole.overrides),
        "model": recipe.model.name,
        "images": recipe.data.backend if recipe.data.backend == "synthetic" else recipe.data.dataset,
        "batch_size": recipe.train.batch_size,
        "precision": recipe.train.precision,
        "engine": recipe.train.engine,
        "smoke_run": smoke(recipe.train.engine, device),
        "kernels": recipe.train.kernels,
        "batchnorm": recipe.train.batchnorm,
        "teacher": "table" if recipe.teacher.labels == "table" else recipe.teacher.engine,
        "look_ahead_batches": recipe.teacher.look_ahead_batches,
    }
    rows = []
    for one in whole.generations:
        train_speed, wall_speed = one.train_images_per_second, one.wall_images_per_second
        figures = {
            "candidate": name_of(one.generation),
            "role": one.role,
            "node": one.node,
            "passes": recipe.train.epochs,
            "student_images": one.images,
            "train_images_per_second": round(train_speed, 1),
            "train_speed_over_generation_0": round(train_speed / first.train_images_per_second, 4),
            "wall_images_per_second": round(wall_speed, 1),
            "wall_speed_over_generation_0": round(wall_speed / first.wall_images_per_second, 4),
            "train_seconds": round(one.train_seconds, 3),
            **{f"{phase}_seconds": round(one.seconds[phase], 3) for phase in PHASES},
            "wall_seconds": round(one.wall_seconds, 3),
        }
        rows.append(_row(machine, {**shared, **figures}))
    total = {
        "candidate": "whole process",
        "passes": whole.passes,
        "student_images": whole.images,
        "wall_images_per_second": round(whole.images_per_second, 1),
        "wall_seconds": round(whole.seconds, 3),
    }
    return [*rows, _row(machine, {**shared, **total})]


def main(words: Sequence[str]) -> None:
    """The command."""
    if {"--help", "-h"} & set(words):
        print(f"{_parser().format_help()}\n{help_text(f'python -m benchmarks.generation {PROCESS}')}")
    elif PROCESS in words:
        _main_process([word for word in words if word != PROCESS])
    else:
        _main_steps(words)


def _main_process(words: Sequence[str]) -> None:
    own, rest = split_words(words, ["--results"])
    results = _parser().parse_args(own).results
    device = choose_device(read_process_recipe(rest).run)
    print(facts_line(device), flush=True)
    whole = train_whole(rest)
    report_process(whole)
    if smoke(whole.recipe.train.engine, device):
        print(SMOKE)
    append_rows(results / "generation.csv", process_rows(whole, device))
    tell_floors([process_floor(whole, device)])


def _main_steps(words: Sequence[str]) -> None:
    arguments = _parser().parse_args(words)
    device = choose(arguments.device)
    if device is None:
        print("not measured (no GPU)")
        return
    hush_compiler()
    for name, value in defaults(arguments.model, device)._asdict().items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    way = Way(arguments.engine, arguments.kernels, arguments.batchnorm)
    setup = Setup(arguments.generations, way, arguments.teacher, arguments.look_ahead_batches)
    chosen = (arguments.model, arguments.batch_size, arguments.precision, device, arguments.images_from)
    # About as long as CIFAR-100's: the trainer draws views beside its steps, here they fall into few of the rounds.
    case, images = case_of(*chosen, GROUPS_IN_AN_EPOCH)
    require_sound(case, setup, arguments.steps_per_round)
    print(facts_line(device))
    print(
        f"engine {way.engine}, kernels {way.kernels}, batchnorm {way.batchnorm}, teacher {setup.teacher}; "
        f"{setup.generations} students; {images} images; {arguments.steps_per_round} steps a round",
        flush=True,
    )
    until = time.monotonic() + 60 * arguments.minutes
    measured = measure(
        case.run_by(way), setup, rounds=arguments.rounds, steps_per_round=arguments.steps_per_round, until=until
    )
    report(measured)
    append_rows(arguments.results / "generation.csv", result_rows(measured, images, arguments.steps_per_round))
    tell_floors(floors(measured))


def defaults(model: str, device: torch.device) -> Defaults:
    """For a network on a device."""
    if device.type != "cuda":
        return ON_CPU_PHOTOS if model in PHOTO_MODELS else ON_CPU
    if model == "resnet50":
        return ON_GPU_RESNET50
    return ON_GPU_PHOTOS if model in PHOTO_MODELS else ON_GPU


def _parser() -> Arguments:
    parser = Arguments("benchmarks.generation", "Images/s of every generation: steps in turns, or a whole process.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    by_device = "default by network and device"
    parser.add_argument(PROCESS, action="store_true", help="train the recipe of --cfg from nothing, and time all of it")
    parser.add_argument("--model", default="resnet20", choices=list(MODELS))
    parser.add_argument("--batch_size", type=at_least_one, help=f"images in a step; {by_device}")
    parser.add_argument("--precision", default="bf16", choices=list(DTYPES))
    parser.add_argument("--generations", type=at_least_one, default=5, help="students after the patriarch")
    parser.add_argument("--engine", choices=ENGINES, help=by_device)
    parser.add_argument("--kernels", choices=KERNELS, help=by_device)
    parser.add_argument("--batchnorm", choices=KERNELS, help=by_device)
    parser.add_argument("--teacher", choices=TEACHINGS, help=by_device)
    parser.add_argument("--look_ahead_batches", type=at_least_one, default=1, help="that a teacher sees at once")
    parser.add_argument("--rounds", type=at_least_one, default=20, help="rounds that are kept")
    parser.add_argument("--steps_per_round", type=at_least_one, help=f"steps of each in a round; {by_device}")
    parser.add_argument("--minutes", type=positive_minutes, default=8.0, help="after it no kept round is begun")
    parser.add_argument("--device", default=device, choices=["cpu", "cuda"])
    parser.add_argument("--images_from", type=Path, help="folder above the official CIFAR-100 files; default: random")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of generation.csv")
    return parser


if __name__ == "__main__":
    sys.exit(command(main, sys.argv[1:]))
