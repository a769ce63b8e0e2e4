"""Repeats side by side: do they run at the same time, equal runs alone, stop, go on, and tell the truth about speed?"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fastgen import crew, record, repeat, train, trainings
from fastgen.crew import Ended
from fastgen.errors import Stopped, command
from fastgen.progress import PatientConsole
from fastgen.repeat import Session
from fastgen.stop import StopRequest

pytest.importorskip("sklearn")

SEEDS, GENERATIONS = (0, 1), (0, 1)
RECIPE = """
data: {dataset: digits, train_limit: 640}
model: {name: resnet8}
train: {epochs: 30, batch_size: 64, lr: 0.05}
gen: {generations: 1}
run: {device: cpu, log_every_steps: 1, eval_every_epochs: 0, save_minutes: 60}
"""
STEPS_PER_EPOCH = 10


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    """A recipe file; the working directory is its folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[int, list[str]]:
    """Seed -> nodes and hashes of the weights of a run of its own."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "small.yaml").write_text(RECIPE)
    for seed in SEEDS:
        words = ["--cfg", str(folder / "small.yaml"), f"--run.seed={seed}", f"--run.dir={folder / f'seed{seed}'}"]
        train.main(words)
    return {seed: fingerprint(folder / f"seed{seed}") for seed in SEEDS}


def fingerprint(run: Path) -> list[str]:
    nodes = [generation["node"] for generation in json.loads((run / "plan.json").read_text())]
    weights = [(run / f"generation_{g}" / "model.safetensors").read_bytes() for g in GENERATIONS]
    return [*nodes, *(hashlib.sha256(content).hexdigest() for content in weights)]


def folders(recipe: Path) -> dict[int, Path]:
    """Seed -> absolute run folder."""
    return {one.seed: one.folder.absolute() for one in repeat.make_repeats(SEEDS, ["--cfg", str(recipe)])}


def times(run: Path, kind: str) -> list[float]:
    return [event["time"] for event in record.read_events(run) if event["event"] == kind]


def start(recipe: Path, *more: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "fastgen.repeat", "--cfg", str(recipe), "--seeds=0,1", *more]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until(condition, seconds=120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def both_train(runs: dict[int, Path]) -> bool:
    return all(times(run, "step") for run in runs.values())


def test_repeats_run_at_the_same_time_and_equal_runs_alone(recipe, alone, capfd):
    words = ["--cfg", str(recipe), "--seeds", "0,1"]
    runs = folders(recipe)
    assert command(repeat.main, [*words, "--at_once=2"]) == 0
    begins, ends = ([times(run, kind)[0] for run in runs.values()] for kind in ("run_begin", "run_end"))
    assert max(begins) < min(ends)
    assert {seed: fingerprint(run) for seed, run in runs.items()} == alone

    out = capfd.readouterr().out
    assert "2 repeats, 2 at once on the CPU" in out
    for seed in SEEDS:
        assert f"seed {seed} | generation 1/1 student  epoch 30/30" in out
        assert f"seed {seed}: done" in out
    rows = [json.loads((run / "results.json").read_text())["generations"][1] for run in runs.values()]
    mean = sum(row["ensemble_top1_error"] for row in rows) / 2
    assert any(line.split()[:2] == ["1", "student"] and f"{mean:.2f}" in line for line in out.splitlines())
    assert "at once, from the first start to the first end" in out

    # The same command, one after the other: found finished, and no speed is claimed.
    assert command(repeat.main, words) == 0
    out = capfd.readouterr().out
    assert out.count("is trained already") == 4
    assert "2 repeats, 1 at once on the CPU" in out
    assert "images/s not measured: repeats were begun before this command (seeds 0, 1)" in out
    assert times(runs[0], "run_end")[1] < times(runs[1], "run_begin")[1]
    assert {seed: fingerprint(run) for seed, run in runs.items()} == alone


def test_a_stop_is_passed_on_and_the_same_command_goes_on(recipe, alone):
    runs = folders(recipe)
    process = start(recipe, "--at_once=2")
    wait_until(lambda: both_train(runs))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT
    assert err.splitlines()[-1] == "fastgen: stopped by SIGINT"
    for seed in SEEDS:
        assert out.count(f"seed {seed} | saved; resume with: python -m fastgen.train") == 1
        assert f"seed {seed}: was stopped" in out
    assert len({file.parent for file in recipe.parent.glob("runs/nodes/*/checkpoint-*.pt")}) == 2

    line = next(line for line in out.splitlines() if line.startswith("go on with: python -m fastgen.repeat "))
    assert command(repeat.main, shlex.split(line)[6:]) == 0
    assert {seed: fingerprint(run) for seed, run in runs.items()} == alone
    resumed = [e["step"] for run in runs.values() for e in record.read_events(run) if e["event"] == "generation_begin"]
    assert sum(step > 0 for step in resumed) == 2


def test_a_killed_parent_leaves_no_orphans_and_loses_nothing(recipe):
    recipe.write_text(RECIPE.replace("epochs: 30", "epochs: 1000"))
    runs = folders(recipe)
    process = start(recipe, "--at_once=2")
    wait_until(lambda: both_train(runs))
    trainings = [int((run / "lock").read_text().split()[1]) for run in runs.values()]
    process.kill()
    process.communicate(timeout=60)
    try:
        wait_until(lambda: not any(_alive(number) for number in trainings), seconds=60)
    finally:
        for number in filter(_alive, trainings):
            os.kill(number, signal.SIGKILL)
    assert len({file.parent for file in recipe.parent.glob("runs/nodes/*/checkpoint-*.pt")}) == 2


def _alive(number: int) -> bool:
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_training_without_its_parent_does_not_begin(tmp_path):
    words = trainings.training_command(["--cfg", "nothing.yaml"])
    words[3] = "1" if os.getpid() != 1 else "2"
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + signal.SIGTERM
    assert not done.stderr


def test_a_repeat_that_fails_is_named_and_the_others_go_on(recipe, capfd):
    runs = folders(recipe)
    runs[0].mkdir(parents=True)
    (runs[0] / "thesis.tex").write_text("years of work")
    words = ["--cfg", str(recipe), "--seeds=0,1", "--at_once=2", "--gen.generations=1"]
    assert command(repeat.main, words) == 1
    captured = capfd.readouterr()
    assert "seed 0: ended with exit code 2" in captured.out
    assert "seed 1: done" in captured.out
    assert f"seed 0 | fastgen: {runs[0].relative_to(recipe.parent)}: is no run folder" in captured.err
    assert captured.err.splitlines()[-1] == "fastgen: 1 of 2 repeats failed: seed 0 ended with exit code 2"
    assert "images/s not measured: not all repeats ended well (seeds 0)" in captured.out
    row = next(line.split() for line in captured.out.splitlines() if line.split()[:2] == ["0", "patriarch"])
    assert (row[3], row[-1]) == ("-", "1")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "required: --seeds"),
        (["--seeds"], "expected one argument"),
        (["--seeds=0,0"], "0 stands twice: keep one"),
        (["--seeds="], "no list of whole numbers"),
        (["--seeds=0;1"], "no list of whole numbers"),
        (["--seeds=-1"], "no list of whole numbers"),
        (["--seeds=0", "--seeds", "1"], "--seeds is given twice: keep one"),
        (["--seeds=0,1", "--at_once=0"], "'0' is below 1"),
        (["--seeds=0,1", "--run.dir=here"], "repeats cannot share a run folder"),
        (["--seeds=0", "--run.dir", "here"], "repeats cannot share a run folder"),
        (["--seeds=0,1", "--run.seed=3"], "--seeds gives every repeat its own"),
        (["--seeds=0,1", "--run.init_seed=3", "--data.seed=3"], "seeds 0 and 1 would share runs/small-"),
        (["--seeds=0,99999999999999999999"], "run.seed = 99999999999999999999: give a number"),
        (["--seeds=0,1", "--train.epoch=3"], "did you mean 'train.epochs'?"),
        (["--seeds=0,1", "--train.epochs=many"], "train.epochs: expected"),
        (["--seeds=0,1", "--data.dataset=cifar100", "--data.root=nowhere"], "nowhere"),
    ],
)
def test_wrong_words_are_one_line_and_start_nothing(words, told, recipe, capfd, monkeypatch):
    monkeypatch.setattr(repeat, "run_repeats", lambda *_: pytest.fail("something was started"))
    assert command(repeat.main, ["--cfg", str(recipe), *words]) == 2
    captured = capfd.readouterr()
    assert told in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out
    assert not Path("runs").exists()


def test_a_folder_in_the_recipe_file_is_refused(recipe, capfd):
    recipe.write_text(RECIPE.replace("device: cpu", "device: cpu, dir: mine"))
    assert command(repeat.main, ["--cfg", str(recipe), "--seeds=0,1"]) == 2
    assert "seeds 0 and 1 would share mine: take run.dir out of the recipe" in capfd.readouterr().err


def test_a_dry_run_prints_each_plan_and_makes_nothing(recipe, capfd):
    runs = folders(recipe)
    assert command(repeat.main, ["--cfg", str(recipe), "--seeds=0,1", "--run.dry=true"]) == 0
    out = capfd.readouterr().out
    plans = repeat.make_plans(repeat.make_repeats(SEEDS, ["--cfg", str(recipe)]))
    nodes = [generation.node for plan in plans for generation in plan]
    assert len(set(nodes)) == 4
    assert all(node in out for node in nodes)
    assert all(f"seed {seed}: {run.relative_to(recipe.parent)}" in out for seed, run in runs.items())
    assert not Path("runs").exists()


def test_help_lists_our_words_and_the_recipe_s(capfd):
    assert command(repeat.main, ["--help"]) == 0
    out = capfd.readouterr().out
    assert "--at_once" in out
    assert "--train.epochs" in out


# What processes print and do, without a training.


def run_scripts(monkeypatch, recipe, scripts, at_once, stop=None):
    """Runs a Python script, with its number as argument, in the place of each training."""
    repeats = repeat.make_repeats(range(len(scripts)), ["--cfg", str(recipe)])

    def instead(words):
        seed = int(words[-1].partition("=")[2])
        return [sys.executable, "-c", scripts[seed], str(seed)]

    monkeypatch.setattr(crew, "training_command", instead)
    return repeat.run_repeats(repeats, at_once, None, stop or StopRequest())


HALF_LINES = """
import sys, time
for number in range(40):
    sys.stdout.write(f"begin {number}, ")
    sys.stdout.flush()
    time.sleep(0.01)
    sys.stdout.write("[red]end[/red] :smile: " + "x" * 300 + "\\n")
sys.stdout.buffer.write(b"no text: \\xff\\n\\nlast")
print("an error", file=sys.stderr)
"""


def test_lines_are_whole_prefixed_and_complete(monkeypatch, recipe, capfd):
    run_scripts(monkeypatch, recipe, [HALF_LINES] * 3, at_once=3)
    captured = capfd.readouterr()
    expected = [f"begin {number}, [red]end[/red] :smile: {'x' * 300}" for number in range(40)]
    expected += ["no text: \N{REPLACEMENT CHARACTER}", "", "last"]
    lines = captured.out.splitlines()
    for seed in range(3):
        prefix = f"seed {seed} | "
        assert [line.removeprefix(prefix) for line in lines if line.startswith(prefix)] == expected
        assert captured.err.count(f"{prefix}an error\n") == 1
    assert len(lines) == 3 * len(expected) + 3


def broken_pipe() -> int:
    ours, theirs = os.pipe()
    os.close(ours)
    return theirs


@pytest.mark.parametrize("where", [broken_pipe, lambda: os.open("/dev/full", os.O_WRONLY)])
def test_a_reader_that_fails_does_not_hold_a_training_up(where):
    # More than a pipe holds, in many lines.
    script = "for number in range(300): print('x' * 1000)"
    talker = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    file = open(where(), "w")  # noqa: SIM115 (closing it fails, as it must)
    crew.show_lines(talker.stdout, "seed 0 | ", PatientConsole(file=file))
    assert talker.wait(timeout=10) == 0
    with contextlib.suppress(OSError):
        file.close()


MEETING = """
import sys, time
from pathlib import Path
Path(f"here{sys.argv[1]}").touch()
end = time.monotonic() + 20
while len(list(Path().glob("here*"))) < 2:
    time.sleep(0.01)
    if time.monotonic() > end:
        sys.exit(3)
"""


@pytest.mark.parametrize(("at_once", "codes"), [(2, {0}), (1, {0, 3})])
def test_as_many_run_at_the_same_time_as_asked(monkeypatch, recipe, at_once, codes):
    scripts = [MEETING.replace("20", "3" if at_once == 1 else "60")] * 2
    session = run_scripts(monkeypatch, recipe, scripts, at_once)
    assert {one.code for one in session.ended} == codes
    assert [one.task.seed for one in sorted(session.ended, key=lambda one: one.task.seed)] == [0, 1]


def test_the_full_time_ends_when_a_place_stays_empty(monkeypatch, recipe):
    scripts = ["import time; time.sleep(0.2)", "import time; time.sleep(2)", "import time; time.sleep(0.5)"]
    begin = time.time()
    session = run_scripts(monkeypatch, recipe, scripts, at_once=2)
    seconds = time.time() - begin
    assert [one.task.seed for one in session.ended] == [0, 2, 1]
    assert begin <= session.full_from < begin + 0.5
    # Seeds 0 and 2 one after the other, beside seed 1: not seed 1's rest.
    assert 0.7 <= session.full_until - session.full_from < seconds - 0.5

    session = run_scripts(monkeypatch, recipe, scripts[:1] * 3, at_once=1)
    assert session.full_until - session.full_from >= 0.6


def test_who_does_not_stop_in_time_is_killed_and_named(monkeypatch, recipe, capfd):
    monkeypatch.setattr(trainings, "GRACE_SECONDS", 0.5)
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    stop = StopRequest()
    original = crew.show_lines

    def show_and_stop(pipe, prefix, console):
        with pipe:
            for line in pipe:
                original(io.StringIO(line), prefix, console)
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(crew, "show_lines", show_and_stop)
    with stop:
        session = run_scripts(monkeypatch, recipe, [stubborn, "print('never begun')"], at_once=1, stop=stop)
        with pytest.raises(Stopped):
            stop.check()
    assert [(one.task.seed, one.code) for one in session.ended] == [(0, -signal.SIGKILL)]
    out = capfd.readouterr().out
    assert "did not end within 0.5 s of SIGTERM: killed" in out
    assert "seed 0: was ended by SIGKILL" in out
    assert "never begun" not in out


@pytest.mark.parametrize(
    ("cores", "at_once", "set_by_user", "threads"),
    [(8, 3, None, 2), (8, 2, None, 4), (2, 4, None, 1), (8, 1, None, None), (8, 2, "5", None)],
)
def test_processes_share_the_cores(monkeypatch, cores, at_once, set_by_user, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.delenv("OMP_NUM_THREADS")
    if set_by_user:
        monkeypatch.setenv("OMP_NUM_THREADS", set_by_user)
    assert repeat.threads_each(torch.device("cpu"), at_once) == threads
    assert repeat.threads_each(torch.device("cuda"), at_once) is None


def test_processes_are_told_their_threads(monkeypatch, recipe, capfd):
    repeats = repeat.make_repeats([0], ["--cfg", str(recipe)])
    script = "import os; print('threads', os.environ['OMP_NUM_THREADS'])"
    monkeypatch.setattr(crew, "training_command", lambda words: [sys.executable, "-c", script])
    repeat.run_repeats(repeats, 1, 7, StopRequest())
    assert "seed 0 | threads 7" in capfd.readouterr().out


# Arithmetic.


def event(kind, at, **facts):
    return {"event": kind, "time": at, **facts}


def test_images_are_counted_up_to_the_last_line_before():
    events = [
        event("run_begin", 1.0),
        event("generation_begin", 2.0, generation=0, step=0),
        event("step", 3.0, generation=0, step=5),
        event("epoch", 4.0, generation=0, step=20),
        event("generation_begin", 5.0, generation=1, step=0),
        event("step", 6.0, generation=1, step=3),
        event("step", 7.0, generation=1, step=13),
        event("diverged", 7.5, step=13),
    ]
    # Ten steps an epoch: nine of 64 images, one of 24.
    for until, images in ((2.5, 0), (3.0, 5 * 64), (4.5, 2 * 600), (6.5, 2 * 600 + 3 * 64), (9.0, 3 * 600 + 3 * 64)):
        assert repeat.trained_images(events, 600, 64, until) == images


def session_of(recipe, changes=(), codes=(0, 0)):
    """Two finished repeats, of which the first trained 2,000 images until 14.0 and the second 1,000."""
    repeats = repeat.make_repeats(SEEDS, ["--cfg", str(recipe)])
    for one in repeats:
        one.folder.mkdir(parents=True, exist_ok=True)
        first = 0 if one.seed not in changes else 1
        events = [
            event("generation_begin", 11.0, generation=0, step=first),
            event("epoch", 12.0 + one.seed, generation=0, step=STEPS_PER_EPOCH),
            event("epoch", 13.0 + 2 * one.seed, generation=0, step=2 * STEPS_PER_EPOCH),
        ]
        (one.folder / "events.jsonl").write_text("\n".join(map(json.dumps, events)) + '\n{"event": "ep')
        (one.folder / "results.json").write_text(json.dumps({"train_images": 640, "generations": [{"generation": 0}]}))
    ended = tuple(Ended(one, code) for one, code in zip(repeats, codes, strict=True))
    return Session(ended, 10.0, 14.0)


def test_the_total_is_all_images_over_the_full_time(recipe):
    # 2 x 640 and 640 images in 4 seconds.
    line = repeat.total_speed(session_of(recipe), [], 2)
    assert "all repeats together: 480 images/s (1,920 student images in 4.0 s, 2 at once" in line


@pytest.mark.parametrize(
    ("changes", "codes", "begun", "why"),
    [
        ((), (0, 0), [1], "repeats were begun before this command (seeds 1)"),
        ((), (0, 1), [], "not all repeats ended well (seeds 1)"),
        ((1,), (0, 0), [], "seed 1 took generations over"),
    ],
)
def test_what_was_not_measured_is_said(recipe, changes, codes, begun, why):
    line = repeat.total_speed(session_of(recipe, changes, codes), begun, 2)
    assert line == f"all repeats together: images/s not measured: {why}"


def test_mean_and_deviation_of_the_seeds():
    # Deviations -2, 0, 2: variance 8 / 2.
    assert repeat.mean_and_deviation([30.0, 32.0, 34.0]) == ("32.00", "2.00")
    assert repeat.mean_and_deviation([30.0]) == ("30.00", "-")
    assert repeat.mean_and_deviation([30.0, None]) == ("-", "-")


def test_the_table_has_a_row_a_generation():
    def results(*errors):
        rows = [
            {
                "generation": g, "role": "patriarch" if g == 0 else "student", "samples_evaluated": 1000,
                "top1_error": error, "ensemble_top1_error": error - 1,
            }
            for g, error in enumerate(errors)
        ]  # fmt: skip
        return {"evaluated_on": "test", "generations": rows}

    table = repeat.repeats_table("small", {3: results(30.0, 20.0), 5: results(32.0, 23.0)})
    assert "seeds 3, 5" in str(table.title)
    assert "1,000 test images" in str(table.title)
    console = Console(width=120, file=io.StringIO())
    console.print(table)
    cells = [line.split() for line in console.file.getvalue().splitlines()]
    rows = [row for row in cells if row[1:2] in (["patriarch"], ["student"])]
    assert rows == [
        ["0", "patriarch", "31.00", "1.41", "30.00", "1.41", "2"],
        ["1", "student", "21.50", "2.12", "20.50", "2.12", "2"],
    ]
