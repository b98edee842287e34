"""The file's header: what a decoder must know before it reads weights, as checked JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

from ..data.selection import MAX_TERM
from ..errors import InvalidBitstream

__all__ = ["Color", "Header", "Source"]

MAX_SIDE: Final = 16384
MAX_FRAMES: Final = 2**24
_MAX_TEXT = 256
_MAX_DEPTH = 8
_MAX_NODES = 4096
_MAX_STRING = 1024
_MAX_INTEGER = 2**53

_REQUIRED = ("fps", "frames", "height", "model", "preset", "width", "writer")


@dataclass(frozen=True)
class Color:
    """How the source stored its colours, for a player or encoder of the decoded frames, which are full-range R'G'B'.

    Attributes:
        matrix: ``"rgb"``, or the YUV matrix by which it was read, e.g. ``"bt709"``; None if unknown.
        range: ``"full"`` or ``"limited"``, the one by which it was read; None if unknown.
        primaries: colour primaries, e.g. ``"bt709"``; None where the source does not say.
        transfer: transfer characteristics, e.g. ``"srgb"``; None where the source does not say.
    """

    matrix: str | None = None
    range: str | None = None
    primaries: str | None = None
    transfer: str | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None:
                _text(f"color.{name}", value)
        if self.range not in (None, "full", "limited"):
            raise ValueError(f"color.range must be 'full', 'limited' or absent, got {self.range!r}")


@dataclass(frozen=True)
class Source:
    """What was done to the original before coding. Information only: decoding does not depend on it.

    Attributes:
        height: height of the original frames in pixels.
        width: their width.
        first_frame: index in the original of the first coded frame.
        resize: ``(height, width)`` that whole frames were resized to first, or None.
        crop: ``(top, left, height, width)`` that was then cut out, or None.
    """

    height: int
    width: int
    first_frame: int = 0
    resize: tuple[int, int] | None = None
    crop: tuple[int, int, int, int] | None = None

    def __post_init__(self) -> None:
        _integer("source.height", self.height, 1, 2**20)
        _integer("source.width", self.width, 1, 2**20)
        _integer("source.first_frame", self.first_frame, 0, _MAX_INTEGER)
        if self.resize is not None:
            _integers("source.resize", self.resize, 2, 1, MAX_SIDE)
        if self.crop is not None:
            _integers("source.crop", self.crop, 4, 0, 2**20)


@dataclass(frozen=True)
class Header:
    """What a decoder must know before it reads weights.

    Attributes:
        model: the network's specification, a JSON object whose ``"model"`` is its name. The container only bounds its
            size; the model classes check it.
        frames: number of frames T, 1 to 2**24.
        height: frame height in pixels, 1 to 16384.
        width: frame width in pixels, 1 to 16384.
        fps: frames per second, exact.
        preset: name of the preset that made the file.
        writer: program and version that made the file.
        sample_aspect_ratio: width of a pixel over its height.
        color: the source's colour description, None if unknown.
        source: what was done to the original before coding, None if unknown.
        training: how the network was trained, any small JSON object, None if not told.
    """

    model: Mapping[str, Any]
    frames: int
    height: int
    width: int
    fps: Fraction
    preset: str
    writer: str
    sample_aspect_ratio: Fraction = Fraction(1)
    color: Color | None = None
    source: Source | None = None
    training: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        _integer("frames", self.frames, 1, MAX_FRAMES)
        _integer("height", self.height, 1, MAX_SIDE)
        _integer("width", self.width, 1, MAX_SIDE)
        for name in ("fps", "sample_aspect_ratio"):
            ratio = getattr(self, name)
            if not isinstance(ratio, Fraction):
                raise TypeError(f"{name} must be a Fraction, got {type(ratio).__name__}")
            _integer(f"{name} numerator", ratio.numerator, 1, MAX_TERM)
            _integer(f"{name} denominator", ratio.denominator, 1, MAX_TERM)
        for name in ("preset", "writer"):
            _text(name, getattr(self, name))
        _object("model", self.model)
        if not isinstance(self.model.get("model"), str):
            raise ValueError(f"model must be an object with a string 'model', got {self.model.get('model')!r:.60}")
        if self.training is not None:
            _object("training", self.training)

    def to_json(self) -> bytes:
        """Return the canonical form: keys sorted, no spaces, ASCII; fields that are None or default left out."""
        data: dict[str, Any] = {
            "fps": [self.fps.numerator, self.fps.denominator],
            "frames": self.frames,
            "height": self.height,
            "model": self.model,
            "preset": self.preset,
            "width": self.width,
            "writer": self.writer,
        }
        if self.sample_aspect_ratio != 1:
            data["sample_aspect_ratio"] = [self.sample_aspect_ratio.numerator, self.sample_aspect_ratio.denominator]
        if self.color is not None:
            data["color"] = {name: value for name, value in vars(self.color).items() if value is not None}
        if self.source is not None:
            data["source"] = {"height": self.source.height, "width": self.source.width}
            if self.source.first_frame:
                data["source"]["first_frame"] = self.source.first_frame
            if self.source.resize is not None:
                data["source"]["resize"] = list(self.source.resize)
            if self.source.crop is not None:
                data["source"]["crop"] = list(self.source.crop)
        if self.training is not None:
            data["training"] = self.training
        text = json.dumps(
            data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False, default=_plain
        )
        return text.encode("ascii")

    @classmethod
    def from_json(cls, data: bytes) -> Header:
        """Read a header, checking every field.

        Raises:
            InvalidBitstream: it is not such JSON; the message names the field.
        """
        try:
            fields = json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constants)
            return cls._from_fields(fields)
        except RecursionError:
            raise InvalidBitstream("header: JSON is nested too deeply") from None
        except (TypeError, ValueError, KeyError) as error:
            raise InvalidBitstream(f"header: {error}") from None

    @classmethod
    def _from_fields(cls, fields: Any) -> Header:
        if not isinstance(fields, dict):
            raise TypeError(f"must be an object, got {type(fields).__name__}")
        missing = [name for name in _REQUIRED if name not in fields]
        if missing:
            raise ValueError(f"must have the fields {missing}")
        known: dict[str, Any] = {name: fields[name] for name in ("frames", "height", "width", "preset", "writer")}
        if "sample_aspect_ratio" in fields:
            known["sample_aspect_ratio"] = _ratio("sample_aspect_ratio", fields["sample_aspect_ratio"])
        if "color" in fields:
            known["color"] = Color(**_members("color", fields["color"], Color))
        if "source" in fields:
            members = _members("source", fields["source"], Source)
            for name, count in (("resize", 2), ("crop", 4)):
                if name in members:
                    members[name] = tuple(_integers(f"source.{name}", members[name], count, 0, 2**20))
            known["source"] = Source(**members)
        for name in ("model", "training"):
            if name in fields:
                known[name] = _object(name, fields[name])
        return cls(
            **known,
            fps=_ratio("fps", fields["fps"]),
        )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("an object has the same key twice")
    return members


def _no_constants(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a header holds JSON values only, got {type(value).__name__}")


def _text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {type(value).__name__}")
    if len(value) > _MAX_TEXT or not value.isprintable():
        raise ValueError(f"{name} must be at most {_MAX_TEXT} printable characters, got {value!r:.60}")


def _integer(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r:.60}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in {low}..{high}, got {value!r:.60}")
    return value


def _integers(name: str, values: Any, count: int, low: int, high: int) -> list[int]:
    if not isinstance(values, (list, tuple)) or len(values) != count:
        raise TypeError(f"{name} must be {count} integers, got {values!r:.60}")
    return [_integer(name, value, low, high) for value in values]


def _ratio(name: str, value: Any) -> Fraction:
    numerator, denominator = _integers(name, value, 2, 1, MAX_TERM)
    return Fraction(numerator, denominator)


def _members(name: str, value: Any, kind: type) -> dict[str, Any]:
    """The members of an object that the dataclass ``kind`` has; others belong to newer versions and are ignored."""
    if not isinstance(value, dict):
        raise TypeError(f"{name} must be an object, got {type(value).__name__}")
    return {key: item for key, item in value.items() if key in kind.__dataclass_fields__}  # type: ignore[attr-defined]


def _object(name: str, value: Any) -> Mapping[str, Any]:
    """Check that a value is a JSON object of bounded size."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be an object, got {type(value).__name__}")
    nodes = 0
    pending: list[tuple[Any, int]] = [(value, 1)]
    while pending:
        item, depth = pending.pop()
        nodes += 1
        if nodes > _MAX_NODES or depth > _MAX_DEPTH:
            raise ValueError(f"{name} must have at most {_MAX_NODES} values and {_MAX_DEPTH} levels")
        if isinstance(item, Mapping):
            for key, member in item.items():
                if not isinstance(key, str) or len(key) > _MAX_STRING:
                    raise ValueError(f"{name} must have keys of at most {_MAX_STRING} characters, got {key!r:.60}")
                pending.append((member, depth + 1))
        elif isinstance(item, (list, tuple)):
            pending.extend((member, depth + 1) for member in item)
        elif isinstance(item, str):
            if len(item) > _MAX_STRING:
                raise ValueError(f"{name} must have strings of at most {_MAX_STRING} characters, got {len(item)}")
        elif isinstance(item, float):
            if not math.isfinite(item):
                raise ValueError(f"{name} must hold finite numbers, got {item}")
        elif isinstance(item, int):
            if abs(item) > _MAX_INTEGER:
                raise ValueError(f"{name} must hold integers within ±2**53, got {item!r:.60}")
        elif item is not None:
            raise TypeError(f"{name} must hold JSON values, got {type(item).__name__}")
    return value
