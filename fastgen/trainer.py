"""Trains one generation: the same function for the patriarch and for every student."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastgen.buffers import merge_statistics, merged_statistics
from fastgen.checkpoint import load_newest, save_checkpoint, save_weights
from fastgen.config import TrainSettings
from fastgen.data.split import Dataset
from fastgen.engines import Engine, Plant, make_engine
from fastgen.environment import describe_environment
from fastgen.errors import Diverged, MachineError, Stopped, UserError
from fastgen.evaluate import examination
from fastgen.learner import Learner, new_learner
from fastgen.locks import Lock, locked
from fastgen.measuring import measure
from fastgen.meters import Meter, Reading, Stopwatch
from fastgen.nodes import Node
from fastgen.plan import Generation
from fastgen.pulse import Pulse, Wish
from fastgen.random_state import seed_random_state
from fastgen.schedule import Schedule, make_schedule, resolution_px
from fastgen.shapes import batch_shapes, part_shapes, view_sizes
from fastgen.supply import Supply, make_supply
from fastgen.teaching import epoch_names
from fastgen.training import MEANS, Training
from fastgen.unseen import origin
from fastgen.views import EpochViews
from fastgen.workbench import Workbench


def train_generation(bench: Workbench, generation: Generation, node: Node, teacher_weights: Sequence[Path]) -> None:
    """Trains a generation to its end, from its checkpoint if there is one, and finishes its node.

    Args:
        bench: recipe, data, device and watchers of the run.
        generation: from the plan.
        node: its folder in the store.
        teacher_weights: of the generations that teach it; none: it learns from labels alone.

    Raises:
        Stopped: a signal came to one of the processes; the state after the same step of all is saved.
        Diverged: the loss was not finite.
        UserError: the teacher is of another network, or another run trains this node.
    """
    train, group = bench.recipe.train, bench.group
    with ExitStack() as held:
        lock = group.in_turn(lambda: held.enter_context(_held(bench, node)) if group.main else None)
        if group.agree(node.finished):
            return
        schedule, stopwatch = make_schedule(train, len(bench.dataset.train)), Stopwatch(bench.device)
        with stopwatch.phase("warm_up"):
            # Engines are in cycles: that of the generation before would keep its graphs' memory on the device.
            gc.collect()
            if "compile" in (train.engine, bench.recipe.teacher.engine):
                # Code of the generation before is of no more use, and counts towards torch's limit of compilations.
                torch.compiler.reset()
            sides = set(view_sizes(bench.recipe, bench.dataset))
            supply = make_supply(bench, generation, node, teacher_weights, stopwatch, sides, held)
            learner = _start(bench, generation, supply)
            training = Training(learner, Meter(group), stopwatch, group, bench.recipe.dist.buffers, supply.means)
            _resume(bench, training, node)
            engine = _make_engine(bench, learner, supply)
        _announce(bench, generation, node, schedule, training, engine)
        _measure_what_a_stop_left_out(bench, training, schedule)
        pauses = _Pauses(bench, node, lock, supply, Pulse(group))

        for epoch, views in _epochs(bench, generation, training, schedule):
            first_batch = training.step % schedule.steps_per_epoch
            lrs = [schedule.lr(step) for step in range(training.step, (epoch + 1) * schedule.steps_per_epoch)]
            with training.stopwatch.phase("train"):
                if supply.means is not None:
                    supply.means.begin(epoch, views)
                for tally in engine.epoch(views, first_batch, lrs):
                    logged = training.step // bench.recipe.run.log_every_steps
                    training.take(tally)
                    bench.recorder.stepped(training.step)
                    if training.step % schedule.steps_per_epoch == 0:
                        break  # what an epoch's end has to tell and to save follows below
                    if training.step // bench.recipe.run.log_every_steps > logged:
                        _log(bench, training, views, schedule, node)
                    pauses.after_step(training, views)
                reading = _log(bench, training, views, schedule, node)
            with training.stopwatch.phase("save"):
                supply.keep()
            training.meter.reset()
            last = epoch + 1 == train.epochs
            wish = pauses.wish_of_all(training, last=last)
            _end_epoch(bench, training, epoch, reading, measured=not (last or wish.stop))
            if not last:
                pauses.fulfil(wish, training, views)
        _finish(bench, generation, training, node, lock, supply, engine)


def _held(bench: Workbench, node: Node) -> AbstractContextManager[Lock]:
    return locked(node.folder, "this generation", say=bench.recorder.say, check=bench.stop.check)


@dataclass(frozen=True)
class _Pauses:
    """Between steps: saves where it is time for it; where a stop is asked for, saves and raises Stopped."""

    bench: Workbench
    node: Node
    lock: Lock | None
    supply: Supply
    pulse: Pulse

    def after_step(self, training: Training, views: EpochViews) -> None:
        wish = self._own_wish(training, epoch_ends=False)
        self.fulfil(self.pulse.beat(wish), training, views)

    def wish_of_all(self, training: Training, *, last: bool) -> Wish:
        """At the end of an epoch; after the last one the whole generation is saved instead."""
        wish = self._own_wish(training, epoch_ends=not last)
        return self.pulse.now(wish)

    def fulfil(self, wish: Wish, training: Training, views: EpochViews) -> None:
        if wish.save or wish.stop:
            _save(self.bench, training, views, self.node, self.lock, self.supply)
        if wish.stop:
            # A launcher ends all as soon as one has ended: not before the main process has saved.
            self.bench.group.agree(None)
            raise Stopped(wish.stop)

    def _own_wish(self, training: Training, *, epoch_ends: bool) -> Wish:
        # One clock says when: the others may be anywhere else in their step.
        save = self.bench.group.main and training.save_is_due(self.bench.recipe.run.save_minutes, epoch_ends=epoch_ends)
        return Wish(self.bench.stop.number, save)


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
    seed_random_state(generation.init_seed, bench.group.rank)
    shapes = len(part_shapes(recipe, dataset, bench.group.share))
    return new_learner(
        recipe,
        dataset.facts,
        generation,
        supply,
        bench.device,
        shapes,
        bench.group,
    )


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
            bench.group.share,
        )
    )


def _resume(bench: Workbench, training: Training, node: Node) -> None:
    """Goes on from the newest checkpoint that is whole. One process reads it, so that all have the same."""

    def load() -> dict[str, Any] | None:
        return load_newest(node.folder, bench.recorder.say) if bench.group.main else None

    found = bench.group.in_turn(load)
    # Only there: the main process deals them out.
    means_NC = None if found is None else found.pop(MEANS, None)
    state = bench.group.agree(found)
    if state is None:
        return
    if state["node"] != node.id:
        raise UserError(
            f"{node.folder}: its checkpoint is of another generation ({state['node']}): delete it, and this one starts "
            "afresh"
        )
    training.load_state(state, means_NC)


def _announce(
    bench: Workbench, generation: Generation, node: Node, schedule: Schedule, training: Training, engine: Engine
) -> None:
    if training.step:
        bench.recorder.say(f"generation {generation.index} goes on at step {training.step} of {schedule.total_steps}")
    facts = {
        "role": generation.role,
        "engine": engine.how,
        "precision": bench.recipe.train.precision,
        "processes": bench.group.world,
    }
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
    saved = node.checkpoints
    good = f"the last good checkpoint is {saved[0]}" if saved else "no checkpoint was saved before"
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


def _save(
    bench: Workbench, training: Training, views: EpochViews, node: Node, lock: Lock | None, supply: Supply
) -> None:
    began = time.monotonic()
    _require_finite(training.meter.read(), bench.recipe.train, bench.dataset, views, node)
    _require_finite_weights(training.learner.model, training.step)
    with training.stopwatch.phase("save"):
        # First: what the steps before this checkpoint have asked for is not asked again after it.
        supply.keep()
        state = {"node": node.id, **training.state()}
        if lock is not None:
            lock.check()
            save_checkpoint(node.folder, state)
    training.saved_at = time.monotonic()
    training.save_seconds = training.saved_at - began


def _end_epoch(bench: Workbench, training: Training, epoch: int, reading: Reading, *, measured: bool) -> None:
    """Measures the network where it is time for it, and tells; the last epoch is measured with the generation."""
    row: dict[str, Any] = {"epoch": epoch, "loss": reading.loss, "accuracy": reading.accuracy}
    if measured and _to_be_measured(bench, epoch):
        with training.stopwatch.phase("evaluate"):
            row |= _evaluate(bench, training.learner.model)
    training.history.append(row)
    # Not in the history: it shall be the same however often a training was stopped.
    seconds = training.stopwatch.seconds()
    clock = {"train_seconds": seconds.get("train", 0.0), "wall_seconds": sum(seconds.values())}
    bench.recorder.epoch(training.step, row | clock)


def _to_be_measured(bench: Workbench, epoch: int) -> bool:
    every = bench.recipe.run.eval_every_epochs
    return bool(every) and (epoch + 1) % every == 0


def _measure_what_a_stop_left_out(bench: Workbench, training: Training, schedule: Schedule) -> None:
    """A stop at the end of an epoch does not wait for its measurement: the network is still the same."""
    if not training.history or training.step % schedule.steps_per_epoch:
        return
    row = training.history[-1]
    if "top1_error" not in row and _to_be_measured(bench, row["epoch"]):
        with training.stopwatch.phase("evaluate"):
            row |= _evaluate(bench, training.learner.model)


def _evaluate(bench: Workbench, model: nn.Module) -> dict[str, float]:
    recipe, dataset, group = bench.recipe, bench.dataset, bench.group
    on = examination(recipe, dataset, dataset.evaluation, bench.evaluation_loader, bench.device, group)
    with merged_statistics(model, group, recipe.dist.buffers):
        measured, _ = measure(model, on, keep=False)
    return {"top1_error": measured.top1_error, "top5_error": measured.top5_error}


def _finish(
    bench: Workbench,
    generation: Generation,
    training: Training,
    node: Node,
    lock: Lock | None,
    supply: Supply,
    engine: Engine,
) -> None:
    recipe, facts, group = bench.recipe, bench.dataset.facts, bench.group
    merge_statistics(training.learner.model, group, recipe.dist.buffers)
    _require_finite_weights(training.learner.model, training.step)
    description = {
        "model": recipe.as_dict()["model"],
        "dataset": recipe.data.dataset,
        "classes": facts.classes,
        "channels": facts.channels,
        "mean": facts.mean,
        "std": facts.std,
        **origin(recipe, bench.dataset),
        "generation": generation.index,
        "node": node.id,
    }
    with training.stopwatch.phase("save"):
        if lock is not None:
            lock.check()
            save_weights(node.weights, training.learner.model, description)
    seconds = training.stopwatch.seconds()
    record = {
        "images": recipe.train.epochs * len(bench.dataset.train),
        "seconds": seconds,
        "processes": group.world,
        "environment": describe_environment(bench.device, group.world),
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
    if group.main and supply.store is not None:
        lost = supply.store.divergence(epoch_names(bench, generation))
        record["label_store"] = {"folder": str(supply.store.folder), "divergence_nats": lost}
        if lost is not None:
            bench.recorder.say(
                f"generation {generation.index}: what is kept of its teacher is {lost:.2g} nats (KL) off"
            )
    if group.main:
        node.finish(generation.identity, record)
    # What comes next is looked for by all.
    group.agree(None)
    bench.recorder.event("generation_end", generation=generation.index, node=node.id, seconds=seconds)
    bench.recorder.end_generation()


def _images_seen(step: int, schedule: Schedule, samples: int, train: TrainSettings) -> int:
    epochs, steps = divmod(step, schedule.steps_per_epoch)
    return epochs * samples + min(steps * train.batch_size, samples)
