"""The rules that hold within and between the settings of a recipe. A broken one is a line that says what to give."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from fastgen.data.facts import DATASETS
from fastgen.errors import UserError
from fastgen.networks import library_and_name, traits_of

if TYPE_CHECKING:
    from fastgen.config import DataSettings, Numbers, Recipe, RunSettings, TrainSettings

MAX_SEED = 2**63 - 1
# int16 numbers them in a label store.
MOST_STORED_CLASSES = 2**15
# Settings of gen that one patriarch alone has -> its name.
PATRIARCHS_OWN = {
    "smoothing": "label_smoothing", "entropy_weight": "confidence_penalty", "lipschitz_weight": "soteacher",
    "consistency_weight": "soteacher", "consistency_dtype": "soteacher",
}  # fmt: skip


def check_recipe(recipe: Recipe) -> None:
    """Checks every rule.

    Raises:
        UserError: one is broken.
    """
    _check_run(recipe.run)
    _check_dist(recipe)
    _check_data(recipe.data)
    _check_photographs(recipe.data)
    _check_train(recipe.train)
    _check_model(recipe)
    _check_together(recipe)
    _check_gen(recipe)
    _check_teacher(recipe)


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise UserError(text)


def _default_of(section: Any, name: str) -> Any:
    return next(field.default for field in fields(section) if field.name == name)


def _check_run(run: RunSettings) -> None:
    for name in ("seed", "init_seed"):
        seed = getattr(run, name)
        _require(seed is None or 0 <= seed <= MAX_SEED, f"run.{name} = {seed}: give a number from 0 to 2^63 - 1")
    _require(run.save_minutes >= 0, f"run.save_minutes = {run.save_minutes}: give 0 (after every step) or more")
    after = run.stop_after_minutes
    _require(after is None or after > 0, f"run.stop_after_minutes = {after}: give a time above 0, or leave it out")
    _require(run.log_every_steps >= 1, f"run.log_every_steps = {run.log_every_steps}: give 1 or more")
    _require(
        run.eval_every_epochs >= 0, f"run.eval_every_epochs = {run.eval_every_epochs}: give 0 (only at the end) or more"
    )


def _check_dist(recipe: Recipe) -> None:
    dist = recipe.dist
    _require(dist.processes is None or dist.processes >= 1, f"dist.processes = {dist.processes}: give 1 or more")
    _require(dist.timeout_minutes > 0, f"dist.timeout_minutes = {dist.timeout_minutes}: give a time above 0")
    _require(dist.max_restarts >= 0, f"dist.max_restarts = {dist.max_restarts}: give 0 (never) or more")
    _require(
        dist.batchnorm == "local" or recipe.train.batchnorm == "torch",
        "dist.batchnorm = synchronised: the fused batch-norm knows one process: set train.batchnorm=torch",
    )


def _check_data(data: DataSettings) -> None:
    classes = DATASETS[data.dataset].classes
    _require(
        data.seed is None or 0 <= data.seed <= MAX_SEED, f"data.seed = {data.seed}: give a number from 0 to 2^63 - 1"
    )
    # Photographs tell their classes when they are opened; `data.split` then says the same.
    least = classes or 1
    for name in ("train_limit", "val_limit"):
        limit = getattr(data, name)
        _require(
            limit is None or limit >= least,
            f"data.{name} = {limit}: give at least {least}, one image for each class",
        )
    _require(
        data.holdout == 0 or data.holdout >= least,
        f"data.holdout = {data.holdout}: give 0, or at least {least}, one image for each class",
    )


def _check_photographs(data: DataSettings) -> None:
    _require(data.workers is None or data.workers >= 1, f"data.workers = {data.workers}: give 1 or more")
    _require(data.batches_ahead >= 1, f"data.batches_ahead = {data.batches_ahead}: give 1 or more")
    for name in ("resolution_px", "start_resolution_px", "eval_resolution_px"):
        side = getattr(data, name)
        _require(side is None or 8 <= side <= 4096, f"data.{name} = {side}: give 8 to 4096 pixels")
    for name, (low, high) in (("resolution_ramp", (0, 1)), ("crop_area", (0, 1)), ("crop_aspect", (0, 20))):
        values = getattr(data, name)
        _require(
            len(values) == 2 and low <= values[0] <= values[1] <= high,
            f"data.{name} = {list(values)}: give two numbers from {low} to {high}, the second not below the first",
        )
    _require(data.crop_area[0] > 0, "data.crop_area begins at 0: give a share above 0")
    _require(data.crop_aspect[0] >= 0.05, "data.crop_aspect begins too low: give 0.05 or more")
    _require(0 < data.eval_crop_share <= 1, f"data.eval_crop_share = {data.eval_crop_share}: give a share in (0, 1]")
    _require(
        0 <= data.rotation_degrees <= 180, f"data.rotation_degrees = {data.rotation_degrees}: give 0 to 180 degrees"
    )
    _require(0 <= data.pixel_shift <= 255, f"data.pixel_shift = {data.pixel_shift}: give 0 to 255")


def _check_model(recipe: Recipe) -> None:
    model, train = recipe.model, recipe.train
    traits = traits_of(model.name)
    _require(
        recipe.data.dataset != "digits" or traits.grey,
        f"model.name = {model.name}: takes colour images, digits are grey: choose resnet8 or resnet20",
    )
    _require(
        model.downsample == "strided" or traits.pooled,
        f"model.downsample = pooled: is written for resnet8 to resnet110, not for {model.name}: set strided",
    )
    _require(
        library_and_name(model.name)[0] is None or train.batchnorm == "torch",
        f"train.batchnorm = triton: is written for our own networks, not for {model.name}: set torch",
    )
    if not model.memory_efficient:
        return
    _require(
        traits.memory_efficient,
        f"model.memory_efficient: is written for densenet100 and densenet190, not for {model.name}: leave it out",
    )
    _require(
        train.batchnorm == "torch" and recipe.dist.batchnorm == "local",
        "model.memory_efficient computes torch's own batch-norm again: set train.batchnorm=torch and "
        "dist.batchnorm=local, or leave it out",
    )


def _check_together(recipe: Recipe) -> None:
    photographs = recipe.data.dataset == "imagenet"
    _require(
        not (photographs and recipe.data.backend == "resident"),
        "data.backend = resident is for images of one size: set data.backend=ffcv, dali or folder",
    )
    _require(
        not (recipe.data.dataset == "digits" and recipe.data.backend == "ffcv"),
        "data.backend = ffcv: there is no .beton of digits: set data.backend=resident, dali or folder",
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
    _require(
        1 <= train.accumulate_steps <= train.batch_size,
        f"train.accumulate_steps = {train.accumulate_steps}: give 1 to {train.batch_size}, the images of a batch",
    )
    _require(train.graph_steps >= 1, f"train.graph_steps = {train.graph_steps}: give 1 or more")
    _require(
        0 <= train.warmup_epochs < train.epochs,
        f"train.warmup_epochs = {train.warmup_epochs}: give 0 or more, and less than train.epochs = {train.epochs}",
    )
    _require(
        train.lr_schedule != "triangular" or train.warmup_epochs > 0,
        "train.lr_schedule = triangular needs train.warmup_epochs above 0: its peak is there",
    )
    _require(0 <= train.momentum < 1, f"train.momentum = {train.momentum}: give 0 or more, and less than 1")
    _require(
        not train.nesterov or train.momentum > 0,
        "train.nesterov = true needs train.momentum above 0: set train.nesterov=false",
    )
    _require(train.weight_decay >= 0, f"train.weight_decay = {train.weight_decay}: give 0 or more")


def _check_gen(recipe: Recipe) -> None:
    gen, classes = recipe.gen, DATASETS[recipe.data.dataset].classes
    _require(gen.generations >= 0, f"gen.generations = {gen.generations}: give 0 (the patriarch alone) or more")
    most = classes or max(gen.k, 2)
    _require(2 <= gen.k <= most, f"gen.k = {gen.k}: give 2 to {most}, the number of classes of the data set")
    _require(
        1 / gen.k <= gen.confidence <= 1,
        f"gen.confidence = {gen.confidence}: give a value in [1/k, 1] = [{1 / gen.k:.4g}, 1]",
    )
    _require(
        gen.patriarch == "tolerant" or gen.confidence == 1,
        f"gen.patriarch = {gen.patriarch} knows no confidence, gen.confidence is {gen.confidence}: "
        "set gen.confidence=1.0 or gen.patriarch=tolerant",
    )
    _require(gen.ensemble_teachers >= 1, f"gen.ensemble_teachers = {gen.ensemble_teachers}: give 1 or more")
    _require(
        gen.ensemble_teachers == 1 or max(_listed(gen.teacher_weight), default=0) > 0,
        "gen.ensemble_teachers has no say with gen.teacher_weight = 0: leave it out",
    )
    _require(
        gen.teacher is None or gen.ensemble_teachers == 1,
        "gen.teacher names one teacher, gen.ensemble_teachers asks for several: leave one of them out",
    )
    _check_patriarch(recipe)
    _check_tolerant_students(recipe, most)
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
        weight = recipe.teacher_weight(gen.only)
        _require(
            weight > 0, f"gen.teacher has no say where gen.teacher_weight of generation {gen.only} is 0: give a weight"
        )


def _check_patriarch(recipe: Recipe) -> None:
    gen = recipe.gen
    for name, owner in PATRIARCHS_OWN.items():
        _require(
            gen.patriarch == owner or getattr(gen, name) == _default_of(gen, name),
            f"gen.{name} has no say with gen.patriarch = {gen.patriarch}: leave it out, or set gen.patriarch={owner}",
        )
    _require(
        gen.consistency_dtype == "fp32" or gen.consistency_weight > 0,
        "gen.consistency_dtype has no say with gen.consistency_weight = 0: leave it out",
    )
    _require(0 <= gen.smoothing < 1, f"gen.smoothing = {gen.smoothing}: give 0 or more, and less than 1")
    for name in ("entropy_weight", "lipschitz_weight", "consistency_weight"):
        _require(getattr(gen, name) >= 0, f"gen.{name} = {getattr(gen, name)}: give 0 or more")
    plain = gen.patriarch in ("tolerant", "cross_entropy") and gen.k_mass is None
    _require(
        recipe.train.kernels == "torch" or plain,
        f"train.kernels = triton: patriarchs with kernels are tolerant, without gen.k_mass, and cross_entropy, not "
        f"{gen.patriarch}: set train.kernels=torch",
    )


def _check_tolerant_students(recipe: Recipe, most: int) -> None:
    gen = recipe.gen
    _check_per_student("student_confidence", gen.student_confidence, gen.generations)
    ks = gen.student_k if isinstance(gen.student_k, tuple) else (gen.student_k,)
    _require(
        not isinstance(gen.student_k, tuple) or len(ks) == gen.generations,
        f"gen.student_k has {len(ks)} values for {gen.generations} students: give one number, or one for each student",
    )
    _require(
        all(k is None or 2 <= k <= most for k in ks),
        f"gen.student_k = {gen.student_k}: give 2 to {most}, the number of classes of the data set",
    )
    for student in range(1, gen.generations + 1):
        values, k = gen.student_confidence, recipe.student_k(student)
        confidence = values[student - 1] if isinstance(values, tuple) else values
        _require(
            1 / k <= confidence <= 1,
            f"gen.student_confidence = {confidence}: give a value in [1/k, 1] = [{1 / k:.4g}, 1]",
        )
    _require(
        gen.student_k is None or min(_listed(gen.student_confidence), default=1) < 1,
        "gen.student_k has no say with gen.student_confidence = 1: leave it out, or give a confidence below 1",
    )
    tolerant = [*(_listed(gen.student_confidence) if gen.generations else ()), gen.confidence]
    _require(gen.k_mass is None or 0 < gen.k_mass < 1, f"gen.k_mass = {gen.k_mass}: give a probability between 0 and 1")
    _require(
        gen.k_mass is None or (min(tolerant) < 1 and min(tolerant) >= 0.5),
        "gen.k_mass needs a tolerant generation, with confidences of at least 0.5: a sample may have two classes alone",
    )
    _require(
        recipe.train.kernels == "torch" or min(_listed(gen.student_confidence), default=1) == 1,
        "train.kernels = triton: there is no kernel of tolerant students: set train.kernels=torch",
    )


def _check_teacher(recipe: Recipe) -> None:
    teacher, data = recipe.teacher, recipe.data
    _require(
        teacher.look_ahead_batches >= 1,
        f"teacher.look_ahead_batches = {teacher.look_ahead_batches}: give 1 or more",
    )
    steps = recipe.train.graph_steps
    _require(
        recipe.train.engine != "graph" or data.backend != "resident" or steps % teacher.look_ahead_batches == 0,
        f"teacher.look_ahead_batches = {teacher.look_ahead_batches}: a graph of train.graph_steps = {steps} holds no "
        "whole number of such groups: give a divisor",
    )
    _require(
        teacher.labels == "store" or (teacher.store_classes is None and teacher.store_dtype == "fp16"),
        "teacher.store_classes and teacher.store_dtype have no say without teacher.labels=store: leave them out",
    )
    _require(
        teacher.store_classes is None or 1 <= teacher.store_classes <= MOST_STORED_CLASSES,
        f"teacher.store_classes = {teacher.store_classes}: give 1 to {MOST_STORED_CLASSES}",
    )
    if teacher.labels == "live":
        return
    _require(
        data.backend != "synthetic",
        f"teacher.labels = {teacher.labels}: data.backend = synthetic shows images of no data set: set "
        "teacher.labels=live",
    )
    if teacher.labels == "store":
        return
    _require(
        bool(DATASETS[data.dataset].height_px),
        f"teacher.labels = table: crops of {data.dataset} are resampled, and too many to label all: set live",
    )
    _require(
        data.augment == "none" or not (data.rotation_degrees or data.pixel_shift),
        "teacher.labels = table: rotation and pixel shifts have no end of views: set teacher.labels=live, or "
        "data.rotation_degrees=0 and data.pixel_shift=0",
    )
    _require(
        teacher.look_ahead_batches == 1,
        "teacher.look_ahead_batches has no say with teacher.labels = table: leave one of them out",
    )


def _check_per_student(name: str, value: Numbers, generations: int) -> None:
    count = len(value) if isinstance(value, tuple) else generations
    _require(
        count == generations,
        f"gen.{name} has {count} values for {generations} students: give one number, or one for each student",
    )


def _listed(value: Numbers) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)
