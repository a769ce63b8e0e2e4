"""Kills, for `benchmarks.soak`: of a run of one process, of one of two, of their launcher, in the middle of a save."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Sequence
from functools import partial

from benchmarks.soak_ranks import die_at
from benchmarks.soak_runs import Case, Outcome
from benchmarks.soak_sessions import POLL_SECONDS, Session, alive, demand, ranks, send
from fastgen import train, trainings
from fastgen.launch import launch

# Calls of `os` that one epoch of each of two generations makes with a checkpoint after every step: a save calls replace
# once and fsync twice, and unlink where it makes an older one superfluous.
ONE_EPOCH = ("--train.epochs=1",)
EVERY_STEP = "--run.save_minutes=0"
SAVING = {"replace": 36, "fsync": 70, "unlink": 20}
# What the grace does not count: two processes that notice, and a machine that is busy.
SLACK_SECONDS = 20.0
# Of a kill of a rank or a launcher, so many fall before the run has begun.
BEFORE = 0.2


def kill_one(case: Case) -> Outcome:
    """A run of one process is killed at random instants, three times at most, and resumed until it ends."""
    kills = 0
    while kills < 3:
        session = case.begin()
        if not case.instant(session, before=0.1):
            break
        kills += session.signal(signal.SIGKILL)
        session.wait()
    case.resume()
    return Outcome("exit 137", "", case.compare(), kills)


def kill_rank(case: Case, restarts: int) -> Outcome:
    """One of the processes is killed: all are started again, or the command ends and is called again."""
    session = case.begin(f"--dist.max_restarts={restarts}")
    rank = case.draw.randrange(case.processes)
    found = _ranks_at_an_instant(case, session)
    sent = rank in found and send(found[rank], signal.SIGKILL)
    ended = session.wait()
    killed = sent and bool(ended.code or ended.err)
    demand(killed or not sent or case.ended(), f"process {rank} was killed, and nobody noticed")
    if killed:
        named = f"process {rank} of {case.processes} was killed by SIGKILL"
        demand(named in ended.line, f"the killed process {rank} is not named: {ended.line}")
    if not restarts:
        demand(ended.code == int(killed), f"exit code {ended.code} after a rank was killed: {ended.err}")
        case.resume()
    else:
        demand(ended.code == 0, f"exit code {ended.code} although it may start again: {ended.err}")
    return Outcome(f"exit {ended.code}", ended.err, case.compare(), int(killed))


def kill_launcher(case: Case) -> Outcome:
    """The launcher is killed: its processes save and end by themselves, and leave no lock behind."""
    session = case.begin()
    found = _ranks_at_an_instant(case, session)
    killed = session.signal(signal.SIGKILL)
    session.wait()
    began = time.monotonic()
    while any(map(alive, found.values())):
        waited = time.monotonic() - began
        demand(waited < trainings.GRACE_SECONDS + SLACK_SECONDS, f"a process still lives {waited:.0f} s later")
        time.sleep(POLL_SECONDS)
    gone_seconds = time.monotonic() - began
    case.resume()
    told = f"the others were gone within {gone_seconds:.0f} s" if killed else ""
    return Outcome("exit 137", told, case.compare(), int(killed))


def kill_in_save(case: Case) -> Outcome:
    """A run of one process is killed right before one of the system calls that saving is made of."""
    name = case.draw.choice(list(SAVING))
    call = case.draw.randint(1, SAVING[name])
    ended = case.start(EVERY_STEP, program=partial(train_dying, name, call)).wait()
    killed = ended.code == -signal.SIGKILL
    demand(killed or ended.code == 0, f"exit code {ended.code}: {ended.err}")
    case.resume(EVERY_STEP)
    return Outcome("exit 137", "", case.compare(), int(killed))


def kill_rank_in_save(case: Case) -> Outcome:
    """Of several processes the one that saves is killed there."""
    name = case.draw.choice(list(SAVING))
    when = f"0:{name}:{case.draw.randint(1, SAVING[name])}"
    ended = case.start(EVERY_STEP, program=partial(launch_dying, when, case.processes)).wait()
    killed = ended.code != 0
    if killed:
        demand(ended.code == 1, f"exit code {ended.code} after a rank was killed: {ended.err}")
        named = re.search(r"process 0 of \d+ was killed by SIGKILL", ended.line)
        demand(named is not None, f"the killed process is not named: {ended.line}")
    case.resume(EVERY_STEP)
    return Outcome(f"exit {ended.code}", ended.err, case.compare(), int(killed))


def train_dying(name: str, call: int, words: Sequence[str]) -> None:
    """What a session runs that is killed before the given call."""
    die_at(name, call)
    train.main(words)


def launch_dying(when: str, processes: int, words: Sequence[str]) -> None:
    """What a session runs one of whose processes is killed; see `soak_ranks.main`."""
    launch([when, *words], processes, 0, module="benchmarks.soak_ranks")


def _ranks_at_an_instant(case: Case, session: Session) -> dict[int, int]:
    """Waits until a random instant of the processes' lives; gives them, none where the command has ended."""
    session.wait_until(lambda: len(ranks(session.pid)) == case.processes, "a process of the run")
    found = ranks(session.pid)
    return found if case.instant(session, BEFORE) else {}
