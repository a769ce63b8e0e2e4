"""16-bit copies of the weights: autocast's arithmetic, to the bit, with the weights and statistics in one place."""

import copy

import pytest
import torch
from torch import nn

from fastgen.kernels.batchnorm_layer import BatchNormAct2d
from fastgen.models import build_model, initialise
from fastgen.models.norm_act import fuse_norm_act
from fastgen.working_copy import WorkingCopy

DTYPES = [torch.bfloat16, torch.float16]


def network(name="resnet20"):
    model = initialise(build_model(name, 10, 3, "strided"), 0)
    return model.to(memory_format=torch.channels_last).train()


def some_batch(size=32, count=12):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, size, size, generator=generator).contiguous(memory_format=torch.channels_last)
    return images, torch.randint(0, 10, (count,), generator=generator)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=True)


def autocast_step(model, optimizer, images, labels, parts):
    optimizer.zero_grad()
    for part in range(parts):
        chosen = slice(part, None, parts)
        with torch.autocast("cpu", images.dtype):
            logits = model(images[chosen])
        nn.functional.cross_entropy(logits.float(), labels[chosen]).backward()
    optimizer.step()


def copied_step(working, optimizer, images, labels, parts):
    optimizer.zero_grad()
    working.refresh()
    for part in range(parts):
        chosen = slice(part, None, parts)
        nn.functional.cross_entropy(working.network(images[chosen]).float(), labels[chosen]).backward()
        working.collect()
    optimizer.step()


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["resnet20", "resnet18"])
def test_it_computes_what_autocast_computes(name, dtype, parts):
    model, reference = network(name), network(name)
    working = WorkingCopy(model, dtype)
    images, labels = some_batch(32 if name == "resnet20" else 64)
    ours, theirs = sgd(model), sgd(reference)
    for _ in range(3):
        copied_step(working, ours, images.to(dtype), labels, parts)
        autocast_step(reference, theirs, images.to(dtype), labels, parts)
    expected = reference.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for tensor_name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[tensor_name]), tensor_name
        assert tensor.dtype == expected[tensor_name].dtype


def test_the_fp32_network_is_the_model_itself():
    model = network()
    working = WorkingCopy(model, torch.float32)
    assert working.network is model
    working.refresh()
    model(some_batch()[0]).sum().backward()
    before = model.conv1.weight.grad
    working.collect()
    assert model.conv1.weight.grad is before


@pytest.mark.parametrize("fused", [False, True])
def test_all_but_multiplied_weights_is_shared(fused):
    model = fuse_norm_act(network("resnet8")) if fused else network("resnet8")
    working = WorkingCopy(model, torch.bfloat16)
    ours, theirs = working.network.state_dict(keep_vars=True), model.state_dict(keep_vars=True)
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        multiplied = ours[name].dtype == torch.bfloat16
        assert multiplied != (ours[name] is tensor), name
        assert multiplied == (tensor.ndim == 4 or name.startswith(("fc", "linear"))), name
    kinds = {type(module) for module in working.network.modules()}
    assert (BatchNormAct2d in kinds) == fused
    # Another mode of the model, as in an evaluation, is not another mode of the step.
    model.eval()
    assert working.network.training


def test_weights_that_are_written_are_taken_over():
    model = network("resnet8")
    working = WorkingCopy(model, torch.bfloat16)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.5)
    model.load_state_dict(other.state_dict())
    images = some_batch()[0].bfloat16()
    before = working.network(images)
    working.refresh()
    after = working.network(images)
    assert not torch.equal(before, after)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(after, other(images))


def test_what_has_no_gradient_is_left_without_one():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    working = WorkingCopy(model, torch.bfloat16)
    working.network(torch.ones(2, 3, dtype=torch.bfloat16)).float().sum().backward()
    working.collect()
    assert model[0].weight.grad is None
    assert model[1].weight.grad.dtype == torch.float32
    assert all(own.grad is None for own in working.network.parameters())
