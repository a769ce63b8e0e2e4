"""models/se_resnet.py: size, names and the gate against plain arithmetic."""

import pytest
import torch
import torchvision
from test_models import some_images, trained_looking
from torch import nn

from fastgen.folding import fold, fuse
from fastgen.fused_conv import FusedConv
from fastgen.models import build_model, initialise, parameter_count
from fastgen.models.se_resnet import Gate


def test_the_size_is_that_of_the_source():
    """ResNet-18 has 11,689,512 parameters; two matrices of C^2 / 16 for each of its eight blocks."""
    model = build_model("se_resnet18", 1000, 3)
    gates = sum(2 * 2 * channels * channels // 16 for channels in (64, 128, 256, 512))
    assert parameter_count(model) == 11_689_512 + gates
    assert round(parameter_count(model) / 1e6, 2) == 11.78


def test_beside_its_gates_it_has_torchvision_s_names():
    own = build_model("se_resnet18", 10, 3).state_dict()
    theirs = torchvision.models.resnet18(num_classes=10).state_dict()
    assert [name for name in own if ".se." not in name] == list(theirs)


def test_the_gate_is_equations_2_to_4():
    generator = torch.Generator().manual_seed(0)
    gate = initialise(Gate(32), 0).double()
    x = torch.randn(3, 32, 5, 4, generator=generator, dtype=torch.float64)
    w1, w2 = gate.squeeze.weight, gate.excite.weight
    with torch.no_grad():
        # Far enough from 0 for the gates to differ.
        w1.mul_(20)
        w2.mul_(5)
    assert (tuple(w1.shape), tuple(w2.shape)) == ((2, 32), (32, 2))
    z = x.sum((2, 3)) / 20
    s = 1 / (1 + torch.exp(-(z @ w1.T).clamp(min=0) @ w2.T))
    torch.testing.assert_close(gate(x), x * s.reshape(3, 32, 1, 1), rtol=1e-13, atol=1e-13)
    assert s.std() > 1e-3


@torch.no_grad()
def test_gates_that_are_open_leave_resnet18():
    """Weights of 0 give gates of 1/2, which scales of 2 in the batch-norms before them make up for."""
    model = trained_looking(initialise(build_model("se_resnet18", 10, 3), 0)).double().eval()
    plain = torchvision.models.resnet18(num_classes=10).double().eval()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if ".se." not in name})
    for name, module in model.named_modules():
        if isinstance(module, Gate):
            module.excite.weight.zero_()
            norm = model.get_submodule(name.replace(".se", ".bn2"))
            norm.weight.mul_(2)
            norm.bias.mul_(2)
    images = some_images(2, size=64, dtype=torch.float64)
    torch.testing.assert_close(model(images), plain(images), rtol=1e-10, atol=1e-12)


def test_every_parameter_has_a_gradient():
    model = initialise(build_model("se_resnet18", 10, 3), 0).train()
    nn.functional.cross_entropy(model(some_images(4, size=64)), torch.arange(4)).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]


@pytest.mark.parametrize("wrong", [{"in_channels": 1}, {"downsample": "pooled"}, {"memory_efficient": True}])
def test_forms_that_it_has_not_are_refused(wrong):
    with pytest.raises(ValueError, match="se_resnet18"):
        build_model(**{"name": "se_resnet18", "classes": 10, "in_channels": 3, **wrong})


@torch.no_grad()
def test_a_folded_and_fused_teacher_computes_the_same():
    model = trained_looking(initialise(build_model("se_resnet18", 10, 3), 0)).double().eval()
    images = some_images(4, size=64, dtype=torch.float64)
    expected = model(images)
    folded, count = fold(model)
    assert count == 20
    # 20 layers of at most 4,608 summands, each rounded at 2^-53.
    allowed = 1e-11 * expected.abs().max().item()
    torch.testing.assert_close(folded(images), expected, rtol=0, atol=allowed)
    # A block's sum is of a gate's output and no convolution's: its first half alone is joined, and the stem.
    fused = fuse(folded)
    assert sum(isinstance(module, FusedConv) for module in fused.modules()) == 9
    torch.testing.assert_close(fused(images), expected, rtol=0, atol=allowed)
    assert expected.std(0).max() > 1e3 * allowed
