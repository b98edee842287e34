"""What a training step on the CPU takes beside the blocks: heads, loss, depthwise convolutions, and Muon's matrices."""

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
BASELINE = "PyTorch"


@suite("training_ops_cpu")
def points() -> Iterable[Point]:
    """Yield forward and backward passes in float32, channels-last."""
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
        yield _orthogonalise(rows, columns)


def _image(*shape: int, seed: int = 0) -> torch.Tensor:
    return make_tensor(*shape, layout="channels_last", seed=seed)


def _point(
    what: str, data: str, shape: Sequence[int], runs: dict[str, Callable[[], Any]], check: Callable[[], None]
) -> Point:
    threads = torch.get_num_threads()
    contenders = [Contender(name, run, 1, f"{threads} threads") for name, run in runs.items()]
    facts = {"threads": threads}
    return Point(what, data, "float32", shape, "calls/s", 1, contenders, BASELINE, check, facts)


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
    return _point(what, data, leaves[0].shape, runs, check)


def _head(channels: int, height: int, width: int) -> Point:
    x, weight = _image(1, channels, height, width), _image(3, channels, 3, 3, seed=1)

    def plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, weight, bias, padding=1)

    def ours(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return ops.conv2d(x, weight, bias, impl="direct")

    data = f"head, {channels} -> 3, k = 3, {height} x {width}"
    return _convolution("conv2d", data, [x, weight, make_tensor(3, seed=2)], "direct", ours, plain)


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


def _orthogonalise(rows: int, columns: int) -> Point:
    x = make_tensor(rows, columns)

    def check() -> None:
        # The bound of tests/train/test_muon.py: a Gram matrix's rounding, times a^8.
        exact = newton_schulz(x.double())
        assert (orthogonalise(x, impl="cpp") - exact).norm() <= 2 * 3.4445**8 * 2**-23 * exact.norm()

    runs = {"cpp": lambda: orthogonalise(x, impl="cpp"), BASELINE: lambda: newton_schulz(x)}
    return _point("orthogonalise", f"orthogonalisation for Muon, {rows} x {columns}", x.shape, runs, check)
