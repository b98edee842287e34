"""Engines: which one decodes, and that AMX makes the frames that float32 makes, as far as bfloat16 can."""

from __future__ import annotations

import copy
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hflfnerv import EncodeConfig, encode
from hflfnerv.codec import Bitstream, Decoder, convert_checkpoint
from hflfnerv.codec import engine as engines
from hflfnerv.codec.container import Container, Section, write_container
from hflfnerv.codec.engine import DECODE, ModuleEngine, make_engine, to_uint8
from hflfnerv.codec.engine_amx import AmxEngine, unavailable
from hflfnerv.codec.engine_fused import FusedEngine
from hflfnerv.models import MODELS, ModelSpec, StreamSpec, build_model
from hflfnerv.models.streams import use_implementation
from hflfnerv.ops import PackedWeights, _cpp
from hflfnerv.ops._winograd import last_blocks
from hflfnerv.testing import threads

CPU = torch.device("cpu")
needs_amx = pytest.mark.skipif(unavailable() is not None, reason=f"amx: {unavailable()}")
# Model, size, height and width of the frame: with and without a crop, at sizes that fill no tile.
NETWORKS = [
    ("hnerv", 60_000, 96, 160),
    ("hnerv", 40_000, 61, 35),
    ("hnerv", 150_000, 320, 90),
    ("hflf", 100_000, 96, 160),
    ("hflf", 90_000, 67, 131),
    ("nerv", 60_000, 64, 96),
    ("nerv", 80_000, 45, 83),
]
BEST = ("hflf", 90_000, 67, 131)
LARGE = ("hflf", 400_000, 240, 400)  # whose last blocks are large enough for products of integers
TILES = {"fp32": "large", "int16": "integer"}


def network(name, size, height, width, frames=6, **options):
    torch.manual_seed(0)
    model = build_model(MODELS[name].plan(size, frames, height, width, **options), with_encoder=False)
    for stream in (model.get_submodule(name) for name in model.spec.streams):
        # At the widths of a trained network: with the initial weights all frames are grey.
        for block in stream.blocks:
            block.conv.weight.data *= 2.5
        stream.head.weight.data *= 4
    return model.requires_grad_(False).eval()


def embeddings_of(model, frames=6):
    shape = model.spec.embedding_shape
    if shape is None:
        return lambda indices: None
    values = torch.randn(frames, *shape, generator=torch.Generator().manual_seed(1))
    return lambda indices: values[list(indices)]


def passes_the_gate(actual, expected):
    difference = (actual.astype(int) - expected.astype(int)).__abs__()
    return (difference <= 1).mean() >= 0.999 and difference.max() <= 4


def assert_as_exact_as_bfloat16(model, embeddings, indices):
    """The frames of AMX are no further from those of float32 than PyTorch's in bfloat16, which round more often."""
    make = {"amx": AmxEngine, "bf16": ModuleEngine, "fp32": ModuleEngine}
    precision = {"amx": "auto", "bf16": "bf16", "fp32": "fp32"}
    made = {name: make[name](model, embeddings, CPU, precision[name]) for name in make}
    floats = {name: torch.stack(list(engine.float_frames(indices))).double() for name, engine in made.items()}
    assert {frames.shape for frames in floats.values()} == {(len(indices), 3, model.spec.height, model.spec.width)}
    assert floats["fp32"].std() > 0.02
    error, allowed = ((floats[name] - floats["fp32"]) for name in ("amx", "bf16"))
    assert error.norm() <= allowed.norm()
    assert error.abs().max() <= 2 * allowed.abs().max()
    return made["amx"]


@needs_amx
@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_frames_are_those_of_float32(case):
    model = network(*case)
    amx = assert_as_exact_as_bfloat16(model, embeddings_of(model), [0, 3, 5])
    frames, floats = np.stack(list(amx.frames([0, 3, 5]))), list(amx.float_frames([0, 3, 5]))
    assert frames.dtype == np.uint8
    assert {frame.dtype for frame in floats} == {torch.float32}
    assert torch.equal(to_uint8(torch.stack(floats)), torch.from_numpy(frames))


@needs_amx
@pytest.mark.parametrize("detail", [None, 0])
def test_two_streams_in_one_tanh(detail):
    model = network(*BEST, preset="best", detail=detail)
    assert set(model.spec.streams) == {"hfd", "lfd"}
    assert (model.spec.streams["hfd"].detail is None) == (detail == 0)
    assert_as_exact_as_bfloat16(model, embeddings_of(model), [0, 3, 5])


def with_reference_blocks(model):
    """The network in float64, convolutions by their definition."""
    model = copy.deepcopy(model).double()
    use_implementation(model, "reference")
    return model


@pytest.mark.parametrize(
    ("case", "options"),
    [
        *((case, {}) for case in (*NETWORKS, LARGE)),
        (BEST, {"preset": "best"}),
        (BEST, {"preset": "best", "detail": 0}),
    ],
    ids=str,
)
def test_fused_frames_are_those_of_float64(case, options):
    model = network(*case, **options)
    embeddings, exact = embeddings_of(model), with_reference_blocks(model)
    engine = FusedEngine(model, embeddings, CPU, "fp32")
    floats = list(engine.float_frames([0, 3, 5]))
    for index, actual in zip([0, 3, 5], floats, strict=True):
        embedding = embeddings([index])
        with torch.inference_mode():
            expected = exact.decode(None if embedding is None else embedding.double(), torch.tensor([index]))[0]
        assert actual.shape == expected.shape
        # Four blocks and a head, each within 1e-5 of its size, and the images are small beside their bound, 1.
        assert (actual - expected).abs().max() <= 1e-4
        assert (actual - expected).square().mean().sqrt() <= 1e-5
    assert expected.std() > 0.02
    frames = np.stack(list(engine.frames([0, 3, 5])))
    assert torch.equal(to_uint8(torch.stack(floats)), torch.from_numpy(frames))
    out = np.full((2, *frames.shape[1:]), 7, np.uint8)
    engine.fill([5, 0], out)
    assert np.array_equal(out, frames[[2, 0]])


@pytest.mark.skipif(_cpp.unavailable() is not None, reason=f"cpp: {_cpp.unavailable()}")
@pytest.mark.parametrize("precision", ["fp32", "int16"])
@pytest.mark.parametrize("case", [NETWORKS[0], NETWORKS[2], NETWORKS[6], LARGE], ids=str)
def test_fused_frames_in_strips_are_those_of_one_operation_after_the_other(case, precision, monkeypatch):
    model = network(*case)
    engine = FusedEngine(model, embeddings_of(model), CPU, precision)
    blocks = []

    def seen(*args, **options):
        blocks.append(args)
        return last_blocks(*args, **options)

    monkeypatch.setattr("hflfnerv.codec.engine_fused.last_blocks", seen)
    frame, floats = next(engine.frames([3])), next(engine.float_frames([3]))
    monkeypatch.setattr("hflfnerv.codec.engine_fused.last_blocks", lambda *args, **options: None)
    assert np.array_equal(next(engine.frames([3])), frame)
    assert torch.equal(next(engine.float_frames([3])), floats)
    for count in (1, 2, 5):
        with threads(count), torch.inference_mode(), PackedWeights(tiles=TILES[precision]):
            again = last_blocks(*blocks[1], as_bytes=False)
        assert torch.equal(again[0].permute(2, 0, 1), floats)
    with threads(9):
        assert last_blocks(*blocks[1], as_bytes=False) is None


@pytest.mark.parametrize("preset", ["paper", "best"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_file_may_have_its_streams_in_any_order(moving_frames, preset, precision):
    data = encode(moving_frames, EncodeConfig(size="60k", epochs=1, preset=preset)).bitstream
    fields = json.loads(Bitstream.open(data).header.to_json())
    streams = fields["model"]["streams"]
    expected = Decoder(data, device="cpu", precision=precision)[:]
    sections = [Section(tag, Container.parse(data).section(tag)) for tag in ("WGTS", "EMBD")]
    for names in itertools.permutations(streams):
        fields["model"]["streams"] = {name: streams[name] for name in names}
        text = json.dumps(fields).encode()
        header = SimpleNamespace(to_json=lambda text=text: text)
        decoder = Decoder(write_container(header, sections), device="cpu", precision=precision)
        assert list(decoder.header.model["streams"]) == list(names)
        assert np.array_equal(decoder[:], expected)


@needs_amx
@pytest.mark.parametrize("case", NETWORKS[3:5], ids=str)
def test_a_frame_does_not_depend_on_the_others_or_the_threads(case):
    model = network(*case)
    engine = AmxEngine(model, embeddings_of(model), CPU, "bf16")
    out = np.full((3, case[2], case[3], 3), 7, np.uint8)
    engine.fill([4, 1, 4], out)
    assert np.array_equal(out[0], out[2])
    assert not np.array_equal(out[0], out[1])
    for count in (1, 2, 5):
        with threads(count):
            assert np.array_equal(next(engine.frames([1])), out[1])
            assert np.array_equal(next(AmxEngine(model, embeddings_of(model), CPU, "auto").frames([4])), out[0])


@needs_amx
def test_it_keeps_no_hold_of_the_weights():
    model = network(*NETWORKS[0])
    engine = AmxEngine(model, embeddings_of(model), CPU, "auto")
    frame = next(engine.frames([2]))
    for name, parameter in model.named_parameters():
        if "stem" not in name:
            parameter.data.fill_(float("nan"))
    assert np.array_equal(next(engine.frames([2])), frame)


@needs_amx
@pytest.mark.parametrize(
    ("widths", "strides", "kernels"),
    [((70, 33, 40), (2, 3), (1, 5)), ((3, 1), (4,), (3,)), ((9, 70, 34, 2), (2, 1, 5), (5, 3, 3))],
)
def test_blocks_of_any_kind(widths, strides, kernels):
    spec = ModelSpec("hnerv", 2, 17, 41, 4, {"decoder": StreamSpec((9, 21), widths, strides, kernels)})
    rows, columns = spec.streams["decoder"].layout.output
    spec = ModelSpec("hnerv", 2, min(17, rows), min(41, columns), 4, spec.streams)
    torch.manual_seed(0)
    model = build_model(spec, with_encoder=False).requires_grad_(False).eval()
    model.decoder.head.weight.data *= 8
    assert_as_exact_as_bfloat16(model, embeddings_of(model, 2), [0, 1])


@pytest.mark.parametrize(
    ("precision", "amx", "chosen"),
    [
        ("auto", True, "amx"),
        ("bf16", True, "amx"),
        ("fp32", True, "fused"),
        ("fp16", True, "module"),
        ("auto", False, "fused"),
        ("int16", True, "fused"),
        ("bf16", False, "module"),
    ],
)
def test_which_engine(monkeypatch, precision, amx, chosen):
    monkeypatch.setattr("hflfnerv.codec.engine_amx.unavailable", lambda: None if amx else "needs AMX")
    model = network(*NETWORKS[0])
    entry = DECODE.select("auto", model, embeddings_of(model), CPU, precision)
    assert entry.name == chosen


@pytest.mark.parametrize(
    ("case", "options"), [(LARGE, {}), (("hnerv", 150_000, 240, 400), {}), (LARGE, {"preset": "best"})]
)
def test_auto_without_amx_is_int16(monkeypatch, case, options):
    monkeypatch.setattr("hflfnerv.codec.engine_amx.unavailable", lambda: "needs AMX")
    model = network(*case, **options)
    embeddings = embeddings_of(model)
    auto, integer, exact = (make_engine(model, embeddings, CPU, p) for p in ("auto", "int16", "fp32"))
    frames = [next(engine.frames([1])) for engine in (auto, integer, exact)]
    assert np.array_equal(frames[0], frames[1])
    assert passes_the_gate(frames[0], frames[2])
    error, size = (next(auto.float_frames([1])) - next(exact.float_frames([1]))).abs(), 1 / 255
    # Far less than half of a level, so that most samples are the same; and not the same tiles.
    assert error.max() <= size / 2
    assert error.square().mean().sqrt() <= size / 20
    assert (error.max() > 0) == (_cpp.unavailable() is None)


def test_small_images_are_float32_in_int16():
    model = network(*NETWORKS[5])
    frames = [next(FusedEngine(model, embeddings_of(model), CPU, p).frames([1])) for p in ("int16", "fp32")]
    assert np.array_equal(*frames)


def test_says_once_why_it_takes_another_engine(monkeypatch, recwarn):
    engines._say_once.cache_clear()
    monkeypatch.setattr("hflfnerv.codec.engine_amx.unavailable", lambda: None)
    monkeypatch.setattr("hflfnerv.codec.engine_amx.rejects", lambda model: "of its shape")
    model = network(*NETWORKS[0])
    for _ in range(2):
        assert isinstance(make_engine(model, embeddings_of(model), CPU), FusedEngine)
    assert [str(w.message) for w in recwarn] == ["decoding with 'fused' instead of 'amx': of its shape"]
    engines._say_once.cache_clear()


def test_a_precision_that_is_none():
    model = network(*NETWORKS[0])
    with pytest.raises(ValueError, match="precision must be one of auto, fp32, bf16, fp16, int16, int8, got 'fp8'"):
        make_engine(model, embeddings_of(model), CPU, "fp8")


@pytest.mark.shared_data
@needs_amx
def test_the_published_network(shared_data, tmp_path):
    coded = convert_checkpoint(shared_data / "hnerv_bunny_1.5m.pth")
    decoder, exact = Decoder(coded, device="cpu"), Decoder(coded, device="cpu", precision="fp32")
    assert (type(decoder.engine), type(exact.engine)) == (AmxEngine, FusedEngine)
    assert passes_the_gate(decoder[70:72], exact[70:72])
