"""Whole runs on photographs: every backend trains, stops in the middle and resumes to the same bits."""

import importlib.util
import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from pictures import write_folder

from data_prep import beton, manifest
from fastgen.config import DataSettings
from fastgen.crops import ResizedCrop
from fastgen.data.beton import (
    ALLOCATION,
    FIELD,
    HEADER,
    IMAGE,
    IMAGE_FIELD,
    INT_FIELD,
    MIN_PAGE_BYTES,
    RAW,
    VERSION,
)  # fmt: skip
from fastgen.data.ffcv_loader import FfcvLoader
from fastgen.data.folder import FolderLoader
from fastgen.data.photographs import read_photographs
from fastgen.errors import Stopped, UserError
from fastgen.record import Recorder
from fastgen.train import main
from fastgen.views import training_views

RECIPE = """
data:
  dataset: imagenet
  resolution_px: 64
  start_resolution_px: 32
  resolution_ramp: [0.5, 0.5]
  rotation_degrees: 10
  pixel_shift: 20
model: {name: resnet18}
train: {epochs: 2, batch_size: 8, accumulate_steps: 2, lr: 0.01, lr_schedule: triangular, warmup_epochs: 1}
gen: {generations: 1, k: 3}
run: {device: cpu, log_every_steps: 2}
"""
ONE_EPOCH = ("--train.lr_schedule=steps", "--train.warmup_epochs=0")
BACKENDS = {
    "folder": "folder",
    "dali": "dali",
    "ffcv native": "ffcv",
    "ffcv decoder": "ffcv",
}


def require(backend):
    needed = {"dali": "nvidia.dali", "ffcv decoder": "ffcv"}.get(backend)
    if needed and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """train and val of 3 classes, as folders with manifests, and as .beton of raw pixels."""
    folder = tmp_path_factory.mktemp("photographs")
    for number, (part, per_class) in enumerate((("train", 7), ("val", 3))):
        source = write_folder(folder / part, classes=3, per_class=per_class, seed=number)
        manifest.main([f"--source={source}", f"--out={folder / part}.manifest", "--workers=1"])
        beton.main([f"--source={source}", f"--out={folder / part}.beton", "--mode=raw", "--workers=1"])
    return folder


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "photos.yaml"
    path.write_text(RECIPE)
    return path


def words_of(recipe, root, backend, folder, *more):
    decoder = ["--data.beton_decoder=ffcv"] if backend == "ffcv decoder" else []
    where = [f"--data.root={root}", f"--data.backend={BACKENDS[backend]}", f"--run.dir={folder / 'run'}"]
    return ["--cfg", str(recipe), *where, *decoder, *more]


def weights_of(folder, generation=1):
    return (folder / "run" / f"generation_{generation}" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_that_was_stopped_ends_like_one_that_was_not(recipe, root, backend, tmp_path, monkeypatch):
    require(backend)
    students = int(backend == "ffcv native")
    more = (f"--gen.generations={students}", "--run.eval_every_epochs=0")
    main(words_of(recipe, root, backend, tmp_path / "whole", "--data.workers=1", *more))
    stepped = Recorder.stepped

    def stop_in_the_middle(self, step):
        stepped(self, step)
        if step == 4:  # the first step of the second epoch's three
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Recorder, "stepped", stop_in_the_middle)
    stopped = words_of(recipe, root, backend, tmp_path / "stopped", "--data.workers=2", *more)
    with pytest.raises(Stopped):
        main(stopped)
    monkeypatch.undo()
    main(stopped)
    # The same weights, although the number of workers differs too.
    for generation in range(1 + students):
        assert weights_of(tmp_path / "stopped", generation) == weights_of(tmp_path / "whole", generation)
    results = json.loads((tmp_path / "stopped" / "run" / "results.json").read_text())
    assert [row["samples_evaluated"] for row in results["generations"]] == [9] * (1 + students)
    assert {row["backend"] for row in results["generations"]} == {BACKENDS[backend]}


def test_backends_that_resample_alike_give_other_nodes_all_the_same(recipe, root, capsys, tmp_path):
    """A node must not be taken from another backend whose pixels differ, were it by one level."""
    plans = set()
    for backend in BACKENDS:
        main(words_of(recipe, root, backend, tmp_path, "--run.dry=true"))
        plans.add(capsys.readouterr().out)
    assert len(plans) == len(BACKENDS)


def test_settings_of_the_view_decide_the_node(recipe, root, capsys, tmp_path):
    def plan(*more):
        main(words_of(recipe, root, "folder", tmp_path, "--run.dry=true", *more))
        return capsys.readouterr().out

    plain = plan()
    for setting in (
        "resolution_px=96", "start_resolution_px=48", "resolution_ramp=[0.2, 0.4]", "crop_area=[0.1, 1.0]",
        "crop_aspect=[1.0, 1.0]", "rotation_degrees=5", "pixel_shift=1", "augment=none", "train_limit=3", "holdout=3",
    ):  # fmt: skip
        assert plan(f"--data.{setting}") != plain, setting
    for setting in ("workers=7", "batches_ahead=9", "os_cache=false", "eval_resolution_px=80", "eval_crop_share=1.0"):
        assert plan(f"--data.{setting}") == plain, setting


def test_holdout_and_limits_work_on_files(recipe, root, tmp_path):
    main(
        words_of(
            recipe, root, "ffcv native", tmp_path, "--data.holdout=6", "--data.train_limit=12", "--gen.generations=0"
        )
    )
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["generations"][0]["samples_evaluated"] == 6


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("--gen.k=4", r"gen\.k = 4: give 2 to 3"),
        ("--data.train_limit=2", r"data\.train_limit = 2: give at least 3"),
        ("--data.holdout=30", r"data\.holdout = 30"),
        ("--data.backend=resident", "images of one size"),
        ("--model.downsample=pooled", r"model\.downsample"),
        ("--train.accumulate_steps=9", r"accumulate_steps = 9: give 1 to 8"),
        ("--train.warmup_epochs=2", r"warmup_epochs = 2"),
        ("--train.warmup_epochs=0", "triangular needs"),
        ("--data.crop_area=[0.5, 0.1]", r"data\.crop_area"),
        ("--data.resolution_px=4", r"data\.resolution_px = 4"),
        ("--data.rotation_degrees=-1", r"data\.rotation_degrees"),
    ],
)
def test_what_does_not_fit_is_one_line(recipe, root, tmp_path, setting, told):
    key = setting.partition("=")[0]
    words = [word for word in words_of(recipe, root, "folder", tmp_path) if not word.startswith(f"{key}=")]
    with pytest.raises(UserError, match=told):
        main([*words, setting])


def test_ids_of_beton_and_manifest_are_the_same_pictures(root):
    by_file = read_photographs(DataSettings(dataset="imagenet", backend="folder", root=str(root)), 2)
    packed = read_photographs(DataSettings(dataset="imagenet", backend="ffcv", root=str(root)), 2)
    for one, two in ((by_file.train, packed.train), (by_file.test, packed.test)):
        np.testing.assert_array_equal(one.labels, two.labels)
        np.testing.assert_array_equal(one.sizes, two.sizes)
        np.testing.assert_array_equal(one.ids, two.ids)
    assert by_file.class_names == packed.class_names


def test_the_ffcv_decoder_leaves_torchs_threads_alone():
    pytest.importorskip("ffcv")
    code = (
        "import torch; torch.set_num_threads(2); from fastgen.data.ffcv_loader import make_decoder; "
        "make_decoder('ffcv'); print(torch.get_num_threads())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2"


def raw_beton(path, images_NHWC, labels):
    """A .beton as FFCV's own writer makes it: image and label, nothing that tells of the pixels."""
    fields = np.zeros(2, FIELD)
    for number, (name, kind) in enumerate((("image", IMAGE_FIELD), ("label", INT_FIELD))):
        fields[number]["type_id"], fields[number]["name"][: len(name)] = kind, np.frombuffer(name.encode(), np.uint8)
    rows = np.zeros(len(labels), np.dtype([("", IMAGE), ("", "<i8")], align=True))
    table = np.zeros(len(labels), ALLOCATION)
    size, at = images_NHWC[0].nbytes, MIN_PAGE_BYTES
    for n, label in enumerate(labels):
        rows[n] = ((RAW, images_NHWC.shape[2], images_NHWC.shape[1], at + n * size), label)
        table[n] = (n, at + n * size, size)
    header = np.zeros(1, HEADER)
    header[0] = (VERSION, 2, MIN_PAGE_BYTES, len(labels), at + len(labels) * size)
    start = header.tobytes() + fields.tobytes() + rows.tobytes()
    path.write_bytes(start.ljust(at, b"\0") + images_NHWC.tobytes() + table.tobytes())


def test_stock_betons_of_other_pixels_are_other_data(tmp_path):
    """Their index is the same byte for byte: without the content, one would be taken for the other."""
    settings, hashes = DataSettings(dataset="imagenet", backend="ffcv", root=str(tmp_path)), []
    labels, random = [0, 1, 0, 1], np.random.default_rng(0)
    for _ in range(2):
        for part in ("train", "val"):
            raw_beton(tmp_path / f"{part}.beton", random.integers(0, 256, (4, 8, 8, 3), np.uint8), labels)
        found = read_photographs(settings, 2)
        hashes += [found.train.content_hash, found.test.content_hash]
        # Read once: the second time the mark beside it is taken.
        assert read_photographs(settings, 2).train.content_hash == found.train.content_hash
    assert len(set(hashes)) == 4
    (tmp_path / "train.beton.sha256.json").write_text("{")
    assert read_photographs(settings, 2).train.content_hash == hashes[2]


def test_the_same_pictures_among_more_classes_are_another_task(root, tmp_path):
    """A network with more outputs must not be looked for in the node of one with fewer."""
    few = write_folder(tmp_path / "few", classes=2, per_class=2)
    many = write_folder(tmp_path / "many", classes=3, per_class=2)
    hashes = set()
    for name, classes in (("few", few), ("many", many)):
        manifest.main([f"--source={classes}", f"--out={tmp_path / name}.manifest", "--workers=1"])
        for part in ("train", "val"):
            out = tmp_path / f"of_{name}" / f"{part}.manifest"
            out.parent.mkdir(exist_ok=True)
            origin = f"--classes-from={tmp_path / name}.manifest"
            manifest.main([f"--source={few}", f"--out={out}", origin, "--workers=1"])
        settings = DataSettings(dataset="imagenet", backend="folder", root=str(tmp_path / f"of_{name}"))
        hashes.add(read_photographs(settings, 2).train.content_hash)
    assert len(hashes) == 2


def test_a_rebuilt_validation_set_is_measured_anew(recipe, root, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in root.glob("*.beton*"):
        shutil.copy(path, copy)
    words = words_of(recipe, copy, "ffcv native", tmp_path, "--gen.generations=0", "--train.epochs=1", *ONE_EPOCH)

    def nll():
        main(words)
        return json.loads((tmp_path / "run" / "results.json").read_text())["generations"][0]["nll"]

    first = nll()
    assert nll() == first
    source, out = root / "val", copy / "val.beton"
    beton.main([f"--source={source}", f"--out={out}", "--redo", "--mode=raw", "--longest-px=10", "--workers=1"])
    assert nll() != first


def test_one_image_of_one_pixel_is_refused_before_training(recipe, root, tmp_path):
    words = words_of(recipe, root, "folder", tmp_path, "--train.accumulate_steps=8")
    with pytest.raises(UserError, match=r"one image of 32 pixels.*train\.batch_size"):
        main(words)


@pytest.mark.parametrize(
    "words",
    [
        ("--data.start_resolution_px=64",),
        ("--data.start_resolution_px=64", "--data.resolution_ramp=[0.1, 0.2]"),
        ("--train.lr_milestones=[0.1]", "--train.lr_factor=0.3"),
    ],
)
def test_what_has_no_say_makes_no_other_node(recipe, root, capsys, tmp_path, words):
    def plan(*more):
        main(words_of(recipe, root, "folder", tmp_path, "--run.dry=true", *more))
        return capsys.readouterr().out

    base = () if "milestones" in words[0] else ("--data.start_resolution_px=null",)
    assert plan(*words) == plan(*base)


def test_without_augmentation_its_settings_have_no_say(recipe, root, capsys, tmp_path):
    def plan(*more):
        main(words_of(recipe, root, "folder", tmp_path, "--run.dry=true", "--data.augment=none", *more))
        return capsys.readouterr().out

    assert plan() == plan("--data.rotation_degrees=3", "--data.pixel_shift=9", "--data.crop_area=[0.5, 1.0]")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("backend", ["ffcv", "folder"])
def test_batches_on_a_gpu_are_those_of_the_cpu(root, backend):
    settings = DataSettings(dataset="imagenet", backend=backend, root=str(root), workers=2)
    split = read_photographs(settings, 2).train
    views = training_views(split.ids, ResizedCrop(), 0, 0, 0, sizes=split.sizes, resolution_px=32)
    loader = {"ffcv": FfcvLoader, "folder": FolderLoader}[backend]
    shown = [list(loader(split, settings, torch.device(kind)).batches(views, 4)) for kind in ("cpu", "cuda")]
    for here, there in zip(*shown, strict=True):
        assert there.images_NCHW.is_contiguous(memory_format=torch.channels_last)
        for one, two in ((here.images_NCHW, there.images_NCHW), (here.labels, there.labels), (here.ids, there.ids)):
            assert torch.equal(one, two.cpu())
