"""Where a run took place: versions, machine, commit. For the record, and for nothing else."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fastgen import __version__
from fastgen.processor import cpu_name

PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "numpy",
    "safetensors",
    "pillow",
    "scikit-learn",
    "ffcv",
    "nvidia-dali-cuda120",
)


def describe_environment(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """Versions, processor, device, commit and command line as plain values.

    Args:
        device: of this process.
        processes: of the run.
    """
    return {
        "fastgen": __version__,
        "commit": commit(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "machine": platform.machine(),
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device_name(device),
        "processes": processes,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
    }


def device_name(device: torch.device) -> str:
    """Name of the device that trains."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def commit() -> str | None:
    """Commit of the checkout that runs, with `+changes` where files differ from it; None outside of git."""
    folder = Path(__file__).parent
    try:
        head = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if changed else "")


def _git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *words], check=True, capture_output=True, text=True).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
