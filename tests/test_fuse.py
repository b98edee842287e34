"""fuse() and unfuse(): on the structures of published code, and on everything they must leave alone."""

from __future__ import annotations

import copy
import dataclasses
import doctest
import gc
import runpy
import sys
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from fuse_branches import HIDDEN, SAFE
from fuse_models import Attributes, sequential
from torch import fx, nn
from torch.nn.utils import prune
from torch.utils import _pytree as pytree
from winograd_method import magnitudes

import hflfnerv
import hflfnerv.fusion
from bench.published import NVRRRCP, Block, CustomConv, DNeRV, ENeRV, HNeRV, NeRV, UpConv
from hflfnerv.fusion import Fused, FusedConv2d, FusedGELU, FusedPixelShuffle
from hflfnerv.ops import CONV_PIXEL_SHUFFLE_GELU, _winograd
from hflfnerv.reference import conv_pixel_shuffle_gelu as reference
from hflfnerv.testing import (
    assert_close_to_reference,
    assert_gradient_close_to_reference,
    convolution_magnitudes,
    make_tensor,
    requires,
)

REPOSITORY = Path(__file__).resolve().parent.parent
BLOCKS = {
    # name: (model, shape of its input, factors of the blocks)
    "hnerv": (HNeRV, (2, 4, 1, 2), [1, 2, 3, 1]),
    "hnerv-tanh-gelu-no-bias": (lambda: HNeRV(act="tanh-gelu", bias=False), (1, 4, 2, 1), [1, 2, 3, 1]),
    "nvr-rrcp": (NVRRRCP, (2, 4, 1, 1), [1, 2, 3, 1, 2, 3, 2, 3]),
    "nerv": (NeRV, (2, 4, 2, 2), [2, 1, 3]),
    "nerv-bilinear": (lambda: NeRV(kind="bilinear"), (1, 4, 2, 2), [1, 1, 1]),
    "e-nerv": (ENeRV, (2, 4, 2, 3), [2, 2]),
    "e-nerv-narrow-first": (lambda: ENeRV(widths=(4, 8, 3)), (2, 4, 2, 3), [1, 2]),
    "d-nerv": (DNeRV, (2, 4, 1, 2), [2, 3, 2, 2, 1, 2]),
    "sequential": (sequential, (2, 4, 3, 2), [2, 3]),
    "sequential-tanh-gelu-no-bias": (lambda: sequential("tanh", bias=False), (1, 4, 2, 3), [2, 3]),
    "attributes": (Attributes, (1, 4, 3, 2), [2, 2]),
}
every_model = pytest.mark.parametrize("name", BLOCKS)


def build(name, dtype=torch.float32):
    factory, shape, _ = BLOCKS[name]
    torch.manual_seed(1)
    model = factory().to(dtype)
    return model, make_tensor(*shape, seed=2).to(dtype)


def run(model, x):
    """The tensors that a model returns; what else it takes is made of x."""
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    kind, time = type(getattr(inner, "_orig_mod", inner)), x.mean(dim=(2, 3))
    arguments = {
        NVRRRCP: lambda: (x, time.repeat(1, 2)),
        NeRV: lambda: (time,),
        ENeRV: lambda: ({"time": time},),
        DNeRV: lambda: ({"content": x, "difference": F.interpolate(x[:, :2], scale_factor=6.0)},),
    }.get(kind, lambda: (x,))
    return [t for t in pytree.tree_leaves(model(*arguments())) if t is not x]


def gradients(model, x):
    x = x.detach().clone().requires_grad_()
    parameters = dict(model.named_parameters())
    wanted = [x, *parameters.values()]
    loss = sum(y.float().square().mean() for y in run(model, x))
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return dict(zip(["x", *parameters], found, strict=True))


def assert_equal(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert a is e or torch.equal(a, e)


@every_model
@pytest.mark.parametrize("training", [True, False])
def test_results_and_gradients_are_the_same_bit_for_bit(name, training):
    model, x = build(name)
    model.train(training)
    outputs, grads = run(model, x), gradients(model, x)
    report = hflfnerv.fuse(model, impl="reference")
    assert len(report.fused) == len(BLOCKS[name][2])
    assert_equal(run(model, x), outputs)
    fused = gradients(model, x)
    assert fused.keys() == grads.keys()
    assert_equal(fused.values(), grads.values())


WINOGRAD = next(entry for entry in CONV_PIXEL_SHUFFLE_GELU if entry.name == "winograd")
KERNELS = {
    # name: (model, shape of its input, what "auto" runs for its blocks, in the order of their calls)
    "hnerv": (HNeRV, (2, 4, 8, 16), ["reference", "reference", "winograd", "winograd"]),
    "hnerv-tanh-gelu-no-bias": (
        lambda: HNeRV(act="tanh-gelu", bias=False),
        (1, 4, 16, 8),
        ["reference", "reference", "winograd", "winograd"],
    ),
    "nerv": (lambda: NeRV(grid=(24, 40)), (2, 4, 2, 2), ["reference", "reference", "winograd"]),
    "e-nerv": (lambda: ENeRV(grid=(32, 24)), (1, 4, 2, 3), ["reference", "winograd"]),
    "sequential": (sequential, (1, 4, 64, 48), ["conv2d+cpp", "winograd"]),
    "attributes": (Attributes, (1, 4, 48, 48), ["conv2d+cpp", "conv2d+cpp"]),
}


def with_gradients(function, tensors, dy):
    y = function(*tensors)
    return [y, *torch.autograd.grad(y, tensors, dy.to(y.dtype))]


def assert_block_close_to_reference(conv, x, entry):
    """Compare a fused block and its gradients with the definition, by the sums of the implementation that ran."""
    block = conv.fused_block
    tensors = [x.requires_grad_(), *conv.parameters()]
    actual = conv(x)
    dy = make_tensor(*actual.shape, seed=3)

    def definition(x, weight, bias=None):
        return reference.conv_pixel_shuffle_gelu(
            x, weight, bias, block.upscale_factor, padding=block.padding, approximate=block.approximate
        )

    ours = [actual, *torch.autograd.grad(actual, tensors, dy)]
    exact = with_gradients(definition, [t.detach().double().requires_grad_() for t in tensors], dy)
    plain = with_gradients(definition, tensors, dy)
    if entry == "winograd":
        sizes = magnitudes(x, conv.weight, conv.bias, dy, block.upscale_factor)
    else:  # PyTorch's convolutions, but of other bits, or without the bias, and then not by the same routine everywhere
        sizes = convolution_magnitudes(x, conv.weight, dy, block.upscale_factor, block.padding)
    checks = [assert_close_to_reference, *[assert_gradient_close_to_reference] * (len(ours) - 1)]
    for check, *values, size in zip(checks, ours, exact, plain, sizes[: len(ours)], strict=True):
        check(*values, magnitude=size)


@pytest.mark.skipif(WINOGRAD.unavailable() is not None, reason=f"winograd: {WINOGRAD.unavailable()}")
@pytest.mark.parametrize("impl", ["auto", "conv2d+cpp"])
@pytest.mark.parametrize("name", KERNELS)
def test_blocks_that_kernels_run_are_near_the_truth(name, impl, monkeypatch):
    factory, shape, entries = KERNELS[name]
    monkeypatch.setattr(
        _winograd, "_LEAST", dict.fromkeys(_winograd._LEAST, _winograd._LEAST["avx2"])
    )  # on any machine
    torch.manual_seed(1)
    model, calls, ran = factory(), [], []

    def recorded(entry):
        return dataclasses.replace(entry, run=lambda call: (ran.append(entry.name), entry.run(call))[1])

    monkeypatch.setattr(CONV_PIXEL_SHUFFLE_GELU, "entries", tuple(map(recorded, CONV_PIXEL_SHUFFLE_GELU)))
    for row in hflfnerv.fuse(model, impl=impl).fused:
        model.get_submodule(row.conv).register_forward_pre_hook(
            lambda conv, args, kwargs: calls.append((conv, *args, *kwargs.values())), with_kwargs=True
        )
    with torch.no_grad():
        run(model, make_tensor(*shape, seed=2))
    assert ran == (entries if impl == "auto" else [impl] * len(entries))
    for (conv, x), entry in zip(list(calls), list(ran), strict=True):
        assert_block_close_to_reference(conv, x, entry)


@every_model
def test_parameters_and_state_are_untouched(name):
    model, _ = build(name)
    modules = dict(model.named_modules())
    parameters = {key: id(value) for key, value in model.named_parameters()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    hflfnerv.fuse(model)
    assert {key: id(value) for key, value in model.named_parameters()} == parameters
    assert list(model.state_dict()) == list(state)
    assert_equal(model.state_dict().values(), state.values())
    assert all(model.get_submodule(key) is module for key, module in modules.items())


@every_model
@pytest.mark.parametrize("assign", [False, True])
def test_state_goes_both_ways(name, assign):
    model, x = build(name)
    other, _ = build(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    expected = run(other, x)
    hflfnerv.fuse(model, impl="reference")
    model.load_state_dict(other.state_dict(), assign=assign)
    assert_equal(run(model, x), expected)
    fresh, _ = build(name)
    fresh.load_state_dict(model.state_dict())
    assert_equal(run(fresh, x), expected)


@every_model
def test_unfuse_restores_the_very_modules(name):
    model, x = build(name)
    before = {key: (id(m), type(m), set(vars(m))) for key, m in model.named_modules()}
    shown, outputs = repr(model), run(model, x)
    hflfnerv.fuse(model)
    assert repr(model) != shown
    model.eval()
    assert hflfnerv.unfuse(model) == len(BLOCKS[name][2])
    assert {key: (id(m), type(m), set(vars(m))) for key, m in model.named_modules()} == before
    assert repr(model) == shown
    assert not any(m.training for m in model.modules())
    assert_equal(run(model, x), outputs)
    assert hflfnerv.unfuse(model) == 0


@every_model
def test_report(name):
    model, _ = build(name)
    plain = dict(model.named_modules())
    factors = {key: m.upscale_factor for key, m in plain.items() if isinstance(m, nn.PixelShuffle)}
    report = hflfnerv.fuse(model)
    assert [row.upscale_factor for row in report.fused] == BLOCKS[name][2]
    for row in report.fused:
        assert type(model.get_submodule(row.conv)) is FusedConv2d
        assert type(model.get_submodule(row.gelu)) is FusedGELU
        if row.pixel_shuffle is None:
            assert row.upscale_factor == 1
        else:
            assert type(model.get_submodule(row.pixel_shuffle)) is FusedPixelShuffle
            assert factors.pop(row.pixel_shuffle) == row.upscale_factor
        assert row.conv in str(report)
    assert {row.name for row in report.left} == factors.keys()
    assert report.already == ()


def test_report_in_full():
    model = ENeRV(widths=(4, 8, 3))
    report = hflfnerv.fuse(model)
    assert report.fused == (
        Fused("layers.0.conv2", None, "layers.0.act", 1),
        Fused("layers.1.conv.conv", "layers.1.conv.up_scale", "layers.1.act", 2),
    )
    assert str(report).splitlines() == [
        "fused: 2",
        "  layers.0.conv2 -> layers.0.act (r = 1)",
        "  layers.1.conv.conv -> layers.1.conv.up_scale -> layers.1.act (r = 2)",
        "left: 1",
        "  layers.0.conv1.up_scale: it is followed by Conv2d 'layers.0.conv2', not by an nn.GELU",
    ]
    assert "impl='auto'" in repr(model)


@every_model
def test_fusing_twice_changes_nothing(name):
    model, x = build(name)
    first = hflfnerv.fuse(model, impl="reference")
    shown, outputs = repr(model), run(model, x)
    second = hflfnerv.fuse(model)
    assert second.fused == ()
    assert second.already == tuple(row.conv for row in first.fused)
    assert second.left == first.left
    assert f"fused already: {len(first.fused)}" in str(second)
    assert repr(model) == shown
    assert_equal(run(model, x), outputs)


@every_model
def test_training_steps_are_the_same(name):
    plain, x = build(name)
    fused = copy.deepcopy(plain)
    # The optimiser is older than the fusion, and never learns of it.
    optimisers = [torch.optim.Adam(model.parameters(), lr=1e-2) for model in (plain, fused)]
    hflfnerv.fuse(fused, impl="reference")
    for _ in range(3):
        for model, optimiser in zip((plain, fused), optimisers, strict=True):
            optimiser.zero_grad()
            sum(y.square().mean() for y in run(model, x)).backward()
            optimiser.step()
    assert_equal(fused.parameters(), plain.parameters())
    hflfnerv.unfuse(fused)
    assert_equal(run(fused, x), run(plain, x))


@every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(name, dtype):
    model, x = build(name)
    fused = copy.deepcopy(model)
    hflfnerv.fuse(fused, impl="reference")
    with torch.autocast("cpu", dtype=dtype):
        expected, actual = run(model, x), run(fused, x)
    assert [y.dtype for y in actual] == [y.dtype for y in expected]
    assert_equal(actual, expected)


@pytest.mark.parametrize("name", ["hnerv", "nerv", "sequential"])
def test_compile(name):
    model, x = build(name)
    expected, grads = run(model, x), gradients(model, x)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_equal(run(compiled, x), expected)
    # It was compiled before: the change of classes must recompile it.
    report = hflfnerv.fuse(compiled, impl="reference")
    assert [row.conv.split(".")[0] for row in report.fused] == ["_orig_mod"] * len(BLOCKS[name][2])
    assert_equal(run(compiled, x), run(model, x))
    torch.testing.assert_close(run(compiled, x), expected)
    fused = gradients(compiled, x)
    torch.testing.assert_close([fused["x"]], [grads["x"]])
    hflfnerv.unfuse(compiled)
    assert_equal(run(compiled, x), expected)


@every_model
def test_deepcopy_is_independent(name):
    model, x = build(name)
    outputs = run(model, x)
    hflfnerv.fuse(model, impl="reference")
    clone = copy.deepcopy(model)
    assert_equal(run(clone, x), outputs)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.zero_()
    assert_equal(run(model, x), outputs)
    assert hflfnerv.unfuse(clone) == len(BLOCKS[name][2])
    assert not any(isinstance(m, FusedConv2d) for m in clone.modules())
    assert_equal(run(model, x), outputs)
    assert hflfnerv.unfuse(model) == len(BLOCKS[name][2])


@pytest.fixture
def process_group(tmp_path):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("first", ["fuse", "wrap"])
@pytest.mark.parametrize("name", ["hnerv", "e-nerv", "sequential"])
def test_distributed_data_parallel(name, first, process_group):
    plain, x = build(name)
    model = copy.deepcopy(plain)
    if first == "fuse":
        hflfnerv.fuse(model, impl="reference")
    wrapped = nn.parallel.DistributedDataParallel(model)
    if first == "wrap":
        report = hflfnerv.fuse(wrapped, impl="reference")
        assert all(row.conv.startswith("module.") for row in report.fused)
    assert isinstance(next(m for m in model.modules() if isinstance(m, nn.Conv2d)), nn.Conv2d)
    assert len([m for m in model.modules() if type(m) is FusedConv2d]) == len(BLOCKS[name][2])
    for m in (plain, wrapped):
        sum(y.square().mean() for y in run(m, x)).backward()
    assert_equal([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])


def test_data_parallel():
    model, x = build("hnerv")
    expected = run(model, x)
    wrapped = nn.DataParallel(model)
    assert len(hflfnerv.fuse(wrapped, impl="reference").fused) == 4
    assert_equal(run(wrapped, x), expected)
    # What it does on several GPUs: shallow copies of every module.
    replicas = [module._replicate_for_data_parallel() for module in model.modules()]
    assert sum(type(replica) is FusedConv2d for replica in replicas) == 4


@pytest.mark.skipif(
    not torch.cuda.is_available() and not requires("cuda"), reason="PyTorch sees no CUDA device for CUDA graphs"
)
@pytest.mark.parametrize("name", ["hnerv", "attributes"])
def test_cuda_graph(name):
    model, x = build(name)
    model, x = model.cuda().to(memory_format=torch.channels_last), x.cuda()
    hflfnerv.fuse(model)
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                run(model, x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run(model, x)
        x.copy_(make_tensor(*x.shape, seed=9).cuda())
        graph.replay()
        torch.testing.assert_close(outputs, run(model, x))


def test_an_image_without_a_batch():
    model = sequential()
    x = make_tensor(4, 3, 2)
    expected = model(x)
    hflfnerv.fuse(model, impl="reference")
    assert torch.equal(model(x), expected)


def test_sizes_from_numpy():
    stride, kernel = np.array([2, 3])
    model = nn.Sequential(conv(3, 8, kernel, padding=kernel // 2), nn.PixelShuffle(stride), nn.GELU())
    x = make_tensor(1, 3, 4, 5)
    expected = model(x)
    assert hflfnerv.fuse(model, impl="reference").fused == (Fused("0", "1", "2", 2),)
    assert torch.equal(model(x), expected)


def test_the_models_of_this_package_need_none():
    spec = hflfnerv.models.HNeRV.plan(30_000, 4, 64, 128)
    model = hflfnerv.models.HNeRV(spec)
    report = hflfnerv.fuse(model)
    assert (report.fused, report.left) == ((), ())
    assert report.already == tuple(f"decoder.blocks.{i}" for i in range(len(model.decoder.blocks)))


def test_what_is_put_on_a_fused_convolution_works():
    model, x = sequential(), make_tensor(1, 4, 3, 2)
    other = copy.deepcopy(model)
    hflfnerv.fuse(model, impl="reference")
    for m in (model, other):
        torch.manual_seed(0)
        torch.nn.utils.parametrizations.spectral_norm(m[0])
    assert torch.equal(model(x), other(x))
    with pytest.raises(ValueError, match="got a ParametrizedFusedConv2d at '0'; take off what was put on it"):
        hflfnerv.unfuse(model)
    assert type(model[2]) is FusedGELU
    torch.nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert hflfnerv.unfuse(model) == 2


def test_unfuse_wants_whole_blocks():
    model = sequential()
    hflfnerv.fuse(model)
    with pytest.raises(ValueError, match="got 2 of the 3 parts of one; pass a module that holds them all"):
        hflfnerv.unfuse(model[3])
    assert type(model[3][0][0]) is FusedConv2d
    assert hflfnerv.unfuse(model) == 2


# What is left alone


class Forward(nn.Module):
    """The attributes of a block, and a forward given as a function of (module, x)."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.up = nn.PixelShuffle(2)
        self.act = nn.GELU()
        for name, module in modules.items():
            self.add_module(name, module)
        self.steps = forward

    def forward(self, x):
        return self.steps(self, x)


class MyGELU(nn.GELU):
    pass


class MyConv(nn.Conv2d):
    pass


class MyShuffle(nn.PixelShuffle):
    pass


class OptionalSkip(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.ModuleList([nn.Conv2d(3, 8, 3, padding=1), nn.PixelShuffle(2), nn.GELU()])

    def forward(self, x, skip=None):
        y = self.block[1](self.block[0](x))
        if skip is None:
            y = y + 1
        return self.block[2](y)


class TypeDependent(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.up, self.act = conv(), nn.PixelShuffle(2), nn.GELU()

    def forward(self, x, skip=None):
        y = self.up(self.conv(x))
        return self.act(y + skip if isinstance(skip, torch.Tensor) else y)


def conv(*arguments, **settings):
    return nn.Conv2d(*(arguments or (3, 8, 3)), **{"padding": 1, **settings})


def chain(first, *rest):
    return nn.Sequential(first, nn.PixelShuffle(2), *(rest or (nn.GELU(),)))


def hooked(model, path, register):
    getattr(model.get_submodule(path), register)(lambda *_: None)
    return model


def branch_on_values(m, x):
    return m.act(m.up(m.conv(x))) if x.sum() > 0 else x


def noise_in_training(m, x):
    y = m.up(m.conv(x))
    return m.act(y + 1 if m.training else y)


def shared_activation():
    act = nn.GELU()
    return nn.Sequential(conv(), nn.PixelShuffle(2), act, conv(2, 8, 3), nn.PixelShuffle(2), act)


def shared_block():
    up = UpConv(3, 3, 2, 3)
    return nn.ModuleDict({"a": nn.Sequential(up, nn.GELU()), "b": nn.Sequential(up, nn.GELU())})


def own_forward(where):
    model = nn.Sequential(chain(conv()))
    module = model.get_submodule(where)
    module.forward = type(module).forward.__get__(module)
    return model


def parametrized():
    model = chain(conv())
    torch.nn.utils.parametrizations.spectral_norm(model[0])
    return model


def spectral_norm_by_hook():
    model = chain(conv())
    torch.nn.utils.spectral_norm(model[0])
    return model


def pruned():
    model = chain(conv())
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


def quantisation_aware():
    from torch.ao.nn.qat import Conv2d
    from torch.ao.quantization import get_default_qat_qconfig

    return chain(Conv2d(3, 8, 3, padding=1, qconfig=get_default_qat_qconfig()))


class FunctionShuffle(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.GELU()

    def forward(self, x):
        return self.act(F.pixel_shuffle(self.conv(x), 2))


def script():
    return nn.Sequential(torch.jit.script(chain(conv())))


REFUSED = {
    "stride": (lambda: chain(conv(stride=2)), "1", "of Conv2d '0': its stride is (2, 2), not 1"),
    "dilation": (lambda: chain(conv(dilation=(1, 2))), "1", "of Conv2d '0': its dilation is (1, 2), not 1"),
    "groups": (lambda: chain(conv(4, 8, 3, groups=2)), "1", "of Conv2d '0': it has 2 groups, not 1"),
    "padding mode": (
        lambda: chain(conv(padding_mode="circular")),
        "1",
        "of Conv2d '0': its padding mode is 'circular', not 'zeros'",
    ),
    "unequal padding": (
        lambda: chain(conv(3, 8, 4, padding="same")),
        "1",
        "of Conv2d '0': its padding 'same' of a kernel (4, 4) differs between two sides",
    ),
    "channels": (
        lambda: chain(conv(3, 6, 3)),
        "1",
        "of Conv2d '0': its 6 output channels are no multiple of r² = 4",
    ),
    "complex": (
        lambda: chain(conv(dtype=torch.complex64)),
        "1",
        "of Conv2d '0': its weight is torch.complex64, not floating point",
    ),
    "transposed": (
        lambda: chain(nn.ConvTranspose2d(3, 8, 3)),
        "1",
        "its input comes from ConvTranspose2d '0', not from an nn.Conv2d",
    ),
    "norm before": (
        lambda: nn.Sequential(conv(), nn.BatchNorm2d(8), nn.PixelShuffle(2), nn.GELU()),
        "2",
        "its input comes from BatchNorm2d '1', not from an nn.Conv2d",
    ),
    "norm after": (
        lambda: Block(UpConv(3, 3, 2, 3), 3, norm="bn"),
        "conv.upconv.1",
        "it is followed by BatchNorm2d 'norm', not by an nn.GELU",
    ),
    "activation": (
        lambda: Block(CustomConv(3, 3, 2), 3, act="silu"),
        "conv.up_scale",
        "it is followed by SiLU 'act', not by an nn.GELU",
    ),
    "activation subclass": (
        lambda: chain(conv(), MyGELU()),
        "1",
        "it is followed by MyGELU '2', a subclass of nn.GELU",
    ),
    "convolution subclass": (
        lambda: chain(MyConv(3, 8, 3)),
        "1",
        "its input comes from MyConv '0', a subclass of nn.Conv2d",
    ),
    "shuffle subclass": (
        lambda: nn.Sequential(conv(), MyShuffle(2), nn.GELU()),
        "1",
        "MyShuffle '1' is a subclass of nn.PixelShuffle",
    ),
    "quantised": (
        quantisation_aware,
        "1",
        "its input comes from torch.ao.nn.qat.modules.conv.Conv2d '0', a subclass of nn.Conv2d",
    ),
    "lazy": (
        lambda: chain(nn.LazyConv2d(8, 3)),
        "1",
        "LazyConv2d '0' has no parameters yet; run the model once, then fuse it",
    ),
    "function GELU": (
        lambda: Forward(lambda m, x: F.gelu(m.up(m.conv(x)))),
        "up",
        "it is followed by the function gelu, not by an nn.GELU: there is no module to replace; call an nn.GELU",
    ),
    "function shuffle": (
        FunctionShuffle,
        "",
        "its forward calls pixel_shuffle as a function, so that there is no module to replace; call an "
        "nn.PixelShuffle and an nn.GELU, or use hflfnerv.nn.UpsampleBlock",
    ),
    "method between": (
        lambda: Forward(lambda m, x: m.act(m.up(m.conv(x)).detach())),
        "up",
        "it is followed by the method .detach(), not by an nn.GELU",
    ),
    "attribute as input": (
        lambda: Forward(lambda m, x: m.act(m.up(m.conv.weight)) + x),
        "up",
        "its input comes from the attribute conv.weight, not from an nn.Conv2d",
    ),
    "no activation": (
        lambda: nn.Sequential(conv(), nn.PixelShuffle(2)),
        "1",
        "its convolution or its activation is not in the model, or its call was not found",
    ),
    "no convolution": (
        lambda: nn.Sequential(nn.PixelShuffle(2), nn.GELU()),
        "0",
        "its convolution or its activation is not in the model, or its call was not found",
    ),
    "the model itself": (
        lambda: nn.PixelShuffle(2),
        "",
        "its convolution or its activation is not in the model, or its call was not found",
    ),
    "shuffled output used twice": (
        lambda: Forward(lambda m, x: m.act(y := m.up(m.conv(x))) + y),
        "up",
        "the output of PixelShuffle 'up' is used by GELU 'act', the function add, not by the next step alone",
    ),
    "convolution's output returned": (
        lambda: Forward(lambda m, x: (y := m.conv(x), m.act(m.up(y)))),
        "up",
        "the output of Conv2d 'conv' is used by PixelShuffle 'up', the return value, not by the next step alone",
    ),
    "output not used": (
        lambda: Forward(lambda m, x: (m.up(m.conv(x)), m.act(x))[1]),
        "up",
        "the output of PixelShuffle 'up' is used by nothing, not by the next step alone",
    ),
    "shuffle called twice": (
        lambda: Forward(lambda m, x: m.act(m.up(m.up(m.conv(x))))),
        "up",
        "the model (Forward) calls PixelShuffle 'up' 2 times; give each call a module of its own",
    ),
    "convolution called twice": (
        lambda: Forward(lambda m, x: m.act(m.up(m.conv(x))) + m.conv(x).mean()),
        "up",
        "the model (Forward) calls Conv2d 'conv' 2 times; give each call a module of its own",
    ),
    "activation called twice": (
        lambda: Forward(lambda m, x: m.act(m.up(m.conv(m.act(x))))),
        "up",
        "the model (Forward) calls GELU 'act' 2 times; give each call a module of its own",
    ),
    "untraceable": (
        lambda: Forward(branch_on_values),
        "up",
        "the model (Forward) around it cannot be traced (TraceError: symbolically traced variables cannot be "
        "used as inputs to control flow)",
    ),
    "asks for types": (
        TypeDependent,
        "up",
        "the model (TypeDependent) around it cannot be traced (RuntimeError: forward() asks isinstance, "
        "which symbols answer in another way than tensors)",
    ),
    "training differs": (
        lambda: Forward(noise_in_training),
        "up",
        "it is followed by the function add, not by an nn.GELU (not in every call: it depends on "
        "training, or on an optional argument)",
    ),
    "optional argument": (
        OptionalSkip,
        "block.1",
        "it is followed by the function add, not by an nn.GELU (not in every call: it depends on "
        "training, or on an optional argument)",
    ),
    "parametrization": (
        parametrized,
        "1",
        "ParametrizedConv2d '0' has parametrizations (of weight); remove them to fuse",
    ),
    "spectral norm": (
        spectral_norm_by_hook,
        "1",
        "Conv2d '0' has a forward pre-hook (SpectralNorm); remove it to fuse",
    ),
    "pruning": (pruned, "1", "Conv2d '0' has a forward pre-hook (L1Unstructured); remove it to fuse"),
    "hook on the convolution": (
        lambda: hooked(chain(conv()), "0", "register_forward_hook"),
        "1",
        "Conv2d '0' has a forward hook (<lambda>); remove it to fuse",
    ),
    "hook on the shuffle": (
        lambda: hooked(chain(conv()), "1", "register_forward_pre_hook"),
        "1",
        "PixelShuffle '1' has a forward pre-hook (<lambda>); remove it to fuse",
    ),
    "hook on the activation": (
        lambda: hooked(chain(conv()), "2", "register_full_backward_hook"),
        "1",
        "GELU '2' has a backward hook (<lambda>); remove it to fuse",
    ),
    "hook on an identity": (
        lambda: hooked(chain(conv(), nn.Identity(), nn.GELU()), "2", "register_full_backward_pre_hook"),
        "1",
        "Identity '2' has a backward pre-hook (<lambda>); remove it to fuse",
    ),
    "hook on a container": (
        lambda: hooked(Block(UpConv(3, 3, 2, 3), 3), "conv.upconv", "register_forward_hook"),
        "conv.upconv.1",
        "Sequential 'conv.upconv' has a forward hook (<lambda>); remove it to fuse",
    ),
    "own forward": (
        lambda: own_forward("0.0"),
        "0.1",
        "Conv2d '0.0' has a forward of its own, set on the object; remove it to fuse",
    ),
    "own forward around": (
        lambda: own_forward("0"),
        "0.1",
        "Sequential '0' around it cannot be traced (RuntimeError: its forward was set on the object)",
    ),
    "shared activation": (
        shared_activation,
        "1",
        "the model (Sequential) calls GELU '2' 2 times; give each call a module of its own",
    ),
    "shared block": (
        shared_block,
        "a.0.upconv.1",
        "one UpConv serves as 'a.0' and 'b.0'; give each place a module of its own",
    ),
    "script": (script, "0.1", "it is TorchScript, whose code is fixed; fuse the model and do not script it"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore:.*torch.ao:DeprecationWarning", "ignore:.*jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Lazy modules", "ignore:Complex modules")
def test_is_left_with_the_reason(case):
    factory, name, reason = REFUSED[case]
    model = factory()
    before = {key: type(m) for key, m in model.named_modules(remove_duplicate=False)}
    shown = repr(model)
    report = hflfnerv.fuse(model)
    assert report.fused == ()
    assert {row.name: row.reason for row in report.left}[name] == reason
    assert f"  {name or '(the model)'}: {reason}" in str(report)
    assert {key: type(m) for key, m in model.named_modules(remove_duplicate=False)} == before
    assert repr(model) == shown


@pytest.mark.parametrize("case", HIDDEN)
def test_a_branch_that_a_trace_hides_is_left(case):
    model, reason = HIDDEN[case]
    report = hflfnerv.fuse(model())
    assert report.fused == ()
    assert reason in report.left[0].reason


@pytest.mark.parametrize("case", SAFE)
def test_a_branch_that_a_trace_shows_is_fused(case):
    assert hflfnerv.fuse(SAFE[case]()).fused == (Fused("conv", "up", "act", 2),)


def test_a_hidden_branch_beside_the_block_does_not_matter():
    beside, _ = HIDDEN["grad_mode"]
    model = nn.Sequential(beside(), nn.Conv2d(2, 8, 1), nn.PixelShuffle(2), nn.GELU())
    assert hflfnerv.fuse(model).fused == (Fused("1", "2", "3", 2),)


def test_what_a_forward_imports_is_no_part_of_it(tmp_path, monkeypatch):
    (tmp_path / "imported_by_a_forward.py").write_text("try:\n    a = type(1)\nexcept ImportError:\n    a = None\n")
    monkeypatch.syspath_prepend(tmp_path)

    def forward(m, x):
        import imported_by_a_forward  # noqa: F401

        return m.act(m.up(m.conv(x)))

    assert len(hflfnerv.fuse(Forward(forward)).fused) == 1


def test_what_the_collector_calls_is_no_part_of_a_forward():
    called = []

    def callback(phase, info):
        called.append(isinstance(phase, str))

    threshold = gc.get_threshold()
    gc.callbacks.append(callback)
    gc.set_threshold(1)
    try:
        report = hflfnerv.fuse(Forward(lambda m, x: m.act(m.up(m.conv(x)))))
        assert gc.isenabled()
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(callback)
    assert called
    assert len(report.fused) == 1


# What a search must not disturb, and where it must not stop


class Stateful(nn.Module):
    """A block whose forward counts, keeps its output, and draws random numbers."""

    def __init__(self):
        super().__init__()
        self.conv, self.up, self.act = conv(), nn.PixelShuffle(2), nn.GELU()
        self.calls, self.last = 0, None

    def forward(self, x, gain: float = 1.0):
        self.calls += 1
        self.noise = torch.empty(1).uniform_()
        self.last = self.act(self.up(self.conv(x * gain + self.noise)))
        return self.last


def test_the_search_leaves_no_trace():
    model = Stateful().eval()
    model.up.train()
    generator = torch.get_rng_state()
    before = {name: dict(vars(m)) for name, m in model.named_modules()}
    assert len(hflfnerv.fuse(model).fused) == 1
    hflfnerv.unfuse(model)
    assert {name: vars(m) for name, m in model.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), generator)
    assert (model.up.training, model.act.training) == (True, False)


class Remembering(Stateful):
    def __init__(self):
        super().__init__()
        self.history, self.seen, self.latest = [0], {"outputs": deque([1], maxlen=4)}, ([2],)
        self.names = {"first"}

    def forward(self, x):
        y = self.act(self.up(self.conv(x)))
        self.history.append(y)
        self.seen["outputs"].append(y)
        self.seen["last"] = y
        self.latest[0][0] = y
        self.names.add("second")
        return y


def test_the_search_leaves_nothing_in_containers():
    model = Remembering()
    containers = model.history, model.seen, model.seen["outputs"], model.latest, model.names
    assert len(hflfnerv.fuse(model).fused) == 1
    assert containers == ([0], {"outputs": deque([1])}, deque([1]), ([2],), {"first"})
    found = model.history, model.seen, model.seen["outputs"], model.latest, model.names
    assert all(a is b for a, b in zip(found, containers, strict=True))


def test_the_search_gives_a_debugger_its_function_back():
    def debugger(frame, event, argument):
        return None

    before = sys.gettrace()
    sys.settrace(debugger)
    try:
        hflfnerv.fuse(sequential())
        assert sys.gettrace() is debugger
    finally:
        sys.settrace(before)


class Counting(Stateful):
    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.steps += 1
        return self.act(self.up(self.conv(x)))


def test_a_buffer_that_forward_writes_stays():
    model = Counting()
    steps = model.steps
    assert len(hflfnerv.fuse(model).fused) == 1
    assert model.steps is steps
    assert steps == 0
    model(make_tensor(1, 3, 2, 2))
    assert model.steps == 1


class Unregistered(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.hidden = nn.PixelShuffle(2), [conv(), nn.GELU()]

    def forward(self, x):
        return self.hidden[1](self.up(self.hidden[0](x)))


def test_modules_in_a_plain_list_are_not_found():
    report = hflfnerv.fuse(Unregistered())
    assert report.left[0].reason == (
        "the model (Unregistered) around it cannot be traced (NameError: module is not installed as a submodule)"
    )


def test_neighbours_that_cannot_be_traced_do_not_matter():
    blind = Forward(branch_on_values)
    inside = nn.Sequential(nn.Sequential(blind, nn.Conv2d(2, 8, 1)), nn.PixelShuffle(2), nn.GELU())
    x = make_tensor(1, 3, 4, 4, seed=1).abs()
    expected = inside(x)
    report = hflfnerv.fuse(inside, impl="reference")
    assert report.fused == (Fused("0.1", "1", "2", 2),)
    assert [row.name for row in report.left] == ["0.0.up"]
    assert torch.equal(inside(x), expected)


def test_a_traced_model():
    x = make_tensor(1, 3, 4, 4)
    model = fx.symbolic_trace(Forward(lambda m, x: m.act(m.up(m.conv(x))) + 1))
    expected = model(x)
    assert hflfnerv.fuse(model, impl="reference").fused == (Fused("conv", "up", "act", 2),)
    assert torch.equal(model(x), expected)


def test_a_block_used_in_two_places():
    block = Block(UpConv(3, 3, 2, 3), 3)
    model = nn.ModuleDict({"a": block, "b": nn.Sequential(block, block)})
    x = make_tensor(1, 3, 2, 2)
    expected = model["b"](x)
    assert len(hflfnerv.fuse(model, impl="reference").fused) == 1
    assert torch.equal(model["b"](x), expected)
    assert hflfnerv.unfuse(model) == 1


@pytest.mark.parametrize("value", [None, torch.zeros(1), "model"])
def test_wants_a_module(value):
    for function in (hflfnerv.fuse, hflfnerv.unfuse):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got (NoneType|Tensor|str)"):
            function(value)


def test_wants_the_name_of_an_implementation():
    model = sequential()
    with pytest.raises(ValueError, match=r"impl must be one of \('auto', .*'reference'\), got 'fast'"):
        hflfnerv.fuse(model, impl="fast")
    assert not any(isinstance(m, FusedConv2d) for m in model.modules())


@pytest.mark.skipif(torch.cuda.is_available(), reason="the implementation can run here")
def test_an_implementation_that_cannot_run_is_refused_at_once():
    model = sequential()
    with pytest.raises(hflfnerv.BackendUnavailable, match=r"fuse: impl='conv2d\+triton' cannot run: "):
        hflfnerv.fuse(model, impl="conv2d+triton")
    assert not any(isinstance(m, FusedConv2d) for m in model.modules())


def test_docstrings():
    assert doctest.testmod(hflfnerv.fusion, raise_on_error=True).attempted > 0


def test_example(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fuse_hnerv.py", "--height", "20", "--runs", "1"])
    runpy.run_path(str(REPOSITORY / "examples" / "fuse_hnerv.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "fused: 3" in printed
    assert "left: 0" in printed
    assert "largest difference" in printed
