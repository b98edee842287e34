"""conv_pixel_shuffle_gelu: the AMX kernel, which computes in bfloat16 and for inference alone."""

from __future__ import annotations

import pytest
import torch

from hflfnerv import ops
from hflfnerv.errors import BackendUnavailable
from hflfnerv.nn import UpsampleBlock
from hflfnerv.ops import CONV_PIXEL_SHUFFLE_GELU
from hflfnerv.ops.conv_pixel_shuffle_gelu import Call
from hflfnerv.reference import conv_pixel_shuffle_gelu as reference
from hflfnerv.testing import assert_close_to_reference, make_tensor, poisoned_empty, threads

ENTRY = next(entry for entry in CONV_PIXEL_SHUFFLE_GELU if entry.name == "cpp")
needs_amx = pytest.mark.skipif(ENTRY.unavailable() is not None, reason=f"cpp: {ENTRY.unavailable()}")
OP = torch.ops.hflfnerv.conv_pixel_shuffle_gelu_inference
# B, C_in, C_out, r, H, W, kernel, padding: input channels in groups of 32 and gathered, one band of rows and several,
# tiles of pixels and of channels that are not full, shuffled rows narrower than a tile.
SHAPES = [
    (1, 33, 28, 2, 9, 33, (5, 5), 2),
    (1, 40, 33, 2, 16, 32, (5, 5), 2),
    (2, 48, 10, 4, 20, 24, (5, 5), 2),
    (1, 57, 12, 4, 10, 20, (3, 3), 1),
    (1, 64, 9, 2, 7, 50, (3, 3), 1),
    (2, 3, 5, 2, 5, 7, (1, 1), 0),
    (2, 5, 3, 3, 4, 5, (3, 3), 1),
    (1, 7, 1, 4, 3, 6, (5, 5), 2),
    (1, 2, 4, 1, 5, 4, (3, 1), (1, 0)),
    (1, 31, 3, 2, 40, 17, (5, 3), (0, 4)),
    (3, 32, 16, 1, 1, 1, (1, 1), 0),
    (1, 24, 5, 2, 64, 80, (3, 3), 0),
    (1, 8, 2, 2, 120, 700, (3, 3), 1),
]


def operands(shape, with_bias=True):
    batch, in_channels, channels, r, height, width, kernel, _ = shape
    scale = (in_channels * kernel[0] * kernel[1]) ** -0.5
    x = make_tensor(batch, in_channels, height, width, dtype=torch.bfloat16)
    weight = make_tensor(channels * r * r, in_channels, *kernel, dtype=torch.bfloat16, scale=scale, seed=1)
    bias = make_tensor(channels * r * r, dtype=torch.bfloat16, seed=2) if with_bias else None
    return channels_last(x), channels_last(weight), bias


def channels_last(t):
    """The same with the strides of channels-last, also where an axis of size 1 leaves a choice."""
    _, c, h, w = t.shape
    strides = (c * h * w, 1, w * c, c)
    return torch.empty_strided(t.shape, strides, dtype=t.dtype).copy_(t)


def run(x, weight, bias, shape, **options):
    return ops.conv_pixel_shuffle_gelu(x, weight, bias, shape[3], padding=shape[7], impl="cpp", **options)


def expect(x, weight, bias, shape, dtype, approximate="none"):
    x, weight, bias = (None if t is None else t.to(dtype) for t in (x, weight, bias))
    return reference.conv_pixel_shuffle_gelu(x, weight, bias, shape[3], padding=shape[7], approximate=approximate)


@needs_amx
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(shape):
    for approximate, with_bias in (("none", True), ("tanh", False)):
        tensors = operands(shape, with_bias)
        if all(t.is_contiguous() for t in tensors[:2]):  # one pixel, and nothing tells the layouts apart
            y = OP(*tensors, shape[3], [0, 0], approximate)
        else:
            with poisoned_empty():
                y = run(*tensors, shape, approximate=approximate)
        expected = expect(*tensors, shape, torch.float64, approximate)
        assert_close_to_reference(y, expected, expect(*tensors, shape, torch.bfloat16, approximate))
        assert y.is_contiguous(memory_format=torch.channels_last)


@needs_amx
def test_forward_sees_a_wrong_tap():
    tensors = operands(SHAPES[0])
    expected, same = (expect(*tensors, SHAPES[0], dtype) for dtype in (torch.float64, torch.bfloat16))
    tensors[1][5, 32, 4, 4] += 0.25
    with pytest.raises(AssertionError, match="error"):
        assert_close_to_reference(run(*tensors, SHAPES[0]), expected, same)


@needs_amx
def test_noncontiguous():
    shape = SHAPES[0]
    x, weight, bias = operands(shape)
    y = run(x, weight, bias, shape)
    assert torch.equal(run(x.contiguous(), weight, bias, shape), y)
    assert torch.equal(run(x, weight.contiguous(), bias, shape), y)
    wide = torch.full((1, 33, 9, 66), float("nan"), dtype=torch.bfloat16)
    wide[..., ::2] = x
    assert torch.equal(run(wide[..., ::2], weight, bias.repeat_interleave(2)[::2], shape), y)


@needs_amx
def test_deterministic_whatever_the_threads_and_the_batch():
    shape = (3, 33, 7, 2, 21, 37, (5, 5), 2)
    tensors = operands(shape)
    results = []
    for number in (1, 2, 5):
        with threads(number):
            results.append(run(*tensors, shape))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    for image in range(3):
        assert torch.equal(run(tensors[0][image : image + 1], *tensors[1:], shape)[0], results[0][image])


@needs_amx
def test_only_what_sees_a_nan_becomes_one():
    shape = (1, 33, 4, 2, 12, 40, (5, 5), 2)
    x, weight, bias = operands(shape)
    for channel in (3, 32):
        changed = x.clone()
        changed[0, channel, 5, 20] = float("nan")
        bad = run(changed, weight, bias, shape).isnan()
        assert bad[:, :, 6:16, 36:46].all()
        assert bad.sum() == 4 * 10 * 10


@needs_amx
def test_opcheck():
    tensors = operands(SHAPES[0])
    torch.library.opcheck(OP.default, (*tensors, 2, [2, 2], "none"))
    torch.library.opcheck(OP.default, (*tensors[:2], None, 2, [0, 1], "tanh"))


@needs_amx
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    tensors = operands(SHAPES[0])

    def function(x, weight, bias):
        return run(x, weight, bias, SHAPES[0]) * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert torch.equal(compiled(*tensors), function(*tensors))


@needs_amx
def test_autocast_and_auto():
    block = UpsampleBlock(33, 7, 2, 5).to(memory_format=torch.channels_last)
    x = make_tensor(1, 33, 12, 16)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        y = block(x)
    tensors = [t.detach().bfloat16() for t in (x, block.conv.weight, block.conv.bias)]
    assert torch.equal(y, ops.conv_pixel_shuffle_gelu(*tensors, 2, padding=2, impl="cpp"))
    assert y.is_contiguous(memory_format=torch.channels_last)
    # With a gradient "auto" is another implementation, which has one.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        block(x).sum().backward()
    assert block.conv.weight.grad.abs().sum() > 0


def test_there_is_no_gradient_in_it():
    x, weight, bias = (t.requires_grad_() for t in operands(SHAPES[0]))
    assert "a gradient is wanted" in ENTRY.rejects(Call(x, weight, bias, 2, (2, 2), "none"))
    with torch.no_grad():
        assert ENTRY.rejects(Call(x, weight, bias, 2, (2, 2), "none")) is None
    if ENTRY.unavailable() is None:
        with pytest.raises(RuntimeError, match=r"has no gradient; use impl='conv2d\+cpp'"):
            OP(x, weight, bias, 2, [2, 2], "none").sum().backward()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x, w: (x.float(), w.float()), "dtype torch.float32 is not torch.bfloat16"),
        (lambda x, w: (x.contiguous(), w.contiguous()), "neither x nor weight is channels-last"),
        (lambda x, w: (x.to("meta"), w.to("meta")), "the tensors are on meta"),
        (lambda x, w: (x[:0], w), "is empty"),
    ],
)
def test_rejects(change, reason):
    x, weight, _ = operands(SHAPES[0])
    assert reason in ENTRY.rejects(Call(*change(x, weight), None, 2, (2, 2), "none"))


def test_says_what_the_machine_lacks(monkeypatch):
    monkeypatch.setattr("hflfnerv.ops._cpp._amx", lambda: "needs AMX (bf16): this CPU has none")
    with pytest.raises(BackendUnavailable, match=r"impl='cpp' cannot run: needs AMX \(bf16\): this CPU has none"):
        run(*operands(SHAPES[0]), SHAPES[0])
    x, weight, bias = operands(SHAPES[0])
    y = ops.conv_pixel_shuffle_gelu(x, weight, bias, 2, padding=2)
    assert_close_to_reference(
        y, expect(x, weight, bias, SHAPES[0], torch.float64), expect(x, weight, bias, SHAPES[0], torch.bfloat16)
    )
