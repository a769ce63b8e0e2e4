"""What all generations of a run share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastgen.config import Recipe
from fastgen.data.batch import Loader
from fastgen.data.split import Dataset
from fastgen.distributed import ALONE, Group
from fastgen.errors import Stopped
from fastgen.record import Recorder
from fastgen.stop import StopRequest


@dataclass(frozen=True)
class Workbench:
    """Recipe, data, device and watchers of a run, as one of its processes has them."""

    recipe: Recipe
    dataset: Dataset
    device: torch.device
    train_loader: Loader
    evaluation_loader: Loader
    recorder: Recorder
    stop: StopRequest
    group: Group = ALONE

    def check_stop(self) -> None:
        """Raises Stopped in all processes if a signal came to one of them."""
        (number,) = self.group.most([self.stop.number])
        if number:
            raise Stopped(number)
