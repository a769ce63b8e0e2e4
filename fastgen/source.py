"""Trained networks that a person names: a run folder's generations, or a weights file with its recipe."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastgen.checkpoint import read_weights
from fastgen.config import Recipe
from fastgen.data import open_dataset
from fastgen.data.facts import DATASETS, Facts
from fastgen.errors import UserError
from fastgen.evaluate import trained_in
from fastgen.recipe import read_recipe
from fastgen.transfer_data import evaluation_view


@dataclass(frozen=True)
class Source:
    """Networks that a person named.

    Attributes:
        place: as the person named it.
        recipe: of the networks.
        weights: file of each generation.
    """

    place: str
    recipe: Recipe
    weights: dict[int, Path]

    @property
    def name(self) -> str:
        """For headings."""
        path = Path(os.path.abspath(self.place))
        return path.stem if path.is_file() else path.name

    def as_dict(self) -> dict[str, Any]:
        """What a record tells of it."""
        recipe = self.recipe
        view = evaluation_view(recipe)
        return {
            "place": self.place, "model": recipe.model.name, "dataset": recipe.data.dataset, "view": view.text,
            "side_px": view.side_px,
        }  # fmt: skip


@dataclass(frozen=True)
class OwnFacts:
    """As much of a data set as a network must know: see `evaluate.load_network`."""

    facts: Facts


def open_source(place: str, cfg: str | None, overrides: Sequence[str], command: str) -> Source:
    """A run folder's generations, or a single weights file.

    Args:
        place: the folder or file.
        cfg: recipe of a weights file.
        overrides: `--section.key=value`, of the recipe.
        command: that asks, as a person starts it.

    Raises:
        UserError: it is neither, or a weights file without a recipe.
    """
    path = Path(place)
    if path.is_file():
        if cfg is None:
            raise UserError(f"{path}: a weights file does not tell its recipe: name it with --cfg RECIPE.yaml")
        _, description = read_weights(path)
        weights, recipe_file = {int(description.get("generation", 0)): path}, Path(cfg)
    else:
        weights = trained_in(path)
        recipe_file = path / "recipe.yaml"
    if not weights:
        raise UserError(f"{path}: is neither a weights file nor a run folder with a trained generation")
    recipe = read_recipe([f"--cfg={recipe_file}", *overrides], command=command)
    return Source(place, recipe, weights)


def facts_of(recipe: Recipe, classes: int | None) -> Facts:
    """Of the networks' own data set; it is opened only where its classes are told nowhere else."""
    facts = DATASETS[recipe.data.dataset]
    if facts.classes:
        return facts
    return replace(facts, classes=classes) if classes else open_dataset(recipe).facts


def readable_here(recipe: Recipe) -> Recipe:
    """The recipe with what reads its images on any machine: no GPU, no kernels, and nothing is downloaded."""
    # DALI may need a GPU, and reads the same files by the same manifest.
    backend = "folder" if recipe.data.backend == "dali" else recipe.data.backend
    data = replace(recipe.data, backend=backend, download=False)
    return replace(recipe, data=data, train=replace(recipe.train, kernels="torch"))
