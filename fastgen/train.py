"""The command: trains a recipe's generations, one after the other, and shows what came of it.

python -m fastgen.train --cfg rcp/demo.yaml [--section.key=value ...]
python -m fastgen.train --help
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch

from fastgen.config import Recipe
from fastgen.data import build_loader, open_dataset
from fastgen.data.batch import usable_cores
from fastgen.data.split import Dataset
from fastgen.device import choose_device, device_kind
from fastgen.distributed import Group, joined, started_by_launcher
from fastgen.environment import device_name
from fastgen.errors import Diverged, Stopped, UserError, command
from fastgen.launch import exit_code_for, exit_hard, launch, processes_wanted
from fastgen.lookup import find_teacher, require_teachers, teacher_weights
from fastgen.nodes import Node, find_node, nodes_folder, open_node
from fastgen.plan import Generation, describe, make_plan
from fastgen.progress import PatientConsole
from fastgen.recipe import read_recipe
from fastgen.record import Recorder, RunFolder, open_run, run_dir
from fastgen.results import Results
from fastgen.shapes import part_shapes
from fastgen.stop import StopRequest
from fastgen.tables import confidence_table, error_table, print_table
from fastgen.teaching import told_stores
from fastgen.trainer import train_generation
from fastgen.trial import require_named, require_usable
from fastgen.workbench import Workbench

# Told by the command to the processes that it starts: its time.monotonic() in seconds.
BEGAN = "FASTGEN_BEGAN_SECONDS"

Plan = tuple[Generation, ...]


def main(words: Sequence[str]) -> None:
    """The command. Several processes are started where the machine has several GPUs, or the recipe asks for them."""
    launched = started_by_launcher(os.environ)
    # Processes that are started again count from the begin of the command.
    began = float(os.environ.get(BEGAN, time.monotonic())) if launched else time.monotonic()
    recipe = read_recipe(words)
    if not launched and not recipe.run.dry:
        processes = processes_wanted(recipe)
        if processes > 1:
            os.environ[BEGAN] = str(began)
            launch(words, processes, recipe.dist.max_restarts)
            return
    with joined(recipe.dist, device_kind(recipe.run)) as group:
        train(recipe, group, words, began)


def train(recipe: Recipe, group: Group, words: Sequence[str], began: float) -> None:
    """The whole run, in one of its processes.

    Args:
        recipe: resolved.
        group: its processes.
        words: of the command line, to tell how to go on.
        began: time.monotonic() of its start, in seconds.
    """
    require_named(recipe.model.name)
    dataset = group.in_turn(lambda: open_dataset(recipe))
    plan = make_plan(recipe, dataset.train_hash, find_teacher(recipe, dataset), dataset.pixels)
    _require_one_plan(plan, group)
    if recipe.run.dry:
        if group.main:
            print(describe(plan))
            stores = told_stores(recipe, dataset, plan)
            if stores is not None:
                print(stores)
        return
    part_shapes(recipe, dataset, group.share)
    # A teacher that the recipe names may be another network.
    taught = any(generation.train and generation.members for generation in plan)
    group.in_turn(lambda: require_usable(recipe, dataset, group.world, taught=taught) if group.main else None)
    device = choose_device(recipe.run, group.local_rank if group.world > 1 else None)
    _require_kernels(recipe, device)
    group.in_turn(lambda: require_teachers(recipe, plan))
    minutes = recipe.run.stop_after_minutes
    with ExitStack() as held:
        stop = held.enter_context(StopRequest(None if minutes is None else began + 60 * minutes))
        folder = group.in_turn(
            lambda: (
                held.enter_context(open_run(recipe, plan, device, group.world, stop.check))
                if group.main
                else RunFolder(run_dir(recipe))
            )
        )
        console = PatientConsole(quiet=not group.main)
        untrained = group.agree(_untrained(recipe, plan))
        recorder = Recorder(folder.path if group.main else None, console, untrained, plan[-1].index)
        held.callback(recorder.close)
        try:
            recorder.say(f"{folder.path}  {recipe.model.name} on {recipe.data.dataset}, {_where(device, group)}")
            _run(recipe, dataset, plan, device, folder, recorder, stop, group)
        except Stopped as stopped:
            recorder.event("stopped", reason=str(stopped))
            recorder.end_generation()
            recorder.say(f"saved; resume with: {_command(words)}")
            raise
        except torch.OutOfMemoryError as full:
            raise MemoryError(str(full).splitlines()[0]) from None
        except RuntimeError as error:
            # How torch's allocator of the CPU's memory says it.
            if "can't allocate memory" not in str(error):
                raise
            raise MemoryError(str(error).splitlines()[0]) from None
        except Diverged as diverged:
            recorder.event("diverged", reason=str(diverged), step=diverged.step, ids=diverged.ids)
            raise


def _tell_taken_over(recorder: Recorder, recipe: Recipe, generation: Generation, node: Node, group: Group) -> None:
    recorder.say(f"generation {generation.index} ({generation.node}) is trained already")
    before = node.facts()["training"].get("processes", group.world)
    if before != group.world and recipe.dist.batchnorm == "local":
        # Its name does not tell: how many there are is of the machine, not of the recipe.
        recorder.say(
            f"generation {generation.index} was trained by {before} process{'es' if before > 1 else ''}, not "
            f"{group.world}: its batch-norm saw other parts of a batch (dist.batchnorm=synchronised sees whole batches)"
        )


def _run(
    recipe: Recipe,
    dataset: Dataset,
    plan: Plan,
    device: torch.device,
    folder: RunFolder,
    recorder: Recorder,
    stop: StopRequest,
    group: Group,
) -> None:
    shared = _with_own_workers(recipe, group)
    train_loader = build_loader(shared, dataset, dataset.train, device)
    evaluation_loader = build_loader(shared, dataset, dataset.evaluation, device)
    bench = Workbench(recipe, dataset, device, train_loader, evaluation_loader, recorder, stop, group)
    results = Results(bench)
    recorder.event("run_begin", plan=[generation.node for generation in plan], processes=group.world)
    for generation in plan:
        node = _node_of(recipe, generation)
        # The main process has looked: a file system that hosts share may show it late to the others.
        if not group.agree(node is not None):
            recorder.say(
                f"generation {generation.index} ({generation.node}) is not trained and not needed here: left out"
            )
            continue
        node = node or Node(nodes_folder(recipe) / generation.node)
        if group.main:
            folder.link(generation, node)
        if group.agree(node.finished):
            _tell_taken_over(recorder, recipe, generation, node, group)
        else:
            weights = teacher_weights(recipe, generation) if group.main else ()
            train_generation(bench, generation, node, group.agree(weights))
        row = results.add(generation, node)
        recorder.event("result", **row)
        if group.main:
            folder.write_results(results.as_dict())
        bench.check_stop()
    recorder.event("run_end")
    if group.main:
        print_table(error_table(results.as_dict()))
        print_table(confidence_table(results.as_dict()))
        print(f"{folder.path / 'results.json'}")


def _require_one_plan(plan: Plan, group: Group) -> None:
    """Processes of several hosts may have been given other recipes, or see other data."""
    nodes = group.gather([generation.node for generation in plan])
    others = [rank for rank, own in enumerate(nodes) if own != nodes[0]]
    if others:
        raise UserError(
            f"process {others[0]} of {group.world} has another recipe or other data than process 0: give all of them "
            "the same words, and the same files"
        )


def _command(words: Sequence[str]) -> str:
    """How to go on: with the command, or with whatever else started this process."""
    ours = BEGAN in os.environ or not started_by_launcher(os.environ)
    return f"{'python' if ours else 'the same torchrun'} -m fastgen.train {shlex.join(words)}"


def _with_own_workers(recipe: Recipe, group: Group) -> Recipe:
    """Processes of one machine share its cores."""
    if group.world == 1 or recipe.data.workers is not None:
        return recipe
    workers = max(1, usable_cores() // group.local_world)
    return replace(recipe, data=replace(recipe.data, workers=workers))


def _where(device: torch.device, group: Group) -> str:
    processes = f"{group.world} processes, " if group.world > 1 else ""
    return f"{processes}{device_name(device)}"


def _node_of(recipe: Recipe, generation: Generation) -> Node | None:
    """The node to train into or to take; None: not trained, and this run may not train it."""
    look = open_node if generation.train else find_node
    return look(nodes_folder(recipe), generation.node)


def _require_kernels(recipe: Recipe, device: torch.device) -> None:
    """Triton's kernels must be able to run before anything is begun."""
    for key in ("kernels", "batchnorm"):
        if getattr(recipe.train, key) == "triton":
            from fastgen.kernels.runtime import require_runnable

            require_runnable(device, f"train.{key}")


def _untrained(recipe: Recipe, plan: Plan) -> list[int]:
    return [g.index for g in plan if g.train and find_node(nodes_folder(recipe), g.node) is None]


if __name__ == "__main__":
    code = exit_code_for(command(main, sys.argv[1:]), os.environ)
    if started_by_launcher(os.environ):
        exit_hard(code)
    sys.exit(code)
