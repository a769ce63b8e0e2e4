"""safetensors: a network's weights under the names of the library that the network is from.

torchvision's and timm's networks are theirs here too, so their weights load into what `get_model` and `create_model`
give, strictly. The others are fastgen's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from fastgen.checkpoint import METADATA_KEY, read_weights
from fastgen.errors import MachineError, UserError
from fastgen.export.check import outputs_of
from fastgen.export.subject import Member, Subject, canonical
from fastgen.models import build_model
from fastgen.models.library import library_model
from fastgen.networks import library_and_name

# Names of our table that stand for torchvision's own networks.
TORCHVISIONS = ("resnet18", "resnet34", "resnet50")


@dataclass(frozen=True)
class Maker:
    """Who makes a network, so that it can be made again without a run.

    Attributes:
        library: `torchvision`, `timm` or `fastgen`.
        name: of the network there.
        classes, channels: of its output and input.
        downsample: a form of fastgen's networks; see `config.ModelSettings`.
    """

    library: str
    name: str
    classes: int
    channels: int
    downsample: str

    def make(self) -> nn.Module:
        """A fresh network of the library, in eval mode."""
        if self.library == "fastgen":
            return build_model(self.name, self.classes, self.channels, self.downsample).eval()
        return library_model(self.library, self.name, self.classes, self.channels, 0).eval()

    def code(self, file: str) -> list[str]:
        """Lines of Python that load a weights file."""
        name, classes, channels = f'"{self.name}"', self.classes, self.channels
        calls = {
            "torchvision": f"torchvision.models.get_model({name}, num_classes={classes})",
            "timm": f"timm.create_model({name}, num_classes={classes}, in_chans={channels})",
            "fastgen": f'fastgen.models.build_model({name}, {classes}, {channels}, "{self.downsample}")',
        }
        module = "fastgen.models" if self.library == "fastgen" else self.library
        return [
            f"import {module}, safetensors.torch",
            f"model = {calls[self.library]}.eval()",
            f'model.load_state_dict(safetensors.torch.load_file("{file}"))',
        ]


def maker_of(subject: Subject) -> Maker:
    """Who makes the networks."""
    settings, facts = subject.recipe.model, subject.facts
    library, name = library_and_name(settings.name)
    if library is None:
        library = "torchvision" if name in TORCHVISIONS else "fastgen"
    return Maker(library, name, facts.classes, facts.channels, settings.downsample)


def weights_name(subject: Subject, member: Member) -> str:
    """Of the file: each member of an ensemble has its own, which loads without the others."""
    return f"{subject.stem}.{f'generation_{member.generation}.' if subject.is_ensemble else ''}safetensors"


def to_weights(subject: Subject, member: Member) -> bytes:
    """A network's parameters and buffers as a safetensors file."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in member.model.state_dict().items()}
    # One key alone: safetensors writes several in random order.
    return to_safetensors(tensors, {METADATA_KEY: canonical(subject.describe([member]))})


def run_weights(path: Path, subject: Subject, member: Member, pixels_NCHW: Tensor) -> Tensor:
    """Reads a written file into a fresh network of its library and runs that on the CPU.

    Returns:
        fp32 (N, classes), logits.

    Raises:
        MachineError: it cannot be read, tells other things of itself, or does not fit that network.
    """
    try:
        tensors, told = read_weights(path)
        if canonical(told) != canonical(subject.describe([member])):
            raise ValueError("it tells other things of itself than were written")
        model = maker_of(subject).make()
        model.load_state_dict(tensors, strict=True)
    except (UserError, ValueError, RuntimeError) as error:
        line = " ".join(str(error).split())[:300]
        raise MachineError(f"{path.name}: failed its check: {line}: nothing was written") from error
    return outputs_of(model, subject, pixels_NCHW)


def probabilities(logits: list[Tensor]) -> Tensor:
    """fp32 (N, C), the mean softmax of members."""
    return torch.stack([one_NC.softmax(1) for one_NC in logits]).mean(0)
