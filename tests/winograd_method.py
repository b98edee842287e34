"""Winograd's method in a few lines, from its points, and the sizes of what it sums, which bound its rounding errors."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hflfnerv.testing import make_tensor


def channels_last(t):
    """The same with the strides of channels-last, also where an axis of size 1 leaves a choice."""
    _, c, h, w = t.shape
    return torch.empty_strided(t.shape, (c * h * w, 1, w * c, c), dtype=t.dtype).copy_(t)


def operands(shape, with_bias=True, dtype=torch.float32):
    """Return x, weight and bias of a block ``(B, C_in, C_out, r, H, W, kernel)``, channels-last."""
    batch, in_channels, channels, r, height, width, kernel = shape
    x = make_tensor(batch, in_channels, height, width)
    weight = make_tensor(channels * r * r, in_channels, kernel, kernel, scale=(in_channels * kernel**2) ** -0.5, seed=1)
    bias = make_tensor(channels * r * r, seed=2) if with_bias else None
    tensors = (channels_last(x), channels_last(weight), bias)
    return tuple(None if t is None else t.to(dtype) for t in tensors)


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


#: Of tiles of 18 x 18 points, of which integers are made: zero, infinity and the 16th roots of unity on each axis.
LINE, LARGEST = 18, 2**14 - 1


def _inputs_at_points(t, dim):
    """Return inputs ``[..., 18, ...]`` at zero, infinity and the 16 roots, complex."""
    inner = t.narrow(dim, 1, 16)
    zero = t.narrow(dim, 0, 1) - inner.narrow(dim, 15, 1)
    infinity = t.narrow(dim, 17, 1) - inner.narrow(dim, 0, 1)
    return torch.cat([zero + 0j, infinity + 0j, torch.fft.fft(inner, dim=dim)], dim)


def _taps_at_points(w, dim):
    """Return taps ``[..., k, ...]`` at the points, those of a correlation."""
    roots = torch.fft.ifft(w, 16, dim=dim) * 16
    return torch.cat([w.narrow(dim, 0, 1) + 0j, w.narrow(dim, w.shape[dim] - 1, 1) + 0j, roots], dim)


def _results(m, dim, taps):
    """Return the results ``[..., 19 - k, ...]`` of products at the points."""
    count = LINE + 1 - taps
    circle = torch.fft.ifft(m.narrow(dim, 2, 16), dim=dim).roll(1, dim).narrow(dim, 0, count)
    between = torch.zeros_like(circle).narrow(dim, 0, count - 2)
    return circle + torch.cat([m.narrow(dim, 0, 1), between, m.narrow(dim, 1, 1)], dim)


def _parts(z):
    return torch.view_as_real(z.resolve_conj())


def _rounded(z, scale):
    return torch.view_as_complex((_parts(z) / scale[..., None]).round() * scale[..., None])


def integer_sums(x, weight, taps):
    """Return what a convolution sums when tiles and weights are integers of 15 bits, in float64.

    Tiles have a scale for each column of points, and one for the root 1 of the other axis there; weights have one for
    each point, such that sums over channels stay below 2^31. The kernels have scales of their own for each 16 or 32
    output channels, so that their errors are a little smaller.
    """
    inputs = _inputs_at_points(_inputs_at_points(tiles(x, LINE, LINE + 1 - taps, taps // 2), -1), -2)
    sizes, one = _parts(inputs).abs().amax((1, -1)), torch.arange(LINE) == 2  # [B, rows, columns, y, x]
    scales = torch.stack([sizes[..., mask, :].amax(-2) for mask in (~one, one)], -2)
    # Columns k and 16 - k say the same.
    scales = torch.maximum(scales, scales[..., [0, 1, *(2 + (-k) % 16 for k in range(16))]])
    scales = scales[..., one.long(), :].clamp(min=1e-30) / LARGEST
    inputs = _rounded(inputs, scales[:, None])
    weights = _taps_at_points(_taps_at_points(weight, -1), -2)  # [N, C, y, x]
    sizes, limit = _parts(weights).abs(), (2**31 - 1) // LARGEST - x.shape[1] - 1
    sums, largest = sizes.sum((1, -1)).amax(0), sizes.amax((0, 1, -1))
    weights = _rounded(weights, torch.maximum(sums / limit, largest / LARGEST).clamp(min=1e-30))
    products = torch.einsum("bchwij,ncij->bnhwij", inputs, weights)
    result = _results(_results(products, -1, taps), -2, taps).real
    result = result.transpose(3, 4).flatten(4, 5).flatten(2, 3)
    return result[..., : x.shape[2], : x.shape[3]]
