"""Where a generation's batches come from: images from the data set's loader, logits from its teacher."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fastgen.augment import Normaliser
from fastgen.consistency import DTYPES as MEANS_DTYPES
from fastgen.consistency import Means, MeansLoader, MeansSource
from fastgen.crops import NO_JITTER, JitterPolicy
from fastgen.data.batch import Batch, DeviceSource, Loader
from fastgen.data.resident import ResidentLoader
from fastgen.label_store import LabelStore
from fastgen.labels import LabelTable
from fastgen.lessons import LookAhead, StoreLoader, StoreSource, TableLoader, TableSource
from fastgen.meters import Stopwatch
from fastgen.nodes import Node
from fastgen.plan import Generation
from fastgen.shapes import group_sizes
from fastgen.step import DTYPES, Prepare, make_prepare
from fastgen.teacher import FrozenTeacher, Teacher
from fastgen.teaching import open_store, open_table, ready_teacher
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
        source: the same batches, but for what `ahead` does, made on the device alone; None: they are not.
        ahead: asks a teacher before the step.
        store: keeps what a teacher was asked for; None: nothing does.
        means: of earlier predictions, which the step adds to; None: there are none.
        still_ours: whether the store is this run's to write to; asked in all processes at once.
        views: how views are executed, for the record.
        lessons: how the teacher is asked, for the record; None: there is none.
    """

    loader: Loader
    dress: Callable[[Batch], Batch]
    prepare: Prepare
    live_teacher: Teacher | None
    views: str
    lessons: str | None
    source: DeviceSource | None = None
    ahead: LookAhead | None = None
    store: LabelStore | None = None
    means: Means | None = None
    still_ours: Callable[[], bool] = lambda: True

    def keep(self) -> None:
        """Writes down what this process has asked its teacher since the last time, if that is to be kept.

        To be called in all processes of a run at once.

        Raises:
            OSError: the disk is full.
        """
        if self.store is None or not self.store.writes:
            return
        if not self.still_ours():
            self.store.give_up()
        self.store.flush()

    def with_store(self, store: LabelStore, device: torch.device, ahead: LookAhead | None, asked: str) -> Supply:
        """The same batches with labels from a store.

        Args:
            store: of a teacher.
            device: where batches are.
            ahead: asks it for those that the store lacks; None: it has all.
            asked: how, for the record.
        """
        loader = StoreLoader(self.loader, store, ahead, self.prepare, device)
        source = StoreSource(self.source, store, device) if self.source is not None and ahead is None else None
        lessons = f"label store {store.kind.key}, {store.kind.truncation.how}"
        lessons += ", all of it read" if ahead is None else f", filled by {asked}"
        return replace(self._then(loader, loader.dress, lessons), source=source, ahead=ahead, store=store)

    def with_means(self, means: Means, device: torch.device) -> Supply:
        """The same batches, which know where the means of their predictions are."""
        loader = MeansLoader(self.loader, means, device)
        source = None if self.source is None else MeansSource(self.source, means, device)
        return replace(self._then(loader, loader.dress, None), source=source, means=means)

    def with_table(self, table: LabelTable) -> Supply:
        """The same batches with the teacher's logits from a table."""
        loader = TableLoader(self.loader, table)
        source = None if self.source is None else TableSource(self.source, table)
        return replace(self._then(loader, loader.dress, f"label table {table.kind.key}"), source=source)

    def with_teacher(self, teacher: FrozenTeacher, batches: int, classes: int) -> Supply:
        """The same batches with a teacher: a folded and a plain one are asked within the step, others before it.

        Args:
            teacher: frozen.
            batches: of the student that it sees at once; of several it is asked before the step.
            classes: of its logits.
        """
        if teacher.engine in ("folded", "plain") and batches == 1:
            return replace(self, live_teacher=teacher, lessons=teacher.how)
        ahead = LookAhead(self.loader, teacher, self.prepare, batches, classes)
        return replace(self._then(ahead, ahead.dress, _how(teacher, batches)), ahead=ahead)

    def _then(self, loader: Loader, dress: Callable[[Batch], Batch], lessons: str | None) -> Supply:
        return replace(self, loader=loader, dress=lambda batch: dress(self.dress(batch)), lessons=lessons)


def supply_images(
    loader: Loader, backend: str, normalise: Normaliser, jitter: JitterPolicy = NO_JITTER, *, fused: bool
) -> Supply:
    """Batches without a teacher.

    Args:
        loader: of the data set; a resident one was built with kernels where `fused` is asked for.
        backend: its name, for the record.
        normalise: pixels -> the dtype of the step.
        jitter: what rows of jitter ask for.
        fused: with kernels, where there are some: those of a resident loader normalise too, unless there is jitter.
    """
    plain = Supply(loader, lambda batch: batch, make_prepare(normalise, jitter), None, backend, None)
    if not isinstance(loader, ResidentLoader):
        return plain
    plain = replace(plain, source=loader)
    if not fused:
        return plain
    if jitter.active:
        return replace(plain, views=f"{backend}, triton")

    def dress(batch: Batch) -> Batch:
        return replace(batch, images_NCHW=normalise(batch.images_NCHW))

    normalised = loader.normalised(normalise)
    views = f"{backend}, triton, normalised"
    return replace(plain, loader=normalised, source=normalised, dress=dress, views=views)


def make_supply(
    bench: Workbench,
    generation: Generation,
    node: Node,
    teacher_weights: Sequence[Path],
    stopwatch: Stopwatch,
    sides: Collection[tuple[int, int]],
    held: ExitStack,
) -> Supply:
    """Builds what the recipe asks for; a label table that is not there yet is made.

    Args:
        bench: of the run.
        generation: to be trained.
        node: its own.
        teacher_weights: of the generations that teach it; none: it learns from labels alone.
        stopwatch: of the generation; a label table is charged to its phase `labels`.
        sides: heights and widths of all views that will come.
        held: until the generation's end; the lock of a label store is put there.

    Raises:
        Stopped: a signal came while a label table was made; what is done of it is kept.
        UserError: the teacher is of another network, or its label table is damaged.
    """
    facts, data, train = bench.dataset.facts, bench.recipe.data, bench.recipe.train
    normalise = Normaliser(facts.mean, facts.std, bench.device, DTYPES[train.precision])
    jitter, fused = bench.dataset.crop.jitter, train.kernels == "triton"
    means = _means(bench, generation)
    supply = supply_images(bench.train_loader, data.backend, normalise, jitter, fused=fused)
    if not teacher_weights:
        return supply if means is None else supply.with_means(means, bench.device)
    settings = bench.recipe.teacher
    if settings.labels == "table":
        return supply.with_table(
            open_table(bench, generation, node, teacher_weights, supply.loader, supply.prepare, stopwatch)
        )
    store, still_ours = None, supply.still_ours
    if settings.labels == "store":
        store, complete, still_ours = open_store(bench, generation, teacher_weights, held)
        if complete:
            return supply.with_store(store, bench.device, None, "")
    # Programs ask for a batch alone where no full group is left.
    groups = {
        images
        for batches in (settings.look_ahead_batches, 1)
        for images in group_sizes(len(bench.dataset.train), train.batch_size, batches, bench.group.share)
    }
    teacher = ready_teacher(bench, teacher_weights, max(groups), len(groups) * len(sides), bench.group)
    if store is None:
        return supply.with_teacher(teacher, settings.look_ahead_batches, facts.classes)
    batches = settings.look_ahead_batches
    ahead = LookAhead(supply.loader, teacher, supply.prepare, batches, facts.classes)
    return replace(supply.with_store(store, bench.device, ahead, _how(teacher, batches)), still_ours=still_ours)


def _means(bench: Workbench, generation: Generation) -> Means | None:
    objective, dataset, train = generation.objective, bench.dataset, bench.recipe.train
    if not objective.consistency_weight:
        return None
    numbers = len(dataset.train) * dataset.facts.classes
    size = numbers * MEANS_DTYPES[objective.consistency_dtype].itemsize / 1e9
    bench.recorder.say(
        f"generation {generation.index} keeps mean predictions of all images: {size:.3g} GB, over all devices together "
        "and in each checkpoint"
    )
    return Means(len(dataset.train), dataset.facts.classes, train, objective, bench.device, bench.group)


def _how(teacher: FrozenTeacher, batches: int) -> str:
    return f"{teacher.how}, {batches} batch{'es' if batches > 1 else ''} at once"
