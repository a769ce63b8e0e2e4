"""The label table and the look ahead: the live teacher's logits, charged, kept, refused where they are another's."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from taught import CLASSES, COUNT, CPU, CROP, MEAN, STD, epoch_of, tiny_prepare, tiny_split, tiny_teacher

from fastgen import labelling, teaching, train
from fastgen.crops import JitterPolicy, ShiftCrop
from fastgen.data.resident import ResidentLoader
from fastgen.errors import MachineError, Stopped, UserError
from fastgen.labelling import build_table, claim_cost
from fastgen.labels import LabelTable, TableKind, read_table
from fastgen.lessons import LookAhead, TableLoader
from fastgen.stop import StopRequest
from fastgen.views import Share


def kind_of(**changes):
    kind = TableKind(
        teacher="0123456789abcdef", images="images", count=COUNT, crop=CROP, mean=MEAN, std=STD, classes=CLASSES,
        precision="fp32", engine="folded",
    )  # fmt: skip
    return replace(kind, **changes)


@pytest.fixture(scope="module")
def split():
    return tiny_split()


@pytest.fixture(scope="module")
def loader(split):
    return ResidentLoader(split, CROP.pad_px, CPU)


def prepare_of(kind, crop=CROP):
    return tiny_prepare(kind.precision, crop)


def teacher_of(kind, engine="folded"):
    return tiny_teacher(kind.precision, engine)


def build(folder, kind, loader, teacher=None, stop=None, passed=lambda done: None, say=lambda text: None):
    build_table(folder, kind, loader, prepare_of(kind), teacher or teacher_of(kind), stop or StopRequest(), passed, say)
    return read_table(folder, kind, CPU)


@pytest.mark.parametrize("crop", [CROP, replace(CROP, flip=False), replace(CROP, pad_px=0), replace(CROP, pad_px=4)])
def test_every_view_has_a_number_and_every_number_a_view(crop):
    kind = kind_of(crop=crop)
    assert kind.views == (2 * crop.pad_px + 1) ** 2 * (2 if crop.flip else 1)
    seen = set()
    for number in range(kind.views):
        views = kind.views_of(number)
        assert (kind.numbers(views.table) == number).all()
        assert (views.order == np.arange(COUNT)).all()
        seen.add(tuple(views.table[0]))
    corners = range(-crop.pad_px, crop.pad_px + 1)
    size = (crop.height_px, crop.width_px)
    assert seen == {
        (top, left, *size, flip) for top, left, flip in itertools.product(corners, corners, [0, 1][: 1 + crop.flip])
    }


def test_cifar_has_162_views_of_each_image_and_its_table_1_62_gigabytes():
    kind = kind_of(crop=ShiftCrop(32, 32, 4, True), count=50_000, classes=100, precision="fp16")
    assert kind.shape == (162, 50_000, 100)
    assert kind.block_bytes * kind.views == 1_620_000_000


def test_views_beyond_the_crops_are_refused():
    wide = replace(CROP, pad_px=2)
    with pytest.raises(ValueError, match="outside"):
        kind_of().numbers(kind_of(crop=wide).views_of(0).table)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("batch_size", [1, 7, COUNT])
def test_the_table_holds_the_live_teacher_s_logits(split, loader, tmp_path, precision, batch_size):
    kind = kind_of(precision=precision)
    teacher, prepare = teacher_of(kind), prepare_of(kind)
    taught = TableLoader(loader, build(tmp_path, kind, loader, teacher))
    assert len(taught) == COUNT
    for epoch in range(3):
        views, shown = epoch_of(split, epoch), 0
        for batch in taught.batches(views, batch_size):
            live = teacher(prepare(batch.images_NCHW, None))
            assert batch.teacher_logits_BC.dtype == live.dtype
            # The bound: sums of at most 577 products in another order, and for bf16 one rounding of each layer's
            # result. Most sizes of batch give the same bits (test_bits).
            bound = {"fp32": 2e-6, "bf16": 2e-2}[precision] * live.abs().max()
            assert (batch.teacher_logits_BC - live).abs().max() <= bound
            # Another view's or image's logits are far off: the comparison can fail.
            shown += len(batch.labels)
        assert shown == COUNT


def test_bits(split, loader, tmp_path):
    """A batch as large as the table's passes has the table's very bits."""
    kind = kind_of()
    table, teacher = build(tmp_path, kind, loader), teacher_of(kind)
    (batch,) = TableLoader(loader, table).batches(epoch_of(split), COUNT)
    live = teacher(prepare_of(kind)(batch.images_NCHW, None))
    assert torch.equal(batch.teacher_logits_BC, live)
    # Rows of other views and images differ by far more than the bound above.
    other = table.logits_RC[(torch.from_numpy(table.rows(epoch_of(split))) + COUNT) % (kind.views * COUNT)]
    assert (other - table.logits_RC[torch.from_numpy(table.rows(epoch_of(split)))]).abs().max() > 1e-3


@pytest.mark.parametrize("first_batch", [0, 2])
@pytest.mark.parametrize("share", [Share(0, 1), Share(0, 3), Share(2, 3)])
def test_rows_follow_the_batches(split, loader, tmp_path, first_batch, share):
    kind = kind_of()
    table, views = build(tmp_path, kind, loader), epoch_of(split)
    whole = {
        int(i): row
        for b in TableLoader(loader, table).batches(views, 7)
        for i, row in zip(b.ids, b.teacher_logits_BC, strict=True)
    }
    found = list(TableLoader(loader, table).batches(views, 7, first_batch, share))
    plain = list(loader.batches(views, 7, first_batch, share))
    assert [b.ids.tolist() for b in found] == [b.ids.tolist() for b in plain]
    for batch in found:
        for number, row in zip(batch.ids, batch.teacher_logits_BC, strict=True):
            assert torch.equal(row, whole[int(number)])


def test_the_file_is_plain_safetensors(loader, tmp_path):
    kind = kind_of()
    table = build(tmp_path, kind, loader)
    with safe_open(tmp_path / "logits.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["fastgen"]) == kind.description
    tensors = load_file(tmp_path / "logits.safetensors")
    assert torch.equal(tensors["logits"].view(-1, 10), table.logits_RC)
    assert tensors["crc32"].shape == (kind.views,)


class CountingTeacher:
    """A teacher that counts its passes, and asks for a stop after some of them."""

    def __init__(self, teacher, stop_after=None):
        self.teacher, self.passes, self.stop_after = teacher, 0, stop_after

    def __call__(self, images_NCHW):
        self.passes += 1
        if self.passes == self.stop_after:
            signal.raise_signal(signal.SIGTERM)
        return self.teacher(images_NCHW)


def test_a_table_that_was_stopped_goes_on_where_it_was(loader, tmp_path):
    kind = kind_of()
    build(tmp_path / "whole", kind, loader)
    first, told = CountingTeacher(teacher_of(kind), stop_after=5), []
    with StopRequest() as stop, pytest.raises(Stopped):
        build(tmp_path / "parts", kind, loader, first, stop, told.append)
    assert told == [0, 1, 2, 3, 4, 5]
    assert read_table(tmp_path / "parts", kind, CPU) is None
    # A kill in the middle of a write leaves half a view.
    partial = tmp_path / "parts" / ".logits.safetensors.partial"
    with partial.open("ab") as file:
        file.write(b"torn")
    second, told = CountingTeacher(teacher_of(kind)), []
    build(tmp_path / "parts", kind, loader, second, passed=told.append)
    assert told[0] == 5
    assert second.passes == kind.views - 5
    ours, theirs = (tmp_path / name / "logits.safetensors" for name in ("parts", "whole"))
    assert ours.read_bytes() == theirs.read_bytes()
    assert not partial.exists()


def test_a_partial_table_of_another_kind_is_begun_anew(loader, tmp_path):
    kind = kind_of()
    tmp_path.joinpath(".logits.safetensors.partial").write_bytes(kind_of(teacher="other").header + b"x" * 9000)
    teacher = CountingTeacher(teacher_of(kind))
    build(tmp_path, kind, loader, teacher)
    assert teacher.passes == kind.views


@pytest.mark.parametrize(
    "change",
    [
        {"teacher": "fedcba9876543210"}, {"images": "others"}, {"count": 21}, {"crop": replace(CROP, flip=False)},
        {"mean": (0.5, 0.4, 0.31)}, {"std": (0.2, 0.3, 0.26)}, {"classes": 11}, {"precision": "bf16"},
        {"engine": "fused"}, {"crop": replace(CROP, pad_px=2)},
    ],
)  # fmt: skip
def test_another_kind_has_another_key_and_its_file_is_refused(loader, tmp_path, change):
    kind, other = kind_of(), kind_of(**change)
    assert kind.key != other.key
    build(tmp_path / "mine", kind, loader)
    shutil.copytree(tmp_path / "mine", tmp_path / "theirs")
    with pytest.raises(UserError, match="is not the label table of this teacher"):
        read_table(tmp_path / "theirs", other, CPU)


@pytest.mark.parametrize("at", [-1, 2000])
def test_a_damaged_table_is_refused(loader, tmp_path, at):
    kind = kind_of()
    build(tmp_path, kind, loader)
    path = tmp_path / "logits.safetensors"
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        read_table(tmp_path, kind, CPU)
    path.write_bytes(content[:-1])
    with pytest.raises(UserError, match="delete it"):
        read_table(tmp_path, kind, CPU)


def test_a_disk_without_room_is_refused_before_anything_is_labelled(loader, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(labelling.shutil, "disk_usage", lambda folder: usage._replace(free=100))
    teacher = CountingTeacher(teacher_of(kind_of()))
    with pytest.raises(MachineError, match=r"teacher\.labels=live"):
        build(tmp_path, kind_of(), loader, teacher)
    assert teacher.passes == 0


def test_a_power_failure_leaves_nothing_that_is_taken_for_logits(loader, tmp_path):
    kind, told = kind_of(), []
    build(tmp_path / "whole", kind, loader)
    with StopRequest() as stop, pytest.raises(Stopped):
        build(tmp_path / "torn", kind, loader, CountingTeacher(teacher_of(kind), stop_after=6), stop)
    # The file has its length, and a block of it was never written.
    partial = tmp_path / "torn" / ".logits.safetensors.partial"
    content = bytearray(partial.read_bytes())
    begin = len(kind.header) + 3 * kind.block_bytes
    content[begin : begin + kind.block_bytes] = bytes(kind.block_bytes)
    partial.write_bytes(content)
    build(tmp_path / "torn", kind, loader, passed=told.append)
    assert told[0] == 3
    ours, theirs = (tmp_path / name / "logits.safetensors" for name in ("torn", "whole"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_who_finds_another_at_it_waits_and_takes_what_that_one_made(loader, tmp_path, monkeypatch):
    monkeypatch.setattr(labelling, "WAIT_SECONDS", 0.01)
    kind = kind_of()
    late, said = CountingTeacher(teacher_of(kind)), []
    build(tmp_path / "theirs", kind, loader)
    mine = tmp_path / "mine"
    mine.mkdir()
    with ThreadPoolExecutor(1) as pool:
        with labelling.locked(mine, "this label table"):
            waiting = pool.submit(build, mine, kind, loader, late, say=said.append)
            time.sleep(0.3)
            assert not waiting.done()
            shutil.copy(tmp_path / "theirs" / "logits.safetensors", mine)
        assert torch.equal(waiting.result(60).logits_RC, read_table(tmp_path / "theirs", kind, CPU).logits_RC)
    assert late.passes == 0
    assert len(said) == 1
    assert said[0].startswith("waiting: ")
    assert said[0].endswith(f"is in use by process {os.getpid()} on {os.uname().nodename}")


def test_who_waits_can_be_stopped(loader, tmp_path):
    with labelling.locked(tmp_path, "this label table"), StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped):
            build(tmp_path, kind_of(), loader, stop=stop)


def test_the_first_student_is_charged_with_all_sessions_and_no_other(loader, tmp_path, monkeypatch):
    clock = itertools.count(0, 10)
    # This module's clock alone: others tell the time too.
    monkeypatch.setattr(labelling, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=time.sleep))
    kind = kind_of()
    with StopRequest() as stop, pytest.raises(Stopped):
        build(tmp_path, kind, loader, CountingTeacher(teacher_of(kind), stop_after=2), stop)
    build(tmp_path, kind, loader)
    # Two sessions of ten ticks.
    assert claim_cost(tmp_path, "first", StopRequest(), print) == 20
    assert claim_cost(tmp_path, "second", StopRequest(), print) == 0
    assert claim_cost(tmp_path, "first", StopRequest(), print) == 20


def test_logits_that_are_not_finite_make_no_table(loader, tmp_path):
    with pytest.raises(UserError, match="not finite"):
        build(tmp_path, kind_of(), loader, lambda images: torch.full((len(images), 10), float("nan")))


def test_a_dressed_batch_has_logits_of_the_table_s_kind(split, loader):
    kind = kind_of(precision="bf16")
    table = LabelTable(kind, torch.zeros(kind.views * COUNT, 10, dtype=torch.bfloat16))
    (batch,) = loader.batches(epoch_of(split), COUNT)
    assert TableLoader(loader, table).dress(batch).teacher_logits_BC.shape == (COUNT, 10)


@pytest.mark.parametrize("jitter", [JitterPolicy(), JitterPolicy(10.0, 20.0)], ids=["plain", "jitter"])
@pytest.mark.parametrize("count", [1, 2, 3, 50])
def test_looking_ahead_is_the_live_teacher(split, loader, count, jitter):
    crop, kind = replace(CROP, jitter=jitter), kind_of()
    teacher, prepare = teacher_of(kind), prepare_of(kind, crop)
    views = epoch_of(split, crop=crop)
    found = list(LookAhead(loader, teacher, prepare, count, 10).batches(views, 6))
    plain = list(loader.batches(views, 6))
    assert [len(batch.labels) for batch in found] == [6, 6, 6, 2]
    for batch, raw in zip(found, plain, strict=True):
        inputs = prepare(raw.images_NCHW, raw.jitter)
        assert torch.equal(batch.images_NCHW, inputs)
        assert batch.images_NCHW.is_contiguous(memory_format=torch.channels_last)
        assert batch.jitter is None
        assert torch.equal(batch.ids, raw.ids)
        live = teacher(inputs)
        assert (batch.teacher_logits_BC - live).abs().max() <= 2e-6 * live.abs().max()


@pytest.mark.parametrize("first_batch", [1, 2, 3])
def test_a_resumed_look_ahead_forms_the_same_groups(split, loader, first_batch):
    sizes = []

    def teacher(images_NCHW):
        sizes.append(len(images_NCHW))
        return images_NCHW.mean((2, 3))

    prepare = prepare_of(kind_of())
    whole = list(LookAhead(loader, teacher, prepare, 2, 10).batches(epoch_of(split), 6))
    assert sizes == [12, 8]
    sizes.clear()
    rest = list(LookAhead(loader, teacher, prepare, 2, 10).batches(epoch_of(split), 6, first_batch))
    assert sizes == [12, 8][first_batch // 2 :]
    assert [batch.ids.tolist() for batch in rest] == [batch.ids.tolist() for batch in whole[first_batch:]]


def test_looking_ahead_reads_no_further_than_its_group(split, loader):
    asked = []

    class Watched:
        def batches(self, *arguments):
            for batch in loader.batches(*arguments):
                asked.append(len(batch.labels))
                yield batch

    batches = LookAhead(Watched(), lambda images: images.mean((2, 3)), prepare_of(kind_of()), 2, 3).batches(
        epoch_of(split), 6
    )
    next(batches)
    assert len(asked) == 2
    next(batches)
    assert len(asked) == 2


RECIPE = (
    "{data: {dataset: digits, train_limit: 200}, model: {name: resnet8}, train: {epochs: 2, batch_size: 40},"
    " gen: {generations: 2}, run: {device: cpu, eval_every_epochs: 0}}"
)


def run(folder, name, *more):
    (folder / "tiny.yaml").write_text(RECIPE)
    train.main(["--cfg", str(folder / "tiny.yaml"), f"--run.dir={folder / name / 'run'}", *more])
    return folder / name / "run"


def weights(run, generation):
    return load_file(run / f"generation_{generation}" / "model.safetensors")


def training_of(run, generation):
    return json.loads((run / f"generation_{generation}" / "node.json").read_text())["training"]


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    return run(tmp_path_factory.mktemp("live"), "live")


@pytest.mark.parametrize(
    ("words", "how"),
    [
        (["--teacher.labels=table"], "label table"),
        (["--teacher.look_ahead_batches=3"], "folded, 3 batches at once"),
    ],
)
def test_students_end_with_the_weights_of_those_of_a_live_teacher(live, tmp_path, words, how):
    other = run(tmp_path, "other", *words)
    for generation in range(3):
        ours, theirs = weights(other, generation), weights(live, generation)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert training_of(other, 1)["path"]["teacher"].startswith(how)
    assert training_of(live, 1)["path"]["teacher"] == "folded"
    assert training_of(other, 0)["path"]["teacher"] is None
    # How the teacher is asked is no part of a node's name.
    assert json.loads((other / "plan.json").read_text()) == json.loads((live / "plan.json").read_text())


def test_a_batch_of_one_image_is_within_rounding(live, tmp_path):
    words = ["--train.batch_size=199", "--gen.generations=1"]
    ours = weights(run(tmp_path, "ours", *words, "--teacher.labels=table"), 1)
    theirs = weights(run(tmp_path, "theirs", *words), 1)
    assert all(torch.allclose(ours[name], tensor, atol=1e-5) for name, tensor in theirs.items())


def test_more_batches_ahead_than_there_are_is_the_whole_epoch(live, tmp_path):
    other = run(tmp_path, "other", "--teacher.look_ahead_batches=100000000", "--gen.generations=1")
    ours, theirs = weights(other, 1), weights(live, 1)
    assert all(torch.allclose(ours[name], tensor, atol=1e-3) for name, tensor in theirs.items())


def test_only_shapes_that_come_are_shown_to_the_teacher(tmp_path, monkeypatch):
    seen, right = [], teaching.make_teacher

    def watched(*words, **options):
        teacher = right(*words, **options)

        def network(images_NCHW):
            seen.append(len(images_NCHW))
            return teacher(images_NCHW)

        return replace(teacher, network=network)

    monkeypatch.setattr(teaching, "make_teacher", watched)
    run(tmp_path, "run", "--teacher.look_ahead_batches=2", "--train.batch_size=45", "--gen.generations=1")
    # 200 images in batches of 45: groups of 90, 90 and 20. Warmed up once each, then two epochs.
    assert seen == [20, 90, *2 * [90, 90, 20]]


@pytest.mark.parametrize("engine", ["fused", "compile"])
def test_other_engines_of_the_teacher_make_other_nodes_and_near_weights(live, tmp_path, engine):
    other = run(tmp_path, "other", f"--teacher.engine={engine}")
    ours, theirs = ([(at / f"generation_{g}").resolve().name for g in range(3)] for at in (other, live))
    assert ours[0] == theirs[0]
    assert not {*ours[1:]} & {*theirs[1:]}
    assert training_of(other, 1)["path"]["teacher"].startswith(engine)
    ours, theirs = weights(other, 1), weights(live, 1)
    # Ten steps from rounding errors of 2^-24.
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-3) for name in theirs if ours[name].is_floating_point())


def test_the_first_student_makes_the_table_and_the_next_only_reads_it(tmp_path, monkeypatch, capsys):
    first = run(tmp_path, "first", "--teacher.labels=table", "--gen.generations=1")
    assert training_of(first, 1)["seconds"]["labels"] > 0
    assert "labels" not in training_of(first, 0)["seconds"]
    out = capsys.readouterr().out
    assert "labels 9 views of 200 images: 9 of 9" in out
    monkeypatch.setattr(teaching, "make_teacher", lambda *words, **options: 1 / 0)
    words = ["--teacher.labels=table", "--gen.generations=1", "--gen.only=1", "--gen.teacher_weight=0.3"]
    again = run(tmp_path, "again", *words, f"--run.nodes={first.parent / 'nodes'}")
    assert training_of(again, 1)["path"]["teacher"] == training_of(first, 1)["path"]["teacher"]
    row = json.loads((first / "results.json").read_text())["generations"][1]
    assert row["wall_seconds"] >= row["train_seconds"] + training_of(first, 1)["seconds"]["labels"]


def test_a_run_that_was_stopped_while_it_labelled_ends_like_one_that_was_not(live, tmp_path, monkeypatch):
    right = labelling._label_view

    def stopping(kind, number, *rest):
        if number == 4:
            time.sleep(0.5)
            signal.raise_signal(signal.SIGTERM)
        return right(kind, number, *rest)

    monkeypatch.setattr(labelling, "_label_view", stopping)
    with pytest.raises(Stopped):
        run(tmp_path, "other", "--teacher.labels=table")
    monkeypatch.setattr(labelling, "_label_view", right)
    other = run(tmp_path, "other", "--teacher.labels=table")
    assert all(torch.equal(tensor, weights(live, 2)[name]) for name, tensor in weights(other, 2).items())
    # The session that was stopped is charged, too.
    assert training_of(other, 1)["seconds"]["labels"] > 0.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.rotation_degrees=5"], "no end of views"),
        (["--data.backend=synthetic"], "synthetic"),
        (["--teacher.look_ahead_batches=2"], "no say"),
        (["--teacher.look_ahead_batches=0"], "1 or more"),
    ],
)
def test_what_a_table_cannot_do_is_told(tmp_path, words, message):
    asked = [] if "look_ahead_batches=0" in words[0] else ["--teacher.labels=table"]
    with pytest.raises(UserError, match=message):
        run(tmp_path, "refused", *asked, *words)
