"""LPIPS, where its weights are."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendUnavailable
from .frames import Frames, per_frame, unit_planes

__all__ = ["lpips", "lpips_unavailable"]

# The network of each variant, and torchvision's weights for it.
_BACKBONES = {"vgg": "VGG16_Weights", "alex": "AlexNet_Weights", "squeeze": "SqueezeNet1_1_Weights"}
#: The shorter side that each network takes before its pooling leaves nothing.
_MIN_SIDE = {"vgg": 16, "alex": 31, "squeeze": 17}
_SCALINGS = ("standard", "unscaled")


def lpips(a: Frames, b: Frames, *, net: str = "vgg", scaling: str = "standard", reduction: str = "none") -> Tensor:
    """Learned perceptual distance per frame (Zhang, Isola, Efros, Shechtman and Wang 2018, Eq. 1), version 0.1.

    It needs the package ``lpips`` and torchvision's weights of the network in the local cache; nothing is downloaded.

    Args:
        a: uint8 ``[T, H, W, 3]`` or ``[H, W, 3]``, or floating point ``[N, 3, H, W]`` in [0, 1]; array or tensor.
        b: of the same kind, shape and device.
        net: ``"vgg"`` (what NeRV papers report), ``"alex"`` or ``"squeeze"``.
        scaling: ``"standard"`` maps samples to [-1, 1], which the network is made for; ``"unscaled"`` feeds them in
            [0, 1] as they are, as the public code of "Neural Video Representation for Redundancy Reduction and
            Consistency Preservation" does. The two give different numbers.
        reduction: ``"none"`` for one value per frame, ``"mean"`` for their mean.

    Returns:
        float64 on the CPU: ``[T]``, or a scalar; 0 for identical frames, lower is better.

    Raises:
        BackendUnavailable: the package or the weights are missing; says which, and where the weights belong.
        TypeError: the frames are neither uint8 nor floating point, or not both the same.
        ValueError: the shapes are not as stated or differ, there is no frame, the frames are too small for the network,
            or ``net`` or ``scaling`` is something else.

    Numerics:
        float32, one frame at a time.
    """
    if scaling not in _SCALINGS:
        raise ValueError(f"scaling must be one of {', '.join(_SCALINGS)}, got {scaling!r}")
    reason = lpips_unavailable(net)
    if reason is not None:
        raise BackendUnavailable(f"LPIPS ({net}) cannot be computed: {reason}")
    device = a.device if isinstance(a, Tensor) else torch.device("cpu")
    model = _model(net, device)

    def metric(x: Tensor, y: Tensor) -> Tensor:
        planes_x, planes_y = unit_planes(x), unit_planes(y)
        height, width = planes_x.shape[-2:]
        if min(height, width) < _MIN_SIDE[net]:
            raise ValueError(
                f"LPIPS ({net}) needs frames of at least {_MIN_SIDE[net]} pixels on each side, got {height}x{width}"
            )
        distance: Tensor = model(planes_x, planes_y, normalize=scaling == "standard")
        return distance.reshape(())

    return per_frame(a, b, metric, reduction)


def lpips_unavailable(net: str = "vgg") -> str | None:
    """Return why :func:`lpips` cannot run here, or None if it can.

    Raises:
        ValueError: ``net`` is not one of its networks.
    """
    if net not in _BACKBONES:
        raise ValueError(f"net must be one of {', '.join(_BACKBONES)}, got {net!r}")
    try:
        importlib.import_module("lpips")
        path = _weights_path(net)
    except ImportError as error:
        return f"{error}; install it with pip install 'hflfnerv[lpips]'"
    except (RuntimeError, OSError) as error:
        # What a torchvision built for another torch raises.
        return f"the packages lpips and torchvision cannot be imported: {error}"
    if not path.is_file():
        return f"torchvision's weights are not at {path}; put {path.name} from {_weights(net).url} there"
    return None


def _weights(net: str) -> Any:
    models = importlib.import_module("torchvision.models")
    return getattr(models, _BACKBONES[net]).IMAGENET1K_V1


def _weights_path(net: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(_weights(net).url).name


@functools.lru_cache(maxsize=2)
def _model(net: str, device: torch.device) -> Any:
    # Left to itself the package takes its backbone from torchvision, which downloads what is not there and unpickles
    # what is. So it builds one without weights and gets them here.
    model = importlib.import_module("lpips").LPIPS(net=net, version="0.1", pnet_rand=True, verbose=False)
    path = _weights_path(net)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        # "slice2.5.weight" is the "features.5.weight" of the whole network.
        names = {name: f"features.{name.split('.', 1)[1]}" for name in model.net.state_dict()}
        model.net.load_state_dict({name: state[stored] for name, stored in names.items()})
    except Exception as error:
        raise BackendUnavailable(
            f"LPIPS ({net}) cannot be computed: {path} does not hold its weights: {error}"
        ) from error
    return model.requires_grad_(False).eval().to(device)
