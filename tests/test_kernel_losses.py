"""The Triton loss kernels: beside closed forms in fp64, as operators of torch, and as the trainer uses them.

On a machine without a GPU they run in Triton's interpreter, which proves the algebra and no more: no races, no layout.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks import checks_kernels
from benchmarks.checks_kernels import check_loss_kernels
from fastgen import losses
from fastgen.grade import make_grade
from fastgen.kernels import distill as distill_module
from fastgen.kernels import tolerant as tolerant_module
from fastgen.kernels.distill import distill, distill_rows
from fastgen.kernels.distill_topm import distill_topm, distill_topm_rows
from fastgen.kernels.rows import LOSS, TOP1, TOP5
from fastgen.kernels.tolerant import tolerant, tolerant_rows
from fastgen.laws import eta_for_confidence
from fastgen.plan import Objective

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ETA, K = eta_for_confidence(0.6, 5), 5
PATRIARCH, STUDENT = Objective(eta=ETA, k=K), Objective(teacher_weight=0.6, temperature=2.0)


def some(rows=5, classes=12, dtype=torch.float32, seed=0):
    """(logits, labels, a teacher's logits)"""
    generator = torch.Generator().manual_seed(seed)
    z, v = (3 * torch.randn(rows, classes, generator=generator) for _ in range(2))
    labels = torch.randint(0, classes, (rows,), generator=generator)
    return z.to(DEVICE, dtype), labels.to(DEVICE), v.to(DEVICE, dtype)


def stored(v, kept=3, temperature=1.0):
    top = (v.float() / temperature).softmax(1).topk(kept, dim=1)
    return top.indices.to(torch.int16), top.values.half()


@pytest.mark.parametrize("classes", [10, 100, 1000, 1001])
def test_every_kernel_equals_the_closed_form(classes):
    outcomes = list(check_loss_kernels(DEVICE, seed=classes, class_counts=(classes,), batches=(1, 3)))
    assert len(outcomes) == 3 * 4 * 15
    assert [outcome.line() for outcome in outcomes if not outcome.passed] == []


@pytest.mark.parametrize(
    ("module", "wrong"),
    [
        (tolerant_module, lambda z, y, eta, k, *rest: (z, y, eta, k + 1, *rest)),
        (tolerant_module, lambda z, y, eta, k, *rest: (z, y, eta * (1 + 1e-4), k, *rest)),
        (distill_module, lambda z, y, v, w, t, *rest: (z, y, v, w * (1 + 1e-4), t, *rest)),
        (distill_module, lambda z, y, v, w, t, *rest: (z, y, v, w, t * (1 + 1e-4), *rest)),
    ],
)
def test_the_check_sees_a_small_error(monkeypatch, module, wrong):
    right = module.launch
    monkeypatch.setattr(module, "launch", lambda *arguments: right(*wrong(*arguments)))
    assert not all(outcome.passed for outcome in check_loss_kernels(DEVICE, 0, (10,), (4,), precisions=("fp32",)))


def test_the_check_sees_what_is_written_beside_an_output(monkeypatch):
    right = tolerant_module.launch

    def beside(*arguments):
        right(*arguments)
        gradient = arguments[-1]
        gradient.as_strided((1,), (1,), gradient.storage_offset() - 1).zero_()

    monkeypatch.setattr(tolerant_module, "launch", beside)
    failed = [o.name for o in check_loss_kernels(DEVICE, 0, (10,), (4,), precisions=("fp32",)) if not o.passed]
    assert all("beside" in name for name in failed)
    assert failed


def test_the_check_sees_an_output_that_is_not_written(monkeypatch):
    monkeypatch.setattr(tolerant_module, "launch", lambda *arguments: None)
    failed = [
        outcome for outcome in check_loss_kernels(DEVICE, 0, (10,), (4,), precisions=("fp32",)) if not outcome.passed
    ]
    assert {name.split(",")[0] for name in (o.name for o in failed)} == {
        f"tolerant: {what}" for what in ("loss", "p_a1", "wrong hits", "gradient")
    }


def calls(classes=12):
    """Each operator with its arguments and the plain reference of its mean."""
    _, y, v = some(classes=classes)
    kept, t = stored(v, temperature=2.0)
    return {
        "tolerant": (tolerant_rows, (y, ETA, K), lambda x: losses.tolerant(x, y, ETA, K)),
        "distill": (distill_rows, (y, v, 0.6, 2.0), lambda x: losses.distill(x, y, v, 0.6, 2.0)),
        "distill_topm": (
            distill_topm_rows,
            (y, kept, t, 0.6, 2.0),
            lambda x: losses.distill_topm(x, y, kept, t, 0.6, 2.0),
        ),
    }


# opcheck itself looks at gradients that are not there.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("name", calls())
def test_opcheck(name):
    op, arguments, _ = calls()[name]
    z = some()[0].requires_grad_()
    torch.library.opcheck(op, (z, *arguments, None, 1.0))
    torch.library.opcheck(op, (z.detach(), *arguments, torch.full((), 4.0, device=DEVICE), 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", calls())
def test_autograd_gives_the_reference_s_gradient(name, dtype):
    op, arguments, reference = calls()[name]
    unit = 2.0**12 if dtype == torch.float16 else 1.0
    z = some(dtype=dtype)[0].requires_grad_()
    rows, _ = op(z, *arguments, None, unit)
    # A factor from above, as a loss scale would bring it.
    (rows[LOSS].mean() * 8).backward()
    exact = z.detach().double().requires_grad_()
    (reference(exact) * 8).backward()
    # Two roundings to the dtype (the interpreter cuts bf16 off, which counts double), and a few of fp32.
    epsilon = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}[dtype]
    torch.testing.assert_close(z.grad.double(), exact.grad, rtol=3 * epsilon, atol=8 * 2.0**-24 * 8)


@pytest.mark.parametrize("name", calls())
def test_compiled_whole_it_is_the_same(name):
    op, arguments, _ = calls()[name]

    def step(z):
        rows, gradient = op(z, *arguments, None, 0.25)
        return rows.sum(1), gradient

    z = some()[0]
    torch.compiler.reset()
    for expected, found in zip(step(z), torch.compile(step, fullgraph=True)(z), strict=True):
        torch.testing.assert_close(found, expected, rtol=2.0**-22, atol=0)


def test_the_mean_losses_are_compiled_whole_too():
    z, y, v = some()
    kept, t = stored(v)

    def all_of_them(x):
        return tolerant(x, y, ETA, K) + distill(x, y, v, 0.6) + distill_topm(x, y, kept, t, 0.6)

    torch.compiler.reset()
    found, exact = z.clone().requires_grad_(), z.double().requires_grad_()
    torch.compile(all_of_them, fullgraph=True)(found).backward()
    expected = losses.tolerant(exact, y, ETA, K) + losses.distill(exact, y, v, 0.6)
    (expected + losses.distill_topm(exact, y, kept, t, 0.6)).backward()
    torch.testing.assert_close(found.grad.double(), exact.grad, rtol=0, atol=3 * 8 * 2.0**-24)


def test_autocast_leaves_them_alone():
    z, y, v = some()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        rows, gradient = distill_rows(z, y, v, 0.6, 1.0, None, 1.0)
    assert gradient.dtype == torch.float32
    assert torch.equal(rows, distill_rows(z, y, v, 0.6, 1.0, None, 1.0)[0])


def test_differentiating_twice_is_refused():
    z, y, _ = some()
    (first,) = torch.autograd.grad(tolerant(z.requires_grad_(), y, ETA, K), z, create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()


def test_a_scaled_gradient_is_not_differentiated():
    z, y, _ = some()
    rows, _ = tolerant_rows(z.requires_grad_(), y, ETA, K, torch.full((), 2.0, device=DEVICE), 1.0)
    with pytest.raises(RuntimeError, match="scaled"):
        rows[LOSS].mean().backward()


def test_small_gradients_in_fp16_survive_until_they_are_scaled():
    # 1000 equal logits and a batch of 64: gradients of the mean are 1.6e-5, of which fp16 keeps 8 of 11 bits.
    z, y = torch.zeros(2, 1000, dtype=torch.float16, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    z = z.requires_grad_()
    (tolerant(z, y, 0.0, 2) / 32 * 2**16).backward()
    torch.testing.assert_close(
        z.grad[:, 1:].float(), torch.full((2, 999), 0.001 / 64 * 2**16, device=DEVICE), rtol=2.0**-10, atol=0
    )


def test_a_high_temperature_does_not_overflow_fp16():
    z, y, v = some(dtype=torch.float16)
    found, exact = z.clone().requires_grad_(), z.double().requires_grad_()
    distill(found, y, v, 1.0, 64.0).backward()
    losses.distill(exact, y, v.double(), 1.0, 64.0).backward()
    # Two roundings to fp16; quotients of logits below 16 are rounded before exp, and the temperature multiplies that.
    torch.testing.assert_close(found.grad.double(), exact.grad, rtol=2.0**-9, atol=64 * 8 * 2.0**-24)


def test_logits_of_minus_infinity_are_classes_without_probability():
    z = torch.tensor([[0.0, -math.inf, 1.0, -math.inf, -math.inf, -math.inf]], dtype=torch.float16, device=DEVICE)
    y = torch.tensor([0], device=DEVICE)
    rows, gradient = tolerant_rows(z, y, ETA, K, None, 1.0)
    exact = z.double().requires_grad_()
    reference = losses.tolerant(exact, y, ETA, K)
    reference.backward()
    assert rows[LOSS].item() == pytest.approx(reference.item(), rel=1e-6)
    # Half of a unit in the last place of fp16.
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=2.0**-11, atol=2.0**-24)


def test_a_stored_teacher_whose_roundings_exceed_one_has_no_residual():
    z, y, _ = some(rows=2, classes=6)
    kept = torch.tensor([[0, 1], [2, 5]], dtype=torch.int16, device=DEVICE)
    t = torch.tensor([[0.5, 0.50048828125], [1.0, 0.0]], dtype=torch.float16, device=DEVICE)
    rows, gradient = distill_topm_rows(z, y, kept, t, 1.0, 1.0, None, 1.0)
    exact = z.double().requires_grad_()
    losses.distill_topm(exact, y, kept, t, 1.0).backward()
    torch.testing.assert_close(gradient.double() / 2, exact.grad, rtol=0, atol=8 * 2.0**-24)
    assert rows.isfinite().all()


@pytest.mark.parametrize("label", [-1, -100, 12, 15, 16, 1000])
def test_a_label_that_is_no_class_makes_the_loss_nan(label):
    z, y, v = some()
    y[2] = label
    for rows, _ in (tolerant_rows(z, y, ETA, K, None, 1.0), distill_rows(z, y, v, 0.6, 1.0, None, 1.0)):
        assert rows[LOSS].isnan().tolist() == [False, False, True, False, False]


def test_no_rows_are_no_launch():
    z, y, v = some(rows=0)
    for rows, gradient in (tolerant_rows(z, y, ETA, K, None, 1.0), distill_rows(z, y, v, 0.6, 1.0, None, 1.0)):
        assert rows.shape == (4, 0)
        assert gradient.shape == z.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z, y, v: tolerant_rows(z[0], y, ETA, K, None, 1.0), r"\(B, C\)"),
        (lambda z, y, v: tolerant_rows(z, y[:2], ETA, K, None, 1.0), r"\(B, C\)"),
        (lambda z, y, v: tolerant_rows(z, y.int(), ETA, K, None, 1.0), "int64"),
        (lambda z, y, v: tolerant_rows(z.double(), y, ETA, K, None, 1.0), "float64"),
        (lambda z, y, v: tolerant_rows(z.T.contiguous().T, y, ETA, K, None, 1.0), "stride"),
        (lambda z, y, v: tolerant_rows(z, y, ETA, 1, None, 1.0), "k = 1"),
        (lambda z, y, v: tolerant_rows(z, y, ETA, 13, None, 1.0), "k = 13"),
        (lambda z, y, v: distill_rows(z, y, v[:, 1:], 0.6, 1.0, None, 1.0), "both alike"),
        (lambda z, y, v: distill_topm_rows(z, y, *stored(v, 12), 0.6, 1.0, None, 1.0), "M = 12"),
        (lambda z, y, v: distill_topm_rows(z, y, stored(v)[0].float(), stored(v)[1], 0.6, 1.0, None, 1.0), "float32"),
    ],
)
def test_what_would_be_read_wrongly_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        change(*some())


@pytest.mark.parametrize("objective", [PATRIARCH, STUDENT, Objective()], ids=["patriarch", "student", "plain"])
@pytest.mark.parametrize("scale", [None, 3.0])
def test_fused_and_plain_grades_are_the_same_step(objective, scale):
    z, y, v = some()
    teacher = v if objective.teacher_weight else None
    scale = None if scale is None else torch.full((), scale, dtype=torch.float64, device=DEVICE)
    found = []
    for fused in (False, True):
        weight = z.clone().requires_grad_()
        graded = make_grade(objective, fused=fused)(weight * 1.0, y, teacher, scale)
        torch.autograd.backward(graded.root, graded.gradient)
        found.append((graded.loss_sum.item(), int(graded.correct), weight.grad))
    (loss, correct, gradient), (fused_loss, fused_correct, fused_gradient) = found
    assert fused_loss == pytest.approx(loss, rel=5 * 8 * 2.0**-24)
    assert fused_correct == correct
    torch.testing.assert_close(fused_gradient, gradient, rtol=0, atol=8 * 2.0**-24 * 3)


def test_hits_are_those_of_the_ranks():
    z, y, _ = some(rows=64, classes=12)
    rows, _ = tolerant_rows(z, y, 0.0, 0, None, 1.0)
    top5 = z.topk(5, dim=1).indices
    np.testing.assert_array_equal(rows[TOP1].bool().cpu(), (z.argmax(1) == y).cpu())
    np.testing.assert_array_equal(rows[TOP5].bool().cpu(), (top5 == y[:, None]).any(1).cpu())


def _train_shares(rank, world, folder, results):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    try:
        torch.manual_seed(0)
        model = nn.Linear(6, 12, dtype=torch.float32)
        wrapped = DistributedDataParallel(model, static_graph=True, gradient_as_bucket_view=True)
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
        labels, teacher = some(rows=8)[1:]
        mine = slice(rank * 4, rank * 4 + 4)
        for objective in (PATRIARCH, STUDENT):
            model.zero_grad()
            grade = make_grade(objective, fused=True)
            given = teacher[mine] if objective.teacher_weight else None
            graded = grade(wrapped(x[mine]), labels[mine], given, None)
            torch.autograd.backward(graded.root, graded.gradient)
            results[rank, objective.teacher_weight] = model.weight.grad.clone()
    finally:
        dist.destroy_process_group()


def test_two_ranks_add_up_to_the_whole_batch(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_train_shares, (2, tmp_path, results), nprocs=2)
        found = dict(results)
    torch.manual_seed(0)
    model = nn.Linear(6, 12, dtype=torch.float64)
    with torch.no_grad():
        torch.manual_seed(0)
        for exact, parameter in zip(model.parameters(), nn.Linear(6, 12).parameters(), strict=True):
            exact.copy_(parameter)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1)).double()
    labels, teacher = (value.cpu() for value in some(rows=8)[1:])
    for objective in (PATRIARCH, STUDENT):
        model.zero_grad()
        given = teacher.double() if objective.teacher_weight else None
        graded = make_grade(objective)(model(x), labels, given, None)
        graded.root.backward()
        for rank in (0, 1):
            # fp32 sums of 8 products of a gradient below 1 and an input below 4.
            torch.testing.assert_close(
                found[rank, objective.teacher_weight].double(), model.weight.grad, rtol=0, atol=32 * 2.0**-24
            )


def test_the_cases_of_the_check_are_what_they_are_called():
    """Misaligned rows must be misaligned, or the check proves less than it says."""
    shifted = checks_kernels._misaligned(torch.zeros(4, 10), DEVICE)
    assert shifted.data_ptr() % 16
    assert shifted.stride(0) != 10
