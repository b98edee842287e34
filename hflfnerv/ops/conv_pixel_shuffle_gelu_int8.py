"""``conv_pixel_shuffle_gelu_int8``: the upsampling block on 8-bit integers, for inference."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch

from .._impl import Implementation, ImplementationTable
from ..reference import conv_pixel_shuffle_gelu_int8 as reference
from ._check import check_approximate, check_tensor, check_upscale_factor
from ._library import register
from ._triton import rejects_tensor, unavailable

__all__ = [
    "CONV_PIXEL_SHUFFLE_GELU_INT8",
    "QUANTIZE_INT8",
    "Int8Block",
    "Int8Range",
    "conv_pixel_shuffle_gelu_int8",
    "int8_image",
    "quantize_int8",
]

_GROUP = 8  # pixels of an image hold a multiple of this many channels
_INT32_MAX = 2**31 - 1
_LEVELS = 255


@dataclass(frozen=True, eq=False)
class Int8Range:
    """How the channels of an activation are quantised: ``q = clamp(round(a / scale) + zero_point, -128, 127)``.

    Attributes:
        scale: float32 ``[C]``, positive.
        zero_point: int8 ``[C]``, what 0 becomes, exactly.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor

    @classmethod
    def of(cls, low: torch.Tensor, high: torch.Tensor) -> Int8Range:
        """Return the range that just holds all values from ``low`` to ``high``, and 0.

        Args:
            low: floating point ``[C]``, the least value of each channel, finite.
            high: the greatest, likewise.

        Raises:
            TypeError: low or high is not a floating-point tensor.
            ValueError: they are not of one length, or not finite.
        """
        for name, bound in (("low", low), ("high", high)):
            check_tensor(name, bound)
            if bound.dim() != 1 or bound.shape != low.shape:
                raise ValueError(f"{name} must be [C], of low's length, got shape {tuple(bound.shape)}")
            _check_finite(name, bound)
        low, high = low.float().clamp(max=0), high.float().clamp(min=0)
        # A channel that is 0 throughout may have any scale.
        scale = (high - low) / _LEVELS
        scale = torch.where(scale > 0, scale, torch.ones_like(low))
        return cls(scale, (-128 - low / scale).round().clamp(-128, 127).to(torch.int8))

    @functools.cached_property
    def inverse_scale(self) -> torch.Tensor:
        """The float32 numbers with which activations are multiplied, ``[C]``."""
        return 1 / self.scale


@dataclass(frozen=True, eq=False)
class Int8Block:
    """An upsampling block in int8: weights per output channel, activations per channel.

    Attributes:
        weight: int8 ``[C_out r², C_in, K_h, K_w]``, from -127 to 127.
        scale: float32 ``[C_out r²]``, what a sum is multiplied by.
        bias: float32 ``[C_out r²]``, with what the zero points of the input add to a sum taken off.
        r: upscale factor.
        approximate: the form of GELU.
        output: how the result is quantised, or None where it is left in floating point.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor
    r: int
    approximate: str
    output: Int8Range | None = None
    _packed: list[torch.Tensor] = field(default_factory=list, init=False, repr=False)

    @classmethod
    def of(
        cls,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        r: int,
        input: Int8Range,
        output: Int8Range | None = None,
        *,
        approximate: str = "none",
    ) -> Int8Block:
        """Quantise the weight of a block, with the scales of its input in it, per output channel.

        Args:
            weight: floating point ``[C_out r², C_in, K_h, K_w]``, finite.
            bias: floating point ``[C_out r²]``, finite, or None.
            r: upscale factor.
            input: of the C_in channels of the block's input.
            output: of the C_out channels of its result, or None for a result in floating point.
            approximate: ``"none"`` for the exact GELU (erf), ``"tanh"`` for its tanh form.

        Raises:
            TypeError: weight or bias is not floating point, or r is not an int.
            ValueError: a shape or a number is not as above.
        """
        check_tensor("weight", weight)
        check_upscale_factor(r)
        check_approximate(approximate)
        if weight.dim() != 4 or weight.shape[0] % (r * r) != 0:
            raise ValueError(f"weight must be [C_out {r}², C_in, K_h, K_w], got shape {tuple(weight.shape)}")
        if input.scale.shape != (weight.shape[1],):
            raise ValueError(f"input must be of weight's {weight.shape[1]} channels, got {tuple(input.scale.shape)}")
        if bias is not None:
            check_tensor("bias", bias)
            if bias.shape != (weight.shape[0],):
                raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
            _check_finite("bias", bias)
        _check_finite("weight", weight)
        channels = weight.shape[0] // (r * r)
        if output is not None and output.scale.shape != (channels,):
            raise ValueError(f"output must be of {channels} channels, got {tuple(output.scale.shape)}")
        folded = weight.detach().double() * input.scale.double()[:, None, None]
        scale = folded.abs().amax(dim=(1, 2, 3)) / 127
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        integers = (folded / scale[:, None, None, None]).round()
        offset = (integers * input.zero_point.double()[:, None, None]).sum(dim=(1, 2, 3))
        shift = torch.zeros_like(scale) if bias is None else bias.detach().double()
        bias = (shift - scale * offset).float()
        return cls(integers.to(torch.int8), scale.float(), bias, r, approximate, output)

    @property
    def out_channels(self) -> int:
        """C_out."""
        return self.weight.shape[0] // self.r**2

    def packed(self) -> list[torch.Tensor]:
        """Return weight and columns as Triton's kernel reads them, made once."""
        if not self._packed:
            self._packed.extend(_pack(self))
        return self._packed


def int8_image(batch: int, height: int, width: int, quantization: Int8Range, *, halo: int) -> torch.Tensor:
    """Return an image that holds 0 everywhere.

    The kernels write its inside and read its border, so one that is kept need never be made again.

    Args:
        batch: B.
        height: of what is written to it.
        width: likewise.
        quantization: of its C channels, and on its device.
        halo: pixels of border on each side: half of the kernel that reads it.

    Returns:
        int8 ``[B, C, height + 2 halo, width + 2 halo]``, whose pixels are contiguous and lie a multiple of 8 apart.

    Raises:
        ValueError: a size is less than 1, or halo less than 0.
    """
    if min(batch, height, width) < 1 or halo < 0:
        raise ValueError(
            f"batch, height and width must be at least 1 and halo at least 0, got {batch}, {height}, {width} and {halo}"
        )
    channels = len(quantization.zero_point)
    size = (batch, height + 2 * halo, width + 2 * halo, _pixel(channels))
    memory = torch.zeros(size, dtype=torch.int8, device=quantization.zero_point.device)
    image = memory[..., :channels].permute(0, 3, 1, 2)
    return image.copy_(quantization.zero_point[:, None, None])


def _check_finite(name: str, t: torch.Tensor) -> None:
    finite = t.isfinite()
    if not finite.all():
        raise ValueError(f"{name} must be finite, got {t[~finite][0].item()}")


def _pixel(channels: int) -> int:
    """Return the distance in memory from one pixel of an image to the next."""
    return channels + -channels % _GROUP


def _pack(block: Int8Block) -> tuple[torch.Tensor, torch.Tensor]:
    from ..triton_kernels.conv_pixel_shuffle_gelu_int8 import pack_columns, pack_weight

    quantisation = (None, None) if block.output is None else (block.output.inverse_scale, block.output.zero_point)
    weight = pack_weight(block.weight, block.r, _pixel(block.weight.shape[1]))
    return weight, pack_columns(block.scale, block.bias, block.r, *quantisation)


def _check_image(name: str, t: torch.Tensor, channels: int) -> None:
    """Raise unless ``t`` is an image, as :func:`int8_image` makes them, of so many channels."""
    if not isinstance(t, torch.Tensor) or t.dtype != torch.int8:
        raise TypeError(f"{name} must be an int8 tensor, got {t.dtype if isinstance(t, torch.Tensor) else type(t)}")
    if t.dim() != 4 or t.shape[1] != channels:
        raise ValueError(f"{name} must be [B, {channels}, rows, columns], got shape {tuple(t.shape)}")
    pixel = _pixel(channels)
    if t.stride() != (t.shape[2] * t.shape[3] * pixel, 1, t.shape[3] * pixel, pixel):
        raise ValueError(f"{name} must lie in memory as int8_image makes it, got strides {t.stride()}")


def _inside(out: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return the part of an image within its border."""
    top, left = (out.shape[2] - height) // 2, (out.shape[3] - width) // 2
    return out[:, :, top : top + height, left : left + width]


def _run_quantize(
    x: torch.Tensor, inverse_scale: torch.Tensor, zero_point: torch.Tensor, out: torch.Tensor, impl: str
) -> None:
    if impl == "triton":
        from ..triton_kernels.conv_pixel_shuffle_gelu_int8 import quantize_int8_fwd

        quantize_int8_fwd(x.contiguous(memory_format=torch.channels_last), inverse_scale, zero_point, out)
        return
    _inside(out, *x.shape[2:]).copy_(reference.quantize_int8(x, inverse_scale, zero_point))


def _run(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    inverse_scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    packed: list[torch.Tensor],
    out: torch.Tensor,
    r: int,
    approximate: str,
    impl: str,
) -> None:
    if impl == "triton":
        from ..triton_kernels.conv_pixel_shuffle_gelu_int8 import conv_pixel_shuffle_gelu_int8_fwd

        kernel_size = (weight.shape[2], weight.shape[3])
        conv_pixel_shuffle_gelu_int8_fwd(x, *packed, out, kernel_size, r, approximate)
        return
    y = reference.conv_pixel_shuffle_gelu_int8(x, weight, scale, bias, r, approximate=approximate)
    if inverse_scale is not None and zero_point is not None:
        y = reference.quantize_int8(y, inverse_scale, zero_point)
    _inside(out, *y.shape[2:]).copy_(y)


def _fake(*args: object) -> None:
    return None


# ``packed`` is what ``Int8Block.packed`` returns for "triton", else empty.
register(
    "quantize_int8(Tensor x, Tensor inverse_scale, Tensor zero_point, Tensor(a!) out, str impl) -> ()",
    run=_run_quantize,
    fake=_fake,
)
register(
    "conv_pixel_shuffle_gelu_int8(Tensor x, Tensor weight, Tensor scale, Tensor bias, Tensor? inverse_scale, "
    "Tensor? zero_point, Tensor[] packed, Tensor(a!) out, int r, str approximate, str impl) -> ()",
    run=_run,
    fake=_fake,
)


def _triton_rejects_quantize(x: torch.Tensor, quantization: Int8Range, out: torch.Tensor) -> str | None:
    return rejects_tensor(x.device, x.dtype) or _too_large(out)


def _too_large(image: torch.Tensor) -> str | None:
    elements = image.shape[2] * image.shape[3] * image.stride(3)
    if elements > _INT32_MAX:
        return f"one image has {elements} elements in memory, more than {_INT32_MAX}"
    pixels = image.shape[0] * image.shape[2] * image.shape[3]
    return f"the images have {pixels} pixels, more than {_INT32_MAX}" if pixels > _INT32_MAX else None


def _quantize_as(impl: str, x: torch.Tensor, quantization: Int8Range, out: torch.Tensor) -> None:
    torch.ops.hflfnerv.quantize_int8(x, quantization.inverse_scale, quantization.zero_point, out, impl)


def _triton_rejects(x: torch.Tensor, block: Int8Block, out: torch.Tensor) -> str | None:
    dtype = torch.float32 if out.dtype == torch.int8 else out.dtype
    return rejects_tensor(x.device, dtype) or _too_large(x) or _too_large(out)


def _run_as(impl: str, x: torch.Tensor, block: Int8Block, out: torch.Tensor) -> None:
    # What the kernel reads of the output's quantisation is among what is packed.
    packed = block.packed() if impl == "triton" else []
    to = None if packed else block.output
    output = (None, None) if to is None else (to.inverse_scale, to.zero_point)
    torch.ops.hflfnerv.conv_pixel_shuffle_gelu_int8(
        x, block.weight, block.scale, block.bias, *output, packed, out, block.r, block.approximate, impl
    )


QUANTIZE_INT8 = ImplementationTable(
    "quantize_int8",
    [
        Implementation("triton", functools.partial(_quantize_as, "triton"), unavailable, _triton_rejects_quantize),
        Implementation("reference", functools.partial(_quantize_as, "reference")),
    ],
)
CONV_PIXEL_SHUFFLE_GELU_INT8 = ImplementationTable(
    "conv_pixel_shuffle_gelu_int8",
    [
        Implementation("triton", functools.partial(_run_as, "triton"), unavailable, _triton_rejects),
        Implementation("reference", functools.partial(_run_as, "reference")),
    ],
)


def quantize_int8(x: torch.Tensor, quantization: Int8Range, out: torch.Tensor, *, impl: str = "auto") -> torch.Tensor:
    """Quantise an activation into the inside of an image.

    Equivalent PyTorch, s and z of :class:`Int8Range`: ``(x * (1 / s) + z).clamp(-128, 127).round().to(torch.int8)``.

    Args:
        x: ``[B, C, H, W]``, floating point.
        quantization: of each channel.
        out: int8 ``[B, C, H + 2 halo, W + 2 halo]`` from :func:`int8_image`; its border stays.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``.

    Returns:
        ``out``.

    Raises:
        TypeError: x is not floating point, or out not int8.
        ValueError: a shape, device, layout or name is not as above.
        BackendUnavailable: the named implementation cannot run; the message says why.
    """
    check_tensor("x", x)
    if x.dim() != 4 or x.shape[1:2] != quantization.zero_point.shape:
        raise ValueError(f"x must be [B, {len(quantization.zero_point)}, H, W], got shape {tuple(x.shape)}")
    _check_image("out", out, x.shape[1])
    _check_output(out, x.shape[0], x.shape[2], x.shape[3])
    _check_devices(x, quantization.zero_point, out)
    QUANTIZE_INT8.select(impl, x, quantization, out).run(x, quantization, out)
    return out


def _check_output(out: torch.Tensor, batch: int, height: int, width: int) -> None:
    borders = out.shape[2] - height, out.shape[3] - width
    if out.shape[0] != batch or min(borders) < 0 or any(border % 2 for border in borders):
        raise ValueError(
            f"out must hold {batch} images of {height} x {width} and a border of as many pixels on either side, "
            f"got shape {tuple(out.shape)}"
        )


def _check_devices(x: torch.Tensor, *tensors: torch.Tensor) -> None:
    for t in tensors:
        if t.device != x.device:
            raise ValueError(f"all tensors must be on x's device {x.device}, got one on {t.device}")


def conv_pixel_shuffle_gelu_int8(
    x: torch.Tensor, block: Int8Block, out: torch.Tensor, *, impl: str = "auto"
) -> torch.Tensor:
    """Run an upsampling block on 8-bit integers: from an image to the next one, or to floating point.

    ``y = GELU(PixelShuffle_r(scale * (weight * x) + bias))``, then quantised as ``block.output`` says. The border of x
    is what pads the convolution: zero points, each of which stands for 0.

    Args:
        x: int8 ``[B, C_in, H + K_h - 1, W + K_w - 1]`` from :func:`int8_image`.
        block: weights, scales, and how the result is quantised.
        out: int8 ``[B, C_out, H r + 2 halo, W r + 2 halo]`` from :func:`int8_image`, whose border stays; or, where
            ``block.output`` is None, floating point ``[B, C_out, H r, W r]``, channels-last.
        impl: ``"auto"``, ``"triton"`` or ``"reference"`` (PyTorch, anywhere; slow).

    Returns:
        ``out``.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape, device, layout or name is not as above.
        BackendUnavailable: the named implementation cannot run; the message says why.

    Numerics:
        Sums are exact. What follows is float32 and rounded once, to 8 bits or to out's dtype; implementations differ
        by the rounding of GELU, so now and then by one step of ``block.output``.

    Example:
        >>> half = Int8Range.of(torch.full((3,), -1.0), torch.ones(3))
        >>> block = Int8Block.of(torch.ones(8, 3, 3, 3), None, 2, half)
        >>> image = quantize_int8(torch.zeros(1, 3, 5, 7), half, int8_image(1, 5, 7, half, halo=1))
        >>> out = torch.empty(1, 2, 10, 14).contiguous(memory_format=torch.channels_last)
        >>> conv_pixel_shuffle_gelu_int8(image, block, out).abs().max()
        tensor(0.)
    """
    _, channels, rows, columns = block.weight.shape
    _check_image("x", x, channels)
    height, width = x.shape[2] - rows + 1, x.shape[3] - columns + 1
    if min(height, width) < 0:
        raise ValueError(f"x must be at least as large as the kernel {(rows, columns)}, got {tuple(x.shape[2:])}")
    if block.output is not None:
        _check_image("out", out, block.out_channels)
    else:
        check_tensor("out", out)
        if out.dim() != 4 or out.shape[1] != block.out_channels or out.shape[2:] != (height * block.r, width * block.r):
            expected = (x.shape[0], block.out_channels, height * block.r, width * block.r)
            raise ValueError(f"out must have shape {expected}, got {tuple(out.shape)}")
        if not out.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(f"out must be channels-last, got strides {out.stride()}")
    _check_output(out, x.shape[0], height * block.r, width * block.r)
    _check_devices(x, block.weight, out)
    CONV_PIXEL_SHUFFLE_GELU_INT8.select(impl, x, block, out).run(x, block, out)
    return out
