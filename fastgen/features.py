"""Frozen features: what a network in eval mode, in fp32, gives to its last linear layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fastgen.augment import Normaliser
from fastgen.errors import UserError
from fastgen.transfer_data import Picture, View, view_batches

Float32 = npt.NDArray[np.float32]
PROBE_IMAGES = 2


class Tap:
    """A network and the layer whose input is taken.

    Args:
        model: fp32; from now on in eval mode.
        layer: one of its linear layers, from `last_linear`.
    """

    def __init__(self, model: nn.Module, layer: nn.Linear) -> None:
        self._model = model.eval()
        self._seen: Tensor | None = None
        layer.register_forward_pre_hook(self._note)

    @torch.no_grad()
    def __call__(self, images_NCHW: Tensor) -> Tensor:
        """Normalised images (B, C, H, W) -> features (B, D)."""
        self._model(images_NCHW)
        assert self._seen is not None
        return self._seen.reshape(len(images_NCHW), -1)

    def _note(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # Where a layer is called several times, the last call is the one that gives the output.
        self._seen = inputs[0]


@dataclass(frozen=True)
class Network:
    """A network whose features are taken.

    Attributes:
        name: for people.
        tap: gives its features.
        normalise: fp32.
        view: in which it sees pictures.
        device: where it is.
    """

    name: str
    tap: Tap
    normalise: Normaliser
    view: View
    device: torch.device

    def features(self, views_NHWC: npt.NDArray[np.uint8]) -> Float32:
        """fp32 (B, D) of views, uint8 (B, side, side, channels).

        Raises:
            UserError: they are not finite.
        """
        images_NCHW = torch.from_numpy(views_NHWC).to(self.device).permute(0, 3, 1, 2)
        found: Float32 = self.tap(self.normalise(images_NCHW)).float().cpu().numpy()
        if not np.isfinite(found).all():
            raise UserError(f"{self.name}: its features are not finite: leave that generation's weights out")
        return found


@torch.no_grad()
def last_linear(model: nn.Module, view: View, device: torch.device, name: str) -> nn.Linear:
    """The linear layer that gives a network's output, found by what the layers do, not by their names.

    Args:
        model: on the device; from now on in eval mode.
        view: whose size and channels the network takes.
        name: of the network, for the error.

    Raises:
        UserError: no linear layer gives the output, or its input holds more than one row an image.
    """
    outputs: dict[nn.Linear, tuple[Tensor, Tensor]] = {}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, nn.Linear)
        outputs[layer] = inputs[0], output

    shape = (PROBE_IMAGES, view.channels, view.side_px, view.side_px)
    # Not zeros, of which two layers might make the same.
    images_NCHW = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    hooks = [layer.register_forward_hook(note) for layer in model.modules() if isinstance(layer, nn.Linear)]
    try:
        logits = model.eval()(images_NCHW)
    finally:
        for hook in hooks:
            hook.remove()
    for layer, (given, output) in reversed(outputs.items()):
        one_row = given.numel() == PROBE_IMAGES * layer.in_features
        if isinstance(logits, Tensor) and one_row and _same(output, logits):
            return layer
    raise UserError(
        f"{name}: no linear layer gives the output of this {type(model).__name__}, and that layer's input is what is "
        "taken: choose a network that ends in one"
    )


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether both hold the same values in the same order, whatever their shapes; not a number equals itself."""
    if a.numel() != b.numel():
        return False
    return bool(torch.isclose(a.reshape(-1), b.reshape(-1), rtol=0, atol=0, equal_nan=True).all())


def extract(
    networks: Sequence[Network], pictures: Sequence[Picture], batch: int, passed: Callable[[int], None]
) -> list[Float32]:
    """Features of the same pictures from several networks; those of one view share the decoding.

    Memory: 4 N D bytes a network, beside `view_batches`.

    Args:
        pictures: N of them.
        batch: images that pass through a network at once.
        passed: told how many batches are done, over all views; see `passes_of`.

    Returns:
        fp32 (N, D) of each network.

    Raises:
        UserError: a picture cannot be read, or features are not finite.
    """
    rows: dict[int, list[Float32]] = {number: [] for number in range(len(networks))}
    done = 0
    passed(done)
    for view in dict.fromkeys(network.view for network in networks):
        of_view = [(number, network) for number, network in enumerate(networks) if network.view == view]
        for views_NHWC in view_batches(pictures, view, batch):
            for number, network in of_view:
                rows[number].append(network.features(views_NHWC))
            done += 1
            passed(done)
    return [np.concatenate(rows[number]) for number in range(len(networks))]


def passes_of(networks: Sequence[Network], images: int, batch: int) -> int:
    """How many batches `extract` reads."""
    return len({network.view for network in networks}) * -(-images // batch)
