"""Evaluation shared by processes: each sample once, and the same bits however many there are. gloo, on the CPU."""

import json
import math
import os
import pickle
import signal
import sys
import time
from dataclasses import astuple, replace
from datetime import timedelta
from itertools import zip_longest
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from conftest import tiny_recipe
from pictures import photograph
from test_loaders import PHOTO, SIZES, ids_of, photo_loader, pixels_of, write_pictures
from torch import nn

from fastgen import measuring
from fastgen.augment import Normaliser
from fastgen.checkpoint import save_weights
from fastgen.config import DataSettings
from fastgen.crops import ResizedCrop, ShiftCrop
from fastgen.data import build_loader, open_dataset
from fastgen.data.dali_loader import DaliLoader
from fastgen.data.digits import read_digits
from fastgen.data.facts import DATASETS
from fastgen.data.folder import FolderLoader
from fastgen.data.resident import ResidentLoader
from fastgen.data.split import Split
from fastgen.data.synthetic import SyntheticLoader
from fastgen.distributed import ALONE, Group
from fastgen.errors import FastgenError, Stopped
from fastgen.measuring import Examination, Tally, measure, measure_ensemble, own_part
from fastgen.models import build_model, initialise
from fastgen.nodes import Node
from fastgen.plan import make_plan
from fastgen.recipe import read_recipe
from fastgen.results import Results
from fastgen.stop import StopRequest
from fastgen.views import evaluation_views
from fastgen.workbench import Workbench

pytestmark = pytest.mark.timeout(240)

CPU = torch.device("cpu")
WORLDS = (1, 2, 3, 7)
PATIENCE_SECONDS = 120
# Five batches, the last one smaller: of seven processes two have none.
IMAGES, SIDE, CLASSES = 2300, 8, 10
# Six batches of 8, the last one of 4: of seven processes one has none.
MARKED, SMALL_BATCH, FIRST_BIT = 44, 8, 7
# Of two networks that were trained, each with the processes that its record tells of, or without.
NODES = {"patriarch": 3, "student": None}


def batches_of(size):
    """Evaluation batches of another size."""
    return mock.patch.object(measuring, "EVALUATION_BATCH", size)


def one_process(rank, world, folder):
    """One of the processes: all cases one after the other, what they gave in a file."""
    torch.set_num_threads(1)
    store = f"file://{folder / f'store{world}'}"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=PATIENCE_SECONDS)
    )
    group = Group(rank, world, rank, world, control=dist.group.WORLD)
    given = {
        "networks": networks(group, 500),
        "networks in many batches": networks(group, 50),
        "marked": marked(group),
        "stopped before": stopped(group, {1 % world: signal.SIGTERM}, at=0),
        "stopped under way": stopped(group, {1 % world: signal.SIGINT}, at=1),
        "stopped differently": stopped(group, {0: signal.SIGINT, 1 % world: signal.SIGTERM}, at=0),
        "results": results(group, folder),
    }
    if world == 1:
        given["networks alone"] = networks(ALONE, 500)
        given["networks in many batches alone"] = networks(ALONE, 50)
    (folder / f"{world}.{rank}").write_bytes(pickle.dumps(given))
    dist.destroy_process_group()


def networks(group, batch_size):
    """Measurements of three networks and of all together, and how many probabilities of each were kept here."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (IMAGES, SIDE, SIDE, 1), generator=generator, dtype=torch.uint8).numpy()
    split = Split(images, np.arange(IMAGES) % CLASSES, np.arange(IMAGES))
    views = evaluation_views(split.ids, ShiftCrop(SIDE, SIDE, 0, flip=False))
    normalise = Normaliser((0.5,), (0.25,), CPU, torch.float32)
    on = Examination(ResidentLoader(split, 0, CPU), views, normalise, 5, CPU, group)
    measured, members = [], []
    with batches_of(batch_size):
        for seed in range(3):
            model = initialise(build_model("resnet8", CLASSES, 1, "strided"), seed)
            measurement, own = measure(model, on)
            measured.append(astuple(measurement))
            members.append(own)
        labels = torch.from_numpy(split.labels[own_part(views.order, group)])
        measured.append(astuple(measure_ensemble(members, labels, 5, group)))
    return measured, [len(own) for own in members]


class Marked(nn.Module):
    """Sample n adds 2^(n + FIRST_BIT) to the sum of the negative log-likelihoods: exact, and a bit of its own."""

    def __init__(self, called=lambda turn: None):
        super().__init__()
        self.seen, self.called = [], called

    def forward(self, images_NCHW):
        numbers = images_NCHW[:, 0, 0, 0].round().long()
        self.seen.append(numbers.tolist())
        self.called(len(self.seen))
        wrong = torch.full((len(numbers), 1), 0.0)
        return torch.cat([wrong, -torch.ldexp(torch.ones(len(numbers), 1), numbers[:, None] + FIRST_BIT)], 1)


def measure_marked(group, model, stop=None):
    """The marked samples, all of class 1, which the network finds impossible."""
    split = Split(np.arange(MARKED, dtype=np.uint8).reshape(-1, 1, 1, 1), np.ones(MARKED, np.int64), np.arange(MARKED))
    # Not in the order of the split, so that positions and places in the order are told apart.
    views = replace(evaluation_views(split.ids, ShiftCrop(1, 1, 0, flip=False)), order=np.arange(MARKED)[::-1].copy())
    normalise = Normaliser((0.0,), (1 / 255,), CPU, torch.float32)
    with batches_of(SMALL_BATCH):
        return measure(model, Examination(ResidentLoader(split, 0, CPU), views, normalise, 2, CPU, group), stop)


def marked(group):
    """The measurement of the marked samples, how many probabilities were kept, and the batches that passed here."""
    model = Marked()
    measurement, own = measure_marked(group, model)
    return measurement, len(own), model.seen


def stopped(group, signals, at):
    """How a measurement ends where some processes get a signal before it (at = 0), or in their n-th batch."""
    with StopRequest() as stop:

        def called(turn):
            if turn == at and group.rank in signals:
                signal.raise_signal(signals[group.rank])

        called(0)
        model = Marked(called)
        begun = time.monotonic()
        try:
            measure_marked(group, model, stop)
            code = 0
        except Stopped as error:
            code = error.exit_code
        seconds = time.monotonic() - begun
    # Whoever had been left waiting would answer here with something else, or not at all.
    return code, seconds, len(model.seen), group.gather(group.rank)


def results(group, folder):
    """Rows of the results; what happens when they are asked for again, and when a file is damaged.

    Only the main process has the nodes' files; the others are shown a folder that is not there.
    """
    recipe = read_recipe([f"--cfg={folder / 'two.yaml'}"])
    dataset = open_dataset(recipe)
    plan = make_plan(recipe, dataset.train_hash)
    store = folder / f"nodes{group.world}" if group.main else folder / "nowhere"
    loaders = [build_loader(recipe, dataset, split, CPU) for split in (dataset.train, dataset.evaluation)]
    nodes = [Node(store / name) for name in NODES]
    if group.main:
        for seed, (node, processes) in enumerate(zip(nodes, NODES.values(), strict=True)):
            finish_untrained(node, seed, processes)
    bench = Workbench(recipe, dataset, CPU, *loaders, recorder=None, stop=StopRequest(), group=group)
    with batches_of(100):
        found = Results(bench)
        rows = [found.add(generation, node) for generation, node in zip(plan, nodes, strict=True)]
        if group.main:
            (kept,) = nodes[0].folder.glob("measured-*.json")
            content = json.loads(kept.read_text())
            kept.write_text(json.dumps(content | {"train": content["train"] | {"top1_error": 12.5}}))
        again = Results(bench).add(plan[0], nodes[0])
        if group.main:
            (nodes[0].folder / "node.json").write_text("{")
            nodes[1].weights.write_bytes(b"no weights")
        failures = [ended(lambda n=n: Results(bench).add(plan[n], nodes[n])) for n in range(2)]
    return found.rows == rows, rows, again, failures, (folder / "nowhere").exists()


def finish_untrained(node, seed, processes):
    """A node as a training leaves it."""
    node.folder.mkdir(parents=True)
    save_weights(node.weights, initialise(build_model("resnet8", CLASSES, 1, "strided"), seed), {})
    training = {"images": 1000, "seconds": {"train": 2.0}, "path": {"views": "resident"}}
    node.finish({}, training | ({} if processes is None else {"processes": processes}))


def ended(call):
    """Kind and exit code of the error that a call ends with."""
    with pytest.raises(FastgenError) as caught:
        call()
    return caught.type.__name__, caught.value.exit_code


def run_processes(world, folder):
    """What each of so many processes gave, by rank."""
    context = mp.start_processes(
        one_process, (world, folder), world, join=False, daemon=True, start_method="forkserver"
    )
    until = time.monotonic() + PATIENCE_SECONDS
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < until, f"{world} processes have not ended"
    finally:
        for process in context.processes:
            process.kill()
            process.join()
    return [pickle.loads((folder / f"{world}.{rank}").read_bytes()) for rank in range(world)]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Name of a case -> number of processes -> what each of them gave."""
    folder = tmp_path_factory.mktemp("processes")
    recipe = tiny_recipe(run__dir=str(folder / "run"), run__nodes=str(folder / "store"))
    (folder / "two.yaml").write_text(yaml.safe_dump(recipe))
    # What processes are forked from finds this module only so.
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}):
        given = {world: run_processes(world, folder) for world in WORLDS}
    return lambda name: {
        world: [of_rank[name] for of_rank in of_ranks] for world, of_ranks in given.items() if name in of_ranks[0]
    }


# Of few batches some processes have none; of many the order in which they are added up decides the last bits.
@pytest.mark.parametrize("case", ["networks", "networks in many batches"])
def test_networks_and_ensemble_are_measured_with_the_same_bits_by_any_number_of_processes(told, case):
    ((expected, _),) = told(f"{case} alone")[1]
    assert all(samples == IMAGES and 0 < error < 100 and math.isfinite(nll) for samples, error, *_, nll, _ in expected)
    assert len(set(expected)) == 4
    for world, of_ranks in told(case).items():
        assert [measured for measured, _ in of_ranks] == [expected] * world


def test_each_process_keeps_the_probabilities_of_its_own_samples_alone(told):
    kept = {world: [lengths for _, lengths in of_ranks] for world, of_ranks in told("networks").items()}
    assert kept == {
        1: [[2300] * 3],
        2: [[1300] * 3, [1000] * 3],
        3: [[1000] * 3, [800] * 3, [500] * 3],
        7: [[500] * 3] * 4 + [[300] * 3] + [[0] * 3] * 2,
    }


def test_every_sample_is_counted_once(told):
    once = (2.0 ** (MARKED + FIRST_BIT) - 2.0**FIRST_BIT) / MARKED
    for world, of_ranks in told("marked").items():
        for rank, (measurement, kept, seen) in enumerate(of_ranks):
            assert (measurement.samples, measurement.top1_error, measurement.nll) == (MARKED, 100.0, once)
            assert kept == sum(map(len, seen)), (world, rank)


def test_batches_are_those_of_one_process_dealt_out_whole(told):
    ((_, _, alone),) = told("marked")[1]
    assert alone == [list(range(last, max(last - SMALL_BATCH, -1), -1)) for last in range(MARKED - 1, -1, -SMALL_BATCH)]
    for of_ranks in told("marked").values():
        turns = zip_longest(*(seen for _, _, seen in of_ranks))
        assert [batch for turn in turns for batch in turn if batch is not None] == alone


@pytest.mark.parametrize(
    ("case", "number"),
    [
        ("stopped before", signal.SIGTERM),
        ("stopped under way", signal.SIGINT),
        ("stopped differently", signal.SIGTERM),
    ],
)
def test_a_stop_at_one_process_stops_all_at_the_same_point(told, case, number):
    for world, of_ranks in told(case).items():
        # Of seven processes none has a second batch that it could leave out.
        code = 0 if (case, world) == ("stopped under way", 7) else 128 + number
        assert [code_of_rank for code_of_rank, *_ in of_ranks] == [code] * world, world
        assert all(ranks == list(range(world)) for *_, ranks in of_ranks)
        # Nobody has waited for a timeout.
        assert max(seconds for _, seconds, *_ in of_ranks) < PATIENCE_SECONDS / 4


def test_a_process_that_is_stopped_leaves_its_other_batches_out(told):
    # Rank 1 is stopped; of one process it is rank 0.
    batches = {world: [seen for _, _, seen, _ in of_ranks] for world, of_ranks in told("stopped before").items()}
    assert batches == {1: [0], 2: [3, 0], 3: [2, 0, 2], 7: [1, 0, 1, 1, 1, 1, 0]}
    batches = {world: [seen for _, _, seen, _ in of_ranks] for world, of_ranks in told("stopped under way").items()}
    assert batches == {1: [1], 2: [3, 1], 3: [2, 1, 2], 7: [1, 1, 1, 1, 1, 1, 0]}


def without_clocks(row):
    """A row but for what depends on how fast the machine is."""
    return {key: value for key, value in row.items() if "second" not in key}


def test_rows_are_the_same_everywhere_and_for_any_number_of_processes(told):
    ((_, alone, *_),) = told("results")[1]
    assert [row["processes"] for row in alone] == [3, 1]
    assert [row["samples_evaluated"] for row in alone] == [len(read_digits()[1].labels)] * 2
    assert None not in (alone[1]["ensemble_top1_error"], alone[1]["ideal_confidence_at_share"])
    for world, of_ranks in told("results").items():
        assert all(added for added, *_ in of_ranks)
        rows = [rows for _, rows, *_ in of_ranks]
        # With the clocks, which are the main process's.
        assert rows == [rows[0]] * world
        assert [without_clocks(row) for row in rows[0]] == [without_clocks(row) for row in alone]


def test_only_the_main_process_reads_and_writes_files(told):
    for world, of_ranks in told("results").items():
        for _, rows, again, _, others_made_files in of_ranks:
            assert not others_made_files
            # What was kept is taken, by those who cannot read it, too.
            assert again["train_top1_error"] == 12.5 != rows[0]["train_top1_error"]
            assert again["top1_error"] == rows[0]["top1_error"], world


def test_a_file_that_the_main_process_cannot_read_ends_all(told):
    for world, of_ranks in told("results").items():
        failures = [failures for *_, failures, _ in of_ranks]
        assert failures == [[("UserError", 2)] * 2] + [[("Told", 2)] * 2] * (world - 1)


def test_own_parts_make_the_whole():
    order = np.random.default_rng(0).permutation(2300)
    for world in (1, 2, 3, 5, 7):
        parts = [own_part(order, Group(rank, world)) for rank in range(world)]
        batches = [np.split(part, range(500, len(part), 500)) for part in parts]
        dealt = [batch for turn in zip_longest(*batches) for batch in turn if batch is not None]
        assert np.array_equal(np.concatenate(dealt), order)
        assert len(own_part(order[:0], Group(world - 1, world))) == 0


def test_rows_are_added_up_in_the_order_of_the_batches():
    """Neither by pairs nor from the end nor by several threads: the sum would depend on who computes it."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.rand(50, generator=generator, dtype=torch.float64).tolist()
    tally = Tally(2)
    for size in sizes:
        log_p = torch.tensor([[-size, 0.0]], dtype=torch.float64)
        tally.add(log_p, log_p, torch.tensor([0]))
    total = 0.0
    for size in sizes:
        total += size
    assert tally.read().nll == total / 50


def in_memory(name):
    """A loader of 13 images in memory."""
    images = np.random.default_rng(0).integers(0, 256, (13, 32, 32, 3), dtype=np.uint8)
    split = Split(images, np.arange(13) % 3, np.arange(13))
    settings = DataSettings(dataset="cifar100", backend=name, workers=2)
    make = {
        "resident": lambda: ResidentLoader(split, 0, CPU),
        "folder": lambda: FolderLoader(split, settings, CPU),
        "dali": lambda: DaliLoader(split, settings, CPU),
        "synthetic": lambda: SyntheticLoader(13, DATASETS["cifar100"], CPU),
    }
    return make[name](), evaluation_views(split.ids, ShiftCrop(32, 32, 4, flip=True))


def require_own_batches(loader, views):
    """Each process's part of the order gives its batches, pixel by pixel, and an empty one gives none."""
    whole = list(loader.batches(views, 4))
    assert [len(batch.ids) for batch in whole] == [4, 4, 4, 1]
    for world in (2, 3, 5):
        for rank in range(world):
            own = list(loader.batches(replace(views, order=own_part(views.order, Group(rank, world))), 4))
            expected = whole[rank::world]
            assert len(own) == len(expected)
            for batch, wanted in zip(own, expected, strict=True):
                assert ids_of([batch]) == ids_of([wanted])
                assert np.array_equal(pixels_of([batch]), pixels_of([wanted]))
                assert torch.equal(batch.labels, wanted.labels)


@pytest.mark.parametrize("name", ["resident", "folder", "dali", "synthetic"])
def test_loaders_of_images_in_memory_take_a_part_of_an_order(name):
    if name == "dali":
        pytest.importorskip("nvidia.dali")
    with batches_of(4):
        require_own_batches(*in_memory(name))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """13 pictures of 13 sizes, as files and as .beton."""
    made = [photograph(number, *size) for number, size in enumerate(SIZES)]
    return write_pictures(tmp_path_factory.mktemp("pictures"), made)


@pytest.mark.parametrize("name", list(PHOTO))
def test_loaders_of_photographs_take_a_part_of_an_order(name, pictures):
    if name == "dali":
        pytest.importorskip("nvidia.dali")
    views = evaluation_views(np.arange(13), ResizedCrop(), sizes=pictures.manifest.sizes, resolution_px=40)
    with batches_of(4):
        require_own_batches(photo_loader(name, pictures), views)
