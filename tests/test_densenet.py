"""models/densenet_cifar.py: sizes, the forward pass against plain arithmetic, and what memory_efficient changes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from processes import run_processes
from test_models import plain_batchnorm, some_images, trained_looking
from torch import nn

from fastgen.config import TrainSettings
from fastgen.data.batch import Batch
from fastgen.distributed import ALONE
from fastgen.folding import fold
from fastgen.grade import plain
from fastgen.learner import make_learner
from fastgen.models import build_model, densenet_cifar, initialise, parameter_count
from fastgen.models.densenet_cifar import CifarDenseNet

CPU = torch.device("cpu")


def small(memory_efficient=False, depth=16, growth=4, channels=3):
    model = initialise(CifarDenseNet(depth, growth, 10, channels, memory_efficient), 0)
    return model.to(memory_format=torch.channels_last).train()


def counted_by_hand(depth, growth, classes, channels=3):
    """Weights of convolutions, two values a batch-norm channel, the linear layer: summed in closed loops."""
    units, width = (depth - 4) // 6, 2 * growth
    total = 9 * channels * width
    for block in range(3):
        for _ in range(units):
            total += 2 * width + width * 4 * growth + 2 * 4 * growth + 9 * 4 * growth * growth
            width += growth
        if block < 2:
            total += 2 * width + width * (width // 2)
            width //= 2
    return total + 2 * width + (width + 1) * classes


@pytest.mark.parametrize(
    ("name", "depth", "growth", "millions"), [("densenet100", 100, 12, 0.80), ("densenet190", 190, 40, 25.8)]
)
def test_parameter_counts_are_the_papers(name, depth, growth, millions):
    model = build_model(name, 100, 3)
    assert parameter_count(model) == counted_by_hand(depth, growth, 100)
    assert round(parameter_count(model) / 1e6, 2 if millions < 1 else 1) == millions
    assert sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules()) == depth
    assert model.conv.out_channels == 2 * growth


@pytest.mark.parametrize("depth", [4, 9, 98, 101])
def test_other_depths_are_refused(depth):
    with pytest.raises(ValueError, match="6n \\+ 4"):
        CifarDenseNet(depth, 12, 10)


def plain_network(x, weights, units, training):
    """The whole network in fp64 from a state dict alone."""

    def norm_relu_conv(x, norm, conv, padding=0):
        x = plain_batchnorm(x, weights, norm, training).clamp(min=0)
        return F.conv2d(x, weights[f"{conv}.weight"], padding=padding)

    x = F.conv2d(x, weights["conv.weight"], padding=1)
    for block in (0, 2, 4):
        for unit in range(units):
            name = f"stages.{block}.units.{unit}"
            narrow = norm_relu_conv(x, f"{name}.bn1", f"{name}.conv1")
            x = torch.cat([x, norm_relu_conv(narrow, f"{name}.bn2", f"{name}.conv2", 1)], 1)
        if block < 4:
            x = norm_relu_conv(x, f"stages.{block + 1}.bn", f"stages.{block + 1}.conv")
            x = (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4
    x = plain_batchnorm(x, weights, "bn", training).clamp(min=0)
    return x.mean((2, 3)) @ weights["fc.weight"].T + weights["fc.bias"]


@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, 8)])
def test_forward_equals_plain_arithmetic(channels, size, training, memory_efficient):
    model = trained_looking(small(memory_efficient, channels=channels)).double().train(training)
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    images = some_images(channels=channels, size=size, dtype=torch.float64)
    logits, expected = model(images), plain_network(images, weights, 2, training)
    # 16 layers of at most 145 summands, each rounded at 2^-53.
    torch.testing.assert_close(logits, expected, rtol=1e-11, atol=1e-11 * expected.abs().max().item())
    assert expected.std() > 1e-4


def test_densenet100_is_finite_and_every_parameter_has_a_gradient():
    model = initialise(build_model("densenet100", 100, 3), 0).train()
    F.cross_entropy(model(some_images(2)), torch.arange(2)).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert not [name for name, p in model.named_parameters() if not p.grad.abs().max() > 0]


def test_weights_lie_channels_last_and_so_do_planes():
    model, seen = small(), []
    model.stages[0].units[1].bn1.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    model(some_images())
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


# Memory-efficient.


def trained(memory_efficient, precision="fp32", parts=1, frozen=False, group=ALONE):
    """All weights, gradients and statistics after two steps of the trainer's."""
    model = small(memory_efficient)
    if frozen:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    train = TrainSettings(epochs=1, batch_size=12, accumulate_steps=parts, precision=precision)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    learner = make_learner(
        model, plain(lambda z, y, v: F.cross_entropy(z.float(), y)), None, lambda x, j: x, train, CPU
    )
    for seed in range(2):
        labels = torch.arange(12) % 10
        own = slice(*group.share.bounds(12))
        images = some_images(12, size=16, dtype=dtype, seed=seed)[own]
        learner.step(Batch(images, labels[own], labels[own]), 0.1, 12)
    found = dict(model.state_dict())
    return found | {f"{name}.grad": p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("case", [
    {}, {"precision": "bf16"}, {"precision": "fp16"}, {"parts": 3}, {"frozen": True},
], ids=str)  # fmt: skip
def test_memory_efficient_gives_the_same_bits(case):
    kept, again = trained(False, **case), trained(True, **case)
    assert kept.keys() == again.keys()
    assert not [name for name in kept if not torch.equal(kept[name], again[name])]
    # Of two steps: computed twice, the batches were noted once.
    assert kept["bn.num_batches_tracked"] == 2 * case.get("parts", 1) * (not case.get("frozen"))


def by_two(group):
    return [trained(memory_efficient, group=group) for memory_efficient in (False, True)]


def test_two_processes_give_the_same_bits_too(tmp_path):
    for kept, again in run_processes(tmp_path, 2, by_two):
        assert not [name for name in kept if not torch.equal(kept[name], again[name])]


def test_the_test_of_bits_sees_statistics_that_are_noted_twice(monkeypatch):
    expected = trained(False)
    monkeypatch.setattr(densenet_cifar, "_without_noting", lambda norm, x: norm(x))
    found = trained(True)
    assert [name for name in found if not torch.equal(found[name], expected[name])]


def test_compiled_it_notes_a_batch_once_and_computes_the_same():
    models = [small(efficient, depth=10) for efficient in (False, True)]
    torch._dynamo.reset()
    for model in models:
        # Its tracer and its choice of what to compute again; no code is made, which takes minutes.
        network = torch.compile(model, dynamic=False, backend="aot_eager_decomp_partition")
        F.cross_entropy(network(some_images(4, size=8)), torch.arange(4)).backward()
    kept, again = (model.state_dict() for model in models)
    for name in kept:
        # A compiler may join operators in another way: roundings of 10 layers.
        torch.testing.assert_close(again[name], kept[name], rtol=1e-5, atol=1e-6)
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(two.grad, one.grad, rtol=1e-4, atol=1e-5)
    assert all(value == 1 for name, value in again.items() if name.endswith("tracked"))


def saved_bytes(model, images):
    """Memory that the forward pass leaves for the backward pass, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        logits = model(images)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(size for place, size in storages.items() if place not in own), logits


def test_memory_efficient_keeps_far_less():
    images = some_images(2)
    (kept, _), (again, logits) = (
        saved_bytes(initialise(build_model("densenet100", 10, 3, memory_efficient=on), 0).train(), images)
        for on in (False, True)
    )
    # Seen: 0.363. Of a unit that reads C channels, 2 C + 9 k planes are kept, and 9 k without the joined ones.
    assert again < 0.4 * kept
    logits.sum().backward()


def test_without_gradients_nothing_is_computed_again(monkeypatch):
    calls = []
    monkeypatch.setattr(densenet_cifar, "checkpoint", lambda *arguments, **how: calls.append(1))
    model = small(memory_efficient=True)
    with torch.no_grad():
        model(some_images())
    model.eval()(some_images())
    assert not calls


@torch.no_grad()
@pytest.mark.parametrize("memory_efficient", [False, True])
def test_a_folded_teacher_computes_the_same(memory_efficient):
    model = trained_looking(small(memory_efficient)).double().eval()
    expected = model(some_images(dtype=torch.float64))
    folded, count = fold(copy.deepcopy(model))
    # The batch-norm between a unit's convolutions; all others stand before theirs.
    assert count == 3 * 2
    found = folded(some_images(dtype=torch.float64))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * expected.abs().max().item())
    assert expected.std(0).max() > 1e-6 * expected.abs().max()
