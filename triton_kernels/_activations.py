"""GELU and tanh with their derivatives, and rounding to integers, in float32."""

import triton
import triton.language as tl


@triton.jit
def gelu(z, TANH: tl.constexpr):
    if TANH:
        # z (1 + tanh(u)) / 2 = z sigmoid(2 u)
        return z / (1.0 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))
    return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def gelu_derivative(z, TANH: tl.constexpr):
    if TANH:
        e = tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z))
        s = 1.0 / (1.0 + e)
        # e s is 1 - s without the cancellation.
        d = s + z * (e * s * s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    else:
        d = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    # Both forms are within 1e-17 of their limits at |z| = 9 and overflow later. A NaN fails both comparisons and stays.
    return tl.where(z > 9.0, 1.0, tl.where(z < -9.0, 0.0, d))


@triton.jit
def tanh(x):
    """Tanh of x, within 2e-7, and its derivative."""
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0.0, -t, t), 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def round_half_even(x):
    """The integer nearest to x, of two the even one, for magnitudes below 2²²."""
    # Adding 1.5 2²³ leaves no room for a fraction.
    return (x + 12582912.0) - 12582912.0
