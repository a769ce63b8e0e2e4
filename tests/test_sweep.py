"""Sweeps: what is shared is trained once, in order, on its place; they go on after a kill; figures are right."""

from __future__ import annotations

import csv
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
import yaml

from fastgen import crew, grid, sweep, sweep_report, sweep_slurm, train
from fastgen.data import open_dataset
from fastgen.errors import MachineError, Stopped, UserError, command
from fastgen.grid import Axis, Cell, Training, cells_of, parse_axis, recipes_of, runs_of, trainings_of
from fastgen.locks import locked
from fastgen.recipe import dump
from fastgen.stop import StopRequest
from fastgen.sweep import Places, run_all

CPU = torch.device("cpu")
WEIGHTS, CONFIDENCES = Axis("gen.teacher_weight", ("0.3", "0.7")), Axis("gen.confidence", ("0.6", "1.0"))


@pytest.fixture
def recipe(write_recipe):
    return write_recipe(data__train_limit=200, train__batch_size=40, gen__k=3)


def words_of(recipe, *more):
    return ["--cfg", str(recipe), "--data.holdout=300", *more]


def runs(recipe, axes, seeds=(0,), *more):
    return runs_of(recipes_of(words_of(recipe, *more), cells_of(axes), seeds), open_dataset)


@pytest.mark.parametrize(
    ("text", "key", "values"),
    [
        ("gen.teacher_weight=0.5,0.7", "gen.teacher_weight", ("0.5", "0.7")),
        ("gen.teacher_weight=[0.5,0.6],0.7", "gen.teacher_weight", ("[0.5,0.6]", "0.7")),
        ("model.name=resnet8", "model.name", ("resnet8",)),
    ],
)
def test_values_are_parted_at_commas_outside_of_brackets(text, key, values):
    assert parse_axis(text) == Axis(key, values)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("gen.k", "is no setting with values"), ("gen.k=", "is no setting with values"), ("k=1,2", "is no setting"),
        ("gen.k=2,,3", "is no setting"), ("gen.k=2,2", "has a value twice"), ("run.seed=0,1", "is not for a grid"),
        ("gen.only=1,2", "is not for a grid"), ("data.holdout=100,200", "is not for a grid"),
    ],
)  # fmt: skip
def test_what_is_no_axis_is_told(text, told):
    with pytest.raises(ValueError, match=told):
        parse_axis(text)


def test_cells_are_all_points():
    cells = cells_of([WEIGHTS, CONFIDENCES])
    assert [cell.name for cell in cells] == [
        "teacher_weight=0.3, confidence=0.6", "teacher_weight=0.3, confidence=1.0",
        "teacher_weight=0.7, confidence=0.6", "teacher_weight=0.7, confidence=1.0",
    ]  # fmt: skip
    assert [cell.number for cell in cells] == [0, 1, 2, 3]
    with pytest.raises(UserError, match="is given twice"):
        cells_of([WEIGHTS, WEIGHTS])


@pytest.mark.parametrize(
    ("more", "axes", "told"),
    [
        (["--gen.only=1"], [WEIGHTS], "give gen.only and gen.teacher both"),
        (["--run.seed=1"], [WEIGHTS], "the sweep gives each run its own"),
        (["--gen.teacher_weight=0.5"], [WEIGHTS], "the sweep gives each run its own"),
        ([], [Axis("gen.teacher_weigth", ("0.5",))], "teacher_weight"),
        ([], [Axis("gen.confidence", ("2.0",))], "gen.confidence"),
        ([], [Axis("train.engine", ("eager", "compile"))], None),
        ([], [Axis("run.log_every_steps", ("1", "2"))], "is the same training as"),
    ],
)
def test_recipes_that_are_wrong_or_alike_are_told_before_anything_starts(recipe, more, axes, told):
    if told is None:
        assert len(list(recipes_of(words_of(recipe, *more), cells_of(axes), [0]))) == 2
        return
    with pytest.raises(UserError, match=told):
        list(recipes_of(words_of(recipe, *more), cells_of(axes), [0]))


def test_nothing_is_chosen_by_the_test_set(recipe, capsys):
    words = ["--cfg", str(recipe), "--grid=gen.teacher_weight=0.3,0.7"]
    assert command(sweep.main, words) == 2
    err = capsys.readouterr().err
    assert "--data.holdout=5000" in err
    assert err.count("\n") == 1


def test_what_runs_share_is_trained_once(recipe, tmp_path):
    found = runs(recipe, [WEIGHTS, CONFIDENCES], (0, 1), "--gen.generations=2")
    trainings = trainings_of(found, tmp_path, lambda node: False, lambda run: False)
    made = [training.makes for training in trainings]
    # Two confidences with two seeds; two students of each with each weight.
    assert len(made) == len({*made}) == 4 + 8 + 8
    assert {*made} == {generation.node for run in found for generation in run.plan}
    # A teacher before its students, and needed by them.
    teachers = {g.node: g.teacher for run in found for g in run.plan}
    for number, training in enumerate(trainings):
        assert teachers[training.makes] is None or teachers[training.makes] in training.needs
        assert training.needs <= {*made[:number]}
    # What the process locks.
    for training in trainings:
        place = Path(training.words[-1].removeprefix("--run.dir="))
        assert training.folders == (place, Path(str(found[0].recipe.run.nodes)) / training.makes)
    # Whoever trains a run's last generation measures the run.
    assert sum("--gen.only" in " ".join(training.words) for training in trainings) == 12


def test_what_is_trained_is_measured_alone(recipe, tmp_path):
    found = runs(recipe, [WEIGHTS])
    patriarch, students = found[0].plan[0].node, [run.plan[1].node for run in found]
    some = trainings_of(found, tmp_path, lambda node: node == patriarch, lambda run: False)
    assert [training.makes for training in some] == students
    assert [training.needs for training in some] == [{patriarch}] * 2
    none = trainings_of(found, tmp_path, lambda node: True, lambda run: False)
    assert [(training.makes, training.needs) for training in none] == [(None, {patriarch, node}) for node in students]
    one = trainings_of(found, tmp_path, lambda node: True, lambda run: run is found[0])
    assert one == none[1:]


# Order and places, with scripts instead of trainings.

LOG = """
import os, sys, time
place = os.environ.get("CUDA_VISIBLE_DEVICES", "-")
with open("log", "a") as log: log.write(f"+{sys.argv[1]}@{place}\\n")
time.sleep(float(sys.argv[2]))
with open("log", "a") as log: log.write(f"-{sys.argv[1]}@{place}\\n")
if int(sys.argv[3]) == 75:
    busy = os.path.exists("busy") and not os.remove("busy")
    sys.exit(2 if busy else 0)
sys.exit(int(sys.argv[3]))
"""
# Ends with 2 where there is a file `busy`, which it removes.
BUSY = 75


@dataclass
class Script:
    name: str
    needs: frozenset
    seconds: float = 0.2
    code: int = 0
    folders: tuple = ()

    @property
    def training(self):
        words = (self.name, str(self.seconds), str(self.code))
        return Training(self.name, words, self.needs, self.name, self.folders)


@pytest.fixture
def run_scripts(tmp_path, monkeypatch):
    """Function that runs scripts as if they were trainings; gives what failed, and lines of begins and ends."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(crew, "training_command", lambda words: [sys.executable, "-c", LOG, *words])

    def run(scripts, places, finished=(), stop=None):
        failed = run_all([script.training for script in scripts], finished, places, stop or StopRequest())
        log = tmp_path / "log"
        return failed, log.read_text().split() if log.exists() else []

    return run


def names(lines, sign):
    return [line[1:].partition("@")[0] for line in lines if line[0] == sign]


def test_students_wait_for_their_teacher_and_nothing_else_does(run_scripts):
    scripts = [
        Script("slow", frozenset(), 1.5), Script("quick", frozenset(), 0.1), Script("pupil", frozenset({"slow"}), 0.1),
        Script("other", frozenset({"quick", "old"}), 0.1),
    ]  # fmt: skip
    failed, lines = run_scripts(scripts, Places(CPU, 2), finished=["old"])
    assert failed == []
    assert lines.index("+other@-") < lines.index("-slow@-") < lines.index("+pupil@-")
    assert sorted(names(lines, "-")) == ["other", "pupil", "quick", "slow"]


def test_what_another_process_trains_is_waited_for_while_the_rest_goes_on(run_scripts, tmp_path, capsys):
    held = tmp_path / "held"
    held.mkdir()
    scripts = [Script("held", frozenset(), folders=(tmp_path / "absent", held)), Script("free", frozenset())]
    scripts += [Script("last", frozenset({"free"}))]
    with ExitStack() as holder:
        holder.enter_context(locked(held, "this generation"))

        def release():
            deadline = time.monotonic() + 60
            while "-last" not in (tmp_path / "log").read_text() and time.monotonic() < deadline:
                time.sleep(0.02)
            holder.close()

        (tmp_path / "log").touch()
        releasing = threading.Thread(target=release)
        releasing.start()
        failed, lines = run_scripts(scripts, Places(CPU, 1))
        releasing.join()
    assert failed == []
    assert names(lines, "-") == ["free", "last", "held"]
    told = f"held waits for process {os.getpid()} on {os.uname().nodename}, which holds {held}\n"
    assert capsys.readouterr().out.count(told) == 1


def test_a_training_that_another_command_was_first_to_begin_is_tried_again(run_scripts, tmp_path, monkeypatch):
    held, right = tmp_path / "held", Places.take
    held.mkdir()
    with ExitStack() as holder:

        def take(self, name):
            if name == "pair":
                # After the look, and before the training's own.
                holder.enter_context(locked(held, "this generation"))
                monkeypatch.setattr(Places, "take", right)
                threading.Timer(1.0, holder.close).start()
            return right(self, name)

        monkeypatch.setattr(Places, "take", take)
        (tmp_path / "busy").touch()
        failed, lines = run_scripts([Script("pair", frozenset(), 0.1, folders=(held,), code=BUSY)], Places(CPU, 1))
    assert failed == []
    assert names(lines, "+") == ["pair", "pair"]


@pytest.mark.parametrize(("at_once", "workers"), [(1, None), (2, 3), (2, None)])
def test_trainings_side_by_side_share_the_cores(at_once, workers, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    places = Places(CPU, at_once, workers)
    assert places.words == (("--data.workers=4",) if (at_once, workers) == (2, None) else ())
    assert places.take("first") == ({} if at_once == 1 else {"OMP_NUM_THREADS": "4"})


@pytest.mark.parametrize("at_once", [1, 3])
def test_no_more_run_than_there_are_places(run_scripts, at_once):
    scripts = [Script(str(number), frozenset(), 0.3) for number in range(5)]
    _, lines = run_scripts(scripts, Places(CPU, at_once))
    running = np.cumsum([1 if line[0] == "+" else -1 for line in lines])
    assert running.max() == at_once


def test_each_gpu_has_one_at_a_time(run_scripts, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    scripts = [Script(str(number), frozenset(), 0.3 if number else 1.0) for number in range(5)]
    _, lines = run_scripts(scripts, Places(torch.device("cuda"), None))
    busy = set()
    for line in lines:
        place = line.partition("@")[2]
        if line[0] == "+":
            assert place not in busy
            busy.add(place)
        else:
            busy.remove(place)
    assert {line.partition("@")[2] for line in lines} == {"5", "3"}


def test_a_failure_ends_what_needs_it_and_nothing_else(run_scripts):
    scripts = [
        Script("bad", frozenset(), code=3), Script("good", frozenset()), Script("child", frozenset({"bad"})),
        Script("grandchild", frozenset({"child"})), Script("sibling", frozenset({"good"})),
    ]  # fmt: skip
    failed, lines = run_scripts(scripts, Places(CPU, 1))
    assert failed == ["bad ended with exit code 3", "child was not begun", "grandchild was not begun"]
    assert names(lines, "-") == ["bad", "good", "sibling"]


def test_a_signal_stops_what_runs_and_begins_no_more(run_scripts, monkeypatch):
    scripts = [Script("first", frozenset(), 30), Script("second", frozenset())]
    right = Places.take

    def take(self, name):
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        return right(self, name)

    monkeypatch.setattr(Places, "take", take)
    with StopRequest() as stop:
        signal.signal(signal.SIGALRM, lambda number, frame: signal.raise_signal(signal.SIGTERM))
        began = time.monotonic()
        _, lines = run_scripts(scripts, Places(CPU, 1), stop=stop)
        with pytest.raises(Stopped):
            stop.check()
    assert time.monotonic() - began < 20
    assert names(lines, "+") == ["first"]
    assert names(lines, "-") == []


# Real ones.


def expected_of(folder):
    """(cell, generation) -> errors by measure, one a seed, straight from the runs' own files."""
    found = {}
    for run in json.loads((folder / "sweep.json").read_text())["runs"]:
        for row in json.loads((folder / run["folder"] / "results.json").read_text())["generations"]:
            values = found.setdefault((*run["cell"].values(), row["generation"]), {"top1": [], "ensemble": []})
            values["top1"].append(row["top1_error"])
            values["ensemble"].append(row["ensemble_top1_error"])
    return found


def test_a_killed_sweep_goes_on_trains_each_generation_once_and_tells_means_and_deviations(recipe, tmp_path):
    words = [*words_of(recipe), "--grid", "gen.teacher_weight=0.3,0.7", "--seeds", "2", "--at_once=2"]
    command_line = [sys.executable, "-m", "fastgen.sweep", *words, "--dir=swept", "--run.nodes=nodes"]
    nodes, first = tmp_path / "nodes", {}
    session = subprocess.Popen(command_line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while not first and time.monotonic() < deadline:
        first = {path: path.stat().st_mtime_ns for path in nodes.glob("*/node.json")}
        time.sleep(0.02)
    session.kill()
    session.communicate()
    assert first, "no generation was trained before the kill"
    # Those that it started are saving: they are waited for.
    done = subprocess.run(command_line, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "2 cells x 2 seeds = 4 runs of 8 generations: 6 different ones (2 shared)" in done.stdout
    # Two patriarchs, four students; what was there is untouched.
    assert len(list(nodes.glob("*/node.json"))) == 6
    assert all(path.stat().st_mtime_ns == at for path, at in first.items())
    assert len(list((tmp_path / "swept").glob("runs/*/results.json"))) == 4
    with (tmp_path / "swept" / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    expected = expected_of(tmp_path / "swept")
    assert len(rows) == len(expected) == 4
    for row in rows:
        values = expected[row["gen.teacher_weight"], int(row["generation"])]
        assert int(row["seeds"]) == 2
        for measure, name in (("top1", "top1_error"), ("ensemble", "ensemble_top1_error")):
            assert float(row[f"{name}_mean"]) == pytest.approx(np.mean(values[measure]), abs=1e-4)
            assert float(row[f"{name}_deviation"]) == pytest.approx(np.std(values[measure], ddof=1), abs=1e-4)
    last = {weight: np.mean(values["top1"]) for (weight, generation), values in expected.items() if generation == 1}
    best = min(last, key=last.get)
    assert f"lowest top-1 error in generation 1: teacher_weight={best}, {last[best]:.2f}" in done.stdout
    assert (tmp_path / "swept" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    # Once more: nothing is left to train, or to measure anew.
    again = subprocess.run(command_line, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr
    assert "6 of them trained already" in again.stdout
    assert "processes done" not in again.stdout
    assert (tmp_path / "swept" / "sweep.csv").read_text() == "\n".join(
        [",".join(rows[0]), *(",".join(row.values()) for row in rows), ""]
    )


def test_the_figure_has_a_line_for_each_cell(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    right = Axes.errorbar

    def watched(self, x, y, bars, **options):
        drawn.append((options["label"], list(x), list(y), list(bars)))
        return right(self, x, y, bars, **options)

    monkeypatch.setattr(Axes, "errorbar", watched)
    points = [
        sweep_report.Point(
            Cell(cell, {"gen.k": str(cell)}), generation, "student",
            {"top1_error": [10.0 * cell + generation, 10.0 * cell + generation + 2], "ensemble_top1_error": [5.0, 5.0]},
        )
        for cell in (2, 3)
        for generation in (0, 1)
    ]  # fmt: skip
    sweep_report.draw(tmp_path / "figure.png", "name", points)
    assert drawn[:2] == [
        ("k=2", [0, 1], [21.0, 22.0], pytest.approx([2**0.5] * 2)),
        ("k=3", [0, 1], [31.0, 32.0], pytest.approx([2**0.5] * 2)),
    ]
    assert len(drawn) == 4


def test_a_dry_sweep_tells_what_it_would_do_and_leaves_nothing(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command(sweep.main, [*words_of(recipe), "--grid=gen.k=2,3", "--run.dry=true"]) == 0
    assert "2 cells x 1 seeds = 2 runs of 4 generations: 4 different ones (0 shared)" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == [recipe.name]


def test_one_generation_is_swept_under_one_teacher(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command(train.main, [*words_of(recipe), "--gen.generations=0", "--run.dir=runs/first"]) == 0
    words = [*words_of(recipe), "--grid=gen.teacher_weight=0.3,0.7", "--dir=swept"]
    alone = [*words, "--gen.only=1"]
    assert command(sweep.main, alone) == 2
    assert "give gen.only and gen.teacher both" in capsys.readouterr().err
    assert command(sweep.main, [*alone, "--gen.teacher=runs/first/generation_0"]) == 0
    out = capsys.readouterr().out
    assert "2 cells x 1 seeds = 2 runs of 2 generations: 2 different ones (0 shared), 0 of them trained already" in out
    assert "lowest top-1 error in generation 1: teacher_weight=0." in out
    with (tmp_path / "swept" / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["generation"], row["ensemble_top1_error_mean"]) for row in rows] == [("1", ""), ("1", "")]
    assert all(float(row["top1_error_mean"]) > 0 for row in rows)


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("--dist.processes=1", "each training of a sweep is one process"),
        ("--run.stop_after_minutes=3", "a sweep has no end of its time"),
    ],
)
def test_what_has_no_sense_in_a_sweep_is_told(recipe, capsys, word, told):
    assert command(sweep.main, [*words_of(recipe), "--grid=gen.teacher_weight=0.3,0.7", word]) == 2
    assert told in capsys.readouterr().err


def test_seeds_are_a_number_or_a_list():
    assert [sweep._seeds(text) for text in ("2", "5,", "4,1")] == [[0, 1], [5], [4, 1]]


def test_help_names_its_own_words_and_the_recipe_s(capsys):
    assert command(sweep.main, ["--help"]) == 0
    out = capsys.readouterr().out
    assert "--grid" in out
    assert "--train.epochs" in out


def test_a_dry_run_names_the_folder_of_the_sweep_itself(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [*words_of(recipe), "--grid=gen.teacher_weight=0.3,0.7", "--run.dry=true"]
    assert command(sweep.main, words) == 0
    dry = capsys.readouterr().out.partition(":")[0]
    names = {
        sweep._folder(tmp_path / "nodes", [*words_of(recipe), *more], [grid.Axis("gen.teacher_weight", ("0.3", "0.7"))])
        for more in ([], ["--run.dry=true"], ["--run.stop_after_minutes=5"])
    }
    assert {name.name for name in names} == {dry.rpartition("/")[2]}
    other = sweep._folder(tmp_path / "nodes", [*words_of(recipe), "--gen.k=3"], [])
    assert other not in names


def test_a_second_sweep_on_one_folder_is_refused(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "swept"
    folder.mkdir()
    with sweep.locked(folder, "this sweep"):
        assert command(sweep.main, [*words_of(recipe), "--grid=gen.k=2,3", f"--dir={folder}"]) == 2
    assert f"{folder}: this sweep is in use by process {os.getpid()}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "grid_there",
    [[["gen.k", "2", "4"], ["train.lr", "1", "2"]], [["train.lr", "1", "2"], ["gen.k", "2", "3"]]],
)
def test_a_folder_of_another_grid_is_refused(recipe, tmp_path, monkeypatch, capsys, grid_there):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "swept").mkdir()
    (tmp_path / "swept" / "sweep.json").write_text(json.dumps({"grid": grid_there}))
    assert command(sweep.main, [*words_of(recipe), "--grid=gen.k=2,3", "--grid=train.lr=1,2", "--dir=swept"]) == 2
    assert "holds a sweep of another grid: name another folder with --dir" in capsys.readouterr().err


def test_results_of_another_run_in_its_folder_are_left_out(recipe, tmp_path, capsys):
    found = runs(recipe, [WEIGHTS])
    write_results(tmp_path, found[0], [7.0, 7.0])
    write_results(tmp_path, found[1], [7.0, 7.0], nodes=["0123", "4567"])
    sweep_report.report(tmp_path, "name", found)
    with (tmp_path / "sweep.csv").open() as file:
        assert {row["gen.teacher_weight"] for row in csv.DictReader(file)} == {"0.3"}


def write_results(folder, run, errors, nodes=None, recipe=None):
    """Results of a run's first generations."""
    named = nodes or [generation.node for generation in run.plan]
    rows = [
        {"generation": number, "role": "student", "node": node, "samples_evaluated": 300,
         "top1_error": error, "ensemble_top1_error": error}
        for number, (node, error) in enumerate(zip(named, errors, strict=False))
    ]  # fmt: skip
    place = grid.run_folder(folder, run)
    place.mkdir(parents=True, exist_ok=True)
    (place / "recipe.yaml").write_text(dump(recipe or run.recipe))
    (place / "results.json").write_text(json.dumps({"generations": rows}))


@pytest.mark.parametrize(("errors", "measured"), [(None, False), ([7.0], False), ([7.0, 6.0], True)])
def test_what_is_measured_is_not_measured_again(recipe, tmp_path, errors, measured):
    (run, *_) = runs(recipe, [WEIGHTS])
    if errors is not None:
        write_results(tmp_path, run, errors)
    assert sweep_report.is_measured(tmp_path, run) == measured


def test_what_was_measured_on_other_images_is_measured_again(recipe, tmp_path):
    """No node tells how it was evaluated; the recipe does."""
    (run, *_), (other, *_) = runs(recipe, [WEIGHTS]), runs(recipe, [WEIGHTS], (0,), "--data.val_limit=100")
    assert [g.node for g in run.plan] == [g.node for g in other.plan]
    write_results(tmp_path, run, [7.0, 6.0], recipe=other.recipe)
    assert not sweep_report.is_measured(tmp_path, run)
    write_results(tmp_path, run, [7.0, 6.0])
    assert sweep_report.is_measured(tmp_path, run)


def test_cells_that_lack_seeds_are_not_compared_with_the_others(recipe, tmp_path, capsys):
    for run in runs(recipe, [WEIGHTS], (0, 1)):
        if (run.cell.number, run.seed) != (1, 1):
            write_results(tmp_path, run, [50.0, 40.0 - run.cell.number])
    sweep_report.report(tmp_path, "name", runs(recipe, [WEIGHTS], (0, 1)))
    told = "teacher_weight=0.3, 40.00 ± 0.00 (2 seeds); cells that lack generations or seeds, not compared: 1"
    assert f"generation 1: {told}\n3 of 4 runs are measured\n" in capsys.readouterr().out


def test_recipes_of_a_sweep_are_whole(recipe, tmp_path):
    """What a process is given has all that the grid says, whatever gen.only would make of words on a command line."""
    (run, *_) = runs(recipe, [Axis("gen.teacher_weight", ("[0.2,0.8]",))], (3,), "--gen.generations=2")
    sweep._write_recipes(tmp_path, [run], [])
    written = yaml.safe_load(grid.recipe_path(tmp_path, run).read_text())
    assert written["gen"]["teacher_weight"] == [0.2, 0.8]
    assert written["run"]["seed"] == 3


# Slurm, of which there is none here: what submitit is asked for.


class FakeExecutor:
    """Takes down what it is asked for."""

    submitted: ClassVar[list] = []
    most: ClassVar[int] = 99

    def __init__(self, folder, cluster, slurm_max_num_timeout):
        self.asked = {"folder": folder, "cluster": cluster, "timeouts": slurm_max_num_timeout}

    def update_parameters(self, **parameters):
        self.asked |= parameters

    def map_array(self, call, names, words, needs, nodes):
        if len(self.submitted) == self.most:
            raise RuntimeError("sbatch: error: invalid account")
        self.submitted.append((self.asked, names, words, needs, {*nodes}))
        number = 100 + len(self.submitted)
        return [SimpleNamespace(job_id=f"{number}_{task}") for task, _ in enumerate(names)]


@pytest.fixture
def submitit(monkeypatch):
    monkeypatch.setattr(FakeExecutor, "submitted", [])
    helpers = SimpleNamespace(DelayedSubmission=lambda *arguments: arguments)
    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(AutoExecutor=FakeExecutor, helpers=helpers))
    return FakeExecutor


def test_a_sweep_over_nodes_is_an_array_for_each_generation(recipe, tmp_path, monkeypatch, capsys, submitit):
    monkeypatch.chdir(tmp_path)
    words = [*words_of(recipe), "--grid=gen.teacher_weight=0.3,0.7", "--seeds=2", "--dir=swept"]
    more = ["--slurm_minutes=90", "--slurm_partition=gpu", "--at_once=4", "--slurm_more=account=us"]
    assert command(sweep.main, [*words, *more, "--slurm_more", "qos=low", "--run.device=auto"]) == 0
    (first, names, _, nothing, _), (second, students, orders, needs, nodes) = submitit.submitted
    assert [*nothing] == [[], []]
    assert nodes == {"runs/nodes"}
    assert all(len(of) == 1 for of in needs)
    assert (len(names), len(students)) == (2, 4)
    own = {"account": "us", "qos": "low"}
    assert first["slurm_additional_parameters"] == own
    assert second["slurm_additional_parameters"] == {**own, "dependency": "afterany:101"}
    for asked in (first, second):
        assert (asked["timeout_min"], asked["slurm_partition"], asked["gpus_per_node"]) == (90, "gpu", 1)
        assert (asked["cluster"], asked["slurm_array_parallelism"]) == ("slurm", 4)
        assert asked["timeouts"] > 100
    # Recipes that the tasks read are there, and no training was begun.
    assert all(os.path.exists(order[1]) for order in orders)
    assert not list(tmp_path.glob("**/node.json"))
    out = capsys.readouterr().out
    assert "submitted 6 trainings as Slurm arrays 101, 102" in out
    assert "--slurm" not in out.partition("has come of them:")[2]
    assert out.rstrip().endswith("--report")
    assert command(sweep.main, [*words, "--report"]) == 0
    assert "nothing is measured yet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("most", "told"),
    [(0, "Slurm takes no array: sbatch: error: invalid account\n"), (1, "(submitted before that: 101: cancel them")],
)
def test_what_slurm_refuses_is_one_line(recipe, tmp_path, monkeypatch, capsys, submitit, most, told):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(submitit, "most", most)
    words = [*words_of(recipe), "--grid=gen.teacher_weight=0.3,0.7", "--run.device=cpu", "--slurm_minutes=9"]
    assert command(sweep.main, words) == 2
    err = capsys.readouterr().err
    assert told in err
    assert err.count("\n") == 1
    assert [asked["gpus_per_node"] for asked, *_ in submitit.submitted] == [0] * most


@pytest.mark.parametrize("word", ["--slurm_partition=gpu", "--slurm_more=account=us", "--slurm_cpus=4"])
def test_words_for_slurm_alone_are_refused(recipe, tmp_path, monkeypatch, capsys, word):
    monkeypatch.chdir(tmp_path)
    assert command(sweep.main, [*words_of(recipe), "--grid=gen.teacher_weight=0.3,0.7", word]) == 2
    assert "has no say without --slurm_minutes" in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/sweep*"))


def test_levels_hold_what_the_ones_before_make():
    trainings = [
        Training("c", (), frozenset({"b"}), "c"), Training("a", (), frozenset(), "a"),
        Training("b", (), frozenset({"a", "old"}), "b"), Training("m", (), frozenset({"a"}), None),
    ]  # fmt: skip
    levels = sweep_slurm.levels_of(trainings, ["old"])
    assert [[training.name for training in level] for level in levels] == [["a"], ["b", "m"], ["c"]]
    with pytest.raises(ValueError, match="c needs what no training makes"):
        sweep_slurm.levels_of(trainings[:1], [])


def test_a_task_of_an_array_trains_and_fails_loudly(monkeypatch, tmp_path, submitit):
    monkeypatch.chdir(tmp_path)
    words = ["first", "0", "0"]
    monkeypatch.setattr(sweep_slurm, "training_command", lambda words: [sys.executable, "-c", LOG, *words])
    job = sweep_slurm.Job()
    job("first", words, [], "nodes")
    assert names((tmp_path / "log").read_text().split(), "-") == ["first"]
    with pytest.raises(MachineError, match="second ended with exit code 3"):
        job("second", ["second", "0", "3"], [], "nodes")
    # Back into the queue with the same words, by one that can be pickled.
    again, *arguments = job.checkpoint("first", words, ["a"], "nodes")
    assert arguments == ["first", words, ["a"], "nodes"]
    assert pickle.loads(pickle.dumps(again))._training is None


def test_a_task_whose_teacher_has_failed_trains_nothing(monkeypatch, tmp_path, submitit):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep_slurm, "training_command", lambda words: [sys.executable, "-c", LOG, *words])
    with pytest.raises(MachineError, match="second was not begun: generation abcd, which it needs, is not in nodes"):
        sweep_slurm.Job()("second", ["second", "0", "0"], ["abcd"], "nodes")
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("to_training", [False, True])
def test_a_task_that_slurm_ends_has_its_training_save_first(monkeypatch, tmp_path, submitit, to_training):
    """Slurm may tell the training first, which then has ended when submitit's own signal comes."""
    monkeypatch.chdir(tmp_path)
    saves = (
        "import signal, sys, time\n"
        "def save(*_): open('saved', 'w').close(); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save); open('begun', 'w').close(); time.sleep(60)"
    )
    monkeypatch.setattr(sweep_slurm, "training_command", lambda words: [sys.executable, "-c", saves])
    job, told = sweep_slurm.Job(), []

    def preempted(number, frame):
        told.append(job.checkpoint("first", [], [], "nodes"))
        sys.exit(0)

    before = signal.signal(signal.SIGUSR2, preempted)
    main = threading.main_thread().ident

    def preempt():
        while not (tmp_path / "begun").exists():
            time.sleep(0.01)
        if to_training:
            job._training.terminate()
            while job._training.returncode is None:
                time.sleep(0.01)
        signal.pthread_kill(main, signal.SIGUSR2)

    threading.Thread(target=preempt, daemon=True).start()
    try:
        with pytest.raises(SystemExit):
            job("first", [], [], "nodes")
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert job._training.wait(10) == 143
    assert (tmp_path / "saved").exists()
    assert len(told) == 1


def test_without_submitit_it_says_how_to_get_it(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert command(sweep.main, [*words_of(recipe), "--grid=gen.k=2,3", "--slurm_minutes=5"]) == 2
    assert "pip install submitit" in capsys.readouterr().err
