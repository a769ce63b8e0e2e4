"""fastgen.export: written files beside the run's networks in fp64, cards that hold, and nothing left of what failed."""

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
import yaml
from conftest import tiny_recipe
from pictures import write_folder
from safetensors.torch import load_file
from torch import nn

from data_prep import manifest
from fastgen import train
from fastgen.augment import Normaliser
from fastgen.checkpoint import read_weights, save_weights
from fastgen.data import open_dataset
from fastgen.data.facts import DATASETS
from fastgen.errors import MachineError, UserError, command
from fastgen.evaluate import _networks_of, load_network, trained_in
from fastgen.export import command as export
from fastgen.export import onnx_file, place, weights_file
from fastgen.export.card import measured_by
from fastgen.export.check import FACTOR, Reference, agreement, batches_of, passes_of, reference_of
from fastgen.export.images import MOST_RANDOM, images_of
from fastgen.export.onnx_file import Graph, feeding, run_onnx, to_onnx
from fastgen.export.subject import Member, Subject
from fastgen.export.weights_file import TORCHVISIONS, maker_of
from fastgen.models import MODELS, build_model, initialise
from fastgen.models.densenet_cifar import CifarDenseNet
from fastgen.recipe import read_recipe
from fastgen.transfer_data import View

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

CPU = torch.device("cpu")
CIFAR = DATASETS["cifar10"]


def settled(model, seed=0):
    """The network with running statistics as after a training, unlike any batch's own."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return model


def network(name, classes=10, channels=3, seed=0):
    model = build_model(name, classes, channels)
    return settled(model if "/" in name else initialise(model, seed), seed)


def make_run(folder, *models, classes=10, **overrides):
    """A run folder of the given networks as generations 0, 1, ..., without results."""
    folder.mkdir()
    tree = tiny_recipe(data__dataset="cifar10", data__root=str(folder / "nowhere")) | {}
    for path, value in overrides.items():
        section, key = path.split("__")
        tree[section][key] = value
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    for generation, model in enumerate(models):
        place_of = folder / f"generation_{generation}"
        place_of.mkdir()
        description = {"generation": generation, "node": f"node{generation}", "classes": classes}
        save_weights(place_of / "model.safetensors", model, description)
    return folder


def call(capsys, *words):
    """Exit code, output, and error lines of the command."""
    capsys.readouterr()
    code = command(export.main, [str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err.splitlines()


def exported(capsys, *words):
    """Exports; the folder's files by name, and the card."""
    code, out, err = call(capsys, *words)
    assert code == 0, err
    paths = [Path(line) for line in out.splitlines() if os.sep in line]
    (card,) = (path for path in paths if path.suffix == ".json")
    return {path.name: path for path in paths}, json.loads(card.read_text())


def refused(capsys, code, *words):
    """The one line with which the command ends."""
    found, _, lines = call(capsys, *words)
    assert found == code, lines
    assert lines[-1].startswith("fastgen: "), lines
    return lines[-1]


def in_fp64(model, pixels_NCHW, facts):
    """Logits in double precision, normalised by the formula."""
    mean, std = (torch.tensor(row, dtype=torch.float64)[:, None, None] for row in (facts.mean, facts.std))
    with torch.no_grad():
        return model.double().eval()((pixels_NCHW.double() / 255 - mean) / std)


def normalised(pixels_NCHW, facts):
    return Normaliser(facts.mean, facts.std, CPU, torch.float32)(pixels_NCHW)


def session_of(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """A real run of two generations on digits; to be read only."""
    folder = tmp_path_factory.mktemp("digits")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny_recipe(train__epochs=2, train__lr=0.05)))
    train.main([f"--cfg={folder / 'tiny.yaml'}", f"--run.dir={folder / 'run'}"])
    return folder / "run"


@pytest.fixture(scope="module")
def digits(digits_run):
    """Recipe, data set and all evaluation images of that run."""
    recipe = read_recipe([f"--cfg={digits_run / 'recipe.yaml'}"])
    dataset = open_dataset(recipe)
    pixels_NCHW = torch.from_numpy(dataset.evaluation.images_NHWC).permute(0, 3, 1, 2).contiguous()
    return recipe, dataset, pixels_NCHW


def network_of_run(digits_run, digits, generation):
    recipe, dataset, _ = digits
    return load_network(recipe, dataset, digits_run / f"generation_{generation}" / "model.safetensors", CPU)


def error_percent(outputs_NC, dataset):
    return 100 * float((outputs_NC.argmax(1) != dataset.evaluation.labels).mean())


# Whole exports of a real run.


def test_a_generation_gives_the_run_s_own_logits_and_errors(capsys, tmp_path, digits_run, digits):
    _, dataset, pixels_NCHW = digits
    files, card = exported(capsys, digits_run, "--to", tmp_path / "out", "--images=48")
    names = {f"generation_1.{suffix}" for suffix in ("onnx", "safetensors", "json", "md")}
    assert set(files) == names == {path.name for path in (tmp_path / "out").iterdir()}
    row = json.loads((digits_run / "results.json").read_text())["generations"][1]
    exact_NC = in_fp64(network_of_run(digits_run, digits, 1), pixels_NCHW, dataset.facts).numpy()

    session = session_of(files["generation_1.onnx"])
    (given,), (output,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape) == ("images", "tensor(uint8)", ["batch", 1, 8, 8])
    assert (output.name, output.shape) == ("logits", ["batch", 10])
    found_NC = session.run(None, {"images": pixels_NCHW.numpy()})[0]
    # The tolerance is of 48 of these images, and means to hold for their like.
    np.testing.assert_allclose(found_NC, exact_NC, rtol=0, atol=2 * card["checked"]["tolerance"])
    assert error_percent(found_NC, dataset) == pytest.approx(row["top1_error"])
    one = session.run(None, {"images": pixels_NCHW[:1].numpy()})[0]
    np.testing.assert_allclose(one, found_NC[:1], rtol=0, atol=2 * card["checked"]["tolerance"])

    model = build_model("resnet8", 10, 1)
    model.load_state_dict(load_file(files["generation_1.safetensors"]), strict=True)
    with torch.no_grad():
        found_NC = model.eval()(normalised(pixels_NCHW, dataset.facts)).numpy()
    np.testing.assert_allclose(found_NC, exact_NC, rtol=0, atol=2 * card["checked"]["tolerance"])
    assert error_percent(found_NC, dataset) == pytest.approx(row["top1_error"])

    assert card["measured_by_the_run"]["top1_error"] == row["top1_error"]
    assert card["measured_by_the_run"]["images"] == row["samples_evaluated"] == len(pixels_NCHW)
    assert card["node"] == row["node"]
    assert card["class_names"] == list("0123456789")
    assert card["checked"]["images"] == 48
    assert card["checked"]["why_random"] is None
    for name in ("onnx", "safetensors"):
        assert card["checked"][name]["largest_difference"] <= card["checked"]["tolerance"]
        assert card["checked"][name]["same_first_class"] >= card["checked"]["images_of_clear_first_class"] > 24


def test_an_ensemble_gives_the_mean_softmax_and_the_run_s_own_error(capsys, tmp_path, digits_run, digits):
    _, dataset, pixels_NCHW = digits
    files, card = exported(capsys, digits_run, "--ensemble", "--to", tmp_path, "--input=pixels-float")
    row = json.loads((digits_run / "results.json").read_text())["generations"][1]
    models = [network_of_run(digits_run, digits, generation) for generation in (0, 1)]
    members = [in_fp64(model, pixels_NCHW, dataset.facts).softmax(1) for model in models]
    exact_NC = torch.stack(members).mean(0).numpy()
    session = session_of(files["ensemble_0-1.onnx"])
    assert session.get_inputs()[0].type == "tensor(float)"
    found_NC = session.run(["probabilities"], {"images": pixels_NCHW.float().numpy()})[0]
    np.testing.assert_allclose(found_NC, exact_NC, rtol=0, atol=2 * card["checked"]["tolerance"])
    assert card["checked"]["tolerance"] < 1e-4
    assert error_percent(found_NC, dataset) == pytest.approx(row["ensemble_top1_error"])
    assert card["measured_by_the_run"]["top1_error"] == row["ensemble_top1_error"]
    assert card["nodes"] == [
        given["node"] for given in json.loads((digits_run / "results.json").read_text())["generations"]
    ]
    for generation in (0, 1):
        own, _ = read_weights(digits_run / f"generation_{generation}" / "model.safetensors")
        copied, told = read_weights(files[f"ensemble_0-1.generation_{generation}.safetensors"])
        assert all(torch.equal(own[name], copied[name]) for name in own)
        assert told["generation"] == generation


def test_the_same_run_gives_the_same_bytes_and_no_place_of_this_machine(capsys, tmp_path, digits_run):
    first, _ = exported(capsys, digits_run, "--generation=0", "--to", tmp_path / "first")
    content = {name: path.read_bytes() for name, path in first.items()}
    second, _ = exported(capsys, digits_run, "--generation=0", "--to", tmp_path / "second")
    assert {name: path.read_bytes() for name, path in second.items()} == content
    root = Path(export.__file__).parents[2]
    for name in ("generation_0.onnx", "generation_0.safetensors"):
        for trace in (str(root), str(tmp_path), sys.prefix, "site-packages", "stack_trace", "resnet_cifar.py"):
            assert trace.encode() not in content[name], (name, trace)
    told = {entry.key: json.loads(entry.value) for entry in onnx.load(first["generation_0.onnx"]).metadata_props}
    _, of_weights = read_weights(first["generation_0.safetensors"])
    assert {name: told["fastgen"][name] for name in of_weights} == of_weights
    assert of_weights["classes"] == 10
    assert (of_weights["height_px"], of_weights["mean"]) == (8, [0.3052])


def test_an_interrupt_while_modules_are_imported_is_one_line(run_command, tmp_path):
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "torch.py").write_text("raise KeyboardInterrupt")
    path = os.pathsep.join([str(modules), *sys.path])
    ended = run_command(["run"], module="fastgen.export", env={"PYTHONPATH": path})
    assert ended == (128 + signal.SIGINT, "", "fastgen: interrupted\n")


def test_the_command_is_a_module(run_command, tmp_path, digits_run):
    words = [digits_run, "--format=safetensors", f"--to={tmp_path / 'out'}"]
    ended = run_command(words, module="fastgen.export")
    assert ended.code == 0, ended.err
    assert "same first class on 64 of 64" in ended.out


# Networks of libraries.


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """train and val of 3 classes, as folders with manifests."""
    folder = tmp_path_factory.mktemp("photographs")
    for number, part in enumerate(("train", "val")):
        source = write_folder(folder / part, classes=3, per_class=4, seed=number)
        manifest.main([f"--source={source}", f"--out={folder / part}.manifest", "--workers=1"])
    return folder


def load_as_the_card_says(card, folder):
    """Runs the card's own lines in its folder; what they define."""
    names = {}
    code = "\n".join(card["load"]["safetensors"]).replace('load_file("', f'load_file("{folder}/')
    exec(code, names)
    return names["model"]


def test_torchvision_s_network_loads_into_torchvision_s(capsys, tmp_path, photographs):
    own = network("resnet18", classes=3)
    settings = {"data__dataset": "imagenet", "data__root": str(photographs), "data__backend": "folder"}
    settings |= {"model__name": "resnet18", "data__resolution_px": 48, "data__eval_crop_share": 0.75, "gen__k": 3}
    run = make_run(tmp_path / "run", own, classes=3, **settings)
    _, card = exported(capsys, run)
    folder = run / "export"
    pixels_NCHW = images_of(subject_of_run(run), 12).pixels_NCHW
    facts = DATASETS["imagenet"]
    model = load_as_the_card_says(card, folder)
    assert type(model) is torchvision.models.ResNet
    assert not model.training
    exact_NC = in_fp64(own, pixels_NCHW, facts)
    with torch.no_grad():
        found_NC = model(normalised(pixels_NCHW, facts))
    assert (found_NC - exact_NC).abs().max() <= 2 * card["checked"]["tolerance"]
    found_NC = session_of(folder / "generation_0.onnx").run(None, {"images": pixels_NCHW.numpy()})[0]
    assert np.abs(found_NC - exact_NC.numpy()).max() <= 2 * card["checked"]["tolerance"]
    assert card["preprocessing"]["side_px"] == 48
    assert card["preprocessing"]["share_of_shorter_side"] == 0.75
    assert card["class_names"] == ["class_0", "class_1", "class_2"]
    assert card["checked"]["images"] == 12
    assert card["measured_by_the_run"] is None
    text = (folder / "generation_0.md").read_text()
    assert "0.75 of the shorter side, resampled to 48 px" in text
    assert all(f"    {line}\n" in text for lines in card["load"].values() for line in lines)


def subject_of_run(run):
    return export.load_subject(export.open_source(str(run), None, [], "it"), [0])


def test_timm_s_network_loads_into_timm_s(capsys, tmp_path):
    timm = pytest.importorskip("timm")
    own = network("timm/test_resnet")
    run = make_run(tmp_path / "run", own, model__name="timm/test_resnet")
    _, card = exported(capsys, run, "--images=20")
    model = load_as_the_card_says(card, run / "export")
    assert isinstance(model, timm.models.resnet.ResNet)
    pixels_NCHW = images_of(subject_of_run(run), 20).pixels_NCHW
    exact_NC = in_fp64(own, pixels_NCHW, CIFAR)
    with torch.no_grad():
        found_NC = model(normalised(pixels_NCHW, CIFAR))
    assert (found_NC - exact_NC).abs().max() <= 2 * card["checked"]["tolerance"]
    assert card["checked"]["onnx"]["largest_difference"] <= card["checked"]["tolerance"]
    # There is no data at this run's data.root.
    assert "nowhere" in card["checked"]["why_random"]
    assert card["class_names"] is None


def test_which_names_of_ours_are_torchvision_s():
    for name in MODELS:
        keys = set(build_model(name, 7, 3).state_dict()) if "190" not in name else set()
        if name in TORCHVISIONS:
            assert keys == set(torchvision.models.get_model(name, weights=None, num_classes=7).state_dict())
        elif keys:
            assert type(build_model(name, 7, 3)) is not torchvision.models.ResNet or name == "se_resnet18"


# Graphs, without a run.


def subject(*models, name="resnet8", side_px=16):
    """Networks of ten classes, as if a run had trained them on small colour images."""
    tree = tiny_recipe(data__dataset="cifar10", model__name=name)
    recipe = replace_sections(tree)
    members = tuple(Member(number, f"node{number}", {}, model.eval()) for number, model in enumerate(models))
    return Subject("run", recipe, CIFAR, View(side_px, 1.0, 3), members)


def replace_sections(tree):
    from fastgen.recipe import load_text

    return load_text(yaml.safe_dump(tree), "it")


def pixels(count=20, side_px=16, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side_px, side_px), dtype=torch.uint8, generator=generator)


def silently(done):
    pass


def checked(tmp_path, of, written=None, given="pixels"):
    """Writes a graph (of other networks, `written`) and checks it against the networks `of`."""
    reference = reference_of(of, pixels(), silently)
    path = tmp_path / "it.onnx"
    path.write_bytes(to_onnx(written or of, given, 18))
    return agreement("it.onnx", run_onnx(path, of, given, 18, pixels()), reference), reference


@pytest.mark.parametrize("given", ["pixels-float", "normalised"])
def test_inputs(tmp_path, given):
    found, reference = checked(tmp_path, subject(network("resnet8")), given=given)
    assert found.difference <= reference.tolerance
    assert found.same_first == found.images == 20
    assert session_of(tmp_path / "it.onnx").get_inputs()[0].type == "tensor(float)"


def test_a_densenet(tmp_path):
    model = settled(initialise(CifarDenseNet(10, 6, 10, memory_efficient=True), 0))
    found, reference = checked(tmp_path, subject(model, name="densenet100"))
    assert found.difference <= reference.tolerance < 1e-3


def shifted_by_a_little(model):
    """One weight in 78,000 is 1 % off."""
    with torch.no_grad():
        largest = model.fc.weight.abs().argmax()
        model.fc.weight.view(-1)[largest] *= 1.01
    return model


def with_another_epsilon(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 2e-5
    return model


@pytest.mark.parametrize("wrong", [shifted_by_a_little, with_another_epsilon])
def test_a_wrong_network_in_the_graph_is_refused(tmp_path, wrong):
    with pytest.raises(MachineError, match=r"it\.onnx: failed its check: an output is .* off .*: nothing was written"):
        checked(tmp_path, subject(network("resnet8")), subject(wrong(network("resnet8"))))


def test_a_wrong_graph_is_refused_and_nothing_is_left(capsys, tmp_path, monkeypatch, digits_run):
    def without_shift(self, images):
        return self.members[0](images.float() * self.scale_C11)

    monkeypatch.setattr(Graph, "forward", without_shift)
    run = tmp_path / "run"
    shutil.copytree(digits_run, run)
    before = sorted(run.rglob("*"))
    line = refused(capsys, 1, run)
    assert "generation_1.onnx: failed its check: an output is" in line
    assert "nothing was written" in line
    assert sorted(run.rglob("*")) == before


def test_a_graph_that_cannot_be_run_is_refused(tmp_path):
    of = subject(network("resnet8"))
    path = tmp_path / "it.onnx"
    content = to_onnx(of, "pixels", 18)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(MachineError, match=r"it\.onnx: failed its check: "):
        run_onnx(path, of, "pixels", 18, pixels())
    # A whole file of another opset, input or network tells so.
    path.write_bytes(content)
    with pytest.raises(MachineError, match="tells other things of itself"):
        run_onnx(path, of, "pixels-float", 18, pixels())


def test_a_network_that_cannot_be_traced_is_told(tmp_path):
    class Branching(nn.Module):
        def forward(self, x):
            return x.mean((2, 3)) if float(x.sum()) > 0 else x.amax((2, 3))

    with pytest.raises(UserError, match=r"torch\.onnx cannot export Branching in opset 18 .*give --format=safetensors"):
        to_onnx(subject(Branching()), "pixels", 18)


# The check itself.


def test_the_reference_is_fp64_and_its_rounding_fp32_s():
    of = subject(network("resnet8"), network("resnet8", seed=1))
    done = []
    reference = reference_of(of, pixels(), done.append)
    assert done == list(range(passes_of(of, 20) + 1))
    members = [in_fp64(network("resnet8", seed=seed), pixels(), CIFAR).softmax(1) for seed in (0, 1)]
    torch.testing.assert_close(reference.exact_NC, torch.stack(members).mean(0), rtol=0, atol=1e-14)
    # Some roundings of probabilities, 2^-25 each: more than none, and not many hundreds.
    assert 2**-26 < reference.rounding < 500 * 2**-25


def test_the_tolerance_is_what_the_text_says():
    exact_NC = torch.tensor([[1.0, 3.0, -8.0], [5.0, 5.0, 0.0]], dtype=torch.float64)
    reference = Reference(exact_NC, 0.01)
    assert reference.tolerance == FACTOR * 0.01
    assert Reference(exact_NC, 0.0).tolerance == FACTOR * 8 * 2.0**-23
    assert reference.clear.tolist() == [True, False]
    within = agreement("it", (exact_NC + 0.079).float(), reference)
    assert within.difference == pytest.approx(0.079, rel=1e-5)
    assert within.images == 2
    for found_NC in (exact_NC + 0.081, torch.full_like(exact_NC, torch.nan), exact_NC[:, :2]):
        with pytest.raises(MachineError, match="it: failed its check"):
            agreement("it", found_NC.float(), reference)


def test_batches_begin_with_a_single_image():
    batches = list(batches_of(pixels(40), feeding(CIFAR, "pixels")))
    assert [len(batch) for batch in batches] == [1, 16, 16, 7]
    assert torch.equal(torch.cat(batches), pixels(40))
    assert torch.equal(feeding(CIFAR, "normalised")(pixels()), normalised(pixels(), CIFAR))


def test_images_are_the_run_s_own_and_spread_over_its_evaluation_set(digits_run, digits):
    _, dataset, pixels_NCHW = digits
    found = images_of(subject_of_run(digits_run), 50)
    assert torch.equal(found.pixels_NCHW, pixels_NCHW[np.arange(50) * 355 // 50])
    assert found.what == "test images of the run's own data"
    assert len(images_of(subject_of_run(digits_run), 1000)) == len(dataset.evaluation) == 355


def test_data_of_other_classes_are_not_the_run_s(digits_run):
    subject_of = subject_of_run(digits_run)
    other = replace(subject_of, facts=replace(subject_of.facts, classes=9))
    found = images_of(other, 5)
    assert "holds 10 classes, and the network is for 9" in found.why_random
    assert found.pixels_NCHW.shape == (5, 1, 8, 8)


def test_results_of_other_networks_are_not_told(tmp_path, digits_run):
    of = subject_of_run(digits_run)
    row = {"generation": 0, "node": of.members[0].node, "samples_evaluated": 9, "top1_error": 1.0, "top5_error": 2.0}
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"evaluated_on": "test", "generations": [row]}))
    expected = {"part": "test", "images": 9, "top1_error": 1.0, "top5_error": 2.0, "nll": None, "ece": None}
    assert measured_by(tmp_path, of) == expected
    path.write_text(json.dumps({"evaluated_on": "test", "generations": [row | {"node": "another"}]}))
    assert measured_by(tmp_path, of) is None
    path.write_text(json.dumps({"evaluated_on": "test"}))
    with pytest.raises(UserError, match=r"results\.json: is damaged \(KeyError"):
        measured_by(tmp_path, of)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top1_error", None), ("top1_error", "abc"), ("top5_error", [1]), ("top5_error", True), ("nll", math.nan),
        ("nll", math.inf), ("ece", None), ("samples_evaluated", None), pytest.param("top1_error", 10**400, id="huge"),
        ("ensemble_top1_error", "abc"), ("ensemble_top5_error", None),
    ],
)  # fmt: skip
def test_results_that_are_no_numbers_are_one_line(capsys, tmp_path, plain_run, name, value):
    run = tmp_path / "run"
    shutil.copytree(plain_run, run)
    row = {"samples_evaluated": 9, "top1_error": 1.0, "top5_error": 2.0, "nll": 0.5, "ece": 0.1}
    row |= {"ensemble_top1_error": 1.0, "ensemble_top5_error": 0.5}
    rows = [row | {"generation": number, "node": f"node{number}"} | {name: value} for number in range(3)]
    (run / "results.json").write_text(json.dumps({"evaluated_on": "test", "generations": rows}))
    which = ["--ensemble"] if name.startswith("ensemble") else []
    line = refused(capsys, 2, run, "--format=safetensors", "--images=1", *which)
    assert re.search(r"results\.json: is damaged \(.*\): start the run's own command again", line)
    assert not (run / "export").exists()


def test_random_images_are_so_many_at_most(plain_run):
    found = images_of(subject_of_run(plain_run), 100_000_000_000)
    assert (len(found), found.what) == (MOST_RANDOM, "random images")


def test_folders_of_other_names_are_no_generations(capsys, tmp_path, plain_run):
    run = tmp_path / "run"
    shutil.copytree(plain_run, run)
    for name in ("generation_old", "generation_1.bak", "generation_", "generation_01"):
        shutil.copytree(plain_run / "generation_0", run / name)
    (run / "generation_3").symlink_to("nowhere")
    _, card = exported(capsys, *export_weights(run, tmp_path / "out"))
    assert card["generation"] == 2
    assert trained_in(run) == {number: run / f"generation_{number}" / "model.safetensors" for number in range(3)}
    # What `evaluate` measures, by the names it tells.
    assert [name for name, _ in _networks_of(run)] == ["generation 0", "generation 1", "generation 2"]


# What is refused, and what is left.


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """A run of generations 0, 1 and 2 without data; to be read only."""
    models = [network("resnet8", seed=seed) for seed in range(3)]
    return make_run(tmp_path_factory.mktemp("plain") / "run", *models)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "usage: python -m fastgen.export RUN_FOLDER"),
        (["--force"], "usage: python -m fastgen.export RUN_FOLDER"),
        (["{tmp}/no"], "no: is no run folder"),
        (["{tmp}"], "is neither a weights file nor a run folder with a trained generation"),
        (["{run}", "--generation=7"], "generation 7 is not trained: there are 0, 1, 2"),
        (["{run}", "--generation=-1"], "generation -1 is not trained"),
        (["{run}", "--generation=x"], "invalid int value: 'x'"),
        (["{run}", "--ensemble=1..4"], "generation 3 is not trained: there are 0, 1, 2"),
        (["{run}", "--ensemble=2..1"], "--ensemble=2..1: give the first and the last member"),
        (["{run}", "--ensemble=1"], "--ensemble=1: give the first and the last member"),
        (["{run}", "--ensemble", "--generation=1"], "not allowed with argument"),
        (["{run}", "--format=tflite"], "'tflite' is no list of onnx and safetensors"),
        (["{run}", "--format=onnx,onnx"], "no list of"),
        (["{run}", "--format=safetensors", "--input=pixels"], "--input is of the ONNX file"),
        (["{run}", "--format=safetensors", "--opset=20"], "--opset is of the ONNX file"),
        (["{run}", "--input=jpeg"], "invalid choice: 'jpeg'"),
        (["{run}", "--opset=17"], "--opset=17: give 18 to "),
        (["{run}", "--opset=99"], "--opset=99: give 18 to "),
        (["{run}", "--to="], "--to: is empty: name a folder"),
        (["{run}", "--to", ""], "--to: is empty: name a folder"),
        (["{run}", "--ensemble", "--ensemble=1..2"], "--ensemble is given twice: keep one"),
        (["{run}", "--ensemble", "1..2", "--ensemble"], "--ensemble is given twice: keep one"),
        (["{run}", "--images=0"], "'0' is below 1"),
        (["{run}", "--to={tmp}/a/b"], "a is not there: make it first"),
        (["{run}", "--to={run}/recipe.yaml"], "is a file: name a folder"),
        (["{run}", "--data.rot=x"], "unknown key 'data.rot': did you mean 'data.root'?"),
        (["{run}", "1..2"], "'1..2' is not understood"),
    ],
)
def test_wrong_arguments_are_one_line(capsys, tmp_path, plain_run, words, part):
    line = refused(capsys, 2, *(word.format(tmp=tmp_path, run=plain_run) for word in words))
    assert part in line
    assert not (plain_run / "export").exists()


def test_members_of_an_ensemble_are_named_in_three_ways(capsys, tmp_path, plain_run):
    options = ["--format=safetensors", "--images=4"]
    for number, (words, members) in enumerate(
        [(["--ensemble"], [0, 1, 2]), (["--ensemble=1..2"], [1, 2]), (["--ensemble", "1..2"], [1, 2])]
    ):
        _, card = exported(capsys, plain_run, *words, *options, f"--to={tmp_path / str(number)}")
        assert card["generations"] == members
    one = make_run(tmp_path / "one", network("resnet8"))
    assert "has generation 0 alone, no ensemble" in refused(capsys, 2, one, "--ensemble", *options)
    gap = tmp_path / "gap"
    shutil.copytree(plain_run, gap)
    shutil.rmtree(gap / "generation_1")
    assert "generation 1 is not trained: name the members, of 0, 2" in refused(capsys, 2, gap, "--ensemble", *options)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_without_a_package_one_line_names_it_and_safetensors_need_none(
    capsys, tmp_path, monkeypatch, plain_run, package
):
    monkeypatch.setitem(sys.modules, package, None)
    line = refused(capsys, 2, plain_run, "--to", tmp_path / "out")
    assert f"--format=onnx needs {package}, which is not installed: pip install onnx onnxruntime onnxscript" in line
    assert not (tmp_path / "out").exists()
    files, _ = exported(capsys, plain_run, "--to", tmp_path / "out", "--format=safetensors", "--images=4")
    assert "generation_2.safetensors" in files


def test_damaged_weights_are_refused(capsys, tmp_path, plain_run):
    run = tmp_path / "run"
    shutil.copytree(plain_run, run)
    weights = run / "generation_2" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    assert "model.safetensors: is no safetensors file, or damaged" in refused(capsys, 2, run)
    model = network("resnet8")
    nn.init.constant_(model.fc.bias, torch.nan)
    save_weights(weights, model, {"generation": 2, "classes": 10})
    assert "generation_2: its outputs are not finite" in refused(capsys, 2, run, "--format=safetensors")
    save_weights(weights, network("resnet20"), {"generation": 2, "classes": 10})
    assert "is of another network" in refused(capsys, 2, run)
    assert not (run / "export").exists()


@pytest.mark.parametrize("wrong", ["other values", "a tensor less"])
def test_a_wrong_weights_file_is_refused_and_nothing_is_left(capsys, tmp_path, monkeypatch, plain_run, wrong):
    to_weights = weights_file.to_weights

    def spoiled(subject, member):
        if wrong == "other values":
            return to_weights(subject, replace(member, model=shifted_by_a_little(member.model)))
        member.model.fc.register_parameter("bias", None)
        return to_weights(subject, member)

    monkeypatch.setattr(weights_file, "to_weights", spoiled)
    line = refused(capsys, 1, plain_run, "--format=safetensors", "--images=4", "--to", tmp_path / "out")
    assert "generation_2.safetensors: failed its check: " in line
    assert ("an output is" if wrong == "other values" else "Missing key(s)") in line
    assert not (tmp_path / "out").exists()


def export_weights(plain_run, folder, *more):
    return [plain_run, "--format=safetensors", "--images=4", f"--to={folder}", *more]


def test_files_are_replaced_only_where_that_is_asked_for(capsys, tmp_path, plain_run):
    words = export_weights(plain_run, tmp_path)
    files, _ = exported(capsys, *words)
    (tmp_path / "generation_20.safetensors").write_bytes(b"of another one")
    files["generation_2.safetensors"].write_bytes(b"changed")
    assert "generation_2.json: is there already: give --force" in refused(capsys, 2, *words)
    files["generation_2.json"].unlink()
    files["generation_2.md"].unlink()
    assert "generation_2.safetensors: is there already: give --force" in refused(capsys, 2, *words)
    assert files["generation_2.safetensors"].read_bytes() == b"changed"
    (tmp_path / "generation_2.onnx").write_bytes(b"of an older export")
    exported(capsys, *words, "--force")
    assert len(load_file(files["generation_2.safetensors"])) > 10
    kept = {"generation_20.safetensors", *files}
    assert {path.name for path in tmp_path.iterdir()} == kept
    # Another generation lies beside it.
    exported(capsys, *words, "--generation=0")


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--format=safetensors"], "generation_2.onnx"),
        (["--format=onnx"], "generation_2.safetensors"),
        (["--format=onnx", "--ensemble=0..1"], "ensemble_0-1.generation_0.safetensors"),
        (["--format=safetensors", "--ensemble=0..1"], "ensemble_0-1.generation_9.safetensors"),
        (["--format=safetensors"], "generation_2.md"),
    ],
)
def test_a_file_that_would_be_removed_is_refused(capsys, tmp_path, monkeypatch, plain_run, words, name):
    monkeypatch.setattr(onnx_file, "to_onnx", lambda subject, given, opset: b"")
    # Even a link to nothing is a person's own.
    (tmp_path / name).symlink_to(tmp_path / "away")
    line = refused(capsys, 2, plain_run, *words, f"--to={tmp_path}", "--images=1")
    assert f"{name}: is there already: give --force" in line
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_that_came_during_the_work_is_kept(capsys, tmp_path, monkeypatch, plain_run):
    to_weights = weights_file.to_weights

    def meanwhile(subject, member):
        (tmp_path / "generation_2.onnx").write_bytes(b"of another")
        return to_weights(subject, member)

    monkeypatch.setattr(weights_file, "to_weights", meanwhile)
    assert "generation_2.onnx: is there already" in refused(capsys, 2, *export_weights(plain_run, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["generation_2.onnx"]


def test_a_stop_between_renames_leaves_no_card(capsys, tmp_path, monkeypatch, plain_run):
    words = export_weights(plain_run, tmp_path)
    exported(capsys, *words)

    def fails(source, target):
        if Path(target).suffix == ".md" and Path(target).parent == tmp_path:
            raise OSError(errno.EIO, "Input/output error", str(target))
        return replace_file(source, target)

    replace_file = os.replace
    monkeypatch.setattr(os, "replace", fails)
    assert "Input/output error" in refused(capsys, 1, *words, "--force")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["generation_2.md", "generation_2.safetensors"]


@pytest.mark.usefixtures("_signals_are_heard")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_leaves_nothing(capsys, tmp_path, monkeypatch, plain_run, number):
    before = signal.getsignal(number)
    reached = []

    def in_the_middle(subject, member):
        # The first file is there, and a library catches all errors.
        reached.append([path.name for path in (tmp_path / "out").iterdir()])
        try:
            signal.raise_signal(number)
        except Exception:  # noqa: BLE001 (as libraries do)
            reached.append("swallowed")
        return b""

    monkeypatch.setattr(weights_file, "to_weights", in_the_middle)
    line = refused(capsys, 128 + number, *export_weights(plain_run, tmp_path / "out"))
    assert line == f"fastgen: stopped by {number.name}"
    ((stage,),) = reached
    assert stage.startswith(".generation_2.")
    assert not (tmp_path / "out").exists()
    assert signal.getsignal(number) is before


@pytest.mark.usefixtures("_signals_are_heard")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("then", ["an error", "a file"])
def test_a_signal_that_the_exporter_swallows_ends_the_work(capsys, tmp_path, monkeypatch, plain_run, number, then):
    """torch catches all that is raised in its tracing: it goes on, or ends with an error of its own."""
    heard = []

    def swallowing(*words, **options):
        for _ in range(2):
            try:
                signal.raise_signal(number)
            except BaseException as error:  # noqa: BLE001 (as torch does)
                heard.append(type(error).__name__)
        if then == "an error":
            raise RuntimeError("Failed to export the model")
        return SimpleNamespace(model_proto=onnx.ModelProto())

    monkeypatch.setattr(torch.onnx, "export", swallowing)
    monkeypatch.setattr(onnx_file, "_forget_places", lambda model: model.opset_import.add(domain="", version=18))
    monkeypatch.setattr(onnx_file, "run_onnx", lambda *words: pytest.fail("the work went on"))
    line = refused(capsys, 128 + number, plain_run, "--format=onnx", "--images=1", f"--to={tmp_path / 'out'}")
    assert line == f"fastgen: stopped by {number.name}"
    # The second one is heard, too, as the first one ended nothing.
    assert heard == ["_Signal", "_Signal"]
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("_signals_are_heard")
def test_a_signal_does_not_break_off_tidying_up_or_putting_in_place(capsys, tmp_path, monkeypatch, plain_run):
    replace_file, remove = os.replace, shutil.rmtree

    def during(work):
        def whole(*words, **options):
            signal.raise_signal(signal.SIGINT)
            return work(*words, **options)

        return whole

    def while_put_in_place(source, target):
        # Not of the stage, where writing is yet to be ended by a signal.
        return (during(replace_file) if Path(target).parent == tmp_path else replace_file)(source, target)

    monkeypatch.setattr(os, "replace", while_put_in_place)
    monkeypatch.setattr(shutil, "rmtree", during(remove))
    files, _ = exported(capsys, *export_weights(plain_run, tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == set(files)


def test_a_full_disk_is_one_line_and_leaves_nothing(capsys, tmp_path, monkeypatch, plain_run):
    def full(stage, name, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(stage.path / name))

    monkeypatch.setattr(export, "write", full)
    line = refused(capsys, 1, *export_weights(plain_run, tmp_path / "out"))
    assert "No space left on device: free some space, or name another folder with --to" in line
    assert not (tmp_path / "out").exists()


def test_what_a_killed_export_left_is_removed(capsys, tmp_path, plain_run):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = place.socket.gethostname()
    # This process's own number is that of an earlier one.
    (tmp_path / f".generation_2.{host}-{os.getpid()}.partial").mkdir()
    kept = [f".generation_2.{host}-{os.getppid()}.partial", f".generation_2.elsewhere-{dead.pid}.partial"]
    kept += [f".generation_1.{host}-{dead.pid}.partial"]
    for name in [*kept, f".generation_2.{host}-{dead.pid}.partial"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_bytes(b"half")
    files, _ = exported(capsys, *export_weights(plain_run, tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {*kept, *files}


def test_a_graph_of_another_opset_than_asked_for_is_refused(monkeypatch):
    of = subject(network("resnet8"))
    traced = onnx_file._traced
    monkeypatch.setattr(onnx_file, "_traced", lambda graph, subject, given, opset: traced(graph, subject, given, 18))
    with pytest.raises(UserError, match="--opset=19: torch could not convert the graph, which is of 18"):
        to_onnx(of, "pixels", 19)
    assert maker_of(of).library == "fastgen"
