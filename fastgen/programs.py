"""A few training steps as a fixed program over tensors that stay where they are: on a GPU, one CUDA graph.

A small network's step is hundreds of launches for microseconds of work. A graph is launched as one; its launches read
and write the memory that they were captured with, so what changes from step to step (samples, learning rates) is
copied to where the program reads it, and what it gives is copied from where it writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from fastgen.meters import Tally

# Samples by column and learning rates (steps,) -> what the steps came to, in one tensor of losses and one of hits.
Body = Callable[[Mapping[str, Tensor], Tensor], Tally]

# Libraries choose their algorithms in the first pass, torch's documentation of graphs asks for three in all.
WARM_UP_PASSES = 3
# DistributedDataParallel arranges its memory anew and times itself in its first ten.
DISTRIBUTED_WARM_UP_PASSES = 11


class Program:
    """A body over static inputs: to be warmed up, then captured, then run as often as wanted.

    Args:
        body: the same work whatever the values of its inputs; on a GPU it must not wait for the device.
        inputs: by name; the program takes their memory, and their values are valid for the body.
        steps: learning rates that the body takes.
        device: where it runs.
    """

    def __init__(self, body: Body, inputs: Mapping[str, Tensor], steps: int, device: torch.device) -> None:
        self._body = body
        self._inputs = dict(inputs)
        self._lrs = torch.zeros(steps, device=device)
        self._replay = self._call

    def warm_up(self, capture: Capture | None) -> None:
        """Calls the body, which changes whatever it changes: see `Learner.preserved`."""
        if capture is None:
            self._call()
            return
        with capture.beside():
            for _ in range(capture.warm_up_passes):
                self._call()

    def capture(self, capture: Capture | None) -> None:
        """Captures the body as a CUDA graph, which runs nothing; without a GPU it will be called."""
        if capture is not None:
            self._replay = capture.graph_of(self._call)

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

    def _call(self) -> Tally:
        return self._body(self._inputs, self._lrs)


class Capture:
    """Where programs are captured that never run at the same time: they share their working memory.

    One stream for all of them, as torch's allocator gives memory back to the stream alone that it was taken on.
    Programs that run at the same time need a capture each, also for the workspaces that libraries keep by stream.

    Args:
        stream: see `Learner.stream`.
        joined: whether gradients are summed over processes.

    Attributes:
        warm_up_passes: that a program needs before it can be captured.
    """

    def __init__(self, stream: torch.cuda.Stream, *, joined: bool = False) -> None:
        self.warm_up_passes = DISTRIBUTED_WARM_UP_PASSES if joined else WARM_UP_PASSES
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = stream

    @contextmanager
    def beside(self) -> Iterator[None]:
        """On the stream of the captures, after what was asked for before, and before what comes after."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    def graph_of(self, call: Callable[[], Tally]) -> Callable[[], Tally]:
        """Captures a call; gives what replays it, with the same output tensors each time."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: what decoders of images do in threads of their own is not captured, and no fault.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            tally = call()

        def replay() -> Tally:
            graph.replay()
            return tally

        return replay
