"""What must a training step cost? FLOPs and bytes of each operator, from the network's shapes alone.

    works = step_work(model, (1024, 3, 224, 224), bytes_per_value=2, fusing="bnrelu")
    seconds = floor_seconds(works, copy_bytes_per_second, matmul_flops_per_second)

Nothing is run or timed here: networks are traced, and shapes are propagated without values. The rates are measured by
`benchmarks.ceilings`. An operator reads and writes each of its values once a pass, in memory that no cache shortens the
way to; operators run one after the other, each as fast as the slower of memory and arithmetic lets it. So the floor is
that of kernels that do not overlap, under a rule of fusing:

- `eager`: batch-norm, sum and ReLU are operators of their own, and so is the sum of the gradients of a value that
  several operators read.
- `bnrelu`: batch-norm -> ReLU and batch-norm -> sum -> ReLU are one operator, wherever `train.batchnorm=triton` fuses
  them, and the operators around sum the gradients.

Left out, so that the floor is rather too low than too high: the loss, normalisation of the images, casts of the
weights, vectors of one value a channel, bits or outputs that say where a fused ReLU let a value pass, indices of a
maximum, under `bnrelu` the sums of gradients, and arithmetic outside of matrix products. Two things make it too high: a
1x1 convolution with a stride is charged all of its input (about 1 % of a ResNet's bytes), and in a small batch one
operator may find in a cache what another one left there.

FLOPs are those of convolutions and linear layers, two a multiplication with its addition. Their backward pass is a
gradient of the input (dgrad) and one of the weights (wgrad), each as many FLOPs as the forward pass; where the input
hangs on no parameter, as the first convolution's, nobody asks for a dgrad.

Shapes: B images, C channels, H rows, W columns.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from fastgen.folding import ADD_FUNCTIONS, RELU_FUNCTIONS, fold, fuse
from fastgen.fused_conv import FusedConv
from fastgen.models import parameter_count
from fastgen.models.norm_act import fuse_norm_act

Fusing = Literal["eager", "bnrelu"]
Phase = Literal["forward", "backward", "optimizer", "teacher"]

CONVOLUTION, LINEAR = "convolution", "linear"
MATRIX_KINDS = (CONVOLUTION, LINEAR)
NORM, NORM_ACT = "batch-norm", "batch-norm and relu"
MODULE_KINDS: dict[type[nn.Module], str] = {
    nn.Conv2d: CONVOLUTION,
    FusedConv: CONVOLUTION,
    nn.Linear: LINEAR,
    nn.BatchNorm2d: NORM,
    nn.ReLU: "relu",
    nn.MaxPool2d: "pool",
    nn.AvgPool2d: "pool",
    nn.AdaptiveAvgPool2d: "pool",
}
# Functions, and methods by their names.
CALL_KINDS: dict[Any, str] = {
    **dict.fromkeys(RELU_FUNCTIONS, "relu"),
    **dict.fromkeys(ADD_FUNCTIONS, "sum"),
    F.pad: "pad",
    operator.getitem: "slice",
    "mean": "pool",
    torch.flatten: "view",
    "flatten": "view",
}


class _Moved(NamedTuple):
    """How often an operator moves all values of its first input, of its other inputs, and of its output."""

    input: int
    others: int
    output: int


NOTHING = _Moved(0, 0, 0)
FORWARD = {
    # Read for the statistics, and again to be normalised.
    NORM: _Moved(2, 0, 1),
    NORM_ACT: _Moved(2, 1, 1),
    "relu": _Moved(1, 0, 1),
    "sum": _Moved(1, 1, 1),
    "pool": _Moved(1, 0, 1),
    "pad": _Moved(1, 0, 1),
    "slice": NOTHING,
    "view": NOTHING,
}
# The gradient of a tensor is as large as the tensor.
BACKWARD = {
    # Input and gradient are read for two sums over each channel, and again for the gradient of the input.
    NORM: _Moved(3, 0, 2),
    # The gradient of the residual is written besides.
    NORM_ACT: _Moved(3, 1, 2),
    # The output says where the gradient passes.
    "relu": _Moved(1, 0, 2),
    # Both inputs are given the output's gradient as it is.
    "sum": NOTHING,
    "pool": _Moved(1, 0, 1),
    "pad": _Moved(1, 0, 1),
    # Zeros everywhere but where the gradient is copied to.
    "slice": _Moved(1, 0, 1),
    "view": NOTHING,
}
# Two gradients read, their sum written.
GRADIENT_SUM_VALUES = 3
# SGD with momentum reads parameter, gradient and momentum and writes parameter and momentum, all in fp32.
OPTIMIZER_BYTES_PER_PARAMETER = 5 * 4


@dataclass(frozen=True)
class Work:
    """What one operator computes and moves in one pass over a batch.

    Attributes:
        flops: of matrix products; 0 for all but convolutions and linear layers.
        bytes: read and written.
        phase: of the step; `teacher` is the teacher's forward pass.
        operator: where it is in the network, as torch.fx names it.
        kind: what it is.
    """

    flops: int
    bytes: int
    phase: Phase
    operator: str
    kind: str


def step_work(
    model: nn.Module, shape_BCHW: Sequence[int], bytes_per_value: int, fusing: Fusing, teacher: bool = False
) -> list[Work]:
    """Everything that a training step runs, in the order in which it runs.

    Args:
        model: as `build_model` gives it, not rewritten; it is not changed.
        shape_BCHW: of a batch of images.
        bytes_per_value: of the step's precision: 2 for bf16 and fp16, 4 for fp32.
        fusing: which operators are one.
        teacher: whether a teacher of the same architecture labels the batch in the step: folded, with convolution,
            sum and ReLU as one operator, whatever `fusing` says.

    Raises:
        ValueError: the rule of fusing is none, the shape is not that of a batch of images, the network has nothing to
            fuse, or its batch-norms are given a single value per channel.
        TypeError: the network holds an operator whose cost is not written down here.
    """
    if fusing not in get_args(Fusing):
        raise ValueError(f"fusing = {fusing}: must be one of {', '.join(get_args(Fusing))}")
    nodes = _read(_student(model, fusing), shape_BCHW)
    works = list(_teacher(model, shape_BCHW, bytes_per_value)) if teacher else []
    works += _forward(nodes, bytes_per_value, "forward")
    works += _backward(nodes, bytes_per_value, sums_gradients=fusing == "eager")
    optimizer_bytes = OPTIMIZER_BYTES_PER_PARAMETER * parameter_count(model)
    return [*works, Work(0, optimizer_bytes, "optimizer", "all parameters", "sgd")]


def model_flops_per_image(model: nn.Module, shape_BCHW: Sequence[int], teacher: bool = False) -> int:
    """FLOPs of forward and backward pass for one image, and of the teacher's forward pass if there is one.

    Arguments and errors as of `step_work`. They do not depend on precision and fusing.
    """
    works = step_work(model, shape_BCHW, bytes_per_value=2, fusing="eager", teacher=teacher)
    return sum(work.flops for work in works) // shape_BCHW[0]


def floor_seconds(works: Iterable[Work], copy_bytes_per_second: float, matmul_flops_per_second: float) -> float:
    """Seconds that operators need at least, one after the other, each bound by memory or by arithmetic.

    Raises:
        ValueError: a rate is not above 0.
    """
    if not (copy_bytes_per_second > 0 and matmul_flops_per_second > 0):
        raise ValueError(f"rates {copy_bytes_per_second} and {matmul_flops_per_second}: must be above 0")
    return math.fsum(max(work.bytes / copy_bytes_per_second, work.flops / matmul_flops_per_second) for work in works)


class _Node(NamedTuple):
    """An operator of a traced network.

    Attributes:
        name: as torch.fx names it.
        kind: a key of FORWARD, or one of MATRIX_KINDS.
        inputs: values of each tensor that it is given, weights apart.
        output: values of its result.
        weight: shape of its weight, without a dimension where it has none.
        input_learns, learns: whether its first input, or its result, hangs on a parameter, so that a gradient flows.
        readers: how often operators read its result, each of which gives it a gradient.
    """

    name: str
    kind: str
    inputs: tuple[int, ...]
    output: int
    weight: tuple[int, ...]
    input_learns: bool
    learns: bool
    readers: int

    def values(self, moved: _Moved) -> int:
        """That are moved."""
        return moved.input * self.inputs[0] + moved.others * sum(self.inputs[1:]) + moved.output * self.output

    @property
    def matrix_values(self) -> int:
        """Of a product. Each of its gradients reads two of input, weight and output and writes the third: as many."""
        return sum(self.inputs) + math.prod(self.weight) + self.output

    @property
    def matrix_flops(self) -> int:
        """Of the product, and of each of its two gradients: every value is a sum over one filter's weights."""
        return 2 * self.output * math.prod(self.weight[1:])


def _without_values(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to("meta", torch.float32)


def _student(model: nn.Module, fusing: Fusing) -> fx.GraphModule:
    network = _without_values(model).train()
    traced = fuse_norm_act(network) if fusing == "bnrelu" else fx.symbolic_trace(network)
    assert isinstance(traced, fx.GraphModule)
    return traced


def _teacher(model: nn.Module, shape_BCHW: Sequence[int], bytes_per_value: int) -> Iterator[Work]:
    folded, _ = fold(_without_values(model).eval())
    return _forward(_read(fuse(folded), shape_BCHW), bytes_per_value, "teacher")


def _read(network: fx.GraphModule, shape_BCHW: Sequence[int]) -> list[_Node]:
    """The operators of a traced network without values, in their order."""
    if len(shape_BCHW) != 4:
        raise ValueError(f"shape = {tuple(shape_BCHW)}: must be (B, C, H, W)")
    ShapeProp(network).propagate(torch.empty(*shape_BCHW, device="meta").contiguous(memory_format=torch.channels_last))
    learning = _learning(network)
    nodes = []
    for node in network.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        kind, weight = _kind_and_weight(network, node)
        inputs = _inputs(node)
        sizes = tuple(_values_of(input_) for input_ in inputs)
        readers = sum(_inputs(user).count(node) for user in node.users if user.op != "output")
        learns = inputs[0] in learning, node in learning
        nodes.append(_Node(node.name, kind, sizes, _values_of(node), weight, *learns, readers))
    return nodes


def _inputs(node: fx.Node) -> list[fx.Node]:
    """The tensors that an operator is given; one that it is given twice it reads twice."""
    return [argument for argument in (*node.args, *node.kwargs.values()) if isinstance(argument, fx.Node)]


def _learning(network: fx.GraphModule) -> set[fx.Node]:
    """What hangs on a parameter."""
    learning: set[fx.Node] = set()
    for node in network.graph.nodes:
        module = network.get_submodule(node.target) if node.op == "call_module" else None
        has_parameters = module is not None and next(module.parameters(), None) is not None
        if has_parameters or not learning.isdisjoint(node.all_input_nodes):
            learning.add(node)
    return learning


def _kind_and_weight(network: fx.GraphModule, node: fx.Node) -> tuple[str, tuple[int, ...]]:
    if node.op != "call_module":
        if node.op not in ("call_function", "call_method") or node.target not in CALL_KINDS:
            raise TypeError(f"no cost is written for {node.target}")
        return CALL_KINDS[node.target], ()
    # Here and not above: it imports Triton.
    from fastgen.kernels.batchnorm_layer import BatchNormAct2d

    module = network.get_submodule(str(node.target))
    kind = NORM_ACT if type(module) is BatchNormAct2d else MODULE_KINDS.get(type(module))
    if kind is None:
        raise TypeError(f"no cost is written for {type(module).__name__}")
    layer = module.conv if isinstance(module, FusedConv) else module
    return kind, tuple(layer.get_parameter("weight").shape) if kind in MATRIX_KINDS else ()


def _values_of(node: fx.Node) -> int:
    return node.meta["tensor_meta"].shape.numel()


def _forward(nodes: Sequence[_Node], bytes_per_value: int, phase: Phase) -> Iterator[Work]:
    for node in nodes:
        if node.kind in MATRIX_KINDS:
            yield Work(node.matrix_flops, bytes_per_value * node.matrix_values, phase, node.name, node.kind)
        elif FORWARD[node.kind] != NOTHING:
            yield Work(0, bytes_per_value * node.values(FORWARD[node.kind]), phase, node.name, node.kind)


def _backward(nodes: Sequence[_Node], bytes_per_value: int, sums_gradients: bool) -> Iterator[Work]:
    for node in reversed(nodes):
        if sums_gradients and node.learns:
            for _ in range(node.readers - 1):
                sum_bytes = bytes_per_value * GRADIENT_SUM_VALUES * node.output
                yield Work(0, sum_bytes, "backward", node.name, "gradient sum")
        if node.kind in MATRIX_KINDS:
            gradients = ("dgrad", "wgrad") if node.input_learns else ("wgrad",)
            for gradient in gradients:
                matrix_bytes = bytes_per_value * node.matrix_values
                yield Work(node.matrix_flops, matrix_bytes, "backward", node.name, f"{node.kind} {gradient}")
        elif node.learns and BACKWARD[node.kind] != NOTHING:
            yield Work(0, bytes_per_value * node.values(BACKWARD[node.kind]), "backward", node.name, node.kind)
