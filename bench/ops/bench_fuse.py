"""What ``hflfnerv.fuse`` does to published networks: the same weights before and after, in time and in memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

import hflfnerv
from hflfnerv._device import training_precision

from ..device import Machine, require_close, without_autotuning
from ..memory import peak_bytes
from ..published import NETWORKS, SMALL, Network
from ..registry import Contender, Point, suite

BASELINE, OURS = "eager", "hflfnerv.fuse"
UNITS = {"inference": "frames/s", "training": "steps/s"}
CPU = torch.device("cpu")
GPU_BATCH = 8
Run = Callable[[], list[torch.Tensor]]


def make_run(
    name: str,
    what: str,
    dtype: str,
    implementation: str,
    *,
    device: torch.device = CPU,
    networks: dict[str, Network] = NETWORKS,
    batch: int = 1,
    exact: bool = False,
) -> Run:
    """Return a function that makes frames, or takes its loss and the gradients of all weights.

    Float32 networks are as their code makes them. In bfloat16 weights are channels-last; inference has them cast, and
    training uses autocast, as one does.

    Args:
        name: of the network.
        what: ``"inference"`` or ``"training"``.
        dtype: ``"float32"`` or ``"bfloat16"``.
        implementation: whether it is fused.
        device: where it runs.
        networks: which of them.
        batch: frames at once.
        exact: compute in float64, from the weights and inputs of that dtype.

    Returns:
        The function; it returns the frames, and of training all gradients in one vector.
    """
    network = networks[name]
    torch.manual_seed(0)
    model = network.build().to(device)
    inputs = {key: torch.randn(batch, *shape).to(device) for key, shape in network.shapes.items()}
    training, half = what == "training", dtype == "bfloat16"
    if half:
        model = model.to(dtype=None if training else torch.bfloat16, memory_format=torch.channels_last)
        inputs = inputs if training else {key: x.bfloat16() for key, x in inputs.items()}
    if exact:
        # Contiguous: the backward pass of nn.InstanceNorm2d on the CPU (torch 2.13), which E-NeRV has, gives wrong
        # numbers for a channels-last gradient of a single image, in any dtype.
        model = model.to(dtype=torch.float64, memory_format=torch.contiguous_format)
        inputs = {key: x.double() for key, x in inputs.items()}
    if implementation == OURS:
        hflfnerv.fuse(model)
    arguments = network.arguments(inputs)
    parameters = list(model.parameters())

    def infer() -> list[torch.Tensor]:
        with torch.inference_mode():
            return [network.frames(model(*arguments))]

    def train() -> list[torch.Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=half and not exact, cache_enabled=False):
            frames = network.frames(model(*arguments))
        loss = F.mse_loss(frames.to(parameters[0].dtype), target)
        gradients = torch.autograd.grad(loss, parameters)
        return [frames.detach(), torch.cat([gradient.flatten() for gradient in gradients])]

    if not training:
        return infer
    with torch.inference_mode():
        shape = network.frames(model(*arguments)).shape
    target = torch.rand(shape).to(parameters[0])
    return train


make_small_run = functools.partial(make_run, networks=SMALL)


# Of the plain network's error: where convolutions run by Winograd's method it is what tests/ops holds that to.
WINOGRAD_FACTOR = 16.0


def _check(
    name: str,
    runs: dict[str, Callable[[], list[torch.Tensor]]],
    exact: Callable[[], list[torch.Tensor]],
    factor: float,
) -> None:
    """Raise unless frames and gradients of the fused network are as near to float64's as those of the plain one."""
    with without_autotuning():
        expected = exact()
    for actual, truth, same in zip(runs[OURS](), expected, runs[BASELINE](), strict=True):
        assert actual.isfinite().all(), f"{name}: not finite"
        require_close(name, actual, truth, same, factor)


def _point(
    name: str,
    what: str,
    dtype: str,
    networks: dict[str, Network],
    device: torch.device,
    batch: int,
    peak: Callable[[str], int | None],
    facts: dict[str, Any],
) -> Point:
    make = functools.partial(make_run, name, what, dtype, device=device, networks=networks, batch=batch)
    model = networks[name].build()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    blocks = len(hflfnerv.fuse(model).fused)
    runs = {implementation: make(implementation) for implementation in (OURS, BASELINE)}
    height, width = runs[BASELINE]()[0].shape[2:]
    data = f"{name} {parameters / 1e6:.2f}M, {height} x {width}, {dtype}, batch {batch}"

    units = batch if what == "inference" else 1
    factor = WINOGRAD_FACTOR if device.type == "cpu" and dtype == "float32" else 2.0

    def contender(implementation: str) -> Contender:
        return Contender(
            implementation, runs[implementation], units, facts=lambda: {"peak_bytes": peak(implementation)}
        )

    return Point(
        what=f"fuse.{what}",
        data=data,
        dtype=dtype,
        shape=(batch, 3, height, width),
        unit=UNITS[what],
        scale=1,
        contenders=[contender(implementation) for implementation in runs],
        baseline=BASELINE,
        check=lambda: _check(f"{data}, {what}", runs, make(BASELINE, exact=True), factor),
        facts={"parameters": parameters, "blocks": blocks, **facts},
    )


@suite("fuse")
def points() -> Iterable[Point]:
    """Yield inference and training of every network; in bfloat16 too where the CPU multiplies in it."""
    dtypes = ["float32", *(["bfloat16"] if training_precision("auto", CPU) == "bf16" else [])]
    facts = {"threads": torch.get_num_threads()}
    for name in NETWORKS:
        for dtype in dtypes:
            for what in UNITS:
                make = (f"{__name__}:make_run", f"{__name__}:make_small_run", name, what, dtype)
                yield _point(name, what, dtype, NETWORKS, CPU, 1, functools.partial(peak_bytes, *make), facts)


def gpu_points(machine: Machine) -> Iterator[dict[str, Any]]:
    """Measure the same on the device, in batches."""
    networks, batch = (SMALL, 2) if machine.dry else (NETWORKS, GPU_BATCH)
    for name in networks:
        for dtype in ("float32", "bfloat16"):
            for what in UNITS:
                label = f"{name}, {dtype}, {what}"
                if not machine.wants(label):
                    continue
                options = {"device": machine.device, "networks": networks, "batch": batch}
                make = functools.partial(make_run, name, what, dtype, **options)

                def peak(implementation: str, make: Callable[..., Any] = make) -> int | None:
                    return machine.peak_bytes(functools.partial(make, implementation))

                with machine.room(label):
                    point = _point(name, what, dtype, networks, machine.device, batch, peak, {})
                    yield from machine.measure(point, flush=False)
