from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hflfnerv.errors import BackendUnavailable
from hflfnerv.metrics import lpips, lpips_unavailable, perceptual

FRAMES = np.random.default_rng(0).integers(0, 256, (2, 2, 40, 48, 3), dtype=np.uint8)


@pytest.fixture
def hub(tmp_path: Path) -> Any:
    """An empty cache of weights."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    perceptual._model.cache_clear()
    yield tmp_path / "checkpoints"
    perceptual._model.cache_clear()
    torch.hub.set_dir(before)


@pytest.fixture
def packages(hub: Path) -> Any:
    """The cache, where the packages that LPIPS needs can be imported."""
    try:
        importlib.import_module("lpips")
    except (ImportError, RuntimeError, OSError) as error:
        pytest.skip(f"the package lpips cannot be imported: {error}")
    return hub


def test_without_the_package(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(perceptual.importlib, "import_module", missing)
    with pytest.raises(BackendUnavailable, match=r"No module named 'lpips'; install it with .*hflfnerv\[lpips\]"):
        lpips(*FRAMES)


def test_with_a_package_that_does_not_load(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(perceptual.importlib, "import_module", broken)
    with pytest.raises(BackendUnavailable, match="cannot be imported: operator torchvision::nms does not exist"):
        lpips(*FRAMES)


def test_rejects() -> None:
    with pytest.raises(ValueError, match="net must be one of vgg, alex, squeeze, got 'resnet'"):
        lpips(*FRAMES, net="resnet")
    with pytest.raises(ValueError, match="scaling must be one of standard, unscaled, got 'none'"):
        lpips(*FRAMES, scaling="none")


def test_without_weights(packages: Path) -> None:
    for net, name in (("vgg", "vgg16-397923af.pth"), ("alex", "alexnet-owt-7be5be79.pth")):
        assert str(packages / name) in str(lpips_unavailable(net))
        with pytest.raises(BackendUnavailable, match=f"weights are not at .*{name}; put {name} from https://"):
            lpips(*FRAMES, net=net)


def test_damaged_weights(packages: Path) -> None:
    (packages / "squeezenet1_1-b8a52dc0.pth").write_bytes(b"not weights")
    assert lpips_unavailable("squeeze") is None
    with pytest.raises(BackendUnavailable, match="does not hold its weights"):
        lpips(*FRAMES, net="squeeze")


# The smallest network, with random weights: what is tested is that they and the scaling get to where they belong.
def test_equals_the_package(packages: Path) -> None:
    torch.manual_seed(0)
    weights = importlib.import_module("torchvision.models").squeezenet1_1(weights=None).state_dict()
    torch.save(weights, packages / "squeezenet1_1-b8a52dc0.pth")
    reference = importlib.import_module("lpips").LPIPS(net="squeeze", verbose=False)
    a, b = (torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255 for frames in FRAMES)
    for scaling, inputs in (("standard", (2 * a - 1, 2 * b - 1)), ("unscaled", (a, b))):
        with torch.no_grad():
            expected = reference(*inputs).flatten().tolist()
        values = lpips(*FRAMES, net="squeeze", scaling=scaling)
        assert values.dtype == torch.float64
        assert values.tolist() == pytest.approx(expected, rel=1e-5)
        assert lpips(*FRAMES, net="squeeze", scaling=scaling, reduction="mean") == values.mean()
    assert lpips(FRAMES[0], FRAMES[0], net="squeeze").tolist() == [0, 0]
    with pytest.raises(
        ValueError, match=r"LPIPS \(squeeze\) needs frames of at least 17 pixels on each side, got 16x48"
    ):
        lpips(FRAMES[0, :, :16], FRAMES[1, :, :16], net="squeeze")
