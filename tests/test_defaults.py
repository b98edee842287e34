"""Results do not depend on PyTorch's default dtype and device, which are the caller's.

A kernel takes the addresses of tensors: one that is not what it takes them for would have it write beyond their ends.
"""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

from hflfnerv import Decoder, EncodeConfig, encode, ops
from hflfnerv.codec.engine_cuda import CudaEngine
from hflfnerv.models import MODELS, build_model
from hflfnerv.ops import _cpp
from hflfnerv.ops._depthwise_conv2d import depthwise_conv2d
from hflfnerv.testing import make_tensor
from hflfnerv.train import TrainConfig, Trainer, prepare_clip

DEFAULTS = pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, "meta"], ids=str)


@contextlib.contextmanager
def default_is(value):
    """Make ``value`` the default dtype, or where it is a name the default device."""
    on_device = isinstance(value, str)
    set_default = torch.set_default_device if on_device else torch.set_default_dtype
    before = None if on_device else torch.get_default_dtype()
    set_default(value)
    try:
        yield
    finally:
        set_default(before)


def block(x, weight, bias, impl):
    return ops.conv_pixel_shuffle_gelu(x, weight, bias, 2, padding=weight.shape[2] // 2, impl=impl)


def packed_block(x, weight, bias, impl):
    with torch.inference_mode(), ops.PackedWeights():
        return block(x, torch.nn.Parameter(weight, requires_grad=False), bias, impl)


def head(x, weight, bias, impl):
    return ops.output_stage([x], [weight], [bias], as_bytes=False, impl=impl)


def depthwise(x, weight, bias, impl):
    return depthwise_conv2d(x, weight, bias, padding=(3, 3), impl=impl)


def shuffle(x, bias, impl):
    return ops.pixel_shuffle_gelu(x, 2, bias, impl=impl)


def loss(x, impl):
    target = torch.full((1, 30, 40, 3), 99, dtype=torch.uint8, device="cpu")
    return ops.stream_loss(x, target, impl=impl)


def tensors(*sizes, layout="channels_last"):
    return [make_tensor(*s, layout=layout if len(s) == 4 else "contiguous", seed=i) for i, s in enumerate(sizes)]


# Large enough for "auto" to be a kernel.
IMAGE = (1, 16, 50, 60)
CALLS = [
    (block, tensors(IMAGE, (64, 16, 3, 3), (64,)), ["auto", "winograd", "conv2d+cpp", "reference"]),
    (block, tensors(IMAGE, (64, 16, 5, 5), (64,), layout="contiguous"), ["winograd"]),
    (ops.conv2d, tensors(IMAGE, (3, 16, 3, 3), (3,)), ["auto", "direct", "winograd", "reference"]),
    (shuffle, tensors(IMAGE, (16,)), ["auto", "cpp", "reference"]),
    (shuffle, [t.bfloat16() for t in tensors(IMAGE, (16,))], ["cpp"]),
    (ops.highpass, tensors(IMAGE), ["auto", "fft", "reference"]),
    (head, tensors(IMAGE, (3, 16, 3, 3), (3,)), ["auto", "reference"]),
    (loss, tensors((1, 3, 30, 40)), ["auto", "reference"]),
    (depthwise, tensors(IMAGE, (16, 1, 7, 7), (16,)), ["auto", "cpp", "groups", "reference"]),
]
WITHOUT_GRADIENTS = [
    (packed_block, CALLS[0][1], ["winograd"]),
    (head, CALLS[6][1], ["auto", "cpp"]),
]


def parameters(calls):
    found = []
    for function, operands, names in calls:
        for impl in names:
            needs_vectors = (
                any(name in impl for name in ("direct", "winograd", "cpp")) and _cpp.unavailable() is not None
            )
            marks = [pytest.mark.skip(reason=f"{impl}: {_cpp.unavailable()}")] if needs_vectors else []
            found.append(pytest.param(function, operands, impl, id=f"{function.__name__}-{impl}", marks=marks))
    return found


def assert_same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert (a.dtype, a.device) == (e.dtype, e.device)
        assert torch.equal(a, e)


@DEFAULTS
@pytest.mark.parametrize(("function", "operands", "impl"), parameters(CALLS))
def test_operations(function, operands, impl, default):
    def run():
        leaves = [t.clone().requires_grad_() for t in operands]
        y = function(*leaves, impl=impl)
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    expected = run()
    with default_is(default):
        actual = run()
    assert_same(actual, expected)


@DEFAULTS
@pytest.mark.parametrize(("function", "operands", "impl"), parameters(WITHOUT_GRADIENTS))
def test_operations_without_gradients(function, operands, impl, default):
    expected = function(*operands, impl=impl)
    with default_is(default):
        actual = function(*operands, impl=impl)
    assert_same([actual], [expected])


@pytest.fixture(scope="module")
def coded(moving_frames):
    return encode(moving_frames, EncodeConfig(size="60k", epochs=1))


@DEFAULTS
@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_a_decoded_frame(coded, precision, default):
    expected = Decoder(coded.bitstream, device="cpu", precision=precision)
    with default_is(default):
        decoder = Decoder(coded.bitstream, device="cpu", precision=precision)
        frame, floats, none = decoder[3], decoder.float_frames([3]), decoder.float_frames([])
    assert np.array_equal(frame, expected[3])
    assert_same([floats, none], [expected.float_frames([3]), expected.float_frames([])])


@DEFAULTS
def test_frames_of_the_engine_for_cuda(coded, default):
    decoder = Decoder(coded.bitstream, device="cpu")

    def draw():
        engine = CudaEngine(decoder.model, decoder.embeddings, torch.device("cpu"), "fp32")
        frames = np.empty((2, *decoder.shape[1:]), np.uint8)
        engine.fill([1, 4], frames)
        return [torch.from_numpy(frames), engine.device_frames([1, 4]), *engine.float_frames([1, 4])]

    expected = draw()
    with default_is(default):
        actual = draw()
    assert_same(actual, expected)


@DEFAULTS
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_training_step(moving_frames, optimizer, default):
    frames = torch.from_numpy(moving_frames)

    def train(model):
        config = TrainConfig(epochs=1, lr=1e-3, batch_size=6, seed=0, precision="fp32", optimizer=optimizer)
        clip = prepare_clip(frames, model.encoder_input, crop=None, removed=0.8)
        trainer = Trainer(model, clip, config, device=torch.device("cpu"))
        trainer.run()
        return [trainer.training_step.errors, *model.state_dict().values()]

    network = MODELS["hflf"]
    models = [build_model(network.plan(60_000, *frames.shape[:3])) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    expected = train(models[0])
    with default_is(default):
        actual = train(models[1])
    assert_same(actual, expected)


@DEFAULTS
def test_encode(coded, moving_frames, default):
    with default_is(default):
        result = encode(moving_frames, EncodeConfig(size="60k", epochs=1))
        assert len(Decoder(result.bitstream, device="cpu")[:]) == len(moving_frames)
    assert result.bitstream == coded.bitstream


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda t: t.double(), "cpu, torch.float64"),
        (lambda t: t.to("meta"), "meta, torch.float32"),
        (lambda t: t[..., ::2], r"strides \(24, 12, 4, 2\)"),
        (lambda t: t.contiguous(memory_format=torch.channels_last), r"strides \(24, 1, 8, 2\)"),
    ],
)
def test_no_address_of_another_tensor(change, found):
    t = torch.zeros(1, 2, 3, 4)
    assert _cpp.address(t, torch.float32) == t.data_ptr()
    assert _cpp.address(None, torch.float32) == 0
    with pytest.raises(ValueError, match=found):
        _cpp.address(change(t), torch.float32)
