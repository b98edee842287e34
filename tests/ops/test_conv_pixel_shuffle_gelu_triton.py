"""The fused kernel of conv_pixel_shuffle_gelu without a GPU: its operation, the interpreter, compilation."""

from __future__ import annotations

import importlib
import re

import pytest
import torch
from ahead_of_time import MATRIX, limits

from hflfnerv import ops
from hflfnerv.errors import BackendUnavailable
from hflfnerv.ops import CONV_PIXEL_SHUFFLE_GELU
from hflfnerv.ops.conv_pixel_shuffle_gelu import Call
from hflfnerv.testing import assert_gradient_close_to_reference, convolution_magnitudes, make_tensor, requires

MODULE = importlib.import_module("hflfnerv.ops.conv_pixel_shuffle_gelu")
OP = torch.ops.hflfnerv.conv_pixel_shuffle_gelu
BACKWARD_OP = torch.ops.hflfnerv.conv_pixel_shuffle_gelu_backward
LIBRARY = ("reference", "conv2d", "conv2d")  # nothing that needs a GPU
ENTRY = next(entry for entry in CONV_PIXEL_SHUFFLE_GELU if entry.name == "triton")


def operands(batch=2, channels=3, out_channels=2, r=2, height=3, width=4, kernel=3, dtype=torch.float32, **kwargs):
    n = out_channels * r * r
    return (
        make_tensor(batch, channels, height, width, dtype=dtype, layout="channels_last", **kwargs),
        make_tensor(n, channels, kernel, kernel, dtype=dtype, seed=1, **kwargs),
        make_tensor(n, dtype=dtype, seed=2, **kwargs),
    )


@pytest.mark.parametrize("keep_z", [False, True])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_opcheck(approximate, keep_z):
    x, weight, bias = operands(requires_grad=keep_z)
    torch.library.opcheck(OP, (x, weight, bias, None, 2, approximate, keep_z, *LIBRARY))
    torch.library.opcheck(OP, (x, weight, None, None, 2, approximate, keep_z, *LIBRARY))


@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, False), (False, True, False), (False,) * 3])
def test_opcheck_backward(wanted):
    x, weight, _ = operands()
    z, dy = make_tensor(2, 8, 3, 4, layout="channels_last"), make_tensor(2, 2, 6, 8, seed=1)
    torch.library.opcheck(BACKWARD_OP, (dy, x, weight, z, 2, "none", list(wanted), *LIBRARY))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "with gaps"])
def test_gradient_of_x_has_its_layout(layout):
    x, weight, _ = operands()
    batch, channels, height, width = x.shape
    if layout == "contiguous":
        x = x.contiguous()
    elif layout == "with gaps":  # as the CUDA kernel leaves the pixels of the block before this one
        x = torch.zeros(batch, height, width, channels + 3)[..., :channels].permute(0, 3, 1, 2).copy_(x)
    z, dy = make_tensor(2, 8, 3, 4, layout="channels_last"), make_tensor(2, 2, 6, 8, seed=1)
    arguments = (dy, x, weight, z, 2, "none", [True, True, True], *LIBRARY)
    dx = BACKWARD_OP(*arguments)[0]
    expected = x if layout == "contiguous" else x.contiguous(memory_format=torch.channels_last)
    assert dx.stride() == expected.stride()
    torch.library.opcheck(BACKWARD_OP, arguments)


@pytest.mark.parametrize("r", [1, 2, 3])
def test_gradcheck(r):
    # The formula that every kernel shares: the order of channels, PyTorch's two convolutions, the bias.
    x, weight, bias = operands(1, 2, 2, r, 3, 4, dtype=torch.float64, requires_grad=True)
    function = lambda x, w, b: OP(x, w, b, None, r, "none", True, *LIBRARY)[0]  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, weight, bias))


def test_same_as_the_definition():
    x, weight, bias = operands(2, 5, 3, 2, 4, 7, 5, dtype=torch.float64)
    y, z = OP(x, weight, bias, None, 2, "none", True, *LIBRARY)
    assert torch.equal(y, ops.conv_pixel_shuffle_gelu(x, weight, bias, 2, padding=2, impl="reference"))
    # Channel (i, j, c) of z is channel (c, i, j) of the convolution.
    conv = torch.nn.functional.conv2d(x, weight, bias, padding=2)
    assert torch.equal(z.view(2, 2, 2, 3, 4, 7), conv.view(2, 3, 2, 2, 4, 7).permute(0, 2, 3, 1, 4, 5))


def test_gradient_needs_z():
    x, weight, bias = operands(requires_grad=True)
    y, _ = OP(x, weight, bias, None, 2, "none", False, *LIBRARY)
    with pytest.raises(RuntimeError, match="keep_z must be True where a gradient is wanted, got False"):
        y.sum().backward()


def test_no_second_derivative():
    x, weight, bias = operands(requires_grad=True)
    y, _ = OP(x, weight, bias, None, 2, "none", True, *LIBRARY)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative in its kernels; use impl='reference'"):
        dx.sum().backward()


def test_compile_of_the_registered_operation():
    compiled = torch.compile(
        lambda x, w, b: OP(x, w, b, None, 2, "none", True, *LIBRARY)[0],
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    for height in (3, 6):
        x, weight, bias = operands(height=height, requires_grad=True)
        y, expected = (
            compiled(x, weight, bias),
            ops.conv_pixel_shuffle_gelu(x, weight, bias, 2, padding=1, impl="reference"),
        )
        torch.testing.assert_close(y, expected)
        actual, expected = (torch.autograd.grad(out.sum(), (x, weight, bias)) for out in (y, expected))
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("kernel", "padding", "size", "reason"),
    [
        ((2, 2), (1, 1), (1, 8, 4, 4), r"kernel \(2, 2\) with padding \(1, 1\) changes the size of the image"),
        ((3, 3), (0, 0), (1, 8, 4, 4), r"kernel \(3, 3\) with padding \(0, 0\) changes the size of the image"),
        ((3, 3), (1, 1), (1, 8, 2**14, 2**14), r"one image has 2147483648 elements, more than 2147483647"),
        ((3, 3), (1, 1), (2**28, 8, 2, 4), r"x has 2147483648 pixels, more than 2147483391"),
        ((3, 3), (1, 1), (1, 8, 1, 2**27), r"two rows of the result have 2147483648 elements, too many"),
        ((63, 63), (31, 31), (1, 8, 4, 4), None),
        ((5, 1), (2, 0), (1, 8, 4, 4), None),
    ],
)
def test_says_why_not(monkeypatch, kernel, padding, size, reason):
    # As on a machine with a GPU: the device's own limits come first.
    monkeypatch.setattr(MODULE, "rejects_tensor", lambda device, dtype: None)
    x, weight = torch.zeros(()).expand(size), torch.zeros(()).expand(8, 8, *kernel)
    found = ENTRY.rejects(Call(x, weight, None, 2, padding, "none"))
    assert found is None if reason is None else re.match(reason, found), found


def test_weights_too_large(monkeypatch):
    monkeypatch.setattr(MODULE, "rejects_tensor", lambda device, dtype: None)
    x, weight = torch.zeros(()).expand(1, 2**15, 4, 4), torch.zeros(()).expand(2**14, 2**15, 3, 3)
    assert "too many for offsets of 32 bits" in ENTRY.rejects(Call(x, weight, None, 2, (1, 1), "none"))


@pytest.mark.parametrize(
    ("stage", "dtype", "layout", "expected"),
    [
        ((33, 28, 2, 5, 320, 640), torch.bfloat16, "channels_last", True),
        ((40, 33, 2, 5, 160, 320), torch.float16, "channels_last", True),
        ((48, 40, 4, 5, 40, 80), torch.bfloat16, "channels_last", True),
        ((48, 40, 4, 5, 40, 80), torch.bfloat16, "contiguous", False),
        ((33, 28, 2, 5, 320, 640), torch.float32, "channels_last", False),
        ((57, 48, 4, 3, 10, 20), torch.bfloat16, "channels_last", False),
        ((33, 5, 2, 5, 320, 640), torch.bfloat16, "channels_last", False),
        ((33, 28, 2, 3, 320, 640), torch.bfloat16, "channels_last", False),
    ],
)
def test_where_it_is_faster(stage, dtype, layout, expected):
    channels, out_channels, r, kernel, height, width = stage
    x = torch.zeros(1, channels, height, width, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x
    weight = torch.zeros(out_channels * r * r, channels, kernel, kernel, dtype=dtype)
    call = MODULE.Call(x, weight, None, r, (kernel // 2, kernel // 2), "none")
    assert MODULE._triton_is_faster(call) is expected


def test_unavailable_here():
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    x, weight, bias = operands()
    with pytest.raises(BackendUnavailable, match=r"impl='triton' cannot run: .+"):
        ops.conv_pixel_shuffle_gelu(x, weight, bias, 2, padding=1, impl="triton")
    assert "the tensors are on cpu" in ENTRY.rejects(Call(x, weight, bias, 2, (1, 1), "none"))


@pytest.mark.skipif(not torch.cuda.is_available() and not requires("cuda"), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block", [(33, 28, 2, 5), (40, 33, 2, 5), (57, 48, 4, 3), (24, 7, 5, 1)])
def test_gradients_by_kernels_on_the_device(block, dtype):
    channels, out_channels, r, kernel = block
    tensors = operands(2, channels, out_channels, r, 37, 53, kernel, dtype=dtype)
    dy = make_tensor(2, out_channels, 37 * r, 53 * r, dtype=dtype, seed=3).cuda()

    def run(dtype, implementations):
        leaves = [t.cuda().to(dtype).requires_grad_() for t in tensors]
        y, _ = OP(*leaves, None, r, "none", True, *implementations)
        return torch.autograd.grad(y, leaves, dy.to(dtype))

    expected, same = run(torch.float64, LIBRARY), run(dtype, LIBRARY)
    sizes = convolution_magnitudes(tensors[0], tensors[1], dy.cpu(), r, (kernel // 2, kernel // 2))[1:]
    for actual, true, rounded, size in zip(run(dtype, ["triton"] * 3), expected, same, sizes, strict=True):
        assert_gradient_close_to_reference(actual, true, rounded, magnitude=size)
    first, second = (run(dtype, ["triton"] * 3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_interpreter(interpreter):
    assert " passed" in interpreter("conv_shuffle")


# C_in, C_out, r, kernel, H, W: the blocks of the 1.5 M network whose columns fill a tile in different ways.
BLOCKS = {
    "112 columns": (33, 28, 2, 5, 320, 640),
    "132 columns": (40, 33, 2, 5, 160, 320),
    "640 columns": (48, 40, 4, 5, 40, 80),
    "768 columns": (57, 48, 4, 3, 10, 20),
    "48 columns": (12, 12, 2, 3, 7, 9),
}


def kernels_module():
    from hflfnerv.triton_kernels import conv_pixel_shuffle_gelu as kernels

    return kernels


def launch(block, dtype, approximate, **options):
    kernels = kernels_module()
    channels, out_channels, r, kernel, height, width = BLOCKS[block]
    weight = make_tensor(out_channels * r * r, channels, kernel, kernel, dtype=dtype)
    bias = make_tensor(len(weight), dtype=dtype)
    x = torch.empty(1, channels, height, width, dtype=dtype).contiguous(memory_format=torch.channels_last)
    packed = kernels.pack_weight(weight, r)
    y, z = kernels.conv_pixel_shuffle_gelu_fwd(
        x, packed, bias, len(weight), (kernel, kernel), r, approximate, **options
    )
    if z is not None:
        kernels.conv_pixel_shuffle_gelu_bwd(y, z, r, approximate, True)


def launch_gradient(block, dtype, which, **options):
    kernels = kernels_module()
    channels, out_channels, r, kernel, height, width = BLOCKS[block]
    n = out_channels * r * r
    weight = torch.zeros(n, channels, kernel, kernel, dtype=dtype)
    x, dz = (
        torch.empty(1, c, height, width, dtype=dtype).contiguous(memory_format=torch.channels_last)
        for c in (channels, n + -n % 8)
    )
    if which == "dgrad":
        kernels.conv_pixel_shuffle_gelu_dgrad(dz, weight, r, **options)
    else:
        kernels.conv_pixel_shuffle_gelu_wgrad(x, dz, weight, r, **options)


def check(compiled, capability, dtype, precision="ieee"):
    for found in compiled:
        assert found.stack_bytes == found.local_bytes == 0, found
        if found.kernel not in ("conv_pixel_shuffle_gelu_fwd_kernel", "conv_pixel_shuffle_gelu_wgrad_kernel"):
            assert found.registers <= 64, found
            continue
        if dtype == torch.float32 and precision == "ieee":
            assert not found.matrix_instructions, found
        else:
            assert found.matrix_instructions == {MATRIX[capability]}, found
        # Never less than 4 bytes, and 16 for x; Triton splits what a small weight tile leaves for a thread.
        assert 16 in found.async_copy_bytes, found


def all_tiles(found):
    """Parameters of found(kernels, capability), which yields tuples that end in a tile."""
    try:
        kernels = kernels_module()
    except ImportError:
        return [pytest.param(*[None] * 4, marks=pytest.mark.skip(reason="Triton is not installed"))]
    return [
        pytest.param(capability, *rest, tile, id="-".join(map(str, (f"sm_{capability}", *rest, *tile))))
        for capability in (80, 90, 100)
        for *rest, tile in found(kernels, capability)
    ]


def forward_tiles(kernels, capability):
    for block, keep_z in (("112 columns", False), ("132 columns", True)):
        _, out_channels, r, _, height, width = BLOCKS[block]
        for tile in kernels.tiles(height * width, out_channels * r * r, torch.bfloat16, limits(capability)):
            # A fourth stage takes shared memory and no registers; once is enough.
            if tile.num_stages == 3 or (capability, block) == (90, "112 columns"):
                yield block, keep_z, tile


def gradient_tiles(kernels, capability):
    # Of devices other than Hopper the preferred tile alone: compiling takes seconds.
    first = slice(None if capability == 90 else 1)
    for block in ("112 columns", "132 columns"):
        channels, out_channels, r, kernel, *_ = BLOCKS[block]
        depth, n = kernel**2 * (channels + -channels % 8), out_channels * r * r
        for tile in kernels.wgrad_tiles(depth, n, torch.bfloat16, limits(capability))[first]:
            yield block, "wgrad", tile
    # Columns of two accumulators; those of one are the forward pass's.
    for tile in kernels.tiles(320 * 640, 33, torch.bfloat16, limits(capability))[first]:
        if tile.num_stages == 3:
            yield "112 columns", "dgrad", tile


@pytest.mark.parametrize(("capability", "block", "keep_z", "tile"), all_tiles(forward_tiles))
def test_ahead_of_time_every_tile(compile_launch, capability, block, keep_z, tile):
    run = lambda: launch(block, torch.bfloat16, "none", keep_z=keep_z, tile=tile)  # noqa: E731
    found = compile_launch(kernels_module(), run, capability)
    check(found, capability, torch.bfloat16)
    if (capability, block, tile.block_m) == (90, "112 columns", 128):
        kernel = next(one for one in found if one.kernel == "conv_pixel_shuffle_gelu_fwd_kernel")
        assert kernel.registers <= 128, kernel  # two programs on a multiprocessor


@pytest.mark.parametrize(("capability", "block", "which", "tile"), all_tiles(gradient_tiles))
def test_ahead_of_time_every_tile_of_the_gradients(compile_launch, capability, block, which, tile):
    run = lambda: launch_gradient(block, torch.bfloat16, which, tile=tile)  # noqa: E731
    found = compile_launch(kernels_module(), run, capability)
    check(found, capability, torch.bfloat16)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("which", ["dgrad", "wgrad"])
def test_ahead_of_time_gradients_in_float32(compile_launch, which, precision):
    run = lambda: launch_gradient("112 columns", torch.float32, which, precision=precision)  # noqa: E731
    (*_, found) = compile_launch(kernels_module(), run, 90)
    assert found.stack_bytes == found.local_bytes == 0, found
    assert found.matrix_instructions == (set() if precision == "ieee" else {"wgmma"}), found


@pytest.mark.parametrize(
    ("capability", "block", "dtype", "approximate", "precision"),
    [
        (90, "112 columns", torch.bfloat16, "none", "ieee"),
        (90, "640 columns", torch.bfloat16, "none", "ieee"),
        (90, "768 columns", torch.float16, "tanh", "ieee"),
        (80, "48 columns", torch.float16, "none", "ieee"),
        (90, "132 columns", torch.float32, "none", "ieee"),
        (90, "132 columns", torch.float32, "none", "tf32"),
    ],
)
def test_ahead_of_time(compile_launch, capability, block, dtype, approximate, precision):
    found = compile_launch(
        kernels_module(), lambda: launch(block, dtype, approximate, keep_z=True, precision=precision), capability
    )
    check(found, capability, dtype, precision)


def test_tiles_fit_every_device():
    from hflfnerv.triton_kernels._tiles import Limits

    kernels = kernels_module()
    consumer = Limits((8, 6), 101376, 28)  # the shared memory of compute capability 8.6, 8.9 and 12.0
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for precision in ("ieee", "tf32"):
            for n in (4, 12, 33, 48, 80, 112, 132, 200, 256, 640):
                for pixels in (1, 1000, 10**6):
                    found = kernels.tiles(pixels, n, dtype, consumer, precision=precision)
                    assert found, (dtype, precision, n, pixels)
                for depth in (8, 64, 1000):
                    assert kernels.wgrad_tiles(depth, n, dtype, consumer, precision=precision), (dtype, n, depth)


@pytest.mark.parametrize(
    ("n", "blocks"),
    [(4, (16, 0)), (33, (32, 16)), (57, (64, 0)), (96, (64, 32)), (112, (128, 0)), (132, (128, 16)), (200, (128, 0))],
)
def test_columns_are_padded_little(n, blocks):
    assert kernels_module().column_blocks(n) == blocks


@pytest.mark.parametrize(
    ("stage", "dtype", "expected"),
    [
        ((33, 28, 2, 5, 320, 640), torch.bfloat16, ("triton", "triton")),
        ((40, 33, 2, 5, 160, 320), torch.bfloat16, ("conv2d", "triton")),
        ((33, 28, 2, 5, 320, 640), torch.float32, ("conv2d", "conv2d")),
        ((57, 48, 4, 3, 10, 20), torch.float16, ("conv2d", "triton")),
        ((68, 57, 5, 1, 2, 4), torch.float16, ("conv2d", "conv2d")),
    ],
)
def test_which_gradients_are_faster(stage, dtype, expected):
    channels, out_channels, r, kernel, height, width = stage
    x = torch.zeros(1, channels, height, width, dtype=dtype)
    weight = torch.zeros(out_channels * r * r, channels, kernel, kernel, dtype=dtype)
    assert MODULE._gradients_by_shape(x, weight) == expected
