"""The faults that `benchmarks.soak` tries, and how often."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random

from benchmarks import soak_kills, soak_places, soak_stops
from benchmarks.soak_runs import Case, Outcome, Rig

Trial = Callable[[Case], Outcome]
Make = Callable[[Rig, int, Random], Case]


def digits(*decisive: str) -> Make:
    """Trials of a network on digits."""
    return lambda rig, processes, draw: rig.case(processes, draw, *decisive)


def photographs(rig: Rig, processes: int, draw: Random) -> Case:
    """Trials of a network on files of pictures."""
    recipe, where = soak_places.photographs(rig)
    return rig.case(processes, draw, where, recipe=recipe)


@dataclass(frozen=True)
class Fault:
    """One way in which things fail.

    Attributes:
        name: of the fault.
        processes: of the run.
        count: how often it is tried in full.
        seconds: that one of them takes, roughly, of two cores; for the time left.
        trial: disturbs one training, and raises Lost if anything is lost.
        make: the training.
    """

    name: str
    processes: int
    count: int
    seconds: float
    trial: Trial
    make: Make = digits()


SHORT = digits(*soak_kills.ONE_EPOCH)
FAULTS = (
    Fault("kill -9", 1, 54, 2, soak_kills.kill_one),
    Fault("kill -9 in a save", 1, 40, 2, soak_kills.kill_in_save, SHORT),
    Fault("signal", 1, 12, 3, soak_stops.stop),
    Fault("time is over", 1, 8, 1, soak_stops.out_of_time),
    Fault("full disk", 1, 6, 3, soak_places.full_disk),
    Fault("read-only folder", 1, 1, 1, soak_places.read_only),
    Fault("checkpoint cut", 1, 30, 1, soak_places.cut),
    Fault("checkpoint's bit flipped", 1, 80, 1, soak_places.flip),
    Fault("picture gone", 1, 2, 20, soak_places.vanish, photographs),
    Fault("loss is not finite", 1, 2, 2, soak_places.diverge, digits("--train.lr=1e30")),
    Fault("second command", 1, 4, 3, soak_stops.start_second),
    Fault("1, 2, 1 processes", 1, 4, 6, soak_stops.other_processes),
    Fault("kill -9 of a rank, started again", 2, 8, 15, partial(soak_kills.kill_rank, restarts=3)),
    Fault("kill -9 of a rank", 2, 7, 16, partial(soak_kills.kill_rank, restarts=0)),
    Fault("kill -9 of the launcher", 2, 4, 16, soak_kills.kill_launcher),
    Fault("kill -9 of a rank in a save", 2, 5, 13, soak_kills.kill_rank_in_save, SHORT),
    Fault("signal", 2, 5, 16, soak_stops.stop),
    Fault("SIGTERM to a rank", 2, 3, 16, soak_stops.stop_rank),
    Fault("time is over", 2, 3, 8, soak_stops.out_of_time),
    Fault("full disk", 2, 3, 15, soak_places.full_disk),
    Fault("read-only folder", 2, 1, 6, soak_places.read_only),
    Fault("picture gone", 2, 2, 40, soak_places.vanish, photographs),
    Fault("loss is not finite", 2, 1, 12, soak_places.diverge, digits("--train.lr=1e30")),
    Fault("second command", 2, 2, 14, soak_stops.start_second),
    Fault("hanging rank", 2, 1, 90, partial(soak_stops.hang, restarts=0)),
    Fault("hanging rank, started again", 2, 1, 90, partial(soak_stops.hang, restarts=1)),
)
