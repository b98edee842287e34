"""Opening a coded video, from bytes to a network ready to decode, against the loader of the HNeRV repository.

The lines "entropy decoding alone" bound what a GPU decoder of the weights could save: all of their time at the most.
"""

from __future__ import annotations

import io
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from hflfnerv.codec import Bitstream, convert_checkpoint, load_model
from hflfnerv.codec.container import Container
from hflfnerv.codec.sections import TensorSection

from ..registry import Contender, Point, Skipped, suite

ROOT = pathlib.Path(__file__).resolve().parents[2]
LOADER = "torch.load, dequantise, load_state_dict"


@suite("open")
def points() -> Iterable[Point]:
    """The published HNeRV 1.5 M, imported with each entropy coder."""
    folder = pathlib.Path(os.environ.get("HFLFNERV_SHARED_DATA", ROOT.parent / "shared" / "data"))
    path = folder / "hnerv_bunny_1.5m.pth"
    if not path.is_file():
        raise Skipped(f"no {path} (set HFLFNERV_SHARED_DATA)")
    torch.set_num_threads(1)
    original = path.read_bytes()
    files = {name: convert_checkpoint(path, entropy=name) for name in ("huffman", "range")}
    network = load_model(Bitstream.open(files["huffman"]))

    def dequantised(entry: dict[str, torch.Tensor]) -> torch.Tensor:
        return entry["min"].float() + entry["scale"].float() * entry["quant"].float()

    def published_loader() -> list[torch.Tensor]:
        data = torch.load(io.BytesIO(original), weights_only=True, map_location="cpu")
        tensors = [dequantised(entry) for entry in data["model"].values()]
        with torch.no_grad():
            for parameter, tensor in zip(network.coded_parameters().values(), tensors, strict=True):
                parameter.copy_(tensor.reshape(parameter.shape))
        return [*tensors, dequantised(data["embed"])]

    def entropy_decoding(name: str) -> Any:
        return TensorSection(Container.parse(files[name]).section("WGTS"), "section WGTS").read_symbols()

    def check() -> None:
        expected = published_loader()
        for data in files.values():
            stream = Bitstream.open(data)
            made = [*load_model(stream).coded_parameters().values()]
            assert all(torch.equal(a.reshape(b.shape), b) for a, b in zip(made, expected, strict=False))
            assert np.array_equal(stream.read_embeddings(), expected[-1].numpy())

    count = sum(p.numel() for p in network.parameters())
    contenders = [
        Contender("hflf, huffman", lambda: load_model(Bitstream.open(files["huffman"])), 1),
        Contender("hflf, range", lambda: load_model(Bitstream.open(files["range"])), 1),
        Contender(LOADER, published_loader, 1),
        Contender("entropy decoding alone, huffman", lambda: entropy_decoding("huffman"), 1),
        Contender("entropy decoding alone, range", lambda: entropy_decoding("range"), 1),
    ]
    sizes = {f"{name}_bytes": len(data) for name, data in files.items()}
    yield Point(
        what="open",
        data="published HNeRV 1.5M",
        dtype="uint8",
        shape=[count],
        unit="files/s",
        scale=1,
        contenders=contenders,
        baseline=LOADER,
        check=check,
        facts={**sizes, "published_bytes": len(original)},
    )
