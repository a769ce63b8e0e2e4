"""The recipe as a tree of frozen, typed settings, with the rules that hold between them.

No torch here. `recipe.py` reads YAML and the command line into these classes; nothing else makes
them, and nothing changes them afterwards.

A setting that decides the trained weights says so (`decides=True`): those, and no others, make up
the identity of a run. The rest is about how and where it runs.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from fastgen.data.facts import DATASETS
from fastgen.errors import UserError
from fastgen.laws import eta_for_confidence

Numbers = float | tuple[float, ...]
MAX_SEED = 2**63 - 1


def setting(default: Any, text: str, *, decides: bool = True) -> Any:
    """Declares a setting with its help text; `...` as default makes it required."""
    metadata = {"text": text, "decides": decides, "required": default is ...}
    if default is ...:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """run: where and how it runs, and the seeds"""

    dir: str | None = setting(None, "run folder; default runs/<recipe name>-<hash of the recipe>", decides=False)
    nodes: str | None = setting(
        None, "store of trained generations, shared by runs; default <folder of the runs>/nodes", decides=False
    )
    seed: int = setting(0, "seed of everything that has no seed of its own", decides=False)
    init_seed: int | None = setting(None, "seed of the initial weights; default run.seed")
    resume: bool = setting(
        True, "go on where the run folder left off; false refuses a folder that exists", decides=False
    )
    dry: bool = setting(False, "print the plan and stop", decides=False)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto takes the GPU where there is one", decides=False)
    deterministic: bool = setting(
        False, "same bits in every run on a GPU, at some cost; on a CPU they are the same anyway", decides=False
    )
    save_minutes: float = setting(5.0, "time between two checkpoints", decides=False)
    log_every_steps: int = setting(
        50, "steps between two log lines; only there the loop waits for the device", decides=False
    )
    eval_every_epochs: int = setting(
        1, "epochs between two evaluations while training; 0: only at the end", decides=False
    )


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """data: what is learned from"""

    dataset: Literal["cifar100", "cifar10", "digits"] = setting(..., "data set")
    root: str = setting("data", "folder that holds the data set's files", decides=False)
    download: bool = setting(False, "fetch the files into data.root when they are not there", decides=False)
    backend: Literal["resident", "synthetic"] = setting(
        "resident", "resident: the whole set in the device's memory; synthetic: random images, for speed only"
    )
    seed: int | None = setting(None, "seed of order and views; default run.seed")
    augment: Literal["standard", "none"] = setting(
        "standard", "standard: the data set's usual crop and flip; none: the plain image"
    )
    train_limit: int | None = setting(None, "train on this many images, the same number of each class")
    val_limit: int | None = setting(None, "evaluate on this many images, the same number of each class", decides=False)
    holdout: int = setting(
        0, "keep this many training images, the same number of each class, and evaluate on them instead of the test set"
    )


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """model: the network, the same in every generation"""

    name: Literal["resnet8", "resnet20", "resnet32", "resnet44", "resnet56", "resnet74", "resnet92", "resnet110"] = (
        setting(..., "network")
    )
    downsample: Literal["strided", "pooled"] = setting(
        "strided", "strided: He et al.; pooled: average pooling between the stages, as arXiv 1805.05551 words it"
    )


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """train: how each generation is trained"""

    epochs: int = setting(..., "passes over the training set")
    batch_size: int = setting(128, "images in a step, over all devices together")
    lr: float = setting(0.1, "initial learning rate")
    lr_milestones: tuple[float, ...] = setting((0.5, 0.75), "fractions of the run after which the learning rate falls")
    lr_factor: float = setting(0.1, "what the learning rate is multiplied with at a milestone")
    momentum: float = setting(0.9, "momentum of SGD")
    nesterov: bool = setting(True, "Nesterov's form of the momentum")
    weight_decay: float = setting(1e-4, "L2 penalty")
    decay_norm_and_bias: bool = setting(True, "apply the weight decay to batch-norm parameters and biases too")
    precision: Literal["fp32", "bf16", "fp16"] = setting(
        "fp32", "of the training step; parameters and evaluation are fp32 always"
    )
    engine: Literal["eager", "compile"] = setting(
        "eager", "compile: torch.compile of the step; seconds to start, faster afterwards"
    )


@dataclass(frozen=True, kw_only=True)
class GenSettings:
    """gen: the generations"""

    generations: int = setting(5, "students after the patriarch", decides=False)
    patriarch: Literal["tolerant", "cross_entropy"] = setting("tolerant", "objective of generation 0")
    k: int = setting(5, "classes in the score difference of the tolerant patriarch")
    confidence: float = setting(
        0.6, "what the tolerant patriarch's first class shall get, in [1/k, 1]; 1 is plain cross-entropy"
    )
    teacher_weight: Numbers = setting(
        0.6, "share of the teacher in a student's objective, in [0, 1]; a list gives one value a student"
    )
    temperature: Numbers = setting(
        1.0, "softening of teacher and student in the distillation term; a list gives one value a student"
    )
    only: int | None = setting(
        None, "train this generation alone; teacher_weight and temperature on the command line then hold for it alone"
    )
    teacher: str | None = setting(None, "with gen.only: the teacher, as a run folder, a node or a .safetensors file")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole recipe. Construction checks every rule; a broken one raises UserError."""

    run: RunSettings = field(default_factory=RunSettings)
    data: DataSettings
    model: ModelSettings
    train: TrainSettings
    gen: GenSettings = field(default_factory=GenSettings)

    def __post_init__(self) -> None:
        _check_run(self.run)
        _check_data(self.data)
        _check_train(self.train)
        _check_gen(self.gen, classes=DATASETS[self.data.dataset].classes)

    @property
    def eta(self) -> float:
        """Weight of the score difference in the patriarch's objective; 0 is plain cross-entropy."""
        if self.gen.patriarch == "cross_entropy":
            return 0.0
        return eta_for_confidence(self.gen.confidence, self.gen.k)

    def teacher_weight(self, generation: int) -> float:
        """Teacher's share in the objective of the given student, 1..G."""
        return _of_generation(self.gen.teacher_weight, generation)

    def temperature(self, generation: int) -> float:
        """Temperature of the given student, 1..G."""
        return _of_generation(self.gen.temperature, generation)

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """All settings, as plain values in the order of declaration."""
        return {name: _plain(getattr(self, name)) for name in SECTIONS}

    def identity(self) -> dict[str, Any]:
        """The settings that decide the trained weights, and how many generations are wanted."""
        decisive = {name: _plain(getattr(self, name), decides=True) for name in SECTIONS}
        decisive["gen"] |= {"generations": self.gen.generations}
        decisive["data"] |= {"val_limit": self.data.val_limit}
        return decisive

    @property
    def short_hash(self) -> str:
        """Eight hexadecimal digits that tell this recipe from others."""
        return hash_of(self.identity())[:8]


SECTIONS: dict[str, type] = {
    "run": RunSettings,
    "data": DataSettings,
    "model": ModelSettings,
    "train": TrainSettings,
    "gen": GenSettings,
}


def hash_of(value: Any) -> str:
    """SHA-256, in hexadecimal, of a value's canonical JSON form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def with_seeds(recipe: Recipe) -> Recipe:
    """Fills in the seeds that default to run.seed."""
    seed = recipe.run.seed
    init_seed = seed if recipe.run.init_seed is None else recipe.run.init_seed
    data_seed = seed if recipe.data.seed is None else recipe.data.seed
    return replace(recipe, run=replace(recipe.run, init_seed=init_seed), data=replace(recipe.data, seed=data_seed))


def _plain(section: Any, *, decides: bool = False) -> dict[str, Any]:
    chosen = [f for f in fields(section) if f.metadata["decides"] or not decides]
    values = {f.name: getattr(section, f.name) for f in chosen}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _of_generation(value: Numbers, generation: int) -> float:
    return value[generation - 1] if isinstance(value, tuple) else value


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise UserError(text)


def _check_run(run: RunSettings) -> None:
    for name in ("seed", "init_seed"):
        seed = getattr(run, name)
        _require(seed is None or 0 <= seed <= MAX_SEED, f"run.{name} = {seed}: give a number from 0 to 2^63 - 1")
    _require(run.save_minutes >= 0, f"run.save_minutes = {run.save_minutes}: give 0 (after every step) or more")
    _require(run.log_every_steps >= 1, f"run.log_every_steps = {run.log_every_steps}: give 1 or more")
    _require(
        run.eval_every_epochs >= 0, f"run.eval_every_epochs = {run.eval_every_epochs}: give 0 (only at the end) or more"
    )


def _check_data(data: DataSettings) -> None:
    classes = DATASETS[data.dataset].classes
    _require(
        data.seed is None or 0 <= data.seed <= MAX_SEED, f"data.seed = {data.seed}: give a number from 0 to 2^63 - 1"
    )
    for name in ("train_limit", "val_limit"):
        limit = getattr(data, name)
        _require(
            limit is None or limit >= classes,
            f"data.{name} = {limit}: give at least {classes}, one image for each class",
        )
    _require(
        data.holdout == 0 or data.holdout >= classes,
        f"data.holdout = {data.holdout}: give 0, or at least {classes}, one image for each class",
    )


def _check_train(train: TrainSettings) -> None:
    _require(train.epochs >= 1, f"train.epochs = {train.epochs}: give 1 or more")
    _require(train.batch_size >= 1, f"train.batch_size = {train.batch_size}: give 1 or more")
    _require(train.lr > 0, f"train.lr = {train.lr}: give a learning rate above 0")
    _require(
        all(0 < at < 1 for at in train.lr_milestones) and list(train.lr_milestones) == sorted(set(train.lr_milestones)),
        f"train.lr_milestones = {list(train.lr_milestones)}: give rising fractions of the run, between 0 and 1",
    )
    _require(train.lr_factor > 0, f"train.lr_factor = {train.lr_factor}: give a factor above 0")
    _require(0 <= train.momentum < 1, f"train.momentum = {train.momentum}: give 0 or more, and less than 1")
    _require(
        not train.nesterov or train.momentum > 0,
        "train.nesterov = true needs train.momentum above 0: set train.nesterov=false",
    )
    _require(train.weight_decay >= 0, f"train.weight_decay = {train.weight_decay}: give 0 or more")


def _check_gen(gen: GenSettings, classes: int) -> None:
    _require(gen.generations >= 0, f"gen.generations = {gen.generations}: give 0 (the patriarch alone) or more")
    _require(2 <= gen.k <= classes, f"gen.k = {gen.k}: give 2 to {classes}, the number of classes of the data set")
    _require(
        1 / gen.k <= gen.confidence <= 1,
        f"gen.confidence = {gen.confidence}: give a value in [1/k, 1] = [{1 / gen.k:.4g}, 1]",
    )
    _require(
        gen.patriarch != "cross_entropy" or gen.confidence == 1,
        f"gen.patriarch = cross_entropy asks for confidence 1, gen.confidence is {gen.confidence}: "
        "set gen.confidence=1.0 or gen.patriarch=tolerant",
    )
    _check_per_student("teacher_weight", gen.teacher_weight, gen.generations)
    _check_per_student("temperature", gen.temperature, gen.generations)
    for weight in _listed(gen.teacher_weight):
        _require(0 <= weight <= 1, f"gen.teacher_weight = {weight}: give a share in [0, 1]")
    for temperature in _listed(gen.temperature):
        _require(temperature > 0, f"gen.temperature = {temperature}: give a value above 0")
    _require(
        gen.only is None or 0 <= gen.only <= gen.generations,
        f"gen.only = {gen.only}: give a generation of the recipe, 0 to {gen.generations}",
    )
    _require(
        gen.teacher is None or gen.only is not None,
        "gen.teacher needs gen.only: name the generation that this teacher shall teach",
    )
    _require(
        gen.teacher is None or gen.only != 0,
        "gen.teacher with gen.only = 0: the patriarch has no teacher; give gen.only 1 or more",
    )
    if gen.teacher is not None and gen.only:
        weight = _of_generation(gen.teacher_weight, gen.only)
        _require(
            weight > 0, f"gen.teacher has no say where gen.teacher_weight of generation {gen.only} is 0: give a weight"
        )


def _check_per_student(name: str, value: Numbers, generations: int) -> None:
    count = len(value) if isinstance(value, tuple) else generations
    _require(
        count == generations,
        f"gen.{name} has {count} values for {generations} students: give one number, or one for each student",
    )


def _listed(value: Numbers) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)
