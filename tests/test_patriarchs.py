"""Objectives beside the paper's own, against closed forms in fp64 numpy; SoTeacher's Lipschitz term by hand.

label smoothing:     q = (1-eps) onehot + eps/C,  L = -sum q ln p,           dL/dz = p - q
confidence penalty:  L = -ln p_y + beta sum p ln p,  dL/dz = (p - onehot) + beta p (ln p - sum p ln p)
a K for each sample: the tolerant loss of each row alone, with its own K and eta
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastgen import train
from fastgen.config import TrainSettings
from fastgen.data.batch import Batch
from fastgen.errors import UserError, command
from fastgen.grade import make_grade
from fastgen.laws import eta_for_confidence, smoothed_confidence
from fastgen.learner import make_learner
from fastgen.lipschitz import lipschitz_term
from fastgen.losses import confidence_penalty, label_smoothing, make_loss, tolerant, tolerant_adaptive
from fastgen.models import build_model, initialise
from fastgen.plan import Objective, make_plan
from fastgen.recipe import dump, load_text, read_recipe
from fastgen.step import DTYPES, make_forward

ROWS = 16


def logits(classes=10, rows=ROWS, seed=0, spread=3.0):
    draw = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, classes, generator=draw, dtype=torch.float64) * spread
    return z, torch.randint(0, classes, (rows,), generator=draw)


def log_softmax_f64(z):
    shifted = z - z.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def smoothing_f64(z, y, smoothing):
    log_p, q = log_softmax_f64(z), (1 - smoothing) * np.eye(z.shape[1])[y] + smoothing / z.shape[1]
    return -(q * log_p).sum(1).mean(), (np.exp(log_p) - q) / len(z)


def penalty_f64(z, y, weight):
    log_p = log_softmax_f64(z)
    p, onehot = np.exp(log_p), np.eye(z.shape[1])[y]
    negative_entropy = (p * log_p).sum(1, keepdims=True)
    loss = -log_p[np.arange(len(z)), y] + weight * negative_entropy[:, 0]
    return loss.mean(), ((p - onehot) + weight * p * (log_p - negative_entropy)) / len(z)


def adaptive_f64(z, y, confidence, k, mass):
    losses, gradients, ks = [], [], []
    for row, label in zip(z, y, strict=True):
        p = np.exp(log_softmax_f64(row[None]))[0]
        order = sorted(range(len(row)), key=lambda j, row=row: (-row[j], j))
        own, reached = 0, 0.0
        while reached < mass and own < k:
            reached += p[order[own]]
            own += 1
        own = max(own, 2)
        ks.append(own)
        eta, w = (own - 1) / ((own - 1) + own * confidence), np.zeros(len(row))
        w[order[0]], w[order[1:own]] = 1, -1 / (own - 1)
        s = (w * p).sum()
        losses.append((1 - eta) * -np.log(p[label]) + eta * s)
        gradients.append((1 - eta) * (p - np.eye(len(row))[label]) + eta * p * (w - s))
    return np.mean(losses), np.array(gradients) / len(z), ks


CASES = {
    "smoothing": (label_smoothing, smoothing_f64, (0.1,)),
    "no smoothing": (label_smoothing, smoothing_f64, (0.0,)),
    "penalty": (confidence_penalty, penalty_f64, (0.3,)),
    "adaptive": (tolerant_adaptive, lambda *words: adaptive_f64(*words)[:2], (0.6, 5, 0.9)),
    "adaptive, all classes": (tolerant_adaptive, lambda *words: adaptive_f64(*words)[:2], (0.5, 10, 0.99)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", list(CASES))
def test_the_losses_equal_their_closed_forms(name, dtype):
    loss, reference, settings = CASES[name]
    z, y = logits()
    z = z.to(dtype).requires_grad_()
    value = loss(z, y, *settings)
    value.backward()
    expected, gradient = reference(z.detach().double().numpy(), y.numpy(), *settings)
    # 16 rows of 10 classes: some hundred roundings, of numbers no larger than the logits, 12.
    unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert abs(value.item() - expected) <= 200 * unit * 12
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(dtype, 0.0)
    np.testing.assert_allclose(z.grad.double().numpy(), gradient, rtol=rounding, atol=200 * unit + rounding * 2.0**-14)


class Noted(TorchDispatchMode):
    """Keeps the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("name", list(CASES))
def test_no_loss_asks_a_gpu_for_what_it_refuses_to_do_the_same_way_twice(name):
    # What torch's documentation of `use_deterministic_algorithms` says to raise on CUDA, of all that losses may use.
    refused = {"cumsum", "kthvalue", "median", "histc", "bincount", "put_", "nll_loss2d_forward", "nll_loss2d_backward"}
    loss, _, settings = CASES[name]
    z, y = logits()
    z = z.float().requires_grad_()
    with Noted() as noted:
        loss(z, y, *settings).backward()
    assert "_log_softmax" in noted.names
    assert not refused & noted.names


def test_each_sample_has_its_own_k():
    z, y = logits()
    assert len({*adaptive_f64(z.numpy(), y.numpy(), 0.6, 5, 0.9)[2]}) >= 3


def test_with_all_mass_wanted_all_samples_have_the_largest_k():
    z, y = logits(spread=0.1)
    adaptive = tolerant_adaptive(z, y, 0.6, 5, 0.999)
    assert adaptive.item() == pytest.approx(tolerant(z, y, eta_for_confidence(0.6, 5), 5).item(), abs=1e-14)


def test_make_loss_gives_each_patriarch_and_tolerant_student_its_objective():
    (z, y), (v, _) = logits(), logits(seed=1)
    assert make_loss(Objective(smoothing=0.2))(z, y, None).item() == label_smoothing(z, y, 0.2).item()
    assert make_loss(Objective(entropy_weight=0.2))(z, y, None).item() == confidence_penalty(z, y, 0.2).item()
    eta = eta_for_confidence(0.6, 5)
    adaptive = make_loss(Objective(eta=eta, k=5, k_mass=0.9))(z, y, None).item()
    assert adaptive == pytest.approx(tolerant_adaptive(z, y, 0.6, 5, 0.9).item(), abs=1e-14)
    # (1 - lambda) of the tolerant term, lambda of the divergence.
    student = make_loss(Objective(eta=eta, k=5, teacher_weight=0.7))(z, y, v).item()
    log_p, log_t = log_softmax_f64(z.numpy()), log_softmax_f64(v.numpy())
    divergence = (np.exp(log_t) * (log_t - log_p)).sum(1).mean()
    assert student == pytest.approx(0.3 * tolerant(z, y, eta, 5).item() + 0.7 * divergence, abs=1e-13)


def test_what_has_no_kernel_is_not_graded_by_one():
    for objective in (
        Objective(smoothing=0.1), Objective(entropy_weight=0.1), Objective(eta=0.5, k=5, teacher_weight=0.5),
        Objective(eta=0.5, k=5, k_mass=0.9), Objective(lipschitz_weight=1e-5),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="there is no kernel"):
            make_grade(objective, fused=True)
    assert Objective(eta=0.5, k=5).fused


@pytest.mark.parametrize("smoothing", [0.1, 0.4])
def test_the_minimiser_under_smoothing_has_the_confidence_of_the_law(smoothing):
    z = torch.zeros(1, 10, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([z], max_iter=300, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = label_smoothing(z, torch.tensor([3]), smoothing)
        value.backward()
        return value

    optimizer.step(closure)
    assert z.softmax(1)[0, 3].item() == pytest.approx(smoothed_confidence(smoothing, 10), abs=1e-6)


# SoTeacher's Lipschitz term.


class ByHand(nn.Module):
    """A network whose bounds can be told by looking at it: 10, 4 and 8."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, (1, 2), bias=True)
        self.norm = nn.BatchNorm2d(2, eps=0.25)
        self.fc = nn.Linear(3, 2)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([1.0, -2.0, 3.0, -4.0]).reshape(2, 1, 1, 2))
            self.conv.bias.fill_(100.0)
            self.norm.weight.copy_(torch.tensor([-2.0, 3.0]))
            # 2 / sqrt(0 + 0.25) = 4; 3 / sqrt(3.75 + 0.25) = 1.5
            self.norm.running_var.copy_(torch.tensor([0.0, 3.75]))
            # Columns |1| + |-2|, |-7| + |1|, |2| + |2|
            self.fc.weight.copy_(torch.tensor([[1.0, -7.0, 2.0], [-2.0, 1.0, 2.0]]))
            self.fc.bias.fill_(100.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_lipschitz_term_of_a_network_made_by_hand(dtype):
    network = ByHand().to(dtype)
    term = lipschitz_term(network)
    assert term.item() == 10 + 4 + 8
    term.backward()
    assert network.conv.weight.grad.flatten().tolist() == [1, -1, 1, -1]
    assert network.norm.weight.grad.tolist() == [-2, 0]
    assert network.fc.weight.grad.tolist() == [[0, -1, 0], [0, 1, 0]]
    assert network.conv.bias.grad is None
    assert network.fc.bias.grad is None


def test_the_lipschitz_term_of_a_resnet_is_that_of_a_plain_sum():
    model = initialise(build_model("resnet20", 100, 3, "strided"), 0)
    draw = np.random.default_rng(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.copy_(torch.from_numpy(draw.uniform(0.5, 2, module.running_var.shape)))
            module.weight.data.copy_(torch.from_numpy(draw.normal(size=module.weight.shape)))
    state, expected = {name: value.double().numpy() for name, value in model.state_dict().items()}, 0.0
    for name, value in state.items():
        if value.ndim == 4:
            expected += np.abs(value).sum()
        if name.endswith("running_var"):
            expected += (np.abs(state[name.replace("running_var", "weight")]) / np.sqrt(value + 1e-5)).max()
    expected += np.abs(state["fc.weight"]).sum(0).max()
    # Sums of up to 37,000 fp32 numbers, in blocks.
    assert lipschitz_term(model).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("parts", [1, 3])
def test_a_step_adds_the_lipschitz_term_s_gradient_in_fp32(precision, parts):
    """Against fp64, as the difference of two steps without momentum or decay, divided by the learning rate."""
    weights, weight = {}, 1e-5
    # fp16's gradients are scaled: a first step may be skipped.
    for lipschitz_weight in (0.0, weight):
        train_settings = TrainSettings(
            epochs=1, batch_size=12, accumulate_steps=parts, precision=precision, momentum=0.0, nesterov=False,
            weight_decay=0.0,
        )  # fmt: skip
        model = initialise(build_model("resnet8", 10, 3, "strided"), 0).to(memory_format=torch.channels_last).train()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        learner = make_learner(
            model, make_grade(Objective()), None, lambda x, jitter: x, train_settings, torch.device("cpu"), 1,
            lipschitz_weight=lipschitz_weight,
        )  # fmt: skip
        draw = torch.Generator().manual_seed(0)
        pixels = torch.randn(12, 3, 8, 8, generator=draw).to(memory_format=torch.channels_last)
        labels = torch.arange(12) % 10
        learner.step(Batch(pixels.to(DTYPES[precision]), labels, labels), 1.0)
        weights[lipschitz_weight] = {name: value.double() for name, value in model.state_dict().items()}
        moved = weights[lipschitz_weight]["conv1.weight"] - before["conv1.weight"].double()
        assert moved.abs().max() > 1e-3
    for name, value in before.items():
        if name.endswith(".weight") and value.ndim == 4:
            step = weights[0.0][name] - weights[weight][name]
            # Of weights below 1 and gradients below 4, each rounded to fp32 a few times.
            torch.testing.assert_close(step, weight * value.double().sign(), rtol=0, atol=4 * 2.0**-22)


def test_the_step_s_gradient_has_the_lipschitz_term_once_whatever_the_parts():
    """Parts of 3 and 5 images of 8, weighed by their images."""
    network, x = ByHand(), torch.zeros(8, 1, 1, 2)

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network

        def forward(self, x):
            return network.fc(x.flatten(1)[:, [0, 1, 1]])

    labels = torch.zeros(8, dtype=torch.int64)
    gradients = {}
    for weight in (0.0, 0.5):
        forward = make_forward(Logits(), make_grade(Objective()), None, lambda x, jitter: x, lipschitz_weight=weight)
        network.zero_grad()
        for part in (slice(0, 3), slice(3, 8)):
            scale = torch.tensor((part.stop - part.start) / 8, dtype=torch.float64)
            graded = forward(x[part], labels[part], scale=scale)
            torch.autograd.backward(graded.root, graded.gradient)
        gradients[weight] = network.fc.weight.grad.clone()
    # The weights' own part is not the backward pass's.
    torch.testing.assert_close(gradients[0.5], gradients[0.0], rtol=0, atol=0)
    assert network.norm.weight.grad.tolist() == [-1, 0]
    # What is told is what is minimised.
    value = make_forward(Logits(), make_grade(Objective()), None, lambda x, jitter: x, lipschitz_weight=0.5)(x, labels)
    plain = make_forward(Logits(), make_grade(Objective()), None, lambda x, jitter: x)(x, labels)
    assert value.loss_sum.item() - plain.loss_sum.item() == pytest.approx(8 * 0.5 * 22, rel=1e-6)


def test_a_network_without_such_layers_is_told():
    with pytest.raises(ValueError, match="no convolution"):
        lipschitz_term(nn.ReLU())


# Recipes.


WORDS = ("--gen.confidence=1.0",)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--gen.patriarch=label_smoothing"], "gen.patriarch = label_smoothing knows no confidence"),
        ([*WORDS, "--gen.patriarch=label_smoothing", "--gen.smoothing=1.0"], "gen.smoothing = 1.0"),
        ([*WORDS, "--gen.patriarch=soteacher", "--gen.smoothing=0.2"], "gen.smoothing has no say"),
        (["--gen.entropy_weight=0.2"], "gen.entropy_weight has no say with gen.patriarch = tolerant"),
        ([*WORDS, "--gen.patriarch=soteacher", "--gen.lipschitz_weight=-1"], "gen.lipschitz_weight = -1.0: give 0"),
        ([*WORDS, "--gen.patriarch=soteacher", "--train.kernels=triton"], "set train.kernels=torch"),
        ([*WORDS, "--gen.patriarch=label_smooting"], "expected one of"),
        (["--gen.student_confidence=[0.6]"], "has 1 values for 2 students"),
        (["--gen.student_confidence=0.1"], "gen.student_confidence = 0.1: give a value in [1/k, 1]"),
        (["--gen.student_confidence=0.6", "--gen.student_k=1"], "gen.student_k = 1: give 2 to 10"),
        (["--gen.student_confidence=0.6", "--gen.student_k=[2,3,4]"], "gen.student_k has 3 values for 2 students"),
        (["--gen.student_confidence=0.6", "--train.kernels=triton"], "no kernel of tolerant students"),
        (["--gen.k_mass=0.9", "--gen.confidence=0.4"], "confidences of at least 0.5"),
        (["--gen.k_mass=0.9", *WORDS], "gen.k_mass needs a tolerant generation"),
        (["--gen.student_k=3"], "gen.student_k has no say with gen.student_confidence = 1"),
        (
            [*WORDS, "--gen.patriarch=soteacher", "--gen.consistency_weight=0.0", "--gen.consistency_dtype=fp16"],
            "gen.consistency_dtype has no say",
        ),
        (["--gen.teacher_weight=0.0", "--gen.ensemble_teachers=2"], "gen.ensemble_teachers has no say"),
        (["--gen.k_mass=1.5"], "gen.k_mass = 1.5: give a probability"),
    ],
)
def test_what_makes_no_sense_is_one_line(write_recipe, capsys, words, told):
    recipe = write_recipe(gen__generations=2)
    assert command(read_recipe, ["--cfg", str(recipe), *words]) == 2
    err = capsys.readouterr().err
    assert told in err
    assert err.count("\n") == 1


def test_students_have_their_own_confidence_and_k(write_recipe):
    words = ["--gen.student_confidence=[0.7,1.0]", "--gen.student_k=[3,4]"]
    recipe = read_recipe(["--cfg", str(write_recipe(gen__generations=2)), *words])
    assert recipe.student_eta(1) == eta_for_confidence(0.7, 3)
    assert recipe.student_eta(2) == 0
    assert (recipe.student_k(1), recipe.student_k(2)) == (3, 4)
    # With gen.only, a number is of that generation alone.
    recipe = read_recipe(
        ["--cfg", str(write_recipe(gen__generations=2)), "--gen.only=2", "--gen.student_confidence=0.8"]
    )
    assert recipe.gen.student_confidence == (1.0, 0.8)
    words = ["--gen.only=2", "--gen.student_confidence=0.8", "--gen.student_k=3"]
    recipe = read_recipe(["--cfg", str(write_recipe(gen__generations=3)), *words])
    assert recipe.gen.student_k == (recipe.gen.k, 3, recipe.gen.k)
    assert load_text(dump(recipe), "dump") == recipe


def test_tolerance_that_the_teacher_leaves_no_say_makes_no_other_node(write_recipe):
    words = ["--cfg", str(write_recipe(gen__generations=2, gen__teacher_weight=1.0))]
    plain, tolerant_too = (
        make_plan(read_recipe([*words, *more]), "data") for more in ((), ("--gen.student_confidence=0.6",))
    )
    assert [g.node for g in plain] == [g.node for g in tolerant_too]
    assert [g.ideal for g in plain] == [g.ideal for g in tolerant_too]


SETTINGS = {
    "smoothing": ["--gen.patriarch=label_smoothing", *WORDS],
    "penalty": ["--gen.patriarch=confidence_penalty", *WORDS],
    "soteacher": ["--gen.patriarch=soteacher", *WORDS],
    "tolerant students": ["--gen.student_confidence=0.8", "--gen.student_k=3"],
    "a k for each sample": ["--gen.k_mass=0.9"],
    "soteacher in bf16": ["--gen.patriarch=soteacher", *WORDS, "--train.precision=bf16"],
    "soteacher, compiled": ["--gen.patriarch=soteacher", *WORDS, "--train.engine=compile"],
}


@pytest.mark.parametrize("name", list(SETTINGS))
def test_each_of_them_trains(write_recipe, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(data__train_limit=200, train__epochs=3, train__batch_size=40, gen__k=5)
    assert command(train.main, ["--cfg", str(recipe), "--run.dir=run", *SETTINGS[name]]) == 0
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["generations"]
    assert [row["role"] for row in rows] == ["patriarch", "student"]
    # 90 % is chance.
    assert all(row["train_top1_error"] < 80 for row in rows)
    ideals = [row["ideal_confidence"] for row in rows]
    assert (ideals[0] is None) == (name.startswith(("penalty", "soteacher")))
    if name == "smoothing":
        assert ideals[0] == pytest.approx(0.91)
    if name == "tolerant students":
        assert (ideals[0], ideals[1]) == (pytest.approx(0.6), None)


def test_names_of_generations_stay_what_they_were():
    """Settings of other patriarchs are no part of a tolerant one's name."""
    assert Objective(eta=0.5, k=5).identity() == {"eta": 0.5, "k": 5, "teacher_weight": 0.0, "temperature": 1.0}
    assert Objective(smoothing=0.1).identity()["smoothing"] == 0.1


def test_a_recipe_that_is_read_twice_is_the_same(write_recipe):
    words = ["--cfg", str(write_recipe(gen__generations=2)), *SETTINGS["tolerant students"]]
    assert read_recipe(words) == read_recipe(words)
    with pytest.raises(UserError, match=r"did you mean 'gen\.student_confidence'"):
        read_recipe(["--cfg", str(write_recipe(gen__generations=2)), "--gen.student_confidense=0.8"])
