"""The Muon optimiser: orthogonalisation, one step by hand, and torch's own Muon as the peer."""

from __future__ import annotations

import pytest
import torch

from hflfnerv.errors import BackendUnavailable
from hflfnerv.testing import implementations, threads
from hflfnerv.train.muon import ORTHOGONALISE, Muon, orthogonalise, orthogonalise_all

BY_IMPL = pytest.mark.parametrize(
    "impl", [pytest.param(p.values[0], marks=p.marks) for p in implementations(ORTHOGONALISE)]
)


@pytest.mark.parametrize("shape", [(8, 8), (5, 40), (64, 6), (1, 9), (9, 1), (20, 90), (90, 20)])
def test_orthogonalise_flattens_the_singular_values(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    y = orthogonalise(x)
    # The same singular vectors: u^T y v is diagonal, its entries within the quintic's range.
    core = u.mT @ y @ vh.mT
    values = core.diagonal()
    assert torch.allclose(core, torch.diag(values), atol=1e-12)
    assert 0.6 < values.min() <= values.max() < 1.25


@BY_IMPL
@pytest.mark.parametrize(
    "shape", [(16, 32), (20, 300), (300, 20), (57, 120), (40, 40), (189, 270), (7, 1), (1, 1), (530, 520)]
)
@pytest.mark.parametrize("decades", [0, 3, 8, 300])
def test_the_steps_through_the_gram_matrix_are_those_of_the_definition(shape, decades, impl):
    generator = torch.Generator().manual_seed(6)
    rank = min(shape)
    left, right = (torch.linalg.qr(torch.randn(n, rank, generator=generator, dtype=torch.float64)).Q for n in shape)
    x = (left * 10 ** -torch.linspace(0, decades, rank, dtype=torch.float64)) @ right.mT
    expected = x / x.norm()
    for _ in range(5):  # the definition
        gram = expected @ expected.mT
        expected = 3.4445 * expected + (-4.7750 * gram + 2.0315 * gram @ gram) @ expected
    for dtype in (torch.float32, torch.float64) if impl == "reference" else (torch.float32,):
        # A Gram matrix errs by its rounding, eps, at its small eigenvalues as well, and each of the four later steps
        # multiplies those by a^2; the reference errs by less.
        bound = 2 * 3.4445**8 * torch.finfo(dtype).eps
        assert (orthogonalise(x.to(dtype), impl=impl) - expected).norm() < bound * expected.norm()


@BY_IMPL
def test_orthogonalise_of_zero_is_zero(impl):
    assert torch.equal(orthogonalise(torch.zeros(3, 5), impl=impl), torch.zeros(3, 5))


@BY_IMPL
@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_orthogonalise_does_not_depend_on_the_scale(impl, scale):
    x = torch.randn(20, 33, generator=torch.Generator().manual_seed(8))
    torch.testing.assert_close(orthogonalise(x * scale, impl=impl), orthogonalise(x, impl=impl), rtol=0, atol=1e-4)


@BY_IMPL
def test_orthogonalise_of_what_is_not_finite_is_not_finite(impl):
    x = torch.ones(20, 33)
    x[3, 4] = float("nan")
    assert orthogonalise(x, impl=impl).isnan().all()


@pytest.mark.skipif(
    ORTHOGONALISE.entries[0].unavailable() is not None, reason=str(ORTHOGONALISE.entries[0].unavailable())
)
def test_kernels_give_the_same_on_any_number_of_threads_and_in_any_layout():
    generator = torch.Generator().manual_seed(9)
    matrices = [torch.randn(shape, generator=generator) for shape in ((150, 140), (5, 40), (130, 400), (40, 5))]
    with threads(1):
        expected = orthogonalise_all(matrices, impl="cpp")
    with threads(3):
        actual = orthogonalise_all([x.mT.contiguous().mT for x in matrices], impl="cpp")
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.skipif(
    ORTHOGONALISE.entries[0].unavailable() is not None, reason=str(ORTHOGONALISE.entries[0].unavailable())
)
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 5, dtype=torch.float64), "dtype torch.float64 is not torch.float32"),
        (torch.zeros(0, 5), r"a matrix of shape \(0, 5\) is empty"),
        (torch.zeros(3, 5, device="meta"), "the tensors are on meta"),
    ],
)
def test_kernels_say_why_not(x, message):
    with pytest.raises(BackendUnavailable, match=rf"orthogonalise: impl='cpp' cannot run: {message}"):
        orthogonalise(x, impl="cpp")


def test_step_does_not_depend_on_the_scale_of_the_gradient():
    weights = [torch.nn.Parameter(torch.ones(4, 3, 3, 3)) for _ in range(2)]
    gradient = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(2))
    for weight, scale in zip(weights, (1.0, 1e-6), strict=True):
        weight.grad = gradient * scale
        Muon([weight]).step()
    assert torch.allclose(weights[0], weights[1], rtol=0, atol=1e-6)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_matches_torch_on_matrices(shape):
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(shape, generator=generator)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    lr, steps = 0.02, 8
    optimizers = Muon([ours], lr=lr), torch.optim.Muon([theirs], lr=lr, weight_decay=0.0)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matrices_together_take_the_steps_that_they_take_alone(dtype):
    generator = torch.Generator().manual_seed(7)
    shapes = [(20, 90), (5, 40), (90, 20), (20, 50), (64, 6), (40, 5), (20, 90), (8, 8), (1, 9)]
    matrices = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    for matrix, together in zip(matrices, orthogonalise_all(matrices), strict=True):
        alone = orthogonalise(matrix)
        assert together.shape == matrix.shape
        assert together.dtype == dtype
        # The same operations, in products that may sum in another order: see the bound of the Gram matrix above.
        assert (together - alone).norm() <= 2 * 3.4445**8 * torch.finfo(dtype).eps * alone.norm()
    assert orthogonalise_all([]) == []
