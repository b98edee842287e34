"""How rows of channels, one after the other in memory, are divided among programs."""

import triton

_ELEMENTS = 8  # of a thread in each tensor: 16 bytes in half precision
_MULTIPROCESSORS = 132  # of an H100
_SHARES = 4 * _MULTIPROCESSORS  # of a sum over rows: as many programs of eight warps as run at the same time


def tile(channels, warps):
    """Return how many rows a program takes at a time, and channels with what pads them: both powers of two."""
    padded = triton.next_power_of_2(channels)
    return max(32 * warps * _ELEMENTS // padded, 1), padded


def shares(rows, block_r):
    """Return into how many shares a sum over rows is divided, and how many tiles of ``block_r`` rows each has."""
    tiles = triton.cdiv(rows, block_r)
    steps = triton.cdiv(tiles, _SHARES)
    return triton.cdiv(tiles, steps), steps
