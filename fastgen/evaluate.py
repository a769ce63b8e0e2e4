"""Measures networks: errors, ensemble, confidence, calibration. Also a command.

    python -m fastgen.evaluate RUN_FOLDER [--analyse [--against RUN_FOLDER ...]] [--section.key=value ...]
    python -m fastgen.evaluate WEIGHTS.safetensors --cfg RECIPE.yaml [--section.key=value ...]

The command is one process. How networks are measured, by one process or several: `measuring.py`. What `--analyse` tells
besides: `analysis.py`.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from fastgen.augment import Normaliser
from fastgen.checkpoint import load_weights, read_weights
from fastgen.config import Recipe
from fastgen.data import build_loader, open_dataset
from fastgen.data.batch import Loader
from fastgen.data.facts import Facts
from fastgen.data.split import AnySplit, Dataset
from fastgen.device import choose_device
from fastgen.distributed import ALONE, Group
from fastgen.errors import UserError, command
from fastgen.layout import channels_last
from fastgen.measuring import Examination, Measurement, measure, measure_ensemble
from fastgen.models import network_of
from fastgen.progress import Display, PatientConsole
from fastgen.recipe import read_recipe
from fastgen.record import generations_in
from fastgen.tables import measurement_table, print_table
from fastgen.unseen import require_same_classes, require_same_network, require_unseen

USAGE = "python -m fastgen.evaluate RUN_FOLDER [--analyse [--against RUN_FOLDER ...]]"


class WithFacts(Protocol):
    """A data set, or as much of one as a network must know."""

    @property
    def facts(self) -> Facts:
        """Of the data set that the network is for."""
        ...


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
    recipe: Recipe, dataset: WithFacts, weights: Path, device: torch.device, group: Group = ALONE
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
    group.in_turn(lambda: _load(recipe, weights, model) if group.main else None)
    model.load_state_dict(group.agree(model.state_dict()))
    return channels_last(model.to(device))


def _load(recipe: Recipe, weights: Path, model: nn.Module) -> None:
    require_same_network(weights, load_weights(weights, model), recipe.model)


def load_examined(recipe: Recipe, dataset: Dataset, weights: Path, device: torch.device) -> nn.Module:
    """A network that is to be measured on the data set's evaluation: see `load_network`.

    Raises:
        UserError: it may have learned from these images, or is of other classes, or another network.
    """
    _, description = read_weights(weights)
    require_unseen(weights, description, recipe, dataset)
    require_same_classes(weights, description, dataset)
    return load_network(recipe, dataset, weights, device)


def main(words: Sequence[str]) -> None:
    """The command."""
    if "--help" in words or "-h" in words:
        read_recipe(words, command=f"{USAGE}, or WEIGHTS.safetensors and")
    # A word without a value.
    analysed, words = "--analyse" in words, [word for word in words if word != "--analyse"]
    against, words = _against(words)
    if not words or words[0].startswith("-"):
        raise UserError(
            f"usage: {USAGE} [--section.key=value ...], or "
            "python -m fastgen.evaluate WEIGHTS.safetensors --cfg RECIPE.yaml [--section.key=value ...]"
        )
    if against and not analysed:
        raise UserError("--against compares analyses: give --analyse too")
    target, rest = Path(words[0]), list(words[1:])
    if analysed and not target.is_dir():
        raise UserError(f"{target}: --analyse needs a run folder")
    networks = _networks_of(target)
    if target.is_dir() and not any(word.startswith("--cfg") for word in rest):
        rest = [f"--cfg={target / 'recipe.yaml'}", *rest]
    recipe = read_recipe(rest, command="python -m fastgen.evaluate")
    if analysed:
        _analyse(recipe, target, against)
        return
    dataset = open_dataset(recipe)
    device = choose_device(recipe.run)
    rows = _measure_all(recipe, dataset, networks, device)
    print_table(measurement_table(rows, dataset))


def _against(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The run folders to compare with, and the other words; `--against A B`, as shells write A and B for a pattern."""
    folders, rest, left = list[str](), list[str](), deque(words)
    while left:
        word = left.popleft()
        name, _, value = word.partition("=")
        if name != "--against":
            rest.append(word)
            continue
        found = [value] if "=" in word else []
        while "=" not in word and left and not left[0].startswith("-"):
            found.append(left.popleft())
        if not found or "" in found:
            raise UserError("--against has no value: give --against RUN_FOLDER")
        folders += found
    return [Path(folder) for folder in folders], rest


def _analyse(recipe: Recipe, folder: Path, against: Sequence[Path]) -> None:
    from fastgen.analysis import analyse, write_analysis
    from fastgen.analysis_figures import draw_all
    from fastgen.analysis_tables import all_tables

    content = analyse(recipe, folder, against, Display(PatientConsole()))
    written = [write_analysis(folder, content), *draw_all(folder, content)]
    for table in all_tables(content):
        print_table(table)
    for line in content["notes"]:
        print(line)
    print("  ".join(map(str, written)))


def trained_in(run: Path) -> dict[int, Path]:
    """Weights files of a run's trained generations, in their order."""
    found = {generation: folder / "model.safetensors" for generation, folder in generations_in(run).items()}
    return {generation: path for generation, path in found.items() if path.exists()}


def _networks_of(target: Path) -> list[tuple[str, Path]]:
    if target.is_file():
        return [(target.name, target)]
    found = trained_in(target)
    if not found:
        raise UserError(f"{target}: is neither a weights file nor a run folder with a trained generation")
    return [(f"generation {generation}", path) for generation, path in found.items()]


def _measure_all(
    recipe: Recipe, dataset: Dataset, networks: Sequence[tuple[str, Path]], device: torch.device
) -> list[tuple[str, Measurement]]:
    loader = build_loader(recipe, dataset, dataset.evaluation, device)
    on = examination(recipe, dataset, dataset.evaluation, loader, device)
    rows, members = [], []
    for name, weights in networks:
        model = load_examined(recipe, dataset, weights, device)
        measurement, probabilities = measure(model, on)
        rows.append((name, measurement))
        members.append(probabilities)
    if len(members) > 1 and recipe.data.backend != "synthetic":
        labels = torch.from_numpy(dataset.evaluation.labels).to(device)
        rows.append((f"ensemble of {len(members)}", measure_ensemble(members, labels, recipe.gen.k)))
    return rows


if __name__ == "__main__":
    sys.exit(command(main, sys.argv[1:]))
