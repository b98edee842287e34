"""``highpass``: remove a rectangle of low frequencies, through the real FFT."""

from __future__ import annotations

from typing import Any

import torch

from .._impl import Implementation, ImplementationTable
from ..reference import highpass as reference
from ._check import check_tensor
from ._library import register
from ._triton import rejects_tensor, unavailable

__all__ = ["HIGHPASS", "half_spectrum_weights", "highpass"]


def half_spectrum_weights(
    height: int, width: int, removed: float, *, dtype: torch.dtype, device: torch.device | None = None
) -> torch.Tensor:
    """Return what to multiply ``torch.fft.rfft2(x)`` with: ``[H, W // 2 + 1]`` of 0, 1/2 and 1.

    Let ``R_N`` be the set of removed frequencies on an axis of N samples, ``-n … n - 1`` with
    ``n = int(removed (N // 2))``, a frequency being its representative in ``-(N // 2) … N - N // 2 - 1``. The mask is
    ``M(u, v) = 1 - [u ∈ R_H][v ∈ R_W]``. It is not symmetric, so ``ifft2(M · X)`` of a real image is complex; the real
    part of an inverse transform is the inverse transform of the Hermitian part, and as ``X(-u, -v) = conj X(u, v)``,
    that part is ``X · M'`` with

    ``M'(u, v) = (M(u, v) + M(-u, -v)) / 2 = 1 - ([u ∈ R_H][v ∈ R_W] + [-u ∈ R_H][-v ∈ R_W]) / 2``

    (negation modulo N: for even N the Nyquist frequency ``-N/2`` is its own mirror). ``M'`` is real and symmetric, so
    half of the spectrum holds all of it, for even and odd sizes alike.
    """

    def inside(size: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        n = reference.removed_frequencies(size, removed)
        index = torch.arange(count, device=device)
        above = size - size // 2  # the first index that stands for a negative frequency
        frequency = torch.where(index < above, index, index - size)
        # -N/2 mirrors to itself, which is the one place where -frequency is not a representative.
        mirror = torch.where(frequency * 2 == -size, frequency, -frequency)
        return (frequency >= -n) & (frequency < n), (mirror >= -n) & (mirror < n)

    rows, mirrored_rows = inside(height, height)
    columns, mirrored_columns = inside(width, width // 2 + 1)
    box = rows[:, None] & columns
    mirrored_box = mirrored_rows[:, None] & mirrored_columns
    return 1 - (box.to(dtype) + mirrored_box.to(dtype)) / 2


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _run_reference(x: torch.Tensor, removed: float) -> torch.Tensor:
    return reference.highpass(x.to(_working_dtype(x.dtype)), removed).to(x.dtype)


def _run_fft(x: torch.Tensor, removed: float) -> torch.Tensor:
    height, width = x.shape[-2:]
    dtype = _working_dtype(x.dtype)
    weights = half_spectrum_weights(height, width, removed, dtype=dtype, device=x.device)
    spectrum = torch.fft.rfft2(x.to(dtype).contiguous())
    y: torch.Tensor = torch.fft.irfft2(spectrum * weights, s=(height, width)).to(x.dtype)
    return y


def _triton_rejects(x: torch.Tensor, removed: float) -> str | None:
    return rejects_tensor(x.device, x.dtype)


def _run_triton(x: torch.Tensor, removed: float) -> torch.Tensor:
    out: torch.Tensor = torch.ops.hflfnerv.highpass(x, removed, "triton")
    return out


HIGHPASS = ImplementationTable(
    "highpass",
    [
        Implementation("triton", _run_triton, unavailable, _triton_rejects),
        Implementation("fft", _run_fft),
        Implementation("reference", _run_reference),
    ],
)


def _forward(x: torch.Tensor, removed: float, impl: str) -> torch.Tensor:
    if impl == "fft":
        return _run_fft(x, removed).contiguous()
    from ..triton_kernels.highpass import highpass_fwd

    height, width = x.shape[-2:]
    # Libraries round otherwise for other strides.
    spectrum = torch.fft.rfft2(x.float().contiguous()).contiguous()
    highpass_fwd(
        spectrum,
        width,
        reference.removed_frequencies(height, removed),
        reference.removed_frequencies(width, removed),
    )
    y: torch.Tensor = torch.fft.irfft2(spectrum, s=(height, width)).to(x.dtype).contiguous()
    return y


def _forward_fake(x: torch.Tensor, removed: float, impl: str) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, ctx.removed, ctx.impl = inputs


def _autograd(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    # The filter is its own adjoint, see highpass().
    return torch.ops.hflfnerv.highpass(dy, ctx.removed, ctx.impl), None, None


register(
    "highpass(Tensor x, float removed, str impl) -> Tensor",
    run=_forward,
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
)


def highpass(x: torch.Tensor, removed: float = 0.8, *, impl: str = "auto") -> torch.Tensor:
    """Remove the low frequencies of each image, a hard-edged rectangle of the spectrum (arXiv 2409.18497).

    ``y = Re(ifft2(mask · fft2(x)))``: in the shifted layout ``mask`` is 0 in rows ``H // 2 - n … H // 2 + n - 1`` with
    ``n = int(removed (H // 2))`` and columns likewise, both at once, and 1 elsewhere.

    Equivalent PyTorch, for any H and W: ``torch.fft.ifft2(torch.fft.fft2(x) * torch.fft.ifftshift(mask)).real``.

    Args:
        x: ``[..., H, W]``, floating point, any strides; leading axes are a batch.
        removed: share of the bandwidth to remove on each axis, in [0, 1]. 0 removes nothing.
        impl: ``"auto"``, ``"triton"`` (CUDA: real FFT and one mask kernel in place), ``"fft"`` (real FFT, anywhere) or
            ``"reference"`` (the complex FFT of the definition).

    Returns:
        ``[..., H, W]`` in x's dtype, signed.

    Raises:
        TypeError: x is not a floating-point tensor or removed is not a number.
        ValueError: x has fewer than two axes or an empty image, or removed is outside [0, 1].
        BackendUnavailable: the named implementation cannot run; the message says why.

    Numerics:
        Computed in float64 for float64 input and in float32 otherwise. The filter is linear, and self-adjoint for every
        H, W and ``removed`` (its weights on the spectrum are real and mirror-symmetric), so the gradient of
        ``highpass`` is ``highpass`` of the gradient. Because the range ``-n … n - 1`` is lopsided, frequencies on its
        rim are halved; applying the filter twice therefore equals applying it once only where nothing (n = 0 on an
        axis) or everything is removed.

    Example:
        >>> highpass(torch.ones(3, 8, 8), 0.5).abs().max() < 1e-6
        tensor(True)
    """
    check_tensor("x", x)
    if x.dim() < 2 or x.shape[-1] == 0 or x.shape[-2] == 0:
        raise ValueError(f"x must be [..., H, W] with H and W at least 1, got shape {tuple(x.shape)}")
    if isinstance(removed, bool) or not isinstance(removed, (int, float)):
        raise TypeError(f"removed must be a number, got {removed!r} ({type(removed).__name__})")
    if not 0 <= removed <= 1:
        raise ValueError(f"removed must be in [0, 1], got {removed!r}")
    removed = float(removed)
    entry = HIGHPASS.select(impl, x, removed)
    if x.numel() == 0:
        return x.clone()  # FFT libraries refuse an empty batch
    out: torch.Tensor = entry.run(x, removed)
    return out
