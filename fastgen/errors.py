"""What can end a run, and the exit code each end has.

One line for the person, no traceback: a mistake that the user can mend exits with 2, a fault of
the machine with 1, a stop that was asked for by a signal with 128 + its number.
"""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

USER_MISTAKES = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG,
)  # fmt: skip
MACHINE_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)


class FastgenError(Exception):
    """An end of the run that is told in one line."""

    exit_code = 1


class UserError(FastgenError):
    """The recipe, a path or the data must be changed; the text says how."""

    exit_code = 2


class MachineError(FastgenError):
    """The machine failed: a full disk, a device that is not there."""


class Diverged(FastgenError):
    """The loss became infinite or not a number.

    Attributes:
        step: the first such step.
        ids: sample ids of its batch.
    """

    def __init__(self, text: str, *, step: int, ids: Sequence[int]) -> None:
        super().__init__(text)
        self.step = step
        self.ids = list(ids)


class LostProcess(MachineError):
    """Another process of the run hangs or is gone; starting again goes on from the last save.

    Attributes:
        primary: whether this tells what happened; False: it was noticed from aside, and the other one knows better.
    """

    def __init__(self, text: str, *, primary: bool) -> None:
        super().__init__(text)
        self.primary = primary


class Stopped(FastgenError):
    """A signal, or the end of the time that was given, asked for a stop; all finished steps are saved."""

    def __init__(self, signal_number: int) -> None:
        over = signal_number == signal.SIGALRM
        super().__init__(
            "stopped: the time of run.stop_after_minutes is over"
            if over
            else f"stopped by {signal.Signals(signal_number).name}"
        )
        self.exit_code = 128 + signal_number


class Told(FastgenError):
    """Another process of the run ends it, and says why."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("")
        self.exit_code = exit_code


def as_one_line(error: OSError) -> FastgenError:
    """Tells an operating-system error as the user's mistake or as the machine's fault."""
    place = f"{error.filename}: " if error.filename else ""
    reason = error.strerror or str(error)
    if error.errno in MACHINE_FAULTS:
        return MachineError(
            f"{place}{reason}. Free some space or name another place with run.dir and run.nodes; the run then resumes."
        )
    if error.errno in USER_MISTAKES:
        return UserError(f"{place}{reason}. Name a place that you may write to with run.dir and run.nodes.")
    return MachineError(f"{place}{reason}")


@contextmanager
def written_to(folder: Path) -> Iterator[None]:
    """Tells the system's errors of a command that writes to the folder of its `--to`, not to a run's.

    Raises:
        UserError: nothing may be written there.
        MachineError: the disk is full.
    """
    try:
        yield
    except OSError as error:
        # The folder, as a partial file's name says nothing to the person.
        told = f"{folder}: {error.strerror or error}"
        if isinstance(as_one_line(error), UserError):
            raise UserError(f"{told}: name a folder that you may write to with --to") from error
        raise MachineError(f"{told}: free some space, or name another folder with --to") from error


def first_line(error: BaseException, most_letters: int = 200) -> str:
    """What an error of a library says, as far as it fits into a line of ours; its kind where it says nothing."""
    text = str(error).strip().splitlines()
    return text[0][:most_letters] if text else type(error).__name__


def as_told(error: OSError | MemoryError) -> FastgenError:
    """Tells what the system refused."""
    if isinstance(error, MemoryError):
        return MachineError(f"out of memory ({error}): lower train.batch_size, or free some")
    return as_one_line(error)


def command(main: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> int:
    """Runs a command's main function and turns its end into an exit code.

    Args:
        main: takes the words of the command line.
        arguments: those words, without the program's name.

    Returns:
        0, or the exit code of the error, after its one line went to standard error.
    """
    try:
        main(arguments)
    except FastgenError as error:
        _tell(error)
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output went away (`| head`); there is nobody left to tell.
        sys.stderr.close()
        return 0
    except (OSError, MemoryError) as error:
        told = as_told(error)
        _tell(told)
        return told.exit_code
    except KeyboardInterrupt:
        print("fastgen: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _tell(error: FastgenError) -> None:
    if isinstance(error, Told):
        return
    # One line, also where the text quotes a value that spans several.
    print(f"fastgen: {' '.join(str(error).split())}", file=sys.stderr)
