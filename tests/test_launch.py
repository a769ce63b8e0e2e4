"""Processes that train together: started, stopped, lost and started again; one of them alone tells how it ended."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from fastgen import launch as launching
from fastgen.errors import Stopped, UserError, command
from fastgen.launch import End, Ended, Verdict, exit_code_for, launch, processes_wanted

ROOT = Path(__file__).resolve().parents[1]
CORES = len(os.sched_getaffinity(0))

# The first word says what to do, the second is a folder where the test finds what was done. Torch is not imported where
# nothing is told between the processes: that takes most of the time.
WORKERS = """
import os, signal, sys, time
from pathlib import Path
from fastgen import trainings
from fastgen.errors import MachineError, Stopped, UserError
from fastgen.stop import StopRequest

RANK = int(os.environ["RANK"])
trainings.GRACE_SECONDS = float(os.environ.get("GRACE_SECONDS", 60))


def main(words):
    act, folder = words[0], Path(words[1])
    with open(folder / f"begun {RANK}", "a") as file:
        print(os.getpid(), file=file, flush=True)
    globals()[act](folder, words)


def joined():
    from fastgen import distributed
    from fastgen.config import DistSettings
    return distributed.joined(DistSettings(timeout_minutes=2 / 60), "cpu")


def wait():
    time.sleep(100)


def attempts(folder):
    return len((folder / f"begun {RANK}").read_text().splitlines())


def good(folder, words):
    import torch
    with joined() as group:
        total = group.sum(torch.tensor([RANK + 1.0])).item()
    print(RANK, total, torch.get_num_threads(), words[2:], Path(sys.argv[0]).name, sys.argv[1] == words[0], flush=True)


def threads(folder, words):
    print(os.environ["OMP_NUM_THREADS"], flush=True)


def mistake_of_one(folder, words):
    with joined() as group:
        group.most([0])
        if RANK == 1:
            raise UserError("no such thing:\\n name another")
        group.most([0])


def mistake_of_all(folder, words):
    with joined() as group:
        group.most([0])
        raise UserError("no such thing")


def unexpected(folder, words):
    if RANK == 1:
        raise ValueError("of many\\nlines")
    wait()


def dies_once(folder, words):
    with joined() as group:
        group.most([0])
        if RANK == 1 and attempts(folder) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        group.most([0])


def dies(folder, words):
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    wait()


def hangs(folder, words):
    with joined() as group:
        group.most([0])
        if RANK == 1:
            wait()
        group.most([0])


def stops_by_agreement(folder, words):
    # The other one has gone long before the main process has saved.
    with StopRequest() as stop, joined() as group:
        (folder / f"ready {RANK}").touch()
        while not group.most([stop.number])[0]:
            time.sleep(1.2)
        number = group.most([stop.number])[0]
        if group.main:
            time.sleep(1)
            (folder / "saved").touch()
        raise Stopped(number)


def stops(folder, words):
    with StopRequest() as stop:
        (folder / f"ready {RANK}").touch()
        while not stop.requested:
            time.sleep(0.02)
        (folder / f"stopped {RANK}").write_text(str(stop.number))
        stop.check()


def stops_or_hangs(folder, words):
    if RANK == 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (folder / "ready 1").touch()
        wait()
    stops(folder, words)


def fails_to_save(folder, words):
    try:
        stops(folder, words)
    except Stopped:
        if RANK == 1:
            raise MachineError("the disk is full")
        raise


def stopped_before_training(folder, words):
    # The other one trains already, and loses the connection.
    with joined() as group:
        group.most([0])
        if RANK == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        with StopRequest():
            group.most([0])


def prints(folder, words):
    while RANK == 0:
        print("x", flush=True)
    wait()


def prints_last(folder, words):
    if RANK == 1:
        wait()
    print("x", flush=True)
    while not (folder / "closed").exists():
        time.sleep(0.02)
    print("x")


def prints_before_a_mistake(folder, words):
    prints_last(folder, words)
    raise UserError("no such thing")


def prints_and_ends(folder, words):
    if RANK == 0:
        prints_last(folder, words)
"""

PARENT = """
import os, sys
from fastgen import trainings
from fastgen.errors import command
from fastgen.launch import launch
trainings.GRACE_SECONDS = float(os.environ.get("GRACE_SECONDS", 60))
sys.exit(command(lambda words: launch(words, 2, 1, module="workers"), sys.argv[1:]))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where the processes find their module, and leave their marks."""
    (tmp_path / "workers.py").write_text(WORKERS)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    # A killed parent leaves the folder of its verdicts behind.
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    # Lines are to be written as a whole, and the last ones at the end.
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    return tmp_path


@pytest.fixture
def run(folder, capfd):
    """Function that launches two processes from here: exit code, lines of standard output and of standard error."""

    def run(act: str, *words: str, max_restarts: int = 1, processes: int = 2) -> tuple[int, list[str], list[str]]:
        def main(words):
            launch(words, processes, max_restarts, module="workers")

        code = command(main, [act, str(folder), *words])
        out, err = capfd.readouterr()
        return code, out.splitlines(), err.splitlines()

    return run


@pytest.fixture
def start(folder):
    """Function that launches them from a process of its own."""
    parents = []

    def start(act: str, place: Path = folder, **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PARENT, act, str(place)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        parents.append(subprocess.Popen(command, env={**os.environ, **environment}, text=True, **pipes))
        return parents[-1]

    yield start
    for parent in parents:
        parent.kill()
        with parent:
            pass


def wait_for(paths: list[Path], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not all(path.exists() for path in paths):
        assert time.monotonic() < end, f"{[path.name for path in paths if not path.exists()]} did not appear"
        time.sleep(0.02)


def pid_of(folder: Path, rank: int) -> int:
    return int((folder / f"begun {rank}").read_text().splitlines()[-1])


def attempts(folder: Path) -> int:
    return len((folder / "begun 1").read_text().splitlines())


def alive(pid: int) -> bool:
    try:
        # One that has ended and was not waited for is no longer alive.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_all_train_and_nothing_else_is_said(run, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    before, handlers = dict(os.environ), [signal.getsignal(number) for number in launching.heeded()]
    code, out, err = run("good", "$HOME$$", "", "two words")
    tail = f"3.0 {max(1, CORES // 2)} ['$HOME$$', '', 'two words'] workers.py True"
    assert (code, sorted(out), err) == (0, [f"0 {tail}", f"1 {tail}"], [])
    assert {name: os.environ.get(name) for name in before} == before
    assert not {"OMP_NUM_THREADS", "RANK", *launching.ENVIRONMENT} & (set(os.environ) - set(before))
    assert [signal.getsignal(number) for number in launching.heeded()] == handlers


def test_processes_share_the_cores_unless_the_user_says_otherwise(run, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert run("threads", processes=1) == (0, [str(CORES)], [])
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert run("threads") == (0, ["7", "7"], [])


def test_a_mistake_that_one_process_finds_is_told_once_and_not_tried_again(run, folder):
    assert run("mistake_of_one") == (2, [], ["fastgen: no such thing: name another"])
    assert attempts(folder) == 1


def test_a_mistake_that_all_find_is_told_once(run, folder):
    assert run("mistake_of_all") == (2, [], ["fastgen: no such thing"])
    assert attempts(folder) == 1


def test_an_unexpected_exception_has_one_traceback(run, folder):
    code, out, err = run("unexpected")
    assert (code, out, attempts(folder)) == (1, [], 2)
    traces = [line for line in err if line.startswith("Traceback")]
    told = [line for line in err if line.startswith("fastgen: ")]
    assert len(traces) == 1
    assert told == [
        "fastgen: process 1 of 2 failed: ValueError: of many lines: all start again from the last save (1 of 1)",
        "fastgen: process 1 of 2 failed: ValueError: of many lines; dist.max_restarts=1 is used up",
    ]
    assert any('raise ValueError("of many' in line for line in err)


def test_a_killed_process_is_started_again_with_all_others(run, folder):
    again = "all start again from the last save (1 of 1)"
    assert run("dies_once") == (0, [], [f"fastgen: process 1 of 2 was killed by SIGKILL: {again}"])
    assert attempts(folder) == 2


def test_restarts_are_used_up(run, folder):
    code, out, err = run("dies", max_restarts=2)
    assert (code, out, attempts(folder)) == (1, [], 3)
    assert err[-1] == "fastgen: process 1 of 2 was killed by SIGKILL; dist.max_restarts=2 is used up"
    assert [line[-8:] for line in err[:-1]] == ["(1 of 2)", "(2 of 2)"]


def test_a_process_that_hangs_is_named(run):
    code, out, err = run("hangs", max_restarts=0)
    assert (code, out, len(err)) == (1, [], 1)
    assert err[0].startswith("fastgen: process 1 of 2 hangs: it has not answered for ")


@pytest.mark.parametrize("signalled", [[1], [0, 1]], ids=["one of them", "all of them"])
def test_processes_that_stop_by_themselves_are_not_started_again_and_save_undisturbed(run, folder, signalled):
    def ask():
        wait_for([folder / "ready 0", folder / "ready 1"])
        for rank in signalled:
            os.kill(pid_of(folder, rank), signal.SIGTERM)

    asker = threading.Thread(target=ask)
    asker.start()
    ended = run("stops_by_agreement")
    asker.join()
    assert ended == (128 + signal.SIGTERM, [], ["fastgen: stopped by SIGTERM"])
    assert (folder / "saved").exists()
    assert attempts(folder) == 1


def test_a_signal_to_one_process_before_it_trains_is_a_stop(run, folder):
    assert run("stopped_before_training") == (128 + signal.SIGTERM, [], ["fastgen: stopped by SIGTERM"])
    assert attempts(folder) == 1


@pytest.mark.usefixtures("_signals_are_heard")
def test_signals_to_the_parent_are_passed_on(folder, start):
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]
    places = [folder / number.name for number in numbers]
    for place in places:
        place.mkdir()
    parents = [start("stops", place) for place in places]
    for number, place, parent in zip(numbers, places, parents, strict=True):
        wait_for([place / "ready 0", place / "ready 1"])
        parent.send_signal(number)
    for number, place, parent in zip(numbers, places, parents, strict=True):
        out, err = parent.communicate(timeout=60)
        assert (parent.returncode, out, err) == (128 + number, "", f"fastgen: stopped by {number.name}\n")
        assert [(place / f"stopped {rank}").read_text() for rank in (0, 1)] == [str(int(number))] * 2


def test_an_error_while_stopping_is_told(folder, start):
    parent = start("fails_to_save")
    wait_for([folder / "ready 0", folder / "ready 1"])
    parent.terminate()
    out, err = parent.communicate(timeout=60)
    assert (parent.returncode, out, err) == (1, "", "fastgen: the disk is full\n")


def test_a_process_that_does_not_end_in_time_is_killed(folder, start):
    parent = start("stops_or_hangs", GRACE_SECONDS="1")
    wait_for([folder / "ready 0", folder / "ready 1"])
    parent.terminate()
    out, err = parent.communicate(timeout=60)
    assert (parent.returncode, out) == (128 + signal.SIGTERM, "")
    assert err.splitlines() == [
        "fastgen: process 1 of 2 did not end within 1 s of SIGTERM: killed",
        "fastgen: stopped by SIGTERM",
    ]
    assert not alive(pid_of(folder, 1))


def test_no_process_outlives_a_killed_parent(folder, start):
    # One saves and ends; the other one hangs, and ends when the grace is over.
    parent = start("stops_or_hangs", GRACE_SECONDS="2")
    wait_for([folder / "ready 0", folder / "ready 1"])
    pids = [pid_of(folder, rank) for rank in (0, 1)]
    parent.kill()
    parent.wait()
    wait_for([folder / "stopped 0"], seconds=10)
    assert (folder / "stopped 0").read_text() == str(int(signal.SIGTERM))
    assert alive(pids[1])
    end = time.monotonic() + 20
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.05)
    # Those that wrote to them are gone: nothing is left that keeps them open.
    assert parent.communicate(timeout=10) == ("", "")


def test_a_reader_that_went_away_ends_all_quietly(folder, start):
    expected = {
        "prints": (0, ""),
        "prints_and_ends": (0, ""),
        "prints_before_a_mistake": (2, "fastgen: no such thing\n"),
    }
    parents = {act: start(act) for act in expected}
    for parent in parents.values():
        parent.stdout.readline()
        parent.stdout.close()
    (folder / "closed").touch()
    assert {act: (parent.wait(60), parent.stderr.read()) for act, parent in parents.items()} == expected


def verdict(rank: int, end: End, seconds: float, exit_code: int = 1) -> Verdict:
    return Verdict(rank, end, f"{end.name} {rank}", exit_code, seconds)


def told(*verdicts: Verdict, asked: int = 0) -> Verdict:
    return launching._told(launching._judged(verdicts), asked)


def test_what_happened_is_told_and_not_what_followed():
    lost_a_neighbour = verdict(0, End.ASIDE, 10.2)
    for first in (End.KILLED, End.FAILED, End.ABORTED):
        assert told(lost_a_neighbour, verdict(1, first, 10.0)).text == f"{first.name} 1"
        # The launcher asked it to end, after the failure.
        assert told(verdict(0, End.STOPPED, 10.3, 143), verdict(1, first, 10.0)).text == f"{first.name} 1"
    assert told(verdict(0, End.FAILED, 10.4), verdict(1, End.FAILED, 10.1)).text == "FAILED 1"
    assert told(verdict(0, End.ASIDE, 10.4), verdict(1, End.ASIDE, 10.1)).text == "ASIDE 1"
    assert told(verdict(0, End.DONE, 10.0), lost_a_neighbour).text == "ASIDE 0"
    assert told(verdict(0, End.DONE, 10.0), verdict(1, End.DONE, 9.0)).end is End.DONE


def test_a_process_without_a_verdict_is_judged_by_its_exit_code():
    def ended(code: int) -> Verdict:
        failure = ProcessFailure(local_rank=1, pid=1, exitcode=code, error_file="none")
        failure.timestamp = 10
        return launching._end_of(1, None, failure, 2)

    assert told(ended(-signal.SIGSEGV), verdict(0, End.ASIDE, 10.1)).text == "process 1 of 2 was killed by SIGSEGV"
    assert told(ended(-signal.SIGABRT), verdict(0, End.FAILED, 10.1)).text == "FAILED 0"
    assert told(ended(7), verdict(0, End.ASIDE, 10.1)).text == "process 1 of 2 ended with exit code 7"
    # By the launcher, which tells the seconds without their fraction.
    assert told(ended(-signal.SIGTERM), verdict(0, End.FAILED, 10.9)).text == "FAILED 0"
    with pytest.raises(Stopped):
        told(ended(-signal.SIGTERM), verdict(0, End.STOPPED, 10.9, 143))
    # It had done its work, and crashed on the way out.
    done = verdict(1, End.DONE, 9.0)
    failure = ProcessFailure(local_rank=1, pid=1, exitcode=-signal.SIGSEGV, error_file="none")
    assert launching._end_of(1, done, failure, 2).end is End.KILLED


def test_a_kill_by_the_launcher_is_no_cause():
    # It kills 30 s after the failure, and tells whole seconds.
    with pytest.raises(Ended, match="TOLD 0"):
        told(verdict(0, End.TOLD, 10.9), verdict(1, End.KILLED, 40.0))
    assert told(verdict(0, End.FAILED, 10.9), verdict(1, End.KILLED, 40.0)).text == "FAILED 0"
    assert told(verdict(0, End.FAILED, 10.9), verdict(1, End.KILLED, 11.0)).text == "KILLED 1"


def test_a_stop_that_was_asked_for_is_no_loss():
    with pytest.raises(Stopped, match="SIGUSR1"):
        told(verdict(0, End.STOPPED, 10.0, 128 + signal.SIGUSR1), verdict(1, End.ASIDE, 10.1))
    with pytest.raises(Stopped, match="stop_after_minutes"):
        told(*(verdict(rank, End.STOPPED, 10.0, 128 + signal.SIGALRM) for rank in (0, 1)))
    with pytest.raises(Stopped, match="SIGINT"):
        told(verdict(0, End.DONE, 10.0), verdict(1, End.KILLED, 10.1), asked=signal.SIGINT)
    # It did not stop as it should, and may not have saved.
    with pytest.raises(Ended, match="FAILED 1"):
        told(verdict(0, End.STOPPED, 10.0, 143), verdict(1, End.FAILED, 10.1))
    # The launcher asked for it, as the connection was lost.
    assert told(verdict(0, End.ASIDE, 10.0), verdict(1, End.STOPPED, 10.1, 143)).text == "ASIDE 0"
    # All was done when the signal came.
    assert told(verdict(0, End.DONE, 10.0), verdict(1, End.DONE, 10.0), asked=signal.SIGTERM).end is End.DONE


@pytest.mark.parametrize(
    ("processes", "device", "gpus", "expected"),
    [
        (None, "auto", 8, 8),
        (None, "cuda", 4, 4),
        (None, "cpu", 8, 1),
        (None, "auto", 0, 1),
        (None, "cuda", 0, 1),
        (3, "auto", 8, 3),
        (3, "auto", 0, 3),
        (3, "cpu", 2, 3),
        (3, "auto", 2, "dist.processes=3 needs as many GPUs, and there are 2"),
        (3, "cuda", 0, "dist.processes=3 needs as many GPUs, and there are 0"),
    ],
)
def test_one_process_for_each_gpu_unless_the_recipe_says_otherwise(monkeypatch, processes, device, gpus, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    recipe = SimpleNamespace(run=SimpleNamespace(device=device), dist=SimpleNamespace(processes=processes))
    if isinstance(expected, int):
        assert processes_wanted(recipe) == expected
        return
    with pytest.raises(UserError, match=re.escape(expected)):
        processes_wanted(recipe)


def test_torchrun_does_not_start_a_stopped_run_again():
    assert exit_code_for(143, {"TORCHELASTIC_MAX_RESTARTS": "3"}) == 0
    assert exit_code_for(143, {"TORCHELASTIC_MAX_RESTARTS": "0"}) == 143
    assert exit_code_for(143, {}) == 143
    assert exit_code_for(1, {"TORCHELASTIC_MAX_RESTARTS": "3"}) == 1


SRUN = """#!/bin/bash
echo "$@" > "$MARKS/srun"
trap 'exit $ON_SIGNAL' USR1
touch "$MARKS/started"
[[ -n $ON_ITS_OWN ]] && exit "$ON_ITS_OWN"
while true; do sleep 0.05; done
"""
SCONTROL = """#!/bin/bash
[[ $1 == show ]] && printf 'node7\\nnode8\\n' && exit
echo "$@" >> "$MARKS/scontrol"
"""


@pytest.mark.parametrize(
    ("nodes", "on_its_own", "on_signal", "requeued"),
    [
        # What the training ends with, on its own or once the signal was passed on.
        (1, "", 128 + 10, True),
        (2, "", 1, True),
        (1, "", 0, False),
        (1, "", 1, False),
        (1, "0", 0, False),
        (2, "1", 0, False),
        (1, "142", 0, True),
        (1, "143", 0, False),
    ],
)
def test_the_slurm_job_goes_back_into_the_queue_after_a_stop_alone(tmp_path, nodes, on_its_own, on_signal, requeued):
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    marks = tmp_path / "marks"
    marks.mkdir()
    slurm = {"SLURM_JOB_ID": "123", "SLURM_JOB_NUM_NODES": str(nodes), "SLURM_JOB_NODELIST": "node[7-8]"}
    stubs = {"MARKS": str(marks), "ON_ITS_OWN": on_its_own, "ON_SIGNAL": str(on_signal)}
    environment = {**os.environ, **slurm, **stubs, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    job = subprocess.Popen(["bash", str(ROOT / "rcp" / "r18_gen.sbatch"), "--data.root=a b"], env=environment)
    wait_for([marks / "started"])
    if not on_its_own:
        job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=20) == int(on_its_own or on_signal)
    assert (marks / "scontrol").exists() == requeued
    if requeued:
        assert (marks / "scontrol").read_text() == "requeue 123\n"
    called = (marks / "srun").read_text()
    assert called.endswith("-m fastgen.train --cfg rcp/r18_gen.yaml --data.root=a b\n")
    assert ("--rdzv_endpoint=node7:20123" in called) == (nodes > 1)
