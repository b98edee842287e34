"""Tables and figures of the reproduction, from its rows; ``python -m bench.reproduce report`` calls it."""

from __future__ import annotations

import datetime
import json
import pathlib
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from hflfnerv.codec import Decoder, bjontegaard, mean_points, plot_points
from hflfnerv.config import parse_size
from hflfnerv.data import CONVENTIONAL_CODECS, load_video

from .reproduce import (
    BEFORE,
    SELECTION,
    SETTINGS,
    Profile,
    cosines,
    file_stem,
    load_profile,
    profile_names,
    read_rows,
    results_path,
    stream_features,
)
from .run import RESULTS, ROOT

__all__ = ["Results", "filled", "load_results", "write_report"]

Row = dict[str, Any]
DOCUMENT = ROOT / "docs" / "results.md"
FIGURES = ROOT / "docs" / "figures"
PAPER = "paper-hayami2024"
BASELINE = "hnerv/paper"
PROPOSED = "hflf/paper"
_NAMES = {"nerv": "NeRV", "hnerv": "HNeRV", "hflf": "dual stream"}


class Results:
    """The rows of a profile, by what tables need.

    Attributes:
        profile: what was measured.
        rows: all rows of the profile's clips as it selects them, each job's last.
        encodes: those of networks.
        table: encodes of the size of the tables, with the settings of the networks' presets.
    """

    def __init__(self, profile: Profile, rows: Iterable[Row]) -> None:
        self.profile = profile
        selection = json.loads(json.dumps([profile.selection.get(name) for name in SELECTION]))
        latest: dict[str, Row] = {}
        for row in rows:
            own = row["selection"] if "selection" in row else row["config"]
            if [own.get(name) for name in SELECTION] == selection:
                config = row.get("config", row.get("setting"))
                if row.get("preset_settings"):
                    # What a preset stands for changes as it gets better: its last rows are the ones that count.
                    config = {name: value for name, value in row["config"].items() if name not in SETTINGS}
                latest[json.dumps([row["clip"], row["implementation"], config], sort_keys=True)] = row
        self.rows = list(latest.values())
        epochs = profile.encodes[0]["epochs"]
        self.encodes = [row for row in self.rows if row["what"] == "encode" and row["config"]["epochs"] == epochs]
        self.table = [row for row in self._of_table_size() if row["preset_settings"]]
        self.networks = list(dict.fromkeys(row["implementation"] for row in self.table))

    def _of_table_size(self) -> list[Row]:
        size = parse_size(self.profile.size)
        return [row for row in self.encodes if row["config"]["size"] == size]

    def by_clip(self, network: str) -> dict[str, list[Row]]:
        """Return a network's rows of the tables for each clip, in order of seeds."""
        clips: dict[str, list[Row]] = {}
        for row in sorted(self.table, key=lambda row: (row["clip"], row["config"]["seed"])):
            if row["implementation"] == network:
                clips.setdefault(row["clip"], []).append(row)
        return clips

    def grid(self) -> dict[str, dict[tuple[Any, ...], dict[str, Row]]]:
        """Return rows by network, values of ``SETTINGS``, and clip, for clips that have every setting."""
        cells: dict[str, dict[tuple[Any, ...], dict[str, Row]]] = {}
        first_seed = min((row["config"]["seed"] for row in self._of_table_size()), default=0)
        for row in self._of_table_size():
            config = row["config"]
            if config["seed"] == first_seed:
                settings = cells.setdefault(row["implementation"], {})
                settings.setdefault(settings_of(config), {})[row["clip"]] = row
        cells = {network: settings for network, settings in cells.items() if len(settings) > 1}
        every = [clips.keys() for settings in cells.values() for clips in settings.values()]
        common = set.intersection(*map(set, every)) if every else set()
        return {
            network: {
                setting: {clip: row for clip, row in clips.items() if clip in common}
                for setting, clips in sorted(settings.items())
            }
            for network, settings in cells.items()
            if common
        }

    def curves(self) -> tuple[list[str], list[Row]]:
        """Return the clips on which networks have several sizes (else all), and the mean points over these clips."""
        first_seed = min((row["config"]["seed"] for row in self.encodes), default=0)
        networks = [row for row in self.encodes if row["preset_settings"] and row["config"]["seed"] == first_seed]
        sizes: dict[tuple[str, str], set[int]] = {}
        for row in networks:
            sizes.setdefault((row["implementation"], row["clip"]), set()).add(row["config"]["size"])
        several = {clip for (_, clip), of in sizes.items() if len(of) > 1}
        if several:
            clips = several
            networks = [row for row in networks if len(sizes[row["implementation"], row["clip"]]) > 1]
        else:
            clips, networks = {row["clip"] for row in self.rows}, []
        named = [{**row, "setting": f"{row['config']['size'] / 1e6:g}M"} for row in networks]
        rows = [row for row in named + self.codecs() if row["clip"] in clips]
        return sorted(clips), mean_points(rows)

    def codecs(self) -> list[Row]:
        """Return the rows of x264, x265 and SVT-AV1, good quality first."""
        order = [codec.encoder for codec in CONVENTIONAL_CODECS.values()]
        rows = [row for row in self.rows if row["what"] == "rate_distortion"]
        return sorted(
            rows, key=lambda row: (order.index(row["settings"]["encoder"]), row["settings"]["crf"], row["clip"])
        )


def load_results(name: str, folder: pathlib.Path = RESULTS) -> Results:
    """Return the results of a profile."""
    return Results(load_profile(name), read_rows(results_path(name, folder)))


def paper_rows(what: str) -> list[Row]:
    """Return the paper's figures of one kind."""
    rows = [json.loads(line) for line in (RESULTS / f"{PAPER}.jsonl").read_text().splitlines()]
    return [row for row in rows if row["what"] == what]


# Tables: each yields the lines of one, or nothing where there are no rows for it.


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table."""
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def settings_of(config: Row) -> tuple[Any, ...]:
    """Return the values of ``SETTINGS``."""
    return tuple(config.get(name, BEFORE.get(name)) for name in SETTINGS)


def name_of(network: str) -> str:
    """Return what a network is called in tables."""
    model, preset = network.split("/")
    return f"{_NAMES[model]}, `{preset}`"


def number(values: Iterable[float | None], digits: int) -> str:
    """Return the mean of values, or a dash where one is missing."""
    known = list(values)
    present = [value for value in known if value is not None]
    return f"{statistics.mean(present):.{digits}f}" if present and len(present) == len(known) else "–"


def signed(values: Sequence[float]) -> str:
    """Return the mean of differences, with its deviation where there are several."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):+.2f}{deviation}"


def provenance(results: Results) -> Iterator[str]:
    """Say what was run, on what, and from which commit."""
    profile, rows = results.profile, results.rows
    command = f"`python -m bench.reproduce run {profile.name} --data DATA`"
    if not rows:
        yield f"{profile.description} Not run yet: {command}."
        yield ""
        return
    encodes = [row for row in rows if row["what"] == "encode"]
    devices = ", ".join(dict.fromkeys(row["device"] for row in rows))
    commits = ", ".join(dict.fromkeys(commit(row) for row in rows))
    torch = ", ".join(dict.fromkeys(row["versions"]["torch"] for row in rows))
    shapes = ", ".join(sorted({"x".join(map(str, row["shape"][1:3])) for row in rows}))
    frames = sorted({row["shape"][0] for row in rows})
    done = f"{len(encodes)} encodes" if encodes else "No network was trained yet, x264, x265 and SVT-AV1 were measured"
    if encodes:
        hours = sum(sum(row["seconds"].values()) for row in encodes) / 3600
        workers = f"{encodes[0]['processes']} at a time with {encodes[0]['threads']} thread(s) each"
        done += f", {workers}, {hours:.1f} hours all together{wall_time(encodes)}"
    yield (
        f"{profile.description} {command} on {devices}, torch {torch}, at commit {commits}; rows in "
        f"`bench/results/{results_path(profile.name).name}`. {len({row['clip'] for row in rows})} clip(s) of "
        f"{frames[0]}{f' to {frames[-1]}' if len(frames) > 1 else ''} frames of {shapes}. {done}."
    )
    yield ""


def wall_time(encodes: Sequence[Row]) -> str:
    """Say how long it took from the first encode's start to the last one's end, where all were made in one go."""
    if len({(row["device"], row["commit"], row["processes"]) for row in encodes}) > 1:
        return ""
    ends = [datetime.datetime.fromisoformat(row["time"]).timestamp() for row in encodes]
    starts = [end - sum(row["seconds"].values()) for end, row in zip(ends, encodes, strict=True)]
    return f", {(max(ends) - min(starts)) / 60:.0f} minutes from start to end"


def commit(row: Row) -> str:
    """Return the commit of a row, marked where files were changed since."""
    return f"{(row['commit'] or 'unknown')[:10]}{' (with changes)' if row['dirty'] else ''}"


def quality_table(results: Results) -> Iterator[str]:
    """The paper's Table I: mean quality of each network over the clips."""
    if not results.table:
        return
    ours = []
    for network in results.networks:
        clips = results.by_clip(network)
        rows = [row for of_clip in clips.values() for row in of_clip]
        ours.append(
            (
                name_of(network),
                f"{len(clips)} x {len(rows) / len(clips):.2g}",
                number((row["psnr_db_before_quantization"] for row in rows), 2),
                number((row["psnr_db"] for row in rows), 2),
                number((row["ms_ssim"] for row in rows), 4),
                number((row["ssim"] for row in rows), 4),
                number((row["lpips_unscaled"] for row in rows), 4),
                number((row["bits_per_pixel"] for row in rows), 4),
                f"{statistics.mean(row['parameters']['total'] for row in rows):,.0f}",
                number((row["training_seconds"] for row in rows), 0),
            )
        )
    head = ("network", "clips x seeds", "PSNR before quantisation", "PSNR of the file", "MS-SSIM", "SSIM", "LPIPS")
    config = results.table[0]["config"]
    yield (
        f"**Table I.** {results.profile.size} parameters, {config['epochs']} epochs, each network with the settings "
        "of its preset; PSNR in dB, means over frames, then clips. LPIPS is VGG's with the paper's scaling."
    )
    yield ""
    yield from markdown((*head, "bits per pixel", "parameters", "training, s"), ours)
    yield from processors(results)
    if any(row["lpips_unscaled"] is None for row in results.table):
        yield "No LPIPS: its package or weights were not on that machine. The column fills itself where they are."
        yield ""
    if all(row["ms_ssim"] is None for row in results.table):
        yield "No MS-SSIM: its five scales need frames of at least 161 pixels on the shorter side."
        yield ""


def clip_table(results: Results) -> Iterator[str]:
    """The paper's Fig. 4 as numbers: each clip's PSNR, and the gain over HNeRV."""
    clips = {network: results.by_clip(network) for network in results.networks}
    proposed = [network for network in results.networks if network.startswith("hflf/")]
    # Where HNeRV as published was not trained, against the one that was.
    baseline = next((name for name in (BASELINE, "hnerv/best") if name in clips), None)
    if baseline is None or not proposed:
        return
    paper = {row["clip"]: row["psnr_gain_db"] for row in paper_rows("gain")}
    lines = []
    for clip in sorted(clips[baseline]):
        cells = [number((row["psnr_db"] for row in clips[network].get(clip, ())), 2) for network in results.networks]
        cells += [difference_cell(clips, network, baseline, clip) for network in proposed]
        lines.append((clip, *cells, f"{paper[clip]:+.2f}" if clip in paper else "–"))
    gains = tuple(f"{name_of(network)} − {name_of(baseline)}" for network in proposed)
    yield "**Per clip.** PSNR of the file in dB, mean over seeds; differences with their deviation over seeds."
    yield ""
    yield from markdown(("clip", *map(name_of, results.networks), *gains, "the paper's gain (1.5 M, 640x1280)"), lines)
    pairs = [(a, b) for a in proposed for b in results.networks if b.startswith("hnerv/") or (b == PROPOSED and a != b)]
    summary = []
    for first, second in pairs:
        values = [statistics.mean(v) for v in differences(clips, first, second).values()]
        if values:
            better = sum(value > 0 for value in values)
            summary.append(
                (
                    f"{name_of(first)} − {name_of(second)}",
                    signed(values),
                    f"{statistics.median(values):+.2f}",
                    f"{better} of {len(values)}",
                )
            )
    yield from markdown(("difference", "mean ± deviation over clips, dB", "median, dB", "clips better"), summary)


def differences(clips: dict[str, dict[str, list[Row]]], first: str, second: str) -> dict[str, list[float]]:
    """Return PSNR of one network minus another's, by clip, for the seeds that both have."""
    found = {}
    for clip, rows in clips[first].items():
        of_seed = {row["config"]["seed"]: row["psnr_db"] for row in clips[second].get(clip, ())}
        values = [row["psnr_db"] - of_seed[s] for row in rows if (s := row["config"]["seed"]) in of_seed]
        if values:
            found[clip] = values
    return found


def difference_cell(clips: dict[str, dict[str, list[Row]]], network: str, baseline: str, clip: str) -> str:
    """Return a clip's difference to the baseline."""
    values = differences(clips, network, baseline).get(clip)
    return "–" if values is None else signed(values)


def grid_table(results: Results) -> Iterator[str]:
    """Optimiser, learning rate and batch size: every network at its own best."""
    grid = results.grid()
    if not grid:
        return
    preset = {(row["implementation"], *settings_of(row["config"])) for row in results.table}

    def values(network: str, setting: tuple[Any, ...], name: str) -> list[float]:
        return [row[name] for row in grid[network][setting].values()]

    best = {
        network: max(settings, key=lambda setting: statistics.mean(values(network, setting, "psnr_db")))
        for network, settings in grid.items()
    }
    lines = []
    # Those that are alike in all rows say nothing; one may be of a later date than any of them.
    used = [setting for of in grid.values() for setting in of]
    shown = [i for i in range(len(SETTINGS)) if len({setting[i] for setting in used}) > 1]
    for network, settings in grid.items():
        for setting in settings:
            marks = ["of the preset"] if (network, *setting) in preset else []
            marks += ["best"] if best[network] == setting else []
            own = [f"{setting[i]:g}" if isinstance(setting[i], float) else str(setting[i]) for i in shown]
            cells = [
                number(values(network, setting, name), digits)
                for name, digits in (("psnr_db", 2), ("bits_per_pixel", 4), ("training_seconds", 0))
            ]
            lines.append((name_of(network), *own, *cells, ", ".join(marks)))
    clips = sorted(next(iter(next(iter(grid.values())).values())))
    yield f"**Each at its own best.** PSNR of the file in dB, one seed, mean over {', '.join(clips)}."
    yield ""
    columns = [SETTINGS[i].replace("_", " ") for i in shown]
    yield from markdown(("network", *columns, "PSNR", "bits per pixel", "training, s", ""), lines)
    if BASELINE in grid:
        for network in grid:
            if network.startswith("hflf/"):
                of_network, of_baseline = grid[network][best[network]], grid[BASELINE][best[BASELINE]]
                gains = [of_network[clip]["psnr_db"] - of_baseline[clip]["psnr_db"] for clip in clips]
                yield f"{name_of(network)} − {name_of(BASELINE)}, each at its best: {signed(gains)} dB."
        yield ""


def speed_table(results: Results) -> Iterator[str]:
    """How soon each network has the quality at which the paper's ends."""
    curves = {network: mean_curve(results.by_clip(network)) for network in results.networks}
    if PROPOSED not in curves or len(curves) < 2:
        return
    target = curves[PROPOSED][-1]
    lines = []
    for network, curve in curves.items():
        rows = [row for of_clip in results.by_clip(network).values() for row in of_clip]
        seconds = statistics.mean(row["training_seconds"] / len(row["epochs_psnr_db"]) for row in rows)
        epoch = next((epoch for epoch, psnr in enumerate(curve, 1) if psnr >= target), None)
        when = ("never", "–") if epoch is None else (f"{epoch}", f"{epoch * seconds:.0f}")
        lines.append((name_of(network), f"{curve[-1]:.2f}", *when))
    yield f"**Road to {target:.2f} dB**, where {name_of(PROPOSED)} ends: mean PSNR of the training epochs, in dB."
    yield ""
    yield from markdown(("network", "at the end", "epoch that reaches it", "seconds of training a clip"), lines)
    yield from processors(results)


def processors(results: Results) -> Iterator[str]:
    """Say which seconds are of which processor, where there are several."""
    networks: dict[str, dict[str, None]] = {}
    for row in results.table:
        networks.setdefault(row["device"], {})[row["implementation"]] = None
    if len(networks) > 1:
        of = (f"{device}: {', '.join(map(name_of, names))}" for device, names in networks.items())
        yield f"The seconds are of several processors and do not compare from one to the other. {'; '.join(of)}."
        yield ""


def mean_curve(clips: dict[str, list[Row]]) -> list[float]:
    """Return PSNR by epoch, mean over clips and seeds."""
    rows = [row["epochs_psnr_db"] for of_clip in clips.values() for row in of_clip]
    return [statistics.mean(values) for values in zip(*rows, strict=True)]


def similarity_table(results: Results) -> Iterator[str]:
    """The paper's Fig. 3 as a number: how alike the features of adjacent frames are."""
    lines = []
    for network in results.networks:
        rows = [row["feature_similarity"] for of_clip in results.by_clip(network).values() for row in of_clip]
        for stream in rows[0]:
            blocks = [[row[stream][i] for row in rows] for i in range(len(rows[0][stream]))]
            lines.append((name_of(network), stream, " ".join(number(of_block, 3) for of_block in blocks)))
    if lines:
        yield (
            "**Features of adjacent frames** (the paper's Fig. 3): cosine between the outputs of a block for frames t "
            "and t + 1, mean over t, clips and seeds; from the first upsampling block to the last."
        )
        yield ""
        yield from markdown(("network", "stream", "cosine, block by block"), lines)


def rate_bound(anchor: Sequence[tuple[float, float]], test: Sequence[tuple[float, float]]) -> str:
    """Say how far rates at equal PSNR are apart at least, for curves that have no PSNR in common; else a dash.

    A curve all of whose points are better, and whose smallest file is smaller than the largest of the other, needs less
    than the former to be as good as the latter.

    Args:
        anchor: bits per pixel and PSNR of each point.
        test: as ``anchor``.
    """

    def ends(worse: Sequence[tuple[float, float]], better: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
        (best_rate, best), (least_rate, least) = max(worse, key=lambda p: p[1]), min(better, key=lambda p: p[1])
        return (best_rate, least_rate) if least > best and least_rate < best_rate else None

    if found := ends(anchor, test):
        return f"under {100 * (found[1] / found[0] - 1):+.1f} %"
    if found := ends(test, anchor):
        return f"over {100 * (found[0] / found[1] - 1):+.1f} %"
    return "–"


def rate_table(results: Results) -> Iterator[str]:
    """The paper's Fig. 6 as numbers, with Bjontegaard deltas."""
    clips, points = results.curves()
    if not points:
        return
    yield (
        f"**Rate-distortion**, mean over {', '.join(clips)}. Networks: bytes of the `.hflf` file. x264, x265, SVT-AV1: "
        "bytes of all packets, yuv420p, one thread, nothing tuned, RGB PSNR."
    )
    yield ""
    cells: dict[str, list[str]] = {point["implementation"]: [] for point in points}
    for point in sorted(points, key=lambda point: float(point["bits_per_pixel"])):
        ssim = "" if point["ms_ssim"] is None else f", {point['ms_ssim']:.4f}"
        text = f"{point['setting']}: {point['bits_per_pixel']:.4f}, {point['psnr_db']:.2f}{ssim}"
        cells[point["implementation"]].append(text)
    head = ("", "setting: bits per pixel, PSNR in dB" + ("" if points[0]["ms_ssim"] is None else ", MS-SSIM"))
    yield from markdown(head, ((name, "; ".join(texts)) for name, texts in cells.items()))
    anchors = [name for name in cells if name.startswith("x265") or name in (PROPOSED, "hnerv/best")]
    curves: dict[str, list[tuple[float, float]]] = {name: [] for name in cells}
    for point in points:
        curves[point["implementation"]].append((point["bits_per_pixel"], point["psnr_db"]))
    lines = []
    for anchor in anchors:
        for delta in bjontegaard(points, anchor):
            rate, psnr = delta["bd_rate_percent"], delta["bd_psnr_db"]
            lines.append(
                (
                    f"{delta['implementation']} against {anchor}",
                    rate_bound(curves[anchor], curves[delta["implementation"]]) if rate is None else f"{rate:+.1f} %",
                    "–" if psnr is None else f"{psnr:+.2f} dB",
                )
            )
    if lines:
        yield from markdown(("Bjontegaard delta", "rate at equal PSNR", "PSNR at equal rate"), lines)
        yield (
            "Under, over: no PSNR in common, all of one curve is better; what the best point of the other needs more. "
            "A dash: no range in common, or one curve has a single point or does not rise."
        )
        yield ""


def figure_links(results: Results) -> Iterator[str]:
    """Show the figures that were drawn."""
    for stem, title in (
        ("gain.svg", "Fig. 4: gain over HNeRV by clip"),
        ("rate.svg", "Fig. 6: rate-distortion"),
        ("features.jpg", "Fig. 3: features of adjacent frames"),
        ("frames.jpg", "Fig. 5: consecutive frames"),
    ):
        path = FIGURES / f"{results.profile.name}-{stem}"
        if path.exists():
            yield f"![{title}](figures/{path.name})"
            yield ""


_PARTS = (
    provenance,
    quality_table,
    clip_table,
    grid_table,
    speed_table,
    similarity_table,
    rate_table,
    figure_links,
)


def block(results: Results) -> str:
    """Return all of a profile."""
    return "\n".join(line for part in _PARTS for line in part(results)).strip()


def published_block() -> str:
    """Return the paper's own numbers."""
    rows = paper_rows("encode")
    lines = [
        (
            _NAMES[row["implementation"].removeprefix("paper-")],
            f"{row['clips']}, {row['note']}",
            f"{row['psnr_db']:.2f}",
            f"{row['ms_ssim']:.4f}",
            f"{row['lpips_unscaled']:.4f}",
        )
        for row in rows
    ]
    gains = [row["psnr_gain_db"] for row in paper_rows("gain")]
    text = [f"{rows[0]['data']}.", "", *markdown(("network", "videos", "PSNR", "MS-SSIM", "LPIPS"), lines)]
    text += [
        f"Gain over HNeRV: {statistics.mean(gains):+.2f} dB mean of {len(gains)} videos, better on "
        f"{sum(gain > 0 for gain in gains)}, median {statistics.median(gains):+.2f} dB; digitised from its figure. "
        f"Rows in `bench/results/{PAPER}.jsonl`, with their sources.",
        "",
    ]
    curves: dict[str, list[str]] = {}
    for row in paper_rows("rate_distortion"):
        point = f"{row['setting']}: {row['bits_per_pixel']:.3f}, {row['psnr_db']:.2f}"
        curves.setdefault(row["implementation"], []).append(point)
    head = ("Fig. 6, digitised", "setting: bits per pixel, PSNR in dB")
    text += markdown(head, ((name, "; ".join(points)) for name, points in curves.items()))
    return "\n".join(text).strip()


def filled(text: str, folder: pathlib.Path = RESULTS) -> str:
    """Return the document's text with every marked block made anew: the paper's numbers, and each profile's.

    Raises:
        ValueError: a block has no place, or several.
    """
    blocks = {f"profile {name}": block(load_results(name, folder)) for name in profile_names()}
    for name, made in {"published": published_block(), **blocks}.items():
        before, after = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        if text.count(before) != 1 or text.count(after) != 1:
            raise ValueError(f"{DOCUMENT.name} must have one place marked {name}, got {text.count(before)}")
        text = text[: text.index(before)] + before + made + text[text.index(after) :]
    return text


# Figures.


def draw_gains(results: Results, path: pathlib.Path) -> bool:
    """Draw Fig. 4: the gain over HNeRV, clip by clip, with the paper's."""
    clips = {network: results.by_clip(network) for network in results.networks}
    proposed = [network for network in results.networks if network.startswith("hflf/")]
    if BASELINE not in clips or not proposed:
        return False
    figure = new_figure(8, 3.5)
    axes = figure.add_subplot()
    names = sorted(clips[BASELINE])
    for place, network in enumerate(proposed):
        gains = {clip: statistics.mean(values) for clip, values in differences(clips, network, BASELINE).items()}
        shown = [i for i, clip in enumerate(names) if clip in gains]
        at = [i + 0.8 * (place + 0.5) / len(proposed) - 0.4 for i in shown]
        axes.bar(at, [gains[names[i]] for i in shown], 0.8 / len(proposed), label=name_of(network).replace("`", ""))
    paper = {row["clip"]: row["psnr_gain_db"] for row in paper_rows("gain")}
    known = [i for i, clip in enumerate(names) if clip in paper]
    axes.plot(known, [paper[names[i]] for i in known], "k_", markersize=18, label="paper (1.5 M, 640x1280)")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(names)), names, fontsize=7, rotation=30, ha="right")
    axes.set_ylabel("PSNR − HNeRV's, dB")
    axes.legend(fontsize=7)
    save(figure, path)
    return True


def draw_rates(results: Results, path: pathlib.Path) -> bool:
    """Draw Fig. 6."""
    clips, points = results.curves()
    if not points:
        return False
    paper = mean_of_paper() if results.profile.beside_paper else []
    plot_points([*points, *paper], path, title=f"mean over {len(clips)} clip(s): {', '.join(clips)[:90]}")
    return True


def mean_of_paper() -> list[Row]:
    """Return the paper's rate-distortion points."""
    return [row | {"ms_ssim": None} for row in paper_rows("rate_distortion")]


def draw_features(results: Results, work: pathlib.Path, path: pathlib.Path) -> bool:
    """Draw Fig. 3: the last features of two adjacent frames, and how they differ."""
    found = list(decoders(results, work))
    if not found:
        return False
    first = len(found[0][1]) // 2
    panels = []
    for network, decoder in found:
        before, after = stream_features(decoder, [first, first + 1])
        for stream in before:
            cosine = cosines(before[stream], after[stream])[-1]
            images = [features[stream][-1].abs().mean(0).numpy() for features in (before, after)]
            panels.append((f"{name_of(network).replace('`', '')}\n{stream}, cosine {cosine:.3f}", images))
    figure = new_figure(7.5, 1.35 * len(panels) + 0.3)
    axes = figure.subplots(len(panels), 3, squeeze=False)
    for row, (title, (before_image, after_image)) in zip(axes, panels, strict=True):
        top = float(max(before_image.max(), after_image.max()))
        difference = abs(after_image - before_image)
        for axis, image in zip(row, (before_image, after_image, difference), strict=True):
            axis.imshow(image, cmap="gray", vmin=0, vmax=top)
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(title, fontsize=6)
    for axis, title in zip(axes[0], (f"frame {first}", f"frame {first + 1}", "difference"), strict=True):
        axis.set_title(title, fontsize=8)
    save(figure, path)
    return True


def draw_frames(results: Results, data: pathlib.Path, work: pathlib.Path, path: pathlib.Path) -> bool:
    """Draw Fig. 5: consecutive frames of the original and of each network, with their PSNR."""
    found = list(decoders(results, work))
    if not found:
        return False
    profile = results.profile
    original = load_video(profile.sources(data)[profile.figure_clip], **profile.selection).frames
    first = max(len(original) // 2 - 2, 0)
    shown = range(first, min(first + 4, len(original)))
    figure = new_figure(10, 10 / len(shown) * original.shape[1] / original.shape[2] * (len(found) + 1) * 1.25)
    axes = figure.subplots(len(found) + 1, len(shown), squeeze=False)
    rows = {row["implementation"]: row for row in figure_rows(results)}
    for column, index in enumerate(shown):
        axes[0, column].imshow(original[index].numpy())
        axes[0, column].set_title(f"frame {index}", fontsize=7)
        for line, (network, decoder) in enumerate(found, 1):
            axes[line, column].imshow(decoder[index])
            quality = rows[network]["per_frame_psnr_db"][index]
            axes[line, column].set_title(f"{name_of(network).replace('`', '')}: {quality:.2f} dB", fontsize=7)
    for axis in axes.flat:
        axis.set_axis_off()
    save(figure, path)
    return True


def figure_rows(results: Results) -> list[Row]:
    """Return the rows whose files the figures show: one for each network, of the first seed."""
    by_network = {
        network: results.by_clip(network).get(results.profile.figure_clip, []) for network in results.networks
    }
    return [rows[0] for rows in by_network.values() if rows]


def decoders(results: Results, work: pathlib.Path) -> Iterator[tuple[str, Decoder]]:
    """Yield the networks of the figures' clip whose files are in the work folder."""
    for row in figure_rows(results):
        path = work / f"{file_stem(row)}.hflf"
        if path.exists():
            yield row["implementation"], Decoder(path, device="cpu")


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure, without a window system."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: pathlib.Path) -> None:
    """Write a figure; the same rows give the same file."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "hflfnerv"}):
        figure.savefig(path, dpi=100, metadata={"Date": None} if path.suffix == ".svg" else None)


def write_report(
    profile: Profile,
    data: pathlib.Path | None,
    work: pathlib.Path,
    results_folder: pathlib.Path = RESULTS,
    document: pathlib.Path = DOCUMENT,
    figures: pathlib.Path = FIGURES,
) -> int:
    """Draw a profile's figures and write the document anew; figures that need missing files stay as they are.

    The tables of a profile that is not among the committed ones are printed instead.
    """
    results = Results(profile, read_rows(results_path(profile.name, results_folder)))
    figures.mkdir(parents=True, exist_ok=True)
    drawings: dict[str, Callable[[pathlib.Path], bool]] = {
        "gain.svg": lambda path: draw_gains(results, path),
        "rate.svg": lambda path: draw_rates(results, path),
        "features.jpg": lambda path: draw_features(results, work, path),
    }
    if data is not None:
        drawings["frames.jpg"] = lambda path: draw_frames(results, data, work, path)
    for name, draw in drawings.items():
        path = figures / f"{profile.name}-{name}"
        print(f"{path}: {'drawn' if draw(path) else 'left as it is: no rows or files for it'}", file=sys.stderr)
    if data is None:
        print("the frames are not drawn: they need --data", file=sys.stderr)
    if profile.name in profile_names():
        document.write_text(filled(document.read_text(), results_folder))
    else:
        print(block(results))
    return 0
