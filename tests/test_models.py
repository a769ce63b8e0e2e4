"""models/ and teacher.py: sizes, the forward pass against plain arithmetic, initialisation, folding."""

import hashlib
import math
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastgen.augment import Normaliser
from fastgen.config import ModelSettings, TrainSettings
from fastgen.grade import plain
from fastgen.layout import channels_last
from fastgen.losses import distill
from fastgen.models import MODELS, build_model, initialise, parameter_count
from fastgen.models.resnet_cifar import CifarResNet
from fastgen.networks import LIBRARIES, NETWORKS
from fastgen.optim import make_optimizer
from fastgen.step import make_forward, make_prepare
from fastgen.teacher import make_teacher

CPU = torch.device("cpu")


def network(name="resnet20", classes=10, channels=3, downsample="strided", seed=0):
    return initialise(build_model(name, classes, channels, downsample), seed)


def trained_looking(model, seed=0):
    """Random running statistics and scales: with variances near 0.01 the epsilon of 1e-5 counts, too."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.005, 0.02, generator=generator)
            module.weight.data.uniform_(0.02, 0.1, generator=generator)
            module.bias.data.normal_(0, 0.1, generator=generator)
    return model


def some_images(rows=4, channels=3, size=32, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(rows, channels, size, size, generator=generator, dtype=torch.float64)
    return images.to(dtype).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("downsample", ["strided", "pooled"])
@pytest.mark.parametrize(
    ("name", "count"),
    [("resnet20", 275_572), ("resnet110", 1_733_812)],
)
def test_parameter_counts_of_100_classes(name, count, downsample):
    assert parameter_count(build_model(name, 100, 3, downsample)) == count


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 74, 92, 110])
def test_every_depth_has_its_layers(depth):
    model = build_model(f"resnet{depth}", 10, 3, "strided")
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == depth
    # Counted by hand: 3x3 convolutions, two values for each batch-norm channel, the linear layer.
    blocks = (depth - 2) // 6
    pairs = [(3, 16)] + [(16, 16)] * 2 * blocks
    pairs += [(16, 32)] + [(32, 32)] * (2 * blocks - 1) + [(32, 64)] + [(64, 64)] * (2 * blocks - 1)
    assert parameter_count(model) == sum(9 * a * b + 2 * b for a, b in pairs) + 65 * 10


@pytest.mark.parametrize("depth", [2, 9, 21, 111])
def test_other_depths_are_refused(depth):
    with pytest.raises(ValueError, match="6n \\+ 2"):
        CifarResNet(depth, 10)


def test_the_recipe_and_the_table_know_the_same_names():
    assert list(NETWORKS) == list(MODELS)
    text = next(f for f in fields(ModelSettings) if f.name == "name").metadata["text"]
    assert all(name in text for name in (*NETWORKS, *LIBRARIES))


FROZEN = {
    "resnet8": "cbcb28cdb7d95dea",
    "resnet20": "a741a7b15f7b4c0c",
    "resnet18": "34e79baf9c9fce5a",
    "resnet50": "987195c6ce2dd01c",
}


@pytest.mark.parametrize("name", FROZEN)
def test_initial_weights_are_those_of_all_versions_before(name):
    """A seed's weights are what nodes and repeats stand on."""
    digest = hashlib.sha256()
    for key, tensor in network(name, seed=5).state_dict().items():
        digest.update(key.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    assert digest.hexdigest()[:16] == FROZEN[name]


def plain_batchnorm(x, weights, name, training):
    if training:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    else:
        mean, var = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
    scale = weights[f"{name}.weight"] / torch.sqrt(var + 1e-5)
    return (x - mean[:, None, None]) * scale[:, None, None] + weights[f"{name}.bias"][:, None, None]


def plain_block(x, weights, name, stride, training):
    channels = weights[f"{name}.conv1.weight"].shape[0]
    out = F.conv2d(x, weights[f"{name}.conv1.weight"], stride=stride, padding=1)
    out = plain_batchnorm(out, weights, f"{name}.bn1", training).clamp(min=0)
    out = F.conv2d(out, weights[f"{name}.conv2.weight"], padding=1)
    out = plain_batchnorm(out, weights, f"{name}.bn2", training)
    # Option A: every second pixel, new channels are zero.
    shortcut = torch.zeros_like(out)
    shortcut[:, : x.shape[1]] = x[:, :, ::stride, ::stride]
    assert out.shape[1] == channels
    return (out + shortcut).clamp(min=0)


def plain_network(x, weights, blocks, downsample, training):
    """The whole network in fp64 from a state dict alone."""
    out = F.conv2d(x, weights["conv1.weight"], padding=1)
    out = plain_batchnorm(out, weights, "bn1", training).clamp(min=0)
    for stage in (1, 2, 3):
        first_block = 0
        if stage > 1 and downsample == "pooled":
            out = (out[:, :, ::2, ::2] + out[:, :, 1::2, ::2] + out[:, :, ::2, 1::2] + out[:, :, 1::2, 1::2]) / 4
            first_block = 1
        for block in range(blocks):
            stride = 2 if stage > 1 and block == 0 and downsample == "strided" else 1
            out = plain_block(out, weights, f"layer{stage}.{first_block + block}", stride, training)
    return out.mean((2, 3)) @ weights["fc.weight"].T + weights["fc.bias"]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("downsample", ["strided", "pooled"])
@pytest.mark.parametrize(("name", "blocks", "channels", "size"), [("resnet20", 3, 3, 32), ("resnet8", 1, 1, 8)])
def test_forward_equals_plain_arithmetic(name, blocks, channels, size, downsample, training):
    model = trained_looking(network(name, channels=channels, downsample=downsample)).double().train(training)
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    images = some_images(channels=channels, size=size, dtype=torch.float64)
    logits, expected = model(images), plain_network(images, weights, blocks, downsample, training)
    assert logits.shape == (4, 10)
    # 20 layers of at most 577 summands, each rounded at 2^-53: 1.3e-12 of the size of what is summed.
    torch.testing.assert_close(logits, expected, rtol=1e-11, atol=1e-11 * expected.abs().max().item())
    assert expected.std() > 0.01


@pytest.mark.parametrize("downsample", ["strided", "pooled"])
def test_the_plane_is_halved_twice(downsample):
    model, planes = network(downsample=downsample), []
    for stage in (model.layer1, model.layer2, model.layer3):
        stage.register_forward_hook(lambda module, inputs, output: planes.append(tuple(output.shape[1:])))
    model(some_images(2))
    assert planes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


@pytest.mark.parametrize("downsample", ["strided", "pooled"])
@pytest.mark.parametrize("name", ["resnet8", "resnet32"])
def test_every_parameter_has_a_gradient(name, downsample):
    model = network(name, downsample=downsample).train()
    F.cross_entropy(model(some_images()), torch.arange(4)).backward()
    assert all(parameter.is_leaf and parameter.dtype == torch.float32 for parameter in model.parameters())
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not without


def test_weights_lie_channels_last():
    model = network()
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in model.parameters() if p.ndim == 4)
    assert model(some_images()).device == CPU


def test_convolutions_have_the_variance_of_he_fan_out():
    for name, module in network("resnet56").named_modules():
        if isinstance(module, nn.Conv2d):
            n, variance = module.weight.numel(), 2 / (9 * module.out_channels)
            # A sample variance of n normal values has a relative spread of sqrt(2/n), their mean one of sd / sqrt(n).
            assert abs(module.weight.double().var().item() / variance - 1) < 5 * math.sqrt(2 / n), name
            assert abs(module.weight.double().mean().item()) < 5 * math.sqrt(variance / n), name


def test_linear_layer_is_uniform_within_its_bound():
    linear = network(classes=100).fc
    bound = 1 / math.sqrt(64)
    for values in (linear.weight.double().flatten(), linear.bias.double()):
        n = len(values)
        assert values.abs().max() <= bound
        assert values.abs().max() > bound * (1 - 20 / n)
        # A uniform value has variance bound^2/3 and fourth moment bound^4/5: spread of the mean square 0.89/sqrt(n).
        assert abs((values**2).mean().item() * 3 / bound**2 - 1) < 5 * 0.9 / math.sqrt(n)
        assert abs(values.mean().item()) < 5 * bound / math.sqrt(3 * n)


def test_batchnorm_starts_as_identity():
    model = trained_looking(network())
    initialise(model, 0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
            assert (module.running_mean == 0).all()
            assert (module.running_var == 1).all()
            assert module.num_batches_tracked == 0


def test_same_seed_same_weights_other_seed_other_weights():
    one, again, other = (network(seed=seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(one[name], again[name]) for name in one)
    drawn = [name for name in one if "conv" in name or "fc" in name]
    assert drawn
    assert all((one[name] != other[name]).float().mean() > 0.99 for name in drawn)


def test_large_seeds_are_told_apart():
    one, other = network(seed=2**62).state_dict(), network(seed=2**62 + 1).state_dict()
    assert not torch.equal(one["conv1.weight"], other["conv1.weight"])


def test_the_global_generator_is_neither_used_nor_moved():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = network(seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    other = network(seed=5).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_unknown_kind_of_layer_is_not_left_uninitialised():
    with pytest.raises(TypeError, match="PReLU"):
        initialise(nn.Sequential(nn.PReLU()), 0)


def folding_error(layers, fan_in, size):
    """Folding rounds each weight anew, and a layer sums fan_in + 1 terms: their roundings add up like random steps."""
    return 2 * layers * math.sqrt(fan_in + 1) * 2.0**-24 * size


def test_the_teacher_is_in_eval_mode_and_frozen_whatever_it_was():
    model = trained_looking(network()).train()
    reference = trained_looking(network()).eval()
    teach = make_teacher(model, CPU, torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = some_images()
    logits = teach(images)
    with torch.no_grad():
        expected = reference(images)
    assert not logits.requires_grad
    assert (logits - expected).abs().max() < folding_error(20, 576, expected.abs().max().item()) * 2
    # Not batch statistics: a row alone gives the same logits, and nothing has moved.
    assert (teach(images[:1]) - expected[:1]).abs().max() < folding_error(20, 576, expected.abs().max().item()) * 2
    assert torch.equal(teach(images), logits)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_teachers_logits_can_enter_a_loss():
    teach = make_teacher(network(seed=1), CPU, torch.float32)
    student = network(seed=0)
    images, labels = some_images(), torch.arange(4)
    distill(student(images), labels, teach(images), 0.6).backward()
    assert all(p.grad is not None for p in student.parameters())


def test_a_teacher_in_bf16_stays_near_the_fp32_one():
    images = some_images()
    with torch.no_grad():
        expected = trained_looking(network()).eval()(images)
    logits = make_teacher(trained_looking(network()), CPU, torch.bfloat16)(images.bfloat16())
    assert logits.dtype == torch.bfloat16
    # Each of 20 layers rounds its weights and its result to 2^-9 relative on average, adding up like random steps.
    size = expected.abs().max().item()
    assert (logits.float() - expected).abs().max() < 5 * math.sqrt(2 * 20) * 2.0**-9 * size


def test_teacher_and_student_see_the_same_tensor():
    seen = []

    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 10)

        def forward(self, images_NCHW):
            seen.append(images_NCHW)
            return self.fc(images_NCHW.mean((2, 3)))

    def teach(images_NCHW):
        seen.append(images_NCHW)
        return torch.zeros(len(images_NCHW), 10)

    normalise = Normaliser((0.5,) * 3, (0.25,) * 3, CPU, torch.float32)
    grade = plain(lambda z, y, v: distill(z, y, v, 0.6))
    forward = make_forward(Student(), grade, teach, make_prepare(normalise))
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    graded = forward(images, torch.arange(4))
    assert seen[0] is seen[1]
    assert torch.equal(seen[0], normalise(images))
    assert graded.root.requires_grad
    assert not graded.loss_sum.requires_grad
    # Images that come prepared, with the teacher's logits, are neither prepared nor labelled again.
    again = forward(normalise(images), torch.arange(4), None, torch.zeros(4, 10))
    assert len(seen) == 3
    assert torch.equal(again.loss_sum, graded.loss_sum)


def test_the_first_step_may_overflow_in_fp16():
    """The scaler skips such a step; the momentum must then start from zero, not from what memory held."""
    model = nn.Linear(3, 2)
    optimizer = make_optimizer(model, TrainSettings(epochs=1, precision="fp16"))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for value in (math.inf, 1.0):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        scaler.update()
    # The second step, scale halved to 2: gradient 1/2 plus decay, and Nesterov's 1 + 0.9 times that.
    for parameter, start in zip(model.parameters(), before, strict=True):
        gradient = 0.5 + 1e-4 * start
        torch.testing.assert_close(parameter.detach(), start - 0.1 * 1.9 * gradient)


def test_as_many_compilations_are_allowed_as_shapes_will_come():
    """torch's own limit of eight is fewer than a growing resolution has shapes."""
    normalise = Normaliser((0.5,) * 3, (0.5,) * 3, CPU, torch.float32)
    # Not pytest's monkeypatch: it would leave torch's configuration without the entry.
    with torch._dynamo.config.patch(recompile_limit=8):
        make_forward(torch.nn.Identity(), plain(lambda z, y, v: z.sum()), None, make_prepare(normalise), "compile", 11)
        assert torch._dynamo.config.recompile_limit == 11


def test_weights_lie_as_torch_itself_lays_them():
    """Those of one channel, or of one pixel, too: their strides decide those of their gradients."""
    ours, theirs = (torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 4, 1)) for _ in range(2))
    strides = [weight.stride() for weight in channels_last(ours).parameters()]
    assert strides == [weight.stride() for weight in theirs.to(memory_format=torch.channels_last).parameters()]
    assert strides[0] == (9, 1, 3, 1)
