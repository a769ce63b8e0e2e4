"""Measures networks and ensembles: each sample once, and with the same bits however many processes share the work.

Plain PyTorch, always fp32, no training kernel. The unit is the evaluation batch of one process: process r of W takes
batches r, r + W, r + 2 W, ... whole. So each sample passes through the network in the same batch, whatever W; and what
processes tell each other is a row of sums for each batch, which are added up in the order of the batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from fastgen.augment import Normaliser
from fastgen.crops import Int64
from fastgen.data.batch import Loader
from fastgen.distributed import ALONE, Group
from fastgen.errors import Stopped
from fastgen.stop import StopRequest
from fastgen.views import EpochViews

CALIBRATION_BINS = 15
EVALUATION_BATCH = 500
# Of a batch: samples; wrong at 1, wrong at 5, p_a1, p_y, mass of classes 2..K, mass of classes 2..C, negative
# log-likelihood; and of each bin count, hits and confidence.
_COLUMNS = (1, 7, 3 * CALIBRATION_BINS)


@dataclass(frozen=True)
class Measurement:
    """What a network, or an ensemble, does on a set of samples.

    Attributes:
        samples: how many were counted.
        top1_error, top5_error: percent; among equal scores the lowest class ranks first.
        mean_confidence: mean of p_a1, the probability of the first class.
        mean_label_confidence: mean of p_y.
        topk_share: s, the share of the mass beside the first class that lies in classes 2..K.
        nll: mean negative log-likelihood of the label, in nats.
        ece: expected calibration error of p_a1 in 15 equal bins (Guo et al., ICML 2017), 0..1.
    """

    samples: int
    top1_error: float
    top5_error: float
    mean_confidence: float
    mean_label_confidence: float
    topk_share: float
    nll: float
    ece: float


class Tally:
    """Sums of each batch, on the device, from which a Measurement is read once.

    Args:
        k: K of the top-K share.
        group: whose processes read it together. This one adds batches r, r + W, r + 2 W, ..., in this order.
    """

    def __init__(self, k: int, group: Group = ALONE) -> None:
        self._k, self._group = k, group
        self._samples: list[int] = []
        self._rows: list[Tensor] = []

    def add(self, scores_BC: Tensor, log_p_BC: Tensor, labels_B: Tensor) -> None:
        """Counts this process's next batch.

        Args:
            scores_BC: what classes are ranked by: logits, or an ensemble's probabilities.
            log_p_BC: log-probabilities, fp32.
            labels_B: int64.
        """
        rank_B = rank_of_label(scores_BC, labels_B)
        # A row that is not a number gives no class any probability; its label gets the smallest one.
        log_p_BC = log_p_BC.nan_to_num(nan=math.log(torch.finfo(torch.float32).tiny))
        p_BC = log_p_BC.exp()
        top_BK, order_BK = p_BC.topk(min(self._k, p_BC.shape[1]), dim=1)
        # Added up by itself: of a network that is all but sure, 1 - p_a1 in fp32 is rounding alone.
        beside_B = p_BC.scatter(1, order_BK[:, :1], 0.0).sum(1)
        log_p_label_B = log_p_BC.gather(1, labels_B[:, None])[:, 0]
        first_B = top_BK[:, 0].double()
        hit_B = (rank_B == 0).double()
        rows = (1 - hit_B, rank_B >= 5, first_B, log_p_label_B.exp(), top_BK[:, 1:].sum(1), beside_B, -log_p_label_B)
        sums = torch.stack([row.double().sum() for row in rows])
        bin_B = (first_B * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
        in_bin = torch.nn.functional.one_hot(bin_B, CALIBRATION_BINS).double()
        # No matrix product: how a library shares one out among threads may decide its last bits.
        bins = (torch.stack([torch.ones_like(hit_B), hit_B, first_B])[:, :, None] * in_bin).sum(1)
        self._samples.append(len(labels_B))
        self._rows.append(torch.cat([sums, bins.reshape(-1)]))

    def read(self, stopped_by: int = 0) -> Measurement:
        """Waits for the device and the other processes, and tells the means, the same bits everywhere.

        Args:
            stopped_by: number of the signal for which this process has left batches out, or 0.

        Raises:
            Stopped: this process, or another one, was stopped by a signal; all of them raise it.
        """
        count, sums, bins = self._total(stopped_by).split(_COLUMNS)
        samples = int(count.item())
        wrong1, wrong5, first, label, rest, beside, nll = (sums / max(samples, 1)).tolist()
        _, hits, confidence = bins.reshape(3, CALIBRATION_BINS)
        ece = (hits - confidence).abs().sum().item() / max(samples, 1)
        share = rest / beside if beside > 0 else 0.0
        return Measurement(samples, 100 * wrong1, 100 * wrong5, first, label, share, nll, ece)

    def _total(self, stopped_by: int) -> Tensor:
        """The sums over the batches of all processes, fp64 on the CPU, added up in the order of the batches."""
        rank, world = self._group.rank, self._group.world
        own = [rank + turn * world for turn in range(len(self._rows))]
        stopped_by, batches = self._group.most([stopped_by, own[-1] + 1 if own else 0])
        if stopped_by:
            raise Stopped(stopped_by)
        rows = torch.zeros(batches, sum(_COLUMNS), dtype=torch.float64)
        if own:
            rows[own, 0] = torch.tensor(self._samples, dtype=torch.float64)
            rows[own, 1:] = torch.stack(self._rows).cpu()
        total = torch.zeros(sum(_COLUMNS), dtype=torch.float64)
        # Each row comes from one process, and zeros from the others: the sum over processes rounds nothing.
        for row in self._group.sum(rows):
            total += row
        return total


def rank_of_label(scores_BC: Tensor, labels_B: Tensor) -> Tensor:
    """How many classes rank before the label; among equal scores the lowest class ranks first.

    Returns:
        int64 (B,), 0 where the label ranks first.
    """
    label_score_B1 = scores_BC.gather(1, labels_B[:, None])
    classes_C = torch.arange(scores_BC.shape[1], device=scores_BC.device)
    before_BC = (scores_BC > label_score_B1) | ((scores_BC == label_score_B1) & (classes_C < labels_B[:, None]))
    # A score that is not a number ranks nowhere: count such a row as wrong.
    broken_B = scores_BC.isnan().any(dim=1)
    return torch.where(broken_B, scores_BC.shape[1], before_BC.sum(1))


def own_part(order: Int64, group: Group) -> Int64:
    """What passes through this process: its batches of an evaluation, whole, one after the other.

    Args:
        order: int64 (N,), of the whole evaluation; see `EpochViews`.
        group: whose processes share it; one of them may have no batch at all.

    Returns:
        int64, the part of the order.
    """
    batch_of = np.arange(len(order)) // EVALUATION_BATCH
    return order[batch_of % group.world == group.rank]


@dataclass(frozen=True)
class Examination:
    """What networks are measured on: the same samples in the same batches.

    Attributes:
        loader: of the samples that the views are of, in every process.
        views: from `Dataset.evaluation_views`, of the whole evaluation.
        normalise: fp32.
        k: K of the top-K share.
        device: where networks and loader are.
        group: whose processes share the work.
    """

    loader: Loader
    views: EpochViews
    normalise: Normaliser
    k: int
    device: torch.device
    group: Group = ALONE


@torch.no_grad()
def measure(
    model: nn.Module, on: Examination, stop: StopRequest | None = None, *, keep: bool = True
) -> tuple[Measurement, Tensor]:
    """Runs a network in eval mode over evaluation views; its mode is put back afterwards.

    All processes of the group call this.

    Args:
        model: fp32, on the device, with the same weights in every process.
        on: samples, views and processes.
        stop: asked before each batch. A process that is asked to stop waits for the others, which finish their batches.
        keep: False: no probabilities are kept, which for a training set of ILSVRC2012 would be 5 GB.

    Returns:
        the measurement, the same everywhere; and the probabilities (n, C), fp32, on the device, of this process's own
        samples, in the order of `own_part` (all of them where it is alone; empty if there are none, or none are kept).

    Raises:
        Stopped: a signal came, to this process or another one; all of them raise it.
    """
    was_training = model.training
    model.eval()
    tally, stopped_by = Tally(on.k, on.group), 0
    probabilities = []
    for batch in on.loader.batches(replace(on.views, order=own_part(on.views.order, on.group)), EVALUATION_BATCH):
        stopped_by = stop.number if stop is not None else 0
        if stopped_by:
            break
        logits_BC = model(on.normalise(batch.images_NCHW)).float()
        log_p_BC = logits_BC.log_softmax(1)
        tally.add(logits_BC, log_p_BC, batch.labels)
        if keep:
            probabilities.append(log_p_BC.exp())
    model.train(was_training)
    # Nobody leaves before: the others wait for what this process tells.
    measurement = tally.read(stopped_by)
    return measurement, torch.cat(probabilities) if probabilities else torch.empty(0, device=on.device)


def measure_ensemble(probabilities: Sequence[Tensor], labels: Tensor, k: int, group: Group = ALONE) -> Measurement:
    """Measures the mean softmax of several networks, an evaluation batch at a time.

    Memory: what is given, 4 n C bytes a network in each process, n = N / W of N samples (200 MB / W for the 50,000
    of ILSVRC2012); beside it no more than a batch of every network as doubles.

    Args:
        probabilities: (n, C) of each network, from `measure`: of this process's own samples.
        labels: int64 (n,), of the same samples in the same order.
        k: K of the top-K share.
        group: whose processes share the samples; all of them call this.

    Returns:
        the measurement over the samples of all processes, the same everywhere.
    """
    tally = Tally(k, group)
    for begin in range(0, len(labels), EVALUATION_BATCH):
        part = slice(begin, begin + EVALUATION_BATCH)
        mean_BC = torch.stack([p[part].double() for p in probabilities]).mean(0)
        # A class that no member gives any mass has log-probability -inf; the smallest double stands for it.
        tally.add(mean_BC, mean_BC.clamp_min(torch.finfo(torch.float64).tiny).log(), labels[part])
    return tally.read()
