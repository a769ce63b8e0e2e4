"""Running statistics of batch-norm where several processes have each its own.

Training reads none of them, so they differ from process to process until the network is measured or saved. Then they
are brought together as the recipe says: the mean over the processes, or those of the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from fastgen.distributed import Group

Rule = Literal["mean", "first"]


def own_statistics(model: nn.Module) -> Tensor:
    """Running statistics of this process, fp64 (N,), a copy on the CPU: exact for fp32."""
    found = _statistics(model)
    return torch.cat([own.detach().double().reshape(-1).cpu() for own in found]) if found else torch.zeros(0).double()


def put_statistics(model: nn.Module, values_N: Tensor) -> None:
    """Writes what `own_statistics` gave, in place."""
    first = 0
    with torch.no_grad():
        for own in _statistics(model):
            own.copy_(values_N[first : first + own.numel()].reshape(own.shape))
            first += own.numel()


def together(rows: Sequence[Tensor], rule: Rule) -> Tensor:
    """Statistics of all processes, by rank, as one."""
    if rule == "first" or len(rows) == 1:
        return rows[0]
    return torch.stack(list(rows)).mean(0)


def merge_statistics(model: nn.Module, group: Group, rule: Rule) -> None:
    """Brings the statistics of all processes together, in each of them."""
    if group.world > 1:
        put_statistics(model, together(group.gather(own_statistics(model)), rule))


@contextmanager
def merged_statistics(model: nn.Module, group: Group, rule: Rule) -> Iterator[None]:
    """For a measurement in the middle of a training; afterwards each process has its own again."""
    if group.world == 1:
        yield
        return
    own = own_statistics(model)
    merge_statistics(model, group, rule)
    try:
        yield
    finally:
        put_statistics(model, own)


def _statistics(model: nn.Module) -> list[Tensor]:
    """Floating-point buffers; what counts batches is the same everywhere."""
    return [buffer for buffer in model.buffers() if buffer.is_floating_point()]
