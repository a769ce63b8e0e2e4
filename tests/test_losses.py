"""losses.py against closed forms in fp64 numpy, written from arXiv 1805.05551 v1, Eqns (3) and (4).

z logits, p = softmax(z), y label, w = +1 on the first class, -1/(K-1) on classes 2..K, else 0:

    tolerant: L = (1-eta) (-ln p_y) + eta S,  S = sum_j w_j p_j, dL/dz_j = (1-eta)(p_j - [j=y]) + eta p_j (w_j - S)
    distill:  L = (1-lambda) (-ln p_y) + lambda t^2 KL(T || P), dL/dz_j = (1-lambda)(p_j - [j=y]) + lambda t (P_j - T_j)

with T and P the softmax of teacher and student at temperature t; means over the batch.
"""

import numpy as np
import pytest
import torch

from fastgen.laws import eta_for_confidence
from fastgen.losses import distill, make_loss, tolerant
from fastgen.plan import Objective

U32 = 2.0**-24  # half a unit in the last place of 1, relative: one rounding of fp32
# One rounding to the dtype, relative: 2^-8 for the 8 significant bits of bf16, 2^-11 for the 11 of fp16.
HALF_ULP = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def log_softmax_f64(z):
    shifted = z - z.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def ranks_f64(z):
    """Classes by falling logit, the lower class first among equals."""
    return np.array([sorted(range(len(row)), key=lambda j, row=row: (-row[j], j)) for row in z])


def tolerant_f64(z, y, eta, k):
    rows = np.arange(len(z))
    log_p = log_softmax_f64(z)
    p, onehot = np.exp(log_p), np.eye(z.shape[1])[y]
    if eta == 0:
        return -log_p[rows, y].mean(), (p - onehot) / len(z)
    order, w = ranks_f64(z), np.zeros_like(z)
    w[rows[:, None], order[:, 1:k]] = -1 / (k - 1)
    w[rows, order[:, 0]] = 1
    s = (w * p).sum(1, keepdims=True)
    loss = (1 - eta) * -log_p[rows, y] + eta * s[:, 0]
    return loss.mean(), ((1 - eta) * (p - onehot) + eta * p * (w - s)) / len(z)


def distill_f64(z, y, v, weight, t):
    rows = np.arange(len(z))
    log_p, log_student, log_teacher = log_softmax_f64(z), log_softmax_f64(z / t), log_softmax_f64(v / t)
    teacher, onehot = np.exp(log_teacher), np.eye(z.shape[1])[y]
    kl = (teacher * (log_teacher - log_student)).sum(1)
    loss = (1 - weight) * -log_p[rows, y] + weight * t**2 * kl
    gradient = (1 - weight) * (np.exp(log_p) - onehot) + weight * t * (np.exp(log_student) - teacher)
    return loss.mean(), gradient / len(z)


def run_torch(loss, z, *arguments):
    logits = z.clone().requires_grad_()
    value = loss(logits, *arguments)
    value.backward()
    assert logits.grad.dtype == z.dtype
    return value, logits.grad.double().numpy()


def require_equal(value, gradient, expected, dtype, z, *, steepness=1.0):
    """Compares with fp64 within what fp32 arithmetic can lose.

    A softmax entry: the difference to the maximum, exp and the quotient are 5 roundings, the sum of C terms at most C
    more; the rounded difference d moves exp(d) by at most |d| exp(d) <= 0.37 units. A gradient has up to 4 such terms,
    each at most 1 (`steepness` where a temperature multiplies them), and is then rounded to the logits' dtype.
    A loss adds the size of the logits: lse and z_y are each rounded at |z|, and the mean over B rows sums B terms.
    Gradients in fp16 that are below its normal range are rounded to multiples of 2^-24.
    """
    loss, grad = expected
    rows, classes = z.shape
    unit = 2.0**-53 if dtype == torch.float64 else U32
    tolerance = 4 * (classes + 8) * unit * steepness / rows
    subnormal = 2.0**-25 if dtype == torch.float16 else 0.0
    np.testing.assert_allclose(gradient, grad, rtol=HALF_ULP[dtype], atol=tolerance + subnormal)
    size = 1 + float(z.abs().max().double())
    assert abs(value.item() - loss) <= (classes + rows + 8) * unit * size * 4 * steepness**2
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def logits_of(kind, rows, classes, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, classes, generator=generator, dtype=torch.float64) * 3
    if kind == "tied":
        # Few values, so that ties fall on every rank: between first and second, and around rank K.
        z = (z / 3).round()
    if kind == "equal":
        z = torch.zeros_like(z)
    if kind == "extreme":
        z = torch.where(z > 0, 1e4, -1e4) + (z if dtype in (torch.float32, torch.float64) else 0)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    if kind == "label last":
        labels = z.argmin(1)
    return z.to(dtype), labels


KINDS = ["random", "tied", "equal", "extreme", "label last"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("classes", "k"), [(10, 5), (10, 2), (10, 10), (100, 5), (2, 2)])
def test_tolerant_equals_the_closed_form(kind, dtype, classes, k):
    z, y = logits_of(kind, 16, classes, dtype)
    for eta in (0.0, 4 / 7, 1.0):
        value, gradient = run_torch(tolerant, z, y, eta, k)
        require_equal(value, gradient, tolerant_f64(z.double().numpy(), y.numpy(), eta, k), dtype, z)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("weight", [0.0, 0.6, 1.0])
def test_distill_equals_the_closed_form(kind, dtype, temperature, weight):
    z, y = logits_of(kind, 16, 10, dtype)
    v, _ = logits_of("extreme" if kind == "extreme" else "random", 16, 10, dtype, seed=1)
    value, gradient = run_torch(distill, z, y, v, weight, temperature)
    expected = distill_f64(z.double().numpy(), y.numpy(), v.double().numpy(), weight, temperature)
    require_equal(value, gradient, expected, dtype, z, steepness=temperature)


def test_at_ties_the_lowest_class_ranks_first():
    # Four equal logits and K = 2: class 0 is a_1, class 1 is a_2, although 2 and 3 are as large.
    z = torch.tensor([[1.0, 1.0, 1.0, 1.0, -9.0]], dtype=torch.float64)
    _, gradient = run_torch(tolerant, z, torch.tensor([4]), 1.0, 2)
    p = float(z.softmax(1)[0, 0])
    assert gradient[0] == pytest.approx([p, -p, 0, 0, 0], abs=1e-15)


def test_rows_with_many_equal_logits_follow_the_same_rule():
    # 16-bit logits of many classes tie in many rows; an unstable sort shows in rows longer than 16.
    z, y = logits_of("tied", 64, 1000, torch.float32, seed=3)
    value, gradient = run_torch(tolerant, z, y, 4 / 7, 5)
    require_equal(value, gradient, tolerant_f64(z.double().numpy(), y.numpy(), 4 / 7, 5), torch.float32, z)


def central_differences(loss, z, step=1e-5):
    gradient = np.zeros(z.shape)
    for index in np.ndindex(*z.shape):
        above, below = z.clone(), z.clone()
        above[index] += step
        below[index] -= step
        gradient[index] = (loss(above) - loss(below)).item() / (2 * step)
    return gradient


# Error of a central difference: step^2/6 times the third derivative (below 10 here) and 2^-53 |L| / step: below 1e-9.
DIFFERENCE_ERROR = 2e-9


@pytest.mark.parametrize(("eta", "k"), [(0.0, 5), (4 / 7, 5), (0.9, 2), (0.5, 8)])
def test_tolerant_gradient_equals_differences(eta, k):
    z, y = logits_of("random", 4, 8, torch.float64)
    _, gradient = run_torch(tolerant, z, y, eta, k)
    expected = central_differences(lambda logits: tolerant(logits, y, eta, k), z)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=DIFFERENCE_ERROR)


@pytest.mark.parametrize(("weight", "temperature"), [(0.0, 1.0), (0.6, 1.0), (1.0, 1.0), (0.6, 4.0)])
def test_distill_gradient_equals_differences(weight, temperature):
    z, y = logits_of("random", 4, 8, torch.float64)
    v, _ = logits_of("random", 4, 8, torch.float64, seed=1)
    _, gradient = run_torch(distill, z, y, v, weight, temperature)
    expected = central_differences(lambda logits: distill(logits, y, v, weight, temperature), z)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=DIFFERENCE_ERROR * temperature**2)


def test_eta_zero_and_teacher_weight_zero_are_cross_entropy():
    z, y = logits_of("random", 16, 10, torch.float32)
    v, _ = logits_of("random", 16, 10, torch.float32, seed=1)
    cross_entropy = torch.nn.functional.cross_entropy(z, y).item()
    assert tolerant(z, y, 0.0, 0).item() == cross_entropy
    assert distill(z, y, v, 0.0).item() == cross_entropy


def test_a_teacher_that_agrees_with_the_student_pulls_nowhere():
    z, y = logits_of("random", 16, 10, torch.float32)
    value, gradient = run_torch(distill, z, y, z.clone(), 1.0, 4.0)
    assert value.item() == 0
    require_equal(value, gradient, (0.0, np.zeros_like(gradient)), torch.float32, z, steepness=4.0)


def test_no_gradient_reaches_the_teacher():
    z, y = logits_of("random", 4, 10, torch.float32)
    v = z.flip(1).clone().requires_grad_()
    student = z.clone().requires_grad_()
    distill(student, y, v, 0.6, 2.0).backward()
    assert v.grad is None
    assert student.grad.abs().max() > 0


def test_the_gradient_that_comes_from_above_is_passed_on():
    z, y = logits_of("random", 4, 10, torch.float32)
    _, plain = run_torch(tolerant, z, y, 4 / 7, 5)
    _, scaled = run_torch(lambda *arguments: 1024 * tolerant(*arguments), z, y, 4 / 7, 5)
    # 1024 is a power of two: exact.
    np.testing.assert_array_equal(scaled, 1024 * plain)


def test_make_loss_gives_each_role_its_objective():
    z, y = logits_of("random", 8, 10, torch.float32)
    v, _ = logits_of("random", 8, 10, torch.float32, seed=1)
    patriarch = make_loss(Objective(eta=4 / 7, k=5))
    student = make_loss(Objective(teacher_weight=0.7, temperature=4.0))
    assert patriarch(z, y, None).item() == tolerant(z, y, 4 / 7, 5).item()
    assert student(z, y, v).item() == distill(z, y, v, 0.7, 4.0).item()
    assert make_loss(Objective())(z, y, None).item() == torch.nn.functional.cross_entropy(z, y).item()


def minimise(loss, start):
    z = start.double().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [z], max_iter=500, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss(z)
        value.backward()
        return value

    optimizer.step(closure)
    assert z.grad.abs().max() < 1e-5, "not converged"
    return z.detach().softmax(1)


PAIRS = [(k, confidence) for k in (2, 3, 5, 10) for confidence in (0.6, 0.8)] + [(5, 0.4), (10, 0.4)]


@pytest.mark.parametrize(("k", "confidence"), PAIRS)
@pytest.mark.parametrize("others", ["none", "outside"])
def test_minimising_the_tolerant_loss_gives_the_wanted_confidence(k, confidence, others):
    """The law has all mass on the top K.

    With C = K classes that is so by definition. With more, the minimum is reached as the mass outside goes to zero
    (the gradient there, p_j (1 - eta - eta S), is positive at the minimum), which logits approach ever more slowly:
    so the rest starts at e^-25 of the label's mass, where it can move the confidence by less than 1e-9.
    """
    generator = torch.Generator().manual_seed(k)
    classes = k if others == "none" else 20
    start = -25 + 0.1 * torch.rand(1, classes, generator=generator)
    start[0, :k] = 0.5 * torch.rand(k, generator=generator)
    start[0, 0] = 1.0
    label, eta = torch.tensor([0]), eta_for_confidence(confidence, k)
    p = minimise(lambda z: tolerant(z, label, eta, k), start)
    assert p.argmax() == 0
    assert p.max().item() == pytest.approx(confidence, abs=1e-3)
    assert p[0, :k].sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.6, 1.0])
def test_minimising_the_distill_loss_gives_the_mixture(weight):
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(3, 10, generator=generator, dtype=torch.float64) * 2
    labels = torch.tensor([0, 4, 9])
    # lambda = 0 has its minimum at infinity: cross-entropy then falls with 1 / steps, hence the tolerance of 1e-3.
    p = minimise(lambda z: distill(z, labels, v, weight), torch.zeros(3, 10))
    expected = (1 - weight) * torch.nn.functional.one_hot(labels, 10) + weight * v.softmax(1)
    torch.testing.assert_close(p, expected, rtol=0, atol=1e-3)
