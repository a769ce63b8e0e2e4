"""What is asked of the speed of generations on an NVIDIA GPU, and how it is told whether that holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from benchmarks.common import Floor, require
from fastgen.step import EngineName

Role = Literal["patriarch", "student"]

# Baselines of each role; the eager ones have the faster of torch's optimizers.
EAGER: dict[Role, str] = {"patriarch": "bare fused sgd", "student": "bare fused sgd student"}
TIMM: dict[Role, str] = {"patriarch": "timm", "student": "timm student"}

SMOKE = "SMOKE RUN: on a CPU programs are not captured; these times say nothing of engine graph"


class Goal(NamedTuple):
    """What is asked of the steps of a network, in 16 bits.

    Attributes:
        role: whose generations; the slowest of them counts.
        over: baselines that its speed is asked over, by role; None: its images/s are asked for.
        engine, batch_size: of the runs of which it is asked; None: of all.
    """

    model: str
    role: Role
    asked: float
    over: Mapping[Role, str] | None = None
    engine: EngineName | None = None
    batch_size: int | None = None

    @property
    def what(self) -> str:
        """To print."""
        whose = "generation 0" if self.role == "patriarch" else "the slowest student"
        if self.over is None:
            return f"{self.model}: images/s of {whose}"
        by = f" by engine {self.engine}, batch {self.batch_size}," if self.engine else ""
        return f"{self.model}: speed of {whose}{by} over {self.over[self.role]}"


GOALS = (
    Goal("resnet20", "patriarch", 4.0, over=EAGER, engine="graph", batch_size=128),
    Goal("resnet18", "patriarch", 22_000),
    Goal("resnet18", "student", 18_500),
    Goal("resnet50", "patriarch", 5_500),
    *(Goal(model, role, 1.3, over=TIMM) for model in ("resnet18", "resnet50") for role in TIMM),
)


@dataclass(frozen=True)
class NotMeasured:
    """A floor that a run says nothing about."""

    what: str
    why: str

    def line(self) -> str:
        """As it is printed."""
        return f"{self.what}: not measured ({self.why})"


def tell_floors(found: Sequence[Floor | NotMeasured]) -> None:
    """Prints a line for each floor.

    Raises:
        FloorMissed: one that was measured does not hold.
    """
    for floor in found:
        print(floor.line())
    if not found:
        print("no floor is asked of this network")
    require([floor for floor in found if isinstance(floor, Floor)])


def smoke(engine: EngineName, device: torch.device) -> bool:
    """Whether it is only seen to run: see SMOKE."""
    return engine == "graph" and device.type != "cuda"
