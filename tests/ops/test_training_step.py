"""The kernels of a training step, one after another, in the interpreter."""

from __future__ import annotations


def test_interpreter(interpreter):
    assert " passed" in interpreter("training_step")
