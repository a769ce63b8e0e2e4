"""A library's network, tried on the shapes of a run before anything is begun.

What torchvision's and timm's networks take and give is known to them alone: sides of images, several outputs while they
train, batch-norms over a single value. So one is run once on tensors without memory (torch's meta device), forward and
backward, for each shape that will come; and where students will ask it as a teacher, it is folded once.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fastgen.config import Recipe
from fastgen.data.split import Dataset
from fastgen.errors import UserError
from fastgen.models import network_of
from fastgen.models.library import require_known
from fastgen.networks import library_and_name
from fastgen.shapes import Shape, part_shapes, view_sizes
from fastgen.step import DTYPES
from fastgen.teacher import first_line, make_teacher
from fastgen.views import Share

CPU, META = torch.device("cpu"), torch.device("meta")


def require_usable(recipe: Recipe, dataset: Dataset, world: int, *, taught: bool) -> None:
    """Tries a library's network; those of our own table are known to fit.

    Args:
        recipe: names it.
        dataset: of the run.
        world: processes of the run.
        taught: whether it will be a teacher.

    Raises:
        UserError: it cannot be used so; the line says why.
    """
    if library_and_name(recipe.model.name)[0] is None:
        return
    network = network_of(recipe.model, dataset.facts)
    if recipe.dist.batchnorm == "synchronised":
        _require_plain_batchnorms(recipe, network)
    phantom, facts = copy.deepcopy(network).to(META), dataset.facts
    for rank in range(world):
        for shape in part_shapes(recipe, dataset, Share(rank, world)):
            _try_training(recipe, phantom, shape, facts.channels, facts.classes, world)
    sides = _evaluation_sides(recipe, dataset)
    for side in sides:
        _try_evaluation(recipe, phantom, (2, *side), facts.channels, facts.classes)
    if taught:
        _try_teaching(recipe, network, (2, facts.channels, *sides[0]))


def require_named(name: str) -> None:
    """Checks a network's name where only its library knows.

    Raises:
        UserError: the library is not installed, or has no network of this name.
    """
    library, own_name = library_and_name(name)
    if library is not None:
        require_known(library, own_name)


def _evaluation_sides(recipe: Recipe, dataset: Dataset) -> list[tuple[int, int]]:
    """Of the evaluation's views first, and of training's, which a teacher sees in eval mode, too."""
    side_px = recipe.data.eval_resolution_px or recipe.data.resolution_px
    height_px, width_px = dataset.facts.height_px or side_px, dataset.facts.width_px or side_px
    return list(dict.fromkeys([(height_px, width_px), *view_sizes(recipe, dataset)]))


def _require_plain_batchnorms(recipe: Recipe, network: nn.Module) -> None:
    odd = [type(m).__name__ for m in network.modules() if _is_batchnorm(m) and type(m) is not nn.BatchNorm2d]
    if odd:
        raise UserError(
            f"dist.batchnorm = synchronised: {recipe.model.name} has batch-norms of another kind ({odd[0]}): set local"
        )


def _is_batchnorm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def _try_training(recipe: Recipe, phantom: nn.Module, shape: Shape, channels: int, classes: int, world: int) -> None:
    phantom.train().zero_grad()
    logits = _logits(recipe, phantom, shape, channels, classes, "while it trains")
    logits.sum().backward()
    idle = [name for name, weight in phantom.named_parameters() if weight.requires_grad and weight.grad is None]
    if idle and world > 1:
        raise UserError(
            f"model.name = {recipe.model.name}: {idle[0]} has no part in its output, so several processes cannot train "
            "it together: set dist.processes=1"
        )


def _try_teaching(recipe: Recipe, network: nn.Module, shape: tuple[int, int, int, int]) -> None:
    """As the recipe's teacher; what is fused or compiled is the folded network all the same."""
    engine, dtype = recipe.teacher.engine, DTYPES[recipe.train.precision]
    engine = engine if engine == "plain" else "folded"
    teacher = make_teacher(network, CPU, dtype, engine, shape=shape, checked=True)
    try:
        teacher(torch.zeros(shape, dtype=dtype))
    except Exception as error:
        # Folded, all of it is in the dtype of the step, which a library's code may not expect.
        raise UserError(
            f"teacher.engine = {engine}: {recipe.model.name} does not run so in {recipe.train.precision} "
            f"({first_line(error)}): set teacher.engine=plain, or train.precision=fp32"
        ) from error


@torch.no_grad()
def _try_evaluation(recipe: Recipe, phantom: nn.Module, shape: Shape, channels: int, classes: int) -> None:
    _logits(recipe, phantom.eval(), shape, channels, classes, "in eval mode")


def _logits(recipe: Recipe, phantom: nn.Module, shape: Shape, channels: int, classes: int, when: str) -> Tensor:
    count, height_px, width_px = shape
    name = f"model.name = {recipe.model.name}"
    try:
        out = phantom(torch.zeros((count, channels, height_px, width_px), device=META))
    except Exception as error:
        # A library's code refuses in every way; all of them mean the same.
        images = f"{count} image{'s' if count > 1 else ''} of {height_px}x{width_px} pixels"
        raise UserError(f"{name}: does not take {images} {when}: {first_line(error)}") from error
    if not isinstance(out, Tensor):
        raise UserError(f"{name}: gives {type(out).__name__} {when}, which are not logits: choose another network")
    if out.shape != (count, classes):
        raise UserError(
            f"{name}: gives values of shape {tuple(out.shape)} {when}, {(count, classes)} are needed: choose another "
            "network"
        )
    return out
