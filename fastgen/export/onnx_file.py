"""ONNX: networks as a graph, by torch.onnx's exporter, and what onnxruntime makes of the written file.

The exporter notes in each node the stack of Python's calls, with the places of files on this machine, and numbers that
differ from process to process; both are taken out. What is left has the same bytes for the same run and libraries.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastgen.augment import Normaliser
from fastgen.checkpoint import METADATA_KEY
from fastgen.data.facts import Facts
from fastgen.errors import MachineError, UserError, first_line
from fastgen.export.check import batches_of
from fastgen.export.subject import Subject, canonical

Input = Literal["pixels", "pixels-float", "normalised"]
INPUTS: tuple[Input, ...] = get_args(Input)
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
# torch's operators are written in this version; it converts them to later ones, and not to earlier ones.
OLDEST_OPSET = 18
LARGEST_BYTES = 2**31
IMAGES = "images"
CPU = torch.device("cpu")
# Of the batch that is traced: not 1, which would become a constant.
TRACED_IMAGES = 2


class Graph(nn.Module):
    """What becomes the graph: pixels or normalised images -> logits, or the members' mean softmax.

    Args:
        subject: networks.
        given: what the graph takes; pixels are normalised in it.
    """

    scale_C11: Tensor
    shift_C11: Tensor

    def __init__(self, subject: Subject, given: Input) -> None:
        super().__init__()
        self.members = nn.ModuleList(member.model for member in subject.members)
        self.takes_pixels = given != "normalised"
        normalise = Normaliser(subject.facts.mean, subject.facts.std, CPU, torch.float32)
        self.register_buffer("scale_C11", normalise.scale_C[:, None, None])
        self.register_buffer("shift_C11", normalise.shift_C[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, classes)."""
        x_NCHW = images.float() * self.scale_C11 + self.shift_C11 if self.takes_pixels else images
        if len(self.members) == 1:
            return self.members[0](x_NCHW)
        return torch.stack([member(x_NCHW).softmax(1) for member in self.members]).mean(0)


def require_packages() -> None:
    """Checks that all packages for ONNX are installed.

    Raises:
        UserError: one is not.
    """
    for name in PACKAGES:
        try:
            with _quiet():
                importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise UserError(
                f"--format=onnx needs {name}, which is not installed: pip install {' '.join(PACKAGES)}, or give "
                "--format=safetensors"
            ) from None


def require_opset(opset: int) -> None:
    """Checks that torch and onnx know this version of the operators.

    Raises:
        UserError: they do not.
    """
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= opset <= newest:
        raise UserError(f"--opset={opset}: give {OLDEST_OPSET} to {newest}")


def to_onnx(subject: Subject, given: Input, opset: int) -> bytes:
    """The networks as an ONNX file.

    Raises:
        UserError: torch cannot export them, in this opset, or the file would be too large for the format.
    """
    graph = Graph(subject, given).eval()
    size = sum(tensor.numel() * tensor.element_size() for tensor in graph.state_dict().values())
    if size >= LARGEST_BYTES:
        raise UserError(
            f"{subject.stem}: holds {size / 2**30:.1f} GiB of weights, and an ONNX file less than 2: give "
            "--format=safetensors"
        )
    model = _traced(graph, subject, given, opset)
    _forget_places(model)
    found = {entry.domain: entry.version for entry in model.opset_import}
    if found.get("") != opset:
        raise UserError(
            f"--opset={opset}: torch could not convert the graph, which is of {found.get('')}: leave it out"
        )
    entry = model.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, canonical(onnx_description(subject, given, opset))
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def onnx_description(subject: Subject, given: Input, opset: int) -> dict[str, Any]:
    """What the file carries of itself."""
    return subject.describe(subject.members) | {"input": given, "output": subject.output, "opset": opset}


def run_onnx(path: Path, subject: Subject, given: Input, opset: int, pixels_NCHW: Tensor) -> Tensor:
    """Reads a written file, checks its form, and runs it in onnxruntime on the CPU.

    Args:
        path: of the file.
        subject, given, opset: what it was made of.
        pixels_NCHW: uint8; passed in batches of unlike sizes.

    Returns:
        fp32 (N, classes).

    Raises:
        MachineError: it cannot be read or run, or tells other things of itself.
    """
    import onnx

    try:
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
        told = {entry.key: entry.value for entry in model.metadata_props}
        if told != {METADATA_KEY: canonical(onnx_description(subject, given, opset))}:
            raise ValueError("it tells other things of itself than were written")
        return _run(path, subject, batches_of(pixels_NCHW, feeding(subject.facts, given)))
    except MemoryError:
        # Says nothing about the file.
        raise
    except Exception as error:
        # Both libraries have errors of their own for each kind of damage; all of them mean the same.
        raise MachineError(f"{path.name}: failed its check: {first_line(error)}: nothing was written") from error


def feeding(facts: Facts, given: Input) -> Callable[[Tensor], Tensor]:
    """Function: pixels -> what a graph of this input takes."""
    if given == "pixels":
        return lambda pixels_NCHW: pixels_NCHW
    return Normaliser(facts.mean, facts.std, CPU, torch.float32) if given == "normalised" else Tensor.float


def _run(path: Path, subject: Subject, batches: Iterator[Tensor]) -> Tensor:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found = [session.run([subject.output], {IMAGES: batch.contiguous().numpy()})[0] for batch in batches]
    return torch.cat([torch.from_numpy(rows_NC) for rows_NC in found])


def _traced(graph: Graph, subject: Subject, given: Input, opset: int) -> Any:
    """The exporter's model."""
    shape = (TRACED_IMAGES, subject.facts.channels, subject.view.side_px, subject.view.side_px)
    sample = torch.zeros(shape, dtype=torch.uint8 if given == "pixels" else torch.float32)
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                graph, (sample,), dynamo=True, verbose=False, opset_version=opset, input_names=[IMAGES],
                output_names=[subject.output], dynamic_shapes=({0: torch.export.Dim("batch")},),
            )  # fmt: skip
    except MemoryError:
        raise
    except Exception as error:
        # torch wraps whatever a network does that it cannot trace; of a signal `place.staged` knows.
        raise UserError(
            f"{subject.stem}: torch.onnx cannot export {type(subject.members[0].model).__name__} in opset {opset} "
            f"({first_line(error)}): give --format=safetensors"
        ) from error
    assert program is not None
    return program.model_proto


def _forget_places(model: Any) -> None:
    """Takes out where each node comes from."""
    parts = [*model.graph.node, *model.graph.input, *model.graph.output, *model.graph.value_info]
    for part in [*parts, *model.graph.initializer, *model.functions, model.graph]:
        del part.metadata_props[:]
        part.ClearField("doc_string")


@contextmanager
def _quiet() -> Iterator[None]:
    """Nobody hears what the exporter tells of its own steps; what it could not do is an error, and told as such."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
