"""Stops, for `benchmarks.soak`: by signals and by the clock, of a process that hangs, and what starts beside a run."""

from __future__ import annotations

import shlex
import signal

from benchmarks.soak_runs import STEPS_PER_EPOCH, Case, Outcome, steps_again
from benchmarks.soak_sessions import Ended, demand, ranks, send
from fastgen.nodes import read_json
from fastgen.stop import heeded

MOST_SESSIONS = 12
# How far losses may part where a batch's statistics are of other parts of it: far less than a training that went wrong.
LOSS_TOLERANCE = 0.25


def stop(case: Case) -> Outcome:
    """A signal comes to the command at a random instant: it saves, and goes on at the very step at which it stopped."""
    session = case.begin()
    number = case.draw.choice(heeded())
    sent = case.instant(session) and session.signal(number)
    return _stopped(case, session.wait(), number, sent=sent)


def stop_rank(case: Case) -> Outcome:
    """SIGTERM comes to one of several processes alone: all stop after the same step."""
    session = case.begin()
    found = ranks(session.pid) if case.instant(session) else {}
    rank = case.draw.randrange(case.processes)
    sent = rank in found and send(found[rank], signal.SIGTERM)
    return _stopped(case, session.wait(), signal.SIGTERM, sent=sent)


def _stopped(case: Case, ended: Ended, number: signal.Signals, *, sent: bool) -> Outcome:
    # After the end of the run nothing listens any more.
    sent = sent and not case.ended()
    if sent:
        demand_stop(case, ended, 128 + number, f"stopped by {number.name}")
    case.resume()
    again = case.compare()
    demand(not (sent and again), f"{again} steps were taken twice after {number.name}")
    return Outcome(f"exit {ended.code}", ended.err, again, int(sent))


def demand_stop(case: Case, ended: Ended, code: int, told: str) -> None:
    """Checks how a command that was asked to stop has ended."""
    demand(ended.code == code, f"exit code {ended.code}, not {code}: {ended.err.strip()[-500:]}")
    demand(told in ended.line, f"it does not say '{told}': {ended.line}")
    resume = f"resume with: python -m fastgen.train {shlex.join(case.base)}"
    demand(resume in ended.out, f"it does not say how to resume: {ended.out[-500:]}")


def out_of_time(case: Case) -> Outcome:
    """The time of run.stop_after_minutes is over again and again, each time a little later."""
    # Several processes need some seconds before their first step.
    stops, minutes, ended = 0, 0.01 if case.processes == 1 else 0.04, Ended(-1, "", "")
    for _ in range(MOST_SESSIONS):
        ended = case.start(f"--run.stop_after_minutes={minutes:g}").wait()
        if ended.code == 0:
            break
        demand_stop(case, ended, 128 + signal.SIGALRM, "the time of run.stop_after_minutes is over")
        stops, minutes, last = stops + 1, 2 * minutes, ended
    demand(ended.code == 0, f"it did not end within {MOST_SESSIONS} sessions")
    again = case.compare()
    demand(not again, f"{again} steps were taken twice")
    return Outcome("exit 142", last.err if stops else "", again, stops)


def start_second(case: Case) -> Outcome:
    """The same command is called twice: one of the two refuses, and the other is not disturbed."""
    first = case.begin()
    first.rest(case.draw.uniform(0, 0.5))
    ends = sorted((session.wait() for session in (first, case.start())), key=lambda ended: ended.code)
    codes = [ended.code for ended in ends]
    demand(codes in ([0, 2], [0, 0]), f"exit codes {codes}: {ends[1].err}")
    if ends[1].code:
        demand("in use by process" in ends[1].line, f"it does not say why: {ends[1].line}")
    # The later one may have come when the earlier one was done.
    return Outcome("exit 2", ends[1].err, case.compare(), int(ends[1].code == 2))


def other_processes(case: Case) -> Outcome:
    """A run goes on in two processes, then in one again: at the very step, with other statistics of batch-norm."""
    stops, handed_over = 0, 0
    for processes in (1, 2):
        session = case.start(processes=processes)
        step = case.draw.randint(2, case.rig.steps // 3) + stops * case.rig.steps // 3
        if case.begun(session, step) and session.signal(signal.SIGTERM):
            ended = session.wait()
            demand_stop(case, ended, 128 + signal.SIGTERM, "stopped by SIGTERM")
            stops += 1
            handed_over = handed_over or step
        else:
            session.wait()
    case.resume()
    again, parted = steps_again(case.run), _parted(case, handed_over)
    demand(not again, f"{again} steps were taken twice")
    return Outcome("exit 143", f"other statistics: losses part by up to {parted:.3f}", again, stops)


def _parted(case: Case, handed_over: int) -> float:
    """How far the mean losses of epochs are from the undisturbed run's; those before the hand-over must be equal."""
    most = 0.0
    for generation in range(2):
        ours, theirs = (
            read_json(run / f"generation_{generation}" / "node.json")["training"]["history"]
            for run in (case.run, case.whole.run)
        )
        demand(len(ours) == len(theirs), f"{len(ours)} epochs in generation {generation}, not {len(theirs)}")
        for epoch, (one, two) in enumerate(zip(ours, theirs, strict=True)):
            before = generation == 0 and (epoch + 1) * STEPS_PER_EPOCH <= handed_over
            demand(not before or one == two, f"epoch {epoch} is another, although it ended before")
            most = max(most, abs(one["loss"] - two["loss"]))
    demand(most <= LOSS_TOLERANCE, f"losses part by up to {most:.3f}")
    return most


def hang(case: Case, restarts: int) -> Outcome:
    """One of two processes is stopped and says nothing any more: it is named, and killed by the launcher."""
    session = case.begin("--dist.timeout_minutes=0.1", f"--dist.max_restarts={restarts}")
    found = ranks(session.pid) if case.instant(session) else {}
    rank = case.draw.randrange(case.processes)
    sent = rank in found and send(found[rank], signal.SIGSTOP)
    ended = session.wait()
    if sent:
        named = f"process {rank} of {case.processes} hangs"
        demand(named in ended.line, f"process {rank}, which hangs, is not named: {ended.line}")
    demand(ended.code == int(sent and not restarts), f"exit code {ended.code}: {ended.err}")
    if not restarts:
        case.resume()
    return Outcome(f"exit {ended.code}", ended.err, case.compare(), int(sent))
