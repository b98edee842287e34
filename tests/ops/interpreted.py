"""The Triton kernels through their registered operations, on the CPU under Triton's interpreter.

Run by the ``interpreter`` fixture (TRITON_INTERPRET=1), not collected by itself. float32 and float16 only: the
interpreter truncates where it should round to bfloat16.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from triton.runtime import interpreter

from hflfnerv import ops
from hflfnerv.ops import _channel_norm, _depthwise_conv2d, _scale_residual  # noqa: F401  register their operations
from hflfnerv.reference import conv_pixel_shuffle_gelu as conv_reference
from hflfnerv.reference import highpass as highpass_reference
from hflfnerv.reference import output_stage as stage_reference
from hflfnerv.reference import pixel_shuffle_gelu as reference
from hflfnerv.reference import stream_loss as loss_reference
from hflfnerv.testing import (
    assert_close_to_reference,
    assert_gradient_close_to_reference,
    convolution_magnitudes,
    layer_norm_magnitudes,
    make_tensor,
    poisoned_empty,
    rounded_in_the_end,
)

torch.set_num_threads(1)

# Triton 3.6's interpreter makes an int of an array with an axis of one element, which NumPy refuses from 2.4 on.
_patch_tensor = interpreter._patch_lang_tensor


def _patch_tensor_with_index(tensor, *scope):
    _patch_tensor(tensor, *scope)
    tensor.__index__ = lambda self: int(self.handle.data.item())


interpreter._patch_lang_tensor = _patch_tensor_with_index

# B, C, r, H, W: sizes of one, odd sizes, channels that fill no tile, r that is no power of two.
SHAPES = [(2, 3, 2, 5, 7), (1, 9, 2, 3, 5), (1, 5, 3, 4, 5), (2, 2, 5, 3, 1), (1, 4, 1, 3, 3), (1, 1, 4, 1, 70)]
SHAPES += [(1, 1, 2, 2, 1100)]  # more than one tile a row in every layout


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("shape", "with_bias"), [*((shape, True) for shape in SHAPES), (SHAPES[0], False)])
def test_pixel_shuffle_gelu(shape, with_bias, dtype, layout, approximate):
    batch, channels, r, height, width = shape
    x = make_tensor(batch, channels * r * r, height, width, dtype=dtype, layout=layout, scale=2, requires_grad=True)
    dy = make_tensor(batch, channels, height * r, width * r, dtype=dtype, seed=1)
    # A bias in every second place of memory, and one that is whole.
    kind = "strided" if layout == "channels_last" else "contiguous"
    bias = None
    if with_bias:
        bias = make_tensor(channels * r * r, dtype=dtype, layout=kind, seed=2, requires_grad=True)
    inputs = [x] if bias is None else [x, bias]

    with poisoned_empty():
        y = torch.ops.hflfnerv.pixel_shuffle_gelu(x, r, bias, approximate, "triton")
        gradients = torch.autograd.grad(y, inputs, dy)
    assert y.stride() == torch.empty_like(y, memory_format=ops_layout(x)).stride()
    assert gradients[0].stride() == torch.empty_like(x, memory_format=ops_layout(x)).stride()

    def run(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        y = reference.pixel_shuffle_gelu(leaves[0], r, *leaves[1:], approximate=approximate)
        return y, torch.autograd.grad(y, leaves, dy.to(dtype))

    (expected, expected_gradients), (same, same_gradients) = run(torch.float64), run(dtype)
    assert_close_to_reference(y, expected, same)
    # The gradient of the bias is a sum over that of x.
    magnitudes = [None, expected_gradients[0].abs().sum(dim=(0, 2, 3))][: len(gradients)]
    for actual, true, rounded, size in zip(gradients, expected_gradients, same_gradients, magnitudes, strict=True):
        assert_gradient_close_to_reference(actual, true, rounded, magnitude=size)


def ops_layout(x):
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_pixel_shuffle_gelu_extremes(approximate):
    # The tails of GELU and of its derivative, where intermediate powers overflow, and a NaN that has to stay one.
    values = [-1e30, -60.0, -14.5, -8.9, 0.0, 8.9, 14.5, 60.0, 1e30, float("nan")]
    x = torch.tensor(values).reshape(1, 1, 1, -1).requires_grad_()
    y = torch.ops.hflfnerv.pixel_shuffle_gelu(x, 1, None, approximate, "triton")
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    expected = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 8.9, 14.5, 60.0, 1e30, float("nan")]).reshape(x.shape)
    slopes = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0, 1.0, float("nan")]).reshape(x.shape)
    torch.testing.assert_close(y, expected, rtol=1e-7, atol=1e-15, equal_nan=True)
    torch.testing.assert_close(dx, slopes, rtol=1e-7, atol=1e-15, equal_nan=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_pixel_shuffle_gelu_empty(layout):
    x = torch.empty(0, 8, 3, 4).contiguous(memory_format=getattr(torch, f"{layout}_format", torch.channels_last))
    x, bias = x.requires_grad_(), torch.ones(8, requires_grad=True)
    y = torch.ops.hflfnerv.pixel_shuffle_gelu(x, 2, bias, "none", "triton")
    y.sum().backward()
    assert y.shape == (0, 2, 6, 8)
    assert x.grad.shape == x.shape
    assert torch.equal(bias.grad, torch.zeros(8))


@pytest.mark.parametrize("removed", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("height", [1, 2, 5, 8])
@pytest.mark.parametrize("width", [1, 2, 7, 10, 1400])
def test_highpass(height, width, removed):
    x = make_tensor(2, height, width, requires_grad=True)
    dy = make_tensor(2, height, width, seed=1)
    with poisoned_empty():
        y = torch.ops.hflfnerv.highpass(x, removed, "triton")
        (dx,) = torch.autograd.grad(y, x, dy)
    for actual, source in ((y, x), (dx, dy)):
        expected, same = (
            highpass_reference.highpass(source.detach().to(d), removed) for d in (torch.float64, torch.float32)
        )
        # Results that cancel to nothing have no size of their own: what is rounded is the input.
        unit = torch.finfo(torch.float32).eps / 2
        assert (actual - expected).abs().max() <= 2 * (same - expected).abs().max() + 4 * unit * source.abs().max()


def test_highpass_keeps_half_precision():
    x = make_tensor(3, 6, 9, dtype=torch.float16)
    y = torch.ops.hflfnerv.highpass(x, 0.8, "triton")
    assert_close_to_reference(y, highpass_reference.highpass(x.double()), ops.highpass(x, impl="reference"))


# B, C_in, C_out, r, (K_h, K_w), H, W: channels that are no multiple of 8, columns of one and of two accumulators and of
# several programs, tiles that end inside a row and that hold several images.
CONV_SHAPES = [
    (2, 33, 3, 2, (5, 5), 5, 7),
    (1, 57, 6, 5, (3, 3), 3, 5),
    (2, 24, 33, 2, (1, 1), 5, 9),
    (1, 60, 7, 1, (3, 1), 9, 1),
    (1, 8, 17, 4, (1, 3), 1, 11),
    (3, 3, 28, 2, (7, 7), 2, 3),
    (3, 5, 7, 1, (1, 1), 1, 1),  # axes of size 1, whose strides say nothing
    (2, 4, 6, 1, (3, 1), 5, 1),
]


def conv_operands(shape, dtype, layout="channels_last", requires_grad=True, bias_layout="contiguous"):
    batch, channels, out_channels, r, kernel, height, width = shape
    n = out_channels * r * r
    x = make_tensor(batch, channels, height, width, dtype=dtype, layout=layout, requires_grad=requires_grad)
    scale = (channels * kernel[0] * kernel[1]) ** -0.5
    weight = make_tensor(n, channels, *kernel, dtype=dtype, scale=scale, seed=1, requires_grad=requires_grad)
    bias = make_tensor(n, dtype=dtype, layout=bias_layout, seed=2, requires_grad=requires_grad)
    return x, weight, bias


def run_conv_reference(tensors, dy, shape, approximate, dtype):
    r, kernel = shape[3], shape[4]
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    x, weight, bias = [*leaves, None][:3]
    padding = (kernel[0] // 2, kernel[1] // 2)
    y = conv_reference.conv_pixel_shuffle_gelu(x, weight, bias, r, padding=padding, approximate=approximate)
    return y, torch.autograd.grad(y, leaves, dy.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("shape", "approximate", "layout", "with_bias", "gradients"),
    [
        (CONV_SHAPES[0], "none", "channels_last", True, "triton"),
        (CONV_SHAPES[0], "tanh", "strided", False, "conv2d"),
        (CONV_SHAPES[1], "none", "contiguous", True, "triton"),
        (CONV_SHAPES[2], "none", "channels_last", True, "conv2d"),
        (CONV_SHAPES[3], "tanh", "contiguous", True, "triton"),
        (CONV_SHAPES[4], "none", "channels_last", False, "triton"),
        (CONV_SHAPES[5], "none", "channels_last", True, "triton"),
    ],
)
def test_conv_shuffle(shape, approximate, layout, with_bias, dtype, gradients):
    kind = "strided" if layout == "contiguous" else "contiguous"
    x, weight, bias = conv_operands(shape, dtype, layout, bias_layout=kind)
    tensors = (x, weight, bias) if with_bias else (x, weight)
    batch, _, out_channels, r, _, height, width = shape
    dy = make_tensor(batch, out_channels, height * r, width * r, dtype=dtype, seed=3)
    with poisoned_empty():
        y, z = torch.ops.hflfnerv.conv_pixel_shuffle_gelu(
            x, weight, bias if with_bias else None, None, r, approximate, True, "triton", gradients, gradients
        )
        actual_gradients = torch.autograd.grad(y, tensors, dy)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert z.is_contiguous(memory_format=torch.channels_last)
    of_x = torch.contiguous_format if layout == "contiguous" else torch.channels_last
    assert actual_gradients[0].is_contiguous(memory_format=of_x)
    expected, expected_gradients = run_conv_reference(tensors, dy, shape, approximate, torch.float64)
    same, same_gradients = run_conv_reference(tensors, dy, shape, approximate, dtype)
    kernel = shape[4]
    size, *sizes = convolution_magnitudes(x, weight, dy, r, (kernel[0] // 2, kernel[1] // 2))
    assert_close_to_reference(y, expected, same, magnitude=size)
    for actual, true, rounded, size in zip(actual_gradients, expected_gradients, same_gradients, sizes, strict=False):
        assert_gradient_close_to_reference(actual, true, rounded, magnitude=size)


@pytest.mark.parametrize("keep_z", [False, True])
def test_conv_shuffle_every_tile(keep_z):
    from hflfnerv.triton_kernels import conv_pixel_shuffle_gelu as kernels
    from hflfnerv.triton_kernels._tiles import HOPPER

    # More pixels than the largest tile holds, in rows that it does not divide, and one group of channels.
    for n, dtype in ((12, torch.float16), (132, torch.float16), (260, torch.float16), (132, torch.float32)):
        shape = (2, 5, n // 4, 2, (1, 1), 3, 61)
        x, weight, bias = conv_operands(shape, dtype, requires_grad=False)
        dy = make_tensor(2, n // 4, 6, 122, dtype=dtype)
        (expected, _), (same, _) = (
            run_conv_reference((x, weight, bias), dy, shape, "none", d) for d in (torch.float64, dtype)
        )
        packed = kernels.pack_weight(weight, 2)
        for tile in kernels.tiles(10**6, n, dtype, HOPPER):
            with poisoned_empty():
                y, z = kernels.conv_pixel_shuffle_gelu_fwd(
                    x, packed, bias, n, (1, 1), 2, "none", keep_z=keep_z, tile=tile
                )
            assert_close_to_reference(y, expected, same)
            if not keep_z:
                assert z is None
                continue
            spread, rounded = (
                torch.nn.functional.conv2d(x.to(d), weight.to(d), bias.to(d))
                .view(2, n // 4, 2, 2, 3, 61)
                .permute(0, 2, 3, 1, 4, 5)
                .reshape(2, n, 3, 61)
                for d in (torch.float64, dtype)
            )
            assert_close_to_reference(z, spread, rounded)


def test_conv_shuffle_takes_pixels_that_lie_apart():
    # As the CUDA kernel leaves them, with anything in between.
    x, weight, bias = conv_operands((2, 5, 3, 2, (3, 3), 4, 5), torch.float32, requires_grad=False)
    memory = torch.full((2, 4, 5, 8), float("nan"))
    apart = memory[..., :5].permute(0, 3, 1, 2).copy_(x)
    run = torch.ops.hflfnerv.conv_pixel_shuffle_gelu
    y, expected = (run(t, weight, bias, None, 2, "none", False, "triton", "conv2d", "conv2d")[0] for t in (apart, x))
    assert torch.equal(y, expected)


@pytest.mark.parametrize("channels", [3, 8])
def test_conv_shuffle_gradients_take_pixels_that_lie_apart(channels):
    # As the CUDA kernels leave them: in dy, and in x where the gradient of the weight alone may read what is between.
    x, weight = (make_tensor(*size, seed=i) for i, size in enumerate(((2, 5, 4, 6), (channels * 4, 5, 3, 3))))
    z, dy = make_tensor(2, channels * 4, 4, 6, seed=2), make_tensor(2, channels, 8, 12, seed=3)
    x, z, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, z, dy))
    run = torch.ops.hflfnerv.conv_pixel_shuffle_gelu_backward
    rest = (z, 2, "none", [True, True, True], "triton", "triton", "triton")
    expected = run(dy, x, weight, *rest)
    apart = []
    for t, pixel in ((dy, channels + 5), (x, 8)):
        batch, _, height, width = t.shape
        memory = torch.full((batch, height, width, pixel), float("nan"))
        apart.append(memory[..., : t.shape[1]].permute(0, 3, 1, 2).copy_(t))
    for actual, of in zip(run(apart[0], apart[1], weight, *rest), expected, strict=True):
        assert torch.equal(actual, of)


def test_conv_shuffle_keeps_the_packed_weight(monkeypatch):
    import importlib

    from hflfnerv.triton_kernels import conv_pixel_shuffle_gelu as kernels

    module = importlib.import_module("hflfnerv.ops.conv_pixel_shuffle_gelu")
    x, weight, bias = conv_operands((1, 9, 3, 2, (3, 3), 4, 5), torch.float32, requires_grad=False)
    call = module.Call(x, torch.nn.Parameter(weight), bias, 2, (1, 1), "none")
    packed, pack = [], kernels.pack_weight
    monkeypatch.setattr(kernels, "pack_weight", lambda *args: packed.append(args) or pack(*args))
    with torch.no_grad(), ops.PackedWeights():
        first, second = module._run_triton(call), module._run_triton(call)
        assert len(packed) == 1
        assert torch.equal(first, second)
        call.weight.mul_(0.5)
        third = module._run_triton(call)
    assert len(packed) == 2
    expected = conv_reference.conv_pixel_shuffle_gelu(x.double(), weight.double(), bias.double(), 2, padding=1)
    torch.testing.assert_close(third.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("n", "dtype"), [(28, torch.float16), (132, torch.float16), (132, torch.float32)])
def test_conv_shuffle_every_tile_of_the_gradients(n, dtype):
    from hflfnerv.triton_kernels import conv_pixel_shuffle_gelu as kernels
    from hflfnerv.triton_kernels._tiles import HOPPER

    # Pixels of several steps in several shares, in rows that a step does not divide; rows of the result of two blocks.
    shape = (2, 33, n // 4, 2, (3, 3), 5, 37)
    x, weight, _ = conv_operands(shape, dtype, requires_grad=False)
    dz = make_tensor(2, n, 5, 37, dtype=dtype, layout="channels_last", seed=1)
    padded = torch.nn.functional.pad(dz, (0, 0, 0, 0, 0, -n % 8)).contiguous(memory_format=torch.channels_last)
    # The order (i, j, c) of dz as the order (c, i, j) of the weight.
    spread = dz.unflatten(1, (4, -1)).transpose(1, 2).flatten(1, 2)

    def gradients(to):
        tensors = [t.to(to) for t in (spread, x, weight)]
        return torch.ops.aten.convolution_backward(
            *tensors, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]
        )

    expected, same = gradients(torch.float64), gradients(dtype)
    sizes = torch.ops.aten.convolution_backward(
        *(t.double().abs() for t in (spread, x, weight)),
        *(None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]),
    )
    found = {
        0: [
            kernels.conv_pixel_shuffle_gelu_dgrad(padded, weight, 2, tile=tile)
            for tile in kernels.tiles(10**6, 33, dtype, HOPPER)
        ],
        1: [
            kernels.conv_pixel_shuffle_gelu_wgrad(x, padded, weight, 2, tile=tile)
            for tile in kernels.wgrad_tiles(9 * 40, n, dtype, HOPPER)
        ],
    }
    for which, results in found.items():
        for actual in results:
            assert_gradient_close_to_reference(actual, expected[which], same[which], magnitude=sizes[which])


def test_conv_shuffle_takes_a_kept_weight():
    from hflfnerv.triton_kernels.conv_pixel_shuffle_gelu import pack_weight

    x, weight, bias = conv_operands((1, 9, 3, 2, (3, 3), 4, 5), torch.float32, requires_grad=False)
    op = torch.ops.hflfnerv.conv_pixel_shuffle_gelu
    y, z = op(x, weight, bias, None, 2, "none", False, "triton", "conv2d", "conv2d")
    assert torch.equal(
        op(x, weight, bias, pack_weight(weight, 2), 2, "none", False, "triton", "conv2d", "conv2d")[0], y
    )
    assert z.numel() == 0


def test_conv_shuffle_reads_nothing_outside_its_window():
    # The rows of the packed weight beyond K are zero, but zero times infinity is not: nothing may be read for them.
    x, weight, _ = conv_operands((1, 5, 1, 2, (3, 3), 7, 9), torch.float32, requires_grad=False)
    x[0, 0, 3, 4] = float("inf")
    x[0, 1, 0, 0] = float("nan")
    y, _ = torch.ops.hflfnerv.conv_pixel_shuffle_gelu(
        x, weight, None, None, 2, "none", False, "triton", "conv2d", "conv2d"
    )
    expected = conv_reference.conv_pixel_shuffle_gelu(x.double(), weight.double(), None, 2, padding=1)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())


@pytest.mark.parametrize("gradients", ["triton", "conv2d"])
def test_conv_shuffle_empty(gradients):
    x = torch.empty(0, 5, 3, 4, requires_grad=True)
    _, weight, bias = conv_operands((1, 5, 2, 2, (3, 3), 3, 4), torch.float32)
    y, _ = torch.ops.hflfnerv.conv_pixel_shuffle_gelu(
        x, weight, bias, None, 2, "none", True, "triton", gradients, gradients
    )
    y.sum().backward()
    assert y.shape == (0, 2, 6, 8)
    assert x.grad.shape == x.shape
    assert torch.equal(bias.grad, torch.zeros(8))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("size", "image", "larger", "layout"),
    [
        ((5, 7), (5, 7), (5, 7), "channels_last"),
        ((6, 9), (7, 12), (9, 10), "contiguous"),
        ((1, 1), (3, 2), (1, 4), "channels_last"),
        ((3, 700), (4, 701), (3, 700), "strided"),  # rows of more than one block
    ],
)
def test_stream_loss(size, image, larger, layout, dtype, both):
    low, high = (
        make_tensor(3, 3, *shape, dtype=dtype, layout=layout, seed=seed, scale=3, requires_grad=True)
        for seed, shape in enumerate((image, larger))
    )
    images = [low, high] if both else [low]
    target = torch.randint(0, 256, (3, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    dloss = make_tensor(3, seed=4)
    with poisoned_empty():
        loss = torch.ops.hflfnerv.stream_loss(low, target, high if both else None, "triton")
        gradients = torch.autograd.grad(loss, images, dloss)

    def run(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in images]
        loss = loss_reference.stream_loss(leaves[0], target, *leaves[1:])
        return loss, torch.autograd.grad(loss, leaves, dloss.to(loss.dtype))

    (expected, expected_gradients), (same, same_gradients) = run(torch.float64), run(dtype)
    assert_close_to_reference(loss, expected, same)
    for actual, true, rounded in zip(gradients, expected_gradients, same_gradients, strict=True):
        assert_gradient_close_to_reference(actual, true, rounded)


def test_stream_loss_extremes():
    values = torch.tensor([-1e30, -50.0, 0.0, 50.0, 1e30, float("nan")])
    low = values.repeat_interleave(3).view(6, 3, 1, 1).requires_grad_()
    loss = torch.ops.hflfnerv.stream_loss(low, torch.zeros(6, 1, 1, 3, dtype=torch.uint8), None, "triton")
    (dlow,) = torch.autograd.grad(loss.sum(), low)
    assert torch.equal(loss[:5], torch.tensor([0.0, 0.0, 0.25, 1.0, 1.0]))
    torch.testing.assert_close(dlow[:5, 0, 0, 0], torch.tensor([0.0, 0.0, 1 / 6, 0.0, 0.0]))
    assert loss[5].isnan()
    assert dlow[5].isnan().all()


# Channels of the features, rows and columns of each beyond the frame, H, W, groups, scales.
STAGES = [
    ((28,), ((0, 0),), (11, 19), (0,), (0.5,)),
    ((24, 5, 10), ((0, 0), (2, 0), (0, 7)), (9, 33), (0, 1, 1), (1.0, 0.5)),
    ((3, 33), ((1, 1), (0, 0)), (1, 5), (0, 1), (-0.75, 0.25)),
    ((16, 1), ((0, 0), (0, 1)), (6, 9), (0, 0), (0.5,)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", STAGES)
def test_output_stage(case, dtype):
    channels, beyond, crop, groups, scales = case
    features = [
        make_tensor(2, c, crop[0] + rows, crop[1] + columns, dtype=dtype, layout="channels_last", seed=i)
        for i, (c, (rows, columns)) in enumerate(zip(channels, beyond, strict=True))
    ]
    # The pixels of the last one are apart, as the CUDA kernels leave them; what is between them is not read.
    last = features[-1]
    memory = torch.full((2, *last.shape[2:], channels[-1] + 3), float("nan"), dtype=dtype)
    features[-1] = memory[..., : channels[-1]].permute(0, 3, 1, 2).copy_(last)
    weights = [make_tensor(3, c, 3, 3, dtype=dtype, scale=(9 * c) ** -0.5, seed=9 + c) for c in channels]
    biases = make_tensor(len(scales), 3, seed=20)
    rest = (list(groups), list(scales), 0.5, list(crop))
    run = torch.ops.hflfnerv.output_stage
    with poisoned_empty():
        frames = run(features, weights, biases, *rest, False, [], "triton")
        levels = run(features, weights, biases, *rest, True, [], "triton")
    options = {"groups": groups, "scales": scales, "offset": 0.5, "crop": crop, "as_bytes": False}
    expected, same = (
        stage_reference.output_stage(
            [x.to(d) for x in features], [weight.to(d) for weight in weights], biases.to(d), **options
        )
        for d in (torch.float64, torch.float32)
    )
    # What is rounded: the terms of the sums, and tanh, whose error of 2e-7 is less than 4 units of roundoff.
    terms = sum(
        torch.nn.functional.conv2d(x.double().abs(), weight.double().abs(), padding=1).max()
        for x, weight in zip(features, weights, strict=True)
    )
    assert_close_to_reference(frames, expected, same, magnitude=terms + 4)
    assert torch.equal(levels, (frames.clamp(0, 1) * 255).round().byte())


def test_output_stage_rounds_halves_to_even():
    # With no weights the image is the offset: every level, every half between two, and what is to be clamped.
    values = [-1.0, 2.0, *(level / 510 for level in range(511))]
    x, weight = torch.zeros(1, 1, 1, 1), torch.zeros(3, 1, 3, 3)
    run = torch.ops.hflfnerv.output_stage
    for value in (values[0], values[1], *values[2::37]):
        levels = run([x], [weight], torch.zeros(1, 3), [0], [1.0], value, [1, 1], True, [], "triton")
        expected = (torch.tensor(value).clamp(0, 1) * 255).round().byte()
        assert levels.flatten().tolist() == [expected.item()] * 3


def test_output_stage_reads_nothing_outside_its_window():
    x, weight = torch.zeros(2, 5, 7, 9), make_tensor(3, 5, 3, 3)
    x[0, 0, 3, 4] = float("nan")
    call = ([x], [weight], torch.zeros(1, 3), [0], [0.5], 0.5, [7, 9], False)
    frames = torch.ops.hflfnerv.output_stage(*call, [], "triton")
    bad = frames.isnan().all(dim=3)
    assert bad[0, 2:5, 3:6].all()
    assert bad.sum() == frames.isnan().sum() / 3 == 9


def int8_operands(shape, approximate, *, quantized, halo=1):
    """A block, an image to read, its values, and what the block may write into."""
    batch, channels, out_channels, r, kernel, height, width = shape
    of = ops.Int8Range.of(torch.linspace(-0.2, 0, channels), torch.linspace(1, 5, channels))
    to = ops.Int8Range.of(torch.full((out_channels,), -0.2), torch.linspace(1, 9, out_channels)) if quantized else None
    weight = make_tensor(out_channels * r * r, channels, *kernel, scale=(channels * kernel[0] * kernel[1]) ** -0.5)
    bias = make_tensor(len(weight), seed=1)
    block = ops.Int8Block.of(weight, bias, r, of, to, approximate=approximate)
    # A border of its own on each axis, where kernels are not square.
    rows, columns = height + kernel[0] - 1, width + kernel[1] - 1
    x = ops.int8_image(batch, rows, columns, of, halo=0)
    values = torch.randint(-128, 128, (batch, channels, height, width), dtype=torch.int8)
    top, left = kernel[0] // 2, kernel[1] // 2
    x[:, :, top : top + height, left : left + width] = values
    if to is not None:
        return block, x, ops.int8_image(batch, height * r, width * r, to, halo=halo)
    out = torch.full((batch, out_channels, height * r, width * r), float("nan"), dtype=torch.float16)
    return block, x, out.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize(
    ("shape", "approximate"),
    [
        *((shape, "none") for shape in CONV_SHAPES),
        (CONV_SHAPES[0], "tanh"),
        ((1, 9, 33, 2, (3, 3), 3, 61), "none"),
        ((2, 16, 40, 4, (3, 3), 5, 29), "none"),
    ],
)
def test_int8_block(shape, approximate, quantized):
    from hflfnerv.triton_kernels import conv_pixel_shuffle_gelu_int8 as kernels
    from hflfnerv.triton_kernels._tiles import HOPPER

    block, x, expected = int8_operands(shape, approximate, quantized=quantized)
    ops.conv_pixel_shuffle_gelu_int8(x, block, expected, impl="reference")
    r, kernel = shape[3], shape[4]
    tiles = kernels.tiles(10**6, kernels.run_of(shape[2]) * r * r, HOPPER)
    # Stages and warps make no difference here; one shape goes through all else.
    for tile in {tile[:2]: tile for tile in tiles}.values() if shape[2] == 33 else tiles[:1]:
        out = int8_operands(shape, approximate, quantized=quantized)[2]
        kernels.conv_pixel_shuffle_gelu_int8_fwd(x, *block.packed(), out, kernel, r, approximate, tile=tile)
        if quantized:
            # Sums are exact; GELU's rounding moves what lies near the middle between two steps.
            difference = (out.int() - expected.int()).abs()
            assert difference.max() <= 1
            assert (difference == 0).double().mean() > 0.999
        else:
            # A step of float16, where the rounding of GELU decides about one.
            torch.testing.assert_close(out, expected, rtol=2**-10, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(2, 33, 5, 7), (1, 8, 1, 3), (3, 3, 19, 31)])
def test_int8_quantize(shape, dtype):
    batch, channels, height, width = shape
    of = ops.Int8Range.of(torch.linspace(-1, 0, channels), torch.linspace(1, 2, channels))
    x = make_tensor(*shape, dtype=dtype, layout="channels_last")
    actual, expected = (ops.int8_image(batch, height, width, of, halo=2) for _ in range(2))
    torch.ops.hflfnerv.quantize_int8(x, of.inverse_scale, of.zero_point, actual, "triton")
    ops.quantize_int8(x, of, expected, impl="reference")
    # A product and a sum, which may be rounded once or twice.
    difference = (actual.int() - expected.int()).abs()
    assert difference.max() <= 1
    assert (difference == 0).double().mean() > 0.999


def test_output_stage_keeps_the_packed_weights(monkeypatch):
    import importlib

    from hflfnerv.triton_kernels import output_stage as kernels

    module = importlib.import_module("hflfnerv.ops.output_stage")
    x, weight = make_tensor(1, 5, 7, 9, layout="channels_last"), torch.nn.Parameter(make_tensor(3, 5, 3, 3, seed=1))
    call = module.Call([x], [weight], torch.zeros(1, 3), [0], [0.5], 0.5, [7, 9], False)
    packed, pack = [], kernels.pack_head
    monkeypatch.setattr(kernels, "pack_head", lambda *args: packed.append(args) or pack(*args))
    with torch.no_grad(), ops.PackedWeights():
        frames = [module._run_triton(call) for _ in range(2)]
        assert len(packed) == 1
        weight.mul_(1)
        frames.append(module._run_triton(call))
        assert len(packed) == 2
    frames.append(module._run_triton(call))
    assert all(torch.equal(frame, frames[0]) for frame in frames)


# B, C, N, H, W: odd sizes, channels that fill no tile, more than one program, pixels apart in memory.
HEADS = [
    (2, 28, 3, 7, 9, 0),
    (3, 5, 3, 1, 1, 0),
    (2, 4, 3, 5, 1, 0),
    (1, 33, 2, 5, 3, 7),
    (1, 8, 1, 40, 60, 0),
    (1, 26, 3, 6, 4, 6),
]


@pytest.mark.parametrize("wanted", [[True, True, True], [True, False, False], [False, True, False]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_conv2d(shape, dtype, wanted):
    batch, channels, n, height, width, gap = shape
    memory = torch.full((batch, height, width, channels + gap), float("nan"), dtype=dtype)
    x = memory[..., :channels].permute(0, 3, 1, 2)
    x.copy_(make_tensor(batch, channels, height, width, dtype=dtype))
    weight = make_tensor(n, channels, 3, 3, dtype=dtype, scale=(9 * channels) ** -0.5, seed=1)
    bias = make_tensor(n, dtype=dtype, layout="strided", seed=2)
    dy = make_tensor(batch, n, height, width, dtype=dtype, seed=3)
    with poisoned_empty():
        y = torch.ops.hflfnerv.conv2d(x, weight, bias, "triton")
        gradients = torch.ops.hflfnerv.conv2d_backward(dy, x, weight, wanted, "triton")

    def run(to):
        leaves = [t.detach().to(to).requires_grad_() for t in (x, weight, bias)]
        y = F.conv2d(*leaves, padding=1)
        return y, torch.autograd.grad(y, leaves, dy.to(to))

    (expected, expected_gradients), (same, same_gradients) = run(torch.float64), run(dtype)
    assert_close_to_reference(y, expected, same)
    magnitudes = convolution_magnitudes(x.detach(), weight, dy, 1, (1, 1))
    for actual, true, rounded, size, want in zip(
        gradients, expected_gradients, same_gradients, magnitudes[1:], wanted, strict=True
    ):
        if want:
            assert_gradient_close_to_reference(actual, true, rounded, magnitude=size)
        else:
            assert actual.numel() == 0
    if wanted[0] and gap:
        assert gradients[0].stride() == x.stride()


def test_orthogonalise():
    """Wide and tall, of few rows and of many, of rank 1, of zeros, and not finite."""
    from hflfnerv.triton_kernels.orthogonalise import orthogonalise

    quintic = 3.4445, -4.7750, 2.0315
    generator = torch.Generator().manual_seed(1)
    shapes = [(16, 64), (57, 120), (120, 57), (128, 33), (1, 5), (9, 1)]
    matrices = [torch.randn(shape, generator=generator) for shape in shapes]
    matrices += [torch.ones(5, 7), torch.zeros(3, 5), 1e15 * torch.ones(2, 2)]
    *made, broken = orthogonalise([*matrices, torch.full((3, 3), float("nan"))], quintic, 5)
    assert broken.isnan().all()
    a, b, c = quintic
    for x, y in zip(matrices, made, strict=True):
        expected = x.double() / x.double().norm().clamp(min=1e-20)
        for _ in range(5):
            gram = expected @ expected.mT
            expected = a * expected + (b * gram + c * gram @ gram) @ expected
        # An error of eps in the Gram matrix grows by a^2 in each of the four later steps.
        assert (y - expected).norm() <= 2 * a**8 * torch.finfo(torch.float32).eps * expected.norm()


# B, C, (K_h, K_w), H, W, gradients that are wanted: odd sizes, channels that fill no block and more than one, images
# smaller than the kernel, more columns than a block has.
ALL = [True, True, True]
DEPTHWISE = [
    (2, 5, (7, 7), 5, 9, ALL),
    (1, 70, (3, 3), 5, 3, ALL),
    (3, 1, (5, 7), 1, 1, ALL),
    (1, 16, (1, 1), 3, 5, ALL),
    (1, 8, (3, 7), 11, 37, ALL),
    (2, 3, (7, 5), 4, 1, [True, True, False]),
    (2, 3, (7, 5), 4, 1, [True, False, True]),
    (2, 3, (7, 5), 4, 1, [False, True, True]),
    (2, 3, (7, 5), 4, 1, [True, False, False]),
    (2, 3, (7, 5), 4, 1, [False, True, False]),
    (2, 3, (7, 5), 4, 1, [False, False, True]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", DEPTHWISE, ids=str)
def test_depthwise_conv2d(case, dtype):
    batch, channels, kernel, height, width, wanted = case
    layout = "channels_last" if wanted[1] else "contiguous"
    x = make_tensor(batch, channels, height, width, dtype=dtype, layout=layout)
    weight = make_tensor(channels, 1, *kernel, dtype=dtype, scale=(kernel[0] * kernel[1]) ** -0.5, seed=1)
    bias = make_tensor(channels, dtype=dtype, layout="strided", seed=2) if wanted[2] else None
    dy = make_tensor(batch, channels, height, width, dtype=dtype, seed=3)
    # As auto hands it over, and as any other.
    taps = weight.float().permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1) if height % 2 else weight
    with poisoned_empty():
        y = torch.ops.hflfnerv.depthwise_conv2d(x, taps, bias, "triton")
        gradients = torch.ops.hflfnerv.depthwise_conv2d_backward(dy, x, taps, wanted, "triton")
    assert [gradient.dtype for gradient in gradients] == [dtype, taps.dtype if wanted[1] else dtype, dtype]

    def run(to, absolute=False):
        # Absolute terms make the sums that are rounded, whatever the order.
        tensors = [None if t is None else t.to(to) for t in (x, weight, bias, dy)]
        *leaves, slopes = [t.abs() if absolute and t is not None else t for t in tensors]
        leaves = [None if t is None else t.requires_grad_() for t in leaves]
        y = F.conv2d(*leaves, padding=(kernel[0] // 2, kernel[1] // 2), groups=channels)
        return y, torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], slopes)

    (expected, *all_expected), (same, *all_same), (size, *sizes) = (
        (y, *gradients) for y, gradients in (run(torch.float64), run(dtype), run(torch.float64, absolute=True))
    )
    assert y.stride() == torch.empty_like(x).stride()
    assert_close_to_reference(y, expected, same, magnitude=size)
    if wanted[0]:
        assert gradients[0].stride() == y.stride()
    for position, want in enumerate(wanted):
        if not want:
            assert gradients[position].numel() == 0
            continue
        true, rounded, terms = (of[position] for of in (all_expected, all_same, sizes))
        assert_gradient_close_to_reference(gradients[position].to(dtype), true, rounded, magnitude=terms)


def test_depthwise_conv2d_in_many_shares(monkeypatch):
    from hflfnerv.triton_kernels import depthwise_conv2d as kernels

    # Tiles that go on in the next strip and the next image, and a last share with fewer steps than the others.
    monkeypatch.setattr(kernels, "_SHARES", 4)
    x, dy = (make_tensor(2, 5, 20, 150, layout="channels_last", seed=seed) for seed in range(2))
    weight = make_tensor(5, 1, 3, 3, seed=2)
    with poisoned_empty():
        dweight, dbias = kernels.depthwise_conv2d_bwd(dy, x, weight, None, sums=True)

    def gradients(*tensors):
        return torch.ops.aten.convolution_backward(
            *tensors, [5], [1, 1], [1, 1], [1, 1], False, [0, 0], 5, [False, True, True]
        )[1:]

    three = (
        gradients(dy.double(), x.double(), weight.double()),
        gradients(dy, x, weight),
        gradients(dy.double().abs(), x.double().abs(), weight.double()),
    )
    for actual, true, rounded, size in zip((dweight, dbias), *three, strict=True):
        assert_gradient_close_to_reference(actual, true, rounded, magnitude=size)


@pytest.mark.parametrize("rows", [2, 4, 8])
def test_depthwise_conv2d_of_every_number_of_rows(rows, monkeypatch):
    from hflfnerv.triton_kernels import depthwise_conv2d as kernels

    x, weight = make_tensor(2, 5, 9, 11, layout="channels_last"), make_tensor(5, 1, 5, 3, seed=1)
    expected = kernels.depthwise_conv2d_fwd(x, weight, None)
    monkeypatch.setattr(kernels, "_ROWS", (rows,))
    # A pixel's products are summed in the same order.
    assert torch.equal(kernels.depthwise_conv2d_fwd(x, weight, None), expected)


def test_training_step(monkeypatch):
    """All kernels of a step hand their tensors on to each other as PyTorch's operations do."""
    from hflfnerv._impl import ImplementationTable
    from hflfnerv.models import HFLFNeRV, build_model, convnext
    from hflfnerv.models.streams import use_implementation

    torch.manual_seed(0)
    model = build_model(HFLFNeRV.plan(20_000, 3, 24, 32, preset="best"))
    model = model.to(memory_format=torch.channels_last)
    x = make_tensor(1, 3, 24, 32, layout="channels_last")
    frames = torch.randint(0, 256, (1, 24, 32, 3), dtype=torch.uint8)

    def gradients(network, to):
        network = copy.deepcopy(network).to(to)
        network.errors(x.to(to), torch.tensor([1]), frames).mean().backward()
        return {name: parameter.grad for name, parameter in network.named_parameters()}

    plain = copy.deepcopy(model)
    use_implementation(plain, "reference")
    expected, same = gradients(plain, torch.float64), gradients(plain, torch.float32)
    select, chosen = ImplementationTable.select, set()

    def by_triton(table, impl, *args, **kwargs):
        entry = next((entry for entry in table if entry.name == "triton"), None)
        chosen.add(table.op)
        return entry or select(table, impl, *args, **kwargs)

    monkeypatch.setattr(ImplementationTable, "select", by_triton)
    monkeypatch.setattr(convnext, "_biases_apart", lambda x: True)
    actual = gradients(model, torch.float32)
    blocks, encoder = {"conv_pixel_shuffle_gelu", "conv2d"}, {"depthwise_conv2d", "channel_norm", "scale_residual"}
    assert chosen >= blocks | encoder | {"stream_loss"}
    for name, true in expected.items():
        of_kernels, of_pytorch = ((each[name].double() - true).norm() / true.norm() for each in (actual, same))
        # Sums over the pixels in an order of their own.
        assert of_kernels <= 2 * of_pytorch + (24 * 32) ** 0.5 * torch.finfo(torch.float32).eps, name


def test_training_step_in_half_precision(monkeypatch):
    """The same in a whole step, with weights cast for it and autocast, as a GPU takes it."""
    from hflfnerv._impl import ImplementationTable
    from hflfnerv.models import HNeRV, build_model, convnext
    from hflfnerv.models.streams import use_implementation
    from hflfnerv.train import TrainConfig, Trainer, prepare_clip

    torch.manual_seed(0)
    model = build_model(HNeRV.plan(30_000, 3, 48, 64, preset="best"))
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            parameter.data.fill_(0.3)  # not so small that what is behind it has no gradient in float16
    smooth = F.interpolate(torch.rand(3, 3, 6, 8), (48, 64), mode="bilinear")
    clip = prepare_clip((smooth * 255).byte().permute(0, 2, 3, 1), "frame", crop=None, removed=0.8)
    config = TrainConfig(epochs=1, lr=0.02, batch_size=1, seed=0, optimizer="muon")
    plain = copy.deepcopy(model)
    use_implementation(plain, "reference")
    convnext.use_pytorch(plain)

    def gradients(network, precision):
        network = copy.deepcopy(network)
        trainer = Trainer(network, clip, dataclasses.replace(config, precision=precision), device=torch.device("cpu"))
        step = trainer.training_step
        # As in bfloat16, for which the interpreter is not right: no scaler, but gradients that float16 can hold.
        step.scaler = torch.amp.GradScaler("cpu", enabled=False)
        step._shares.mul_(2.0**14)
        step()
        return {name: parameter.grad for name, parameter in network.named_parameters()}

    exact, same = gradients(plain, "fp32"), gradients(plain, "fp16")
    select, chosen = ImplementationTable.select, set()

    def by_triton(table, impl, *args, **kwargs):
        entry = next((entry for entry in table if entry.name == "triton" and table.op != "orthogonalise"), None)
        if entry is not None:
            chosen.add(table.op)
        return entry or select(table, impl, *args, **kwargs)

    monkeypatch.setattr(ImplementationTable, "select", by_triton)
    monkeypatch.setattr(convnext, "_biases_apart", lambda x: True)
    monkeypatch.setattr(convnext.PatchConv, "forward", lambda self, x: self.product(x, self.bias))
    actual = gradients(model, "fp16")
    blocks, encoder = {"conv_pixel_shuffle_gelu", "conv2d"}, {"depthwise_conv2d", "channel_norm", "scale_residual"}
    assert chosen == blocks | encoder | {"pixel_shuffle_gelu", "stream_loss"}
    for name, true in exact.items():
        of_kernels, of_pytorch = ((each[name] - true).norm() / true.norm() for each in (actual, same))
        # Roundings of other places, of which no one is larger.
        assert of_kernels <= 4 * of_pytorch + torch.finfo(torch.float16).eps, name


# One row and many, channels that are a block, that fill none, and that take all of a program.
ROWS = [(1, 1), (700, 1), (2, 5, 7, 3), (9, 5), (1, 9, 3, 64), (2, 3, 70), (3, 1000)]
F32, F16 = torch.float32, torch.float16


@pytest.mark.parametrize("shape", ROWS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "of_weights", "out_dtype"),
    [
        (F32, F32, F32),
        (F16, F32, F16),
        (F16, F32, F32),
        (F32, F32, F16),
        (F16, F16, F16),
    ],
)
@pytest.mark.parametrize("with_shift", [False, True])
def test_channel_norm(shape, dtype, of_weights, out_dtype, with_shift):
    layout = "strided" if of_weights == F16 else "contiguous"
    x = make_tensor(*shape, dtype=dtype, layout=layout)
    gain, bias = (make_tensor(shape[-1], dtype=of_weights, layout=layout, seed=seed) for seed in (1, 2))
    dy = make_tensor(*shape, dtype=out_dtype, layout=layout, seed=3)
    shift = [make_tensor(shape[-1], dtype=dtype, layout=layout, seed=4)] if with_shift else []

    def run(to, impl):
        leaves = [t.detach().to(to or t.dtype).requires_grad_() for t in (x, gain, bias, *shift)]
        y = torch.ops.hflfnerv.channel_norm(*[*leaves, None][:4], 1e-6, to or out_dtype, impl)
        return y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))

    with poisoned_empty():
        results = run(None, "triton")
    expected, same = run(torch.float64, "reference"), run(None, "reference")
    sizes = layer_norm_magnitudes(x.double() + sum(shift), gain, bias, dy, 1e-6)
    sizes = [*sizes, sizes[1].flatten(0, -2).sum(dim=0)][: len(results)]
    for actual, true, rounded, size in zip(results, expected, same, sizes, strict=True):
        assert actual.is_contiguous()
        magnitude = rounded_in_the_end(true, size, actual.dtype)
        assert_gradient_close_to_reference(actual, true, rounded, magnitude=magnitude)


@pytest.mark.parametrize("shape", ROWS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "of_gamma", "of_y"),
    [(F32, F32, F32), (F32, F32, F16), (F16, F32, F16), (F16, F16, F16), (F16, F16, F32)],
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_scale_residual(shape, dtype, of_gamma, of_y, with_bias):
    layout = "strided" if of_gamma == F16 else "contiguous"
    x, y = make_tensor(*shape, dtype=dtype, layout=layout), make_tensor(*shape, dtype=of_y, layout=layout, seed=1)
    gamma = make_tensor(shape[-1], dtype=of_gamma, layout=layout, seed=2)
    dout = make_tensor(*shape, dtype=(x + gamma * y).dtype, layout=layout, seed=3)
    bias = [make_tensor(shape[-1], dtype=of_y, layout=layout, seed=4)] if with_bias else []

    def run(to, impl, change=lambda t: t):
        leaves = [change(t.detach().to(to or t.dtype)).requires_grad_() for t in (x, gamma, y, *bias)]
        out = torch.ops.hflfnerv.scale_residual(*[*leaves, None][:4], impl)
        return out, *torch.autograd.grad(out, leaves, change(dout.to(to or dout.dtype)))

    with poisoned_empty():
        results = run(None, "triton")
    expected, same = run(torch.float64, "reference"), run(None, "reference")
    for actual, true, rounded, size in zip(
        results, expected, same, run(torch.float64, "reference", torch.abs), strict=True
    ):
        magnitude = rounded_in_the_end(true, size, actual.dtype)
        assert_gradient_close_to_reference(actual, true, rounded, magnitude=magnitude)


def test_channel_norm_and_scale_residual_in_many_shares(monkeypatch):
    from hflfnerv.triton_kernels import _rows

    # Shares of several tiles, the last with fewer than the others and a tile that is not full.
    monkeypatch.setattr(_rows, "_SHARES", 3)
    x, dy = (make_tensor(300, 64, seed=seed) for seed in range(2))
    gain = make_tensor(64, seed=2)

    def gradients(impl, to=F32, change=lambda t: t):
        of, slopes, factors = (change(t.to(to)) for t in (x, dy, gain))
        yield from torch.ops.hflfnerv.channel_norm_backward(slopes, of, factors, factors, 1e-6, [True] * 3, impl)
        yield from torch.ops.hflfnerv.scale_residual_backward(slopes, factors, of, factors, to, [True] * 4, impl)

    with poisoned_empty():
        results = list(gradients("triton"))
    _, dx, *sums = layer_norm_magnitudes(x + gain, gain, gain, dy, 1e-6)
    _, _, _, *sizes = gradients("reference", torch.float64, torch.abs)
    for actual, true, rounded, size in zip(
        results,
        gradients("reference", torch.float64),
        gradients("reference"),
        [dx, torch.stack(sums), dx.sum(dim=0), *sizes],
        strict=True,
    ):
        assert_gradient_close_to_reference(actual, true, rounded, magnitude=size)


@pytest.mark.parametrize("wanted", [list(w) for w in itertools.product([True, False], repeat=3) if any(w)])
def test_channel_norm_makes_what_is_wanted(wanted):
    x, dy = (make_tensor(3, 11, 5, seed=seed) for seed in range(2))
    make = torch.ops.hflfnerv.channel_norm_backward
    gain, shift = make_tensor(5, seed=2), make_tensor(5, dtype=F16, seed=3)
    check_wanted(lambda wanted: make(dy, x, gain, shift, 1e-6, wanted, "triton"), wanted)


@pytest.mark.parametrize("wanted", [list(w) for w in itertools.product([True, False], repeat=4) if any(w)])
def test_scale_residual_makes_what_is_wanted(wanted):
    y, dout = (make_tensor(3, 11, 5, seed=seed) for seed in range(2))
    make = torch.ops.hflfnerv.scale_residual_backward
    gamma, bias = make_tensor(5, seed=2), make_tensor(5, dtype=F16, seed=3)
    check_wanted(lambda wanted: make(dout, gamma, y, bias, F16, wanted, "triton"), wanted)


def check_wanted(gradients, wanted):
    with poisoned_empty():
        some, all_of_them = gradients(wanted), gradients([True] * len(wanted))
    for actual, expected, want in zip(some, all_of_them, wanted, strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected) if want else actual.numel() == 0


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("rows", [1, 5, 300])
def test_sum_shares(rows, dtype):
    from hflfnerv.triton_kernels._sums import sum_shares

    # Parts of what there is, in another order and in strides of their own; columns of one program and of several.
    partial = make_tensor(rows, 3, 5, 4, 7)
    of, more = partial[:, :, 1:, :, :6].unflatten(4, (2, 3)), partial[:, 1, 0, 2, 1:7]
    for order in ((0, 1, 2, 3, 4), (4, 2, 0, 1, 3)):
        memory = torch.empty([of.shape[1:][axis] for axis in order], dtype=dtype)
        out, more_out = memory.permute(*(order.index(axis) for axis in range(5))), torch.empty(6, dtype=dtype)
        with poisoned_empty():
            sum_shares(of, out, more, more_out)
        for actual, source in ((out, of), (more_out, more)):
            expected, size = source.double().sum(0), source.double().abs().sum(0)
            error = rows * torch.finfo(F32).eps / 2 * size + torch.finfo(dtype).eps / 2 * expected.abs()
            assert bool(((actual - expected).abs() <= error).all())


def test_sum_shares_of_scalars_and_of_neighbours():
    from hflfnerv.triton_kernels._sums import sum_shares

    partial = make_tensor(40, 16, 64)
    out = sum_shares(partial, torch.full((16, 64), float("nan")))
    torch.testing.assert_close(out, partial.sum(0), rtol=0, atol=1e-5)
    alone = sum_shares(partial[:, :1, 0], torch.full((1,), float("nan")))
    torch.testing.assert_close(alone, partial[:, :1, 0].sum(0), rtol=0, atol=1e-5)
    wide = make_tensor(2, 9000)
    torch.testing.assert_close(sum_shares(wide, torch.empty(9000)), wide.sum(0), rtol=0, atol=1e-6)
