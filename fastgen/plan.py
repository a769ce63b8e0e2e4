"""Recipe -> a tuple of generations: pure, printable, the unit of resume and rerun. No torch.

A generation is an immutable node. Its id is a hash of all that decides its weights, the id of its
teacher among it, so equal ids are the same network: runs share it, and another lambda for
generation 3 is another node under the same teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fastgen.config import Recipe, hash_of
from fastgen.data.facts import DATASETS
from fastgen.laws import confidence_for_eta, ideal_confidence

Role = Literal["patriarch", "student", "independent"]

# Raised whenever the same settings start to give other weights; old nodes are then not reused.
NODE_FORMAT = 2


@dataclass(frozen=True)
class Objective:
    """What a generation minimises.

    Attributes:
        eta: weight of the score difference (arXiv 1805.05551 v1 Eqn 3); 0: cross-entropy.
        k: classes in it; 0 where eta is 0, so that equal objectives are equal.
        teacher_weight: lambda, the teacher's share (Eqn 4); 0: no teacher.
        temperature: of the distillation term; 1 without a teacher.
    """

    eta: float = 0.0
    k: int = 0
    teacher_weight: float = 0.0
    temperature: float = 1.0


@dataclass(frozen=True)
class Teacher:
    """A teacher that the recipe names itself (`gen.teacher`), found before the plan is made.

    Attributes:
        id: the node's id, or the hash of the weights file.
        weights: path of the .safetensors file.
    """

    id: str
    weights: str


@dataclass(frozen=True)
class Generation:
    """One network to be trained, or to be found trained.

    Attributes:
        index: 0 for the patriarch.
        objective: what it minimises.
        teacher: id of the teacher's node; None: it learns from labels alone.
        teacher_weights: path of the teacher's weights where the recipe names them; None: the
            node store knows where they are.
        init_seed: of the initial weights; differs from that of every other generation.
        data_seed: of order and views.
        train: whether this run may train it; else it must be in the store already.
        identity: everything that decides the weights, as plain values.
        ideal: confidence of the exact minimisers, None where no law is known.
    """

    index: int
    role: Role
    objective: Objective
    teacher: str | None
    teacher_weights: str | None
    init_seed: int
    data_seed: int
    train: bool
    identity: dict[str, Any]
    ideal: float | None

    @property
    def node(self) -> str:
        """Sixteen hexadecimal digits: the name of this generation's node."""
        return hash_of(self.identity)[:16]


def make_plan(
    recipe: Recipe, data_hash: str, teacher: Teacher | None = None, pixels: str = "stored"
) -> tuple[Generation, ...]:
    """All generations that a recipe asks for, each with its node id.

    With `gen.only` = g these are 0..g, where all but g must be trained already; with a named
    teacher besides, g alone.

    Args:
        recipe: with its seeds filled in.
        data_hash: hash of the training images and labels.
        teacher: what `gen.teacher` leads to.
        pixels: names what turns views into pixels (`Dataset.pixels`); backends that give the same share their nodes.
    """
    only = recipe.gen.only
    last = recipe.gen.generations if only is None else only
    plan: list[Generation] = []
    for index in range(last + 1):
        named = teacher if index == only else None
        before = plan[-1].node if plan else None
        plan.append(_generation(recipe, _data_identity(recipe, data_hash, pixels), index, before, named))
    return tuple(plan[-1:]) if teacher is not None else tuple(plan)


def describe(plan: Sequence[Generation]) -> str:
    """The plan as a table in plain text."""
    rows = [("generation", "role", "node", "teacher", "objective", "init seed", "data seed", "ideal confidence")]
    for g in plan:
        ideal = "-" if g.ideal is None else f"{g.ideal:.3f}"
        rows.append(
            (
                str(g.index),
                g.role,
                g.node,
                g.teacher or "-",
                _objective_text(g),
                str(g.init_seed),
                str(g.data_seed),
                ideal,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def init_seed_of(run_init_seed: int, generation: int) -> int:
    """Seed of a generation's initial weights: 63 bits of a hash, another for each generation."""
    return int(hash_of(["initial weights", run_init_seed, generation])[:16], 16) >> 1


def _data_identity(recipe: Recipe, data_hash: str, pixels: str) -> dict[str, Any]:
    data = recipe.data
    augmented = data.augment == "standard"
    identity = {
        "hash": data_hash,
        "dataset": data.dataset,
        "seed": _seed(data.seed),
        "augment": data.augment,
        "train_limit": data.train_limit,
        "holdout": data.holdout,
        "pixels": "random" if data.backend == "synthetic" else pixels,
        "rotation_degrees": data.rotation_degrees if augmented else 0.0,
        "pixel_shift": data.pixel_shift if augmented else 0.0,
    }
    if DATASETS[data.dataset].height_px:
        return identity
    grows = data.start_resolution_px not in (None, data.resolution_px)
    return identity | {
        "resolution_px": data.resolution_px,
        "start_resolution_px": data.start_resolution_px if grows else None,
        "resolution_ramp": data.resolution_ramp if grows else None,
        "crop_area": data.crop_area if augmented else None,
        "crop_aspect": data.crop_aspect if augmented else None,
    }


def _train_identity(train: dict[str, Any]) -> dict[str, Any]:
    """What has no say is left out, so that it makes no other node."""
    if train["lr_schedule"] == "steps":
        return train
    return {name: value for name, value in train.items() if name not in ("lr_milestones", "lr_factor")}


def _teaching_identity(settings: dict[str, Any], teacher_id: str | None) -> dict[str, Any]:
    """How a teacher is asked rounds its logits in another way, and so decides the student's weights."""
    return {"teaching": settings["teacher"]} if teacher_id is not None and "teacher" in settings else {}


def _together_identity(settings: dict[str, Any]) -> dict[str, Any]:
    """How several processes treat batch-norm, where that is not the default. How many there are is not asked."""
    return {"dist": settings["dist"]} if "dist" in settings else {}


def _generation(
    recipe: Recipe, data: dict[str, Any], index: int, before: str | None, named: Teacher | None
) -> Generation:
    objective = _objective(recipe, index)
    taught = objective.teacher_weight > 0
    teacher_id = (named.id if named else before) if taught else None
    init_seed = init_seed_of(_seed(recipe.run.init_seed), index)
    data_seed = _seed(recipe.data.seed)
    settings = recipe.identity()
    identity = (
        {
            "format": NODE_FORMAT,
            "generation": index,
            "objective": asdict(objective),
            "teacher": teacher_id,
            "init_seed": init_seed,
            "model": settings["model"],
            "train": _train_identity(settings["train"]),
            "data": data,
        }
        | _teaching_identity(settings, teacher_id)
        | _together_identity(settings)
    )
    return Generation(
        index=index,
        role="student" if taught else ("patriarch" if index == 0 else "independent"),
        objective=objective,
        teacher=teacher_id,
        teacher_weights=named.weights if named and taught else None,
        init_seed=init_seed,
        data_seed=data_seed,
        train=recipe.gen.only is None or recipe.gen.only == index,
        identity=identity,
        ideal=None if named else _ideal(recipe, index),
    )


def _objective(recipe: Recipe, index: int) -> Objective:
    if index == 0:
        return Objective(eta=recipe.eta, k=recipe.gen.k) if recipe.eta else Objective()
    weight = recipe.teacher_weight(index)
    return Objective(teacher_weight=weight, temperature=recipe.temperature(index)) if weight else Objective()


def _ideal(recipe: Recipe, index: int) -> float | None:
    weights = [recipe.teacher_weight(g) for g in range(1, index + 1)]
    temperatures = [recipe.temperature(g) for g in range(1, index + 1)]
    if any(weight and temperature != 1 for weight, temperature in zip(weights, temperatures, strict=True)):
        return None
    return ideal_confidence(confidence_for_eta(recipe.eta, recipe.gen.k), weights, index)


def _objective_text(g: Generation) -> str:
    o = g.objective
    if g.role == "student":
        softened = f", temperature {o.temperature:g}" if o.temperature != 1 else ""
        return f"teacher_weight {o.teacher_weight:g}{softened}"
    return f"tolerant, eta {o.eta:.4f}, k {o.k}" if o.eta else "cross-entropy"


def _seed(seed: int | None) -> int:
    if seed is None:
        raise ValueError("the recipe's seeds are not filled in: use config.with_seeds")
    return seed
