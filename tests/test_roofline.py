"""The model of a step's cost: against counts by hand, torch's own counter of FLOPs, and the notes' table."""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.roofline import Work, floor_seconds, model_flops_per_image, step_work
from fastgen.models import build_model, initialise, parameter_count

# Of an H200, measured elsewhere: what the table below was made with.
COPY_BYTES_PER_SECOND, MATMUL_FLOPS_PER_SECOND = 4.3e12, 790e12
OPTIMIZER_BYTES = 20


class TinyNet(nn.Module):
    """A stem, one block around a shortcut, a mean and a linear layer: every rule of counting once."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)) + x)
        return self.fc(x.mean((2, 3)))


# Two images of 3 x 8 x 6 values; four channels of 4 x 3 positions behind the stem.
TINY_SHAPE = (2, 3, 8, 6)
IMAGES, Y, MEANS, LOGITS = 288, 96, 8, 10
STEM, CONV, FC = 4 * 27, 4 * 36, 4 * 5
STEM_FLOPS, CONV_FLOPS, FC_FLOPS = 2 * Y * 27, 2 * Y * 36, 2 * LOGITS * 4
STEM_VALUES, CONV_VALUES, FC_VALUES = IMAGES + STEM + Y, Y + CONV + Y, MEANS + FC + LOGITS
# Weights, four vectors of batch-norms, and the linear layer with its bias.
TINY_PARAMETERS = STEM + CONV + 4 * 4 + FC + 5

# Phase, kind, FLOPs, values; in the order of the step.
EAGER = [
    ("forward", "convolution", STEM_FLOPS, STEM_VALUES),
    ("forward", "batch-norm", 0, 3 * Y),
    ("forward", "relu", 0, 2 * Y),
    ("forward", "convolution", CONV_FLOPS, CONV_VALUES),
    ("forward", "batch-norm", 0, 3 * Y),
    ("forward", "sum", 0, 3 * Y),
    ("forward", "relu", 0, 2 * Y),
    ("forward", "pool", 0, Y + MEANS),
    ("forward", "linear", FC_FLOPS, FC_VALUES),
    ("backward", "linear dgrad", FC_FLOPS, FC_VALUES),
    ("backward", "linear wgrad", FC_FLOPS, FC_VALUES),
    ("backward", "pool", 0, Y + MEANS),
    ("backward", "relu", 0, 3 * Y),
    ("backward", "batch-norm", 0, 5 * Y),
    ("backward", "convolution dgrad", CONV_FLOPS, CONV_VALUES),
    ("backward", "convolution wgrad", CONV_FLOPS, CONV_VALUES),
    ("backward", "gradient sum", 0, 3 * Y),
    ("backward", "relu", 0, 3 * Y),
    ("backward", "batch-norm", 0, 5 * Y),
    # Nobody asks for the gradient of the images.
    ("backward", "convolution wgrad", STEM_FLOPS, STEM_VALUES),
]
BNRELU = [
    ("forward", "convolution", STEM_FLOPS, STEM_VALUES),
    ("forward", "batch-norm and relu", 0, 3 * Y),
    ("forward", "convolution", CONV_FLOPS, CONV_VALUES),
    ("forward", "batch-norm and relu", 0, 4 * Y),
    ("forward", "pool", 0, Y + MEANS),
    ("forward", "linear", FC_FLOPS, FC_VALUES),
    ("backward", "linear dgrad", FC_FLOPS, FC_VALUES),
    ("backward", "linear wgrad", FC_FLOPS, FC_VALUES),
    ("backward", "pool", 0, Y + MEANS),
    ("backward", "batch-norm and relu", 0, 6 * Y),
    ("backward", "convolution dgrad", CONV_FLOPS, CONV_VALUES),
    ("backward", "convolution wgrad", CONV_FLOPS, CONV_VALUES),
    ("backward", "batch-norm and relu", 0, 5 * Y),
    ("backward", "convolution wgrad", STEM_FLOPS, STEM_VALUES),
]
TEACHER = [
    ("teacher", "convolution", STEM_FLOPS, STEM_VALUES),
    # The residual is read besides.
    ("teacher", "convolution", CONV_FLOPS, CONV_VALUES + Y),
    ("teacher", "pool", 0, Y + MEANS),
    ("teacher", "linear", FC_FLOPS, FC_VALUES),
]


@pytest.mark.parametrize("bytes_per_value", [2, 4])
@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize(("fusing", "step"), [("eager", EAGER), ("bnrelu", BNRELU)])
def test_a_tiny_step_costs_what_was_counted_by_hand(fusing, step, teacher, bytes_per_value):
    works = step_work(TinyNet(), TINY_SHAPE, bytes_per_value, fusing, teacher)
    expected = [
        (phase, kind, flops, bytes_per_value * values)
        for phase, kind, flops, values in [*(TEACHER if teacher else []), *step]
    ]
    expected.append(("optimizer", "sgd", 0, OPTIMIZER_BYTES * TINY_PARAMETERS))
    assert [(work.phase, work.kind, work.flops, work.bytes) for work in works] == expected


def test_flops_of_an_image_are_those_of_the_tiny_step():
    forward = STEM_FLOPS + CONV_FLOPS + FC_FLOPS
    step = 3 * forward - STEM_FLOPS
    assert model_flops_per_image(TinyNet(), TINY_SHAPE) == step / 2
    assert model_flops_per_image(TinyNet(), TINY_SHAPE, teacher=True) == (step + forward) / 2


def _flops(works, *phases):
    return sum(work.flops for work in works if work.phase in phases)


@pytest.mark.parametrize(("name", "image_px"), [("resnet20", 32), ("resnet18", 64)])
def test_flops_are_those_that_torch_counts(name, image_px):
    model = initialise(build_model(name, 10, 3, "strided"), seed=0).train()
    shape = (2, 3, image_px, image_px)
    works = step_work(model, shape, 4, "eager", teacher=True)
    images = torch.randn(shape)
    with FlopCounterMode(display=False) as forward:
        logits = model(images)
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    assert _flops(works, "forward") == forward.get_total_flops() == _flops(works, "teacher")
    assert _flops(works, "backward") == backward.get_total_flops()
    # Convolutions and linear layers are all that torch counts, too.
    counted = {str(name) for counter in (forward, backward) for name in counter.get_flop_counts()["Global"]}
    assert counted == {"aten.convolution", "aten.convolution_backward", "aten.addmm", "aten.mm"}

    # As soon as somebody asks for the gradient of the images, torch counts one product more: the stem's dgrad, which
    # is as large as its forward pass.
    logits = model(images.requires_grad_())
    with FlopCounterMode(display=False) as with_dgrad:
        logits.sum().backward()
    stem = next(work for work in works if work.phase == "forward")
    assert (stem.operator, stem.kind) == ("conv1", "convolution")
    assert with_dgrad.get_total_flops() == backward.get_total_flops() + stem.flops


class Published(NamedTuple):
    """A line of the table in speed.md, section 2.1: of 790 TFLOP/s and 4.3 TB/s, bf16.

    The two of `thousands` are images a second, of operators one after the other.
    """

    network: str
    batch: int
    image_px: int
    gmac: float
    flop_roof_thousands: float
    megabytes: dict[str, float]
    thousands: dict[str, float]


TABLE = [
    Published("resnet18", 1024, 224, 1.814, 74.2, {"eager": 102.3, "bnrelu": 73.2}, {"eager": 31.2, "bnrelu": 39.6}),
    Published("resnet50", 256, 224, 4.089, 32.5, {"eager": 475.6, "bnrelu": 335.4}, {"eager": 8.2, "bnrelu": 11.2}),
    Published("resnet20", 128, 32, 0.041, 3260, {"eager": 8.2, "bnrelu": 5.6}, {"eager": 516, "bnrelu": 746}),
    Published("resnet110", 128, 32, 0.253, 521, {"eager": 46.4, "bnrelu": 31.8}, {"eager": 91.0, "bnrelu": 132}),
]


def _as_in_the_table(works):
    """The table's two shortcuts undone: it takes slices and zeros in the shortcuts of CIFAR's networks for free, and a
    sum of gradients for as large as a block's result, where it is as large as what the block is given."""
    kept = [work for work in works if work.kind not in ("slice", "pad", "gradient sum")]
    summed = any(work.kind == "gradient sum" for work in works)
    return kept + [work for work in kept if summed and work.kind == "sum"]


def _megabytes(works, batch):
    return sum(work.bytes for work in works) / batch / 1e6


def _thousands(works, batch):
    return batch / floor_seconds(works, COPY_BYTES_PER_SECOND, MATMUL_FLOPS_PER_SECOND) / 1e3


def _step(line, fusing, teacher=False):
    model = build_model(line.network, 1000 if line.image_px == 224 else 100, 3, "strided")
    return step_work(model, (line.batch, 3, line.image_px, line.image_px), 2, fusing, teacher)


@pytest.mark.parametrize("fusing", ["eager", "bnrelu"])
@pytest.mark.parametrize("line", TABLE, ids=lambda line: line.network)
def test_the_table_of_the_notes(line, fusing):
    works = _step(line, fusing)
    assert _flops(works, "forward") / line.batch / 2e9 == pytest.approx(line.gmac, rel=0.011)
    flops = _flops(works, "forward", "backward") / line.batch
    assert MATMUL_FLOPS_PER_SECOND / flops / 1e3 == pytest.approx(line.flop_roof_thousands, rel=1e-3)
    same = _as_in_the_table(works)
    assert _megabytes(same, line.batch) == pytest.approx(line.megabytes[fusing], rel=0.01)
    assert _thousands(same, line.batch) == pytest.approx(line.thousands[fusing], rel=0.01)
    # What the shortcuts hide.
    assert 1 <= _megabytes(works, line.batch) / _megabytes(same, line.batch) < 1.03


def test_training_flops_of_the_notes():
    for name, gflop in (("resnet18", 10.65), ("resnet50", 24.3)):
        model = build_model(name, 1000, 3, "strided")
        assert model_flops_per_image(model, (2, 3, 224, 224)) / 1e9 == pytest.approx(gflop, rel=1e-3)


@pytest.mark.parametrize(("line", "megabytes", "microseconds"), [(TABLE[0], 12.8, 5.40), (TABLE[1], 56.6, 16.8)])
def test_teachers_of_the_notes(line, megabytes, microseconds):
    teacher = [work for work in _step(line, "bnrelu", teacher=True) if work.phase == "teacher"]
    assert _megabytes(teacher, line.batch) == pytest.approx(megabytes, rel=0.01)
    assert 1e3 / _thousands(teacher, line.batch) == pytest.approx(microseconds, rel=0.01)


def test_each_operator_is_bound_by_itself():
    works = [
        Work(flops=30, bytes=1, phase="forward", operator="a", kind="linear"),
        Work(flops=10, bytes=8, phase="forward", operator="b", kind="linear"),
    ]
    # 30 / 10 of arithmetic and 8 / 4 of memory; all together would be 40 / 10 and 9 / 4.
    assert floor_seconds(works, copy_bytes_per_second=4, matmul_flops_per_second=10) == 5
    assert floor_seconds([], 4, 10) == 0
    for rates in ((0, 10), (4, 0), (math.nan, 10), (4, -1)):
        with pytest.raises(ValueError, match="above 0"):
            floor_seconds(works, *rates)


@pytest.mark.parametrize("downsample", ["strided", "pooled"])
@pytest.mark.parametrize("fusing", ["eager", "bnrelu"])
def test_every_parameter_is_stepped_and_every_layer_counted(fusing, downsample):
    model = build_model("resnet20", 100, 3, downsample)
    works = step_work(model, (4, 3, 32, 32), 2, fusing)
    counts = Counter((work.phase, work.kind) for work in works)
    assert counts["forward", "convolution"] == counts["backward", "convolution wgrad"] == 19
    assert counts["backward", "convolution dgrad"] == 18
    norms = {"eager": "batch-norm", "bnrelu": "batch-norm and relu"}[fusing]
    assert counts["forward", norms] == counts["backward", norms] == 19
    assert counts["backward", "gradient sum"] == (9 if fusing == "eager" else 0)
    assert works[-1].bytes == OPTIMIZER_BYTES * parameter_count(model)


def test_the_network_is_left_as_it_was():
    model = initialise(build_model("resnet8", 10, 3, "strided"), seed=0).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step_work(model, (2, 3, 8, 8), 2, "bnrelu", teacher=True)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model(torch.zeros(1, 3, 8, 8)).shape == (1, 10)


def test_what_has_no_cost_written_down_is_refused():
    with pytest.raises(TypeError, match="Dropout"):
        step_work(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout()), (2, 3, 4, 4), 2, "eager")

    class Sine(nn.Module):
        def forward(self, x):
            return torch.sin(x)

    with pytest.raises(TypeError, match="sin"):
        step_work(Sine(), (2, 3, 4, 4), 2, "eager")
    with pytest.raises(ValueError, match="must be one of eager, bnrelu"):
        step_work(TinyNet(), TINY_SHAPE, 2, "everything")
    with pytest.raises(ValueError, match="must be"):
        step_work(TinyNet(), TINY_SHAPE[1:], 2, "eager")
