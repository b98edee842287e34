"""Operations on lists of tensors: what they compute, with and without the CUDA kernels."""

from __future__ import annotations

import pytest
import torch

from hflfnerv.ops import _cuda, _lists
from hflfnerv.testing import requires

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(
            _cuda.unavailable() is not None and not requires("cuda"), reason=str(_cuda.unavailable())
        ),
    ),
]
BY_DEVICE = pytest.mark.parametrize("device", DEVICES)
# More than one call of the kernel takes.
SHAPES = [(8, 3, 5, 5), (64, 256), (7,), (1425, 68, 1, 1), (70, 90), *[(5, 1 + i) for i in range(70)]]


def tensors(device, seed, layout=torch.contiguous_format, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator).to(device, dtype) for shape in SHAPES]
    return [x.contiguous(memory_format=layout) if x.ndim == 4 else x for x in made]


@BY_DEVICE
@pytest.mark.parametrize("mu", [0.95, 0.3, 0.0])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_momentum(device, mu, layout):
    gradients, averages = tensors(device, 1, layout), tensors(device, 2, layout)
    expected = [mu * m.double() + (1 - mu) * g.double() for m, g in zip(averages, gradients, strict=True)]
    results = _lists.momentum(gradients, averages, mu)
    for g, m, true, result in zip(gradients, averages, expected, results, strict=True):
        # A handful of operations on values of the size of a few.
        torch.testing.assert_close(m.double(), true, rtol=0, atol=1e-6)
        torch.testing.assert_close(result.double(), (1 - mu) * g.double() + mu * true, rtol=0, atol=2e-6)


@BY_DEVICE
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_subtract(device, on_device, layout, decay):
    parameters, updates = tensors(device, 3, layout), tensors(device, 4, layout)
    factors = [1.0 + i / 8 for i in range(len(SHAPES))]
    expected = [
        p.double() - 0.25 * (f * u.double() + decay * p.double())
        for p, u, f in zip(parameters, updates, factors, strict=True)
    ]
    _lists.subtract(parameters, updates, factors, torch.tensor(0.25, device=device) if on_device else 0.25, decay)
    for p, true in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.double(), true, rtol=2**-22, atol=1e-5)


@BY_DEVICE
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)])
def test_cast(device, dtypes):
    sources = tensors(device, 5, torch.channels_last, dtypes[0])
    targets = [torch.full_like(x, 7, dtype=dtypes[1]) for x in sources]
    targets[0] = targets[0].contiguous()  # of another order in memory
    _lists.cast(sources, targets)
    assert all(torch.equal(t, s.to(dtypes[1])) for s, t in zip(sources, targets, strict=True))


def test_says_why_not():
    x = torch.zeros(3, 4)
    assert "the tensors are on cpu" in _cuda.rejects_list([x], [x])
    assert "differ in shape" in _cuda.rejects_list([x], [x.t().contiguous().t()])
    assert _cuda.rejects_list([], []) is None


@pytest.mark.skipif(_cuda.unavailable() is not None and not requires("cuda"), reason=str(_cuda.unavailable()))
def test_what_the_kernels_take():
    x = torch.zeros(4, 6, 3, 3, device="cuda")
    assert _cuda.rejects_list([x], [x.clone()]) is None
    assert "has gaps in memory" in _cuda.rejects_list([x[:, ::2]], [x[:, ::2]])
    assert "is empty" in _cuda.rejects_list([x[:0]], [x[:0]])
    assert "dtype torch.float64 is not one of" in _cuda.rejects_list([x.double()], [x.double()])
