"""conv_pixel_shuffle_gelu by Fourier transforms and products of 16-bit integers: inference on the CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from winograd_method import LARGEST, integer_sums, operands

from hflfnerv import ops
from hflfnerv.ops import PackedWeights, _cpp, _winograd
from hflfnerv.testing import make_tensor, poisoned_empty, threads

pytestmark = pytest.mark.skipif(_cpp.unavailable() is not None, reason=f"cpp: {_cpp.unavailable()}")
# B, C_in, C_out, r, H, W, kernel: the blocks of the networks, channels that fill no vector, alone or shared by tiles,
# tiles that are not full, one tile and several blocks of tiles.
SHAPES = [
    (1, 33, 28, 2, 17, 21, 5),
    (2, 40, 33, 2, 9, 14, 5),
    (1, 48, 10, 4, 28, 29, 5),
    (1, 57, 12, 4, 16, 32, 3),
    (1, 24, 24, 2, 37, 30, 3),
    (2, 5, 3, 3, 4, 5, 3),
    (1, 7, 1, 4, 3, 6, 5),
    (1, 128, 9, 1, 8, 8, 5),
    (3, 1, 1, 1, 1, 1, 3),
    (1, 16, 5, 2, 141, 50, 5),
    (2, 12, 5, 2, 60, 99, 3),
]


@pytest.fixture(autouse=True)
def small_images_too(monkeypatch):
    monkeypatch.setattr(_winograd, "_INTEGER_LEAST", {3: 1, 5: 1})


def block(x, weight, bias, r, tiles="integer", impl="winograd", approximate="none"):
    with torch.inference_mode(), PackedWeights(tiles=tiles):
        return ops.conv_pixel_shuffle_gelu(
            x, weight, bias, r, padding=weight.shape[2] // 2, impl=impl, approximate=approximate
        )


def by_definition(x, weight, bias, r, approximate="none"):
    """Return what the method gives in float64, and what it would give without rounding."""
    x, weight, bias = (t.double() for t in (x, weight, bias))
    sums = (integer_sums(x, weight, weight.shape[2]), F.conv2d(x, weight, padding=weight.shape[2] // 2))
    return [F.gelu(F.pixel_shuffle(z + bias[:, None, None], r), approximate=approximate) for z in sums]


def assert_as_near(actual, method, exact):
    """The errors are those of the method, with a tenth for other roundings, and float32's."""
    unit = torch.finfo(torch.float32).eps
    error, allowed = ((t.double() - exact) for t in (actual, method))
    assert error.norm() <= 1.1 * allowed.norm() + 8 * unit * exact.norm()
    assert error.abs().max() <= 2 * allowed.abs().max() + 8 * unit * exact.abs().max()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_method(shape):
    tensors, r = operands(shape), shape[3]
    for approximate in ("none", "tanh"):
        method, exact = by_definition(*tensors, r, approximate)
        assert (method - exact).norm() <= 3e-4 * exact.norm()
        with poisoned_empty():
            y = block(*tensors, r, approximate=approximate)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert_as_near(y, method, exact)
        for wrong in (1.001 * y, y + 0.001 * make_tensor(*y.shape, seed=4) * exact.square().mean().sqrt().float()):
            with pytest.raises(AssertionError):
                assert_as_near(wrong, method, exact)


def test_errors_are_a_tenth_of_those_of_bfloat16():
    shape = (1, 33, 28, 2, 64, 64, 5)
    tensors = operands(shape)
    exact = by_definition(*tensors, 2)[1]
    bf16 = block(*(t.bfloat16() for t in tensors), 2, impl="reference").double()
    error = (block(*tensors, 2) - exact).norm()
    assert error <= (bf16 - exact).norm() / 10
    assert error <= 2e-4 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_those_of_float32_rounded(dtype):
    tensors = operands(SHAPES[0], dtype=dtype)
    assert torch.equal(block(*tensors, 2), block(*(t.float() for t in tensors), 2).to(dtype))


@pytest.mark.parametrize("channels", [1, 2, 33, 128])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e15])
def test_no_sum_overflows(channels, size):
    # All products of a position have the same sign, and all values are as large as their scale allows. So all weights
    # are off alike, by half of a unit, of which all of them together are 2^31 / LARGEST, and all values by one in
    # LARGEST.
    allowed = channels * LARGEST / 2**31 + 2 / LARGEST
    signs = torch.ones(channels)
    signs[::2] = -1
    x = (size * signs[:, None, None]).expand(1, channels, 40, 40).contiguous()
    weight = signs[None, :, None, None].expand(32, channels, 5, 5).contiguous()
    for signed in (x, -x):
        expected = F.gelu(F.conv2d(signed.double(), weight.double(), padding=2))
        error = (block(signed, weight, None, 1) - expected).abs().max()
        assert error <= allowed * 25 * channels * size


def test_zeros_and_scales_of_each_tile():
    x, weight, bias = operands((1, 20, 8, 1, 42, 56, 5))
    x[:, :, :, :28] = 0
    x[..., 32:] *= 1e-3  # tiles from column 28 on see nothing else but for two columns
    y, exact = block(x, weight, bias, 1).double(), by_definition(x, weight, bias, 1)[1]
    assert (y - exact)[..., :14].abs().max() <= 1e-6  # a tile that sees zeros alone: GELU's errors
    x = x[..., 32:]
    method, exact = by_definition(x, weight, 0 * bias, 1)
    assert_as_near(block(x, weight, 0 * bias, 1), method, exact)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("channels", "kernel", "reach"), [(3, 5, 28), (16, 5, 28), (35, 3, 32)])
def test_how_far_what_is_not_finite_reaches(channels, kernel, reach, value):
    weight = make_tensor(4, channels, kernel, kernel)
    tile = 19 - kernel
    places = [(20, 20), (tile - 1, tile), (2 * tile + 1, tile - kernel // 2), (0, 0), (63, 63), (tile, 40)]
    for channel in (0, channels - 1):
        for row, column in places:
            x = make_tensor(1, channels, 64, 64, layout="channels_last")
            clean = block(x, weight, None, 1)
            x[0, channel, row, column] = value
            y = block(x, weight, None, 1)
            bad = ~y.isfinite()
            rows, columns = (bad.any(dim=1)[0].any(dim=d).nonzero().flatten() for d in (1, 0))
            for where, at in ((rows, row), (columns, column)):
                assert at in where
                assert int(where.max() - where.min()) < reach
            assert torch.equal(y[~bad], clean[~bad])
            # What the convolution makes of it is not finite either.
            near = bad[0, :, max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
            assert near.all()


@pytest.mark.parametrize("kernel", [3, 5])
def test_the_weight_is_not_finite(kernel):
    x, weight, bias = operands((1, 9, 4, 2, 20, 20, kernel))
    for value in (float("nan"), float("inf")):
        weight[3, 4, 1, 2] = value
        assert not block(x, weight, bias, 2).isfinite().all()


def test_whatever_the_threads_and_the_batch():
    tensors = operands((3, 33, 7, 2, 61, 67, 5))
    results = []
    for number in (1, 2, 5):
        with threads(number):
            results.append(block(*tensors, 2))
    assert all(torch.equal(results[0], y) for y in results[1:])
    for image in range(3):
        assert torch.equal(block(tensors[0][image : image + 1], *tensors[1:], 2)[0], results[0][image])


def test_a_weight_that_is_passed_over_once_for_all_tiles():
    # Larger than 8 MB at the points: tiles are evaluated before, and chunks of the weight taken one by one.
    tensors = operands((2, 64, 9, 8, 20, 30, 5))
    assert _cpp.load().winograd_weight_floats([2, 64, 20, 30, 9, 8, 5, 18], False) > 2**21
    assert_as_near(block(*tensors, 8), *by_definition(*tensors, 8))
    with threads(1):
        alone = block(*tensors, 8)
    assert torch.equal(block(*tensors, 8), alone)


def test_when_it_is_taken(monkeypatch):
    monkeypatch.undo()
    x, weight, bias = operands((1, 6, 5, 2, 50, 64, 5))
    large, integer = (block(x, weight, bias, 2, tiles) for tiles in ("large", "integer"))
    assert not torch.equal(large, integer)
    # Not for small images, larger ones of 3x3 kernels, not for many channels, and not where a gradient is wanted.
    assert torch.equal(block(x[..., :63], weight, bias, 2, "large"), block(x[..., :63], weight, bias, 2))
    for height in (124, 125):
        small = operands((1, 6, 5, 2, height, 64, 3))
        assert torch.equal(block(*small, 2, "large"), block(*small, 2)) == (height == 124)
    many = operands((1, 129, 5, 2, 50, 64, 5))
    assert torch.equal(block(*many, 2, "large"), block(*many, 2))
    with PackedWeights(tiles="integer"):
        y = ops.conv_pixel_shuffle_gelu(x, weight.requires_grad_(), bias, 2, padding=2, impl="winograd")
    assert torch.equal(y, block(x, weight, bias, 2, "small"))


def test_kept_weights_are_those_of_the_size():
    x, weight, bias = operands((1, 6, 5, 2, 50, 64, 5))
    weight = torch.nn.Parameter(weight, requires_grad=False)
    packed = PackedWeights(tiles="integer")
    with torch.inference_mode(), packed:
        for _ in range(2):
            y = ops.conv_pixel_shuffle_gelu(x, weight, bias, 2, padding=2, impl="winograd")
            assert torch.equal(y, block(x, weight.detach().clone(), bias, 2))


def test_names_of_tiles():
    with pytest.raises(ValueError, match="tiles must be one of 'small', 'large', 'integer', got 'huge'"):
        PackedWeights(tiles="huge")


def test_what_the_extension_refuses():
    module = _cpp.load()
    with pytest.raises(ValueError, match="points must be 8, 18, or 10 with a kernel of 5, got 16"):
        module.winograd_weight_floats([1, 1, 1, 1, 1, 1, 5, 16], False)
    with pytest.raises(ValueError, match="with 18 points there may be 4096 channels"):
        module.winograd_weight_floats([1, 4097, 1, 1, 1, 1, 5, 18], False)
    with pytest.raises(ValueError, match="the gradient of the weight is not made at 18 points"):
        module.winograd_wgrad([1, 1, 1, 1, 1, 1, 5, 18], "float32", 0, 0, 0, threads=1)
