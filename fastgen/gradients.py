"""Gradients of several processes, summed while backpropagation goes on: torch's DistributedDataParallel.

Its own rule, the mean over the processes, is replaced by the plain sum: each process has weighed its part of the batch
by its images already, so parts may differ in size, and the sum of two is the very sum that one process adds up over two
parts. 16-bit gradients are summed in fp32, as one process adds them up.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastgen.distributed import Group
from fastgen.grade import Graded
from fastgen.step import Forward
from fastgen.working_copy import WorkingCopy

# DDP times every hundredth step, too: it would wait for events, which no CUDA graph that is being captured may do.
_NEVER = 2**31 - 1
# torch 2.14 has a new name for it and warns of the old one.
_KNOWN = inspect.signature(DistributedDataParallel.__init__).parameters
_BUFFERS_ALONE: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _KNOWN else "broadcast_buffers": False
}


class Reducer:
    """Sums gradients over the processes; where none has joined another it does nothing.

    Args:
        forward: of a part of a batch, by the working copy.
        working: holds the weights.
        group: of the run.
        parts: in which each process takes its share of a batch.
        stream: on which steps will be captured; None: they are not, and run where they are called.
    """

    def __init__(
        self,
        forward: Forward,
        working: WorkingCopy,
        group: Group,
        parts: int = 1,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self._working = working
        self._forward = forward
        self._wrapped: DistributedDataParallel | None = None
        if group.control is not None:
            self._wrapped = _wrapped(_Whole(working.network, forward), stream, static=parts == 1)
            # DDP compares annotations of a hook, which it takes for classes; ours are texts.
            self._wrapped.register_comm_hook(working, lambda working, bucket: _sum(working, bucket))

    def forward(self, last: bool) -> Forward:
        """What a part of a batch goes through; the backward pass of the last one sums gradients over the processes.

        Args:
            last: whether it is the last part of its batch. Earlier ones pass by DDP and are added up in each process.
        """
        return self._forward if self._wrapped is None or not last else self._wrapped

    def collect(self, last: bool) -> None:
        """Takes 16-bit gradients over into those of the weights, after the backward pass of a part."""
        if self._wrapped is not None and last:
            # The hook poured them while they came.
            self._working.drop()
        else:
            self._working.collect()


class _Whole(nn.Module):
    """The forward pass with the loss as the module that DDP takes; compiled or not."""

    def __init__(self, network: nn.Module, call: Callable[..., Graded]) -> None:
        super().__init__()
        self.network = network
        self._call = call

    def forward(self, *arguments: Any) -> Graded:
        return self._call(*arguments)


def _wrapped(whole: nn.Module, stream: torch.cuda.Stream | None, *, static: bool) -> DistributedDataParallel:
    # DDP counts the gradients of a static graph, those of passes that it is left out of too, and then sends sums that
    # are not whole (seen with torch 2.14.1): where there are such passes its graph is not static.
    def wrap() -> DistributedDataParallel:
        # Running statistics stay each process's own: nothing reads them while it trains (see `buffers`).
        wrapped = DistributedDataParallel(whole, gradient_as_bucket_view=True, static_graph=static, **_BUFFERS_ALONE)
        wrapped._set_ddp_runtime_logging_sample_rate(_NEVER)
        return wrapped

    if stream is None:
        return wrap()
    # Gradients are accumulated on the stream on which DDP was made: another one than the steps' would be waited for,
    # parameter by parameter.
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        wrapped = wrap()
    torch.cuda.current_stream().wait_stream(stream)
    return wrapped


def _sum(working: WorkingCopy, bucket: Any) -> torch.futures.Future[Tensor]:
    """DDP's hook: the sum of one bucket (`torch.distributed.GradBucket`) over all processes."""
    buffer = bucket.buffer()
    if buffer.dtype.itemsize >= torch.float32.itemsize:
        return dist.all_reduce(buffer, async_op=True).get_future().then(lambda future: future.value()[0])
    total = torch.empty_like(buffer, dtype=torch.float32)
    copies, first = bucket.parameters(), buffer.storage_offset()
    # The hook is given gradients as if they were contiguous, in memory where they lie as the parameters do.
    places = [
        (own.size(), own.stride(), given.storage_offset())
        for own, given in zip(copies, bucket.gradients(), strict=True)
    ]
    gradients = [buffer.as_strided(size, stride, place) for size, stride, place in places]
    into = [total.as_strided(size, stride, place - first) for size, stride, place in places]
    working.pour(copies, gradients, into)
    # DDP's own 16-bit memory is left as it is: the sums stand where the optimizer looks for them.
    return dist.all_reduce(total, async_op=True).get_future().then(lambda _: buffer)
