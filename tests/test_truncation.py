"""Truncated teachers: what is kept, in which order, at which temperature, and what that loses, beside fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastgen.data.batch import Kept
from fastgen.grade import make_grade
from fastgen.losses import distill, make_loss
from fastgen.plan import Objective
from fastgen.truncation import CLASSES, LOG_P, Truncation, kept_probabilities, truncation

ROWS, WIDE = 40, 150
FP16, FP32 = 2.0**-11, 2.0**-24


def logits(classes, steepness=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return steepness * torch.randn(ROWS, classes, generator=generator)


def log_softmax_f64(z):
    z = z.astype(np.float64)
    z = z - z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def spread_f64(cut, labels):
    """The truncated teacher as one distribution, fp64: the rest of the mass lies evenly among the other classes."""
    p = np.exp(labels[LOG_P].numpy().astype(np.float64))
    whole = np.repeat(p[:, -1:] / (cut.classes - cut.kept), cut.classes, axis=1)
    np.put_along_axis(whole, labels[CLASSES].numpy().astype(np.int64), p[:, :-1], axis=1)
    return whole / whole.sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("classes", "wanted", "kept"),
    [(10, None, 10), (100, None, 100), (101, None, 16), (1000, None, 16), (1000, 5, 5), (10, 3, 3), (10, 50, 10)],
)
def test_up_to_a_hundred_classes_are_kept_and_of_more_sixteen(classes, wanted, kept):
    found = truncation(classes, wanted, "fp16")
    assert (found.classes, found.kept, found.dense) == (classes, kept, kept == classes)
    columns = found(logits(classes))
    assert found.row_bytes == sum(column[0].numel() * column.element_size() for column in columns.values())
    assert {name: column.dtype for name, column in columns.items()} == found.columns
    assert {name: (column.shape, column.dtype) for name, column in found.blank(ROWS, torch.device("cpu")).items()} == {
        name: (column.shape, column.dtype) for name, column in columns.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_classes_in_fp32_are_the_teacher_s_own_logits(dtype):
    z = logits(10).to(dtype)
    cut = Truncation(10, 10, "fp32")
    assert torch.equal(cut(z)[LOG_P], z.float())
    assert cut.divergence(z, cut(z)).abs().max() <= 1e-12


def test_all_classes_in_fp16_are_log_probabilities_within_one_rounding():
    z = logits(100)
    found = Truncation(100, 100, "fp16")(z)[LOG_P].numpy().astype(np.float64)
    exact = log_softmax_f64(z.numpy())
    # One rounding to fp16; the fp32 log-softmax before it: C roundings in its sum, and z's own size.
    np.testing.assert_allclose(found, exact, rtol=FP16, atol=2 * 100 * FP32)
    # The bound can fail: the next smaller format would not meet it.
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(z.log_softmax(1).bfloat16().double(), exact, rtol=FP16, atol=2 * 100 * FP32)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_the_largest_classes_are_kept_in_falling_order(dtype):
    z = logits(WIDE)
    cut = Truncation(WIDE, 16, dtype)
    labels, exact = cut(z), log_softmax_f64(z.numpy())
    order = np.argsort(-z.numpy(), axis=1, kind="stable")[:, :16]
    np.testing.assert_array_equal(labels[CLASSES].numpy(), order)
    rounding = {"fp16": FP16, "fp32": FP32}[dtype]
    wanted = np.take_along_axis(exact, order, 1)
    rest = np.log(np.exp(exact).sum(1) - np.exp(wanted).sum(1))[:, None]
    wanted = np.concatenate([wanted, rest], axis=1)
    np.testing.assert_allclose(labels[LOG_P].numpy().astype(np.float64), wanted, rtol=rounding, atol=2 * WIDE * FP32)


def test_among_equals_the_lowest_class_is_kept():
    z = torch.zeros(1, WIDE)
    z[0, 120] = 1.0
    assert Truncation(WIDE, 4, "fp16")(z)[CLASSES].tolist() == [[120, 0, 1, 2]]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0, 20.0])
@pytest.mark.parametrize("steepness", [0.1, 3.0, 12.0])
def test_kept_probabilities_are_those_of_one_distribution_at_every_temperature(temperature, steepness):
    cut = Truncation(WIDE, 16, "fp32")
    labels = cut(logits(WIDE, steepness))
    found = kept_probabilities(labels[LOG_P], WIDE, temperature).double().numpy()
    warm = spread_f64(cut, labels) ** (1 / temperature)
    warm /= warm.sum(1, keepdims=True)
    expected = np.take_along_axis(warm, labels[CLASSES].numpy().astype(np.int64), 1)
    # Relative errors: of the exponents, which are some |ln p| / t large and rounded three times in fp32, of exp and of
    # a sum of 17.
    size = np.abs(labels[LOG_P].double().numpy()).max(1, keepdims=True) / temperature + np.log(WIDE)
    assert (np.abs(found - expected) <= expected * (3 * size + 20) * FP32).all()


def test_a_rest_that_rounding_would_hide_is_there():
    """One class has all but 1e-9: fp32 cannot tell its probability from 1, and at temperature 8 the others count."""
    z = torch.zeros(1, WIDE)
    z[0, 7] = 25.0
    warm = kept_probabilities(Truncation(WIDE, 1, "fp16")(z)[LOG_P], WIDE, 8.0)
    assert warm.item() == pytest.approx((z / 8).softmax(1)[0, 7].item(), rel=25 / 8 * 2**-10)
    assert warm.item() < 0.2


@pytest.mark.parametrize("kept", [1, 16, 149])
def test_the_divergence_is_that_of_the_spread_teacher(kept):
    z, cut = logits(WIDE), Truncation(WIDE, kept, "fp16")
    labels, full = cut(z), log_softmax_f64(z.numpy())
    expected = (np.exp(full) * (full - np.log(spread_f64(cut, labels)))).sum(1)
    np.testing.assert_allclose(cut.divergence(z, labels).numpy(), expected, rtol=1e-6, atol=1e-9)
    if kept == 1:
        assert expected.mean() > 0.1, "the check can fail"


def test_the_more_is_kept_the_less_is_lost():
    z = logits(WIDE)
    lost = [
        float(Truncation(WIDE, kept, "fp32").divergence(z, Truncation(WIDE, kept, "fp32")(z)).mean())
        for kept in (1, 4, 16, 64, WIDE)
    ]
    assert lost == sorted(lost, reverse=True)
    assert lost[-1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("fused", [False, True])
def test_grades_beside_kept_classes_are_the_plain_objective(temperature, fused):
    """Beside the objective in fp64, with the rest as one outcome, written out."""
    z, v = logits(WIDE), logits(WIDE, seed=1)
    y, cut, weight = torch.arange(ROWS) % WIDE, Truncation(WIDE, 16, "fp16"), 0.7
    labels = cut(v)
    graded = make_grade(Objective(teacher_weight=weight, temperature=temperature), fused=fused)(
        z.clone().requires_grad_(), y, Kept(labels[LOG_P], labels[CLASSES]), None
    )
    warm = spread_f64(cut, labels) ** (1 / temperature)
    warm /= warm.sum(1, keepdims=True)
    at = labels[CLASSES].numpy().astype(np.int64)
    target = np.take_along_axis(warm, at, 1)
    student = np.exp(log_softmax_f64(z.numpy() / temperature))
    own = np.take_along_axis(student, at, 1)
    rest, others = 1 - target.sum(1), 1 - own.sum(1)
    divergence = (target * np.log(target / own)).sum(1) + rest * np.log(rest / others)
    entropy = -log_softmax_f64(z.numpy())[np.arange(ROWS), y.numpy()]
    expected = ((1 - weight) * entropy + weight * temperature**2 * divergence).sum()
    # Sums of WIDE terms of size up to |ln p| (some 20) in fp32, multiplied by t^2.
    assert float(graded.loss_sum) == pytest.approx(expected, abs=ROWS * temperature**2 * 20 * WIDE * FP32)


def test_a_dense_lesson_is_the_ordinary_objective():
    z, v, y = logits(10), logits(10, seed=1), torch.arange(ROWS) % 10
    loss = make_loss(Objective(teacher_weight=0.6, temperature=2.0))
    labels = Truncation(10, 10, "fp32")(v)
    assert torch.equal(loss(z, y, labels[LOG_P]), distill(z, y, v, 0.6, 2.0))
