"""Fixtures for kernels on a machine without a GPU: Triton's interpreter, and compilation ahead of time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

TRITON_TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.complex64: "*fp32"}
TRITON_TYPES |= {torch.uint8: "*u8", torch.int8: "*i8", torch.int32: "*i32"}


class Compiled(NamedTuple):
    """What a kernel compiled ahead of time takes from the machine."""

    kernel: str
    blocks: str
    registers: int
    stack_bytes: int
    local_bytes: int
    matrix_instructions: frozenset[str]  # of PTX: "mma.sync" (from sm_80), "wgmma" (sm_90), "tcgen05.mma" (sm_100)
    async_copy_bytes: frozenset[int]  # widths of the copies from global to shared memory


@pytest.fixture(scope="session")
def interpreter() -> Callable[[str], str]:
    """Run the tests named ``interpreted_<...>`` of interpreted.py with Triton's interpreter, in a process of their own.

    The interpreter has to be on before Triton is imported. Returns pytest's summary.
    """
    pytest.importorskip("triton")

    def run(selection: str) -> str:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts="]
        command += [
            "-o",
            "python_files=interpreted.py",
            "-k",
            selection,
            str(Path(__file__).with_name("interpreted.py")),
        ]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip().splitlines()[-1]

    return run


@pytest.fixture
def compile_launch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Compiled]]:
    """Compile what a launcher would launch, for a GPU that need not be here, exactly as it would be specialised there.

    ``compile_launch(module, launch, capability, **options)``: the kernels of ``module`` are replaced by recorders,
    ``launch()`` is called with CPU tensors, and each recorded launch is compiled for ``capability`` (80, 90, 100).
    """
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def usage(cubin: bytes) -> dict[str, int]:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", listing)}

    def compile_one(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], capability: int) -> Compiled:
        values = dict(zip(kernel.arg_names, args, strict=False))
        values |= {name: kwargs.pop(name) for name in kernel.arg_names if name in kwargs}
        blocks = " ".join(f"{name}={value}" for name, value in values.items() if name.startswith(("BLOCK", "STEPS")))
        fixed = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
        general = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
        signature, constants, attributes = {}, {}, {}
        for index, (name, value) in enumerate(values.items()):
            one = isinstance(value, int) and value == 1 and name not in general
            if name in fixed or value is None or value is True or one:
                signature[name], constants[name] = "constexpr", value
                continue
            signature[name] = TRITON_TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"
            if isinstance(value, torch.Tensor) or (value % 16 == 0 and name not in general):
                attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constants, attributes)
        binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=kwargs)
        resources = usage(binary.asm["cubin"])
        ptx = binary.asm["ptx"]
        return Compiled(
            kernel.__name__,
            blocks,
            resources["REG"],
            resources["STACK"],
            resources["LOCAL"],
            frozenset(re.findall(r"\b(mma\.sync|wgmma(?=\.mma_async)|tcgen05\.mma)\b", ptx)),
            frozenset(int(size, 0) for size in re.findall(r"\bcp\.async\.c[ag]\.\S+ \[.*?\], \[.*?\], (\w+)", ptx)),
        )

    def run(module: ModuleType, launch: Callable[[], Any], capability: int, **options: Any) -> list[Compiled]:
        recorded: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

        class Recorder:
            def __init__(self, kernel: Any) -> None:
                self.kernel = kernel

            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                assert all(isinstance(size, int) and size > 0 for size in grid)
                return lambda *args, **kwargs: recorded.append((self.kernel, args, {**kwargs, **options}))

        from hflfnerv.triton_kernels import _sums

        class Silent:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                return lambda *args, **kwargs: None

        with monkeypatch.context() as patch:
            # The kernel that other modules launch behind their own has tests of its own.
            if module is not _sums:
                patch.setattr(_sums, "sum_shares_kernel", Silent())
            for name, value in list(vars(module).items()):
                if name.endswith("_kernel"):
                    patch.setattr(module, name, Recorder(value))
            launch()
        assert recorded, "the launcher launched nothing"
        return [compile_one(kernel, args, kwargs, capability) for kernel, args, kwargs in recorded]

    return run
