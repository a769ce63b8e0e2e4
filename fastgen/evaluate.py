"""Measures networks: errors, ensemble, confidence, calibration. Also a command.

    python -m fastgen.evaluate RUN_FOLDER [--section.key=value ...]
    python -m fastgen.evaluate WEIGHTS.safetensors --cfg RECIPE.yaml [--section.key=value ...]

Plain PyTorch, always fp32, no training kernel; each sample is counted exactly once.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastgen.augment import Normaliser
from fastgen.checkpoint import load_weights
from fastgen.config import Recipe
from fastgen.data import build_loader, open_dataset
from fastgen.data.batch import Loader
from fastgen.data.split import Dataset
from fastgen.device import choose_device
from fastgen.errors import UserError, command
from fastgen.models import build_model
from fastgen.recipe import read_recipe
from fastgen.stop import StopRequest
from fastgen.tables import measurement_table, print_table
from fastgen.views import EpochViews

CALIBRATION_BINS = 15
EVALUATION_BATCH = 500
ENSEMBLE_SLICE = 2048


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
    """Sums over batches, on the device, from which a Measurement is read once.

    Args:
        k: K of the top-K share.
        device: where the batches are.
    """

    def __init__(self, k: int, device: torch.device) -> None:
        self._k = k
        self._samples = 0
        # wrong at 1, wrong at 5, p_a1, p_y, mass of classes 2..K, negative log-likelihood
        self._sums = torch.zeros(6, dtype=torch.float64, device=device)
        # count, hits, confidence of each bin
        self._bins = torch.zeros(3, CALIBRATION_BINS, dtype=torch.float64, device=device)

    def add(self, scores_BC: Tensor, log_p_BC: Tensor, labels_B: Tensor) -> None:
        """Counts a batch.

        Args:
            scores_BC: what classes are ranked by: logits, or an ensemble's probabilities.
            log_p_BC: log-probabilities, fp32.
            labels_B: int64.
        """
        self._samples += len(labels_B)
        rank_B = rank_of_label(scores_BC, labels_B)
        # A row that is not a number gives no class any probability; its label gets the smallest one.
        log_p_BC = log_p_BC.nan_to_num(nan=math.log(torch.finfo(torch.float32).tiny))
        p_BC = log_p_BC.exp()
        top_BK = p_BC.topk(min(self._k, p_BC.shape[1]), dim=1).values
        log_p_label_B = log_p_BC.gather(1, labels_B[:, None])[:, 0]
        first_B = top_BK[:, 0].double()
        hit_B = (rank_B == 0).double()
        rows = (1 - hit_B, rank_B >= 5, first_B, log_p_label_B.exp(), top_BK[:, 1:].sum(1), -log_p_label_B)
        self._sums += torch.stack([row.double().sum() for row in rows])
        bin_B = (first_B * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
        in_bin = torch.nn.functional.one_hot(bin_B, CALIBRATION_BINS).double()
        self._bins += torch.stack([torch.ones_like(hit_B), hit_B, first_B]) @ in_bin

    def read(self) -> Measurement:
        """Waits for the device and tells the means."""
        wrong1, wrong5, first, label, rest, nll = (self._sums / max(self._samples, 1)).tolist()
        _, hits, confidence = self._bins
        ece = (hits - confidence).abs().sum().item() / max(self._samples, 1)
        beside = 1 - first
        share = rest / beside if beside > 0 else 0.0
        return Measurement(self._samples, 100 * wrong1, 100 * wrong5, first, label, share, nll, ece)


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


@torch.no_grad()
def measure(
    model: nn.Module,
    loader: Loader,
    views: EpochViews,
    normalise: Normaliser,
    k: int,
    device: torch.device,
    stop: StopRequest | None = None,
    *,
    keep: bool = True,
) -> tuple[Measurement, Tensor]:
    """Runs a network in eval mode over evaluation views; its mode is put back afterwards.

    Args:
        model: fp32, on the device.
        loader: of the samples that the views are of.
        views: from `Dataset.evaluation_views`.
        normalise: from `evaluation_normaliser`.
        k: K of the top-K share.
        device: where model and loader are.
        stop: asked before each batch.
        keep: False: no probabilities are kept, which for a training set of ILSVRC2012 would be 5 GB.

    Returns:
        the measurement, and the probabilities (N, C), fp32, on the device, in the views' order (empty if not kept).

    Raises:
        Stopped: a signal came.
    """
    was_training = model.training
    model.eval()
    tally = Tally(k, device)
    probabilities = []
    for batch in loader.batches(views, EVALUATION_BATCH):
        if stop is not None:
            stop.check()
        logits_BC = model(normalise(batch.images_NCHW)).float()
        log_p_BC = logits_BC.log_softmax(1)
        tally.add(logits_BC, log_p_BC, batch.labels)
        if keep:
            probabilities.append(log_p_BC.exp())
    model.train(was_training)
    return tally.read(), torch.cat(probabilities) if keep else torch.empty(0, device=device)


def measure_ensemble(probabilities: Sequence[Tensor], labels: Tensor, k: int) -> Measurement:
    """Measures the mean softmax of several networks.

    Args:
        probabilities: (N, C) of each network, for the same samples in the same order.
        labels: int64 (N,).
        k: K of the top-K share.
    """
    tally = Tally(k, labels.device)
    # In slices: 50,000 x 1,000 doubles of every member at once would be gigabytes.
    for begin in range(0, len(labels), ENSEMBLE_SLICE):
        part = slice(begin, begin + ENSEMBLE_SLICE)
        mean_BC = torch.stack([p[part].double() for p in probabilities]).mean(0)
        # A class that no member gives any mass has log-probability -inf; the smallest double stands for it.
        tally.add(mean_BC, mean_BC.clamp_min(torch.finfo(torch.float64).tiny).log(), labels[part])
    return tally.read()


def evaluation_normaliser(dataset: Dataset, device: torch.device) -> Normaliser:
    """The fp32 normalisation that every evaluation uses."""
    return Normaliser(dataset.facts.mean, dataset.facts.std, device, torch.float32)


def load_network(recipe: Recipe, dataset: Dataset, weights: Path, device: torch.device) -> nn.Module:
    """The recipe's network with weights from a file, channels-last, on the device.

    Raises:
        UserError: the weights are of another network.
    """
    model = build_model(recipe.model.name, dataset.facts.classes, dataset.facts.channels, recipe.model.downsample)
    load_weights(weights, model)
    return model.to(device).to(memory_format=torch.channels_last)


def main(words: Sequence[str]) -> None:
    """The command."""
    if "--help" in words or "-h" in words:
        read_recipe(words, command="python -m fastgen.evaluate RUN_FOLDER, or WEIGHTS.safetensors and")
    if not words or words[0].startswith("-"):
        raise UserError(
            "usage: python -m fastgen.evaluate RUN_FOLDER [--section.key=value ...], or "
            "python -m fastgen.evaluate WEIGHTS.safetensors --cfg RECIPE.yaml [--section.key=value ...]"
        )
    target, rest = Path(words[0]), list(words[1:])
    networks = _networks_of(target)
    if target.is_dir() and not any(word.startswith("--cfg") for word in rest):
        rest = [f"--cfg={target / 'recipe.yaml'}", *rest]
    recipe = read_recipe(rest, command="python -m fastgen.evaluate")
    dataset = open_dataset(recipe)
    device = choose_device(recipe.run)
    rows = _measure_all(recipe, dataset, networks, device)
    print_table(measurement_table(rows, dataset))


def _networks_of(target: Path) -> list[tuple[str, Path]]:
    if target.is_file():
        return [(target.name, target)]
    found = sorted(target.glob("generation_*/model.safetensors"), key=lambda path: int(path.parent.name.split("_")[1]))
    if not found:
        raise UserError(f"{target}: is neither a weights file nor a run folder with a trained generation")
    return [(path.parent.name.replace("_", " "), path) for path in found]


def _measure_all(
    recipe: Recipe, dataset: Dataset, networks: Sequence[tuple[str, Path]], device: torch.device
) -> list[tuple[str, Measurement]]:
    loader = build_loader(recipe, dataset, dataset.evaluation, device)
    views = dataset.evaluation_views(dataset.evaluation)
    normalise = evaluation_normaliser(dataset, device)
    rows, members = [], []
    for name, weights in networks:
        model = load_network(recipe, dataset, weights, device)
        measurement, probabilities = measure(model, loader, views, normalise, recipe.gen.k, device)
        rows.append((name, measurement))
        members.append(probabilities)
    if len(members) > 1 and recipe.data.backend != "synthetic":
        labels = torch.from_numpy(dataset.evaluation.labels).to(device)
        rows.append((f"ensemble of {len(members)}", measure_ensemble(members, labels, recipe.gen.k)))
    return rows


if __name__ == "__main__":
    sys.exit(command(main, sys.argv[1:]))
