"""Networks side by side in this process, each on a CUDA stream of its own."""

from __future__ import annotations

import time
from collections.abc import Collection

import torch

from benchmarks.networks import Race, Runner, Setup, peak_memory, rig_maker, run_together

# torch has 32 streams and then gives out the first again. A network takes two, one to capture on and one to run on:
# were the first shared, so would be the memory that cuBLAS works in, which a graph keeps.
MOST_NETWORKS = 16


class Streams:
    """Networks on streams. Why none reads what another one is still writing:

    - A network is built on the default stream, which waits for the stream that its graph is captured on; then the host
      waits for the device. So all that the graph reads is in place, and the next capture meets no work of others.
    - Everything after that is on the network's own stream: `next` runs the engine's code in the stream that is current.
    - Memory goes back to the stream that it was made on. What the default stream made lives as long as the network;
      what an own stream made was used on that stream alone.
    - Networks share images, which are only read, and no graph memory: each engine has a pool of its own.

    Args:
        device: a GPU.
        counts: of networks that will run side by side.
    """

    def __init__(self, setup: Setup, device: torch.device, counts: Collection[int]) -> None:
        self._runners: list[Runner] = []
        torch.cuda.reset_peak_memory_stats(device)
        self._peaks = {}
        make = rig_maker(setup, device)
        for built in range(1, max(counts) + 1):
            rig = make()
            torch.cuda.synchronize(device)
            self._runners.append(Runner(rig, device, torch.cuda.Stream(device)))
            # With an epoch's columns in the peak; and the device is idle when the next one is built.
            self._runners[-1].warm_up()
            self._peaks[built] = peak_memory(device)

    def race(self, networks: int, seconds: float) -> Race:
        """Lets so many of them take steps for so long; raises as `run_together` does."""
        return Race(run_together(self._runners[:networks], time.monotonic(), seconds), self._peaks[networks])
