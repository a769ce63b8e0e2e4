"""Where a generation's batches come from: images from the data set's loader, logits from its teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from fastgen.augment import Normaliser
from fastgen.crops import ShiftCrop
from fastgen.data.batch import Batch, Loader
from fastgen.data.resident import ResidentLoader
from fastgen.evaluate import load_network
from fastgen.labels import TABLE_BATCH, LabelTable, TableKind, build_table, read_table
from fastgen.lessons import LookAhead, TableLoader
from fastgen.meters import Stopwatch
from fastgen.plan import Generation
from fastgen.step import DTYPES, Prepare, make_prepare
from fastgen.teacher import FrozenTeacher, Teacher, make_teacher
from fastgen.workbench import Workbench


@dataclass(frozen=True)
class Supply:
    """Batches of a generation.

    Attributes:
        loader: gives them.
        dress: makes of a raw batch, as the data set's loader gives it, one as this loader gives it; for blank batches
            before the training.
        prepare: what the network sees of a batch's images.
        live_teacher: asked within the step; None: there is none, or batches bring its logits along.
        views: how views are executed, for the record.
        lessons: how the teacher is asked, for the record; None: there is none.
    """

    loader: Loader
    dress: Callable[[Batch], Batch]
    prepare: Prepare
    live_teacher: Teacher | None
    views: str
    lessons: str | None


def make_supply(
    bench: Workbench, generation: Generation, teacher_weights: Path | None, stopwatch: Stopwatch, shapes: int
) -> Supply:
    """Builds what the recipe asks for; a label table that is not there yet is made, and charged to phase `labels`.

    Args:
        bench: of the run.
        generation: to be trained.
        teacher_weights: of the generation that teaches it; None: it learns from labels alone.
        stopwatch: of the generation.
        shapes: how many shapes of batches will come.

    Raises:
        Stopped: a signal came while a label table was made; what is done of it is kept.
        UserError: the teacher is of another network, or its label table is damaged.
    """
    supply = _images(bench)
    if teacher_weights is None:
        return supply
    settings = bench.recipe.teacher
    if settings.labels == "table":
        with stopwatch.phase("labels"):
            table = _table(bench, generation, teacher_weights, supply)
        loader = TableLoader(supply.loader, table)
        return _then(supply, loader, loader.dress, f"label table {table.kind.key}")
    # Groups at the end of an epoch are of sizes of their own.
    images = bench.recipe.train.batch_size * settings.look_ahead_batches
    teacher = _teacher(bench, teacher_weights, images, 2 * shapes)
    if settings.engine == "folded" and settings.look_ahead_batches == 1:
        return replace(supply, live_teacher=teacher, lessons=teacher.how)
    ahead = LookAhead(supply.loader, teacher, supply.prepare, settings.look_ahead_batches)
    return _then(supply, ahead, ahead.dress, f"{teacher.how}, {settings.look_ahead_batches} batches at once")


def _then(supply: Supply, loader: Loader, dress: Callable[[Batch], Batch], lessons: str) -> Supply:
    return replace(supply, loader=loader, dress=lambda batch: dress(supply.dress(batch)), lessons=lessons)


def _images(bench: Workbench) -> Supply:
    facts, train, jitter = bench.dataset.facts, bench.recipe.train, bench.dataset.crop.jitter
    normalise = Normaliser(facts.mean, facts.std, bench.device, DTYPES[train.precision])
    prepare, loader = make_prepare(normalise, jitter), bench.train_loader
    plain = Supply(loader, lambda batch: batch, prepare, None, bench.recipe.data.backend, None)
    if train.kernels != "triton" or not isinstance(loader, ResidentLoader):
        return plain
    if jitter.active:
        return replace(plain, views="resident, triton")

    def dress(batch: Batch) -> Batch:
        return replace(batch, images_NCHW=normalise(batch.images_NCHW))

    return replace(plain, loader=loader.normalised(normalise), dress=dress, views="resident, triton, normalised")


def _teacher(bench: Workbench, weights: Path, images: int, shapes: int) -> FrozenTeacher:
    """The teacher, for passes of so many images."""
    recipe, facts = bench.recipe, bench.dataset.facts
    model = load_network(recipe, bench.dataset, weights, bench.device)
    side_px = recipe.data.resolution_px
    height_px, width_px = facts.height_px or side_px, facts.width_px or side_px
    return make_teacher(
        model,
        bench.device,
        DTYPES[recipe.train.precision],
        recipe.teacher.engine,
        shape=(images, facts.channels, height_px, width_px),
        timed=not recipe.run.deterministic,
        shapes=shapes,
    )


def _table(bench: Workbench, generation: Generation, weights: Path, images: Supply) -> LabelTable:
    kind = _kind(bench, generation)
    folder = Path(str(bench.recipe.run.nodes)) / "labels" / kind.key
    table, path = read_table(folder, kind, bench.device), folder / "logits.safetensors"
    if table is None:
        teacher = _teacher(bench, weights, TABLE_BATCH, 2)
        what = f"teacher of generation {generation.index} labels {kind.views} views of {kind.count} images"
        with bench.recorder.display.passes(what, kind.views, kind.count) as passed:
            build_table(folder, kind, images.loader, images.prepare, teacher, bench.stop, passed)
        bench.recorder.event("label_table", generation=generation.index, path=str(path), teacher=teacher.how)
        table = read_table(folder, kind, bench.device)
    if table is None:
        raise ValueError(f"{path} was written a moment ago and is not there")
    bench.recorder.say(f"generation {generation.index} learns from {path} ({path.stat().st_size / 1e9:.2f} GB)")
    return table


def _kind(bench: Workbench, generation: Generation) -> TableKind:
    recipe, dataset = bench.recipe, bench.dataset
    if not isinstance(dataset.crop, ShiftCrop) or generation.teacher is None:
        raise TypeError("a label table needs a teacher, and crops that are not resampled")
    return TableKind(
        teacher=generation.teacher,
        images=dataset.train.content_hash,
        count=len(dataset.train),
        crop=dataset.crop,
        mean=dataset.facts.mean,
        std=dataset.facts.std,
        classes=dataset.facts.classes,
        precision=recipe.train.precision,
        engine=recipe.teacher.engine,
    )
