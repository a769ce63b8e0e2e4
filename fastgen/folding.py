"""A trained network in eval mode, rewritten as a frozen one that computes the same with fewer operators.

Three steps, in this order, with moving and casting between the first two or after the second:

    folded, count = fold(model.eval())                  # batch-norms into the convolutions before them
    folded.to(device, dtype).to(memory_format=torch.channels_last)
    network = fuse(folded)                              # convolution (+ shortcut) + ReLU as one module
    choices = choose_variants(network, shape, timed)    # which operator each of them runs

`fold` and `fuse` leave plain PyTorch, which torch.compile takes whole. What `choose_variants` may put in
is not for torch.compile: oneDNN's sum and both of cuDNN's have no meta kernel (torch 2.14), so each is
a graph break, and an error under fullgraph. Where the network will be compiled, leave it out.

Shapes: N images, C channels, H rows, W columns.
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fastgen.fused_conv import FusedConv

RELU_FUNCTIONS = (F.relu, torch.relu, torch.relu_, "relu", "relu_")
ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
# Their result is memory of their own, that nothing else reads unless the graph says so.
OWNERS = (nn.Conv2d, nn.BatchNorm2d, nn.AvgPool2d, nn.MaxPool2d)


@torch.no_grad()
def fold(model: nn.Module) -> tuple[fx.GraphModule, int]:
    """The network with each batch-norm folded into the convolution whose output it alone takes.

    A batch-norm before its convolution stays, as do those whose convolution has another reader or is
    called twice, and those without running statistics. torch.fx records `a += b` as `a = a + b`: a network
    that afterwards reads the sum under another name of a's memory is not for this function.

    Args:
        model: in eval mode, any device and dtype; it is not changed. What is not folded (linear layers,
            other batch-norms) is shared with it, so moving or casting the result moves or casts that, too.

    Returns:
        The network, and how many batch-norms were folded.

    Raises:
        ValueError: the model is in train mode.
        torch.fx.proxy.TraceError: its forward pass branches on values.
    """
    if model.training:
        raise ValueError("fold: the model is in train mode, where batch-norms use the batch's statistics")
    network = fx.symbolic_trace(model)
    calls = _calls(network)
    folded = 0
    for node in list(network.graph.nodes):
        bn, conv_node = _module(network, node), node.all_input_nodes[0] if node.all_input_nodes else None
        if type(bn) is not nn.BatchNorm2d or bn.running_mean is None or conv_node is None:
            continue
        conv = _module(network, conv_node)
        if type(conv) is not nn.Conv2d or len(conv_node.users) > 1 or calls[conv_node.target] > 1:
            continue
        network.set_submodule(conv_node.target, fuse_conv_bn_eval(conv, bn))
        node.replace_all_uses_with(conv_node)
        network.graph.erase_node(node)
        folded += 1
    return _finished(network), folded


def fuse(network: fx.GraphModule) -> fx.GraphModule:
    """Makes one `FusedConv` of each convolution followed by ReLU, or by a sum and ReLU; changes the network.

    ReLU and sum may be modules, functions or methods, in place or not, the convolution on either side of
    the sum; what lies between must have no other reader. All of them are left in the variant `plain`:
    what each can run depends on device, dtype and shapes, which `choose_variants` knows.

    Args:
        network: what `fold` gave, before or after it was moved and cast.

    Returns:
        The same object.
    """
    calls = _calls(network)
    for node in list(network.graph.nodes):
        chain = _chain_to(network, node, calls)
        if chain is None:
            continue
        name, conv = str(chain.conv.target), _module(network, chain.conv)
        assert isinstance(conv, nn.Conv2d)
        network.set_submodule(name, FusedConv(conv))
        inputs = chain.conv.args if chain.residual is None else (*chain.conv.args, chain.residual)
        with network.graph.inserting_before(node):
            node.replace_all_uses_with(network.graph.call_module(name, inputs))
        for replaced in reversed(chain.nodes):
            network.graph.erase_node(replaced)
    _allow_overwriting(network)
    return _finished(network)


def _allow_overwriting(network: fx.GraphModule) -> None:
    """Lets each fused convolution write into a residual that dies there.

    Only when all chains are joined: a convolution that reads the residual moves to where its own ReLU stood.
    """
    for node in network.graph.nodes:
        layer = _module(network, node)
        if isinstance(layer, FusedConv) and len(node.args) == 2:
            x, residual = node.args
            layer.may_overwrite = x is not residual and _dies_at(network, residual, node)


class _Chain(NamedTuple):
    """Nodes that become one: convolution, sum if there is one, ReLU."""

    nodes: tuple[fx.Node, ...]
    residual: fx.Node | None

    @property
    def conv(self) -> fx.Node:
        return self.nodes[0]


def _chain_to(network: fx.GraphModule, relu: fx.Node, calls: Counter[str]) -> _Chain | None:
    """The chain that ends in this node, if it ends one."""
    if not _is_relu(network, relu) or len(relu.all_input_nodes) != 1:
        return None
    last = relu.all_input_nodes[0]
    for chain in (_Chain((last, relu), None), *_chains_with_sum(last, relu)):
        middle = chain.nodes[:-1]
        if (
            _is_plain_conv(network, chain.conv, calls)
            and all(len(node.users) == 1 for node in middle)
            and not writes_between(network, chain.nodes)
            and _spares_residual(network, chain)
        ):
            return chain
    return None


def _chains_with_sum(sum_node: fx.Node, relu: fx.Node) -> list[_Chain]:
    """Both readings of a sum: either side may be the convolution."""
    is_sum = sum_node.op in ("call_function", "call_method") and sum_node.target in ADD_FUNCTIONS
    if not is_sum or len(sum_node.all_input_nodes) != 2 or len(sum_node.args) != 2 or sum_node.kwargs:
        return []
    return [_Chain((conv, sum_node, relu), other) for conv, other in itertools.permutations(sum_node.all_input_nodes)]


def _is_relu(network: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(_module(network, node)) is nn.ReLU
    return node.op in ("call_function", "call_method") and node.target in RELU_FUNCTIONS


def _is_plain_conv(network: fx.GraphModule, node: fx.Node, calls: Counter[str]) -> bool:
    """A convolution that the fused operators can express: called once, with zeros around the image."""
    conv = _module(network, node)
    return (
        type(conv) is nn.Conv2d
        and calls[str(node.target)] == 1
        and len(node.args) == 1
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
    )


def writes_between(network: fx.GraphModule, nodes: Sequence[fx.Node]) -> bool:
    """Whether anything else is written in place between the first and the last of these nodes.

    One operator in the last one's place would read what the first ones read too late.
    """
    order = list(network.graph.nodes)
    between = order[order.index(nodes[0]) : order.index(nodes[-1])]
    return any(_writes(network, node) for node in between if node not in nodes)


def _writes(network: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node may write into one of its inputs; in doubt it does."""
    if node.op == "call_module":
        return bool(getattr(_module(network, node), "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "_")
    of_operator = getattr(node.target, "__module__", "") == "_operator" and (name[0] == "i" or name == "setitem")
    of_functional = getattr(node.target, "__module__", "") == F.__name__ and any(
        value is True for value in node.args[1:]
    )
    of_keywords = node.kwargs.get("inplace") is True or node.kwargs.get("out") is not None
    return name.endswith("_") or of_operator or of_functional or of_keywords


def _spares_residual(network: fx.GraphModule, chain: _Chain) -> bool:
    """False for `shortcut += conv(x)` where somebody else may still read the sum under the shortcut's name.

    Convolutions that read the shortcut before may still move behind the sum: the chain that this one becomes leaves
    the shortcut as it was, unless `_allow_overwriting` finds that they did not move.
    """
    if chain.residual is None:
        return True
    sum_node = chain.nodes[1]
    writes_into_it = _writes(network, sum_node) and sum_node.args[0] is chain.residual
    return not writes_into_it or _dies_at(network, chain.residual, sum_node)


def _dies_at(network: fx.GraphModule, value: fx.Node, end: fx.Node) -> bool:
    """Whether a value lies in memory of its own that nothing but this node reads from there on.

    All its other readers must be convolutions before the node: others might give a view of it.
    """
    owner = isinstance(_module(network, value), (*OWNERS, FusedConv)) or value.target is F.pad
    order = {node: place for place, node in enumerate(network.graph.nodes)}
    readers = [user for user in value.users if user is not end]
    return (
        owner
        and all(isinstance(_module(network, user), (nn.Conv2d, FusedConv)) for user in readers)
        and all(order[user] < order[end] for user in readers)
    )


def _module(network: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return network.get_submodule(str(node.target)) if node.op == "call_module" else None


def _calls(network: fx.GraphModule) -> Counter[str]:
    return Counter(str(node.target) for node in network.graph.nodes if node.op == "call_module")


def _finished(network: fx.GraphModule) -> fx.GraphModule:
    network.delete_all_unused_submodules()
    network.graph.lint()
    network.recompile()
    return network.eval()
