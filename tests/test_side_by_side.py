"""Several networks on one device: are images counted rightly, and does a process that fails end the whole?"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import common, networks, networks_processes, rigs, side_by_side
from benchmarks.gpu_check import SMALL_FACTS
from benchmarks.networks import NetworkFailed, Peak, Race, Runner, Setup, run_together
from benchmarks.networks_processes import in_processes
from benchmarks.networks_streams import Streams
from benchmarks.side_by_side import Measured, Side
from fastgen.data.facts import DATASETS
from fastgen.errors import command
from fastgen.meters import Tally

CPU = torch.device("cpu")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
SETUP = Setup("resnet8", 16, "fp32", "student", SMALL_FACTS, 64, "cpu")
# Far more than it takes to notice an end, far less than the rounds that are cut short by it.
SOON_SECONDS, LONG_SECONDS = 60.0, 600.0
SMALL_WORDS = ["--model=resnet8", "--batch_size=16", "--precision=fp32", "--networks=2", "--rounds=1", "--device=cpu"]


def alive(pid):
    """Whether a process runs; one that is over and not waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def eventually(condition):
    """What a condition comes to within some seconds."""
    deadline = time.monotonic() + SOON_SECONDS
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@contextmanager
def failing(match):
    """A failure in one line, told soon, after which no process is left."""
    began = time.monotonic()
    with pytest.raises(NetworkFailed, match=match) as told:
        yield
    assert "\n" not in str(told.value)
    assert multiprocessing.active_children() == []
    assert time.monotonic() - began < 2 * SOON_SECONDS


# Counting.


@pytest.mark.parametrize(
    ("seconds", "images"), [(3.0, 30), (0.5, 5), (1.0, 10), (1.25, 12.5), (4.0, 40), (9.0, 40), (0.0, 0)]
)
def test_images_that_are_done_by_a_time(seconds, images):
    assert networks.images_done(seconds, [1.0, 2.0, 4.0], [10, 10, 20]) == images


class Ticking:
    """A clock that only work, and sleep, let go on."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(networks, "time", SimpleNamespace(monotonic=lambda: self.now))

    def rig(self, seconds, images, loss=1.0):
        def tallies():
            while True:
                self.now += seconds
                yield Tally((0, 1), (images - 1, 1), (torch.full((2,), loss),), (torch.zeros(2),))

        return rigs.Rig(tallies())


def test_networks_take_turns_and_what_is_done_in_time_counts(monkeypatch):
    clock = Ticking(monkeypatch)
    made = [clock.rig(1.0, 10), clock.rig(2.0, 30)]
    # Done after 1, 4, 7 and after 3, 6, 9 seconds.
    assert run_together([Runner(rig, CPU) for rig in made], 100.0, 7.0) == (30, 70)
    assert [rig.steps for rig in made] == [6, 6]
    assert [rig.meter.read().images for rig in made] == [30, 90]


def test_a_network_that_begins_late_has_done_less(monkeypatch):
    clock = Ticking(monkeypatch)
    runner = Runner(clock.rig(1.0, 10), CPU)
    runner.warm_up()
    assert clock.now == 101.0
    # Done after 1.5 and 2.5 seconds: of the second half is in time.
    assert run_together([runner], 100.5, 2.0) == (15,)
    with pytest.raises(NetworkFailed, match=r"took no step within 0\.5 s: give more --seconds"):
        run_together([runner], 100.5, 0.5)


def test_a_loss_that_is_not_finite_is_noticed(monkeypatch):
    clock = Ticking(monkeypatch)
    with pytest.raises(ValueError, match="not finite at step 0"):
        run_together([Runner(clock.rig(1.0, 10, loss=torch.nan), CPU)], 100.0, 2.0)


def test_totals_are_set_beside_one_alone_of_the_same_way_and_round():
    races = {
        Side("streams", 1): [(100,), (200,), (400,)],
        Side("streams", 2): [(90, 70), (200, 180), (400, 400)],
        Side("processes", 1): [(50,), (50,), (50,)],
        Side("processes", 2): [(50, 50), (30, 30), (40, 40)],
    }
    measured = Measured(2.0, {side: tuple(Race(images, None) for images in of) for side, of in races.items()})
    assert measured.total(Side("streams", 2)) == common.spread([80, 190, 400])
    assert measured.over_alone(Side("streams", 2)) == common.spread([1.6, 1.9, 2.0])
    assert measured.over_alone(Side("processes", 2)) == common.spread([2.0, 1.2, 1.6])
    assert measured.over_alone(Side("processes", 1)) == common.spread([1, 1, 1])
    assert measured.of_each(Side("streams", 2)) == common.spread([45, 35, 100, 90, 200, 200])


def test_rounds_are_taken_in_turns_and_the_first_is_dropped():
    taken = []

    class Noting:
        def __init__(self, way):
            self.way = way

        def race(self, networks, seconds):
            taken.append((self.way, networks))
            return Race((float(len(taken)),) * networks, Peak(10 * len(taken), 20 * len(taken)))

    ways = {way: Noting(way).race for way in ("streams", "processes")}
    measured = side_by_side.measure(ways, (1, 2), CPU, seconds=1.0, rounds=3)
    order = list(itertools.product(ways, (1, 2)))
    assert taken == [*order, *order[1:], *order[:1], *order[2:], *order[:2], *order[3:], *order[:3]]
    of_alone = [race.images for race in measured.races[Side("streams", 1)]]
    assert of_alone == [(8.0,), (11.0,), (14.0,)]
    rows = side_by_side.result_rows(SETUP, measured, CPU)
    assert [(row["way"], row["networks"]) for row in rows] == order
    assert [row["rounds"] for row in rows] == [3] * 4
    assert [row["images_per_second_median"] for row in rows] == [11.0, 24.0, 9.0, 20.0]
    assert [row["peak_reserved_mb"] for row in rows] == [280, 300, 320, 260]


# Processes.


@pytest.mark.parametrize(("cores", "each"), [(2, [2, 1, 1]), (9, [9, 4, 2])])
def test_processes_share_the_cores(monkeypatch, cores, each):
    monkeypatch.setattr(networks_processes, "usable_cores", lambda: cores)
    assert [networks_processes.threads_each(networks) for networks in (1, 2, 4)] == each
    told = networks_processes.sharing_line((1, 2), CPU)
    assert told == f"processes: {cores} cores; threads {each[0]} in each of 1, {each[1]} in each of 2"


def test_processes_train_side_by_side(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(networks_processes, "usable_cores", lambda: 2)
    with in_processes(SETUP, 2) as processes:
        pids = [child.pid for child in multiprocessing.active_children()]
        began = time.monotonic()
        measured = side_by_side.measure({"processes": processes.race}, (1, 2), CPU, seconds=0.3, rounds=1)
        took = time.monotonic() - began
    assert len(pids) == 2
    assert not any(map(alive, pids))
    # Side by side: two rounds of two turns.
    assert took > 4 * 0.3
    alone, both = (measured.races[Side("processes", networks)] for networks in (1, 2))
    assert [len(race.images) for race in (*alone, *both)] == [1, 2]
    assert min(images for race in (*alone, *both) for images in race.images) > 0
    side_by_side.report(SETUP, measured)
    common.append_rows(tmp_path / "side_by_side.csv", side_by_side.result_rows(SETUP, measured, CPU))
    rows = common.read_rows(tmp_path / "side_by_side.csv")
    assert [(row["networks"], row["engine"], row["role"]) for row in rows] == [
        ("1", "eager", "student"),
        ("2", "eager", "student"),
    ]
    assert [row["threads_each"] for row in rows] == ["2", "1"]
    assert all(float(row["images_per_second_median"]) > 0 for row in rows)
    assert float(rows[0]["over_alone_median"]) == 1
    assert all(row["peak_allocated_mb"] == row["peak_reserved_mb"] == row["mps"] == "" for row in rows)
    out = capsys.readouterr().out
    assert "over one alone" in out
    assert "MB" not in out


def test_what_a_process_raises_is_told():
    with failing(r"^network 1 of 1: KeyError: 'resnet9'$"), in_processes(replace(SETUP, model="resnet9"), 1):
        pass


def test_a_loss_that_is_not_finite_in_a_process_is_told():
    broken = replace(SETUP, facts=replace(SMALL_FACTS, std=(0.0,) * 3))
    with failing(r"^network 1 of 1: ValueError: the loss was not finite at step 0$"), in_processes(broken, 1) as one:
        one.race(1, 0.1)


def test_a_process_that_is_killed_ends_the_round():
    def kill(pid):
        os.kill(pid, signal.SIGKILL)

    with failing(r"^network \d of 2: its process was ended by SIGKILL$"), in_processes(SETUP, 2) as processes:
        victim = max(child.pid for child in multiprocessing.active_children())
        threading.Timer(1.0, kill, [victim]).start()
        processes.race(2, LONG_SECONDS)


def test_a_process_that_died_between_rounds_is_told():
    with failing(r"^network \d of 2: its process was ended by SIGTERM$"), in_processes(SETUP, 2) as processes:
        victim = multiprocessing.active_children()[0]
        victim.terminate()
        victim.join()
        processes.race(2, 0.1)


def test_a_process_that_does_not_begin_is_told(monkeypatch):
    with failing(r"^network \d of 2: did not begin within 0\.5 s$"), in_processes(SETUP, 2) as processes:
        monkeypatch.setattr(networks_processes, "BEGIN_SECONDS", 0.5)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGSTOP)
        processes.race(2, 0.1)


def test_a_process_that_does_not_come_to_its_first_step_is_told(monkeypatch):
    monkeypatch.setattr(networks_processes, "BUILD_SECONDS", 0.01)
    with failing(r"^network 1 of 1: did not build its network within 0\.01 s$"), in_processes(SETUP, 1):
        pass


def children_of(pid):
    """Processes that it started: workers, but not the helper that multiprocessing starts beside them."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
            found.append(int(child))
    return found


@contextmanager
def long_command(tmp_path):
    """The command, and the processes that it started, in rounds that go on for minutes."""
    words = [*SMALL_WORDS, f"--seconds={LONG_SECONDS:g}", f"--results={tmp_path}", "--by=processes"]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.side_by_side", *words], cwd=common.ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    children = []
    try:
        assert eventually(lambda: len(children_of(process.pid)) == 2)
        children += children_of(process.pid)
        yield process, children
    finally:
        for pid in (process.pid, *children):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def test_a_killed_process_ends_the_command_in_one_line(tmp_path):
    with long_command(tmp_path) as (process, children):
        os.kill(children[0], signal.SIGKILL)
        _, told = process.communicate(timeout=SOON_SECONDS)
        assert process.returncode == 1
        assert told == "fastgen: network 1 of 2: its process was ended by SIGKILL\n"
        assert not any(map(alive, children))
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("_signals_are_heard")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_process_is_left_when_the_command_ends(tmp_path, number):
    with long_command(tmp_path) as (process, children):
        process.send_signal(number)
        _, told = process.communicate(timeout=SOON_SECONDS)
        assert (process.returncode, told) == ((-9, "") if number == signal.SIGKILL else (130, "fastgen: interrupted\n"))
        assert eventually(lambda: not any(map(alive, children)))


def test_the_command_from_any_folder(run_command, tmp_path):
    words = [*SMALL_WORDS, "--seconds=0.2", f"--results={tmp_path}"]
    ended = run_command(words, module="benchmarks.side_by_side", env={"PYTHONPATH": str(common.ROOT)})
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert lines[1] == "streams: not measured (no GPU)"
    assert lines[2].startswith("processes: ")
    rows = common.read_rows(tmp_path / "side_by_side.csv")
    assert [(row["way"], row["networks"]) for row in rows] == [("processes", "1"), ("processes", "2")]


# The command line.


@pytest.mark.parametrize(("text", "counts"), [("1", (1,)), ("4,2", (1, 2, 4)), ("1,16", (1, 16)), (" 3", (1, 3))])
def test_one_alone_is_always_measured(text, counts):
    assert side_by_side.network_counts(text) == counts


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("--networks=0", "'0' is below 1"),
        ("--networks=1,-2", "'-2' is below 1"),
        ("--networks=1,2,2", "'1,2,2' names a number twice"),
        ("--networks=1,two", "'two' is no whole number"),
        ("--networks=1.5", "'1.5' is no whole number"),
        ("--networks=", "'' is no whole number"),
        ("--networks=1,", "'' is no whole number"),
        ("--networks=2,17", "17 is above 16"),
        ("--seconds=0", "'0' is no time above 0"),
        ("--seconds=nan", "'nan' is no time above 0"),
        ("--seconds=soon", "invalid positive_seconds value: 'soon'"),
        ("--rounds=0", "'0' is below 1"),
        ("--by=threads", "invalid choice: 'threads'"),
        ("--role=teacher", "invalid choice: 'teacher'"),
        ("--model=resnet50", "invalid choice: 'resnet50'"),
        ("--kernels=triton", "--kernels=triton is timed on an NVIDIA GPU alone"),
        ("--batchnorm=triton", "--batchnorm=triton is timed on an NVIDIA GPU alone"),
        ("--batch_size=50001", "50001 images are taken at once, and there are 50000"),
    ],
)
def test_a_wrong_argument_is_one_line(word, why, capsys):
    assert command(side_by_side.main, ["--device=cpu", word]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fastgen: ")
    assert captured.err.count("\n") == 1
    assert why in captured.err
    assert not captured.out


@without_gpu
def test_streams_are_not_measured_without_a_gpu(capsys, tmp_path):
    assert command(side_by_side.main, ["--by=streams", f"--results={tmp_path}"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["streams: not measured (no GPU)"]
    assert command(side_by_side.main, ["--device=cuda", f"--results={tmp_path}"]) == 0
    assert capsys.readouterr().out == "not measured (no GPU)\n"
    assert not list(tmp_path.iterdir())


def test_whether_mps_runs_is_told(monkeypatch, tmp_path):
    gpu = torch.device("cuda")
    monkeypatch.delenv(networks_processes.MPS_KEY, raising=False)
    assert networks_processes.mps_pipe() == Path("/tmp/nvidia-mps/control")
    monkeypatch.setenv(networks_processes.MPS_KEY, str(tmp_path))
    assert "is not running" in networks_processes.sharing_line((1,), gpu)
    (tmp_path / "control").touch()
    assert "at the same time" in networks_processes.sharing_line((1,), gpu)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_networks_on_streams_learn_as_one_alone(kernels):
    facts = DATASETS["cifar100"]
    setup = Setup("resnet8", 128, "fp32", "student", facts, 4096, "cuda", kernels, kernels)
    device = common.choose("cuda")
    together = Streams(setup, device, (1, 3))
    race = together.race(3, 0.5)
    assert len(race.images) == 3
    assert min(race.images) > setup.images_at_once
    assert race.peak.reserved_mb > together.race(1, 0.2).peak.reserved_mb > 0
    # All begin with the same weights and see the same images: what one wrote into another's memory would show.
    runners = Streams(setup, device, (3,))._runners
    for _ in range(3):
        for runner in runners:
            runner.take()
    torch.cuda.synchronize()
    losses = [
        torch.cat([tally.loss_sums[0].double().cpu() for _, tally in runner._rig.meter._unread]) for runner in runners
    ]
    assert all(len(values) == 4 * rigs.Case.graph_steps for values in losses)
    for ours in losses[1:]:
        torch.testing.assert_close(ours, losses[0], rtol=0.05, atol=0)
