"""PackedWeights: kept weights are those of the parameter as it is, and nothing is kept unasked."""

from __future__ import annotations

import threading
import weakref

import pytest
import torch

from hflfnerv.ops import PackedWeights
from hflfnerv.ops.packed_weights import kept_weight
from hflfnerv.testing import requires


def doubled(weight, layout=()):
    return kept_weight(weight, lambda: layout, lambda: weight.detach() * 2)


@pytest.fixture
def linear():
    return torch.nn.Linear(3, 2, bias=False)


def test_nothing_is_kept_unasked(linear):
    assert doubled(linear.weight) is None
    with PackedWeights():
        assert doubled(linear.weight) is not None
    assert doubled(linear.weight) is None


def test_kept_until_the_weight_changes(linear):
    def write_in_place():
        with torch.no_grad():
            linear.weight.mul_(3)

    def optimise():
        linear.weight.grad = torch.ones_like(linear.weight)
        torch.optim.SGD([linear.weight], lr=0.5).step()

    changes = [
        write_in_place,
        optimise,
        lambda: linear.load_state_dict({"weight": torch.randn(2, 3)}),
        lambda: linear.load_state_dict({"weight": torch.randn(2, 3)}, assign=True),
        lambda: linear.double(),
        lambda: setattr(linear.weight, "data", torch.randn(2, 3, dtype=torch.float64)),
    ]
    with PackedWeights(), torch.no_grad():
        for change in changes:
            before = doubled(linear.weight)
            assert doubled(linear.weight) is before
            change()
            after = doubled(linear.weight)
            assert after is not before
            assert torch.equal(after, linear.weight * 2)


def test_layouts_are_kept_apart(linear):
    with PackedWeights():
        assert doubled(linear.weight, (2,)) is not doubled(linear.weight, (4,))
        assert doubled(linear.weight, (2,)) is doubled(linear.weight, (2,))


def test_nothing_stale_is_kept(linear):
    with PackedWeights() as kept, torch.no_grad():
        old = weakref.ref(doubled(linear.weight, (2,)))
        doubled(linear.weight, (4,))
        linear.weight.mul_(3)
        doubled(linear.weight, (4,))
        assert old() is None
        old = [weakref.ref(doubled(linear.weight, (4,))), weakref.ref(linear.weight)]
        linear.load_state_dict({"weight": torch.zeros(2, 3)}, assign=True)
        assert [t() for t in old] == [None, None]
        assert not kept._kept
        doubled(linear.weight)
        del linear.weight
        assert not kept._kept


def test_a_parameter_in_the_place_of_another(linear):
    # An id is given again once its object is gone, even with the address of the values and the version.
    values = torch.zeros(2, 3)
    with PackedWeights():
        for _ in range(20):
            parameter = torch.nn.Parameter(values)
            packed = doubled(parameter)
            assert torch.equal(packed, values * 2)
            del parameter, packed
            values.data.add_(1)


def test_one_object_in_threads_that_overlap(linear):
    shared, entered, failures = PackedWeights(), threading.Barrier(2), []

    def work():
        try:
            with shared:
                entered.wait()
                assert doubled(linear.weight) is not None
                entered.wait()
            assert doubled(linear.weight) is None
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_only_parameters_are_kept(linear):
    with PackedWeights() as kept:
        cast = linear.weight.detach()
        assert doubled(cast) is not doubled(cast)
        assert not kept._kept
        with torch.inference_mode():
            parameter = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
            assert doubled(parameter) is doubled(parameter)


def test_nested_and_in_other_threads(linear):
    outer = PackedWeights()
    with outer:
        of_outer = doubled(linear.weight)
        with PackedWeights():
            assert doubled(linear.weight) is not of_outer
        assert doubled(linear.weight) is of_outer
        found = []
        thread = threading.Thread(target=lambda: found.append(doubled(linear.weight)))
        thread.start()
        thread.join()
        assert found == [None]
    with outer:
        assert doubled(linear.weight) is of_outer


def test_compiled_code_keeps_nothing(linear):
    def function(x):
        packed = doubled(linear.weight)
        return x if packed is None else x + 1

    with PackedWeights():
        assert function(torch.zeros(1)).item() == 1
        assert torch.compile(function, fullgraph=True, backend="eager")(torch.zeros(1)).item() == 0


@pytest.mark.skipif(not torch.cuda.is_available() and not requires("cuda"), reason="no CUDA device")
@pytest.mark.parametrize("kept", [True, False])
def test_in_a_cuda_graph(kept):
    from hflfnerv.nn import UpsampleBlock

    block = UpsampleBlock(33, 28, 2, 5, impl="triton").cuda().bfloat16().to(memory_format=torch.channels_last)
    x = torch.randn(1, 33, 16, 32, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), PackedWeights():
        expected = block(x)
        if not kept:  # as if the graph were the first to see the weight
            block.conv.weight.add_(0)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = block(x)
        graph.replay()
        assert torch.equal(y, expected)
        assert torch.equal(block(x), expected)
