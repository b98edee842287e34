"""The fused kernel of output_stage without a GPU: the interpreter, compilation, what it refuses."""

from __future__ import annotations

import importlib

import pytest
import torch
from ahead_of_time import MATRIX

from hflfnerv.ops import OUTPUT_STAGE, PackedWeights

MODULE = importlib.import_module("hflfnerv.ops.output_stage")
ENTRY = next(entry for entry in OUTPUT_STAGE if entry.name == "triton")
ONE, DUAL = ([0], [0.5]), ([0, 1, 1], [1.0, 0.5])


def test_interpreter(interpreter):
    assert " passed" in interpreter("output_stage")


@pytest.mark.parametrize(
    ("channels", "link", "dtype", "precision", "capability"),
    [
        *(((24, 5, 10), DUAL, torch.bfloat16, "ieee", capability) for capability in (80, 90, 100)),
        ((28,), ONE, torch.float16, "ieee", 90),
        ((64,), ONE, torch.bfloat16, "ieee", 90),
        ((28,), ONE, torch.float32, "ieee", 90),
        ((28,), ONE, torch.float32, "tf32", 90),
        ((64,), ONE, torch.float32, "tf32", 80),
    ],
)
def test_ahead_of_time(compile_launch, monkeypatch, channels, link, dtype, precision, capability):
    from hflfnerv.triton_kernels import output_stage as kernels

    monkeypatch.setattr(kernels, "precision_of", lambda _: precision)
    features = [torch.empty(1, c, 640, 1280, dtype=dtype).to(memory_format=torch.channels_last) for c in channels]
    packed = [kernels.pack_head(torch.zeros(3, c, 3, 3, dtype=dtype)) for c in channels]
    groups, scales = link

    def launch():
        kernels.output_stage_fwd(features, packed, torch.zeros(len(scales), 3), groups, scales, 0.5, (640, 1280), True)

    (found,) = compile_launch(kernels, launch, capability)
    assert found.stack_bytes == found.local_bytes == 0, found
    if dtype != torch.float32:
        assert found.matrix_instructions == {MATRIX[capability]}, found
    assert not found.async_copy_bytes, found  # the loads are to go through L1


def test_compiled_code_keeps_nothing(monkeypatch):
    pytest.importorskip("triton")
    from hflfnerv.triton_kernels import output_stage as kernels

    # The weights as they are in place of a kernel: it is to be given what is packed for this call.
    packed = []
    monkeypatch.setattr(kernels, "pack_head", lambda weight: packed.append(weight) or weight)
    monkeypatch.setattr(kernels, "output_stage_fwd", lambda features, weights, *_: weights[0][:, :, :, 0].clone())
    weight = torch.nn.Parameter(torch.zeros(3, 8, 3, 3))

    def function(x):
        call = MODULE.Call([x], [weight], torch.zeros(1, 3), [0], [0.5], 0.5, [3, 3], False)
        return MODULE._run_triton(call)

    x = torch.zeros(1, 8, 4, 4)
    with torch.no_grad(), PackedWeights() as kept:
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        for _ in range(2):
            compiled(x)
        assert len(packed) == 2
        assert not kept._kept
        for _ in range(2):
            function(x)
        assert len(packed) == 3


def test_says_why_not(monkeypatch):
    weight = torch.zeros(3, 8, 3, 3)

    def why_not(*features):
        return ENTRY.rejects(MODULE.Call(list(features), [weight], torch.zeros(1, 3), [0], [0.5], 0.5, [4, 4], True))

    assert "the tensors are on cpu" in why_not(torch.zeros(1, 8, 4, 4))
    # As on a machine with a GPU: the device's own limits come first.
    monkeypatch.setattr(MODULE, "rejects_tensor", lambda device, dtype: None)
    small = torch.zeros(1, 8, 4, 4)
    assert why_not(small, small, small) is None
    assert why_not(small, small, small, small) == "there are 4 features, more than 3"
    assert why_not(torch.zeros(1, 65, 4, 4)) == "a feature has 65 channels, more than 64"
    huge = torch.zeros(()).expand(1, 32, 2**13, 2**13)
    assert why_not(huge) == "one image has 2147483648 elements, more than 2147483647"
