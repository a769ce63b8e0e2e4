"""Locks of folders: one process at a time, free as soon as that one is gone, also where its host died with it.

The kernel's flock on <folder>/lock decides. It goes with the process, however that ends; but the server of a network
file system may keep the flock of a host that died. So the holder also changes a sign in its file every few seconds,
and who sees no change for a minute takes the folder over.

A lock file is never taken twice: whoever takes the folder, from a dead holder or after one that left, makes a file of
its own, and renames it over `lock`. Until then it is called .lock.<token of the file that it follows>.next, and is
flocked: so one process at a time can follow a given file, and looks first whether that one is still there. Hence of
several that come at once exactly one gets it, and one whose folder was taken from it finds another's token in `lock`.

Where flock does not reach other hosts (mount options such as localflock and local_lock), this lock does not either.
Flocks belong to open files: programs that the holder starts do not inherit this one, but processes that it forks, such
as workers of a loader, keep the folder held on this host for as long as they live.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fastgen.errors import MachineError, UserError

# How often the holder changes its sign, how long it may fail to, and how often who waits looks. A network file system
# may show the change to other hosts some 20 seconds late.
SIGN_SECONDS = 10.0
STALE_SECONDS = 60.0
POLL_SECONDS = 0.2
SIGN_DIGITS = 10
CANNOT_LOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


class InUse(UserError):
    """Another process holds a folder."""


class Lock:
    """A folder that this process holds; made by `locked`."""

    def __init__(self, folder: Path, what: str, descriptor: int, record: Record) -> None:
        self._folder = folder
        self._what = what
        self._descriptor = descriptor
        self._token = record.token
        self._sign_at = len(record.text.encode()) - SIGN_DIGITS
        self._left = threading.Event()
        self._signing = threading.Thread(target=self._sign, name="lock", daemon=True)
        self._signing.start()

    @property
    def lost(self) -> bool:
        """Whether another process took the folder over, or the lock file was removed; reads the file."""
        return _read_path(self._folder / "lock").token != self._token

    def check(self) -> None:
        """To be asked before anything is written that another holder would write, too.

        Raises:
            MachineError: this process was suspended, or cut off, for so long that another one took the folder over.
        """
        holder = _read_path(self._folder / "lock")
        if holder.token != self._token:
            how = f"was taken over by {holder.name}" if holder.text else "has lost its lock file"
            raise MachineError(f"{self._folder}: {self._what} {how}: this process ends")

    def _sign(self) -> None:
        number = 0
        while not self._left.wait(SIGN_SECONDS):
            number += 1
            # What fails now may work the next time. If it never does, another one takes over, and `check` tells that.
            with contextlib.suppress(OSError):
                os.pwrite(self._descriptor, _sign_of(number), self._sign_at)
                os.fsync(self._descriptor)

    def _leave(self) -> None:
        """Only closes this process's own file: `lock` may be another's by now."""
        self._left.set()
        # Before the close: the number of a closed file is given to the next one that is opened.
        self._signing.join()
        os.close(self._descriptor)


def _ignore(text: str = "") -> None:
    pass


@contextmanager
def locked(
    folder: Path, what: str, say: Callable[[str], None] = _ignore, check: Callable[[], None] = _ignore
) -> Iterator[Lock]:
    """Holds a folder for this process alone; the lock goes with the process, however it ends.

    A holder on this host is believed. One on another host is watched for up to STALE_SECONDS: if its sign changes, it
    lives. A requeued Slurm job takes over from its former self without waiting.

    Args:
        folder: must be there.
        what: it is, for messages.
        say: told, once, that a holder on another host is being watched.
        check: called several times a second meanwhile; what it raises ends the wait.

    Raises:
        InUse: another process holds it.
        MachineError: the file system has no locks.
    """
    lock = _take(folder, what, say, check)
    try:
        yield lock
    finally:
        lock._leave()


class Watch:
    """Tells who holds folders, without holding them; to be asked again and again, as signs of other hosts are."""

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[Record, float]] = {}

    def holder(self, folder: Path) -> str:
        """The process that holds a folder; empty where none does that is known to live.

        Args:
            folder: need not be there.

        Raises:
            MachineError: the file system has no locks.
        """
        if not (folder / "lock").exists():
            return ""
        free, record = _look(folder)
        if free or record.former_self:
            return ""
        before, since = self._seen.get(folder, (None, 0.0))
        if record.this_system:
            return record.name
        if record != before:
            since = time.monotonic()
            self._seen[folder] = record, since
        return record.name if time.monotonic() - since < STALE_SECONDS else ""


@dataclass(frozen=True)
class Record:
    """Content of a lock file: "process PID on HOST", and lines of a name and a value. Empty: nobody held it yet.

    Attributes:
        text: the whole file, sign included.
    """

    text: str

    @property
    def name(self) -> str:
        """The holder, for messages."""
        return next(iter(self.text.splitlines()), "another process")

    @property
    def token(self) -> str:
        """Tells this lock file from all others; empty where it has none."""
        return self._match(r"^token ([0-9a-f]+)$")

    @property
    def this_system(self) -> bool:
        """Whether the holder's kernel is ours, which knows whether the holder lives."""
        # Hosts of one name are not rare, and the same host after a crash is another one to a file server.
        boots = {boot_id(), self._match(r"^boot (.+)$")} - {""}
        return self._match(r"^process \d+ on (.+)$") == host_name() and len(boots) < 2

    @property
    def former_self(self) -> bool:
        """Whether the holder was this Slurm job before it was requeued: Slurm starts it again only after its end."""
        job, restart = slurm_job()
        return bool(job) and int(self._match(rf"^job {re.escape(job)}, restart (\d+)$") or restart) < restart

    def _match(self, pattern: str) -> str:
        found = re.search(pattern, self.text, re.MULTILINE)
        return found[1] if found else ""


def host_name() -> str:
    """Name of this host."""
    return os.uname().nodename


def boot_id() -> str:
    """Of the running kernel; empty where the system does not tell."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def slurm_job() -> tuple[str, int]:
    """Id of this Slurm job, empty outside of Slurm, and how many times it was requeued."""
    return os.environ.get("SLURM_JOB_ID", ""), int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def _own_record() -> Record:
    job, restart = slurm_job()
    lines = [
        f"process {os.getpid()} on {host_name()}",
        *([f"job {job}, restart {restart}"] if job else []),
        *([f"boot {boot_id()}"] if boot_id() else []),
        f"token {secrets.token_hex(8)}",
        f"sign {_sign_of(0).decode()}",
    ]
    return Record("\n".join(lines))


def _sign_of(number: int) -> bytes:
    return f"{number:0{SIGN_DIGITS}d}".encode()


def _take(folder: Path, what: str, say: Callable[[str], None], check: Callable[[], None]) -> Lock:
    while True:
        former = _abandoned(folder, what, say, check)
        lock = _follow(folder, what, former)
        if lock is not None:
            return lock


def _abandoned(folder: Path, what: str, say: Callable[[str], None], check: Callable[[], None]) -> Record:
    """What the lock file says, after it is certain that nobody who lives holds it.

    Raises:
        InUse: someone does.
    """
    free, first = _look(folder)
    if free or first.former_self:
        return first
    if first.this_system:
        raise _in_use(folder, what, first)
    # Looks are counted, not seconds: while the file system does not answer, a holder that lives cannot sign either.
    for looks in range(math.ceil(STALE_SECONDS / POLL_SECONDS)):
        if looks == 1:
            say(f"waiting up to {STALE_SECONDS:g} s: {what} was held by {first.name}, which may be gone")
        check()
        time.sleep(POLL_SECONDS)
        free, now = _look(folder)
        if free:
            return now
        if now != first:
            raise _in_use(folder, what, now)
    return first


def _look(folder: Path) -> tuple[bool, Record]:
    """Whether nobody holds the lock file, and what it says; the file is made if it is not there."""
    path = folder / "lock"
    # Opened anew for each look: that is when network file systems ask the server what others have written. And always
    # as if to make it, because they remember for half a minute that a file was not there.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        # Shared: processes that only look are no holders to each other.
        return _flock(descriptor, path, fcntl.LOCK_SH), _read(descriptor)
    finally:
        os.close(descriptor)


def _follow(folder: Path, what: str, former: Record) -> Lock | None:
    """Puts a lock file of this process in the place of another one, which nobody holds.

    Returns:
        None: it is not in that place any more.

    Raises:
        InUse: another process is about to do the same.
    """
    place, path = folder / "lock", folder / f".lock.{former.token or 'first'}.next"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not _flock(descriptor, path):
            raise _in_use(folder, what, _read(descriptor))
        if _leads_to(path, descriptor):
            if _read_path(place).token == former.token:
                record = _own_record()
                # Whoever was killed here before us may have written something.
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, record.text.encode(), 0)
                os.fsync(descriptor)
                os.replace(path, place)
                return Lock(folder, what, descriptor, record)
            path.unlink(missing_ok=True)
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _flock(descriptor: int, path: Path, kind: int = fcntl.LOCK_EX) -> bool:
    """Whether the lock of an open file was free, and is this process's now."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in CANNOT_LOCK:
            raise MachineError(
                f"{path.parent}: its file system cannot lock files ({error.strerror}): name folders on another one "
                "with run.dir and run.nodes"
            ) from None
        error.filename = str(path)
        raise
    return True


def _leads_to(path: Path, descriptor: int) -> bool:
    """Whether the path still names this open file."""
    try:
        other = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return os.path.sameopenfile(other, descriptor)
    finally:
        os.close(other)


def _read(descriptor: int) -> Record:
    return Record(os.pread(descriptor, 4096, 0).decode(errors="replace"))


def _read_path(path: Path) -> Record:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return Record("")
    try:
        return _read(descriptor)
    finally:
        os.close(descriptor)


def _in_use(folder: Path, what: str, holder: Record) -> InUse:
    return InUse(f"{folder}: {what} is in use by {holder.name}: wait for it, or name another folder")
