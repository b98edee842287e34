"""Importing checkpoints: from the file that others published to frames."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from published_checkpoints import published_names

from hflfnerv import Decoder
from hflfnerv.cli import main
from hflfnerv.codec import Source, convert_checkpoint
from hflfnerv.data import VideoWriter, load_video, write_frames
from hflfnerv.errors import CheckpointError
from hflfnerv.metrics import psnr
from hflfnerv.models import MODELS, build_model
from hflfnerv.train import prepare_clip


@pytest.mark.shared_data
@pytest.mark.slow
@pytest.mark.parametrize(("entropy", "limit"), [("huffman", 1_456_000), ("range", 1_449_000)])
def test_published_hnerv_decodes_at_its_published_quality(shared_data, tmp_path, capsys, entropy, limit):
    if entropy == "range":
        pytest.importorskip("constriction")
    coded = tmp_path / "bunny.hflf"
    checkpoint = shared_data / "hnerv_bunny_1.5m.pth"
    assert main(["import", str(checkpoint), "-o", str(coded), "--entropy", entropy]) == 0
    assert coded.stat().st_size <= limit
    decoder = Decoder(coded)
    assert decoder.shape == (132, 640, 1280, 3)
    if entropy == "range":  # the same symbols, so the same frames: one is enough
        return
    original = load_video(shared_data / "bunny.mp4", crop=(640, 1280)).frames
    made, rounded = [], []
    for i in range(0, 132, 12):
        frame = original[i].permute(2, 0, 1)[None].float() / 255
        made.append(float(psnr(decoder.float_frames([i]), frame)))
        rounded.append(float(psnr(torch.from_numpy(decoder[i]), original[i])))
    assert np.mean(made) == pytest.approx(33.43, abs=0.01)
    # Rounding to 8 bits adds a mean squared error of 1/12 level^2.
    loss = [10 * np.log10(1 + 1 / (12 * 255**2) * 10 ** (value / 10)) for value in made]
    assert np.mean(rounded) == pytest.approx(np.mean(made) - np.mean(loss), abs=0.002)
    capsys.readouterr()
    assert main(["info", str(coded), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    # The published file holds 8-bit symbols in pickled arrays: entropy coding must pay at least what order 0 says.
    symbols = info["parameters"]["total"]
    assert checkpoint.stat().st_size - info["bytes"] >= symbols - info["paper_symbol_bits"] / 8


@pytest.fixture(params=["hnerv", "hflf"])
def training_checkpoint(request, tmp_path):
    """A training checkpoint in the names of the published code, its network and its clip."""
    torch.manual_seed(0)
    network = MODELS[request.param]
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (3, 160, 320, 3), dtype=np.uint8)
    write_frames(tmp_path / "images", frames, fps=25)
    model = build_model(network.plan(150_000, 3, 160, 320))
    if request.param == "hflf":
        model.time.spec = type(model.time.spec)(1.25, 30, 0)  # the published code's index / T
        model.time.table = model.time._rows(np.arange(3))
    path = tmp_path / "model_latest.pth"
    torch.save({"epoch": 7, "state_dict": published_names(model.state_dict()), "optimizer": {"state": {}}}, path)
    return path, model, frames, tmp_path / "images"


def test_training_checkpoint_decodes_to_its_own_frames(training_checkpoint, tmp_path):
    path, model, frames, images = training_checkpoint
    data = convert_checkpoint(path, reference=images)
    decoder = Decoder(data)
    assert decoder.header.training == {"epochs": 7}
    clip = prepare_clip(torch.from_numpy(frames), model.encoder_input, crop=None, removed=0.8)
    with torch.inference_mode():
        index = torch.arange(3)
        expected = model(clip.inputs(index), index).clamp(0, 1).mul(255).permute(0, 2, 3, 1).numpy()
    # 8-bit weights and 6-bit embeddings move an untrained network's samples by a few levels at most.
    assert np.abs(decoder[:] - expected).mean() < 3
    exact = convert_checkpoint(path, reference=images, weight_bits=8, embedding_bits=8)
    assert np.abs(Decoder(exact)[:] - expected).mean() <= np.abs(decoder[:] - expected).mean() + 0.5


def test_training_checkpoint_of_a_crop(training_checkpoint, tmp_path, capsys):
    path, model, frames, _ = training_checkpoint
    larger = np.pad(frames, ((1, 0), (6, 6), (4, 4), (0, 0)), mode="edge")
    write_frames(tmp_path / "larger", larger, fps=25)
    data = convert_checkpoint(path, reference=tmp_path / "larger", frames=slice(1, None), crop=(160, 320), fps="30/7")
    header = Decoder(data).header
    assert (header.fps, header.source.first_frame, header.source.crop) == (Fraction(30, 7), 1, (6, 4, 160, 320))
    if model.encoder_input == "frame":  # the filter sees more than the crop
        images = convert_checkpoint(path, reference=tmp_path / "images")
        assert np.array_equal(Decoder(data)[:], Decoder(images)[:])
    (tmp_path / "x.hflf").write_bytes(data)
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "x.hflf"), "--reference", str(tmp_path / "larger"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["psnr_db"] > 0


@pytest.fixture
def coded_video(tmp_path):
    """A coded video of HNeRV's code: 3 frames of 160x320."""
    torch.manual_seed(0)
    model = build_model(MODELS["hnerv"].plan(150_000, 3, 160, 320))

    def quantised(tensor, bits):
        scale = (tensor.max() - tensor.min()).clamp(min=1e-3) / (2**bits - 1)
        quant = ((tensor - tensor.min()) / scale).round().clamp(0, 2**bits - 1).to(torch.uint8)
        return {"quant": quant, "min": tensor.min(), "scale": scale}

    renamed = {}
    for name, tensor in model.coded_parameters().items():
        _, part, *rest = name.split(".")
        theirs = {"stem": "decoder.0.conv.downconv.", "head": "head_layer."}.get(part)
        theirs = theirs or f"decoder.{int(rest[0]) + 1}.conv.upconv.0."
        renamed[theirs + rest[-1]] = quantised(tensor.detach(), 8)
    embed = quantised(torch.randn(3, *model.spec.embedding_shape), 6)
    torch.save({"embed": embed, "model": renamed}, tmp_path / "quant_vid.pth")
    return tmp_path / "quant_vid.pth"


def test_a_coded_video_knows_its_original(coded_video, tmp_path, capsys):
    original = np.random.default_rng(0).integers(0, 256, (5, 90, 170, 3), dtype=np.uint8)
    with VideoWriter(tmp_path / "clip.mkv", "30000/1001", (90, 170), sample_aspect_ratio=Fraction(4, 3)) as writer:
        writer.write(original)
    options = ["--frames", "1:4", "--resize", "180x340", "--crop", "160x320"]
    command = ["import", str(coded_video), "--reference", str(tmp_path / "clip.mkv"), "-o", str(tmp_path / "x.hflf")]
    assert main([*command, *options]) == 0
    header = Decoder(tmp_path / "x.hflf").header
    assert abs(header.fps - Fraction(30000, 1001)) < Fraction(1, 100)
    assert header.color.matrix == "bt709"
    assert header.sample_aspect_ratio == Fraction(4, 3)
    assert header.source == Source(90, 170, 1, (180, 340), (10, 10, 160, 320))
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "x.hflf"), "--reference", str(tmp_path / "clip.mkv"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["per_frame"]["psnr_db"]) == 3

    # Without an original nothing is made up.
    header = Decoder(convert_checkpoint(coded_video, fps=1 / 3600)).header
    assert (header.fps, header.color, header.source) == (Fraction(1, 3600), None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"has 3 frames, and 5 of the reference are selected: give --frames"),
        ({"frames": slice(-2, None)}, r"has 3 frames, and 2 of the reference are selected"),
        ({"frames": slice(0, 3)}, r"frames of 160x320 \(height x width\), and those of the reference are 90x170"),
        ({"frames": slice(0, 3), "resize": (320, 160)}, "of the reference are 320x160: give --resize and --crop"),
    ],
)
def test_another_original_is_refused(coded_video, tmp_path, options, message):
    write_frames(tmp_path / "clip.mkv", np.zeros((5, 90, 170, 3), np.uint8), 25)
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(coded_video, reference=tmp_path / "clip.mkv", **options)


def test_training_checkpoint_needs_its_video(training_checkpoint):
    with pytest.raises(CheckpointError, match="--reference"):
        convert_checkpoint(training_checkpoint[0])


def test_import_rejects(tmp_path, capsys):
    (tmp_path / "x.pth").write_bytes(b"nothing")
    assert main(["import", str(tmp_path / "x.pth"), "-o", str(tmp_path / "x.hflf")]) == 1
    assert capsys.readouterr().err.startswith("hflfnerv: error: ")
    assert not (tmp_path / "x.hflf").exists()
