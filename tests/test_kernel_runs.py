"""Whole runs with Triton kernels: the same training up to rounding, recorded, resumed, refused where impossible."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from fastgen import train, trainer
from fastgen.errors import Stopped
from fastgen.kernels.runtime import interpreted

pytestmark = pytest.mark.skipif(
    not (interpreted() or torch.cuda.is_available()), reason="neither a GPU nor Triton's interpreter"
)

# Five steps a generation, the last of them smaller.
RECIPE = (
    "{data: {dataset: digits, train_limit: 90, val_limit: 20}, model: {name: resnet8},"
    " train: {epochs: 1, batch_size: 20, lr: 0.01}, gen: {generations: 1}, run: {eval_every_epochs: 0}}"
)


def run(folder, name, *words):
    (folder / "tiny.yaml").write_text(RECIPE)
    train.main(["--cfg", str(folder / "tiny.yaml"), f"--run.dir={folder / name / 'run'}", *words])
    return folder / name / "run"


def weights(run, generation=1):
    return load_file(run / f"generation_{generation}" / "model.safetensors")


def path_of(run, generation=1):
    return json.loads((run / f"generation_{generation}" / "node.json").read_text())["training"]["path"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run(tmp_path_factory.mktemp("plain"), "plain")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--train.kernels=triton"], {"views": "resident, triton, normalised", "loss": "triton", "batchnorm": "torch"}),
        (["--train.batchnorm=triton"], {"views": "resident", "loss": "torch", "batchnorm": "triton"}),
        (
            ["--train.kernels=triton", "--data.backend=folder"],
            {"views": "folder", "loss": "triton", "batchnorm": "torch"},
        ),
        (
            ["--train.kernels=triton", "--teacher.labels=table", "--train.accumulate_steps=2", "--train.lr=0.001"],
            {"views": "resident, triton, normalised", "loss": "triton"},
        ),
    ],
)
def test_kernels_train_what_plain_pytorch_trains(plain, tmp_path, words, expected):
    other = run(tmp_path, "other", *words)
    changed = [word for word in words if not word.startswith(("--train.kernels", "--train.batchnorm"))]
    reference = run(tmp_path, "reference", *changed) if changed else plain
    for generation in range(2):
        ours, theirs = weights(other, generation), weights(reference, generation)
        assert ours.keys() == theirs.keys()
        # Rounding errors of 2^-24 a step; the weights themselves move by 1e-2 and more.
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5)
    assert path_of(other).items() >= expected.items()
    rounding = "--train.kernels=triton" in words or "--train.batchnorm=triton" in words
    same_node = (other / "generation_0").resolve().name == (reference / "generation_0").resolve().name
    assert rounding != same_node


@pytest.mark.parametrize("words", [["--train.kernels=triton"], ["--train.batchnorm=triton"]])
def test_a_stopped_run_ends_with_the_same_bits(tmp_path, monkeypatch, words):
    whole = run(tmp_path, "whole", *words)
    take, steps = trainer.Training.take, 0

    def stopping(training, tally):
        nonlocal steps
        take(training, tally)
        steps += 1
        if steps == 3:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(trainer.Training, "take", stopping)
    with pytest.raises(Stopped):
        run(tmp_path, "stopped", *words)
    stopped = run(tmp_path, "stopped", *words)
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(stopped).items())


def test_jitter_leaves_the_pixels_raw(tmp_path):
    # The kernel executes the views; what is turned afterwards must not be normalised yet.
    words = ["--data.rotation_degrees=10", "--gen.generations=0"]
    ours, theirs = run(tmp_path, "ours", "--train.kernels=triton", *words), run(tmp_path, "theirs", *words)
    assert path_of(ours, 0)["views"] == "resident, triton"
    for name, tensor in weights(theirs, 0).items():
        torch.testing.assert_close(weights(ours, 0)[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
@pytest.mark.parametrize("key", ["kernels", "batchnorm"])
def test_without_a_gpu_it_is_one_line(run_command, tmp_path, key):
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    without = {name: "" for name in os.environ if name == "TRITON_INTERPRET"}
    ended = run_command(["--cfg", tmp_path / "tiny.yaml", f"--train.{key}=triton"], env=without)
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert f"train.{key}=triton needs an NVIDIA GPU" in ended.err
    assert f"set train.{key}=torch" in ended.err
