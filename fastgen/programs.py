"""A few training steps as a fixed program over tensors that stay where they are: on a GPU, one CUDA graph.

A small network's step is hundreds of launches for microseconds of work. A graph is launched as one; its launches read
and write the memory that they were captured with, so what changes from step to step (samples, learning rates) is
copied to where the program reads it, and what it gives is copied from where it writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastgen.meters import Tally

# Samples by column and learning rates (steps,) -> what the steps came to, in one tensor of losses and one of hits.
Body = Callable[[Mapping[str, Tensor], Tensor], Tally]

# Libraries choose their algorithms in the first pass, torch's documentation of graphs asks for three in all.
WARM_UP_PASSES = 3


class Program:
    """Runs a body over static inputs.

    Building it runs the body, which changes whatever the body changes: see `Learner.preserved`.

    Args:
        body: the same work whatever the values of its inputs; on a GPU it must not wait for the device.
        inputs: by name; the program takes their memory, and their values are valid for the body.
        steps: learning rates that the body takes.
        device: where it runs; on a GPU it is captured, elsewhere the body is called each time.
        pool: memory that programs share which never run at the same time, `torch.cuda.graph_pool_handle()`; None: its
            own.
    """

    def __init__(
        self, body: Body, inputs: Mapping[str, Tensor], steps: int, device: torch.device, pool: Any = None
    ) -> None:
        self._inputs = dict(inputs)
        self._lrs = torch.zeros(steps, device=device)
        if device.type == "cuda":
            self._replay = _captured(body, self._inputs, self._lrs, pool)
        else:
            body(self._inputs, self._lrs)
            self._replay = lambda: body(self._inputs, self._lrs)

    def run(self, columns: Mapping[str, Tensor], lrs: Tensor) -> Tally:
        """Takes the steps.

        Args:
            columns: of the samples, shaped as the inputs.
            lrs: fp32 (steps,), on the device.

        Returns:
            what they came to, in memory of its own.

        Raises:
            ValueError: the columns or their shapes are others than those of the inputs.
        """
        if columns.keys() != self._inputs.keys():
            raise ValueError(f"the program takes {', '.join(self._inputs)}, and was given {', '.join(columns)}")
        for name, static in self._inputs.items():
            if columns[name].shape != static.shape:
                raise ValueError(f"{name} is {tuple(columns[name].shape)}, the program takes {tuple(static.shape)}")
            static.copy_(columns[name])
        self._lrs.copy_(lrs)
        tally = self._replay()
        # The next run writes to the same memory.
        losses, correct = (tuple(value.clone() for value in values) for values in (tally.loss_sums, tally.correct))
        return replace(tally, loss_sums=losses, correct=correct)


def _captured(body: Body, inputs: Mapping[str, Tensor], lrs: Tensor, pool: Any) -> Callable[[], Tally]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_PASSES):
            body(inputs, lrs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # thread_local: what decoders of images do in threads of their own is not captured, and no fault.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        tally = body(inputs, lrs)

    def replay() -> Tally:
        graph.replay()
        return tally

    return replay
