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
import gc
import inspect
import itertools
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
    so are the lists, dicts, sets and deques among them. The run is not trusted where ``forward``, or a function that it
    calls outside PyTorch and the standard library, has ``isinstance``, ``type``, ``callable`` or ``hasattr``, ``is``
    other than with None, ``match`` on types, ``try``, ``random``, ``torch.rand``, ``torch.is_grad_enabled()`` or the
    like. What no trace can show is up to you. A branch on other attributes, globals or random numbers is followed as
    they are at the moment. A value that is compared with None inside ``forward``, other than an optional argument whose
    default is None, is taken as it is in the trace; so is what is looked up in a set or a dict, or written out as text.
    And nobody else (other methods, code outside the module) may call the parts of a block one by one.

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
        Those of the implementation. With ``impl="reference"`` results and gradients are bit-identical. On a CPU
        without matrix units ``"auto"`` is mostly ``"winograd"``, in float32 whatever the tensors are; its rounding
        errors are up to five times those of PyTorch's convolution in float32 for kernels 5x5, and up to nine times for
        3x3. ``"conv2d+cpp"`` has the latter. Of the implementations ``"reference"`` alone has second derivatives; the
        others say so in an error.

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


# What symbols answer in another way than tensors.
_ABOUT_TYPES = {"__class__", "callable", "hasattr", "is_tensor", "isinstance", "issubclass", "type"}
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
    "rand",
    "randint",
    "randn",
    "random",
}


@functools.lru_cache(maxsize=1024)
def _doubt(code: CodeType) -> str | None:
    """Return why the trace of a function cannot be trusted, in words, or None."""
    steps = list(dis.get_instructions(code))
    operations = [step.opname for step in steps]
    names = {step.argval for step in steps if step.opname == "LOAD_GLOBAL"}
    names |= {*code.co_names} - {"type"}  # x.type(...) and self.type ask nothing
    if asked := names & _ABOUT_TYPES:
        return f"asks {min(asked)}, which symbols answer in another way than tensors"
    if asked := names & _ABOUT_THE_CALL:
        return f"asks {min(asked)}, which may answer in another way in another call"
    if any(operation.startswith("MATCH_") for operation in operations):
        return "matches types, and symbols have another type than tensors"
    for before, step in itertools.pairwise(steps):
        if step.opname == "IS_OP" and (before.opname, before.argval) != ("LOAD_CONST", None):
            return "compares identities, and symbols have another identity than what they stand for"
    # The first is Python 3.10; later a with statement has a handler, too.
    handlers = operations.count("PUSH_EXC_INFO") - operations.count("WITH_EXCEPT_START")
    if "SETUP_FINALLY" in operations or handlers > 0 or "suppress" in names:
        return "may catch what symbols raise"
    return None


def _watch(frame: FrameType, _event: str, _argument: Any) -> None:
    """For :func:`sys.settrace`: raise where a function is called whose trace cannot be trusted."""
    package = str(frame.f_globals.get("__name__")).split(".")[0]
    if package in _LIBRARY or package in sys.stdlib_module_names:
        return
    if (reason := _doubt(frame.f_code)) is None:
        return
    caller: FrameType | None = frame
    while caller is not None and caller.f_code is not _trace.__code__:
        if caller.f_globals.get("__name__") == "importlib._bootstrap":
            return  # the code of a module that a forward imports is not that of the forward
        caller = caller.f_back
    raise RuntimeError(f"{frame.f_code.co_name}() {reason}")


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    before, collects = sys.gettrace(), gc.isenabled()
    # What the collector calls, callbacks of other packages and finalizers, is no part of a forward.
    gc.disable()
    sys.settrace(_watch)
    try:
        yield
        if sys.gettrace() is not _watch:  # Python takes it away when it raises
            raise RuntimeError("what a function raised was caught on the way")
    finally:
        sys.settrace(before)
        if collects:
            gc.enable()


class _Tracer(fx.Tracer):
    """Trace into everything but library modules and those in ``closed``; remember which module failed first."""

    # A forward that adds to a buffer must add to a symbol, and not in earnest.
    proxy_buffer_attributes = True

    def __init__(self, closed: set[nn.Module]) -> None:
        super().__init__()
        self.closed = closed
        self.failed: nn.Module | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_library(m) or isinstance(m, _STEPS) or m in self.closed

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        try:
            if not self.is_leaf_module(m, ""):
                _check_traceable(m)
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed is None and not self.is_leaf_module(m, ""):
                self.failed = m
            raise


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
            with _set_training(module, training), _watched():
                return tracer.trace(module, concrete_args=arguments or None)
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
