"""Networks of torchvision and timm by name: models/library.py, trial.py, and what training does with them."""

import copy
import json
import random
import signal
import sys
from dataclasses import replace

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from test_models import some_images
from torch import nn

from fastgen.config import ModelSettings
from fastgen.data.facts import DATASETS
from fastgen.errors import Stopped, UserError
from fastgen.models import build_model, fresh_network
from fastgen.networks import NETWORKS, library_and_name, traits_of
from fastgen.recipe import read_recipe
from fastgen.record import Recorder
from fastgen.teacher import make_teacher
from fastgen.train import main
from fastgen.trial import require_named
from fastgen.working_copy import WorkingCopy

CPU = torch.device("cpu")
CIFAR = DATASETS["cifar10"]
try:
    import timm
except ModuleNotFoundError:
    timm = None
needs_timm = pytest.mark.skipif(timm is None, reason="timm is not installed")


def fresh(name, seed=0, facts=CIFAR):
    return fresh_network(ModelSettings(name=name), facts, seed)


# Names.


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("torchvision/renset18", ["torchvision has no network of this name", "resnet18"]),
        ("torchvision/fcn_resnet50", ["torchvision has no network of this name"]),
        pytest.param("timm/resnte18", ["timm has no network of this name", "resnet18"], marks=needs_timm),
        pytest.param("timm/qqqqqqqq", ["timm has no network of this name; timm has"], marks=needs_timm),
    ],
)
def test_a_name_that_a_library_has_not_is_one_line(name, parts):
    with pytest.raises(UserError) as caught:
        require_named(name)
    assert all(part in str(caught.value) for part in [f"model.name = {name}", *parts])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["timmy/resnet18", "torchvision/", "/resnet18", "timm/resnet18.a1_in1k", "timm/a/b", "hf-hub:x", "Timm/x"]
)
def test_a_name_of_another_form_is_refused_by_the_rules(write_recipe, name):
    with pytest.raises(UserError, match=r"no such network.*resnet20.*torchvision/NAME or timm/NAME"):
        read_recipe([f"--cfg={write_recipe(model__name=name)}"])


def test_names_of_libraries_are_split():
    assert library_and_name("timm/resnet18") == ("timm", "resnet18")
    assert library_and_name("resnet18") == (None, "resnet18")
    assert not set(NETWORKS) & {"timm", "torchvision"}
    assert traits_of("timm/x").grey
    assert not traits_of("torchvision/x").grey


def test_without_timm_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="pip install timm"):
        require_named("timm/resnet18")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"model__name": "torchvision/resnet18"}, "takes colour images"),
        ({"model__name": "timm/resnet18", "model__downsample": "pooled"}, "model.downsample = pooled"),
        ({"model__name": "timm/resnet18", "model__memory_efficient": True}, "model.memory_efficient"),
        ({"model__name": "timm/resnet18", "train__batchnorm": "triton"}, "train.batchnorm = triton"),
        ({"model__memory_efficient": True}, "densenet100 and densenet190, not for resnet8"),
        ({"model__name": "densenet100", "model__downsample": "pooled"}, "model.downsample = pooled"),
        ({"model__name": "se_resnet18"}, "takes colour images"),
        (
            {"model__name": "densenet100", "model__memory_efficient": True, "train__batchnorm": "triton"},
            "train.batchnorm=torch",
        ),
        (
            {"model__name": "densenet100", "model__memory_efficient": True, "dist__batchnorm": "synchronised"},
            "dist.batchnorm=local",
        ),
    ],
)
def test_what_cannot_be_together_is_refused(write_recipe, change, part):
    with pytest.raises(UserError) as caught:
        read_recipe([f"--cfg={write_recipe(**change)}"])
    assert part in str(caught.value)


def test_memory_efficient_is_part_of_an_identity_only_where_a_compiler_may_change_bits(write_recipe):
    def identity(*words):
        return read_recipe([f"--cfg={write_recipe(model__name='densenet100')}", *words]).identity()

    assert "memory_efficient" not in identity()["model"]
    assert identity("--model.memory_efficient=true") == identity()
    assert identity("--model.memory_efficient=true", "--train.engine=compile") != identity("--train.engine=compile")


# Weights.

SOME = ["torchvision/shufflenet_v2_x0_5", "torchvision/convnext_tiny", pytest.param("timm/resnet10t", marks=needs_timm)]


@pytest.mark.parametrize("name", SOME)
def test_weights_depend_on_the_seed_alone(name):
    torch.manual_seed(1)
    random.seed(1)
    before = torch.get_rng_state()
    one = fresh(name, 5).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    random.seed(2)
    again, other = fresh(name, 5).state_dict(), fresh(name, 6).state_dict()
    assert all(torch.equal(one[key], again[key]) for key in one)
    drawn = [key for key in one if not torch.equal(one[key], other[key])]
    assert len(drawn) > 10


def test_weights_are_as_torchvision_initialises_them():
    with torch.random.fork_rng():
        torch.manual_seed(7)
        theirs = torchvision.models.convnext_tiny(num_classes=10).state_dict()
    own = fresh("torchvision/convnext_tiny", 7).state_dict()
    assert list(own) == list(theirs)
    assert all(torch.equal(own[key], theirs[key]) for key in own)


@needs_timm
def test_timm_s_networks_keep_their_names_and_take_grey_images():
    model = fresh("timm/resnet10t", facts=DATASETS["digits"])
    assert list(model.state_dict()) == list(timm.create_model("resnet10t", num_classes=10, in_chans=1).state_dict())
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 10)


def test_what_a_library_computes_when_it_makes_a_network_is_there():
    """Swin's table of positions is in no initialisation: without memory it would hold whatever was there."""
    model = build_model("torchvision/swin_t", 10, 3)
    theirs = torchvision.models.swin_t(num_classes=10)
    for (name, own), (_, other) in zip(model.named_buffers(), theirs.named_buffers(), strict=True):
        assert torch.equal(own, other), name


# 16 bits.


class Odd(nn.Module):
    """Kinds of parameters that copies are not made for."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.LayerNorm(8), nn.Linear(8, 10)
        self.scale = nn.Parameter(torch.full((8,), 0.5))

    def forward(self, x):
        return self.fc(self.norm(self.conv(x).mean((2, 3)) * self.scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_networks_of_other_kinds_run_under_autocast(dtype):
    torch.manual_seed(0)
    model, images = Odd(), some_images(dtype=dtype)
    reference = copy.deepcopy(model)
    working = WorkingCopy(model, dtype)
    logits = working.network(images)
    logits.float().square().sum().backward()
    working.collect()
    with torch.autocast("cpu", dtype):
        expected = reference(images)
    expected.float().square().sum().backward()
    assert logits.dtype == dtype
    assert torch.equal(logits, expected)
    for one, two in zip(model.parameters(), reference.parameters(), strict=True):
        assert one.grad.dtype == torch.float32
        assert torch.equal(one.grad, two.grad)
    model.eval()
    assert working.network.network.training


# Teachers.


class Branching(nn.Module):
    """What torch.fx cannot trace."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, x):
        x = self.bn(self.conv(x))
        return self.fc((x if x.sum() > 0 else -x).mean((2, 3)))


class Deceiving(Branching):
    """What torch.fx traces wrongly."""

    def forward(self, x):
        out = self.fc(self.bn(self.conv(x)).mean((2, 3)))
        return out if isinstance(x, torch.Tensor) else 2 * out


@pytest.mark.parametrize("engine", ["folded", "fused", "compile"])
def test_a_teacher_that_cannot_be_traced_is_refused(engine):
    with pytest.raises(UserError, match=rf"teacher.engine = {engine}: .*Branching.*set teacher.engine=plain"):
        make_teacher(Branching(), CPU, torch.float32, engine, shape=(2, 3, 8, 8))


def test_a_teacher_that_is_traced_wrongly_is_refused():
    with pytest.raises(UserError, match=r"something else: set teacher\.engine=plain"):
        make_teacher(Deceiving(), CPU, torch.float32, shape=(2, 3, 8, 8), checked=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_teacher_is_the_network_in_eval_mode(dtype):
    torch.manual_seed(0)
    model = Branching().train()
    model(some_images())
    reference, images = copy.deepcopy(model).eval(), some_images(seed=1, dtype=dtype)
    teacher = make_teacher(model, CPU, dtype, "plain")
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        expected = reference(images)
    assert torch.equal(teacher(images), expected)
    assert teacher.how == "plain"
    assert not teacher(images).requires_grad


# Runs.


@pytest.fixture
def words(fake_cifar100, write_recipe, tmp_path):
    """Function that gives the words of a small run on random images: 200 of 100 classes in batches of 80, 80 and 40."""

    def of(name, folder="run", **overrides):
        settings = {"train__batch_size": 80, "train__epochs": 1, "data__train_limit": 200, "data__val_limit": 100}
        settings |= {"data__dataset": "cifar100", "model__name": name, "run__log_every_steps": 1} | overrides
        path = write_recipe(name=f"{folder}.yaml", **settings)
        return [f"--cfg={path}", f"--data.root={fake_cifar100}", f"--run.dir={tmp_path / folder / 'run'}"]

    return of


def results(tmp_path, folder="run"):
    return json.loads((tmp_path / folder / "run" / "results.json").read_text())


@pytest.mark.parametrize(
    ("name", "teacher"),
    [
        ("torchvision/shufflenet_v2_x0_5", "folded"),
        pytest.param("timm/resnet10t", "plain", marks=needs_timm),
    ],
)
def test_a_library_s_network_trains_and_teaches(words, tmp_path, name, teacher):
    main(words(name, teacher__engine=teacher))
    found = results(tmp_path)
    assert found["model"] == name
    assert [row["path"]["teacher"] for row in found["generations"]] == [None, teacher]
    assert [row["samples_evaluated"] for row in found["generations"]] == [100, 100]


def test_densenet100_trains_the_same_with_less_memory(write_recipe, tmp_path):
    """Two steps of the patriarch, two of its student, on images of 8 pixels."""
    settings = {"model__name": "densenet100", "train__batch_size": 10, "data__train_limit": 20, "data__val_limit": 10}
    path = write_recipe(**settings)
    for folder, more in (("kept", "false"), ("again", "true")):
        (tmp_path / folder).mkdir()
        main([f"--cfg={path}", f"--run.dir={tmp_path / folder / 'run'}", f"--model.memory_efficient={more}"])
    kept, again = (results(tmp_path, folder)["generations"] for folder in ("kept", "again"))
    assert [row["node"] for row in kept] == [row["node"] for row in again]
    for generation in (0, 1):
        one, two = (
            load_file(tmp_path / folder / "run" / f"generation_{generation}" / "model.safetensors")
            for folder in ("kept", "again")
        )
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert all(bool(value.isfinite().all()) for value in one.values())


@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_a_network_that_draws_ends_the_same_where_it_was_stopped(words, tmp_path, engine):
    """SqueezeNet has dropout, and steps that warm up draw, too."""
    name, how = "torchvision/squeezenet1_1", {"gen__generations": 0, "train__lr": 0.01, "train__engine": engine}
    how["train__graph_steps"] = 1
    main(words(name, "whole", **how))
    stepped = Recorder.stepped

    def stop_in_the_middle(self, step):
        stepped(self, step)
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "stepped", stop_in_the_middle)
        with pytest.raises(Stopped):
            main(words(name, "stopped", **how))
    main(words(name, "stopped", **how))
    one, two = (
        (tmp_path / folder / "run" / "generation_0" / "model.safetensors").read_bytes()
        for folder in ("whole", "stopped")
    )
    assert one == two


@pytest.mark.parametrize(
    ("name", "more", "parts"),
    [
        ("torchvision/vit_b_16", {}, ["does not take 40 images of 32x32 pixels while it trains", "224"]),
        ("torchvision/googlenet", {}, ["gives GoogLeNetOutputs while it trains"]),
        # The last batch of 200 in batches of 199 is one image, of which a stride of 32 leaves one pixel.
        ("torchvision/resnet18", {"train__batch_size": 199}, ["does not take 1 image of 32x32", "more than 1 value"]),
        ("torchvision/renset18", {}, ["did you mean resnet18"]),
        pytest.param("timm/mobilevit_xxs", {}, ["torch.fx cannot trace", "teacher.engine=plain"], marks=needs_timm),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_begun(words, tmp_path, name, more, parts):
    with pytest.raises(UserError) as caught:
        main(words(name, **more))
    assert all(part in str(caught.value) for part in parts), caught.value
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_synchronised_batchnorm_is_refused_where_it_is_of_another_kind(words):
    from fastgen import trial

    class Other(nn.BatchNorm2d):
        pass

    recipe = read_recipe(words("torchvision/shufflenet_v2_x0_5"))
    recipe = replace(recipe, dist=replace(recipe.dist, batchnorm="synchronised"))
    with pytest.raises(UserError, match="batch-norms of another kind"):
        trial._require_plain_batchnorms(recipe, nn.Sequential(nn.BatchNorm2d(3), Other(3)))
    trial._require_plain_batchnorms(recipe, nn.Sequential(nn.BatchNorm2d(3)))
