"""Nothing is lost: kills at any instant, also within a save; signals; a full disk; a diverged loss."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fastgen import files, trainer
from fastgen.errors import MachineError
from fastgen.train import main

KILLS = 20
GENERATIONS = 2
ONE_EPOCH = ("--train.epochs=1", "--run.save_minutes=0")
RECIPE = """
data: {dataset: digits, train_limit: 640}
model: {name: resnet8}
train: {epochs: 12, batch_size: 64, lr: 0.1}
gen: {generations: 1, k: 3, confidence: 0.6, teacher_weight: 0.6}
run: {save_minutes: 0.002, eval_every_epochs: 0, log_every_steps: 7, device: cpu}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def server() -> multiprocessing.context.ForkServerContext:
    """Starts processes that have imported everything already: a kill every tenth of a second."""
    return multiprocessing.get_context("forkserver")


def train_quietly(words: list[str]) -> None:
    """One session, in a process of its own."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        main(words)


def train_without_fsync(words: list[str]) -> None:
    """As above, faster: a kill takes nothing from the system's cache, which is all that fsync empties."""
    files.os.fsync = lambda descriptor: None
    train_quietly(words)


def train_and_die(words: list[str], name: str, call: int) -> None:
    """One session that is killed before the given call of an `os` function that saving is made of."""
    original, calls = getattr(os, name), iter(range(1, call + 1))

    def fatal(*arguments: object) -> object:
        if next(calls, None) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    setattr(files.os, name, fatal)
    train_quietly(words)


def run_words(recipe: Path, folder: Path) -> list[str]:
    return ["--cfg", str(recipe), f"--run.dir={folder / 'run'}"]


def fingerprint(folder: Path) -> list[str]:
    """Hashes of the weights, and the losses of every epoch: equal only for the same training."""
    found = []
    for generation in range(GENERATIONS):
        node = folder / "run" / f"generation_{generation}"
        history = json.loads((node / "node.json").read_text())["training"]["history"]
        found += [hashlib.sha256((node / "model.safetensors").read_bytes()).hexdigest(), json.dumps(history)]
    rows = json.loads((folder / "run" / "results.json").read_text())["generations"]
    return found + [str(row["ensemble_top1_error"]) for row in rows]


def test_kills_at_random_instants_lose_nothing(tmp_path, recipe, server):
    words = run_words(recipe, tmp_path / "whole")
    started = time.monotonic()
    undisturbed = server.Process(target=train_without_fsync, args=(words,))
    undisturbed.start()
    undisturbed.join()
    whole_seconds = time.monotonic() - started
    expected = fingerprint(tmp_path / "whole")
    window, draw, kills, chain, resumed_at = whole_seconds, random.Random(0), 0, 0, set()
    allowed = KILLS
    while kills < allowed:
        # One chain: killed and resumed until it ends by itself.
        words, ended = run_words(recipe, tmp_path / f"chain{chain}"), False
        while not ended:
            session = server.Process(target=train_without_fsync, args=(words,))
            session.start()
            session.join(draw.uniform(0, window) if kills < allowed else None)
            ended = session.exitcode is not None
            if ended:
                assert session.exitcode == 0
            else:
                session.kill()
                session.join()
                kills += 1
                if not list((tmp_path / f"chain{chain}").glob("nodes/*/*")):
                    # Killed before anything was saved: the machine is slower by now than in the first run.
                    window *= 1.2
        assert fingerprint(tmp_path / f"chain{chain}") == expected
        resumed_at |= steps_resumed_at(tmp_path / f"chain{chain}" / "run")
        chain += 1
        if kills >= allowed and len(resumed_at) < KILLS // 4 and allowed < 3 * KILLS:
            # Where starting takes most of a session, few kills fall into the training: then it takes more of them.
            allowed += KILLS
    # The kills fell all over the training, not on its beginning alone.
    assert len(resumed_at) >= KILLS // 4


# A save calls replace once: the kill falls when the new content stands beside the old one. With a
# checkpoint after every step, 1 to 3 are the run folder's own files, 4 the link, then come 9
# checkpoints, the weights (14), the node's mark (15), its measurement (16) and the results (17); then
# the student's. A save calls fsync twice: in the first call the new content may be torn.
@pytest.mark.parametrize(
    "at", ["fsync 2", "fsync 15", "replace 2", "replace 9", *(f"replace {n}" for n in range(13, 19))]
)
def test_kills_within_a_save_lose_nothing(tmp_path, recipe, server, expected_of_one_epoch, at):
    name, call = at.split()
    words = [*run_words(recipe, tmp_path), *ONE_EPOCH]
    killed = server.Process(target=train_and_die, args=(words, name, int(call)))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    main(words)
    assert fingerprint(tmp_path) == expected_of_one_epoch


@pytest.fixture(scope="module")
def expected_of_one_epoch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    (folder / "small.yaml").write_text(RECIPE)
    main([*run_words(folder / "small.yaml", folder), *ONE_EPOCH])
    return fingerprint(folder)


def steps_resumed_at(run: Path) -> set[tuple[int, int]]:
    """Generation and step at which sessions went on in the middle of a training."""
    lines = [line for line in (run / "events.jsonl").read_text().splitlines() if line.endswith("}")]
    begun = [event for event in map(json.loads, lines) if event["event"] == "generation_begin"]
    return {(event["generation"], event["step"]) for event in begun if event["step"] > 0}


def start(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fastgen.train", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(path: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_resume(tmp_path, recipe, number):
    words = [*run_words(recipe, tmp_path / "cut"), "--run.save_minutes=60"]
    process = start(words)
    wait_for(tmp_path / "cut" / "run" / "generation_0")
    time.sleep(0.3)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"resume with: python -m fastgen.train {shlex.join(words)}" in out
    assert err.strip() == f"fastgen: stopped by {number.name}"
    assert list((tmp_path / "cut").glob("nodes/*/checkpoint-*.pt"))
    main(words)
    main(run_words(recipe, tmp_path / "whole"))
    assert fingerprint(tmp_path / "cut") == fingerprint(tmp_path / "whole")


def test_a_second_process_on_one_run_folder_is_refused(tmp_path, recipe):
    words = [*run_words(recipe, tmp_path / "shared"), "--run.save_minutes=60", "--train.epochs=1000"]
    first = start(words)
    wait_for(tmp_path / "shared" / "run" / "generation_0")
    second = start(words)
    _, err = second.communicate(timeout=60)
    assert second.returncode == 2
    assert "in use by process" in err
    assert len(err.strip().splitlines()) == 1
    first.terminate()
    first.communicate(timeout=60)
    assert first.returncode == 128 + signal.SIGTERM


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system in memory with the given mount options; needs the rights of root."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a file system in memory cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_place_that_may_not_be_written_to_is_one_line(tmp_path, recipe):
    with mounted(tmp_path / "disk", "ro") as disk:
        process = start(run_words(recipe, disk))
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "Read-only file system" in err
    assert len(err.strip().splitlines()) == 1


def test_a_full_disk_ends_with_one_line_and_loses_nothing(tmp_path, recipe):
    with mounted(tmp_path / "disk", "size=1200k") as disk:
        # A checkpoint after every step: there is room for one, and not for the next beside it.
        words = [*run_words(recipe, disk), "--run.save_minutes=0"]
        process = start(words)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 1, out
        assert "No space left on device" in err
        assert len(err.strip().splitlines()) == 1
        assert "Traceback" not in err
        subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
        main(words)
        main(run_words(recipe, tmp_path / "whole"))
        assert fingerprint(disk) == fingerprint(tmp_path / "whole")


def test_a_diverged_loss_names_step_and_samples(tmp_path, recipe):
    process = start([*run_words(recipe, tmp_path), "--train.lr=1e30"])
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "the loss is not finite at step" in err
    assert "checkpoint" in err
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "diverged"
    assert len(events[-1]["ids"]) == 64


def test_weights_broken_by_the_last_update_are_not_finished(tmp_path, recipe, monkeypatch):
    original = trainer.Training.take

    def breaks_at_the_end(training, tally):
        original(training, tally)
        if training.step == 10:
            next(training.learner.model.parameters()).data.fill_(float("inf"))

    monkeypatch.setattr(trainer.Training, "take", breaks_at_the_end)
    with pytest.raises(MachineError, match="infinite or not a number"):
        main([*run_words(recipe, tmp_path), "--train.epochs=1", "--run.save_minutes=60"])
    assert not list(tmp_path.glob("nodes/*/node.json"))
    assert not list(tmp_path.glob("nodes/*/model.safetensors"))


def test_a_torn_event_line_does_not_spoil_the_next(tmp_path, recipe):
    words = run_words(recipe, tmp_path)
    main(words)
    with open(tmp_path / "run" / "events.jsonl", "a") as file:
        file.write('{"event": "st')
    main(words)
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    broken = [line for line in lines if not line.endswith("}")]
    assert broken == ['{"event": "st']
