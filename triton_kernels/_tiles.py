"""Configurations of the implicit GEMMs, and what decides about them."""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Tile(NamedTuple):
    """One configuration of a product: pixels and (tap, channel) of a block; the columns follow from the problem."""

    block_m: int
    block_k: int
    num_warps: int
    num_stages: int


class Limits(NamedTuple):
    """What decides about a configuration: the device's."""

    capability: tuple[int, int]
    shared_bytes: int  # that one program may use
    multiprocessors: int


HOPPER = Limits((9, 0), 232448, 132)


@functools.cache
def device_limits(index):
    """Return the :class:`Limits` of a CUDA device."""
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    return Limits(
        torch.cuda.get_device_capability(index), properties["max_shared_mem"], properties["multiprocessor_count"]
    )


def limits_of(x):
    """Return those of a tensor's device; of a Hopper GPU without one (the interpreter, compilation ahead of time)."""
    return device_limits(x.device.index) if x.is_cuda else HOPPER


def column_blocks(n):
    """Return (BLOCK_N, BLOCK_N2) for n output channels.

    A program computes BLOCK_N columns, and BLOCK_N2 more in an accumulator of their own: 132 columns are 128 + 16
    instead of 256, and 33 are 32 + 16 instead of 64. The packed weight is laid out by these, so they depend on nothing
    but n.
    """
    if n > 128 and not (n < 256 and 0 < n % 128 <= 64):
        return 128, 0
    whole = max(triton.next_power_of_2(n), 16)
    half = whole // 2
    rest = max(triton.next_power_of_2(n - half), 16)
    return (half, rest) if half >= 16 and half + rest < whole else (whole, 0)


def padded_columns(n):
    """Return the columns of all programs together."""
    return triton.cdiv(n, sum(column_blocks(n))) * sum(column_blocks(n))


@triton.jit
def halves(tile):
    """Return the left and the right half of the columns."""
    rows: tl.constexpr = tile.shape[0]
    columns: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, (rows, 2, columns // 2)), (0, 2, 1)))
