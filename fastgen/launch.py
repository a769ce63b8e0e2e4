"""Starts several processes that train together on this machine, one a GPU, and tells how they ended.

torch's elastic launcher starts them, passes signals on and ends all where one was lost. It does not tell which end came
first, so each process leaves a verdict when it ends, and the earliest that is no consequence of another one's is told.
Whether all are started again is decided here, not by the launcher: after a loss, and never after a mistake or a stop.

A process begins in `work`. torch is imported after its environment is set, so nothing here imports it at the top.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from fastgen import trainings
from fastgen.errors import FastgenError, LostProcess, MachineError, Stopped, Told, UserError, as_told
from fastgen.stop import heeded

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

    from fastgen.config import Recipe

VERDICT = "fastgen"
# After a failure the launcher asks the others to end, and kills them so much later.
LAUNCHERS_GRACE_SECONDS = 30
# For the processes, unless the user has them set: one machine needs no other interface, and what the libraries under
# torch write about a lost connection is told by the verdict.
ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "FATAL"}


class End(IntEnum):
    """Ways to end; where processes ended in several ways, the lowest tells what happened."""

    KILLED = 0  # by a signal that nobody here sent
    TOLD = 1  # with an error for the user, which would come again
    CLOSED = 2  # nobody reads the output any more
    FAILED = 3  # with an exception that nobody expected, or another process was found to hang
    ABORTED = 4  # by its own libraries, which may be for the loss of another one
    STOPPED = 5  # by request
    ASIDE = 6  # another process went away
    DONE = 7  # well


@dataclass(frozen=True)
class Verdict:
    """How a process ended.

    Attributes:
        exit_code: of the whole run, if this is what happened.
        seconds: time.time() of the end.
        trace: traceback of an exception that nobody expected.
    """

    rank: int
    end: End
    text: str
    exit_code: int
    seconds: float
    trace: str = ""


class Ended(FastgenError):
    """The error of one of the processes, told by the one that started them."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


def processes_wanted(recipe: Recipe) -> int:
    """How many processes the recipe asks for on this machine: one for each GPU, unless it says otherwise.

    Raises:
        UserError: more than there are GPUs, where they are used.
    """
    import torch

    gpus = 0 if recipe.run.device == "cpu" else torch.cuda.device_count()
    wanted = recipe.dist.processes
    if wanted is None:
        return max(1, gpus)
    if wanted > max(1, gpus) and (gpus or recipe.run.device == "cuda"):
        raise UserError(
            f"dist.processes={wanted} needs as many GPUs, and there are {gpus}: lower it, or train with run.device=cpu"
        )
    return wanted


def exit_code_for(code: int, environment: Mapping[str, str]) -> int:
    """The exit code to give under `torchrun`, which starts again whatever ends with another one than 0.

    Args:
        code: of the run; a stop has 128 or more.
        environment: where torchrun says how often it does so.
    """
    return 0 if code >= 128 and int(environment.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0 else code


def exit_hard(code: int) -> NoReturn:
    """Ends this process after an error: in the ordinary way it would abort, noisily, as its groups are still open."""
    # Where the reader is gone there is nobody left to tell.
    with suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def launch(words: Sequence[str], processes: int, max_restarts: int, module: str = "fastgen.train") -> None:
    """Runs a module's `main(words)` in processes that train together; returns when all have ended well.

    Call it from the main thread: the processes save and end when the thread that started them ends.

    Args:
        max_restarts: how often all are started again after one was lost.
        module: in which there is `main`.

    Raises:
        Ended: the error of the process that failed first, with its text and its exit code.
        MachineError: a process was lost once more than `max_restarts`.
        Stopped: a signal came, here or to a process, or the time was over.
        BrokenPipeError: nobody reads the output any more.
    """
    from torch.distributed.elastic.multiprocessing import SignalException

    shown = ""
    try:
        with _signals_raise(), _without_the_launchers_log():
            for restart in range(1, max_restarts + 2):
                verdict = _attempt(words, processes, module)
                if verdict.trace not in ("", shown):
                    print(verdict.trace, end="", file=sys.stderr, flush=True)
                    shown = verdict.trace
                if verdict.end is End.DONE:
                    return
                if restart > max_restarts:
                    used_up = f"; dist.max_restarts={max_restarts} is used up" if max_restarts else ""
                    raise MachineError(f"{verdict.text}{used_up}")
                _say(f"{verdict.text}: all start again from the last save ({restart} of {max_restarts})")
    except SignalException as caught:
        raise Stopped(caught.sigval) from None


def work() -> None:
    """What each process runs: the module's `main`, ended when its parent is gone, with a verdict at the end."""
    parent, module, *words = sys.argv[1:]
    trainings.end_with(int(parent))
    for number in heeded():
        signal.signal(number, _end_here)
    threading.Thread(target=_outlive_by_the_grace, args=(int(parent),), daemon=True).start()
    _set_environment()
    try:
        called = importlib.import_module(module)
        # As if called by -m: the run's record keeps the command line.
        sys.argv = [str(called.__file__), *words]
        called.main(words)
        sys.stdout.flush()
    except BaseException as error:  # noqa: BLE001 (all of it is told by the parent)
        verdict = _verdict_of(error)
    else:
        verdict = _verdict(End.DONE, "", 0)
    # The others may have noticed by now, and the launcher asks this one to end: it does.
    for number in heeded():
        signal.signal(number, signal.SIG_IGN)
    _leave(verdict)
    if verdict.end is not End.DONE:
        # A stop is no error to the launcher: it would ask those to end that save still, for the second time.
        exit_hard(0 if verdict.end is End.STOPPED else verdict.exit_code)


def _attempt(words: Sequence[str], processes: int, module: str) -> Verdict:
    """Runs the processes once; tells what was lost, or that all ended well, and raises any other end."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import elastic_launch

    failures: Mapping[int, Any] = {}
    asked, began = 0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fastgen_") as folder:
        config = _config(folder, processes)
        program = "from fastgen.launch import work; work()"
        # The launcher fills in what follows a dollar sign.
        arguments = [str(os.getpid()), module, *(word.replace("$", "$$") for word in words)]
        try:
            elastic_launch(config, sys.executable)("-c", program, *arguments)
        except ChildFailedError as failed:
            failures = failed.failures
        except SignalException as caught:
            asked = caught.sigval
        except RendezvousError as error:
            raise MachineError(f"the processes cannot be started: {error}") from error
        left = _read(Path(folder))
    grace_seconds = getattr(config, "shutdown_timeout", LAUNCHERS_GRACE_SECONDS)
    if asked and time.monotonic() - began >= grace_seconds:
        for rank in sorted(set(range(processes)) - set(left)):
            name = signal.Signals(asked).name
            _say(f"process {rank} of {processes} did not end within {grace_seconds} s of {name}: killed")
    ends = [_end_of(rank, left.get(rank), failures.get(rank), processes) for rank in range(processes)]
    return _told(_judged(ends), asked)


def _config(folder: str, processes: int) -> LaunchConfig:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    grace: dict[str, Any] = {"shutdown_timeout": int(trainings.GRACE_SECONDS)}
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        # No name: it would have to be resolved, which not every machine does well.
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=folder),
        signals_to_handle=",".join(number.name for number in heeded()),
        # torch 2.11 may not have it yet, and gives 30 s.
        **(grace if hasattr(LaunchConfig, "shutdown_timeout") else {}),
    )


def _told(verdicts: Sequence[Verdict], asked: int) -> Verdict:
    """The verdict that tells what was lost, or that all ended well; raises where it ended otherwise.

    Args:
        asked: number of the signal that was passed on to all; 0: none.
    """
    first = min(verdicts, key=lambda verdict: (verdict.end, verdict.seconds))
    stops = [verdict.exit_code - 128 for verdict in verdicts if verdict.end is End.STOPPED]
    asked = asked or next(iter(stops), 0)
    if first.end is End.CLOSED:
        raise BrokenPipeError
    if first.end is End.TOLD or (asked and first.end in (End.FAILED, End.ABORTED)):
        print(first.trace, end="", file=sys.stderr, flush=True)
        raise Ended(first.text, first.exit_code)
    if asked and first.end is not End.DONE:
        raise Stopped(asked)
    return first


def _judged(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """With the launcher's own doing set aside: after a failure it asks the others to end, then it kills them."""
    failed = [verdict.seconds for verdict in verdicts if verdict.end not in (End.DONE, End.STOPPED)]
    first = min(failed, default=float("inf"))

    def its_doing(verdict: Verdict) -> bool:
        if verdict.end is End.KILLED:
            # It tells whole seconds.
            return verdict.seconds >= first + LAUNCHERS_GRACE_SECONDS - 1
        return verdict.end is End.STOPPED and verdict.seconds > first

    return [dataclasses.replace(verdict, end=End.ASIDE) if its_doing(verdict) else verdict for verdict in verdicts]


def _end_of(rank: int, left: Verdict | None, failure: Any, processes: int) -> Verdict:
    """How a process ended, by the verdict that it left or else by its exit code.

    Args:
        left: None: it left none.
        failure: the launcher's record; None: it did not end with an error.
    """
    code = 0 if failure is None else failure.exitcode
    if left is not None and not (left.end is End.DONE and code):
        return left
    who, seconds = f"process {rank} of {processes}", float(0 if failure is None else failure.timestamp)
    if code == 0:
        # Killed after a signal that was passed on, which is told as a stop. The launcher leaves no record then.
        return Verdict(rank, End.ASIDE if left is None else End.DONE, f"{who} ended without a word", 1, seconds)
    if -code in heeded():
        # At the latest, as the launcher tells whole seconds: it may have been its own signal, after a failure.
        return Verdict(rank, End.STOPPED, "", 128 - code, seconds + 1)
    if code < 0:
        end = End.ABORTED if code == -signal.SIGABRT else End.KILLED
        return Verdict(rank, end, f"{who} was killed by {failure.signal_name()}", 1, seconds)
    return Verdict(rank, End.FAILED, f"{who} ended with exit code {code}", 1, seconds)


def _read(folder: Path) -> dict[int, Verdict]:
    """The verdicts that the processes left, by rank."""
    told = [json.loads(file.read_text())[VERDICT] for file in folder.rglob("*.json")]
    return {entry["rank"]: Verdict(**{**entry, "end": End(entry["end"])}) for entry in told}


def _leave(verdict: Verdict) -> None:
    """Writes the verdict where the launcher looks for it, in the form that it asks for."""
    path = Path(os.environ["TORCHELASTIC_ERROR_FILE"])
    about = {"timestamp": str(int(verdict.seconds)), "py_callstack": verdict.trace}
    content = {
        "message": {"message": verdict.text, "extraInfo": about},
        VERDICT: {**dataclasses.asdict(verdict), "end": int(verdict.end)},
    }
    # The launcher fails on half a file.
    half = path.with_suffix(".half")
    half.write_text(json.dumps(content))
    half.replace(path)


def _verdict(end: End, text: str, exit_code: int, trace: str = "") -> Verdict:
    return Verdict(int(os.environ["RANK"]), end, text, exit_code, time.time(), trace)


def _verdict_of(error: BaseException) -> Verdict:
    """What this process says of what ended it; the same words as `errors.command` has, which only the parent speaks."""
    me = f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']}"
    if isinstance(error, SystemExit) and error.code in (0, None):
        return _verdict(End.DONE, "", 0)
    if isinstance(error, BrokenPipeError):
        return _verdict(End.CLOSED, "", 1)
    if isinstance(error, OSError | MemoryError):
        error = as_told(error)
    if isinstance(error, Told):
        return _verdict(End.ASIDE, f"{me} was told by another one that it ends", error.exit_code)
    if isinstance(error, LostProcess):
        return _verdict(End.FAILED if error.primary else End.ASIDE, str(error), error.exit_code)
    if isinstance(error, Stopped):
        return _verdict(End.STOPPED, str(error), error.exit_code)
    if isinstance(error, FastgenError):
        return _verdict(End.TOLD, str(error), error.exit_code)
    trace = "".join(traceback.format_exception(error))
    return _verdict(End.FAILED, f"{me} failed: {type(error).__name__}: {error}", 1, trace)


def _set_environment() -> None:
    """Sets what torch and the libraries under it read when they are loaded, for this process alone."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    share = len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_WORLD_SIZE"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))


def _end_here(number: int, frame: FrameType | None) -> None:
    """Ends this process where a signal comes before or after training: as it would without us, but with a verdict."""
    stopped = Stopped(number)
    _leave(_verdict(End.STOPPED, str(stopped), stopped.exit_code))
    os._exit(stopped.exit_code)


def _outlive_by_the_grace(parent: int) -> None:
    """Ends this process hard where it hangs: the parent is gone, and it has not ended within the grace."""
    while os.getppid() == parent:
        time.sleep(trainings.POLL_SECONDS)
    time.sleep(trainings.GRACE_SECONDS)
    os._exit(128 + signal.SIGTERM)


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Has signals end the launcher also between two attempts, and gives the handlers back that it leaves changed."""
    from torch.distributed.elastic.multiprocessing import SignalException

    def end(number: int, frame: FrameType | None) -> None:
        raise SignalException("", signal.Signals(number))

    before = {number: signal.signal(number, end) for number in heeded()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _without_the_launchers_log() -> Iterator[None]:
    """Keeps what the launcher logs from the screen: 25 lines for one failed process, which is told in one here."""
    logger, nowhere = logging.getLogger("torch.distributed.elastic"), logging.NullHandler()
    before, logger.propagate = logger.propagate, False
    logger.addHandler(nowhere)
    try:
        yield
    finally:
        logger.removeHandler(nowhere)
        logger.propagate = before


def _say(text: str) -> None:
    print(f"fastgen: {' '.join(text.split())}", file=sys.stderr, flush=True)
