"""The build of the extension: with a compiler, without one, and what the package says about it."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
pytest.importorskip("pybind11")


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the extension is built from; its core is cut down so that a build takes seconds."""
    root = tmp_path / "with space" / "checkout"
    (root / "hflfnerv").mkdir(parents=True)
    (root / "csrc" / "core").mkdir(parents=True)
    shutil.copy(ROOT / "setup.py", root)
    shutil.copy(ROOT / "csrc" / "flags.mk", root / "csrc")
    for name in ("__init__.py", "_version.py", "errors.py", "_ext.py"):
        shutil.copy(ROOT / "hflfnerv" / name, root / "hflfnerv")
    (root / "pyproject.toml").write_text(
        '[project]\nname = "hflfnerv"\nversion = "0"\n[tool.setuptools]\npackages = ["hflfnerv"]\n'
    )
    (root / "csrc" / "bindings.cpp").write_text(
        "#include <pybind11/pybind11.h>\n"
        "int portable(); int avx2();\n"
        "#ifndef HFLFNERV_HAVE_AVX2\nint avx2() { return 2; }\n#endif\n"
        'PYBIND11_MODULE(_C, module) { module.def("answer", [] { return portable() + avx2(); }); }\n'
    )
    (root / "csrc" / "core" / "some.cpp").write_text("int portable() { return 1; }\n")
    (root / "csrc" / "core" / "some_avx2.cpp").write_text(
        "#ifndef __AVX2__\n#error flags\n#endif\nint avx2() { return 2; }\n"
    )
    return root


def build(checkout, *arguments, **environment):
    """Build without CUDA unless the environment says otherwise."""
    removed = ("CXX", "CUDA_HOME", "HFLFNERV_CUDA_ARCHITECTURES", "HFLFNERV_REQUIRE_EXT", "PYTHONPATH")
    env = {key: value for key, value in os.environ.items() if key not in removed} | {"HFLFNERV_CUDA": "0"}
    command = [sys.executable, "setup.py", "-q", *(arguments or ("build_ext", "--inplace"))]
    return subprocess.run(command, cwd=checkout, env=env | environment, capture_output=True, text=True)


def python(checkout, code, **environment):
    """Run code on the copy; -S keeps an installed hflfnerv out of the way."""
    env = os.environ | {"PYTHONPATH": str(checkout)} | environment
    return subprocess.run([sys.executable, "-S", "-c", code], cwd=checkout, env=env, capture_output=True, text=True)


def record(checkout):
    return json.loads((checkout / "hflfnerv" / "_build.json").read_text())


def test_build_in_place_and_again(checkout):
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("needs a C++ compiler")
    result = build(checkout)
    assert result.returncode == 0, result.stderr
    assert record(checkout)["built"] is True
    answer = python(checkout, "from hflfnerv import _ext; print(_ext.load().answer(), _ext.unavailable())")
    assert answer.stdout == "3 None\n", answer.stderr
    answer = python(checkout, "from hflfnerv import _ext; print(_ext.unavailable_cuda())")
    assert answer.stdout.startswith("hflfnerv._C was built without CUDA (HFLFNERV_CUDA=0); install CUDA's nvcc")

    # What was built before does not outlive a build that fails.
    result = build(checkout, CXX="no-such-compiler")
    assert result.returncode == 0
    assert not list((checkout / "hflfnerv").glob("_C*"))


def test_without_a_compiler_the_package_says_why(checkout):
    result = build(checkout, CXX="no-such-compiler")
    assert result.returncode == 0
    assert "no-such-compiler" in result.stderr
    assert record(checkout)["built"] is False
    answer = python(checkout, "from hflfnerv import _ext; _ext.load()")
    last = answer.stderr.strip().splitlines()[-1]
    assert last.startswith("hflfnerv.errors.BackendUnavailable: ")
    assert "no C++ compiler found (tried no-such-compiler)" in last
    assert "build_ext --inplace" in last


def test_a_source_that_does_not_compile_is_named(checkout):
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("needs a C++ compiler")
    (checkout / "csrc" / "core" / "some.cpp").write_text("int portable() { return missing; }\n")
    assert build(checkout).returncode == 0
    assert "missing" in record(checkout)["reason"]
    assert "some.cpp" in record(checkout)["reason"]


def test_required_extension_fails_the_build(checkout):
    result = build(checkout, CXX="no-such-compiler", HFLFNERV_REQUIRE_EXT="1")
    assert result.returncode != 0
    assert "no C++ compiler found" in result.stderr


def test_never_built_is_named(checkout):
    answer = python(checkout, "from hflfnerv import _ext; print(_ext.unavailable())")
    assert "it was never built" in answer.stdout


def test_record_and_module_go_into_the_build_folder(checkout):
    assert build(checkout, "build_ext", "--build-lib", "out", CXX="no-such-compiler").returncode == 0
    assert (checkout / "out" / "hflfnerv" / "_build.json").is_file()
    assert not (checkout / "hflfnerv" / "_build.json").exists()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_with_cuda_it_still_loads_without(checkout):
    (checkout / "csrc" / "cuda").mkdir()
    (checkout / "csrc" / "cuda" / "number.h").write_text("const int number = 4;\n")
    (checkout / "csrc" / "cuda" / "some.cu").write_text(
        '#include "cuda/number.h"\n'
        "__global__ void kernel(int* to) { *to = number; }\n"
        "int launch() { kernel<<<1, 1>>>(nullptr); return cudaGetLastError() == cudaSuccess; }\n"
    )
    (checkout / "csrc" / "bindings.cpp").write_text(
        "#include <pybind11/pybind11.h>\n"
        "int launch();\n"
        "PYBIND11_MODULE(_C, module) {\n"
        '  module.attr("cuda_architectures") = HFLFNERV_CUDA_ARCHITECTURES;\n'
        '  module.def("launch", launch);\n'
        "}\n"
    )
    result = build(checkout, HFLFNERV_CUDA="1", HFLFNERV_CUDA_ARCHITECTURES="80,90a")
    assert result.returncode == 0, result.stderr
    assert record(checkout)["no_cuda"] is None
    code = "from hflfnerv import _ext as e; print(e.load().cuda_architectures, e.unavailable_cuda(), e.load().launch())"
    answer = python(checkout, code, CUDA_VISIBLE_DEVICES="")
    assert answer.stdout == "80,90a None 0\n", answer.stderr
    if shutil.which("ldd"):
        (module,) = (checkout / "hflfnerv").glob("_C*")
        needed = subprocess.run(["ldd", module], capture_output=True, text=True, check=True).stdout
        assert "libstdc++" in needed
        assert "libcud" not in needed


@pytest.fixture
def only_host_tools(tmp_path):
    """A folder for the search path with a C++ compiler and its helpers, and nothing else."""
    tools = {name: shutil.which(name) for name in ("c++", "as", "ld")}
    if None in tools.values():
        pytest.skip("needs a C++ compiler")
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, path in tools.items():
        (folder / name).symlink_to(path)
    return folder


def build_without(checkout, only_host_tools, *modules):
    """Build as on a machine where these modules are not installed, and ninja is not on the path."""
    code = (
        f"import runpy, sys; sys.modules |= dict.fromkeys({modules}); "
        "sys.argv[:] = ['setup.py', '-q', 'build_ext', '--inplace']; runpy.run_path('setup.py', run_name='__main__')"
    )
    env = os.environ | {"HFLFNERV_CUDA": "0", "PATH": str(only_host_tools)}
    return subprocess.run([sys.executable, "-c", code], cwd=checkout, env=env, capture_output=True, text=True)


def test_without_pybind11_and_ninja(checkout, only_host_tools):
    for _ in range(2):
        result = build_without(checkout, only_host_tools, "pybind11", "ninja")
        assert result.returncode == 0, result.stderr
        assert record(checkout)["built"], record(checkout)
    assert not list(checkout.rglob("build.ninja"))
    answer = python(checkout, "from hflfnerv import _ext; print(_ext.load().answer())")
    assert answer.stdout == "3\n", answer.stderr

    (checkout / "csrc" / "core" / "some.cpp").write_text("int portable() { return missing; }\n")
    assert build_without(checkout, only_host_tools, "pybind11", "ninja").returncode == 0
    assert "missing" in record(checkout)["reason"]


def test_without_any_headers_of_pybind11(checkout, only_host_tools):
    assert build_without(checkout, only_host_tools, "pybind11", "torch").returncode == 0
    assert record(checkout) == {"built": False, "reason": "pybind11 not found (pip install pybind11)"}


@pytest.mark.parametrize(
    ("nvcc", "reason"),
    [(None, "nvcc not found"), ("#!/bin/sh\nexit 1\n", "nvcc cannot compile for 75 with c++")],
)
def test_without_a_working_nvcc(checkout, only_host_tools, nvcc, reason):
    (checkout / "csrc" / "bindings.cpp").write_text("int nothing;\n")
    environment = {"PATH": str(only_host_tools), "CUDA_HOME": "/nowhere", "HFLFNERV_CUDA_ARCHITECTURES": "75"}
    if nvcc is not None:
        (only_host_tools / "nvcc").write_text(nvcc)
        (only_host_tools / "nvcc").chmod(0o755)
    result = build(checkout, HFLFNERV_CUDA="", **environment)
    assert result.returncode == 0, result.stderr
    assert record(checkout)["built"]
    assert reason in record(checkout)["no_cuda"]
    result = build(checkout, HFLFNERV_CUDA="1", **environment)
    assert result.returncode != 0
    assert "HFLFNERV_CUDA=1, but " in result.stderr
    assert reason in result.stderr


def test_cuda_is_asked_for_by_0_or_1(checkout):
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("needs a C++ compiler")
    result = build(checkout, HFLFNERV_CUDA="yes")
    assert result.returncode != 0
    assert "HFLFNERV_CUDA must be 0 or 1, got 'yes'" in result.stderr
