"""Need over give: the recipe's own loader, steps that have a batch to themselves, and arithmetic that can say no."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pictures import write_folder

from benchmarks import feed, feed_steps
from benchmarks.common import Timings, machine_facts, read_rows
from benchmarks.feed import Measured, Turns
from data_prep import beton, manifest
from fastgen.data.batch import Batch, usable_cores
from fastgen.data.resident import ResidentLoader
from fastgen.errors import command
from fastgen.views import EpochViews

CPU = torch.device("cpu")
SHORT = ("--rounds=2",)

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def words_of(recipe, *more):
    return ["--cfg", str(recipe), "--run.device=cpu", *more]


def feed_on(recipe, folder, *more):
    """Rows of the command."""
    assert command(feed.main, [*words_of(recipe, *more), f"--results={folder}"]) == 0
    return read_rows(folder / "feed.csv")


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--train.engine=graph", "--train.graph_steps=2"],
        ["--train.engine=graph", "--train.graph_steps=2", "--teacher.labels=table"],
        ["--teacher.labels=store", "--teacher.store_classes=3"],
        ["--teacher.engine=fused", "--teacher.look_ahead_batches=2", "--train.precision=bf16"],
        ["--data.backend=folder", "--data.workers=1", "--data.rotation_degrees=5", "--train.accumulate_steps=2"],
        ["--gen.patriarch=soteacher", "--gen.confidence=1.0", "--train.engine=graph", "--train.graph_steps=2"],
        ["--data.backend=dali", "--data.workers=1", "--train.engine=graph"],
    ],
    ids=" ".join,
)
def test_a_recipe_of_digits_is_measured(more, write_recipe, tmp_path, capsys):
    if "--data.backend=dali" in more and importlib.util.find_spec("nvidia.dali") is None:
        pytest.skip("nvidia.dali is not installed")
    rows = feed_on(write_recipe(), tmp_path, *SHORT, "--batches=3", *more)
    assert [row["role"] for row in rows] == ["patriarch", "student"]
    assert list(rows[0])[: len(machine_facts(CPU))] == list(machine_facts(CPU))
    backend = next((word.partition("=")[2] for word in more if "backend" in word), "resident")
    for row in rows:
        assert (row["recipe"], row["dataset"], row["backend"]) == ("tiny.yaml", "digits", backend)
        assert row["workers"] == ("" if backend == "resident" else "1")
        assert (row["loader_images_per_round"], row["step_images_per_round"]) == ("384", "256")
        assert (row["rounds"], row["image_px"], row["train_images"]) == ("2", "8", "1442")
        give, need, ratio = (
            float(row[f"{name}_median"])
            for name in ("loader_images_per_second", "step_images_per_second", "need_over_give")
        )
        # Of two rounds: the ratio of medians is near the median of ratios.
        assert give > 0 < need
        assert float(row["need_over_give_q25"]) <= ratio <= float(row["need_over_give_q75"])
        cpu_seconds = float(row["loader_cpu_seconds_per_1000_images_median"])
        assert float(row["cores_needed"]) == pytest.approx(cpu_seconds / 1e3 * need, abs=0.01 + 1e-4 * need)
    assert rows[0]["teacher"] == ""
    assert rows[1]["teacher"]
    out = capsys.readouterr().out
    assert "fewer than 3,000 images a turn" in out
    assert out.splitlines()[-1] == "what a GPU's steps need: not measured (no GPU)"


PHOTOS = """
data: {dataset: imagenet, resolution_px: 64, start_resolution_px: 32, resolution_ramp: [0.5, 0.5], rotation_degrees: 10}
model: {name: resnet18}
train: {epochs: 2, batch_size: 8, lr: 0.01}
gen: {generations: 1, k: 3}
"""


@pytest.mark.parametrize("backend", ["ffcv", "folder"])
def test_photographs_are_measured_at_the_smallest_side_of_the_run(backend, tmp_path):
    for part in ("train", "val"):
        source = write_folder(tmp_path / part, classes=3, per_class=7)
        if backend == "ffcv":
            beton.main([f"--source={source}", f"--out={tmp_path / part}.beton", "--mode=raw", "--workers=1"])
        else:
            manifest.main([f"--source={source}", f"--out={tmp_path / part}.manifest", "--workers=1"])
    recipe = tmp_path / "photos.yaml"
    recipe.write_text(PHOTOS)
    more = [f"--data.root={tmp_path}", f"--data.backend={backend}", "--data.workers=2"]
    # Five batches of 8 are more than the 21 photographs: several epochs make a turn.
    rows = feed_on(recipe, tmp_path, "--rounds=1", "--batches=5", *more)
    assert [(row["role"], row["image_px"], row["loader_images_per_round"]) for row in rows] == [
        ("patriarch", "32", "40"), ("student", "32", "40"),
    ]  # fmt: skip
    assert {row["overrides"] for row in rows} == {f"run.device=cpu data.backend={backend} data.workers=2"}


def test_a_recipe_without_students_says_so(write_recipe, tmp_path, capsys):
    rows = feed_on(write_recipe(gen__generations=0), tmp_path, *SHORT, "--batches=1")
    assert [row["role"] for row in rows] == ["patriarch"]
    assert "student: not measured (the recipe has none)" in capsys.readouterr().out


def losses(case, role, steps=4):
    """Mean losses of the first steps of a role."""
    rig = feed_steps.make_rig(case, feed_steps.supply_of(case), case.generations[role], steps)
    found = []
    while len(found) < steps:
        tally = next(rig.tallies)
        sums = torch.cat([values.reshape(-1).double() for values in tally.loss_sums])
        found += (sums / torch.tensor(tally.images)).tolist()
    return found


def test_steps_see_one_batch_and_learn_nothing(write_recipe):
    recipe = write_recipe()
    plain = feed.read_case(words_of(recipe))
    expected = {role: losses(plain, role) for role in plain.generations}
    for role, found in expected.items():
        assert found == pytest.approx([found[0]] * 4, rel=1e-6), role
    assert expected["student"][0] != pytest.approx(expected["patriarch"][0], rel=1e-3)
    ways = (
        ["--train.engine=graph", "--train.graph_steps=2"],
        ["--teacher.labels=table"],
        ["--teacher.labels=table", "--train.engine=graph", "--train.graph_steps=4"],
        ["--teacher.look_ahead_batches=2"],
        ["--teacher.engine=fused", "--train.engine=graph", "--teacher.look_ahead_batches=2", "--train.graph_steps=4"],
        ["--data.backend=folder", "--data.workers=1"],
    )
    for more in ways:
        case = feed.read_case(words_of(recipe, *more))
        for role, values in expected.items():
            assert losses(case, role) == pytest.approx(values, rel=1e-4), (role, more)


@without_gpu
@pytest.mark.parametrize("more", [[], ["--train.engine=graph", "--train.graph_steps=2"], ["--teacher.labels=table"]])
def test_steps_by_kernels_see_the_same_batch(more, write_recipe):
    # By Triton's interpreter, whose time is not looked at.
    recipe, small = write_recipe(), ["--train.batch_size=8"]
    plain = feed.read_case(words_of(recipe, *small))
    case = feed.read_case(words_of(recipe, *small, "--train.kernels=triton", *more))
    for role in plain.generations:
        assert losses(case, role) == pytest.approx(losses(plain, role), rel=1e-4), role


def test_a_held_loader_gives_what_is_asked_for():
    numbers = torch.arange(6)
    held = feed_steps.Held(Batch(numbers, numbers, numbers), 20)
    views = EpochViews(np.arange(10), np.zeros((10, 5), np.int32), 8, 8)
    assert len(held) == 20
    assert [batch.labels.tolist() for batch in held.batches(views, 4)] == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1]]
    assert len(held.execute(held.columns(views, np.arange(5))).labels) == 5
    assert len(held.execute(held.blank(6, jitter=False)).labels) == 6


def test_the_dropped_round_costs_nothing(write_recipe, monkeypatch):
    # Before and after each turn; the first round is dropped.
    clock = iter([0.0, 100.0, 100.0, 101.0, 110.0, 112.0])
    monkeypatch.setattr(feed, "used_cpu_seconds", lambda: next(clock))
    case = feed.read_case(words_of(write_recipe(gen__generations=0)))
    measured = feed.measure(case, Turns(1, 1), rounds=2)
    assert measured.cpu_seconds == (1.0, 2.0)
    assert measured.timings.rounds == 2


@without_gpu
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_raw_batch_is_dressed_as_the_held_one(kernels, write_recipe, monkeypatch):
    plants = []
    make_engine = feed_steps.make_engine
    monkeypatch.setattr(feed_steps, "make_engine", lambda plant: plants.append(plant) or make_engine(plant))
    words = ["--train.batch_size=8", "--teacher.labels=table", f"--train.kernels={kernels}"]
    case = feed.read_case(words_of(write_recipe(), *words))
    feed_steps.make_rig(case, feed_steps.supply_of(case), case.generations["student"], 2)
    (plant,) = plants
    dressed = plant.supply.dress(plant.blank((8, 8, 8)))
    (held,) = plant.supply.loader.batches(case.part(8), 8)
    for name in ("images_NCHW", "labels", "teacher_logits_BC"):
        ours, theirs = getattr(dressed, name), getattr(held, name)
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), name


def test_steps_have_the_device_to_themselves(write_recipe, monkeypatch):
    calls = []
    execute = ResidentLoader.execute
    monkeypatch.setattr(ResidentLoader, "execute", lambda self, columns: calls.append(1) or execute(self, columns))
    for engine in ("eager", "graph"):
        case = feed.read_case(words_of(write_recipe(), f"--train.engine={engine}"))
        rig = feed_steps.make_rig(case, feed_steps.supply_of(case), case.generations["student"], 8)
        assert calls
        calls.clear()
        for _ in range(8):
            rig.step()
        assert (calls, rig.steps) == ([], 8)


class FakeLoader:
    """Notes the batches that it gives; `lost` images of each are missing."""

    def __init__(self, lost=0):
        self.seen, self._lost = [], lost

    def batches(self, views, batch_size):
        for begin in range(0, len(views.order), batch_size):
            self.seen.append(views.order[begin : begin + batch_size].tolist())
            labels = torch.zeros(len(self.seen[-1]) - self._lost, dtype=torch.int64)
            yield Batch(torch.zeros(1), labels, labels)


@pytest.mark.parametrize(("batches", "sizes"), [(1, [128]), (11, [128] * 11), (25, [128] * 25)])
def test_a_turn_is_of_full_batches_the_same_each_time(batches, sizes, write_recipe):
    case, loader, cpu_seconds = feed.read_case(words_of(write_recipe())), FakeLoader(), []
    turn = feed.loader_turn(case, loader, batches, cpu_seconds)
    turn()
    first = loader.seen[:]
    turn()
    assert [len(batch) for batch in first] == sizes
    assert loader.seen == 2 * first
    # 11 full batches in an epoch, no sample twice in it.
    assert len({sample for batch in first[:11] for sample in batch}) == 128 * min(batches, 11)
    assert len(cpu_seconds) == 2
    assert min(cpu_seconds) >= 0


def test_a_loader_that_gives_less_is_no_measurement(write_recipe):
    turn = feed.loader_turn(feed.read_case(words_of(write_recipe())), FakeLoader(lost=1), 3, [])
    with pytest.raises(ValueError, match="gave 381 images, 384 were asked for"):
        turn()


def doctored(need_seconds, give_seconds, cpu_seconds=()):
    """A turn of the loader is 100 images, one of the steps 50."""
    recipe = SimpleNamespace(data=SimpleNamespace(dataset="digits", backend="folder"), model=SimpleNamespace(name="r"))
    case = SimpleNamespace(batch_size=10, device=CPU, workers=3, recipe=recipe, side_px=(8, 8))
    timings = Timings({"loader": tuple(give_seconds), "patriarch": tuple(need_seconds)})
    return Measured(case, Turns(10, 5), timings, tuple(cpu_seconds))


@pytest.mark.parametrize(
    ("need_seconds", "give_seconds", "ratio", "verdict"),
    [
        # 50 images/s are needed of 100.
        ((1.0, 2.0, 4.0), (1.0, 2.0, 4.0), 0.5, "the loader keeps up"),
        ((0.51,), (1.0,), 50 / 51, "the loader keeps up"),
        ((0.5,), (1.0,), 1.0, "steps would wait for 0% of the time"),
        ((0.25, 0.25, 0.25), (1.0, 1.0, 1.0), 2.0, "steps would wait for 50% of the time"),
        # The median of the rounds' ratios, 0.5, 2 and 4.
        ((1.0, 0.25, 0.5), (1.0, 1.0, 4.0), 2.0, "THE LOADER DOES NOT KEEP UP"),
    ],
)
def test_need_over_give(need_seconds, give_seconds, ratio, verdict, capsys):
    measured = doctored(need_seconds, give_seconds, [0.2] * len(need_seconds))
    assert measured.need_over_give("patriarch").median == pytest.approx(ratio)
    feed.report(measured)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("patriarch: "))
    assert verdict in line
    assert ("DOES NOT" in line) == (ratio >= 1)


def test_cores_are_what_the_steps_would_cost_the_loader():
    # 0.2 s for 100 images, and 200 images/s are needed.
    measured = doctored((0.25,), (1.0,), (0.2,))
    assert measured.cpu_seconds_per_1000_images.median == pytest.approx(2.0)
    assert measured.cores_needed("patriarch") == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("more", "batches", "steps"),
    [
        ([], 24, 2),
        # An epoch, where it is more than 3,000 images; in files 3,000 are enough.
        (["--train.batch_size=4000"], 3, 2),
        (["--data.backend=folder", "--train.batch_size=100"], 30, 2),
        (["--train.engine=graph"], 24, 8),
        (["--train.engine=graph", "--data.backend=folder"], 24, 2),
        (["--teacher.look_ahead_batches=3"], 24, 3),
    ],
    ids=str,
)
@without_gpu
def test_turns_that_are_not_given_are_chosen(more, batches, steps, write_recipe):
    case = feed.read_case(words_of(write_recipe(), *more))
    assert feed.turns_of(case, None) == Turns(batches, steps)
    assert feed.turns_of(case, 5) == Turns(5, steps)


def test_workers_are_the_recipes_or_one_a_core(write_recipe):
    recipe = write_recipe()
    assert feed.read_case(words_of(recipe)).workers is None
    assert feed.read_case(words_of(recipe, "--data.backend=folder")).workers == usable_cores()
    assert feed.read_case(words_of(recipe, "--data.backend=folder", "--data.workers=7")).workers == 7


def test_a_held_batch_is_the_loaders_own(write_recipe):
    case = feed.read_case(words_of(write_recipe(), "--train.engine=graph", "--train.graph_steps=3"))
    loader = feed_steps.supply_of(case).loader
    held = feed_steps.held_batch(case, loader)
    assert held.images_NCHW.is_contiguous(memory_format=torch.channels_last)
    assert len(held.labels) == 3 * 128
    positions = case.views.order[:128]
    for part in range(3):
        assert np.array_equal(held.ids[part * 128 : (part + 1) * 128], case.dataset.train.ids[positions])
        (batch,) = loader.batches(case.part(128), 128)
        assert torch.equal(held.images_NCHW[part * 128 : (part + 1) * 128], batch.images_NCHW)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--data.backend=synthetic"], "loads nothing: name resident"),
        (["--run.dry=true"], "have no say here"),
        (["--gen.only=0"], "have no say here"),
        (["--batches=0"], "'0' is below 1"),
        (["--batches=2", "--batches=3"], "--batches is given twice"),
        (["--data.worker=3"], "did you mean 'data.workers'?"),
        (["--data.dataset=imagenet", "--data.backend=folder", "--data.root=nowhere"], "nowhere"),
    ],
)
def test_wrong_words_are_one_line_and_time_nothing(more, told, write_recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(feed, "measure", lambda *_, **__: pytest.fail("something was timed"))
    assert command(feed.main, [*words_of(write_recipe()), *more, f"--results={tmp_path / 'rows'}"]) == 2
    captured = capsys.readouterr()
    assert told in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out
    assert not (tmp_path / "rows").exists()
