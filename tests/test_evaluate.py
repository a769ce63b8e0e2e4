"""measuring.py against numpy in fp64: every measure, over several batches, the last of them smaller."""

import math
import signal
from dataclasses import astuple, fields

import numpy as np
import pytest
import torch
from torch import nn

from fastgen.augment import Normaliser
from fastgen.crops import ShiftCrop
from fastgen.data.resident import ResidentLoader
from fastgen.data.split import Split
from fastgen.errors import Stopped
from fastgen.measuring import (
    EVALUATION_BATCH,
    Examination,
    Measurement,
    Tally,
    measure,
    measure_ensemble,
    rank_of_label,
)
from fastgen.stop import StopRequest
from fastgen.views import evaluation_views

CPU = torch.device("cpu")
NAMES = [f.name for f in fields(Measurement)]


def random_logits(rows, classes, seed=0, scale=2.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, classes, generator=generator, dtype=torch.float64) * scale).to(dtype)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    # Half of the labels are the network's own choice, so that every measure is neither 0 nor 100 %.
    return logits, torch.where(torch.arange(rows) % 2 == 0, logits.argmax(1), labels)


def softmax_f64(logits):
    z = logits.double().numpy()
    exponentials = np.exp(z - z.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


def measured_f64(p, labels, k, scores=None, bins=15):
    """Written from the definitions, row by row."""
    scores = p if scores is None else scores
    rows = []
    for p_C, score_C, y in zip(p, scores, labels, strict=True):
        order = sorted(range(len(p_C)), key=lambda c, score_C=score_C: (-score_C[c], c))
        ordered = np.sort(p_C)[::-1]
        masses = ordered[0], p_C[y], ordered[1:k].sum(), ordered[1:].sum()
        rows.append((order[0] != y, y not in order[:5], *masses, -math.log(p_C[y])))
    wrong1, wrong5, first, label, in_topk, beside, nll = np.array(rows, np.float64).T
    which = np.minimum((first * bins).astype(int), bins - 1)
    gaps = [
        abs((1 - wrong1[which == b]).mean() - first[which == b].mean()) * (which == b).mean()
        for b in range(bins)
        if (which == b).any()
    ]
    share = in_topk.mean() / beside.mean()
    return Measurement(
        len(p), 100 * wrong1.mean(), 100 * wrong5.mean(), first.mean(), label.mean(), share, nll.mean(), sum(gaps)
    )


def require_close(found, expected, classes, size):
    """fp32 softmax: a relative error of (C + 8) 2^-24 in p, and of |z| 2^-24 more in ln p; the sums are fp64.

    The errors are counts, and exact. `size` is the largest |z|; the share divides one mass beside the first class by
    another, each with the relative error of exp(ln p).
    """
    unit = (classes + 8) * 2.0**-24
    tolerances = {
        "samples": 0,
        "top1_error": 1e-11,
        "top5_error": 1e-11,
        "topk_share": 2 * (unit + size * 2.0**-24),
        "nll": unit * size,
    }
    for name, a, b in zip(NAMES, astuple(found), astuple(expected), strict=True):
        assert abs(a - b) <= tolerances.get(name, 2 * unit), (name, a, b)


@pytest.mark.parametrize(("classes", "k"), [(10, 5), (100, 5), (100, 2), (4, 4), (3, 5), (20, 10)])
@pytest.mark.parametrize("batch", [64, 7, 1000])
def test_tally_equals_the_definitions(classes, k, batch):
    logits, labels = random_logits(200, classes)
    tally = Tally(k)
    for z, y in zip(logits.split(batch), labels.split(batch), strict=True):
        tally.add(z, z.log_softmax(1), y)
    expected = measured_f64(softmax_f64(logits), labels.tolist(), k, logits.numpy())
    require_close(tally.read(), expected, classes, 1 + logits.abs().max().item())
    assert expected.samples == 200
    assert 0 < expected.top1_error < 100


def test_a_certain_network_falls_in_the_last_bin():
    logits = torch.tensor([[200.0, 0.0, 0.0], [0.0, 200.0, 0.0], [200.0, 0.0, 0.0], [200.0, 0.0, 0.0]])
    tally = Tally(2)
    tally.add(logits, logits.log_softmax(1), torch.tensor([0, 1, 0, 1]))
    found = tally.read()
    assert (found.samples, found.top1_error, found.top5_error) == (4, 25.0, 0.0)
    assert (found.mean_confidence, found.mean_label_confidence, found.topk_share) == (1.0, 0.75, 0.0)
    assert found.ece == pytest.approx(0.25, abs=1e-15)
    assert found.nll == pytest.approx(50.0, rel=1e-7)


def test_share_is_all_where_k_is_all_classes():
    logits, labels = random_logits(50, 10)
    tally = Tally(10)
    tally.add(logits, logits.log_softmax(1), labels)
    assert tally.read().topk_share == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("gap", [1.0, 16.0, 17.0, 18.0, 40.0])
@pytest.mark.parametrize(("k", "share"), [(5, 1.0), (3, 0.5)])
def test_share_of_a_network_that_is_all_but_sure(gap, k, share):
    # 1 - p_a1 in fp32 has no digit of the mass that is left from a gap of 17 on.
    logits = torch.zeros(3, 5)
    logits[:, 2] = gap
    tally = Tally(k)
    tally.add(logits, logits.log_softmax(1), torch.tensor([2, 2, 0]))
    assert tally.read().topk_share == pytest.approx(share, rel=4 * (5 + 8 + gap) * 2.0**-24)


def test_an_empty_tally_can_be_read():
    assert Tally(5).read().samples == 0


@pytest.mark.parametrize("kind", ["random", "few values", "all equal"])
def test_rank_of_label_equals_a_stable_sort(kind):
    logits, _ = random_logits(300, 50, seed=3)
    if kind != "random":
        logits = logits.round().clamp(-1, 1) if kind == "few values" else torch.zeros_like(logits)
    labels = torch.arange(300) % 50
    order = np.argsort(-logits.numpy(), axis=1, kind="stable")
    expected = [int(np.flatnonzero(row == label)[0]) for row, label in zip(order, labels.tolist(), strict=True)]
    assert rank_of_label(logits, labels).tolist() == expected


def test_infinite_scores_rank_like_others():
    scores = torch.tensor([[math.inf, 0.0, -math.inf], [-math.inf, -math.inf, -math.inf]])
    assert rank_of_label(scores, torch.tensor([0, 2])).tolist() == [0, 2]
    assert rank_of_label(scores, torch.tensor([2, 0])).tolist() == [2, 0]


@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_row_that_is_not_a_number_is_wrong(place):
    scores = torch.tensor([[5.0, 1.0, 2.0, 0.0]] * 3)
    scores[1, place] = math.nan
    assert rank_of_label(scores, torch.tensor([0, 0, 0])).tolist() == [0, 4, 0]


def test_a_tally_counts_a_row_that_is_not_a_number_as_wrong():
    logits, labels = random_logits(20, 10)
    labels = logits.argmax(1)
    logits[3, labels[3]] = math.nan
    tally = Tally(5)
    tally.add(logits, logits.log_softmax(1), labels)
    found = tally.read()
    assert (found.samples, found.top1_error, found.top5_error) == (20, 5.0, 5.0)


class Lookup(nn.Module):
    """A network whose logits are known: it reads the number of the sample out of the picture."""

    def __init__(self, logits):
        super().__init__()
        self.register_buffer("logits", logits)
        self.batches = []
        self.saw_training = False

    def forward(self, images_NCHW):
        self.saw_training |= self.training
        self.batches.append(len(images_NCHW))
        numbers = (images_NCHW[:, 0, 0, 0] + 256 * images_NCHW[:, 0, 0, 1]).round().long()
        return self.logits[numbers]


@pytest.fixture
def bench():
    """Loader of 1,100 numbered pictures, their labels, views, a normalisation that changes nothing, logits."""
    count = 1100
    logits, labels = random_logits(count, 10, seed=1)
    pixels = np.zeros((count, 2, 2, 1), np.uint8)
    pixels[:, 0, 0, 0], pixels[:, 0, 1, 0] = np.arange(count) % 256, np.arange(count) // 256
    split = Split(pixels, labels.numpy(), np.arange(count))
    views = evaluation_views(split.ids, ShiftCrop(2, 2, 0, flip=False))
    # (pixel / 255 - 0) / (1 / 255) = pixel
    normalise = Normaliser((0.0,), (1 / 255,), CPU, torch.float32)
    return Examination(ResidentLoader(split, 0, CPU), views, normalise, 5, CPU), labels, logits


def test_measure_counts_every_sample_once(bench):
    on, labels, logits = bench
    model = Lookup(logits).train()
    found, probabilities = measure(model, on)
    expected = measured_f64(softmax_f64(logits), labels.tolist(), 5, logits.numpy())
    require_close(found, expected, 10, 1 + logits.abs().max().item())
    assert found.samples == 1100
    assert model.batches == [EVALUATION_BATCH, EVALUATION_BATCH, 100]
    assert probabilities.dtype == torch.float32
    # C + 8 roundings as above, and those of ln p (here above -20), which exp turns into relative ones.
    np.testing.assert_allclose(probabilities.numpy(), softmax_f64(logits), rtol=(18 + 20) * 2.0**-24, atol=0)


def test_measure_runs_in_eval_mode_and_puts_the_mode_back(bench):
    on, _, logits = bench
    for training in (True, False):
        model = Lookup(logits).train(training)
        _, probabilities = measure(model, on)
        assert not model.saw_training
        assert model.training == training
        assert not probabilities.requires_grad


def test_measure_stops_when_asked(bench):
    on, _, logits = bench
    model = Lookup(logits)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Stopped, match="SIGTERM"):
        measure(model, on, stop)
    assert model.batches == []


def test_an_ensemble_of_equal_members_equals_the_member():
    logits, labels = random_logits(200, 20)
    p = logits.softmax(1)
    expected = measured_f64(p.double().numpy(), labels.tolist(), 5)
    for members in (1, 2, 3, 6):
        # The mean of three equal doubles may be rounded once.
        for found, wanted in zip(astuple(measure_ensemble([p] * members, labels, 5)), astuple(expected), strict=True):
            assert found == pytest.approx(wanted, rel=1e-12, abs=1e-12)


def test_an_ensemble_is_the_mean_of_the_softmaxes():
    """Not of the logits, and no vote: the members disagree, and are sure to different degrees."""
    members = [random_logits(300, 20, seed=seed, scale=scale)[0] for seed, scale in ((0, 1.0), (1, 2.0), (2, 4.0))]
    labels = random_logits(300, 20, seed=2)[1]
    mean = sum(softmax_f64(z) for z in members) / 3
    found = measure_ensemble([torch.from_numpy(softmax_f64(z)) for z in members], labels, 5)
    for a, b in zip(astuple(found), astuple(measured_f64(mean, labels.tolist(), 5)), strict=True):
        assert a == pytest.approx(b, rel=1e-12)


def test_an_ensemble_that_gives_the_label_nothing_is_finite():
    p = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    found = measure_ensemble([p, p], torch.tensor([2, 1]), 2)
    assert all(math.isfinite(value) for value in astuple(found))
    # -ln of the smallest normal double, half of it for two samples.
    assert found.nll == pytest.approx(-math.log(2.0**-1022) / 2, rel=1e-12)
    assert (found.samples, found.top1_error, found.mean_label_confidence) == (2, 50.0, 0.5)
