"""Decoding on the CPU, from the embeddings of a frame to its uint8 pixels: engines against PyTorch and HEVC.

HEVC decodes the same clip, coded by x265 to about the PSNR of the network, with FFmpeg's own decoder.
"""

from __future__ import annotations

import copy
import io
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray

from hflfnerv._device import autocast_dtype, training_precision
from hflfnerv.codec import Decoder, convert_checkpoint
from hflfnerv.codec.engine import DECODE, to_uint8
from hflfnerv.data import load_video
from hflfnerv.metrics import psnr
from hflfnerv.models import HFLFNeRV, VideoNetwork, build_model
from hflfnerv.models.streams import use_implementation

from ..registry import Contender, Point, Skipped, suite

ROOT = pathlib.Path(__file__).resolve().parents[2]
SIZE, FRAMES, HEIGHT, WIDTH = 1_500_000, 132, 640, 1280
CPU = torch.device("cpu")
# The precision in which the processor multiplies fastest.
PRECISION = training_precision("auto", CPU)
BASELINE = f"PyTorch {PRECISION}, channels-last"
EAGER = "PyTorch fp32, eager"
HEVC_FRAMES, HEVC_CRF = 33, 35
CHECKED = [10, 75]

Frames = NDArray[np.uint8]


@suite("decode_cpu")
def points() -> Iterable[Point]:
    """Yield the published HNeRV 1.5 M, and the two streams at 1.5 M with random weights."""
    folder = pathlib.Path(os.environ.get("HFLFNERV_SHARED_DATA", ROOT.parent / "shared" / "data"))
    checkpoint, video = folder / "hnerv_bunny_1.5m.pth", folder / "bunny.mp4"
    for path in (checkpoint, video):
        if not path.is_file():
            raise Skipped(f"no {path} (set HFLFNERV_SHARED_DATA)")
    yield published(convert_checkpoint(checkpoint), video)
    yield two_streams()


def engines(model: VideoNetwork, embeddings: Callable[..., Any]) -> dict[str, Any]:
    """Return the engines that this machine can run, by what a table calls them."""
    made: dict[str, Any] = {}
    for entry in DECODE:
        for precision in {"amx": ["bf16"], "fused": ["int16", "fp32"], "module": ["fp32"]}.get(entry.name, []):
            if entry.why_not(model, embeddings, CPU, precision) is None:
                made[f"{entry.name}, {precision}"] = entry.run(copy.deepcopy(model), embeddings, CPU, precision)
    return made


def with_impl(model: VideoNetwork, impl: str, **to: Any) -> VideoNetwork:
    """Return a copy whose blocks use one implementation."""
    model = copy.deepcopy(model).to(**to)
    use_implementation(model, impl)
    return model


def contenders(
    model: VideoNetwork, embeddings: Callable[..., Any], *, with_compiled: bool
) -> tuple[dict[str, Callable[[int], Frames]], list[str]]:
    """Return what makes frame i, by name, and the names of ours. Compiling takes minutes."""
    ours = engines(model, embeddings)
    out = np.empty((1, HEIGHT, WIDTH, 3), np.uint8)

    def by_engine(engine: Any) -> Callable[[int], Frames]:
        def run(index: int) -> Frames:
            engine.fill([index], out)
            return out[0]

        return run

    def by_module(network: VideoNetwork, decode: Callable[..., torch.Tensor]) -> Callable[[int], Frames]:
        dtype = next(network.parameters()).dtype

        @torch.inference_mode()
        def run(index: int) -> Frames:
            embedding = embeddings([index])
            frame = decode(None if embedding is None else embedding.to(dtype), torch.tensor([index]))
            return to_uint8(frame)[0].numpy()

        return run

    runs = {name: by_engine(engine) for name, engine in ours.items()}
    dtype = autocast_dtype(PRECISION) or torch.float32
    plain = with_impl(model, "reference", dtype=dtype, memory_format=torch.channels_last)
    eager = with_impl(model, "reference")
    runs[BASELINE] = by_module(plain, plain.decode)
    runs[EAGER] = by_module(eager, eager.decode)
    if with_compiled:
        compiled = copy.deepcopy(plain)
        runs[f"torch.compile {PRECISION}, channels-last"] = by_module(
            compiled, torch.compile(compiled.decode, dynamic=False)
        )
    return runs, list(ours)


def require_gate(actual: Frames, expected: Frames, name: str) -> None:
    """Raise unless 99.9 % of the samples are within one level of float32's, and all within four."""
    difference = np.abs(actual.astype(int) - expected.astype(int))
    assert (difference <= 1).mean() >= 0.999, f"{name}: {(difference <= 1).mean():.5f} of the samples within a level"
    assert difference.max() <= 4, f"{name}: a sample is off by {difference.max()}"


def point(name: str, runs: dict[str, Callable[[int], Frames]], more: list[Contender], **options: Any) -> Point:
    """Return the point of a network."""
    threads = f"{torch.get_num_threads()} threads"

    def one_after_another(run: Callable[[int], Frames]) -> Callable[[], Frames]:
        position = 0

        def step() -> Frames:
            nonlocal position
            position = (position + 1) % FRAMES
            return run(position)

        return step

    return Point(
        what="decode_cpu",
        data=name,
        dtype="uint8",
        shape=[HEIGHT, WIDTH, 3],
        unit="frames/s",
        scale=1,
        contenders=[*(Contender(name, one_after_another(run), 1, threads) for name, run in runs.items()), *more],
        baseline=BASELINE,
        **options,
    )


def published(coded: bytes, video: pathlib.Path) -> Point:
    """Return the published network on the clip that it was trained on."""
    decoder = Decoder(coded, device="cpu", precision="fp32")
    runs, ours = contenders(decoder.model, decoder.embeddings, with_compiled=True)
    original = torch.as_tensor(load_video(video, crop=(HEIGHT, WIDTH)).frames)
    stream = hevc_stream(original[:HEVC_FRAMES].numpy())
    hevc = np.stack([frame.to_ndarray(format="rgb24") for frame in hevc_frames(stream)])
    expected = {index: runs[EAGER](index).copy() for index in CHECKED}

    def quality(frames: Frames, index: int) -> float:
        return float(psnr(torch.from_numpy(frames.copy()), original[index]))

    def check() -> None:
        assert len(hevc) == HEVC_FRAMES
        for name in ours:
            for index in CHECKED:
                frame = runs[name](index)
                require_gate(frame, expected[index], name)
                change = quality(frame, index) - quality(expected[index], index)
                assert abs(change) <= 0.02, f"{name}: PSNR changes by {change:.3f} dB"

    def decode_yuv() -> None:
        for _ in hevc_frames(stream):
            pass

    def decode_rgb() -> None:
        for frame in hevc_frames(stream):
            frame.to_ndarray(format="rgb24")

    peers = [
        Contender("HEVC, FFmpeg, to YUV", decode_yuv, HEVC_FRAMES, "x265 medium, decoded in 2 threads"),
        Contender("HEVC, FFmpeg, to RGB", decode_rgb, HEVC_FRAMES, "x265 medium, decoded in 2 threads"),
    ]
    facts = {
        "threads": torch.get_num_threads(),
        "network_psnr_db": round(quality(expected[CHECKED[0]], CHECKED[0]), 2),
        "hevc_psnr_db": round(quality(hevc[CHECKED[0]], CHECKED[0]), 2),
    }
    return point("published HNeRV 1.5M, 640x1280", runs, peers, check=check, facts=facts)


def hevc_stream(frames: Frames) -> bytes:
    """Code frames with x265."""
    file = io.BytesIO()
    with av.open(file, "w", format="hevc") as container:
        stream: Any = container.add_stream("libx265", rate=25)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        stream.options = {"crf": str(HEVC_CRF), "preset": "medium", "x265-params": "log-level=error"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def hevc_frames(stream: bytes) -> Iterable[Any]:
    """Decode an HEVC stream in two threads."""
    with av.open(io.BytesIO(stream), format="hevc") as container:
        video = container.streams.video[0]
        video.thread_type, video.codec_context.thread_count = "AUTO", 2
        yield from container.decode(video)


def two_streams() -> Point:
    """Return the paper's network with random weights."""
    torch.manual_seed(1)
    model = build_model(HFLFNeRV.plan(SIZE, FRAMES, HEIGHT, WIDTH), with_encoder=False).requires_grad_(False).eval()
    shape = model.spec.embedding_shape
    assert shape is not None
    values = torch.randn(FRAMES, *shape)
    runs, ours = contenders(model, lambda indices: values[list(indices)], with_compiled=False)

    def check() -> None:
        for index in CHECKED:
            expected = runs[EAGER](index).copy()
            for name in ours:
                require_gate(runs[name](index), expected, name)

    facts = {"threads": torch.get_num_threads()}
    return point("HFLFNeRV 1.5M (random weights), 640x1280", runs, [], check=check, facts=facts)
