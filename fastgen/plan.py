"""Recipe -> a tuple of generations: pure, printable, the unit of resume and rerun. No torch.

A generation is an immutable node. Its id is a hash of all that decides its weights, the id of its
teacher among it, so equal ids are the same network: runs share it, and another lambda for
generation 3 is another node under the same teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from fastgen.config import Recipe, hash_of
from fastgen.data.facts import DATASETS
from fastgen.laws import confidence_for_eta, ideal_confidence, smoothed_confidence

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
        k_mass: each sample's K is as many classes as have this mass, at most k; 0: all have k.
        smoothing: of the labels; 0: none.
        entropy_weight: of the confidence penalty; 0: none.
        lipschitz_weight, consistency_weight: of SoTeacher's terms; 0: none.
        consistency_dtype: of the means that the consistency term keeps; empty without one.
    """

    eta: float = 0.0
    k: int = 0
    teacher_weight: float = 0.0
    temperature: float = 1.0
    k_mass: float = 0.0
    smoothing: float = 0.0
    entropy_weight: float = 0.0
    lipschitz_weight: float = 0.0
    consistency_weight: float = 0.0
    consistency_dtype: str = ""

    def identity(self) -> dict[str, Any]:
        """What decides weights; what came after the first four is left out where it is off, so that names stay."""
        values = asdict(self)
        first = list(values)[:4]
        return {name: value for name, value in values.items() if name in first or value}

    @property
    def fused(self) -> bool:
        """Whether there are Triton kernels for it."""
        others = self.k_mass, self.smoothing, self.entropy_weight, self.lipschitz_weight, self.consistency_weight
        return not any(others) and not (self.eta and self.teacher_weight)


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
        teacher: id of the teacher's node, or of an ensemble of nodes; None: it learns from labels alone.
        members: ids of all nodes that teach it; none where the recipe names the teacher's weights.
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
    members: tuple[str, ...]
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
        before = [generation.node for generation in plan[-recipe.gen.ensemble_teachers :]]
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
    recipe: Recipe, data: dict[str, Any], index: int, before: Sequence[str], named: Teacher | None
) -> Generation:
    objective = _objective(recipe, index)
    taught = objective.teacher_weight > 0
    members = tuple(before) if taught and named is None else ()
    teacher_id = (named.id if named else ensemble_id(members)) if taught else None
    init_seed = init_seed_of(_seed(recipe.run.init_seed), index)
    data_seed = _seed(recipe.data.seed)
    settings = recipe.identity()
    identity = (
        {
            "format": NODE_FORMAT,
            "generation": index,
            "objective": objective.identity(),
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
        members=members,
        teacher_weights=named.weights if named and taught else None,
        init_seed=init_seed,
        data_seed=data_seed,
        train=recipe.gen.only is None or recipe.gen.only == index,
        identity=identity,
        ideal=None if named else _ideal(recipe, index),
    )


def ensemble_id(nodes: Sequence[str]) -> str:
    """Name of the teacher that the mean prediction of these nodes is; of one node its own."""
    return nodes[0] if len(nodes) == 1 else f"mean:{hash_of(list(nodes))[:16]}"


def _objective(recipe: Recipe, index: int) -> Objective:
    if index == 0:
        return _patriarchs(recipe)
    weight = recipe.teacher_weight(index)
    # Under the teacher's word alone the labels' term has no say.
    eta = recipe.student_eta(index) if weight < 1 else 0.0
    tolerance = _tolerance(recipe, eta, recipe.student_k(index))
    if not weight:
        return tolerance
    return replace(tolerance, teacher_weight=weight, temperature=recipe.temperature(index))


def _patriarchs(recipe: Recipe) -> Objective:
    gen = recipe.gen
    if gen.patriarch == "label_smoothing":
        return Objective(smoothing=gen.smoothing)
    if gen.patriarch == "confidence_penalty":
        return Objective(entropy_weight=gen.entropy_weight)
    if gen.patriarch == "soteacher":
        return Objective(
            lipschitz_weight=gen.lipschitz_weight,
            consistency_weight=gen.consistency_weight,
            consistency_dtype=gen.consistency_dtype if gen.consistency_weight else "",
        )
    return _tolerance(recipe, recipe.eta, gen.k)


def _tolerance(recipe: Recipe, eta: float, k: int) -> Objective:
    return Objective(eta=eta, k=k, k_mass=recipe.gen.k_mass or 0.0) if eta else Objective()


def _ideal(recipe: Recipe, index: int) -> float | None:
    """None: of temperatures, tolerant students and other patriarchs no law is known."""
    weights = [recipe.teacher_weight(g) for g in range(1, index + 1)]
    temperatures = [recipe.temperature(g) for g in range(1, index + 1)]
    if any(weight and temperature != 1 for weight, temperature in zip(weights, temperatures, strict=True)):
        return None
    if any(_objective(recipe, g).eta for g in range(1, index + 1)):
        return None
    first = _patriarchs_ideal(recipe)
    return None if first is None else ideal_confidence(first, weights, index, recipe.gen.ensemble_teachers)


def _patriarchs_ideal(recipe: Recipe) -> float | None:
    if recipe.gen.patriarch in ("confidence_penalty", "soteacher"):
        return None
    if recipe.gen.patriarch == "label_smoothing":
        classes = DATASETS[recipe.data.dataset].classes
        return smoothed_confidence(recipe.gen.smoothing, classes) if classes else None
    return confidence_for_eta(recipe.eta, recipe.gen.k)


def _objective_text(g: Generation) -> str:
    o = g.objective
    names = {
        "smoothing": "label smoothing", "entropy_weight": "confidence penalty, entropy_weight",
        "lipschitz_weight": "lipschitz_weight", "consistency_weight": "consistency_weight",
    }  # fmt: skip
    terms = [f"{text} {getattr(o, name):g}" for name, text in names.items() if getattr(o, name)]
    if o.eta:
        adaptive = f" at most, for mass {o.k_mass:g}" if o.k_mass else ""
        terms.append(f"tolerant, eta {o.eta:.4f}, k {o.k}{adaptive}")
    if g.role == "student":
        terms.append(f"teacher_weight {o.teacher_weight:g}")
        terms += [f"temperature {o.temperature:g}"] if o.temperature != 1 else []
    return ", ".join(terms) or "cross-entropy"


def _seed(seed: int | None) -> int:
    if seed is None:
        raise ValueError("the recipe's seeds are not filled in: use config.with_seeds")
    return seed
