"""Checks of the Triton loss kernels against closed forms in fp64, for `gpu_check` and for the tests.

Kernels are launched on tensors that were filled with NaN and lie within more of them: what is not written, or is
written beside its place, shows. Shapes: B rows, C classes, M kept ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks import closed_forms
from benchmarks.checks import (
    PATTERNS,
    PRECISIONS,
    U32,
    Float64,
    Int64,
    Outcome,
    draw_labels,
    draw_logits,
    gradient_tolerance,
    sum_roundings,
    worst,
)
from benchmarks.rigs import Precision
from fastgen.kernels import distill, distill_topm, tolerant
from fastgen.kernels.rows import CONFIDENCE, LOSS, TOP1, TOP5
from fastgen.laws import eta_for_confidence

KERNEL_CLASSES = (10, 100, 1000, 1001)
KERNEL_BATCHES = (1, 7, 128, 1024)
SCALE = 2.0**7
WEIGHT = 0.25
# Numbers before and after each output that must stay what they were.
GUARD = 64
# Elements by which views of logits and labels are moved out of their alignment.
SHIFT = 1


@dataclass(frozen=True)
class LossCase:
    """Inputs of the loss kernels, on the CPU.

    Attributes:
        z_BC: logits.
        v_BC: the teacher's.
        labels_B: of the rows.
        precision: of the logits.
        where: what to print.
    """

    z_BC: Tensor
    v_BC: Tensor
    labels_B: Int64
    precision: str
    where: str

    @property
    def exact(self) -> Float64:
        """Logits in fp64."""
        values: Float64 = self.z_BC.double().numpy()
        return values

    @property
    def size(self) -> float:
        """The largest logit."""
        return float(max(self.z_BC.float().abs().max(), self.v_BC.float().abs().max()))


# (z, labels, v, scale, rows_4B, gradient_BC) on the device -> nothing.
Launch = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor], None]


@dataclass(frozen=True)
class Variant:
    """One kernel with one set of arguments.

    Attributes:
        name: of the kernel.
        where: its arguments, to print.
        expected: losses (B,) and their gradient (B, C) in fp64.
        launch: fills the outputs.
        temperature: which the tolerances depend on.
    """

    name: str
    where: str
    expected: tuple[Float64, Float64]
    launch: Launch
    temperature: float = 1.0


def check_loss_kernels(
    device: torch.device,
    seed: int,
    class_counts: Sequence[int],
    batches: Sequence[int],
    kept: int = 5,
    precisions: Sequence[Precision] = PRECISIONS,
) -> Iterator[Outcome]:
    """Losses, gradients, p_a1 and hits of every kernel, in every dtype, aligned or not, with a scale or without.

    Args:
        device: a GPU, or the CPU under TRITON_INTERPRET=1.
        seed: of the logits.
        class_counts, batches: C and B.
        kept: M of the stored teacher.
        precisions: of the logits.
    """
    random = np.random.default_rng(seed)
    for precision, pattern in itertools.product(precisions, PATTERNS):
        found: dict[str, list[Outcome]] = {}
        for classes, rows in itertools.product(class_counts, batches):
            z_BC, v_BC = (draw_logits(random, pattern, rows, classes, precision) for _ in range(2))
            where = f"C={classes} B={rows}"
            case = LossCase(z_BC, v_BC, draw_labels(random, pattern, z_BC), precision, where)
            for outcome in _check_case(case, device, kept):
                found.setdefault(outcome.name, []).append(outcome)
        for name, outcomes in found.items():
            most = worst(outcomes)
            yield Outcome(f"{name}, {precision}, {pattern}", most.error, most.tolerance, most.where)


def _check_case(case: LossCase, device: torch.device, kept: int) -> Iterator[Outcome]:
    """Every variant; they take turns at being misaligned and at having a scale."""
    variants = [_tolerant(case, confidence, k) for confidence, k in ((0.6, 5), (0.8, 2), (1.0, 5))]
    for weight, temperature in ((0.6, 1.0), (0.7, 4.0)):
        variants += [_distill(case, weight, temperature), _distill_topm(case, weight, temperature, kept, device)]
    for number, variant in enumerate(variants):
        yield from _check_variant(case, variant, device, misaligned=number % 2 == 1, scaled=number % 3 == 1)


def _tolerant(case: LossCase, confidence: float, k: int) -> Variant:
    eta = eta_for_confidence(confidence, k)

    def launch(z: Tensor, labels: Tensor, v: Tensor, scale: Tensor | None, rows: Tensor, gradient: Tensor) -> None:
        tolerant.launch(z, labels, eta, k, scale, WEIGHT, rows, gradient)

    expected = closed_forms.tolerant(case.exact, case.labels_B, eta, k)
    return Variant("tolerant", f"eta={eta:.3g} K={k}", expected, launch)


def _distill(case: LossCase, weight: float, temperature: float) -> Variant:
    def launch(z: Tensor, labels: Tensor, v: Tensor, scale: Tensor | None, rows: Tensor, gradient: Tensor) -> None:
        distill.launch(z, labels, v, weight, temperature, scale, WEIGHT, rows, gradient)

    expected = closed_forms.distill(case.exact, case.labels_B, case.v_BC.double().numpy(), weight, temperature)
    return Variant("distill", f"lambda={weight:g} t={temperature:g}", expected, launch, temperature)


def _distill_topm(case: LossCase, weight: float, temperature: float, kept: int, device: torch.device) -> Variant:
    kept_BM, t_BM = _stored(case.v_BC, temperature, kept)
    classes_BM, probabilities_BM = kept_BM.to(device, torch.int16), t_BM.to(device)

    def launch(z: Tensor, labels: Tensor, v: Tensor, scale: Tensor | None, rows: Tensor, gradient: Tensor) -> None:
        stored = classes_BM, probabilities_BM
        distill_topm.launch(z, labels, *stored, weight, temperature, scale, WEIGHT, rows, gradient)

    stored64 = kept_BM.numpy(), t_BM.double().numpy()
    expected = closed_forms.distill_topm(case.exact, case.labels_B, *stored64, weight, temperature)
    where = f"lambda={weight:g} t={temperature:g} M={kept}"
    return Variant("distill_topm", where, expected, launch, temperature)


def _stored(v_BC: Tensor, temperature: float, kept: int) -> tuple[Tensor, Tensor]:
    """What would be kept of a teacher: M classes, int64, and their probabilities, fp16."""
    top = (v_BC.double() / temperature).softmax(1).topk(kept, dim=1)
    return top.indices, top.values.half()


def _check_variant(
    case: LossCase, variant: Variant, device: torch.device, *, misaligned: bool, scaled: bool
) -> Iterator[Outcome]:
    rows, classes = case.z_BC.shape
    place = _misaligned if misaligned else Tensor.to
    z_BC, v_BC = place(case.z_BC, device), place(case.v_BC, device)
    labels_B = torch.from_numpy(case.labels_B)
    labels_B = _shifted(labels_B, device) if misaligned else labels_B.to(device)
    scale = torch.full((), SCALE, device=device) if scaled else None
    rows_4B, rows_guard = _poisoned((4, rows), torch.float32, device)
    gradient_BC, gradient_guard = _poisoned((rows, classes), case.z_BC.dtype, device)
    variant.launch(z_BC, labels_B, v_BC, scale, rows_4B, gradient_BC)

    where = f"{case.where} {variant.where}{' misaligned' if misaligned else ''}{' scaled' if scaled else ''}"
    loss64_B, gradient64_BC = variant.expected
    found_4B = rows_4B.double().cpu().numpy()
    allowed_B = _loss_tolerance(loss64_B, classes, case.size, variant.temperature)
    yield _nearest(f"{variant.name}: loss", np.abs(found_4B[LOSS] - loss64_B), allowed_B, where)
    confidence_B = np.exp(closed_forms.log_softmax(case.exact).max(1))
    allowed = np.full(rows, 2 * U32 * sum_roundings(classes))
    yield _nearest(f"{variant.name}: p_a1", np.abs(found_4B[CONFIDENCE] - confidence_B), allowed, where)
    rank_B = closed_forms.rank_of_label(case.exact, case.labels_B)
    wrong = (found_4B[TOP1] != (rank_B < 1)).sum() + (found_4B[TOP5] != (rank_B < 5)).sum()
    yield Outcome(f"{variant.name}: wrong hits", float(wrong), 0, where)
    factor = WEIGHT * (SCALE if scaled else 1)
    error_BC = np.abs(gradient_BC.double().cpu().numpy() - factor * gradient64_BC)
    allowed_BC = _gradient_tolerance(gradient64_BC, factor, case, variant.temperature)
    yield _nearest(f"{variant.name}: gradient", error_BC, allowed_BC, where)
    touched = _touched(rows_guard) + _touched(gradient_guard)
    yield Outcome(f"{variant.name}: numbers written beside the outputs", touched, 0, where)


def _nearest(name: str, error: Float64, allowed: Float64, where: str) -> Outcome:
    """The element that is nearest to failing."""
    at = int(np.nan_to_num(error / allowed, nan=np.inf).argmax())
    return Outcome(name, float(error.flat[at]), float(allowed.flat[at]), where)


def _loss_tolerance(loss_B: Float64, classes: int, size: float, temperature: float) -> Float64:
    """Error of a row's loss.

    As `checks.loss_tolerance`; and the stored teacher's residual, 1 minus a sum, is wrong by the roundings of the sum,
    times ln of the ratio of the tails, which two differences of logits and ln 2^-24 bound.
    """
    of_residual = sum_roundings(classes) * (2 * size / temperature + 17)
    in_rows = temperature * (8 * 2 * size + temperature * (sum_roundings(classes) + of_residual))
    return U32 * (in_rows + 4 * np.abs(loss_B))


def _gradient_tolerance(gradient_BC: Float64, factor: float, case: LossCase, temperature: float) -> Float64:
    """As `checks.gradient_tolerance`, for a gradient that is multiplied by a factor before it is rounded.

    Of a row and not of a mean over rows: hence times their number.
    """
    of_one = gradient_tolerance(factor * gradient_BC, case.size, temperature, case.precision)
    in_fp32 = gradient_tolerance(np.zeros_like(gradient_BC), case.size, temperature, "fp32")
    return of_one + (len(gradient_BC) * factor) * in_fp32


def _misaligned(values: Tensor, device: torch.device) -> Tensor:
    """The same values in rows that begin at odd places, NaN around them."""
    wider = torch.full((values.shape[0], values.shape[1] + 2 * SHIFT), float("nan"), dtype=values.dtype, device=device)
    wider[:, SHIFT:-SHIFT] = values.to(device)
    return wider[:, SHIFT:-SHIFT]


def _shifted(labels_B: Tensor, device: torch.device) -> Tensor:
    longer = torch.full((len(labels_B) + SHIFT,), -1, dtype=torch.int64, device=device)
    longer[SHIFT:] = labels_B.to(device)
    return longer[SHIFT:]


def _poisoned(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """A dense tensor full of NaN, and a (2, GUARD) copy-free view of what lies before and after it."""
    count = shape[0] * shape[1]
    memory = torch.full((count + 2 * GUARD,), float("nan"), dtype=dtype, device=device)
    guards = memory.as_strided((2, GUARD), (count + GUARD, 1))
    return memory[GUARD : GUARD + count].view(shape), guards


def _touched(guards: Tensor) -> float:
    return float((~guards.isnan()).sum())
