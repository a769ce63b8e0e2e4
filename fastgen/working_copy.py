"""The network as a step runs it: 16-bit copies of the weights that are multiplied, everything else shared.

Autocast casts each weight on every pass and each gradient back, two operators a tensor. Here all weights are copied by
one operator, and all gradients by another; the arithmetic is autocast's, to the bit. That holds for networks of
convolutions, linear layers and batch-norms; others (layer norms, class tokens, attention) run under autocast itself.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

# What autocast runs in 16 bits. Batch-norms keep their fp32 parameters and statistics.
MULTIPLIED = (nn.modules.conv._ConvNd, nn.Linear)
# What a class of these may be for copies to compute what autocast does: a subclass may use its weights in another way.
KNOWN = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class WorkingCopy:
    """A network that computes in a dtype, beside the fp32 model that it belongs to.

    Args:
        model: holds the weights that are trained; they must stay the tensors that they are, to be written in place.
        dtype: of convolutions and linear layers; with fp32 the network is the model itself.

    Attributes:
        network: to be called with images in that dtype; its other parameters and all buffers are the model's own, and
            under autocast so are all parameters.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        multiplied = [module for module in model.modules() if isinstance(module, MULTIPLIED)]
        cast = dtype != torch.float32 and not all(map(_is_copied_or_kept, model.modules()))
        if dtype == torch.float32 or cast:
            multiplied = []
        self._weights: list[Tensor] = [weight for module in multiplied for weight in module.parameters(recurse=False)]
        self._copies: list[Tensor] = [
            nn.Parameter(weight.detach().to(dtype), weight.requires_grad) for weight in self._weights
        ]
        # Where fp32 gradients stand: the same memory in every step.
        self._gradients = [torch.zeros_like(weight) for weight in self._weights]
        self._weight_of = {id(own): weight for own, weight in zip(self._copies, self._weights, strict=True)}
        self.network = _sharing(model, self._weights, self._copies) if multiplied or cast else model
        if cast:
            self.network = _Autocast(self.network, dtype)

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes over the weights, rounded."""
        if self._copies:
            torch._foreach_copy_(self._copies, self._weights)

    @torch.no_grad()
    def collect(self) -> None:
        """Adds the copies' gradients to those of the weights, in fp32, and frees them."""
        asked = [number for number, own in enumerate(self._copies) if own.grad is not None]
        if not asked:
            return
        sums = [self._gradients[number] for number in asked]
        gradients = [own.grad for own in self._copies if own.grad is not None]
        if self._weights[asked[0]].grad is None:
            torch._foreach_copy_(sums, gradients)
        else:
            torch._foreach_add_(sums, gradients)
        for number, sum_ in zip(asked, sums, strict=True):
            self._weights[number].grad, self._copies[number].grad = sum_, None

    @torch.no_grad()
    def pour(self, copies: Sequence[Tensor], gradients: Sequence[Tensor], into: Sequence[Tensor]) -> None:
        """As `collect`, for some of the copies, into memory that is given: their weights' gradients from now on.

        Args:
            copies: of this network.
            gradients: their own of this pass, 16-bit.
            into: fp32, laid out as they are.
        """
        weights = [self._weight_of[id(own)] for own in copies]
        torch._foreach_copy_(list(into), list(gradients))
        earlier = [weight.grad for weight in weights if weight.grad is not None]
        if earlier:
            torch._foreach_add_(list(into), earlier)
        for weight, sum_ in zip(weights, into, strict=True):
            weight.grad = sum_

    def drop(self) -> None:
        """Frees the copies' gradients, which were poured."""
        for own in self._copies:
            own.grad = None


class _Autocast(nn.Module):
    """A network that computes as autocast decides, operator by operator."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network
        self.dtype = dtype

    def forward(self, images_NCHW: Tensor) -> Any:
        # Without its cache: a weight is cast once in a pass anyway, and a captured step must not keep casts of another.
        with torch.autocast(images_NCHW.device.type, self.dtype, cache_enabled=False):
            return self.network(images_NCHW)


def _is_copied_or_kept(module: nn.Module) -> bool:
    """Whether a module computes with copies of its weights, or has none, or is a batch-norm, which keeps its own."""
    has_weights = any(True for _ in module.parameters(recurse=False))
    return not has_weights or type(module) in KNOWN or isinstance(module, nn.modules.batchnorm._BatchNorm)


def _sharing(model: nn.Module, weights: list[Tensor], copies: list[Tensor]) -> nn.Module:
    """A copy of the modules alone: these weights are replaced, all other tensors shared."""
    # What deepcopy finds here counts as copied already.
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    memo |= {id(weight): own for weight, own in zip(weights, copies, strict=True)}
    return copy.deepcopy(model, memo)
