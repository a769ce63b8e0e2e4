"""Places that fail, for `benchmarks.soak`: a full disk, one to be read only, damaged and missing files, a bad loss."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data_prep.manifest
from benchmarks.soak_kills import EVERY_STEP
from benchmarks.soak_runs import Case, Outcome, Rig
from benchmarks.soak_sessions import NotTried, demand
from fastgen import train
from fastgen.checkpoint import load_checkpoint
from fastgen.nodes import checkpoints
from fastgen.record import Recorder

# A checkpoint takes 90 MB: one every two seconds.
PHOTOGRAPHS = """
data: {dataset: imagenet, backend: folder, resolution_px: 32, workers: 1}
model: {name: resnet18}
train: {epochs: 6, batch_size: 8, lr: 0.01}
gen: {generations: 1, k: 3}
run: {save_minutes: 0.03, eval_every_epochs: 0, log_every_steps: 1, device: cpu}
"""
CLASSES, PER_CLASS = 3, {"train": 7, "val": 3}
# From hardly anything to all but enough: the run folder's own files take 100 KB, and a checkpoint 680 KB.
DISK_KB = (100, 2000)


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system in memory with the given mount options.

    Raises:
        NotTried: that takes rights which we have not.
    """
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(words, capture_output=True).returncode:
        raise NotTried("no right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def full_disk(case: Case) -> Outcome:
    """The disk of the run is full at some point: once there is room, it goes on."""
    with mounted(case.folder / "disk", f"size={case.draw.randint(*DISK_KB)}k") as disk:
        case.run = disk / "run"
        ended = case.start(EVERY_STEP).wait()
        if ended.code:
            demand(ended.code == 1, f"exit code {ended.code} on a full disk: {ended.err[-500:]}")
            demand("No space left on device" in ended.line, f"it does not say why: {ended.line}")
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        case.resume(EVERY_STEP)
        return Outcome(f"exit {ended.code}", ended.err, case.compare(), int(ended.code != 0))


def read_only(case: Case) -> Outcome:
    """The run folder may not be written to."""
    with mounted(case.folder / "disk", "ro") as disk:
        case.run = disk / "run"
        ended = case.start().wait()
    demand(ended.code == 2, f"exit code {ended.code}: {ended.err}")
    demand("Read-only file system" in ended.line, f"it does not say why: {ended.line}")
    return Outcome("exit 2", ended.err, 0)


def cut(case: Case) -> Outcome:
    """The newest checkpoint has lost its end, as after a loss of power: the one before it is taken."""
    _copy_of_a_stopped_run(case)
    newest = _newest(case)
    content = newest.read_bytes()
    newest.write_bytes(content[: case.draw.randrange(len(content))])
    return _after_damage(case)


def flip(case: Case) -> Outcome:
    """A bit of the newest checkpoint has changed: the one before it is taken, or nothing comes of it."""
    _copy_of_a_stopped_run(case)
    newest = _newest(case)
    content = bytearray(newest.read_bytes())
    content[case.draw.randrange(len(content))] ^= 1 << case.draw.randrange(8)
    newest.write_bytes(content)
    return _after_damage(case)


def _after_damage(case: Case) -> Outcome:
    ended = case.start().wait()
    demand(ended.code == 0, f"exit code {ended.code}: {ended.err}")
    again = case.compare()
    said = re.search(r"is damaged \(.*\): going on from the one before it, step \d+", " ".join(ended.out.split()))
    demand((again > 0) == (said is not None), f"{again} steps were taken again, and it says: {ended.out[:500]}")
    return Outcome("exit 0", "went on from the one before it" if said else "loaded the same", again)


def _newest(case: Case) -> Path:
    found = checkpoints(case.run / "generation_1")
    demand(len(found) == 2, f"{len(found)} checkpoints are kept, not 2")
    return found[0]


def _copy_of_a_stopped_run(case: Case) -> None:
    """A run that was stopped in its last epoch; made once."""
    stopped = case.rig.folder / "stopped"
    if not stopped.exists():
        maker = case.rig.case(1, case.draw)
        ended = maker.start(EVERY_STEP, program=partial(train_and_stop, case.rig.steps - 4)).wait()
        demand(ended.code == 128 + signal.SIGTERM, f"exit code {ended.code}: {ended.err}")
        maker.folder.rename(stopped)
    for name in ("run", "nodes"):
        shutil.copytree(stopped / name, case.folder / name, symlinks=True)


def train_and_stop(step: int, words: Sequence[str]) -> None:
    """What a session runs that is asked to stop after a step of the student."""
    stepped = Recorder.stepped

    def stop_there(recorder: Recorder, at: int) -> None:
        stepped(recorder, at)
        if at == step and recorder._generation == 1:
            signal.raise_signal(signal.SIGTERM)

    setattr(Recorder, "stepped", stop_there)  # noqa: B010 (a method is not to be assigned to, says mypy)
    train.main(words)


def photographs(rig: Rig) -> tuple[Path, str]:
    """A recipe for a few soft random pictures, and the word that says where they are; made once."""
    root, recipe = rig.folder / "photographs", rig.folder / "photographs.yaml"
    if not recipe.exists():
        for part, count in PER_CLASS.items():
            for number in range(CLASSES * count):
                place = root / part / f"class{number % CLASSES}" / f"{number}.jpg"
                place.parent.mkdir(parents=True, exist_ok=True)
                coarse = np.random.default_rng([count, number]).integers(0, 256, (6, 8, 3), dtype=np.uint8)
                Image.fromarray(coarse).resize((80, 60), Image.Resampling.BICUBIC).save(place)
            words = [f"--source={root / part}", f"--out={root / part}.manifest", "--workers=1"]
            rig.call(data_prep.manifest.main, words)
        recipe.write_text(PHOTOGRAPHS)
    return recipe, f"--data.root={root}"


def vanish(case: Case) -> Outcome:
    """A picture disappears while it is trained on: the line names it, and once it is back the run goes on."""
    root = case.rig.folder / "photographs"
    picture = case.draw.choice(sorted((root / "train").rglob("*.jpg")))
    away = root / "away.jpg"
    session = case.begin()
    try:
        if case.begun(session, step=case.draw.randint(1, 6), generation=case.draw.randint(0, 1)):
            picture.rename(away)
        ended = session.wait()
    finally:
        if away.exists():
            away.rename(picture)
    missed = ended.code != 0
    if missed:
        demand(ended.code == 2, f"exit code {ended.code}: {ended.err[-500:]}")
        demand(str(picture) in ended.line, f"it does not name {picture}: {ended.line}")
    case.resume()
    return Outcome(f"exit {ended.code}", ended.err, case.compare(), int(missed))


def diverge(case: Case) -> Outcome:
    """The loss is not finite: nothing of that is saved, and called again the command says the same."""
    told = []
    for _ in range(2):
        ended = case.start().wait()
        demand(ended.code == 1, f"exit code {ended.code}: {ended.err[-500:]}")
        found = re.search(r"the loss is not finite at step (\d+) \(sample ids .*checkpoint", ended.line)
        demand(found is not None, f"it does not name step, samples and checkpoint: {ended.line}")
        told.append(found[1] if found else "")
    demand(told[0] == told[1], f"the second time another step is named: {told}")
    demand(not list(case.folder.glob("nodes/*/model.safetensors")), "weights were saved")
    for path in case.folder.glob("nodes/*/checkpoint*"):
        broken = [
            name for name, tensor in load_checkpoint(path)["model"].items() if not bool(torch.isfinite(tensor).all())
        ]
        demand(not broken, f"a checkpoint was saved that is not finite: {broken[:3]}")
    return Outcome("exit 1", ended.err, 0)
