"""What does a teacher cost, and does it still say the same? Every way to ask it, in one process, in turns.

python -m benchmarks.teacher [--model=resnet20 --batch_size=128 --precision=bf16 --rounds=20 --images_from=DIR]
python -m benchmarks.teacher --model=resnet18                     # 224 pixels, random images; its floor is a GPU's

`eager` is the network in eval mode as it was trained: batch-norms unfolded, under autocast. `folded`, `fused` and
`compile` are the engines of a recipe, `_x8` the look ahead of 8 batches, `table` the label table. Each is timed twice:
alone, and within the student's step of the trainer, beside the patriarch's step. What a student's step takes longer is
the overhead; the other loss is part of it. A round is 8 steps, so that a look ahead is paid in full.

The teacher is untrained; its batch-norms know the images. KL is that of a variant from the fp32 network, unfolded, on
images that were never rounded, in nats, the worst of 8 batches. Rows of the table are random numbers: its logits would
be those of the engine that made it.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.checks import full_fp32
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
    spread,
    time_interleaved,
)
from benchmarks.rigs import (
    PATRIARCH,
    STUDENT,
    Case,
    Rig,
    calibrate,
    case_of,
    endless_batches,
    fresh_network,
    hush_compiler,
    make_rig,
    rig_of,
    supply_of,
)
from fastgen.arguments import Arguments, at_least_one
from fastgen.data.batch import Loader
from fastgen.data.resident import ResidentLoader
from fastgen.errors import command
from fastgen.labels import LabelTable, TableKind
from fastgen.models import MODELS
from fastgen.step import DTYPES
from fastgen.tables import new_table, print_table
from fastgen.teacher import FrozenTeacher, Teacher, TeacherEngine, make_teacher

AHEAD = 8
EAGER, TABLE = "eager", "table"
# Name -> engine and how many batches it is shown at once.
ENGINES: dict[str, tuple[TeacherEngine, int]] = {
    "folded": ("folded", 1),
    "fused": ("fused", 1),
    "compile": ("compile", 1),
    f"folded_x{AHEAD}": ("folded", AHEAD),
    f"fused_x{AHEAD}": ("fused", AHEAD),
}
VARIANTS = (EAGER, *ENGINES, TABLE)
PATRIARCH_STEP = "patriarch"

FLOOR_MODEL, FLOOR_VARIANT, FLOOR_OVERHEAD = "resnet18", "fused", 0.22


@dataclass(frozen=True)
class Asked:
    """A way to ask the teacher.

    Attributes:
        name: of the variant.
        logits: prepared images -> logits; of a table any.
        batches: that it is shown at once.
        how: what runs, for the record.
        max_kl_nats: from the fp32 network, unfolded; None: of a table.
    """

    name: str
    logits: Teacher
    batches: int
    how: str
    max_kl_nats: float | None


@dataclass(frozen=True)
class Measured:
    """What was measured of a case.

    Attributes:
        case: the shared facts.
        asked: the variants.
        alone: seconds of AHEAD batches, by variant.
        steps: seconds of a step, of the patriarch and by variant.
    """

    case: Case
    asked: Sequence[Asked]
    alone: Timings
    steps: Timings

    def images_per_second(self, name: str) -> float:
        """Of the teacher alone."""
        return 1e3 * AHEAD * self.case.batch_size / self.alone.ms_per_step(name).median

    def overhead(self, name: str) -> Spread:
        """How much longer the student's step takes than the patriarch's, as a share of that; round by round."""
        pairs = zip(self.steps.seconds_per_step[PATRIARCH_STEP], self.steps.seconds_per_step[name], strict=True)
        return spread([student / patriarch - 1 for patriarch, student in pairs])


def measure(case: Case, names: Sequence[str], *, rounds: int, until: float = math.inf) -> Measured:
    """Times the variants alone, then within steps.

    Args:
        case: the shared facts.
        names: of the variants; `eager` is among them.
        rounds: that are kept.
        until: see `time_interleaved`.

    Raises:
        ValueError: a loss was not finite.
    """
    # What an earlier case compiled counts against Dynamo's limit.
    torch.compiler.reset()
    loader = ResidentLoader(case.split, case.facts.pad_px, case.device)
    table = make_table(case) if TABLE in names else None
    asked = [_ask(case, name, loader, table) for name in names]
    passes = {one.name: _passes(case, one, loader) for one in asked}
    alone = time_interleaved(passes, case.device, rounds=rounds, steps_per_round=1, until=until)
    rigs = {PATRIARCH_STEP: make_rig(case, "eager", PATRIARCH, loader)}
    rigs |= {one.name: make_student(case, one, loader, table) for one in asked}
    steps: dict[str, Step] = {name: rig.step for name, rig in rigs.items()}
    times = time_interleaved(steps, case.device, rounds=rounds, steps_per_round=AHEAD, until=until)
    for rig in rigs.values():
        rig.require_finite()
    return Measured(case, asked, alone, times)


def teaching_network(case: Case, loader: Loader, init_seed: int = 1) -> nn.Module:
    """The network that teaches, fp32, in eval mode; the same each time. The loader gives raw images."""
    images_NCHW = next(endless_batches(loader, case)).images_NCHW
    return calibrate(fresh_network(case, init_seed), case.normaliser(torch.float32)(images_NCHW))


def unfolded(case: Case, network: nn.Module) -> Teacher:
    """The network as it is, under autocast, without gradient."""
    dtype = DTYPES[case.precision]
    network.requires_grad_(False)

    def teacher(images_NCHW: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(case.device.type, dtype, enabled=dtype != torch.float32):
            logits_BC: Tensor = network(images_NCHW)
        return logits_BC

    return teacher


def _ask(case: Case, name: str, loader: Loader, table: LabelTable | None) -> Asked:
    if name == TABLE:
        assert table is not None
        return Asked(name, _gather(case, table), 1, "gather of rows", None)
    network = teaching_network(case, loader)
    if name == EAGER:
        plain = unfolded(case, network)
        how = "eval mode" if case.precision == "fp32" else "eval mode, autocast"
        return Asked(name, plain, 1, how, max_kl(case, plain, loader))
    engine, batches = ENGINES[name]
    teacher = freeze(case, network, engine, batches)
    return Asked(name, teacher, batches, teacher.how, max_kl(case, teacher, loader))


def freeze(case: Case, network: nn.Module, engine: TeacherEngine, batches: int) -> FrozenTeacher:
    """The trainer's teacher, made of this network, for so many batches at once."""
    facts = case.facts
    shape = (batches * case.batch_size, facts.channels, facts.height_px, facts.width_px)
    return make_teacher(network, case.device, DTYPES[case.precision], engine, shape=shape)


@torch.no_grad()
def max_kl(case: Case, teacher: Teacher, loader: Loader) -> float:
    """max over images of KL(fp32 network || teacher), in nats, fp64."""
    reference, found = teaching_network(case, loader), []
    prepare = case.normaliser(DTYPES[case.precision])
    batches = endless_batches(loader, case)
    for _ in range(AHEAD):
        images_NCHW = next(batches).images_NCHW
        with full_fp32():
            of_reference = reference(case.normaliser(torch.float32)(images_NCHW)).double().log_softmax(1)
        of_teacher = teacher(prepare(images_NCHW)).double().log_softmax(1)
        found.append(float((of_reference.exp() * (of_reference - of_teacher)).sum(1).max()))
    return max(found)


def make_table(case: Case) -> LabelTable:
    """A label table of the case's images, of its true size; the logits are random."""
    facts = case.facts
    kind = TableKind(
        teacher="random",
        images="",
        count=len(case.split),
        crop=case.crop,
        mean=facts.mean,
        std=facts.std,
        classes=facts.classes,
        precision=case.precision,
        engine="folded",
    )
    generator = torch.Generator(case.device).manual_seed(2)
    shape = (kind.views * kind.count, kind.classes)
    dtype = DTYPES[case.precision]
    return LabelTable(kind, torch.randn(shape, generator=generator, device=case.device, dtype=dtype))


def _gather(case: Case, table: LabelTable) -> Teacher:
    """Takes as many rows as there are images, anywhere in the table."""
    generator = torch.Generator(case.device).manual_seed(3)
    last = len(table.logits_RC)
    rows = torch.randint(last, (AHEAD, case.batch_size), generator=generator, device=case.device)
    order = iter(range(sys.maxsize))
    return lambda images_NCHW: table.logits_RC[rows[next(order) % AHEAD]]


def _passes(case: Case, asked: Asked, loader: Loader) -> Step:
    """AHEAD batches through the teacher."""
    prepare, batches = case.normaliser(DTYPES[case.precision]), endless_batches(loader, case)
    images_NCHW = prepare(torch.cat([next(batches).images_NCHW for _ in range(AHEAD)]))
    groups = images_NCHW.split(asked.batches * case.batch_size)

    def step() -> None:
        for group in groups:
            asked.logits(group)

    return step


def make_student(case: Case, asked: Asked, loader: Loader, table: LabelTable | None) -> Rig:
    """The student's step beside this teacher."""
    supply = supply_of(case, loader, None)
    if asked.name == TABLE:
        assert table is not None
        supply = supply.with_table(table)
    elif isinstance(asked.logits, FrozenTeacher):
        supply = supply.with_teacher(asked.logits, asked.batches, case.facts.classes)
    else:
        supply = supply_of(case, loader, asked.logits)
    return rig_of(case, "eager", STUDENT, supply)


def floors(measured: Measured) -> list[Floor]:
    """What is asked for, where it can be measured: on a GPU, of one network."""
    case, names = measured.case, [one.name for one in measured.asked]
    if case.device.type != "cuda" or case.model != FLOOR_MODEL or FLOOR_VARIANT not in names:
        return []
    what = f"{case.model}, {case.facts.height_px} px, {case.precision}: overhead of the {FLOOR_VARIANT} teacher"
    return [Floor(what, measured.overhead(FLOOR_VARIANT).median, FLOOR_OVERHEAD, at_most=True)]


def report(measured: Measured) -> None:
    """Prints the table, and the floor or why there is none."""
    case = measured.case
    title = (
        f"teacher {case.model}, batch {case.batch_size}, {case.precision}, {measured.alone.rounds} rounds alone, "
        f"{measured.steps.rounds} of steps; median (quartiles)"
    )
    headings = ("teacher", "images/s", "speed over eager", "overhead of the step", "max KL", "how")
    table = new_table(title, headings, ("teacher", "how"), wrap=True)
    for one in measured.asked:
        table.add_row(
            one.name,
            f"{measured.images_per_second(one.name):,.0f}",
            measured.alone.speed_ratio(one.name, EAGER).text(2),
            measured.overhead(one.name).text(3),
            "-" if one.max_kl_nats is None else f"{one.max_kl_nats:.1e}",
            one.how,
        )
    print_table(table)
    found = floors(measured)
    for floor in found:
        print(floor.line())
    if not found:
        asked = f"overhead of the {FLOOR_VARIANT} teacher of {FLOOR_MODEL} at 224 px at most {FLOOR_OVERHEAD:.2f}"
        print(f"floor, {asked}: a GPU's, not measured")


def result_rows(measured: Measured, images: str) -> list[dict[str, Any]]:
    """One row a variant, for teacher.csv."""
    case, machine = measured.case, machine_facts(measured.case.device)
    return [
        {
            **machine,
            "model": case.model,
            "image_px": case.facts.height_px,
            "images": images,
            "batch_size": case.batch_size,
            "precision": case.precision,
            "teacher": one.name,
            "how": one.how,
            "rounds": min(measured.alone.rounds, measured.steps.rounds),
            "steps_per_round": AHEAD,
            "patriarch_ms_per_step": round(measured.steps.ms_per_step(PATRIARCH_STEP).median, 4),
            "student_ms_per_step": round(measured.steps.ms_per_step(one.name).median, 4),
            "teacher_images_per_second": round(measured.images_per_second(one.name), 1),
            **columns("speed_over_eager", measured.alone.speed_ratio(one.name, EAGER), 4),
            **columns("overhead", measured.overhead(one.name), 4),
            "max_kl_nats": one.max_kl_nats,
        }
        for one in measured.asked
    ]


def main(words: Sequence[str]) -> None:
    """The command."""
    arguments = _parse(words)
    device = choose(arguments.device)
    if device is None:
        print("not measured (no GPU)")
        return
    hush_compiler()
    case, images = case_of(arguments.model, arguments.batch_size, arguments.precision, device, arguments.images_from)
    names = [name for name in VARIANTS if name == EAGER or name in (arguments.only or VARIANTS)]
    print(facts_line(device))
    until = time.monotonic() + 60 * arguments.minutes
    measured = measure(case, names, rounds=arguments.rounds, until=until)
    report(measured)
    append_rows(arguments.results / "teacher.csv", result_rows(measured, images))
    require(floors(measured))


def _parse(words: Sequence[str]) -> Any:
    parser = Arguments("benchmarks.teacher", "Times every way to ask a teacher, alone and within the student's step.")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--model", default="resnet20", choices=list(MODELS))
    parser.add_argument("--batch_size", type=at_least_one, default=128, help="images in a step")
    parser.add_argument("--precision", default="bf16", choices=list(DTYPES))
    parser.add_argument("--rounds", type=at_least_one, default=10, help="rounds that are kept")
    parser.add_argument("--minutes", type=positive_minutes, default=8.0, help="after it no kept round is begun")
    parser.add_argument("--only", action="append", choices=VARIANTS, help="beside eager; may be given several times")
    parser.add_argument("--device", default=default, choices=["cpu", "cuda"])
    parser.add_argument("--images_from", type=Path, help="folder above the official CIFAR-100 files; default: random")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of teacher.csv")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(command(main, sys.argv[1:]))
