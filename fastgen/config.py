"""The recipe as a tree of frozen, typed settings; `rules.py` has what must hold between them.

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
from fastgen.laws import eta_for_confidence
from fastgen.networks import NETWORKS, PHOTO_MODELS
from fastgen.rules import check_recipe

Numbers = float | tuple[float, ...]
Counts = int | tuple[int, ...]


def kept_classes(classes: int, wanted: int | None) -> int:
    """Classes of a view that a label store keeps.

    Args:
        classes: of the data set.
        wanted: `teacher.store_classes`; None: all of up to 100, else 16.
    """
    return min(wanted or (classes if classes <= DENSE_CLASSES else KEPT_CLASSES), classes)


def setting(default: Any, text: str, *, decides: bool = True, silent: bool = False) -> Any:
    """Declares a setting with its help text; `...` as default makes it required.

    With `silent` its default is no part of an identity: recipes from before the setting keep their names.
    """
    metadata = {"text": text, "decides": decides, "required": default is ..., "silent": silent}
    if default is ...:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


# Up to so many classes a label store keeps all, unless the recipe says otherwise; of more, so many.
DENSE_CLASSES, KEPT_CLASSES = 100, 16


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
    stop_after_minutes: float | None = setting(
        None, "save and stop when the command has run for so long, as a signal would; for batch systems", decides=False
    )
    log_every_steps: int = setting(
        50, "steps between two log lines; only there the loop waits for the device", decides=False
    )
    eval_every_epochs: int = setting(
        1, "epochs between two evaluations while training; 0: only at the end", decides=False
    )


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """data: what is learned from"""

    dataset: Literal["cifar100", "cifar10", "digits", "imagenet"] = setting(
        ..., "data set; imagenet: ILSVRC2012, or any other folder of photographs"
    )
    root: str = setting("data", "folder that holds the data set's files", decides=False)
    download: bool = setting(False, "fetch the files into data.root when they are not there", decides=False)
    backend: Literal["resident", "ffcv", "dali", "folder", "synthetic"] = setting(
        "resident",
        "resident: the whole set in the device's memory; ffcv: .beton files; dali, folder: image files by their "
        "manifest, decoded by NVIDIA DALI or by Pillow; synthetic: random images, for speed only",
    )
    workers: int | None = setting(
        None, "threads (ffcv, dali) or processes (folder) that decode; default one for each core", decides=False
    )
    batches_ahead: int = setting(3, "batches that are decoded before they are asked for", decides=False)
    os_cache: bool = setting(
        True,
        "ffcv: map the file and let the system keep it in memory; false reads each image and lets the system forget "
        "it, for files far larger than the memory",
        decides=False,
    )
    beton_decoder: Literal["native", "ffcv"] = setting(
        "native",
        "ffcv: native decodes what a crop needs and resamples as Pillow does; ffcv decodes as FFCV's own loader does",
    )
    dali_decoder: Literal["cpu", "gpu"] = setting("cpu", "dali: decode on the CPU, or in the GPU's decoder engines")
    seed: int | None = setting(None, "seed of order and views; default run.seed")
    augment: Literal["standard", "none"] = setting(
        "standard", "standard: the data set's usual crop and flip; none: the plain image"
    )
    resolution_px: int = setting(224, "photographs: side of the views")
    start_resolution_px: int | None = setting(
        None, "photographs: side of the training views before resolution_ramp; default resolution_px throughout"
    )
    resolution_ramp: tuple[float, ...] = setting(
        (0.75, 0.875), "fractions of the run between which the side grows, in multiples of 32"
    )
    eval_resolution_px: int | None = setting(None, "photographs: side of the evaluation's views; default resolution_px")
    eval_crop_share: float = setting(0.875, "photographs: side of the evaluation's centre square, over the short side")
    crop_area: tuple[float, ...] = setting((0.08, 1.0), "photographs: smallest and largest share that a crop takes")
    crop_aspect: tuple[float, ...] = setting((0.75, 4 / 3), "photographs: smallest and largest width over height")
    rotation_degrees: float = setting(0.0, "training views are turned by up to this angle to either side")
    pixel_shift: float = setting(
        0.0, "each colour channel of a training view is shifted by up to this value, of 255, to either side"
    )
    train_limit: int | None = setting(None, "train on this many images, as many of each class, give or take one")
    val_limit: int | None = setting(
        None, "evaluate on this many images, as many of each class, give or take one", decides=False
    )
    holdout: int = setting(
        0,
        "keep this many training images, as many of each class, give or take one, and evaluate on them instead of the "
        "test set",
    )


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """model: the network, the same in every generation"""

    name: str = setting(
        ...,
        f"network: {', '.join(NETWORKS)}, or torchvision/NAME or timm/NAME, as that library initialises it; "
        f"{', '.join(PHOTO_MODELS)} are for photographs",
    )
    downsample: Literal["strided", "pooled"] = setting(
        "strided", "strided: He et al.; pooled: average pooling between the stages, as arXiv 1805.05551 words it"
    )
    memory_efficient: bool = setting(
        False,
        "DenseNets: joined inputs and their batch-norms are computed again in the backward pass instead of kept; the "
        "same bits and the same node, but for engine compile",
        silent=True,
    )


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """train: how each generation is trained"""

    epochs: int = setting(..., "passes over the training set")
    batch_size: int = setting(128, "images in a step, over all devices together")
    accumulate_steps: int = setting(
        1, "parts of a batch that pass through the network one after the other, to need less memory"
    )
    lr: float = setting(0.1, "initial learning rate")
    lr_schedule: Literal["steps", "cosine", "triangular"] = setting(
        "steps",
        "after the warm-up: steps at the milestones; cosine to 0; triangular: a straight line to 0",
    )
    warmup_epochs: float = setting(0.0, "epochs over which the learning rate grows from near 0 to lr")
    lr_milestones: tuple[float, ...] = setting((0.5, 0.75), "fractions of the run after which the learning rate falls")
    lr_factor: float = setting(0.1, "what the learning rate is multiplied with at a milestone")
    momentum: float = setting(0.9, "momentum of SGD")
    nesterov: bool = setting(True, "Nesterov's form of the momentum")
    weight_decay: float = setting(1e-4, "L2 penalty")
    decay_norm_and_bias: bool = setting(True, "apply the weight decay to batch-norm parameters and biases too")
    precision: Literal["fp32", "bf16", "fp16"] = setting(
        "fp32", "of the training step; parameters and evaluation are fp32 always"
    )
    engine: Literal["eager", "compile", "graph"] = setting(
        "eager",
        "compile: torch.compile of forward and backward; graph: whole steps as CUDA graphs (on a CPU the same program, "
        "not captured); both need seconds to start",
    )
    graph_steps: int = setting(
        8,
        "engine graph: steps that are launched at once, with data.backend=resident; a stop waits for them",
        decides=False,
    )
    kernels: Literal["torch", "triton"] = setting(
        "torch",
        "triton: fused loss kernels, and with data.backend=resident one that makes the batches; need an NVIDIA GPU",
        silent=True,
    )
    batchnorm: Literal["torch", "triton"] = setting(
        "torch", "triton: batch-norm, residual sum and ReLU as one fused operation; needs an NVIDIA GPU", silent=True
    )


@dataclass(frozen=True, kw_only=True)
class TeacherSettings:
    """teacher: how a student's teacher is asked"""

    engine: Literal["folded", "fused", "compile", "plain"] = setting(
        "folded",
        "folded: batch-norms folded into convolutions; fused: and convolutions joined with the sums and ReLUs after "
        "them; compile: torch.compile of the folded network; plain: the network as it is, for those that torch.fx "
        "cannot trace",
        silent=True,
    )
    look_ahead_batches: int = setting(1, "batches of the student that the teacher sees at once", decides=False)
    labels: Literal["live", "table", "store"] = setting(
        "live",
        "table: the teacher labels every possible view of every image once, and the table stays beside its weights; "
        "for data sets whose crops are not resampled. store: what it says of the views that the first student sees is "
        "kept, for later students of the same views",
        decides=False,
    )
    store_classes: int | None = setting(
        None, "labels=store: classes of each view that are kept; default all of up to 100, of more 16", decides=False
    )
    store_dtype: Literal["fp16", "fp32"] = setting("fp16", "labels=store: in which they are kept", decides=False)

    def truncation(self, classes: int) -> dict[str, Any]:
        """What a label store's truncation adds to a student's identity; {}: it leaves the teacher's word as it is.

        Args:
            classes: of the data set; 0: known only when it is opened.
        """
        if self.labels != "store":
            return {}
        if not classes:
            # Rounded or not, whether all are kept is not known yet.
            kept: Any = self.store_classes or [DENSE_CLASSES, KEPT_CLASSES]
            return {"store_classes": kept, "store_dtype": self.store_dtype}
        kept = kept_classes(classes, self.store_classes)
        exact = kept == classes and self.store_dtype == "fp32"
        return {} if exact else {"store_classes": kept, "store_dtype": self.store_dtype}


@dataclass(frozen=True, kw_only=True)
class GenSettings:
    """gen: the generations"""

    generations: int = setting(5, "students after the patriarch", decides=False)
    patriarch: Literal["tolerant", "cross_entropy", "label_smoothing", "confidence_penalty", "soteacher"] = setting(
        "tolerant",
        "objective of generation 0; soteacher: cross-entropy with a Lipschitz and a consistency term",
    )
    k: int = setting(5, "classes in the score difference of the tolerant patriarch")
    confidence: float = setting(
        0.6, "what the tolerant patriarch's first class shall get, in [1/k, 1]; 1 is plain cross-entropy"
    )
    k_mass: float | None = setting(
        None,
        "tolerant: each sample's k is as many classes as together have this probability, 2 at least and gen.k at most",
        silent=True,
    )
    smoothing: float = setting(0.1, "label_smoothing: share of the labels that is spread evenly", silent=True)
    entropy_weight: float = setting(0.1, "confidence_penalty: weight of the entropy", silent=True)
    lipschitz_weight: float = setting(1e-5, "soteacher: weight of the Lipschitz term", silent=True)
    consistency_weight: float = setting(
        1.0, "soteacher: weight of the consistency term, at the end of a linear ramp", silent=True
    )
    consistency_dtype: Literal["fp32", "fp16"] = setting(
        "fp32", "soteacher: of each image's mean prediction, which is kept on the device", silent=True
    )
    student_confidence: Numbers = setting(
        1.0,
        "a tolerant term in a student's share of the labels: what its first class shall get, as gen.confidence says it "
        "of the patriarch; 1: none; a list gives one value a student",
        silent=True,
    )
    student_k: Counts | None = setting(
        None, "classes in it; default gen.k; a list gives one value a student", silent=True
    )
    teacher_weight: Numbers = setting(
        0.6, "share of the teacher in a student's objective, in [0, 1]; a list gives one value a student"
    )
    temperature: Numbers = setting(
        1.0, "softening of teacher and student in the distillation term; a list gives one value a student"
    )
    ensemble_teachers: int = setting(
        1, "a student's teacher is the mean prediction of up to so many generations before it", silent=True
    )
    only: int | None = setting(
        None, "train this generation alone; what has one value a student then holds for it alone on the command line"
    )
    teacher: str | None = setting(None, "with gen.only: the teacher, as a run folder, a node or a .safetensors file")


@dataclass(frozen=True, kw_only=True)
class DistSettings:
    """dist: several processes that train together, one a GPU; batches and learning rates do not depend on how many"""

    processes: int | None = setting(
        None, "processes on this machine; default one for each GPU, one on a CPU", decides=False
    )
    batchnorm: Literal["local", "synchronised"] = setting(
        "local",
        "local: each process's part of a batch has statistics of its own; synchronised: the whole batch has",
        silent=True,
    )
    buffers: Literal["mean", "first"] = setting(
        "mean", "running statistics of batch-norm: the mean over the processes, or those of the first", silent=True
    )
    timeout_minutes: float = setting(
        10.0, "a process that does not answer the others for so long ends the run, and is named", decides=False
    )
    max_restarts: int = setting(
        3, "how often all processes are started again where one of them was lost, to go on from the last save",
        decides=False,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole recipe. Construction checks every rule; a broken one raises UserError."""

    run: RunSettings = field(default_factory=RunSettings)
    data: DataSettings
    model: ModelSettings
    train: TrainSettings
    gen: GenSettings = field(default_factory=GenSettings)
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    dist: DistSettings = field(default_factory=DistSettings)

    def __post_init__(self) -> None:
        check_recipe(self)

    @property
    def eta(self) -> float:
        """Weight of the score difference in the patriarch's objective; 0: there is none."""
        if self.gen.patriarch != "tolerant":
            return 0.0
        return eta_for_confidence(self.gen.confidence, self.gen.k)

    def teacher_weight(self, generation: int) -> float:
        """Teacher's share in the objective of the given student, 1..G."""
        return _of_generation(self.gen.teacher_weight, generation)

    def student_k(self, generation: int) -> int:
        """Classes in the score difference of the given student, 1..G."""
        k = self.gen.student_k
        if k is None:
            return self.gen.k
        return k[generation - 1] if isinstance(k, tuple) else k

    def student_eta(self, generation: int) -> float:
        """Weight of the score difference in the given student's share of the labels, 1..G; 0: there is none."""
        return eta_for_confidence(_of_generation(self.gen.student_confidence, generation), self.student_k(generation))

    def temperature(self, generation: int) -> float:
        """Temperature of the given student, 1..G."""
        return _of_generation(self.gen.temperature, generation)

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """All settings, as plain values in the order of declaration."""
        return {name: _plain(getattr(self, name)) for name in SECTIONS}

    def identity(self) -> dict[str, Any]:
        """The settings that decide the trained weights, and how many generations are wanted."""
        decisive = {name: _decisive(getattr(self, name)) for name in SECTIONS}
        decisive["gen"] |= {"generations": self.gen.generations}
        decisive["data"] |= {"val_limit": self.data.val_limit}
        if self.train.engine != "compile":
            # Elsewhere what is computed again is the same bits; a compiler joins operators in another way.
            decisive["model"].pop("memory_efficient", None)
        decisive["teacher"] |= self.teacher.truncation(DATASETS[self.data.dataset].classes)
        return {name: values for name, values in decisive.items() if values}

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
    "teacher": TeacherSettings,
    "dist": DistSettings,
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


def _plain(section: Any) -> dict[str, Any]:
    values = {f.name: getattr(section, f.name) for f in fields(section)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _decisive(section: Any) -> dict[str, Any]:
    values = _plain(section)
    silent = [f.name for f in fields(section) if f.metadata["silent"] and values[f.name] == f.default]
    return {f.name: values[f.name] for f in fields(section) if f.metadata["decides"] and f.name not in silent}


def _of_generation(value: Numbers, generation: int) -> float:
    return value[generation - 1] if isinstance(value, tuple) else value
