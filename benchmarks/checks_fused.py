"""Checks of what is fused or looked up: views, batch-norm, CUDA graphs, label tables. Used by `gpu_check`."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.checks import (
    PRECISIONS,
    U32,
    Float64,
    Outcome,
    U,
    full_fp32,
    lively_network,
    logits_outcome,
    network_size,
)
from benchmarks.rigs import Case, Precision
from fastgen.data.batch import Loader
from fastgen.data.resident import ResidentLoader
from fastgen.kernels.batchnorm_layer import batchnorm_act
from fastgen.kernels.distill import distill_rows
from fastgen.kernels.tolerant import tolerant_rows
from fastgen.kernels.views import execute_views
from fastgen.label_store import LabelStore, StoreKind
from fastgen.labelling import build_table
from fastgen.labels import TableKind, read_table
from fastgen.lessons import LookAhead, StoreLoader, TableLoader
from fastgen.step import DTYPES, make_prepare
from fastgen.stop import StopRequest
from fastgen.teacher import make_teacher
from fastgen.truncation import Truncation
from fastgen.views import training_views

EPS, MOMENTUM = 1e-5, 0.1
# (images, channels, height, width): CIFAR's three stages, a photograph's, and what no tile divides.
BATCHNORM_SHAPES = (
    (128, 16, 32, 32), (128, 64, 8, 8), (64, 64, 56, 56), (32, 512, 7, 7), (3, 100, 9, 11), (5, 3, 31, 37),
)  # fmt: skip
SMALL_BATCHNORM_SHAPES = ((2, 16, 5, 7), (1, 3, 9, 4))


def check_normalised_views(case: Case) -> Iterator[Outcome]:
    """Batches that the kernel normalises, against pixels of plain PyTorch and arithmetic in fp64."""
    loader = ResidentLoader(case.split, case.facts.pad_px, case.device, kernels=True)
    plain = ResidentLoader(case.split, case.facts.pad_px, case.device)
    views = training_views(case.split.ids, case.crop, data_seed=8, generation=0, epoch=0)
    mean_C, std_C = np.array(case.facts.mean), np.array(case.facts.std)
    for precision in PRECISIONS:
        normalised = loader.normalised(case.normaliser(DTYPES[precision]))
        excess, images = 0.0, 0
        for found, raw in zip(
            normalised.batches(views, case.batch_size), plain.batches(views, case.batch_size), strict=True
        ):
            pixels_NHWC = raw.images_NCHW.permute(0, 2, 3, 1).cpu().numpy()
            expected = (pixels_NHWC / 255 - mean_C) / std_C
            error = np.abs(found.images_NCHW.permute(0, 2, 3, 1).double().cpu().numpy() - expected)
            # Scale, product, shift and sum are rounded, each at most 1/std in size; then the dtype rounds.
            allowed = 4 * U32 / std_C.min() + 2 * U[precision] * np.abs(expected)
            excess, images = max(excess, float((error / allowed).max())), images + len(raw.labels)
        yield Outcome(f"views kernel: error over tolerance, {precision}", excess, 1, f"{images} images")


def check_batchnorm(device: torch.device, seed: int, shapes: Sequence[tuple[int, int, int, int]]) -> Iterator[Outcome]:
    """Batch-norm with ReLU, with and without a residual, forward and backward, against PyTorch in fp64 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    for precision, residual in itertools.product(PRECISIONS, (False, True)):
        found: dict[str, list[Outcome]] = {}
        for shape in shapes:
            for outcome in _compare_batchnorm(shape, precision, residual, generator, device):
                found.setdefault(outcome.name, []).append(outcome)
        for name, outcomes in found.items():
            most = max(outcomes, key=lambda outcome: np.nan_to_num(outcome.error, nan=np.inf))
            yield replace(most, name=f"batchnorm: {name}, {precision}{', residual' if residual else ''}")


def _compare_batchnorm(
    shape: tuple[int, int, int, int],
    precision: Precision,
    residual: bool,
    generator: torch.Generator,
    device: torch.device,
) -> Iterator[Outcome]:
    dtype, channels = DTYPES[precision], shape[1]
    x, extra, dy = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    x = (2 * x + 3).to(dtype)
    weight, bias = (torch.randn(channels, generator=generator) for _ in range(2))
    values = [x, weight, bias, *([extra] if residual else [])]
    exact = [value.double().requires_grad_() for value in values]
    mean, var = torch.zeros(channels, dtype=torch.float64), torch.ones(channels, dtype=torch.float64)
    before = F.batch_norm(exact[0], mean, var, exact[1], exact[2], True, MOMENTUM, EPS)
    before = before + exact[3] if residual else before
    # Where the sum is all but zero, rounding decides whether ReLU is open: no gradient comes from there.
    dy = torch.where(before.detach().abs() < 2.0**-6, 0, dy)
    before.relu().backward(dy.double())

    given = [_on(value, device).requires_grad_() for value in values]
    running = torch.zeros(channels, device=device), torch.ones(channels, device=device)
    counter = torch.zeros((), dtype=torch.int64, device=device)
    y = batchnorm_act(given[0], given[3] if residual else None, given[1], given[2], *running, counter, MOMENTUM, EPS)
    y.backward(_on(dy, device))
    rows, where = x.numel() // channels, "x".join(map(str, shape))
    results: dict[str, tuple[Tensor | None, Tensor | None]]
    results = {"y": (y, before.relu()), "running mean": (running[0], mean), "running variance": (running[1], var)}
    for name, ours, theirs in zip(("dx", "dweight", "dbias", "dresidual"), given, exact, strict=False):
        results[name] = (ours.grad, theirs.grad)
    for name, pair in results.items():
        yield _batchnorm_outcome(name, *pair, precision, rows, where)


def _batchnorm_outcome(
    name: str, found: Tensor | None, expected: Tensor | None, precision: Precision, rows: int, where: str
) -> Outcome:
    """Error over what is allowed.

    Sums over the rows go through about log2 of them and one rounding a tile, 32 roundings at most here, of terms
    that are of the size of the largest result times the square root of the rows; the elementwise part is a few
    roundings of numbers of the size of the largest result; then the dtype rounds.
    """
    if found is None or expected is None:
        return Outcome(name, np.nan, 1, f"{where}: no gradient")
    of_rows = name in ("dweight", "dbias")
    rounding = 0.0 if of_rows or name.startswith("running") else U[precision]
    exact: Float64 = expected.detach().numpy()
    error = np.abs(found.detach().double().cpu().numpy() - exact)
    size = max(1.0, float(np.abs(exact).max())) * (rows**0.5 if of_rows else 1)
    allowed = 32 * U32 * size + 2 * rounding * np.abs(exact)
    return Outcome(name, float((error / allowed).max()), 1, where)


def _on(value: Tensor, device: torch.device) -> Tensor:
    moved = value.to(device)
    return moved.contiguous(memory_format=torch.channels_last) if moved.ndim == 4 else moved


def check_capture(case: Case) -> Iterator[Outcome]:
    """Every operator in a CUDA graph: replayed on other inputs it gives the bits of a call."""
    device, generator = case.device, torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return _on(torch.randn(shape, generator=generator), device)

    z, v, x, residual = random(64, 100), random(64, 100), random(8, 16, 8, 8), random(8, 16, 8, 8)
    labels = torch.randint(100, (64,), generator=generator).to(device)
    scale = torch.full((), 3.0, device=device)
    pixels = torch.from_numpy(case.split.images_NHWC[:8]).to(device)
    rows = torch.from_numpy(training_views(np.arange(8), case.crop, 0, 0, 0).table).to(device)
    weight, bias, mean, var = random(16), random(16), random(16), random(16)
    counter = torch.zeros((), dtype=torch.int64, device=device)
    positions = torch.arange(8, device=device)
    calls: dict[str, tuple[Callable[[], Sequence[Tensor]], Tensor]] = {
        "tolerant": (lambda: tolerant_rows(z, labels, 4 / 7, 5, scale, 0.5), z),
        "distill": (lambda: distill_rows(z, labels, v, 0.6, 2.0, scale, 0.5), z),
        "views": (lambda: [execute_views(pixels, positions, rows, None, None, torch.uint8)], pixels),
        "batchnorm": (
            lambda: [batchnorm_act(x, residual, weight, bias, mean, var, counter, MOMENTUM, EPS)],
            x,
        ),
    }
    for name, (call, changed) in calls.items():
        yield Outcome(f"capture, {name}: outputs that differ", _replayed_differently(call, changed), 0)


def _replayed_differently(call: Callable[[], Sequence[Tensor]], changed: Tensor) -> float:
    """Outputs of a replayed graph that are not those of a call, after an input was changed in place."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    changed.copy_(changed.flip(0))
    for output in captured:
        output.fill_(77)
    graph.replay()
    return float(sum(not torch.equal(ours, theirs) for ours, theirs in zip(captured, call(), strict=True)))


def check_labels(case: Case, folder: Path) -> Iterator[Outcome]:
    """Label table, label store and a look ahead of eight batches beside the live teacher, over an epoch's views."""
    loader = ResidentLoader(case.split, case.facts.pad_px, case.device)
    views = training_views(case.split.ids, case.crop, data_seed=9, generation=1, epoch=2)
    first = next(loader.batches(views, case.batch_size))
    inputs_NCHW = case.normaliser(torch.float32)(first.images_NCHW)
    model = lively_network(case, inputs_NCHW)
    for precision in PRECISIONS:
        kind = TableKind(
            "checked", "random", len(case.split), case.crop, case.facts.mean, case.facts.std, case.facts.classes,
            precision, "folded",
        )  # fmt: skip
        prepare = make_prepare(case.normaliser(DTYPES[precision]))
        with full_fp32():
            teacher = make_teacher(copy.deepcopy(model), case.device, DTYPES[precision])
            build_table(folder / precision, kind, loader, prepare, teacher, StopRequest(), lambda done: None, print)
            table = read_table(folder / precision, kind, case.device)
            if table is None:
                raise ValueError("the table that was built is not there")
            live = [teacher(prepare(batch.images_NCHW, None)) for batch in loader.batches(views, case.batch_size)]
            store, ahead = _store(case, precision, folder), LookAhead(loader, teacher, prepare, 8, case.facts.classes)
            ways: dict[str, Loader] = {
                "label table": TableLoader(loader, table),
                "look ahead": ahead,
                "label store, filled": StoreLoader(loader, store, ahead, prepare, case.device),
                "label store, read": StoreLoader(loader, store, None, prepare, case.device),
            }
            for name, way in ways.items():
                found = [batch.teacher_logits_BC for batch in way.batches(views, case.batch_size)]
                store.flush()
                yield _beside_live(f"{name} beside live, {precision}", found, live, network_size(model), U[precision])


def _store(case: Case, precision: Precision, folder: Path) -> LabelStore:
    """An empty one that keeps all of a teacher's word."""
    facts, truncation = case.facts, Truncation(case.facts.classes, case.facts.classes, "fp32")
    kind = StoreKind(
        "checked",
        "random",
        len(case.split),
        case.crop,
        "stored",
        facts.mean,
        facts.std,
        precision,
        "folded",
        truncation,
    )
    return LabelStore(folder / "stores", kind, writes=True)


def _beside_live(
    name: str, found: Sequence[Tensor | None], live: Sequence[Tensor], size: tuple[int, int], u: float
) -> Outcome:
    found_BC = torch.cat([logits for logits in found if logits is not None])
    live_BC = torch.cat(list(live))
    equal = int((found_BC == live_BC).sum())
    outcome = logits_outcome(name, found_BC, live_BC.double().cpu(), *size, u)
    return replace(outcome, where=f"{equal} of {live_BC.numel()} logits bit-equal")
