"""The Muon optimiser: one step by hand, and torch's own Muon as the peer."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hflfnerv.ops import _cpp
from hflfnerv.ops._orthogonalise import orthogonalise_all
from hflfnerv.train import muon
from hflfnerv.train.muon import Muon


def test_step_does_not_depend_on_the_scale_of_the_gradient():
    weights = [torch.nn.Parameter(torch.ones(4, 3, 3, 3)) for _ in range(2)]
    gradient = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(2))
    for weight, scale in zip(weights, (1.0, 1e-6), strict=True):
        weight.grad = gradient * scale
        Muon([weight]).step()
    assert torch.allclose(weights[0], weights[1], rtol=0, atol=1e-6)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_matches_torch_on_matrices(shape, weight_decay):
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(shape, generator=generator)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    lr, steps = 0.02, 8
    optimizers = [of([w], lr=lr, weight_decay=weight_decay) for of, w in ((Muon, ours), (torch.optim.Muon, theirs))]
    for _ in range(steps):
        gradient = torch.randn(shape, generator=generator)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    # Theirs runs in bfloat16 (2^-8); each of the quintic's steps amplifies a relative error by at most a = 3.4445, and
    # what is left of the early ones is damped, so a step's update is off by a few per cent of its own length at most.
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.05 * moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(8, 3, 5, 5), (40, 4, 1, 3), (96, 3, 3, 3)])
def test_channels_last_weights_and_tensor_learning_rates(shape, dtype):
    start = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        for lr in (0.02, torch.tensor(0.02)):
            weight = torch.nn.Parameter(start.clone(memory_format=layout))
            weight.grad = gradient.clone(memory_format=layout)
            Muon([weight], lr=lr).step()
            assert weight.stride() == start.clone(memory_format=layout).stride()
            results.append(weight.detach())
    for other in results[1:]:
        assert torch.allclose(results[0], other, rtol=0, atol=1e-6)


def test_skips_parameters_without_a_gradient():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = Muon([weight])
    optimizer.step()
    assert torch.equal(weight, torch.ones(2, 2))
    assert not optimizer.state_dict()["state"]


def test_closure_is_called_with_gradients_enabled():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = Muon([weight])

    def closure() -> float:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == 4.0
    assert not torch.equal(weight, torch.ones(2, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, r"lr must be at least 0, got -1\.0"),
        ({"weight_decay": -0.1}, r"weight_decay must be at least 0, got -0\.1"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1\.0"),
        ({"momentum": -0.1}, r"momentum must be in \[0, 1\), got -0\.1"),
    ],
)
def test_rejects_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        Muon([torch.nn.Parameter(torch.ones(2, 2))], **arguments)


def test_rejects_vectors():
    with pytest.raises(ValueError, match=r"params must have two or more dimensions, got one of shape \(3,\)"):
        Muon([torch.nn.Parameter(torch.ones(3))])


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lr", [0.02, torch.tensor(0.02)], ids=["float", "tensor"])
def test_lists_of_tensors_agree_in_their_strides(impl, dtype, lr, monkeypatch):
    """Where one pair of two lists does not, PyTorch takes a kernel for each pair in place of one for all."""
    # The reference makes a tall matrix as the transpose of a wide one, as on a GPU, and there in another dtype.
    to = torch.float64 if dtype == torch.float32 and impl == "reference" else dtype
    monkeypatch.setattr(
        muon, "orthogonalise_all", lambda matrices: orthogonalise_all([x.to(to) for x in matrices], impl=impl)
    )
    shapes = [(8, 4, 3, 3), (8, 4, 1, 1), (1, 4, 3, 3), (6, 1, 3, 3), (5, 7), (7, 5), (40, 4, 3, 3)]
    weights = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]
    layouts = [torch.channels_last if weight.ndim == 4 else torch.contiguous_format for weight in weights]
    weights += [
        torch.nn.Parameter(torch.ones(shape, dtype=dtype).contiguous(memory_format=f))
        for shape, f in zip(shapes, layouts, strict=True)
    ]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    lists = []

    class Lists(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket.__name__.startswith(("_foreach", "_fused")):
                lists.append(
                    [
                        [t.stride() for t in arg]
                        for arg in args
                        if isinstance(arg, list) and arg and isinstance(arg[0], torch.Tensor)
                    ]
                )
            return function(*args, **(kwargs or {}))

    optimizer = Muon(weights, lr=lr)
    with Lists():
        optimizer.step()
    assert len(lists) >= 4
    assert all(strides == of[0] for of in lists for strides in of)
    assert lists[-1][0] == [weight.stride() for weight in weights]


def test_a_prepared_step_is_the_same_step():
    generator = torch.Generator().manual_seed(12)
    shapes = [(4, 3, 3, 3), (12, 30), (30, 12), (5, 5)]
    one, other = ([torch.nn.Parameter(torch.randn(s, generator=g)) for s in shapes] for g in (generator, generator))
    for a, b in zip(one, other, strict=True):
        b.data.copy_(a)
    plain, ahead = Muon(one), Muon([{"params": other[:2]}, {"params": other[2:]}])
    for _ in range(3):
        for a, b in zip(one, other, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        plain.step()
        foreign = torch.nn.Parameter(torch.zeros(2, 2))
        assert [update.shape for update in ahead.prepare([other[3], other[1], foreign])] == [(12, 30), (5, 5)]
        assert not torch.equal(one[1], other[1])
        ahead.step()
        assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(one, other, strict=True))


def test_without_gradients_nothing_is_prepared():
    weight = torch.nn.Parameter(torch.ones(3, 4))
    optimizer = Muon([weight])
    assert optimizer.prepare([weight]) == []
    weight.grad = torch.ones(3, 4)
    optimizer.prepare([weight])
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(weight, torch.ones(3, 4))


@pytest.mark.parametrize("fast", [False, True])
def test_large_matrices_are_orthogonalised_in_bfloat16_where_that_is_multiplied(fast, monkeypatch):
    """Both sides have more than 128 values; a side may be that of channels under a kernel."""
    monkeypatch.setattr(muon, "multiplies_bfloat16", lambda x: fast)
    taken = []

    def record(matrices):
        taken.extend((tuple(x.shape), x.dtype) for x in matrices)
        return orthogonalise_all(matrices)

    monkeypatch.setattr(muon, "orthogonalise_all", record)
    large = {(129, 130): (129, 130), (150, 40, 3, 3): (150, 360), (200, 129, 1, 1): (200, 129)}
    small = {(128, 300): (128, 300), (300, 128): (300, 128), (12, 30): (12, 30), (130, 14, 3, 3): (130, 126)}
    shapes = {**large, **small}
    generator = torch.Generator().manual_seed(13)
    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)
    Muon(weights, lr=1.0, momentum=0.0).step()
    half = torch.bfloat16 if fast else torch.float32
    expected = [*((matrix, half) for matrix in large.values()), *((m, torch.float32) for m in small.values())]
    assert sorted(taken, key=str) == sorted(expected, key=str)
    for weight in weights:
        matrix = weight.grad.flatten(1)
        exact = orthogonalise_all([matrix.double()])[0] * max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
        made = -weight.detach().flatten(1)
        error = (made - exact).norm() / exact.norm()
        assert weight.dtype == torch.float32
        # As where the kernels are tested: in bfloat16 about six of its roundings, in float32 a^8 of its.
        in_half = fast and min(matrix.shape) > 128
        assert 2**-12 < error < 6 * 2**-8 if in_half else error < 2 * 3.4445**8 * 2**-23


@pytest.mark.skipif(_cpp.unavailable_amx() is not None, reason=str(_cpp.unavailable_amx()))
def test_on_matrix_units():
    generator = torch.Generator().manual_seed(14)
    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((150, 140), (128, 200))]
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)
    Muon(weights, lr=1.0, momentum=0.0).step()
    for weight, impl, dtype in zip(weights, ("amx", "cpp"), (torch.bfloat16, torch.float32), strict=True):
        (made,) = orthogonalise_all([weight.grad.to(dtype)], impl=impl)
        rows, columns = weight.shape
        assert torch.equal(weight.detach(), -(max(1.0, rows / columns) ** 0.5) * made.float())
