"""``hflfnerv explain``."""

from __future__ import annotations

import argparse

__all__ = ["add_parser", "run"]


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser("explain", help="every operation's implementations: usable here, or why not")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print every table of implementations."""
    import importlib

    from .._impl import tables

    for module in ("hflfnerv.ops", "hflfnerv.huffman", "hflfnerv.codec"):
        importlib.import_module(module)
    width = max(len(entry.name) for table in tables() for entry in table)
    for table in tables():
        print(table.op)
        for entry in table:
            reason = entry.unavailable()
            print(f"  {entry.name:<{width}} {'yes' if reason is None else f'no: {reason}'}")
    return 0
