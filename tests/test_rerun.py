"""The cost of a rerun: the very views of a training, all ways in turns, and a floor that can be missed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks import rerun
from benchmarks.common import Timings, read_rows
from benchmarks.feed_steps import supply_of
from benchmarks.rerun import FILLING, LIVE, STORE, TABLE, Measured
from benchmarks.scaling_steps import case_of, read_setup, teacher_of
from fastgen.distributed import ALONE
from fastgen.errors import command
from fastgen.label_store import LabelStore
from fastgen.lessons import LookAhead, StoreLoader
from fastgen.views import WHOLE

CPU = torch.device("cpu")
ALL = [LIVE, FILLING, STORE, TABLE]


def words_of(recipe, *more):
    return ["--cfg", str(recipe), "--run.device=cpu", "--data.train_limit=200", "--train.batch_size=40", *more]


@pytest.mark.parametrize(
    ("more", "ways"),
    [
        ([], ALL),
        (["--train.engine=graph", "--train.graph_steps=2", "--teacher.look_ahead_batches=2"], ALL),
        (["--data.rotation_degrees=5"], ALL[:3]),
        (["--data.backend=folder", "--data.workers=1"], ALL),
    ],
    ids=["plain", "programs", "jitter", "folder"],
)  # fmt: skip
def test_a_recipe_is_measured_all_ways(write_recipe, tmp_path, capsys, more, ways):
    words = [*words_of(write_recipe(), *more), "--rounds=2", "--steps=2", f"--results={tmp_path}"]
    assert command(rerun.main, words) == 0
    rows = read_rows(tmp_path / "rerun.csv")
    assert [row["labels"] for row in rows] == ways
    assert all(float(row["images_per_second"]) > 0 for row in rows)
    assert rows[0]["over_live_median"] == "1.0"
    assert rows[0]["kept"] == "all 10 classes in fp16"
    assert 0 <= float(rows[0]["divergence_nats"]) < 1e-3
    out = capsys.readouterr().out
    # Programs of two groups of 80 images leave the rest of an epoch out.
    images = 160 if "--train.engine=graph" in more else 200
    assert f"an epoch of {images} images, all 10 classes in fp16" in out
    # Rows of 10 fp16 numbers and an int32, and a header.
    assert images * 24 <= int(rows[0]["store_bytes"]) <= images * 24 + 2000


def test_the_store_is_of_the_very_views_that_are_timed(write_recipe, tmp_path):
    setup = read_setup(words_of(write_recipe()), "student", random=False)
    case = case_of(setup, "one", ALONE, CPU)
    images = supply_of(case)
    teacher = teacher_of(case, images, WHOLE)
    store, _ = rerun.fill(case, images, LookAhead(images.loader, teacher, images.prepare, 1, 10), tmp_path)
    assert store.missing([case.views.name]) == 0
    read = StoreLoader(images.loader, LabelStore(tmp_path, store.kind, writes=False), None, images.prepare, CPU)
    for raw, found in zip(images.loader.batches(case.views, 40), read.batches(case.views, 40), strict=True):
        live = store.kind.truncation(teacher(images.prepare(raw.images_NCHW, raw.jitter)))
        assert torch.equal(found.teacher_logits_BC, live["log_p"])


@pytest.mark.parametrize(("store", "passed"), [(0.8, True), (0.84, False)])
def test_the_floor_can_be_missed(store, passed):
    case = SimpleNamespace(device=CPU, recipe=SimpleNamespace(model=SimpleNamespace(name="resnet20")), batch_size=128)
    timings = Timings({LIVE: (1.0, 1.0, 1.0), STORE: (store,) * 3})
    (floor,) = rerun.floors(Measured(case, timings, 0, 0.0, 0.0))
    assert floor.passed == passed
    other = SimpleNamespace(device=CPU, recipe=SimpleNamespace(model=SimpleNamespace(name="resnet18")), batch_size=128)
    assert rerun.floors(Measured(other, timings, 0, 0.0, 0.0)) == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--teacher.labels=store"], "nothing is trained here that could fill one"),
        (["--gen.generations=0"], "--role=student: the recipe has none"),
        (["--rounds=0"], "is below 1"),
    ],
)
def test_what_cannot_be_measured_is_told(write_recipe, tmp_path, capsys, words, told):
    assert command(rerun.main, [*words_of(write_recipe()), *words, f"--results={tmp_path}"]) == 2
    assert told in capsys.readouterr().err


def test_help(capsys):
    assert command(rerun.main, ["--help"]) == 0
    assert "--rounds" in capsys.readouterr().out
