"""conv_pixel_shuffle_gelu by Winograd's method: on the CPU, gradients included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from winograd_method import channels_last, magnitudes, operands, sums

from hflfnerv import ops
from hflfnerv.errors import BackendUnavailable
from hflfnerv.nn import UpsampleBlock
from hflfnerv.ops import CONV_PIXEL_SHUFFLE_GELU, PackedWeights, _cpp, _winograd
from hflfnerv.ops.conv_pixel_shuffle_gelu import Call, _by_shape
from hflfnerv.reference import conv_pixel_shuffle_gelu as reference
from hflfnerv.testing import (
    assert_close_to_reference,
    assert_gradient_close_to_reference,
    convolution_magnitudes,
    make_tensor,
    poisoned_empty,
    rounded_in_the_end,
    threads,
)

ENTRY = next(entry for entry in CONV_PIXEL_SHUFFLE_GELU if entry.name == "winograd")
needs_vectors = pytest.mark.skipif(ENTRY.unavailable() is not None, reason=f"winograd: {ENTRY.unavailable()}")
# B, C_in, C_out, r, H, W, kernel: the blocks of the networks, channels that fill no vector, rows of y that end within
# one, tiles that are not full, one tile and several blocks of tiles.
SHAPES = [
    (1, 33, 28, 2, 17, 21, 5),
    (2, 40, 33, 2, 9, 14, 5),
    (1, 48, 10, 4, 12, 20, 5),
    (1, 57, 12, 4, 10, 20, 3),
    (1, 24, 24, 2, 37, 30, 3),
    (2, 5, 3, 3, 4, 5, 3),
    (1, 7, 1, 4, 3, 6, 5),
    (1, 130, 9, 1, 8, 8, 5),
    (3, 1, 1, 1, 1, 1, 3),
    (1, 16, 5, 2, 41, 50, 5),
]


HALF = [torch.bfloat16, torch.float16]


def run(tensors, shape, dy=None, dtype=None, impl="winograd", approximate="none"):
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors if t is not None]
    x, weight, bias = [*leaves, None][:3]
    y = ops.conv_pixel_shuffle_gelu(
        x, weight, bias, shape[3], padding=shape[6] // 2, impl=impl, approximate=approximate
    )
    return y, None if dy is None else torch.autograd.grad(y, leaves, dy.to(y.dtype))


@pytest.mark.parametrize(("taps", "size"), [(3, 8), (5, 8), (5, 10)])
def test_the_method(taps, size):
    x, weight = make_tensor(2, 3, 11, 14, dtype=torch.float64), make_tensor(4, 3, taps, taps, dtype=torch.float64)
    torch.testing.assert_close(sums(x, weight, taps, size), F.conv2d(x, weight, padding=taps // 2))


@needs_vectors
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(shape):
    for approximate, with_bias in (("none", True), ("tanh", False)):
        tensors = operands(shape, with_bias)
        batch, _, channels, r, height, width, _ = shape
        dy = make_tensor(batch, channels, height * r, width * r, seed=3)
        options = {"approximate": approximate}
        with poisoned_empty():
            y, gradients = run(tensors, shape, dy, **options)
        expected, true = run(tensors, shape, dy, dtype=torch.float64, impl="reference", **options)
        same, rounded = run(tensors, shape, dy, impl="reference", **options)
        size, *sizes = magnitudes(*tensors, dy, r)
        assert_close_to_reference(y, expected, same, magnitude=size)
        assert y.is_contiguous(memory_format=torch.channels_last)
        for actual, wanted, other, terms in zip(gradients, true, rounded, sizes, strict=False):
            assert_gradient_close_to_reference(actual, wanted, other, magnitude=terms)


@needs_vectors
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_16_bits(shape, dtype):
    tensors = operands(shape, dtype=dtype)
    batch, _, channels, r, height, width, kernel = shape
    dy = make_tensor(batch, channels, height * r, width * r, seed=3).to(dtype)
    with poisoned_empty():
        y, gradients = run(tensors, shape, dy)
    expected, true = run(tensors, shape, dy, dtype=torch.float64, impl="reference")
    same, rounded = run(tensors, shape, dy, impl="reference")
    # Sums are those of float32; what is stored is rounded once. Gradients are sums of terms with a stored factor.
    size, *sizes = magnitudes(*tensors, dy, r)
    assert_close_to_reference(y, expected, same, magnitude=rounded_in_the_end(expected, size, dtype))
    stored = convolution_magnitudes(*tensors[:2], dy, r, (kernel // 2, kernel // 2))[1:]
    for actual, wanted, other, terms, once in zip(gradients, true, rounded, sizes, stored, strict=True):
        assert actual.dtype == dtype
        assert_gradient_close_to_reference(actual, wanted, other, magnitude=rounded_in_the_end(once, terms, dtype))
    # Without gradients, with the weight kept, and in the layout of the inputs.
    for tiles in ("small", "large"):
        again = inference(tensors, shape, tiles=tiles)
        assert_close_to_reference(again, expected, same, magnitude=rounded_in_the_end(expected, 8 * size, dtype))
    again, others = run(tuple(t.contiguous() for t in tensors), shape, dy)
    assert torch.equal(again, y)
    assert all(torch.equal(a, b) for a, b in zip(others, gradients, strict=True))


@needs_vectors
@pytest.mark.parametrize("dtype", HALF)
def test_16_bits_are_those_of_float32_in_large_tiles_rounded(dtype):
    shape = SHAPES[0]
    tensors = operands(shape, dtype=dtype)
    wide = inference([t.float() for t in tensors], shape, tiles="large")
    assert torch.equal(run(tensors, shape)[0], wide.to(dtype))


@needs_vectors
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bounds_see_one_per_cent(shape):
    tensors = operands(shape)
    batch, _, channels, r, height, width, _ = shape
    dy = make_tensor(batch, channels, height * r, width * r, seed=3)
    results = [run(tensors, shape, dy, dtype, impl="reference") for dtype in (torch.float64, torch.float32)]
    expected, same = ([y, *gradients] for y, gradients in results)
    for true, rounded, size in zip(expected, same, magnitudes(*tensors, dy, r), strict=True):
        assert_gradient_close_to_reference(rounded, true, rounded, magnitude=size)
        noise = make_tensor(*true.shape, seed=4) * true.square().mean().sqrt().float()
        for wrong in (1.01 * rounded, rounded + 0.01 * noise):
            with pytest.raises(AssertionError, match="error"):
                assert_gradient_close_to_reference(wrong, true, rounded, magnitude=size)


@needs_vectors
@pytest.mark.parametrize(("kernel", "reach"), [(5, 8), (3, 7)])
def test_how_far_a_nan_reaches(kernel, reach):
    places = torch.cartesian_prod(torch.arange(12, 24), torch.arange(12, 24))
    x, weight = torch.zeros(len(places), 3, 36, 36), make_tensor(4, 3, kernel, kernel)
    x[torch.arange(len(places)), 1, places[:, 0], places[:, 1]] = float("nan")
    y = ops.conv_pixel_shuffle_gelu(x, weight, None, 1, padding=kernel // 2, impl="winograd")
    reached = y.isnan().any(dim=1)
    assert [int(reached.any(dim=d).sum(dim=1).max()) for d in (1, 2)] == [reach, reach]
    assert int(reached.sum(dim=(1, 2)).max()) == reach**2


def inference(tensors, shape, *, tiles, approximate="none"):
    with torch.inference_mode(), PackedWeights(tiles=tiles):
        return run(tensors, shape, approximate=approximate)[0]


@needs_vectors
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_large_tiles(shape):
    for approximate, with_bias in (("none", True), ("tanh", False)):
        tensors, r, taps = operands(shape, with_bias), shape[3], shape[6]
        with poisoned_empty():
            y = inference(tensors, shape, tiles="large", approximate=approximate)
        small = inference(tensors, shape, tiles="small", approximate=approximate)
        expected = run(tensors, shape, dtype=torch.float64, impl="reference", approximate=approximate)[0]
        same = run(tensors, shape, impl="reference", approximate=approximate)[0]
        x, weight, bias = (None if t is None else t.double().abs() for t in tensors)
        size = sums(x, weight, taps, 10 if taps == 5 else 8) + (0 if bias is None else bias[:, None, None])
        assert_close_to_reference(y, expected, same, magnitude=F.pixel_shuffle(size, r))
        assert torch.equal(y, small) == (taps == 3)
        # With a gradient tiles are small, whatever is allowed.
        with PackedWeights(tiles="large"):
            assert torch.equal(run(tensors, shape, approximate=approximate)[0], small)


@needs_vectors
def test_errors_of_large_tiles():
    shape = (1, 33, 28, 2, 64, 64, 5)
    tensors = operands(shape)
    expected = run(tensors, shape, impl="reference", dtype=torch.float64)[0]
    large, small = (inference(tensors, shape, tiles=tiles) for tiles in ("large", "small"))
    assert (large - expected).norm() <= 8 * (small - expected).norm()
    assert (large - expected).norm() <= 2e-5 * expected.norm()


@needs_vectors
def test_large_tiles_whatever_the_threads_and_the_batch():
    shape = (3, 33, 7, 2, 61, 67, 5)
    tensors = operands(shape)
    results = []
    for number in (1, 2, 5):
        with threads(number):
            results.append(inference(tensors, shape, tiles="large"))
    assert all(torch.equal(results[0], y) for y in results[1:])
    for image in range(3):
        alone = inference((tensors[0][image : image + 1], *tensors[1:]), shape, tiles="large")
        assert torch.equal(alone[0], results[0][image])


@needs_vectors
def test_the_bound_sees_a_wrong_tap():
    shape = SHAPES[0]
    tensors = operands(shape)
    dy = make_tensor(1, 28, 34, 42, seed=3)
    expected, same = run(tensors, shape, dtype=torch.float64, impl="reference")[0], run(tensors, shape)[0]
    tensors[1][5, 32, 4, 4] += 0.01
    size, wrong = magnitudes(*tensors, dy, 2)[0], run(tensors, shape)[0]
    with pytest.raises(AssertionError, match="error"):
        assert_close_to_reference(wrong, expected, same, magnitude=size)


@needs_vectors
def test_noncontiguous():
    shape = SHAPES[0]
    x, weight, bias = operands(shape)
    dy = make_tensor(1, 28, 34, 42, seed=3)
    y, gradients = run((x, weight, bias), shape, dy)
    wide = torch.full((1, 33, 17, 42), float("nan"))
    wide[..., ::2] = x
    for other in ((x.contiguous(), weight, bias), (x, weight.contiguous(), bias), (wide[..., ::2], weight, bias)):
        again, others = run(other, shape, channels_last(dy))
        assert torch.equal(again, y)
        assert all(torch.equal(a, b) for a, b in zip(others, gradients, strict=True))
        assert [g.stride() for g in others][1] == other[1].stride()
        assert again.is_contiguous(memory_format=torch.channels_last)
    again, others = run((x.contiguous(), weight.contiguous(), bias), shape, dy)
    assert again.is_contiguous()
    assert torch.equal(again, y)
    assert all(torch.equal(a, b) for a, b in zip(others, gradients, strict=True))


@needs_vectors
def test_before_it_a_norm_that_takes_gradients_in_its_own_layout_alone():
    x, weight, bias = (t.contiguous() for t in operands(SHAPES[0]))
    norm = torch.nn.InstanceNorm2d(33)
    dy = make_tensor(1, 28, 34, 42, seed=3)

    def gradient(impl, dtype=torch.float32):
        leaf = x.to(dtype).requires_grad_()
        y = ops.conv_pixel_shuffle_gelu(norm(leaf), weight.to(dtype), bias.to(dtype), 2, padding=2, impl=impl)
        return torch.autograd.grad(y, leaf, dy.to(dtype))[0]

    # What the norm makes of a gradient g is (g - mean(g) - n mean(g n)) / deviation, of its result n.
    normal, deviation = norm(x.double()), x.double().std(dim=(2, 3), correction=0, keepdim=True)
    size = magnitudes(normal, weight, bias, dy, 2)[1]
    means = [t.mean(dim=(2, 3), keepdim=True) for t in (size, size * normal.abs())]
    size = (size + means[0] + normal.abs() * means[1]) / deviation
    results = [gradient("winograd"), gradient("reference", torch.float64), gradient("reference")]
    assert_gradient_close_to_reference(*results, magnitude=size)


@needs_vectors
def test_deterministic_whatever_the_threads_and_the_batch():
    shape = (3, 33, 7, 2, 61, 67, 5)
    tensors = operands(shape)
    dy = make_tensor(3, 7, 122, 134, seed=3)
    results = []
    for number in (1, 2, 5):
        with threads(number):
            y, gradients = run(tensors, shape, dy)
            results.append((y, *gradients))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))
    for image in range(3):
        y, (dx, *_) = run((tensors[0][image : image + 1], *tensors[1:]), shape, dy[image : image + 1])
        assert torch.equal(y[0], results[0][0][image])
        assert torch.equal(dx[0], results[0][1][image])


@needs_vectors
def test_only_the_gradients_that_are_wanted():
    shape = SHAPES[4]
    x, weight, bias = operands(shape)
    dy = make_tensor(1, 24, 74, 60, seed=3)
    _, expected = run((x, weight, bias), shape, dy)
    for position in range(3):
        leaves = [t.clone().requires_grad_(i == position) for i, t in enumerate((x, weight, bias))]
        y = ops.conv_pixel_shuffle_gelu(*leaves, 2, padding=1, impl="winograd")
        (gradient,) = torch.autograd.grad(y, leaves[position], dy)
        assert torch.equal(gradient, expected[position])


@needs_vectors
def test_opcheck():
    x, weight, bias = (t.requires_grad_() for t in operands(SHAPES[5]))
    op = torch.ops.hflfnerv.conv_pixel_shuffle_gelu.default
    torch.library.opcheck(op, (x, weight, bias, None, 3, "none", True, "winograd", "winograd", "winograd"))


@needs_vectors
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    shape = SHAPES[0]
    tensors = [t.requires_grad_() for t in operands(shape)]

    def function(x, weight, bias):
        return ops.conv_pixel_shuffle_gelu(x, weight, bias, 2, padding=2, impl="winograd") * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    y, expected = compiled(*tensors), function(*tensors)
    assert torch.equal(y, expected)
    gradients = [torch.autograd.grad(t.sum(), tensors) for t in (y, expected)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@needs_vectors
def test_auto():
    torch.manual_seed(0)
    block = UpsampleBlock(33, 7, 2, 5).to(memory_format=torch.channels_last)
    x = make_tensor(1, 33, 80, 64)
    tensors = (x, block.conv.weight, block.conv.bias)
    assert torch.equal(block(x), ops.conv_pixel_shuffle_gelu(*tensors, 2, padding=2, impl="winograd"))
    with torch.inference_mode():
        packed = PackedWeights()
        for _ in range(2):
            with packed:
                assert torch.equal(block(x), ops.conv_pixel_shuffle_gelu(*tensors, 2, padding=2, impl="winograd"))
        assert len(packed._kept) == 1
    # Fewer products are worth more than PyTorch's instructions for 16 bits, but not than matrix units, which read
    # channels-last images.
    for weight in (tensors[1], tensors[1].contiguous()):
        half = (x.bfloat16().requires_grad_(), weight.bfloat16(), tensors[2].bfloat16())
        on_matrix_units = "conv2d+cpp" if weight.is_contiguous() else "cpp"
        impl = "winograd" if _cpp.unavailable_amx() is not None else on_matrix_units
        y = ops.conv_pixel_shuffle_gelu(*half, 2, padding=2)
        assert torch.equal(y, ops.conv_pixel_shuffle_gelu(*half, 2, padding=2, impl=impl))
    # Small images do not pay for the evaluation of the weight, and few values not for any kernel.
    wide = make_tensor(200, 33, 5, 5, layout="channels_last")
    assert _by_shape(Call(x[..., :4, :8], wide, None, 5, (2, 2), "none")) == "reference"
    wide = make_tensor(2000, 33, 5, 5, layout="channels_last")
    assert _by_shape(Call(x[..., :4, :8], wide, None, 5, (2, 2), "none")) == "conv2d+cpp"


@pytest.mark.parametrize(
    ("dtype", "simd", "flags", "least"),
    [
        (torch.float32, "avx2", "", [128, 128]),
        (torch.float32, "avx512", "avx512_bf16 avx512_fp16", [800, 52]),
        (torch.bfloat16, "avx512", "avx512_bf16", [3200, 200]),
        (torch.bfloat16, "avx512", "avx512_fp16", [52, 52]),
        (torch.float16, "avx512", "avx512_bf16", [52, 52]),
        (torch.float16, "avx512", "avx512_fp16", [3200, 200]),
    ],
)
def test_how_large_an_image_pays(monkeypatch, dtype, simd, flags, least):
    monkeypatch.setattr("hflfnerv.ops._cpp.simd", lambda: simd)
    monkeypatch.setattr("hflfnerv.ops._winograd.cpu_flags", lambda: frozenset(flags.split()))
    weight = torch.empty(4, 1, 5, 5, dtype=dtype)
    for kept in (False, True):
        for width, expected in ((least[kept] - 1, False), (least[kept], True)):
            x = torch.empty(7, 1, 1, width, dtype=dtype)
            assert _winograd.pays(x, weight, kept=kept) == expected


@pytest.mark.parametrize(
    ("change", "padding", "reason"),
    [
        (
            lambda x, w: (x.double(), w.double()),
            2,
            "dtype torch.float64 is not one of torch.float32, torch.float16, torch.bfloat16",
        ),
        (lambda x, w: (x.to("meta"), w.to("meta")), 2, "the tensors are on meta"),
        (lambda x, w: (x[:0], w), 2, "is empty"),
        (lambda x, w: (x, w), 1, "kernel (5, 5) with padding (1, 1) is not 3x3 with 1 or 5x5 with 2"),
        (lambda x, w: (x, w[..., :3]), 2, "kernel (5, 3) with padding (2, 2) is not"),
    ],
)
def test_rejects(change, padding, reason):
    x, weight, _ = operands(SHAPES[0])
    assert reason in ENTRY.rejects(Call(*change(x, weight), None, 2, (padding, padding), "none"))


def test_says_what_the_machine_lacks(monkeypatch):
    monkeypatch.setattr("hflfnerv.ops._cpp._machine", lambda: "needs AVX2")
    x, weight, bias = operands(SHAPES[0])
    with pytest.raises(BackendUnavailable, match="impl='winograd' cannot run: needs AVX2"):
        run((x, weight, bias), SHAPES[0])
    y = ops.conv_pixel_shuffle_gelu(x, weight, bias, 2, padding=2)
    assert torch.equal(y, reference.conv_pixel_shuffle_gelu(x, weight, bias, 2, padding=2))
