"""One contract, every loader: the same samples in the same order under the same views, whatever executes them."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import sys
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import encode, photograph, ramp
from PIL import Image

from fastgen.config import DataSettings, hash_of
from fastgen.crops import JitterPolicy, ResizedCrop, ShiftCrop
from fastgen.data.beton import JPEG, RAW, BetonWriter, Sample, page_bytes_for, read_beton
from fastgen.data.dali_loader import DaliLoader, export_pipeline
from fastgen.data.digits import read_digits
from fastgen.data.facts import DATASETS
from fastgen.data.ffcv_loader import FfcvLoader
from fastgen.data.folder import FolderLoader
from fastgen.data.manifest import DIGEST_BYTES, Manifest, read_manifest, to_bytes
from fastgen.data.photographs import read_photographs
from fastgen.data.resident import ResidentLoader
from fastgen.data.small_beton import read_small_betons
from fastgen.data.split import FileSplit, Split
from fastgen.data.synthetic import SyntheticLoader
from fastgen.errors import MachineError, UserError
from fastgen.views import Share, evaluation_views, training_views

pytestmark = pytest.mark.timeout(120)

CPU = torch.device("cpu")
CLASSES = ("ant", "bee", "cat")
# (height, width); 13 pictures: three batches of four and one of one.
SIZES = [(60 + 9 * n, 150 - 7 * n) for n in range(13)]
STAND_IN, GREY = 4, 7
RANDOM_CROP = ResizedCrop(jitter=JitterPolicy(rotation_degrees=5.0, pixel_shift=3.0))

# Loaders of photographs: backend, what the .beton holds, its decoder.
PHOTO = {
    "folder": ("folder", None, None),
    "dali": ("dali", None, None),
    "native jpeg": ("ffcv", "jpeg", "native"),
    "native raw": ("ffcv", "raw", "native"),
    "ffcv jpeg": ("ffcv", "jpeg", "ffcv"),
    "ffcv raw": ("ffcv", "raw", "ffcv"),
}
FILES = ("folder", "dali")


@dataclass(frozen=True)
class Pictures:
    """A small data set in every form, and the pixels it must show."""

    manifest: Manifest
    betons: dict[str, Path]
    pixels: list[np.ndarray]


def sample(pixels, stored, mode, label):
    """A picture as it lies in a .beton, at its own size."""
    size = pixels.shape[:2]
    return Sample(stored, mode, size, size, label, zlib.crc32(stored))


def write_beton(path, samples):
    """A .beton of these samples."""
    with open(path, "wb") as file:
        writer = BetonWriter(file, len(samples), page_bytes_for(max(len(entry.stored) for entry in samples)))
        for entry in samples:
            writer.add(entry)
        writer.finish()
    return path


def make_manifest(folder, names, labels, sizes, stand_ins=None, classes=CLASSES):
    """The manifest of files in a folder."""
    contents = [(folder / name).read_bytes() for name in names]
    beside = [(stand_ins or {}).get(name, "") for name in names]
    digests = [hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest() for content in contents]
    return Manifest(
        folder=folder,
        class_names=tuple(classes),
        paths=np.array([name.encode() for name in names]),
        stand_ins=np.array([name.encode() for name in beside]),
        labels=np.array(labels, np.int64),
        heights=np.array([height for height, _ in sizes], np.int32),
        widths=np.array([width for _, width in sizes], np.int32),
        modes=np.array([b"RGB"] * len(names)),
        file_bytes=np.array([len(content) for content in contents], np.int64),
        digests=np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST_BYTES),
        conditions=np.zeros(len(names), np.uint8),
        stand_in_folder=folder / "stand_ins" if stand_ins else None,
    )


def write_pictures(folder, pictures, **options):
    """Writes pixels as files and as .beton; two of the files are not plain RGB JPEGs."""
    (folder / "stand_ins").mkdir(parents=True)
    names, samples, shown = [], {"jpeg": [], "raw": []}, []
    for number, pixels in enumerate(pictures):
        content = encode(pixels, **{"quality": 90, "subsampling": ("4:4:4", "4:2:0")[number % 2]} | options)
        if number == GREY:
            content = encode(pixels, mode="L")
        names.append(f"{number}.JPEG")
        (folder / names[-1]).write_bytes(content)
        decoded = np.asarray(Image.open(folder / names[-1]).convert("RGB"))
        as_raw = sample(decoded, decoded.tobytes(), RAW, number % len(CLASSES))
        samples["raw"].append(as_raw)
        samples["jpeg"].append(sample(decoded, content, JPEG, number % len(CLASSES)))
        if number == STAND_IN:
            # The file is something that no loader may look at; a copy stands in for it.
            (folder / "stand_ins" / "4.png").write_bytes(encode(decoded, "PNG"))
            (folder / names[-1]).write_bytes(encode(pixels, mode="CMYK"))
            samples["jpeg"][-1] = as_raw
        shown.append(decoded)
    labels = [number % len(CLASSES) for number in range(len(names))]
    sizes = [pixels.shape[:2] for pixels in pictures]
    manifest = make_manifest(folder, names, labels, sizes, {names[STAND_IN]: "4.png"})
    betons = {kind: write_beton(folder / f"{kind}.beton", entries) for kind, entries in samples.items()}
    return Pictures(manifest, betons, shown)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """13 soft pictures of 13 sizes."""
    made = [photograph(n, *size) for n, size in enumerate(SIZES)]
    return write_pictures(tmp_path_factory.mktemp("pictures"), made)


@pytest.fixture(scope="module")
def ramps(tmp_path_factory):
    """Pictures whose pixels tell where they are; a step of a pixel is 0.85 levels."""
    made = [ramp(300, 300) for _ in range(9)]
    return write_pictures(tmp_path_factory.mktemp("ramps"), made, subsampling="4:4:4")


@pytest.fixture
def own_pictures(tmp_path):
    """Five pictures that a test may damage."""
    return write_pictures(tmp_path / "own", [photograph(n, *size) for n, size in enumerate(SIZES[:5])])


def file_split(index):
    """All samples of a manifest or .beton."""
    return FileSplit(index, index.labels, np.arange(len(index), dtype=np.int64), index.sizes, "hash")


def photo_loader(name, pictures, *, workers=2, ahead=2, keep=None, device=CPU):
    """A loader of photographs, of all of them or those in `keep`."""
    backend, kind, decoder = PHOTO[name]
    if decoder == "ffcv":
        pytest.importorskip("ffcv")
    settings = DataSettings(dataset="imagenet", backend=backend, workers=workers, batches_ahead=ahead)
    if decoder:
        settings = replace(settings, beton_decoder=decoder)
    split = file_split(read_beton(pictures.betons[kind]) if kind else pictures.manifest)
    split = split if keep is None else split.at(np.array(keep))
    return {"folder": FolderLoader, "dali": DaliLoader, "ffcv": FfcvLoader}[backend](split, settings, device)


def photo_views(pictures, epoch=0, side=48, keep=None):
    """Views of one epoch of the pictures."""
    ids = np.arange(len(pictures.manifest)) if keep is None else np.array(keep)
    sizes = pictures.manifest.sizes[ids]
    return training_views(ids, RANDOM_CROP, 7, 0, epoch, sizes=sizes, resolution_px=side)


def pixels_of(batches) -> np.ndarray:
    """All images of some batches, uint8 (N, H, W, C)."""
    return torch.cat([batch.images_NCHW for batch in batches]).permute(0, 2, 3, 1).numpy()


def ids_of(batches) -> list[int]:
    """Sample ids in the order in which they came."""
    return [int(sample_id) for batch in batches for sample_id in batch.ids]


def by_pillow(pixels, row, side, flip=None):
    """A view by Pillow alone."""
    top, left, height, width, mirrored = row.tolist()
    window = Image.fromarray(pixels).crop((left, top, left + width, top + height))
    view = np.asarray(window.resize((side, side), Image.Resampling.BILINEAR))
    return view[:, ::-1] if (mirrored if flip is None else flip) else view


def expected_by_pillow(pictures, views):
    """The views of an epoch in its order, by Pillow, float (N, H, W, 3)."""
    return np.stack([by_pillow(pictures.pixels[n], views.table[n], views.height_px) for n in views.order]).astype(float)


@pytest.fixture(params=list(PHOTO))
def photo(request):
    """Name of a loader of photographs."""
    return request.param


class TestPhotographs:
    def test_batches_hold_what_the_contract_says(self, photo, pictures):
        loader, views = photo_loader(photo, pictures), photo_views(pictures)
        assert len(loader) == 13
        batches = list(loader.batches(views, 4))
        assert [len(batch.labels) for batch in batches] == [4, 4, 4, 1]
        assert ids_of(batches) == views.order.tolist()
        for number, batch in enumerate(batches):
            positions = views.order[4 * number : 4 * number + 4]
            assert batch.images_NCHW.dtype == torch.uint8
            assert batch.images_NCHW.shape[1:] == (3, 48, 48)
            assert batch.images_NCHW.is_contiguous(memory_format=torch.channels_last)
            assert batch.labels.dtype == batch.ids.dtype == torch.int64
            assert batch.labels.tolist() == pictures.manifest.labels[positions].tolist()
            assert np.array_equal(batch.jitter.numpy(), views.jitter[positions])

    def test_part_of_a_split_keeps_its_ids(self, photo, pictures):
        keep = [11, 2, 5, 8]
        loader, views = photo_loader(photo, pictures, keep=keep), photo_views(pictures, keep=keep)
        batches = list(loader.batches(views, 3))
        assert ids_of(batches) == [keep[position] for position in views.order]
        whole = photo_views(pictures)
        first = pixels_of(photo_loader(photo, pictures).batches(replace(whole, order=np.array(keep)), 4))
        rows = {keep[position]: image for position, image in zip(views.order, pixels_of(batches), strict=True)}
        # The row of a sample depends on the sample alone, so the part shows what the whole shows.
        assert all(np.array_equal(rows[sample_id], image) for sample_id, image in zip(keep, first, strict=True))

    def test_two_ranks_make_the_global_batches(self, photo, pictures):
        loader, views = photo_loader(photo, pictures), photo_views(pictures)
        whole = list(loader.batches(views, 4))
        shares = [list(loader.batches(views, 4, share=Share(rank, 2))) for rank in range(2)]
        # The last batch is of one sample: nothing of it is for the first rank.
        assert [len(share) for share in shares] == [3, 4]
        for number, batch in enumerate(whole):
            parts = [share[number] for share in shares if number < len(share)]
            assert ids_of(parts) == batch.ids.tolist()
            assert np.array_equal(pixels_of(parts), pixels_of([batch]))

    def test_stop_and_resume_in_the_middle(self, photo, pictures):
        loader, views = photo_loader(photo, pictures), photo_views(pictures)
        whole = list(loader.batches(views, 4))
        iterator = loader.batches(views, 4)
        begun = [next(iterator)]
        iterator.close()
        resumed = begun + list(loader.batches(views, 4, first_batch=1))
        assert ids_of(resumed) == ids_of(whole)
        assert np.array_equal(pixels_of(resumed), pixels_of(whole))
        assert list(loader.batches(views, 4, first_batch=4)) == []

    def test_other_epochs_and_resolutions(self, photo, pictures):
        loader = photo_loader(photo, pictures)
        kept = []
        for epoch, side in ((0, 48), (1, 48), (2, 80), (3, 32)):
            views = photo_views(pictures, epoch, side)
            batches = list(loader.batches(views, 5))
            assert ids_of(batches) == views.order.tolist()
            fresh = pixels_of(photo_loader(photo, pictures).batches(views, 5))
            kept.append((batches, fresh))
        # All batches were kept until here: none was written over, none by another epoch.
        assert all(np.array_equal(pixels_of(batches), fresh) for batches, fresh in kept)

    def test_workers_and_batches_ahead_change_nothing(self, photo, pictures):
        views = photo_views(pictures)
        one = pixels_of(photo_loader(photo, pictures, workers=1, ahead=1).batches(views, 4))
        for workers, ahead in ((2, 1), (4, 5)):
            loader = photo_loader(photo, pictures, workers=workers, ahead=ahead)
            assert np.array_equal(pixels_of(loader.batches(views, 4)), one)
        assert np.array_equal(pixels_of(photo_loader(photo, pictures).batches(views, 13)), one)

    def test_two_iterators_at_once(self, photo, pictures):
        loader, other = photo_loader(photo, pictures), photo_loader(photo, pictures)
        views = photo_views(pictures)
        expected = pixels_of(loader.batches(views, 4))
        three = [loader.batches(views, 4), other.batches(views, 4), loader.batches(views, 4)]
        together = [[next(iterator) for iterator in three] for _ in range(4)]
        for column in zip(*together, strict=True):
            assert np.array_equal(pixels_of(column), expected)

    def test_draws_nothing_from_global_generators(self, photo, pictures):
        before = torch.get_rng_state(), np.random.get_state()[1].tobytes(), signal.getsignal(signal.SIGCHLD)
        loader = photo_loader(photo, pictures)
        list(loader.batches(photo_views(pictures), 4))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.random.get_state()[1].tobytes() == before[1]
        assert signal.getsignal(signal.SIGCHLD) == before[2]

    def test_refuses_views_that_are_not_its_own(self, photo, pictures):
        loader, views = photo_loader(photo, pictures), photo_views(pictures)
        outside = views.table.copy()
        outside[3, 0] = SIZES[3][0]
        wrong = [
            replace(views, table=outside),
            replace(views, table=views.table[:5], order=np.arange(5)),
            replace(views, order=np.array([13])),
            replace(views, order=np.array([-1])),
        ]
        for refused in wrong:
            with pytest.raises(ValueError, match=r"position 3|samples"):
                list(loader.batches(refused, 4))
        assert ids_of(loader.batches(views, 4)) == views.order.tolist()

    def test_evaluation_views(self, photo, pictures):
        views = evaluation_views(np.arange(13), RANDOM_CROP, sizes=pictures.manifest.sizes, resolution_px=40)
        batches = list(photo_loader(photo, pictures).batches(views, 6))
        assert ids_of(batches) == list(range(13))
        assert all(batch.jitter is None for batch in batches)

    def test_pixels(self, photo, pictures):
        for epoch, side in ((0, 48), (1, 112)):
            views = photo_views(pictures, epoch, side)
            found = pixels_of(photo_loader(photo, pictures).batches(views, 4)).astype(float)
            if photo.startswith("ffcv"):
                expected, largest, mean = self.area(pictures, views), *((0, 0) if "raw" in photo else (20, 2))
            else:
                # Pillow rounds between its two passes; DALI repeats the edge where Pillow leaves it out.
                expected = expected_by_pillow(pictures, views)
                largest, mean = {"folder": (0, 0), "dali": (8, 0.3)}.get(photo, (1, 0.3))
            difference = np.abs(found - expected)
            assert difference.max() <= largest
            assert difference.mean(axis=(1, 2, 3)).max() <= mean
            if photo == "dali":
                assert difference[:, 1:-1, 1:-1].max() <= 1

    @staticmethod
    def area(pictures, views):
        """FFCV's resampling: OpenCV's area filter on Pillow's crop."""
        cv2 = pytest.importorskip("cv2")
        shown = []
        for position in views.order:
            top, left, height, width, flip = views.table[position].tolist()
            window = np.ascontiguousarray(pictures.pixels[position][top : top + height, left : left + width])
            view = cv2.resize(window, (views.width_px, views.height_px), interpolation=cv2.INTER_AREA)
            shown.append(view[:, ::-1] if flip else view)
        return np.stack(shown).astype(float)

    def test_geometry(self, photo, ramps):
        # On ramps a view that is wrong by one pixel has another mean; on photographs it would hide in the tolerance.
        loader, largest = photo_loader(photo, ramps), 0.0
        if photo == "ffcv jpeg":
            # Its fast inverse DCT is off by more than a level in the mean, wherever the crop lies.
            ramps = replace(ramps, pixels=[self.by_fast_dct(ramps, n) for n in range(9)])
        for epoch in range(3):
            views = photo_views(ramps, epoch, 64)
            found, expected = pixels_of(loader.batches(views, 4)).astype(float), expected_by_pillow(ramps, views)
            largest = max(largest, np.abs((found - expected).mean(axis=(1, 2))).max())
            mirrored = np.abs(found - expected[:, :, ::-1]).mean(axis=(1, 2, 3))
            assert (mirrored > 4 * np.abs(found - expected).mean(axis=(1, 2, 3)) + 4).all(), "a missed flip would pass"
        assert largest < 0.4

    @staticmethod
    def by_fast_dct(pictures, number):
        """A stored picture as FFCV's decoder shows it."""
        simplejpeg = pytest.importorskip("simplejpeg")
        beton = read_beton(pictures.betons["jpeg"])
        if beton.modes[number] == RAW:
            return pictures.pixels[number]
        return simplejpeg.decode_jpeg(beton.bytes_of(number).tobytes(), "RGB", fastdct=True)

    def test_geometry_would_be_noticed(self, ramps):
        views = photo_views(ramps, side=64)
        for column in (0, 1):
            movable = views.table[:, column] > 0
            assert movable.sum() > 4
            shifted = views.table.copy()
            shifted[movable, column] -= 1
            other = expected_by_pillow(ramps, replace(views, table=shifted))
            difference = np.abs((other - expected_by_pillow(ramps, views)).mean(axis=(1, 2))).max(axis=1)
            # In grey, red and blue cancel out: that picture tells less.
            assert difference[movable[views.order] & (views.order != GREY)].min() > 0.7


class TestFilesThatChange:
    @staticmethod
    def change(path, how):
        """Changes a file after the manifest was made."""
        content = path.read_bytes()
        smaller = encode(photograph(1, 20, 20), quality=30)
        changed = {
            "empty": b"",
            "text": b"<html>404 not found</html>",
            "text_of_the_same_length": b"not found ".ljust(len(content), b"!"),
            "truncated": content[: len(content) // 2],
            "smaller": smaller,
            "smaller_of_the_same_length": smaller.ljust(len(content), b"\0"),
            # Large enough for every view: only the number of bytes tells.
            "another_picture": encode(photograph(99, 200, 200)),
            "header_alone": content[:30].ljust(len(content), b"\0"),
        }
        if how == "missing":
            path.unlink()
        elif how == "a_folder":
            path.unlink()
            path.mkdir()
        else:
            path.write_bytes(changed[how])
        return content

    @pytest.mark.parametrize("name", FILES)
    @pytest.mark.parametrize(
        "how",
        [
            "missing", "a_folder", "empty", "text", "text_of_the_same_length", "truncated", "smaller",
            "smaller_of_the_same_length", "header_alone", "another_picture",
        ],
    )  # fmt: skip
    def test_is_named_and_the_loader_lives_on(self, name, how, own_pictures):
        loader, views = photo_loader(name, own_pictures), photo_views(own_pictures)
        expected = pixels_of(loader.batches(views, 1))
        path = own_pictures.manifest.file(int(views.order[3]))
        content = self.change(path, how)
        iterator = loader.batches(views, 1)
        good = [next(iterator) for _ in range(3)]
        with pytest.raises(UserError, match="has changed since the manifest was made") as caught:
            next(iterator)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        if how == "a_folder":
            path.rmdir()
        path.write_bytes(content)
        assert np.array_equal(pixels_of(good), expected[:3])
        assert np.array_equal(pixels_of(loader.batches(views, 1)), expected)

    @pytest.mark.parametrize("name", FILES)
    def test_a_stand_in_is_a_file_like_others(self, name, own_pictures):
        loader, views = photo_loader(name, own_pictures), photo_views(own_pictures)
        # The original is not read: neither its content nor its size counts.
        (own_pictures.manifest.folder / own_pictures.manifest.name(STAND_IN)).write_bytes(b"")
        list(loader.batches(views, 2))
        own_pictures.manifest.file(STAND_IN).write_bytes(b"no picture")
        with pytest.raises(UserError, match=r"4\.png"):
            list(loader.batches(views, 2))

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    @pytest.mark.parametrize("name", FILES)
    def test_permission(self, name, own_pictures):
        own_pictures.manifest.file(0).chmod(0)
        with pytest.raises(UserError, match="Permission denied"):
            list(photo_loader(name, own_pictures).batches(photo_views(own_pictures), 2))

    @pytest.mark.parametrize("name", ["native jpeg", "ffcv jpeg"])
    def test_damaged_beton(self, name, own_pictures):
        loader, views = photo_loader(name, own_pictures), photo_views(own_pictures)
        beton = read_beton(own_pictures.betons["jpeg"])
        with open(beton.path, "r+b") as file:
            file.seek(int(beton.pointers[2]))
            file.write(bytes(int(beton.stored_bytes[2])))
        with pytest.raises(UserError, match=r"jpeg\.beton: sample 2"):
            list(loader.batches(views, 2))

    def test_killed_worker(self, pictures):
        views = photo_views(pictures)
        views = replace(views, order=np.tile(views.order, 20))
        iterator = photo_loader("folder", pictures, workers=2, ahead=1).batches(views, 4)
        next(iterator)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        with pytest.raises(MachineError, match="was killed") as caught:
            list(iterator)
        assert "\n" not in str(caught.value)

    def test_no_worker_is_left(self, pictures):
        loader, views = photo_loader("folder", pictures), photo_views(pictures)
        iterator = loader.batches(views, 2)
        next(iterator)
        assert multiprocessing.active_children()
        iterator.close()
        assert not multiprocessing.active_children()


@pytest.fixture(scope="module")
def small():
    """A set like CIFAR: 21 colour images of 16x12 pixels."""
    random = np.random.default_rng(5)
    images = random.integers(0, 256, (21, 16, 12, 3), dtype=np.uint8)
    return Split(images, random.integers(0, 10, 21), np.arange(100, 121))


SMALL = ("folder", "dali", "native", "ffcv")
SMALL_CROP = ShiftCrop(16, 12, 4, True, JitterPolicy(rotation_degrees=5.0))


def small_loader(name, split, folder, workers=2):
    """A loader of images of one size."""
    settings = DataSettings(dataset="cifar10", backend="folder", workers=workers)
    if name == "resident":
        return ResidentLoader(split, 4, CPU)
    if name in FILES:
        return {"folder": FolderLoader, "dali": DaliLoader}[name](split, settings, CPU)
    if name == "ffcv":
        pytest.importorskip("ffcv")
    entries = [sample(i, i.tobytes(), RAW, int(n)) for i, n in zip(split.images_NHWC, split.labels, strict=True)]
    index = file_split(read_beton(write_beton(folder / "small.beton", entries)))
    return FfcvLoader(replace(index, sizes=split.sizes), replace(settings, beton_decoder=name), CPU)


class TestSmallImages:
    @pytest.mark.parametrize("name", SMALL)
    def test_equal_the_resident_loader(self, name, small, tmp_path):
        resident, loader = small_loader("resident", small, tmp_path), small_loader(name, small, tmp_path)
        for epoch in range(3):
            views = training_views(small.ids, SMALL_CROP, 3, 0, epoch)
            expected, found = list(resident.batches(views, 8)), list(loader.batches(views, 8))
            assert np.array_equal(pixels_of(found), pixels_of(expected))
            for one, other in zip(found, expected, strict=True):
                assert torch.equal(one.labels, other.labels)
                assert torch.equal(one.jitter, other.jitter)
                assert one.images_NCHW.stride() == other.images_NCHW.stride()
        positions = [sample_id - 100 for sample_id in ids_of(expected)]
        assert ids_of(found) == (ids_of(expected) if name in FILES else positions)

    @pytest.mark.parametrize("name", FILES)
    def test_grey_digits(self, name, tmp_path):
        pytest.importorskip("sklearn")
        split = read_digits()[0].at(np.arange(50))
        views = training_views(split.ids, ShiftCrop(8, 8, 1, True), 3, 0, 0)
        expected = list(ResidentLoader(split, 1, CPU).batches(views, 16))
        found = list(small_loader(name, split, tmp_path).batches(views, 16))
        assert found[0].images_NCHW.shape == (16, 1, 8, 8)
        assert ids_of(found) == ids_of(expected)
        assert np.array_equal(pixels_of(found), pixels_of(expected))

    @pytest.mark.parametrize("name", ["resident", *SMALL])
    def test_shares_and_resume(self, name, small, tmp_path):
        loader = small_loader(name, small, tmp_path)
        views = training_views(small.ids, SMALL_CROP, 3, 0, 0)
        whole = list(loader.batches(views, 8))
        shares = [list(loader.batches(views, 8, first_batch=1, share=Share(rank, 2))) for rank in range(2)]
        for number, batch in enumerate(whole[1:]):
            parts = [share[number] for share in shares]
            assert ids_of(parts) == batch.ids.tolist()
            assert np.array_equal(pixels_of(parts), pixels_of([batch]))

    @pytest.mark.parametrize("name", FILES)
    def test_refuses_views_that_are_not_its_own(self, name, small, tmp_path):
        loader = small_loader(name, small, tmp_path)
        views = training_views(small.ids, SMALL_CROP, 3, 0, 0)
        far, other = views.table.copy(), views.table.copy()
        far[3, 1], other[3, 2] = 12, 15
        for refused in (
            replace(views, table=far),
            replace(views, table=other),
            replace(views, order=np.array([21])),
            replace(views, height_px=32, width_px=32),
        ):
            with pytest.raises(ValueError, match=r"position|samples"):
                list(loader.batches(refused, 4))

    def test_synthetic(self):
        loader = SyntheticLoader(13, replace(DATASETS["imagenet"], classes=3), CPU)
        views = training_views(
            np.arange(13), RANDOM_CROP, 7, 0, 0, sizes=np.full((13, 2), 90, np.int32), resolution_px=32
        )
        batches = list(loader.batches(views, 4, first_batch=1, share=Share(1, 2)))
        assert ids_of(batches) == [*views.order[6:8].tolist(), *views.order[10:12].tolist(), views.order[12]]
        assert batches[0].images_NCHW.shape == (2, 3, 32, 32)
        assert batches[0].jitter.shape == (2, 4)
        assert batches[0].images_NCHW.is_contiguous(memory_format=torch.channels_last)


class TestDali:
    def test_exported_pipeline(self, pictures, tmp_path):
        dali = pytest.importorskip("nvidia.dali")
        path = tmp_path / "pictures.dali"
        export_pipeline(pictures.manifest, path, batch_size=13)
        pipeline = dali.Pipeline.deserialize(filename=str(path), num_threads=2)
        views, ids = photo_views(pictures), np.arange(13)
        names = [os.fsencode(pictures.manifest.file(n)) for n in ids]
        pipeline.feed_input("path", [np.frombuffer(name, np.uint8) for name in names])
        pipeline.feed_input("start", views.table[ids, 0:2])
        pipeline.feed_input("shape", views.table[ids, 2:4])
        pipeline.feed_input("size", np.where(views.table[ids, 4:5], [48, -48], [48, 48]).astype(np.float32))
        images, file_bytes = pipeline.run()
        in_order = replace(views, order=ids)
        expected = pixels_of(photo_loader("dali", pictures).batches(in_order, 13))
        assert np.array_equal(images.as_array(), expected)
        own = ids != STAND_IN
        assert np.array_equal(file_bytes.as_array().ravel()[own], pictures.manifest.file_bytes[own])
        if not torch.cuda.is_available():
            with pytest.raises(UserError, match="give decoder=cpu"):
                export_pipeline(pictures.manifest, path, decoder="gpu")
        with pytest.raises(UserError, match="there is no pipeline"):
            export_pipeline(replace(pictures.manifest, folder=None), path)

    def test_larger_batches_later(self, pictures):
        loader, views = photo_loader("dali", pictures), photo_views(pictures)
        small = pixels_of(loader.batches(views, 2))
        assert np.array_equal(pixels_of(loader.batches(views, 13)), small)
        assert np.array_equal(pixels_of(loader.batches(views, 3)), small)

    def test_missing_package(self, pictures, monkeypatch):
        monkeypatch.setitem(sys.modules, "nvidia.dali", None)
        with pytest.raises(UserError, match=r"pip install nvidia-dali-cuda120$"):
            photo_loader("dali", pictures)

    def test_gpu_decoder_without_gpu(self, pictures):
        settings = DataSettings(dataset="imagenet", backend="dali", dali_decoder="gpu")
        with pytest.raises(UserError, match=r"data\.dali_decoder=cpu"):
            DaliLoader(file_split(pictures.manifest), settings, CPU)

    def test_failure_without_a_culprit(self, pictures, monkeypatch):
        loader, views = photo_loader("dali", pictures), photo_views(pictures)
        monkeypatch.setattr("fastgen.data.dali_loader.require_views", lambda split, views: None)
        outside = views.table.copy()
        outside[views.order[5], 0] = 5000
        with pytest.raises(MachineError, match="cropping window") as caught:
            list(loader.batches(replace(views, table=outside), 4))
        assert str(views.order[4:8].tolist()) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert ids_of(loader.batches(views, 4)) == views.order.tolist()

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
    @pytest.mark.parametrize("decoder", ["cpu", "gpu"])
    def test_on_a_gpu(self, decoder, ramps):
        device = torch.device("cuda")
        settings = DataSettings(dataset="imagenet", backend="dali", dali_decoder=decoder, workers=2)
        loader = DaliLoader(file_split(ramps.manifest), settings, device)
        for epoch in range(3):
            views = photo_views(ramps, epoch, 64)
            batches = list(loader.batches(views, 4))
            assert all(batch.images_NCHW.device.type == "cuda" for batch in batches)
            assert ids_of(batches) == views.order.tolist()
            found = torch.cat([batch.images_NCHW.cpu() for batch in batches]).permute(0, 2, 3, 1).numpy().astype(float)
            assert np.abs((found - expected_by_pillow(ramps, views)).mean(axis=(1, 2))).max() < 0.4


@pytest.fixture
def root(tmp_path):
    """A data set of photographs as `data_prep` leaves it: train and val, as manifests and as .beton files."""
    for part, count in (("train", 7), ("val", 5)):
        made = write_pictures(tmp_path / part, [photograph(n, 40, 50) for n in range(count)])
        (tmp_path / f"{part}.manifest").write_bytes(to_bytes(made.manifest, tmp_path / f"{part}.manifest"))
        os.replace(made.betons["jpeg"], tmp_path / f"{part}.beton")
        write_beside(tmp_path / f"{part}.beton", made.manifest)
    return tmp_path


def write_beside(path, manifest):
    """The manifest beside a .beton."""
    beside = replace(
        manifest, folder=None, stand_in_folder=None, header={"beton_index_hash": read_beton(path).index_hash}
    )
    place = Path(f"{path}.manifest")
    place.write_bytes(to_bytes(beside, place))


def rewrite(path, **changes):
    """Changes columns of a manifest file."""
    path.write_bytes(to_bytes(replace(read_manifest(path), **changes), path))


def settings_for(root, backend):
    """Settings of a data set of photographs."""
    return DataSettings(dataset="imagenet", root=str(root), backend=backend)


class TestReadPhotographs:
    @pytest.mark.parametrize("backend", ["folder", "dali", "ffcv", "synthetic"])
    def test_reads(self, backend, root):
        found = read_photographs(settings_for(root, backend), 3)
        assert (len(found.train), len(found.test)) == (7, 5)
        assert found.class_names == CLASSES
        index = read_beton(root / "train.beton") if backend == "ffcv" else None
        content = read_manifest(root / "train.manifest").data_hash if index is None else index.index_hash
        assert found.train.index_hash == hash_of([content, 3])
        assert found.train.sizes.tolist() == [[40, 50]] * 7
        assert found.train.ids.tolist() == list(range(7))
        assert found.pixels

    def test_pixels_tell_what_makes_them(self, root):
        names = {
            backend: read_photographs(settings_for(root, backend), 3).pixels for backend in ("folder", "dali", "ffcv")
        }
        assert names["folder"] == "Pillow bilinear"
        assert names["dali"] == "DALI linear, cpu decoder"
        assert names["ffcv"] == ".beton, triangle filter"

    def test_beton_that_ffcv_wrote(self, root):
        for part in ("train", "val"):
            (root / f"{part}.beton.manifest").unlink()
        found = read_photographs(settings_for(root, "ffcv"), 3)
        assert found.class_names == ("0", "1", "2")
        # The stored pixels name it, whether its manifest is there or not.
        assert found.train.index_hash == hash_of([read_beton(root / "train.beton").index_hash, 3])

    def test_beton_of_other_classes(self, root):
        for part in ("train", "val"):
            (root / f"{part}.beton.manifest").unlink()
        pixels = photograph(0, 40, 50)
        write_beton(root / "train.beton", [sample(pixels, encode(pixels), JPEG, label) for label in (0, 1, 0)])
        with pytest.raises(UserError, match="sample 2 has label 2, there are the classes 0 to 1"):
            read_photographs(settings_for(root, "ffcv"), 2)

    @pytest.mark.parametrize(
        ("backend", "missing", "told"),
        [
            (
                "folder",
                "train.manifest",
                "python -m data_prep.manifest --source={root}/train --out={root}/train.manifest",
            ),
            ("dali", "val.manifest", "python -m data_prep.manifest --source={root}/val --out={root}/val.manifest"),
            ("ffcv", "val.beton", "python -m data_prep.beton --source={root}/val --out={root}/val.beton"),
        ],
    )
    def test_missing(self, backend, missing, told, root):
        (root / missing).unlink()
        with pytest.raises(UserError) as caught:
            read_photographs(settings_for(root, backend), 3)
        assert told.format(root=root) in str(caught.value)

    def test_k(self, root):
        with pytest.raises(UserError, match=r"gen\.k = 4: give 2 to 3"):
            read_photographs(settings_for(root, "folder"), 4)

    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"class_names": ("ant", "bee", "dog")}, "different classes .cat is only in the first"),
            ({"class_names": ("ant", "cat", "bee")}, "the same names in another order"),
            ({"labels": np.array([0, 1, 2, 3, 0])}, "labels outside|sample 3 has label 3"),
            ({"labels": np.array([0, -1, 2, 2, 0])}, "labels outside|sample 1 has label -1"),
            ({"folder": Path("/not/there")}, "/not/there, which is gone"),
            ({"stand_in_folder": Path("/not/there")}, "/not/there, which is gone"),
            ({"folder": None}, "names no files"),
        ],
    )
    def test_unfit_manifests(self, changes, told, root):
        rewrite(root / "val.manifest", **changes)
        with pytest.raises(UserError, match=told):
            read_photographs(settings_for(root, "folder"), 3)

    def test_empty_manifest(self, root):
        whole = read_manifest(root / "val.manifest")
        columns = ("paths", "stand_ins", "labels", "heights", "widths", "modes", "file_bytes", "digests", "conditions")
        rewrite(root / "val.manifest", **{name: getattr(whole, name)[:0] for name in columns})
        with pytest.raises(UserError, match="holds no pictures"):
            read_photographs(settings_for(root, "folder"), 3)

    def test_manifest_of_another_beton(self, root):
        os.replace(root / "val.beton.manifest", root / "train.beton.manifest")
        with pytest.raises(UserError, match=r"does not belong to the \.beton beside it"):
            read_photographs(settings_for(root, "ffcv"), 3)


class TestSmallBetons:
    FACTS = replace(DATASETS["cifar10"], train_images=12, test_images=6)

    @pytest.fixture
    def splits(self):
        """Training and test images like CIFAR-10's."""
        random = np.random.default_rng(3)
        counts = (12, 6)
        return [
            Split(random.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), random.integers(0, 10, n), np.arange(n))
            for n in counts
        ]

    @staticmethod
    def write(folder, splits, mode=RAW, labels=None):
        for part, split in zip(("train", "val"), splits, strict=True):
            numbers = split.labels if labels is None else labels[: len(split)]
            entries = [
                sample(image, image.tobytes() if mode == RAW else encode(image), mode, int(label))
                for image, label in zip(split.images_NHWC, numbers, strict=True)
            ]
            write_beton(folder / f"{part}.beton", entries)

    def test_same_hash_as_in_memory(self, splits, tmp_path):
        self.write(tmp_path, splits)
        train, test, names = read_small_betons(tmp_path, self.FACTS)
        assert [train.content_hash, test.content_hash] == [split.content_hash for split in splits]
        assert names == tuple("0123456789")
        assert train.labels.tolist() == splits[0].labels.tolist()

    def test_names_from_the_manifest_beside(self, splits, tmp_path, own_pictures):
        self.write(tmp_path, splits)
        folder, sizes = own_pictures.manifest.folder, [(32, 32)] * 12
        twelve = make_manifest(folder, ["0.JPEG"] * 12, splits[0].labels, sizes, classes="abcdefghij")
        write_beside(tmp_path / "train.beton", twelve)
        assert read_small_betons(tmp_path, self.FACTS)[2] == tuple("abcdefghij")
        write_beside(tmp_path / "train.beton", replace(twelve, class_names=tuple("abcdefghijk")))
        with pytest.raises(UserError, match="not of 10 classes"):
            read_small_betons(tmp_path, self.FACTS)

    def test_refuses_what_is_not_the_data_set(self, splits, tmp_path):
        with pytest.raises(UserError, match=r"train\.beton: is missing"):
            read_small_betons(tmp_path, self.FACTS)
        self.write(tmp_path, splits)
        with pytest.raises(UserError, match="holds 12 images, not 50,000"):
            read_small_betons(tmp_path, DATASETS["cifar10"])
        self.write(tmp_path, splits, labels=np.full(12, 10))
        with pytest.raises(UserError, match=r"labels outside 0\.\.9"):
            read_small_betons(tmp_path, self.FACTS)
        self.write(tmp_path, splits, mode=JPEG)
        with pytest.raises(UserError, match="holds JPEG"):
            read_small_betons(tmp_path, self.FACTS)
        wide = [replace(split, images_NHWC=split.images_NHWC[:, :, :30]) for split in splits]
        self.write(tmp_path, wide)
        with pytest.raises(UserError, match="30x32 pixels, not 32x32"):
            read_small_betons(tmp_path, self.FACTS)
