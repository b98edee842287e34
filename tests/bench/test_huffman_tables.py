"""The Huffman tables: from rows with and without the unverified decoder."""

from __future__ import annotations

from typing import Any

from bench import readme

OURS = "cpp (avx2)"
CHECKED = "zstandard level 1, checksum"
SPEEDS = {
    "huffman.encode": {OURS: 30.0, "zstandard level 1": 20.0, CHECKED: 10.0},
    "huffman.decode": {OURS: 60.0, f"{OURS}, unverified": 90.0, "zstandard level 1": 60.0, CHECKED: 40.0},
}


def rows(*, unverified: bool) -> list[dict[str, Any]]:
    facts = {"baseline": "zstandard level 1", "device": "A", "commit": "c" * 40, "bytes": 101, "payload_bytes": 100}
    return [
        {"what": what, "data": data, "implementation": name, "p50": speed, **facts}
        for data in ("real weights", "uniform")
        for what, speeds in SPEEDS.items()
        for name, speed in speeds.items()
        if unverified or "unverified" not in name
    ]


def test_like_is_compared_with_like() -> None:
    lines = readme.huffman_table(rows(unverified=True)).splitlines()
    at = lines.index("| **cpp (avx2)** | 60 MB/s (1.00) | 30 MB/s (1.50) |")
    assert lines[at + 1] == "| **cpp (avx2), unverified** | 90 MB/s (1.50) |  |"
    (title,) = (line for line in lines if line.startswith("| Speed of"))
    assert title == (
        "| Speed of cpp (avx2) over | zstandard level 1: decode unverified | decode | encode "
        "| zstandard level 1, checksum: decode | encode | dahuffman: decode | encode |"
    )
    assert "| uniform | 1.50 | 1.00 | 1.50 | 1.50 | 3.00 |  |  |" in lines
    assert lines[-1].startswith("Like for like")


def test_what_is_not_copied_has_a_line_of_its_own() -> None:
    view = {**rows(unverified=True)[-1], "implementation": f"{OURS}, unverified, no copy", "p50": 6000.0}
    assert view["what"] == "huffman.decode"
    assert view["data"] == "uniform"
    lines = readme.huffman_inputs([*rows(unverified=True), view])
    assert lines[:-2] == readme.huffman_inputs(rows(unverified=True))
    assert lines[-1].startswith("What does not shrink (uniform)")
    assert "100 times as fast" in lines[-1]


def test_rows_from_before_there_was_unverified_decoding() -> None:
    lines = readme.huffman_table(rows(unverified=False)).splitlines()
    assert "| **cpp (avx2)** | 60 MB/s (1.00) | 30 MB/s (1.50) |" in lines
    assert lines[-4].startswith("| Speed of cpp (avx2) over | zstandard level 1: decode | encode |")
    assert lines[-1] == "| uniform | 1.00 | 1.50 | 1.50 | 3.00 |  |  |"
    assert not any("unverified" in line for line in lines)
