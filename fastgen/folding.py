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
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

Variant = Literal["plain", "cudnn", "onednn"]

RELU_FUNCTIONS = (F.relu, torch.relu, torch.relu_, "relu", "relu_")
ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
# Their result is memory of their own, that nothing else reads unless the graph says so.
OWNERS = (nn.Conv2d, nn.BatchNorm2d, nn.AvgPool2d, nn.MaxPool2d)

TIMED_ROUNDS, CALLS_A_ROUND = 9, 5
# Far above any rounding (three of bf16 are 2^-7 of the largest value), far below a wrong result.
WRONG = 2.0**-5


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
        may_overwrite = chain.residual is not None and _dies_at(network, chain.residual, node, chain)
        network.set_submodule(name, FusedConv(conv, may_overwrite))
        inputs = chain.conv.args if chain.residual is None else (*chain.conv.args, chain.residual)
        with network.graph.inserting_before(node):
            node.replace_all_uses_with(network.graph.call_module(name, inputs))
        for replaced in reversed(chain.nodes):
            network.graph.erase_node(replaced)
    return _finished(network)


class FusedConv(nn.Module):
    """relu(conv(x)) or relu(conv(x) + residual), by PyTorch's three operators or by one fused one.

    Channels-last in, channels-last out, in the convolution's device and dtype; no gradients.

    Found on one CPU with AVX-512 (torch 2.14): in fp32 oneDNN's fused 3x3 convolutions give the bits of the plain
    operators, and 1x1 ones over 256 channels and more sum in another order. In bf16 those without a residual
    give the same bits; those with one round once where the plain operators round twice.

    Attributes:
        conv: the convolution, with the batch-norm folded in.
        variant: what runs: `plain`; `cudnn`: torch.cudnn_convolution_relu and _add_relu; `onednn`:
            torch.ops.mkldnn._convolution_pointwise, with weights reordered once.
        may_overwrite: nothing reads the residual afterwards, so `onednn` adds into its memory, which saves
            a pass over it.
    """

    def __init__(self, conv: nn.Conv2d, may_overwrite: bool = False) -> None:
        super().__init__()
        if isinstance(conv.padding, str):
            raise TypeError(f"FusedConv: padding = {conv.padding}: must be numbers")
        self.conv = conv
        self.padding = conv.padding
        self.may_overwrite = may_overwrite
        self.variant: Variant = "plain"
        self._packed_weight: Tensor | None = None

    def use(self, variant: Variant) -> None:
        """Sets the variant; the weights have to be where and what they will stay."""
        conv = self.conv
        self.variant = variant
        # Opaque to all but oneDNN: neither parameter nor buffer, and not to be copied, moved or cast.
        self._packed_weight = None
        if variant == "onednn":
            self._packed_weight = torch.ops.mkldnn._reorder_convolution_weight(
                conv.weight.detach(), self.padding, conv.stride, conv.dilation, conv.groups
            )

    def forward(self, x_NCHW: Tensor, residual_NCHW: Tensor | None = None) -> Tensor:
        """(N, C, H, W) and the shape of the result, if any -> the result."""
        if self.variant == "cudnn":
            return self._cudnn(x_NCHW, residual_NCHW)
        if self.variant == "onednn":
            return self._onednn(x_NCHW, residual_NCHW)
        return self._plain(x_NCHW, residual_NCHW)

    def _plain(self, x_NCHW: Tensor, residual_NCHW: Tensor | None) -> Tensor:
        out: Tensor = self.conv(x_NCHW)
        if residual_NCHW is not None:
            # Only what has the result's shape can be added in place.
            out = out.add_(residual_NCHW) if residual_NCHW.shape == out.shape else out + residual_NCHW
        return out.relu_()

    def _cudnn(self, x_NCHW: Tensor, residual_NCHW: Tensor | None) -> Tensor:
        conv = self.conv
        geometry = (conv.stride, self.padding, conv.dilation, conv.groups)
        if residual_NCHW is None:
            return torch.cudnn_convolution_relu(x_NCHW, conv.weight, conv.bias, *geometry)
        return torch.cudnn_convolution_add_relu(x_NCHW, conv.weight, residual_NCHW, 1.0, conv.bias, *geometry)

    def _onednn(self, x_NCHW: Tensor, residual_NCHW: Tensor | None) -> Tensor:
        conv, weight = self.conv, self._packed_weight
        geometry = (conv.bias, self.padding, conv.stride, conv.dilation, conv.groups)
        mkldnn = torch.ops.mkldnn
        out: Tensor
        if residual_NCHW is None:
            out = mkldnn._convolution_pointwise(x_NCHW, weight, *geometry, "relu", [], "")
        elif self.may_overwrite:
            out = mkldnn._convolution_pointwise_(residual_NCHW, x_NCHW, weight, *geometry, "add", 1.0, "relu", [], None)
        else:
            out = mkldnn._convolution_pointwise(x_NCHW, residual_NCHW, weight, *geometry, "add", 1.0, "relu", [], None)
        return out


@dataclass(frozen=True)
class LayerChoice:
    """What one FusedConv runs, and why.

    Attributes:
        layer: its name in the network.
        variant: what it runs.
        fused_ms, plain_ms: median time of one call; None where it was not timed.
        why: `timed`, `not timed`, or what speaks against the fused operator.
    """

    layer: str
    variant: Variant
    fused_ms: float | None
    plain_ms: float | None
    why: str


@torch.no_grad()
def choose_variants(network: fx.GraphModule, images_shape: Sequence[int], *, timed: bool) -> tuple[LayerChoice, ...]:
    """Lets each `FusedConv` run its fused operator where there is one that works and, if timed, is faster.

    The fused operator of this device is first tried on the layer's real shapes: one that refuses or
    whose result is wrong is not taken, and the choice says so. Some of cuDNN's are much slower than the
    plain three (pytorch#68506), hence the clock; equal layers are timed once. A choice by the clock may
    differ from run to run, and with it the rounding: take `timed=False` where runs have to repeat.

    torch calls both of cuDNN's fused operators with `deterministic = false` whatever has been asked for,
    so in deterministic mode they are not taken.

    Found on the same CPU, with one thread and with two: an image's fp32 logits have the same bits in batches of 80,
    128 and 512 (ResNet-20), fused, plain or unfolded; alone in its batch it has others, in all three. oneDNN
    promises none of it.

    Args:
        network: what `fuse` gave, frozen, on its device, in its dtype, channels-last. It must not be moved,
            cast or copied afterwards.
        images_shape: N, C, H, W of a batch; other sizes of batch work afterwards, too.
        timed: choose by the clock; otherwise fused wherever it works.

    Returns:
        One record a layer, in the order of the network.
    """
    layers = {name: module for name, module in network.named_modules() if isinstance(module, FusedConv)}
    for layer in layers.values():
        layer.use("plain")
    cases = _cases(network, layers, images_shape)
    found: dict[tuple[object, ...], LayerChoice] = {}
    choices = []
    for name, case in cases.items():
        known = found.get(case.key)
        choice = _choose(name, case, timed) if known is None else known
        found[case.key] = choice
        case.layer.use(choice.variant)
        choices.append(LayerChoice(name, choice.variant, choice.fused_ms, choice.plain_ms, choice.why))
    return tuple(choices)


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
            and not _writes_between(network, chain)
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


def _writes_between(network: fx.GraphModule, chain: _Chain) -> bool:
    """Whether anything is written in place between convolution and ReLU: the fused one would read it too late."""
    order = list(network.graph.nodes)
    between = order[order.index(chain.conv) : order.index(chain.nodes[-1])]
    return any(_writes(network, node) for node in between if node not in chain.nodes)


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
    return name.endswith("_") or of_operator or of_functional or node.kwargs.get("inplace") is True


def _spares_residual(network: fx.GraphModule, chain: _Chain) -> bool:
    """False for `shortcut += conv(x)` where somebody else may still read the shortcut."""
    if chain.residual is None:
        return True
    sum_node = chain.nodes[1]
    writes_into_it = _writes(network, sum_node) and sum_node.args[0] is chain.residual
    return not writes_into_it or _dies_at(network, chain.residual, sum_node, chain)


def _dies_at(network: fx.GraphModule, value: fx.Node, end: fx.Node, chain: _Chain) -> bool:
    """Whether a value lies in memory of its own that nothing reads from this node on, and the convolution not at all.

    All its readers but the chain must be convolutions before the node: others might give a view of it.
    """
    owner = isinstance(_module(network, value), (*OWNERS, FusedConv)) or value.target is F.pad
    order = {node: place for place, node in enumerate(network.graph.nodes)}
    readers = [user for user in value.users if user not in chain.nodes[1:]]
    return (
        owner
        and chain.conv.args[0] is not value
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


class _Case(NamedTuple):
    """A layer and the shapes that it sees."""

    layer: FusedConv
    x_shape: torch.Size
    residual_shape: torch.Size | None

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for layers that cost the same."""
        conv = self.layer.conv
        geometry = (conv.weight.shape, conv.stride, conv.padding, conv.dilation, conv.groups, conv.bias is None)
        return (self.x_shape, self.residual_shape, self.layer.may_overwrite, *geometry)


def _cases(network: fx.GraphModule, layers: dict[str, FusedConv], images_shape: Sequence[int]) -> dict[str, _Case]:
    """Runs the network once and notes the shapes, in the order of the calls."""
    cases: dict[str, _Case] = {}

    def note(name: str, layer: FusedConv) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            cases[name] = _Case(layer, inputs[0].shape, inputs[1].shape if len(inputs) > 1 else None)

        return hook

    hooks = [layer.register_forward_pre_hook(note(name, layer)) for name, layer in layers.items()]
    weight = next(network.parameters())
    network(_channels_last(torch.zeros(*images_shape, dtype=weight.dtype, device=weight.device)))
    for hook in hooks:
        hook.remove()
    return cases


def _choose(name: str, case: _Case, timed: bool) -> LayerChoice:
    fused, why = _fused_variant(case)
    if fused == "plain":
        return LayerChoice(name, "plain", None, None, why)
    trouble = _trouble(case, fused)
    if trouble:
        return LayerChoice(name, "plain", None, None, trouble)
    if not timed:
        return LayerChoice(name, fused, None, None, "not timed")
    fused_ms, plain_ms = _time_both(case, fused)
    return LayerChoice(name, fused if fused_ms <= plain_ms else "plain", fused_ms, plain_ms, "timed")


def _fused_variant(case: _Case) -> tuple[Variant, str]:
    """The fused operator for this layer on its device and in its dtype; `plain` and the reason where there is none."""
    weight = case.layer.conv.weight
    if weight.is_cuda:
        if torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic:
            return "plain", "cuDNN's fused operators do not promise the same bits"
        takes = torch.backends.cudnn.is_available() and torch.backends.cudnn.enabled
        takes = takes and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
        return ("cudnn", "") if takes else ("plain", f"cuDNN does not take {weight.dtype} here")
    if weight.device.type != "cpu" or not _onednn_takes(weight.dtype):
        return "plain", f"oneDNN does not take {weight.dtype} here"
    if case.residual_shape is not None and case.layer.conv.groups > 1:
        # torch would run the plain three under that name.
        return "plain", "oneDNN fuses no sum with a grouped convolution"
    return "onednn", ""


def _onednn_takes(dtype: torch.dtype) -> bool:
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


def _inputs(case: _Case) -> tuple[Tensor, Tensor | None]:
    """Random values of the layer's shapes, the same each time."""
    weight = case.layer.conv.weight
    generator = torch.Generator(weight.device).manual_seed(0)

    def draw(shape: torch.Size) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=weight.dtype, device=weight.device)
        return _channels_last(values)

    return draw(case.x_shape), None if case.residual_shape is None else draw(case.residual_shape)


def _trouble(case: _Case, fused: Variant) -> str:
    """What speaks against the fused operator when it is tried; empty if nothing does."""
    layer = case.layer
    layer.use("plain")
    expected_NCHW = layer(*_inputs(case))
    if case.residual_shape not in (None, expected_NCHW.shape):
        return "the sum broadcasts"
    layer.use(fused)
    try:
        layer(*_inputs(case))
        # cuDNN is given memory that nobody has filled as a summand with the factor 0; were it to multiply
        # what stands there, this not-a-number would show.
        inputs = _inputs(case)
        torch.full_like(expected_NCHW, torch.nan)
        found_NCHW = layer(*inputs)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return f"refused: {str(error).splitlines()[0]}"
    finally:
        layer.use("plain")
    wrong_by = float((found_NCHW.float() - expected_NCHW.float()).abs().max())
    size = float(expected_NCHW.abs().max())
    return "" if wrong_by <= WRONG * size else f"wrong by {wrong_by:.1e} beside values of {size:.1e}"


def _time_both(case: _Case, fused: Variant) -> tuple[float, float]:
    """Median milliseconds of a fused and of a plain call, measured in turns."""
    inputs = _inputs(case)
    times: dict[Variant, list[float]] = {fused: [], "plain": []}
    # The first round warms up: cuDNN looks for its fastest algorithm there.
    for timed_round in range(TIMED_ROUNDS + 1):
        for variant, taken in times.items():
            case.layer.use(variant)
            ms = _call_ms(lambda: case.layer(*inputs), inputs[0].device)
            if timed_round:
                taken.append(ms)
    case.layer.use("plain")
    return statistics.median(times[fused]), statistics.median(times["plain"])


def _call_ms(call: Callable[[], Tensor], device: torch.device) -> float:
    """Milliseconds of one call among several in a row, on the device's clock where it has one."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(CALLS_A_ROUND):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / CALLS_A_ROUND
    began = time.perf_counter()
    for _ in range(CALLS_A_ROUND):
        call()
    return 1e3 * (time.perf_counter() - began) / CALLS_A_ROUND


def _channels_last(values_NCHW: Tensor) -> Tensor:
    return values_NCHW.contiguous(memory_format=torch.channels_last)
