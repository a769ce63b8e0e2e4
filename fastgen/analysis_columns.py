"""What an analysis keeps of each sample: a few numbers in place of C probabilities of every network.

Each function condenses some samples, row by row, so the columns of a whole set are those of its parts, joined: how a
set is cut into parts has no say in any bit of them. Everything else is computed from whole columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from fastgen.measuring import rank_of_label

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Columns = TypeVar("Columns", bound=DataclassInstance)

# Of a sorted row of scores, the first so many are kept; of the classes beside the label, the first so many.
SORTED_SCORES = 10
OTHERS = 5


@dataclass(frozen=True)
class TrainingColumns:
    """Of each training sample, what one network says: 80 bytes in all for ten or more classes.

    Attributes:
        labels_N: int64.
        top_NR: fp32, the R = min(C, 10) largest probabilities, the largest first.
        label_p_N: fp32, p_y.
        kin_p_N: fp32, mass of the other classes of the label's group; zeros where classes have no groups.
        rank_N: int32, how many classes rank before the label.
        others_NJ: int32, the J = min(5, C - 1) highest-scored classes other than the label, the highest first; among
            equal scores the lowest class.
    """

    labels_N: Tensor
    top_NR: Tensor
    label_p_N: Tensor
    kin_p_N: Tensor
    rank_N: Tensor
    others_NJ: Tensor


@dataclass(frozen=True)
class EvaluationColumns:
    """Of each evaluation sample, what M networks say, and E predictors: the networks, and the ensemble of them all.

    Attributes:
        first_NM: int64, the class that ranks first; among equal scores the lowest.
        kl_NMM: fp64, KL(p_a || p_b) of the networks a and b, in nats.
        confidence_NE: fp64, p_a1.
        hit_NE: bool, whether the label ranks first.
        nll_NE: fp64, -ln p_y, in nats.
        first_members_hit_NM: bool, whether the mean softmax of the first 1 .. M networks ranks the label first.
        last_members_hit_NM: bool, the same of the last 1 .. M networks.
    """

    first_NM: Tensor
    kl_NMM: Tensor
    confidence_NE: Tensor
    hit_NE: Tensor
    nll_NE: Tensor
    first_members_hit_NM: Tensor
    last_members_hit_NM: Tensor


def training_columns(logits_BC: Tensor, labels_B: Tensor, group_of_class_C: Tensor | None) -> TrainingColumns:
    """Condenses samples of the training set.

    Args:
        logits_BC: fp32, finite.
        labels_B: int64.
        group_of_class_C: int64; None: classes have no groups.
    """
    p_BC = logits_BC.log_softmax(1).exp()
    label_p_B = p_BC.gather(1, labels_B[:, None])[:, 0]
    beside_BC = logits_BC.scatter(1, labels_B[:, None], -math.inf)
    ranked_BC = beside_BC.sort(dim=1, descending=True, stable=True).indices
    if group_of_class_C is None:
        kin_p_B = torch.zeros_like(label_p_B)
    else:
        kin_BC = (group_of_class_C == group_of_class_C[labels_B][:, None]).scatter(1, labels_B[:, None], False)
        kin_p_B = torch.where(kin_BC, p_BC, 0.0).sum(1)
    return TrainingColumns(
        labels_N=labels_B,
        top_NR=p_BC.topk(min(SORTED_SCORES, p_BC.shape[1]), dim=1).values,
        label_p_N=label_p_B,
        kin_p_N=kin_p_B,
        rank_N=rank_of_label(logits_BC, labels_B).int(),
        others_NJ=ranked_BC[:, : min(OTHERS, p_BC.shape[1] - 1)].int(),
    )


def evaluation_columns(logits: Sequence[Tensor], labels_B: Tensor) -> EvaluationColumns:
    """Condenses samples of the evaluation set. Memory: about 40 M C bytes a sample.

    Args:
        logits: (B, C) of each network, fp32, finite.
        labels_B: int64.
    """
    # The same probabilities as measuring.py has: errors of ensembles are those of results.json, to the last tie.
    p_MBC = torch.stack([z_BC.log_softmax(1).exp() for z_BC in logits]).double()
    ensemble = [p_MBC.mean(0)] if len(logits) > 1 else []
    log_p_label = [z_BC.log_softmax(1).gather(1, labels_B[:, None])[:, 0].double() for z_BC in logits]
    # A class that no member gives any mass: the smallest double stands for it.
    smallest = torch.finfo(torch.float64).tiny
    log_p_label += [p_BC.gather(1, labels_B[:, None])[:, 0].clamp_min(smallest).log() for p_BC in ensemble]
    members = range(1, len(logits) + 1)
    return EvaluationColumns(
        first_NM=torch.stack([first_class(z_BC) for z_BC in logits], 1),
        kl_NMM=_divergences(logits),
        confidence_NE=torch.stack([p_BC.max(1).values for p_BC in (*p_MBC, *ensemble)], 1),
        hit_NE=torch.stack([rank_of_label(scores_BC, labels_B) == 0 for scores_BC in (*logits, *ensemble)], 1),
        nll_NE=-torch.stack(log_p_label, 1),
        first_members_hit_NM=torch.stack([_hits(p_MBC[:count], labels_B) for count in members], 1),
        last_members_hit_NM=torch.stack([_hits(p_MBC[-count:], labels_B) for count in members], 1),
    )


def first_class(scores_BC: Tensor) -> Tensor:
    """The class that ranks first, int64 (B,); among equal scores the lowest, which `argmax` does not promise."""
    classes_C = torch.arange(scores_BC.shape[1], device=scores_BC.device)
    largest_B1 = scores_BC.max(1, keepdim=True).values
    return torch.where(scores_BC == largest_B1, classes_C, scores_BC.shape[1]).min(1).values


def joined(parts: Sequence[Columns]) -> Columns:
    """The columns of all samples of the parts, in order, on the CPU."""
    names = [field.name for field in fields(parts[0])]
    return type(parts[0])(*(torch.cat([getattr(part, name).cpu() for part in parts]) for name in names))


def _hits(p_MBC: Tensor, labels_B: Tensor) -> Tensor:
    return rank_of_label(p_MBC.mean(0), labels_B) == 0


def _divergences(logits: Sequence[Tensor]) -> Tensor:
    """KL(p_a || p_b) in fp64 (B, M, M): of near equals it is far smaller than what fp32 leaves of their logarithms."""
    log_p = [z_BC.double().log_softmax(1) for z_BC in logits]
    rows = [torch.stack([(a_BC.exp() * (a_BC - b_BC)).sum(1) for b_BC in log_p], 1) for a_BC in log_p]
    return torch.stack(rows, 1)
