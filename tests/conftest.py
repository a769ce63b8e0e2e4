"""Shared by all tests: tiny recipes, the command as a process, CIFAR-100 as a small copy and as the real one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

# Tiny networks gain nothing from threads, and several processes of several threads wait for each other
# ten times longer than they work. Set before torch is imported; tests that start processes pass it on.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton reads it when it is imported. On a GPU the kernels themselves are tested.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

TINY_RECIPE = {
    "data": {"dataset": "digits"},
    "model": {"name": "resnet8"},
    "train": {"epochs": 1, "batch_size": 128},
    "gen": {"generations": 1},
    "run": {"device": "cpu", "eval_every_epochs": 0},
}


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    out: str
    err: str


def tiny_recipe(**overrides):
    """A valid recipe as a tree: `train__epochs=3` sets train.epochs, a value of `...` removes the key."""
    tree = {section: dict(keys) for section, keys in TINY_RECIPE.items()}
    for path, value in overrides.items():
        section, key = path.split("__")
        tree.setdefault(section, {})[key] = value
        if value is ...:
            del tree[section][key]
    return tree


@pytest.fixture(scope="session", autouse=True)
def _server_of_processes():
    """Before any test starts it; and not before the first one, as its processes print where it was begun."""
    # Not at the top: it imports torch, which reads the environment that is set there.
    from processes import start_server

    start_server()


@pytest.fixture
def _signals_are_heard():
    """Under `nohup`, or in a shell's background, SIGHUP or SIGINT is ignored, here and in what is started from here."""
    usual = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def write_recipe(tmp_path):
    """Function that writes `tiny_recipe(**overrides)` to a file and gives its path."""

    def write(folder: Path | None = None, name: str = "tiny.yaml", **overrides) -> Path:
        path = (folder or tmp_path) / name
        path.write_text(yaml.safe_dump(tiny_recipe(**overrides)))
        return path

    return write


@pytest.fixture
def run_command(tmp_path):
    """Function that runs `python -m fastgen.train WORDS` (or another module) in an empty folder of its own."""

    def run(words, *, module="fastgen.train", folder: Path | None = None, env=None, timeout=300) -> Ended:
        if folder is None:
            folder = tmp_path / "here"
            folder.mkdir(exist_ok=True)
        command = [sys.executable, "-m", module, *map(str, words)]
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=timeout
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def small_layouts(monkeypatch):
    """Lets `fastgen.data.cifar` expect small files; the true counts would be 185 MB a test. For this process alone."""
    # Not at the top: it imports torch.
    from small_cifar import small_layouts as layouts

    from fastgen.data import cifar

    for name, layout in layouts().items():
        monkeypatch.setitem(cifar.LAYOUTS, name, layout)


@pytest.fixture
def fake_cifar100(tmp_path, small_layouts):
    """Folder with random pixels in the binary layout: 6 training and 2 test images of each of 100 classes."""
    from small_cifar import write_small_cifar100

    return write_small_cifar100(tmp_path / "fake")


@pytest.fixture(scope="session")
def cifar100_root():
    """Folder above the official CIFAR-100 files."""
    folder = os.environ.get("FASTGEN_CIFAR100")
    if not folder:
        pytest.skip("FASTGEN_CIFAR100 does not name the folder of the official CIFAR-100 files")
    return Path(folder)


@pytest.fixture(scope="session")
def report_runs(tmp_path_factory):
    """Folder of the small runs that reports are made of; not to be changed."""
    from report_runs import train_runs

    return train_runs(tmp_path_factory.mktemp("report_runs"))


@pytest.fixture(scope="session")
def written_report(report_runs, tmp_path_factory):
    """Folder of a report of all small runs; not to be changed."""
    from fastgen.report.__main__ import main

    folder = tmp_path_factory.mktemp("written_report")
    main([str(report_runs), "--to", str(folder)])
    return folder
