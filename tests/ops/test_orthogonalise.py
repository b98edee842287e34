"""Orthogonalisation of matrices: by every implementation, compiled ahead of time, and many at once."""

from __future__ import annotations

import pytest
import torch

from hflfnerv.errors import BackendUnavailable
from hflfnerv.ops._orthogonalise import (
    ORTHOGONALISE,
    SMALL_ROWS,
    multiplies_bfloat16,
    orthogonalise,
    orthogonalise_all,
)
from hflfnerv.testing import implementations, poisoned_empty, requires, threads

BY_IMPL = pytest.mark.parametrize(("impl", "device"), implementations(ORTHOGONALISE))
IN_FLOAT32 = pytest.mark.parametrize(
    ("impl", "device"), [parameter for parameter in implementations(ORTHOGONALISE) if parameter.id != "amx"]
)
CPP, AMX = (next(entry for entry in ORTHOGONALISE if entry.name == name) for name in ("cpp", "amx"))
needs_amx = pytest.mark.skipif(AMX.unavailable() is not None, reason=str(AMX.unavailable()))


def dtype_of(impl):
    """Return the dtype that an implementation is tested in where any will do."""
    return torch.bfloat16 if impl == "amx" else torch.float32


@pytest.mark.parametrize("shape", [(8, 8), (5, 40), (64, 6), (1, 9), (9, 1), (20, 90), (90, 20)])
def test_flattens_the_singular_values(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    y = orthogonalise(x)
    # The same singular vectors: u^T y v is diagonal, its entries within the quintic's range.
    core = u.mT @ y @ vh.mT
    values = core.diagonal()
    assert torch.allclose(core, torch.diag(values), atol=1e-12)
    assert 0.6 < values.min() <= values.max() < 1.25


def steps(x, rounded=lambda t: t):
    """Return what the definition says, in float64, with x, its Gram matrix and the polynomial of that rounded."""
    tall = x.shape[0] > x.shape[1]
    x = x.mT.double() if tall else x.double()
    x = rounded(x / x.norm())
    for _ in range(5):
        gram = rounded(x @ x.mT)
        x = rounded(3.4445 * x + rounded(-4.7750 * gram + 2.0315 * gram @ gram) @ x)
    return x.mT if tall else x


@IN_FLOAT32
@pytest.mark.parametrize(
    "shape", [(16, 32), (20, 300), (300, 20), (57, 120), (40, 40), (189, 270), (7, 1), (1, 1), (530, 520)]
)
@pytest.mark.parametrize("decades", [0, 3, 8, 300])
def test_the_steps_through_the_gram_matrix_are_those_of_the_definition(shape, decades, impl, device):
    if impl in ("cuda", "triton") and min(shape) > SMALL_ROWS:
        pytest.skip(f"{impl} takes matrices with a side of at most {SMALL_ROWS}")
    generator = torch.Generator().manual_seed(6)
    rank = min(shape)
    left, right = (torch.linalg.qr(torch.randn(n, rank, generator=generator, dtype=torch.float64)).Q for n in shape)
    x = (left * 10 ** -torch.linspace(0, decades, rank, dtype=torch.float64)) @ right.mT
    expected = steps(x)
    for dtype in (torch.float32, torch.float64) if impl == "reference" else (torch.float32,):
        # A Gram matrix errs by its rounding, eps, at its small eigenvalues as well, and each of the four later steps
        # multiplies those by a^2; the reference errs by less. Of three products of TF32 the fourth is missing, which is
        # 2^-22 of the whole, and so large is the rounding of each of the two small ones; "cuda" truncates those.
        eps = {"triton": 3 * 2**-22, "cuda": 5 * 2**-22}.get(impl, torch.finfo(dtype).eps)
        bound = 2 * 3.4445**8 * eps
        made = orthogonalise(x.to(device=device, dtype=dtype), impl=impl)
        assert (made.cpu() - expected).norm() < bound * expected.norm()


@BY_IMPL
def test_of_zero_is_zero(impl, device):
    zeros = torch.zeros(3, 5, dtype=dtype_of(impl), device=device)
    assert torch.equal(orthogonalise(zeros, impl=impl), zeros)


@BY_IMPL
@pytest.mark.parametrize("scale", [2.0**-50, 2.0**50])
def test_does_not_depend_on_the_scale(impl, device, scale):
    x = torch.randn(20, 33, generator=torch.Generator().manual_seed(8)).to(device, dtype_of(impl))
    torch.testing.assert_close(orthogonalise(x * scale, impl=impl), orthogonalise(x, impl=impl), rtol=0, atol=1e-4)


@BY_IMPL
def test_of_what_is_not_finite_is_not_finite(impl, device):
    x = torch.ones(20, 33, dtype=dtype_of(impl), device=device)
    x[3, 4] = float("nan")
    assert orthogonalise(x, impl=impl).isnan().all()


@pytest.mark.skipif(CPP.unavailable() is not None, reason=str(CPP.unavailable()))
def test_kernels_give_the_same_on_any_number_of_threads_and_in_any_layout():
    generator = torch.Generator().manual_seed(9)
    matrices = [torch.randn(shape, generator=generator) for shape in ((150, 140), (5, 40), (130, 400), (40, 5))]
    with threads(1):
        expected = orthogonalise_all(matrices, impl="cpp")
    with threads(3):
        actual = orthogonalise_all([x.mT.contiguous().mT for x in matrices], impl="cpp")
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.skipif(CPP.unavailable() is not None, reason=str(CPP.unavailable()))
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


def bfloat16_matrix(shape, decades=None, seed=6):
    """Return a normally distributed matrix, or one whose singular values go so many decades down."""
    generator, rank = torch.Generator().manual_seed(seed), min(shape)
    if decades is None:
        return torch.randn(shape, generator=generator, dtype=torch.float64).bfloat16()
    left, right = (torch.linalg.qr(torch.randn(n, rank, generator=generator, dtype=torch.float64)).Q for n in shape)
    return ((left * 10 ** -torch.linspace(0, decades, rank, dtype=torch.float64)) @ right.mT).bfloat16()


def bfloat16_steps(x):
    """Return the steps with each number rounded where ``"amx"`` rounds it, and nowhere else."""
    return steps(x, lambda t: t.bfloat16().double())


BFLOAT16_SHAPES = [
    *[(1, 1), (7, 1), (1, 9), (5, 40), (16, 32), (32, 32), (33, 65), (40, 40), (57, 120), (300, 20), (200, 31)],
    *[(189, 270), (130, 400), (400, 130), (150, 140), (530, 520)],
]


@needs_amx
@pytest.mark.parametrize("shape", BFLOAT16_SHAPES, ids=str)
@pytest.mark.parametrize("decades", [None, 0, 3, 8])
def test_amx_takes_the_steps_of_the_definition(shape, decades):
    x = bfloat16_matrix(shape, decades)
    with poisoned_empty():
        made = orthogonalise(x, impl="amx")
    assert made.dtype == torch.bfloat16
    exact, rounded = steps(x), bfloat16_steps(x)
    # The sums are in float32, whose error is 2^-16 of a rounding's times the root of their length: a few roundings go
    # the other way, which is an error of the kind and at most of the size that all of them together make.
    own = (rounded - exact).norm()
    assert (made.double() - rounded).norm() <= own
    assert (made.double() - exact).norm() <= 1.5 * own
    if decades is None and x.numel() >= 1000:
        # PyTorch rounds the same numbers, but for the order of its sums, and the polynomial's terms once or twice.
        peer = (orthogonalise(x, impl="reference").double() - exact).norm()
        assert (made.double() - exact).norm() <= 1.5 * peer
        # Three roundings in each of five steps, and one before, are 2^-8 / sqrt(3) sqrt(16) of the whole if none grows;
        # a step makes an error grow by a at most, where the values grow by as much, and by 1.6 near 1, which the last
        # two reach.
        assert (made.double() - exact).norm() <= 2**-8 * (16 / 3) ** 0.5 * 1.6**2 * exact.norm()


@pytest.mark.parametrize("shape", [shape for shape in BFLOAT16_SHAPES if min(shape) >= 16], ids=str)
def test_the_bounds_of_amx_see_an_error(shape):
    x = bfloat16_matrix(shape)
    exact, rounded = steps(x), bfloat16_steps(x)
    own = (rounded - exact).norm()
    # 2.5 %; a block of the Gram matrix left out; the wrong one of two neighbours.
    wrong = [1.025 * rounded, rounded.clone(), rounded.clone()]
    wrong[1][:16, :16] = 0
    wrong[2][:, [2, 3]] = rounded[:, [3, 2]]
    for made in wrong:
        assert (made - rounded).norm() > own


@needs_amx
def test_amx_gives_the_same_on_any_number_of_threads_in_any_layout_and_beside_any_others():
    shapes = [(150, 140), (5, 40), (130, 400), (40, 5), (257, 300), (300, 257)]
    matrices = [bfloat16_matrix(shape, seed=i) for i, shape in enumerate(shapes)]
    with threads(1):
        expected = orthogonalise_all(matrices, impl="amx")
    for number in (2, 3, 5):
        with threads(number), poisoned_empty():
            actual = orthogonalise_all([x.mT.contiguous().mT for x in matrices], impl="amx")
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    for x, together in zip(matrices, expected, strict=True):
        assert torch.equal(orthogonalise(x.repeat_interleave(2, 1)[:, ::2], impl="amx"), together)
        # A tall matrix takes the steps of the wide one.
        assert torch.equal(orthogonalise(x.mT, impl="amx"), together.mT)
        assert torch.equal(orthogonalise(x), together)


@needs_amx
@pytest.mark.parametrize("shape", [(3, 5), (160, 140), (1, 1)])
def test_amx_of_zeros_and_of_what_is_not_finite(shape):
    zeros = torch.zeros(shape, dtype=torch.bfloat16)
    assert torch.equal(orthogonalise(zeros, impl="amx"), zeros)
    for value in (float("nan"), float("inf")):
        x = zeros.clone()
        x[-1, -1] = value
        assert orthogonalise(x, impl="amx").isnan().all()


@needs_amx
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 5), r"dtype torch\.float32 is not torch\.bfloat16"),
        (torch.zeros(3, 5, dtype=torch.float16), r"dtype torch\.float16 is not torch\.bfloat16"),
        (torch.zeros(0, 5, dtype=torch.bfloat16), r"a matrix of shape \(0, 5\) is empty"),
        (torch.zeros(3, 5, dtype=torch.bfloat16, device="meta"), "the tensors are on meta"),
    ],
)
def test_amx_says_why_not(x, message):
    with pytest.raises(BackendUnavailable, match=rf"orthogonalise: impl='amx' cannot run: {message}"):
        orthogonalise(x, impl="amx")


def test_amx_says_what_the_machine_lacks(monkeypatch):
    monkeypatch.setattr("hflfnerv.ops._cpp._amx", lambda: "needs AMX (bf16): this CPU has none")
    x = bfloat16_matrix((20, 33))
    with pytest.raises(BackendUnavailable, match=r"impl='amx' cannot run: needs AMX \(bf16\): this CPU has none"):
        orthogonalise(x, impl="amx")
    assert not multiplies_bfloat16(x)
    assert torch.equal(orthogonalise(x), orthogonalise(x, impl="reference"))


@pytest.mark.parametrize("reason", [None, "needs AMX"])
def test_where_bfloat16_is_multiplied(monkeypatch, reason):
    monkeypatch.setattr("hflfnerv.ops._cpp._amx", lambda: reason)
    assert multiplies_bfloat16(torch.zeros(3, 5)) == (reason is None)
    assert not multiplies_bfloat16(torch.zeros(3, 5, device="meta"))


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


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_results_are_in_the_order_of_the_matrices(impl):
    """Also of matrices that different implementations take."""
    generator = torch.Generator().manual_seed(10)
    shapes = [(3, 7), (40, 90), (7, 3), (20, 90), (3, 7)]
    dtypes = [torch.float32, torch.float64, torch.float32, torch.float32, torch.float64]
    matrices = [torch.randn(s, generator=generator, dtype=d) for s, d in zip(shapes, dtypes, strict=True)]
    for made, x in zip(orthogonalise_all(matrices, impl=impl), matrices, strict=True):
        assert made.dtype == x.dtype
        torch.testing.assert_close(made, orthogonalise(x, impl=impl), rtol=0, atol=1e-4)
    assert orthogonalise_all([], impl=impl) == []


def test_interpreter(interpreter):
    assert " passed" in interpreter("orthogonalise")


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("rows", [64, 128])
def test_ahead_of_time(compile_launch, capability, rows):
    from hflfnerv.triton_kernels import orthogonalise as kernels

    matrices = [torch.zeros(rows, 800), torch.zeros(800, rows), torch.zeros(4, 7)]
    (found,) = compile_launch(kernels, lambda: kernels.orthogonalise(matrices, (3.4, -4.8, 2.0), 5), capability)
    assert found.stack_bytes == found.local_bytes == 0, found
    assert found.matrix_instructions, found


ON_GPU = [
    pytest.param(
        entry,
        id=entry.name,
        marks=pytest.mark.skipif(
            entry.unavailable() is not None and not requires("cuda"), reason=f"{entry.name}: {entry.unavailable()}"
        ),
    )
    for entry in ORTHOGONALISE
    if entry.name in ("cuda", "triton")
]


@pytest.mark.parametrize("name", ["cuda", "triton"])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 5), "the tensors are on cpu"),
        (torch.zeros(3, 5, device="meta"), "the tensors are on meta"),
    ],
)
def test_kernels_for_a_gpu_say_why_not(name, x, message):
    entry = next(entry for entry in ORTHOGONALISE if entry.name == name)
    assert message in entry.rejects(x)


@pytest.mark.parametrize("entry", ON_GPU)
@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((129, 140), torch.float32, r"a matrix of shape \(129, 140\) has no side from 1 to 128"),
        ((0, 3), torch.float32, r"a matrix of shape \(0, 3\) has no side from 1 to 128"),
        ((3, 2**21), torch.float32, "has more than 4194304 elements"),
        ((3, 5), torch.bfloat16, "dtype torch.bfloat16 is not"),
    ],
)
def test_kernels_for_a_gpu_say_what_they_do_not_take(entry, shape, dtype, message):
    with pytest.raises(BackendUnavailable, match=message):
        orthogonalise(torch.zeros(shape, dtype=dtype, device="cuda"), impl=entry.name)


@pytest.mark.parametrize("entry", ON_GPU)
def test_a_gpu_gives_the_same_beside_any_others(entry):
    generator = torch.Generator().manual_seed(11)
    shapes = [(64, 256), (128, 925), (1350, 64), (16, 4), *[(9, 30 + i) for i in range(70)]]
    matrices = [torch.randn(s, generator=generator).cuda() for s in shapes]
    for made, x in zip(orthogonalise_all(matrices, impl=entry.name), matrices, strict=True):
        alone = orthogonalise(x, impl=entry.name)
        torch.testing.assert_close(made, alone, rtol=0, atol=2 * 3.4445**8 * 3 * 2**-22)
