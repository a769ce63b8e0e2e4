"""Batch-norm with residual and ReLU in one kernel pair, beside fp64, and the networks that hold it beside plain ones.

The closed form, over the R positions of a channel, of m = mean(x), v = mean((x - m)^2), xhat = (x - m) / sqrt(v + eps),
z = weight xhat + bias [+ residual], y = max(0, z), dz = dy [z > 0]:

    dresidual = dz    dbias = sum(dz)    dweight = sum(dz xhat)
    dx = weight / sqrt(v + eps) (dz - mean(dz) - xhat mean(dz xhat))

Without a GPU Triton's interpreter runs the kernels; it costs 7 to 60 ms a program, hence the small shapes.
"""

import copy
import os

import numpy as np
import pytest
import torch
import torch.multiprocessing
import torch.nn.functional as F
from torch import nn

if not torch.cuda.is_available():
    # Before triton is imported, here and in the processes that a test starts.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton

from fastgen.kernels import batchnorm_act as kernel
from fastgen.kernels.batchnorm_layer import BatchNormAct2d, backward_op, forward_op
from fastgen.models import build_model, initialise
from fastgen.models.norm_act import batchnorm_act as reference
from fastgen.models.norm_act import fuse_norm_act

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
EPS, MOMENTUM = 1e-5, 0.1
U32 = 2.0**-24
# One rounding to the dtype, relative. The interpreter cuts fp32 off to bf16 where a GPU rounds: a whole unit.
ROUNDING = {
    torch.float32: 0.0,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-7 if triton.knobs.runtime.interpret else 2.0**-8,
}
# Where fp16 is below its normal range it is rounded to multiples of 2^-24.
SUBNORMAL = {torch.float32: 0.0, torch.float16: 2.0**-25, torch.bfloat16: 0.0}
# Rows are no multiple of a tile; two of the shapes give several shares to every kernel, the last of them not full.
SHAPES = {3: (5, 3, 31, 37), 16: (3, 16, 29, 31), 64: (2, 64, 19, 23), 100: (1, 100, 11, 13)}


@pytest.fixture(autouse=True)
def full_fp32(monkeypatch):
    """fp32 proper: cuDNN otherwise rounds to ten bits, and adds in any order."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def images(shape, seed, dtype=torch.float32, scale=1.0, shift=0.0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale + shift
    return values.to(DEVICE, dtype, memory_format=torch.channels_last)


def layer_of(channels, seed=9):
    """A layer whose parameters and statistics are nothing special, weights of both signs."""
    layer, generator = BatchNormAct2d(channels, EPS, MOMENTUM), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
            tensor.copy_(torch.randn(channels, generator=generator))
        layer.running_var.abs_()
    return layer.to(DEVICE)


def rows_f64(tensor_NCHW):
    """(R, C), as in channels-last memory."""
    return tensor_NCHW.detach().double().cpu().numpy().transpose(0, 2, 3, 1).reshape(-1, tensor_NCHW.shape[1])


class ClosedForm:
    """fp64 values of one layer, and how far fp32 arithmetic may be from them.

    R roundings of one sum add like a random walk, sqrt(R) of them; `walk` is four times that, for the largest of many
    channels, and a dozen more for what surrounds the sum. The mean is corrected after it is summed and so is exact to
    a dozen units of |x|, but for the places that keep a running mean over the tiles, and each tile adds a unit or two.
    """

    def __init__(self, x, residual, layer, dy, y):
        self.x, self.dy = rows_f64(x), rows_f64(dy)
        self.residual = 0.0 if residual is None else rows_f64(residual)
        self.weight, self.bias = (p.detach().double().cpu().numpy() for p in (layer.weight, layer.bias))
        self.count = len(self.x)
        self.mean, self.var = self.x.mean(0), self.x.var(0)
        self.invstd = 1 / np.sqrt(self.var + EPS)
        self.xhat = (self.x - self.mean) * self.invstd
        self.z = self.xhat * self.weight + self.bias + self.residual
        self.walk = 12 + 4 * np.sqrt(self.count)
        # Where z is 0 within its error, rounding decides whether dy passes: the kernel's own choice is taken, after
        # `require_output` has shown that it differs nowhere else.
        self.dz = self.dy * (rows_f64(y) > 0)
        self.dbias, self.dweight = self.dz.sum(0), (self.dz * self.xhat).sum(0)
        self.mean_dz, self.mean_dzx = self.dbias / self.count, self.dweight / self.count
        self.dx = self.weight * self.invstd * (self.dz - self.mean_dz - self.xhat * self.mean_dzx)

    def mean_error(self):
        return 24 * U32 * np.abs(self.x).max(0)

    def xhat_error(self):
        """From the mean, the subtraction, and 1 / sqrt(variance + eps), half as wrong as the variance."""
        moved = self.mean_error() * self.invstd
        # A mean that is wrong by d adds d^2 to the variance.
        return moved + np.abs(self.xhat) * (self.walk * U32 + moved**2)

    def z_error(self):
        terms = np.abs(self.xhat * self.weight) + np.abs(self.bias) + np.abs(self.residual)
        return np.abs(self.weight) * self.xhat_error() + 4 * U32 * terms

    def dbias_error(self):
        return self.walk * U32 * np.abs(self.dz).sum(0)

    def dweight_error(self):
        summed = np.abs(self.dz * self.xhat).sum(0)
        # An error of the mean moves all of xhat alike, so it counts with the sum of dz, not of |dz|.
        alike = self.mean_error() * self.invstd * (np.abs(self.dbias) + self.dbias_error())
        scattered = (np.abs(self.dz) * (self.xhat_error() - self.mean_error() * self.invstd)).sum(0)
        return self.walk * U32 * summed + alike + scattered

    def dx_error(self):
        scale = np.abs(self.weight * self.invstd)
        terms = np.abs(self.dz) + np.abs(self.mean_dz) + np.abs(self.xhat * self.mean_dzx)
        sums = (self.dbias_error() + np.abs(self.xhat) * self.dweight_error()) / self.count
        return scale * (self.walk * U32 * terms + sums + self.xhat_error() * np.abs(self.mean_dzx))


def require_close(value, expected, error, dtype=torch.float32):
    allowed = error + ROUNDING[dtype] * (np.abs(expected) + error) + SUBNORMAL[dtype]
    excess = np.abs(value - expected) - allowed
    worst = np.unravel_index(np.nanargmax(excess), excess.shape)
    assert np.isfinite(value).all()
    assert excess[worst] <= 0, f"at {worst}: {value[worst]} instead of {expected[worst]}, {allowed[worst]} is allowed"


def require_output(y, true, dtype):
    require_close(rows_f64(y), np.maximum(true.z, 0), true.z_error(), dtype)


def require_layer(x, residual, layer, dy):
    """One step of the layer beside fp64: output, gradients, running statistics."""
    before = copy.deepcopy(layer.state_dict())
    x, residual = x.clone().requires_grad_(), None if residual is None else residual.clone().requires_grad_()
    y = layer(x, residual)
    y.backward(dy)
    true, dtype = ClosedForm(x, residual, layer, dy, y), x.dtype
    assert y.dtype == x.grad.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    require_output(y, true, dtype)
    require_close(rows_f64(x.grad), true.dx, true.dx_error(), dtype)
    if residual is not None:
        # Nothing is computed: dy or 0.
        np.testing.assert_array_equal(rows_f64(residual.grad), true.dz)
    for parameter, expected, error in (
        (layer.bias, true.dbias, true.dbias_error()),
        (layer.weight, true.dweight, true.dweight_error()),
    ):
        assert parameter.grad.dtype == torch.float32
        require_close(parameter.grad.double().cpu().numpy(), expected, error)
    old_mean, old_var = (before[name].double().cpu().numpy() for name in ("running_mean", "running_var"))
    mean, var = (layer.state_dict()[name].double().cpu().numpy() for name in ("running_mean", "running_var"))
    unbiased = true.var * true.count / (true.count - 1)
    require_close(mean, 0.9 * old_mean + 0.1 * true.mean, 0.1 * true.mean_error() + 4 * U32 * np.abs(old_mean))
    var_error = true.walk * U32 * unbiased + true.mean_error() ** 2
    require_close(var, 0.9 * old_var + 0.1 * unbiased, 0.1 * var_error + 4 * U32 * old_var)
    assert layer.num_batches_tracked == before["num_batches_tracked"] + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("channels", SHAPES)
def test_a_step_equals_the_closed_form(channels, with_residual, dtype):
    shape = SHAPES[channels]
    residual = images(shape, 1, dtype) if with_residual else None
    require_layer(images(shape, 0, dtype, 2.0, 0.5), residual, layer_of(channels), images(shape, 2, dtype, 0.1))


@pytest.mark.parametrize("programs", [1, 3])
def test_many_tiles_a_program_give_the_same(programs, monkeypatch):
    monkeypatch.setattr(kernel, "REDUCE_PROGRAMS", programs)
    monkeypatch.setattr(kernel, "STREAM_PROGRAMS", programs)
    x, residual = images(SHAPES[16], 0), images(SHAPES[16], 1)
    assert kernel.stream_split(x).shares == programs
    require_layer(x, residual, layer_of(16), images(SHAPES[16], 2))


@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
def test_a_large_mean_takes_nothing_from_the_variance(with_residual):
    # mean(x^2) - m^2 would be 10^6 - 10^6 with an error of 0.06: of a variance of 1 a digit would be left.
    x = images(SHAPES[16], 0, shift=1000.0)
    layer = layer_of(16)
    require_layer(x, images(SHAPES[16], 1) if with_residual else None, layer, images(SHAPES[16], 2))
    unbiased = rows_f64(x).var(0, ddof=1)
    fresh = BatchNormAct2d(16, momentum=1.0).to(DEVICE)
    fresh(x)
    # Means of places and shares are 1000 within some units of 2^-14, which the variance takes as squares.
    np.testing.assert_allclose(fresh.running_var.double().cpu().numpy(), unbiased, rtol=1e-5)


def test_shares_with_different_means_combine():
    # What the second launch makes of the parts, alone: the values within a share are equal, the shares are not.
    x = torch.arange(3.0, device=DEVICE).repeat_interleave(1024)[:2697].view(3, 29, 31, 1).permute(0, 3, 1, 2)
    x = x.expand(3, 16, 29, 31).contiguous(memory_format=torch.channels_last)
    assert kernel.statistics_split(x).share_rows == 1024
    require_layer(x, None, layer_of(16), images(x.shape, 2))


def test_constant_channels():
    x = images(SHAPES[16], 0)
    x[:, ::2] = 3.7
    x[:, 4] = 0
    require_layer(x, None, layer_of(16), images(x.shape, 2))


def test_two_rows_train_and_one_is_refused():
    require_layer(images((2, 16, 1, 1), 0), None, layer_of(16), images((2, 16, 1, 1), 2))
    with pytest.raises(ValueError, match="two values per channel"):
        layer_of(16)(images((1, 16, 1, 1), 0))


def test_running_statistics_beside_torchs_after_three_steps():
    layer = layer_of(16)
    plain = nn.BatchNorm2d(16, EPS, MOMENTUM).to(DEVICE)
    plain.load_state_dict(layer.state_dict())
    for step in range(3):
        x = images((4, 16, 9, 9), step, scale=1 + step)
        layer(x)
        plain(x)
    assert list(layer.state_dict()) == list(plain.state_dict())
    for one, two in zip(layer.buffers(), plain.buffers(), strict=True):
        # 324 summands on both sides, as ClosedForm counts them; statistics are about 1.
        torch.testing.assert_close(one, two, rtol=0, atol=2 * (12 + 4 * 18) * U32 * 9)


def test_evaluation_is_plain_torch():
    layer, x, residual = layer_of(16).eval(), images((2, 16, 5, 5), 0), images((2, 16, 5, 5), 1)
    before = copy.deepcopy(layer.state_dict())
    normed = F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, False, 0.1, EPS)
    assert torch.equal(layer(x), normed.relu())
    assert torch.equal(layer(x, residual), (normed + residual).relu())
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_not_a_number_stays_one():
    x = images((2, 16, 5, 5), 0)
    x[1, 3, 2, 2] = torch.nan
    y = layer_of(16)(x)
    assert y[:, 3].isnan().all()
    assert y[:, :3].isfinite().all()
    assert y[:, 4:].isfinite().all()


def test_the_plain_reference_equals_the_closed_form():
    x, residual, dy, layer = images(SHAPES[16], 0), images(SHAPES[16], 1), images(SHAPES[16], 2), layer_of(16)
    x.requires_grad_()
    y = reference(x, residual, layer.weight, layer.bias, None, None, True, None, EPS)
    y.backward(dy)
    true = ClosedForm(x, residual, layer, dy, y)
    require_output(y, true, x.dtype)
    require_close(rows_f64(x.grad), true.dx, true.dx_error())


def test_a_gradient_in_another_layout_is_taken():
    # What a mean over the plane sends back has strides of 0.
    x = images((3, 16, 4, 4), 0).requires_grad_()
    layer = layer_of(16)
    layer(x).mean((2, 3)).sum().backward()
    seen, x.grad = x.grad, None
    layer(x).backward(torch.full_like(x, 1 / 16))
    assert torch.equal(seen, x.grad)


@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
def test_a_single_image_may_have_any_strides(with_residual):
    # Its x and residual as a slice gives them; torch calls neither channels-last.
    x, residual, dy = images(SHAPES[100], 0), images(SHAPES[100], 1), images(SHAPES[100], 2)
    require_layer(x.contiguous(), residual.contiguous() if with_residual else None, layer_of(100), dy.contiguous())


# Outputs that nobody filled.

GUARD = 64


class Guarded:
    """Tensors within larger ones, all not-a-number."""

    def __init__(self):
        self.zones = []

    def like(self, tensor, keep=False):
        flat = torch.full((tensor.numel() + 2 * GUARD,), torch.nan, dtype=tensor.dtype, device=tensor.device)
        self.zones += [flat[:GUARD], flat[GUARD + tensor.numel() :]]
        inner = flat[GUARD : GUARD + tensor.numel()].as_strided(tensor.shape, tensor.stride())
        return inner.copy_(tensor) if keep else inner

    def untouched(self):
        return all(bool(zone.isnan().all()) for zone in self.zones)


@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("channels", [3, 100])
def test_every_output_is_written_and_nothing_beside_it(channels, with_residual):
    shape = SHAPES[channels]
    x, residual, dy = images(shape, 0), images(shape, 1) if with_residual else None, images(shape, 2)
    layer, guarded = layer_of(channels), Guarded()
    weight, bias = layer.weight.detach(), layer.bias.detach()
    running = [guarded.like(buffer, keep=True) for buffer in (layer.running_mean, layer.running_var)]
    tracked = torch.zeros((), dtype=torch.int64, device=DEVICE)
    parts = guarded.like(kernel.empty_parts(x, kernel.statistics_split(x)))
    y, saved = guarded.like(x), guarded.like(torch.empty(2, channels, device=DEVICE))
    kernel.launch_forward(x, residual, weight, bias, *running, tracked, MOMENTUM, EPS, parts, y, saved)
    parts = guarded.like(kernel.empty_parts(x, kernel.reduce_split(x)))
    dx, dz = guarded.like(x), guarded.like(x) if with_residual else None
    dweight, dbias = guarded.like(weight), guarded.like(weight)
    y_read = y if with_residual else None
    kernel.launch_backward(dy, x, y_read, weight, bias, saved, parts, dz, dx, dweight, dbias)
    assert guarded.untouched()

    state = layer.running_mean, layer.running_var, layer.num_batches_tracked
    expected_y, expected_saved = forward_op(x, residual, weight, bias, *state, MOMENTUM, EPS)
    expected = backward_op(dy, x, expected_y if with_residual else None, weight, bias, expected_saved)
    assert torch.equal(y, expected_y)
    assert torch.equal(saved, expected_saved)
    assert torch.equal(running[0], layer.running_mean)
    assert torch.equal(running[1], layer.running_var)
    for one, two in zip((dx, dweight, dbias), (expected[0], expected[2], expected[3]), strict=True):
        assert torch.equal(one, two)
    if with_residual:
        assert torch.equal(dz, expected[1])


# What is refused.


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x.contiguous(), "x has strides .* dense channels-last"),
        (lambda x: x[:, :, ::2, ::2], "x has strides .* dense channels-last"),
        (lambda x: x.double(), "fp16, bf16 or fp32"),
        (lambda x: x[:, :, 0], "fp16, bf16 or fp32"),
        (lambda x: x[:, :8].contiguous(memory_format=torch.channels_last), "weight is"),
        (lambda x: x[:0], "two values per channel"),
    ],
)
def test_inputs_that_would_be_read_wrongly_are_refused(spoil, message):
    with pytest.raises(ValueError, match=message) as caught:
        layer_of(16)(spoil(images((2, 16, 5, 6), 0)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spoil", [lambda x: x.contiguous(), lambda x: x[:1], lambda x: x.half()])
def test_residuals_that_would_be_read_wrongly_are_refused(spoil):
    x = images((2, 16, 5, 6), 0)
    with pytest.raises(ValueError, match="residual"):
        layer_of(16)(x, spoil(x))


@pytest.mark.parametrize("settings", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}])
def test_batch_norms_that_the_kernels_do_not_know_are_refused(settings):
    with pytest.raises(ValueError, match="affine, track_running_stats and a momentum"):
        BatchNormAct2d(16, **settings)
    with pytest.raises(ValueError, match="affine, track_running_stats and a momentum"):
        BatchNormAct2d.sharing(nn.BatchNorm2d(16, **settings))


# torch's machinery.


@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
def test_operators_keep_torchs_rules(with_residual):
    x, residual, layer = images((2, 16, 5, 7), 0), images((2, 16, 5, 7), 1) if with_residual else None, layer_of(16)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    state = layer.running_mean, layer.running_var, layer.num_batches_tracked
    y, saved = forward_op(x, residual, weight, bias, *state, MOMENTUM, EPS)
    torch.library.opcheck(forward_op, (x, residual, weight, bias, *state, MOMENTUM, EPS))
    torch.library.opcheck(backward_op, (x, x, y if with_residual else None, weight, bias, saved))


class SmallNetwork(nn.Module):
    """Both chains, one after the other."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x_NCHW):
        first = F.relu(self.bn1(self.conv1(x_NCHW)))
        out = self.bn2(self.conv2(first))
        out += first
        return self.fc(out.relu_().mean((2, 3)))


def small_network(seed=0):
    return initialise(SmallNetwork(), seed).to(DEVICE, memory_format=torch.channels_last)


def labels_of(count):
    return (torch.arange(count, device=DEVICE) * 3) % 10


def gradients(model, x, dtype=None):
    """(loss, gradients by name) of one step."""
    model.zero_grad()
    with torch.autocast(DEVICE.type, dtype or torch.bfloat16, enabled=dtype is not None):
        loss = F.cross_entropy(model(x), labels_of(len(x)))
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def distance(found, true):
    """Relative, over all tensors together."""
    flat = [torch.cat([named[name].detach().double().flatten() for name in true]) for named in (found, true)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


def test_compiled_as_one_graph_it_is_the_same():
    model, x = fuse_norm_act(small_network()), images((4, 3, 6, 6), 0)
    compiled = copy.deepcopy(model)
    torch._dynamo.reset()
    eager_loss, eager = gradients(model, x)
    loss, found = gradients(torch.compile(compiled, fullgraph=True), x)
    # Around the kernels the compiler sums in another order: some units of fp32 for each of four layers.
    assert float(loss) == pytest.approx(float(eager_loss), rel=64 * U32)
    assert distance({name.removeprefix("_orig_mod."): value for name, value in found.items()}, eager) < 64 * U32
    for one, two in zip(compiled.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(one, two, rtol=64 * U32, atol=64 * U32)
    assert int(compiled.bn1.num_batches_tracked) == 1


def test_compiled_it_takes_a_single_image(few_programs):
    # The compiler takes the padded shortcut for channels-last, and torch's own operators give it otherwise.
    model, x = (
        fuse_norm_act(initialise(build_model("resnet8", 10, 3, "pooled"), 0).to(DEVICE)),
        images((1, 3, 16, 16), 0),
    )
    model.to(memory_format=torch.channels_last)
    torch._dynamo.reset()
    _, found = gradients(torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager"), x)
    _, eager = gradients(model, x)
    assert distance({name.removeprefix("_orig_mod."): value for name, value in found.items()}, eager) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_it_computes_in_the_convolutions_dtype(dtype):
    plain, x = small_network(), images((4, 3, 6, 6), 0)
    fused, true = fuse_norm_act(copy.deepcopy(plain)), copy.deepcopy(plain).double()
    seen = []
    fused.bn2.register_forward_hook(lambda module, inputs, output: seen.extend([*inputs, output]))
    _, expected = gradients(true, x.double())
    _, found = gradients(fused, x, dtype)
    _, beside = gradients(plain, x, dtype)
    assert {tensor.dtype for tensor in seen} == {dtype}
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    # Rounding decides the error, and the fused network rounds less often; but on the interpreter twice as far.
    assert 0 < distance(found, expected) < 2 * distance(beside, expected)


@pytest.mark.gpu
@needs_gpu
def test_a_captured_step_is_the_same():
    model, x = fuse_norm_act(small_network()), images((64, 3, 32, 32), 0)
    before = copy.deepcopy(model.state_dict())
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        _, expected = gradients(model, x)
        expected = {name: value.clone() for name, value in expected.items()}
    torch.cuda.synchronize()
    after = copy.deepcopy(model.state_dict())
    model.load_state_dict(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, found = gradients(model, x)
    graph.replay()
    torch.cuda.synchronize()
    assert distance(found, expected) < 64 * U32
    for one, two in zip(model.buffers(), (after[name] for name, _ in model.named_buffers()), strict=True):
        torch.testing.assert_close(one, two)


def train_a_half(rank, folder):
    """One of two processes: its half of the batch, gradients averaged by DDP; process 0 keeps them."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(fuse_norm_act(small_network()))
    _, found = gradients(model, images((4, 3, 6, 6), rank))
    if rank == 0:
        torch.save({name.removeprefix("module."): value.cpu() for name, value in found.items()}, f"{folder}/found")
    # Neither leaves while the other is still at work: gloo aborts a process whose partner is gone.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one_that_accumulates(tmp_path):
    torch.multiprocessing.spawn(train_a_half, (str(tmp_path),), nprocs=2)
    found, model = torch.load(tmp_path / "found"), fuse_norm_act(small_network())
    halves = [gradients(model, images((4, 3, 6, 6), rank))[1] for rank in range(2)]
    # Half of a sum and a sum of halves are the same bits. Statistics of the batch are each process's own.
    for name, value in found.items():
        assert torch.equal(value, ((halves[0][name] + halves[1][name]) / 2).cpu()), name


# Networks.


def fused_names(model):
    return {name for name, module in model.named_modules() if isinstance(module, BatchNormAct2d)}


def plain_names(model):
    return {name for name, module in model.named_modules() if type(module) is nn.BatchNorm2d}


@pytest.fixture
def few_programs(monkeypatch):
    """One or two large programs a kernel: the interpreter's time goes by programs."""
    if DEVICE.type == "cpu":
        for name in ("STATISTICS_TILE", "REDUCE_TILE", "STREAM_TILE"):
            monkeypatch.setattr(kernel, name, 2**16)
        monkeypatch.setattr(kernel, "MAX_TILE_C", 512)


NETWORKS = [("resnet20", "strided", 16), ("resnet8", "pooled", 16), ("resnet18", "strided", 48)]


@pytest.mark.parametrize(("name", "downsample", "size"), NETWORKS)
def test_a_step_of_a_fused_network(name, downsample, size, few_programs):
    plain = initialise(build_model(name, 10, 3, downsample), 0).to(DEVICE).train()
    fused, true, x = fuse_norm_act(copy.deepcopy(plain)), copy.deepcopy(plain).double(), images((4, 3, size, size), 0)
    names = list(plain.state_dict())
    assert list(fused.state_dict()) == names
    assert [name for name, _ in fused.named_parameters()] == [name for name, _ in plain.named_parameters()]
    _, expected = gradients(true, x.double())
    _, beside = gradients(plain, x)
    _, found = gradients(fused, x)
    # Both sum in fp32, each in an order of its own: the fused network is to be no farther from fp64, but for luck.
    assert distance(found, expected) < 4 * distance(beside, expected) < 1e-4
    for model in (true, plain, fused):
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert distance(fused.state_dict(), true.state_dict()) < 4 * distance(plain.state_dict(), true.state_dict())
    running = [
        {key: value for key, value in model.state_dict().items() if "running" in key} for model in (fused, plain, true)
    ]
    assert distance(running[0], running[2]) < 4 * distance(running[1], running[2]) < 1e-5
    assert all(module.num_batches_tracked == 1 for module in fused.modules() if isinstance(module, nn.BatchNorm2d))

    assert list(fused.state_dict()) == names
    plain.load_state_dict(fused.state_dict())
    for model in (plain, fused, copy.deepcopy(fused)):
        assert not any(module.training for module in model.eval().modules())
        # Evaluation runs the same operations in both.
        assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize(
    ("name", "downsample", "size"),
    [("resnet8", "strided", 16), ("resnet8", "pooled", 16), ("resnet20", "pooled", 16), ("resnet18", "strided", 64)],
)
def test_a_fused_network_trains_on_a_single_image(name, downsample, size, few_programs):
    plain = initialise(build_model(name, 10, 3, downsample), 0).to(DEVICE, memory_format=torch.channels_last).train()
    fused, true, x = fuse_norm_act(copy.deepcopy(plain)), copy.deepcopy(plain).double(), images((1, 3, size, size), 0)
    _, expected = gradients(true, x.double())
    _, beside = gradients(plain, x)
    _, found = gradients(fused, x)
    # The last layers normalise four values a channel, so roundings grow more than in a batch.
    assert distance(found, expected) < 4 * distance(beside, expected) < 1e-3
    states = [{key: value for key, value in model.state_dict().items() if "running" in key} for model in (fused, true)]
    assert distance(*states) < 1e-5


@pytest.mark.parametrize(
    ("name", "fused", "plain"), [("resnet20", 19, 0), ("resnet18", 17, 3), ("resnet34", 33, 3), ("resnet50", 49, 4)]
)
def test_which_batch_norms_are_fused(name, fused, plain):
    model = fuse_norm_act(build_model(name, 10, 3, "strided"))
    assert len(fused_names(model)) == fused
    # torchvision's shortcuts: their batch-norms are the residuals.
    assert {name.split(".", 2)[2] for name in plain_names(model)} <= {"downsample.1"}
    assert len(plain_names(model)) == plain
    assert not any(isinstance(module, nn.ReLU) for module in model.modules())


def test_parameters_and_buffers_are_the_very_same():
    model = initialise(build_model("resnet18", 10, 3, "strided"), 0)
    fused = fuse_norm_act(model)
    assert all(one is two for one, two in zip(fused.parameters(), model.parameters(), strict=True))
    assert all(one is two for one, two in zip(fused.buffers(), model.buffers(), strict=True))


def test_train_and_eval_reach_the_fused_layers_of_a_copy():
    fused = fuse_norm_act(small_network().eval())
    assert not any(module.training for module in fused.modules())
    other = copy.deepcopy(fused).train()
    x = images((4, 3, 6, 6), 0)
    other(x)
    assert int(other.bn1.num_batches_tracked) == 1
    fused(x)
    assert int(fused.bn1.num_batches_tracked) == 0


class Forms(nn.Module):
    """bn, then whatever the test says."""

    def __init__(self, what_follows):
        super().__init__()
        self.bn, self.other, self.what_follows = nn.BatchNorm2d(16), nn.BatchNorm2d(16), what_follows
        self.relu, self.relu_in_place = nn.ReLU(), nn.ReLU(inplace=True)

    def forward(self, x_NCHW):
        # The first operation makes a value of its own, as in-place forms would change the test's.
        return self.what_follows(self, x_NCHW * 2)


def added_in_place(m, x):
    out = m.bn(x)
    out += m.other(x)
    return m.relu_in_place(out)


def added_as_second(m, x):
    out = m.bn(x)
    return F.relu(m.other(x) * 3 + out)


FUSED_FORMS = {
    "module": lambda m, x: m.relu(m.bn(x)) + m.other(x),
    "module in place": lambda m, x: m.relu_in_place(m.bn(x)) + m.other(x),
    "F.relu": lambda m, x: F.relu(m.bn(x), inplace=True) + m.other(x),
    "torch.relu_": lambda m, x: torch.relu_(m.bn(x)) + m.other(x),
    "method": lambda m, x: m.bn(x).relu() + m.other(x),
    "second operand": added_as_second,
    "+=": added_in_place,
    "torch.add": lambda m, x: F.relu(torch.add(m.bn(x), m.other(x))),
    "add_": lambda m, x: m.bn(x).add_(m.other(x)).relu_(),
}


@pytest.mark.parametrize("form", FUSED_FORMS)
def test_forms_that_are_fused(form):
    plain = Forms(FUSED_FORMS[form])
    plain.load_state_dict({**plain.state_dict(), **{f"bn.{k}": v for k, v in layer_of(16).state_dict().items()}})
    plain.to(DEVICE)
    fused = fuse_norm_act(copy.deepcopy(plain))
    assert fused_names(fused) == {"bn"}
    assert plain_names(fused) == {"other"}
    x = images((3, 16, 4, 4), 0)
    # 48 summands; values are below 16.
    torch.testing.assert_close(fused(x), plain(x), rtol=0, atol=(12 + 4 * 7) * U32 * 16)


def another_reads_the_norm(m, x):
    out = m.bn(x)
    return F.relu(out) + out


def another_reads_the_sum(m, x):
    out = m.bn(x) + m.other(x) * 2
    return F.relu(out) + out


def residual_changed_in_place(m, x):
    before = m.other(x)
    return F.relu(before.add_(m.bn(x))) + before


def residual_written_before_the_relu(m, x):
    residual = m.other(x)
    total = m.bn(x) + residual
    residual = residual.mul_(2)
    return F.relu(total) + residual


def input_written_before_the_relu(m, x):
    out = m.bn(x)
    x = m.relu_in_place(x)
    return F.relu(out) + m.other(x)


KEPT_FORMS = {
    "read by another": another_reads_the_norm,
    "sum read by another": another_reads_the_sum,
    "residual in place": residual_changed_in_place,
    "residual written before the ReLU": residual_written_before_the_relu,
    "input written before the ReLU": input_written_before_the_relu,
    "added to itself": lambda m, x: F.relu((lambda out: out + out)(m.bn(x))),
    "a number added": lambda m, x: F.relu(m.bn(x) + 1) + m.other(x),
    "a factor": lambda m, x: F.relu(torch.add(m.bn(x), x, alpha=2)) + m.other(x),
    "another activation": lambda m, x: F.gelu(m.bn(x)) + m.other(x),
    "called twice": lambda m, x: F.relu(m.bn(x)) + F.relu(m.bn(x * 2)) + m.other(x),
    "output": lambda m, x: m.bn(x),
}


@pytest.mark.parametrize("form", KEPT_FORMS)
def test_without_a_chain_there_is_nothing_to_fuse(form):
    with pytest.raises(ValueError, match="Forms has no batch-norm that is followed by ReLU alone"):
        fuse_norm_act(Forms(KEPT_FORMS[form]))


def only_in_training(m, x):
    out = F.relu(m.bn(x)) + m.other(x)
    return out * 2 if m.training else out


@pytest.mark.parametrize(
    "form", [only_in_training, lambda m, x: F.dropout(F.relu(m.bn(x)) + m.other(x), 0.5, m.training)]
)
@pytest.mark.parametrize("training", [True, False])
def test_networks_whose_trace_would_freeze_their_mode_are_refused(form, training):
    model = Forms(form).train(training)
    model.other.eval()
    with pytest.raises(ValueError, match="Forms computes something else in train mode than in eval mode"):
        fuse_norm_act(model)
    assert [model.training, model.bn.training, model.other.training] == [training, training, False]


def test_modules_that_know_their_mode_do_not_freeze_it():
    model = Forms(lambda m, x: m.drop(F.relu(m.bn(x)) + m.other(x)))
    model.drop = nn.Dropout(0.5)
    model.other.eval()
    fused = fuse_norm_act(model.to(DEVICE))
    assert [fused.training, fused.bn.training, fused.other.training] == [True, True, False]
    x = images((2, 16, 4, 4), 0)
    assert (fused(x) == 0).any()
    assert torch.equal(fused.eval()(x), model.eval()(x))


def test_state_that_the_forward_pass_does_not_use_is_refused():
    # The traced network would lack it, and its weights file with it.
    with pytest.raises(ValueError, match="cannot be fused"):
        fuse_norm_act(Forms(lambda m, x: F.relu(m.bn(x))))
