"""SoTeacher's Lipschitz term: what bounds how fast a network's output can change with its input."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def lipschitz_term(network: nn.Module) -> Tensor:
    """Sum over the layers of a bound of each; the smaller, the smoother the network. Other kinds of layers have no say.

    Convolutions: the L1 norm of the weights. Batch-norms: max_c |gamma_c| / sqrt(var_c + eps), with the running
    variance as a constant. Linear layers, W of (out, in): max_j sum_i |W_ij|, the norm that L1 induces. Biases have no
    say. Source: Dong, Liu, Shang, "Toward Student-oriented Teacher Network Training for Knowledge Distillation",
    ICLR 2024, arXiv 2206.06661, with weight 1e-5.

    Args:
        network: on any device; 16-bit weights are taken to fp32.

    Returns:
        fp32 (), differentiable; fp64 for fp64 networks.

    Raises:
        ValueError: it has no layer of these kinds.
    """
    bounds = [*_bounds_of_weights(network), *_bounds_of_norms(network)]
    if not bounds:
        raise ValueError(f"{type(network).__name__} has no convolution, batch-norm or linear layer")
    return torch.stack(bounds).sum()


def norms_term(network: nn.Module) -> Tensor | None:
    """The batch-norms' part, which depends on each process's own statistics; None: there are none."""
    bounds = _bounds_of_norms(network)
    return torch.stack(bounds).sum() if bounds else None


def add_weights_gradient(model: nn.Module, scale: Tensor | float) -> None:
    """Adds to `.grad` what the rest of the term, which depends on the weights alone, has as its gradient.

    In fp32, which is why it is no part of a step's backward pass: beside a 16-bit gradient 1e-5 is often rounded away.

    Args:
        model: its parameters have gradients.
        scale: what the term is multiplied with: its weight, and the gradients' own scale.
    """
    weights = [module.weight for module in model.modules() if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))]
    bounds = _bounds_of_weights(model)
    if not bounds:
        return
    # Not backward: it would call what watches the parameters, such as DistributedDataParallel.
    found = torch.autograd.grad(torch.stack(bounds).sum() * scale, weights)
    sums = [weight.grad for weight in weights if weight.grad is not None]
    if len(sums) < len(weights):
        raise ValueError("a weight without a gradient")
    with torch.no_grad():
        torch._foreach_add_(sums, list(found))


def _bounds_of_weights(network: nn.Module) -> list[Tensor]:
    bounds = []
    for module in network.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            bounds.append(_wide(module.weight).abs().sum())
        if isinstance(module, nn.Linear):
            bounds.append(_wide(module.weight).abs().sum(0).max())
    return bounds


def _bounds_of_norms(network: nn.Module) -> list[Tensor]:
    bounds = []
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.affine and module.running_var is not None:
            bounds.append((_wide(module.weight).abs() / (_wide(module.running_var) + module.eps).sqrt()).max())
    return bounds


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
