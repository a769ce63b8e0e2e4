"""The command: trains a recipe several times, with another seed each, side by side on one device.

python -m fastgen.repeat --cfg rcp/c100_r20_gen.yaml --seeds=0,1,2 [--at_once=3] [--section.key=value ...]

A small network leaves most of a GPU idle, and a claim needs more than one seed. Each repeat is `fastgen.train` in a
process of its own, with the run folder that its recipe has by default; the same command goes on where they were. On a
CPU the repeats share the cores: with another --at_once they sum in another order, and end with other last bits.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from fastgen.arguments import Arguments, at_least_one, split_words
from fastgen.config import Recipe
from fastgen.crew import Crew, Ended
from fastgen.data import open_dataset
from fastgen.device import choose_device
from fastgen.errors import FastgenError, UserError, command
from fastgen.lookup import find_teacher
from fastgen.nodes import read_json
from fastgen.plan import Generation, describe, make_plan
from fastgen.recipe import help_text, parse_words, read_recipe
from fastgen.record import read_events, run_dir
from fastgen.spread import spread_of
from fastgen.stop import StopRequest
from fastgen.tables import new_table, print_table
from fastgen.trainings import POLL_SECONDS

OWN_WORDS = ("--seeds", "--at_once")
PROGRESS_EVENTS = ("generation_begin", "step", "epoch")


class RepeatsFailed(FastgenError):
    """Repeats that ended with an error of their own; told line by line before."""


@dataclass(frozen=True)
class Repeat:
    """One training of the recipe.

    Attributes:
        seed: run.seed.
        recipe: resolved.
        words: command line of `fastgen.train`.
    """

    seed: int
    recipe: Recipe
    words: tuple[str, ...]

    @property
    def name(self) -> str:
        """See `Task`."""
        return f"seed {self.seed}"

    @property
    def folder(self) -> Path:
        """The run folder."""
        return run_dir(self.recipe)


@dataclass(frozen=True)
class Session:
    """What this command did.

    Attributes:
        ended: the repeats whose processes were started, in the order of their ends.
        full_from, full_until: seconds since 1970 between which as many repeats ran at the same time as may: from the
            first start to the first end after which none was left to start.
    """

    ended: tuple[Ended[Repeat], ...]
    full_from: float
    full_until: float


def make_repeats(seeds: Sequence[int], words: Sequence[str]) -> list[Repeat]:
    """One repeat a seed.

    Args:
        seeds: no two alike.
        words: of the command line; the recipe's alone.

    Raises:
        UserError: the recipe or an override is wrong, or repeats would share a run folder.
    """
    given = parse_words(words).overrides
    if "run.dir" in given:
        raise UserError(
            f"--run.dir={given['run.dir']}: repeats cannot share a run folder: leave it out, and each gets its own"
        )
    if "run.seed" in given:
        raise UserError(f"--run.seed={given['run.seed']}: --seeds gives every repeat its own: leave it out")
    repeats = []
    for seed in seeds:
        its_words = (*words, f"--run.seed={seed}")
        if read_recipe(its_words).dist.processes is None:
            # Repeats lie side by side on one device: none of them takes the others.
            its_words = (*words, "--dist.processes=1", f"--run.seed={seed}")
        repeats.append(Repeat(seed, read_recipe(its_words), its_words))
    for one, other in itertools.combinations(repeats, 2):
        if one.folder == other.folder:
            raise UserError(
                f"seeds {one.seed} and {other.seed} would share {one.folder}: take run.dir out of the recipe, "
                "and leave run.init_seed or data.seed free to follow run.seed"
            )
    return repeats


def make_plans(repeats: Sequence[Repeat]) -> list[tuple[Generation, ...]]:
    """What each repeat will train. Opens the data once, so that missing files are told, or fetched, once.

    Raises:
        UserError: the data or a named teacher is missing, damaged, or does not fit.
    """
    dataset = open_dataset(repeats[0].recipe)
    return [
        make_plan(repeat.recipe, dataset.train_hash, find_teacher(repeat.recipe, dataset), dataset.pixels)
        for repeat in repeats
    ]


def threads_each(device: torch.device, at_once: int) -> int | None:
    """Threads that each process shall use; None: what torch chooses, or what OMP_NUM_THREADS says already."""
    if device.type != "cpu" or at_once == 1 or "OMP_NUM_THREADS" in os.environ:
        return None
    return max(1, len(os.sched_getaffinity(0)) // at_once)


def run_repeats(repeats: Sequence[Repeat], at_once: int, threads: int | None, stop: StopRequest) -> Session:
    """Runs all repeats, as many at the same time as may; on a signal, stops those that run and starts no more.

    Args:
        repeats: in the order in which they are started.
        at_once: processes at the same time; not more than there are repeats.
        threads: of each process; None leaves them alone.
        stop: asked for signals.
    """
    environment = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    waiting, crew, ended = deque(repeats), Crew[Repeat](), list[Ended[Repeat]]()
    full_from, full_until = time.time(), None
    try:
        while (waiting or crew) and not stop.requested:
            while waiting and len(crew) < at_once:
                crew.start(waiting.popleft(), environment)
            if len(crew) < at_once and full_until is None:
                full_until = time.time()
            ended += crew.reap()
            time.sleep(POLL_SECONDS)
    finally:
        crew.stop()
    ended += crew.reap()
    return Session(tuple(ended), full_from, time.time() if full_until is None else full_until)


def trained_images(events: Sequence[Mapping[str, Any]], images: int, batch_size: int, until: float) -> int:
    """Student images that a run has trained on, by its last line before a point in time.

    Args:
        events: of a run that was begun afresh.
        images: training images an epoch.
        batch_size: of all steps but an epoch's last.
        until: seconds since 1970.
    """
    seen = [event for event in events if event["event"] in PROGRESS_EVENTS and event["time"] <= until]
    steps = {event["generation"]: event["step"] for event in seen}
    steps_per_epoch = -(-images // batch_size)
    rounds = [divmod(step, steps_per_epoch) for step in steps.values()]
    return sum(epochs * images + rest * batch_size for epochs, rest in rounds)


def total_speed(session: Session, begun: Sequence[int], at_once: int) -> str:
    """A line that tells the images/s of all repeats together, or why they are not measured.

    Student images of all repeats by the end of the time in which the device was full, over that time: the start of
    the processes, warm-up, evaluation and saving included; what the slower repeats do afterwards left out of both.

    Args:
        session: what this command did.
        begun: seeds whose run folders were there before.
        at_once: processes at the same time.
    """
    failed = [ended.task.seed for ended in session.ended if ended.code != 0]
    for seeds, why in ((failed, "not all repeats ended well"), (begun, "repeats were begun before this command")):
        if seeds:
            return f"all repeats together: images/s not measured: {why} (seeds {_listed(seeds)})"
    total = 0
    for ended in session.ended:
        events, results = list(read_events(ended.task.folder)), read_json(ended.task.folder / "results.json")
        afresh = {e["generation"] for e in events if e["event"] == "generation_begin" and e["step"] == 0}
        if {row["generation"] for row in results["generations"]} != afresh:
            return f"all repeats together: images/s not measured: seed {ended.task.seed} took generations over"
        batch_size = ended.task.recipe.train.batch_size
        total += trained_images(events, results["train_images"], batch_size, session.full_until)
    seconds = session.full_until - session.full_from
    return (
        f"all repeats together: {total / seconds:,.0f} images/s ({total:,} student images in {seconds:,.1f} s, "
        f"{at_once} at once, from the first start to the first end that left a place empty; start-up, evaluation "
        "and saving included)"
    )


def repeats_table(name: str, results: Mapping[int, Mapping[str, Any]]) -> Table:
    """Mean and standard deviation over the seeds, a row a generation.

    Args:
        name: of the recipe.
        results: seed -> content of results.json.
    """
    seeds, all_rows = list(results), [row for found in results.values() for row in found["generations"]]
    samples = " and ".join(f"{count:,}" for count in sorted({row["samples_evaluated"] for row in all_rows}))
    evaluated_on = results[seeds[0]]["evaluated_on"]
    title = (
        f"{name}, seeds {_listed(seeds)}: errors in percent of {samples} {evaluated_on} images, "
        f"mean and standard deviation (n - 1) of {len(seeds)} repeats"
    )
    table = new_table(title, ("generation", "top-1", "deviation", "ensemble top-1", "deviation", "repeats"))
    for generation in sorted({row["generation"] for row in all_rows}):
        rows = [row for row in all_rows if row["generation"] == generation]
        errors = (mean_and_deviation([row[key] for row in rows]) for key in ("top1_error", "ensemble_top1_error"))
        table.add_row(f"{generation} {rows[0]['role']}", *itertools.chain(*errors), str(len(rows)))
    return table


def mean_and_deviation(values: Sequence[float | None]) -> tuple[str, str]:
    """Both with two digits; `-` where a value is not known, and for the deviation of a single one."""
    known = [value for value in values if value is not None]
    found = spread_of(known)
    if found is None or found.count < len(values):
        return "-", "-"
    return f"{found.mean:.2f}", "-" if found.deviation is None else f"{found.deviation:.2f}"


def main(words: Sequence[str]) -> None:
    """The command.

    Raises:
        UserError: words, recipe or data are wrong; nothing was started.
        Stopped: a signal came; the running repeats have saved and ended.
        RepeatsFailed: a repeat failed; the others ran all the same.
    """
    if {"--help", "-h"} & set(words):
        print(f"{_parser().format_help()}\n{help_text('python -m fastgen.repeat --seeds=0,1,2')}")
        return
    own, rest = split_words(words, OWN_WORDS)
    options = _parser().parse_args(own)
    repeats = make_repeats(options.seeds, rest)
    plans = make_plans(repeats)
    if repeats[0].recipe.run.dry:
        for repeat, plan in zip(repeats, plans, strict=True):
            print(f"seed {repeat.seed}: {repeat.folder}\n{describe(plan)}")
        return
    device = choose_device(repeats[0].recipe.run)
    at_once = min(options.at_once or (len(repeats) if device.type == "cuda" else 1), len(repeats))
    threads = threads_each(device, at_once)
    _announce(repeats, at_once, threads, device)
    begun = [repeat.seed for repeat in repeats if (repeat.folder / "events.jsonl").exists()]
    with StopRequest() as stop:
        session = run_repeats(repeats, at_once, threads, stop)
        if stop.requested:
            print(f"go on with: python -m fastgen.repeat {shlex.join(words)}", flush=True)
        stop.check()
    done = sorted((one.task for one in session.ended if one.code == 0), key=repeats.index)
    if done:
        results = {repeat.seed: read_json(repeat.folder / "results.json") for repeat in done}
        print_table(repeats_table(_name(rest), results))
    print(total_speed(session, begun, at_once))
    failed = [f"seed {one.task.seed} {one.how}" for one in session.ended if one.code != 0]
    if failed:
        raise RepeatsFailed(f"{len(failed)} of {len(repeats)} repeats failed: {', '.join(failed)}")


def _announce(repeats: Sequence[Repeat], at_once: int, threads: int | None, device: torch.device) -> None:
    where = "the GPU" if device.type == "cuda" else "the CPU"
    shared = "" if threads is None else f", threads of each: {threads}"
    print(f"{len(repeats)} repeats, {at_once} at once on {where}{shared} (--at_once sets how many)")
    for repeat in repeats:
        print(f"seed {repeat.seed}: {repeat.folder}", flush=True)


def _name(words: Sequence[str]) -> str:
    return parse_words(words).cfg.stem


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def _seeds(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isascii() and word.isdigit() for word in words):
        raise argparse.ArgumentTypeError(f"'{text}' is no list of whole numbers such as 0,1,2")
    seeds = [int(word) for word in words]
    for seed in seeds:
        if seeds.count(seed) > 1:
            raise argparse.ArgumentTypeError(f"{seed} stands twice: keep one")
    return seeds


def _parser() -> Arguments:
    parser = Arguments("fastgen.repeat", "Trains a recipe with several seeds, side by side on one device.")
    parser.add_argument("--seeds", type=_seeds, required=True, help="run.seed of each repeat, such as 0,1,2")
    parser.add_argument(
        "--at_once", type=at_least_one, help="processes at the same time; default all of them on a GPU, 1 on a CPU"
    )
    return parser


if __name__ == "__main__":
    sys.exit(command(main, sys.argv[1:]))
