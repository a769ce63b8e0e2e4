"""Time to accuracy: is the right epoch found, with its own seconds, whatever kills and resumes left in the events?"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import common
from benchmarks import time_to_accuracy as tta
from benchmarks.time_to_accuracy import Curve, Point
from fastgen import train
from fastgen.errors import command
from fastgen.record import read_events

EPOCHS = 5
RECIPE = """
data: {dataset: digits, train_limit: 640}
model: {name: resnet8}
train: {epochs: 5, batch_size: 64, lr: 0.05}
gen: {generations: 1}
run: {device: cpu, eval_every_epochs: 0, save_minutes: 60}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    """A recipe file; the working directory is its folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path


def begin(step=0, node="aa", generation=0):
    return {"event": "generation_begin", "generation": generation, "node": node, "step": step}


def epoch(number, error=None, seconds=None, generation=0):
    """The clock is ten seconds an epoch unless told; everything else together as much again."""
    seconds = 10.0 * (number + 1) if seconds is None else seconds
    row = {"event": "epoch", "generation": generation, "epoch": number, "train_seconds": seconds}
    return row | {"wall_seconds": 2 * seconds} | ({} if error is None else {"top1_error": error})


def result(error, node="aa", generation=0):
    row = {"event": "result", "generation": generation, "role": "patriarch", "node": node, "top1_error": error}
    return row | {"train_seconds": 50.0, "wall_seconds": 120.0}


def curve_of(events) -> Curve:
    (curve,) = tta.read_curves(events, EPOCHS)
    return curve


UNDISTURBED = [begin(), epoch(0, 80.0), epoch(1, 60.0), epoch(2, 35.0), epoch(3, 40.0), epoch(4), result(30.0)]


@pytest.mark.parametrize(
    ("target", "epochs", "train_seconds", "wall_seconds"),
    [
        (99, 1, 10.0, 20.0),
        (60, 2, 20.0, 40.0),
        (59.99, 3, 30.0, 60.0),
        # At the target counts, and the worse epoch after it does not matter.
        (35, 3, 30.0, 60.0),
        # The last epoch is measured by the result, and charged with all of it.
        (34.99, 5, 50.0, 120.0),
    ],
)
def test_the_first_epoch_at_or_below_the_target_is_found(target, epochs, train_seconds, wall_seconds):
    curve = curve_of(UNDISTURBED)
    point = curve.first_at(target)
    assert (point.epochs, point.train_seconds, point.wall_seconds) == (epochs, train_seconds, wall_seconds)
    assert curve.unknown_before(point) == 0
    assert tta.notes(curve, target) == []


def test_a_target_that_was_not_reached_tells_the_best():
    curve = curve_of([*UNDISTURBED[:-1], result(36.0)])
    assert curve.first_at(34.0) is None
    assert curve.best == Point(3, 35.0, 30.0, 60.0)
    assert tta._cells(curve, 34.0, EPOCHS) == ("not reached, best 35.00", "3 of 5", "-", "-")


def test_an_epoch_that_was_trained_again_counts_as_it_was_the_second_time():
    killed = [begin(), epoch(0, 80.0), epoch(1, 60.0), epoch(2, 35.0, seconds=31.0)]
    # From the checkpoint after the first epoch.
    resumed = [begin(step=10), epoch(1, 61.0, seconds=23.0), epoch(2, 34.0, seconds=33.0), epoch(3, 20.0, seconds=43.0)]
    curve = curve_of([*killed, *resumed, epoch(4), result(19.0)])
    assert curve.sessions == 2
    assert [point.top1_error for point in curve.points] == [80.0, 61.0, 34.0, 20.0, 19.0]
    assert curve.first_at(35.0) == Point(3, 34.0, 33.0, 66.0)
    assert tta.notes(curve, 35.0) == ["trained in 2 sessions"]


def test_an_epoch_that_was_not_evaluated_again_is_not_known():
    # A stop was asked for at the end of the second epoch, which is then not evaluated.
    events = [begin(), epoch(0, 80.0), epoch(1, 30.0), begin(step=10), epoch(1), epoch(2, 29.0), epoch(3, 28.0)]
    curve = curve_of([*events, epoch(4), result(27.0)])
    assert curve.first_at(35.0).epochs == 3
    assert curve.unknown_before(curve.first_at(35.0)) == 1
    assert tta.notes(curve, 35.0)[0].startswith("1 of the 2 epochs before were not evaluated")


def test_torn_lines_are_left_out_and_said(tmp_path):
    lines = [json.dumps({**event, "time": 1.0}) for event in UNDISTURBED]
    torn = [*lines[:2], lines[2][:-7], *lines[3:]]
    (tmp_path / "events.jsonl").write_text("\n".join(torn) + "\n" + lines[0][:20])
    curve = curve_of(read_events(tmp_path))
    assert [point.epochs for point in curve.points] == [1, 3, 4, 5]
    assert curve.unknown_before(curve.first_at(35.0)) == 1


def test_generations_and_nodes_are_kept_apart():
    second = [begin(generation=1, node="bb"), epoch(0, 50.0, generation=1), result(10.0, node="bb", generation=1)]
    again = [begin(generation=1, node="cc"), epoch(1, 45.0, generation=1), result(11.0, node="cc", generation=1)]
    curves = tta.read_curves([*UNDISTURBED, *second], EPOCHS)
    assert [(curve.generation, curve.node, len(curve.points)) for curve in curves] == [(0, "aa", 5), (1, "bb", 2)]
    # Another node under the same number: nothing of the first is left.
    curves = tta.read_curves([*UNDISTURBED, *second, *again], EPOCHS)
    assert [point.epochs for point in curves[1].points] == [2, 5]
    assert (curves[1].node, curves[1].sessions) == ("cc", 1)


def test_a_generation_of_another_run_has_its_last_epoch_alone():
    curve = curve_of([result(30.0)])
    assert curve.sessions == 0
    assert curve.first_at(35.0).epochs == EPOCHS
    assert "was trained by another run" in tta.notes(curve, 35.0)[0]
    assert "4 of the 4 epochs before were not evaluated" in tta.notes(curve, 35.0)[1]


def measure(recipe, *more, target=60):
    return command(tta.main, ["--cfg", str(recipe), f"--top1_error={target}", "--results=rows", *more])


def errors_by_epoch(run: Path) -> dict[int, float]:
    """Of the patriarch: 0-based epoch -> error, the last one from the results."""
    found = {
        event["epoch"]: event["top1_error"]
        for event in read_events(run)
        if event["event"] == "epoch" and event["generation"] == 0 and "top1_error" in event
    }
    row = json.loads((run / "results.json").read_text())["generations"][0]
    return found | {EPOCHS - 1: row["top1_error"]}


def test_digits_are_measured_and_asked_again(recipe, capfd):
    assert measure(recipe, "--run.dir=mine", "--data.root=elsewhere", target=0) == 0
    errors = errors_by_epoch(Path("mine"))
    assert sorted(errors) == list(range(EPOCHS))
    out = capfd.readouterr().out
    assert f"not reached, best {min(errors.values()):.2f}" in out
    assert "wall_seconds: all that is charged to the generation so far" in out
    assert "2 of 2 rows are new" in out
    rows = common.read_rows(Path("rows/time_to_accuracy.csv"))
    assert [(row["generation"], row["role"]) for row in rows] == [("0", "patriarch"), ("1", "student")]
    for row in rows:
        assert (row["recipe"], row["overrides"], row["engine"], row["precision"]) == ("small.yaml", "", "eager", "fp32")
        assert (row["reached"], row["epochs"], row["wall_seconds"], row["sessions"]) == ("False", "", "", "1")
        assert row["torch"]
        assert row["cpu"]
    assert float(rows[0]["best_top1_error_percent"]) == pytest.approx(min(errors.values()), abs=1e-4)

    # A finished run is asked again, for the best of the epochs before the last one.
    target = min(error for number, error in errors.items() if number < EPOCHS - 1)
    first = min(number for number, error in errors.items() if error <= target)
    for new in (1, 0):
        assert measure(recipe, "--run.dir=mine", "--generation=0", target=target) == 0
        assert f"{new} of 1 rows are new" in capfd.readouterr().out
    rows = common.read_rows(Path("rows/time_to_accuracy.csv"))
    assert len(rows) == 3
    told = next(event for event in read_events(Path("mine")) if event["event"] == "epoch" and event["epoch"] == first)
    assert (rows[2]["reached"], rows[2]["epochs"]) == ("True", str(first + 1))
    for clock in ("train_seconds", "wall_seconds"):
        assert float(rows[2][clock]) == pytest.approx(told[clock], abs=1e-3)


def test_a_stopped_measurement_goes_on_with_its_seconds(recipe):
    words = ["--cfg", str(recipe), "--top1_error=60", "--generation=0", "--gen.generations=0", "--train.epochs=30"]
    run = tta.ask(["--cfg", str(recipe), *words[4:]], 60.0, 0).folder
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.time_to_accuracy", *words, "--results=rows"],
        env={**os.environ, "PYTHONPATH": str(common.ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    end = time.monotonic() + 120
    while sum(event["event"] == "epoch" for event in read_events(run)) < 2:
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert err.splitlines()[-1] == "fastgen: stopped by SIGTERM"
    assert "go on with: python -m benchmarks.time_to_accuracy --cfg" in out
    assert not Path("rows").exists()

    assert command(tta.main, [*words, "--results=rows"]) == 0
    (row,) = common.read_rows(Path("rows/time_to_accuracy.csv"))
    assert row["sessions"] == "2"
    assert row["overrides"] == "gen.generations=0 train.epochs=30"
    clocks = [event["wall_seconds"] for event in read_events(run) if event["event"] == "epoch"]
    assert clocks == sorted(clocks)
    assert len(clocks) == 30


def test_epochs_of_an_earlier_run_without_evaluations_are_said_to_be_unknown(recipe, capfd):
    run = tta.ask(["--cfg", str(recipe)], 60.0, None).folder
    train.main(["--cfg", str(recipe)])
    assert run.exists()
    assert measure(recipe, "--generation=1", target=99) == 0
    assert "generation 1: 4 of the 4 epochs before were not evaluated" in capfd.readouterr().out
    (row,) = common.read_rows(Path("rows/time_to_accuracy.csv"))
    assert (row["epochs"], row["epochs_not_evaluated_before"]) == ("5", "4")


def test_a_training_that_fails_ends_the_command_with_its_code(recipe, capfd):
    Path("strange").mkdir()
    Path("strange/thesis.tex").write_text("years of work")
    assert measure(recipe, "--run.dir=strange") == 2
    lines = capfd.readouterr().err.splitlines()
    assert "no run folder of fastgen" in lines[0]
    assert lines[1:] == ["fastgen: the training ended with exit code 2"]
    assert not Path("rows").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "required: --top1_error"),
        (["--top1_error=100"], "no error in percent"),
        (["--top1_error=nan"], "no error in percent"),
        (["--top1_error=low"], "'low' is no number"),
        (["--top1_error=35", "--top1_error=36"], "--top1_error is given twice"),
        (["--top1_error=35", "--generation=2"], "--generation=2: the recipe trains 0, 1"),
        (["--top1_error=35", "--generation=0", "--gen.only=1"], "the recipe trains 1"),
        (["--top1_error=35", "--run.eval_every_epochs=2"], "every epoch is evaluated here"),
        (["--top1_error=35", "--run.dry=true"], "nothing to measure in a plan"),
        (["--top1_error=35", "--data.backend=synthetic"], "its labels are random"),
        (["--top1_error=35", "--train.epoch=2"], "did you mean 'train.epochs'?"),
    ],
)
def test_wrong_words_are_one_line_and_start_nothing(words, told, recipe, capfd, monkeypatch):
    monkeypatch.setattr(tta, "train", lambda words: pytest.fail("something was started"))
    assert command(tta.main, ["--cfg", str(recipe), *words]) == 2
    captured = capfd.readouterr()
    assert told in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out
    assert not Path("runs").exists()
