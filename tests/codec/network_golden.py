"""The golden networks, one of each structure; run as a script to write files for a new version of the format.

    python tests/codec/network_golden.py tests/golden

Files of an existing version never change: a decoder that makes other frames of them is broken, by another name of a
parameter, another activation, or another encoding of the time. The files beside them hold the frames in float64, by the
definitions of the operations.
"""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from hflfnerv.codec import Bitstream, load_model
from hflfnerv.codec.bitstream import Header, write_bitstream
from hflfnerv.codec.quantization import quantize, quantize_tensors
from hflfnerv.models import ModelSpec, StreamSpec, TimeSpec, build_model
from hflfnerv.models.spec import DetailSpec
from hflfnerv.models.streams import use_implementation

_FRAMES, _HEIGHT, _WIDTH = 5, 7, 11
#: The first frame, one between two knots, and the last.
EXPECTED_FRAMES = (0, 1, 4)

_EMBEDDED = StreamSpec((2, 3), (6, 5, 4), (2, 2), (1, 3))
_DETAILED = StreamSpec((4, 6), (5, 4), (2,), (3,), detail=DetailSpec(channels=2, width=6, stride=2))
_TIMED = StreamSpec((2, 3), (3, 3, 2), (2, 2), (3, 5))


def _spec(model: str, embedding_channels: int, **fields: object) -> ModelSpec:
    return ModelSpec(model, _FRAMES, _HEIGHT, _WIDTH, embedding_channels, **fields)  # type: ignore[arg-type]


SPECS = {
    "hflf-paper": _spec(
        "hflf",
        4,
        streams={"hfd": _EMBEDDED, "lfd1": _TIMED, "lfd2": StreamSpec((2, 3), (4, 2), (4,), (3,))},
        time=TimeSpec(base=1.25, levels=6, first=1),
        time_split=2,
    ),
    "hflf-best": _spec(
        "hflf", 4, streams={"hfd": _DETAILED, "lfd": StreamSpec((2, 3), (4, 3, 3), (2, 2), (1, 3), knots=2)}
    ),
    "hnerv": _spec("hnerv", 4, streams={"decoder": _EMBEDDED}),
    "nerv": _spec("nerv", 0, streams={"decoder": _TIMED}, time=TimeSpec(base=1.25, levels=8, first=0)),
}


def golden_file(name: str) -> bytes:
    """Return a coded network with random weights, at the scale at which its frames are not grey."""
    spec = SPECS[name]
    rng = np.random.default_rng(sorted(SPECS).index(name))
    weights = {}
    for key, parameter in build_model(spec, with_encoder=False).coded_parameters().items():
        inputs = max(np.prod(parameter.shape[1:]), 4)
        weights[key] = rng.normal(size=tuple(parameter.shape)) * 1.3 / np.sqrt(inputs)
    shape = spec.embedding_shape
    embeddings = None if shape is None else quantize(rng.normal(size=(_FRAMES, *shape)), 6)
    header = Header(
        model=spec.to_dict(),
        frames=_FRAMES,
        height=_HEIGHT,
        width=_WIDTH,
        fps=Fraction(25),
        preset=name.partition("-")[2] or "paper",
        writer="hflfnerv 0.1.0",
    )
    return write_bitstream(header, quantize_tensors(weights, 8), embeddings)


@torch.inference_mode()
def exact_frames(data: bytes) -> NDArray[np.float64]:
    """Return the expected frames of a file, float64 ``[n, 3, H, W]``, neither clamped nor rounded."""
    stream = Bitstream.open(data)
    model = load_model(stream).double()
    use_implementation(model, "reference")
    made = []
    for index in EXPECTED_FRAMES:
        embedding = (
            None if stream.embedding_shape is None else torch.from_numpy(stream.read_embeddings([index])).double()
        )
        made.append(model.decode(embedding, torch.tensor([index]))[0].numpy())
    return np.stack(made)


def main(folder: Path) -> None:
    """Write the golden files and the frames that they decode to."""
    for name in SPECS:
        data = golden_file(name)
        path = folder / f"v1-network-{name}.hflf"
        path.write_bytes(data)
        values = exact_frames(data)
        lines = [",".join(f"{value:.7f}" for value in frame.ravel()) for frame in values]
        path.with_suffix(".json").write_text("[" + ",\n".join(f"[{line}]" for line in lines) + "]\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
