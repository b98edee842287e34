"""The CUDA engine: on the CPU, where it has neither graphs nor streams, and on a GPU where there is one."""

from __future__ import annotations

import copy
import dataclasses
import queue
import threading

import numpy as np
import pytest
import torch

from hflfnerv import Decoder, EncodeConfig, encode
from hflfnerv.codec import decoder, engine_cuda
from hflfnerv.codec.engine import DECODE, ModuleEngine, make_engine
from hflfnerv.codec.engine_cuda import CudaEngine
from hflfnerv.models import MODELS
from hflfnerv.testing import requires

MAX_LENT = engine_cuda._MAX_LENT
VIEWS = {
    "frame": lambda frame: frame,
    "channel": lambda frame: frame[..., 0],
    "flat": lambda frame: frame.reshape(-1),
    "crop of a transpose": lambda frame: frame.transpose(1, 0, 2)[3:9, ::2],
    "other type": lambda frame: frame.view(np.int8)[1:],
    "tensor": torch.from_numpy,
    "DLPack": torch.from_dlpack,
    "tensor and back": lambda frame: torch.from_numpy(frame)[2:].numpy(),
    "memoryview": memoryview,
    "buffer": lambda frame: np.frombuffer(frame, np.uint8),
}
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


one_network = pytest.mark.parametrize("coded", ["hflf"], indirect=True)


def content(view):
    return np.asarray(view).copy()


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


@one_network
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_frame_that_is_held_is_not_written_again(coded, device, batch_size):
    engine, dec = make(coded, device)
    engine.batch_size = batch_size
    expected = dec[:].astype(int)
    rng = np.random.default_rng(batch_size)
    held = []
    for _ in range(5):
        wanted = rng.integers(0, len(dec), 60).tolist()
        reader = engine.frames(wanted)
        for index, frame in zip(wanted[: rng.integers(40, 61)], reader, strict=False):
            assert level_differences([frame], expected[[index]]).max() <= 1
            view = VIEWS[rng.choice(list(VIEWS))](frame)
            held.append((view, content(view)))
            del frame, view
            # Up to few, and up to more than are lent, in turns.
            while len(held) > rng.choice([1, 5, MAX_LENT + 5]):
                view, as_received = held.pop(rng.integers(len(held)))
                assert np.array_equal(view, as_received)
                del view
        reader.close()
    assert held
    for view, as_received in held:
        assert np.array_equal(view, as_received)


@one_network
def test_frames_of_several_readers_and_threads(coded, device):
    engine, dec = make(coded, device)
    engine.batch_size = 2
    expected = dec[:].astype(int)
    received: queue.Queue = queue.Queue()
    wrong = []

    def read(seed):
        rng = np.random.default_rng(seed)
        wanted = rng.integers(0, len(dec), 60).tolist()
        held = []
        try:
            for index, frame in zip(wanted, engine.frames(wanted), strict=True):
                held.append((index, frame))
                if len(held) > rng.integers(8):
                    received.put(held.pop(rng.integers(len(held))))
        finally:
            for item in [*held, None]:
                received.put(item)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for _ in threads:
        while (item := received.get()) is not None:
            wrong.append(level_differences([item[1]], expected[[item[0]]]).max() > 1)
    for thread in threads:
        thread.join()
    assert len(wrong) == 3 * 60
    assert not any(wrong)
    del item
    assert len(engine._lent) == 0


@one_network
@pytest.mark.parametrize("view", VIEWS.values(), ids=list(VIEWS))
def test_a_view_holds_its_frame(coded, device, view):
    engine, _ = make(coded, device)
    first = view(next(engine.frames([0])))
    as_received = content(first)
    assert len(engine._lent) == 1
    for frame in engine.frames([1, 2, 3, 4, 5] * 3):
        assert not np.shares_memory(frame, np.asarray(first))
    assert np.array_equal(first, as_received)
    del frame, first
    assert len(engine._lent) == 0


@one_network
def test_a_reader_that_lets_go_gets_the_memory_that_frames_are_copied_to(coded, device):
    engine, _ = make(coded, device)
    for frame in engine.frames([0, 1, 2, 3, 4, 5] * MAX_LENT):
        assert frame.ctypes.data in engine._lent
        assert len(engine._lent) <= 2
        assert frame.flags.writeable
        assert torch.from_numpy(frame).is_pinned() == (device.type == "cuda")


@one_network
@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_reader_that_keeps_frames_gets_copies(coded, device, batch_size):
    engine, dec = make(coded, device)
    engine.batch_size = batch_size
    wanted = [0, 1, 2, 3, 4, 5] * MAX_LENT
    kept = list(engine.frames(wanted))
    assert [frame.ctypes.data in engine._lent for frame in kept] == [i < MAX_LENT for i in range(len(wanted))]
    assert len({frame.ctypes.data for frame in kept}) == len(wanted)
    assert level_differences(kept, dec.frames(wanted).astype(int)).max() <= 1
    del kept[3]
    lent, copied = engine.frames([0, 1])
    assert lent.ctypes.data in engine._lent
    assert copied.ctypes.data not in engine._lent
    del kept
    assert len(engine._lent) == 1


@one_network
def test_frames_are_their_readers_own_and_outlive_the_engine(coded, device):
    engine, dec = make(coded, device)
    expected = dec[:].astype(int)
    reader = engine.frames([0, 1, 2, 3, 4, 5])
    kept = [next(reader)]
    kept[0][:] = 7
    kept += list(reader)
    assert level_differences([next(engine.frames([0]))], expected[:1]).max() <= 1
    del engine, reader
    assert (kept.pop(0) == 7).all()
    assert level_differences(kept, expected[1:]).max() <= 1


@one_network
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_asynchronous_copy_from_a_frame_that_is_let_go_of(coded, device, batch_size):
    engine, dec = make(coded, device)
    engine.batch_size = batch_size
    wanted = [0, 1, 2, 3, 4, 5] * MAX_LENT
    stream = torch.cuda.Stream(device)

    def upload(frame):
        with torch.cuda.stream(stream):
            return torch.from_numpy(frame).to(device, non_blocking=True)

    with torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)  # cycles, through which the copies wait and their frames are gone
    uploaded = [upload(frame) for frame in engine.frames(wanted)]
    stream.synchronize()
    assert level_differences([frame.cpu() for frame in uploaded], dec.frames(wanted).astype(int)).max() <= 1


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
    expected = copy.deepcopy(dec.model).cpu().decode(dec.embeddings([0]), torch.tensor([0]))  # the engine's own stays
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
