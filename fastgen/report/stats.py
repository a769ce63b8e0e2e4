"""Means over seeds, differences of pairs, and when two are told apart. Pure functions.

Runs of two recipes with the same seed are a pair: they may share their initial weights and their views, so what both
owe to the seed falls out of the difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from fastgen.spread import Spread, spread_of

Seed = TypeVar("Seed")

MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"


@dataclass(frozen=True)
class Difference:
    """First minus second, over pairs.

    Attributes:
        mean: of the differences.
        standard_error: of that mean, from their standard deviation; None: there are not two pairs.
        pairs: how many.
        p: of the paired t-test, two-sided; None: there are not two pairs, or they do not differ among themselves.
    """

    mean: float
    standard_error: float | None
    pairs: int
    p: float | None


def difference_of(first: Mapping[Seed, float], second: Mapping[Seed, float]) -> Difference | None:
    """Compares what two recipes have under the same seeds; None: there is no such seed."""
    differences = [first[seed] - second[seed] for seed in first if seed in second]
    found = spread_of(differences)
    if found is None:
        return None
    if found.deviation is None:
        return Difference(found.mean, None, 1, None)
    standard_error = found.deviation / math.sqrt(found.count)
    # Equal differences, to the last bits: an error rate counts images, so that happens, and tells nothing of a spread.
    flat = standard_error <= 1e-9 * max(map(abs, differences), default=0.0)
    p = None if flat else p_of_t(found.mean / standard_error, found.count - 1)
    return Difference(found.mean, 0.0 if flat else standard_error, found.count, p)


def p_of_t(t: float, freedom: int) -> float:
    """Probability that Student's t is as far from 0, on either side.

    Written out, as no dependency of fastgen's core has it (scipy comes with scikit-learn alone). Finite sums for whole
    degrees of freedom: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3, 26.7.4.

    Args:
        t: any number.
        freedom: degrees of freedom, at least 1.

    Returns:
        0..1, right to about 1e-15: smaller values are rounding.
    """
    angle = math.atan(abs(t) / math.sqrt(freedom))
    cosine, odd = math.cos(angle), freedom % 2
    # 1, c^2/2, c^4 3/8, ... of even ones; c, c^3 2/3, c^5 8/15, ... of odd ones.
    term, total = (cosine if odd else 1.0), 0.0
    for power in range(2 + odd, freedom + 1, 2):
        total += term
        term *= cosine * cosine * (power - 1) / power
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return min(1.0, max(0.0, 1 - inside))


def spread_text(found: Spread | None, digits: int = 2) -> str:
    """`86.74 ± 0.39`; a dash where nothing is known."""
    if found is None:
        return DASH
    deviation = "" if found.deviation is None else f" ± {found.deviation:.{digits}f}"
    return f"{found.mean:,.{digits}f}{deviation}"


def difference_text(found: Difference | None) -> str:
    """`−0.58 ± 0.24`, with its standard error."""
    if found is None:
        return DASH
    error = "" if found.standard_error is None else f" ± {found.standard_error:.2f}"
    return f"{signed(found.mean)}{error}"


def signed(value: float) -> str:
    """With a sign before two digits, and none before a zero."""
    text = f"{value:+.2f}"
    return "0.00" if float(text) == 0 else text.replace("-", MINUS)


def p_text(p: float | None) -> str:
    """`p = 0.14`."""
    if p is None:
        return "no test"
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"
