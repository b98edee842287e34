"""A kernel that reads a small buffer over and over past L1: the bandwidth from L2 to the multiprocessors."""

import triton
import triton.language as tl

BLOCK = 4096


@triton.jit
def l2_read_kernel(x_ptr, sums_ptr, blocks, REPEATS: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    pid = tl.program_id(0)
    element = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(REPEATS):
        block = (pid + i * tl.num_programs(0)) % blocks
        total += tl.load(x_ptr + block * BLOCK + element, cache_modifier=".cg")
    tl.store(sums_ptr + pid * BLOCK + element, total)


def l2_read(x, sums, programs, repeats):
    """Let ``programs`` programs read ``repeats`` blocks of float32 each and write their sums ``[programs, BLOCK]``."""
    blocks = x.numel() // BLOCK
    l2_read_kernel[(programs,)](x, sums, blocks, REPEATS=repeats, BLOCK=BLOCK, num_warps=8, enable_fp_fusion=True)
