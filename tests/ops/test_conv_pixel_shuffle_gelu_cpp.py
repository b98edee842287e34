"""conv_pixel_shuffle_gelu: the AMX kernels, which compute in bfloat16, gradients included."""

from __future__ import annotations

import pytest
import torch
from rounding import assert_within, results

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
    # So it is with a gradient.
    dy = make_tensor(1, 7, 24, 32, dtype=torch.bfloat16, seed=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        block(x).backward(dy)
    for leaf in tensors:
        leaf.requires_grad_()
    ops.conv_pixel_shuffle_gelu(*tensors, 2, padding=2, impl="cpp").backward(dy)
    for parameter, leaf in zip((block.conv.weight, block.conv.bias), tensors[1:], strict=True):
        assert torch.equal(parameter.grad, leaf.grad.float())


@needs_amx
def test_auto_with_a_gradient():
    x, weight, bias = (t.requires_grad_() for t in operands(SHAPES[0]))
    y, named = (ops.conv_pixel_shuffle_gelu(x, weight, bias, 2, padding=2, impl=i) for i in ("auto", "cpp"))
    assert y.grad_fn.name() == named.grad_fn.name()
    assert torch.equal(y, named)
    # Where the image changes its size, "auto" is another implementation.
    x = make_tensor(1, 33, 40, 50, dtype=torch.bfloat16, layout="channels_last")
    y, named = (ops.conv_pixel_shuffle_gelu(x, weight, bias, 2, padding=1, impl=i) for i in ("auto", "conv2d+cpp"))
    assert y.grad_fn.name() == named.grad_fn.name()
    assert torch.equal(y, named)


def test_inference_has_no_gradient():
    x, weight, bias = (t.requires_grad_() for t in operands(SHAPES[0]))
    if ENTRY.unavailable() is None:
        with pytest.raises(RuntimeError, match=r"has no gradient; use impl='conv2d\+cpp'"):
            OP(x, weight, bias, 2, [2, 2], "none").sum().backward()


@pytest.mark.parametrize(
    ("kernel", "padding"), [((5, 5), (1, 1)), ((3, 3), (1, 0)), ((3, 1), (0, 0)), ((2, 3), (1, 1)), ((3, 4), (1, 2))]
)
def test_rejects_gradients_of_what_changes_its_size(kernel, padding):
    x, weight, bias = operands((1, 5, 4, 2, 9, 12, kernel, padding))
    reason = f"a gradient is wanted, and kernel {kernel} with padding {padding} changes the size of the image"
    for position in range(3):
        leaves = [t.clone().requires_grad_(i == position) for i, t in enumerate((x, weight, bias))]
        assert ENTRY.rejects(Call(*leaves, 2, padding, "none")).startswith(reason)
        with torch.no_grad():
            assert ENTRY.rejects(Call(*leaves, 2, padding, "none")) is None
    assert ENTRY.rejects(Call(x, weight, bias, 2, padding, "none")) is None


# B, C_in, C_out, r, H, W, kernel: the blocks of the networks, channels that fill no vector and few, every r, bands of
# rows and of columns in all three kernels, one pixel, one row and one column.
GRADIENTS = [
    (1, 33, 28, 2, 9, 33, (5, 5)),
    (2, 57, 12, 4, 10, 21, (3, 3)),
    (1, 40, 33, 2, 7, 19, (5, 5)),
    (1, 3, 5, 2, 5, 7, (1, 1)),
    (2, 24, 3, 3, 13, 11, (3, 3)),
    (1, 1, 1, 5, 6, 9, (5, 3)),
    (3, 130, 2, 4, 5, 9, (3, 1)),
    (1, 16, 7, 1, 11, 8, (7, 7)),
    (2, 31, 4, 1, 41, 17, (5, 3)),
    (3, 2, 1, 1, 1, 1, (3, 3)),
    (1, 48, 10, 4, 1, 35, (3, 3)),
    (1, 40, 32, 1, 37, 1, (5, 5)),
    (1, 130, 9, 1, 20, 301, (5, 5)),
    (1, 24, 24, 2, 23, 1037, (3, 3)),
    (3, 8, 2, 2, 120, 531, (3, 3)),
]


def operands_and_slopes(shape, with_bias=True):
    batch, _, channels, r, height, width, (rows, columns) = shape
    tensors = operands((*shape, (rows // 2, columns // 2)), with_bias)
    dy = make_tensor(batch, channels, height * r, width * r, dtype=torch.bfloat16, seed=3)
    return tensors, channels_last(dy)


def run_backward(tensors, dy, shape, impl="cpp", approximate="none"):
    leaves = [t.detach().requires_grad_() for t in tensors if t is not None]
    x, weight, bias = [*leaves, None][:3]
    padding = (shape[6][0] // 2, shape[6][1] // 2)
    if x.shape[1] == 1:  # one channel, and nothing tells the layouts apart
        op = torch.ops.hflfnerv.conv_pixel_shuffle_gelu
        y, _ = op(x, weight, bias, None, shape[3], approximate, True, impl, impl, impl)
        return y, torch.autograd.grad(y, leaves, dy)
    y = ops.conv_pixel_shuffle_gelu(x, weight, bias, shape[3], padding=padding, impl=impl, approximate=approximate)
    return y, torch.autograd.grad(y, leaves, dy)


@needs_amx
@pytest.mark.parametrize("shape", GRADIENTS, ids=str)
def test_gradients(shape):
    padding = [size // 2 for size in shape[6]]
    for approximate, with_bias in (("none", True), ("tanh", False)):
        tensors, dy = operands_and_slopes(shape, with_bias)
        with poisoned_empty():
            y, gradients = run_backward(tensors, dy, shape, approximate=approximate)
        expected = results(*tensors, dy, shape[3], padding, approximate)
        for actual, result in zip((y, *gradients), expected, strict=False):
            assert_within(actual, result)
        assert y.is_contiguous(memory_format=torch.channels_last)
        for gradient, tensor in zip(gradients, tensors, strict=False):
            assert gradient.is_contiguous(memory_format=torch.channels_last) or tensor.dim() == 1


@pytest.mark.parametrize("shape", GRADIENTS, ids=str)
def test_the_bounds_see_one_per_cent(shape):
    tensors, dy = operands_and_slopes(shape)
    for result in results(*tensors, dy, shape[3], [size // 2 for size in shape[6]], "none"):
        assert_within(result.exact.bfloat16(), result)
        if result.numbers < 256:
            wrong = result.exact + 1.01 * result.most + 2**-8 * result.exact.abs()
            with pytest.raises(AssertionError, match="error"):
                assert_within(wrong.bfloat16(), result)
            continue
        noise = make_tensor(*result.exact.shape, seed=4) * result.exact.square().mean().sqrt()
        for wrong in (1.01 * result.exact, result.exact + 0.01 * noise):
            with pytest.raises(AssertionError, match="error"):
                assert_within(wrong.bfloat16(), result)


@needs_amx
@pytest.mark.parametrize("change", ["x", "weight", "dy", "z"])
def test_gradients_see_a_wrong_tap(change):
    """One channel of x a pixel off, one weight and one channel of dy changed, GELU without its bias."""
    shape = GRADIENTS[0]
    tensors, dy = operands_and_slopes(shape)
    expected = results(*tensors, dy, 2, [2, 2], "none")
    x, weight, bias = (t.clone() for t in tensors)
    wrong = []
    if change == "x":
        x[:, 32] = x[:, 32].roll(1, -1)
        wrong = [0, 2]
    elif change == "weight":
        weight[5, 32, 4, 4] += 0.25
        wrong = [0, 1]
    elif change == "dy":
        dy[:, 27, ::2, 1::2] *= 1.25
        wrong = [1, 2, 3]
    else:
        bias[3] += 0.25
        wrong = [0, 1, 2, 3]
    y, gradients = run_backward((x, weight, bias), dy, shape)
    for i, (actual, result) in enumerate(zip((y, *gradients), expected, strict=True)):
        if i in wrong:
            with pytest.raises(AssertionError, match="error"):
                assert_within(actual, result)


@needs_amx
@pytest.mark.parametrize(
    "shape", [(3, 33, 28, 2, 21, 37, (5, 5)), (2, 40, 12, 4, 9, 67, (3, 3)), GRADIENTS[-2]], ids=str
)
def test_gradients_are_the_same_on_any_number_of_threads(shape):
    tensors, dy = operands_and_slopes(shape)
    made = []
    for number in (1, 2, 5):
        with threads(number), poisoned_empty():
            y, gradients = run_backward(tensors, dy, shape)
            made.append((y, *gradients))
    for others in made[1:]:
        assert all(torch.equal(a, b) for a, b in zip(made[0], others, strict=True))
    for image in range(shape[0]):
        one, (dx, *_) = run_backward((tensors[0][image : image + 1], *tensors[1:]), dy[image : image + 1], shape)
        assert torch.equal(one[0], made[0][0][image])
        assert torch.equal(dx[0], made[0][1][image])


@needs_amx
def test_with_a_gradient_y_is_what_it_is_without():
    for shape in (GRADIENTS[0], GRADIENTS[1], GRADIENTS[4]):
        tensors, dy = operands_and_slopes(shape)
        padding = (shape[6][0] // 2, shape[6][1] // 2)
        y = ops.conv_pixel_shuffle_gelu(*tensors, shape[3], padding=padding, impl="cpp")
        assert torch.equal(run_backward(tensors, dy, shape)[0], y)


@needs_amx
@pytest.mark.parametrize("shape", [GRADIENTS[0], GRADIENTS[1]], ids=str)
def test_only_the_gradients_that_are_wanted(shape):
    tensors, dy = operands_and_slopes(shape)
    _, expected = run_backward(tensors, dy, shape)
    padding = (shape[6][0] // 2, shape[6][1] // 2)
    for position in range(3):
        leaves = [t.clone().requires_grad_(i == position) for i, t in enumerate(tensors)]
        with poisoned_empty():
            y = ops.conv_pixel_shuffle_gelu(*leaves, shape[3], padding=padding, impl="cpp")
            (gradient,) = torch.autograd.grad(y, leaves[position], dy)
        assert torch.equal(gradient, expected[position])


@needs_amx
def test_gradients_in_other_layouts():
    shape = GRADIENTS[0]
    (x, weight, bias), dy = operands_and_slopes(shape)
    y, gradients = run_backward((x, weight, bias), dy, shape)
    wide = torch.full((1, 33, 9, 66), float("nan"), dtype=torch.bfloat16)
    wide[..., ::2] = x
    transposed = weight.transpose(2, 3).contiguous().transpose(2, 3)
    others = (
        (x.contiguous(), weight, bias),
        (x, weight.contiguous(), bias),
        (wide[..., ::2], weight, bias),
        (x, transposed, bias),
        (x, weight, bias.repeat_interleave(2)[::2]),
    )
    for tensors in others:
        for slopes in (dy, dy.contiguous(), dy.repeat_interleave(2, -1)[..., ::2]):
            again, made = run_backward(tensors, slopes, shape)
            assert torch.equal(again, y)
            assert all(torch.equal(a, b) for a, b in zip(made, gradients, strict=True))
            # The gradient of x has its layout.
            layout = torch.channels_last if tensors[0] is x else torch.contiguous_format
            assert made[0].is_contiguous(memory_format=layout)
    # dy of one value, such as that of a sum, has no layout at all.
    again, made = (run_backward((x, weight, bias), t, shape)[1] for t in (dy.new_ones(()).expand(dy.shape), dy * 0 + 1))
    assert all(torch.equal(a, b) for a, b in zip(again, made, strict=True))


@needs_amx
def test_a_nan_reaches_the_gradients_of_its_channel_and_pixels_alone():
    shape = (1, 33, 12, 2, 12, 40, (5, 5))
    (x, weight, bias), dy = operands_and_slopes(shape)
    for channel in (3, 32):
        changed = x.clone()
        changed[0, channel, 5, 20] = float("nan")
        seen = run(changed, weight, bias, (*shape, (2, 2))).isnan()
        y, (_, dweight, dbias) = run_backward((changed, weight, bias), dy.masked_fill(seen, 0), shape)
        assert torch.equal(y.isnan(), seen)
        # GELU' of NaN is NaN, and so is that times 0: every weight and bias sees one of these pixels, by way of dz.
        assert dweight.isnan().all()
        assert dbias.isnan().all()
        # With z as it was before, dz is not NaN.
        op = torch.ops.hflfnerv.conv_pixel_shuffle_gelu_backward
        _, z = torch.ops.hflfnerv.conv_pixel_shuffle_gelu(x, weight, bias, None, 2, "none", True, "cpp", "cpp", "cpp")
        same, better, _ = op(dy, x, weight, z, 2, "none", [True] * 3, "cpp", "cpp", "cpp")
        dx, dweight, dbias = op(dy, changed, weight, z, 2, "none", [True] * 3, "cpp", "cpp", "cpp")
        assert torch.equal(dx, same)
        assert dbias.isfinite().all()
        assert dweight[:, channel].isnan().any()
        others = [c for c in range(33) if c != channel]
        assert torch.equal(dweight[:, others], better[:, others])
    # One of dy reaches the pixels of dx under its kernel, and the weights of its output channel.
    (x, weight, bias), dy = operands_and_slopes(shape)
    expected = run_backward((x, weight, bias), dy, shape)[1]
    dy[0, 7, 11, 41] = float("nan")  # of pixel (5, 20), i = j = 1
    dx, dweight, dbias = run_backward((x, weight, bias), dy, shape)[1]
    assert dx[:, :, 3:8, 18:23].isnan().all()
    assert dx.isnan().sum() == 33 * 25
    others = [n for n in range(48) if n != 7 * 4 + 3]
    assert dweight[7 * 4 + 3].isnan().all()
    assert torch.equal(dweight[others], expected[1][others])
    assert torch.equal(dbias.isnan().nonzero().flatten(), torch.tensor([7 * 4 + 3]))


@needs_amx
@pytest.mark.parametrize("shape", [GRADIENTS[0], GRADIENTS[3], GRADIENTS[4], GRADIENTS[9]], ids=str)
def test_opcheck_of_gradients(shape):
    op = torch.ops.hflfnerv.conv_pixel_shuffle_gelu.default
    for with_bias, layout in ((True, torch.channels_last), (False, torch.contiguous_format)):
        tensors, _ = operands_and_slopes(shape, with_bias)
        x, weight, bias = (
            None if t is None else (t.contiguous(memory_format=layout) if t.dim() == 4 else t).requires_grad_()
            for t in tensors
        )
        torch.library.opcheck(op, (x, weight, bias, None, shape[3], "none", True, "cpp", "cpp", "cpp"))


@needs_amx
@pytest.mark.parametrize("axes", [(0, 0), (2, 3), (0, 1)])
def test_gradients_lie_as_torch_compile_is_told(axes):
    shape = GRADIENTS[0]
    (x, weight, bias), dy = operands_and_slopes(shape)
    weight = weight.transpose(*axes).contiguous().transpose(*axes)  # as dense as any, and neither of the two formats
    tensors = (x, weight, bias, None, 2, "none", True, "cpp", "cpp", "cpp")
    _, z = torch.ops.hflfnerv.conv_pixel_shuffle_gelu(*tensors)
    arguments = (dy, x, weight, z, 2, "none", [True] * 3, "cpp", "cpp", "cpp")
    torch.library.opcheck(torch.ops.hflfnerv.conv_pixel_shuffle_gelu_backward.default, arguments)


@needs_amx
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_compile_with_gradients(dynamic, layout):
    shape = GRADIENTS[0]
    (x, weight, bias), dy = operands_and_slopes(shape)
    tensors = [x.contiguous(memory_format=layout).requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]

    def function(x, weight, bias):
        return ops.conv_pixel_shuffle_gelu(x, weight, bias, 2, padding=2, impl="cpp") * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    y, expected = compiled(*tensors), function(*tensors)
    assert torch.equal(y, expected)
    gradients = [torch.autograd.grad(t, tensors, dy) for t in (y, expected)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@needs_amx
def test_a_gradient_needs_z_and_has_no_derivative():
    (x, weight, bias), dy = operands_and_slopes(GRADIENTS[0])
    leaf = x.requires_grad_()
    y = torch.ops.hflfnerv.conv_pixel_shuffle_gelu(leaf, weight, bias, None, 2, "none", False, "cpp", "cpp", "cpp")[0]
    with pytest.raises(RuntimeError, match="keep_z must be True where a gradient is wanted"):
        y.backward(dy)
    y = ops.conv_pixel_shuffle_gelu(leaf, weight, bias, 2, padding=2, impl="cpp")
    (dx,) = torch.autograd.grad(y, leaf, dy.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative in its kernels"):
        dx.sum().backward()


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
