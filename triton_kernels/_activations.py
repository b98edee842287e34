"""GELU and tanh with their derivatives, and rounding to integers, in float32."""

import triton
import triton.language as tl

# GELU is z (1 + tanh(u(z))) / 2, u an odd polynomial in which z² counts as 50 at most: there tanh is -1 or 1. The tanh
# form is that by definition; for the exact one u is fitted: GELU is then within 2.6e-5, its derivative within 5.1e-5.
# In half precision tanh is the hardware's, within 5e-4 of its value: the arithmetic of a division, or of erf, would
# take longer than the memory does.
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))  # which has no instructions of the hardware


def gelu_form(approximate, dtype):
    """Return the form of GELU that kernels compute: "erf", "tanh", or in half precision "fitted" and "fast tanh"."""
    if dtype.itemsize == 2:
        return "fast tanh" if approximate == "tanh" else "fitted"
    return "tanh" if approximate == "tanh" else "erf"


@triton.jit
def _argument(z, FORM: tl.constexpr):
    """Return u(z)."""
    square = tl.minimum(z * z, 50.0)
    if FORM == "fitted":
        return z * ((-3.5156457e-4 * square + 0.03700594) * square + 0.79750756)
    return z * (0.035677408136300125 * square + 0.7978845608028654)


@triton.jit
def _fast_tanh(x):
    if _INTERPRETED:
        return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _fast_exp2(x):
    if _INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def gelu(z, FORM: tl.constexpr):
    """GELU, in one of the forms of gelu_form."""
    if FORM == "erf":
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    if FORM == "tanh":
        # z (1 + tanh(u)) / 2 = z sigmoid(2 u)
        return z / (1.0 + tl.exp(-2.0 * _argument(z, FORM)))
    half = 0.5 * z
    return half * _fast_tanh(_argument(z, FORM)) + half


@triton.jit
def gelu_derivative(z, FORM: tl.constexpr):
    """Its derivative."""
    if FORM == "tanh":
        e = tl.exp(-2.0 * _argument(z, FORM))
        s = 1.0 / (1.0 + e)
        # e s is 1 - s without the cancellation.
        d = s + z * (e * s * s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    elif FORM == "fast tanh":
        u = _argument(z, FORM)
        t = _fast_tanh(u)
        # 1 - t² is 4 e / (1 + e)², e = exp(-2 |u|), without the cancellation; and 2 / (1 + e) is 1 + |t|.
        twice = 1.0 + tl.abs(t)
        slope = _fast_exp2(-2.8853900817779268 * tl.abs(u)) * twice * twice
        d = 0.5 * t + 0.5 + z * slope * (0.053516112204450188 * (z * z) + 0.3989422804014327)
    else:
        # The distribution, and z times its density exp(-z² / 2) / sqrt(2 pi).
        if FORM == "erf":
            d = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
            d += z * tl.exp(-0.5 * z * z) * 0.3989422804014327
        else:
            d = 0.5 * _fast_tanh(_argument(z, FORM)) + 0.5
            d += z * (_fast_exp2(-0.7213475204444817 * z * z) * 0.3989422804014327)
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
