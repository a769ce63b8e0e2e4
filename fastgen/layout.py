"""How a network's weights lie in memory."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def channels_last(network: Network) -> Network:
    """Puts all tensors of four dimensions into channels-last memory, in place; gives the same network.

    `Module.to(memory_format=...)` does so too, and refuses networks that hold a tensor of five.
    """
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.ndim == 4:
            # Not `contiguous`: that leaves weights of one channel the strides that they have, and their gradients, in
            # others, would not fit torch's DistributedDataParallel.
            tensor.data = tensor.data.to(memory_format=torch.channels_last)
    return network
