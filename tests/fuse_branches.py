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
    """The modules of a block, a head that is off, and a list and a dict for forwards to look into."""

    def __init__(self):
        super().__init__()
        self.conv, self.up, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.PixelShuffle(2), nn.GELU()
        self.head, self.heads, self.modes = None, [None], {"a": 1}

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
NONE = "asks whether 'skip' is None, which symbols hide"
LOOK_UP = "looks up in a set or a dict what a symbol stands for"


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


@hidden("asks for .tensors, which tensors do not have, or not always")
def attribute_or_default(self, x):
    y = self.start(x)
    return self.act(y + 1 if getattr(x, "tensors", None) is None else y)


@hidden(f"asks callable, {TYPES}")
def is_callable(self, x):
    y = self.start(x)
    return self.act(y if callable(x) else y + 1)


@hidden("matches types, and symbols have another type than tensors")
def match_class(self, x, skip=None):
    y = self.start(x)
    match skip:
        case Tensor():
            y = y + skip
    return self.act(y)


@hidden("matches types, and symbols have another type than tensors")
def match_mapping(self, x, skip=None):
    y = self.start(x)
    match skip:
        case {"value": value}:
            y = y + value
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


@hidden(f"asks is_inference_mode_enabled, {CALL}")
def inference_mode(self, x):
    y = self.start(x)
    return self.act(y + 1 if torch.is_inference_mode_enabled() else y)


@hidden(f"asks is_autocast_enabled, {CALL}")
def autocast(self, x):
    y = self.start(x)
    return self.act(y + 1 if torch.is_autocast_enabled("cpu") else y)


@hidden(f"asks is_compiling, {CALL}")
def compiling(self, x):
    y = self.start(x)
    return self.act(y + 1 if torch.compiler.is_compiling() else y)


@hidden("symbolically traced variables cannot be used as inputs to control flow")
def requires_grad(self, x):
    y = self.start(x)
    return self.act(y + 1 if x.requires_grad else y)


@hidden("symbolically traced variables cannot be used as inputs to control flow")
def device(self, x):
    y = self.start(x)
    return self.act(y + 1 if x.device.type == "cuda" else y)


@hidden("compares identities, and symbols have another identity than what they stand for")
def dtype(self, x):
    y = self.start(x)
    return self.act(y + 1 if x.dtype is torch.float32 else y)


@hidden("compares identities, and symbols have another identity than what they stand for")
def flag(self, x, add=False):
    y = self.start(x)
    return self.act(y + 1 if add is True else y)


@hidden(LOOK_UP)
def dtype_in_a_set(self, x):
    y = self.start(x)
    return self.act(y + 1 if x.dtype in {torch.float32, torch.float64} else y)


@hidden(LOOK_UP)
def device_in_a_set(self, x):
    y = self.start(x)
    return self.act(y + 1 if x.device.type in {"cuda", "mps"} else y)


@hidden(LOOK_UP)
def mode_in_a_dict(self, x, mode="b"):
    y = self.start(x)
    return self.act(y + 1 if self.modes.get(mode) else y)


@hidden("its forward writes out what a symbol stands for")
def device_as_text(self, x):
    y = self.start(x)
    return self.act(y + 1 if str(x.device).startswith("cuda") else y)


@hidden("has a try statement, which may catch what symbols raise")
def typed_except(self, x):
    y = self.start(x)
    try:
        y = y + 1 if x.sum() > 0 else y
    except RuntimeError:
        self.head = None
    return self.act(y)


@hidden("has a try statement, which may catch what symbols raise")
def bare_except(self, x):
    y = self.start(x)
    try:
        y = y + 1 if x.sum() > 0 else y
    except:  # noqa: E722
        self.head = None
    return self.act(y)


@hidden("suppresses exceptions, and may suppress what symbols raise")
def suppressed(self, x):
    y = self.start(x)
    with contextlib.suppress(Exception):
        y = y + 1 if x.sum() > 0 else y
    return self.act(y)


@hidden(NONE)
def required_argument(self, x, skip):
    y = self.start(x)
    return self.act(y + 1 if skip is None else y)


@hidden(NONE)
def another_default_than_none(self, x, skip=1.0):
    y = self.start(x)
    return self.act(y + 1 if skip is None else y)


@hidden("add_one() asks whether 'value' is None, which symbols hide")
def required_argument_in_a_helper(self, x, skip):
    def add_one(y, value):
        return y + 1 if value is None else y

    return self.act(add_one(self.start(x), skip))


@hidden(NONE)
def item_of_a_dict(self, data):
    y, skip = self.start(data["x"]), data["skip"]
    return self.act(y + 1 if skip is None else y)


@hidden(NONE)
def unpacked(self, data):
    x, skip = data
    y = self.start(x)
    return self.act(y + 1 if skip is None else y)


@hidden(NONE)
def assigned_on_the_way(self, data):
    y = self.start(data["x"])
    return self.act(y + 1 if (skip := data["skip"]) is None else y * skip.mean())


@hidden(NONE)
def matched(self, x, skip):
    y = self.start(x)
    match skip:
        case None:
            y = y + 1
    return self.act(y)


@hidden("it asks whether something is None, which symbols hide")
def item_without_a_name(self, data):
    y = self.start(data["x"])
    return self.act(y + 1 if data["skip"] is None else y)


@hidden("it asks whether something is None, which symbols hide")
def one_of_two_values(self, x, which=None, skip=1.0):
    y = self.start(x)
    return self.act(y + 1 if (skip if which is None else which) is None else y)


@hidden("asks for .get, which tensors do not have, or not always")
def item_of_keyword_arguments(self, x, **others):
    y = self.start(x)
    return self.act(y + 1 if others.get("skip") is None else y)


@hidden("asks for .grad, which tensors do not have, or not always")
def gradient(self, x):
    y = self.start(x)
    return self.act(y + 1 if x.grad is None else y)


@hidden(f"asks random, {CALL}")
def random_number(self, x):
    y = self.start(x)
    return self.act(y + 1 if random.random() < 1e-9 else y)


@hidden("its forward reads the value of a tensor (__bool__)")
def random_tensor(self, x):
    y = self.start(x)
    return self.act(y + 1 if torch.rand(()) < 1e-9 else y)


@hidden("its forward reads the value of a tensor (item)")
def random_value(self, x):
    y = self.start(x)
    return self.act(y + 1 if torch.rand(()).item() < 1e-9 else y)


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
    return self.act(self.start(x + torch.rand_like(x) * torch.rand(())))


@safe
def shape(self, x):
    batch, _, height, width = x.shape
    return self.act(self.start(x)).reshape(batch, -1, height, width)


class ByItsParent(SAFE["shape"]):
    def forward(self, x):
        return super().forward(x)


SAFE["super"] = ByItsParent
