"""What a training step is measured against: bare PyTorch loops, timm's training, and NVIDIA's optimizer.

Each is one whole step on one batch that is held on the device, channels-last; nothing of fastgen's trainer is in it.
All of them minimise what the trainer's patriarch of plain cross-entropy or its student would, by SGD with Nesterov's
momentum. What this machine cannot run is said, by `missing`, and never measured by something else in its place.

Shapes: B images, C classes.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import Step
from benchmarks.rigs import LR, STUDENT, Case, calibrate, fresh_network
from fastgen.compiling import compiled
from fastgen.models import initialise
from fastgen.step import DTYPES

MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4
# Of a student's loss; the labels have the rest.
TEACHER_WEIGHT = STUDENT.teacher_weight

# Newer than timm itself.
TIMM_TASKS = ("ClassificationTask", "LogitDistillationTask", "DistillationTeacher")

# (parameters, lr, momentum, nesterov, weight_decay) -> optimizer; all but the first by name.
MakeOptimizer = Callable[..., torch.optim.Optimizer]
# (images, labels) -> mean loss
LossOf = Callable[[Tensor, Tensor], Tensor]


class HeldBatch(NamedTuple):
    """One batch on the device: images (B, channels, H, W) fp32 within -1..1, channels-last; labels (B) int64."""

    images_NCHW: Tensor
    labels_B: Tensor


@dataclass(frozen=True)
class Loop:
    """A training loop that is shown the same batch again and again.

    Attributes:
        network: that learns, in train mode.
        batch: that it learns.
        loss_of: forward pass and loss, in the precision of the case.
        learn: backward pass and update, from the loss.
    """

    network: nn.Module
    batch: HeldBatch
    loss_of: LossOf
    learn: Callable[[Tensor], None]

    def loss(self) -> Tensor:
        """The mean loss of the batch as the network is now."""
        return self.loss_of(*self.batch)

    def step(self) -> None:
        """One whole training step; may leave work queued on the device."""
        self.learn(self.loss())


def held_batch(case: Case) -> HeldBatch:
    """The first images of the case's split."""
    pixels_NHWC = torch.from_numpy(case.split.images_NHWC[: case.batch_size]).to(case.device)
    images_NCHW = (pixels_NHWC.float() / 127.5 - 1).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    return HeldBatch(images_NCHW, torch.from_numpy(case.split.labels[: case.batch_size]).to(case.device))


def _autocast(case: Case) -> torch.autocast:
    dtype = DTYPES[case.precision]
    return torch.autocast(case.device.type, dtype, enabled=dtype != torch.float32)


def bare_step(case: Case, optimizer: MakeOptimizer = torch.optim.SGD) -> Step:
    """What anybody would write: autocast, cross-entropy, a gradient scaler for fp16, plain SGD."""
    return bare_loop(case, optimizer).step


def bare_loop(case: Case, optimizer: MakeOptimizer = torch.optim.SGD) -> Loop:
    """The loop of `bare_step`.

    Args:
        case: what is trained, and in which precision.
        optimizer: a class of optimizers, or a function that makes one.
    """
    network = fresh_network(case, init_seed=0).train()
    return Loop(network, held_batch(case), _bare_loss(case, network), _bare_learn(case, network, optimizer))


def compiled_bare_step(case: Case) -> Step:
    """The bare loop with torch.compile around its forward pass and loss, for this one shape."""
    return compiled_bare_loop(case).step


def compiled_bare_loop(case: Case) -> Loop:
    """The loop of `compiled_bare_step`."""
    network = fresh_network(case, init_seed=0).train()
    loss_of = compiled(_bare_loss(case, network), shapes=1)
    return Loop(network, held_batch(case), loss_of, _bare_learn(case, network))


def bare_student_step(case: Case) -> Step:
    """The bare loop of a student: its teacher is asked at every step, as it was trained, with its batch-norms."""
    return bare_student_loop(case).step


def bare_student_loop(case: Case, optimizer: MakeOptimizer = torch.optim.SGD) -> Loop:
    """The loop of `bare_student_step`; its arguments are those of `bare_loop`."""
    network, batch = fresh_network(case, init_seed=0).train(), held_batch(case)
    teacher = calibrate(fresh_network(case, init_seed=1), batch.images_NCHW)

    def loss_of(images_NCHW: Tensor, labels_B: Tensor) -> Tensor:
        with _autocast(case):
            with torch.no_grad():
                teacher_logits_BC = teacher(images_NCHW)
            return student_loss(network(images_NCHW), teacher_logits_BC, labels_B)

    return Loop(network, batch, loss_of, _bare_learn(case, network, optimizer))


def student_loss(logits_BC: Tensor, teacher_logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """(1-lambda) CE(y, p) + lambda KL(teacher || p), as people write it; mean over the batch."""
    teacher_BC = F.softmax(teacher_logits_BC, dim=1)
    divergence = F.kl_div(F.log_softmax(logits_BC, dim=1), teacher_BC, reduction="batchmean")
    return (1 - TEACHER_WEIGHT) * F.cross_entropy(logits_BC, labels_B) + TEACHER_WEIGHT * divergence


def _bare_loss(case: Case, network: nn.Module) -> LossOf:
    def loss_of(images_NCHW: Tensor, labels_B: Tensor) -> Tensor:
        with _autocast(case):
            return F.cross_entropy(network(images_NCHW), labels_B)

    return loss_of


def _bare_learn(case: Case, network: nn.Module, optimizer: MakeOptimizer = torch.optim.SGD) -> Callable[[Tensor], None]:
    made = optimizer(network.parameters(), lr=LR, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY)
    scaler = torch.amp.GradScaler(case.device.type, enabled=case.precision == "fp16")

    def learn(loss: Tensor) -> None:
        made.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(made)
        scaler.update()

    return learn


def fused_sgd(parameters: Any, **settings: Any) -> torch.optim.Optimizer:
    """torch's SGD in its fused form: one call for all parameters."""
    optimizer = torch.optim.SGD(parameters, fused=True, **settings)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            # torch leaves it uninitialised where the first fp16 step overflows and is skipped; NaNs are faster.
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def apex_sgd() -> type[torch.optim.Optimizer] | None:
    """FusedSGD of NVIDIA's apex, None where nobody built it here.

    The package index has an unrelated package of that name. It is told apart by what is in it: the extension amp_C
    is built with NVIDIA's alone, and without it FusedSGD cannot be made.
    """
    # Asked first, so that the unrelated package is not even imported.
    if importlib.util.find_spec("amp_C") is None or importlib.util.find_spec("apex") is None:
        return None
    try:
        found: Any = importlib.import_module("apex.optimizers")
    except ImportError:
        return None
    return getattr(found, "FusedSGD", None)


def apex_step(case: Case) -> Step:
    """The bare loop with apex's FusedSGD, to be seen beside torch's `fused_sgd`.

    Raises:
        ValueError: it is not here.
    """
    optimizer = apex_sgd()
    if optimizer is None:
        raise ValueError("apex.optimizers.FusedSGD is not here")
    return bare_step(case, optimizer)


def timm_version() -> str | None:
    """The version of timm that is installed, None where it is not."""
    try:
        return importlib.metadata.version("timm")
    except importlib.metadata.PackageNotFoundError:
        return None


def timm_step(case: Case) -> Step:
    """One step of timm's training: its task, network, optimizer and scaler.

    Left out, in timm's favour: its script reads the loss back to the host at every step.
    """
    return timm_loop(case).step


def timm_loop(case: Case) -> Loop:
    """The loop of `timm_step`."""
    network = timm_network(case, init_seed=0).train()
    task = _timm("timm.task").ClassificationTask(network, nn.CrossEntropyLoss(), device=case.device, verbose=False)
    return Loop(network, held_batch(case), _timm_loss(case, task), _timm_learn(case, network))


def timm_student_step(case: Case) -> Step:
    """One step of timm's distillation of logits, with a teacher of the same architecture.

    In timm's favour the teacher is channels-last too, which its script would leave as it was.
    """
    return timm_student_loop(case).step


def timm_student_loop(case: Case) -> Loop:
    """The loop of `timm_student_step`."""
    tasks = _timm("timm.task")
    network, batch = timm_network(case, init_seed=0).train(), held_batch(case)
    teacher = tasks.DistillationTeacher(
        calibrate(timm_network(case, init_seed=1), batch.images_NCHW), device=case.device, dtype=torch.float32
    )
    task = tasks.LogitDistillationTask(
        network,
        teacher,
        nn.CrossEntropyLoss(),
        # The teacher has the rest.
        task_loss_weight=1 - TEACHER_WEIGHT,
        temperature=1.0,
        device=case.device,
        verbose=False,
    )
    return Loop(network, batch, _timm_loss(case, task), _timm_learn(case, network))


def timm_network(case: Case, init_seed: int) -> nn.Module:
    """timm's own network where it has that architecture, else fastgen's, channels-last, on the device."""
    timm = _timm("timm")
    if timm.is_model(case.model):
        network = timm.create_model(case.model, num_classes=case.facts.classes, in_chans=case.facts.channels)
        # Weights are drawn in the order of the memory: channels-last first, so that a seed gives fastgen's.
        return initialise(network.to(memory_format=torch.channels_last), init_seed).to(case.device)
    network = fresh_network(case, init_seed)
    # Distillation compares what student and teacher want their pixels to be normalised by.
    vars(network).update(pretrained_cfg={"mean": case.facts.mean, "std": case.facts.std})
    return network


def _timm(module: str) -> Any:
    # Here and not above: it need not be installed, and its import takes seconds. Not all of its types are exported.
    return importlib.import_module(module)


def _timm_loss(case: Case, task: nn.Module) -> LossOf:
    def loss_of(images_NCHW: Tensor, labels_B: Tensor) -> Tensor:
        with _autocast(case):
            return task(images_NCHW, labels_B)["loss"]

    return loss_of


def _timm_learn(case: Case, network: nn.Module) -> Callable[[Tensor], None]:
    # Its "sgd" has Nesterov's momentum; batch-norms and biases do not decay.
    optimizer = _timm("timm.optim").create_optimizer_v2(
        network, opt="sgd", lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    scaler = _timm("timm.utils").NativeScaler(device=case.device.type) if case.precision == "fp16" else None

    def learn(loss: Tensor) -> None:
        if scaler is not None:
            scaler(loss, optimizer)
        else:
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()

    return learn


def _why_no_timm(case: Case) -> str | None:
    version = timm_version()
    if version is None:
        return "timm is not installed"
    try:
        tasks = _timm("timm.task")
    except ImportError as error:
        # Too old, or without what it needs.
        return f"timm {version} cannot be used: {error}"
    lacking = [name for name in TIMM_TASKS if not hasattr(tasks, name)]
    return f"timm {version} has no {', '.join(lacking)}" if lacking else None


def _why_no_apex(case: Case) -> str | None:
    if case.device.type != "cuda":
        return "no GPU"
    if apex_sgd() is not None:
        return None
    if importlib.util.find_spec("apex") is None:
        return "apex is not installed"
    return "the package apex that is installed is not NVIDIA's, or was built without its extensions"


def _nothing(case: Case) -> None:
    return None


class Baseline(NamedTuple):
    """How a baseline is made, and what stands against it on this machine, if anything does."""

    make: Callable[[Case], Step]
    why_not: Callable[[Case], str | None] = _nothing


BASELINES = {
    "bare": Baseline(bare_step),
    "bare compile": Baseline(compiled_bare_step),
    "bare fused sgd": Baseline(lambda case: bare_step(case, fused_sgd)),
    "apex": Baseline(apex_step, _why_no_apex),
    "bare student": Baseline(bare_student_step),
    "timm": Baseline(timm_step, _why_no_timm),
    "timm student": Baseline(timm_student_step, _why_no_timm),
}


def baselines(case: Case) -> dict[str, Step]:
    """All steps that this machine can run, by name; `missing` tells of the others."""
    return {name: baseline.make(case) for name, baseline in BASELINES.items() if baseline.why_not(case) is None}


def missing(case: Case) -> dict[str, str]:
    """What this machine cannot run: name -> `not measured (why)`, for the caller to print."""
    reasons = {name: baseline.why_not(case) for name, baseline in BASELINES.items()}
    return {name: f"not measured ({reason})" for name, reason in reasons.items() if reason is not None}
