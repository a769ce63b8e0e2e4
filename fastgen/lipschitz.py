"""SoTeacher's Lipschitz term: what bounds how fast a network's output can change with its input."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def lipschitz_term(network: nn.Module) -> Tensor:
    """Sum over the layers of a bound of each; the smaller, the smoother the network.

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
    bounds = [bound for module in network.modules() for bound in _bounds(module)]
    if not bounds:
        raise ValueError(f"{type(network).__name__} has no convolution, batch-norm or linear layer")
    return torch.stack(bounds).sum()


def _bounds(module: nn.Module) -> list[Tensor]:
    if isinstance(module, nn.modules.conv._ConvNd):
        return [_wide(module.weight).abs().sum()]
    if isinstance(module, nn.Linear):
        return [_wide(module.weight).abs().sum(0).max()]
    if isinstance(module, nn.modules.batchnorm._NormBase) and module.affine and module.running_var is not None:
        return [(_wide(module.weight).abs() / (_wide(module.running_var) + module.eps).sqrt()).max()]
    return []


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
