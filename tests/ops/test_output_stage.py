"""output_stage: head convolutions, tanh, sum of the streams and 8 bits, every kernel against the definition."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from hflfnerv import _ext, ops
from hflfnerv._device import exact_convolutions
from hflfnerv.errors import BackendUnavailable
from hflfnerv.ops import OUTPUT_STAGE, _cpp
from hflfnerv.reference import output_stage as reference
from hflfnerv.testing import implementations, make_tensor, poisoned_empty, threads

# The CUDA kernel, for half precision alone, has tests of its own.
BY_IMPL = pytest.mark.parametrize(
    ("impl", "device"), [case for case in implementations(OUTPUT_STAGE) if case.values[0] != "cuda"]
)
ENTRY = next(entry for entry in OUTPUT_STAGE if entry.name == "cpp")
needs_cpp = pytest.mark.skipif(ENTRY.unavailable() is not None, reason=f"cpp: {ENTRY.unavailable()}")
OP = torch.ops.hflfnerv.output_stage
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ONE, DUAL = {"groups": (0,), "scales": (0.5,)}, {"groups": (0, 1, 1), "scales": (1.0, 0.5)}
# B, channels of the features, rows and columns of each beyond the frame, H, W, groups: pixels that fill cache lines and
# pixels one after the other, frames of less than a tile, of several, and of several bands of rows.
CASES = [
    (1, (28,), ((0, 0),), 37, 97, ONE),
    (2, (24,), ((0, 0),), 5, 81, ONE),
    (1, (1,), ((0, 0),), 1, 1, ONE),
    (1, (33,), ((3, 5),), 18, 20, ONE),
    (1, (64,), ((1, 1),), 4, 330, ONE),
    (2, (24, 5, 10), ((0, 0), (2, 0), (0, 7)), 21, 160, DUAL),
    (1, (12, 2, 31), ((1, 1), (0, 0), (4, 40)), 33, 79, DUAL),
    (1, (3, 4), ((0, 0), (0, 1)), 6, 9, {"groups": (0, 1), "scales": (-0.75, 0.25)}),
]


def operands(case, dtype=torch.float32, device="cpu", layout="channels_last"):
    batch, channels, beyond, height, width, link = case
    features, weights, biases = [], [], []
    for i, (c, (rows, columns)) in enumerate(zip(channels, beyond, strict=True)):
        options = {"dtype": dtype, "device": device}
        features.append(make_tensor(batch, c, height + rows, width + columns, layout=layout, seed=3 * i, **options))
        weights.append(make_tensor(3, c, 3, 3, scale=0.7 * (9 * c) ** -0.5, seed=3 * i + 1, **options))
        biases.append(make_tensor(3, scale=0.3, seed=3 * i + 2, **options))
    return features, weights, biases, {**link, "crop": (height, width)}


def exactly(features, weights, biases, *, groups, scales, crop, offset=0.5, dtype=torch.float64, as_bytes=False):
    """The definition, from what ops.output_stage takes."""
    sums = torch.zeros(len(scales), 3, dtype=dtype)
    for group, bias in zip(groups, biases, strict=True):
        if bias is not None:
            sums[group] += bias.detach().cpu().to(dtype)
    features, weights = ([t.detach().cpu().to(dtype) for t in tensors] for tensors in (features, weights))
    return reference.output_stage(
        features, weights, sums, groups=groups, scales=scales, offset=offset, crop=crop, as_bytes=as_bytes
    )


def allowed(features, weights, *, scales, **_):
    """How far a result may be: tanh's error and rounding, and that of the sums before it.

    A sum of n products in float32 is within n 2^-24 of the sum of their sizes, in whatever order; the slope of tanh is
    at most 1. bfloat16 and float16 products are exact in float32.
    """
    sizes = sum(
        F.conv2d(x.detach().cpu().double().abs(), w.detach().cpu().double().abs(), padding=1).max()
        for x, w in zip(features, weights, strict=True)
    )
    terms = max(9 * w.shape[1] for w in weights) + len(weights)
    return sum(abs(scale) for scale in scales) * (float(sizes) * terms * 2**-24 + 1e-6) + 2**-23


def check(case, dtype, actual_of, device="cpu", **options):
    features, weights, biases, link = operands(case, dtype, device, **options)
    expected, tolerance = exactly(features, weights, biases, **link), allowed(features, weights, **link)
    with poisoned_empty():
        floats = actual_of(features, weights, biases, link, False)
        levels = actual_of(features, weights, biases, link, True)
    assert (floats.dtype, levels.dtype) == (torch.float32, torch.uint8)
    assert floats.shape == levels.shape == expected.shape
    error = (floats.cpu().double() - expected).abs().max().item()
    assert error <= tolerance, f"error {error:.3e} is over {tolerance:.3e}"
    # A level is the rounding of a value that is as near.
    error = (levels.cpu().double() - 255 * expected.clamp(0, 1)).abs().max().item()
    assert error <= 0.5 + 256 * tolerance, f"a level is off by {error:.6f}"
    assert levels.float().std() > 1 or levels.numel() <= 3


def run(impl):
    def call(features, weights, biases, link, as_bytes):
        return ops.output_stage(features, weights, biases, **link, as_bytes=as_bytes, impl=impl)

    return call


@needs_cpp
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(case, dtype):
    check(case, dtype, run("cpp"))


@needs_cpp
@pytest.mark.parametrize("simd", ["avx2", "avx512", "amx"])
@pytest.mark.parametrize("case", CASES[:2] + CASES[5:6], ids=str)
def test_every_instruction_set(case, simd):
    if (simd == "amx" and _cpp.unavailable_amx() is not None) or simd not in ("amx", *_ext.load().simd_levels()):
        pytest.skip(f"this machine has no {simd}")

    def call(features, weights, biases, link, as_bytes):
        rows, columns = link["crop"]
        out = torch.empty(len(features[0]), rows, columns, 3, dtype=torch.uint8 if as_bytes else torch.float32)
        floats = [w.float().contiguous() for w in weights]
        sums = torch.zeros(len(link["scales"]), 3)
        for group, bias in zip(link["groups"], biases, strict=True):
            sums[group] += bias
        described = [
            (x.data_ptr(), *x.shape[1:], w.data_ptr(), group)
            for x, w, group in zip(features, floats, link["groups"], strict=True)
        ]
        _ext.load().output_stage_fwd(
            [len(out), rows, columns],
            (link["scales"], sums.flatten().tolist(), 0.5),
            described,
            "bfloat16",
            out.data_ptr(),
            as_bytes,
            1,
            simd,
        )
        return out

    check(case, torch.bfloat16, call)


@BY_IMPL
def test_the_frame_of_one_stream(impl, device):
    features, weights, biases, link = operands(CASES[0], device=device)
    with exact_convolutions():
        y = ops.output_stage(features, weights, biases, crop=link["crop"], impl=impl)
    image = F.conv2d(*(t.cpu().double() for t in (features[0], weights[0], biases[0])), padding=1)
    expected = (torch.tanh(image) * 0.5 + 0.5).clamp(0, 1).mul(255).permute(0, 2, 3, 1)
    # A level is the rounding of a value that is as near as it can be.
    assert (y.cpu() - expected).abs().max() <= 0.5 + 256 * allowed(features, weights, **link)


@BY_IMPL
def test_rounds_half_to_even_and_clamps(impl, device):
    # Without features all that is left is the offset: levels k + 1/2 exactly, and values far outside.
    x, weight = torch.zeros(1, 1, 2, 3, device=device), torch.zeros(3, 1, 3, 3, device=device)
    for level in (0.5, 1.5, 2.5, 253.5, 254.5, -3.0, 300.0):
        offset = torch.tensor(level / 255).item()
        y = ops.output_stage([x], [weight], [None], offset=offset, impl=impl)
        expected = torch.full_like(x[0, 0], offset).clamp(0, 1).mul(255).round()
        assert y.unique().tolist() == expected.unique().tolist()


@BY_IMPL
def test_noncontiguous_and_other_layouts(impl, device):
    features, weights, biases, link = operands(CASES[5], device=device)
    y = ops.output_stage(features, weights, biases, **link, impl=impl)
    for layout in ("contiguous", "strided"):
        others = operands(CASES[5], device=device, layout=layout)[0]
        difference = ops.output_stage(others, weights, biases, **link, impl=impl).int() - y.int()
        assert difference.abs().max() <= (1 if impl == "reference" else 0)


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pixel_does_not_depend_on_the_frame_the_batch_or_the_threads(dtype):
    features, weights, biases, link = operands(CASES[5], dtype)
    y = ops.output_stage(features, weights, biases, **link, impl="cpp", as_bytes=False)
    for count in (1, 2, 3):
        with threads(count):
            again = ops.output_stage(features, weights, biases, **link, impl="cpp", as_bytes=False)
            assert torch.equal(again, y)
    single = [x[1:] for x in features]
    assert torch.equal(ops.output_stage(single, weights, biases, **link, impl="cpp", as_bytes=False), y[1:])
    smaller = ops.output_stage(features, weights, biases, **{**link, "crop": (17, 83)}, impl="cpp", as_bytes=False)
    assert torch.equal(smaller, y[:, :17, :83])


@BY_IMPL
def test_compile(impl, device):
    features, weights, biases, link = operands(CASES[0], device=device)
    compiled = torch.compile(
        lambda x: ops.output_stage([x], weights, biases, **link, impl=impl), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(features[0]), ops.output_stage(features, weights, biases, **link, impl=impl))


@needs_cpp
@pytest.mark.parametrize("as_bytes", [False, True])
def test_opcheck(as_bytes):
    features, weights, biases, _ = operands(CASES[7])
    sums = torch.stack(biases)
    arguments = (features, weights, sums, [0, 1], [-0.75, 0.25], 0.5, [6, 9], as_bytes, [], "cpp")
    torch.library.opcheck(OP.default, arguments)


def test_gradients_are_the_reference_s():
    features, weights, biases, link = operands(CASES[7], torch.float64)
    leaves = [t.requires_grad_() for t in (*features, *weights, *biases)]

    def function(*leaves):
        return ops.output_stage(leaves[:2], leaves[2:4], leaves[4:], **link, as_bytes=False).double()

    y = function(*leaves)
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(exactly_with_grad(leaves, link), leaves, dy)
    for actual, wanted in zip(torch.autograd.grad(y, leaves, dy), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-6)


def exactly_with_grad(leaves, link):
    return reference.output_stage(leaves[:2], leaves[2:4], torch.stack(leaves[4:]), **link, offset=0.5, as_bytes=False)


@needs_cpp
def test_there_is_no_gradient_in_the_kernel():
    features, weights, biases, link = operands(CASES[0])
    features[0].requires_grad_()
    y = ops.output_stage(features, weights, biases, **link, as_bytes=False, impl="cpp")
    with pytest.raises(RuntimeError, match="use impl='reference'"):
        y.sum().backward()


@needs_cpp
def test_autocast():
    features, weights, biases, link = operands(CASES[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.output_stage(features, weights, biases, **link, impl="cpp", as_bytes=False)
    low = [[t.bfloat16() for t in tensors] for tensors in (features, weights)]
    error = (y.double() - exactly(*low, biases, **link)).abs().max().item()
    assert error <= allowed(*low, **link)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": torch.zeros(1, 5, 4, 4)}, TypeError, "features must be a list, got Tensor"),
        ({"features": []}, ValueError, "must be lists of one length, got 0, 1 and 1"),
        ({"weights": [torch.zeros(3, 4, 3, 3)]}, ValueError, r"weights\[0\] must have shape \(3, 5, 3, 3\)"),
        ({"features": [torch.zeros(5, 4, 4)]}, ValueError, r"features\[0\] must be \[B, C, H, W\]"),
        ({"features": [torch.zeros(1, 5, 4, 4, dtype=torch.int32)]}, TypeError, r"features\[0\] must be a floating"),
        ({"weights": [torch.zeros(3, 5, 3, 3).double()]}, TypeError, r"weights\[0\] must have features\[0\]'s dtype"),
        ({"biases": [torch.zeros(3).half()]}, TypeError, r"biases\[0\] must have features\[0\]'s dtype"),
        ({"biases": [torch.zeros(3, device="meta")]}, ValueError, r"on features\[0\]'s device cpu, got meta; move"),
        ({"biases": [torch.zeros(4)]}, ValueError, r"biases\[0\] must have shape \(3,\)"),
        ({"crop": (5, 4)}, ValueError, "crop must be at least 1 x 1 and fit into every feature, got 5 x 4"),
        ({"crop": (0, 4)}, ValueError, "crop must be"),
        ({"crop": (2.9, 4)}, TypeError, r"crop must be two integers, got \(2.9, 4\)"),
        ({"crop": "44"}, TypeError, r"crop must be \(rows, columns\), got '44'"),
        ({"crop": (4, 4, 4)}, TypeError, r"crop must be \(rows, columns\), got \(4, 4, 4\)"),
        ({"scales": ()}, ValueError, r"scales must have at least one number, got \(\)"),
        ({"groups": (1,)}, ValueError, "groups must ascend from 0 to 0"),
        ({"groups": (0, 0)}, ValueError, "groups must have one number for each of the 1 features"),
        ({"scales": (1.0, 0.5)}, ValueError, "without a gap"),
        ({"impl": "fastest"}, ValueError, "impl must be one of"),
    ],
)
def test_rejects(change, error, message):
    arguments = {
        "features": [torch.zeros(1, 5, 4, 4)],
        "weights": [torch.zeros(3, 5, 3, 3)],
        "biases": [None],
        "crop": (4, 4),
        **change,
    }
    with pytest.raises(error, match=message):
        ops.output_stage(**arguments)


def test_says_why_a_kernel_cannot_run(monkeypatch):
    features, weights, biases, link = operands(CASES[7], torch.float64)
    with pytest.raises(BackendUnavailable, match=r"impl='cpp' cannot run"):
        ops.output_stage(features, weights, biases, **link, impl="cpp")
    monkeypatch.setattr("hflfnerv.ops._cpp._machine", lambda: "needs AVX2")
    features, weights, biases, link = operands(CASES[7])
    with pytest.raises(BackendUnavailable, match="needs AVX2"):
        ops.output_stage(features, weights, biases, **link, impl="cpp")
    assert ops.output_stage(features, weights, biases, **link).dtype == torch.uint8


def test_every_number_of_pixels_and_rows():
    """Blocks of pixels, rows and bands that are not full, all of them near a border."""
    if ENTRY.unavailable() is not None:
        pytest.skip(f"cpp: {ENTRY.unavailable()}")
    for (height, width), dtype in itertools.product(
        [(1, 5), (2, 4), (3, 79), (4, 80), (5, 81), (15, 3), (16, 6), (17, 11)], [torch.float32, torch.bfloat16]
    ):
        check((1, (6,), ((0, 0),), height, width, ONE), dtype, run("cpp"))
