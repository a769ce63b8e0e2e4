"""locks.py: one holder at a time, also when several come at once, and none that is dead, on whatever host it was.

Another host is a process that writes another host's name; one that died with its lock kept is a process that is
suspended, because nobody frees its flock and it does not sign.
"""

import errno
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from fastgen import locks
from fastgen.errors import MachineError, Stopped
from fastgen.locks import InUse, locked

# Does what it reads, one command a line, and answers each with one line.
HOLDER = """
import os, subprocess, sys
from pathlib import Path
from fastgen import locks

host, boot, sign, stale = sys.argv[1:]
locks.host_name = lambda: host or os.uname().nodename
if boot:
    locks.boot_id = lambda: boot
locks.SIGN_SECONDS, locks.STALE_SECONDS, locks.POLL_SECONDS = float(sign), float(stale), 0.01

def tell(*words):
    print(*words, flush=True)

def hold(folder):
    with locks.locked(folder, "this folder") as lock:
        tell("held")
        for word in map(str.strip, sys.stdin):
            if word == "check":
                try:
                    lock.check()
                    tell("fine")
                except locks.MachineError as error:
                    tell(error)
            elif word == "fork":
                pid = os.fork()
                if pid == 0:
                    sys.stdin.read()
                    os._exit(0)
                tell(pid)
            elif word == "start":
                tell(subprocess.Popen(["cat"], close_fds=False).pid)
            elif word == "leave":
                break
    tell("left")

for line in sys.stdin:
    word, folder = line.split()
    if word == "race":
        tell("ready")
        while not Path(folder, "go").exists():
            pass
    try:
        hold(Path(folder))
    except locks.InUse as error:
        tell("refused:", error)
"""
# Of processes that never sign in a test's time, and of those that wait.
NEVER, LONG = 1000.0, 20.0


class Holder:
    """Another process that holds the folder, or wants to."""

    def __init__(self, host="", *, boot="", sign=NEVER, stale=LONG, **env):
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, host, boot, str(sign), str(stale)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **env},
        )  # fmt: skip
        self.pid = self.process.pid

    def tell(self, word):
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()

    def read(self):
        return self.process.stdout.readline().strip()

    def ask(self, word):
        self.tell(word)
        return self.read()

    def send(self, number):
        self.process.send_signal(number)
        if number == signal.SIGSTOP:
            # Until all of its threads stand still.
            os.waitid(os.P_PID, self.pid, os.WSTOPPED)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def close(self):
        self.kill()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def start():
    """Function that starts a `Holder`; all are killed in the end."""
    started = []

    def start(*words, **settings):
        started.append(Holder(*words, **settings))
        return started[-1]

    yield start
    for holder in started:
        holder.close()


@pytest.fixture
def hold(start):
    """Function that starts a `Holder` and waits until it holds the folder."""

    def hold(folder, *words, **settings):
        holder = start(*words, **settings)
        assert holder.ask(f"hold {folder}") == "held"
        return holder

    return hold


@pytest.fixture
def gone(hold):
    """Function that starts a holder that stands still from then on, as if it were gone and its lock were not."""

    def gone(*words, **settings):
        holder = hold(*words, **settings)
        holder.send(signal.SIGSTOP)
        return holder

    return gone


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)


@pytest.fixture
def short(monkeypatch):
    """This process takes others for dead after 0.3 s."""
    monkeypatch.setattr(locks, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(locks, "STALE_SECONDS", 0.3)


def take(folder, **settings):
    """Takes the folder and leaves it at once."""
    with locked(folder, "this folder", **settings):
        return True


def no_wait():
    raise AssertionError("waited")


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- on one host


def test_a_folder_is_held_by_one_process_and_free_after_its_kill(tmp_path, hold):
    holder = hold(tmp_path)
    for _ in range(2):
        with pytest.raises(InUse, match=f"this folder is in use by process {holder.pid} on ") as caught:
            take(tmp_path, check=no_wait)
        assert str(caught.value).startswith(f"{tmp_path}: ")
        assert "\n" not in str(caught.value)
    holder.kill()
    assert take(tmp_path, check=no_wait)
    assert take(tmp_path, check=no_wait)
    assert files(tmp_path) == ["lock"]


def test_other_folders_stay_free(tmp_path, hold):
    hold(tmp_path)
    (tmp_path / "other").mkdir()
    assert take(tmp_path / "other")


def test_who_holds_a_folder_is_told(tmp_path, hold):
    watch = locks.Watch()
    assert watch.holder(tmp_path / "absent") == ""
    assert watch.holder(tmp_path) == ""
    assert not [*tmp_path.iterdir()]
    holder = hold(tmp_path)
    assert watch.holder(tmp_path) == f"process {holder.pid} on {os.uname().nodename}"
    holder.kill()
    assert watch.holder(tmp_path) == ""


def test_a_holder_on_another_host_is_told_for_as_long_as_it_signs(tmp_path, hold, monkeypatch):
    monkeypatch.setattr(locks, "STALE_SECONDS", 0.3)
    living, dead = tmp_path / "living", tmp_path / "dead"
    living.mkdir()
    dead.mkdir()
    signing, silent, watch = hold(living, "node7", sign=0.05), hold(dead, "node8"), locks.Watch()
    assert watch.holder(dead) == f"process {silent.pid} on node8"
    wait_until(lambda: not watch.holder(dead))
    monkeypatch.setattr(locks, "STALE_SECONDS", 1.5)
    until = time.monotonic() + 3
    while time.monotonic() < until:
        assert watch.holder(living) == f"process {signing.pid} on node7"
        time.sleep(0.02)


def test_who_looks_is_no_holder(tmp_path):
    (tmp_path / "lock").touch()
    with (tmp_path / "lock").open() as file:
        locks.fcntl.flock(file, locks.fcntl.LOCK_SH)
        assert take(tmp_path, check=no_wait)


def test_a_process_may_not_hold_a_folder_twice(tmp_path):
    with locked(tmp_path, "this folder"), pytest.raises(InUse, match=f"by process {os.getpid()} on "):
        take(tmp_path)


def test_the_file_tells_who_holds_it(tmp_path):
    with locked(tmp_path, "this folder"):
        first = (tmp_path / "lock").read_text().splitlines()[0]
    assert first == f"process {os.getpid()} on {os.uname().nodename}"


def test_a_folder_is_free_after_an_error_and_nobody_signs_any_more(tmp_path):
    before, open_files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with pytest.raises(KeyError), locked(tmp_path, "this folder"):
        raise KeyError(threading.active_count())
    assert threading.active_count() == before
    assert len(os.listdir("/proc/self/fd")) == open_files
    assert take(tmp_path)


def test_refusals_leave_no_files_open(tmp_path, hold):
    hold(tmp_path)
    open_files = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(InUse):
            take(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == open_files


@pytest.mark.parametrize("content", ["", "process 12 on node7", "token ../../x\n", "\0\0\0", "job 1, restart x"])
def test_a_file_that_nobody_holds_may_say_anything(tmp_path, content, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    (tmp_path / "lock").write_text(content)
    assert take(tmp_path, check=no_wait)


def test_the_kernel_of_this_host_is_believed_about_a_forked_child(tmp_path, hold, short):
    holder = hold(tmp_path)
    child = int(holder.ask("fork"))
    holder.kill()
    with pytest.raises(InUse, match=f"by process {holder.pid} on "):
        take(tmp_path, check=no_wait)
    os.kill(child, signal.SIGKILL)
    wait_until(lambda: locks._look(tmp_path)[0])
    assert take(tmp_path)


def test_programs_that_the_holder_started_do_not_keep_the_folder(tmp_path, hold):
    holder = hold(tmp_path)
    program = int(holder.ask("start"))
    holder.kill()
    os.kill(program, 0)
    assert take(tmp_path, check=no_wait)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_one_line(tmp_path, monkeypatch, number):
    def fail(descriptor, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "flock", fail)
    with pytest.raises(MachineError, match=r"its file system cannot lock files .*run\.dir and run\.nodes$") as caught:
        take(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: ")


def test_other_errors_of_locking_name_the_file(tmp_path, monkeypatch):
    def fail(descriptor, how):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(locks.fcntl, "flock", fail)
    with pytest.raises(OSError, match=str(tmp_path / "lock")):
        take(tmp_path)


# ---- on other hosts


def test_a_holder_on_another_host_that_lives_is_refused_as_soon_as_it_signs(tmp_path, hold, monkeypatch):
    monkeypatch.setattr(locks, "POLL_SECONDS", 0.01)
    holder, said = hold(tmp_path, "node7", sign=0.5), []
    began = time.monotonic()
    with pytest.raises(InUse, match=f"this folder is in use by process {holder.pid} on node7: "):
        take(tmp_path, say=said.append)
    assert time.monotonic() - began < locks.STALE_SECONDS / 4
    assert said == [f"waiting up to 60 s: this folder was held by process {holder.pid} on node7, which may be gone"]
    assert holder.ask("check") == "fine"


def test_a_holder_that_is_gone_with_its_host_is_followed(tmp_path, gone, short):
    holder, said = gone(tmp_path, "node7"), []
    began = time.monotonic()
    with locked(tmp_path, "this folder", say=said.append) as lock:
        assert time.monotonic() - began >= 0.3
        lock.check()
        assert not lock.lost
        with pytest.raises(InUse, match=f"by process {os.getpid()} on "):
            take(tmp_path, check=no_wait)
    assert said == [f"waiting up to 0.3 s: this folder was held by process {holder.pid} on node7, which may be gone"]
    assert files(tmp_path) == ["lock"]
    assert take(tmp_path, check=no_wait)


def test_a_former_holder_that_comes_back_is_told_and_leaves_the_next_ones_lock_alone(tmp_path, gone, start, short):
    former = gone(tmp_path, "node7", sign=0.05)
    with locked(tmp_path, "this folder") as lock:
        content = (tmp_path / "lock").read_bytes()
        former.send(signal.SIGCONT)
        mine = f"process {os.getpid()} on {os.uname().nodename}"
        assert former.ask("check") == f"{tmp_path}: this folder was taken over by {mine}: this process ends"
        # It goes on signing what is nobody's file any more.
        time.sleep(0.2)
        assert former.ask("leave") == "left"
        assert (tmp_path / "lock").read_bytes() == content
        lock.check()
        assert start().ask(f"hold {tmp_path}").endswith("or name another folder")
        with pytest.raises(InUse):
            take(tmp_path, check=no_wait)
    assert take(tmp_path, check=no_wait)


def test_who_was_taken_from_may_come_back_after_its_follower(tmp_path, gone, short):
    former = gone(tmp_path, "node7")
    assert take(tmp_path)
    former.send(signal.SIGCONT)
    # Nobody holds the folder, and still another one may have changed what is in it.
    assert "was taken over by" in former.ask("check")
    assert former.ask("leave") == "left"
    assert take(tmp_path, check=no_wait)


def test_a_holder_whose_file_is_removed_is_told(tmp_path):
    with locked(tmp_path, "this folder") as lock:
        (tmp_path / "lock").unlink()
        assert lock.lost
        with pytest.raises(MachineError, match="this folder has lost its lock file: this process ends"):
            lock.check()


def test_who_waits_takes_the_folder_as_soon_as_it_is_free(tmp_path, hold, monkeypatch):
    monkeypatch.setattr(locks, "POLL_SECONDS", 0.01)
    holder = hold(tmp_path, "node7")
    began = time.monotonic()
    assert take(tmp_path, say=lambda text: holder.kill())
    assert time.monotonic() - began < locks.STALE_SECONDS / 4


def test_who_waits_can_be_stopped(tmp_path, gone):
    gone(tmp_path, "node7")
    open_files = len(os.listdir("/proc/self/fd"))
    checks = itertools.count()

    def check():
        if next(checks) == 3:
            raise Stopped(signal.SIGTERM)

    with pytest.raises(Stopped):
        take(tmp_path, check=check)
    assert files(tmp_path) == ["lock"]
    assert len(os.listdir("/proc/self/fd")) == open_files


def test_a_file_system_that_does_not_answer_for_long_makes_nobody_dead(tmp_path, gone, monkeypatch):
    monkeypatch.setattr(locks, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(locks, "STALE_SECONDS", 2.0)
    holder, look, looks = gone(tmp_path, "node7", sign=0.05), locks._look, itertools.count()

    def slow(folder):
        if next(looks) == 2:
            found = look(folder)
            time.sleep(2.5)
            # It could not write either, until now.
            holder.send(signal.SIGCONT)
            return found
        return look(folder)

    monkeypatch.setattr(locks, "_look", slow)
    with pytest.raises(InUse):
        take(tmp_path)


def test_the_same_name_after_a_reboot_is_another_host(tmp_path, gone, short):
    gone(tmp_path, boot="former")
    assert take(tmp_path)


@pytest.mark.parametrize("mine", ["", None])
def test_without_ids_of_boots_the_name_decides(tmp_path, hold, monkeypatch, mine):
    hold(tmp_path, boot="former" if mine == "" else "")
    if mine is None:
        # As a version that did not write them.
        lines = (tmp_path / "lock").read_text().splitlines()
        (tmp_path / "lock").write_text("\n".join(line for line in lines if not line.startswith("boot ")))
    else:
        monkeypatch.setattr(locks, "boot_id", lambda: mine)
    with pytest.raises(InUse):
        take(tmp_path, check=no_wait)


def test_the_sign_alone_changes(tmp_path, hold):
    hold(tmp_path, sign=0.02)
    path = tmp_path / "lock"
    before = path.read_text()
    wait_until(lambda: path.read_text() != before)
    after = path.read_text()
    assert len(after) == len(before)
    assert after.rpartition("sign ")[0] == before.rpartition("sign ")[0]
    assert int(after.rpartition("sign ")[2]) > 0


# ---- Slurm


def test_a_requeued_job_follows_its_former_self_at_once(tmp_path, gone, monkeypatch):
    gone(tmp_path, "node7", SLURM_JOB_ID="77")
    assert "\njob 77, restart 0\n" in (tmp_path / "lock").read_text()
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with locked(tmp_path, "this folder", check=no_wait):
        assert "\njob 77, restart 1\n" in (tmp_path / "lock").read_text()


def test_a_requeued_job_follows_what_its_former_self_left_on_the_same_host(tmp_path, gone, monkeypatch):
    gone(tmp_path, SLURM_JOB_ID="77", SLURM_RESTART_COUNT="9")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "10")
    assert take(tmp_path, check=no_wait)


@pytest.mark.parametrize(
    ("job", "restart"), [("77", "1"), ("77", "0"), ("77", None), ("7", "2"), ("777", "2"), ("7.", "2"), ("", "2")]
)
def test_other_jobs_and_the_same_start_are_not_the_former_self(tmp_path, hold, monkeypatch, job, restart):
    holder = hold(tmp_path, SLURM_JOB_ID="77", SLURM_RESTART_COUNT="1")
    monkeypatch.setenv("SLURM_JOB_ID", job)
    if restart is not None:
        monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
    with pytest.raises(InUse):
        take(tmp_path, check=no_wait)
    assert holder.ask("check") == "fine"


# ---- several at once


@pytest.mark.parametrize("former", ["none", "left", "gone"])
def test_of_several_that_come_at_once_exactly_one_gets_the_folder(tmp_path, start, former):
    # Comers of one host believe the kernel about each other, those of several watch: then the winner must not be
    # taken for dead because this machine is busy.
    hosts, stale = (("", "", ""), 0.1) if former == "gone" else (("", "", "node8"), LONG)
    comers, first = [start(host, sign=0.05, stale=stale) for host in hosts], start("node7")
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        if former != "none":
            assert first.ask(f"hold {folder}") == "held"
        if former == "left":
            assert first.ask("leave") == "left"
        elif former == "gone":
            first.send(signal.SIGSTOP)
        assert [comer.ask(f"race {folder}") for comer in comers] == ["ready"] * 3
        (folder / "go").touch()
        answers = [comer.read() for comer in comers]
        assert sorted(answer.partition(":")[0] for answer in answers) == ["held", "refused", "refused"]
        winner = comers[answers.index("held")]
        assert winner.ask("check") == "fine"
        if former == "gone":
            first.send(signal.SIGCONT)
            assert f"taken over by process {winner.pid} on " in first.ask("check")
            assert first.ask("leave") == "left"
        assert winner.ask("leave") == "left"
        assert files(folder) == ["go", "lock"]


@contextmanager
def just_before(monkeypatch, name, act, call_number=0):
    """Lets others do something just before this process calls a function of the module."""
    original, calls = getattr(locks, name), itertools.count()

    def call(*words, **settings):
        if next(calls) == call_number:
            act()
        return original(*words, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(locks, name, call)
        yield


@pytest.mark.parametrize("before", ["_follow", "_leads_to", "_read_path"])
@pytest.mark.parametrize("former", ["none", "left"])
def test_who_looked_before_another_one_took_the_folder_is_refused(tmp_path, hold, start, monkeypatch, former, before):
    if former == "left":
        take(tmp_path)
    others = []
    with just_before(monkeypatch, before, lambda: others.append(start().ask(f"hold {tmp_path}"))):
        if before == "_follow":
            with pytest.raises(InUse):
                take(tmp_path)
            assert others == ["held"]
        else:
            # From here on the place is this process's.
            assert take(tmp_path)
            assert [answer.partition(":")[0] for answer in others] == ["refused"]
    assert [name for name in files(tmp_path) if name != "lock"] == []


def test_who_took_another_for_dead_is_refused_where_a_third_was_faster(tmp_path, gone, hold, short, monkeypatch):
    gone(tmp_path, "node7")
    faster = []

    def act():
        faster.append(hold(tmp_path, "node8", sign=0.05, stale=0.1))
        monkeypatch.setattr(locks, "STALE_SECONDS", LONG)

    with just_before(monkeypatch, "_follow", act), pytest.raises(InUse, match="on node8"):
        take(tmp_path)
    assert faster[0].ask("check") == "fine"


def test_a_file_that_was_renamed_meanwhile_is_no_way_to_the_place(tmp_path, monkeypatch):
    third = []

    def act():
        # Another one held the folder and left, someone cleaned up, and a third one is about to take the place.
        take(tmp_path)
        (tmp_path / "lock").unlink()
        third.append((tmp_path / ".lock.first.next").open("w"))
        locks.fcntl.flock(third[0], locks.fcntl.LOCK_EX)

    # The first call is of the look at `lock`, the second of the file that shall follow it.
    with just_before(monkeypatch, "_flock", act, 1), pytest.raises(InUse, match="by another process: "):
        take(tmp_path)
    assert files(tmp_path) == [".lock.first.next", "lock"]
    third[0].close()
    assert take(tmp_path, check=no_wait)
    assert files(tmp_path) == ["lock"]


def test_who_dies_while_it_takes_the_folder_is_followed(tmp_path):
    take(tmp_path)
    token = locks._read_path(tmp_path / "lock").token
    # What a kill just before the renaming leaves.
    (tmp_path / f".lock.{token}.next").write_text("process 1 on node7\n" + 100 * "token 0123\n")
    with locked(tmp_path, "this folder", check=no_wait):
        assert (tmp_path / "lock").read_text().count("token") == 1
        assert files(tmp_path) == ["lock"]


def test_a_full_disk_while_it_takes_the_folder_leaves_it_free(tmp_path, monkeypatch):
    take(tmp_path)
    before, open_files = (tmp_path / "lock").read_bytes(), len(os.listdir("/proc/self/fd"))

    def full(descriptor, content, offset):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(locks.os, "pwrite", full)
        with pytest.raises(OSError, match="No space left"):
            take(tmp_path)
    assert (tmp_path / "lock").read_bytes() == before
    assert len(os.listdir("/proc/self/fd")) == open_files
    assert take(tmp_path, check=no_wait)
    assert files(tmp_path) == ["lock"]


def test_a_sign_that_cannot_be_written_is_written_later(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "SIGN_SECONDS", 0.01)
    with locked(tmp_path, "this folder") as lock:
        write, failed = os.pwrite, []

        def fail(descriptor, content, offset):
            if len(failed) < 3:
                failed.append(content)
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return write(descriptor, content, offset)

        monkeypatch.setattr(locks.os, "pwrite", fail)
        wait_until(lambda: len(failed) == 3)
        before = (tmp_path / "lock").read_bytes()
        wait_until(lambda: (tmp_path / "lock").read_bytes() != before)
        lock.check()
