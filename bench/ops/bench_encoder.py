"""Encoders on a GPU and single blocks of them, forward and backward, under autocast."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hflfnerv.config import PRESETS
from hflfnerv.models.convnext import ConvNeXtBlock, use_pytorch
from hflfnerv.models.hflf import HFLFNeRV
from hflfnerv.models.hnerv import HNeRV

from ..device import Machine, require_close, without_autotuning
from ..networks import network_of
from ..registry import Contender, Point

# Channels and size of the finest stage of an encoder, and of that of the one for details.
_BLOCKS = [(64, 128, 256), (32, 40, 80)]


def gpu_points(machine: Machine) -> Iterator[dict[str, Any]]:
    """Measure blocks and whole encoders against copies of them made of PyTorch's own operations."""
    for channels, height, width in _BLOCKS:
        name = f"block of {channels} channels, {height}x{width}, batch 1, bfloat16"
        if machine.wants(name, seconds=20):
            with machine.room(name):
                torch.manual_seed(1)
                block = ConvNeXtBlock(channels).to(machine.device)
                size = (channels, *machine.shape((height, width), (5, 8)))
                yield from _measure(machine, name, block, size, of_input=True)
    for preset in PRESETS:
        for model in (HNeRV, HFLFNeRV):
            name = f"encoder of {model.name} 1.5M {preset}, 640x1280, batch 1, bfloat16"
            if machine.wants(name, seconds=20):
                with machine.room(name):
                    network = network_of(machine, model, with_encoder=True, preset=preset)
                    size = (3, network.spec.height, network.spec.width)
                    assert network.encoder is not None
                    yield from _measure(machine, name, network.encoder, size, of_input=False)


def _measure(
    machine: Machine, name: str, layers: nn.Module, size: tuple[int, ...], *, of_input: bool
) -> Iterator[dict[str, Any]]:
    for module in layers.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.to(torch.bfloat16)  # a step casts them once, before it calls the network
        elif isinstance(module, ConvNeXtBlock):
            nn.init.normal_(module.gamma)  # with the first ones the branch would go unseen in the comparison
    layers = layers.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    pytorch, exact = copy.deepcopy(layers), copy.deepcopy(layers).double()
    use_pytorch(pytorch)
    use_pytorch(exact)
    x = torch.randn(1, *size, device=machine.device).contiguous(memory_format=torch.channels_last)
    x.requires_grad_(of_input)

    def forward(of: nn.Module, x: Tensor) -> Tensor:
        half = x.dtype == torch.float32
        with torch.autocast(machine.device.type, torch.bfloat16, enabled=half, cache_enabled=False):
            y: Tensor = of(x)
            return y

    def infer(of: nn.Module) -> Tensor:
        with torch.inference_mode():
            return forward(of, x)

    dy = torch.randn_like(infer(pytorch))

    def step(of: nn.Module, x: Tensor = x) -> list[Tensor]:
        y = forward(of, x)
        wanted = [*of.parameters(), *([x] if of_input else [])]
        gradients = torch.autograd.grad(y, wanted, dy.to(y.dtype))
        return [y.detach(), *gradients]

    functions = {"auto": layers, "eager": pytorch}

    def check() -> None:
        with without_autotuning():
            expected = step(exact, x.detach().double().requires_grad_(of_input))
        same = step(pytorch)
        for function_name, function in functions.items():
            with machine.trying(function_name):
                results = step(function)
                require_close(f"{name}, {function_name}", results[0], expected[0], same[0])
                actual, true, rounded = (torch.cat([g.flatten() for g in of[1:]]) for of in (results, expected, same))
                require_close(f"{name}, {function_name}, gradients", actual, true, rounded)

    runs: list[tuple[str, Callable[[nn.Module], Any]]] = [("forward", infer), ("forward_backward", step)]
    for what, run in runs:
        point = Point(
            what=f"encoder.{what}",
            data=name,
            dtype="bfloat16",
            shape=x.shape,
            unit="frames/s",
            scale=1.0,
            contenders=[
                Contender(function_name, functools.partial(run, function), 1)
                for function_name, function in functions.items()
            ],
            baseline="eager",
            check=check,
        )
        yield from machine.measure(point)
