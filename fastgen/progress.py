"""What the person sees while a generation trains: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table

from fastgen.meters import Reading

PLAIN_SECONDS = 15.0


@dataclass(frozen=True)
class Leg:
    """One generation, as the display needs to know it.

    Attributes:
        index, last_index: of this generation and of the run's last one.
        role: `patriarch`, `student` or `independent`.
        first_step, total_steps: where this session begins, and how long the generation is.
        steps_per_epoch: to tell the epoch.
        images: training images an epoch.
        generations_left: still to be trained after this one.
    """

    index: int
    last_index: int
    role: str
    first_step: int
    total_steps: int
    steps_per_epoch: int
    images: int
    generations_left: int


class PatientConsole(Console):
    """A console whose reader may go away (`| head`): the training goes on, unseen."""

    def on_broken_pipe(self) -> None:
        """Called by rich, whose own ends the process in the middle of a step."""
        self.quiet = True


def counted(passed: Callable[[int], None]) -> Callable[[], None]:
    """From what is told how many are done, as `Display.passes` yields it: what is told of each one."""
    done = 0
    passed(done)

    def one_more() -> None:
        nonlocal done
        done += 1
        passed(done)

    return one_more


class Display:
    """Shows one generation at a time.

    Args:
        console: where to; a console that is no terminal gets plain lines.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None

    def begin(self, leg: Leg) -> None:
        """Starts a generation."""
        self._leg, self._step = leg, leg.first_step
        self._started = self._printed = time.monotonic()
        self._latest = self._lr = ""
        if self._console.is_terminal:
            self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4, transient=True)
            self._live.start()

    def stepped(self, step: int) -> None:
        """Notes a finished step; costs nothing and does not wait for the device."""
        self._step = step

    def log(self, reading: Reading, lr: float) -> None:
        """Notes what was read from the device, and prints a plain line where it is time for one."""
        self._latest = f"loss {reading.loss:.3f}  accuracy {100 * reading.accuracy:.1f} %"
        self._lr = f"  lr {lr:g}"
        done = self._step >= self._leg.total_steps
        if done or (self._live is None and time.monotonic() - self._printed >= PLAIN_SECONDS):
            self._printed = time.monotonic()
            self.say("  ".join((self._where(), self._how())))

    def end(self) -> None:
        """Ends a generation, also one that was broken off."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    @contextmanager
    def passes(self, what: str, total: int, images: int, unit: str = "images") -> Iterator[Callable[[int], None]]:
        """Shows work of `total` passes over so many images each; yields what is told how many are done.

        The first number that it is told is where this session begins.
        """
        console = self._console
        bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        task = bar.add_task(what, total=total, rate="")
        first, started, printed = -1, time.monotonic(), time.monotonic()

        def passed(done: int) -> None:
            nonlocal first, printed
            first = done if first < 0 else first
            seconds = max(time.monotonic() - started, 1e-9)
            rate = (done - first) / seconds
            speed = rate * images
            text = f"{speed:,.{0 if speed >= 10 else 1}f} {unit}/s"
            bar.update(task, completed=done, rate=text)
            if not console.is_terminal and (done == total or time.monotonic() - printed >= PLAIN_SECONDS):
                printed = time.monotonic()
                left = _clock((total - done) / rate if rate else None)
                self.say(f"{what}: {done} of {total}  {text}  left {left}")

        with bar:
            yield passed

    def say(self, text: str) -> None:
        """Prints a line beside the progress."""
        self._console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def _rate(self) -> float:
        """Steps a second of this session, evaluations and savings included."""
        return (self._step - self._leg.first_step) / max(time.monotonic() - self._started, 1e-9)

    def _where(self) -> str:
        leg = self._leg
        epochs = -(-leg.total_steps // leg.steps_per_epoch)
        epoch = min(self._step // leg.steps_per_epoch + 1, epochs)
        return f"generation {leg.index}/{leg.last_index} {leg.role}  epoch {epoch}/{epochs}{self._lr}"

    def _how(self) -> str:
        leg, rate = self._leg, self._rate()
        images_per_second = rate * leg.images / leg.steps_per_epoch
        left = (leg.total_steps - self._step) / rate if rate else None
        run = None if left is None else left + leg.generations_left * leg.total_steps / rate
        return f"{images_per_second:,.0f} images/s  {self._latest}  left {_clock(left)} (run about {_clock(run)})"

    def _render(self) -> Table:
        grid = Table.grid(padding=(0, 1))
        grid.add_row(ProgressBar(total=self._leg.total_steps, completed=self._step, width=32), self._where())
        whole = Table.grid()
        whole.add_row(grid)
        whole.add_row(self._how())
        return whole


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
