"""torch.compile for a few static shapes, loud where torch would be quiet."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar, cast

import torch

Compiled = TypeVar("Compiled", bound=Callable[..., object])


def compiled(function: Compiled, shapes: int) -> Compiled:
    """Compiles for static shapes, which make faster code; one shape too many raises.

    Args:
        function: of tensors, or a network.
        shapes: of the tensors that it will be called with.
    """
    # Where CUDA's compiler is installed and no GPU is, torch warns of it on every start.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # Past its limit of compilations torch would go on in eager mode and only log it.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, shapes)
    return cast(Compiled, torch.compile(function, dynamic=False))
