"""Sums over the shares of programs by Triton: in the interpreter, compiled ahead of time, and on a GPU."""

from __future__ import annotations

import pytest
import torch
from ahead_of_time import triton_version

from hflfnerv.ops._triton import unavailable
from hflfnerv.testing import make_tensor, requires

needs_gpu = pytest.mark.skipif(unavailable() is not None and not requires("cuda"), reason=f"triton: {unavailable()}")


def test_interpreter(interpreter):
    assert " passed" in interpreter("sum_shares")


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 4), (512, 128), (960, 112), (400, 756), (33, 800, 128), (5, 1200, 640)], ids=str)
@pytest.mark.parametrize("twice", [False, True])
def test_ahead_of_time(compile_launch, capability, dtype, shape, twice):
    from hflfnerv.triton_kernels import _sums

    def launch():
        partial, out = torch.zeros(shape), torch.zeros(shape[1:], dtype=dtype)
        more = (partial.flatten(1)[:, :3], torch.zeros(3, dtype=dtype)) if twice else ()
        _sums.sum_shares(partial, out, *more)

    (kernel,) = compile_launch(_sums, launch, capability)
    assert kernel.stack_bytes == kernel.local_bytes == 0, kernel
    # Thirty-two warps on a multiprocessor; sixteen by older Tritons.
    assert kernel.registers <= (64 if triton_version() >= (3, 9) else 128), kernel


def test_programs_are_many_and_loop_little():
    from hflfnerv.triton_kernels._sums import _TILE, _columns_of

    for rows, columns, programs, steps in (
        (512, 128, 32, 1),
        (960, 112, 28, 1),
        (7680, 112, 28, 8),
        (400, 756, 95, 1),
        (256, 3136, 196, 1),
        (33, 102400, 400, 3),
        (5, 768000, 1500, 1),
        (1, 64, 4, 1),
    ):
        block = _columns_of(rows, columns)
        assert -(-columns // block) == programs, (rows, columns)
        assert -(-rows // (_TILE // block)) == steps, (rows, columns)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 4), (512, 128), (960, 112), (400, 756), (33, 800, 128), (5, 1200, 640)], ids=str)
def test_sums(shape, dtype):
    from hflfnerv.triton_kernels._sums import sum_shares

    partial = make_tensor(*shape, device="cuda")
    out, again = (torch.empty(shape[1:], dtype=dtype, device="cuda") for _ in range(2))
    more, more_again = (torch.empty(3, dtype=dtype, device="cuda") for _ in range(2))
    sum_shares(partial, out, partial.flatten(1)[:, 1:4], more)
    sum_shares(partial, again, partial.flatten(1)[:, 1:4], more_again)
    assert torch.equal(out, again)
    assert torch.equal(more, more_again)
    true, size = partial.double().sum(0), partial.double().abs().sum(0)
    # Each of the sums that a value goes through rounds, and so does the result in the end.
    error = shape[0] * torch.finfo(torch.float32).eps / 2 * size + torch.finfo(dtype).eps / 2 * true.abs()
    assert bool(((out.double() - true).abs() <= error).all())
    assert bool(((more.double() - true.flatten()[1:4]).abs() <= error.flatten()[1:4]).all())
