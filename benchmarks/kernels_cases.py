"""The calls whose kernels `benchmarks.kernels_static` compiles: every kernel that fastgen launches, at telling shapes.

A case calls fastgen's own operator or launcher, so that constants, strides and warps are those of training. What is in
its tensors does not matter: nothing is computed. Kernels are imported when a case is called: whether Triton interprets
or compiles is settled when it is first imported, which this table must not do.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CLASS_COUNTS = (10, 100, 1000, 1001)
TEMPERATURES = (1.0, 4.0)
TEACHER_WEIGHT = 0.6
K = 5
KEPT = 16
ROWS = 128

# Height, width, channels of CIFAR's images.
VIEWED = (32, 32, 3)

# Channels -> shape of the images: large enough for as many parts as there ever are.
NORM_SHAPES = {16: (128, 16, 32, 32), 64: (32, 64, 56, 56), 256: (128, 256, 14, 14)}


@dataclass(frozen=True)
class Narrow:
    """What must hold with any version of Triton: at most so many global loads are narrower than so many bits."""

    below_bits: int
    loads: int


@dataclass(frozen=True)
class Case:
    """A call that launches a kernel.

    Attributes:
        kernel: name of the @triton.jit function.
        shape: what tells the kernel's cases apart.
        call: launches it, perhaps beside others.
        narrow: None where memory cannot be read in wide words.
    """

    kernel: str
    shape: str
    call: Callable[[], object]
    narrow: Narrow | None = None

    @property
    def key(self) -> str:
        """Name of the case in the budget."""
        return f"{self.kernel} {self.shape}"


def _row_words(dtype: str, classes: int, others: int = 0) -> Narrow | None:
    """Rows of 1000 classes are read 128 bits at a time; of those of 100 a lane holds four. Odd rows are not aligned.

    Args:
        dtype: of the logits.
        classes: C.
        others: numbers that are read beside the rows, the label (64 bits) and the scale (32) apart.
    """
    if classes not in (100, 1000):
        return None
    others += dtype == "fp16"
    return Narrow(128, others + 1) if classes == 1000 or dtype == "fp32" else Narrow(64, others)


def _logits(dtype: str, classes: int) -> Tensor:
    return torch.empty(ROWS, classes, dtype=DTYPES[dtype])


def _labels() -> Tensor:
    return torch.empty(ROWS, dtype=torch.int64)


def _scale(dtype: str) -> Tensor | None:
    """fp16 trains with a loss scale that only the device knows."""
    return torch.empty(()) if dtype == "fp16" else None


def _tolerant(dtype: str, classes: int, k: int) -> Case:
    def call() -> object:
        from fastgen.kernels.tolerant import tolerant_rows

        return tolerant_rows(_logits(dtype, classes), _labels(), 0.5 if k else 0.0, k, _scale(dtype), 1.0)

    return Case("tolerant_kernel", f"{dtype} C={classes} K={k}", call, _row_words(dtype, classes))


def _distill(dtype: str, classes: int, temperature: float) -> Case:
    def call() -> object:
        from fastgen.kernels.distill import distill_rows

        student, teacher = _logits(dtype, classes), _logits(dtype, classes)
        return distill_rows(student, _labels(), teacher, TEACHER_WEIGHT, temperature, _scale(dtype), 1.0)

    return Case("distill_kernel", f"{dtype} C={classes} t={temperature:g}", call, _row_words(dtype, classes))


def _distill_topm(dtype: str, classes: int, temperature: float) -> Case:
    kept = min(KEPT, classes // 2)

    def call() -> object:
        from fastgen.kernels.distill_topm import distill_topm_rows

        stored = torch.empty(ROWS, kept, dtype=torch.int16), torch.empty(ROWS, kept, dtype=torch.float16)
        inputs = _logits(dtype, classes), _labels(), *stored
        return distill_topm_rows(*inputs, TEACHER_WEIGHT, temperature, _scale(dtype), 1.0)

    shape = f"{dtype} C={classes} M={kept} t={temperature:g}"
    return Case("distill_topm_kernel", shape, call, _row_words(dtype, classes, 2 * kept))


def _images(dtype: str, channels: int) -> Tensor:
    return torch.empty(NORM_SHAPES[channels], dtype=DTYPES[dtype], memory_format=torch.channels_last)


def _norm_forward(dtype: str, channels: int, residual: bool) -> Callable[[], object]:
    def call() -> object:
        from fastgen.kernels.batchnorm_layer import forward_op

        x, weight, bias, mean, var = _images(dtype, channels), *(torch.empty(channels) for _ in range(4))
        added = _images(dtype, channels) if residual else None
        return forward_op(x, added, weight, bias, mean, var, torch.zeros((), dtype=torch.int64), 0.1, 1e-5)

    return call


def _norm_backward(dtype: str, channels: int, residual: bool) -> Callable[[], object]:
    def call() -> object:
        from fastgen.kernels.batchnorm_layer import backward_op

        dy, x, weight, bias = (*(_images(dtype, channels) for _ in range(2)), *(torch.empty(channels) for _ in "wb"))
        y = _images(dtype, channels) if residual else None
        return backward_op(dy, x, y, weight, bias, torch.empty(2, channels))

    return call


def _views(dtype: torch.dtype, shape: str, normalise: bool) -> Case:
    def call() -> object:
        from fastgen.kernels.views import execute_views

        images = torch.empty(2 * ROWS, *VIEWED, dtype=torch.uint8)
        positions, rows = torch.empty(ROWS, dtype=torch.int64), torch.empty(ROWS, 5, dtype=torch.int32)
        scale, shift = (torch.empty(VIEWED[2]) for _ in range(2)) if normalise else (None, None)
        return execute_views(images, positions, rows, scale, shift, dtype)

    return Case("views_kernel", f"{shape} {'x'.join(map(str, VIEWED))}", call)


def _loss_cases() -> Iterator[Case]:
    for dtype, classes in itertools.product(DTYPES, CLASS_COUNTS):
        yield _tolerant(dtype, classes, K)
    # Cross-entropy alone, the baseline's objective.
    yield from (_tolerant("bf16", classes, 0) for classes in (100, 1000))
    for make in (_distill, _distill_topm):
        for dtype, classes, temperature in itertools.product(DTYPES, CLASS_COUNTS, TEMPERATURES):
            yield make(dtype, classes, temperature)


def _norm_cases() -> Iterator[Case]:
    for dtype, channels in itertools.product(("bf16", "fp16"), NORM_SHAPES):
        forward = _norm_forward(dtype, channels, False)
        yield Case("statistics_kernel", f"{dtype} C={channels}", forward, Narrow(128, 0))
    for dtype, channels, residual in itertools.product(("bf16", "fp16"), NORM_SHAPES, (False, True)):
        shape = f"{dtype} C={channels}{' residual' if residual else ''}"
        forward, backward = (make(dtype, channels, residual) for make in (_norm_forward, _norm_backward))
        # Two running statistics and the number of batches.
        yield Case("apply_kernel", shape, forward, Narrow(128, 3))
        yield Case("reduce_kernel", shape, backward, Narrow(128, 0))
        yield Case("input_gradient_kernel", shape, backward, Narrow(128, 0))


def _view_cases() -> Iterator[Case]:
    yield from (_views(dtype, name, True) for name, dtype in DTYPES.items())
    yield _views(torch.uint8, "uint8", False)


CASES = (*_loss_cases(), *_view_cases(), *_norm_cases())


def by_kernel(cases: Sequence[Case]) -> dict[str, list[Case]]:
    """The cases of each kernel, kernels in the order in which they first appear."""
    kernels = dict.fromkeys(case.kernel for case in cases)
    return {kernel: [case for case in cases if case.kernel == kernel] for kernel in kernels}


KERNELS = tuple(by_kernel(CASES))
