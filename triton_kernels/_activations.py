"""GELU and tanh with their derivatives, and rounding to integers, in float32."""

import triton
import triton.language as tl

# GELU is z sigmoid(2 u(z)), u an odd polynomial in which z² counts as 50 at most: there the sigmoid is 0 or 1. The tanh
# form is that by definition; for the exact one u is fitted: GELU is then within 2.6e-5, its derivative within 5.1e-5.
_EXPONENT = tl.constexpr(-2.8853900817779268)  # exp(-2 u) = 2 ** (this u)


def gelu_form(approximate, dtype):
    """Return the form of GELU that kernels compute: "tanh", "erf", or in half precision "fitted" instead of that."""
    if approximate == "tanh":
        return "tanh"
    return "fitted" if dtype.itemsize == 2 else "erf"


@triton.jit
def _exponential(z, FORM: tl.constexpr):
    """Return exp(-2 u(z))."""
    square = tl.minimum(z * z, 50.0)
    if FORM == "tanh":
        u = 0.035677408136300125 * square + 0.7978845608028654
    else:
        u = (-3.5156457e-4 * square + 0.03700594) * square + 0.79750756
    return tl.exp2(z * (_EXPONENT * u))


@triton.jit
def gelu(z, FORM: tl.constexpr):
    """GELU, in one of the forms of gelu_form."""
    if FORM == "erf":
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    return z / (1.0 + _exponential(z, FORM))


@triton.jit
def gelu_derivative(z, FORM: tl.constexpr):
    """Its derivative."""
    if FORM == "tanh":
        e = _exponential(z, FORM)
        s = 1.0 / (1.0 + e)
        # e s is 1 - s without the cancellation.
        d = s + z * (e * s * s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    else:
        if FORM == "erf":
            distribution = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        else:
            distribution = 1.0 / (1.0 + _exponential(z, FORM))
        # exp(-z² / 2) / sqrt(2 pi)
        d = distribution + z * (tl.exp2(-0.7213475204444817 * z * z) * 0.3989422804014327)
    # All forms are within 1e-17 of their limits at |z| = 9 and overflow later. A NaN fails both comparisons and stays.
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
