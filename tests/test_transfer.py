"""fastgen.transfer: features against fp64 by hand, classifiers against scikit-learn's own search, and its lines."""

import csv
import json
import math
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pictures import encode, odd, photograph
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from fastgen import probe, transfer
from fastgen.augment import Normaliser
from fastgen.checkpoint import save_weights
from fastgen.data.facts import DATASETS
from fastgen.errors import MachineError, UserError, command
from fastgen.features import Network, Tap, extract, last_linear, passes_of
from fastgen.models import build_model, initialise
from fastgen.probe import CS, classify, compare, told_apart, wilson
from fastgen.recipe import read_recipe
from fastgen.transfer_data import View, evaluation_view, open_images, picture_view, view_batches

CPU = torch.device("cpu")
SMALL = View(32, 1.0, 3)
CIFAR = DATASETS["cifar100"]


def resnet8(seed=0, classes=100, channels=3):
    model = initialise(build_model("resnet8", classes, channels, "strided"), seed)
    generator = torch.Generator().manual_seed(seed + 100)
    for module in model.modules():
        # As after a training: unlike any batch's own statistics.
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return model


def blind_to_red(model):
    """The same network, which sees neither red nor green."""
    with torch.no_grad():
        model.conv1.weight[:, :2] = 0
    return model


def network(model, view=SMALL, facts=CIFAR):
    normalise = Normaliser(facts.mean, facts.std, CPU, torch.float32)
    return Network("it", Tap(model, last_linear(model, view, CPU, "it")), normalise, view, CPU)


@pytest.fixture
def make_run(tmp_path, write_recipe):
    """Function that makes a run folder of the given networks, as generations 0, 1, ..."""

    def make(name, *models, **overrides):
        folder = tmp_path / name
        folder.mkdir()
        write_recipe(folder, "recipe.yaml", **{"data__dataset": "cifar100", **overrides})
        for generation, model in enumerate(models):
            place = folder / f"generation_{generation}"
            place.mkdir()
            description = {"generation": generation, "node": f"{name}{generation}", "classes": model.fc.out_features}
            save_weights(place / "model.safetensors", model, description)
        return folder

    return make


def coloured(folder, train=10, val=20):
    """train/ and val/ of two classes that differ in red alone; the rest is noise."""
    random = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for label in range(2):
            place = folder / part / f"class_{label}"
            place.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                pixels[:, :, 0] = 190 * label + random.integers(0, 60, (40, 48))
                (place / f"{number}.png").write_bytes(encode(pixels, "PNG"))
    return folder


@pytest.fixture(scope="module")
def woof(tmp_path_factory):
    """The folder of `coloured`, to be read only."""
    return coloured(tmp_path_factory.mktemp("sets") / "woof")


def call(capsys, *words):
    """Exit code, output and error lines of the command."""
    capsys.readouterr()
    code = command(transfer.main, [str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err.splitlines()


def refused(capsys, *words):
    """The one line with which the command ends."""
    code, _, lines = call(capsys, *words)
    assert code == 2, lines
    assert len(lines) == 1, lines
    return lines[0]


# Features.


def features_f64(model, views_NHWC):
    """Input of the last layer, in fp64, layer by layer."""

    def norm(bn, x):
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)

    model = model.double()
    x = torch.from_numpy(views_NHWC).double().permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor(CIFAR.mean).double()[:, None, None]) / torch.tensor(CIFAR.std).double()[:, None, None]
    x = norm(model.bn1, F.conv2d(x, model.conv1.weight, padding=1)).relu()
    for stage in (model.layer1, model.layer2, model.layer3):
        for block in stage:
            shortcut = F.pad(x[:, :, :: block.stride, :: block.stride], (0, 0, 0, 0, 0, block.added_channels))
            x_in = norm(block.bn1, F.conv2d(x, block.conv1.weight, stride=block.stride, padding=1)).relu()
            x = (norm(block.bn2, F.conv2d(x_in, block.conv2.weight, padding=1)) + shortcut).relu()
    return x.mean((2, 3)).detach().numpy()


def test_features_equal_those_computed_by_hand_in_fp64():
    pictures = [photograph(seed, 50, 40 + seed) for seed in range(7)]
    (found,) = extract([network(resnet8().train())], pictures, 3, lambda done: None)
    expected = features_f64(resnet8(), np.stack([picture_view(picture, SMALL) for picture in pictures]))
    assert found.dtype == np.float32
    # Seven convolutions, each with its norm, of sums of at most 576 products, whose roundings add up like a walk.
    tolerance = 7 * 2 * math.sqrt(576) * 2.0**-24 * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
    assert np.ptp(expected, axis=0).max() > 1000 * tolerance


def test_a_norm_of_the_batch_would_be_noticed():
    """The tolerance above tells eval mode from training mode."""
    pictures = [photograph(seed) for seed in range(4)]
    views = np.stack([picture_view(picture, SMALL) for picture in pictures])
    model = resnet8().train()
    seen = []
    model.fc.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].detach().numpy()))
    model(Normaliser(CIFAR.mean, CIFAR.std, CPU, torch.float32)(torch.from_numpy(views).permute(0, 3, 1, 2)))
    expected = features_f64(resnet8(), views)
    assert np.abs(seen[0] - expected).max() > 0.01 * np.abs(expected).max()


def test_networks_of_unlike_views_are_read_each_in_its_own():
    digits = network(resnet8(1, 10, 1), View(8, 1.0, 1), DATASETS["digits"])
    networks = [network(resnet8()), digits, network(resnet8(2))]
    pictures = [photograph(seed) for seed in range(5)]
    done = []
    together = extract(networks, pictures, 2, done.append)
    assert done == list(range(passes_of(networks, 5, 2) + 1)) == list(range(7))
    for one, features in zip(networks, together, strict=True):
        np.testing.assert_array_equal(features, extract([one], pictures, 2, done.append)[0])


class TwoHeads(nn.Module):
    """Two linear layers of as many outputs; the second one that is declared gives none of them."""

    def __init__(self, last):
        super().__init__()
        self.first = nn.Linear(12, 5)
        self.beside = nn.Linear(12, 5)
        self.last = last

    def forward(self, x):
        x = x.flatten(1)
        self.beside(x)
        return self.last(self.first(x), self.beside)


def layer_of(model):
    return last_linear(model, View(2, 1.0, 3), CPU, "it")


def test_the_last_layer_is_found_by_what_it_does():
    model = TwoHeads(lambda logits, beside: logits)
    assert layer_of(model) is model.first
    stacked = nn.Sequential(nn.Flatten(), nn.Linear(12, 12), nn.Linear(12, 12))
    assert layer_of(stacked) is stacked[2]
    # Where two of them give it, the later one.
    nn.init.eye_(stacked[2].weight)
    nn.init.zeros_(stacked[2].bias)
    assert layer_of(stacked) is stacked[2]
    # Some networks drop dimensions after it.
    squeezed = nn.Sequential(nn.Flatten(), nn.Unflatten(1, (1, 12)), nn.Linear(12, 5), nn.Flatten())
    assert layer_of(squeezed) is squeezed[2]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_last_layer_of_torchvisions_networks_is_found(name):
    model = initialise(build_model(name, 7, 3, "strided"), 0)
    assert last_linear(model, View(64, 0.875, 3), CPU, "it") is model.fc


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(3, 5, 2), nn.Flatten()),
        TwoHeads(lambda logits, beside: logits + 1),
        # A row for each pixel, of which the mean is taken by nobody.
        nn.Linear(2, 2),
    ],
    ids=["no linear layer", "changed afterwards", "several rows an image"],
)
def test_a_network_that_does_not_end_in_a_linear_layer_is_refused(model):
    with pytest.raises(UserError, match=r"it: no linear layer gives the output of this .*: choose a network"):
        layer_of(model)


def test_features_that_are_not_finite_are_refused(make_run, woof, capsys):
    model = resnet8()
    with torch.no_grad():
        model.bn1.weight.fill_(math.nan)
    run = make_run("broken", model)
    code, _, lines = call(capsys, run, f"--to={woof}")
    assert (code, lines[-1]) == (
        2, "fastgen: broken generation 0: its features are not finite: leave that generation's weights out",
    )  # fmt: skip


# Views.


def test_a_view_is_the_centre_square_resampled():
    pixels = photograph(1, 61, 97)
    square = Image.fromarray(pixels[:, 18:79])
    np.testing.assert_array_equal(picture_view(pixels, SMALL), square.resize((32, 32), Image.Resampling.BILINEAR))
    # Of 61 pixels, 0.8 are 48.8: 49.
    square = Image.fromarray(pixels[6:55, 24:73])
    expected = np.asarray(square.resize((40, 40), Image.Resampling.BILINEAR).convert("L"))
    np.testing.assert_array_equal(picture_view(pixels, View(40, 0.8, 1))[:, :, 0], expected)


def test_images_of_the_networks_own_size_stay_as_they_are():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    np.testing.assert_array_equal(picture_view(pixels, SMALL), pixels)
    grey = np.repeat(pixels[:8, :8, :1], 3, axis=2)
    np.testing.assert_array_equal(picture_view(grey, View(8, 1.0, 1)), grey[:, :, :1])


def test_views_are_those_of_the_recipes_evaluation(write_recipe):
    assert evaluation_view(read_recipe([f"--cfg={write_recipe(data__dataset='cifar100')}"])) == SMALL
    assert evaluation_view(read_recipe([f"--cfg={write_recipe()}"])) == View(8, 1.0, 1)
    photos = {"data__dataset": "imagenet", "data__backend": "folder", "model__name": "resnet18"}
    recipe = write_recipe(**photos, data__resolution_px=64)
    assert evaluation_view(read_recipe([f"--cfg={recipe}"])) == View(64, 0.875, 3)
    words = [f"--cfg={recipe}", "--data.eval_resolution_px=96", "--data.eval_crop_share=1.0"]
    assert evaluation_view(read_recipe(words)) == View(96, 1.0, 3)
    rule = "centre square of 0.875 of the shorter side, resampled to 64 px (bilinear, antialiased)"
    assert View(64, 0.875, 3).text == rule


@pytest.mark.parametrize("name", ["grey", "cmyk", "alpha", "palette", "grey_alpha", "webp"])
def test_files_of_any_kind_become_rgb(tmp_path, name):
    path = tmp_path / "it.jpg"
    path.write_bytes(odd(name).content)
    expected = picture_view(np.asarray(Image.open(path).convert("RGB")), SMALL)
    np.testing.assert_array_equal(picture_view(path, SMALL), expected)


@pytest.mark.parametrize("batch", [1, 3, 7, 100])
def test_view_batches_hold_every_picture_once_in_order(batch):
    pictures = [np.full((4, 4, 3), number, np.uint8) for number in range(7)]
    found = list(view_batches(pictures, View(4, 1.0, 3), batch))
    assert [len(views) for views in found][:-1] == [batch] * (len(found) - 1)
    np.testing.assert_array_equal(np.concatenate(found), np.stack(pictures))


def test_a_limit_takes_the_first_of_each_class(woof):
    images = open_images(str(woof), woof, 3)
    assert [path.name for path in images.train.pictures] == ["0.png", "1.png", "2.png"] * 2
    assert images.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert len(images.val) == 6
    assert images.train.content_hash != images.val.content_hash


def test_a_disk_that_fails_is_no_mistake(woof, monkeypatch):
    def fail(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("pathlib.Path.read_bytes", fail)
    with pytest.raises(MachineError, match=r"0\.png: cannot be read"):
        picture_view(woof / "train" / "class_0" / "0.png", SMALL)


# Classifiers.


def clusters(seed, spread, count=90, classes=3, dimensions=6):
    """Features of three overlapping classes on very different scales; one of them never changes."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(0, 1, (classes, dimensions))
    labels = np.arange(count) % classes
    features = (centres[labels] + random.normal(0, spread, (count, dimensions))) * 10.0 ** np.arange(-2, 4)
    features[:, 2] = 7
    return features.astype(np.float32), labels.astype(np.int64)


@pytest.mark.parametrize(("spread", "seed"), [(0.5, 0), (1.0, 1), (2.0, 2)])
def test_a_probe_equals_scikit_learns_own_search(spread, seed):
    (train, train_labels), (val, val_labels) = clusters(1, spread), clusters(2, spread)
    fits = []
    found = classify(train, train_labels, val, val_labels, 4, seed, lambda: fits.append(1))
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        {"logisticregression__C": list(CS)},
        cv=StratifiedKFold(4, shuffle=True, random_state=seed),
    ).fit(train.astype(np.float64), train_labels)
    np.testing.assert_array_equal(found.correct, search.predict(val.astype(np.float64)) == val_labels)
    assert found.accuracy == search.score(val.astype(np.float64), val_labels)
    assert (found.c, found.cv_accuracy) == (search.best_params_["logisticregression__C"], search.best_score_)
    assert 0.4 < found.accuracy < 1
    assert (found.converged, found.unconverged_fits) == (True, 0)
    assert len(fits) == probe.fits_of(4)


def test_test_pictures_choose_nothing():
    (train, train_labels), (val, val_labels) = clusters(1, 1.0), clusters(2, 1.0)
    one = classify(train, train_labels, val, val_labels, 3, 0, lambda: None)
    other = classify(train, train_labels, 5 - val, (val_labels + 1) % 3, 3, 0, lambda: None)
    assert (one.c, one.cv_accuracy) == (other.c, other.cv_accuracy)
    assert one.accuracy != other.accuracy


def test_fits_that_do_not_converge_are_told(monkeypatch, make_run, woof, capsys):
    monkeypatch.setattr(probe, "MOST_ITERATIONS", (1,))
    run = make_run("hasty", resnet8())
    code, out, _ = call(capsys, run, f"--to={woof}", "--folds=2")
    assert code == 0
    found = json.loads((run / "transfer-woof.json").read_text())["generations"][0]["run"]
    assert found["unconverged_cv_fits"] > 0
    assert f"hasty: {found['unconverged_cv_fits']} in the choice of C" in " ".join(out.split())
    # More iterations are tried before that.
    monkeypatch.setattr(probe, "MOST_ITERATIONS", (1, 1000))
    assert call(capsys, run, f"--to={woof}", "--folds=2")[0] == 0
    found = json.loads((run / "transfer-woof.json").read_text())["generations"][0]["run"]
    assert (found["converged"], found["unconverged_cv_fits"]) == (True, 0)


def test_other_warnings_of_a_fit_come_through(monkeypatch):
    fit = LogisticRegression.fit

    def warned(self, *arguments):
        warnings.warn("something else", UserWarning, stacklevel=1)
        return fit(self, *arguments)

    monkeypatch.setattr(LogisticRegression, "fit", warned)
    with pytest.raises(UserWarning, match="something else"):
        probe._fit(1.0, *clusters(1, 1.0))


def test_mcnemar_equals_the_sum_of_binomials():
    first = np.array([True] * 9 + [False] * 3 + [True] * 20 + [False] * 8)
    second = np.array([False] * 9 + [True] * 3 + [True] * 20 + [False] * 8)
    found = compare(first, second)
    expected = 2 * sum(math.comb(12, wins) for wins in range(4)) / 2**12
    assert found.p == pytest.approx(expected, rel=1e-12)
    assert (found.only_first, found.only_second) == (9, 3)
    assert found.difference == 6 / 40
    # Standard deviation, over the pictures, of their differences +1, 0, -1; over the root of their number.
    assert found.standard_error == pytest.approx((first.astype(int) - second).std() / math.sqrt(40), rel=1e-12)
    assert compare(second, first).p == found.p
    assert (compare(first, first).p, compare(first, first).standard_error) == (1.0, 0.0)


def test_wilsons_interval_solves_its_equation():
    for correct, count in ((0, 10), (3, 10), (10, 10), (150, 200)):
        low, high = wilson(correct, count)
        p = correct / count
        assert 0 <= low <= p <= high <= 1
        for end in {low, high} - {0.0, 1.0}:
            assert abs(p - end) == pytest.approx(1.959963984540054 * math.sqrt(end * (1 - end) / count), rel=1e-9)


def test_holms_procedure_stops_at_the_first_that_fails():
    assert told_apart([0.04]) == [True]
    assert told_apart([0.04, 0.03]) == [False, False]
    assert told_apart([0.04, 0.001, 0.02]) == [True, True, True]
    assert told_apart([0.06, 0.001, 0.02]) == [False, True, True]
    # 0.03 > 0.05 / 2, and what comes after is not asked any more.
    assert told_apart([0.03, 0.001, 0.04]) == [False, True, False]
    assert told_apart([]) == []


# The command.


def test_one_networks_features_separate_the_classes_and_anothers_do_not(make_run, woof, capsys):
    run = make_run("sees", resnet8(0), resnet8(1))
    baseline = make_run("blind", blind_to_red(resnet8(0)), blind_to_red(resnet8(1)), blind_to_red(resnet8(2)))
    code, out, _ = call(capsys, run, f"--to={woof}", "--baseline", baseline)
    assert code == 0
    record = json.loads((run / "transfer-woof.json").read_text())
    rows = record["generations"]
    assert [row["generation"] for row in rows] == [0, 1, 2]
    for row in rows[:2]:
        assert row["run"]["accuracy"] >= 95
        # Of 40 coin tosses, 8 to 32 hits, but for one time in 10,000.
        assert 20 <= row["baseline"]["accuracy"] <= 80
        assert row["comparison"]["told_apart"]
        difference = row["run"]["accuracy"] - row["baseline"]["accuracy"]
        assert row["comparison"]["difference"] == pytest.approx(difference, rel=1e-12)
    assert rows[2]["run"] is None
    assert rows[2]["comparison"] is None
    assert [row["run"]["node"] for row in rows[:2]] == ["sees0", "sees1"]
    assert record["note"].endswith("no benchmark of transfer where the source network was trained on small images.")
    assert record["note"] in out
    assert (record["to"]["train_images"], record["to"]["val_images"]) == (20, 40)
    table = list(csv.DictReader((run / "transfer-woof.csv").read_text().splitlines()))
    assert [float(line["baseline_accuracy"]) for line in table] == [row["baseline"]["accuracy"] for row in rows]
    assert table[2]["run_accuracy"] == ""
    assert (run / "transfer-woof.png").read_bytes().startswith(b"\x89PNG")


def test_accuracy_equals_scikit_learns_on_the_same_features(make_run, woof, capsys):
    run = make_run("it", blind_to_red(resnet8(3)))
    assert call(capsys, run, f"--to={woof}", "--seed=5", "--batch=7")[0] == 0
    (row,) = json.loads((run / "transfer-woof.json").read_text())["generations"]
    images = open_images(str(woof), woof, None)
    train, val = (
        extract([network(blind_to_red(resnet8(3)))], part.pictures, 7, lambda done: None)[0].astype(np.float64)
        for part in (images.train, images.val)
    )
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        {"logisticregression__C": list(CS)},
        cv=StratifiedKFold(5, shuffle=True, random_state=5),
    ).fit(train, images.train.labels)
    assert row["run"]["accuracy"] == 100 * search.score(val, images.val.labels)
    assert row["run"]["c"] == search.best_params_["logisticregression__C"]


def test_the_same_command_writes_the_same_files(make_run, woof, capsys, tmp_path):
    run, baseline = make_run("one", resnet8(0)), make_run("two", blind_to_red(resnet8(1)))
    files = []
    for name in ("a", "b"):
        out = tmp_path / name
        out.mkdir()
        assert call(capsys, run, f"--to={woof}", f"--baseline={baseline}", f"--out={out}")[0] == 0
        files.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert sorted(files[0]) == ["transfer-woof.csv", "transfer-woof.json", "transfer-woof.png"]
    assert files[0] == files[1]


def test_two_weights_files_are_compared_whatever_their_generations(make_run, woof, capsys, tmp_path):
    run = make_run("it", resnet8(0), resnet8(1))
    first, second = (run / f"generation_{number}" / "model.safetensors" for number in (0, 1))
    words = [second, f"--cfg={run / 'recipe.yaml'}", f"--to={woof}", f"--baseline={first}"]
    (second.parent / "node.json").write_text("{}")
    code, _, err = call(capsys, *words)
    told = f"fastgen: {second.parent}: is a node, to which nothing is added: name a folder for the results with --out"
    assert (code, err) == (2, [told])
    assert call(capsys, *words, f"--out={tmp_path}")[0] == 0
    (row,) = json.loads((tmp_path / "transfer-woof-model.json").read_text())["generations"]
    assert (row["generation"], row["run"]["node"], row["baseline"]["node"]) == (1, "it1", "it0")
    assert row["comparison"] is not None


def test_a_small_data_set_goes_by_its_name(make_run, capsys):
    run = make_run("it", resnet8(), resnet8(1))
    code, out, _ = call(capsys, run, "--to", "digits", "--limit", "8")
    assert code == 0
    record = json.loads((run / "transfer-digits.json").read_text())
    assert (record["to"]["train_images"], record["to"]["val_images"], record["to"]["classes"]) == (80, 80, 10)
    # Ten classes: chance is 10 %, and colours tell nothing.
    assert all(row["run"]["accuracy"] > 30 for row in record["generations"])
    assert "no transfer" not in out


def test_the_networks_own_data_set_is_no_transfer(make_run, capsys):
    run = make_run("it", resnet8(0, 10, 1), data__dataset="digits")
    code, out, _ = call(capsys, run, "--to=digits", "--limit=5")
    assert code == 0
    assert "it: was trained on digits itself, so this is no transfer" in out


def test_what_is_no_picture_by_name_is_ignored_aloud(make_run, tmp_path, capsys):
    folder = coloured(tmp_path / "set", 5, 5)
    (folder / "train" / "class_0" / "list.txt").write_text("hello")
    (folder / "train" / ".hidden").mkdir()
    code, out, _ = call(capsys, make_run("it", resnet8()), f"--to={folder}")
    assert code == 0
    assert f"ignored, no pictures by name: 1 files or folders, the first {folder}/train/class_0/list.txt" in out


def test_another_networks_weights_are_refused(make_run, woof, capsys):
    run = make_run("it", resnet8(), model__name="resnet20")
    assert "is of another network" in refused(capsys, run, f"--to={woof}")


def damage_train(folder):
    path = folder / "train" / "class_1" / "3.png"
    path.write_bytes(path.read_bytes()[:200])


def a_text(folder):
    (folder / "val" / "class_0" / "a.jpg").write_bytes(odd("text").content)


def empty_class(folder):
    for path in (folder / "train" / "class_1").iterdir():
        path.unlink()


def extra_class(folder):
    (folder / "train" / "class_2").mkdir()


def renamed_class(folder):
    (folder / "val" / "class_0").rename(folder / "val" / "class_9")


def no_val(folder):
    (folder / "val").rename(folder / "test")


def one_class(folder):
    for part in ("train", "val"):
        (folder / part / "class_1").rename(folder / f"gone_{part}")


def few(folder):
    for number in range(2, 5):
        (folder / "train" / "class_1" / f"{number}.png").unlink()


def no_classes(folder):
    one_class(folder)
    (folder / "val" / "class_0").rename(folder / "gone")


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (damage_train, "class_1/3.png: cannot be decoded (image file is truncated"),
        (a_text, "val/class_0/a.jpg: is no picture: repair or remove that file"),
        (empty_class, "train/class_1: holds no picture: fill or remove that class folder"),
        (extra_class, "the class class_2 is in train/ and not in val/ (in one of them alone: 1)"),
        (renamed_class, "the class class_0 is in train/ and not in val/ (in one of them alone: 2)"),
        (no_val, "/val: is missing: --to names a folder with train/ and val/"),
        (no_classes, "/val: holds no class folders"),
        (one_class, "holds one class, class_0: a classifier needs two or more"),
        (few, "the class class_1 has 2 training pictures, too few for cross-validation in 5 parts: give it more, or "
              "--folds=2"),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_used_is_one_line(make_run, tmp_path, capsys, spoil, line):
    folder = coloured(tmp_path / "set", 5, 5)
    spoil(folder)
    run = make_run("it", resnet8())
    code, _, lines = call(capsys, run, f"--to={folder}")
    assert code == 2
    assert len([text for text in lines if text.startswith("fastgen:")]) == 1
    assert line in lines[-1]
    assert not list(run.glob("transfer-*"))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "the following arguments are required: --to"),
        (["--to=nowhere"], "--to=nowhere: is no folder, and none of cifar10, cifar100, digits"),
        (["--to=cifar10", "--to_root=nowhere"], "set --to_root to the folder above one of them"),
        (["--to=digits", "--limit=0"], "'0' is below 1"),
        (["--to=digits", "--folds=1"], "--folds=1: cross-validation needs 2 or more"),
        (["--to=digits", "--limit=2"], "has 2 training pictures, too few for cross-validation in 5 parts"),
        (["--to=digits", "--seed=-1"], "--seed=-1: give a number from 0"),
        (["--to=digits", "--to=digits"], "--to is given twice"),
        (["--to=digits", "--limt=3"], "unknown key 'limt'"),
        (["--to=digits", "--train.epoch=3"], "did you mean 'train.epochs'?"),
        (["--to=digits", "--baseline=nowhere"], "nowhere: is neither a weights file nor a run folder"),
        (["--to=digits", "--cfg=recipe.yaml"], "a run folder has its own: leave it out"),
        (["--to=digits", "--out=nowhere"], "--out=nowhere: is no folder: make it first"),
    ],
)
def test_a_mistake_in_the_words_is_one_line(make_run, capsys, words, line):
    assert line in refused(capsys, make_run("it", resnet8()), *words)


def test_a_target_that_is_no_network_is_one_line(make_run, tmp_path, capsys):
    assert "usage: python -m fastgen.transfer RUN_FOLDER --to FOLDER" in refused(capsys, "--to=digits")
    assert "is neither a weights file nor a run folder" in refused(capsys, tmp_path, "--to=digits")
    weights = make_run("it", resnet8()) / "generation_0" / "model.safetensors"
    assert "name it with --cfg RECIPE.yaml" in refused(capsys, weights, "--to=digits")


def test_without_scikit_learn_the_line_says_how_to_install_it(make_run, woof, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    line = refused(capsys, make_run("it", resnet8()), f"--to={woof}")
    assert line == "fastgen: fastgen.transfer needs scikit-learn: pip install scikit-learn"


def test_the_help_lists_all_arguments(run_command):
    ended = run_command(["--help"], module="fastgen.transfer")
    assert ended.code == 0
    assert all(name in ended.out for name in transfer.NAMES)
    assert "WEIGHTS.safetensors --cfg" in ended.out or "weights file with --cfg" in " ".join(ended.out.split())
