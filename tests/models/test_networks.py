"""Shapes, ranges and formulas of the networks."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from hflfnerv.models import MODELS, HFLFNeRV, HNeRV, ModelSpec, StreamSpec, TimeEncoding, TimeSpec, build_model
from hflfnerv.models.spec import DetailSpec

SIZES = [(96, 160), (17, 31), (45, 80)]
# Every structure there is; the presets of the other networks differ in widths alone.
ONE_EMBEDDING = "hflf/best, one embedding"
NETWORKS = [*MODELS, "hflf/best", ONE_EMBEDDING]


def plan(network, size, frames, height, width):
    if network == ONE_EMBEDDING:
        return HFLFNeRV.plan(size, frames, height, width, preset="best", detail=0)
    model, _, preset = network.partition("/")
    return MODELS[model].plan(size, frames, height, width, preset=preset or "paper")


def make(network, height, width, frames=3, size=60_000, **options):
    torch.manual_seed(0)
    return build_model(plan(network, size, frames, height, width), **options)


def network_input(net, height, width, batch=2):
    return None if net.encoder_input is None else torch.rand(batch, 3, height, width)


@pytest.mark.parametrize("model", NETWORKS)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_forward(model, height, width):
    net = make(model, height, width)
    out = net(network_input(net, height, width), torch.tensor([0, 2]))
    assert out.shape == (2, 3, height, width)
    assert torch.isfinite(out).all()
    low, high = (-1, 2) if model == "hflf" else (0, 1)
    assert low < out.min()
    assert out.max() < high


@pytest.mark.parametrize("model", NETWORKS)
def test_backward_reaches_every_parameter(model):
    net = make(model, 48, 64)
    net(network_input(net, 48, 64), torch.tensor([0, 1])).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_link_is_the_papers_sum():
    net = make("hflf", 48, 64)
    embedding, index = torch.randn(2, *net.spec.embedding_shape), torch.tensor([0, 1])
    time = net.time(index)
    expected = (
        torch.tanh(net.hfd(embedding))[..., :48, :64]
        + (torch.tanh((net.lfd1(time[:, :20]) + net.lfd2(time[:, 20:]))[..., :48, :64]) + 1) / 2
    )
    torch.testing.assert_close(net.decode(embedding, index), expected)


def test_link_of_best_is_one_sum():
    net = make("hflf/best", 48, 64, frames=9)
    embedding, index = torch.randn(3, *net.spec.embedding_shape), torch.tensor([0, 3, 8])
    grid = net.lfd.stem.grid
    assert grid.shape[0] == 3  # one for four frames
    at = [grid[0], grid[0] * 0.25 + grid[1] * 0.75, grid[2]]  # knots are at frames 0, 4 and 8
    low = net.lfd.finish(torch.stack(at))[..., :48, :64]
    expected = (torch.tanh(net.hfd(embedding)[..., :48, :64] + low) + 1) / 2
    torch.testing.assert_close(net.decode(embedding, index), expected)


def test_a_finer_embedding_joins_before_the_second_activation():
    net = make("hflf/best", 48, 64)
    detail, stem = net.spec.streams["hfd"].detail, net.hfd.stem
    rows, columns = net.spec.embedding_shape[1:]
    coarse = torch.randn(2, net.spec.embedding_channels, rows, columns)
    fine = torch.randn(2, detail.channels, *net.spec.streams["hfd"].grid)
    packed = torch.cat([coarse, torch.nn.functional.pixel_unshuffle(fine, detail.stride)], 1)
    assert packed.shape[1:] == net.spec.embedding_shape
    up = torch.nn.functional.pixel_shuffle(stem.upsample(torch.nn.functional.gelu(stem.coarse(coarse))), detail.stride)
    expected = torch.nn.functional.gelu(up + stem.fine(fine))
    torch.testing.assert_close(net.hfd.begin(packed), expected)
    assert any(weight is stem.upsample.weight for weight in net.hidden_weights())


def test_both_encoders_make_one_embedding():
    net = make("hflf/best", 48, 64)
    x = torch.rand(1, 3, 48, 64)
    detail, encoder = net.spec.streams["hfd"].detail, net.encoder
    coarse, fine = net.embed(x).split([16, detail.channels * detail.stride**2], 1)
    torch.testing.assert_close(coarse, encoder.coarse(x))
    fine = torch.nn.functional.pixel_shuffle(fine, detail.stride)
    assert fine.shape[2:] == net.spec.streams["hfd"].grid
    torch.testing.assert_close(fine, encoder.fine(x))


def test_other_streams_take_no_finer_embedding():
    spec = plan("hflf/best", 60_000, 5, 48, 64)
    detail = spec.streams["hfd"].detail
    for model, name in (("hnerv", "decoder"), ("hflf", "lfd"), ("nerv", "decoder")):
        other = spec if model == "hflf" else plan(model, 60_000, 5, 48, 64)
        streams = {**other.streams, name: dataclasses.replace(other.streams[name], detail=detail)}
        with pytest.raises(ValueError, match="detail"):
            build_model(dataclasses.replace(other, streams=streams))


def test_one_frame_has_a_time():
    net = make("hflf/best", 48, 64, frames=1)
    assert torch.equal(net.lfd.begin(torch.tensor([0]))[0], net.lfd.stem.grid[0])


@pytest.mark.parametrize("name", NETWORKS)
def test_errors_are_those_of_the_frames(name):
    net = make(name, 50, 66)  # which no strides divide
    x, index = network_input(net, 50, 66), torch.tensor([0, 1])
    frames = torch.randint(0, 256, (2, 50, 66, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = (net(x, index) - frames.permute(0, 3, 1, 2) / 255).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(net.errors(x, index, frames), expected)


def test_stream_is_conv_shuffle_gelu():
    net = make("hnerv", 48, 64)
    x = torch.randn(1, *net.spec.embedding_shape)
    stream = net.decoder
    y = torch.nn.functional.gelu(torch.nn.functional.conv2d(x, stream.stem.weight, stream.stem.bias))
    for block, stride, kernel in zip(stream.blocks, stream.spec.strides, stream.spec.kernels, strict=True):
        y = torch.nn.functional.conv2d(y, block.conv.weight, block.conv.bias, padding=kernel // 2)
        y = torch.nn.functional.gelu(torch.nn.functional.pixel_shuffle(y, stride))
    y = torch.nn.functional.conv2d(y, stream.head.weight, stream.head.bias, padding=1)
    torch.testing.assert_close(stream(x), y)
    features = stream.features(x)
    assert [f.shape[1] for f in features] == list(stream.spec.widths)


@pytest.mark.parametrize("first", [0, 1])
def test_time_encoding_is_equation_1(first):
    rows = TimeEncoding(TimeSpec(1.25, 30, first), frames=7, cached=True)(torch.tensor([0, 6]))
    for row, i in zip(rows, (0, 6), strict=True):
        t = (i + first) / 7
        for level in range(30):
            angle = 1.25**level * math.pi * t
            assert row[2 * level].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert row[2 * level + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_time_encoding_is_the_same_cached_or_not():
    index = torch.arange(9)
    cached, lazy = (TimeEncoding(TimeSpec(1.25, 80, 0), 9, cached=c)(index) for c in (True, False))
    assert torch.equal(cached, lazy)


def test_encoder_matches_the_published_structure():
    # Counted from the structure: per stage a strided convolution with a norm, and one block of a depthwise 7x7
    # convolution, a norm, two linear layers and the layer scale.
    net = make("hflf", 640, 1280, frames=2, size=1_500_000)
    strides, widths = (5, 4, 4, 2, 2), (64, 64, 64, 64, 16)
    count, previous = 0, 3
    for index, (s, c) in enumerate(zip(strides, widths, strict=True)):
        count += previous * c * s * s + c + 2 * (previous if index else c)
        count += 49 * c + c + 2 * c + 4 * c * c + 4 * c + 4 * c * c + c + c
        previous = c
    assert sum(p.numel() for p in net.encoder.parameters()) == count
    assert net.encoder(torch.zeros(1, 3, 640, 1280)).shape == (1, 16, 2, 4)


@pytest.mark.parametrize("model", NETWORKS)
def test_spec_survives_json(model):
    import json

    spec = plan(model, 60_000, 5, 45, 80)
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def replaced(path, value):
    def change(data):
        *parents, last = path
        for key in parents:
            data = data[key]
        if value is None:
            del data[last]
        else:
            data[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced(["frames"], 0), "frames"),
        (replaced(["frames"], 2**40), "frames"),
        (replaced(["height"], "64"), "height"),
        (replaced(["width"], True), "width"),
        (replaced(["streams"], {}), "streams"),
        (replaced(["streams", "\x1b]0;x\x07"], {}), r"printable names of at most 64 characters, got '\\x1b"),
        (replaced(["streams", "x" * 65], {}), "printable names"),
        (replaced(["streams", "hfd", "widths"], [1]), "hfd"),
        (replaced(["streams", "hfd", "kernels", 0], 2), "kernels"),
        (replaced(["streams", "hfd", "strides"], [10**9]), "strides"),
        (replaced(["streams", "lfd1", "grid"], [1, 1]), "lfd1"),
        (replaced(["streams", "lfd1", "widths"], [4096] * 5), "lfd1|widths|weights"),
        (replaced(["time", "levels"], 10**6), "levels"),
        (replaced(["time", "base"], float("nan")), "base"),
        (replaced(["embedding_channels"], None), "embedding_channels"),
    ],
)
def test_spec_rejects(change, message):
    import json

    data = json.loads(json.dumps(HFLFNeRV.plan(60_000, 5, 45, 80).to_dict()))
    change(data)
    with pytest.raises(ValueError, match=message):
        ModelSpec.from_dict(data)


def everything_at_its_largest(data):
    hfd = data["streams"]["hfd"]
    hfd["widths"] = [4096] + [1] * len(hfd["strides"])
    hfd["grid"], hfd["detail"] = [16, 16], {"channels": 64, "width": 4096, "stride": 16}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced(["streams", "lfd", "knots"], 1), "knots must be in"),
        (replaced(["streams", "lfd", "knots"], 2**24), "knots must hold at most"),
        (replaced(["streams", "lfd", "knots"], "2"), "knots must be a int"),
        (replaced(["streams", "hfd", "detail"], 2), "detail must be a dict"),
        (replaced(["streams", "hfd", "detail", "channels"], 0), "channels must be in"),
        (replaced(["streams", "hfd", "detail", "width"], None), "width must be a int"),
        (replaced(["streams", "hfd", "detail", "stride"], 7), "stride must divide the grid"),
        (everything_at_its_largest, "detail.width must give at most"),
    ],
)
def test_spec_of_best_rejects(change, message):
    data = plan("hflf/best", 60_000, 5, 45, 80).to_dict()
    change(data)
    with pytest.raises(ValueError, match=message):
        ModelSpec.from_dict(data)


@pytest.mark.parametrize("name", ["hflf", "hflf/best", "hnerv", "nerv"])
@pytest.mark.parametrize(
    ("size", "height", "width"), [(100_000_000, 2160, 4096), (6_000_000, 4320, 7680), (60_000, 1, 1)]
)
def test_layers_of_sensible_networks_fit(name, size, height, width):
    spec = plan(name, size, 100, height, width)
    assert ModelSpec.from_dict(spec.to_dict()) == spec


@pytest.mark.parametrize(
    ("frame", "stream", "most"),
    [
        ((64, 64), StreamSpec((64, 128), (1, 4096), (2,), (1,)), 2**26),
        ((64, 64), StreamSpec((512, 512), (1, 1), (16,), (1,)), 2**26),  # the head has three channels
        ((1024, 1024), StreamSpec((256, 256), (1, 513, 1), (4, 1), (1, 1)), 2**29),
        ((8192, 8192), StreamSpec((8192, 8192), (1, 33, 1), (1, 1), (1, 1)), 2**31),
        ((64, 64), StreamSpec((4096, 4096), (1, 1), (1,), (1,), detail=DetailSpec(1, 4096, 16)), 2**26),
    ],
)
def test_a_layer_has_no_more_values_than_its_frame_needs(frame, stream, most):
    data = ModelSpec("hnerv", 1, *frame, 1, {"decoder": stream}).to_dict()
    with pytest.raises(ValueError, match=f"decoder must have layers of at most {most} values for frames of {frame[0]}"):
        ModelSpec.from_dict(data)


@pytest.mark.parametrize("name", ["hflf", "hflf/best", "hnerv", "nerv"])
def test_the_largest_layer_is_that_of_the_network(name):
    net = make(name, 48, 64)
    values = {stream: [] for stream in net.spec.streams}
    for stream, sizes in values.items():
        module = net.get_submodule(stream)
        for layer in (module.stem, *module.blocks, module.head):
            layer.register_forward_hook(lambda module, given, out, sizes=sizes: sizes.append(out.numel()))
    shape = net.spec.embedding_shape
    net.decode(None if shape is None else torch.zeros(1, *shape), torch.tensor([0]))
    for stream, spec in net.spec.streams.items():
        assert max(values[stream]) == spec.largest_activation


def test_a_low_frequency_stream_needs_knots_or_a_time():
    data = plan("hflf/best", 60_000, 5, 45, 80).to_dict()
    del data["streams"]["lfd"]["knots"]
    with pytest.raises(ValueError, match="or a stream lfd with knots"):
        HFLFNeRV(ModelSpec.from_dict(data))


def test_a_spec_of_another_model_is_refused():
    spec = HFLFNeRV.plan(60_000, 5, 45, 80)
    with pytest.raises(ValueError, match=r"spec\.model"):
        HNeRV(spec)


def test_decoding_network_has_no_encoder_and_needs_none():
    full = make("hflf", 48, 64)
    bare = build_model(full.spec, with_encoder=False)
    bare.load_coded({name: p.detach() for name, p in full.coded_parameters().items()})
    embedding, index = torch.randn(1, *full.spec.embedding_shape), torch.tensor([1])
    assert torch.equal(bare.decode(embedding, index), full.decode(embedding, index))
    with pytest.raises(RuntimeError, match="no encoder"):
        bare.embed(torch.zeros(1, 3, 48, 64))


def test_parameter_counts_add_up():
    net = make("hflf", 48, 64, frames=4)
    counts = net.parameter_counts()
    assert counts["embeddings"] == 4 * int(np.prod(net.spec.embedding_shape))
    assert counts["total"] == sum(value for name, value in counts.items() if name != "total")
    assert counts["hfd"] == sum(p.numel() for p in net.hfd.parameters())
