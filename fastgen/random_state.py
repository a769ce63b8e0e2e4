"""torch's own generators, for networks that draw while they train (dropout, stochastic depth)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def seed_random_state(seed: int, rank: int) -> None:
    """Seeds torch's own generators: differently in each process."""
    torch.manual_seed((seed + rank) % 2**63)


def random_state(device: torch.device) -> dict[str, Any]:
    """State of torch's own generators in this process."""
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def put_random_state(state: Mapping[str, Any]) -> None:
    """Goes on from what `random_state` gave."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
