"""Decoding on a CUDA device: batches from CUDA graphs, copied to the host while the next ones are made."""

from __future__ import annotations

import copy
import threading
import time
import warnings
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._concurrent import capture, side_by_side
from .._device import autocast_dtype, exact_convolutions, first_line
from ..models import ModelSpec, VideoNetwork
from ..models.streams import DecoderStream
from ..ops import PackedWeights
from .engine import OUTPUT_GROUPS, Embeddings, Engine, draw, to_uint8
from .int8_stream import Int8Stream, first_int8_block

__all__ = ["CudaEngine", "rejects"]

_SLOTS = 3
_MAX_LENT = 16  # frames in pinned memory that readers hold: enough to look ahead, too few to pin a whole video
_MAX_STEM_BYTES = 2**30
_CALIBRATION_FRAMES = 16  # spread over the video, from which int8 takes the ranges of activations


def rejects(spec: ModelSpec, precision: str = "auto") -> str | None:
    """Return why this engine is not for a network, or None."""
    if len(spec.streams) not in OUTPUT_GROUPS:
        return f"the network has {len(spec.streams)} streams"
    needed = 4 * spec.frames * sum(stream.widths[0] * stream.layout.cells for stream in spec.streams.values())
    if needed > _MAX_STEM_BYTES:
        return f"the stems of all {spec.frames} frames take {needed} bytes, more than {_MAX_STEM_BYTES}"
    if precision == "int8" and all(first_int8_block(spec, name) is None for name in spec.streams):
        return "the network has no upsampling block to run in int8"
    return None


class _Program:
    """Makes ``batch`` frames; on a CUDA device by the replay of a graph."""

    def __init__(self, render: Callable[[Tensor], Tensor], batch: int, device: torch.device, pool: Any) -> None:
        self.index = torch.zeros(batch, dtype=torch.int64, device=device)
        self._render = render
        self._graph: torch.cuda.CUDAGraph | None = None
        self._out = torch.empty(0, device=device)
        if device.type == "cuda":
            self._capture(device, pool)

    def run(self) -> Tensor:
        """Return the frames that ``index`` names, uint8 ``[batch, H, W, 3]``; the next run may overwrite them."""
        if self._graph is None:
            return self._render(self.index)
        self._graph.replay()
        return self._out

    def _capture(self, device: torch.device, pool: Any) -> None:
        stream = torch.cuda.Stream(device)
        current = torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(2):  # what runs the first time, such as compilers, cannot be captured
                self._render(self.index)
        current.wait_stream(stream)
        try:
            self._graph, self._out = capture(partial(self._render, self.index), stream, pool)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            warnings.warn(
                f"decoding without a CUDA graph, which is slower: it cannot be captured ({first_line(error)})",
                RuntimeWarning,
                stacklevel=5,
            )


class _Slot:
    """A batch on its way to the host."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        on_cuda = device.type == "cuda"
        self.device = torch.empty(shape, dtype=torch.uint8, device=device)
        # Frame by frame, so that each can be let go of by itself, and is known to PyTorch by where it starts: that is
        # how a reader's own asynchronous copy from it is waited for before its memory is given out again.
        self.host: defaultdict[int, Tensor] = defaultdict(
            lambda: torch.empty(shape[1:], dtype=torch.uint8, device="cpu", pin_memory=on_cuda)
        )
        self.index = torch.empty(shape[0], dtype=torch.int64, device="cpu", pin_memory=on_cuda)
        self.made = torch.cuda.Event() if on_cuda else None
        # Of its own: what a reader lets go of is given out again when all that is queued by then on the stream that
        # filled it is done, and on a shared one that is the batches in flight. Of a priority of their own, PyTorch
        # gives out other streams than those on which graphs are captured, perhaps in another thread.
        self.copies = torch.cuda.Stream(device, priority=-2) if on_cuda else None
        self.count = 0

    def copy(self) -> None:
        """Queue the copy of the frames to the host."""
        for position in range(self.count):
            self.host[position].copy_(self.device[position], non_blocking=True)


class CudaEngine(Engine):
    """All that is constant made once, batches of frames by CUDA graphs, copies that overlap with them.

    The embeddings of all frames are read once, and the stems of all streams, which include the layers on the time, are
    computed from them in float32. What is left of a frame is its index: a graph of the upsampling blocks takes the
    indices of a batch and makes uint8 frames, with weights that are cast and packed once. They go to pinned memory on
    streams of their own, and at most three batches are in flight.

    The frames that ``frames`` yields are that pinned memory, with no further copy, and it is used again once neither
    they nor views of them are alive. While 16 are, further ones are copied to ordinary memory, which is slower.

    ``precision="auto"`` computes in float16, whose frames are within a level of float32's, unless that does not hold
    for the first frame of this video; then in float32. ``precision="int8"`` runs the blocks that make up most of the
    work on 8-bit integers, the rest in float16 (on a CPU float32): activations are quantised by channel, over the range
    they have in up to 16 frames of the video, and weights by output channel. It is never chosen by itself.

    The device may also be a CPU, without graphs and streams; that is how this module is tested where there is no GPU.

    Attributes:
        batch_size: frames made at once, 1 to begin with: then a frame is the same, bit for bit, whichever others are
            asked for with it. Larger batches are faster and promise that no more: for them cuDNN may choose other
            algorithms, and a sample in float16 may differ by a level.
    """

    def __init__(self, model: VideoNetwork, embeddings: Embeddings, device: torch.device, precision: str) -> None:
        super().__init__(model, embeddings, device, precision)
        self._on_cuda = device.type == "cuda"
        self._packed = PackedWeights()
        self._pool = torch.cuda.graph_pool_handle() if self._on_cuda else None
        self._lock = threading.Lock()
        self._done = torch.cuda.Event() if self._on_cuda else None
        self._free: list[_Slot] = []
        self._lent: weakref.WeakValueDictionary[int, NDArray[np.uint8]] = weakref.WeakValueDictionary()  # by address
        self._programs: dict[int, _Program] = {}
        self.batch_size = 1
        model = model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        exact = self._make_stems(model)
        half = torch.float16 if self._on_cuda or precision == "auto" else torch.float32
        self._dtype = half if precision in ("auto", "int8") else autocast_dtype(precision) or torch.float32
        self._use(model, exact)
        if precision == "int8":
            self._quantize(model, exact)
        if precision == "auto" and not self._first_frame_is_right(model, exact):
            warnings.warn(
                "decoding in float32: the frames of this network in float16 are too far from it",
                RuntimeWarning,
                stacklevel=4,
            )
            self._dtype = torch.float32
            self._use(model, exact)
        with self._turn():  # what comes first waits for all this
            pass

    def _current_device(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.device) if self._on_cuda else nullcontext()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Let one thread launch at a time, and what it launches run after what was launched before, on any stream."""
        with self._lock, self._current_device():
            if self._done is not None:
                self._done.wait()
            try:
                yield
            finally:
                if self._done is not None:
                    self._done.record()

    def _use(self, model: VideoNetwork, stems: list[Tensor]) -> None:
        model = model if self._dtype == torch.float32 else copy.deepcopy(model).to(self._dtype)
        self._streams: list[DecoderStream | Int8Stream] = [
            cast(DecoderStream, model.get_submodule(name)) for name in self.spec.streams
        ]
        self._stems = [stem.to(self._dtype) for stem in stems]

    @torch.inference_mode()
    def _quantize(self, exact: VideoNetwork, stems: list[Tensor]) -> None:
        """Replace the streams that are worth it by such in int8."""
        frames = self.spec.frames
        count = min(frames, _CALIBRATION_FRAMES)
        chosen = [round(i * (frames - 1) / max(count - 1, 1)) for i in range(count)]
        with self._current_device(), self._packed, exact_convolutions():
            for index, name in enumerate(self.spec.streams):
                first = first_int8_block(self.spec, name)
                if first is None:
                    continue
                stream, typical = self._streams[index], (stems[index][t : t + 1] for t in chosen)
                assert isinstance(stream, DecoderStream)
                in_float = cast(DecoderStream, exact.get_submodule(name))
                self._streams[index] = Int8Stream(stream, in_float, first, typical)

    @torch.inference_mode()
    def _make_stems(self, model: VideoNetwork) -> list[Tensor]:
        indices = range(self.spec.frames)
        embeddings = self.embeddings(indices)
        index = torch.arange(self.spec.frames, device=self.device)
        with self._current_device(), exact_convolutions():
            stems = model.stems(None if embeddings is None else embeddings.to(self.device), index)
        return [stem.contiguous(memory_format=torch.channels_last) for stem in stems]

    @torch.inference_mode()
    def _first_frame_is_right(self, model: VideoNetwork, exact: list[Tensor]) -> bool:
        frame = self._render(torch.zeros(1, dtype=torch.int64, device=self.device))
        with self._current_device(), exact_convolutions():
            expected = to_uint8(model.render([stem[:1] for stem in exact]))
        difference = (frame.int() - expected.int()).abs()
        return bool((difference <= 4).all() & ((difference <= 1).float().mean() >= 0.999))

    def _render(self, index: Tensor, *, as_bytes: bool = True) -> Tensor:
        """Make frames ``[B, H, W, 3]``, uint8 or float32."""
        stems = [stem.index_select(0, index) for stem in self._stems]
        with self._current_device(), self._packed, exact_convolutions(), side_by_side():
            return draw(self._streams, stems, self.spec, as_bytes=as_bytes)

    def _program(self, batch: int) -> _Program:
        program = self._programs.get(batch)
        if program is None:
            program = _Program(self._render, batch, self.device, self._pool)
            self._programs[batch] = program
        return program

    @torch.inference_mode()
    def device_frames(self, indices: Sequence[int]) -> Tensor:
        """Make frames in one batch and leave them on the device, uint8 ``[B, H, W, 3]``.

        The next frames of this engine may overwrite them.
        """
        with self._turn():
            program = self._program(len(indices))
            program.index.copy_(torch.tensor(indices, device="cpu"))
            return program.run()

    def frames(self, indices: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        for slot in self._batches(indices):
            for position in range(slot.count):
                yield self._hand_out(slot, position)

    def _hand_out(self, slot: _Slot, position: int) -> NDArray[np.uint8]:
        """Return a frame that has landed, in memory that the slot has no more part in.

        Nothing here says when that memory may be written again: it is PyTorch's to give out when the last reference to
        it is gone, in whichever thread that happens, and copies from it are done. What is lent is only counted, so that
        a reader that keeps its frames does not pin memory for all of them. The count needs no lock: the dictionary
        drops a dead entry in one step, and two readers that see the last free place at once lend one frame more.
        """
        if len(self._lent) >= _MAX_LENT:
            return slot.host[position].clone().numpy()
        frame = slot.host.pop(position)
        # Counted by this array: views of a frame, and tensors made of it, keep it alive as their base.
        lent: NDArray[np.uint8] = frame.numpy()
        self._lent[frame.data_ptr()] = lent
        return lent

    def fill(self, indices: Sequence[int], out: NDArray[np.uint8]) -> None:
        target, done = torch.from_numpy(out), 0
        for slot in self._batches(indices):
            for position in range(slot.count):
                target[done + position].copy_(slot.host[position])
            done += slot.count

    @torch.inference_mode()
    def float_frames(self, indices: Sequence[int]) -> Iterator[Tensor]:
        for index in indices:
            with self._turn():
                frame = self._render(torch.tensor([index], device=self.device), as_bytes=False)
            yield frame[0].permute(2, 0, 1).cpu()

    def _batches(self, indices: Sequence[int]) -> Iterator[_Slot]:
        """Yield slots whose frames are on the host, each valid until the next is asked for."""
        flying: deque[_Slot] = deque()
        try:
            start = 0
            while start < len(indices):
                if len(flying) == _SLOTS:
                    self._land(flying[0])
                    yield flying[0]
                    self._free.append(flying.popleft())
                size = self.batch_size
                try:
                    flying.append(self._launch(indices[start : start + size], size))
                except torch.OutOfMemoryError:
                    if size == 1:
                        raise
                    self._shrink(size)
                    continue
                start += size
            while flying:
                self._land(flying[0])
                yield flying[0]
                self._free.append(flying.popleft())
        finally:
            # Where the caller stopped early: a slot is free once its copy is done.
            for slot in flying:
                self._land(slot)
                self._free.append(slot)

    def _shrink(self, size: int) -> None:
        self.batch_size = size // 2
        self._programs.pop(size, None)
        if self._on_cuda and not self._programs:
            # What was made from a pool may still be in a reader's hands: one without graphs is not used again.
            self._pool = torch.cuda.graph_pool_handle()
        for stream in self._streams:
            if isinstance(stream, Int8Stream):
                stream.forget(size)
        self._free.clear()
        torch.cuda.empty_cache()
        warnings.warn(
            f"not enough memory on {self.device} for {size} frames at once: decoding in batches of {self.batch_size}",
            RuntimeWarning,
            stacklevel=4,
        )

    @torch.inference_mode()
    def _launch(self, indices: Sequence[int], size: int) -> _Slot:
        """Queue a batch of ``size`` frames, the last of which may be the same, and its copy to the host."""
        with self._turn():
            program = self._program(size)
            slot = self._take_slot(size)
            slot.count = len(indices)
            slot.index.copy_(torch.tensor([*indices, *[indices[-1]] * (size - len(indices))], device="cpu"))
            program.index.copy_(slot.index, non_blocking=True)
            # The graph's own memory is for the next batch; the slot's is this batch's until the host has it.
            slot.device.copy_(program.run())
        if slot.copies is None:
            slot.copy()
            return slot
        assert slot.made is not None
        slot.made.record(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(slot.copies):
            slot.copies.wait_event(slot.made)
            slot.copy()
        return slot

    def _take_slot(self, size: int) -> _Slot:
        for position, slot in enumerate(self._free):
            if len(slot.index) == size:
                return self._free.pop(position)
        return _Slot((size, self.spec.height, self.spec.width, 3), self.device)

    def _land(self, slot: _Slot) -> None:
        if slot.made is not None and slot.copies is not None:
            slot.made.synchronize()
            made = time.perf_counter()
            slot.copies.synchronize()
            self.copy_seconds += time.perf_counter() - made
