"""The machine as this process may use it: cores, memory and disk, with the limits of its control groups. No torch."""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fastgen.doctor.findings import Answer, Mark, Place
from fastgen.processor import cpu_name

GIB = 1 << 30
MIB = 1 << 20
# Control groups of version 1 say "no limit" by a number near 2^63.
NO_LIMIT = 1 << 60
# A run folder of small networks fits; below it a disk is as good as full.
LEAST_FREE = 100 * MIB
PYTHON = (3, 11)


def python(place: Place) -> Answer:
    """The interpreter and the system."""
    facts = {"version": platform.python_version(), "machine": platform.machine(), "system": platform.system()}
    seen = f"{facts['version']}, {facts['system']} {facts['machine']}, {sys.executable}"
    if sys.version_info < PYTHON:
        return Answer(Mark.BROKEN, seen, "make the environment with Python 3.11 or later", facts)
    if facts["system"] != "Linux":
        return Answer(Mark.BROKEN, seen, "fastgen runs on Linux: use a Linux machine, WSL or a container", facts)
    return Answer(Mark.OK, seen, facts=facts)


def cores(place: Place) -> Answer:
    """Processor cores that this process may use."""
    here, allowed, quota = os.cpu_count() or 1, len(os.sched_getaffinity(0)), cpu_quota(Path("/"))
    usable = min(allowed, quota) if quota else allowed
    seen = f"{usable:g} of {here}"
    if quota and quota < allowed:
        seen += ", by the limit of the control group"
    elif allowed < here:
        seen += ", by the affinity of this process"
    threads = os.environ.get("OMP_NUM_THREADS")
    seen += f"; OMP_NUM_THREADS={threads}" if threads else ""
    return Answer(Mark.OK, f"{seen}; {cpu_name()}", facts={"usable": usable, "cores": here})


def memory(place: Place) -> Answer:
    """Memory that this process may use."""
    total, available = meminfo(Path("/"))
    limit = memory_limit(Path("/"))
    limited = limit is not None and limit < total
    usable = limit if limited and limit is not None else total
    seen = f"{usable / GIB:.1f} GiB"
    seen += f" by the limit of the control group, of {total / GIB:.1f}" if limited else ""
    return Answer(Mark.OK, f"{seen}, {min(available, usable) / GIB:.1f} free", facts={"usable_bytes": usable})


def shared_memory(place: Place) -> Answer:
    """Room in /dev/shm, where workers of backend folder put pictures."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Answer(Mark.MISSING, "there is no /dev/shm", "mount a tmpfs there, in Docker with --shm-size=8g")
    free = shutil.disk_usage(folder).free
    seen, facts = f"{free / GIB:.2f} GiB free in /dev/shm", {"free_bytes": free}
    if free < LEAST_FREE:
        return Answer(Mark.BROKEN, f"{seen}: too small", "enlarge it, in Docker with --shm-size=8g", facts)
    return Answer(Mark.OK, seen, facts=facts)


def runs(place: Place) -> Answer:
    """The folder of the runs: room, whether files can be written, renamed and locked in it."""
    folder = existing_parent(place.runs)
    free = shutil.disk_usage(folder).free
    where = f"in {place.runs}" if folder == place.runs else f"in {folder}, where {place.runs.name} will be made"
    seen, facts = f"{free / GIB:.1f} GiB free {where}", {"free_bytes": free, "folder": str(folder)}
    another = "name another folder with --runs, and to trainings with run.dir and run.nodes"
    if free < LEAST_FREE:
        return Answer(Mark.BROKEN, seen, f"free some space, or {another}", facts)
    try:
        _write_and_lock(folder)
    except OSError as error:
        return Answer(Mark.BROKEN, f"{seen}: cannot be used ({error.strerror})", another, facts)
    return Answer(Mark.OK, f"{seen}; files can be written and locked", facts=facts)


def existing_parent(path: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    whole = path.absolute()
    return path if path.is_dir() else next(folder for folder in whole.parents if folder.is_dir())


def _write_and_lock(folder: Path) -> None:
    """Does what a run does to its files.

    Raises:
        OSError: it cannot be done here.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fastgen_doctor_") as trial:
        path = Path(trial) / "partial"
        with open(path, "wb") as file:
            file.write(b"\0" * MIB)
            file.flush()
            os.fsync(file.fileno())
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.replace(Path(trial) / "whole")


def meminfo(root: Path) -> tuple[int, int]:
    """Total and available memory of the machine, bytes."""
    pairs = (line.partition(":") for line in (root / "proc/meminfo").read_text().splitlines())
    values = {name: int(value.split()[0]) * 1024 for name, _, value in pairs}
    return values["MemTotal"], values["MemAvailable"]


def memory_limit(root: Path) -> int | None:
    """The lowest limit of the control groups that this process is in, bytes; None: there is none."""
    names = ("memory.max", "memory.limit_in_bytes")
    found = [text for folder in _groups(root, "memory") for text in _texts(folder, names)]
    limits = [int(text) for text in found if text.isdigit() and int(text) < NO_LIMIT]
    return min(limits, default=None)


def cpu_quota(root: Path) -> float | None:
    """The lowest limit of the control groups that this process is in, in cores; None: there is none."""
    quotas = []
    for folder in _groups(root, "cpu"):
        quotas += [text.split() for text in _texts(folder, ("cpu.max",))]
        quotas += [[*_texts(folder, ("cpu.cfs_quota_us",)), *_texts(folder, ("cpu.cfs_period_us",))]]
    pairs = [pair for pair in quotas if len(pair) == 2 and pair[0].isdigit()]
    return min((int(quota) / int(period) for quota, period in pairs), default=None)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the control groups that this process is in, of version 1 and 2, from its own upwards."""
    mounted = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            top = next((top for top in (mounted / controllers, mounted / controller) if top.is_dir()), None)
        else:
            top = mounted if number == "0" else None
        if top is not None:
            # In a container the path may be the host's, and nothing of that name be there.
            own = top / path.strip("/")
            yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(top))


def _texts(folder: Path, names: tuple[str, ...]) -> list[str]:
    return [(folder / name).read_text().strip() for name in names if (folder / name).is_file()]
