"""conv_pixel_shuffle_gelu: the CUDA kernel; without a GPU it is emulated, and compiled ahead of time."""

from __future__ import annotations

import contextlib
import importlib
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hflfnerv import _ext, ops
from hflfnerv.errors import BackendUnavailable
from hflfnerv.ops import CONV_PIXEL_SHUFFLE_GELU, PackedWeights, _cuda
from hflfnerv.ops.conv_pixel_shuffle_gelu import Call
from hflfnerv.reference import conv_pixel_shuffle_gelu as reference
from hflfnerv.testing import (
    assert_close_to_reference,
    assert_gradient_close_to_reference,
    convolution_magnitudes,
    make_tensor,
    poisoned_empty,
    requires,
)

CSRC = Path(__file__).parents[2] / "csrc"
MODULE = importlib.import_module("hflfnerv.ops.conv_pixel_shuffle_gelu")
ENTRY = next(entry for entry in CONV_PIXEL_SHUFFLE_GELU if entry.name == "cuda")
needs_gpu = pytest.mark.skipif(
    ENTRY.unavailable() is not None and not requires("cuda"), reason=f"cuda: {ENTRY.unavailable()}"
)
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
# B, C_in, C_out, r, H, W, kernel: the ways to cut channels (full, half and gathered), tiles that are not full, several
# tiles of columns, results that are stored 16, 4 and 2 bytes at a time.
SHAPES = [
    (1, 33, 28, 2, 19, 37, (5, 5)),
    (1, 40, 33, 2, 16, 32, (5, 5)),
    (2, 48, 40, 4, 20, 24, (5, 5)),
    (1, 57, 48, 4, 10, 20, (3, 3)),
    (2, 29, 24, 2, 17, 9, (5, 5)),
    (1, 3, 5, 3, 9, 70, (3, 3)),
    (1, 8, 7, 1, 5, 4, (1, 1)),
    (3, 64, 9, 5, 33, 8, (1, 5)),
    (1, 1, 3, 2, 1, 1, (7, 3)),
    (1, 130, 33, 1, 40, 40, (3, 3)),
]


# ---- Without a GPU ----


@needs_nvcc
@pytest.mark.parametrize("source", sorted((CSRC / "cuda").glob("*.cu")), ids=lambda path: path.stem)
@pytest.mark.parametrize("architecture", ["80", "100"])
def test_compiles_ahead_of_time(source, architecture, tmp_path):
    # The kernel is empty there, what is around it is not.
    options = ["-std=c++17", f"-arch=sm_{architecture}", "-cubin", f"-I{CSRC}"]
    done = subprocess.run(
        ["nvcc", *options, str(source), "-o", str(tmp_path / "out.cubin")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr


@pytest.mark.skipif(_ext.unavailable_cuda() is not None, reason=str(_ext.unavailable_cuda()))
def test_resources_ahead_of_time():
    # What is measured is what was built: hflfnerv._C itself.
    cuobjdump = Path(pytest.importorskip("triton").knobs.nvidia.cuobjdump.path)
    listing = subprocess.run(
        [cuobjdump, "-res-usage", _ext.load().__file__], capture_output=True, text=True, check=True
    ).stdout
    kernels = re.findall(r"Function (\S+):\s*REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", listing)
    for name, _, stack, local in kernels:
        assert (int(stack), int(local)) == (0, 0), name
    found = [(name, int(registers)) for name, registers, _, _ in kernels if "conv_pixel_shuffle_gelu_kernel" in name]
    assert len(found) == 18, "two types, nine widths"
    for name, registers in found:
        # A block's 640 threads share these out by setmaxnreg, and wait for ever if they want more.
        assert registers == 96, name
    disassembler = cuobjdump.with_name("nvdisasm")
    if not disassembler.exists():
        pytest.skip("the products' instructions are not looked at: this Triton has no nvdisasm")
    command = [cuobjdump, "-sass", _ext.load().__file__]
    path = {"PATH": str(cuobjdump.parent)}
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=path).stdout
    for function in text.split("Function : ")[1:]:
        name = function.split()[0]
        if "conv_pixel_shuffle_gelu_kernel" in name:
            columns = int(re.search(r"Li(\d+)E", name)[1])
            # Stages of 1 to 5 steps, and the gathered ones; more than 128 columns are two instructions.
            for of_one in [columns] if columns <= 128 else [72, 64]:
                assert len(re.findall(rf"HGMMA\.64x{of_one}x16\.F32", function)) >= 16, name
            assert "UTMALDG.4D" in function, name
            assert "UBLKCP" in function, name
            assert not re.search(r"\b(HMMA|LDL|STL)\b", function), name


def test_says_why_not(monkeypatch):
    assert re.search("CUDA", _cuda.rejects_tensor(torch.device("cpu"), torch.float16))
    assert re.search("float32 is not one of", _cuda.rejects_tensor(torch.device("cuda"), torch.float32))
    monkeypatch.setattr(_cuda, "rejects_tensor", lambda device, dtype: None)

    def why(kernel, padding, size, n=8):
        x, weight = torch.zeros(()).expand(size), torch.zeros(()).expand(n, size[1], *kernel)
        return ENTRY.rejects(Call(x, weight, None, 2, padding, "none"))

    assert why((5, 3), (2, 1), (1, 8, 4, 4)) is None
    assert "changes the size of the image" in why((3, 3), (0, 0), (1, 8, 4, 4))
    assert "more than 7 and 2048" in why((9, 9), (4, 4), (1, 8, 4, 4))
    assert "more than 7 and 2048" in why((3, 3), (1, 1), (1, 8, 4, 4), n=2052)
    assert "is empty" in why((3, 3), (1, 1), (0, 8, 4, 4))
    assert "x has 2147483648 pixels" in why((3, 3), (1, 1), (2**28, 8, 2, 4))
    assert "too many for offsets of 32 bits" in why((3, 3), (1, 1), (1, 8, 1, 2**27))


def test_compute_capability(monkeypatch):
    _cuda.device._capability.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (10, 0))
    assert "capability 10.0 of cuda:3 is not 9.0" in _cuda.device._capability(3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(_ext, "load", lambda: SimpleNamespace(cuda_architectures="80,100"))
    assert "built for 80,100 (HFLFNERV_CUDA_ARCHITECTURES), not for 90a" in _cuda.device._capability(4)
    guarded = []

    @contextlib.contextmanager
    def guard(index):
        guarded.append(index)
        yield
        guarded.append("restored")

    monkeypatch.setattr(torch.cuda, "device", guard)
    for index, reason in ((5, None), (6, "the driver is too old")):
        module = SimpleNamespace(cuda_architectures="80,90a", cuda_device_unavailable={index: reason}.__getitem__)
        monkeypatch.setattr(_ext, "load", lambda module=module: module)
        assert _cuda.device._capability(index) == reason
        assert guarded[-2:] == [index, "restored"]
    _cuda.device._capability.cache_clear()


@pytest.mark.parametrize(
    ("channels", "r", "pixel", "apart"), [(28, 2, 28, 32), (33, 2, 40, 40), (40, 4, 40, 40), (3, 1, 8, 8), (1, 8, 1, 8)]
)
def test_result_in_memory(channels, r, pixel, apart):
    for may, expected in ((False, pixel), (True, apart)):
        y = _cuda.empty_result(torch.empty(2, 5, 3, 4), channels * r * r, r, may)
        assert y.shape == (2, channels, 3 * r, 4 * r)
        assert y.stride() == (12 * r * r * expected, 1, 4 * r * expected, expected)
        assert _cuda.apart_of(_cuda.implementation(may)) == may
    assert _cuda.apart_of("triton") is None


@pytest.mark.parametrize(
    ("channels", "r", "apart", "filled"),
    [
        *[(5, 2, False, 8), (12, 2, True, 16), (12, 4, True, 16), (36, 2, True, 40)],
        *[(10, 2, False, 10), (12, 2, False, 12), (33, 2, False, 33), (16, 2, True, 16)],
    ],
)
def test_channels_are_filled_up_to_whole_pixels(channels, r, apart, filled):
    assert _cuda.filled_channels(channels * r * r, r, apart) == filled


def test_reads_aligned_pixels_as_they_are():
    wide = torch.arange(2 * 4 * 6 * 16, dtype=torch.float32).half().view(2, 4, 6, 16).permute(0, 3, 1, 2)
    for x in (wide, wide[:, :9], wide[:, 8:11], wide[:, :, 1:3, 2:5], wide[1:, :5]):
        prepared, strides = _cuda.pixels.prepare(x)
        assert prepared.data_ptr() == x.data_ptr()
        assert strides == [384, 96, 16]
    # An axis of size 1 may have any stride.
    assert _cuda.pixels.prepare(wide[:1].as_strided((1, 16, 1, 6), (1, 1, 3, 16)))[1] == [96, 96, 16]
    for x in (wide[:, 1:], wide[..., ::2].contiguous(), wide[:, :3].contiguous(memory_format=torch.channels_last)):
        prepared, (image, row, pixel) = _cuda.pixels.prepare(x)
        assert torch.equal(prepared, x)
        assert prepared.stride() == (image, 1, row, pixel)
        assert pixel % 8 == 0
        assert prepared.data_ptr() != x.data_ptr()


def test_what_the_kernel_is_told(monkeypatch):
    calls = {}

    def record(name, result=None):
        return lambda *args: calls.setdefault(name, args) and result

    module = SimpleNamespace(
        conv_pixel_shuffle_gelu_cuda_columns=record("columns", 32),
        conv_pixel_shuffle_gelu_cuda_packed_elements=record("elements", 640),
        conv_pixel_shuffle_gelu_cuda_pack=record("pack"),
        conv_pixel_shuffle_gelu_cuda_fwd=record("fwd"),
    )
    monkeypatch.setattr(_ext, "load", lambda: module)
    monkeypatch.setattr(torch.cuda, "device_of", lambda t: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=77))
    x, weight = torch.zeros(2, 9, 4, 6).half(), torch.zeros(20, 9, 3, 5).half()
    y, z = _cuda.conv_pixel_shuffle_gelu_fwd(x, weight, None, None, 2, "tanh", keep_z=True, apart=False)
    sizes = [2, 9, 4, 6, 5, 2, 3, 5, 1, 2, 4 * 6 * 16, 6 * 16, 16, 8, 0]
    assert calls["elements"] == (sizes, None)
    assert _cuda.columns(x, weight, 2, False) == 32
    assert calls["columns"] == (sizes, None)
    assert calls["pack"][:4] == (sizes, None, weight.data_ptr(), [9 * 15, 15, 1])
    assert calls["pack"][5] == 77
    assert calls["fwd"][:4] == (sizes, None, "float16", "gelu_tanh")
    assert calls["fwd"][5:] == (calls["pack"][4], 0, y.data_ptr(), z.data_ptr(), 77)
    assert y.stride(3) == 8
    assert z.shape == (2, 20, 4, 6)
    assert z.stride() == (480, 1, 120, 20)


def test_what_the_kernel_is_told_of_a_gradient(monkeypatch):
    calls = {}
    module = SimpleNamespace(
        conv_pixel_shuffle_gelu_cuda_packed_elements=lambda *args: 640,
        conv_pixel_shuffle_gelu_cuda_pack=lambda *args: calls.setdefault("pack", args),
        conv_pixel_shuffle_gelu_cuda_fwd=lambda *args: calls.setdefault("fwd", args),
    )
    monkeypatch.setattr(_ext, "load", lambda: module)
    monkeypatch.setattr(torch.cuda, "device_of", lambda t: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=77))
    weight = torch.zeros(20, 9, 3, 5).half()
    # Four zero channels behind those of dz, which are not read.
    dz = torch.zeros(2, 24, 4, 6).half().contiguous(memory_format=torch.channels_last)
    dx = _cuda.conv_pixel_shuffle_gelu_dgrad(dz, weight, 2)
    sizes = [2, 20, 4, 6, 9, 1, 3, 5, 1, 2, 4 * 6 * 24, 6 * 24, 24, 16, 2]
    assert calls["pack"][:4] == (sizes, None, weight.data_ptr(), [9 * 15, 15, 1])
    assert calls["fwd"][:4] == (sizes, None, "float16", "none")
    assert calls["fwd"][4:] == (dz.data_ptr(), calls["pack"][4], 0, dx.data_ptr(), 0, 77)
    assert dx.shape == (2, 9, 4, 6)
    assert dx.stride() == (4 * 6 * 16, 1, 6 * 16, 16)


@pytest.mark.parametrize("kernel", [(5, 5), (3, 1), (1, 3), (1, 1), (1, 7)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_weights_are_packed_from_where_they_lie(kernel, layout):
    weight = torch.arange(6 * 5 * kernel[0] * kernel[1]).view(6, 5, *kernel).contiguous(memory_format=layout)
    taps = weight.as_strided((6, 5, kernel[0] * kernel[1]), _cuda.conv_pixel_shuffle_gelu._weight_strides(weight))
    assert torch.equal(taps, weight.flatten(2))
    apart = torch.zeros(6, 5, *(2 * size for size in kernel))[:, :, ::2, ::2]
    assert _cuda.conv_pixel_shuffle_gelu._weight_strides(apart) is None or 1 in kernel


def test_gradient_fake():
    x, weight = torch.empty(2, 33, 3, 4, device="meta"), torch.empty(132, 33, 3, 3, device="meta")
    dy, z = torch.empty(2, 33, 6, 8, device="meta"), torch.empty(2, 132, 3, 4, device="meta")
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        dx, dweight, dbias = torch.ops.hflfnerv.conv_pixel_shuffle_gelu_backward(
            dy, x, weight, z, 2, "none", [True, True, False], "cuda", "cuda", "conv2d"
        )
    assert dx.shape == x.shape
    assert dx.stride() == (3 * 4 * 40, 1, 4 * 40, 40)
    assert dweight.shape == weight.shape
    assert dbias.shape == (0,)


@pytest.mark.parametrize("keep_z", [False, True])
def test_fake(keep_z):
    x, weight = torch.empty(2, 5, 3, 4, device="meta"), torch.empty(132, 5, 3, 3, device="meta")
    arguments = (x, weight, None, None, 2, "none", keep_z, "cuda", "conv2d", "conv2d")
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        y, z = torch.ops.hflfnerv.conv_pixel_shuffle_gelu(*arguments)
    assert y.shape == (2, 33, 6, 8)
    assert y.stride() == (6 * 8 * 40, 1, 8 * 40, 40)
    assert z.shape == ((2, 132, 3, 4) if keep_z else (0,))


@pytest.mark.parametrize(("impl", "pixel"), [("cuda", 12), ("cuda, pixels apart", 16), ("triton", 12)])
def test_fake_of_pixels_that_may_lie_apart(impl, pixel):
    x, weight = torch.empty(2, 5, 3, 4, device="meta"), torch.empty(192, 5, 3, 3, device="meta")
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        y, _ = torch.ops.hflfnerv.conv_pixel_shuffle_gelu(
            x, weight, None, None, 4, "none", False, impl, "conv2d", "conv2d"
        )
    assert y.shape == (2, 12, 12, 16)
    assert y.stride() == (12 * 16 * pixel, 1, 16 * pixel, pixel)


# ---- With one ----


def operands(shape, dtype, *, with_bias=True, requires_grad=False):
    batch, in_channels, channels, r, height, width, kernel = shape
    scale = (in_channels * kernel[0] * kernel[1]) ** -0.5
    options = {"dtype": dtype, "device": "cuda", "requires_grad": requires_grad}
    x = make_tensor(batch, in_channels, height, width, layout="channels_last", **options)
    weight = make_tensor(channels * r * r, in_channels, *kernel, scale=scale, seed=1, **options)
    return x, weight, make_tensor(channels * r * r, seed=2, **options) if with_bias else None


def run(tensors, shape, *, impl="cuda", dtype=None, approximate="none", **options):
    x, weight, bias = (None if t is None else t.to(dtype or t.dtype) for t in tensors)
    padding = tuple(size // 2 for size in shape[6])
    function = reference.conv_pixel_shuffle_gelu if impl is None else ops.conv_pixel_shuffle_gelu
    options = {} if impl is None else {"impl": impl, **options}
    return function(x, weight, bias, shape[3], padding=padding, approximate=approximate, **options)


def compare(y, tensors, shape, approximate="none"):
    expected = run(tensors, shape, impl=None, dtype=torch.float64, approximate=approximate)
    assert_close_to_reference(y, expected, run(tensors, shape, impl=None, approximate=approximate))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(shape, dtype):
    for approximate, with_bias in (("none", True), ("tanh", False)):
        tensors = operands(shape, dtype, with_bias=with_bias)
        with poisoned_empty():
            y = run(tensors, shape, approximate=approximate)
            apart = run(tensors, shape, approximate=approximate, pixels_apart=True)
        compare(y, tensors, shape, approximate)
        assert torch.equal(apart, y)
        assert apart.stride(3) % 8 == 0


@needs_gpu
def test_forward_sees_a_wrong_tap():
    shape = SHAPES[0]
    x, weight, bias = operands(shape, torch.bfloat16)
    y = run((x, weight, bias), shape)
    shifted = weight.roll(1, dims=3)
    with pytest.raises(AssertionError):
        compare(y, (x, shifted, bias), shape)


@needs_gpu
@pytest.mark.parametrize(("channels", "pixel"), [(33, 40), (12, 16)])
def test_chain_of_blocks(channels, pixel):
    # The first result's pixels are padded, so that the second block reads it in place; what is behind is never read.
    first, second = (1, 40, channels, 2, 16, 32, (5, 5)), (1, channels, 28, 2, 32, 64, (5, 5))
    tensors = operands(first, torch.float16)
    with poisoned_empty():
        y = run(tensors, first, pixels_apart=True)
    assert y.stride(3) == pixel
    x, (*_, read) = _cuda.pixels.prepare(y)
    assert (x.data_ptr(), read) == (y.data_ptr(), pixel)
    following = (y, *operands(second, torch.float16)[1:])
    compare(run(following, second), following, second)


@needs_gpu
@pytest.mark.parametrize("shape", SHAPES[:6])
def test_backward(shape):
    tensors = operands(shape, torch.bfloat16, requires_grad=True)
    y = run(tensors, shape)
    dy = make_tensor(*y.shape, dtype=torch.bfloat16, device="cuda", seed=3)
    gradients = torch.autograd.grad(y, tensors, dy)
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(run(doubles, shape, impl=None), doubles, dy.double())
    same = torch.autograd.grad(run(tensors, shape, impl=None), tensors, dy)
    padding = tuple(size // 2 for size in shape[6])
    _, *magnitudes = convolution_magnitudes(tensors[0], tensors[1], dy, shape[3], padding)
    for actual, true, rounded, size in zip(gradients, expected, same, magnitudes, strict=True):
        assert_gradient_close_to_reference(actual, true, rounded, magnitude=size)


@needs_gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_of_x(shape):
    # Alone: what a tensor between its pixels holds does not matter, and dx of a chain is read as it is by the next.
    x, weight, _ = operands(shape, torch.bfloat16)
    r, (rows, columns) = shape[3], shape[6]
    dz = make_tensor(x.shape[0], weight.shape[0], *x.shape[2:], dtype=torch.bfloat16, device="cuda", seed=4)
    with poisoned_empty():
        dx = _cuda.conv_pixel_shuffle_gelu_dgrad(dz, weight, r)
    ordered = weight.unflatten(0, (-1, r * r)).transpose(0, 1).flatten(0, 1)  # (i, j, c), as dz
    padding = (rows // 2, columns // 2)
    expected, same = (
        torch.nn.grad.conv2d_input(x.shape, ordered.to(dtype), dz.to(dtype), padding=padding)
        for dtype in (torch.float64, torch.bfloat16)
    )
    assert_close_to_reference(dx, expected, same)


@needs_gpu
def test_backward_of_a_chain():
    # The gradient between the blocks has its pixels apart, as the forward result has.
    first, second = (1, 40, 33, 2, 16, 32, (5, 5)), (1, 33, 28, 2, 32, 64, (5, 5))
    x, *of_first = operands(first, torch.bfloat16, requires_grad=True)
    _, *of_second = operands(second, torch.bfloat16, requires_grad=True)
    leaves = [x, *of_first, *of_second]

    def chain(tensors, impl):
        y = run(tensors[:3], first, impl=impl)
        return run([y, *tensors[3:]], second, impl=impl)

    y = chain(leaves, "cuda")
    dy = make_tensor(*y.shape, dtype=torch.bfloat16, device="cuda", seed=3)
    gradients = torch.autograd.grad(y, leaves, dy)
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    expected = torch.autograd.grad(chain(doubles, None), doubles, dy.double())
    same = torch.autograd.grad(chain(leaves, None), leaves, dy)
    for actual, true, rounded in zip(gradients, expected, same, strict=True):
        error, allowed = ((t.double() - true).norm() / true.norm() for t in (actual, rounded))
        assert error <= 2 * allowed + torch.finfo(torch.bfloat16).eps


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("channels", "with_bias"), [(5, True), (12, False)])
def test_results_filled_up_to_whole_pixels(channels, with_bias, dtype):
    shape = (2, 12, channels, 2, 33, 70, (5, 5))
    tensors = operands(shape, dtype, with_bias=with_bias)
    parameters = [None if t is None else torch.nn.Parameter(t) for t in tensors[1:]]
    with PackedWeights(), torch.inference_mode():
        for _ in range(2):
            with poisoned_empty():
                y = run([tensors[0], *parameters], shape, pixels_apart=True)
    assert y.shape[1] == channels
    assert y.stride(3) % 8 == 0
    compare(y, tensors, shape)


@needs_gpu
def test_streams_graphs_and_kept_weights():
    shape = SHAPES[0]
    tensors = operands(shape, torch.float16)
    with torch.inference_mode():
        packed = _cuda.pack_weight(tensors[0], tensors[1], 2, False)
        operation = torch.ops.hflfnerv.conv_pixel_shuffle_gelu
        arguments = (*tensors, packed, 2, "none", False, "cuda", "conv2d", "conv2d")
        y = operation(*arguments)[0]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = operation(*arguments)[0]
        for seed in range(3):  # other values in the same place, each right at once
            tensors[0].copy_(make_tensor(*tensors[0].shape, seed=seed))
            graph.replay()
            compare(replayed, tensors, shape)
        assert torch.equal(replayed, operation(*arguments)[0])
        assert y.shape == replayed.shape


@needs_gpu
def test_compile():
    shape = SHAPES[1]
    tensors = operands(shape, torch.bfloat16, requires_grad=True)
    compiled = torch.compile(lambda *t: run(t, shape), fullgraph=True)(*tensors)
    assert torch.equal(compiled, run(tensors, shape))
    assert torch.equal(
        torch.autograd.grad(compiled.float().sum(), tensors[0])[0],
        torch.autograd.grad(run(tensors, shape).float().sum(), tensors[0])[0],
    )


@needs_gpu
@pytest.mark.parametrize("shape", [(8, 33, 28, 2, 80, 160, (5, 5)), (2, 40, 33, 2, 320, 640, (5, 5))])
def test_deterministic(shape):
    # Many tiles for each multiprocessor: rings of shared memory go round, with the weight in place and streamed.
    tensors = operands(shape, torch.bfloat16)
    y = run(tensors, shape)
    for _ in range(3):
        assert torch.equal(y, run(tensors, shape))
    compare(y, tensors, shape)


@needs_gpu
def test_rejects():
    x, weight, _ = operands((1, 8, 2, 2, 4, 4, (3, 3)), torch.float32)
    with pytest.raises(BackendUnavailable, match=r"impl='cuda' cannot run: dtype torch\.float32 is not one of"):
        ops.conv_pixel_shuffle_gelu(x, weight, None, 2, padding=1, impl="cuda")
