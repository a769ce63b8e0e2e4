"""Checks of whole trainings on a device: all engines and precisions learn, engines agree, runs resume."""

from __future__ import annotations

import contextlib
import io
import itertools
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks.checks import Outcome, full_fp32
from benchmarks.rigs import PATRIARCH, STUDENT, Case, Precision, Way, make_rig, ways_on
from benchmarks.verdicts import agrees, learns, resumes
from fastgen import train
from fastgen.checkpoint import read_weights
from fastgen.data.cifar import LAYOUTS, PIXELS
from fastgen.data.facts import Facts
from fastgen.data.resident import ResidentLoader
from fastgen.data.split import Split
from fastgen.distributed import ALONE, Group
from fastgen.errors import Stopped
from fastgen.meters import Tally
from fastgen.plan import Objective
from fastgen.training import Training

OBJECTIVES = {"patriarch": PATRIARCH, "student": STUDENT}
LEARN_STEPS = 40
# Classes that have images; the others cost a network nothing to leave out.
COLOURS = 10
LEARN_LR = 0.05
# Random guessing stays at 1; a network that learns these images at all is far below.
LEARN_LOSS_RATIO = 0.8
AGREE_STEPS = 20
# A unit whose input is all but zero is on in one engine and off in the other, and larger steps blow that up: at 0.01,
# eager beside eager with weights moved by one rounding differs by up to 1e-3, at 0.001 by 2e-5. A gradient wrong by 1 %
# shows as 6e-4 or more.
AGREE_LR = 0.001
AGREE_RELATIVE = 1e-4
CURVE_SEEDS, CURVE_STEPS, CURVE_WINDOW = 5, 60, 10

# Of each step, fp64.
Losses = np.ndarray[Any, np.dtype[np.float64]]


def memorisable_split(facts: Facts, count: int, seed: int) -> Split:
    """Images that a few steps can learn, whatever their crop: a few classes, each a colour under a fifth of noise."""
    random = np.random.default_rng(seed)
    levels = np.array(list(itertools.product((0, 127, 255), repeat=facts.channels)))
    colours = random.permutation(levels)[: min(facts.classes, COLOURS)]
    labels = np.arange(count, dtype=np.int64) % len(colours)
    noise = random.integers(0, 256, (count, facts.height_px, facts.width_px, facts.channels))
    pixels = (0.8 * colours[labels][:, None, None] + 0.2 * noise).astype(np.uint8)
    return Split(pixels, labels, np.arange(count, dtype=np.int64))


def check_engines(case: Case, ways: Sequence[tuple[Way, Precision]]) -> Iterator[Outcome]:
    """Each way in each precision learns, as patriarch and as student; then the ways beside each other."""
    for way, precision in ways:
        # Dynamo falls back to eager past a number of compilations of one function: begin anew.
        torch.compiler.reset()
        for role, objective in OBJECTIVES.items():
            losses = losses_of(replace(case, precision=precision), way, objective, LEARN_STEPS, LEARN_LR)
            name = f"{way.name} {role}, {precision}: loss at the end over the start"
            where = f"{losses[0]:.3f} to {losses[-1]:.3f}"
            yield Outcome(name, _fall(losses), LEARN_LOSS_RATIO, where, learns(way, precision))
    yield from _check_agreement(case)
    yield from _check_curves(case, dict.fromkeys(way for way, _ in ways))


def _check_agreement(case: Case) -> Iterator[Outcome]:
    """Every way to run a step beside plain PyTorch, eager: the same losses, step for step."""
    torch.compiler.reset()
    case = replace(case, precision="fp32")
    with full_fp32():
        for role, objective in OBJECTIVES.items():
            eager = losses_of(case, Way("eager"), objective, AGREE_STEPS, AGREE_LR)
            for way in ways_on(case.device)[1:]:
                found = losses_of(case, way, objective, AGREE_STEPS, AGREE_LR)
                error = float(np.max(np.abs(found - eager) / np.abs(eager)))
                name = f"{way.name} {role} beside eager, fp32: relative loss"
                yield Outcome(name, error, AGREE_RELATIVE, of=agrees(way))


def _check_curves(case: Case, ways: Iterable[Way]) -> Iterator[Outcome]:
    """Whole loss curves, at a rate that learns: a way stays as near to eager as other initial weights do.

    Rounding grows into other weights there, so two ways part, as five seeds do; what one of them did wrong would part
    them further. Losses are means over windows of steps.
    """
    torch.compiler.reset()
    for role, objective in OBJECTIVES.items():
        eager = np.stack([_curve(case, Way("eager"), objective, seed) for seed in range(CURVE_SEEDS)])
        spread = np.ptp(eager, axis=0)
        for way in ways:
            if way == Way("eager"):
                continue
            error = float(np.max(np.abs(_curve(case, way, objective, 0) - eager[0]) / spread))
            yield Outcome(f"{way.name} {role}: loss curve off, over the spread of seeds", error, 1.0, of=agrees(way))


def _curve(case: Case, way: Way, objective: Objective, init_seed: int) -> Losses:
    losses = losses_of(case, way, objective, CURVE_STEPS, LEARN_LR, init_seed)
    return losses.reshape(-1, CURVE_WINDOW).mean(axis=1)


def losses_of(
    case: Case, way: Way, objective: Objective, steps: int, lr: float, init_seed: int = 0, group: Group = ALONE
) -> Losses:
    """Loss of each step, fp64; epochs are whole, with their smaller last batch."""
    case = case.run_by(way)
    loader = ResidentLoader(case.split, case.facts.pad_px, case.device, case.kernels == "triton")
    rig = make_rig(case, way.engine, objective, loader, lr=lr, init_seed=init_seed, whole_epochs=True, group=group)
    found: list[float] = []
    at_once = 1
    while len(found) < steps:
        tally = next(rig.tallies)
        at_once = max(at_once, tally.count)
        found += [loss_sum / images for loss_sum, images in zip(_values(tally), tally.images, strict=True)]
    if way.engine == "graph" and at_once == 1:
        raise ValueError("no graph held more than one step: nothing of what lies between steps was checked")
    return np.array(found[:steps])


def _values(tally: Tally) -> list[float]:
    return [value for values in tally.loss_sums for value in values.reshape(-1).tolist()]


def _fall(losses: Losses) -> float:
    """Mean of the last five over mean of the first five; not a number where any loss is not finite."""
    if not np.isfinite(losses).all():
        return float("nan")
    return float(losses[-5:].mean() / losses[:5].mean())


def write_random_cifar100(root: Path, seed: int) -> None:
    """Files in the official binary layout and size, with random pixels."""
    layout = LAYOUTS["cifar100"]
    folder = root / layout.binary
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for name, count in (*layout.binary_train, *layout.binary_test):
        records = random.integers(0, 256, (count, layout.label_bytes + PIXELS), dtype=np.uint8)
        fine = np.arange(count) % 100
        records[:, 0], records[:, 1] = fine // 5, fine
        records.tofile(folder / name)
    (folder / layout.binary_names).write_text("".join(f"class_{number}\n" for number in range(100)))


def check_resume(
    folder: Path, seed: int, device: torch.device, model: str, ways: Sequence[tuple[Way, Precision]]
) -> Iterator[Outcome]:
    """The command itself, stopped by SIGTERM in both generations and taken up again, beside one that was left alone.

    Args:
        folder: empty.
        seed: of the pixels.
        device: where it trains, in torch's deterministic mode.
        model: name of the network.
        ways: and precision of each pair of runs.
    """
    write_random_cifar100(folder / "data", seed)
    recipe = folder / "resume.yaml"
    recipe.write_text(_resume_recipe(model))
    for way, precision in ways:
        torch.compiler.reset()
        words = [
            "--cfg", str(recipe), f"--data.root={folder / 'data'}", *way.words, f"--train.precision={precision}",
            f"--run.device={device.type}",
        ]  # fmt: skip
        home = folder / f"{way.name}-{precision}"
        with _determinism_restored():
            _train([*words, f"--run.dir={home / 'whole' / 'run'}"])
            stopped_words = [*words, f"--run.dir={home / 'stopped' / 'run'}"]
            stops = [_train(stopped_words, stop_after_steps=steps) for steps in (3, RESUME_STEPS - 3 + 2)]
            _train(stopped_words)
        of = resumes(way, precision)
        yield Outcome(f"resume, {way.name}, {precision}: stops that did not stop", stops.count(False), 0, of=of)
        differing, tensors = _differing(home / "whole" / "run", home / "stopped" / "run")
        yield Outcome(f"resume, {way.name}, {precision}: tensors that differ", differing, 0, f"of {tensors}", of)


RESUME_EPOCHS, RESUME_IMAGES, RESUME_BATCH = 2, 200, 32
# Of one generation; the last step of an epoch holds fewer images.
RESUME_STEPS = RESUME_EPOCHS * -(-RESUME_IMAGES // RESUME_BATCH)


def _resume_recipe(model: str) -> str:
    # In this very process, which counts the steps, however many GPUs there are.
    return f"""\
data: {{dataset: cifar100, train_limit: {RESUME_IMAGES}, val_limit: 100}}
model: {{name: {model}}}
train: {{epochs: {RESUME_EPOCHS}, batch_size: {RESUME_BATCH}, graph_steps: 2}}
gen: {{generations: 1}}
run: {{deterministic: true, eval_every_epochs: 1}}
dist: {{processes: 1}}
"""


def _train(words: Sequence[str], stop_after_steps: int | None = None) -> bool:
    """Runs the command, silently; tells whether it was stopped.

    Raises:
        Stopped: by another signal than the one that was sent here.
    """
    take, taken = Training.take, 0

    def stopping(training: Training, tally: Tally) -> None:
        nonlocal taken
        before = taken
        take(training, tally)
        taken += tally.count
        # An engine may take several steps at once: it is stopped after them.
        if stop_after_steps is not None and before < stop_after_steps <= taken:
            signal.raise_signal(signal.SIGTERM)

    with mock.patch.object(Training, "take", stopping), contextlib.redirect_stdout(io.StringIO()):
        try:
            train.main(words)
        except Stopped as stopped:
            if stop_after_steps is None or stopped.exit_code != 128 + signal.SIGTERM:
                raise
            return True
    return False


@contextlib.contextmanager
def _determinism_restored() -> Iterator[None]:
    """The command sets these for the whole process; what is measured afterwards shall not be slowed down."""
    deterministic, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.benchmark = benchmark


def _differing(run: Path, other: Path) -> tuple[int, int]:
    """Tensors of both generations that are not bit-equal, and how many there are."""
    differing = count = 0
    for generation in range(2):
        weights = Path(f"generation_{generation}") / "model.safetensors"
        ours, theirs = (read_weights(folder / weights)[0] for folder in (run, other))
        if ours.keys() != theirs.keys():
            raise ValueError(f"{run} and {other} hold other networks")
        differing += sum(not torch.equal(ours[name], theirs[name]) for name in ours)
        count += len(ours)
    return differing, count
