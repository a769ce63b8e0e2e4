"""What all generations of a run share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastgen.config import Recipe
from fastgen.data.batch import Loader
from fastgen.data.split import Dataset
from fastgen.record import Recorder
from fastgen.stop import StopRequest


@dataclass(frozen=True)
class Workbench:
    """Recipe, data, device and watchers of a run."""

    recipe: Recipe
    dataset: Dataset
    device: torch.device
    train_loader: Loader
    evaluation_loader: Loader
    recorder: Recorder
    stop: StopRequest
