"""A whole encode of a clip: 1.5 M parameters, 300 epochs, from the frames in memory to the checked file."""

from __future__ import annotations

import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from hflfnerv.config import EncodeConfig

from .device import Machine
from .run import ROOT

MODELS = ("hnerv", "hflf")
EPOCHS = 300


def find_clip(path: str | None) -> pathlib.Path:
    """Return the clip to encode: the one asked for, or bunny.mp4 in the folder of shared data."""
    folders = [ROOT.parent / "shared" / "data", ROOT / "shared" / "data"]
    folders[:0] = filter(
        None, [os.environ.get("HFLFNERV_SHARED_DATA") and pathlib.Path(os.environ["HFLFNERV_SHARED_DATA"])]
    )
    candidates = [pathlib.Path(path)] if path else [folder / "bunny.mp4" for folder in folders]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise RuntimeError(f"there is no {' and no '.join(map(str, candidates))}; name a clip with --clip")


def points(machine: Machine) -> Iterator[dict[str, Any]]:
    """Encode with HNeRV and with the dual-stream network, and note the time of each stage and the quality."""
    if machine.dry:
        source: Any = torch.randint(0, 256, (6, 96, 160, 3), dtype=torch.uint8)
        options: dict[str, Any] = {"size": "100k", "epochs": 2}
        name = "6 random frames"
    else:
        from hflfnerv.data import load_video

        path = find_clip(machine.clip)
        source = load_video(path).frames  # read once, for both networks
        options = {"size": "1.5M", "epochs": EPOCHS, "crop": (640, 1280)}
        name = path.stem
    for model in MODELS:
        data = f"{model} {options['size']}, {name}, {len(source)} frames, {options['epochs']} epochs"
        if machine.wants(data, seconds=200):
            with machine.room(data):
                yield _encode(machine, model, source, data, options)


def _encode(machine: Machine, model: str, source: Any, data: str, options: dict[str, Any]) -> dict[str, Any]:
    from hflfnerv.codec import encode

    config = EncodeConfig(model=model, device=machine.device.type, precision="auto", **options)
    began = time.perf_counter()
    report = encode(source, config).report
    seconds = time.perf_counter() - began
    print(f"{data}: {seconds:.1f} s, {report['psnr_db']:.2f} dB", file=sys.stderr, flush=True)
    steps = len(source) // report["config"]["batch_size"] * options["epochs"]
    speed = round(steps / report["seconds"]["train"], 4)
    facts = {name: report[name] for name in ("psnr_db", "psnr_db_before_quantization", "bits_per_pixel", "bytes")}
    row = {"what": "encode", "implementation": "hflfnerv", "baseline": "hflfnerv", "data": data, "metric": "throughput"}
    row |= {"dtype": "auto", "shape": list(source.shape), "unit": "steps/s", "p20": speed, "p50": speed, "p80": speed}
    row |= {"milliseconds": round(seconds * 1e3, 1), "runs": 1, "note": "milliseconds are those of the whole encode"}
    facts["epochs_psnr_db"] = [round(epoch["psnr_db"], 3) for epoch in report["epochs"]]
    return row | facts | {"seconds": report["seconds"]} | machine.environment()
