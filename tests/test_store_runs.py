"""Trainings from a label store: filled by the first student, read by the next, with the very same weights."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from fastgen import label_parts, label_store, supply, teaching, train
from fastgen.errors import MachineError, Stopped, UserError
from fastgen.locks import locked

RECIPE = (
    "{data: {dataset: digits, train_limit: 200}, model: {name: resnet8}, train: {epochs: 2, batch_size: 40},"
    " gen: {generations: 1}, run: {device: cpu, eval_every_epochs: 0}}"
)
STORE = "--teacher.labels=store"
CUTS = (["--teacher.store_classes=3"], [], ["--teacher.store_dtype=fp32"])


def run(folder, name, *more):
    """Trains; all runs of a folder share their nodes, and so their stores."""
    (folder / "tiny.yaml").write_text(RECIPE)
    train.main(
        ["--cfg", str(folder / "tiny.yaml"), f"--run.dir={folder / name}", f"--run.nodes={folder / 'nodes'}", *more]
    )
    return folder / name


def weights(run):
    return load_file(run / "generation_1" / "model.safetensors")


def training_of(run):
    return json.loads((run / "generation_1" / "node.json").read_text())["training"]


def forget(run):
    """Removes the student, and leaves its teacher's labels."""
    shutil.rmtree((run / "generation_1").resolve())
    shutil.rmtree(run)


def require_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.fixture
def no_teacher(monkeypatch):
    """Function that lets any further teacher fail the test."""
    return lambda: monkeypatch.setattr(teaching, "make_teacher", lambda *words, **options: 1 / 0)


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    return run(tmp_path_factory.mktemp("live"), "live")


@pytest.mark.parametrize("cut", CUTS, ids=["three", "dense", "exact"])
def test_a_rerun_from_the_store_is_the_first_run_bit_for_bit_and_runs_no_teacher(tmp_path, no_teacher, capsys, cut):
    first = run(tmp_path, "first", STORE, *cut)
    expected, record = weights(first), training_of(first)
    assert record["path"]["teacher"].endswith(", filled by folded, 1 batch at once")
    assert "keeps its teacher's word in" in capsys.readouterr().out
    forget(first)
    no_teacher()
    again = run(tmp_path, "again", STORE, *cut)
    require_equal(weights(again), expected)
    found = training_of(again)
    assert found["path"]["teacher"].endswith(", all of it read")
    assert found["label_store"] == record["label_store"]
    assert found["history"] == record["history"]
    assert "no teacher runs" in capsys.readouterr().out


def test_readers_of_a_whole_store_hold_nothing(tmp_path, capsys):
    first = run(tmp_path, "first", STORE)
    forget(first)
    (place,) = (tmp_path / "nodes" / "labels").glob("*/seed_0_generation_1")
    with locked(place, "this label store"):
        run(tmp_path, "again", STORE)
    out = capsys.readouterr().out
    assert "no teacher runs" in out
    assert "in use" not in out


def test_a_run_whose_store_was_taken_over_goes_on_and_keeps_nothing_more(tmp_path, monkeypatch, capsys):
    """It was suspended for so long that another one writes now."""
    whole = run(tmp_path, "whole", STORE)
    expected = weights(whole)
    forget(whole)
    shutil.rmtree(tmp_path / "nodes" / "labels")
    lost = []
    right = supply.Supply.keep

    def keep(self):
        if self.store is not None and not lost:
            lost.append(self.store.folder / "seed_0_generation_1" / "lock")
            right(self)
            lost[0].write_text("process 7 on another host\ntoken 0123456789abcdef\nsign 0000000000")
            return
        right(self)

    monkeypatch.setattr(supply.Supply, "keep", keep)
    other = run(tmp_path, "other", STORE)
    require_equal(weights(other), expected)
    parts = [part.parent.name for part in (tmp_path / "nodes").rglob(f"*{label_parts.SUFFIX}")]
    assert parts == ["epoch_0000_8x8"]
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("another run adds to it now: no more of this one is kept") == 1


def test_all_classes_in_fp32_are_the_live_run_and_its_very_node(live, tmp_path):
    exact = run(tmp_path, "exact", STORE, "--teacher.store_dtype=fp32")
    require_equal(weights(exact), weights(live))
    assert (exact / "generation_1").resolve().name == (live / "generation_1").resolve().name
    assert training_of(exact)["label_store"]["divergence_nats"] < 1e-12


def test_truncated_teachers_make_other_nodes_and_near_weights(live, tmp_path):
    names, far = {(live / "generation_1").resolve().name}, []
    for number, cut in enumerate((["--teacher.store_classes=1"], *CUTS[:2])):
        other = run(tmp_path, str(number), STORE, *cut)
        names.add((other / "generation_1").resolve().name)
        far.append(max(float((tensor - weights(live)[name]).abs().max()) for name, tensor in weights(other).items()))
    assert len(names) == 4
    # Ten steps of a teacher that is off by 2^-11 of its logits; one that knows a single class is far off.
    assert far[2] < 0.02 < far[0]
    assert far[2] > 0


@pytest.mark.parametrize(
    "change",
    ["gen.teacher_weight=0.3", "gen.temperature=4.0", "train.lr=0.05", "model.name=resnet20", "train.weight_decay=0",
     "run.init_seed=7", "train.batch_size=50"],
)  # fmt: skip
def test_any_later_student_of_the_same_views_takes_them(tmp_path, no_teacher, change):
    first = run(tmp_path, "first", STORE, "--data.seed=0")
    # The patriarch of another lr is another teacher: named, it is the same.
    teacher = (first / "generation_0").resolve() / "model.safetensors"
    words = [STORE, "--data.seed=0", "--gen.only=1", f"--gen.teacher={teacher.parent.name}"]
    no_teacher()
    other = run(tmp_path, "other", *words, f"--{change}")
    assert training_of(other)["path"]["teacher"].endswith("all of it read")
    expected = weights(first)
    assert any(
        tensor.shape != expected[name].shape or not torch.equal(tensor, expected[name])
        for name, tensor in weights(other).items()
        if name in expected
    )


@pytest.mark.parametrize("change", ["data.seed=5", "data.train_limit=150", "data.augment=none", "train.precision=bf16"])
def test_other_views_or_pixels_are_asked_for_anew(tmp_path, capsys, change):
    first = run(tmp_path, "first", STORE, "--data.seed=0")
    teacher = (first / "generation_0").resolve().name
    words = [STORE, "--data.seed=0", "--gen.only=1", f"--gen.teacher={teacher}"]
    key = change.partition("=")[0]
    words = [word for word in words if not word.startswith(f"--{key}=")]
    other = run(tmp_path, "other", *words, f"--{change}")
    assert "filled by folded" in training_of(other)["path"]["teacher"]
    # A data seed is no part of a store's name.
    differs = {
        "data.train_limit": "images = ",
        "data.augment": "crop.",
        "train.precision": "precision = fp32, not bf16",
    }
    told = " ".join(capsys.readouterr().out.split())
    assert ("is of the same teacher, but has" in told) == (key in differs)
    assert differs.get(key, "") in told


def test_a_dry_run_tells_how_large_stores_will_be(tmp_path, capsys):
    run(tmp_path, "dry", STORE, "--run.dry=true", "--gen.generations=3", "--train.epochs=100")
    # 200 images x 100 epochs x (10 classes x 2 bytes + 4)
    assert "label stores: 3 of 0.48 MB each, all 10 classes in fp16" in capsys.readouterr().out


def test_students_of_a_live_teacher_are_none_of_a_store(tmp_path, live):
    with pytest.raises(UserError, match="students of a store are other generations than those of a live teacher"):
        run(live.parent, "other", STORE, "--gen.generations=2", "--gen.only=2")


def test_longer_trainings_ask_for_the_epochs_that_are_not_there(tmp_path):
    first = run(tmp_path, "first", STORE)
    teacher = (first / "generation_0").resolve().name
    other = run(tmp_path, "other", STORE, "--gen.only=1", f"--gen.teacher={teacher}", "--train.epochs=3")
    assert "filled by folded" in training_of(other)["path"]["teacher"]
    parts = sorted(part.parent.name for part in (tmp_path / "nodes").rglob(f"*{label_parts.SUFFIX}"))
    assert parts == ["epoch_0000_8x8", "epoch_0001_8x8", "epoch_0002_8x8"]


@pytest.mark.parametrize("step", [3, 5, 7])
def test_a_stop_keeps_what_was_asked_and_the_run_goes_on_to_the_same_weights(tmp_path, monkeypatch, step):
    for name in ("whole", "torn"):
        (tmp_path / name).mkdir()
    whole = run(tmp_path / "whole", "run", STORE)
    asked, right = [], teaching.make_teacher

    def counting(*words, **options):
        teacher = right(*words, **options)

        def network(images_NCHW):
            asked.append(len(images_NCHW))
            # One batch more than steps: the first one is the rehearsal's.
            if sum(asked) == 40 * (step + 1):
                signal.raise_signal(signal.SIGTERM)
            return teacher(images_NCHW)

        return replace(teacher, network=network)

    monkeypatch.setattr(teaching, "make_teacher", counting)
    with pytest.raises(Stopped):
        run(tmp_path / "torn", "run", STORE)
    asked[:] = [10**6]
    found = run(tmp_path / "torn", "run", STORE)
    require_equal(weights(found), weights(whole))
    # 10 batches in all, and one to rehearse.
    assert sum(asked[1:]) == 40 * (10 - step + 1)


def test_a_compiled_step_takes_truncated_labels(tmp_path):
    words = [STORE, "--teacher.store_classes=3"]
    first = run(tmp_path, "first", *words)
    teacher = (first / "generation_0").resolve().name
    more = ["--gen.only=1", f"--gen.teacher={teacher}", "--train.engine=compile"]
    for name, how in (("filled", "all of it read"), ("emptied", "filled by folded")):
        if name == "emptied":
            shutil.rmtree(tmp_path / "nodes" / "labels")
            forget(tmp_path / "filled")
        other = run(tmp_path, name, *words, *more)
        assert how in training_of(other)["path"]["teacher"]
        ours, theirs = weights(other), weights(first)
        # Ten steps from rounding errors of 2^-24.
        assert all(
            torch.allclose(ours[name], theirs[name], atol=1e-3) for name in theirs if ours[name].is_floating_point()
        )


def test_programs_read_the_store_too(tmp_path, no_teacher):
    first = run(tmp_path, "first", STORE, "--teacher.store_classes=3")
    expected = weights(first)
    teacher = (first / "generation_0").resolve().name
    forget(first)
    no_teacher()
    words = ["--train.engine=graph", "--train.graph_steps=2", "--gen.only=1", f"--gen.teacher={teacher}"]
    other = run(tmp_path, "other", STORE, "--teacher.store_classes=3", *words)
    assert training_of(other)["path"]["step"] == "programs of 2 steps, not captured: no GPU"
    require_equal(weights(other), expected)


def test_programs_fill_the_store_too(tmp_path):
    eager = run(tmp_path, "eager", STORE)
    teacher = (eager / "generation_0").resolve().name
    expected = weights(eager)
    shutil.rmtree(tmp_path / "nodes" / "labels")
    words = ["--train.engine=graph", "--gen.only=1", f"--gen.teacher={teacher}"]
    other = run(tmp_path, "other", STORE, *words)
    assert training_of(other)["path"]["step"] == "programs of 1 step, not captured: no GPU"
    require_equal(weights(other), expected)


def test_jittered_views_are_kept_as_well(tmp_path, no_teacher):
    words = [STORE, "--data.rotation_degrees=10", "--data.pixel_shift=5"]
    first = run(tmp_path, "first", *words)
    expected = weights(first)
    forget(first)
    no_teacher()
    require_equal(weights(run(tmp_path, "again", *words)), expected)


def test_two_processes_fill_it_and_one_reads_it(tmp_path, run_command):
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    words = ["--cfg", tmp_path / "tiny.yaml", f"--run.nodes={tmp_path / 'nodes'}", STORE, "--teacher.store_classes=3"]
    done = run_command([*words, f"--run.dir={tmp_path / 'two'}", "--dist.processes=2"], folder=tmp_path)
    assert done.code == 0, done.err
    parts = list((tmp_path / "nodes").rglob(f"*{label_parts.SUFFIX}"))
    assert len(parts) == 4
    forget(tmp_path / "two")
    done = run_command([*words, f"--run.dir={tmp_path / 'one'}"], folder=tmp_path)
    assert done.code == 0, done.err
    assert "no teacher runs" in done.out


def test_a_store_that_another_run_fills_is_not_written_to(tmp_path, capsys):
    first = run(tmp_path, "first", STORE)
    expected, teacher = weights(first), (first / "generation_0").resolve().name
    (place,) = (tmp_path / "nodes" / "labels").glob("*/seed_0_generation_1")
    forget(first)
    for epoch in place.iterdir():
        if epoch.is_dir():
            shutil.rmtree(epoch)
    with locked(place, "this label store"):
        other = run(tmp_path, "other", STORE, "--gen.only=1", f"--gen.teacher={teacher}")
    assert (
        f"in use by process {os.getpid()} on {os.uname().nodename}: what is asked of the teacher here is not kept"
        in (capsys.readouterr().out.replace("\n", " "))
    )
    require_equal(weights(other), expected)
    assert not list((tmp_path / "nodes").rglob(f"*{label_parts.SUFFIX}"))


def test_a_damaged_part_is_one_line(tmp_path):
    first = run(tmp_path, "first", STORE)
    forget(first)
    part = sorted((tmp_path / "nodes").rglob(f"*{label_parts.SUFFIX}"))[0]
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    with pytest.raises(UserError, match=f"{part}: is damaged .*: delete it"):
        run(tmp_path, "again", STORE)
    part.unlink()
    again = run(tmp_path, "again", STORE)
    assert "filled by folded" in training_of(again)["path"]["teacher"]


def test_no_room_is_told_before(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(label_store.shutil, "disk_usage", lambda folder: usage._replace(free=100))
    with pytest.raises(MachineError, match="the label store needs"):
        run(tmp_path, "run", STORE)


def test_more_classes_than_int16_numbers_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(teaching, "MOST_STORED_CLASSES", 9)
    with pytest.raises(UserError, match=r"numbers classes up to 9, the data set has 10: set teacher\.labels=live"):
        run(tmp_path, "run", STORE, "--teacher.store_classes=3")
    assert run(tmp_path, "dense", STORE)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--teacher.store_classes=3"], "no say without teacher.labels=store"),
        (["--teacher.store_dtype=fp32"], "no say without teacher.labels=store"),
        ([STORE, "--teacher.store_classes=0"], "give 1 to 32768"),
        ([STORE, "--teacher.store_classes=40000"], "give 1 to 32768"),
        ([STORE, "--data.backend=synthetic"], "teacher.labels=live"),
    ],
)
def test_what_makes_no_sense_is_one_line(tmp_path, words, told):
    with pytest.raises(UserError, match=told.replace(".", r"\.")):
        run(tmp_path, "run", *words)
