"""The layers of the package: imports run one way, and only operations import kernels, when they need them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "hflfnerv"

# A module may import what stands above it here, and its own package; nothing below it, and nothing beside it.
LAYERS = [
    {"errors", "_version"},
    {
        "_impl",
        "_ext",
        "_concurrent",
        "_device",
        "_machine",
        "_atomic",
        "_memory",
        "_log_step",
        "_optional",
        "config",
        "reference",
        "triton_kernels",
    },
    {"ops", "huffman", "data", "metrics", "testing"},
    {"nn"},
    {"models", "fusion"},
    {"train"},
    {"codec"},
    {"cli"},
    {"__init__", "__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


class Import(NamedTuple):
    importer: str  # module below hflfnerv, with dots
    imported: str  # absolute name
    lazy: bool  # inside a function
    line: int

    def __str__(self) -> str:
        return f"hflfnerv.{self.importer}, line {self.line}: imports {self.imported}"


def targets(node: ast.Import | ast.ImportFrom, package: list[str]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = package[: len(package) - node.level + 1] if node.level else []
    prefix = ".".join([*base, *([node.module] if node.module else [])])
    # Of "from . import x" x is a module of ours; of "from .a import x" a is, and x makes no difference.
    return [f"{prefix}.{alias.name}" for alias in node.names]


def imports(tree: ast.Module, module: str, package: list[str]) -> Iterator[Import]:
    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.Import, ast.ImportFrom)):
                for target in targets(child, package):
                    yield Import(module, target, lazy, child.lineno)
            elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            else:
                yield from visit(child, lazy or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)))

    return visit(tree, False)


def read(folder: Path, name: list[str]) -> list[Import]:
    found = []
    for path in sorted(folder.rglob("*.py")):
        parts = [*name, *path.relative_to(folder).with_suffix("").parts]
        found += imports(ast.parse(path.read_text(encoding="utf-8")), ".".join(parts[1:]), parts[:-1])
    return found


IMPORTS = read(PACKAGE, ["hflfnerv"]) + read(REPOSITORY / "triton_kernels", ["hflfnerv", "triton_kernels"])


def layer(dotted: str) -> str | None:
    parts = dotted.split(".")
    return parts[1] if parts[0] == "hflfnerv" and len(parts) > 1 else None


def wrong_way(found: Import) -> bool:
    own, other = found.importer.split(".")[0], layer(found.imported)
    if other is None or other == own or other == "__version__":
        return False
    return other not in RANK or RANK[other] >= RANK[own]


def test_every_module_has_a_layer():
    names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert names - {"py"} <= RANK.keys()


def test_imports_run_one_way():
    assert [str(found) for found in IMPORTS if layer(found.imported) != "_C" and wrong_way(found)] == []


def shared_by_kernels(imported: str) -> bool:
    return imported.startswith("hflfnerv.triton_kernels._")


def test_kernels_import_nothing_of_the_package_but_what_they_share():
    found = [f for f in IMPORTS if f.importer.startswith("triton_kernels.") and layer(f.imported) is not None]
    assert [str(f) for f in found if not shared_by_kernels(f.imported)] == []


def test_what_kernels_share_is_theirs_alone():
    found = [f for f in IMPORTS if shared_by_kernels(f.imported)]
    assert [str(f) for f in found if not f.importer.startswith("triton_kernels.")] == []


@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        ("from ._activations import gelu", True),
        ("from . import _activations", True),
        ("from .highpass import highpass_fwd", False),
        ("from . import highpass", False),
        ("from ..ops import _check", False),
    ],
)
def test_what_kernels_may_import(line, allowed):
    (found,) = imports(ast.parse(line), "triton_kernels.x", ["hflfnerv", "triton_kernels"])
    assert shared_by_kernels(found.imported) is allowed


def test_kernels_are_imported_lazily_and_by_operations_alone():
    for found in IMPORTS:
        if found.importer.startswith("triton_kernels"):
            continue
        kernel = layer(found.imported) == "triton_kernels"
        assert not kernel or (found.importer.startswith("ops.") and found.lazy), found
        assert found.imported.split(".")[0] != "triton" or found.lazy, found
        # The extension is loaded by _ext, which says how to build it.
        assert layer(found.imported) != "_C" or (found.importer == "_ext" and found.lazy), found


def test_implementations_do_not_import_each_other():
    wrong = [
        str(found)
        for found in IMPORTS
        if found.importer.split(".")[0] == "reference" and layer(found.imported) not in (None, "errors", "reference")
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("module", "package", "line", "wrong"),
    [
        ("ops.x", ["hflfnerv", "ops"], "from ..nn import UpsampleBlock", True),
        ("ops.x", ["hflfnerv", "ops"], "from .. import models", True),
        ("ops.x", ["hflfnerv", "ops"], "from ..reference import x", False),
        ("ops.x", ["hflfnerv", "ops"], "from ._check import check_tensor", False),
        ("nn.x", ["hflfnerv", "nn"], "import hflfnerv.train.loop", True),
        ("train.x", ["hflfnerv", "train"], "def f():\n    from ..codec import encode", True),
        ("cli.x", ["hflfnerv", "cli"], "from ..codec import encode", False),
        ("reference.x", ["hflfnerv", "reference"], "from .._impl import ImplementationTable", True),
        ("ops.x", ["hflfnerv", "ops"], "from ..unheard_of import f", True),
        ("ops.x", ["hflfnerv", "ops"], "import torch", False),
    ],
)
def test_the_reader_sees_what_is_wrong(module, package, line, wrong):
    (found,) = imports(ast.parse(line), module, package)
    assert wrong_way(found) is wrong
