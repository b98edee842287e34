"""All casts of a step at once: the values and gradients of autocast, in a fraction of the operations."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from hflfnerv.models import MODELS, build_model
from hflfnerv.train.master_weights import MasterWeights


def make_model(name, preset):
    torch.manual_seed(0)
    model = build_model(MODELS[name].plan(60_000, 6, 48, 64, preset=preset))
    return model.to(memory_format=torch.channels_last)


def inputs_of(model):
    generator = torch.Generator().manual_seed(1)
    frames = torch.rand(2, 3, 48, 64, generator=generator).contiguous(memory_format=torch.channels_last)
    return (None if model.encoder is None else frames), torch.tensor([0, 3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "preset"), [("hflf", "best"), ("hflf", "paper"), ("hnerv", "paper"), ("nerv", "paper")]
)
def test_values_and_gradients_are_those_of_autocast(name, preset, dtype):
    model = make_model(name, preset)
    other = copy.deepcopy(model)
    with torch.autocast("cpu", dtype=dtype, cache_enabled=False):
        expected = model(*inputs_of(model))
        casts = MasterWeights(other, dtype).cast()
        actual = functional_call(other, casts, inputs_of(other))
    assert {cast.dtype for cast in casts.values()} == {dtype}
    assert torch.equal(actual, expected)
    for image in (expected, actual):
        image.float().square().mean().backward()
    for (key, parameter), same in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(same.grad, parameter.grad), key
        assert same.grad.stride() == parameter.stride(), key
        assert same.grad.dtype == torch.float32, key


def test_no_weight_is_cast_by_itself():
    model = make_model("hflf", "best")
    weights = MasterWeights(model, torch.bfloat16)
    shapes = {cast.shape for cast in weights.cast().values()}
    casts = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket.__name__ == "_to_copy" and args[0].shape in shapes:
                casts.append(args[0].shape)
            return function(*args, **(kwargs or {}))

    with Casts():
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            image = functional_call(model, weights.cast(), inputs_of(model))
        image.float().square().mean().backward()
    assert casts == []


def test_a_weight_that_nothing_depends_on_has_no_gradient():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    casts = MasterWeights(model, torch.bfloat16).cast()
    torch.nn.functional.linear(torch.ones(1, 3, dtype=torch.bfloat16), casts["1.weight"]).sum().backward()
    assert model[1].weight.grad is not None
    assert [p.grad for p in (model[0].weight, model[0].bias, model[1].bias)] == [None] * 3


class Decoding(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, embeddings, index):
        return self.model.decode(embeddings, index)


def test_the_gradients_of_a_part_are_taken_by_themselves():
    model = make_model("hnerv", "paper")
    weights = MasterWeights(model, torch.bfloat16, apart="encoder.").cast()
    (x, index), encoder = inputs_of(model), set(model.encoder.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        embeddings = functional_call(model.encoder, {k[8:]: w for k, w in weights.items() if k[:8] == "encoder."}, x)
        leaf = embeddings.detach().requires_grad_()
        image = functional_call(Decoding(model), {f"model.{k}": w for k, w in weights.items()}, (leaf, index))
    image.float().square().mean().backward()
    assert all((p.grad is None) == (p in encoder) for p in model.parameters())
    embeddings.backward(leaf.grad)
    assert all(p.grad is not None for p in encoder)
