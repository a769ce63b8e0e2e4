"""What is kept of a teacher's logits: all of them, or the M classes that each row ranks first.

Kept are log-probabilities, not probabilities: fp16 has none below 6e-8, and a temperature above 1 needs them. What M
classes leave of a row's mass is one outcome in the loss (`losses.distill_topm`), and is kept by itself: 1 - sum p would
be nothing but roundings where it is small. Temperatures other than 1 ask how it lies among the other classes: evenly.
So a truncated teacher is one distribution, whatever the temperature.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastgen.config import kept_classes

StoredDtype = Literal["fp16", "fp32"]
STORED_DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


# A truncated teacher's word on B samples, by column. Dense: LOG_P (B, C) in fp16 or fp32. Otherwise LOG_P (B, M + 1),
# of which the last is all other classes together, and CLASSES int16 (B, M), in falling order of their probabilities.
Labels = Mapping[str, Tensor]
LOG_P, CLASSES = "log_p", "classes"


@dataclass(frozen=True)
class Truncation:
    """How a teacher's logits are cut down and rounded.

    Attributes:
        classes: C.
        kept: M, of each row; C: all of them.
        dtype: in which they are kept.
    """

    classes: int
    kept: int
    dtype: StoredDtype

    @property
    def dense(self) -> bool:
        """Whether every class is kept; then classes need no numbers."""
        return self.kept == self.classes

    @property
    def how(self) -> str:
        """For the record."""
        kept = f"all {self.classes:,}" if self.dense else f"{self.kept:,} of {self.classes:,}"
        return f"{kept} classes in {self.dtype}"

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's classes and log-probabilities."""
        return sum(self.widths[name] * dtype.itemsize for name, dtype in self.columns.items())

    @property
    def widths(self) -> dict[str, int]:
        """Names of what is kept, and how many values of it a row has."""
        return {LOG_P: self.kept} if self.dense else {LOG_P: self.kept + 1, CLASSES: self.kept}

    @property
    def columns(self) -> dict[str, torch.dtype]:
        """Names and dtypes of what is kept."""
        return {LOG_P: STORED_DTYPES[self.dtype]} | ({} if self.dense else {CLASSES: torch.int16})

    def __call__(self, logits_BC: Tensor) -> Labels:
        """Truncates.

        Args:
            logits_BC: of the teacher, any floating-point dtype.

        Returns:
            its columns. Where all classes are kept in fp32 these are the very logits.
        """
        if self.dense and self.dtype == "fp32":
            return {LOG_P: logits_BC.float()}
        log_p_BC = logits_BC.float().log_softmax(1)
        if self.dense:
            return {LOG_P: log_p_BC.to(STORED_DTYPES[self.dtype])}
        # A stable sort: torch.topk promises no order among equals.
        ranked = log_p_BC.sort(dim=1, descending=True, stable=True)
        rest_B1 = ranked.values[:, self.kept :].logsumexp(1, keepdim=True)
        log_p_BN = torch.cat([ranked.values[:, : self.kept], rest_B1], 1).to(STORED_DTYPES[self.dtype])
        return {LOG_P: log_p_BN, CLASSES: ranked.indices[:, : self.kept].to(torch.int16)}

    def blank(self, count: int, device: torch.device) -> Labels:
        """Valid columns of so many samples that no teacher has seen."""
        log_p = torch.zeros((count, self.widths[LOG_P]), dtype=STORED_DTYPES[self.dtype], device=device)
        if self.dense:
            return {LOG_P: log_p}
        return {LOG_P: log_p, CLASSES: torch.arange(self.kept, dtype=torch.int16, device=device).repeat(count, 1)}

    def divergence(self, logits_BC: Tensor, labels: Labels) -> Tensor:
        """What is lost: KL of the truncated teacher from the full one, in nats, fp64 (B,).

        Args:
            logits_BC: of the teacher.
            labels: what was made of them.
        """
        full_BC = logits_BC.double().log_softmax(1)
        other_BC = labels[LOG_P].double().log_softmax(1) if self.dense else self._spread(labels)
        # 0 ln 0 = 0
        return torch.where(full_BC.exp() == 0, 0.0, full_BC.exp() * (full_BC - other_BC)).sum(1)

    def _spread(self, labels: Labels) -> Tensor:
        """Log-probabilities (B, C), fp64, of what is kept, with the rest of the mass spread evenly."""
        log_p_BN = labels[LOG_P].double()
        each_B1 = log_p_BN[:, -1:] - math.log(self.classes - self.kept)
        return each_B1.repeat(1, self.classes).scatter(1, labels[CLASSES].long(), log_p_BN[:, :-1]).log_softmax(1)


def truncation(classes: int, kept: int | None, dtype: StoredDtype) -> Truncation:
    """The truncation that a recipe names.

    Args:
        classes: of the data set.
        kept: `teacher.store_classes`; None: all of up to 100, else 16.
        dtype: `teacher.store_dtype`.
    """
    return Truncation(classes, kept_classes(classes, kept), dtype)


def kept_probabilities(log_p_BN: Tensor, classes: int, temperature: float = 1.0) -> Tensor:
    """Probabilities at a temperature of the kept classes; what they leave to 1 is all other classes together.

    Args:
        log_p_BN: (B, M + 1), at temperature 1, of M < C classes and of all others together; fp16 is taken to fp32.
        classes: C.
        temperature: t, above 0.

    Returns:
        (B, M): p^(1/t) / (sum p^(1/t) + (C - M) (r / (C - M))^(1/t)), r being what the kept leave at temperature 1.
    """
    log_p_BN = log_p_BN if log_p_BN.dtype == torch.float64 else log_p_BN.float()
    others = math.log(classes - log_p_BN.shape[1] + 1)
    log_rest_B1 = others + (log_p_BN[:, -1:] - others) / temperature
    # Rounded, they add up to 1 no more: softmax sees to that.
    return torch.cat([log_p_BN[:, :-1] / temperature, log_rest_B1], 1).softmax(1)[:, :-1].contiguous()
