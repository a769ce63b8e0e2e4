"""Trains one generation: the same function for the patriarch and for every student."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.checkpoint import load_checkpoint, save_checkpoint, save_weights
from fastgen.config import TrainSettings
from fastgen.data.batch import Batch
from fastgen.data.split import Dataset
from fastgen.environment import describe_environment
from fastgen.errors import Diverged, MachineError, UserError
from fastgen.evaluate import evaluation_normaliser, measure
from fastgen.grade import make_grade
from fastgen.meters import Meter, Reading, Stopwatch
from fastgen.models import build_model, initialise
from fastgen.nodes import Node, locked
from fastgen.optim import make_optimizer, set_lr
from fastgen.plan import Generation
from fastgen.schedule import Schedule, make_schedule, resolution_px
from fastgen.shapes import group_sizes, part_bounds, training_shapes
from fastgen.step import Forward, make_forward, make_scaler
from fastgen.supply import Supply, make_supply
from fastgen.views import EpochViews
from fastgen.workbench import Workbench


@dataclass
class Training:
    """A training under way: all that a step changes, and that a checkpoint therefore holds."""

    model: nn.Module
    optimizer: torch.optim.SGD
    scaler: torch.amp.GradScaler
    meter: Meter
    stopwatch: Stopwatch
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    saved_at: float = field(default_factory=time.monotonic)


def train_generation(bench: Workbench, generation: Generation, node: Node, teacher_weights: Path | None) -> None:
    """Trains a generation to its end, from its checkpoint if there is one, and finishes its node.

    Args:
        bench: recipe, data, device and watchers of the run.
        generation: from the plan.
        node: its folder in the store.
        teacher_weights: of the generation that teaches it; None: it learns from labels alone.

    Raises:
        Stopped: a signal came; the state after the last finished step is saved.
        Diverged: the loss was not finite.
        UserError: the teacher is of another network, or another process trains this node.
    """
    train, dataset = bench.recipe.train, bench.dataset
    with locked(node.folder, "this generation"):
        if node.finished:
            return
        schedule = make_schedule(train, len(dataset.train))
        training = _start(bench, generation)
        with training.stopwatch.phase("warm_up"):
            shapes = training_shapes(bench.recipe, dataset, schedule)
            sides = {shape[1:] for shape in shapes}
            supply = make_supply(bench, generation, node, teacher_weights, training.stopwatch, sides)
            forward = _make_forward(bench, training, generation, supply, len(shapes))
            _warm_up(bench, training, forward, supply, shapes)
        _resume(training, node)
        _announce(bench, generation, node, schedule, training)

        for epoch, views in _epochs(bench, generation, training, schedule):
            first_batch = training.step % schedule.steps_per_epoch
            with training.stopwatch.phase("train"):
                for batch in supply.loader.batches(views, train.batch_size, first_batch):
                    take_step(training, forward, batch, schedule.lr(training.step), train.accumulate_steps)
                    bench.recorder.stepped(training.step)
                    if training.step % schedule.steps_per_epoch == 0:
                        break  # what an epoch's end has to tell and to save follows below
                    if training.step % bench.recipe.run.log_every_steps == 0:
                        _log(bench, training, views, schedule, node)
                    _pause(bench, training, views, node)
                reading = _log(bench, training, views, schedule, node)
            training.meter.reset()
            _end_epoch(bench, training, epoch, reading)
            if epoch + 1 < train.epochs:
                _pause(bench, training, views, node)
        _finish(bench, generation, training, node, supply)


def _epochs(
    bench: Workbench, generation: Generation, training: Training, schedule: Schedule
) -> Iterator[tuple[int, EpochViews]]:
    """The epochs that are left, each with its views; those of the next one are computed meanwhile."""
    epochs, dataset = bench.recipe.train.epochs, bench.dataset

    def views_of(epoch: int) -> EpochViews:
        side_px = resolution_px(bench.recipe.data, epochs, epoch)
        return dataset.training_views(generation.data_seed, generation.index, epoch, side_px)

    first = training.step // schedule.steps_per_epoch
    with ThreadPoolExecutor(1, "fastgen-views") as pool:
        coming = pool.submit(views_of, first)
        for epoch in range(first, epochs):
            with training.stopwatch.phase("views"):
                views = coming.result()
            if epoch + 1 < epochs:
                coming = pool.submit(views_of, epoch + 1)
            yield epoch, views


def take_step(training: Training, forward: Forward, batch: Batch, lr: float, accumulate_steps: int = 1) -> None:
    """One step of SGD; nothing in it waits for the device.

    With accumulate_steps the batch passes in so many parts, whose gradients are added up, weighed by their images:
    the gradient of the whole batch's mean loss, but for batch-norm, which sees one part at a time.
    """
    set_lr(training.optimizer, lr)
    # Here and not after the step: measured faster on a CPU (benchmarks/NOTES.md).
    training.optimizer.zero_grad()
    images = len(batch.labels)
    for part in _parts(batch, accumulate_steps):
        share = None if accumulate_steps == 1 else len(part.labels) / images
        scale = _scale(training.scaler, share, part.labels.device)
        graded = forward(part.images_NCHW, part.labels, part.jitter, part.teacher_logits_BC, scale)
        torch.autograd.backward(graded.root, graded.gradient)
        training.meter.add(training.step, len(part.labels), graded.loss_sum, graded.correct)
    training.scaler.step(training.optimizer)
    training.scaler.update()
    training.step += 1


def _scale(scaler: torch.amp.GradScaler, share: float | None, device: torch.device) -> Tensor | None:
    """What the mean loss of a part, or (None) of the whole batch, counts in the gradient; None: once."""
    if share is None and not scaler.is_enabled():
        return None
    # A tensor and not a number: compiled code has no constants then that change with the size of a part.
    return scaler.scale(torch.full((), 1.0 if share is None else share, dtype=torch.float64, device=device))


def _parts(batch: Batch, count: int) -> Iterator[Batch]:
    bounds = part_bounds(len(batch.labels), count)
    return (batch[begin:end] for begin, end in itertools.pairwise(bounds))


def _start(bench: Workbench, generation: Generation) -> Training:
    recipe, facts = bench.recipe, bench.dataset.facts
    if "compile" in (recipe.train.engine, recipe.teacher.engine):
        # The code of the generation before is of no more use, and counts towards torch's limit of compilations.
        torch.compiler.reset()
    model = build_model(recipe.model.name, facts.classes, facts.channels, recipe.model.downsample)
    initialise(model, generation.init_seed)
    model = model.to(bench.device).to(memory_format=torch.channels_last).train()
    if recipe.train.batchnorm == "triton":
        from fastgen.models.norm_act import fuse_norm_act

        model = fuse_norm_act(model)
    optimizer = make_optimizer(model, recipe.train)
    return Training(
        model, optimizer, make_scaler(recipe.train, bench.device), Meter(bench.device), Stopwatch(bench.device)
    )


def _make_forward(bench: Workbench, training: Training, generation: Generation, supply: Supply, shapes: int) -> Forward:
    train = bench.recipe.train
    grade = make_grade(generation.objective, fused=train.kernels == "triton")
    return make_forward(training.model, grade, supply.live_teacher, supply.prepare, train, bench.device, shapes)


def _warm_up(
    bench: Workbench, training: Training, forward: Forward, supply: Supply, shapes: Sequence[tuple[int, int, int]]
) -> None:
    """Compiles, and lets libraries choose their algorithms, on blank images; changes no state."""
    if supply.ahead is not None:
        groups = group_sizes(len(bench.dataset.train), bench.recipe.train.batch_size, supply.ahead.count)
        for count, side in itertools.product(groups, {shape[1:] for shape in shapes}):
            supply.ahead.teach([_blank(bench, count, *side)])
    before = {name: buffer.clone() for name, buffer in training.model.named_buffers()}
    for count, height_px, width_px in shapes:
        part = supply.dress(_blank(bench, count, height_px, width_px))
        scale = _scale(training.scaler, None if bench.recipe.train.accumulate_steps == 1 else 1.0, bench.device)
        graded = forward(part.images_NCHW, part.labels, part.jitter, part.teacher_logits_BC, scale)
        torch.autograd.backward(graded.root, graded.gradient)
    training.optimizer.zero_grad()
    for name, buffer in training.model.named_buffers():
        buffer.copy_(before[name])


def _blank(bench: Workbench, count: int, height_px: int, width_px: int) -> Batch:
    """Black images of class 0, as the data set's loader would give them."""
    shape = (count, bench.dataset.facts.channels, height_px, width_px)
    images_NCHW = torch.zeros(shape, dtype=torch.uint8, device=bench.device)
    numbers = torch.zeros(count, dtype=torch.int64, device=bench.device)
    jitter = torch.zeros((count, 4), device=bench.device) if bench.dataset.crop.jitter.active else None
    return Batch(images_NCHW.contiguous(memory_format=torch.channels_last), numbers, numbers, jitter)


def _resume(training: Training, node: Node) -> None:
    if not node.checkpoint.exists():
        return
    state = load_checkpoint(node.checkpoint)
    if state["node"] != node.id:
        raise UserError(
            f"{node.checkpoint}: is of another generation ({state['node']}): delete it, and this one starts afresh"
        )
    training.model.load_state_dict(state["model"])
    training.optimizer.load_state_dict(state["optimizer"])
    training.scaler.load_state_dict(state["scaler"])
    training.meter.restore(state["meter"])
    training.stopwatch.add(state["seconds"])
    training.step, training.history = state["step"], state["history"]


def _announce(bench: Workbench, generation: Generation, node: Node, schedule: Schedule, training: Training) -> None:
    if training.step:
        bench.recorder.say(f"generation {generation.index} goes on at step {training.step} of {schedule.total_steps}")
    facts = {"role": generation.role, "engine": bench.recipe.train.engine, "precision": bench.recipe.train.precision}
    bench.recorder.begin(generation, schedule, len(bench.dataset.train), training.step, facts)


def _log(bench: Workbench, training: Training, views: EpochViews, schedule: Schedule, node: Node) -> Reading:
    """Reads the device's sums of this epoch and tells them to the watchers."""
    reading = training.meter.read()
    _require_finite(reading, bench.recipe.train, bench.dataset, views, node)
    seconds = training.stopwatch.seconds().get("train", 0.0)
    images_per_second = _images_seen(training.step, schedule, len(bench.dataset.train), bench.recipe.train) / seconds
    bench.recorder.log(training.step, schedule.lr(training.step - 1), reading, images_per_second)
    return reading


def _require_finite(reading: Reading, train: TrainSettings, dataset: Dataset, views: EpochViews, node: Node) -> None:
    step = reading.first_bad_step
    if step is None and math.isfinite(reading.loss):
        return
    if step is None:
        raise ValueError(f"the mean loss is {reading.loss}, yet every step's was finite")
    batch = step % -(-len(dataset.train) // train.batch_size)
    positions = views.order[batch * train.batch_size : (batch + 1) * train.batch_size]
    ids = dataset.train.ids[positions].tolist()
    good = (
        f"the last good checkpoint is {node.checkpoint}"
        if node.checkpoint.exists()
        else "no checkpoint was saved before"
    )
    raise Diverged(
        f"the loss is not finite at step {step} (sample ids {', '.join(map(str, ids[:8]))}, ..., all of them in "
        f"events.jsonl); {good}. Lower train.lr, or set train.precision=fp32.",
        step=step,
        ids=ids,
    )


def _require_finite_weights(model: nn.Module, step: int) -> None:
    """The last update may have broken the weights although every loss up to it was finite."""
    broken = [name for name, tensor in model.state_dict().items() if not bool(tensor.isfinite().all())]
    if broken:
        raise MachineError(
            f"the update of step {step - 1} made {broken[0]} infinite or not a number; nothing of it is saved. "
            "Lower train.lr, or set train.precision=fp32."
        )


def _pause(bench: Workbench, training: Training, views: EpochViews, node: Node) -> None:
    """Saves where it is time for it; where a stop is asked for, saves and raises Stopped."""
    # Asked once: a signal that comes while this runs waits for the next step.
    stopping = bench.stop.requested
    if stopping or time.monotonic() - training.saved_at >= bench.recipe.run.save_minutes * 60:
        _save(bench, training, views, node)
    if stopping:
        bench.stop.check()


def _save(bench: Workbench, training: Training, views: EpochViews, node: Node) -> None:
    _require_finite(training.meter.read(), bench.recipe.train, bench.dataset, views, node)
    _require_finite_weights(training.model, training.step)
    with training.stopwatch.phase("save"):
        state = {
            "node": node.id,
            "step": training.step,
            "model": training.model.state_dict(),
            "optimizer": training.optimizer.state_dict(),
            "scaler": training.scaler.state_dict(),
            "meter": training.meter.state(),
            "seconds": training.stopwatch.seconds(),
            "history": training.history,
        }
        save_checkpoint(node.checkpoint, state)
    training.saved_at = time.monotonic()


def _end_epoch(bench: Workbench, training: Training, epoch: int, reading: Reading) -> None:
    row: dict[str, Any] = {"epoch": epoch, "loss": reading.loss, "accuracy": reading.accuracy}
    every = bench.recipe.run.eval_every_epochs
    # The last epoch is measured when the generation is finished.
    due = every and (epoch + 1) % every == 0 and epoch + 1 < bench.recipe.train.epochs
    if due and not bench.stop.requested:
        with training.stopwatch.phase("evaluate"):
            row |= _evaluate(bench, training.model)
    training.history.append(row)
    # Not in the history: it shall be the same however often a training was stopped.
    seconds = training.stopwatch.seconds()
    clock = {"train_seconds": seconds.get("train", 0.0), "wall_seconds": sum(seconds.values())}
    bench.recorder.epoch(training.step, row | clock)


def _evaluate(bench: Workbench, model: nn.Module) -> dict[str, float]:
    dataset = bench.dataset
    views = dataset.evaluation_views(dataset.evaluation)
    normalise = evaluation_normaliser(dataset, bench.device)
    measured, _ = measure(model, bench.evaluation_loader, views, normalise, bench.recipe.gen.k, bench.device)
    return {"top1_error": measured.top1_error, "top5_error": measured.top5_error}


def _finish(bench: Workbench, generation: Generation, training: Training, node: Node, supply: Supply) -> None:
    recipe, facts = bench.recipe, bench.dataset.facts
    _require_finite_weights(training.model, training.step)
    description = {
        "model": recipe.as_dict()["model"],
        "dataset": recipe.data.dataset,
        "classes": facts.classes,
        "channels": facts.channels,
        "mean": facts.mean,
        "std": facts.std,
        "holdout": recipe.data.holdout,
        "generation": generation.index,
        "node": node.id,
    }
    with training.stopwatch.phase("save"):
        save_weights(node.weights, training.model, description)
    seconds = training.stopwatch.seconds()
    record = {
        "images": recipe.train.epochs * len(bench.dataset.train),
        "seconds": seconds,
        "environment": describe_environment(bench.device),
        "path": {
            "views": supply.views,
            "pixels": bench.dataset.pixels,
            "step": recipe.train.engine,
            "loss": recipe.train.kernels,
            "batchnorm": recipe.train.batchnorm,
            "teacher": supply.lessons,
            "optimizer": "torch SGD, fused",
        },
        "history": training.history,
    }
    node.finish(generation.identity, record)
    bench.recorder.event("generation_end", generation=generation.index, node=node.id, seconds=seconds)
    bench.recorder.end_generation()


def _images_seen(step: int, schedule: Schedule, samples: int, train: TrainSettings) -> int:
    epochs, steps = divmod(step, schedule.steps_per_epoch)
    return epochs * samples + min(steps * train.batch_size, samples)
