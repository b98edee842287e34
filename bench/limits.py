"""What the machine can do at most: copy, L2 reads, matrix products."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .device import Machine, require_close
from .registry import Contender, Point


def points(machine: Machine) -> Iterator[dict[str, Any]]:
    """Measure the limits that the other parts are compared with."""
    cases: list[tuple[str, Callable[[Machine], Iterator[dict[str, Any]]]]] = [("copy", _copy)]
    if not machine.dry:
        cases += [(f"L2 read, {mb} MB", functools.partial(_l2, megabytes=mb)) for mb in (8, 16, 24, 32)]
    cases += [(f"matmul {t}", functools.partial(_matmul, dtype=t)) for t in (torch.bfloat16, torch.float16)]
    for name, measure in cases:
        if machine.wants(name):
            with machine.room(name):
                yield from measure(machine)


def _copy(machine: Machine) -> Iterator[dict[str, Any]]:
    (size,) = machine.shape([2**31], [2**12])
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=machine.device)
    target = torch.zeros_like(source)

    def check() -> None:
        target.copy_(source)
        assert torch.equal(target, source)

    point = Point(
        what="limits.copy",
        data=f"{size} bytes on the device",
        dtype="uint8",
        shape=source.shape,
        unit="GB/s",
        scale=1e9,
        contenders=[Contender("torch copy_", lambda: target.copy_(source), 2 * size, "bytes read and written")],
        baseline="torch copy_",
        check=check,
    )
    yield from machine.measure(point, flush=False)


def _l2(machine: Machine, megabytes: int) -> Iterator[dict[str, Any]]:
    from .l2 import BLOCK, l2_read

    programs = 8 * torch.cuda.get_device_properties(machine.device).multi_processor_count
    # Small whole numbers, whose sums are exact in any order.
    x = torch.randint(0, 16, (megabytes * 2**20 // 4,), device=machine.device).float()
    sums = torch.empty(programs, BLOCK, device=machine.device)
    repeats = 128

    def check() -> None:
        l2_read(x, sums, programs, repeats)
        blocks = x.view(-1, BLOCK)
        index = torch.arange(programs, device=x.device)[:, None]
        index = (index + torch.arange(repeats, device=x.device) * programs) % len(blocks)
        assert torch.equal(sums[:4], blocks[index[:4]].sum(dim=1)), "L2 read: the sums are wrong"

    point = Point(
        what="limits.l2_read",
        data=f"{megabytes} MB, read by all multiprocessors",
        dtype="float32",
        shape=x.shape,
        unit="GB/s",
        scale=1e9,
        contenders=[
            Contender("triton", lambda: l2_read(x, sums, programs, repeats), programs * repeats * BLOCK * 4, "past L1")
        ],
        baseline="triton",
        check=check,
    )
    yield from machine.measure(point, flush=False)


def _matmul(machine: Machine, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    (n,) = machine.shape([8192], [16])
    a, b = (torch.randn(n, n, device=machine.device).to(dtype) for _ in range(2))

    def check() -> None:
        rows = slice(0, 64)
        require_close("matmul", (a @ b)[rows], a[rows].double() @ b.double(), a[rows] @ b)

    point = Point(
        what="limits.matmul",
        data=f"{n} x {n} x {n}, {str(dtype)[6:]}, random",
        dtype=str(dtype)[6:],
        shape=(n, n, n),
        unit="TFLOP/s",
        scale=1e12,
        contenders=[Contender("torch", lambda: a @ b, 2 * n**3)],
        baseline="torch",
        check=check,
    )
    yield from machine.measure(point, flush=False)
