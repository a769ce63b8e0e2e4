"""Chooses the device and sets what torch lets be set for the whole process alone."""

from __future__ import annotations

import os

import torch

from fastgen.config import RunSettings
from fastgen.errors import UserError


def device_kind(run: RunSettings) -> str:
    """`cuda` or `cpu`, as the recipe asks for; `auto` is the GPU where there is one.

    Raises:
        UserError: `cuda` is asked for and there is none.
    """
    if run.device == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device = cuda: torch sees no GPU here: set run.device=cpu or auto")
    return ("cuda" if torch.cuda.is_available() else "cpu") if run.device == "auto" else run.device


def choose_device(run: RunSettings, number: int | None = None) -> torch.device:
    """The device that the recipe asks for.

    Args:
        run: settings.
        number: of the GPU, where several processes share the machine; None: the current one.

    Raises:
        UserError: `cuda` is asked for and there is none, or none of this number.
    """
    kind = device_kind(run)
    if kind == "cuda" and number is not None:
        if number >= torch.cuda.device_count():
            raise UserError(
                f"process {number} of this machine has no GPU: torch sees {torch.cuda.device_count()}: start as many "
                "processes as there are GPUs"
            )
        torch.cuda.set_device(number)
    if kind == "cuda":
        # fp32 means fp32: torch would round the inputs of convolutions to ten bits.
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
        # Shapes are fixed in a run, so the fastest algorithm of each layer is worth finding once.
        torch.backends.cudnn.benchmark = not run.deterministic
    if run.deterministic:
        # cuBLAS reads this when it starts; without it torch refuses its matrix products.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(run.deterministic)
    return torch.device(kind) if number is None or kind == "cpu" else torch.device(kind, number)
