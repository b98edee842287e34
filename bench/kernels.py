"""Where the time of a training step goes on a GPU: its kernels, the longest first."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from hflfnerv.config import PRESETS
from hflfnerv.models.hflf import HFLFNeRV
from hflfnerv.models.hnerv import HNeRV

from .device import Machine
from .networks import network_of, settings_of_best, trainers_step

_STEPS = 5
_KERNELS = 40  # that have a row


def points(machine: Machine) -> Iterator[dict[str, Any]]:
    """Profile the training steps of both networks, as the preset ``best`` has them and as published."""
    points = [("best", *each) for each in settings_of_best()]
    points += [("paper", model, PRESETS["paper"][model.name]) for model in (HNeRV, HFLFNeRV)]
    for preset, model, used in points:
        name = f"{model.name} 1.5M {preset}, 640x1280, batch {used.batch_size}"
        if machine.wants(name, seconds=40):
            with machine.room(name):
                network = network_of(machine, model, with_encoder=True, preset=preset)
                step = trainers_step(machine, network, used.batch_size, used, captured=False)
                yield from _profile(machine, name, step)


def _profile(machine: Machine, name: str, step: Callable[[], None]) -> Iterator[dict[str, Any]]:
    for _ in range(3):
        step()
    machine.synchronize()
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU if machine.dry else activity.CUDA]) as profiler:
        for _ in range(_STEPS):
            step()
        machine.synchronize()
    attribute = "self_cpu_time_total" if machine.dry else "self_device_time_total"
    kernels = [(getattr(event, attribute), event) for event in profiler.key_averages()]
    kernels = sorted([each for each in kernels if each[0] > 0], key=lambda each: -each[0])
    total, launches = sum(time for time, _ in kernels), sum(event.count for _, event in kernels)
    print(f"{name}: {total / _STEPS:.0f} us in {launches / _STEPS:.0f} kernels a step", file=sys.stderr, flush=True)
    now = machine.environment()
    for time, event in kernels[:_KERNELS]:
        yield {
            "what": "profile.training_step",
            "implementation": event.key[:160],
            "baseline": "",
            "data": name,
            "dtype": "bfloat16",
            "metric": "time",
            "unit": "% of the time of its kernels",
            "p20": 0.0,
            "p50": round(100 * time / total, 3),
            "p80": 0.0,
            "milliseconds": round(time / _STEPS / 1e3, 5),
            "launches": event.count / _STEPS,
            "kernels_of_step": launches / _STEPS,
            "milliseconds_of_step": round(total / _STEPS / 1e3, 4),
        } | now
