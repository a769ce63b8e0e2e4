"""What an analysis tells, computed from columns of whole sets (`analysis_columns.py`): pure functions, in fp64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastgen.measuring import CALIBRATION_BINS

PERCENTILES = (5, 25, 50, 75, 95)
# Classes 2..5 of a row; and the classes beside the label that are asked for their group.
SECONDARY = 4


@dataclass(frozen=True)
class Reliability:
    """Calibration of p_a1 in equal bins (Guo et al., ICML 2017).

    Attributes:
        images: in each bin.
        confidence: mean p_a1 of each bin; None: the bin is empty.
        accuracy: share of each bin's images whose label ranks first; None: the bin is empty.
        ece: mean over the images of |accuracy - confidence| of their bins, 0..1.
    """

    images: tuple[int, ...]
    confidence: tuple[float | None, ...]
    accuracy: tuple[float | None, ...]
    ece: float


def sorted_scores(top_NR: Tensor) -> tuple[list[float], list[list[float]]]:
    """How the r-th largest score is distributed over the images (arXiv 1805.05551, Figure 1, left).

    Args:
        top_NR: the largest probabilities of each image, the largest first.

    Returns:
        the mean of each rank; and the PERCENTILES of each rank, linear between neighbours: [rank][percentile].
    """
    at = torch.tensor(PERCENTILES, dtype=torch.float64) / 100
    columns = [top_NR[:, rank].double() for rank in range(top_NR.shape[1])]
    # torch.quantile refuses more than 16 million values; a sorted column is asked directly.
    return [column.mean().item() for column in columns], [_quantiles(column, at) for column in columns]


def _quantiles(values_N: Tensor, at: Tensor) -> list[float]:
    ordered_N = values_N.sort().values
    place = at * (len(ordered_N) - 1)
    low, high = ordered_N[place.floor().long()], ordered_N[place.ceil().long()]
    return (low + (high - low) * place.frac()).tolist()


def secondary_mass(top_NR: Tensor) -> float:
    """Mean mass of classes 2..5, or of as many as there are."""
    return top_NR[:, 1 : 1 + SECONDARY].double().sum(1).mean().item()


def second_best_counts(labels_N: Tensor, others_NJ: Tensor, classes: int) -> Tensor:
    """Of the images of class y, how many have class j as second-best (arXiv 1805.05551, Figure 1, right).

    The second-best class is the highest-scored class **other than the label**. Of an image whose label ranks first that
    is the class that ranks second. Of one whose label does not, the class that ranks second may be the label itself,
    which is no secondary class; and so every image counts once, whatever the network's error.

    Args:
        labels_N: int64.
        others_NJ: classes other than the label, the highest-scored first.
        classes: C.

    Returns:
        int64 (C, C), 8 C^2 bytes: [y, j]; the diagonal is 0, a row adds up to the images of its class.
    """
    pairs_N = labels_N * classes + others_NJ[:, 0].long()
    return torch.bincount(pairs_N, minlength=classes * classes).reshape(classes, classes)


def in_blocks(counts_CC: Tensor, per_cell: int) -> Tensor:
    """Sums of square blocks of so many neighbouring classes; the last row and column may be of fewer."""
    classes = len(counts_CC)
    cells = -(-classes // per_cell)
    cell_C = torch.arange(classes) // per_cell
    rows = torch.zeros(cells, classes, dtype=counts_CC.dtype).index_add_(0, cell_C, counts_CC)
    return torch.zeros(cells, cells, dtype=counts_CC.dtype).index_add_(1, cell_C, rows)


def shares_of_rows(counts_CC: Tensor) -> Tensor:
    """Each row over its sum, fp64; a row of zeros stays one."""
    return counts_CC.double() / counts_CC.sum(1, keepdim=True).clamp_min(1)


def others_in_group(labels_N: Tensor, others_NJ: Tensor, group_of_class_C: Tensor) -> float:
    """Mean number, of the four highest-scored classes other than the label, that are of the label's group."""
    kin_NJ = group_of_class_C[others_NJ.long()] == group_of_class_C[labels_N][:, None]
    return kin_NJ[:, :SECONDARY].double().sum(1).mean().item()


def top5_in_group(labels_N: Tensor, rank_N: Tensor, others_NJ: Tensor, group_of_class_C: Tensor) -> float:
    """Mean number of the five classes that rank first that are of the label's group, the label among them."""
    kin_NJ = group_of_class_C[others_NJ.long()] == group_of_class_C[labels_N][:, None]
    # The label takes one of the five places, or it ranks behind them and the five are all others.
    among_N = rank_N <= SECONDARY
    found_N = torch.where(among_N, 1 + kin_NJ[:, :SECONDARY].sum(1), kin_NJ.sum(1))
    return found_N.double().mean().item()


def others_in_group_by_chance(labels_N: Tensor, group_of_class_C: Tensor) -> float:
    """What `others_in_group` would be if the other classes were ranked at random: 4 x 4 / 99 for CIFAR-100."""
    sizes = torch.bincount(group_of_class_C)
    beside = len(group_of_class_C) - 1
    kin_N = (sizes[group_of_class_C[labels_N]] - 1).double()
    return min(SECONDARY, beside) * kin_N.mean().item() / beside


def reliability(confidence_N: Tensor, hit_N: Tensor, bins: int = CALIBRATION_BINS) -> Reliability:
    """Accuracy beside confidence, in bins [b / bins, (b + 1) / bins); the last one holds 1 too.

    Args:
        confidence_N: fp64, p_a1.
        hit_N: bool.
        bins: how many.
    """
    bin_N = (confidence_N * bins).long().clamp(max=bins - 1)
    images = torch.bincount(bin_N, minlength=bins)
    confidence = torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_N, confidence_N)
    hits = torch.bincount(bin_N[hit_N], minlength=bins).double()
    ece = (hits - confidence).abs().sum().item() / max(len(confidence_N), 1)
    return Reliability(
        images=tuple(images.tolist()),
        confidence=_over(confidence, images),
        accuracy=_over(hits, images),
        ece=ece,
    )


def _over(sums: Tensor, images: Tensor) -> tuple[float | None, ...]:
    pairs = zip(sums.tolist(), images.tolist(), strict=True)
    return tuple(total / count if count else None for total, count in pairs)


def agreement(first_NM: Tensor) -> Tensor:
    """Share of the samples that two networks rank the same class first of: fp64 (M, M), ones on the diagonal."""
    networks = first_NM.unbind(1)
    return torch.stack([torch.stack([(a_N == b_N).double().mean() for b_N in networks]) for a_N in networks])


def error_percent(hit_N: Tensor) -> float:
    """Share of the samples whose label does not rank first, in percent."""
    return 100 * (1 - hit_N.double().mean().item())
