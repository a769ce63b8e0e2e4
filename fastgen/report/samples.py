"""Sample images by a rule that looks at no result, with what the first and the last network of a run say of them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fastgen.augment import Normaliser
from fastgen.config import Recipe
from fastgen.crops import Int64
from fastgen.data import build_loader, open_dataset
from fastgen.data.batch import Batch
from fastgen.data.split import Dataset
from fastgen.errors import UserError
from fastgen.evaluate import load_network
from fastgen.nodes import Node
from fastgen.philox import SAMPLE_STREAM, Draws, keys64
from fastgen.recipe import load_text
from fastgen.report.document import Gallery, Paragraph, Ranked, Sample, words
from fastgen.report.groups import Group
from fastgen.report.runs import Run
from fastgen.source import readable_here

SHOWN_CLASSES = 5
# Photographs are shown smaller than networks see them: a page of eight of 224 pixels would be a megabyte.
MOST_PIXELS = 128
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Shown:
    """Whose networks are asked.

    Attributes:
        group: recipe of the run.
        run: its first one.
    """

    group: Group
    run: Run


def chosen(groups: Sequence[Group]) -> Shown:
    """The first run of the first recipe that has students; of the first recipe where none has."""
    taught = [group for group in groups if any(row["role"] == "student" for row in group.runs[0].rows)]
    group = (taught or list(groups))[0]
    return Shown(group, group.runs[0])


def gallery(groups: Sequence[Group], count: int, root: str | None) -> Gallery | Paragraph:
    """So many samples, or a line that says why there are none.

    Args:
        count: of samples; 0: none are wanted.
        root: of the data; None: where the recipe says.
    """
    if not count:
        return Paragraph(words("No samples were asked for (--samples=0)."))
    shown = chosen(groups)
    try:
        return _gallery(shown, count, root)
    except UserError as error:
        return Paragraph(words(f"Samples are left out: {error}."))


def _gallery(shown: Shown, count: int, root: str | None) -> Gallery:
    recipe = _recipe(shown.run, root)
    dataset = _dataset(recipe)
    if dataset.train_hash != shown.run.record.data:
        raise UserError(f"{recipe.data.root} holds other images than those of the run: name theirs with --data.root")
    positions = drawn(dataset.evaluation.ids, count)
    batch = _batch(recipe, dataset, positions)
    asked = _networks(shown.run)
    answers = [(name, _probabilities(recipe, dataset, node, batch)) for name, node in asked]
    part = dataset.evaluated_on
    return Gallery(
        caption=words(
            f"The first {len(positions)} {part} images in the order of their Philox words under key 0 (stream "
            f"{SAMPLE_STREAM}): nobody chose them. Beside each, what networks of {shown.group.name}, seed "
            f"{shown.run.seed_name}, rank first among {dataset.facts.classes} classes; a tick marks the right one."
        ),
        samples=tuple(_sample(dataset, batch, n, answers) for n in range(len(positions))),
    )


def _dataset(recipe: Recipe) -> Dataset:
    try:
        return open_dataset(recipe)
    except UserError as error:
        raise UserError(f"{error} (for the report, --data.root=DIR names where the data are)") from None


def drawn(ids: Int64, count: int) -> Int64:
    """Positions of the samples that are shown: a draw that depends on the ids alone.

    Args:
        ids: int64 (N,).
        count: how many, at most.

    Returns:
        int64 (min(N, count),), in the order of the draw.
    """
    keys = keys64(Draws(0, 0, 0)(ids, SAMPLE_STREAM))
    return np.argsort(keys, kind="stable")[:count].astype(np.int64)


def _recipe(run: Run, root: str | None) -> Recipe:
    """The run's, made to run here."""
    folder = run.record.folder
    recipe = readable_here(load_text((folder / "recipe.yaml").read_text(), str(folder / "recipe.yaml")))
    return replace(recipe, data=replace(recipe.data, root=root or recipe.data.root, workers=1))


def _batch(recipe: Recipe, dataset: Dataset, positions: Int64) -> Batch:
    if recipe.data.backend == "synthetic":
        raise UserError("data.backend = synthetic: random images show nothing")
    split = dataset.evaluation.at(positions)
    loader = build_loader(recipe, dataset, split, CPU)
    return next(iter(loader.batches(dataset.evaluation_views(split), len(positions))))


def _networks(run: Run) -> list[tuple[str, Node]]:
    """The first one and the last."""
    first, last = run.rows[0], run.rows[-1]
    asked = [(f"{row['role']}, gen {row['generation']}", row) for row in (first, last)]
    return [(name, Node(run.record.folder / f"generation_{row['generation']}")) for name, row in dict(asked).items()]


def _probabilities(recipe: Recipe, dataset: Dataset, node: Node, batch: Batch) -> Tensor:
    """fp32 (N, C)."""
    if not node.weights.is_file():
        raise UserError(f"{node.weights}: is not there any more")
    model = load_network(recipe, dataset, node.weights, CPU).eval()
    normalise = Normaliser(dataset.facts.mean, dataset.facts.std, CPU, torch.float32)
    with torch.no_grad():
        return model(normalise(batch.images_NCHW)).float().softmax(1)


def _sample(dataset: Dataset, batch: Batch, number: int, answers: Sequence[tuple[str, Tensor]]) -> Sample:
    label = int(batch.labels[number])
    data, width, height = _png(batch.images_NCHW[number])
    return Sample(
        png=data,
        width_px=width,
        height_px=height,
        sample_id=int(batch.ids[number]),
        label=dataset.class_names[label],
        answers=tuple((name, _ranked(dataset, p_NC[number], label)) for name, p_NC in answers),
    )


def _ranked(dataset: Dataset, p_C: Tensor, label: int) -> tuple[Ranked, ...]:
    """Among equals the lowest class first."""
    order = p_C.sort(descending=True, stable=True).indices[:SHOWN_CLASSES].tolist()
    return tuple(Ranked(dataset.class_names[c], float(p_C[c]), c == label) for c in order)


def _png(image_CHW: Tensor) -> tuple[bytes, int, int]:
    """The view as a file, with its width and height."""
    from PIL import Image

    pixels = image_CHW.permute(1, 2, 0).contiguous().numpy()
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    if max(image.size) > MOST_PIXELS:
        image.thumbnail((MOST_PIXELS, MOST_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, "png", optimize=True)
    return buffer.getvalue(), image.width, image.height
