"""Processes agree on when to save and when to stop, without waiting for each other or for a device in every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fastgen.distributed import Group
from fastgen.errors import Stopped
from fastgen.stop import StopRequest


class Wish(NamedTuple):
    """What is asked for.

    Attributes:
        stop: number of the signal that asks for a stop; 0: none.
        save: whether it is time for a checkpoint.
    """

    stop: int
    save: bool


class Pulse:
    """Signals and clocks reach processes at different steps; what one of them wishes, all do, after the same step.

    Each process tells its wishes after each of its steps and goes on; the answer, which is on its way meanwhile, is
    taken up one step later. With one process it is there at once.

    Args:
        group: of the run.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._answer: Callable[[], list[int]] | None = None

    def beat(self, wish: Wish) -> Wish:
        """Tells what this process wishes after a step; gives what all do now."""
        if self._group.world == 1:
            return wish
        answer, self._answer = self._answer, self._group.ask_most(wish)
        return Wish(0, False) if answer is None else _read(answer)

    def now(self, wish: Wish) -> Wish:
        """As `beat`, and waits for the answer: at the end of an epoch, where processes wait for each other anyway."""
        earlier, self._answer = self._answer, None
        found = _read(self._group.ask_most(wish))
        if earlier is None:
            return found
        before = _read(earlier)
        return Wish(max(before.stop, found.stop), before.save or found.save)


class StopsOfAll:
    """Signals to any process end what the main one does alone, while the others wait for it.

    Args:
        group: of the run.
        stop: of this process.
    """

    def __init__(self, group: Group, stop: StopRequest) -> None:
        self._group = group
        self._stop = stop

    def check(self) -> None:
        """For the main process, from time to time: raises Stopped in all if a signal came to one of them."""
        self._ask(done=False)

    def end(self) -> None:
        """For the main process, at the end: the others go on."""
        self._ask(done=True)

    def wait(self) -> None:
        """For the others: until the end, or until Stopped is raised in all."""
        while not self._ask(done=False):
            pass

    def _ask(self, *, done: bool) -> bool:
        number, ended = self._group.most([self._stop.number, int(done)])
        if number:
            raise Stopped(number)
        return bool(ended)


def _read(answer: Callable[[], list[int]]) -> Wish:
    stop, save = answer()
    return Wish(stop, bool(save))
