"""``hflfnerv demo``."""

from __future__ import annotations

import argparse
import time
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from ._options import argument, check_folder, size_hw, write_json

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ..codec import Decoder

__all__ = ["add_parser", "run"]

CLIP = "bunny_320x640.mp4"
_HIGHPASS_GAIN = 8
_ERROR_GAIN = 4


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser("demo", help="encode, decode and score a bundled clip; minutes on two CPU cores")
    parser.add_argument("-o", "--output", type=Path, default=Path("demo-output"), help="folder (default: demo-output)")
    parser.add_argument("--resize", metavar="HxW", type=argument(size_hw), default="180x360", help="(default: 180x360)")
    parser.add_argument("--size", default="0.15M", help="parameters (default: 0.15M)")
    parser.add_argument("--epochs", type=int, default=100, help="(default: 100)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Encode the bundled clip, decode the file, and show what came of it."""
    import torch

    from .. import _machine
    from ..codec import Decoder, encode
    from ..config import EncodeConfig
    from ..data import VideoWriter, load_video
    from ._progress import progress_observer

    began = time.perf_counter()
    folder: Path = arguments.output
    check_folder("--output", folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = EncodeConfig(
        size=arguments.size,
        epochs=arguments.epochs,
        resize=arguments.resize,
        device=arguments.device,
    )
    with resources.as_file(resources.files("hflfnerv") / "assets" / CLIP) as clip:
        original = load_video(clip, resize=config.resize)
        print(f"clip        {len(original)} frames of {original.shape[1]}x{original.shape[2]} from Big Buck Bunny")
        with progress_observer(quiet=False) as observer:
            result = encode(clip, config, observer=observer)
    coded, decoded, picture = folder / "bunny.hflf", folder / "decoded.mp4", folder / "comparison.png"
    result.save(coded)

    decoder = Decoder(coded, device=arguments.device)
    with VideoWriter(decoded, decoder.fps, decoder.shape[1:3]) as writer:
        for frame in decoder.iter_frames():
            writer.write(frame)
    middle = len(decoder) // 2
    _comparison(decoder, original.frames[middle], middle, config.highpass_removed).save(picture)

    report = result.report
    report["total_seconds"] = time.perf_counter() - began
    report["machine"] = {
        "processor": _machine.processor(),
        "simd": _machine.vector_extensions(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(decoder.device) if decoder.device.type == "cuda" else None,
        "commit": _machine.commit_of(Path(__file__).resolve().parents[2]),
    }
    write_json(folder / "report.json", report)
    seconds = report["seconds"]
    raw_bytes = original.frames.numel()
    print(f"parameters  {report['parameters']['total']:,}")
    print(f"file        {report['bytes']:,} bytes, {raw_bytes / report['bytes']:.0f} times smaller than 8-bit RGB")
    print(f"rate        {report['bits_per_pixel']:.4f} bits per pixel")
    ssim = "not available (frames too small)" if report["ms_ssim"] is None else f"{report['ms_ssim']:.4f}"
    print(f"quality     PSNR {report['psnr_db']:.2f} dB, MS-SSIM {ssim}")
    print(f"training    {seconds['train']:.1f} s, {len(report['epochs'])} epochs on {report['device']}")
    print(f"decoding    {len(decoder) / seconds['check']:.1f} frames per second, metrics included")
    print(f"in all      {report['total_seconds']:.0f} s, on {report['machine']['threads']} threads")
    print(f"wrote       {coded}, {decoded}, {picture}")
    return 0


def _comparison(decoder: Decoder, original: Tensor, index: int, removed: float) -> Image.Image:
    """Original, decoded frame, high-pass frame, high- and low-frequency image, and error of one frame, side by side."""
    import torch
    from PIL import Image, ImageDraw

    from ..models import HFLFNeRV
    from ..ops import highpass

    decoded = torch.from_numpy(decoder[index])
    planes = original.permute(2, 0, 1)[None].float() / 255
    filtered = highpass(planes, removed)[0]
    assert isinstance(decoder.model, HFLFNeRV)
    with torch.inference_mode():
        embedding = torch.from_numpy(decoder.bitstream.read_embeddings([index])).to(decoder.device)
        stems = decoder.model.stems(embedding, torch.tensor([index], device=decoder.device))
        high, low = (torch.tanh(image)[0].cpu() for image in decoder.model.stream_images(stems))
    panels = {
        "original": original,
        f"decoded, frame {index}": decoded,
        f"high-pass frame, x{_HIGHPASS_GAIN}": _to_image(0.5 + _HIGHPASS_GAIN / 2 * filtered),
        "high-frequency image": _to_image(0.5 + 0.5 * high),
        "low-frequency image": _to_image(0.5 + 0.5 * low),
        f"error, x{_ERROR_GAIN}": (original.int() - decoded.int()).abs().mul(_ERROR_GAIN).clamp(max=255).byte(),
    }
    height, width = original.shape[:2]
    margin = 14
    sheet = Image.new("RGB", (3 * width, 2 * (height + margin)), "white")
    draw = ImageDraw.Draw(sheet)
    for position, (title, panel) in enumerate(panels.items()):
        left, top = position % 3 * width, position // 3 * (height + margin)
        draw.text((left + 4, top + 1), title, fill="black")
        sheet.paste(Image.fromarray(panel.numpy()), (left, top + margin))
    return sheet


def _to_image(planes: Tensor) -> Tensor:
    return planes.clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).contiguous()
