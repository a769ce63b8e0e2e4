"""All that doctor tries, in the order in which it is told. Importing this imports none of it."""

from __future__ import annotations

from collections.abc import Callable

from fastgen.doctor import driver, machine, torch_trials, training
from fastgen.doctor.findings import Answer, Place, Trial
from fastgen.doctor.packages import apex, package, scikit_learn, tool
from fastgen.extras import PACKAGES

# What each trial of a group shares a process with; those that take long, hang or crash have one of their own.
MACHINE, TRAINING, CORE, SPEED = "Machine", "Training", "Packages of the core", "Speed"
TOGETHER, DATA, EXTRAS, DEVELOPMENT = "Processes that train together", "Data", "Extras", "Development of fastgen"


def _core(name: str) -> Trial:
    return Trial(name, CORE, PACKAGES[name].purpose, package(name), "packages", False, name)


def _extra(name: str, *, needs_torch: bool = False) -> Trial:
    session = "torch" if needs_torch else "packages"
    return Trial(name, EXTRAS, PACKAGES[name].purpose, package(name), session, needs_torch, name)


def _tool(name: str) -> Trial:
    return Trial(name, DEVELOPMENT, PACKAGES[name].purpose, tool(name), "packages", False, name)


def _machine(name: str, purpose: str, probe: Callable[[Place], Answer], session: str = "machine") -> Trial:
    return Trial(name, MACHINE, purpose, probe, session, needs_torch=False)


TRIALS: tuple[Trial, ...] = (
    _machine("python", "everything", machine.python),
    _machine("cores", "data.workers, threads", machine.cores),
    _machine("memory", "data.backend=resident and others", machine.memory),
    _machine("shared_memory", "workers of data.backend=folder", machine.shared_memory),
    _machine("runs", "run folders", machine.runs, "runs"),
    _machine("driver", "GPUs", driver.driver, "driver"),
    Trial("torch", TRAINING, PACKAGES["torch"].purpose, torch_trials.torch_itself, "torch", False, "torch"),
    Trial(
        "torchvision", TRAINING, PACKAGES["torchvision"].purpose, package("torchvision"), "torch", package="torchvision"
    ),
    Trial("gpu", TRAINING, "training on a GPU", torch_trials.gpu, "torch"),
    Trial("training", TRAINING, "everything", training.training, "training"),
    *(_core(name) for name, about in PACKAGES.items() if not about.extras and name not in ("torch", "torchvision")),
    Trial("bf16", SPEED, "train.precision=bf16", torch_trials.bf16, "torch"),
    Trial("fp16", SPEED, "train.precision=fp16", torch_trials.fp16, "torch"),
    Trial("compile", SPEED, "train.engine=compile, teacher.engine=compile", torch_trials.compiling, "compile"),
    Trial("graphs", SPEED, "train.engine=graph, captured", torch_trials.graphs, "cuda"),
    Trial("triton", SPEED, "train.kernels=triton, train.batchnorm=triton", torch_trials.triton, "triton"),
    Trial("gloo", TOGETHER, "dist.processes of several on a CPU; control of those on GPUs", torch_trials.gloo, "gloo"),
    Trial("nccl", TOGETHER, "dist.processes of several GPUs", torch_trials.nccl, "cuda"),
    Trial("native", DATA, "data.beton_decoder=native, the default of data.backend=ffcv", training.native, "native"),
    Trial("ffcv", DATA, PACKAGES["ffcv"].purpose, training.ffcv, "ffcv", package="ffcv"),
    Trial("dali", DATA, PACKAGES["nvidia-dali-cuda120"].purpose, training.dali, "dali", False, training.dali_package()),
    Trial("scikit-learn", EXTRAS, PACKAGES["scikit-learn"].purpose, scikit_learn, "packages", False, "scikit-learn"),
    _extra("timm", needs_torch=True),
    _extra("submitit"),
    _extra("onnx"),
    _extra("onnxruntime"),
    _extra("onnxscript"),
    Trial("apex", EXTRAS, "benchmarks: FusedSGD of NVIDIA's beside torch's", apex, "apex", needs_torch=False),
    *(_tool(name) for name, about in PACKAGES.items() if not about.module),
)
