"""The CUDA engine: on the CPU, where it has neither graphs nor streams, and on a GPU where there is one."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from hflfnerv import Decoder, EncodeConfig, encode
from hflfnerv.codec import decoder, engine_cuda
from hflfnerv.codec.engine import DECODE, ModuleEngine, make_engine
from hflfnerv.codec.engine_cuda import CudaEngine
from hflfnerv.models import MODELS
from hflfnerv.testing import requires

CONFIG = EncodeConfig(size="60k", epochs=1, device="cpu", precision="fp32")


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        assert not requires("cuda")
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.fixture(scope="module", params=MODELS)
def coded(request, moving_frames):
    return encode(moving_frames, dataclasses.replace(CONFIG, model=request.param)).bitstream


def make(coded, device, precision="fp32"):
    dec = Decoder(coded, device="cpu", precision="fp32")
    return CudaEngine(dec.model, dec.embeddings, device, precision), Decoder(coded, "cpu", "fp32")


def level_differences(frames, expected):
    return np.abs(np.stack(list(frames)).astype(int) - expected)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_frames_are_those_of_the_network(coded, device, batch_size):
    engine, dec = make(coded, device)
    engine.batch_size = batch_size
    wanted = [5, 0, 3, 3, 1, 2, 4]
    expected = dec.frames(wanted).astype(int)
    difference = level_differences(engine.frames(wanted), expected)
    assert difference.max() <= 1
    assert (difference == 0).mean() > 0.999
    out = np.empty((len(wanted), *dec.shape[1:]), np.uint8)
    engine.fill(wanted, out)
    assert level_differences(out, np.stack(list(engine.frames(wanted)))).max() == 0
    images = torch.stack(list(engine.float_frames(wanted)))
    torch.testing.assert_close(images, dec.float_frames(wanted), atol=1e-4, rtol=0)
    assert level_differences(engine.device_frames([5, 0]).cpu().numpy(), expected[:2]).max() <= 1


def test_a_frame_alone_is_that_frame_among_others(coded, device):
    engine, _ = make(coded, device, "auto")
    whole = list(engine.frames(range(6)))
    for index, frame in enumerate(whole):
        assert np.array_equal(next(engine.frames([index])), frame)


@pytest.mark.parametrize("precision", ["auto", "bf16", "fp16"])
def test_half_precision(coded, device, precision):
    engine, dec = make(coded, device, precision)
    difference = level_differences(engine.frames(range(6)), dec[:].astype(int))
    assert difference.max() <= 4
    assert (difference <= 1).mean() >= (0.999 if precision != "bf16" else 0.98)
    assert all(image.dtype == torch.float32 for image in engine.float_frames([0]))


def test_interleaved_and_abandoned_readers(coded, device):
    engine, dec = make(coded, device)
    engine.batch_size = 2
    expected = dec[:]
    readers = [engine.frames(range(6)), engine.frames(range(5, -1, -1))]
    for index, pair in enumerate(zip(*readers, strict=True)):
        assert level_differences(pair, expected[[index, 5 - index]].astype(int)).max() <= 1
    abandoned = engine.frames(range(6))
    next(abandoned)
    abandoned.close()
    slots = len(engine._free)
    assert level_differences(engine.frames(range(6)), expected.astype(int)).max() <= 1
    assert len(engine._free) == slots


def test_nothing_asked_for(coded, device):
    engine, _ = make(coded, device)
    assert list(engine.frames([])) == []
    assert list(engine.float_frames([])) == []


def test_too_little_memory_halves_the_batches(coded, device, monkeypatch):
    engine, dec = make(coded, device)
    engine.batch_size = 4
    program = engine._program

    def limited(batch):
        if batch > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return program(batch)

    monkeypatch.setattr(engine, "_program", limited)
    with pytest.warns(RuntimeWarning, match=r"not enough memory on .*: decoding in batches of [21]$") as notes:
        frames = list(engine.frames(range(6)))
    assert [str(note.message)[-1] for note in notes] == ["2", "1"]
    assert level_differences(frames, dec[:].astype(int)).max() <= 1
    monkeypatch.setattr(engine, "_program", lambda batch: limited(2))
    with pytest.raises(torch.OutOfMemoryError):
        list(engine.frames([0]))


def test_float16_that_overflows_is_float32(coded, device):
    dec = Decoder(coded, device="cpu", precision="fp32")
    with torch.no_grad():
        for name, parameter in dec.model.named_parameters():
            if ".stem." in name and ".coarse." not in name:
                parameter.mul_(1e6)
            elif name.endswith("blocks.0.conv.weight"):
                parameter.mul_(1e-6)
    with pytest.warns(RuntimeWarning, match="decoding in float32"):
        engine = CudaEngine(dec.model, dec.embeddings, device, "auto")
    expected = dec.model.cpu().decode(dec.embeddings([0]), torch.tensor([0]))
    torch.testing.assert_close(next(engine.float_frames([0])), expected[0], atol=1e-3, rtol=0)


def test_the_table_names_it(coded):
    dec = Decoder(coded, device="cpu")
    assert DECODE.names[0] == "cuda"
    with pytest.raises(RuntimeError, match=r"not for device cpu"):
        DECODE.select("cuda", dec.model, dec.embeddings, torch.device("cpu"), "auto")


def test_networks_with_too_many_stems_are_left_to_others(coded, monkeypatch):
    dec = Decoder(coded, device="cpu")
    assert engine_cuda.rejects(dec.model.spec) is None
    monkeypatch.setattr(engine_cuda, "_MAX_STEM_BYTES", 1000)
    assert "the stems of all 6 frames take" in engine_cuda.rejects(dec.model.spec)
    assert not isinstance(make_engine(dec.model, dec.embeddings, torch.device("cpu")), CudaEngine)


def test_a_gpu_that_fails_is_the_cpu_for_auto_alone(coded, monkeypatch):
    def make_engine(model, embeddings, device, precision):
        if device.type == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return ModuleEngine(model, embeddings, device, precision)

    monkeypatch.setattr(decoder, "resolve_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(decoder, "make_engine", make_engine)
    with pytest.warns(RuntimeWarning, match=r"decoding on the CPU: the GPU has not enough memory"):
        dec = Decoder(coded)
    assert dec.device == torch.device("cpu")
    assert dec[0].shape == dec.shape[1:]
    with pytest.raises(torch.OutOfMemoryError):
        Decoder(coded, device="cuda")
