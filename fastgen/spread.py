"""Mean and standard deviation, over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Of so many values.

    Attributes:
        mean: of them.
        deviation: with n - 1 in the denominator; None: there are not two.
        count: how many.
    """

    mean: float
    deviation: float | None
    count: int


def spread_of(values: Sequence[float]) -> Spread | None:
    """None: there are no values."""
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.mean(values), deviation, len(values))
