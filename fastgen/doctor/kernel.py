"""A small Triton kernel, to see whether kernels compile and run."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

WIDTH = 64
# Hopper's, as good as any: what is compiled is not run.
TARGET = ("cuda", 90, 32)


@triton.jit  # type: ignore[untyped-decorator]
def _doubled(x_ptr, y_ptr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.arange(0, WIDTH)
    tl.store(y_ptr + places, 2 * tl.load(x_ptr + places))


def compile_doubled() -> int:
    """Compiles the kernel for a GPU that need not be here; gives the bytes of its machine code."""
    source = ASTSource(_doubled, {"x_ptr": "*fp32", "y_ptr": "*fp32", "WIDTH": "constexpr"}, {"WIDTH": WIDTH})
    return len(triton.compile(source, target=GPUTarget(*TARGET)).asm["cubin"])


def double(x_N: Tensor) -> Tensor:
    """Twice the fp32 values of a tensor of WIDTH on a GPU."""
    import torch

    y_N = torch.empty_like(x_N)
    _doubled[(1,)](x_N, y_N, WIDTH)
    return y_N
