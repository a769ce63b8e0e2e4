"""Runs trials in processes of their own, two at a time: whatever one does, the others go on.

A trial that raises is told by its process. One that ends its process, by a signal or an exit, or that is not done
within the limit, is told from outside, and the rest of its session goes on in another process.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastgen.doctor.advice import reinstall
from fastgen.doctor.findings import Answer, Finding, Mark, Place, Trial
from fastgen.doctor.worker import worker_command

AT_ONCE = 2
POLL_SECONDS = 0.2
TORCH = "torch"

Told = Callable[[Sequence[Finding], Sequence[str]], None]


class _Process:
    """A process and the trials that it has still to answer, the first of which it is at."""

    def __init__(self, trials: Sequence[Trial], place: Place) -> None:
        self.left = list(trials)
        self._errors = tempfile.TemporaryFile(dir=place.scratch)  # noqa: SIM115 (closed by end)
        self.pipe, theirs = os.pipe()
        os.set_blocking(self.pipe, False)
        command = worker_command(os.getpid(), theirs, place, [trial.name for trial in trials])
        # Not sys.stdout: what libraries print is no answer. A session of its own, so that all it starts can be ended.
        self._process = subprocess.Popen(
            command, pass_fds=[theirs], stdin=subprocess.DEVNULL, stdout=self._errors, stderr=self._errors,
            start_new_session=True, env={**os.environ, "TMPDIR": str(place.scratch)},
        )  # fmt: skip
        os.close(theirs)
        self._unread = b""
        self.since = time.monotonic()

    def read(self) -> list[dict[str, Any]]:
        """What it has told since."""
        try:
            got = os.read(self.pipe, 1 << 16)
        except BlockingIOError:
            return []
        *lines, self._unread = (self._unread + got).split(b"\n")
        return [json.loads(line) for line in lines]

    def ended(self) -> bool:
        """Whether it is gone. It is not reaped, so that its number, and its group's, stay its own."""
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def how_it_ended(self) -> str:
        """Of one that is gone, for people, with the last line that it printed."""
        code = self._kill()
        how = f"dies by {_signal_name(-code)}" if code < 0 else f"ends its process with exit code {code}"
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        return f"{how}: {lines[-1][:300]}" if lines else how

    def end(self) -> None:
        """Ends it, and all that it has started."""
        self._kill()
        os.close(self.pipe)
        self._errors.close()

    def _kill(self) -> int:
        """Ends it where it still runs, and what it has left behind; gives its exit code."""
        if self._process.returncode is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait()


def run_trials(trials: Sequence[Trial], runs: Path, limit_seconds: float, told: Told) -> list[Finding]:
    """Runs trials and gives what came of them, in their order.

    Args:
        trials: of one session stand together; those that need torch wait for the trial of that name.
        runs: the folder of the runs.
        limit_seconds: that each trial may take.
        told: is called some times a second with the findings so far and the names of what is being tried.
    """
    with tempfile.TemporaryDirectory(prefix="fastgen_doctor_") as scratch:
        work = _Work(trials, Place(Path(scratch), runs), limit_seconds)
        try:
            while work.unfinished():
                work.start()
                work.listen()
                told(work.findings(), work.running())
        finally:
            work.end()
    return work.findings()


class _Work:
    """Sessions that wait, processes that run, findings."""

    def __init__(self, trials: Sequence[Trial], place: Place, limit_seconds: float) -> None:
        self._trials, self._place, self._limit = trials, place, limit_seconds
        sessions = dict.fromkeys(trial.session for trial in trials)
        self._waiting = [[trial for trial in trials if trial.session == session] for session in sessions]
        self._processes: list[_Process] = []
        self._found: dict[str, Finding] = {}

    def unfinished(self) -> bool:
        return bool(self._waiting or self._processes)

    def findings(self) -> list[Finding]:
        return [self._found[trial.name] for trial in self._trials if trial.name in self._found]

    def running(self) -> list[str]:
        return [process.left[0].name for process in self._processes if process.left]

    def start(self) -> None:
        """Starts what may be started now."""
        for session in list(self._waiting):
            if len(self._processes) == AT_ONCE:
                return
            if session[0].name == TORCH or not session[0].needs_torch:
                ready = session
            elif TORCH not in self._found:
                continue
            else:
                ready = self._possible(session)
            self._waiting.remove(session)
            if ready:
                self._processes.append(_Process(ready, self._place))

    def _possible(self, session: Sequence[Trial]) -> list[Trial]:
        """The trials of a session that can be tried; the others are found impossible."""
        torch = self._found[TORCH]
        if torch.ok:
            return list(session)
        for trial in session:
            if trial.needs_torch:
                text = f"needs torch, which is {torch.answer.mark}"
                self._add(trial, Answer(Mark.NOT_TRIED, text, torch.answer.mend), 0.0)
        return [trial for trial in session if not trial.needs_torch]

    def listen(self) -> None:
        """Waits a little for what processes tell, and looks after those that do not."""
        with selectors.DefaultSelector() as selector:
            for process in self._processes:
                selector.register(process.pipe, selectors.EVENT_READ)
            selector.select(POLL_SECONDS)
        for process in list(self._processes):
            # Asked first: what it has told before it went is then in the pipe.
            gone = process.ended()
            messages = process.read()
            for message in messages:
                # Its process may be some trials ahead of us.
                if not self._is_vain(process):
                    self._hear(process, message)
            late = time.monotonic() - process.since > self._limit
            if self._is_vain(process):
                self._stop(process)
            elif not process.left or late or (gone and not messages):
                self._finish(process, late=late)

    def _hear(self, process: _Process, message: Mapping[str, Any]) -> None:
        now = time.monotonic()
        answer = Answer(Mark(message["mark"]), message["seen"], message["mend"], message["facts"])
        self._add(process.left.pop(0), answer, now - process.since)
        process.since = now

    def _is_vain(self, process: _Process) -> bool:
        """Whether torch, that it needs, has turned out not to work."""
        torch = self._found.get(TORCH)
        return torch is not None and not torch.ok and any(trial.needs_torch for trial in process.left)

    def _stop(self, process: _Process) -> None:
        """Ends a process; what of its trials can still be tried waits for another one."""
        self._processes.remove(process)
        if process.left:
            self._waiting.insert(0, process.left)
        process.end()

    def _finish(self, process: _Process, *, late: bool) -> None:
        """Takes leave of a process; what it was at is found broken, and the rest waits for another one."""
        if process.left:
            blamed = process.left.pop(0)
            answer = self._late() if late else Answer(Mark.BROKEN, process.how_it_ended())
            self._add(blamed, answer, time.monotonic() - process.since)
        self._stop(process)

    def _late(self) -> Answer:
        text = f"hangs, or is slow: not done after {self._limit:g} s, and ended"
        return Answer(Mark.BROKEN, text, f"on a busy machine, give it longer with --limit_seconds={5 * self._limit:g}")

    def _add(self, trial: Trial, answer: Answer, seconds: float) -> None:
        if answer.mark is Mark.BROKEN and trial.package and not answer.mend:
            answer = replace(answer, mend=reinstall(trial.package))
        self._found[trial.name] = Finding(trial.name, trial.group, trial.purpose, answer, round(seconds, 2))

    def end(self) -> None:
        for process in self._processes:
            process.end()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
