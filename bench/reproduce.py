"""Makes the paper's tables and figures again: ``python -m bench.reproduce run cpu --data DIR``, then ``report cpu``.

A profile, ``bench/profiles/<name>.toml``, says which clips, networks, sizes, seeds and settings. ``run`` encodes each
clip with each, and with x264, x265 and SVT-AV1; each one becomes a line in ``bench/results/reproduce-<name>.jsonl`` as
soon as it is finished. What is there already is not done again, and an encode that was stopped goes on from its
checkpoint. ``report`` writes the tables into ``docs/results.md`` and draws the figures.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

# Before torch is loaded, here and in the processes started from here; see hflfnerv.cli.main.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from hflfnerv._memory import keep_freed_memory
from hflfnerv.config import EncodeConfig, TrainingDefaults

from .run import RESULTS, ROOT, environment

if TYPE_CHECKING:
    from torch import Tensor

    from hflfnerv.codec import Decoder

__all__ = [
    "PROFILES",
    "SELECTION",
    "SETTINGS",
    "Codec",
    "Encode",
    "Profile",
    "cosines",
    "file_stem",
    "load_profile",
    "profile_names",
    "read_rows",
    "results_path",
    "run_jobs",
    "stream_features",
]

Row = dict[str, Any]
PROFILES = ROOT / "bench" / "profiles"
WORK = ROOT / "build" / "reproduce"
#: What an encode's result does not depend on.
_INCIDENTAL = ("device", "workdir", "tensorboard", "checkpoint_seconds")
#: What encodes were like before there were these settings; rows from then do not have them.
BEFORE = {
    "quantization_share": 0.0,
    "rate_weight": 0.0,
    "schedule": "cosine",
    "weight_decay": 0.0,
    "untagged_matrix": "bt601",
}
#: Which frames of a clip.
SELECTION = ("frames", "resize", "crop")
#: What a preset fixes, and a block of a profile may try other values of.
SETTINGS = TrainingDefaults._fields
_ENCODE_KEYS = {"networks", "sizes", "seeds", "epochs", "clips", "precision", *SETTINGS}


@dataclasses.dataclass(frozen=True)
class Encode:
    """One clip, one network, one setting."""

    clip: str
    path: pathlib.Path
    config: EncodeConfig

    @property
    def key(self) -> Row:
        """What tells this job from others, as it stands in its row."""
        settings = {
            name: value
            for name, value in vars(self.config.resolved()).items()
            if name not in _INCIDENTAL and not (name in BEFORE and value == BEFORE[name])
        }
        return json.loads(json.dumps({"what": "encode", "clip": self.clip, "config": settings}))

    @property
    def title(self) -> str:
        c = self.config.resolved()
        settings = ", ".join(f"{name} {getattr(c, name)}" for name in SETTINGS)
        return f"{self.clip}, {c.model} {c.preset}, {c.size}, seed {c.seed}, {settings}"


def file_stem(row: Row) -> str:
    """Return the name of an encode's files, without suffix, from its row or key."""
    config = row["config"]
    digest = hashlib.blake2b(json.dumps([row["clip"], config], sort_keys=True).encode(), digest_size=4).hexdigest()
    return f"{row['clip']}-{config['model']}-{config['preset']}-{config['size']}-{digest}"


@dataclasses.dataclass(frozen=True)
class Codec:
    """One clip through x264, x265 or SVT-AV1."""

    clip: str
    path: pathlib.Path
    selection: Row  # frames, resize and crop
    codec: str
    preset: str
    crf: int

    @property
    def key(self) -> Row:
        """What tells this job from others, as it stands in its row."""
        setting = {"implementation": f"{self.codec} {self.preset}", "setting": f"CRF {self.crf}"}
        return json.loads(
            json.dumps({"what": "rate_distortion", "clip": self.clip, **setting, "selection": self.selection})
        )

    @property
    def title(self) -> str:
        return f"{self.clip}, {self.codec} {self.preset}, CRF {self.crf}"


@dataclasses.dataclass(frozen=True)
class Profile:
    """What to measure.

    Attributes:
        name: of the file.
        description: a sentence for the report.
        size: parameters of the networks in the tables.
        folder: of the clips, below the data folder.
        clips: their names, empty for all that are there.
        selection: frames, resize and crop, as :class:`EncodeConfig` takes them.
        encodes: blocks of networks, sizes, seeds and settings; see ``bench/profiles/cpu.toml``.
        codecs: preset and CRFs of each conventional codec, and on which clips, if not on all.
        processes: how many encodes at once.
        threads: of each.
        figure_clip: of the figures that show frames.
        beside_paper: whether rates are such that the paper's curves belong into the rate-distortion plot.
    """

    name: str
    description: str
    size: str
    folder: str
    clips: tuple[str, ...]
    selection: Row
    encodes: tuple[Row, ...]
    codecs: Row
    processes: int
    threads: int
    figure_clip: str
    beside_paper: bool

    def sources(self, data: pathlib.Path) -> dict[str, pathlib.Path]:
        """Return the clips' files and folders by name.

        Raises:
            FileNotFoundError: a clip, or the folder, is not there.
        """
        folder = data / self.folder
        if not folder.is_dir():
            raise FileNotFoundError(f"--data must hold the folder {self.folder!r} of the profile, got {data}")
        found = {
            path.name if path.is_dir() else path.stem: path
            for path in sorted(folder.iterdir())
            if not path.name.startswith(".")
        }
        missing = [name for name in self.clips if name not in found]
        if missing:
            raise FileNotFoundError(f"{folder} must hold the clips of the profile, got none named {', '.join(missing)}")
        return {name: found[name] for name in self.clips or found}

    def jobs(self, data: pathlib.Path, device: str) -> list[Encode | Codec]:
        """Return everything to do, each once.

        Raises:
            FileNotFoundError: a clip is not there.
            ValueError: a setting is impossible.
        """
        sources = self.sources(data)
        shape_of = functools.cache(lambda name: self._coded_shape(sources[name]))
        jobs: dict[str, Encode | Codec] = {}
        for block in self.encodes:
            names = _clips_of(block, sources)
            for seed in block.get("seeds", [1]):
                for name in names:
                    for config in self._configs(block, seed, device, shape_of(name)):
                        job = Encode(name, sources[name], config)
                        jobs.setdefault(json.dumps(job.key, sort_keys=True), job)
        for codec, options in self.codecs.items():
            for name in _clips_of(options, sources):
                for crf in options["crf"]:
                    job_of_codec = Codec(name, sources[name], self.selection, codec, str(options["preset"]), crf)
                    jobs.setdefault(json.dumps(job_of_codec.key, sort_keys=True), job_of_codec)
        return list(jobs.values())

    def _coded_shape(self, path: pathlib.Path) -> tuple[int, int, int]:
        from hflfnerv.data import count_frames, probe_video
        from hflfnerv.data.selection import as_frame_slice

        frames = as_frame_slice(self.selection.get("frames")).indices(count_frames(path))
        sides = self.selection.get("crop") or self.selection.get("resize")
        if sides is None:
            info = probe_video(path)
            sides = info.height, info.width
        return len(range(*frames)), *sides

    def _configs(self, block: Row, seed: int, device: str, shape: tuple[int, int, int]) -> Iterator[EncodeConfig]:
        for size, network in itertools.product(block.get("sizes", [self.size]), block["networks"]):
            model, preset = network.split("/")
            for values in itertools.product(*(block.get(name, [None]) for name in SETTINGS)):
                config = EncodeConfig(
                    model=model, preset=preset, size=size, epochs=block["epochs"], seed=seed, device=device
                )
                precision = {"precision": block["precision"]} if "precision" in block else {}
                settings = dict(zip(SETTINGS, values, strict=True))
                yield dataclasses.replace(config, **precision, **settings, **self.selection).resolved(shape)


def profile_names(folder: pathlib.Path = PROFILES) -> list[str]:
    """Return the names of the profiles in a folder."""
    return sorted(path.stem for path in folder.glob("*.toml"))


def _clips_of(block: Row, sources: Mapping[str, pathlib.Path]) -> list[str]:
    names: list[str] = block.get("clips", list(sources))
    unknown = [name for name in names if name not in sources]
    if unknown:
        raise ValueError(f"clips of a block must be among {', '.join(sources)}, got {', '.join(unknown)}")
    return names


_KINDS: dict[str, type] = {"encodes": Encode, "codecs": Codec}


def load_profile(name: str, folder: pathlib.Path = PROFILES) -> Profile:
    """Read ``<folder>/<name>.toml``.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it lacks something, or says something unknown.
    """
    path = folder / f"{name}.toml"
    if not path.is_file():
        raise FileNotFoundError(f"profile must be one of {', '.join(profile_names(folder))}, got {name!r}")
    text = tomllib.loads(path.read_text())
    try:
        clips, workers = text["clips"], text["workers"]
        selection: Row = {key: clips[key] for key in SELECTION if key in clips}
        for key in ("resize", "crop"):
            if key in selection:
                selection[key] = tuple(selection[key])
        for block in text["encode"]:
            unknown = set(block) - _ENCODE_KEYS
            if unknown:
                raise ValueError(
                    f"{path}: encode must have {', '.join(sorted(_ENCODE_KEYS))}, got {', '.join(unknown)}"
                )
        return Profile(
            name=name,
            description=text["description"],
            size=text["size"],
            folder=clips["folder"],
            clips=tuple(clips.get("names", ())),
            selection=selection,
            encodes=tuple(text["encode"]),
            codecs=text.get("codecs", {}),
            processes=workers["processes"],
            threads=workers["threads"],
            figure_clip=text["figures"]["clip"],
            beside_paper=text["figures"].get("beside_paper", False),
        )
    except KeyError as error:
        raise ValueError(f"{path} must have {error}") from error


def results_path(name: str, results: pathlib.Path = RESULTS) -> pathlib.Path:
    """Return where a profile's rows are."""
    return results / f"reproduce-{name}.jsonl"


def read_rows(path: pathlib.Path) -> list[Row]:
    """Read rows; what a crash left of a last line is cut off."""
    if not path.is_file():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def append_row(path: pathlib.Path, row: Row) -> None:
    """Write a row so that it survives whatever comes next."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def is_done(key: Row, rows: Iterable[Row]) -> bool:
    """Return whether a row has this key."""
    return any(all(row.get(name) == value for name, value in key.items()) for row in rows)


# In a worker process.


def prepare_worker(threads: int) -> None:
    """Make a fresh process ready: its own session, so that Ctrl-C on a terminal comes from the parent, once."""
    os.setsid()
    # Training has its own handler, which keeps a checkpoint; all else is short and is let finish.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    keep_freed_memory()  # as the command line does
    import torch

    torch.set_num_threads(threads)


def execute(job: Encode | Codec, profile: Profile, work: pathlib.Path) -> Row:
    """Do one job and return its row."""
    made = encode_clip(job, work) if isinstance(job, Encode) else code_clip(job)
    return {
        **job.key,
        "profile": profile.name,
        "processes": profile.processes,
        "threads": profile.threads,
        **made,
        **described_environment(made.get("trained_on", "cpu")),
    }


def described_environment(device: str) -> Row:
    """Return the environment, named by the GPU where one was used."""
    row = environment()
    if not device.startswith("cuda"):
        return row
    import torch

    from .device import driver_version

    return row | {"device": torch.cuda.get_device_name(device), "driver": driver_version(), "cpu": row["device"]}


def code_clip(job: Codec) -> Row:
    """Measure a conventional codec on a clip."""
    from hflfnerv.codec import conventional_point
    from hflfnerv.data import CONVENTIONAL_CODECS, load_video

    video = load_video(job.path, **job.selection)
    point = conventional_point(video, CONVENTIONAL_CODECS[job.codec], crf=job.crf, preset=job.preset)
    return point | job.key  # the clip under the profile's name for it


def encode_clip(job: Encode, work: pathlib.Path) -> Row:
    """Train, code, decode and measure; the file stays in the work folder for the figures."""
    from hflfnerv.codec import Decoder, encode, evaluate
    from hflfnerv.data import load_video

    stem = file_stem(job.key)
    config = dataclasses.replace(job.config, workdir=work / f"{stem}.work")
    result = encode(job.path, config)
    result.save(work / f"{stem}.hflf")
    report = result.report
    decoder = Decoder(result.bitstream, device=config.device, precision="fp32")
    reference = load_video(job.path, frames=config.frames, resize=config.resize, crop=config.crop).frames
    quality = evaluate(decoder, reference, with_lpips=True)
    preset = EncodeConfig(config.model, config.preset, epochs=config.epochs).resolved(decoder.shape[:3])
    row = {
        "implementation": f"{config.model}/{config.preset}",
        "shape": list(decoder.shape),
        "preset_settings": all(getattr(config, name) == getattr(preset, name) for name in SETTINGS),
        "parameters": report["parameters"],
        "bytes": report["bytes"],
        "bits_per_pixel": report["bits_per_pixel"],
        "psnr_db": report["psnr_db"],
        "psnr_db_before_quantization": report["psnr_db_before_quantization"],
        "ms_ssim": quality["ms_ssim"],
        **further_metrics(decoder, reference, quality),
        "per_frame_psnr_db": [round(value, 3) for value in quality["per_frame"]["psnr_db"]],
        "epochs_psnr_db": [round(epoch["psnr_db"], 3) for epoch in report["epochs"]],
        "training_seconds": round(sum(epoch["seconds"] for epoch in report["epochs"]), 2),
        "seconds": {name: round(value, 2) for name, value in report["seconds"].items()},
        "feature_similarity": feature_similarity(decoder),
        "trained_on": report["device"],
    }
    shutil.rmtree(work / f"{stem}.work")
    return row


def further_metrics(decoder: Decoder, reference: Tensor, quality: Row) -> Row:
    """Return SSIM, for frames that are too small for MS-SSIM, and LPIPS in both scalings, None where it is missing."""
    from hflfnerv.metrics import lpips, ssim

    values: dict[str, list[float]] = {"ssim": []}
    with_lpips = quality["lpips"] is not None
    if with_lpips:
        values["lpips_unscaled"] = []
    for frame, original in zip(decoder.iter_frames(), reference, strict=True):
        values["ssim"].append(float(ssim(frame, original.numpy())))
        if with_lpips:
            values["lpips_unscaled"].append(float(lpips(frame, original.numpy(), scaling="unscaled")))
    row: Row = {"lpips": quality["lpips"], "lpips_unscaled": None}
    return row | {name: sum(series) / len(series) for name, series in values.items()}


def stream_features(decoder: Decoder, indices: Iterable[int]) -> Iterator[dict[str, list[Tensor]]]:
    """Yield, for each frame, the output of every upsampling block of every stream, float32 ``[C, h, w]`` on the CPU."""
    import torch

    from hflfnerv.codec import load_model

    model = load_model(decoder.bitstream).to(decoder.device)  # another one: the decoder may have fused its own
    features: dict[str, list[Tensor]] = {}

    def keep(stream: str, output: Tensor) -> None:
        features[stream].append(output[0].float().cpu())

    for name in model.spec.streams:
        for block in model.get_submodule(name).get_submodule("blocks").children():
            block.register_forward_hook(lambda _block, _inputs, output, stream=name: keep(stream, output))
    for index in indices:
        features.update({name: [] for name in model.spec.streams})
        embedding = None
        if decoder.bitstream.embedding_shape is not None:
            embedding = torch.from_numpy(decoder.bitstream.read_embeddings([index])).to(decoder.device)
        with torch.inference_mode():
            model.decode(embedding, torch.tensor([index], device=decoder.device))
        yield dict(features)


def cosines(first: list[Tensor], second: list[Tensor]) -> list[float]:
    """Return the cosine between the features of two frames, for each block."""
    import torch

    pairs = zip(first, second, strict=True)
    return [float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)) for a, b in pairs]


def feature_similarity(decoder: Decoder) -> dict[str, list[float]]:
    """Return, for each stream and block, the cosine between the features of adjacent frames, mean over the frames."""
    values: dict[str, list[list[float]]] = {}
    for before, after in itertools.pairwise(stream_features(decoder, range(len(decoder)))):
        for name in before:
            values.setdefault(name, []).append(cosines(before[name], after[name]))
    return {
        name: [round(statistics.mean(of_block), 4) for of_block in zip(*rows, strict=True)]
        for name, rows in values.items()
    }


# In the parent.


def run_jobs(
    profile: Profile,
    data: pathlib.Path,
    work: pathlib.Path,
    results: pathlib.Path,
    device: str = "auto",
    kinds: tuple[type, ...] = (Encode, Codec),
) -> int:
    """Do what is not done yet, several jobs at once; return how many failed, or 130 when interrupted.

    Args:
        profile: what to do.
        data: the folder of the profile's folder of clips.
        work: folder for checkpoints and files.
        results: folder of the rows.
        device: where to train.
        kinds: of jobs to do.
    """
    path = results_path(profile.name, results)
    rows = read_rows(path)
    jobs = [job for job in profile.jobs(data, device) if isinstance(job, kinds)]
    left = [job for job in jobs if not is_done(job.key, rows)]
    left.sort(key=_size, reverse=True)  # so that no process waits long for the last one
    print(f"{profile.name}: {len(jobs)} jobs, {len(jobs) - len(left)} done before", file=sys.stderr, flush=True)
    if not left:
        return 0
    if Encode in kinds:
        note_missing_lpips()
    work.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = str(profile.threads)  # for the processes started from here
    started, done, failed = time.monotonic(), 0, 0
    with _Interruption() as interrupted, _pool(profile) as pool:
        running: dict[concurrent.futures.Future[Row], Encode | Codec] = {}
        while running or (left and not interrupted.is_set):
            # No more than can begin at once, so that nothing is waiting when it is interrupted.
            while left and len(running) < profile.processes and not interrupted.is_set:
                job = left.pop(0)
                running[pool.submit(execute, job, profile, work)] = job
            finished, _ = concurrent.futures.wait(running, timeout=0.5, return_when="FIRST_COMPLETED")
            interrupted.pass_on()
            for future in finished:
                job = running.pop(future)
                error = future.exception()
                if isinstance(error, concurrent.futures.BrokenExecutor):
                    raise error
                if error is None:
                    row = future.result()
                    append_row(path, row)
                    done += 1
                    outcome = f"{row['psnr_db']:.2f} dB, {row['bits_per_pixel']:.4f} bits per pixel"
                else:
                    failed += not interrupted.is_set
                    outcome = f"{type(error).__name__}: {error}"
                minutes = (time.monotonic() - started) / 60
                count = f"{len(jobs) - len(left) - len(running)}/{len(jobs)}"
                print(f"[{count}, {minutes:.1f} min] {job.title}: {outcome}", file=sys.stderr, flush=True)
    if interrupted.is_set:
        print("interrupted: the same command goes on from there", file=sys.stderr)
        return 130
    print(f"{done} done, {failed} failed, rows in {path}", file=sys.stderr)
    return failed


def _size(job: Encode | Codec) -> int:
    """Return the parameters of a job's network, which say roughly how long it takes."""
    return job.config.parameters if isinstance(job, Encode) else 0


def note_missing_lpips() -> None:
    """Say why there will be no LPIPS, if so."""
    from hflfnerv.metrics import lpips_unavailable

    reason = lpips_unavailable()
    if reason is not None:
        print(f"without LPIPS: {reason}", file=sys.stderr, flush=True)


def _pool(profile: Profile) -> concurrent.futures.ProcessPoolExecutor:
    return concurrent.futures.ProcessPoolExecutor(
        profile.processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=prepare_worker,
        initargs=(profile.threads,),
    )


class _Interruption:
    """Remembers SIGINT and SIGTERM, and tells the workers, whose training then keeps a checkpoint and stops."""

    def __init__(self) -> None:
        self.is_set = False

    def __enter__(self) -> _Interruption:
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self.is_set = True

    def pass_on(self) -> None:
        """Signal the workers, again and again: one whose training has not begun yet hears nothing."""
        if self.is_set:
            for child in multiprocessing.active_children():
                if child.pid is not None:
                    os.kill(child.pid, signal.SIGTERM)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a profile, or report on it."""
    parser = argparse.ArgumentParser(prog="python -m bench.reproduce", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help_text in (
        ("run", "do what is not done yet"),
        ("list", "print what is done and what is not"),
        ("report", "write docs/results.md and docs/figures"),
    ):
        command = commands.add_parser(name, help=help_text)
        command.add_argument("profile", help=f"{', '.join(profile_names())}, or one in --profiles")
        command.add_argument(
            "--profiles", type=pathlib.Path, default=PROFILES, help="folder of profiles (default: bench/profiles)"
        )
        command.add_argument("--data", type=pathlib.Path, help="folder that holds the profile's folder of clips")
        command.add_argument(
            "--work", type=pathlib.Path, help="for checkpoints and files (default: build/reproduce/PROFILE)"
        )
        command.add_argument(
            "--results", type=pathlib.Path, default=RESULTS, help="folder of the rows (default: bench/results)"
        )
        command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
        command.add_argument("--only", choices=_KINDS, help="networks, or x264, x265 and SVT-AV1 (default: both)")
        command.add_argument("--processes", type=int, help="encodes at once (default: the profile's)")
    arguments = parser.parse_args(argv)
    if arguments.data is None and arguments.command != "report":
        parser.error("--data must name the folder that holds the profile's folder of clips")
    try:
        profile = load_profile(arguments.profile, arguments.profiles)
        if arguments.processes is not None:
            profile = dataclasses.replace(profile, processes=arguments.processes)
        work = arguments.work or WORK / profile.name
        if arguments.command == "run":
            kinds = (_KINDS[arguments.only],) if arguments.only else (Encode, Codec)
            return run_jobs(profile, arguments.data, work, arguments.results, arguments.device, kinds)
        if arguments.command == "list":
            rows = read_rows(results_path(profile.name, arguments.results))
            for job in profile.jobs(arguments.data, arguments.device):
                print(f"{'done' if is_done(job.key, rows) else 'to do'}  {job.title}")
            return 0
        from .report import write_report

        return write_report(profile, arguments.data, work, arguments.results)
    except concurrent.futures.BrokenExecutor:
        print(f"{parser.prog}: error: a worker died, out of memory perhaps: fewer --processes", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
