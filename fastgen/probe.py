"""A linear classifier on frozen features, and how two of them are compared. numpy and scikit-learn, no torch.

Multinomial logistic regression with an L2 penalty (scikit-learn's, lbfgs) on features of mean 0 and standard deviation
1 over the training part. C, the inverse of the penalty's weight, is that of the highest mean accuracy in a stratified
cross-validation within the training part alone, among equals the smallest; features are standardised anew on what each
fold is fitted on.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastgen.data.split import Int64
from fastgen.errors import UserError
from fastgen.extras import install_line

CS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1e0, 1e1, 1e2)
# Few fits need the second number; what has not converged after that is told.
MOST_ITERATIONS = (1_000, 10_000)
NORMAL_95 = 1.959963984540054
SIGNIFICANCE = 0.05

Features = npt.NDArray[np.floating[Any]]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Probe:
    """What a classifier does on the pictures that it was not fitted on.

    Attributes:
        correct: bool (N,), of each picture.
        c: that cross-validation chose.
        cv_accuracy: mean over the folds at this C, 0..1, of training pictures alone.
        unconverged_fits: of the cross-validation, at any C.
        converged: whether the classifier itself did.
    """

    correct: Bools
    c: float
    cv_accuracy: float
    unconverged_fits: int
    converged: bool

    @property
    def accuracy(self) -> float:
        """Share of the pictures that it classifies rightly, 0..1."""
        return float(self.correct.mean())

    @property
    def at_edge(self) -> bool:
        """Whether C is the first or last of those tried: a better one may lie beyond."""
        return self.c in (CS[0], CS[-1])


@dataclass(frozen=True)
class Comparison:
    """Two classifiers on the same pictures.

    Attributes:
        difference: of the accuracies, first - second, -1..1.
        standard_error: of the difference, from the pairs.
        only_first, only_second: pictures that one alone classifies rightly.
        p: of McNemar's exact two-sided test, that a picture on which they differ is as likely to be of either kind.
    """

    difference: float
    standard_error: float
    only_first: int
    only_second: int
    p: float


def require_sklearn() -> None:
    """Checks that scikit-learn is there.

    Raises:
        UserError: it is not.
    """
    try:
        import sklearn.linear_model  # noqa: F401 (asked for, not used)
    except ImportError:
        raise UserError(f"fastgen.transfer needs scikit-learn: {install_line('scikit-learn')}") from None


def require_enough(labels: Int64, class_names: tuple[str, ...], folds: int) -> None:
    """Checks that each class has a training picture for each fold.

    Raises:
        UserError: one has not.
    """
    counts = np.bincount(labels, minlength=len(class_names))
    label = int(counts.argmin())
    if counts[label] < folds:
        fewer = f", or --folds={counts[label]}" if counts[label] > 1 else ""
        raise UserError(
            f"the class {class_names[label]} has {counts[label]} training pictures, too few for cross-validation in "
            f"{folds} parts: give it more{fewer}"
        )


def fits_of(folds: int) -> int:
    """How many classifiers `classify` fits."""
    return len(CS) * folds + 1


def classify(
    train_ND: Features, train_labels: Int64, val_ND: Features, val_labels: Int64, folds: int, seed: int,
    fitted: Callable[[], None],
) -> Probe:  # fmt: skip
    """Chooses C, fits on the whole training part, and measures on the other one.

    The same arguments give the same result on the same machine with the same number of threads.

    Args:
        train_ND, val_ND: features.
        train_labels, val_labels: int64 (N,).
        folds: parts of the cross-validation; every class has as many training pictures at least.
        seed: of the shuffle before the training part is divided.
        fitted: called after each fit.
    """
    from sklearn.model_selection import StratifiedKFold

    train, val = train_ND.astype(np.float64), val_ND.astype(np.float64)
    parts = list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(train, train_labels))
    unconverged, means = 0, []
    for c in CS:
        accuracies = []
        for kept, held in parts:
            model, converged = _fit(c, train[kept], train_labels[kept])
            accuracies.append(model.score(train[held], train_labels[held]))
            unconverged += not converged
            fitted()
        means.append(float(np.mean(accuracies)))
    best = int(np.argmax(means))
    model, converged = _fit(CS[best], train, train_labels)
    fitted()
    return Probe(model.predict(val) == val_labels, CS[best], means[best], unconverged, converged)


def _fit(c: float, features_ND: Features, labels: Int64) -> tuple[Any, bool]:
    """A fitted pipeline, and whether it converged."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    converged = False
    for iterations in MOST_ITERATIONS:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=iterations))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.fit(features_ND, labels)
        for warning in caught:
            if not issubclass(warning.category, ConvergenceWarning):
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        converged = not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
        if converged:
            break
    return model, converged


def wilson(correct: int, count: int) -> tuple[float, float]:
    """95 % interval of a share, 0..1 (Wilson, JASA 1927), for pictures drawn anew; count is 1 or more."""
    p, z = correct / count, NORMAL_95
    middle = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    # Exactly 0 and 1 at the ends, which rounding would miss.
    return middle - half if correct else 0.0, middle + half if correct < count else 1.0


def compare(first: Bools, second: Bools) -> Comparison:
    """Compares what two classifiers get right, bool (N,) each, of the same pictures (McNemar, Psychometrika 1947)."""
    from scipy.stats import binomtest

    count = len(first)
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    differing = only_first + only_second
    difference = (only_first - only_second) / count
    p = float(binomtest(only_first, differing).pvalue) if differing else 1.0
    return Comparison(difference, math.sqrt((differing / count - difference**2) / count), only_first, only_second, p)


def told_apart(p_values: list[float]) -> list[bool]:
    """Which of several tests are significant at 5 % by Holm's procedure (Scand. J. Statist. 1979)."""
    found = [False] * len(p_values)
    for rank, number in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[number] > SIGNIFICANCE / (len(p_values) - rank):
            break
        found[number] = True
    return found
