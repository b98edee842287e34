from __future__ import annotations

import math
from collections import OrderedDict
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hflfnerv.codec.bitstream import Bitstream, Header, write_bitstream
from hflfnerv.codec.importer import ImportedModel, read_checkpoint
from hflfnerv.codec.quantization import dequantize
from hflfnerv.errors import CheckpointError
from hflfnerv.models import build_model

_STRIDES = (5, 4, 4, 2, 2)


def _hnerv_state(widths: tuple[int, ...] = (14, 12, 12, 12, 12, 12), prefix: str = "") -> dict[str, torch.Tensor]:
    """A decoder under the names of HNeRV's code."""
    torch.manual_seed(0)
    state = {"decoder.0.conv.downconv.weight": torch.randn(widths[0], 16, 1, 1)}
    state["decoder.0.conv.downconv.bias"] = torch.randn(widths[0])
    for i, (stride, kernel) in enumerate(zip(_STRIDES, (1, 3, 5, 5, 5), strict=True)):
        out = widths[i + 1] * stride**2
        state[f"decoder.{i + 1}.conv.upconv.0.weight"] = torch.randn(out, widths[i], kernel, kernel)
        state[f"decoder.{i + 1}.conv.upconv.0.bias"] = torch.randn(out)
    state["head_layer.weight"], state["head_layer.bias"] = torch.randn(3, widths[-1], 3, 3), torch.randn(3)
    return {prefix + name: 0.1 * tensor for name, tensor in state.items()}


def _nvr_state() -> dict[str, torch.Tensor]:
    state = _hnerv_state()
    for number, (features, widths) in enumerate([(20, (3, 2, 2, 2, 2)), (40, (4, 3, 3, 2, 2))], start=1):
        name = f"lr_decoder{number}"
        state[f"{name}.0.0.weight"], state[f"{name}.0.0.bias"] = (
            torch.randn(50 * widths[0], features),
            torch.randn(50 * widths[0]),
        )
        for i, (stride, kernel) in enumerate(zip((4, 4, 4, 2), (3, 5, 5, 5), strict=True)):
            state[f"{name}.{i + 1}.conv.upconv.0.weight"] = torch.randn(
                widths[i + 1] * stride**2, widths[i], kernel, kernel
            )
            state[f"{name}.{i + 1}.conv.upconv.0.bias"] = torch.randn(widths[i + 1] * stride**2)
        state[f"lr_head_layer{number}.weight"], state[f"lr_head_layer{number}.bias"] = (
            torch.randn(3, widths[-1], 3, 3),
            torch.randn(3),
        )
    return state  # fmt: skip


def _encoder_state() -> dict[str, torch.Tensor]:
    return {
        "encoder.downsample_layers.0.0.weight": torch.randn(64, 3, 5, 5),
        "encoder.stages.0.0.gamma": torch.ones(64),
    }


def _quantised(tensor: torch.Tensor, bits: int, axis: int | None) -> dict[str, torch.Tensor]:
    if axis is None:
        minimum, scale = tensor.min(), (tensor.max() - tensor.min()) / (2**bits - 1)
    else:
        minimum = tensor.min(axis, keepdim=True)[0]
        scale = ((tensor.max(axis, keepdim=True)[0] - minimum) / (2**bits - 1)).half()
        minimum = minimum.half()
    quant = ((tensor - minimum) / scale).round().clamp(0, 2**bits - 1).to(torch.uint8)
    return {"quant": quant, "min": minimum, "scale": scale}


def _coded(state: dict[str, torch.Tensor], frames: int = 6) -> dict[str, Any]:
    model = OrderedDict((k, _quantised(v, 8, i % 2 if v.ndim > 1 else None)) for i, (k, v) in enumerate(state.items()))
    return {"embed": _quantised(torch.randn(frames, 16, 2, 4), 6, 0), "model": model}


def _save(tmp_path: Path, data: object) -> Path:
    path = tmp_path / "checkpoint.pth"
    torch.save(data, path)
    return path


def _loads_into_the_network(imported: ImportedModel, **size: int) -> None:
    model = build_model(imported.spec(**size), with_encoder=False)
    assert {name: tuple(p.shape) for name, p in model.coded_parameters().items()} == imported.shapes
    assert list(model.coded_parameters()) == list(imported.shapes)


def test_coded_video(tmp_path: Path) -> None:
    data = _coded(_hnerv_state())
    imported = read_checkpoint(_save(tmp_path, data))
    assert imported.model == "hnerv"
    spec = imported.spec()
    assert (spec.frames, spec.height, spec.width) == (6, 640, 1280)
    stream = spec.streams["decoder"]
    assert stream.grid == (2, 4)
    assert (stream.widths, stream.strides, stream.kernels) == ((14, 12, 12, 12, 12, 12), _STRIDES, (1, 3, 5, 5, 5))
    _loads_into_the_network(imported)
    assert imported.weights is not None
    theirs = data["model"]["decoder.2.conv.upconv.0.weight"]
    ours = imported.weights["decoder.blocks.1.conv.weight"]
    assert np.array_equal(ours.symbols, theirs["quant"].numpy())
    assert ours.step.arrays[0].tobytes() == theirs["min"].numpy().tobytes()
    assert ours.step.arrays[1].tobytes() == theirs["scale"].numpy().tobytes()
    expected = theirs["min"].float() + theirs["scale"].float() * theirs["quant"]
    assert torch.equal(torch.from_numpy(dequantize(ours)), expected)
    assert imported.embeddings is not None
    assert (imported.embeddings.bits, ours.bits) == (6, 8)
    with pytest.raises(CheckpointError, match="embeddings of 6 frames, not of 7"):
        imported.spec(frames=7)


@pytest.mark.parametrize("prefix", ["", "module.", "module.blocks.0."])
def test_hnerv_training_checkpoint(tmp_path: Path, prefix: str) -> None:
    state = {**_encoder_state(), **_hnerv_state()}
    data = {"epoch": 300, "state_dict": {prefix + name: tensor for name, tensor in state.items()}, "optimizer": {}}
    imported = read_checkpoint(_save(tmp_path, data))
    assert (imported.model, imported.weights, imported.embeddings, imported.epoch) == ("hnerv", None, None, 300)
    assert imported.float_weights is not None
    assert np.array_equal(imported.float_weights["decoder.stem.weight"], state["decoder.0.conv.downconv.weight"])
    assert set(imported.encoder) == set(_encoder_state())
    _loads_into_the_network(imported, frames=10, height=320, width=640)
    with pytest.raises(ValueError, match="frames, height and width must be given"):
        imported.spec()
    with pytest.raises(CheckpointError, match="upscales by 320, which does not divide 480 x 640"):
        imported.spec(frames=1, height=480, width=640)


def test_nvr_rrcp_training_checkpoint(tmp_path: Path) -> None:
    imported = read_checkpoint(_save(tmp_path, {"epoch": 1, "state_dict": {**_encoder_state(), **_nvr_state()}}))
    assert imported.model == "hflf"
    spec = imported.spec(frames=80, height=640, width=1280)
    assert spec.time is not None
    assert (spec.time.base, spec.time.levels, spec.time.first, spec.time_split) == (1.25, 30, 0, 10)
    assert spec.streams["lfd1"].widths == (3, 2, 2, 2, 2)
    assert spec.streams["lfd2"].strides == (4, 4, 4, 2)
    assert spec.streams["hfd"].grid == (2, 4)
    _loads_into_the_network(imported, frames=80, height=640, width=1280)
    with pytest.raises(CheckpointError, match="makes 640 x 1280 frames, not 320 x 640"):
        imported.spec(frames=1, height=320, width=640)


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"weights": 1}, "must be a quant_vid.pth"),
        ([1, 2], "must be a quant_vid.pth"),
        ({"state_dict": {"conv1.weight": torch.ones(3)}}, "'conv1.weight' belongs to no supported network"),
        ({"state_dict": {}}, "stem, blocks and head of the stream decoder"),
        ({"state_dict": {"head_layer.weight": "x"}}, "must be a tensor of finite floats"),
        ({"embed": {}, "model": {}}, "embed must hold the tensors"),
        ({"state_dict": {**_hnerv_state(), "head_layer.bias": torch.tensor([math.nan] * 3)}}, "finite floats"),
        (
            {"state_dict": {k: v for k, v in _hnerv_state().items() if k != "decoder.2.conv.upconv.0.bias"}},
            "must come with a bias",
        ),
        (
            {"state_dict": {**_hnerv_state(), "decoder.3.conv.upconv.0.weight": torch.ones(193, 12, 5, 5)}},
            "193 channels cannot be shuffled to 12",
        ),
        (
            {"state_dict": {**_hnerv_state(), "decoder.0.conv.downconv.weight": torch.ones(14 * 144, 160, 1, 1)}},
            "NeRV's time-driven stem is not supported",
        ),
        (
            {"state_dict": {**_hnerv_state(), "decoder.1.conv.upconv.0.weight": torch.ones(300, 14, 2, 2)}},
            "odd square kernels",
        ),
        ({"embed": _quantised(torch.randn(6, 8), 6, None), "model": {}}, "embed must have four axes"),
        ({"embed": _quantised(torch.randn(6, 16, 2, 4), 6, None), "model": {}}, "stem, blocks and head"),
    ],
)
def test_refuses(tmp_path: Path, data: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(_save(tmp_path, data))


def test_refuses_bad_coded_entries(tmp_path: Path) -> None:
    name = "decoder.2.conv.upconv.0.weight"
    for change, message in [
        ({"scale": torch.full((1, 12, 3, 3), math.inf).half()}, "finite"),
        ({"min": torch.zeros(2).half(), "scale": torch.zeros(2).half()}, "pairs of shape"),
        ({"quant": torch.zeros(192, 12, 3, 3)}, "must be uint8"),
        ({"scale": torch.zeros(()).double()}, "must both be float16 or both float32"),
    ]:
        data = _coded(_hnerv_state())
        data["model"][name] = {**data["model"][name], **change}
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(_save(tmp_path, data))


def test_never_executes_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = _save(tmp_path, {"state_dict": {"decoder.0.conv.downconv.weight": _Evil()}})
    with pytest.raises(CheckpointError, match=r"cannot be read as a checkpoint of tensors: it holds \S+$"):
        read_checkpoint(path)
    assert not Path("executed").exists()
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"of tensors: it is not what torch\.save writes$"):
        read_checkpoint(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"of tensors: it is empty, or ends too early$"):
        read_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "missing.pth")


# --- the published model ---


def _header(imported: ImportedModel) -> Header:
    spec = imported.spec()
    return Header(
        model=spec.to_dict(),
        frames=spec.frames,
        height=spec.height,
        width=spec.width,
        fps=Fraction(25),
        preset="imported",
        writer="hflfnerv",
    )


@pytest.mark.shared_data
@pytest.mark.parametrize(("entropy", "limit"), [("huffman", 1_456_000), ("range", 1_449_000)])
def test_the_published_model_is_small_and_bit_exact(shared_data: Path, entropy: str, limit: int) -> None:
    if entropy == "range":
        pytest.importorskip("constriction")
    path = shared_data / "hnerv_bunny_1.5m.pth"
    imported = read_checkpoint(path)
    data = write_bitstream(_header(imported), imported.weights or {}, imported.embeddings, entropy=entropy)
    assert len(data) <= limit
    stream = Bitstream.open(data)
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    tensors = [(stream.read_quantized_embeddings(), theirs["embed"])]
    weights = stream.read_weights(imported.shapes)
    assert len(weights) == len(theirs["model"]) == 14
    # The same order: stem, blocks and head are in both.
    tensors += zip(weights.values(), theirs["model"].values(), strict=True)
    for ours, entry in tensors:
        assert np.array_equal(ours.symbols, entry["quant"].numpy())
        for array, key in zip(ours.step.arrays, ("min", "scale"), strict=True):
            assert (array.dtype, array.shape) == (entry[key].numpy().dtype, tuple(entry[key].shape))
            assert array.tobytes() == entry[key].numpy().tobytes()
    account = stream.accounting()
    assert (account.parameters, account.embedding_values, account.pairs) == (1_488_276, 16_896, 11_514)
    # One table for all and 16 bits for each minimum and scale, as the papers count.
    assert account.paper_bits == account.paper_symbol_bits + 32 * 11_514
    assert abs(account.paper_symbol_bits / 8 - 1_434_725) < 100


@pytest.mark.shared_data
def test_the_published_model_decodes_the_published_video(shared_data: Path) -> None:
    """One frame through a decoder written here, from the bytes of the file."""
    av = pytest.importorskip("av")
    imported = read_checkpoint(shared_data / "hnerv_bunny_1.5m.pth")
    stream = Bitstream.open(write_bitstream(_header(imported), imported.weights or {}, imported.embeddings))
    weights = {name: torch.from_numpy(dequantize(tensor)) for name, tensor in stream.read_weights().items()}
    with torch.inference_mode():
        x = torch.from_numpy(stream.read_embeddings([10]))
        x = F.gelu(F.conv2d(x, weights["decoder.stem.weight"], weights["decoder.stem.bias"]))
        for i, stride in enumerate(_STRIDES):
            weight = weights[f"decoder.blocks.{i}.conv.weight"]
            x = F.conv2d(x, weight, weights[f"decoder.blocks.{i}.conv.bias"], padding=weight.shape[-1] // 2)
            x = F.gelu(F.pixel_shuffle(x, stride))
        x = F.conv2d(x, weights["decoder.head.weight"], weights["decoder.head.bias"], padding=1)
        image = (torch.tanh(x)[0] * 0.5 + 0.5).permute(1, 2, 0).numpy()
    with av.open(str(shared_data / "bunny.mp4")) as video:
        frame = next(f for i, f in enumerate(video.decode(video=0)) if i == 10).to_ndarray(format="rgb24")
    error = np.mean((image - frame[40:680] / 255.0) ** 2)
    assert -10 * math.log10(error) == pytest.approx(33.26, abs=0.01)
