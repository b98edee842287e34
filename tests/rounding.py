"""How far a convolution in bfloat16 may be off, from where its results are rounded: at most, and in the mean square."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

UNIT, SUM_UNIT = 2**-8, 2**-24  # largest relative errors of a rounding to bfloat16 and to float32
# Errors that are spread evenly up to the largest one have a third of its square as mean square. The sum of squares
# varies: where FEW numbers are rounded, half of them large, by sqrt(2 / 128) of it, and CHANCE allows four times as
# much. An element that is off by more than so many DEVIATIONS would be one in hundreds of millions.
MEAN_SQUARE, CHANCE, FEW, DEVIATIONS = 1 / 3, 1.5, 256, 6
GELU_ERROR, SLOPE_ERROR = (1e-7, 1.2e-7), 2e-7  # those that csrc/core/gelu_table.h promises


class Result(NamedTuple):
    """A result in float64; the expected square of the error of each element, and its largest one; how many numbers."""

    exact: torch.Tensor
    square: torch.Tensor
    most: torch.Tensor
    numbers: int


def gradients_of(dz, x, weight, padding):
    """Return the gradients of x and weight of a convolution."""
    return torch.ops.aten.convolution_backward(
        dz, x, weight, None, [1, 1], padding, [1, 1], False, [0, 0], 1, [True, True, False]
    )[:2]


def results(x, weight, bias, dy, r, padding, gelu=None):
    """Return y, dx, dweight and dbias as the kernels for AMX make them of tensors in bfloat16.

    Products of bfloat16 numbers are exact in float32, in which they are added up with a rounding each; as signs are
    random, squares of partial sums are at most the sum of the terms' squares in the mean. y is rounded once. With a
    GELU (``"none"`` or ``"tanh"``) so is z, what it is applied to, after y was made of it; GELU' of that times dy is
    rounded as dz, of which dx and dweight are made, after dbias was made of it. These are rounded once.
    """
    x, weight, dy = (t.detach().double() for t in (x, weight, F.pixel_unshuffle(dy, r)))
    bias = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.detach().double()
    z = F.conv2d(x, weight, bias, padding=padding)
    count = weight[0].numel() + 1
    z_square = count * MEAN_SQUARE * SUM_UNIT**2 * F.conv2d(x**2, weight**2, bias**2, padding=padding)
    z_most = count * SUM_UNIT * F.conv2d(x.abs(), weight.abs(), bias.abs(), padding=padding)
    if gelu is None:
        value, slope, dz = z, torch.ones_like(z), dy
        square, most = (torch.zeros_like(z) for _ in range(2))
        table = torch.zeros_like(z)
    else:
        z.requires_grad_()
        value = F.gelu(z, approximate=gelu)
        (slope,) = torch.autograd.grad(value.sum(), z, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), z)
        z, value, slope = (t.detach() for t in (z, value, slope))
        table = GELU_ERROR[0] + GELU_ERROR[1] * value.abs()
        dz = slope * dy
        # GELU' bends as well, by less than 1.
        far = z_most + UNIT * z.abs()
        more = dy.abs() * (far**2 / 2 + SLOPE_ERROR)
        square = (bend * dy) ** 2 * (z_square + MEAN_SQUARE * (UNIT * z) ** 2) + more**2
        most = (bend * dy).abs() * far + more
    y = _rounded(value, slope**2 * z_square + table**2, 1.13 * z_most + table)
    made = [tuple(F.pixel_shuffle(t, r) for t in y)]
    count = dz[:, 0].numel()
    sums = square + count * MEAN_SQUARE * (SUM_UNIT * dz) ** 2, most + count * SUM_UNIT * dz.abs()
    dbias = [t.sum(dim=(0, 2, 3)) for t in (dz, *sums)]
    if gelu is not None:
        _, square, most = _rounded(dz, square, most)
    exact, squares, sizes, of_square, of_most = (
        gradients_of(a, b, c, padding)
        for a, b, c in (
            (dz, x, weight),
            (dz**2, x**2, weight**2),
            (dz.abs(), x.abs(), weight.abs()),
            (square, x**2, weight**2),
            (most, x.abs(), weight.abs()),
        )
    )
    for i, count in enumerate((weight[:, 0].numel(), dz[:, 0].numel())):
        sums = of_square[i] + count * MEAN_SQUARE * SUM_UNIT**2 * squares[i], of_most[i] + count * SUM_UNIT * sizes[i]
        made.append(_rounded(exact[i], *sums))
    made.append(_rounded(*dbias))
    return [Result(*result, min(dz.numel(), result[0].numel())) for result in made]


def _rounded(exact, square, most):
    """Return the same with the error of a rounding to bfloat16, which may be of a number that is off already."""
    before = torch.minimum(most, DEVIATIONS * square.sqrt())
    return exact, square + MEAN_SQUARE * (UNIT * exact) ** 2, (1 + UNIT) * before + UNIT * exact.abs()


def assert_within(actual, result):
    """Assert that a result has no more than the errors of its roundings."""
    assert actual.dtype == torch.bfloat16
    assert actual.shape == result.exact.shape
    error = (actual.detach().double() - result.exact).abs()
    worst = (error - result.most).argmax()
    assert (error <= result.most).all(), (
        f"error {error.flatten()[worst]:.3e} is over {result.most.flatten()[worst]:.3e}, at element {worst}"
    )
    if result.numbers >= FEW:
        allowed = (CHANCE * result.square.sum()).sqrt()
        assert error.norm() <= allowed, f"error {error.norm():.3e} of all is over {allowed:.3e}"
