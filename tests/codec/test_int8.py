"""Decoding in int8: which blocks, their ranges, the frames they make, and what that costs."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hflfnerv import Decoder, EncodeConfig, encode
from hflfnerv.codec.convert import convert_checkpoint
from hflfnerv.codec.engine import DECODE, make_engine
from hflfnerv.codec.engine_cuda import CudaEngine
from hflfnerv.codec.int8_stream import first_int8_block
from hflfnerv.data import load_video
from hflfnerv.errors import BackendUnavailable
from hflfnerv.metrics import psnr
from hflfnerv.models import MODELS, ModelSpec, StreamSpec
from hflfnerv.ops import Int8Range
from hflfnerv.testing import requires

CPU = torch.device("cpu")
CONFIG = EncodeConfig(size="60k", epochs=1, device="cpu", precision="fp32")


@pytest.fixture(scope="module", params=["paper", "best", "hnerv"])
def coded(request, moving_frames):
    model, preset = ("hnerv", "paper") if request.param == "hnerv" else ("hflf", request.param)
    return encode(moving_frames, dataclasses.replace(CONFIG, model=model, preset=preset)).bitstream


def test_the_large_blocks_are_chosen():
    hnerv, ours = (MODELS[name].plan(1_500_000, 132, 640, 1280) for name in ("hnerv", "hflf"))
    assert first_int8_block(hnerv, "decoder") == 2  # the blocks that make 40x80, 160x320, 320x640 larger
    assert first_int8_block(ours, "hfd") == 2
    # The others make a few hundredths of the multiplications.
    shares = [first_int8_block(ours, name) for name in ("lfd1", "lfd2")]
    assert shares[0] is None
    small_last = StreamSpec((8, 8), (64, 64, 4), (2, 1), (3, 1))
    assert first_int8_block(ModelSpec("hnerv", 2, 16, 16, 4, {"decoder": small_last}), "decoder") is None


def quantised_by_hand(model, stem, name, first, engine_stream):
    """The stream in float64 with every activation and weight that int8 rounds rounded by plain arithmetic.

    Which way an activation near the middle between two steps falls is the engine's to say, not any other's.
    """
    stream, rounded = copy.deepcopy(model.get_submodule(name)).double(), None
    x = stem.double()
    for index, block in enumerate(stream.blocks):
        weight, padding = block.conv.weight, block.conv.kernel_size[0] // 2
        if index >= first:
            rounded = engine_stream._images_for(x) if rounded is None else rounded
            of, image = engine_stream._ranges[index - first], rounded[index - first]
            scale, zero = (t.double()[:, None, None] for t in (of.scale, of.zero_point))
            inside = image[:, :, padding : image.shape[2] - padding, padding : image.shape[3] - padding].double()
            # Half a step, and what float32 sums of a hundred terms may be off of 255 steps.
            assert ((x / scale + zero).clamp(-128, 127) - inside).abs().max() <= 0.5 + 255 * 100 * 2**-24
            x = (inside - zero) * scale
            folded = weight * scale
            step = folded.abs().amax(dim=(1, 2, 3), keepdim=True) / 127
            weight = (folded / step).round() * step / scale
        x = F.gelu(F.pixel_shuffle(F.conv2d(x, weight, block.conv.bias, padding=padding), block.upscale_factor))
    return stream.head(x)


def test_frames_are_those_of_rounded_values(coded):
    exact = Decoder(coded, device="cpu", precision="fp32")
    engine = Decoder(coded, device="cpu", precision="int8").engine
    assert isinstance(engine, CudaEngine)
    model, spec = exact.model, exact.model.spec
    stems = model.stems(exact.embeddings(range(spec.frames)), torch.arange(spec.frames))
    firsts = [first_int8_block(spec, name) for name in spec.streams]
    assert any(first is not None for first in firsts)
    for name, stem, first, engine_stream in zip(spec.streams, stems, firsts, engine._streams, strict=True):
        if first is None:
            continue
        inputs = [stem]
        for block in model.get_submodule(name).blocks[:-1]:
            inputs.append(block(inputs[-1]))
        # All six frames are among the sixteen from which ranges are taken.
        for x, of in zip(inputs[first:], engine_stream._ranges, strict=True):
            expected = Int8Range.of(x.amin(dim=(0, 2, 3)), x.amax(dim=(0, 2, 3)))
            torch.testing.assert_close(of.scale, expected.scale)
            assert (of.zero_point.int() - expected.zero_point.int()).abs().max() <= 1
    for index in range(spec.frames):
        (frame,) = engine.float_frames([index])
        images = [
            model.get_submodule(name).finish(stem[index : index + 1])
            if first is None
            else quantised_by_hand(model, stem[index : index + 1], name, first, engine_stream).float()
            for name, stem, first, engine_stream in zip(spec.streams, stems, firsts, engine._streams, strict=True)
        ]
        streams = [image[0, :, : spec.height, : spec.width] for image in images]
        if len(streams) == 3:
            expected = streams[0].tanh() + (streams[1] + streams[2]).tanh() / 2 + 0.5
        else:
            expected = sum(streams).tanh() / 2 + 0.5
        # The error of tanh, and far less than rounding to 8 bits changes.
        assert (frame - expected).abs().max() <= 2e-6
        assert (frame - exact.float_frames([index])[0]).abs().max() >= 1e-5


def test_a_frame_does_not_depend_on_the_others(coded):
    engine = Decoder(coded, device="cpu", precision="int8").engine
    alone = [next(engine.frames([index])) for index in (4, 1)]
    engine.batch_size = 3
    together = list(engine.frames([1, 4, 4]))
    for frame, other in zip((alone[1], alone[0], alone[0]), together, strict=True):
        # On 8-bit integers they are the same; the blocks before them may be summed in another order in a batch.
        assert np.abs(frame.astype(int) - other).max() <= 1


def test_it_is_never_chosen_by_itself(coded):
    decoder = Decoder(coded, device="cpu")
    arguments = (decoder.model, decoder.embeddings, CPU)
    for precision in ("auto", "fp32", "bf16", "fp16"):
        assert DECODE.select("auto", *arguments, precision).name != "int8"
    assert DECODE.select("auto", *arguments, "int8").name == "int8"
    with pytest.raises(ValueError, match="precision must be one of"):
        make_engine(*arguments, "int4")


def test_a_network_without_large_blocks_says_so(coded, monkeypatch):
    monkeypatch.setattr("hflfnerv.codec.engine_cuda.first_int8_block", lambda spec, name: None)
    with pytest.raises(BackendUnavailable, match="the network has no upsampling block to run in int8"):
        Decoder(coded, device="cpu", precision="int8")


@pytest.mark.skipif(not torch.cuda.is_available() and not requires("cuda"), reason="no CUDA device")
def test_on_the_device(coded):
    frames = [Decoder(coded, device=device, precision="int8").frames(range(6)) for device in ("cpu", "cuda")]
    difference = np.abs(frames[0].astype(int) - frames[1])
    assert (difference <= 1).mean() >= 0.999
    assert difference.max() <= 4


@pytest.mark.shared_data
def test_the_published_network(shared_data):
    """It costs less than 0.1 dB."""
    coded = convert_checkpoint(shared_data / "hnerv_bunny_1.5m.pth")
    video = load_video(shared_data / "bunny.mp4", crop=(640, 1280)).frames
    chosen = [0, 48, 84]
    found = []
    for precision in ("fp32", "int8"):
        frames = Decoder(coded, device="cpu", precision=precision).frames(chosen)
        found.append(np.mean([psnr(frames[i], np.asarray(video[t])) for i, t in enumerate(chosen)]))
    assert found[0] - 0.1 <= found[1] <= found[0]
