"""Python of the README runs, its commands are parsed, and its make targets exist."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hflfnerv import huffman, ops
from hflfnerv._impl import tables
from hflfnerv.cli.main import build_parser

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [
    line.removeprefix("$ ").split("#")[0].strip()
    for language, code in BLOCKS
    if language == "console"
    for line in code.splitlines()
    if line.startswith("$ ")
]


def test_there_are_blocks():
    assert {language for language, _ in BLOCKS} == {"console", "python", "bibtex"}
    assert len(PYTHON) == 4


@pytest.mark.parametrize("code", PYTHON)
def test_python_block(code, tmp_path):
    shutil.copy(REPOSITORY / "hflfnerv" / "assets" / "bunny_320x640.mp4", tmp_path / "clip.mp4")
    subprocess.run([sys.executable, "-W", "error::SyntaxWarning", "-c", code], check=True, cwd=tmp_path)


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("hflfnerv ")])
def test_command_line_is_understood(command):
    build_parser().parse_args(shlex.split(command)[1:])


def test_make_targets_exist():
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = [word for line in COMMANDS for word in re.findall(r"make (\w+)", line)]
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (REPOSITORY / target).exists(), target


def test_every_implementation_of_an_operation_is_named():
    named = {}
    for row in re.findall(r"^\| `(?:ops|huffman)\..*\|$", README, flags=re.MULTILINE):
        what, _, implementations = (cell.strip() for cell in row.strip("|").split(" | "))
        operation = re.match(r"`(?:ops\.)?(\w+)", what)[1]
        named[operation] = sorted(re.findall(r"`([\w+]+)`", implementations))
    assert huffman.encode  # importing it makes its table
    there = {table.op: sorted(table.names) for table in tables()}
    assert len(named) >= 8
    assert named == {operation: there[operation] for operation in named}
    assert set(ops.__all__) & there.keys() <= named.keys() | {"quantize_int8"}


def test_the_demo_takes_as_long_as_make_says():
    minutes = round(json.loads((REPOSITORY / "docs" / "demo.json").read_text())["total_seconds"] / 60)
    named = {1: "one minute", 2: "two minutes", 3: "three minutes", 4: "four minutes", 5: "five minutes"}
    assert f"(about {named[minutes]} on two cores)" in (REPOSITORY / "Makefile").read_text()


def test_tables_are_what_the_results_say(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY))
    from bench.readme import PAGES, filled

    for page in PAGES:
        assert filled(page) == page.read_text(), f"{page.name}: run python -m bench.readme"
