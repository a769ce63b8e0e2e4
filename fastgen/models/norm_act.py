"""Batch-norm and what follows it as one module: bn -> relu, and bn -> add -> relu.

`fuse_norm_act` finds these chains in a network by tracing it and puts `kernels.batchnorm_layer.BatchNormAct2d` in their
place. Names and values of the state, the parameters and their order stay as they were.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastgen.folding import writes_between

RELU_FUNCTIONS = (F.relu, F.relu_, torch.relu, torch.relu_)
# torch.fx traces += as +.
ADD_FUNCTIONS = (operator.add, torch.add)


def batchnorm_act(
    x_NCHW: Tensor,
    residual_NCHW: Tensor | None,
    weight_C: Tensor,
    bias_C: Tensor,
    running_mean_C: Tensor | None,
    running_var_C: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """max(0, batch-norm(x) [+ residual]) in plain PyTorch: what the kernels must equal, and what evaluation runs.

    Args:
        x_NCHW: any floating dtype.
        residual_NCHW: like x, or None.
        training: normalise by the batch and update the running statistics; else by the running statistics.
    """
    y_NCHW = F.batch_norm(
        x_NCHW, running_mean_C, running_var_C, weight_C, bias_C, training, 0.0 if momentum is None else momentum, eps
    )
    return F.relu(y_NCHW if residual_NCHW is None else y_NCHW + residual_NCHW)


class Chain(NamedTuple):
    """A batch-norm and what it is fused with, in a traced network."""

    norm: fx.Node
    add: fx.Node | None
    relu: fx.Node

    @property
    def residual(self) -> tuple[fx.Node, ...]:
        """The other operand of the addition, if there is one."""
        return () if self.add is None else tuple(node for node in _operands(self.add) if node is not self.norm)

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All of them, in order."""
        return tuple(node for node in self if node is not None)


def fuse_norm_act(model: nn.Module) -> nn.Module:
    """The network with every bn -> relu and bn -> add -> relu as one BatchNormAct2d.

    Parameters and buffers are shared with `model`: trained weights are in both, unless one of them is moved to
    another device or dtype afterwards, which gives it buffers of its own. Where both operands of an addition are
    batch-norms (torchvision's shortcuts), the one that is computed first is fused and the other stays as it is.
    Values that anything else reads, modules that are called twice, and chains between whose ends something else is
    written in place are left alone.

    Raises:
        ValueError: nothing to fuse was found, the network computes something else in train mode than in eval mode, or
            it holds state that its forward pass does not use.
    """
    # Here and not above: it imports Triton.
    from fastgen.kernels.batchnorm_layer import BatchNormAct2d

    _require_one_trace(model)
    traced = fx.symbolic_trace(model)
    chains = _chains(traced)
    if not chains:
        raise ValueError(f"{type(model).__name__} has no batch-norm that is followed by ReLU alone: nothing to fuse")
    for chain in chains:
        target = str(chain.norm.target)
        fused = BatchNormAct2d.sharing(traced.get_submodule(target))  # type: ignore[arg-type]
        traced.set_submodule(target, fused)
        with traced.graph.inserting_before(chain.relu):
            call = traced.graph.call_module(target, (chain.norm.args[0], *chain.residual))
        chain.relu.replace_all_uses_with(call)
        for node in reversed(chain.nodes):
            traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    if list(traced.state_dict()) != list(model.state_dict()):
        raise ValueError(f"{type(model).__name__} holds its state in another order than it uses it: cannot be fused")
    return traced


def _require_one_trace(model: nn.Module) -> None:
    """Refuses what a trace would freeze in the mode that the network is in; changes nothing.

    Modules such as nn.Dropout keep their mode; an `if self.training` and F.dropout(x, training=self.training) do not.
    """
    modes = {module: module.training for module in model.modules()}
    graphs = []
    try:
        for training in (True, False):
            for module in modes:
                module.training = training
            # A shallow copy, as the tracer keeps constants on what it traces.
            graphs.append(str(fx.Tracer().trace(copy.copy(model))))
    finally:
        for module, training in modes.items():
            module.training = training
    if graphs[0] != graphs[1]:
        raise ValueError(
            f"{type(model).__name__} computes something else in train mode than in eval mode, and not in modules such "
            "as nn.Dropout: cannot be fused, as its trace would keep to one mode"
        )


def _chains(traced: fx.GraphModule) -> list[Chain]:
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    chains: list[Chain] = []
    for node in traced.graph.nodes:
        if not _is_norm(traced, node) or calls[node.target] > 1:
            continue
        chain = _chain_from(traced, node)
        if chain is None or writes_between(traced, chain.nodes):
            continue
        # Of two batch-norms that are added, the second finds its ReLU taken.
        if all(chain.relu is not other.relu for other in chains):
            chains.append(chain)
    return chains


def _is_norm(traced: fx.GraphModule, node: fx.Node) -> bool:
    # Exactly this class: a subclass may compute something else.
    return (
        node.op == "call_module"
        and type(traced.get_submodule(str(node.target))) is nn.BatchNorm2d
        and len(node.args) == 1
    )


def _chain_from(traced: fx.GraphModule, norm: fx.Node) -> Chain | None:
    user = _only_user(norm)
    if user is None:
        return None
    if _is_relu(traced, user):
        return Chain(norm, None, user)
    after = _only_user(user)
    if _is_add_to(user, norm) and after is not None and _is_relu(traced, after):
        return Chain(norm, user, after)
    return None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_relu(traced: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(traced.get_submodule(str(node.target))) is nn.ReLU
    return node.target in (RELU_FUNCTIONS if node.op == "call_function" else ("relu", "relu_"))


def _is_add_to(node: fx.Node, norm: fx.Node) -> bool:
    """Whether the node adds another tensor to the batch-norm's output, and changes nothing but that output."""
    adds = {"call_function": ADD_FUNCTIONS, "call_method": ("add", "add_")}.get(node.op, ())
    if node.target not in adds or len(_operands(node)) != 2:
        return False
    return node.target != "add_" or node.args[0] is norm


def _operands(add: fx.Node) -> tuple[fx.Node, ...]:
    """The two different tensors that are added, or nothing: numbers, factors and x + x are other operations."""
    nodes = tuple(argument for argument in add.args if isinstance(argument, fx.Node))
    return nodes if len(add.args) == 2 and len(set(nodes)) == 2 and not add.kwargs else ()
