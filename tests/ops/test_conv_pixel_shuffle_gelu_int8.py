"""The upsampling block in int8: its definition, the kernel in the interpreter, ahead of time and on a device."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from ahead_of_time import MATRIX, limits, matrix_int8

from hflfnerv import ops
from hflfnerv.errors import BackendUnavailable
from hflfnerv.reference.conv_pixel_shuffle_gelu_int8 import conv_pixel_shuffle_gelu_int8
from hflfnerv.testing import make_tensor, requires

# C_in, C_out, r, kernel, H, W
BLOCKS = {
    "112 columns": (33, 28, 2, 5, 320, 640),
    "144 columns": (40, 33, 2, 5, 160, 320),
    "640 columns": (48, 40, 4, 5, 40, 80),
}


def ranges(channels, seed=0):
    low, high = torch.rand(2, channels, generator=torch.Generator().manual_seed(seed))
    return ops.Int8Range.of(-low, 1 + 4 * high)


def test_a_range_holds_its_ends_and_zero():
    low, high = torch.tensor([-1.0, -0.17, 0.0, 2.0, -3.0, 0.0]), torch.tensor([1.0, 5.0, 2.0, 4.0, -1.0, 0.0])
    of = ops.Int8Range.of(low, high)
    assert of.zero_point.dtype == torch.int8
    for value in (low.clamp(max=0), torch.zeros(6), high.clamp(min=0)):
        image = ops.int8_image(1, 1, 1, of, halo=0)
        ops.quantize_int8(value.view(1, 6, 1, 1), of, image, impl="reference")
        back = (image.flatten() - of.zero_point.float()) * of.scale
        # Half a step of the values, and half a step by which the zero point was rounded.
        assert ((back - value).abs() <= of.scale * 1.001).all()
        if not value.any():
            assert torch.equal(back, value)


def test_an_image_is_zero_and_keeps_its_border():
    of = ranges(5)
    image = ops.int8_image(2, 3, 4, of, halo=2)
    assert image.shape == (2, 5, 7, 8)
    assert image.stride() == (7 * 8 * 8, 1, 8 * 8, 8)
    assert torch.equal(image, of.zero_point[:, None, None].expand(image.shape))
    ops.quantize_int8(torch.full((2, 5, 3, 4), 100.0), of, image, impl="reference")
    assert (image[:, :, 2:5, 2:6] == 127).all()
    border = torch.ones(7, 8, dtype=torch.bool)
    border[2:5, 2:6] = False
    assert torch.equal(image[..., border], of.zero_point[:, None].expand(2, 5, int(border.sum())))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize(("channels", "out_channels", "r", "kernel"), [(9, 3, 2, 5), (4, 7, 3, 3), (5, 2, 1, 1)])
def test_is_the_block_of_the_quantised_values(channels, out_channels, r, kernel, approximate):
    """Against the block in float64, of what the integers stand for."""
    of, to = ranges(channels), ranges(out_channels, seed=1)
    weight = make_tensor(out_channels * r * r, channels, kernel, kernel, scale=(channels * kernel**2) ** -0.5)
    bias = make_tensor(len(weight), seed=1)
    x = make_tensor(2, channels, 6, 7, seed=2)
    image = ops.quantize_int8(x, of, ops.int8_image(2, 6, 7, of, halo=kernel // 2), impl="reference")

    def stands_for(image, of):
        return (image.double() - of.zero_point[:, None, None]) * of.scale[:, None, None]

    block = ops.Int8Block.of(weight, bias, r, of, approximate=approximate)
    assert block.weight.abs().max() <= 127
    quantized_weight = block.weight.double() * block.scale.double()[:, None, None, None] / of.scale[:, None, None]
    step = block.scale.double()[:, None, None, None] / of.scale.double()[:, None, None]
    # Half a step, and what 127 of them are off because a scale is float32.
    assert ((quantized_weight - weight).abs() <= step * (0.5 + 127 * 2**-24)).all()
    z = F.conv2d(stands_for(image, of), quantized_weight, bias.double())
    expected = F.gelu(F.pixel_shuffle(z, r), approximate=approximate)

    out = torch.full(expected.shape, float("nan")).contiguous(memory_format=torch.channels_last)
    ops.conv_pixel_shuffle_gelu_int8(image, block, out)
    # Float32 beside the exact sums: the sum as it is scaled, the bias with the zero points in it, GELU.
    size = (
        F.conv2d(torch.full_like(image, 255, dtype=torch.float64), block.weight.double().abs())
        * block.scale[:, None, None].double()
        + bias.double().abs()[:, None, None]
    )
    assert (out - expected).abs().max() <= 4 * 2**-24 * size.max()

    quantized = ops.Int8Block.of(weight, bias, r, of, to, approximate=approximate)
    result = ops.int8_image(2, 6 * r, 7 * r, to, halo=1)
    ops.conv_pixel_shuffle_gelu_int8(image, quantized, result)
    inside = stands_for(result[:, :, 1:-1, 1:-1], to)
    limits = [(torch.tensor(q) - to.zero_point.double()) * to.scale for q in (-128, 127)]
    clamped = torch.maximum(torch.minimum(expected, limits[1][:, None, None]), limits[0][:, None, None])
    assert ((inside - clamped).abs() <= to.scale[:, None, None] * 0.501).all()


def test_sums_too_large_for_float32_are_exact():
    # 17,500 products of 127 squared but for one: an odd number beyond 2^24, rounded once when it is float32 at the end.
    weight = torch.full((1, 700, 5, 5), 127, dtype=torch.int8)
    x = weight.clone()
    x[0, 0, 0, 0] = 126
    total = 127 * (127 * 17500 - 1)
    y = conv_pixel_shuffle_gelu_int8(x, weight, torch.ones(1), torch.zeros(1), 1)
    assert float(y) == float(torch.tensor(total, dtype=torch.float32))


def operands():
    of = ranges(8)
    block = ops.Int8Block.of(make_tensor(12, 8, 3, 3), None, 2, of)
    out = torch.empty(2, 3, 8, 10).contiguous(memory_format=torch.channels_last)
    return block, ops.int8_image(2, 4, 5, of, halo=1), out


def test_bad_input():
    block, image, out = operands()
    run = ops.conv_pixel_shuffle_gelu_int8
    with pytest.raises(TypeError, match=r"x must be an int8 tensor, got torch\.float32"):
        run(image.float(), block, out)
    with pytest.raises(ValueError, match=r"x must be \[B, 8, rows, columns\], got shape \(2, 7, 6, 7\)"):
        run(image[:, :7], block, out)
    with pytest.raises(ValueError, match="x must lie in memory as int8_image makes it, got strides"):
        run(image.contiguous(), block, out)
    with pytest.raises(ValueError, match=r"out must have shape \(2, 3, 8, 10\), got \(2, 3, 8, 9\)"):
        run(image, block, out[..., :9])
    with pytest.raises(ValueError, match="out must be channels-last"):
        run(image, block, out.contiguous())
    with pytest.raises(TypeError, match="out must be a floating-point tensor"):
        run(image, block, out.int())
    with pytest.raises(ValueError, match="all tensors must be on x's device cpu, got one on meta"):
        run(image, block, out.to("meta"))
    with pytest.raises(ValueError, match="impl must be one of"):
        run(image, block, out, impl="cpp")
    with pytest.raises(ValueError, match=r"x must be at least as large as the kernel \(3, 3\), got \(1, 2\)"):
        run(ops.int8_image(2, 1, 2, ranges(8), halo=0), block, out)
    quantized = ops.Int8Block.of(make_tensor(12, 8, 3, 3), None, 2, ranges(8), ranges(3))
    with pytest.raises(ValueError, match="out must hold 2 images of 8 x 10 and a border of as many pixels"):
        run(image, quantized, ops.int8_image(2, 8, 9, ranges(3), halo=0))
    with pytest.raises(ValueError, match="input must be of weight's 8 channels, got"):
        ops.Int8Block.of(make_tensor(12, 8, 3, 3), None, 2, ranges(7))
    with pytest.raises(ValueError, match="output must be of 3 channels, got"):
        ops.Int8Block.of(make_tensor(12, 8, 3, 3), None, 2, ranges(8), ranges(2))
    with pytest.raises(ValueError, match=r"weight must be \[C_out 3², C_in, K_h, K_w\], got shape"):
        ops.Int8Block.of(make_tensor(12, 8, 3, 3), None, 3, ranges(8))
    with pytest.raises(TypeError, match=r"bias must be a floating-point tensor, got torch\.int64"):
        ops.Int8Block.of(make_tensor(12, 8, 3, 3), torch.zeros(12, dtype=torch.int64), 2, ranges(8))
    with pytest.raises(ValueError, match=r"bias must have shape \(12,\), got \(1,\)"):
        ops.Int8Block.of(make_tensor(12, 8, 3, 3), torch.zeros(1), 2, ranges(8))
    with pytest.raises(ValueError, match="weight must be finite, got nan"):
        ops.Int8Block.of(torch.full((12, 8, 3, 3), float("nan")), None, 2, ranges(8))
    with pytest.raises(ValueError, match="high must be finite, got inf"):
        ops.Int8Range.of(torch.zeros(2), torch.tensor([1, float("inf")]))
    with pytest.raises(ValueError, match=r"high must be \[C\], of low's length, got shape \(3,\)"):
        ops.Int8Range.of(torch.zeros(2), torch.zeros(3))
    with pytest.raises(TypeError, match=r"low must be a floating-point tensor, got torch\.int32"):
        ops.Int8Range.of(torch.zeros(2, dtype=torch.int32), torch.zeros(2))
    assert ops.Int8Range.of(torch.zeros(1), torch.tensor([1e-45])).scale.item() > 0
    with pytest.raises(ValueError, match="halo at least 0, got 1, 2, 3 and -1"):
        ops.int8_image(1, 2, 3, ranges(8), halo=-1)
    with pytest.raises(ValueError, match=r"x must be \[B, 8, H, W\], got shape"):
        ops.quantize_int8(torch.zeros(2, 3, 4, 5), ranges(8), image)
    with pytest.raises(TypeError, match="x must be a floating-point tensor"):
        ops.quantize_int8(image, ranges(8), image)


def test_unavailable_here():
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    block, image, out = operands()
    with pytest.raises(BackendUnavailable, match=r"impl='triton' cannot run: .+"):
        ops.conv_pixel_shuffle_gelu_int8(image, block, out, impl="triton")
    with pytest.raises(BackendUnavailable, match=r"impl='triton' cannot run: .+"):
        ops.quantize_int8(torch.zeros(2, 8, 4, 5), ranges(8), image, impl="triton")


def test_images_too_large(monkeypatch):
    module = importlib.import_module("hflfnerv.ops.conv_pixel_shuffle_gelu_int8")  # not the function of that name
    monkeypatch.setattr(module, "rejects_tensor", lambda device, dtype: None)
    entry = next(entry for entry in ops.QUANTIZE_INT8 if entry.name == "triton")
    image = torch.empty(1, 2**14, 2**14, 8, dtype=torch.int8, device="meta").permute(0, 3, 1, 2)
    reason = entry.rejects(torch.empty(1, 8, 2, 2, device="meta"), ranges(8), image)
    assert reason == "one image has 2147483648 elements in memory, more than 2147483647"
    image = torch.empty(2**29, 2, 2, 8, dtype=torch.int8, device="meta").permute(0, 3, 1, 2)
    assert "the images have 2147483648 pixels" in entry.rejects(torch.empty(1, 8, 2, 2), ranges(8), image)


def test_opcheck():
    block, image, out = operands()
    arguments = (image, block.weight, block.scale, block.bias, None, None, [], out, 2, "none", "reference")
    torch.library.opcheck(torch.ops.hflfnerv.conv_pixel_shuffle_gelu_int8.default, arguments)
    of = ranges(8)
    arguments = (torch.randn(2, 8, 4, 5), of.inverse_scale, of.zero_point, image, "reference")
    torch.library.opcheck(torch.ops.hflfnerv.quantize_int8.default, arguments)


def test_interpreter(interpreter):
    assert " passed" in interpreter("int8")


def kernels_module():
    from hflfnerv.triton_kernels import conv_pixel_shuffle_gelu_int8 as kernels

    return kernels


def launch(name, tile):
    channels, out_channels, r, kernel, height, width = BLOCKS[name]
    of, to = ranges(channels), ranges(out_channels)
    last = name == "112 columns"
    weight = torch.zeros(out_channels * r * r, channels, kernel, kernel)
    block = ops.Int8Block.of(weight, None, r, of, None if last else to)
    x = ops.int8_image(1, height, width, of, halo=kernel // 2)
    if last:
        out = torch.empty(1, out_channels, height * r, width * r, dtype=torch.float16)
        out = out.contiguous(memory_format=torch.channels_last)
    else:
        out = ops.int8_image(1, height * r, width * r, to, halo=2)
    kernels_module().conv_pixel_shuffle_gelu_int8_fwd(x, *block.packed(), out, (kernel, kernel), r, "none", tile=tile)


def all_tiles():
    try:
        kernels = kernels_module()
    except ImportError:
        return [pytest.param(None, None, None, marks=pytest.mark.skip(reason="Triton is not installed"))]
    found = []
    for capability in MATRIX:
        for name, (_, out_channels, r, _, height, width) in BLOCKS.items():
            tiles = kernels.tiles(height * width, kernels.run_of(out_channels) * r * r, limits(capability))
            # Of other devices than Hopper the preferred one alone: compiling takes seconds.
            for tile in tiles if capability == 90 and name == "112 columns" else tiles[:1]:
                found.append(pytest.param(capability, name, tile, id=f"sm_{capability}-{name}-{tile}"))
    return found


@pytest.mark.parametrize(("capability", "name", "tile"), all_tiles())
def test_ahead_of_time(compile_launch, capability, name, tile):
    (found,) = compile_launch(kernels_module(), lambda: launch(name, tile), capability)
    assert found.stack_bytes == found.local_bytes == 0, found
    assert found.matrix_instructions == {matrix_int8(capability)}, found
    # 16 of the weight, and 8 of x where a pixel is no multiple of 16 channels.
    assert 16 in found.async_copy_bytes, found
    assert min(found.async_copy_bytes) >= 8 or tile.block_k < 128, found
    if (capability, name, *tile) == (90, "112 columns", 128, 128, 8, 3):
        assert found.registers <= 128, found  # two programs on a multiprocessor


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_quantize_ahead_of_time(compile_launch, capability):
    of = ranges(48)
    x = torch.empty(1, 48, 40, 80, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    image = ops.int8_image(1, 40, 80, of, halo=2)
    run = lambda: kernels_module().quantize_int8_fwd(x, of.inverse_scale, of.zero_point, image)  # noqa: E731
    (found,) = compile_launch(kernels_module(), run, capability)
    assert found.stack_bytes == found.local_bytes == 0, found
    assert found.registers <= 64, found


@pytest.mark.skipif(not torch.cuda.is_available() and not requires("cuda"), reason="no CUDA device")
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.bfloat16])
def test_on_the_device(name, dtype):
    channels, out_channels, r, kernel, *_ = BLOCKS[name]
    of, to = (
        ops.Int8Range(on_cpu.scale.cuda(), on_cpu.zero_point.cuda()) for on_cpu in map(ranges, (channels, out_channels))
    )
    weight = make_tensor(out_channels * r * r, channels, kernel, kernel, scale=(channels * kernel**2) ** -0.5).cuda()
    block = ops.Int8Block.of(weight, None, r, of, to if dtype == torch.int8 else None)
    x = ops.int8_image(3, 19, 37, of, halo=kernel // 2)
    ops.quantize_int8(make_tensor(3, channels, 19, 37).cuda(), of, x, impl="triton")

    def run(impl):
        if dtype == torch.int8:
            return ops.conv_pixel_shuffle_gelu_int8(x, block, ops.int8_image(3, 19 * r, 37 * r, to, halo=2), impl=impl)
        size = (3, out_channels, 19 * r, 37 * r)
        out = torch.empty(size, dtype=dtype, device="cuda", memory_format=torch.channels_last)
        return ops.conv_pixel_shuffle_gelu_int8(x, block, out, impl=impl)

    actual, expected = run("triton"), run("reference")
    if dtype == torch.int8:
        difference = (actual.int() - expected.int()).abs()
        assert difference.max() <= 1
        assert (difference == 0).double().mean() > 0.999
    else:
        torch.testing.assert_close(actual, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
