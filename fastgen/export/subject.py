"""What is exported: one generation of a run, or the ensemble of some of them."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastgen.checkpoint import read_weights
from fastgen.config import Recipe
from fastgen.data.facts import Facts
from fastgen.errors import UserError
from fastgen.evaluate import load_network
from fastgen.source import OwnFacts, Source, facts_of
from fastgen.transfer_data import View, evaluation_view
from fastgen.unseen import ORIGIN


@dataclass(frozen=True)
class Member:
    """A generation's network.

    Attributes:
        generation: its number.
        node: its name in the store.
        origin: what its own file tells of the images that it learned from.
        model: fp32, in eval mode, on the CPU.
    """

    generation: int
    node: str | None
    origin: Mapping[str, Any]
    model: nn.Module

    def in_fp64(self) -> nn.Module:
        """The same network in double precision."""
        return copy.deepcopy(self.model).double()


@dataclass(frozen=True)
class Subject:
    """What is exported.

    Attributes:
        run: name of the run.
        recipe: of its networks.
        facts: of the data set that they are for.
        view: in which they are evaluated.
        members: one network, whose logits are given; or several, whose mean softmax is given.
    """

    run: str
    recipe: Recipe
    facts: Facts
    view: View
    members: tuple[Member, ...]

    @property
    def is_ensemble(self) -> bool:
        """Whether it gives probabilities, not logits."""
        return len(self.members) > 1

    @property
    def output(self) -> str:
        """What it gives for each class."""
        return "probabilities" if self.is_ensemble else "logits"

    @property
    def stem(self) -> str:
        """Its files' names without the suffix."""
        return stem_of([member.generation for member in self.members])

    def describe(self, members: Sequence[Member]) -> dict[str, Any]:
        """What each file carries of itself; keys that weights files of runs have mean the same there."""
        facts, view = self.facts, self.view
        described: dict[str, Any] = {
            "model": self.recipe.as_dict()["model"],
            "dataset": self.recipe.data.dataset,
            "classes": facts.classes,
            "channels": facts.channels,
            "height_px": view.side_px,
            "width_px": view.side_px,
            "mean": list(facts.mean),
            "std": list(facts.std),
            "generations": [member.generation for member in members],
            "nodes": [member.node for member in members],
        }
        if len(members) == 1:
            described |= {"generation": members[0].generation, "node": members[0].node, **members[0].origin}
        return described


def stem_of(generations: Sequence[int]) -> str:
    """`generation_3`, or `ensemble_0-3`."""
    first, last = generations[0], generations[-1]
    return f"generation_{first}" if len(generations) == 1 else f"ensemble_{first}-{last}"


def canonical(value: Mapping[str, Any]) -> str:
    """JSON that is the same for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def chosen(source: Source, generation: int | None, ensemble: tuple[int, int] | None) -> list[int]:
    """The generations that are asked for, of those that the run has trained.

    Args:
        source: the run.
        generation: its number; None: the last one.
        ensemble: first and last member; None: a single generation is asked for.

    Raises:
        UserError: one of them is not trained; or the ensemble would be a single one.
    """
    trained = list(source.weights)
    if ensemble is None:
        wanted = [trained[-1] if generation is None else generation]
    else:
        wanted = list(range(ensemble[0], ensemble[1] + 1))
    missing = [number for number in wanted if number not in source.weights]
    if missing:
        raise UserError(f"{source.place}: generation {missing[0]} is not trained: there are {_listed(trained)}")
    return wanted


def whole_ensemble(source: Source) -> tuple[int, int]:
    """First and last generation of a run that has several.

    Raises:
        UserError: it has one alone, or one between them is missing.
    """
    trained = list(source.weights)
    if len(trained) == 1:
        raise UserError(f"{source.place}: has generation {trained[0]} alone, no ensemble: leave --ensemble out")
    gaps = sorted({*range(trained[0], trained[-1])} - {*trained})
    if gaps:
        raise UserError(
            f"{source.place}: generation {gaps[0]} is not trained: name the members, of {_listed(trained)}, as "
            "--ensemble=FIRST..LAST"
        )
    return trained[0], trained[-1]


def load_subject(source: Source, generations: Sequence[int]) -> Subject:
    """Loads the networks on the CPU.

    Raises:
        UserError: a weights file is damaged, or of another network than the recipe's.
    """
    members: list[Member] = []
    for number in generations:
        path = source.weights[number]
        _, description = read_weights(path)
        facts = facts_of(source.recipe, description.get("classes"))
        model = load_network(source.recipe, OwnFacts(facts), path, torch.device("cpu")).eval()
        told = {key: description[key] for key in ORIGIN if key in description}
        members.append(Member(number, description.get("node"), told, model))
    return Subject(source.name, source.recipe, facts, evaluation_view(source.recipe), tuple(members))


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
