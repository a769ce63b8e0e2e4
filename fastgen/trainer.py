"""Trains one generation: the same function for the patriarch and for every student."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastgen.checkpoint import load_checkpoint, save_checkpoint, save_weights
from fastgen.config import TrainSettings
from fastgen.data.split import Dataset
from fastgen.engines import Engine, Plant, make_engine
from fastgen.environment import describe_environment
from fastgen.errors import Diverged, MachineError, UserError
from fastgen.evaluate import evaluation_normaliser, measure
from fastgen.learner import Learner, new_learner
from fastgen.meters import Meter, Reading, Stopwatch, Tally
from fastgen.nodes import Node, locked
from fastgen.plan import Generation
from fastgen.schedule import Schedule, make_schedule, resolution_px
from fastgen.shapes import batch_shapes, part_shapes
from fastgen.supply import Supply, make_supply
from fastgen.views import EpochViews
from fastgen.workbench import Workbench


@dataclass
class Training:
    """A training under way: all that a step changes, and that a checkpoint therefore holds."""

    learner: Learner
    meter: Meter
    stopwatch: Stopwatch
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    saved_at: float = field(default_factory=time.monotonic)

    def take(self, tally: Tally) -> None:
        """Counts steps that were taken."""
        self.meter.add(self.step, tally)
        self.step += tally.count


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
        schedule, stopwatch = make_schedule(train, len(dataset.train)), Stopwatch(bench.device)
        with stopwatch.phase("warm_up"):
            if "compile" in (train.engine, bench.recipe.teacher.engine):
                # Code of the generation before is of no more use, and counts towards torch's limit of compilations.
                torch.compiler.reset()
            sides = {shape[1:] for shape in part_shapes(bench.recipe, dataset)}
            supply = make_supply(bench, generation, node, teacher_weights, stopwatch, sides)
            training = Training(_start(bench, generation, supply), Meter(), stopwatch)
            _resume(training, node)
            engine = _make_engine(bench, training.learner, supply)
        _announce(bench, generation, node, schedule, training, engine)

        for epoch, views in _epochs(bench, generation, training, schedule):
            first_batch = training.step % schedule.steps_per_epoch
            lrs = [schedule.lr(step) for step in range(training.step, (epoch + 1) * schedule.steps_per_epoch)]
            with training.stopwatch.phase("train"):
                for tally in engine.epoch(views, first_batch, lrs):
                    logged = training.step // bench.recipe.run.log_every_steps
                    training.take(tally)
                    bench.recorder.stepped(training.step)
                    if training.step % schedule.steps_per_epoch == 0:
                        break  # what an epoch's end has to tell and to save follows below
                    if training.step // bench.recipe.run.log_every_steps > logged:
                        _log(bench, training, views, schedule, node)
                    _pause(bench, training, views, node)
                reading = _log(bench, training, views, schedule, node)
            training.meter.reset()
            _end_epoch(bench, training, epoch, reading)
            if epoch + 1 < train.epochs:
                _pause(bench, training, views, node)
        _finish(bench, generation, training, node, supply, engine)


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


def _start(bench: Workbench, generation: Generation, supply: Supply) -> Learner:
    recipe, dataset = bench.recipe, bench.dataset
    shapes = len(part_shapes(recipe, dataset))
    return new_learner(recipe, dataset.facts, generation, supply.live_teacher, supply.prepare, bench.device, shapes)


def _make_engine(bench: Workbench, learner: Learner, supply: Supply) -> Engine:
    dataset = bench.dataset
    return make_engine(
        Plant(
            learner,
            supply,
            bench.recipe.train,
            len(dataset.train),
            batch_shapes(bench.recipe, dataset),
            dataset.facts.channels,
            dataset.crop.jitter.active,
            bench.device,
        )
    )


def _resume(training: Training, node: Node) -> None:
    if not node.checkpoint.exists():
        return
    state = load_checkpoint(node.checkpoint)
    if state["node"] != node.id:
        raise UserError(
            f"{node.checkpoint}: is of another generation ({state['node']}): delete it, and this one starts afresh"
        )
    training.learner.load_state(state)
    training.meter.restore(state["meter"])
    training.stopwatch.add(state["seconds"])
    training.step, training.history = state["step"], state["history"]


def _announce(
    bench: Workbench, generation: Generation, node: Node, schedule: Schedule, training: Training, engine: Engine
) -> None:
    if training.step:
        bench.recorder.say(f"generation {generation.index} goes on at step {training.step} of {schedule.total_steps}")
    facts = {"role": generation.role, "engine": engine.how, "precision": bench.recipe.train.precision}
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
    _require_finite_weights(training.learner.model, training.step)
    with training.stopwatch.phase("save"):
        state = {
            "node": node.id,
            "step": training.step,
            **training.learner.state(),
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
            row |= _evaluate(bench, training.learner.model)
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


def _finish(
    bench: Workbench, generation: Generation, training: Training, node: Node, supply: Supply, engine: Engine
) -> None:
    recipe, facts = bench.recipe, bench.dataset.facts
    _require_finite_weights(training.learner.model, training.step)
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
        save_weights(node.weights, training.learner.model, description)
    seconds = training.stopwatch.seconds()
    record = {
        "images": recipe.train.epochs * len(bench.dataset.train),
        "seconds": seconds,
        "environment": describe_environment(bench.device),
        "path": {
            "views": supply.views,
            "pixels": bench.dataset.pixels,
            "step": engine.how,
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
