"""Forwards of one block whose way a trace cannot know, and others that look like them and are safe.

The first add something between PixelShuffle and GELU in some calls; ``HIDDEN`` has the reason why each is left alone.
"""

from __future__ import annotations

import contextlib
import random

import torch
from torch import Tensor, nn

HIDDEN = {}
SAFE = {}


class OneBlock(nn.Module):
    """The modules of a block, a head that is off, and a list of heads."""

    def __init__(self):
        super().__init__()
        self.conv, self.up, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.PixelShuffle(2), nn.GELU()
        self.head, self.heads = None, [None]

    def start(self, x):
        return self.up(self.conv(x))


def hidden(reason):
    def add(forward):
        HIDDEN[forward.__name__] = type("Branch", (OneBlock,), {"forward": forward}), reason
        return forward

    return add


def safe(forward):
    SAFE[forward.__name__] = type("Safe", (OneBlock,), {"forward": forward})
    return forward


TYPES = "which symbols answer in another way than tensors"
CALL = "which may answer in another way in another call"
CATCH = "may catch what symbols raise"


def add_tensor(y, skip):
    return y + skip if isinstance(skip, Tensor) else y


@hidden(f"add_tensor() asks isinstance, {TYPES}")
def helper(self, x, skip=None):
    return self.act(add_tensor(self.start(x), skip))


@hidden(f"asks isinstance, {TYPES}")
def comprehension(self, x, skip=None):
    return self.act(self.start(x) + sum([s for s in (skip,) if isinstance(s, Tensor)]))


@hidden(f"asks type, {TYPES}")
def exact_type(self, x, skip=None):
    y = self.start(x)
    return self.act(y + skip if type(skip) is Tensor else y)


@hidden(f"asks __class__, {TYPES}")
def class_attribute(self, x, skip=None):
    y = self.start(x)
    return self.act(y + skip if skip.__class__ == Tensor else y)


@hidden(f"asks hasattr, {TYPES}")
def has_attribute(self, x):
    y = self.start(x)
    return self.act(y + 1 if not hasattr(x, "shape") else y)


@hidden("matches types, and symbols have another type than tensors")
def match_class(self, x, skip=None):
    y = self.start(x)
    match skip:
        case Tensor():
            y = y + skip
    return self.act(y)


@hidden("not in every call: it depends on training, or on an optional argument")
def one_argument_of_two(self, x, skip=None, gate=None):
    y = self.start(x)
    return self.act(y + skip if skip is not None and gate is None else y)


@hidden("its forward has 4 optional arguments; 3 are tried, each with and without")
def four_optional_arguments(self, x, a=None, b=None, c=None, skip=None):
    return self.act(self.start(x))


@hidden(f"asks is_grad_enabled, {CALL}")
def grad_mode(self, x):
    y = self.start(x)
    return self.act(y if torch.is_grad_enabled() else y + 1)


@hidden(f"asks is_autocast_enabled, {CALL}")
def autocast(self, x):
    y = self.start(x)
    return self.act(y + 1 if torch.is_autocast_enabled("cpu") else y)


@hidden(f"asks is_compiling, {CALL}")
def compiling(self, x):
    y = self.start(x)
    return self.act(y + 1 if torch.compiler.is_compiling() else y)


@hidden("compares identities, and symbols have another identity than what they stand for")
def flag(self, x, add=False):
    y = self.start(x)
    return self.act(y + 1 if add is True else y)


@hidden(CATCH)
def typed_except(self, x):
    y = self.start(x)
    try:
        y = y + 1 if x.sum() > 0 else y
    except RuntimeError:
        self.head = None
    return self.act(y)


@hidden(CATCH)
def bare_except(self, x):
    y = self.start(x)
    try:
        y = y + 1 if x.sum() > 0 else y
    except:  # noqa: E722
        self.head = None
    return self.act(y)


@hidden(CATCH)
def suppressed(self, x):
    y = self.start(x)
    with contextlib.suppress(Exception):
        y = y + 1 if x.sum() > 0 else y
    return self.act(y)


@hidden("what a function raised was caught on the way")
def caught(self, x, skip=None):
    y = self.start(x)
    with contextlib.ExitStack() as stack:
        stack.push(lambda *_: True)
        y = add_tensor(y, skip)
    return self.act(y)


@hidden(f"asks random, {CALL}")
def random_number(self, x):
    y = self.start(x)
    return self.act(y + 1 if random.random() < 1e-9 else y)


@hidden(f"asks rand, {CALL}")
def random_tensor(self, x):
    y = self.start(x)
    return self.act(y + 1 if torch.rand(()) < 1e-9 else y)


@safe
def three_optional_arguments(self, x, skip=None, gate=None, gain=1.0):
    y = self.act(self.start(x)) * gain
    if skip is not None and gate is None:
        y = y + skip
    return y


@safe
def none_that_is_no_symbol(self, data):
    y = self.act(self.start(data["x"]))
    total = None
    for head in self.heads:
        total = y if total is None else total + y
        if head is not None:
            total = head(total)
    return total if self.head is None else self.head(total)


@safe
def context_manager(self, x):
    with torch.no_grad():
        mean = x.mean(dim=(2, 3), keepdim=True)
    return self.act(self.start(x)) * mean.mean()


@safe
def scripting(self, x):
    # Never in Python, and a fused block is not for scripting.
    return self.act(self.start(x) + 1 if torch.jit.is_scripting() else self.start(x))


@safe
def noise(self, x):
    return self.act(self.start(x + torch.rand_like(x)))


@safe
def type_that_is_an_attribute(self, x):
    return self.act(self.start(x)).type(torch.float32)


@safe
def shape(self, x):
    batch, _, height, width = x.shape
    return self.act(self.start(x)).reshape(batch, -1, height, width)


class ByItsParent(SAFE["shape"]):
    def forward(self, x):
        return super().forward(x)


SAFE["super"] = ByItsParent
