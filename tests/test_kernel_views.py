"""kernels/views.py against `augment.py`, against plain numpy slices, and inside the resident loader.

On a machine without a GPU Triton's interpreter runs the kernel.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import closed_forms
from fastgen.augment import Normaliser, Windows, crop_and_flip
from fastgen.crops import JitterPolicy, ShiftCrop
from fastgen.data import resident
from fastgen.data.resident import ResidentLoader
from fastgen.data.split import Split
from fastgen.errors import UserError
from fastgen.kernels import runtime
from fastgen.kernels.views import empty_views, execute_views, launch, require_normalisation
from fastgen.views import Share, training_views

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
U32 = 2.0**-24  # half a unit in the last place of 1, relative: one rounding of fp32
# One rounding to the dtype. The interpreter cuts fp32 to bf16 instead of rounding it, which is off by up to twice that.
LAST = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0 ** (-7 if runtime.interpreted() else -8)}
# Half the distance of the smallest numbers of fp16, where results are near 0.
SMALLEST = {torch.float32: 0.0, torch.float16: 2.0**-25, torch.bfloat16: 0.0}
MEAN, STD = (0.5, 0.45, 0.3), (0.25, 0.2, 0.31)


def on_device(array):
    return torch.from_numpy(np.ascontiguousarray(array)).to(DEVICE)


def random_case(images, height, width, channels, views, pad, seed=0):
    """Pixels (N, H, W, C), positions (B,), of which some come twice, and rows (B, 5)."""
    random = np.random.default_rng(seed)
    pixels_NHWC = random.integers(0, 256, (images, height, width, channels), dtype=np.uint8)
    rows_B5 = np.empty((views, 5), np.int32)
    rows_B5[:, :2] = random.integers(-pad, pad + 1, (views, 2))
    rows_B5[:, 2:] = np.stack(np.broadcast_arrays(height, width, random.integers(0, 2, views)), 1)
    return pixels_NHWC, random.integers(0, images, views), rows_B5


def numpy_views(pixels_NHWC, positions_B, rows_B5, pad):
    """uint8 (B, C, H, W)"""
    views = [closed_forms.view(pixels_NHWC[n], row, pad) for n, row in zip(positions_B, rows_B5, strict=True)]
    return np.stack(views).transpose(0, 3, 1, 2)


def require_channels_last(images_NCHW):
    assert images_NCHW.is_contiguous(memory_format=torch.channels_last)
    assert images_NCHW.stride() == empty_views(images_NCHW.permute(0, 2, 3, 1), len(images_NCHW), torch.uint8).stride()


def require_normalised(found_NCHW, pixels_NCHW, dtype):
    """Scale, shift and their product with the pixel are rounded once each, the product and the sum again."""
    channels = pixels_NCHW.shape[1]
    mean, std = (np.array(values[:channels])[:, None, None] for values in (MEAN, STD))
    scaled, shift = pixels_NCHW / (255 * std), -mean / std
    fp32 = U32 * (3 * np.abs(scaled) + 2 * np.abs(shift))
    # A thousandth more for what is of the second order: roundings of what is rounded already.
    allowed = 1.001 * (fp32 + LAST[dtype] * np.abs(scaled + shift) + SMALLEST[dtype])
    assert found_NCHW.dtype == dtype
    assert (np.abs(found_NCHW.double().cpu().numpy() - (scaled + shift)) <= allowed).all()


def normaliser(channels, dtype):
    return Normaliser(MEAN[:channels], STD[:channels], DEVICE, dtype)


@pytest.mark.parametrize("views", [1, 7])
@pytest.mark.parametrize(
    ("shape", "pad"),
    [
        ((4, 8, 8, 1), 1),  # digits: one block without a rest
        ((9, 5, 9, 3), 2),  # not square, 135 values in a block of 256
        ((3, 9, 6, 2), 0),
        ((2, 5, 5, 4), 6),  # more padding than image: views that see nothing of it
        ((3, 19, 23, 3), 4),  # 1311 values: two blocks of 1024
    ],
)
def test_stored_pixels_bit_for_bit(shape, pad, views):
    pixels_NHWC, positions, rows = random_case(*shape, views, pad)
    images = on_device(pixels_NHWC)
    found = execute_views(images, on_device(positions), on_device(rows), None, None, torch.uint8)
    require_channels_last(found)
    plain = crop_and_flip(Windows(images, pad), on_device(positions), on_device(rows).long())
    assert torch.equal(found, plain)
    np.testing.assert_array_equal(found.cpu(), numpy_views(pixels_NHWC, positions, rows, pad))


def test_every_corner_and_both_flips():
    """No two pixels of the ramp are equal, so a view that is wrong by one pixel differs everywhere."""
    pad, ramp = 2, np.arange(1, 91, dtype=np.uint8).reshape(1, 5, 6, 3)
    corners = range(-pad, pad + 1)
    rows = np.array([(top, left, 5, 6, flip) for top in corners for left in corners for flip in (0, 1)], np.int32)
    positions = np.zeros(len(rows), np.int64)
    found = execute_views(on_device(ramp), on_device(positions), on_device(rows), None, None, torch.uint8).cpu()
    np.testing.assert_array_equal(found, numpy_views(ramp, positions, rows, pad))
    assert len({view.numpy().tobytes() for view in found}) == len(rows)


def test_views_far_outside_are_black():
    far = [(-5, 0), (5, 0), (0, -6), (0, 6), (2**31 - 9, 0), (-(2**31), 0), (0, -(2**30)), (10**6, 10**6)]
    rows = on_device(np.array([(*corner, 5, 6, 0) for corner in far], np.int32))
    images, positions = torch.full((1, 5, 6, 3), 255, dtype=torch.uint8, device=DEVICE), torch.zeros(8).long()
    assert not execute_views(images, positions.to(DEVICE), rows, None, None, torch.uint8).any()


@pytest.mark.parametrize("dtype", list(LAST), ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_normalised_pixels_against_fp64(channels, dtype):
    pixels_NHWC, positions, rows = random_case(5, 9, 7, channels, 6, 3)
    normalise = normaliser(channels, dtype)
    found = execute_views(
        on_device(pixels_NHWC), on_device(positions), on_device(rows), normalise.scale_C, normalise.shift_C, dtype
    )
    require_channels_last(found)
    require_normalised(found, numpy_views(pixels_NHWC, positions, rows, 3), dtype)


def test_every_value_of_a_pixel():
    pixels_NHWC = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    rows = np.array([(0, 0, 16, 16, 0)], np.int32)
    for dtype in LAST:
        normalise = normaliser(3, dtype)
        scales = normalise.scale_C, normalise.shift_C
        found = execute_views(on_device(pixels_NHWC), torch.zeros(1).long().to(DEVICE), on_device(rows), *scales, dtype)
        require_normalised(found, pixels_NHWC.transpose(0, 3, 1, 2), dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32], ids=str)
def test_writes_its_output_and_nothing_else(dtype):
    pixels_NHWC, positions, rows = random_case(3, 5, 9, 3, 4, 2)
    images, guard, poison = on_device(pixels_NHWC), 512, 0xA5
    normalise = normaliser(3, dtype)
    scales = (None, None) if dtype == torch.uint8 else (normalise.scale_C, normalise.shift_C)
    arguments = images, on_device(positions), on_device(rows), *scales
    values = 4 * 5 * 9 * 3
    memory = torch.full(((values + 2 * guard) * dtype.itemsize,), poison, dtype=torch.uint8, device=DEVICE)
    inside = memory.view(dtype)[guard : guard + values].view(4, 5, 9, 3).permute(0, 3, 1, 2)
    # None at all: nothing happens.
    launch(images, arguments[1][:0], arguments[2][:0], *scales, inside[:0])
    assert (memory == poison).all()
    launch(*arguments, inside)
    for zone in (memory[: guard * dtype.itemsize], memory[-guard * dtype.itemsize :]):
        assert (zone == poison).all()
    assert torch.equal(inside, execute_views(*arguments, dtype))
    np.testing.assert_array_equal(images.cpu(), pixels_NHWC)


def test_an_image_beyond_32_bits():
    """Its offset, cut to 32 bits, is the first image's. The offset of a view is computed alike, from an int64.

    The memory is not touched but for two images, so the system does not provide it on a CPU.
    """
    shape = (8, 8, 4)
    position = 2**32 // np.prod(shape)
    images = torch.empty((position + 1, *shape), dtype=torch.uint8, device=DEVICE)
    images[0], images[position] = 7, on_device(np.arange(256, dtype=np.uint8).reshape(shape))
    rows = on_device(np.array([(0, 0, 8, 8, 0)], np.int32))
    found = execute_views(images, torch.tensor([position], device=DEVICE), rows, None, None, torch.uint8)
    assert torch.equal(found[0].permute(1, 2, 0), images[position])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_opcheck(channels, dtype):
    pixels_NHWC, positions, rows = random_case(3, 5, 6, channels, 2, 1)
    normalise = normaliser(channels, dtype)
    scales = (None, None) if dtype == torch.uint8 else (normalise.scale_C, normalise.shift_C)
    torch.library.opcheck(
        execute_views, (on_device(pixels_NHWC), on_device(positions), on_device(rows), *scales, dtype)
    )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(backend):
    pixels_NHWC, positions, rows = random_case(3, 5, 6, 3, 2, 1)
    normalise = normaliser(3, torch.float32)
    arguments = on_device(pixels_NHWC), on_device(positions), on_device(rows), normalise.scale_C, normalise.shift_C

    def doubled(*words):
        return execute_views(*words, torch.float32) * 2

    found = torch.compile(doubled, fullgraph=True, backend=backend)(*arguments)
    require_channels_last(found)
    assert torch.equal(found, doubled(*arguments))


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("images", lambda images: images.float(), "give uint8"),
        ("images", lambda images: images.permute(0, 2, 1, 3), "dense memory"),
        ("positions", lambda positions: positions.int(), "give int64"),
        ("positions", lambda positions: positions.repeat_interleave(2)[::2], "contiguous"),
        ("rows", lambda rows: rows.long(), "give int32"),
        ("rows", lambda rows: rows[:1], r"int32 \(2, 5\)"),
        ("rows", lambda rows: rows.repeat(1, 2)[:, ::2], "contiguous"),
        ("scale", lambda scale: None, "give both"),
        ("scale", lambda scale: scale[:2], r"give fp32 \(3,\)"),
        ("shift", lambda shift: shift.double(), "give fp32"),
        ("dtype", lambda dtype: torch.float64, "fp16, bf16 or fp32"),
        ("dtype", lambda dtype: torch.uint8, "fp16, bf16 or fp32"),
    ],
)
def test_refuses_what_it_would_read_wrongly(name, change, told):
    pixels_NHWC, positions, rows = random_case(3, 5, 6, 3, 2, 1)
    normalise = normaliser(3, torch.float16)
    arguments = {
        "images": on_device(pixels_NHWC),
        "positions": on_device(positions),
        "rows": on_device(rows),
        "scale": normalise.scale_C,
        "shift": normalise.shift_C,
        "dtype": torch.float16,
    }
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=told):
        execute_views(*arguments.values())


def test_refuses_a_normalisation_on_another_device():
    scale = torch.ones(3, device=DEVICE)
    with pytest.raises(ValueError, match="where the images are"):
        require_normalisation(torch.zeros(1, 2, 2, 3, device=DEVICE), scale, scale.to("meta"), torch.float16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_in_a_cuda_graph():
    pixels_NHWC, positions, rows = random_case(50, 32, 32, 3, 2 * 16, 4)
    images, all_positions, all_rows = on_device(pixels_NHWC), on_device(positions), on_device(rows)
    seen = all_positions[:16].clone(), all_rows[:16].clone()
    out = execute_views(images, *seen, None, None, torch.uint8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(images, *seen, None, None, out)
    for held, later in zip(seen, (all_positions[16:], all_rows[16:]), strict=True):
        held.copy_(later)
    graph.replay()
    np.testing.assert_array_equal(out.cpu(), numpy_views(pixels_NHWC, positions[16:], rows[16:], 4))


POLICY = ShiftCrop(8, 7, 2, flip=True)
JITTERED = replace(POLICY, jitter=JitterPolicy(rotation_degrees=5, pixel_shift=7))


@pytest.fixture
def split():
    """13 images of 8x7 pixels; ids and labels are not positions."""
    random = np.random.default_rng(3)
    return Split(
        random.integers(0, 256, (13, 8, 7, 3), dtype=np.uint8), random.permutation(13) % 5, np.arange(40, 79, 3)
    )


@pytest.fixture
def loaders(split, monkeypatch):
    """(plain, with the kernel); only the plain one may crop by torch."""
    plain, fast = ResidentLoader(split, 2, DEVICE), ResidentLoader(split, 2, DEVICE, kernels=True)
    right = resident.crop_and_flip

    def watched(windows, positions, rows):
        assert positions.dtype == rows.dtype == torch.int64
        watched.calls += 1
        return right(windows, positions, rows)

    watched.calls = 0
    monkeypatch.setattr(resident, "crop_and_flip", watched)
    plain.calls = lambda: watched.calls
    return plain, fast


def require_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.images_NCHW.stride() == other.images_NCHW.stride()
        for name in ("images_NCHW", "labels", "ids"):
            assert getattr(one, name).dtype == getattr(other, name).dtype
            assert torch.equal(getattr(one, name), getattr(other, name))
        assert (one.jitter is None) == (other.jitter is None)
        if one.jitter is not None:
            assert torch.equal(one.jitter, other.jitter)


@pytest.mark.parametrize(
    ("batch_size", "first_batch", "share"),
    [
        (4, 0, Share()),  # the last batch has one sample
        (4, 2, Share()),  # stopped in the middle of an epoch
        (4, 3, Share()),  # only the last batch is left
        (4, 4, Share()),  # nothing is left
        (5, 1, Share(0, 2)),  # batches of odd size: slices of every alignment
        (5, 0, Share(1, 2)),
        (6, 0, Share(1, 2)),
        (6, 0, Share(0, 2)),  # its share of the last batch is empty
        (6, 2, Share(0, 2)),  # and so is all of what is left
        (100, 0, Share()),
    ],
)
@pytest.mark.parametrize("policy", [POLICY, JITTERED], ids=["plain", "jittered"])
def test_batches_equal_those_without_kernels(loaders, split, policy, batch_size, first_batch, share):
    plain, fast = loaders
    views = training_views(split.ids, policy, 3, 1, 2)
    expected = list(plain.batches(views, batch_size, first_batch, share))
    calls = plain.calls()
    assert calls == len(expected)
    require_same(list(fast.batches(views, batch_size, first_batch, share)), expected)
    assert plain.calls() == calls
    for batch in expected:
        places = np.searchsorted(split.ids, batch.ids.cpu().numpy())
        np.testing.assert_array_equal(
            batch.images_NCHW.cpu(), numpy_views(split.images_NHWC, places, views.table[places], 2)
        )
        np.testing.assert_array_equal(batch.labels.cpu(), split.labels[places])
        if policy is JITTERED:
            np.testing.assert_array_equal(batch.jitter.cpu(), views.jitter[places])


@pytest.mark.parametrize("kernels", [False, True])
def test_a_batch_is_its_own(split, kernels):
    loader = ResidentLoader(split, 2, DEVICE, kernels)
    views = training_views(split.ids, JITTERED, 3, 1, 0)
    expected = list(loader.batches(views, 4))
    pixels = split.images_NHWC.copy()
    changed = []
    for batch in loader.batches(views, 4):
        copied = replace(batch, **{name: value.clone() for name, value in vars(batch).items() if value is not None})
        changed.append(copied)
        for value in vars(batch).values():
            if value is not None:
                value.zero_()
    require_same(changed, expected)
    require_same(list(loader.batches(views, 4)), expected)
    np.testing.assert_array_equal(split.images_NHWC, pixels)


@pytest.mark.parametrize("dtype", list(LAST), ids=str)
def test_normalised_batches(loaders, split, dtype):
    plain, fast = loaders
    views = training_views(split.ids, POLICY, 3, 1, 0)
    expected = list(plain.batches(views, 4, 1, Share(1, 2)))
    normalised = fast.normalised(normaliser(3, dtype))
    assert len(normalised) == 13
    found = list(normalised.batches(views, 4, 1, Share(1, 2)))
    for one, other in zip(found, expected, strict=True):
        require_normalised(one.images_NCHW, other.images_NCHW.cpu().numpy(), dtype)
        require_channels_last(one.images_NCHW)
    images = [batch.images_NCHW for batch in expected]
    require_same([replace(one, images_NCHW=image) for one, image in zip(found, images, strict=True)], expected)
    # The loader that it came from stays as it was.
    require_same(list(fast.batches(views, 4, 1, Share(1, 2))), expected)


def test_what_cannot_be_normalised(loaders, split):
    plain, fast = loaders
    with pytest.raises(ValueError, match="kernels=True"):
        plain.normalised(normaliser(3, torch.float16))
    with pytest.raises(ValueError, match=r"give fp32 \(3,\)"):
        fast.normalised(normaliser(1, torch.float16))
    with pytest.raises(ValueError, match="jitter"):
        next(fast.normalised(normaliser(3, torch.float16)).batches(training_views(split.ids, JITTERED, 3, 1, 0), 4))


@pytest.mark.parametrize("kernels", [False, True])
def test_views_of_other_images(split, kernels):
    loader = ResidentLoader(split, 2, DEVICE, kernels)
    views = training_views(split.ids, POLICY, 3, 1, 0)
    wrong_corner, wrong_size = views.table.copy(), views.table.copy()
    wrong_corner[5, 1], wrong_size[5, 3] = -3, 8
    for refused in (
        replace(views, order=np.array([13])),
        replace(views, order=np.array([-1])),
        replace(views, table=views.table[:12]),
        replace(views, table=wrong_corner),
        replace(views, table=wrong_size),
    ):
        with pytest.raises(ValueError, match=r"12 samples|13 samples|8x7 pixels"):
            next(loader.batches(refused, 4))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs kernels")
def test_kernels_without_a_gpu_are_refused(split, monkeypatch):
    monkeypatch.setattr(runtime, "interpreted", lambda: False)
    with pytest.raises(UserError, match="needs an NVIDIA GPU"):
        ResidentLoader(split, 2, DEVICE, kernels=True)
