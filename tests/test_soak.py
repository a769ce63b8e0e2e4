"""Nothing is lost where several processes train together: some of the faults of `make soak`, and its own judgement."""

from __future__ import annotations

import json
import random
import shutil
import time
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest

from benchmarks import soak, soak_kills, soak_runs, soak_stops, soak_trials
from benchmarks.common import read_rows
from benchmarks.soak_faults import FAULTS, Fault
from benchmarks.soak_runs import Fingerprint, Outcome, Rig, differences, fingerprint, resumptions, steps_again
from benchmarks.soak_sessions import Ended, Lost, NotTried, demand
from fastgen.errors import command

SAME = Fingerprint(("a", "b"), (("1", "2"), ("3",)), ("5.0", "4.0"))


@pytest.fixture(scope="module")
def rig(tmp_path_factory):
    return Rig(tmp_path_factory.mktemp("soak"), epochs=2)


@pytest.fixture
def case(rig):
    """Function that makes a case; whatever it leaves running is ended."""
    made = []

    def make(processes=2, *decisive, seed=0):
        made.append(rig.case(processes, random.Random(seed), *decisive))
        return made[-1]

    yield make
    for one in made:
        one.close()


# Kills of a rank that is not started again are below, in a save. The first seed draws an instant well before the end.
@pytest.mark.parametrize(
    ("trial", "seed"),
    [(partial(soak_kills.kill_rank, restarts=3), 9), (soak_kills.kill_launcher, 4), (soak_stops.stop_rank, 4)],
    ids=["kill -9 of a rank", "kill -9 of the launcher", "SIGTERM to a rank"],
)
def test_two_processes_lose_nothing_to(case, trial, seed):
    # Where the run has ended before the instant came, another one is drawn.
    assert any(trial(case(seed=seed + more)).disturbed for more in range(4))


def test_the_process_that_saves_may_be_killed_in_a_save(case, monkeypatch):
    # The second checkpoint: 1 to 3 are the run folder's own files, 4 the link.
    monkeypatch.setattr(soak_kills, "SAVING", {"replace": 6})
    monkeypatch.setattr(random.Random, "randint", lambda draw, low, high: high)
    outcome = soak_kills.kill_rank_in_save(case())
    assert (outcome.end, outcome.disturbed) == ("exit 1", 1)


def test_a_run_goes_on_in_another_number_of_processes(case):
    outcome = soak_stops.other_processes(case(1))
    assert outcome.disturbed >= 1
    assert outcome.again == 0


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (replace(SAME, weights=("a", "c")), ["other weights in generation 1"]),
        (replace(SAME, history=(("1", "2.5"), ("3",))), ["other history in generation 0"]),
        (replace(SAME, history=(("1",), ("3",))), ["other history in generation 0"]),
        (replace(SAME, errors=("5.0",)), ["errors of 1 generations, not 2"]),
        (SAME, []),
    ],
)
def test_what_differs_is_told(changed, told):
    assert differences(changed, SAME) == told


def test_a_changed_weight_or_history_or_error_is_lost(rig, case):
    run = rig.whole(case(1).base, 1).run

    def lost_after(name, change):
        one = case(1)
        for part in ("run", "nodes"):
            shutil.copytree(run.parent / part, one.folder / part, symlinks=True)
        assert one.compare() == 0
        path = one.run / name
        path.write_bytes(change(path.read_bytes()))
        with pytest.raises(Lost) as lost:
            one.compare()
        return str(lost.value)

    def last_bit(content):
        return content[:-1] + bytes([content[-1] ^ 1])

    def last_loss(content):
        facts = json.loads(content)
        facts["training"]["history"][-1]["loss"] += 1e-9
        return json.dumps(facts).encode()

    def last_error(content):
        facts = json.loads(content)
        facts["generations"][-1]["ensemble_top1_error"] += 1e-9
        return json.dumps(facts).encode()

    assert lost_after("generation_1/model.safetensors", last_bit) == "other weights in generation 1"
    assert lost_after("generation_0/node.json", last_loss) == "other history in generation 0"
    assert lost_after("results.json", last_error) == "other errors in generation 1"


def test_a_run_that_ended_well_without_a_generation_is_lost(rig, case):
    one = case(1)
    shutil.copytree(rig.whole(one.base, 1).run.parent / "nodes", one.folder / "nodes")
    with pytest.raises(Lost, match="not trained, although the run ended well: generation_0, generation_1"):
        fingerprint(one.run)


def events_of(*pairs):
    names = {"begin": "generation_begin"}
    return [{"event": names.get(name, name), "generation": 0, "step": step} for name, step in pairs]


def test_steps_taken_twice_are_counted_and_those_left_out_are_lost(tmp_path):
    events = events_of(("begin", 0), ("step", 1), ("step", 2), ("step", 3), ("begin", 1), ("step", 2), ("begin", 2))
    assert [one.seen - one.begun for one in resumptions(events)] == [2, 0]

    def run(events):
        (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"torn')
        return tmp_path

    assert steps_again(run(events)) == 2
    with pytest.raises(Lost, match="went on at step 5, and no step after 3 was seen"):
        steps_again(run(events_of(("begin", 0), ("step", 3), ("begin", 5))))


def test_more_than_one_line_is_lost():
    assert Ended(1, "", "fastgen: a\n").line == "fastgen: a"
    for err in ("", "a\nb\n"):
        with pytest.raises(Lost, match="lines on standard error, not 1"):
            Ended(1, "", err).line  # noqa: B018


def test_a_stop_that_takes_steps_twice_is_lost(case, monkeypatch):
    one = case(1)
    monkeypatch.setattr(soak_runs.Case, "compare", lambda self: 3)

    def stop_in_time():
        while not soak_stops.stop(one).disturbed:
            pass

    with pytest.raises(Lost, match="3 steps were taken twice after SIG"):
        stop_in_time()


def soaked(monkeypatch, tmp_path, **trials):
    """Exit code of the command for faults of these names and trials."""
    faults = tuple(Fault(name, 1, 4, 1, trial) for name, trial in trials.items())
    monkeypatch.setattr(soak, "FAULTS", faults)
    return command(soak.main, [f"--results={tmp_path}", f"--folder={tmp_path}", "--at_once=1"])


def fine(case):
    return Outcome("exit 143", f"fastgen: {case.folder}/x: process 7 on some-host stopped [1]", 2)


def test_a_row_tells_how_often_and_how_it_ended(monkeypatch, tmp_path, capsys):
    assert soaked(monkeypatch, tmp_path, fine=fine) == 0
    (row,) = read_rows(tmp_path / "soak.csv")
    told = {"fault": "fine", "tried": "4", "ends": "exit 143 x4", "says": "PATH: process PID on HOST stopped [1]"}
    assert told.items() <= row.items()
    assert (row["lost"], row["steps_again_most"], row["not_tried"]) == ("0", "2", "")
    out = capsys.readouterr().out
    assert "4 of 4 faults" in out
    assert "left 0.0 minutes" in out
    assert "nothing" in out
    # Nothing is left of what was fine.
    assert [path.name for path in tmp_path.iterdir()] == ["soak.csv"]


def test_what_was_lost_is_told_and_kept_and_fails_the_command(monkeypatch, tmp_path, capsys):
    def bad(case):
        demand(case.rig.numbers != 6, "other weights in generation 1")
        return fine(case)

    assert soaked(monkeypatch, tmp_path, fine=fine, bad=bad) == 1
    told = capsys.readouterr()
    assert "LOST  bad, 1 processes: other weights in generation 1" in told.out
    assert "1 x: other weights" in " ".join(told.out.split())
    assert told.err.startswith("fastgen: something was lost in 1 trials")
    assert [row["lost"] for row in read_rows(tmp_path / "soak.csv")] == ["0", "1"]
    assert list(tmp_path.glob("*/case6"))


def test_what_cannot_be_tried_or_comes_too_late_is_said(monkeypatch, tmp_path, capsys):
    def no_right(case):
        raise NotTried("no right to mount")

    def early(case):
        return Outcome("exit 0", "", 0, disturbed=0)

    assert soaked(monkeypatch, tmp_path, no_right=no_right, early=early) == 0
    rows = read_rows(tmp_path / "soak.csv")
    assert [(row["tried"], row["not_tried"], row["ends"]) for row in rows] == [
        ("0", "no right to mount", ""),
        ("0", "", ""),
    ]
    out = " ".join(capsys.readouterr().out.split())
    assert "not tried (no right to mount)" in out
    assert "0 of 4" in out


def test_no_fault_is_begun_when_the_time_is_over(tmp_path):
    faults, over = [Fault("fine", 1, 4, 1, fine)], time.monotonic() - 1
    tallies = soak_trials.soak(faults, soak_trials.here(Rig(tmp_path)), 1, 1.0, over, print)
    assert [(tally.tried, tally.not_tried) for tally in tallies] == [(0, soak_trials.OVER)]


class Workers:
    """Trials that end when they are told to, the newest first; those of `bad` lose something."""

    def __init__(self):
        self.flying, self.most, self.begun = [], {1: 0, 2: 0}, []

    def __call__(self, fault, number):
        self.flying.append((fault, Future()))
        self.begun.append((fault.name, fault.processes, number))
        self.most[fault.processes] = max(self.most[fault.processes], len(self.flying))
        return self.flying[-1][1]

    def end_one(self, futures, **_):
        fault, future = self.flying.pop()
        lost = "weights" if fault.name == "bad" else ""
        future.set_result(soak_trials.Tried(1.0, None if lost else Outcome("exit 143", "", 2), lost))
        return SimpleNamespace(done={future})


@pytest.mark.parametrize(("at_once", "most"), [(1, {1: 1, 2: 1}), (4, {1: 4, 2: 2})])
def test_as_many_are_disturbed_at_a_time_as_there_are_places(monkeypatch, at_once, most):
    workers, said = Workers(), []
    monkeypatch.setattr(soak_trials, "wait", workers.end_one)
    faults = [Fault("two", 2, 3, 1, fine), Fault("good", 1, 5, 1, fine), Fault("bad", 1, 4, 1, fine)]
    tallies = soak_trials.soak(faults, workers, at_once, 1.0, time.monotonic() + 60, said.append)
    assert workers.most == most
    # No trial more than were wanted, each by a number of its own; those of one process first.
    wanted = [("good", 1, number) for number in range(5)] + [("bad", 1, number) for number in range(4)]
    assert workers.begun == [*wanted, *(("two", 2, number) for number in range(3))]
    assert [(tally.fault.name, tally.tried, len(tally.lost), tally.seconds) for tally in tallies] == [
        ("two", 3, 0, 3.0), ("good", 5, 0, 5.0), ("bad", 4, 4, 4.0),
    ]  # fmt: skip
    assert said.count("LOST  bad, 1 processes: weights") == 4
    assert sum(line.lstrip().startswith("12 of 12 faults") for line in said) == 1


def test_workers_try_the_real_faults(tmp_path):
    (cut,) = (fault for fault in FAULTS if fault.name == "checkpoint cut")
    with soak_trials.in_workers(tmp_path, 2) as trier:
        (tally,) = soak_trials.soak([cut], trier, 2, 0.1, time.monotonic() + 120, print)
    assert (tally.tried, tally.lost, tally.not_tried) == (3, [], "")
    assert len(list(tmp_path.glob("worker*"))) == 2


def test_every_fault_is_of_one_name_for_each_number_of_processes():
    names = [(fault.name, fault.processes) for fault in FAULTS]
    assert len({*names}) == len(names)
    assert {processes for _, processes in names} == {1, 2}
