"""``output_stage``: head convolutions to frames of 8 bits, in one pass."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .._impl import Implementation, ImplementationTable
from ..reference import output_stage as reference
from . import _cpp, _cuda
from ._check import channels_last_pixels, check_like, check_tensor, compute_dtype
from ._library import register
from ._triton import rejects_tensor, unavailable
from .packed_weights import kept_weight

__all__ = ["OUTPUT_STAGE", "output_stage"]

_INT32_MAX = 2**31 - 1
_KERNEL_FEATURES = 3
_TRITON_CHANNELS = 64  # what the registers of a program hold
_CUDA_EIGHTS = 20  # of all features' channels, an odd number of each


class Call(NamedTuple):
    """The checked arguments of one call: what each entry of the table runs or rejects, and the operation's own."""

    features: list[torch.Tensor]
    weights: list[torch.Tensor]
    biases: torch.Tensor
    groups: list[int]
    scales: list[float]
    offset: float
    crop: list[int]
    as_bytes: bool


def _run_reference(call: Call) -> torch.Tensor:
    features, weights, biases, groups, scales, offset, (rows, columns), as_bytes = call
    frame = reference.output_stage(
        features,
        weights,
        biases,
        groups=groups,
        scales=scales,
        offset=offset,
        crop=(rows, columns),
        as_bytes=as_bytes,
    )
    return frame if as_bytes else frame.float()


def _too_many(features: Sequence[torch.Tensor]) -> str | None:
    """Return why the kernels of a GPU do not take so many features or so large ones, or None."""
    if len(features) > _KERNEL_FEATURES:
        return f"there are {len(features)} features, more than {_KERNEL_FEATURES}"
    image = max(max(x.shape[1], x.stride(3)) * x.shape[2] * x.shape[3] for x in features)
    return f"one image has {image} elements, more than {_INT32_MAX}" if image > _INT32_MAX else None


def _triton_rejects(call: Call) -> str | None:
    features = call.features
    reason = rejects_tensor(features[0].device, features[0].dtype)
    most = max(x.shape[1] for x in features)
    if reason is None and most > _TRITON_CHANNELS:
        reason = f"a feature has {most} channels, more than {_TRITON_CHANNELS}"
    return reason or _too_many(features)


def _pack_triton(weight: torch.Tensor) -> torch.Tensor:
    from ..triton_kernels.output_stage import pack_head

    packed: torch.Tensor = pack_head(weight)
    return packed


def _run_triton(call: Call) -> torch.Tensor:
    # Here and not in the operation, which compiled code runs as well.
    kept = [
        kept_weight(weight, lambda: ("output_stage", "triton"), functools.partial(_pack_triton, weight))
        for weight in call.weights
    ]
    packed = [weight for weight in kept if weight is not None]
    out: torch.Tensor = torch.ops.hflfnerv.output_stage(*call, packed, "triton")
    return out


def _cuda_rejects(call: Call) -> str | None:
    features = call.features
    reason = _cuda.rejects_tensor(features[0].device, features[0].dtype)
    if reason is None and min(min(x.shape) for x in features) == 0:
        reason = "a feature is empty"
    reason = reason or _too_many(features)
    if reason is None and sum(-(-x.shape[1] // 8) | 1 for x in features) > _CUDA_EIGHTS:
        reason = f"features of {[x.shape[1] for x in features]} channels do not fit into shared memory"
    return reason


def _run_cuda(call: Call) -> torch.Tensor:
    kept = [
        kept_weight(weight, lambda: ("output_stage", "cuda"), functools.partial(_cuda.pack_head, weight))
        for weight in call.weights
    ]
    packed = [weight for weight in kept if weight is not None]
    out: torch.Tensor = torch.ops.hflfnerv.output_stage(*call, packed, "cuda")
    return out


def _cpp_rejects(call: Call) -> str | None:
    features = call.features
    reason = _cpp.rejects_tensor(features[0].device, features[0].dtype)
    if reason is None and features[0].shape[0] == 0:
        reason = "the batch is empty"
    return reason


def _run_cpp(call: Call) -> torch.Tensor:
    out: torch.Tensor = torch.ops.hflfnerv.output_stage(*call, [], "cpp")
    return out


OUTPUT_STAGE = ImplementationTable(
    "output_stage",
    [
        Implementation("cuda", _run_cuda, _cuda.unavailable, _cuda_rejects),
        Implementation("triton", _run_triton, unavailable, _triton_rejects),
        Implementation("cpp", _run_cpp, _cpp.unavailable, _cpp_rejects),
        Implementation("reference", _run_reference),
    ],
)


def _empty_result(call: Call) -> torch.Tensor:
    first = call.features[0]
    dtype = torch.uint8 if call.as_bytes else torch.float32
    return torch.empty((first.shape[0], *call.crop, 3), dtype=dtype, device=first.device)


def _fake(*arguments: Any) -> torch.Tensor:
    return _empty_result(Call(*arguments[:-2]))


def _forward(*arguments: Any) -> torch.Tensor:
    *of_call, packed, impl = arguments
    call = Call(*of_call)
    if impl == "cuda":
        return _forward_cuda(call, packed)
    if impl == "triton":
        return _forward_triton(call._replace(features=[channels_last_pixels(x) for x in call.features]), packed)
    return _forward_cpp(
        call._replace(features=[x.contiguous(memory_format=torch.channels_last) for x in call.features])
    )


def _forward_cpp(call: Call) -> torch.Tensor:
    features, weights, biases, groups, scales, offset, crop, as_bytes = call
    out, dtype = _empty_result(call), features[0].dtype
    weights = [weight.float().contiguous() for weight in weights]
    _cpp.load().output_stage_fwd(
        [len(out), *crop],
        (scales, biases.flatten().tolist(), offset),
        [
            (_cpp.address(x, dtype, torch.channels_last), *x.shape[1:], _cpp.address(weight, torch.float32), group)
            for x, weight, group in zip(features, weights, groups, strict=True)
        ],
        _cpp.dtype_name(dtype),
        _cpp.address(out, out.dtype),
        as_bytes,
        torch.get_num_threads(),
    )
    return out


def _forward_cuda(call: Call, packed: list[torch.Tensor]) -> torch.Tensor:
    features = [channels_last_pixels(x) for x in call.features]
    # The kernel reads four bytes at a time.
    features = [x if x.data_ptr() % 4 == 0 else x.clone(memory_format=torch.channels_last) for x in features]
    packed = packed or [_cuda.pack_head(weight) for weight in call.weights]
    out = _empty_result(call)
    _cuda.output_stage_fwd(features, packed, call.biases, call.groups, call.scales, call.offset, out)
    return out


def _forward_triton(call: Call, packed: list[torch.Tensor]) -> torch.Tensor:
    from ..triton_kernels.output_stage import output_stage_fwd

    packed = packed or [_pack_triton(weight) for weight in call.weights]
    frame: torch.Tensor = output_stage_fwd(*call._replace(weights=packed))
    return frame


def _no_gradient(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    raise RuntimeError("output_stage has no gradient in its kernels; use impl='reference'")


# ``biases`` is float32 [G, 3], without gradient; ``packed`` what the implementation's ``pack_head`` returns of each
# weight, for a caller who keeps it, or empty.
register(
    "output_stage(Tensor[] features, Tensor[] weights, Tensor biases, int[] groups, float[] scales, float offset, "
    "int[] crop, bool as_bytes, Tensor[] packed, str impl) -> Tensor",
    run=_forward,
    fake=_fake,
    setup_context=None,
    backward=_no_gradient,
)


def _check_groups(count: int, groups: Sequence[int] | None, scales: Sequence[float]) -> list[int]:
    if not scales:
        raise ValueError(f"scales must have at least one number, got {scales!r}")
    chosen = [0] * count if groups is None else list(groups)
    if len(chosen) != count:
        raise ValueError(f"groups must have one number for each of the {count} features, got {groups!r}")
    if chosen != sorted(chosen) or sorted(set(chosen)) != list(range(len(scales))):
        raise ValueError(
            f"groups must ascend from 0 to {len(scales) - 1}, the index of the last of scales, without a gap, "
            f"got {groups!r}"
        )
    return chosen


def _check_crop(crop: object) -> tuple[int, int]:
    if not isinstance(crop, (tuple, list)) or len(crop) != 2:
        raise TypeError(f"crop must be (rows, columns), got {crop!r}")
    try:
        rows, columns = map(operator.index, crop)
    except TypeError:
        raise TypeError(f"crop must be two integers, got {crop!r}") from None
    return rows, columns


def output_stage(
    features: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    *,
    groups: Sequence[int] | None = None,
    scales: Sequence[float] = (0.5,),
    offset: float = 0.5,
    crop: tuple[int, int] | None = None,
    as_bytes: bool = True,
    impl: str = "auto",
) -> torch.Tensor:
    """Convolve the last features to three colours, apply tanh, add the streams up, crop, round to 8 bits.

    ``frame = offset + Σ_g scales[g] tanh(Σ_{i: groups[i] = g} (weights[i] * features[i] + biases[i]))``: with the
    defaults the ``(tanh + 1) / 2`` of HNeRV (arXiv 2304.02633) and NeRV; with ``groups=(0, 1, 1)``, ``scales=(1, 0.5)``
    the link of two streams, ``tanh(HFD) + (tanh(LFD1 + LFD2) + 1) / 2`` (arXiv 2409.18497).

    Equivalent PyTorch, for one feature: ``(torch.tanh(F.conv2d(x, weight, bias, padding=1)) * 0.5 + 0.5)``, cropped,
    ``.clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1)``.

    Args:
        features: ``[B, C_i, H_i, W_i]``, floating point, any strides (channels-last is not copied).
        weights: ``[3, C_i, 3, 3]`` for each feature, in its dtype.
        biases: ``[3]`` for each feature in its dtype, or None.
        groups: the group of each feature, 0, 1, … in ascending order; None for one group.
        scales: of the groups.
        offset: what is added.
        crop: height and width of the frames, the top left of each feature's image; None for that of the first.
        as_bytes: clamp to [0, 1], multiply by 255 and round half to even. Otherwise neither clamp nor round.
        impl: ``"auto"``, ``"triton"`` (CUDA; float32, float16, bfloat16; up to three features of at most 64 channels),
            ``"cuda"`` (Hopper; float16, bfloat16; up to three features with about 160 channels together: each pixel is
            read once for all nine taps),
            ``"cpp"`` (CPU: AMX for bfloat16 where there is some, otherwise AVX2 or AVX-512) or
            ``"reference"`` (PyTorch, anywhere; the only one that has gradients, with ``as_bytes=False``).

    Returns:
        ``[B, H, W, 3]``, uint8 or float32.

    Raises:
        TypeError: a tensor is not floating point, or dtypes differ without autocast.
        ValueError: a shape, device, number or name is not as above.
        BackendUnavailable: the named implementation cannot run; the message says why.

    Numerics:
        ``"cpp"`` sums the convolution in float32, takes tanh (error at most 1e-6) in float32 and rounds once. A pixel
        is the same bits wherever it lies, on any number of threads and in any batch. A feature that is not finite
        also reaches pixels to the left whose vectors of 16 floats at most end on it; with AMX the others of five
        pixels that are multiplied together, and further to the left those whose 32 elements reach it.
        ``"triton"`` and ``"cuda"`` do the same in tiles, tanh within 2e-7; products of float32 are rounded to TF32
        where PyTorch's convolutions are told to. A feature that is not finite reaches no further than its convolution
        does.

    Example:
        >>> x, weight = torch.zeros(2, 8, 5, 7), torch.zeros(3, 8, 3, 3)
        >>> output_stage([x], [weight], [None], crop=(4, 7)).shape
        torch.Size([2, 4, 7, 3])
    """
    for name, value in (("features", features), ("weights", weights), ("biases", biases)):
        if not isinstance(value, Sequence):
            raise TypeError(f"{name} must be a list, got {type(value).__name__}")
    if not features or not len(features) == len(weights) == len(biases):
        raise ValueError(
            f"features, weights and biases must be lists of one length, got {len(features)}, {len(weights)} "
            f"and {len(biases)}"
        )
    chosen = _check_groups(len(features), groups, scales)
    first = features[0]
    for i, (x, weight, bias) in enumerate(zip(features, weights, biases, strict=True)):
        check_tensor(f"features[{i}]", x)
        check_like(f"features[{i}]", x, first, "features[0]")
        if x.dim() != 4 or x.shape[0] != first.shape[0]:
            raise ValueError(
                f"features[{i}] must be [B, C, H, W] with the batch of the first, got shape {tuple(x.shape)}"
            )
        check_tensor(f"weights[{i}]", weight)
        check_like(f"weights[{i}]", weight, x, f"features[{i}]")
        if weight.shape != (3, x.shape[1], 3, 3):
            raise ValueError(f"weights[{i}] must have shape (3, {x.shape[1]}, 3, 3), got {tuple(weight.shape)}")
        if bias is not None:
            check_tensor(f"biases[{i}]", bias)
            check_like(f"biases[{i}]", bias, x, f"features[{i}]")
            if bias.shape != (3,):
                raise ValueError(f"biases[{i}] must have shape (3,), got {tuple(bias.shape)}")
    rows, columns = _check_crop(first.shape[2:] if crop is None else crop)
    if rows < 1 or columns < 1 or any(x.shape[2] < rows or x.shape[3] < columns for x in features):
        raise ValueError(
            f"crop must be at least 1 x 1 and fit into every feature, got {rows} x {columns} for "
            f"{[tuple(x.shape[2:]) for x in features]}"
        )
    dtype = compute_dtype(first)
    zero = first.new_zeros(3, dtype=torch.promote_types(dtype, torch.float32))
    sums = torch.stack(
        [
            sum((bias for g, bias in zip(chosen, biases, strict=True) if g == group and bias is not None), zero)
            for group in range(len(scales))
        ]
    )
    call = Call(
        [x.to(dtype) for x in features],
        [weight.to(dtype) for weight in weights],
        sums,
        chosen,
        [float(scale) for scale in scales],
        float(offset),
        [rows, columns],
        as_bytes,
    )
    wants_gradient = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (*features, *weights, *biases)
    )
    if impl == "auto" and wants_gradient:
        impl = "reference"
    out: torch.Tensor = OUTPUT_STAGE.select(impl, call).run(call)
    return out
