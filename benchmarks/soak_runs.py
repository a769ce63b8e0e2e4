"""What `benchmarks.soak` disturbs: small trainings, and how what they leave is compared with an undisturbed one."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT
from benchmarks.soak_sessions import Program, Session, demand
from fastgen import train
from fastgen.errors import MachineError
from fastgen.nodes import read_json
from fastgen.record import read_events

PRELOAD = [
    "fastgen.train",
    "torch.distributed.launcher.api",
    "torch.utils.tensorboard",
    "sklearn.datasets",
    "benchmarks.soak_faults",
]
# Every step is told, so that what is taken again can be counted; a checkpoint every eighth of a second.
DIGITS = """
data: {dataset: digits, train_limit: 640}
model: {name: resnet8}
train: {epochs: EPOCHS, batch_size: 64, lr: 0.1}
gen: {generations: 1, k: 3, confidence: 0.6, teacher_weight: 0.6}
run: {save_minutes: 0.002, eval_every_epochs: 0, log_every_steps: 1, device: cpu}
"""
STEPS_PER_EPOCH = 10
GENERATIONS = 2


@dataclass(frozen=True)
class Fingerprint:
    """What a finished run leaves: equal only for the same training.

    Attributes:
        weights: SHA-256 of each generation's file.
        history: a row of JSON an epoch, by generation.
        errors: the ensemble's, by generation.
    """

    weights: tuple[str, ...]
    history: tuple[tuple[str, ...], ...]
    errors: tuple[str, ...]


def fingerprint(run: Path) -> Fingerprint:
    """Reads a finished run's folder."""
    nodes = [run / f"generation_{generation}" for generation in range(GENERATIONS)]
    missing = [node.name for node in nodes if not (node / "node.json").exists()]
    demand(not missing, f"not trained, although the run ended well: {', '.join(missing)}")
    return Fingerprint(
        tuple(hashlib.sha256((node / "model.safetensors").read_bytes()).hexdigest() for node in nodes),
        tuple(tuple(map(json.dumps, read_json(node / "node.json")["training"]["history"])) for node in nodes),
        tuple(json.dumps(row["ensemble_top1_error"]) for row in read_json(run / "results.json")["generations"]),
    )


def differences(found: Fingerprint, expected: Fingerprint) -> list[str]:
    """In words, where two runs differ; none: nothing was lost."""
    told = []
    for name in ("weights", "history", "errors"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        if len(ours) != len(theirs):
            told.append(f"{name} of {len(ours)} generations, not {len(theirs)}")
        told += [
            f"other {name} in generation {generation}"
            for generation, (one, two) in enumerate(zip(ours, theirs, strict=False))
            if one != two
        ]
    return told


@dataclass(frozen=True)
class Resumption:
    """A generation that went on: after so many steps were seen, at such a step."""

    generation: int
    seen: int
    begun: int


def resumptions(events: Sequence[Mapping[str, Any]]) -> list[Resumption]:
    """Every time that a training went on, by the events of its run."""
    seen: dict[int, int] = {}
    found = []
    for event in events:
        if event["event"] == "generation_begin":
            generation = event["generation"]
            if generation in seen:
                found.append(Resumption(generation, seen[generation], event["step"]))
            seen[generation] = event["step"]
        elif event["event"] == "step":
            seen[event["generation"]] = event["step"]
    return found


def steps_again(run: Path) -> int:
    """Steps of a run that had to be taken twice.

    Raises:
        Lost: some were left out.
    """
    found = resumptions(list(read_events(run)))
    for one in found:
        demand(
            one.begun <= one.seen,
            f"generation {one.generation} went on at step {one.begun}, and no step after {one.seen} was seen",
        )
    return sum(one.seen - one.begun for one in found)


@dataclass(frozen=True)
class Outcome:
    """What came of one trial in which nothing was lost.

    Attributes:
        end: exit code of the disturbed command, `exit 143`.
        says: what it told, in one line.
        again: steps that were taken twice.
        disturbed: how many faults there were; 0: the run ended before.
    """

    end: str
    says: str
    again: int
    disturbed: int = 1


@dataclass(frozen=True)
class Whole:
    """A run that nothing disturbed.

    Attributes:
        left: what it left.
        begin_seconds: from the start of the command to that of the run.
        seconds: of the run, from there on.
        run: its folder.
    """

    left: Fingerprint
    begin_seconds: float
    seconds: float
    run: Path


@dataclass
class Rig:
    """Where sessions are started, and the undisturbed runs with which they are compared.

    Args:
        folder: an empty one.
        epochs: of the small trainings.
    """

    folder: Path
    epochs: int = 4
    wholes: dict[tuple[tuple[str, ...], int], Whole] = field(default_factory=dict)
    numbers: int = 0

    def __post_init__(self) -> None:
        # Several threads of tiny networks on few cores wait for each other ten times longer than they work.
        os.environ["OMP_NUM_THREADS"] = "1"
        # Ranks find the packages from any folder.
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOAD)
        self.digits = self.folder / "digits.yaml"
        self.digits.write_text(DIGITS.replace("EPOCHS", str(self.epochs)))

    @property
    def steps(self) -> int:
        """Of each generation."""
        return STEPS_PER_EPOCH * self.epochs

    def case(self, processes: int, draw: random.Random, *decisive: str, recipe: Path | None = None) -> Case:
        """A training to disturb, in a folder of its own.

        Args:
            processes: it trains in.
            draw: of instants and places.
            decisive: words that belong to the recipe.
            recipe: default: the digits.
        """
        self.numbers += 1
        folder = self.folder / f"case{self.numbers}"
        folder.mkdir()
        return Case(self, folder, processes, draw, ("--cfg", str(recipe or self.digits), *decisive))

    def call(self, program: Program, words: Sequence[str]) -> None:
        """Runs another command to its end, quietly.

        Raises:
            MachineError: it failed.
        """
        session = Session(self.context, self.folder, program, words)
        ended = session.wait()
        if ended.code:
            raise MachineError(f"exit code {ended.code}: {ended.err}")

    def whole(self, base: tuple[str, ...], processes: int) -> Whole:
        """The same training, undisturbed; trained when it is asked for the first time."""
        if (base, processes) not in self.wholes:
            self.numbers += 1
            folder = self.folder / f"whole{self.numbers}"
            folder.mkdir()
            case = Case(self, folder, processes, random.Random(0), base)
            session = case.start()
            ended = session.wait()
            demand(ended.code == 0, f"the undisturbed run ended with exit code {ended.code}: {ended.err.strip()}")
            times = {event["event"]: event["time"] for event in read_events(case.run)}
            begin = times["run_begin"]
            whole = Whole(fingerprint(case.run), begin - session.started, times["run_end"] - begin, case.run)
            self.wholes[base, processes] = whole
        return self.wholes[base, processes]


@dataclass
class Case:
    """One training that is disturbed; see `Rig.case`."""

    rig: Rig
    folder: Path
    processes: int
    draw: random.Random
    base: tuple[str, ...]
    sessions: list[Session] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.run = self.folder / "run"

    @property
    def whole(self) -> Whole:
        """The same, undisturbed."""
        return self.rig.whole(self.base, self.processes)

    def start(self, *more: str, program: Program = train.main, processes: int | None = None) -> Session:
        """Starts the command; `more` are words that decide no weights."""
        several = f"--dist.processes={processes or self.processes}"
        words = [*self.base, f"--run.dir={self.run}", several, *more]
        self.sessions.append(Session(self.rig.context, self.folder, program, words))
        return self.sessions[-1]

    def begin(self, *more: str) -> Session:
        """As `start`, once it is known how long the run takes: an instant of it is drawn then."""
        demand(self.whole.seconds > 0, "the undisturbed run took no time")
        return self.start(*more)

    def begun(self, session: Session, step: int = 0, generation: int = 0) -> bool:
        """Waits until a session's run has begun, or a step was taken in it; False: it ended before."""

        def holds() -> bool:
            if not step and not generation:
                return any(event["event"] == "run_begin" for event in self._since(session))
            steps = ((event["generation"], event["step"]) for event in self._since(session) if event["event"] == "step")
            return any(taken >= (generation, step) for taken in steps)

        return session.wait_until(holds, "the begin of the run")

    def ended(self) -> bool:
        """Whether the last session came to the end of its run."""
        return any(event["event"] == "run_end" for event in self._since(self.sessions[-1]))

    def _since(self, session: Session) -> list[dict[str, Any]]:
        # Events have three digits after the point.
        return [event for event in read_events(self.run) if event["time"] >= session.started - 0.001]

    def instant(self, session: Session, before: float = 0.0) -> bool:
        """Waits until a random instant of a session; False: it has ended.

        It is drawn among the steps that are left, so that a busy machine does not move it to the end.

        Args:
            before: share of the instants that lie before the run begins.
        """
        whole, steps = self.whole, self.rig.steps
        if self.draw.random() < before:
            return session.rest(self.draw.uniform(0, whole.begin_seconds))
        taken = [
            event["generation"] * steps + event["step"] for event in read_events(self.run) if event["event"] == "step"
        ]
        last = GENERATIONS * steps - 1
        first = min(max(taken, default=0), last)
        generation, step = divmod(self.draw.randrange(first, last + 1), steps)
        # A little later: in the step that follows, in a save, or between two generations.
        later_seconds = self.draw.uniform(0, 3 * whole.seconds / (GENERATIONS * steps))
        return self.begun(session, step, generation) and session.rest(later_seconds)

    def resume(self, *more: str) -> None:
        """Goes on to the end.

        Raises:
            Lost: it does not end well.
        """
        ended = self.start(*more).wait()
        demand(ended.code == 0, f"resumed, it ended with exit code {ended.code}: {ended.err.strip()[-500:]}")

    def compare(self) -> int:
        """Compares with the undisturbed run; gives how many steps were taken twice.

        Raises:
            Lost: something differs.
        """
        differing = differences(fingerprint(self.run), self.whole.left)
        demand(not differing, "; ".join(differing))
        return steps_again(self.run)

    def close(self) -> None:
        """Ends whatever still runs."""
        for session in self.sessions:
            session.close()
