"""Measures networks: errors, ensemble, confidence, calibration. Also a command.

    python -m fastgen.evaluate RUN_FOLDER [--section.key=value ...]
    python -m fastgen.evaluate WEIGHTS.safetensors --cfg RECIPE.yaml [--section.key=value ...]

The command is one process. How networks are measured, by one process or several: `measuring.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from fastgen.augment import Normaliser
from fastgen.checkpoint import load_weights
from fastgen.config import Recipe
from fastgen.data import build_loader, open_dataset
from fastgen.data.batch import Loader
from fastgen.data.split import AnySplit, Dataset
from fastgen.device import choose_device
from fastgen.distributed import ALONE, Group
from fastgen.errors import UserError, command
from fastgen.layout import channels_last
from fastgen.measuring import Examination, Measurement, measure, measure_ensemble
from fastgen.models import network_of
from fastgen.recipe import read_recipe
from fastgen.tables import measurement_table, print_table


def examination(
    recipe: Recipe, dataset: Dataset, split: AnySplit, loader: Loader, device: torch.device, group: Group = ALONE
) -> Examination:
    """What a recipe's networks are measured on.

    Args:
        split: of the dataset: which samples.
        loader: of the split, on the device.
        group: whose processes share the work.
    """
    normalise = Normaliser(dataset.facts.mean, dataset.facts.std, device, torch.float32)
    return Examination(loader, dataset.evaluation_views(split), normalise, recipe.gen.k, device, group)


def load_network(
    recipe: Recipe, dataset: Dataset, weights: Path, device: torch.device, group: Group = ALONE
) -> nn.Module:
    """The recipe's network with weights from a file, channels-last, on the device.

    Args:
        recipe, dataset: which network.
        weights: read by the main process alone, which tells the others: their hosts may see the file late, or never.
        device: of this process.
        group: whose processes load it; all of them call this.

    Raises:
        UserError: the weights are of another network.
        Told: the main process found that, or another fault of the file.
    """
    model = network_of(recipe.model, dataset.facts)
    group.in_turn(lambda: load_weights(weights, model) if group.main else None)
    model.load_state_dict(group.agree(model.state_dict()))
    return channels_last(model.to(device))


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
    on = examination(recipe, dataset, dataset.evaluation, loader, device)
    rows, members = [], []
    for name, weights in networks:
        model = load_network(recipe, dataset, weights, device)
        measurement, probabilities = measure(model, on)
        rows.append((name, measurement))
        members.append(probabilities)
    if len(members) > 1 and recipe.data.backend != "synthetic":
        labels = torch.from_numpy(dataset.evaluation.labels).to(device)
        rows.append((f"ensemble of {len(members)}", measure_ensemble(members, labels, recipe.gen.k)))
    return rows


if __name__ == "__main__":
    sys.exit(command(main, sys.argv[1:]))
