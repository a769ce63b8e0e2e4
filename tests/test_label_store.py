"""The label store: filled while a student learns, read by the next, whole under stops, faults and other processes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from taught import COUNT, CPU, CROP, epoch_of, tiny_prepare, tiny_split, tiny_store_kind, tiny_teacher

from fastgen import label_parts, label_store
from fastgen.crops import JitterPolicy
from fastgen.data.batch import Kept
from fastgen.data.resident import ResidentLoader
from fastgen.errors import MachineError, UserError
from fastgen.label_parts import epoch_folder, missing_rows, part_paths, read_part
from fastgen.label_store import LabelStore, Whereabouts
from fastgen.lessons import LookAhead, StoreLoader, StoreSource
from fastgen.truncation import CLASSES, LOG_P, Truncation
from fastgen.views import EpochName, Share

DENSE, SOME, EXACT = Truncation(10, 10, "fp16"), Truncation(10, 3, "fp16"), Truncation(10, 10, "fp32")
BATCH = 6


def kind_of(**changes):
    return replace(tiny_store_kind(), **changes)


def store_of(folder, *, writes=True, **changes):
    return LabelStore(folder, kind_of(**changes), writes=writes)


@pytest.fixture(scope="module")
def split():
    return tiny_split()


@pytest.fixture(scope="module")
def loader(split):
    return ResidentLoader(split, CROP.pad_px, CPU)


class CountingTeacher:
    """A teacher that counts the images that it is shown."""

    def __init__(self):
        self.teacher, self.images = tiny_teacher(), 0

    def __call__(self, inputs_NCHW):
        self.images += len(inputs_NCHW)
        return self.teacher(inputs_NCHW)


def taught(loader, store, teacher=None, batches=1):
    """A loader of the store, which asks the teacher if there is one."""
    prepare = tiny_prepare()
    ahead = None if teacher is None else LookAhead(loader, teacher, prepare, batches, 10)
    return StoreLoader(loader, store, ahead, prepare, CPU)


def shown(batches):
    """Sample id -> its labels."""
    return {
        int(number): [
            column[row] for column in (batch.teacher_logits_BC, batch.teacher_classes_BM) if column is not None
        ]
        for batch in batches
        for row, number in enumerate(batch.ids)
    }


def require_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for number, columns in ours.items():
        assert len(columns) == len(theirs[number])
        assert all(torch.equal(one, other) for one, other in zip(columns, theirs[number], strict=True))


@pytest.mark.parametrize("cut", [DENSE, SOME, EXACT])
@pytest.mark.parametrize("ahead", [1, 3])
def test_what_was_asked_once_is_read_ever_after_and_is_the_same(split, loader, tmp_path, cut, ahead):
    store, teacher = store_of(tmp_path, truncation=cut), CountingTeacher()
    filling = taught(loader, store, teacher, ahead)
    for epoch in range(2):
        views = epoch_of(split, epoch)
        first = list(filling.batches(views, BATCH))
        store.flush()
        assert teacher.images == (epoch + 1) * COUNT
        again = taught(loader, store_of(tmp_path, truncation=cut, writes=False))
        read = list(again.batches(views, BATCH))
        require_same(shown(read), shown(first))
        assert (again.read, again.asked) == (COUNT, 0)
        # Beside the teacher itself, asked for one view after the other.
        plain = {
            int(number): tiny_teacher()(tiny_prepare()(image[None], None))
            for batch in loader.batches(views, 1)
            for number, image in zip(batch.ids, batch.images_NCHW, strict=True)
        }
        for batch in read:
            assert (batch.teacher_classes_BM is None) == cut.dense
            for row, number in enumerate(batch.ids):
                expected = cut(plain[int(number)])
                # A pass of one image sums in another order than one of several: see test_labels.
                bound = 4e-6 * float(plain[int(number)].abs().max()) + (2**-11 * 8 if cut.dtype == "fp16" else 0)
                torch.testing.assert_close(batch.teacher_logits_BC[row], expected[LOG_P][0], rtol=0, atol=bound)
                if not cut.dense:
                    assert torch.equal(batch.teacher_classes_BM[row], expected[CLASSES][0])
    assert (filling.read, filling.asked) == (0, 2 * COUNT)


@pytest.mark.parametrize("cut", [DENSE, SOME])
@pytest.mark.parametrize("stopped_after", [1, 2, 3])
@pytest.mark.parametrize(("ahead", "batch_size", "world"), [(1, BATCH, 1), (2, BATCH, 1), (1, 4, 1), (2, 5, 2)])
def test_what_a_stop_left_out_is_asked_and_nothing_else(
    split, loader, tmp_path, cut, stopped_after, ahead, batch_size, world
):
    """Also where it goes on in batches of another size, in another number of processes."""
    views = epoch_of(split)
    whole = store_of(tmp_path / "whole", truncation=cut)
    expected = shown(taught(loader, whole, CountingTeacher()).batches(views, BATCH))
    store = store_of(tmp_path / "torn", truncation=cut)
    before = taught(loader, store, CountingTeacher())
    for _, _ in zip(range(stopped_after), before.batches(views, BATCH), strict=False):
        pass
    store.flush()
    kept = min(stopped_after * BATCH, COUNT)
    assert store.missing([views.name]) == COUNT - kept
    found = {}
    for rank in range(world):
        mine, teacher = store_of(tmp_path / "torn", truncation=cut), CountingTeacher()
        going_on = taught(loader, mine, teacher, ahead)
        found |= shown(going_on.batches(views, batch_size, share=Share(rank, world)))
        mine.flush()
        assert going_on.asked == teacher.images
        # No more than what is missing, but for the rest of groups that lacked something.
        assert teacher.images <= COUNT - kept + ahead * batch_size
    assert found.keys() == expected.keys()
    for number, columns in found.items():
        for one, other in zip(columns, expected[number], strict=True):
            torch.testing.assert_close(one.float(), other.float(), rtol=0, atol=2**-11 * 8)
    assert store.missing([views.name]) == 0
    require_same(shown(taught(loader, store).batches(views, BATCH)), found)


def test_two_ranks_fill_one_store(split, loader, tmp_path):
    views, found = epoch_of(split), {}
    for rank in range(2):
        store = store_of(tmp_path)
        found |= shown(taught(loader, store, CountingTeacher()).batches(views, BATCH, share=Share(rank, 2)))
        store.flush()
        assert len(store.parts(views.name)) == rank + 1
    require_same(shown(taught(loader, store_of(tmp_path)).batches(views, 7)), found)


def test_a_resumed_epoch_begins_at_its_batch(split, loader, tmp_path):
    views, store = epoch_of(split), store_of(tmp_path)
    whole = list(taught(loader, store, CountingTeacher(), 2).batches(views, BATCH))
    store.flush()
    for first_batch in range(4):
        rest = list(taught(loader, store).batches(views, BATCH, first_batch))
        assert [batch.ids.tolist() for batch in rest] == [batch.ids.tolist() for batch in whole[first_batch:]]
        require_same(shown(rest), shown(whole[first_batch:]))


def test_the_source_gives_what_the_loader_gives(split, loader, tmp_path):
    views, store = epoch_of(split), store_of(tmp_path)
    list(taught(loader, store, CountingTeacher()).batches(views, BATCH))
    store.flush()
    source = StoreSource(loader, store, CPU)
    columns = source.columns(views, views.order)
    assert {name: column[:4].shape for name, column in columns.items()} == {
        name: column.shape for name, column in source.blank(4, jitter=False).items()
    }
    (expected,) = taught(loader, store).batches(views, COUNT)
    found = source.execute(columns)
    require_same(shown([found]), shown([expected]))
    assert torch.equal(found.images_NCHW, expected.images_NCHW)


def test_a_blank_batch_is_dressed_as_others_are(split, loader, tmp_path):
    store, views = store_of(tmp_path), epoch_of(split)
    raw = next(iter(loader.batches(views, BATCH)))
    for teacher in (CountingTeacher(), None):
        lessons = taught(loader, store, teacher)
        real = next(iter(lessons.batches(views, BATCH)))
        store.flush() if teacher else None
        blank = lessons.dress(raw)
        for name in ("images_NCHW", "labels", "teacher_logits_BC", "teacher_classes_BM"):
            assert getattr(blank, name).shape == getattr(real, name).shape, name
            assert getattr(blank, name).dtype == getattr(real, name).dtype, name
        if teacher is not None:
            list(lessons.batches(views, BATCH, 1))
            store.flush()


def test_batches_slice_their_lessons(split, loader, tmp_path):
    store = store_of(tmp_path)
    batch = next(iter(taught(loader, store, CountingTeacher()).batches(epoch_of(split), BATCH)))
    part = batch[2:4].lesson
    assert isinstance(part, Kept)
    assert torch.equal(part.log_p_BN, batch.lesson.log_p_BN[2:4])
    assert torch.equal(part.classes_BM, batch.lesson.classes_BM[2:4])


@pytest.mark.parametrize(
    "change",
    [
        {"teacher": "fedcba9876543210"}, {"images": "others"}, {"count": 21}, {"crop": replace(CROP, flip=False)},
        {"crop": replace(CROP, jitter=JitterPolicy(10.0, 0.0))}, {"pixels": "dali"}, {"mean": (0.5, 0.4, 0.31)},
        {"std": (0.2, 0.3, 0.26)}, {"precision": "bf16"}, {"engine": "fused"}, {"truncation": DENSE},
        {"truncation": Truncation(10, 4, "fp16")}, {"truncation": Truncation(10, 3, "fp32")},
    ],
)  # fmt: skip
def test_another_kind_is_another_store(change):
    assert kind_of().key != kind_of(**change).key


@pytest.mark.parametrize("other", [{"data_seed": 4}, {"generation": 2}, {"epoch": 1}, {"height_px": 16}])
def test_labels_belong_to_an_epoch_s_views(split, loader, tmp_path, other):
    views, store = epoch_of(split), store_of(tmp_path)
    list(taught(loader, store, CountingTeacher()).batches(views, BATCH))
    store.flush()
    name = views.name._replace(**other)
    assert store.missing([views.name]) == 0
    assert store.missing([name]) == COUNT
    # A folder that was renamed, or copied to where it does not belong.
    shutil.copytree(epoch_folder(store.folder, views.name), epoch_folder(store.folder, name))
    elsewhere = replace(epoch_of(split, 1), name=name)
    with pytest.raises(UserError, match="holds labels of other views"):
        store.read(elsewhere)


def filled(split, loader, folder):
    store = store_of(folder)
    for epoch in range(2):
        list(taught(loader, store, CountingTeacher()).batches(epoch_of(split, epoch), BATCH))
        store.flush()
    return store


def test_no_flipped_bit_is_taken_for_a_label(split, loader, tmp_path):
    """Any byte of a part, one after the other: it is refused by its name, or all that it holds is unharmed."""
    store, views = filled(split, loader, tmp_path), epoch_of(split)
    (path,) = part_paths(epoch_folder(store.folder, views.name))
    whole, content = store.read(views), path.read_bytes()
    about, refused = read_part(path), 0
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
        told, found = "", None
        try:
            found = store.read(views)
        except UserError as error:
            told = str(error)
        if found is None:
            assert str(path) in told
            assert "delete it" in told
            refused += 1
            continue
        assert read_part(path) == about
        assert (found.known == whole.known).all()
        for name, column in found.columns.items():
            np.testing.assert_array_equal(column, whole.columns[name])
    assert refused > 0.9 * len(content)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 100, -1, -100])
def test_a_cut_part_is_named(split, loader, tmp_path, length):
    store, views = filled(split, loader, tmp_path), epoch_of(split)
    (path,) = part_paths(epoch_folder(store.folder, views.name))
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=rf"{path}: is damaged .* delete it"):
        store.read(views)
    with pytest.raises(UserError, match="is damaged"):
        store.missing([views.name])
    # As it says: deleted, its labels are asked for again.
    path.unlink()
    assert store.missing([views.name]) == COUNT
    teacher = CountingTeacher()
    list(taught(loader, store, teacher).batches(views, BATCH))
    assert teacher.images == COUNT


def test_a_part_that_goes_away_under_a_training_without_a_teacher_is_told(split, loader, tmp_path):
    store, views = filled(split, loader, tmp_path), epoch_of(split)
    (path,) = part_paths(epoch_folder(store.folder, views.name))
    path.unlink()
    with pytest.raises(MachineError, match="have gone: start again"):
        list(taught(loader, store).batches(views, BATCH))
    with pytest.raises(MachineError, match="have gone: start again"):
        StoreSource(loader, store, CPU).columns(views, views.order)


def test_rows_that_two_parts_have_count_once(split, loader, tmp_path):
    """Two runs on two machines may have written the same ones, and copies of stores may be brought together."""
    views = epoch_of(split)
    for _ in range(2):
        store = store_of(tmp_path)
        store.read = lambda views: label_store.KnownLabels(
            np.zeros(COUNT, bool), {LOG_P: np.zeros((COUNT, 4), np.float16), CLASSES: np.zeros((COUNT, 3), np.int16)}
        )
        for _, _ in zip(range(2), taught(loader, store, CountingTeacher()).batches(views, BATCH), strict=False):
            pass
        store.flush()
    store = store_of(tmp_path)
    assert [part.count for part in store.parts(views.name)] == [12, 12]
    assert store.missing([views.name]) == COUNT - 12
    teacher = CountingTeacher()
    list(taught(loader, store, teacher).batches(views, BATCH))
    assert teacher.images == COUNT - 12


def test_a_run_that_has_lost_its_store_keeps_nothing_more(split, loader, tmp_path):
    store, views = store_of(tmp_path), epoch_of(split)
    list(taught(loader, store, CountingTeacher()).batches(views, BATCH))
    store.give_up()
    store.flush()
    list(taught(loader, store, CountingTeacher()).batches(views, BATCH))
    store.flush()
    assert store.missing([views.name]) == COUNT


def test_missing_rows_are_ranges():
    known = np.array([False, False, True, True, False, True, False])
    assert list(missing_rows(known)) == [(0, 2), (4, 5), (6, 7)]
    assert list(missing_rows(np.ones(3, bool))) == []


def test_a_full_disk_leaves_what_was_there(split, loader, tmp_path, monkeypatch):
    store, views = filled(split, loader, tmp_path), epoch_of(split, 2)
    list(taught(loader, store, CountingTeacher()).batches(views, BATCH))

    def full(path, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(label_parts, "write_atomically", full)
        with pytest.raises(OSError, match="No space"):
            store.flush()
    assert store.missing([EpochName(3, 1, 0, 8, 6), EpochName(3, 1, 1, 8, 6)]) == 0
    # Once there is room.
    store.flush()
    assert store.missing([views.name]) == 0


def test_a_disk_without_room_is_refused_before_anything_is_asked(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(label_store.shutil, "disk_usage", lambda folder: usage._replace(free=100))
    store = store_of(tmp_path)
    store.folder.mkdir()
    with pytest.raises(MachineError, match=r"needs .* GB more.*teacher\.labels=live"):
        store.require_room(COUNT)
    store.require_room(100 // (store.kind.epoch_bytes // COUNT))


def test_who_may_not_write_does_not(split, loader, tmp_path):
    store = store_of(tmp_path, writes=False)
    list(taught(loader, store, CountingTeacher()).batches(epoch_of(split), BATCH))
    store.flush()
    assert list(tmp_path.iterdir()) == []


def test_logits_that_are_no_numbers_are_not_kept(split, loader, tmp_path):
    store, right = store_of(tmp_path), tiny_teacher()

    def broken(images_NCHW):
        return right(images_NCHW) * float("inf")

    ahead = LookAhead(loader, broken, tiny_prepare(), 1, 10)
    list(StoreLoader(loader, store, ahead, tiny_prepare(), CPU).batches(epoch_of(split), BATCH))
    with pytest.raises(UserError, match="the teacher's logits are not finite"):
        store.flush()
    assert not part_paths(epoch_folder(store.folder, epoch_of(split).name))


def test_what_a_kill_within_a_write_left_is_removed(split, loader, tmp_path):
    store, views = filled(split, loader, tmp_path), epoch_of(split)
    (part,) = part_paths(epoch_folder(store.folder, views.name))
    rest = part.with_name(f".{part.name}.12.partial")
    rest.touch()
    store.clear(views.name.data_seed, views.name.generation)
    assert (rest.exists(), part.exists()) == (False, True)


def test_a_part_that_goes_between_listing_and_reading_is_told(tmp_path):
    with pytest.raises(MachineError, match=r"gone.part: has gone while labels were read: start again"):
        read_part(tmp_path / "gone.part")


def test_other_stores_of_a_teacher_are_told_with_what_differs(tmp_path):
    for other in ({"precision": "bf16"}, {"truncation": Truncation(10, 5, "fp16")}, {"teacher": "1" * 16}, {}):
        LabelStore(tmp_path, kind_of(**other), writes=True).describe([Whereabouts("", tmp_path / "weights")])
    told = label_store.other_stores(tmp_path, kind_of())
    folders = [tmp_path / kind_of(precision="bf16").key, tmp_path / kind_of(truncation=Truncation(10, 5, "fp16")).key]
    ends = ["has precision = bf16, not fp32", "has truncation.kept = 5, not 3"]
    assert sorted(told) == sorted(
        f"{folder} is of the same teacher, but {end}" for folder, end in zip(folders, ends, strict=True)
    )


def test_labels_of_two_epochs_are_no_part(split, loader, tmp_path):
    store = store_of(tmp_path)
    list(taught(loader, store, CountingTeacher()).batches(epoch_of(split, 0), BATCH))
    with pytest.raises(ValueError, match="not flushed"):
        list(taught(loader, store, CountingTeacher()).batches(epoch_of(split, 1), BATCH))


def test_the_loss_of_truncation_is_kept_with_the_labels(split, loader, tmp_path):
    store, views = filled(split, loader, tmp_path), epoch_of(split)
    teacher, prepare = tiny_teacher(), tiny_prepare()
    lost = [
        SOME.divergence(logits, SOME(logits))
        for batch in loader.batches(views, BATCH)
        for logits in [teacher(prepare(batch.images_NCHW, None))]
    ]
    assert store.divergence([views.name]) == pytest.approx(float(torch.cat(lost).mean()), rel=1e-9)
    assert store.divergence([views.name]) > 1e-3


def test_the_description_says_what_a_store_depends_on(tmp_path):
    store = store_of(tmp_path)
    store.describe([Whereabouts("0123", tmp_path / "weights")])
    about = json.loads((store.folder / "store.json").read_text())
    assert about == {**store.kind.description, "teachers": [["0123", str(tmp_path / "weights")]]}
    assert about["teacher"] == "0123456789abcdef"
    assert about["truncation"] == {"classes": 10, "kept": 3, "dtype": "fp16"}


def test_ilsvrc_takes_about_ten_gigabytes():
    """Sixteen of 1,000 classes, 1.28 million images, 100 epochs."""
    kind = kind_of(count=1_281_167, truncation=Truncation(1000, 16, "fp16"))
    assert 100 * kind.epoch_bytes == 100 * 1_281_167 * (17 * 2 + 16 * 2 + 4)
    assert 8e9 < 100 * kind.epoch_bytes < 10e9
