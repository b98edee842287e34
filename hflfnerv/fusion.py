"""Fuse the upsampling blocks of a model that knows nothing of this package, in place, and undo it.

A block is a convolution, a PixelShuffle and a GELU that are three modules. :func:`fuse` changes the *class* of these
three objects, as :mod:`torch.nn.utils.parametrize` does: the convolution then computes the whole block, and the other
two hand on what they get. The objects, their names, parameters and buffers, and the code that calls them stay as they
are; so do the optimiser, DistributedDataParallel and every reference that somebody holds.

Which modules follow one another is read from the graph that :mod:`torch.fx` traces of the smallest module that
encloses them. What a trace cannot show to be safe is left alone, and the report says why.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import itertools
import operator
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from .errors import BackendUnavailable
from .nn import UpsampleBlock
from .nn._attached import attached
from .ops import CONV_PIXEL_SHUFFLE_GELU, conv_pixel_shuffle_gelu

__all__ = ["FuseReport", "Fused", "Left", "fuse", "unfuse"]


@dataclass(eq=False)
class _Block:
    """What the parts of one fused block share; copies of a model keep it one object per block."""

    upscale_factor: int
    padding: tuple[int, int]
    approximate: str
    impl: str
    parts: int


class FusedConv2d(nn.Conv2d):
    """An ``nn.Conv2d`` that :func:`fuse` made to compute its whole block."""

    fused_block: _Block

    def forward(self, input: Tensor) -> Tensor:
        """Return ``GELU(PixelShuffle_r(conv(input)))`` for ``[B, C_in, H, W]`` or ``[C_in, H, W]``."""
        block = self.fused_block
        y = conv_pixel_shuffle_gelu(
            input.unsqueeze(0) if input.dim() == 3 else input,
            self.weight,
            self.bias,
            block.upscale_factor,
            padding=block.padding,
            approximate=block.approximate,
            impl=block.impl,
        )
        return y.squeeze(0) if input.dim() == 3 else y

    def extra_repr(self) -> str:
        """Return the settings of the convolution and of the rest of the block."""
        block = self.fused_block
        return (
            f"{super().extra_repr()}, upscale_factor={block.upscale_factor}, "  # type: ignore[no-untyped-call]
            f"approximate={block.approximate!r}, impl={block.impl!r}"
        )


class FusedPixelShuffle(nn.PixelShuffle):
    """An ``nn.PixelShuffle`` whose work the convolution before it does."""

    fused_block: _Block

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input``."""
        return input


class FusedGELU(nn.GELU):
    """An ``nn.GELU`` whose work the convolution before it does."""

    fused_block: _Block

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input``."""
        return input


_FUSED_CLASS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: FusedConv2d,
    nn.PixelShuffle: FusedPixelShuffle,
    nn.GELU: FusedGELU,
}
_PLAIN_CLASS = {fused: plain for plain, fused in _FUSED_CLASS.items()}
_STEPS = (*_FUSED_CLASS, nn.Identity)
_LIBRARY = ("torch", "hflfnerv")


@dataclass(frozen=True)
class Fused:
    """A block that was fused. Names are those of ``model.get_submodule``.

    Attributes:
        conv: name of the convolution, which now computes the block.
        pixel_shuffle: name of the PixelShuffle, or None where an ``nn.Identity`` stands in its place.
        gelu: name of the GELU.
        upscale_factor: r, by which rows and columns grow; 1 without a PixelShuffle.
    """

    conv: str
    pixel_shuffle: str | None
    gelu: str
    upscale_factor: int


@dataclass(frozen=True)
class Left:
    """A PixelShuffle that was left as it is.

    Attributes:
        name: of the PixelShuffle, or of the module whose forward calls ``pixel_shuffle`` as a function.
        reason: why, in words.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class FuseReport:
    """What :func:`fuse` did; ``print`` it.

    Attributes:
        fused: the blocks it fused, in the order of ``model.named_modules()``.
        left: every PixelShuffle it left, and why.
        already: names of the convolutions that an earlier call fused, and of this package's own blocks.
    """

    fused: tuple[Fused, ...]
    left: tuple[Left, ...]
    already: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"fused: {len(self.fused)}"]
        for row in self.fused:
            names = " -> ".join(name for name in (row.conv, row.pixel_shuffle, row.gelu) if name is not None)
            lines.append(f"  {names} (r = {row.upscale_factor})")
        lines.append(f"left: {len(self.left)}")
        lines += [f"  {row.name or '(the model)'}: {row.reason}" for row in self.left]
        if self.already:
            lines.append(f"fused already: {len(self.already)}")
        return "\n".join(lines)


def fuse(model: nn.Module, *, impl: str = "auto") -> FuseReport:
    """Fuse every conv -> PixelShuffle -> GELU of a model, in place.

    ``y = GELU(PixelShuffle_r(conv(x)))`` then runs as one :func:`hflfnerv.ops.conv_pixel_shuffle_gelu`. Found are
    ``nn.Conv2d``, ``nn.PixelShuffle`` and ``nn.GELU`` modules that are called one after another, in whichever way:
    in an ``nn.Sequential``, nested, or as attributes in somebody's ``forward``. ``nn.Identity`` may stand between them
    (a norm that is switched off), or in place of the PixelShuffle (a block of stride 1).

    Parameters, buffers, ``state_dict()`` and its keys, and all module objects stay the same, so that checkpoints,
    optimisers, DistributedDataParallel, DataParallel, ``copy.deepcopy`` and ``torch.compile`` work as before; call it
    before or after wrapping. :func:`unfuse` undoes it. Undo it also before you edit, script or symbolically trace a
    fused block, and register hooks on its parts with care: the convolution returns the output of the whole block.

    A block is left alone where fusing could change a result or lose something: see :attr:`FuseReport.left`. Calls of
    ``F.pixel_shuffle`` or ``F.gelu`` inside a ``forward`` are left as well, since there is no module whose class
    could change; rewriting that ``forward`` from a trace would freeze its control flow.

    To see what follows what, the ``forward`` of the smallest enclosing module is run on symbolic values, for training
    and for inference, with every choice of its optional arguments (three at most). Attributes it sets are restored, and
    so are the lists, dicts, sets and deques among them. Code that could take another way with tensors than with
    symbols is not trusted, wherever ``forward`` calls it: ``isinstance``, ``type``, ``hasattr``, ``is`` other than with
    None, ``match`` on types, ``try``, a branch on a random number, ``torch.is_grad_enabled()`` and the like. Two things
    no trace can show, and are up to you: a branch on other attributes or globals is followed as they are at the moment,
    and nobody else (other methods, code outside the module) may call the parts of a block one by one.

    Args:
        model: any module; names in the report are relative to it.
        impl: implementation of :func:`hflfnerv.ops.conv_pixel_shuffle_gelu` that the blocks use.

    Returns:
        What was fused and what was not, with reasons. Blocks that are fused already stay as they are.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: ``impl`` is not the name of an implementation.
        BackendUnavailable: the named implementation cannot run on this machine.

    Numerics:
        Those of the implementation. With ``impl="reference"`` results and gradients are bit-identical. In float32 on a
        CPU ``"auto"`` is mostly ``"winograd"``, whose rounding errors are about four times those of PyTorch's
        convolution; ``"conv2d+cpp"`` has the latter.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.PixelShuffle(2), nn.GELU(), nn.Conv2d(2, 3, 1))
        >>> print(fuse(model))
        fused: 1
          0 -> 1 -> 2 (r = 2)
        left: 0
        >>> model(torch.zeros(1, 3, 4, 6)).shape
        torch.Size([1, 3, 8, 12])
    """
    _check_model(model)
    if impl not in ("auto", *CONV_PIXEL_SHUFFLE_GELU.names):
        raise ValueError(f"impl must be one of {('auto', *CONV_PIXEL_SHUFFLE_GELU.names)}, got {impl!r}")
    for entry in CONV_PIXEL_SHUFFLE_GELU:
        if entry.name == impl and (reason := entry.unavailable()) is not None:
            raise BackendUnavailable(f"fuse: impl={impl!r} cannot run: {reason}")

    search = _Search(model)
    chains: dict[str, _Chain] = {}  # by the name of the convolution
    left = []
    for name, module in model.named_modules():
        if type(module) is nn.PixelShuffle:
            found = search.find(module)
            if isinstance(found, _Chain):
                chains[found.conv] = found
            else:
                left.append(Left(name, found))
        elif isinstance(module, nn.PixelShuffle) and type(module) is not FusedPixelShuffle:
            left.append(Left(name, f"{_describe(name, module)} is a subclass of nn.PixelShuffle"))
        elif reason := _shuffles_by_function(module):
            left.append(Left(name, reason))
    for module in model.modules():
        if type(module) is nn.Identity:
            found = search.find(module)
            if isinstance(found, _Chain) and found.pixel_shuffle is None:
                chains[found.conv] = found

    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    already = tuple(name for name, m in model.named_modules() if isinstance(m, (FusedConv2d, UpsampleBlock)))
    fused = tuple(_apply(model, chain, impl) for chain in sorted(chains.values(), key=lambda c: order[c.conv]))
    return FuseReport(fused, tuple(left), already)


def unfuse(model: nn.Module) -> int:
    """Undo :func:`fuse`, in place: the same module objects, with the classes they had.

    Args:
        model: the model, or a module that holds whole blocks of it.

    Returns:
        How many blocks were restored.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: ``model`` holds a part of a block, or a part got another class since. Nothing is changed then.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.PixelShuffle(2), nn.GELU())
        >>> before = repr(model)
        >>> report = fuse(model)
        >>> unfuse(model), repr(model) == before
        (1, True)
    """
    _check_model(model)
    blocks: dict[_Block, list[nn.Module]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, (FusedConv2d, FusedPixelShuffle, FusedGELU)):
            continue
        if type(module) not in _PLAIN_CLASS:
            raise ValueError(
                f"model must hold the modules that fuse() left, got a {type(module).__name__} at {name!r}; "
                "take off what was put on it since (a parametrization), then call unfuse() again"
            )
        blocks.setdefault(module.fused_block, []).append(module)
    for block, parts in blocks.items():
        if len(parts) != block.parts:
            raise ValueError(
                f"model must hold whole blocks, got {len(parts)} of the {block.parts} parts of one; "
                "pass a module that holds them all"
            )
    for parts in blocks.values():
        for part in parts:
            part.__class__ = _PLAIN_CLASS[type(part)]
            del part.fused_block
    return len(blocks)


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


@dataclass(frozen=True)
class _Chain:
    """Names of the parts of a block that can be fused."""

    conv: str
    pixel_shuffle: str | None
    gelu: str


def _apply(model: nn.Module, chain: _Chain, impl: str) -> Fused:
    names = [name for name in (chain.conv, chain.pixel_shuffle, chain.gelu) if name is not None]
    parts = [model.get_submodule(name) for name in names]
    conv, shuffle, gelu = parts[0], parts[1:-1], parts[-1]
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(gelu, nn.GELU)
    factor = int(shuffle[0].upscale_factor) if shuffle else 1  # type: ignore[arg-type]
    padding = _padding(conv)
    assert padding is not None, "the search lets no other convolution through"
    block = _Block(factor, padding, gelu.approximate, impl, len(parts))
    for part in parts:
        part.fused_block = block  # type: ignore[assignment]
        part.__class__ = _FUSED_CLASS[type(part)]
    return Fused(chain.conv, chain.pixel_shuffle, chain.gelu, factor)


def _padding(conv: nn.Conv2d) -> tuple[int, int] | None:
    """Return the zeros on each side of rows and columns, or None where the two sides differ ("same", even kernel)."""
    if conv.padding == "valid":
        return 0, 0
    if conv.padding == "same":
        height, width = conv.kernel_size
        return ((height - 1) // 2, (width - 1) // 2) if height % 2 and width % 2 else None
    return int(conv.padding[0]), int(conv.padding[1])  # NumPy integers serve nn.Conv2d too, but no operator


def _is_library(module: nn.Module) -> bool:
    """Return whether a trace takes the module as one step: PyTorch's own and ours, but containers that only call."""
    return type(module).__module__.split(".")[0] in _LIBRARY and not isinstance(module, (nn.Sequential, fx.GraphModule))


def _describe(name: str, module: nn.Module) -> str:
    cls = _PLAIN_CLASS.get(type(module), type(module))
    quantised = cls.__module__.startswith("torch.ao.")  # whose classes have the names of torch.nn
    kind = f"{cls.__module__}.{cls.__name__}" if quantised else cls.__name__
    return f"{kind} '{name}'" if name else f"the model ({kind})"


def _shuffles_by_function(module: nn.Module) -> str | None:
    if isinstance(module, torch.jit.ScriptModule):
        scripted = module.original_name == "PixelShuffle"
        return "it is TorchScript, whose code is fixed; fuse the model and do not script it" if scripted else None
    if _is_library(module) or "pixel_shuffle" not in _names_in_forward(module):
        return None
    return (
        "its forward calls pixel_shuffle as a function, so that there is no module to replace; call an nn.PixelShuffle "
        "and an nn.GELU, or use hflfnerv.nn.UpsampleBlock"
    )


def _reason_of_part(module: nn.Module) -> str | None:
    """Return what a module has that would be lost or would see other values, in words, or None."""
    if isinstance(module, LazyModuleMixin):
        return "has no parameters yet; run the model once, then fuse it"
    if (what := attached(module)) is not None:
        return f"{what}; remove it to fuse"
    if parametrize.is_parametrized(module):
        return f"has parametrizations (of {', '.join(module.parametrizations)}); remove them to fuse"  # type: ignore[arg-type]
    return None


def _conv_reason(conv: nn.Conv2d, factor: int) -> str | None:
    """Return which setting of a convolution the operation lacks, or None."""
    zero_padded = conv.padding_mode == "zeros" or conv.padding in ((0, 0), "valid")
    rules: list[tuple[bool, str]] = [
        (conv.stride == (1, 1), f"its stride is {conv.stride}, not 1"),
        (conv.dilation == (1, 1), f"its dilation is {conv.dilation}, not 1"),
        (conv.groups == 1, f"it has {conv.groups} groups, not 1"),
        (zero_padded, f"its padding mode is {conv.padding_mode!r}, not 'zeros'"),
        (_padding(conv) is not None, f"its padding 'same' of a kernel {conv.kernel_size} differs between two sides"),
        (
            conv.out_channels % factor**2 == 0,
            f"its {conv.out_channels} output channels are no multiple of r² = {factor**2}",
        ),
        (conv.weight.is_floating_point(), f"its weight is {conv.weight.dtype}, not floating point"),
    ]
    return next((reason for holds, reason in rules if not holds), None)


def _names_in_forward(module: nn.Module) -> tuple[str, ...]:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return () if code is None else code.co_names


def _check_traceable(module: nn.Module) -> None:
    if "forward" in vars(module):
        raise RuntimeError("its forward was set on the object")


# What Python answers without asking the symbol.
_ABOUT_TYPES = {"callable", "hasattr", "isinstance", "issubclass", "type"}
# What may answer in another way when the model is called.
_ABOUT_THE_CALL = {
    "is_autocast_cpu_enabled",
    "is_autocast_enabled",
    "is_compiling",
    "is_dynamo_compiling",
    "is_exporting",
    "is_fx_symbolic_tracing",
    "is_fx_tracing",
    "is_grad_enabled",
    "is_in_onnx_export",
    "is_inference_mode_enabled",
    "is_tracing",
    "random",
}
_READS_VALUES = {
    "__bool__",
    "__float__",
    "__index__",
    "__int__",
    "allclose",
    "equal",
    "is_nonzero",
    "item",
    "numpy",
    "tolist",
}
_MAY_BE_NONE = {"_base", "_grad", "_grad_fn", "grad", "grad_fn"}


@dataclass(frozen=True)
class _Questions:
    """What a piece of code asks that a trace cannot see.

    Attributes:
        untraceable: what makes the code unfit for a trace, in words, or None.
        locals_or_none: names of the local variables that it compares with None, by the offset of the comparison.
        others_or_none: whether it compares anything but local variables and attributes with None.
    """

    untraceable: str | None
    locals_or_none: dict[int, str]
    others_or_none: bool


def _untraceable(steps: list[dis.Instruction], i: int) -> str | None:
    """Return why code with the instruction ``steps[i]`` cannot be traced, or None."""
    name, argument = steps[i].opname, steps[i].argval
    called = name in ("LOAD_GLOBAL", "LOAD_NAME")
    named = called or name in ("LOAD_ATTR", "LOAD_METHOD", "IMPORT_FROM")
    if (called and argument in _ABOUT_TYPES) or (named and argument in ("is_tensor", "__class__")):
        return f"asks {argument}, which symbols answer in another way than tensors"
    if named and argument in _ABOUT_THE_CALL:
        return f"asks {argument}, which may answer in another way in another call"
    if name in ("MATCH_CLASS", "MATCH_MAPPING", "MATCH_SEQUENCE"):
        return "matches types, and symbols have another type than tensors"
    if name == "IS_OP" and not (steps[i - 1].opname == "LOAD_CONST" and steps[i - 1].argval is None):
        return "compares identities, and symbols have another identity than what they stand for"
    # SETUP_FINALLY until Python 3.10; with statements are no danger.
    if name == "SETUP_FINALLY" or (name == "PUSH_EXC_INFO" and steps[i + 1].opname != "WITH_EXCEPT_START"):
        return "has a try statement, which may catch what symbols raise"
    if named and argument == "suppress":
        return "suppresses exceptions, and may suppress what symbols raise"
    return None


@functools.lru_cache(maxsize=1024)
def _questions(code: CodeType) -> _Questions:
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("EXTENDED_ARG", "NOP")]
    names: dict[int, str] = {}
    others = False
    for i, step in enumerate(steps):
        if (reason := _untraceable(steps, i)) is not None:
            return _Questions(f"{code.co_name}() {reason}", {}, False)
        if step.opname == "IS_OP":
            first = i - 1  # after the operand comes None
        elif step.opname.startswith("POP_JUMP") and step.opname.endswith("_NONE"):
            first = i
        else:
            continue
        operand, merged = steps[first - 1], steps[first].is_jump_target
        if not merged and ("_FAST" in operand.opname or operand.opname == "LOAD_DEREF"):
            # One instruction of later Python versions loads two variables, of which the second is compared.
            name = str(operand.argval[-1] if isinstance(operand.argval, tuple) else operand.argval)
            # An instruction that is extended is one event, at the offset of its first extension.
            names.update(dict.fromkeys(range(steps[i - 1].offset + 2, step.offset + 1, 2), name))
        else:
            others |= merged or operand.opname != "LOAD_ATTR"
    return _Questions(None, names, others)


class _Opaque(fx.Proxy):
    """Raises where a symbol would show itself instead of what it stands for: in a set, in a dict and in text."""

    def __getattr__(self, k: str) -> fx.proxy.Attribute:
        return _Attribute(self, k)

    def __hash__(self) -> int:
        raise RuntimeError("its forward looks up in a set or a dict what a symbol stands for")

    def __repr__(self) -> str:
        raise RuntimeError("its forward writes out what a symbol stands for")


class _Symbol(_Opaque):
    def __getattr__(self, k: str) -> fx.proxy.Attribute:
        if not hasattr(Tensor, k) or k in _MAY_BE_NONE:
            raise RuntimeError(f"its forward asks for .{k}, which tensors do not have, or not always")
        return super().__getattr__(k)


class _Attribute(_Opaque, fx.proxy.Attribute):
    pass


class _Tracer(fx.Tracer):
    """Trace into everything but library modules and those in ``closed``; remember which module failed first."""

    # A forward that adds to a buffer must add to a symbol, and not in earnest.
    proxy_buffer_attributes = True

    def __init__(self, closed: set[nn.Module]) -> None:
        super().__init__()
        self.closed = closed
        self.failed: nn.Module | None = None
        self.doubt: str | None = None
        self.others_or_none = False
        self.stepped: set[FrameType] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_library(m) or isinstance(m, _STEPS) or m in self.closed

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Symbol(node, self)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        try:
            if not self.is_leaf_module(m, ""):
                _check_traceable(m)
            result = super().call_module(m, forward, args, kwargs)
            self.check()
            return result
        except Exception:
            if self.failed is None and not self.is_leaf_module(m, ""):
                self.failed = m
            raise

    def check(self) -> None:
        """Raise where the trace so far may show something else than what a call does."""
        if self.doubt is not None:
            raise RuntimeError(self.doubt)

    def may_be_none(self, node: fx.Node) -> bool:
        """Return whether a symbol may stand for None, too; of optional arguments both are tried."""
        if node.op == "placeholder":
            return node.args != (None,)
        if node.op == "call_module":
            return self.root.get_submodule(str(node.target)) in self.closed
        if node.target is not operator.getitem or not isinstance(node.args[1], (int, str)):
            return False
        whole = node.all_input_nodes[0]
        return whole.op in ("placeholder", "call_module") or self.may_be_none(whole)

    def watch(self, frame: FrameType, event: str, _argument: Any) -> Any:
        """Look at the code of every function that the trace calls, as :func:`sys.settrace` wants it."""
        if event == "call":
            package = str(frame.f_globals.get("__name__")).split(".")[0]
            if package in _LIBRARY or package in sys.stdlib_module_names or _is_importing(frame):
                return None
            questions = _questions(frame.f_code)
            self.doubt = self.doubt or questions.untraceable
            self.others_or_none |= questions.others_or_none
            if not questions.locals_or_none:
                return None
            # Python 3.13 wants the function before the flag.
            frame.f_trace = self.watch
            frame.f_trace_lines, frame.f_trace_opcodes = False, True
        elif event == "opcode":
            self.stepped.add(frame)
            name = _questions(frame.f_code).locals_or_none.get(frame.f_lasti)
            value = None if name is None else frame.f_locals.get(name)
            if type(value) is _Symbol and self.may_be_none(value.node):
                self.doubt = self.doubt or f"{frame.f_code.co_name}() asks whether {name!r} is None, which symbols hide"
        elif event == "return" and frame not in self.stepped:
            self.doubt = self.doubt or "this Python does not tell what its forward compares with None"
        return self.watch


def _is_importing(frame: FrameType | None) -> bool:
    """Return whether the trace imports something, whose code on the way is not that of a forward."""
    while frame is not None and frame.f_code is not _trace.__code__:
        if frame.f_globals.get("__name__") == "importlib._bootstrap":
            return True
        frame = frame.f_back
    return False


class _NoValues(TorchFunctionMode):
    """Lets nothing ask for the values of the tensors that a forward makes, random ones among them."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", None) in _READS_VALUES:
            raise RuntimeError(f"its forward reads the value of a tensor ({func.__name__})")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _watched(tracer: _Tracer) -> Iterator[None]:
    before = sys.gettrace()
    # Without it Python 3.12 reports no instructions at all.
    sys._getframe().f_trace_opcodes = True
    sys.settrace(tracer.watch)
    try:
        with _NoValues():
            yield
    finally:
        sys.settrace(before)


def _containers(module: nn.Module) -> Iterator[Any]:
    """Yield the table of a module's attributes, and every list, dict, set and deque in it, at any depth."""
    found: dict[int, Any] = {}
    inside: list[Any] = [vars(module)]
    while inside:
        value = inside.pop()
        if id(value) in found or not isinstance(value, (list, dict, set, deque, tuple)):
            continue
        found[id(value)] = value
        inside.extend(value.values() if isinstance(value, dict) else value)
    return (value for value in found.values() if not isinstance(value, tuple))


@contextlib.contextmanager
def _set_training(module: nn.Module, training: bool) -> Iterator[None]:
    """Set the mode of a module for a trace; then restore all its attributes, and the CPU's random numbers."""
    modules = [m for m in module.modules() if not isinstance(m, torch.jit.ScriptModule)]
    containers = [container for m in modules for container in _containers(m)]
    saved = [(c, dict(c) if isinstance(c, dict) else list(c)) for c in containers]
    with torch.random.fork_rng(devices=[]):
        try:
            for m in modules:
                m.training = training
            yield
        finally:
            for container, before in saved:
                container.clear()
                if isinstance(container, (list, deque)):
                    container.extend(before)
                else:
                    container.update(before)


def _trace(module: nn.Module, training: bool, arguments: dict[str, Any]) -> fx.Graph:
    """Return the graph of a module; modules below it that cannot be traced are one step in it."""
    closed: set[nn.Module] = set()
    while True:
        tracer = _Tracer(closed)
        try:
            with _set_training(module, training), _watched(tracer):
                graph = tracer.trace(module, concrete_args=arguments or None)
            tracer.check()
            # The first node is what the forward is about, and hardly None.
            if tracer.others_or_none and any(map(tracer.may_be_none, list(graph.nodes)[1:])):
                raise RuntimeError("it asks whether something is None, which symbols hide")
            return graph
        except Exception:
            if tracer.failed is None:
                raise
            closed.add(tracer.failed)


def _calls(module: nn.Module) -> list[dict[str, Any]]:
    """Return every choice of optional arguments that a caller leaves out, with their defaults."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    optional = [(p.name, p.default) for p in parameters if p.default is not p.empty]
    if len(optional) > 3:
        raise RuntimeError(f"its forward has {len(optional)} optional arguments; 3 are tried, each with and without")
    return [dict(left) for n in range(len(optional) + 1) for left in itertools.combinations(optional, n)]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


class _Search:
    """Finds the block of a PixelShuffle or an Identity, in traces of the modules around it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
        self.homes: dict[nn.Module, list[str]] = {}
        self.parent: dict[nn.Module, nn.Module] = {}
        for module, name in self.names.items():
            for key, child in module._modules.items():
                if child is not None:
                    self.homes.setdefault(child, []).append(f"{name}.{key}" if name else key)
                    self.parent.setdefault(child, module)
        self.traces: dict[nn.Module, list[fx.Graph] | str] = {}

    def find(self, anchor: nn.Module) -> _Chain | str:
        """Return the block that ``anchor`` is part of, or why it is not to be fused."""
        inner = anchor
        while inner is not self.model:
            if len(self.homes[inner]) > 1:
                return self._shared(inner)
            inner = self.parent[inner]
            if _is_library(inner):
                continue  # ModuleList, DataParallel and the like: no code that tells an order
            if type(anchor) is nn.Identity and not {nn.Conv2d, nn.GELU} <= {type(m) for m in inner.modules()}:
                continue  # not worth running somebody's code
            found = self._look(inner, anchor)
            if found is not None:
                return found
        return "its convolution or its activation is not in the model, or its call was not found"

    def _shared(self, module: nn.Module) -> str:
        names = " and ".join(f"'{name}'" for name in self.homes[module])
        return f"one {type(module).__name__} serves as {names}; give each place a module of its own"

    def _graphs(self, outer: nn.Module) -> list[fx.Graph] | str:
        if outer not in self.traces:
            try:
                _check_traceable(outer)
                self.traces[outer] = [
                    _trace(outer, training, arguments) for training in (True, False) for arguments in _calls(outer)
                ]
            except Exception as error:
                self.traces[outer] = (
                    f"{_describe(self.names[outer], outer)} around it cannot be traced ({_first_line(error)})"
                )
        return self.traces[outer]

    def _look(self, outer: nn.Module, anchor: nn.Module) -> _Chain | str | None:
        """Return what the traces of ``outer`` say; None where the block goes on outside of it."""
        graphs = self._graphs(outer)
        if isinstance(graphs, str):
            return graphs
        answers = [_Walk(self, outer, graph).block(anchor) for graph in graphs]
        if all(answer == answers[0] for answer in answers):
            return answers[0]
        reason = next((answer for answer in answers if isinstance(answer, str)), "the order of its calls changes")
        return f"{reason} (not in every call: it depends on training, or on an optional argument)"


class _Walk:
    """Follows one graph of ``outer`` from a node to the convolution before it and to the GELU after it."""

    def __init__(self, search: _Search, outer: nn.Module, graph: fx.Graph) -> None:
        self.search = search
        self.outer = outer
        self.steps = [node for node in graph.nodes if node.op == "call_module"]

    def block(self, anchor: nn.Module) -> _Chain | str | None:
        calls = [node for node in self.steps if self._module(node) is anchor]
        if not calls:
            return None
        if len(calls) > 1:
            return self._called(calls)
        after = self._follow(calls[0], self._next)
        before = self._follow(calls[0], self._previous)
        for end in (after, before):
            if isinstance(end, str):
                return end
        if not isinstance(after, list) or not isinstance(before, list):
            return None
        nodes = [*reversed(before), calls[0], *after]
        return self._check(nodes)

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.outer.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _name(self, node: fx.Node) -> str:
        return self.search.names[self.outer.get_submodule(str(node.target))]

    def _words(self, node: fx.Node) -> str:
        module = self._module(node)
        if module is not None:
            return _describe(self._name(node), module)
        if node.op == "call_method":
            return f"the method .{node.target}()"
        if node.op == "call_function":
            return f"the function {getattr(node.target, '__name__', node.target)}"
        kinds = {"output": "the return value", "placeholder": "an argument"}
        return kinds.get(str(node.op), f"the attribute {node.target}")

    def _called(self, calls: list[fx.Node]) -> str:
        outer: str = _describe(self.search.names[self.outer], self.outer)
        return f"{outer} calls {self._words(calls[0])} {len(calls)} times; give each call a module of its own"

    def _follow(self, node: fx.Node, step: Callable[[fx.Node], fx.Node | str | None]) -> list[fx.Node] | str | None:
        """Return the nodes from behind ``node``, over Identities, to the end that ``step`` leads to."""
        nodes: list[fx.Node] = []
        while True:
            found = step(node)
            if not isinstance(found, fx.Node):
                return found
            nodes.append(found)
            node = found
            if type(self._module(node)) is not nn.Identity:
                return nodes

    def _next(self, node: fx.Node) -> fx.Node | str | None:
        users = list(node.users)
        if len(users) != 1:
            return self._used_elsewhere(node)
        module = self._module(users[0])
        if users[0].op == "output":
            return None
        if type(module) in (nn.Identity, nn.GELU):
            return users[0]
        if isinstance(module, nn.GELU):
            return f"it is followed by {self._words(users[0])}, a subclass of nn.GELU"
        hint = ""
        if users[0].op == "call_function" and "gelu" in str(getattr(users[0].target, "__name__", "")):
            hint = ": there is no module to replace; call an nn.GELU"
        return f"it is followed by {self._words(users[0])}, not by an nn.GELU{hint}"

    def _previous(self, node: fx.Node) -> fx.Node | str | None:
        source = node.all_input_nodes[0]
        module = self._module(source)
        if source.op == "placeholder":
            return None
        if type(module) is nn.Identity or (isinstance(module, nn.Conv2d) and not isinstance(module, FusedConv2d)):
            return source if len(source.users) == 1 else self._used_elsewhere(source)
        return f"its input comes from {self._words(source)}, not from an nn.Conv2d"

    def _used_elsewhere(self, node: fx.Node) -> str:
        users = ", ".join(self._words(user) for user in node.users)
        return f"the output of {self._words(node)} is used by {users or 'nothing'}, not by the next step alone"

    def _check(self, nodes: list[fx.Node]) -> _Chain | str:
        """Return the block of these nodes, convolution to GELU, or why it is not to be fused."""
        conv_node, gelu_node = nodes[0], nodes[-1]
        shuffles = [node for node in nodes if type(self._module(node)) is nn.PixelShuffle]
        parts = [conv_node, *shuffles, gelu_node]
        for node in parts:
            calls = [step for step in self.steps if step.target == node.target]
            if len(calls) > 1:
                return self._called(calls)
            module = self._module(node)
            assert module is not None
            if len(self.search.homes[module]) > 1:
                return self.search._shared(module)
        conv = self._module(conv_node)
        assert isinstance(conv, nn.Conv2d)
        paths = [str(node.target).split(".") for node in nodes]
        touched = dict.fromkeys(".".join(path[:end]) for path in paths for end in range(len(path), 0, -1))
        for target in touched:  # the parts and the containers between them and ``outer``
            module = self.outer.get_submodule(target)
            if (reason := _reason_of_part(module)) is not None:
                return f"{_describe(self.search.names[module], module)} {reason}"
        if type(conv) is not nn.Conv2d:
            return f"its input comes from {self._words(conv_node)}, a subclass of nn.Conv2d"
        factor = self._module(shuffles[0]).upscale_factor if shuffles else 1  # type: ignore[union-attr]
        if (reason := _conv_reason(conv, factor)) is not None:  # type: ignore[arg-type]
            return f"of {self._words(conv_node)}: {reason}"
        return _Chain(self._name(conv_node), self._name(shuffles[0]) if shuffles else None, self._name(gelu_node))
