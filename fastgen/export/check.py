"""What a written file must give: the networks' outputs in fp64, and how far an fp32 computation may be from them.

How far is measured, not guessed. The same networks are computed on the same images in fp32 by PyTorch, as
`fastgen.evaluate` does, and in fp64; the largest difference of any output, `rounding`, is what rounding to 24 bits
makes of these very weights and images. Another program rounds as often, in another order: it may fold batch-norm into
the convolution before it (one rounding more a weight) and may add the products of a convolution one after the other,
where PyTorch adds them in lanes. Rounding errors add up like a walk, so a sum of n terms in one lane is about
sqrt(n / m) as far off as one in lanes of m terms: some 8 for n = 4,608, the longest sums of a ResNet-18, and m = 64.
Hence

    tolerance = FACTOR * max(rounding, 2^-23 * largest output),    FACTOR = 8,

where the second term, one unit in the last place, stands in where the images happen to round well. What is wrong in a
graph, such as a missing normalisation, another epsilon or a layer in training mode, is thousands of times larger.

Within the tolerance the first class is that of fp64 wherever the first two outputs lie two tolerances apart or more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.augment import Normaliser
from fastgen.data.facts import Facts
from fastgen.errors import MachineError, UserError, first_line
from fastgen.export.subject import Subject
from fastgen.progress import counted

FACTOR = 8
UNIT_FP32 = 2.0**-23
BATCH = 16


@dataclass(frozen=True)
class Reference:
    """What files are compared with.

    Attributes:
        exact_NC: fp64, logits, or an ensemble's probabilities.
        rounding: largest difference of PyTorch's fp32 from it.
    """

    exact_NC: Tensor
    rounding: float

    @property
    def tolerance(self) -> float:
        """Largest difference that a file may have."""
        return FACTOR * max(self.rounding, UNIT_FP32 * self.exact_NC.abs().max().item())

    @property
    def clear(self) -> Tensor:
        """bool (N,): images whose first class no difference within the tolerance can change."""
        first_N, second_N = self.exact_NC.topk(2, dim=1).values.unbind(1)
        return first_N - second_N > 2 * self.tolerance


@dataclass(frozen=True)
class Agreement:
    """A file beside the reference.

    Attributes:
        difference: the largest of all outputs.
        same_first: on how many images the first class is the same.
        images: how many there are.
    """

    difference: float
    same_first: int
    images: int

    def as_dict(self) -> dict[str, Any]:
        """For the record."""
        return {"largest_difference": self.difference, "same_first_class": self.same_first, "images": self.images}


def passes_of(subject: Subject, images: int) -> int:
    """How many batches `reference_of` passes through networks."""
    return 2 * len(subject.members) * (1 + math.ceil((images - 1) / BATCH))


@torch.no_grad()
def reference_of(subject: Subject, pixels_NCHW: Tensor, passed: Callable[[int], None]) -> Reference:
    """Computes what files are compared with.

    Args:
        subject: networks.
        pixels_NCHW: uint8.
        passed: told the number of batches that are done.

    Raises:
        UserError: the outputs are not finite, or the network cannot be computed in fp64.
    """
    normalise = Normaliser(subject.facts.mean, subject.facts.std, torch.device("cpu"), torch.float32)
    one_more = counted(passed)
    exact, single = [], []
    for member in subject.members:
        try:
            double = member.in_fp64()
            exact.append(_logits(double, batches_of(pixels_NCHW, exactly_normalised(subject.facts)), one_more))
        except RuntimeError as error:
            raise UserError(
                f"generation {member.generation}: {type(member.model).__name__} cannot be computed in fp64, which the "
                f"check needs: {first_line(error)}"
            ) from error
        single.append(_logits(member.model, batches_of(pixels_NCHW, normalise), one_more))
    exact_NC, single_NC = combined(exact), combined(single)
    if not (exact_NC.isfinite().all() and single_NC.isfinite().all()):
        raise UserError(f"{subject.stem}: its outputs are not finite: export another generation")
    return Reference(exact_NC, (single_NC - exact_NC).abs().max().item())


def exactly_normalised(facts: Facts) -> Callable[[Tensor], Tensor]:
    """Function: pixels 0..255 -> (pixel / 255 - mean) / std in fp64."""
    mean_C11, std_C11 = (torch.tensor(row, dtype=torch.float64)[:, None, None] for row in (facts.mean, facts.std))
    return lambda pixels_NCHW: (pixels_NCHW.double() / 255 - mean_C11) / std_C11


def batches_of(pixels_NCHW: Tensor, prepare: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    """What networks take, a batch at a time: one image first, then BATCH at most."""
    yield prepare(pixels_NCHW[:1])
    for begin in range(1, len(pixels_NCHW), BATCH):
        yield prepare(pixels_NCHW[begin : begin + BATCH])


def combined(logits: Sequence[Tensor]) -> Tensor:
    """(N, C): the logits of one network, or the mean softmax of several, in fp64."""
    if len(logits) == 1:
        return logits[0].double()
    return torch.stack([one_NC.softmax(1).double() for one_NC in logits]).mean(0)


def agreement(name: str, found_NC: Tensor, reference: Reference) -> Agreement:
    """Compares a file's outputs with the reference.

    Raises:
        MachineError: they are too far from it, or of another form; nothing must come of the file.
    """
    exact_NC = reference.exact_NC
    if found_NC.shape != exact_NC.shape:
        shapes = f"{tuple(found_NC.shape)}, the networks {tuple(exact_NC.shape)}"
        raise MachineError(f"{name}: failed its check: it gives outputs of the form {shapes}: nothing was written")
    difference = (found_NC.double() - exact_NC).abs().max().item()
    # Not `>`: what is not a number is no agreement.
    if not difference <= reference.tolerance:
        raise MachineError(
            f"{name}: failed its check: an output is {difference:.3g} off the run's network in fp64, where "
            f"{reference.tolerance:.3g} is allowed ({FACTOR} times the rounding of fp32): nothing was written"
        )
    same_N = found_NC.argmax(1) == exact_NC.argmax(1)
    return Agreement(difference, int(same_N.sum()), len(same_N))


@torch.no_grad()
def outputs_of(model: nn.Module, subject: Subject, pixels_NCHW: Tensor) -> Tensor:
    """fp32 (N, C): what a network gives for pixels, normalised as in training."""
    normalise = Normaliser(subject.facts.mean, subject.facts.std, torch.device("cpu"), torch.float32)
    return _logits(model, batches_of(pixels_NCHW, normalise), lambda: None)


def _logits(model: nn.Module, batches: Iterable[Tensor], passed: Callable[[], None]) -> Tensor:
    found = []
    for batch in batches:
        found.append(model(batch))
        passed()
    return torch.cat(found)
