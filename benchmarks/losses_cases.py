"""What `losses` compares: its cases, their random inputs, the candidates, and how far off they are.

Shapes: B rows, C classes, M kept ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from benchmarks import closed_forms
from benchmarks.rigs import PATRIARCH
from fastgen import losses
from fastgen.step import DTYPES

Precision = Literal["bf16", "fp16"]
Teacher = Literal["none", "dense", "stored"]
# Logits, labels, and what is known of the teacher -> mean loss.
PlainLoss = Callable[..., Tensor]

TEACHER_WEIGHT = 0.6
KEPT = 16
# What torch.amp.GradScaler begins with: without it most of an fp16 gradient would be zeros.
FP16_SCALE = 2.0**16
SHAPES = ((1024, 1000), (128, 100), (8192, 1000))
SMALL_SHAPES = ((3, 100), (5, 40))
PRECISIONS: tuple[Precision, ...] = ("bf16", "fp16")
CANDIDATES = ("eager", "compile", "fused")

LABEL_AND_LOSS_BYTES = 12
# Several times the 50 MB of an H200's second-level cache.
ROTATION_BYTES = 128e6
MOST_COPIES = 64


class Objective(NamedTuple):
    """What is computed of the logits.

    Attributes:
        teacher: none, its logits, or M classes a row and their probabilities.
        temperature: of the teacher.
    """

    teacher: Teacher
    temperature: float = 1.0


OBJECTIVES = {
    "tolerant": Objective("none"),
    "distill t=1": Objective("dense"),
    "distill t=4": Objective("dense", 4.0),
    f"distill_topm M={KEPT}": Objective("stored"),
}


@dataclass(frozen=True)
class Case:
    """One table: an objective on logits of one shape and dtype."""

    objective: str
    rows: int
    classes: int
    precision: Precision

    @property
    def name(self) -> str:
        """To print."""
        return f"{self.objective}, ({self.rows}, {self.classes}) {self.precision}"

    @property
    def bytes_read(self) -> int:
        """Of logits and teacher."""
        of_logits = self.rows * self.classes * DTYPES[self.precision].itemsize
        # A class is int16, a probability fp16.
        of_teacher = {"none": 0, "dense": of_logits, "stored": self.rows * KEPT * 4}
        return of_logits + of_teacher[OBJECTIVES[self.objective].teacher]

    @property
    def bytes_moved(self) -> int:
        """That any way to compute it moves at least."""
        gradient = self.rows * self.classes * DTYPES[self.precision].itemsize
        return self.bytes_read + gradient + LABEL_AND_LOSS_BYTES * self.rows

    @property
    def copies(self) -> int:
        """Inputs that are taken in turn."""
        return min(MOST_COPIES, math.ceil(ROTATION_BYTES / self.bytes_read))

    @property
    def rotation(self) -> str:
        """What is said of them."""
        megabytes = self.copies * self.bytes_read / 1e6
        cached = ", WITHIN THE CACHE" if self.copies * self.bytes_read < ROTATION_BYTES else ""
        return f"{self.copies} inputs of {megabytes:.1f} MB together in turn{cached}"


# In the order of their worth: what the floors are about comes first.
CASES = tuple(
    Case(objective, *shape, precision)
    for shape, precision, objective in itertools.product(SHAPES, PRECISIONS, OBJECTIVES)
)
SMALL_CASES = tuple(
    Case(objective, *shape, precision)
    for shape, precision, objective in itertools.product(SMALL_SHAPES, PRECISIONS, OBJECTIVES)
)


@dataclass(frozen=True)
class Inputs:
    """Of one call.

    Attributes:
        z_BC: logits.
        labels_B: int64.
        teacher: nothing, (v_BC,), or (classes_BM, probabilities_BM).
        scale: fp32 (), what the gradient is multiplied with; None: 1.
    """

    z_BC: Tensor
    labels_B: Tensor
    teacher: tuple[Tensor, ...]
    scale: Tensor | None


# -> mean loss, fp32 (), and its gradient times the scale, in the logits' dtype.
Output = tuple[Tensor, Tensor]
Call = Callable[[Inputs], Output]


def draw(case: Case, device: torch.device, seed: int) -> Inputs:
    """Random logits three wide, never zeros, and random labels."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype, objective = DTYPES[case.precision], OBJECTIVES[case.objective]

    def logits() -> Tensor:
        values_BC = torch.randn((case.rows, case.classes), generator=generator, device=device)
        return (3 * values_BC).to(dtype)

    z_BC, v_BC = logits(), logits()
    labels_B = torch.randint(case.classes, (case.rows,), generator=generator, device=device)
    scale = torch.full((), FP16_SCALE, device=device) if case.precision == "fp16" else None
    teacher: dict[Teacher, tuple[Tensor, ...]] = {"none": (), "dense": (v_BC,)}
    if objective.teacher == "stored":
        top = (v_BC.float() / objective.temperature).softmax(1).topk(KEPT, dim=1)
        teacher["stored"] = (top.indices.to(torch.int16), top.values.half())
    return Inputs(z_BC, labels_B, teacher[objective.teacher], scale)


def candidates(case: Case, device: torch.device) -> dict[str, Call]:
    """Everything that computes the case's objective, by name."""
    plain = plain_loss(OBJECTIVES[case.objective])
    # On a CPU nothing is timed: what inductor would make of it there has no say.
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(plain, dynamic=False, fullgraph=True, backend=backend)
    fused = fused_call(OBJECTIVES[case.objective])
    return dict(zip(CANDIDATES, (differentiated(plain), differentiated(compiled), fused), strict=True))


def plain_loss(objective: Objective) -> PlainLoss:
    """The reference in plain PyTorch."""
    weight, temperature = TEACHER_WEIGHT, objective.temperature
    if objective.teacher == "none":
        return lambda z, labels: losses.tolerant(z, labels, PATRIARCH.eta, PATRIARCH.k)
    if objective.teacher == "dense":
        return lambda z, labels, v: losses.distill(z, labels, v, weight, temperature)
    return lambda z, labels, kept, t: losses.distill_topm(z, labels, kept, t, weight, temperature)


def differentiated(loss: PlainLoss) -> Call:
    """A loss and, by autograd, its gradient."""

    def call(inputs: Inputs) -> Output:
        z_BC = inputs.z_BC.detach().requires_grad_()
        mean = loss(z_BC, inputs.labels_B, *inputs.teacher)
        (gradient_BC,) = torch.autograd.grad(mean, z_BC, inputs.scale)
        return mean.detach(), gradient_BC

    return call


def fused_call(objective: Objective) -> Call:
    """The kernel, as the trainer uses it: its gradient is finished, autograd has no part in it."""
    from fastgen.kernels.distill import distill_rows
    from fastgen.kernels.distill_topm import distill_topm_rows
    from fastgen.kernels.rows import LOSS
    from fastgen.kernels.tolerant import tolerant_rows

    kernel = {"none": tolerant_rows, "dense": distill_rows, "stored": distill_topm_rows}[objective.teacher]
    of_teacher = (TEACHER_WEIGHT, objective.temperature)
    settings = (PATRIARCH.eta, PATRIARCH.k) if objective.teacher == "none" else of_teacher

    def call(inputs: Inputs) -> Output:
        weight = 1 / len(inputs.labels_B)
        rows_4B, gradient_BC = kernel(inputs.z_BC, inputs.labels_B, *inputs.teacher, *settings, inputs.scale, weight)
        return rows_4B[LOSS].mean(), gradient_BC

    return call


class Errors(NamedTuple):
    """Distance to fp64: of the mean loss, relative; of the gradient, the largest over the largest gradient."""

    loss: float
    gradient: float


def errors(case: Case, inputs: Inputs, output: Output) -> Errors:
    """How far an output is from the closed form in fp64."""
    objective = OBJECTIVES[case.objective]
    z_BC, labels_B = inputs.z_BC.double().cpu().numpy(), inputs.labels_B.cpu().numpy()
    of_teacher = TEACHER_WEIGHT, objective.temperature
    if objective.teacher == "none":
        loss_B, gradient_BC = closed_forms.tolerant(z_BC, labels_B, PATRIARCH.eta, PATRIARCH.k)
    elif objective.teacher == "dense":
        loss_B, gradient_BC = closed_forms.distill(
            z_BC, labels_B, inputs.teacher[0].double().cpu().numpy(), *of_teacher
        )
    else:
        kept_BM, t_BM = inputs.teacher[0].long().cpu().numpy(), inputs.teacher[1].double().cpu().numpy()
        loss_B, gradient_BC = closed_forms.distill_topm(z_BC, labels_B, kept_BM, t_BM, *of_teacher)
    expected_BC = gradient_BC * (1.0 if inputs.scale is None else inputs.scale.item()) / case.rows
    found_BC = output[1].double().cpu().numpy()
    of_loss = abs(output[0].item() - loss_B.mean()) / abs(loss_B.mean())
    return Errors(float(of_loss), float(abs(found_BC - expected_BC).max() / abs(expected_BC).max()))
