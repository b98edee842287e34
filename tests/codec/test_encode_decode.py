"""The codec from frames to frames: what is promised of a file and of its decoder."""

from __future__ import annotations

import dataclasses
import gc
import math
import os
import subprocess
import sys
import threading
import weakref
from fractions import Fraction

import numpy as np
import pytest
import torch

from hflfnerv import Decoder, EncodeConfig, encode
from hflfnerv.codec import Bitstream, encoder, evaluate, write_bitstream
from hflfnerv.data import load_video
from hflfnerv.errors import BackendUnavailable, CheckpointError, InvalidBitstream
from hflfnerv.models import MODELS, ModelSpec, hflf
from hflfnerv.models.budget import parameter_count
from hflfnerv.train import Trainer

CONFIG = EncodeConfig(size="60k", epochs=2)


@pytest.fixture(scope="module", params=MODELS)
def coded(request, moving_frames):
    return encode(moving_frames, dataclasses.replace(CONFIG, model=request.param), fps=Fraction(30000, 1001))


def test_decoder_is_a_sequence_of_frames(coded, moving_frames):
    dec = Decoder(coded.bitstream)
    assert len(dec) == len(moving_frames)
    assert dec.shape == moving_frames.shape
    assert dec.fps == Fraction(30000, 1001)
    assert dec[0].dtype == np.uint8
    assert dec[0].shape == moving_frames.shape[1:]
    assert dec[1:3].shape == (2, *moving_frames.shape[1:])
    assert dec[4:4].shape == (0, *moving_frames.shape[1:])


def test_any_frame_alone_is_that_frame_of_the_whole(coded):
    whole = Decoder(coded.bitstream)[:]
    for index in range(len(whole)):
        assert np.array_equal(Decoder(coded.bitstream)[index], whole[index])
    dec = Decoder(coded.bitstream)
    assert np.array_equal(dec[-1], whole[-1])
    assert np.array_equal(dec[::-2], whole[::-2])
    assert np.array_equal(dec.frames([3, 0, 3]), whole[[3, 0, 3]])
    assert np.array_equal(dec.frames(np.array([2, 1])), whole[[2, 1]])
    assert np.array_equal(np.stack(list(dec.iter_frames(1, 4))), whole[1:4])
    assert np.array_equal(np.stack(list(dec)), whole)


def test_frames_are_the_callers(coded):
    dec = Decoder(coded.bitstream)
    whole = dec[:]
    for frame in [dec[2], dec[2:3][0], next(dec.iter_frames(2)), *dec]:
        assert frame.flags.writeable
        frame[...] = 7
    assert np.array_equal(dec[:], whole)


def test_threads_share_a_decoder(coded):
    dec = Decoder(coded.bitstream, device="cpu", precision="fp32")
    expected, found = dec[:], []

    def work():
        for index in 2 * list(range(len(dec))):
            found.append(np.array_equal(dec[index], expected[index]))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert found == [True] * 4 * 2 * len(dec)


def test_float_frames_are_what_is_rounded(coded):
    dec = Decoder(coded.bitstream)
    images = dec.float_frames([4, -6])
    assert images.dtype == torch.float32
    expected = images.clamp(0, 1).mul(255).round().permute(0, 2, 3, 1).numpy()
    assert np.array_equal(dec.frames([4, 0]), expected)
    assert dec.float_frames([]).shape == (0, 3, *dec.shape[1:3])


def test_decoder_rejects(coded):
    dec = Decoder(coded.bitstream)
    for index in (6, -7):
        with pytest.raises(IndexError, match=r"in -6\.\.5"):
            dec[index]
    with pytest.raises(TypeError, match="integer"):
        dec.frames([1.5])
    for frames in (dec.frames, dec.float_frames):
        with pytest.raises(TypeError, match=r"indices must be a sequence of integers, got 5; one frame is dec\[5\]"):
            frames(5)
    for source in (0, None, [coded.bitstream]):
        with pytest.raises(TypeError, match="source must be a path, or the bytes of a file, got"):
            Decoder(source)
    with pytest.raises(ValueError, match="precision"):
        Decoder(coded.bitstream, precision="fp8")
    with pytest.raises(ValueError, match="device"):
        Decoder(coded.bitstream, device="tpu")
    with pytest.raises((BackendUnavailable, RuntimeError), match="cuda"):
        Decoder(coded.bitstream, device="cuda:99")


def test_file_and_bytes_decode_alike(coded, tmp_path):
    coded.save(tmp_path / "clip.hflf")
    assert (tmp_path / "clip.hflf").read_bytes() == coded.bitstream
    assert np.array_equal(Decoder(tmp_path / "clip.hflf")[:], Decoder(coded.bitstream)[:])


def test_report_is_of_the_decoded_file(coded, moving_frames):
    report = coded.report
    dec = Decoder(coded.bitstream, precision="fp32")
    quality = evaluate(dec, torch.from_numpy(moving_frames))
    mse = ((dec[:].astype(float) - moving_frames) ** 2).mean(axis=(1, 2, 3))
    assert report["psnr_db"] == quality["psnr_db"] == pytest.approx(np.mean(10 * np.log10(255**2 / mse)), abs=1e-9)
    assert report["bytes"] == len(coded.bitstream) == sum(report["section_bytes"].values())
    assert report["bits_per_pixel"] == 8 * len(coded.bitstream) / np.prod(moving_frames.shape[:3])
    assert report["ms_ssim"] is None  # 48 rows are too few for five scales
    assert set(report["seconds"]) == {"load", "train", "code", "check"}


def test_header_tells_how_it_was_made(coded, moving_frames):
    header = Bitstream.open(coded.bitstream).header
    assert (header.frames, header.height, header.width) == moving_frames.shape[:3]
    assert header.training["epochs"] == 2
    assert header.preset == CONFIG.preset == "best"
    assert header.writer.startswith("hflfnerv ")
    assert header.source.crop is None


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_is_close(coded, precision):
    exact = Decoder(coded.bitstream)[:].astype(int)
    # A unit roundoff of 2^-8 (bf16) in a few layers moves a sample in [0, 1] by some hundredths at the most.
    assert np.abs(Decoder(coded.bitstream, precision=precision)[:] - exact).max() <= 255 * 0.04


def test_weights_are_quantised_as_asked(moving_frames):
    for bits in ((8, 6), (4, 3)):
        config = dataclasses.replace(CONFIG, weight_bits=bits[0], embedding_bits=bits[1])
        stream = Bitstream.open(encode(moving_frames, config).bitstream)
        assert all(int(tensor.symbols.max()) < 2 ** bits[0] for tensor in stream.read_weights().values())
        assert int(stream.read_quantized_embeddings().symbols.max()) < 2 ** bits[1]


def test_coders_give_the_same_frames(moving_frames):
    pytest.importorskip("constriction")
    files = [
        encode(moving_frames, dataclasses.replace(CONFIG, entropy=name)).bitstream for name in ("huffman", "range")
    ]
    assert Bitstream.open(files[1]).entropy == "range"
    assert np.array_equal(Decoder(files[0])[:], Decoder(files[1])[:])


def test_selection(moving_frames):
    config = dataclasses.replace(CONFIG, frames=(1, 5), resize=(24, 40), crop=(17, 31))
    dec = Decoder(encode(moving_frames, config).bitstream)
    assert dec.shape == (4, 17, 31, 3)
    source = dec.header.source
    assert (source.height, source.width, source.first_frame) == (48, 64, 1)
    assert source.resize == (24, 40)
    assert source.crop == (4, 4, 17, 31)


def test_same_seed_same_file(moving_frames):
    assert encode(moving_frames, CONFIG).bitstream == encode(moving_frames, CONFIG).bitstream
    other = encode(moving_frames, dataclasses.replace(CONFIG, seed=2))
    assert other.bitstream != encode(moving_frames, CONFIG).bitstream


def test_workdir_resumes_and_guards(moving_frames, tmp_path):
    config = dataclasses.replace(CONFIG, workdir=tmp_path / "work")
    first = encode(moving_frames, config)
    assert encode(moving_frames, config).bitstream == first.bitstream
    with pytest.raises(CheckpointError, match="another run"):
        encode(moving_frames, dataclasses.replace(config, epochs=3))


def test_tensorboard(moving_frames, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result = encode(moving_frames, dataclasses.replace(CONFIG, tensorboard=tmp_path))
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    logged = [(event.step, event.value) for event in events.Scalars("train/psnr_db")]
    expected = [(epoch["epoch"], pytest.approx(epoch["psnr_db"], rel=1e-6)) for epoch in result.report["epochs"]]
    assert logged == expected


def rewritten(data, **changes):
    """The same file with another header."""
    stream = Bitstream.open(data)
    header = dataclasses.replace(stream.header, **changes)
    embeddings = None if stream.embedding_shape is None else stream.read_quantized_embeddings()
    return write_bitstream(header, stream.read_weights(), embeddings)


def test_a_header_that_does_not_fit_is_refused(coded):
    header = Bitstream.open(coded.bitstream).header
    spec = dict(header.model)
    bad_specs = [
        {"model": "unknown"},
        spec | {"model": "hnerv" if spec["model"] == "hflf" else "hflf"},
        spec | {"height": spec["height"] + 1},
        spec | {"frames": 10**9},
        spec | {"streams": {}},
    ]
    for bad in bad_specs:
        with pytest.raises(InvalidBitstream, match="network"):
            Decoder(rewritten(coded.bitstream, model=bad))
    wider = {name: dict(stream) for name, stream in spec["streams"].items()}
    name = next(iter(wider))
    wider[name]["widths"] = [width + 1 for width in wider[name]["widths"]]
    with pytest.raises(InvalidBitstream, match="shape"):
        Decoder(rewritten(coded.bitstream, model=spec | {"streams": wider}))


_UNDER_A_LIMIT = """
import resource, sys
from pathlib import Path
from hflfnerv.codec import Bitstream, load_model
from hflfnerv.errors import InvalidBitstream

good, huge = (Path(name).read_bytes() for name in sys.argv[1:])
load_model(Bitstream.open(good))  # what is loaded or started the first time is not what is measured
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 2**26
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    load_model(Bitstream.open(huge))
except InvalidBitstream as error:
    print(error)
"""


def test_a_huge_claim_allocates_nothing(coded, tmp_path):
    """Networks of a gigabyte, within every limit of a header, of which the file has no weights."""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("needs /proc to know how much memory is taken")
    spec = dict(Bitstream.open(coded.bitstream).header.model)
    streams = {name: dict(stream) for name, stream in spec["streams"].items()}
    for stream in streams.values():
        per_pair = sum((s * k) ** 2 for s, k in zip(stream["strides"], stream["kernels"], strict=True))
        stream["widths"] = [math.isqrt(2**27 // per_pair)] * len(stream["widths"])
    huge = ModelSpec.from_dict(spec | {"streams": streams})
    assert 4 * parameter_count(huge) > 2**28
    names = [tmp_path / "good.hflf", tmp_path / "huge.hflf"]
    for name, data in zip(names, (coded.bitstream, rewritten(coded.bitstream, model=huge.to_dict())), strict=True):
        name.write_bytes(data)
    command = [sys.executable, "-c", _UNDER_A_LIMIT, *map(str, names)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("the weights must fit the network"), done.stderr


def test_missing_coder_is_told_before_training(moving_frames, monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    trained = []

    class Observer:
        def stage(self, name):
            trained.append(name)

        def step(self, trainer):
            pass

    with pytest.raises(BackendUnavailable, match="constriction"):
        encode(moving_frames, dataclasses.replace(CONFIG, entropy="range"), observer=Observer())
    assert trained == []


@pytest.mark.parametrize(
    ("shape", "change", "message"),
    [
        ((1, 8, 16400, 3), {"size": "150k"}, r"width must be in 1\.\.16384, got 16400"),
        ((2, 48, 64, 3), {"size": "200M"}, "size must give at most 134217728 weights"),
        (
            (2, 48, 64, 3),
            {"size": "200M", "model": "nerv", "preset": "paper"},
            "size must give at most 134217728 weights",
        ),
    ],
)
def test_limits_of_the_format_are_told_before_training(shape, change, message):
    stages = []

    class Observer:
        def stage(self, name):
            stages.append(name)

        def step(self, trainer):
            pass

    with pytest.raises(ValueError, match=message):
        encode(np.zeros(shape, np.uint8), dataclasses.replace(CONFIG, **change), observer=Observer())
    assert stages == ["load"]


def test_any_frame_rate_is_stored(moving_frames):
    config = dataclasses.replace(CONFIG, epochs=1)
    for given, stored in (
        (Fraction(29.97), Fraction(2997, 100)),
        (Fraction(10**10 + 1, 4 * 10**10), Fraction(1, 4)),
        (Fraction(999_999 * 10**9 + 1, 10**9), Fraction(999_999)),
    ):
        assert Bitstream.open(encode(moving_frames[:1], config, fps=given).bitstream).header.fps == stored


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "x"}, "model must be one of"),
        ({"preset": "x"}, "preset must be one of"),
        ({"size": "big"}, "size must be"),
        ({"size": 0}, "size must be"),
        ({"epochs": 0}, "epochs must be"),
        ({"lr": 0.0}, "lr must be"),
        ({"lr": float("nan")}, "lr must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"weight_bits": 13}, "weight_bits must be"),
        ({"embedding_bits": 1}, "embedding_bits must be"),
        ({"crop": (0, 4)}, "crop must be"),
        ({"resize": (4,)}, "resize must be"),
        ({"highpass_removed": 1.5}, "highpass_removed must be"),
        ({"quantization_share": 1.5}, r"quantization_share must be in \[0, 1\], got 1.5"),
        ({"quantization_share": float("nan")}, "quantization_share must be"),
        ({"rate_weight": -0.5}, "rate_weight must be at least 0, got -0.5"),
        ({"rate_weight": float("inf")}, "rate_weight must be"),
        ({"entropy": "zip"}, "entropy must be one of"),
        ({"precision": "fp8"}, "precision must be one of"),
        ({"seed": -1}, "seed must be"),
        ({"optimizer": "sgd"}, "optimizer must be one of"),
        ({"schedule": "step"}, "schedule must be one of"),
        ({"encoder_input": "x"}, "encoder_input must be one of"),
        ({"untagged_matrix": "bt2020"}, "untagged_matrix must be one of bt601, bt709"),
        ({"model": "nerv", "encoder_input": "frame"}, "encoder_input must be None for model 'nerv'"),
    ],
)
def test_config_rejects(change, message):
    with pytest.raises(ValueError, match=message):
        EncodeConfig(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": None}, "size must be a number or text such as 1.5M, got None"),
        ({"epochs": 1.5}, "epochs must be an integer, got 1.5"),
        ({"epochs": None}, "epochs must be an integer, got None"),
        ({"seed": True}, "seed must be an integer, got True"),
        ({"lr": "a"}, "lr must be a number, got 'a'"),
        ({"lr": True}, "lr must be a number, got True"),
        ({"highpass_removed": None}, "highpass_removed must be a number, got None"),
        ({"crop": 5}, r"crop must be \(height, width\), got 5"),
        ({"resize": "64"}, r"resize must be \(height, width\), got '64'"),
    ],
)
def test_config_rejects_types(change, message):
    with pytest.raises(TypeError, match=message):
        EncodeConfig(**change)


def test_config_holds_numbers_of_python():
    config = EncodeConfig(
        size=np.int64(60_000), epochs=np.int64(3), lr=np.float32(0.5), crop=np.array([4, 6]).tolist(), batch_size=None
    )
    assert (config.parameters, config.epochs, config.lr, config.crop) == (60_000, 3, 0.5, (4, 6))
    assert (type(config.epochs), type(config.lr), config.batch_size) == (int, float, None)


def test_presets_fill_in_what_is_not_given():
    paper = EncodeConfig(preset="paper").resolved()
    assert (paper.optimizer, paper.lr, paper.batch_size, paper.encoder_input) == ("adam", 2e-3, 1, "highpass")
    best = EncodeConfig().resolved()
    assert (best.optimizer, best.lr, best.batch_size, best.encoder_input) == ("muon", 0.02, 1, "frame")
    assert (paper.schedule, best.schedule) == ("cosine", "linear")
    assert EncodeConfig(schedule="cosine").resolved().schedule == "cosine"
    assert (paper.quantization_share, paper.rate_weight) == (0, 0)
    assert (best.quantization_share, best.rate_weight) == (0.3, 0.5)
    assert EncodeConfig(rate_weight=0.0).resolved().rate_weight == 0
    assert EncodeConfig(preset="paper", quantization_share=0.5).resolved().quantization_share == 0.5
    assert EncodeConfig(encoder_input="highpass").resolved().encoder_input == "highpass"
    assert EncodeConfig(lr=0.01).resolved().lr == 0.01
    assert EncodeConfig(optimizer="adam", lr=1e-3).resolved().optimizer == "adam"
    with pytest.raises(ValueError, match=r"lr must be given with optimizer 'adam', got None"):
        EncodeConfig(optimizer="adam").resolved()


def test_long_training_has_larger_batches():
    def settings(frames, height=640, **options):
        config = EncodeConfig(**options).resolved((frames, height, 2 * height))
        return config.batch_size, pytest.approx(config.lr), pytest.approx(config.weight_decay)

    root = 2**0.5
    assert settings(132, epochs=300) == (4, 0.04, 0.06)  # 9,900 steps
    assert settings(132, epochs=151) == (2, 0.02 * root, 0.03 * root)  # four frames would leave 4,983
    assert settings(132, epochs=75) == (1, 0.02, 0.03)  # and two 4,950
    assert settings(3, epochs=20_000) == (2, 0.02 * root, 0.03 * root)  # no more than there are
    assert settings(132, 641, epochs=300) == (2, 0.02 * root, 0.03 * root)  # nor than a device has room for
    assert settings(132, epochs=300, batch_size=1) == (1, 0.02, 0.03)
    assert settings(132, epochs=300, batch_size=9, weight_decay=0.0) == (9, 0.06, 0.0)
    assert settings(132, epochs=300, lr=0.03) == (1, 0.03, 0.03)
    assert settings(132, epochs=300, preset="paper") == (1, 2e-3, 0.0)
    assert settings(132, epochs=300, preset="paper", model="hnerv", batch_size=4) == (4, 1e-3, 0.0)
    assert settings(132, epochs=300, optimizer="adam", lr=1e-3) == (1, 1e-3, 0.03)


def test_the_report_tells_the_batch_of_the_training(moving_frames, monkeypatch):
    monkeypatch.setattr("hflfnerv.config._FEWEST_STEPS", 4)
    config = encode(moving_frames[:4], EncodeConfig(size=60_000, epochs=2)).report["config"]
    assert (config["batch_size"], config["lr"]) == (2, pytest.approx(0.02 * 2**0.5))


@pytest.mark.parametrize(("text", "value"), [("1.5M", 1_500_000), ("300k", 300_000), ("42", 42), (0.5e6, 500_000)])
def test_sizes(text, value):
    assert EncodeConfig(size=text).parameters == value


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_rate_counts(moving_frames, share):
    files = []
    for weight in (0.1, 1.0):
        config = dataclasses.replace(CONFIG, epochs=4, quantization_share=share, rate_weight=weight)
        result = encode(moving_frames, config)
        stream = Bitstream.open(result.bitstream)
        assert stream.header.training["rate_weight"] == weight
        assert result.report["config"]["quantization_share"] == share
        bits = {tensor.bits for tensor in stream.read_weights().values()}
        assert max(bits) <= 8
        assert min(bits) < 5
        files.append(result)
    if share < 1:
        assert files[1].report["bytes"] < files[0].report["bytes"]
    else:  # steps for weights that nothing has trained yet: by seed, one file or the other is some 0.3 % smaller
        assert files[1].bitstream != files[0].bitstream
    assert encode(moving_frames, config).bitstream == files[1].bitstream


def test_trained_for_few_bits(moving_frames):
    results = []
    for share in (0.0, 0.5):
        config = dataclasses.replace(CONFIG, epochs=30, weight_bits=4, quantization_share=share, rate_weight=0.0)
        results.append(encode(moving_frames, config).report)
    assert results[1]["psnr_db"] > results[0]["psnr_db"] + 0.5
    assert results[1]["bytes"] < 1.1 * results[0]["bytes"]


def test_a_crop_that_does_not_fit_is_said_to_be_that():
    frames = np.zeros((2, 40, 60, 3), np.uint8)
    with pytest.raises(
        ValueError, match=r"crop must be at least 1x1 and fit into the frames of 40x60 .*, got 640x1280"
    ):
        encode(frames, EncodeConfig(size="60k", crop=(640, 1280)))


def test_config_must_be_one():
    with pytest.raises(TypeError, match="config must be an EncodeConfig, got dict"):
        encode(np.zeros((2, 40, 60, 3), np.uint8), {"size": "60k"})


def test_a_file_with_one_embedding_is_the_dual_stream_s_too(moving_frames, monkeypatch):
    """As ``best`` wrote them before it had a finer embedding."""
    monkeypatch.setattr(hflf, "_DETAIL_CHANNELS", 0)
    result = encode(moving_frames, CONFIG)
    monkeypatch.undo()
    stream = Bitstream.open(result.bitstream)
    assert b"detail" not in stream.header.to_json()
    assert stream.embedding_shape[0] == 16
    assert Decoder(result.bitstream)[:].shape == moving_frames.shape


@pytest.mark.parametrize("encoder_input", ["frame", "highpass"])
def test_a_crop_is_of_the_frames_that_an_uncropped_clip_has(encoder_input, moving_frames, monkeypatch):
    cropped = moving_frames[:, 10:39, 12:53]
    loaded, seen = [], []
    config = dataclasses.replace(CONFIG, epochs=1, crop=(29, 41), encoder_input=encoder_input)

    def load(*arguments, **options):
        loaded.append(load_video(*arguments, **options))
        return loaded[-1]

    def trainer(model, clip, *arguments, **options):
        # What was loaded is gone but for the clip.
        loaded[:] = [weakref.ref(loaded[0]), loaded[0].shape]
        gc.collect()
        seen.append(clip)
        return Trainer(model, clip, *arguments, **options)

    monkeypatch.setattr(encoder, "load_video", load)
    monkeypatch.setattr(encoder, "Trainer", trainer)
    data = encode(moving_frames, config).bitstream
    assert torch.equal(seen[0].frames, torch.from_numpy(cropped))
    assert loaded[0]() is None
    assert loaded[1] == ((6, 29, 41) if encoder_input == "frame" else (6, 48, 64))
    if encoder_input == "frame":
        # Bit for bit the network of the clip that was cropped before.
        monkeypatch.undo()
        other = encode(cropped, dataclasses.replace(config, crop=None)).bitstream
        assert np.array_equal(Decoder(data)[:], Decoder(other)[:])
    source = Bitstream.open(data).header.source
    assert (source.height, source.width, source.crop) == (48, 64, (10, 12, 29, 41))


@pytest.mark.parametrize("encoder_input", ["frame", "highpass"])
def test_a_crop_that_does_not_fit_is_named(encoder_input, moving_frames):
    with pytest.raises(ValueError, match=r"crop must be .* fit into the frames of 48x64"):
        encode(moving_frames, dataclasses.replace(CONFIG, crop=(49, 64), encoder_input=encoder_input))
