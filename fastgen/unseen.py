"""What a weights file tells of its training, and what may be believed of a network that one is told so little of.

A network that has learned from the images that it is measured on says nothing; nor does a teacher that knows those
that its student is measured on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastgen.config import ModelSettings, Recipe, hash_of
from fastgen.data.split import Dataset
from fastgen.errors import UserError

# Keys of a description that tell which images it has learned from, and of which classes.
ORIGIN = ("holdout", "data", "class_names")


def origin(recipe: Recipe, dataset: Dataset) -> dict[str, Any]:
    """What a network's description tells of the images that it learned from."""
    return {
        "holdout": recipe.data.holdout,
        "data": dataset.train_hash,
        "class_names": hash_of(list(dataset.class_names)),
    }


def require_unseen(weights: Path, description: Mapping[str, Any], recipe: Recipe, dataset: Dataset) -> None:
    """Refuses a network that may have learned from the images that are held out here.

    Args:
        weights: its file, for the line.
        description: that the file holds, `checkpoint.read_weights`.
        recipe, dataset: of the evaluation. Test images are nobody's training images.

    Raises:
        UserError: other images were held out of its training, none, or it does not tell.
    """
    if dataset.evaluated_on != "holdout":
        return
    asked = recipe.data.holdout
    if "holdout" not in description:
        raise UserError(
            f"{weights}: does not tell which images were held out of its training, so it may know the {asked} of "
            "data.holdout: leave data.holdout out"
        )
    if description["holdout"] != asked:
        raise UserError(
            f"{weights}: was trained with data.holdout = {description['holdout']}, so it may know the {asked} images "
            f"that are held out here: give data.holdout={description['holdout']}"
        )
    if description.get("data", dataset.train_hash) != dataset.train_hash:
        raise UserError(
            f"{weights}: was trained on other images than {recipe.data.root} holds, so nobody knows which of these it "
            "has seen: leave data.holdout out, or name its own data with data.root"
        )


def require_same_classes(weights: Path, description: Mapping[str, Any], dataset: Dataset) -> None:
    """Refuses a network of other classes, though as many.

    Raises:
        UserError: it is one.
    """
    own = hash_of(list(dataset.class_names))
    if description.get("class_names", own) != own:
        raise UserError(f"{weights}: was trained for other classes than those of this data set")


def require_same_network(weights: Path, description: Mapping[str, Any], model: ModelSettings) -> None:
    """Refuses weights of another network, where the shapes of its tensors do not tell.

    Raises:
        UserError: they are.
    """
    told = description.get("model")
    if told is None:
        return
    # Memory alone: the same function of the same weights.
    wanted = replace(model, memory_efficient=False)
    there = {**told, "memory_efficient": False}
    differing = [name for name, value in there.items() if value != getattr(wanted, name, value)]
    if differing:
        name = differing[0]
        raise UserError(
            f"{weights}: has model.{name} = {there[name]}, the recipe has {getattr(model, name)}: make them equal"
        )
