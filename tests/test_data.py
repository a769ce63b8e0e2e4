"""data/: official files of both layouts, damaged ones, the facts of each data set, limits and hold-out."""

import os
import pickle
import random
import struct
from typing import ClassVar

import numpy as np
import pytest

from fastgen.config import DataSettings
from fastgen.crops import ShiftCrop
from fastgen.data import open_dataset
from fastgen.data.cifar import LAYOUTS, read_cifar
from fastgen.data.digits import read_digits
from fastgen.data.facts import DATASETS
from fastgen.data.split import Split, make_dataset
from fastgen.errors import UserError
from fastgen.recipe import read_recipe


def save_string(pickler, value):
    content = value if isinstance(value, bytes) else value.encode("latin1")
    pickler.write(b"T" + struct.pack("<i", len(content)) + content)
    pickler.memoize(value)


class Python2Pickler(pickle._Pickler):
    """Writes what Python 2 wrote into the official files: all text and bytes as its one kind of string."""

    dispatch: ClassVar = {**pickle._Pickler.dispatch, bytes: save_string, str: save_string}


def official_pickle(path, value):
    with open(path, "wb") as file:
        Python2Pickler(file, 2).dump(value)
    # numpy had its reconstruction function there when the files were made.
    path.write_bytes(path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))


def random_records(count, classes, seed):
    """(pixels (N, 3072), labels)"""
    numbers = np.random.default_rng(seed)
    return numbers.integers(0, 256, (count, 3072), np.uint8), numbers.permutation(np.arange(count) % classes)


def records_of(layout, dataset, part):
    """Every file of one split: name in both layouts, pixels, labels."""
    files = zip(getattr(layout, f"binary_{part}"), getattr(layout, f"python_{part}"), strict=True)
    for number, ((binary, count), (python, _)) in enumerate(files):
        seed = number + 100 * (part == "test")
        yield binary, python, *random_records(count, DATASETS[dataset].classes, seed)


def write_binary(root, dataset):
    layout = LAYOUTS[dataset]
    folder = root / layout.binary
    folder.mkdir(parents=True)
    for part in ("train", "test"):
        for name, _, pixels, labels in records_of(layout, dataset, part):
            columns = [labels // 5, labels][-layout.label_bytes :]
            records = np.concatenate([np.stack(columns, 1).astype(np.uint8), pixels], 1)
            (folder / name).write_bytes(records.tobytes())
    names = [f"name_{number}" for number in range(DATASETS[dataset].classes)]
    # The official file of CIFAR-10 ends in an empty line.
    (folder / layout.binary_names).write_text("\n".join(names) + "\n\n")
    return folder


def write_python(root, dataset):
    layout = LAYOUTS[dataset]
    folder = root / layout.python
    folder.mkdir(parents=True)
    for part in ("train", "test"):
        for _, name, pixels, labels in records_of(layout, dataset, part):
            content = {"batch_label": name, "data": pixels, layout.label_key: labels.tolist()}
            official_pickle(folder / name, {**content, "coarse_labels": (labels // 5).tolist()})
    name, key = layout.python_names
    official_pickle(folder / name, {key: [f"name_{number}" for number in range(DATASETS[dataset].classes)]})
    return folder


@pytest.fixture(params=["cifar100", "cifar10"])
def dataset(request, small_layouts):
    return request.param


@pytest.mark.parametrize("write", [write_binary, write_python])
def test_every_pixel_label_and_id_is_the_files(dataset, write, tmp_path):
    write(tmp_path, dataset)
    train, test, names = read_cifar(dataset, tmp_path)
    for split, part in ((train, "train"), (test, "test")):
        records = list(records_of(LAYOUTS[dataset], dataset, part))
        pixels, labels = (np.concatenate([record[column] for record in records]) for column in (2, 3))
        # Pixel (row r, column c, channel k) is byte 1024 k + 32 r + c of its record.
        for r, c, k in [(0, 0, 0), (0, 31, 0), (31, 0, 1), (5, 7, 2), (31, 31, 2)]:
            np.testing.assert_array_equal(split.images_NHWC[:, r, c, k], pixels[:, 1024 * k + 32 * r + c])
        assert split.images_NHWC.shape == (len(labels), 32, 32, 3)
        assert split.images_NHWC.dtype == np.uint8
        np.testing.assert_array_equal(split.labels, labels)
        np.testing.assert_array_equal(split.ids, np.arange(len(labels)))
        assert split.labels.dtype == split.ids.dtype == np.int64
    assert names == tuple(f"name_{number}" for number in range(DATASETS[dataset].classes))


def test_both_layouts_give_equal_data_and_equal_hashes(dataset, tmp_path):
    write_binary(tmp_path / "binary", dataset)
    write_python(tmp_path / "python", dataset)
    one, two = (
        make_dataset(DataSettings(dataset=dataset), DATASETS[dataset], *read_cifar(dataset, tmp_path / layout))
        for layout in ("binary", "python")
    )
    np.testing.assert_array_equal(one.train.images_NHWC, two.train.images_NHWC)
    assert (one.train_hash, one.evaluation.content_hash) == (two.train_hash, two.evaluation.content_hash)
    assert one.train_hash != one.evaluation.content_hash
    assert one.class_names == two.class_names


@pytest.mark.parametrize("what", ["pixel", "label", "order"])
def test_the_hash_tells_data_apart(what):
    pixels, labels = np.zeros((4, 2, 2, 1), np.uint8), np.array([0, 1, 0, 1])
    pixels[0] = 7

    def hash_of(pixels, labels):
        split = Split(pixels, labels, np.arange(4))
        return make_dataset(DataSettings(dataset="digits"), DATASETS["digits"], split, split, ()).train_hash

    before = hash_of(pixels, labels)
    if what == "pixel":
        pixels[3, 1, 1, 0] = 1
    if what == "label":
        labels = np.array([0, 1, 0, 0])
    if what == "order":
        pixels = pixels[[1, 0, 2, 3]]
    assert hash_of(pixels, labels) != before


def refused(dataset, root):
    with pytest.raises(UserError) as caught:
        read_cifar(dataset, root)
    told = str(caught.value)
    assert "\n" not in told
    return told


@pytest.mark.parametrize("change", [-1, -3074, +1, "missing", "empty", "a folder"])
@pytest.mark.parametrize("part", ["train", "test"])
def test_a_binary_file_of_another_size_is_refused(dataset, change, part, tmp_path):
    layout = LAYOUTS[dataset]
    name, count = getattr(layout, f"binary_{part}")[-1]
    path = write_binary(tmp_path, dataset) / name
    expected = count * (layout.label_bytes + 3072)
    content = path.read_bytes()
    path.unlink()
    if change == "a folder":
        path.mkdir()
    elif change != "missing":
        path.write_bytes({-1: content[:-1], -3074: content[:-3074], +1: content + b"x", "empty": b""}[change])
    told = refused(dataset, tmp_path)
    assert str(path) in told
    assert f"expected {expected:,} bytes" in told
    if isinstance(change, int):
        assert f"found {expected + change:,}" in told
    if change == "missing":
        assert "is missing" in told


def test_a_label_that_no_class_has_is_refused(dataset, tmp_path):
    """A file of the right size and the wrong content must not end in the middle of the training."""
    layout = LAYOUTS[dataset]
    path = write_binary(tmp_path, dataset) / layout.binary_train[0][0]
    content = bytearray(path.read_bytes())
    content[layout.label_bytes - 1] = DATASETS[dataset].classes
    path.write_bytes(content)
    assert str(path) in refused(dataset, tmp_path)


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, -1])
def test_a_truncated_python_file_is_refused(dataset, kept, tmp_path):
    path = write_python(tmp_path, dataset) / LAYOUTS[dataset].python_train[0][0]
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    told = refused(dataset, tmp_path)
    assert str(path) in told
    if kept != -1:
        least = LAYOUTS[dataset].python_train[0][1] * 3072
        assert f"expected at least {least:,} bytes, found {path.stat().st_size:,}" in told


def test_a_missing_python_file_is_named(dataset, tmp_path):
    path = write_python(tmp_path, dataset) / LAYOUTS[dataset].python_test[0][0]
    path.unlink()
    assert f"{path}: is missing (expected" in refused(dataset, tmp_path)


LENGTH = 3_000_000  # more than any of the small files must have


def garbage(seed):
    content = random.Random(seed).randbytes(2000)
    # A head that makes the unpickler begin, then noise.
    return [b"\x80\x02", b"\x80\x02}q\x00", b"(dp0\n", b""][seed % 4] + content + bytes(LENGTH)


@pytest.mark.parametrize("seed", range(40))
def test_garbage_is_refused(small_layouts, seed, tmp_path):
    path = write_python(tmp_path, "cifar100") / "train"
    path.write_bytes(garbage(seed))
    assert str(path) in refused("cifar100", tmp_path)


WRONG_CONTENTS = {
    "a list": [1, 2, 3],
    "no data": {"fine_labels": [0] * 600},
    "no labels": {"data": np.zeros((600, 3072), np.uint8)},
    "too few images": {"data": np.zeros((599, 3072), np.uint8), "fine_labels": [0] * 599},
    "too few labels": {"data": np.zeros((600, 3072), np.uint8), "fine_labels": [0] * 599},
    "pixels of another type": {"data": np.zeros((600, 3072), np.float32), "fine_labels": [0] * 600},
    "labels that are text": {"data": np.zeros((600, 3072), np.uint8), "fine_labels": ["x"] * 600},
    "labels of no class": {"data": np.zeros((600, 3072), np.uint8), "fine_labels": [100] * 600},
    "negative labels": {"data": np.zeros((600, 3072), np.uint8), "fine_labels": [-1] * 600},
}


@pytest.mark.parametrize("name", WRONG_CONTENTS)
def test_a_python_file_with_other_content_is_refused(small_layouts, name, tmp_path):
    path = write_python(tmp_path, "cifar100") / "train"
    official_pickle(path, WRONG_CONTENTS[name])
    with path.open("ab") as file:
        file.write(bytes(LENGTH))
    assert str(path) in refused("cifar100", tmp_path)


@pytest.mark.parametrize("names", [{}, {"fine_label_names": None}, {"fine_label_names": ["only one"]}])
def test_class_names_that_are_not_there_are_refused(small_layouts, names, tmp_path):
    path = write_python(tmp_path, "cifar100") / "meta"
    official_pickle(path, names)
    assert str(path) in refused("cifar100", tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\n" * 100, b"only one\n"])
def test_a_damaged_list_of_class_names_is_refused(small_layouts, content, tmp_path):
    path = write_binary(tmp_path, "cifar100") / "fine_label_names.txt"
    path.write_bytes(content)
    assert str(path) in refused("cifar100", tmp_path)


class RunsCode:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("where", ["train", "meta"])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("function", ["open", "system", "numpy"])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(small_layouts, where, protocol, function, tmp_path):
    path, proof = write_python(tmp_path, "cifar100") / where, tmp_path / "ran"
    evil = {
        "open": RunsCode(open, str(proof), "w"),
        "system": RunsCode(os.system, f"touch {proof}"),
        "numpy": RunsCode(np.save, str(proof), np.zeros(1)),
    }[function]
    path.write_bytes(pickle.dumps({"data": evil}, protocol=protocol) + bytes(LENGTH))
    assert str(path) in refused("cifar100", tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cifar-100-python"]


def test_neither_layout_is_told_with_what_to_do(tmp_path):
    told = refused("cifar100", tmp_path)
    for part in (str(tmp_path), "cifar-100-binary", "cifar-100-python", "data.root", "data.download=true"):
        assert part in told


def test_digits_are_what_the_facts_say():
    train, test, names = read_digits()
    facts = DATASETS["digits"]
    assert (len(train), len(test)) == (facts.train_images, facts.test_images) == (1442, 355)
    assert names == tuple("0123456789")
    assert train.images_NHWC.shape[1:] == (facts.height_px, facts.width_px, facts.channels)
    assert not set(train.ids.tolist()) & set(test.ids.tolist())
    require_facts(train, facts)
    # A fifth of every class is for testing.
    for label in range(10):
        ours, theirs = (int((split.labels == label).sum()) for split in (test, train))
        assert ours == (ours + theirs) // 5


def test_digits_are_the_scans_at_full_range():
    from sklearn.datasets import load_digits

    scans = load_digits()
    for split in read_digits()[:2]:
        np.testing.assert_array_equal(split.labels, scans.target[split.ids])
        # 0..16 of ink becomes 0..255, rounded.
        assert np.abs(split.images_NHWC[..., 0] - scans.images[split.ids] * 255 / 16).max() <= 0.5
        assert split.images_NHWC.max() == 255


def require_facts(train, facts):
    """Mean and standard deviation of each channel, to the 4 decimals that are written down."""
    for channel in range(facts.channels):
        # Exact from counts of the 256 values; half a unit of the fourth decimal for the rounding of the facts.
        counts = np.bincount(train.images_NHWC[..., channel].ravel(), minlength=256) / train.images_NHWC[..., 0].size
        values = np.arange(256) / 255
        mean = counts @ values
        assert mean == pytest.approx(facts.mean[channel], abs=0.5001e-4)
        assert np.sqrt(counts @ (values - mean) ** 2) == pytest.approx(facts.std[channel], abs=0.5001e-4)


def small_dataset(root, **settings):
    settings = DataSettings(dataset="cifar100", root=str(root), **settings)
    return make_dataset(settings, DATASETS["cifar100"], *read_cifar("cifar100", root))


def require_limits(root, train_images, test_images):
    """Counts, balance and which samples are taken, for a root with either the real or a small CIFAR-100."""
    whole = small_dataset(root)
    assert (len(whole.train), len(whole.evaluation), whole.evaluated_on) == (train_images, test_images, "test")
    held = train_images // 5
    part = small_dataset(root, train_limit=300, val_limit=100, holdout=held, seed=1)
    assert (len(part.train), len(part.evaluation), part.evaluated_on) == (300, 100, "holdout")
    assert set(np.bincount(part.train.labels, minlength=100)) == {3}
    assert set(np.bincount(part.evaluation.labels, minlength=100)) == {1}
    assert not set(part.train.ids.tolist()) & set(part.evaluation.ids.tolist())
    for split in (part.train, part.evaluation):
        np.testing.assert_array_equal(split.images_NHWC, whole.train.images_NHWC[split.ids])
        np.testing.assert_array_equal(split.labels, whole.train.labels[split.ids])
    # The hash is of the whole training set, so that a part of it keeps its own settings as its name.
    assert part.train_hash == whole.train_hash
    assert part.evaluation.content_hash != whole.evaluation.content_hash
    # All runs of a sweep select on the same images, whatever their seed.
    all_held = small_dataset(root, holdout=held)
    assert len(all_held.train) + len(all_held.evaluation) == train_images
    np.testing.assert_array_equal(
        all_held.evaluation.ids, small_dataset(root, holdout=held, seed=2, augment="none").evaluation.ids
    )


def test_limits_and_holdout(fake_cifar100):
    require_limits(fake_cifar100, 600, 200)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"train_limit": 601}, "data.train_limit = 601: class 0 has 6 images, 7 are wanted"),
        ({"val_limit": 300}, "data.val_limit = 300"),
        ({"holdout": 601}, "data.holdout = 601"),
        ({"holdout": 100, "train_limit": 600}, "data.train_limit = 600: class 0 has 5 images, 6 are wanted"),
    ],
)
def test_a_limit_that_is_too_large_is_refused(fake_cifar100, settings, named):
    with pytest.raises(UserError, match="give a smaller number") as caught:
        small_dataset(fake_cifar100, **settings)
    assert named in str(caught.value)


def test_augmentation_is_the_data_sets_own(fake_cifar100):
    assert small_dataset(fake_cifar100).crop == ShiftCrop(32, 32, 4, True)
    assert small_dataset(fake_cifar100, augment="none").crop == ShiftCrop(32, 32, 0, False)


def test_a_recipe_opens_its_data_set(fake_cifar100, write_recipe):
    path = write_recipe(data__dataset="cifar100", data__root=str(fake_cifar100), data__train_limit=200)
    opened = open_dataset(read_recipe([f"--cfg={path}"]))
    assert (len(opened.train), len(opened.evaluation)) == (200, 200)
    assert opened.class_names[99] == "class_99"


@pytest.fixture(scope="module")
def real_cifar100(cifar100_root):
    return read_cifar("cifar100", cifar100_root)


@pytest.mark.cifar100
def test_real_cifar100_is_what_the_facts_say(real_cifar100):
    train, test, names = real_cifar100
    facts = DATASETS["cifar100"]
    assert (len(train), len(test)) == (facts.train_images, facts.test_images) == (50_000, 10_000)
    assert set(np.bincount(train.labels, minlength=100)) == {500}
    assert set(np.bincount(test.labels, minlength=100)) == {100}
    assert len(names) == facts.classes
    require_facts(train, facts)


@pytest.mark.cifar100
def test_real_cifar100_has_its_known_first_labels(real_cifar100):
    train, test, names = real_cifar100
    # The first images of the official files: a cow, a dinosaur, an apple; a mountain, a forest, a seal.
    assert [names[label] for label in train.labels[:3]] == ["cattle", "dinosaur", "apple"]
    assert [names[label] for label in test.labels[:3]] == ["mountain", "forest", "seal"]
    assert names[:2] == ("apple", "aquarium_fish")
    assert names[-1] == "worm"
    # A clear sky or a white ground: the first image begins with white pixels.
    assert train.images_NHWC[0, 0, :3].min() == 255


@pytest.mark.cifar100
def test_real_limits_and_holdout(cifar100_root):
    require_limits(cifar100_root, 50_000, 10_000)


@pytest.mark.cifar100
def test_a_limit_of_the_real_set_that_is_too_large(cifar100_root):
    with pytest.raises(UserError, match=r"data\.train_limit = 50001: class 0 has 500 images, 501 are wanted"):
        small_dataset(cifar100_root, train_limit=50_001)
