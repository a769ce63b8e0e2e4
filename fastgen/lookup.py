"""Finds teachers: of a plan's generations, and the one that a recipe names, a run folder, a node, or a weights file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fastgen.checkpoint import read_weights
from fastgen.config import ModelSettings, Recipe, hash_of
from fastgen.data.split import Dataset
from fastgen.errors import UserError
from fastgen.evaluate import load_network
from fastgen.nodes import Node, find_node, nodes_folder
from fastgen.plan import Generation, Teacher
from fastgen.unseen import require_same_classes, require_unseen

# Why a teacher that seems to be there is another one.
ENSEMBLES_RENAME = " (gen.ensemble_teachers is of all students: those before this one are others, too)"
STORES_RENAME = " (students of a store are other generations than those of a live teacher: gen.teacher=RUN takes those)"


def find_teacher(recipe: Recipe, dataset: Dataset) -> Teacher | None:
    """What `gen.teacher` leads to, or None where the recipe names no teacher.

    A run folder stands for its generation before `gen.only`.

    Raises:
        UserError: there is no such teacher, it is not trained, or it is of another network, number
            of classes or data set.
    """
    if recipe.gen.teacher is None:
        return None
    import torch

    weights = _weights_of(recipe, recipe.gen.teacher)
    _, description = read_weights(weights)
    trained_on = description.get("dataset", recipe.data.dataset)
    if trained_on != recipe.data.dataset:
        raise UserError(
            f"gen.teacher = {recipe.gen.teacher}: was trained on {trained_on}, "
            f"the recipe's data set is {recipe.data.dataset}"
        )
    require_same_classes(weights, description, dataset)
    load_network(teachers_recipe(recipe, weights), dataset, weights, torch.device("cpu"))
    require_unseen(weights, description, recipe, dataset)
    return Teacher(_identity_of(weights), str(weights))


def teacher_weights(recipe: Recipe, generation: Generation) -> tuple[Path, ...]:
    """Of all that teach a generation, the earliest first; none: it learns from labels alone.

    Raises:
        UserError: one of them is not trained.
    """
    if generation.teacher_weights is not None:
        return (Path(generation.teacher_weights),)
    nodes = nodes_folder(recipe)
    found = [(member, find_node(nodes, member)) for member in generation.members]
    for member, node in found:
        if node is None:
            raise UserError(f"the teacher of generation {generation.index} ({member}) is not in {nodes}")
    return tuple(node.weights for _, node in found if node is not None)


def require_teachers(recipe: Recipe, plan: Sequence[Generation]) -> None:
    """With gen.only the teacher must be there before anything is begun.

    Raises:
        UserError: it is not.
    """
    nodes = nodes_folder(recipe)
    planned = {generation.node for generation in plan if generation.train}
    for generation in plan:
        for member in {*generation.members} - planned if generation.train else ():
            if find_node(nodes, member) is not None:
                continue
            taught_by = next(other.index for other in plan if other.node == member)
            raise UserError(
                f"generation {generation.index} needs its teacher, generation {taught_by} ({member}), which is not in "
                f"{nodes}: train the recipe without gen.only first, or name a teacher with gen.teacher"
                f"{STORES_RENAME if recipe.teacher.labels == 'store' else ''}"
                f"{ENSEMBLES_RENAME if recipe.gen.ensemble_teachers > 1 else ''}"
            )


def teachers_recipe(recipe: Recipe, weights: Path) -> Recipe:
    """The recipe with its teacher's network: from a label store any architecture may learn, else the teacher's alone.

    Args:
        recipe: of the student.
        weights: of the teacher.

    Raises:
        UserError: the file is missing, or damaged.
    """
    _, description = read_weights(weights)
    if recipe.teacher.labels != "store" or "model" not in description:
        return recipe
    # How much memory its own training took is of no concern, nor whether the student's settings would allow it.
    # A library's network has no fused batch-norm, and a teacher does not train.
    recipe = replace(recipe, train=replace(recipe.train, batchnorm="torch"))
    return replace(recipe, model=replace(ModelSettings(**description["model"]), memory_efficient=False))


def _identity_of(weights: Path) -> str:
    """The node's id where the file is a node's own, whatever its folder is called now; else the file's hash."""
    node = Node(weights.resolve().parent)
    if node.finished and weights.name == node.weights.name:
        facts = node.facts()
        if facts["node"] == hash_of(facts["identity"])[:16]:
            return str(facts["node"])
    return f"file:{hashlib.sha256(weights.read_bytes()).hexdigest()}"


def _weights_of(recipe: Recipe, name: str) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    if (path / "plan.json").exists():
        before = (recipe.gen.only or 0) - 1
        return _trained(Node(path / f"generation_{before}"), f"{name}: generation {before} of this run")
    if path.is_dir():
        return _trained(Node(path), f"{name}: this node")
    node = find_node(nodes_folder(recipe), name)
    if node is None:
        raise UserError(
            f"gen.teacher = {name}: neither run folder nor weights file nor trained node of {recipe.run.nodes}"
        )
    return node.weights


def _trained(node: Node, what: str) -> Path:
    if not node.finished:
        raise UserError(f"gen.teacher = {what} is not trained to its end: resume that run first")
    return node.weights
