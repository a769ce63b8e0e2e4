"""Checks of single parts on a device: losses, views, initial weights, folded teacher. Used by `gpu_check`.

A tolerance is derived, not tuned: u is half the distance from 1 to the next number of a format, so
that one rounding is wrong by at most u of its result. Shapes: B rows, C classes, N images.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from benchmarks import closed_forms
from benchmarks.rigs import Case, Precision, calibrate, fresh_network
from fastgen import losses
from fastgen.augment import Normaliser
from fastgen.data.resident import ResidentLoader
from fastgen.laws import eta_for_confidence
from fastgen.step import DTYPES
from fastgen.teacher import TeacherEngine, make_teacher
from fastgen.views import training_views

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")
U = {name: torch.finfo(dtype).eps / 2 for name, dtype in DTYPES.items()}
U32 = U["fp32"]

TEACHER_ENGINES: tuple[TeacherEngine, ...] = ("folded", "fused", "compile")
CLASSES = (10, 100, 1000)
BATCHES = (1, 7, 128)
SMALL_CLASSES, SMALL_BATCHES = (10, 100), (1, 7)
PATTERNS = ("random", "ties", "extreme", "label outside top K")
EXTREME_LOGIT = 1e4
CONFIDENCE_K = ((0.6, 5), (0.8, 2), (0.4, 10))
WEIGHT_TEMPERATURE = ((0.6, 1.0), (0.7, 4.0), (1.0, 1.0))


@dataclass(frozen=True)
class Outcome:
    """One check.

    Attributes:
        name: what was compared.
        error: what was measured.
        tolerance: the largest error that passes.
        where: the case in which the error stood highest beside its tolerance.
        of: its tag, by which `verdicts` knows what it is of; empty: that of its part of `gpu_check`.
    """

    name: str
    error: float
    tolerance: float
    where: str = ""
    of: str = ""

    @property
    def passed(self) -> bool:
        """An error that is not a number does not pass."""
        return self.error <= self.tolerance

    def line(self) -> str:
        """The check as it is printed."""
        verdict = "PASS" if self.passed else "FAIL"
        return f"{verdict}  {self.name:<58} error {self.error:9.2e}  tolerance {self.tolerance:9.2e}  {self.where}"


def worst(outcomes: Sequence[Outcome]) -> Outcome:
    """The one nearest to failing, or failing most; not-a-number fails most of all."""

    def severity(outcome: Outcome) -> float:
        if np.isnan(outcome.error):
            return np.inf
        return outcome.error / outcome.tolerance if outcome.tolerance else np.inf * outcome.error

    return max(outcomes, key=severity)


@contextmanager
def full_fp32() -> Iterator[None]:
    """Convolutions in fp32 proper: cuDNN otherwise takes TF32, whose 10-bit fractions hide what is compared."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def check_losses(
    device: torch.device, seed: int, class_counts: Sequence[int], batches: Sequence[int]
) -> Iterator[Outcome]:
    """Loss and gradient of both objectives, in every precision of the logits, against the closed forms in fp64."""
    random = np.random.default_rng(seed)
    for precision, pattern in itertools.product(PRECISIONS, PATTERNS):
        found: dict[str, list[Outcome]] = {}
        for classes, rows in itertools.product(class_counts, batches):
            z_BC, v_BC = (draw_logits(random, pattern, rows, classes, precision) for _ in range(2))
            labels_B = draw_labels(random, pattern, z_BC)
            for outcome in _compare_losses(z_BC, v_BC, labels_B, precision, device):
                found.setdefault(outcome.name, []).append(outcome)
        for name, outcomes in found.items():
            worst_one = worst(outcomes)
            yield Outcome(f"{name}, {precision}, {pattern}", worst_one.error, worst_one.tolerance, worst_one.where)


def draw_logits(random: np.random.Generator, pattern: str, rows: int, classes: int, precision: str) -> Tensor:
    """Logits (B, C) on the CPU in the given precision; rounded first, so that both sides rank the same values."""
    values_BC = 3 * random.standard_normal((rows, classes))
    if pattern == "ties":
        # Four values for at least ten classes; the first row is one single tie.
        values_BC = random.integers(-1, 3, (rows, classes)).astype(np.float64)
        values_BC[0] = values_BC[0, 0]
    elif pattern == "extreme":
        values_BC = EXTREME_LOGIT * random.choice([-1.0, 1.0], (rows, classes))
    return torch.from_numpy(values_BC).to(DTYPES[precision])


def draw_labels(random: np.random.Generator, pattern: str, z_BC: Tensor) -> Int64:
    rows, classes = z_BC.shape
    if pattern == "label outside top K":
        return z_BC.argmin(1).numpy()
    return random.integers(0, classes, rows)


def _compare_losses(
    z_BC: Tensor, v_BC: Tensor, labels_B: Int64, precision: str, device: torch.device
) -> Iterator[Outcome]:
    z64_BC, v64_BC = z_BC.double().numpy(), v_BC.double().numpy()
    on_device = z_BC.to(device).requires_grad_()
    labels, teacher_BC = torch.from_numpy(labels_B).to(device), v_BC.to(device)
    for confidence, k in CONFIDENCE_K:
        eta = eta_for_confidence(confidence, k)
        wanted = closed_forms.tolerant(z64_BC, labels_B, eta, k)
        yield from _compare(
            "tolerant", f"K={k}", losses.tolerant(on_device, labels, eta, k), on_device, wanted, precision
        )
    for weight, temperature in WEIGHT_TEMPERATURE:
        expected = closed_forms.distill(z64_BC, labels_B, v64_BC, weight, temperature)
        loss = losses.distill(on_device, labels, teacher_BC, weight, temperature)
        where = f"lambda={weight:g} t={temperature:g}"
        yield from _compare("distill", where, loss, on_device, expected, precision, temperature)


def _compare(
    name: str,
    where: str,
    loss: Tensor,
    logits_BC: Tensor,
    expected: tuple[Float64, Float64],
    precision: str,
    temperature: float = 1.0,
) -> Iterator[Outcome]:
    rows, classes = logits_BC.shape
    loss64, gradient64_BC = float(expected[0].mean()), expected[1] / rows
    (gradient_BC,) = torch.autograd.grad(loss, logits_BC)
    where = f"C={classes} B={rows} {where}"
    size = float(logits_BC.detach().abs().max())
    yield Outcome(
        f"loss {name}", abs(loss.item() - loss64), loss_tolerance(loss64, rows, classes, size, temperature), where
    )
    error_BC = np.abs(gradient_BC.double().cpu().numpy() - gradient64_BC)
    allowed_BC = gradient_tolerance(gradient64_BC, size, temperature, precision)
    at = int(np.nan_to_num(error_BC / allowed_BC, nan=np.inf).argmax())
    yield Outcome(f"gradient {name}", float(error_BC.flat[at]), float(allowed_BC.flat[at]), where)


def sum_roundings(count: int) -> float:
    """Roundings that a term goes through when `count` terms are added by at least 8 lanes side by side."""
    return 4 + count / 8


def loss_tolerance(loss: float, rows: int, classes: int, size: float, temperature: float) -> float:
    """Error of a mean loss that fp32 arithmetic on exact logits may have.

    Differences of logits are at most 2 `size` and are rounded a few times on their way through
    log_softmax (of the student and, divided and multiplied by the temperature, of both in the
    divergence): 8 times at most. The sum over classes is rounded in terms of at most 1, the mean over rows in
    terms of the loss.
    """
    in_rows = temperature * (8 * 2 * size + temperature * sum_roundings(classes))
    return U32 * (in_rows + sum_roundings(rows) * abs(loss))


def gradient_tolerance(gradient_BC: Float64, size: float, temperature: float, precision: str) -> Float64:
    """Error of each element of the mean's gradient.

    Within fp32 it is made of probabilities, each wrong by a few roundings of the sum over classes
    (and, where the temperature divides logits, by the rounding of that quotient); then it is
    rounded to the logits' dtype, down to the smallest number there is.
    """
    rows, classes = gradient_BC.shape
    of_quotient = 0.0 if temperature == 1 else 2 * size / temperature
    in_fp32 = U32 * temperature * (4 * sum_roundings(classes) + of_quotient) / rows
    smallest = torch.finfo(DTYPES[precision]).smallest_normal * U[precision]
    return in_fp32 + 2 * U[precision] * np.abs(gradient_BC) + smallest


def check_views(case: Case, *, kernels: bool = False) -> Iterator[Outcome]:
    """Two epochs' views executed on the device, pixel for pixel; and their normalisation."""
    loader = ResidentLoader(case.split, case.facts.pad_px, case.device, kernels)
    name = "views kernel" if kernels else "views"
    differing = samples = 0
    for epoch in range(2):
        views = training_views(case.split.ids, case.crop, data_seed=7, generation=1, epoch=epoch)
        expected = np.stack(
            [
                closed_forms.view(image, row, case.facts.pad_px)
                for image, row in zip(case.split.images_NHWC, views.table, strict=True)
            ]
        )
        shown = 0
        for batch in loader.batches(views, case.batch_size):
            positions = views.order[shown : shown + case.batch_size]
            shown += len(batch.labels)
            images_NHWC = batch.images_NCHW.permute(0, 2, 3, 1).cpu().numpy()
            differing += int((images_NHWC != expected[positions]).sum())
            differing += int((batch.labels.cpu().numpy() != case.split.labels[positions]).sum())
            differing += int((batch.ids.cpu().numpy() != case.split.ids[positions]).sum())
        samples += shown
    yield Outcome(f"{name}: differing pixels, labels and ids", differing, 0, f"{samples} samples")
    yield Outcome(f"{name}: samples missing in two epochs", abs(2 * len(case.split) - samples), 0)
    yield _check_normaliser(case)


def _check_normaliser(case: Case) -> Outcome:
    pixels_NHWC = case.split.images_NHWC[: case.batch_size]
    images_NCHW = torch.from_numpy(pixels_NHWC).permute(0, 3, 1, 2).to(case.device)
    normalise = Normaliser(case.facts.mean, case.facts.std, case.device, torch.float32)
    found_NHWC = normalise(images_NCHW).permute(0, 2, 3, 1).double().cpu().numpy()
    mean_C, std_C = np.array(case.facts.mean), np.array(case.facts.std)
    error = np.abs(found_NHWC - (pixels_NHWC / 255 - mean_C) / std_C).max()
    # Scale, product, shift and sum are rounded, each at most 1/std in size.
    return Outcome("views: normalised pixels, fp32", float(error), float(4 * U32 / std_C.min()))


def check_initial_weights(case: Case) -> Iterator[Outcome]:
    """A seed gives the same bits on every device, and another seed gives others."""
    first, again, other = (_weights(fresh_network(case, seed)) for seed in (3, 3, 4))
    on_cpu = _weights(fresh_network(replace(case, device=torch.device("cpu")), 3))
    yield Outcome("initial weights: tensors that differ from the CPU's", _differing(first, on_cpu), 0)
    yield Outcome("initial weights: tensors that differ from another time", _differing(first, again), 0)
    yield Outcome("initial weights: tensors that another seed leaves alike", _alike(first, other), 0)


def _weights(model: nn.Module) -> list[Tensor]:
    """Weights that are drawn, and not the constants of batch-norms."""
    return [parameter.detach().cpu() for parameter in model.parameters() if parameter.ndim > 1]


def _alike(weights: Sequence[Tensor], others: Sequence[Tensor]) -> int:
    return sum(torch.equal(ours, theirs) for ours, theirs in zip(weights, others, strict=True))


def _differing(weights: Sequence[Tensor], others: Sequence[Tensor]) -> int:
    return len(weights) - _alike(weights, others)


def check_teacher(case: Case) -> Iterator[Outcome]:
    """Every engine of the teacher in each precision against the unfolded network in fp64 on the CPU."""
    images_NCHW = torch.from_numpy(case.split.images_NHWC[: case.batch_size]).permute(0, 3, 1, 2).to(case.device)
    inputs_NCHW = case.normaliser(torch.float32)(images_NCHW).contiguous(memory_format=torch.channels_last)
    model = lively_network(case, inputs_NCHW)
    sizes = network_size(model)
    with full_fp32(), torch.no_grad():
        reference_BC = copy.deepcopy(model).cpu().double()(inputs_NCHW.cpu().double())
        yield logits_outcome("teacher: network in eval mode, fp32", model(inputs_NCHW), reference_BC, *sizes, U32)
        for engine, precision in itertools.product(TEACHER_ENGINES, PRECISIONS):
            torch.compiler.reset()
            dtype = DTYPES[precision]
            copied = copy.deepcopy(model)
            teach = make_teacher(copied, case.device, dtype, engine, shape=inputs_NCHW.shape)
            name = f"teacher: {teach.how}, {precision}"
            yield logits_outcome(name, teach(inputs_NCHW.to(dtype)), reference_BC, *sizes, U[precision])


def logits_outcome(name: str, found_BC: Tensor, reference_BC: Tensor, layers: int, fan_in: int, u: float) -> Outcome:
    """Error relative to the largest logit.

    Each layer rounds its weights and its output to the dtype and adds up in fp32; roundings of
    random sign add like a random walk. Four standard deviations of that walk are allowed.

    Args:
        name: of the outcome.
        found_BC: logits.
        reference_BC: fp64, on the CPU.
        layers, fan_in: from `network_size`.
        u: one rounding of the network's dtype.
    """
    size = float(reference_BC.abs().max())
    error = float((found_BC.double().cpu() - reference_BC).abs().max()) / size
    return Outcome(name, error, 4 * (2 * layers) ** 0.5 * (u + fan_in**0.5 * U32))


def lively_network(case: Case, inputs_NCHW: Tensor) -> nn.Module:
    """An untrained network, as a trained one would be: batch-norms with statistics, scales and shifts of their own."""
    return calibrate(_lively(fresh_network(case, init_seed=5)), inputs_NCHW)


@torch.no_grad()
def _lively(model: nn.Module) -> nn.Module:
    """Gives batch-norms scales and shifts of their own, as training would; fresh ones are 1 and 0."""
    generator = torch.Generator().manual_seed(6)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.copy_(0.5 + torch.rand(module.weight.shape, generator=generator))
            module.bias.copy_(0.5 * torch.randn(module.bias.shape, generator=generator))
    return model


def network_size(model: nn.Module) -> tuple[int, int]:
    """How many convolutions there are, and the largest number of products in one sum."""
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]
    return len(weights), max(weight[0].numel() for weight in weights)
