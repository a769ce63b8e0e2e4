"""Where kernels can run, and on which device they are launched."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton

from fastgen.errors import UserError


def require_runnable(device: torch.device, key: str) -> None:
    """Refuses a device that Triton has no code for.

    Args:
        device: where kernels would run.
        key: the setting that asks for them.

    Raises:
        UserError: the device is no NVIDIA GPU, and Triton's interpreter is not asked for.
    """
    if device.type != "cuda" and not interpreted():
        raise UserError(
            f"{key}=triton needs an NVIDIA GPU, this is {device.type}: set {key}=torch "
            "(TRITON_INTERPRET=1 interprets the kernels on a CPU, thousands of times slower, to test them)"
        )


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, in numpy on the CPU."""
    return bool(triton.knobs.runtime.interpret)


def launched_on(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()
