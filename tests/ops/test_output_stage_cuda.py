"""The CUDA output stage: in an emulation of a GPU, and on one."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hflfnerv import _ext, ops
from hflfnerv.ops import OUTPUT_STAGE, _cuda
from hflfnerv.ops.output_stage import Call
from hflfnerv.reference import output_stage as reference
from hflfnerv.testing import assert_close_to_reference, make_tensor, requires

CSRC = Path(__file__).parents[2] / "csrc"
ENTRY = next(entry for entry in OUTPUT_STAGE if entry.name == "cuda")
needs_gpu = pytest.mark.skipif(
    ENTRY.unavailable() is not None and not requires("cuda"), reason=f"cuda: {ENTRY.unavailable()}"
)


@pytest.mark.parametrize("channels", [1, 16, 28, 33])
def test_order_of_the_weight(channels):
    weight = make_tensor(3, channels, 3, 3)
    packed = _cuda.pack_head(weight).flatten()
    steps = -(-channels // 16)
    assert packed.numel() == steps * 3 * 256
    for at, value in enumerate(packed.tolist()):
        e, i, lane, step, k = at % 2, at // 2 % 4, at // 8 % 32, at // 256 % steps, at // 256 // steps
        channel, row = 16 * step + i // 2 * 8 + lane % 4 * 2 + e, lane // 4 + i % 2 * 8
        column, colour = divmod(row, 3)
        inside = channel < channels and row < 9
        assert value == (weight[colour, channel, k, column].item() if inside else 0.0)


def test_features_that_do_not_fit(monkeypatch):
    monkeypatch.setattr(_cuda, "rejects_tensor", lambda device, dtype: None)

    def rejects(*channels):
        features = [torch.zeros(1, c, 2, 2) for c in channels]
        return ENTRY.rejects(Call(features, [], torch.zeros(1, 3), [], [], 0.0, [2, 2], True))

    assert rejects(130, 3) is None
    assert rejects(64, 64) is None
    assert "do not fit into shared memory" in rejects(130, 33)


def test_what_the_kernel_is_told(monkeypatch):
    calls = []
    monkeypatch.setattr(_ext, "load", lambda: SimpleNamespace(output_stage_cuda_fwd=lambda *args: calls.append(args)))
    monkeypatch.setattr(torch.cuda, "device_of", lambda t: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=77))
    memory = torch.zeros(2, 6, 7, 8).half()
    features = [memory[..., :5].permute(0, 3, 1, 2), torch.zeros(2, 3, 5, 7).half()]
    weights = [torch.zeros(3, 5, 3, 3).half(), torch.zeros(3, 3, 3, 3).half()]
    biases = torch.zeros(2, 3)
    run = torch.ops.hflfnerv.output_stage
    frames = run(features, weights, biases, [0, 1], [1.0, 0.5], 0.25, [5, 6], True, [], "cuda")
    ((size, device, dtype, told, scales, offset, bias, y, as_bytes, stream),) = calls
    assert (size, device, dtype) == ([2, 5, 6], None, "float16")
    # The first as it is, its pixels eight elements apart; the second channels-last.
    assert told[0][0] == memory.data_ptr()
    assert [of[2:] for of in told] == [(5, 6, 7, 8, 0), (3, 5, 7, 3, 1)]
    assert (scales, offset, bias, y) == ([1.0, 0.5], 0.25, biases.data_ptr(), frames.data_ptr())
    assert (as_bytes, stream) == (True, 77)
    assert (frames.shape, frames.dtype) == ((2, 5, 6, 3), torch.uint8)


# Channels and gaps of the features, rows and columns beyond the frame, H, W, groups, scales.
STAGES = [
    (((28, 0),), ((0, 0),), (37, 83), (0,), (0.5,)),
    (((24, 0), (5, 3), (10, 6)), ((0, 0), (2, 0), (0, 7)), (64, 96), (0, 1, 1), (1.0, 0.5)),
    (((3, 0), (130, 6)), ((1, 1), (0, 0)), (1, 5), (0, 1), (-0.75, 0.25)),
]


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", STAGES)
def test_on_a_gpu(case, dtype):
    channels, beyond, crop, groups, scales = case
    features = []
    for i, ((c, gap), (rows, columns)) in enumerate(zip(channels, beyond, strict=True)):
        size = (crop[0] + rows, crop[1] + columns)
        memory = torch.full((2, *size, c + gap), float("nan"), dtype=dtype, device="cuda")
        features.append(memory[..., :c].permute(0, 3, 1, 2).copy_(make_tensor(2, c, *size, seed=i)))
    weights = [make_tensor(3, c, 3, 3, dtype=dtype, scale=(9 * c) ** -0.5, device="cuda", seed=c) for c, _ in channels]
    biases = [make_tensor(3, dtype=dtype, device="cuda", seed=20 + i) for i in range(len(channels))]
    link = {"groups": groups, "scales": scales, "crop": crop, "impl": "cuda"}
    frames = ops.output_stage(features, weights, biases, as_bytes=False, **link)
    levels = ops.output_stage(features, weights, biases, **link)
    sums = torch.zeros(len(scales), 3, device="cuda", dtype=torch.float64)
    for group, bias in zip(groups, biases, strict=True):
        sums[group] += bias
    options = {"groups": groups, "scales": scales, "offset": 0.5, "crop": crop, "as_bytes": False}
    expected, same = (
        reference.output_stage([x.to(d) for x in features], [w.to(d) for w in weights], sums.to(d), **options)
        for d in (torch.float64, torch.float32)
    )
    # What is rounded: the terms of the sums, and tanh, whose error of 2e-7 is less than 4 units of roundoff.
    terms = sum(
        torch.nn.functional.conv2d(x.double().abs(), w.double().abs(), padding=1).max()
        for x, w in zip(features, weights, strict=True)
    )
    assert_close_to_reference(frames, expected, same, magnitude=terms + 4)
    assert torch.equal(levels, (frames.clamp(0, 1) * 255).round().byte())
