"""What a training step on the CPU takes beside the blocks: heads, loss, the encoders' blocks, and Muon's matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from hflfnerv import ops
from hflfnerv._memory import keep_freed_memory
from hflfnerv.codec.benchmark import newton_schulz
from hflfnerv.ops import _cpp
from hflfnerv.ops._depthwise_conv2d import depthwise_conv2d
from hflfnerv.ops._inverted_bottleneck import Bottleneck, inverted_bottleneck
from hflfnerv.ops._orthogonalise import orthogonalise
from hflfnerv.reference import stream_loss as reference
from hflfnerv.testing import assert_close_to_reference, make_tensor

from ..device import require_close
from ..registry import Contender, Point, Skipped, suite

# Channels, height and width of the last features: of the dual stream of 0.15 M and of the published HNeRV.
HEADS = [(2, 160, 320), (13, 160, 320), (28, 640, 1280)]
LOSSES = [(160, 320), (640, 1280)]
# Of the encoders: those of "best" at 160x320, and the first stage of HNeRV's at 640x1280.
DEPTHWISE = [(64, 8, 16), (32, 20, 40), (64, 128, 256)]
# Weights of blocks and encoders, as matrices, at 0.15 M and 1.5 M.
MATRICES = [(64, 256), (60, 450), (288, 189), (720, 486)]
# Of the same encoders, and of the matrices, those that AMX takes.
BOTTLENECKS = [(64, 8, 16), (32, 20, 40), (64, 128, 256)]
LARGE_MATRICES = MATRICES[2:]
BASELINE = "PyTorch"


@suite("training_ops_cpu")
def points() -> Iterable[Point]:
    """Yield forward and backward passes in float32, and in bfloat16 what AMX takes; channels-last."""
    if _cpp.unavailable() is not None:
        raise Skipped(str(_cpp.unavailable()))
    keep_freed_memory()  # as the command line does
    for shape in HEADS:
        yield _head(*shape)
    for size in LOSSES:
        yield _loss(*size)
    for shape in DEPTHWISE:
        yield _depthwise(*shape)
    for rows, columns in MATRICES:
        yield _orthogonalise(rows, columns, "cpp")
    if _cpp.unavailable_amx() is not None:
        return
    yield _head(*HEADS[-1], torch.bfloat16, "amx")
    for shape in BOTTLENECKS:
        yield _bottleneck(*shape)
    for rows, columns in LARGE_MATRICES:
        yield _orthogonalise(rows, columns, "amx")


def _image(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return make_tensor(*shape, layout="channels_last", seed=seed, dtype=dtype)


def _point(
    what: str,
    data: str,
    shape: Sequence[int],
    runs: dict[str, Callable[[], Any]],
    check: Callable[[], None],
    dtype: torch.dtype = torch.float32,
) -> Point:
    threads = torch.get_num_threads()
    contenders = [Contender(name, run, 1, f"{threads} threads") for name, run in runs.items()]
    facts = {"threads": threads}
    name = str(dtype).removeprefix("torch.")
    return Point(what, f"{data}, {name}", name, shape, "calls/s", 1, contenders, BASELINE, check, facts)


def _convolution(
    what: str,
    data: str,
    leaves: Sequence[torch.Tensor],
    name: str,
    ours: Callable[..., torch.Tensor],
    plain: Callable[..., torch.Tensor],
) -> Point:
    """Return a forward and backward pass."""
    dy = torch.randn_like(plain(*leaves))

    def step(
        function: Callable[..., torch.Tensor], change: Callable[[torch.Tensor], torch.Tensor] = lambda t: t
    ) -> list[torch.Tensor]:
        own = [change(t.detach()).requires_grad_() for t in leaves]
        y = function(*own)
        return [y.detach(), *torch.autograd.grad(y, own, change(dy))]

    def check() -> None:
        x, weight, _ = leaves
        pixels = x.shape[0] * x.shape[2] * x.shape[3]
        # Of y and the gradients of the leaves.
        terms = [weight[0].numel(), weight.numel() // x.shape[1], pixels, pixels]
        results = zip(step(ours), step(plain, torch.Tensor.double), step(plain), terms, strict=True)
        for actual, exact, same, count in results:
            require_close(data, actual, exact, same, terms=count)

    runs = {name: lambda: step(ours), BASELINE: lambda: step(plain)}
    return _point(what, data, leaves[0].shape, runs, check, leaves[0].dtype)


def _head(channels: int, height: int, width: int, dtype: torch.dtype = torch.float32, impl: str = "direct") -> Point:
    x, weight = _image(1, channels, height, width, dtype=dtype), _image(3, channels, 3, 3, seed=1, dtype=dtype)

    def plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, weight, bias, padding=1)

    def ours(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return ops.conv2d(x, weight, bias, impl=impl)

    data = f"head, {channels} -> 3, k = 3, {height} x {width}"
    return _convolution("conv2d", data, [x, weight, make_tensor(3, seed=2, dtype=dtype)], impl, ours, plain)


def _loss(height: int, width: int) -> Point:
    images = [_image(1, 3, height, width, seed=seed) for seed in (0, 1)]
    generator = torch.Generator().manual_seed(2)
    target = torch.randint(0, 256, (1, height, width, 3), dtype=torch.uint8, generator=generator)
    # As one writes it down: frames are kept as floats.
    frame = target.permute(0, 3, 1, 2) / 255

    def plain(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(torch.tanh(low) * 0.5 + 0.5 + torch.tanh(high), frame.to(low.dtype)).reshape(1)

    def check() -> None:
        leaves = [t.double().requires_grad_() for t in images]
        exact = torch.autograd.grad(reference.stream_loss(leaves[0], target, leaves[1]), leaves)
        same = [t.clone().requires_grad_() for t in images]
        rounded = torch.autograd.grad(reference.stream_loss(same[0], target, same[1]), same)
        for actual, true, other in zip(step(ours), exact, rounded, strict=True):
            assert_close_to_reference(actual, true, other)

    def ours(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        return ops.stream_loss(low, target, high, impl="cpp")

    def step(function: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in images]
        return torch.autograd.grad(function(*leaves), leaves)

    runs = {"cpp": lambda: step(ours), BASELINE: lambda: step(plain)}
    return _point("stream_loss", f"loss of two streams, {height} x {width}", images[0].shape, runs, check)


def _depthwise(channels: int, height: int, width: int) -> Point:
    leaves = [_image(1, channels, height, width), make_tensor(channels, 1, 7, 7, seed=1), make_tensor(channels, seed=2)]

    def plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, weight, bias, padding=3, groups=channels)

    def ours(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return depthwise_conv2d(x, weight, bias, padding=(3, 3))

    data = f"depthwise convolution, {channels} channels, k = 7, {height} x {width}"
    return _convolution("depthwise_conv2d", data, leaves, "cpp", ours, plain)


def _bottleneck(channels: int, height: int, width: int) -> Point:
    shapes = [(channels,), (channels,), (4 * channels, channels), (4 * channels,), (channels, 4 * channels)]
    parameters = [make_tensor(*shape, seed=seed) for seed, shape in enumerate([*shapes, (channels,), (channels,)])]
    # Of variances that a trained network has.
    parameters[2], parameters[4] = parameters[2] * channels**-0.5, parameters[4] * (4 * channels) ** -0.5
    x, u = (make_tensor(1, height, width, channels, seed=seed, dtype=torch.bfloat16) for seed in (7, 8))

    def step(impl: str, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, u, *parameters)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is None):
            y = inverted_bottleneck(leaves[0], leaves[1], Bottleneck(*leaves[2:]), eps=1e-6, impl=impl)
        return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    def check() -> None:
        # A sum of ones times normal values is what is left of many: the errors are in relation to the terms.
        for actual, exact, same in zip(step("amx"), step("reference", torch.double), step("reference"), strict=True):
            error, allowed = ((t.double() - exact).norm() for t in (actual, same))
            assert error <= 2 * allowed + 2**-8 * exact.norm(), f"error {error:.2e} is over {allowed:.2e}"

    runs = {"amx": lambda: step("amx"), BASELINE: lambda: step("reference")}
    data = f"norm, linear layers and GELU of a ConvNeXt block, {channels} channels, {height} x {width}"
    return _point("inverted_bottleneck", data, x.shape, runs, check, torch.bfloat16)


def _orthogonalise(rows: int, columns: int, impl: str) -> Point:
    dtype = torch.bfloat16 if impl == "amx" else torch.float32
    x = make_tensor(rows, columns, dtype=dtype)

    def check() -> None:
        exact = newton_schulz(x.double())
        # The bound of tests/train/test_muon.py: a Gram matrix's rounding, times a^8; of bfloat16 twice PyTorch's error.
        bound = 2 * 3.4445**8 * 2**-23 * exact.norm() if impl == "cpp" else 2 * (newton_schulz(x) - exact).norm()
        assert (orthogonalise(x, impl=impl) - exact).norm() <= bound

    runs = {impl: lambda: orthogonalise(x, impl=impl), BASELINE: lambda: newton_schulz(x)}
    return _point("orthogonalise", f"orthogonalisation for Muon, {rows} x {columns}", x.shape, runs, check, dtype)
