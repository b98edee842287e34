"""Winograd's method in a few lines, from its points, and the sizes of what it sums, which bound its rounding errors."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def channels_last(t):
    """The same with the strides of channels-last, also where an axis of size 1 leaves a choice."""
    _, c, h, w = t.shape
    return torch.empty_strided(t.shape, (c * h * w, 1, w * c, c), dtype=t.dtype).copy_(t)


#: Those of an axis but infinity, by the number of all.
POINTS = {8: [0, 1, -1, 2, -2, 0.5, -0.5], 10: [0, 0.4, -0.4, 2.5, -2.5, 0.8, -0.8, 1.25, -1.25]}


def matrices(taps, size=8):
    """Return A^T ``[size + 1 - taps, size]``, G ``[size, taps]`` and B^T ``[size, size]`` in float64."""
    points, last = torch.tensor(POINTS[size], dtype=torch.float64), size - 1

    def powers(count):
        table = torch.zeros(size, count, dtype=torch.float64)
        table[:last] = points[:, None] ** torch.arange(count)
        table[last, -1] = 1
        return table

    weights, inputs = powers(taps), torch.zeros(size, size, dtype=torch.float64)
    for j in range(size):
        others = points if j == last else torch.cat([points[:j], points[j + 1 :]])
        polynomial = torch.ones(1, dtype=torch.float64)
        for p in others:
            polynomial = F.pad(polynomial, (1, 0)) - p * F.pad(polynomial, (0, 1))
        inputs[j, : len(polynomial)] = polynomial
        if j < last:
            weights[j] /= (points[j] - others).prod()
    return powers(size + 1 - taps).T, weights, inputs


def tiles(x, size, step, before):
    """Return the squares of ``size`` that begin every ``step`` pixels, ``[B, C, rows, columns, size, size]``."""
    height, width = x.shape[2:]
    after = [(-(-extent // step) - 1) * step + size - extent - before for extent in (height, width)]
    return F.pad(x, (before, after[1], before, after[0])).unfold(2, size, step).unfold(3, size, step)


def both_sides(matrix, t):
    return matrix @ t @ matrix.T


def sums(x, weight, taps, size=8):
    """Return what the convolution sums: of terms alone, or of their sizes where the operands and matrices are sizes."""
    at, g, bt = matrices(taps, size)
    absolute = bool((x >= 0).all() and (weight >= 0).all())
    at, g, bt = (m.abs() if absolute else m for m in (at, g, bt))
    inputs = both_sides(bt, tiles(x, size, size + 1 - taps, taps // 2))
    products = torch.einsum("bchwij,ncij->bnhwij", inputs, both_sides(g, weight))
    result = both_sides(at, products).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    return result[..., : x.shape[2], : x.shape[3]]


def gradient_sums(x, weight, dz):
    """Return the sizes of what the gradients of x and weight are sums of, in float64, for sizes of all three."""
    taps = weight.shape[2]
    at, g, bt = (m.abs() for m in matrices(taps))
    inputs = both_sides(bt, tiles(x, 8, 9 - taps, taps // 2))
    gradients = both_sides(at.T, tiles(dz, 9 - taps, 9 - taps, 0))
    dweight = both_sides(g.T, torch.einsum("bchwij,bnhwij->ncij", inputs, gradients))
    return sums(dz, weight.transpose(0, 1).flip(2, 3), taps), dweight


def magnitudes(x, weight, bias, dy, r):
    """Return the sizes of what y, dx, dweight and dbias are sums of, in float64: see ``assert_close_to_reference``.

    dz is dy times GELU's derivative, which is at most 1.13 and whose slope is at most 0.8: the error of z, a part of
    its own size, makes one of dz. It goes through the convolutions once, as any value does; what their own rounding
    makes of dz is another matter, and that alone grows with the sizes of the evaluated polynomials.
    """
    size, terms, slopes = (t.detach().double().abs() for t in (x, weight, F.pixel_unshuffle(dy, r)))
    z = sums(size, terms, weight.shape[2]) + (0 if bias is None else bias.detach().double().abs()[:, None, None])
    slopes, errors = 1.13 * slopes, 0.8 * z * slopes
    padding = [weight.shape[2] // 2] * 2
    passed_on = torch.ops.aten.convolution_backward(
        errors, size, terms, None, [1, 1], padding, [1, 1], False, [0, 0], 1, [True, True, False]
    )
    rounded = gradient_sums(size, terms, slopes)
    gradients = (a + b for a, b in zip(rounded, passed_on, strict=False))
    return F.pixel_shuffle(z, r), *gradients, (slopes + errors).sum(dim=(0, 2, 3))
