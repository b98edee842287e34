"""Builds the extension module hflfnerv._C; everything else about the package is in pyproject.toml.

An installation brings pybind11 and ninja. Where a checkout is built without them, PyTorch's copy of pybind11's headers
does as well, and the commands that ninja would run are run from here, all of them every time.

Environment:
    CXX: the C++ compiler; otherwise the first of c++, g++ and clang++.
    HFLFNERV_CUDA: 1 builds the CUDA kernels or fails, 0 leaves them out; otherwise they are built where nvcc is found
        (on the path, in CUDA_HOME or /usr/local/cuda) and works. Whether there is a GPU makes no difference.
    HFLFNERV_CUDA_ARCHITECTURES: what they are built for, comma separated (default: 90a).
    HFLFNERV_REQUIRE_EXT=1: a build that fails is an error. Without it the package installs with its Python
        implementations only, and hflfnerv/_build.json keeps the reason.
"""

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def files(*patterns):
    """Return the files below csrc that match, in order."""
    return sorted(p.relative_to(ROOT).as_posix() for pattern in patterns for p in ROOT.glob(f"csrc/{pattern}"))


SOURCES = ["csrc/bindings.cpp", *files("core/*.cpp", "cuda/*.cu")]
HEADERS = files("core/*.h", "core/*.inl", "cuda/*.h", "flags.mk")
# Flags that the C++ tests are built with as well, by name in lower case. Sources named *_<name>.cpp get those of an
# instruction set, and are left out where the compiler does not take them.
NAMED_FLAGS = re.findall(r"^(\w+) := (.+)$", Path(ROOT, "csrc/flags.mk").read_text(), re.MULTILINE)
X86_FLAGS = {name.lower(): flags for name, flags in NAMED_FLAGS}
FLAGS = ["-O3", *X86_FLAGS.pop("base").split(), "-fPIC", "-fvisibility=hidden", "-DNDEBUG"]
# Kernels for Hopper's matrix instructions, which no other architecture has, older or newer.
CUDA_ARCHITECTURES = os.environ.get("HFLFNERV_CUDA_ARCHITECTURES", "90a").split(",")
# With it the kernels use PyTorch's threads (both share libgomp); without it they run in the calling thread.
OPENMP = ["-fopenmp"]
MACOS_LINK = ["-bundle", "-undefined", "dynamic_lookup"]
RULES = """ninja_required_version = 1.5
rule compile
  command = $with -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = $in
rule link
  command = $with $in -o $out
  description = link"""


class BuildError(Exception):
    """Why the extension cannot be built, in one line."""


def run(command):
    """Run a command and raise BuildError with the end of its output if it fails."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if result.returncode != 0:
        lines = [line for line in result.stdout.splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()] or lines[-1:] or ["no output"]
        sys.stderr.write(result.stdout)
        raise BuildError(f"{Path(command[0]).name} failed: {errors[0].strip()}")


def find_compiler():
    """Return the C++ compiler's command, having compiled a C++17 program with it."""
    named = os.environ.get("CXX")
    candidates = [shlex.split(named)] if named else [["c++"], ["g++"], ["clang++"]]
    for command in candidates:
        if shutil.which(command[0]):
            if not takes(command, FLAGS):
                raise BuildError(f"the C++ compiler {command[0]!r} cannot compile C++17")
            return command
    raise BuildError(f"no C++ compiler found (tried {', '.join(c[0] for c in candidates)})")


def takes(compiler, flags, *, link=False, suffix=".cpp"):
    """Return whether the compiler compiles a small program with these flags, and links it if that is asked for."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, f"try{suffix}")
        source.write_text("#include <optional>\nint main() { return std::optional<int>(0).value(); }\n")
        only = [] if link else ["-c"]
        strict = [] if suffix == ".cu" else ["-Werror"]
        command = [*compiler, *flags, *strict, *only, str(source), "-o", str(source.with_suffix(".o"))]
        return subprocess.run(command, capture_output=True).returncode == 0


def find_nvcc(compiler):
    """Return (nvcc's command with all that compiles and links with it, None), or (None, why there is none)."""
    wanted = os.environ.get("HFLFNERV_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise BuildError(f"HFLFNERV_CUDA must be 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None, "HFLFNERV_CUDA=0"
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    nvcc, reason = shutil.which("nvcc") or shutil.which("nvcc", path=str(home)), "nvcc not found"
    if nvcc is not None:
        gencode = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in CUDA_ARCHITECTURES]
        host = ["-ccbin", compiler[0], *(f"-Xcompiler={flag}" for flag in compiler[1:])]
        command = [nvcc, *gencode, *host, "-std=c++17", "-O3", "-DNDEBUG"]
        if takes(command, [], link=True, suffix=".cu"):
            return command, None
        reason = f"{nvcc} cannot compile for {', '.join(CUDA_ARCHITECTURES)} with {compiler[0]}"
    if wanted == "1":
        raise BuildError(f"HFLFNERV_CUDA=1, but {reason}")
    return None, reason


def find_pybind11():
    """Return the folder of pybind11's headers: the package's, or else those that come with PyTorch."""
    if importlib.util.find_spec("pybind11") is not None:
        import pybind11

        return pybind11.get_include()
    torch = importlib.util.find_spec("torch")
    include = Path(torch.origin).parent / "include" if torch is not None else None
    if include is None or not (include / "pybind11" / "pybind11.h").is_file():
        raise BuildError("pybind11 not found (pip install pybind11)")
    return include


def find_ninja():
    """Return the path of the ninja program, or None."""
    try:
        import ninja
    except ImportError:
        found = shutil.which("ninja")
    else:
        found = shutil.which("ninja", path=ninja.BIN_DIR) or shutil.which("ninja")
    return found


def quoted(words):
    """Return words as a shell command line in the notation of a ninja file."""
    return " ".join(shlex.quote(str(word)).replace("$", "$$") for word in words)


def path(value):
    """Return a path in the notation of a ninja build line."""
    return str(value).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuildExt(build_ext):
    """Compiles the sources and records how that went beside the module."""

    def run(self):
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name)).resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                record = {"built": True, "reason": None} | self.build(extension.sources, target)
            except BuildError as error:
                wanted = os.environ.get("HFLFNERV_CUDA") not in (None, "", "0")
                if wanted or os.environ.get("HFLFNERV_REQUIRE_EXT") == "1":
                    raise SystemExit(f"error: {extension.name} was not built: {error}") from None
                target.unlink(missing_ok=True)
                record = {"built": False, "reason": str(error)}
                print(f"warning: {extension.name} was not built: {error}", file=sys.stderr)
            target.with_name("_build.json").write_text(json.dumps(record, indent=1) + "\n")

    def build(self, sources, target):
        """Compile, link, and return what went into the module."""
        compiler, ninja = find_compiler(), find_ninja()
        x86 = platform.machine() in ("x86_64", "AMD64")
        simd = [name for name, flags in X86_FLAGS.items() if x86 and takes(compiler, flags.split())]
        nvcc, no_cuda = find_nvcc(compiler)
        openmp = OPENMP if takes(compiler, [*FLAGS, *OPENMP], link=True) else []
        python = sysconfig.get_paths()
        includes = [ROOT / "csrc", find_pybind11(), *{python["include"], python["platinclude"]}]
        cxx = [*compiler, *FLAGS, *openmp, *(f"-I{p}" for p in includes)]
        cxx += [f"-DHFLFNERV_HAVE_{name.upper()}=1" for name in simd]
        cxx += [f'-DHFLFNERV_CUDA_ARCHITECTURES="{",".join(CUDA_ARCHITECTURES)}"'] if nvcc else []
        commands = {None: cxx} | {name: [*cxx, *X86_FLAGS[name].split()] for name in simd}
        link = [*compiler, *openmp, *(MACOS_LINK if sys.platform == "darwin" else ["-shared"])]
        if nvcc:  # which adds the CUDA runtime as a static library, so that the module loads where there is no CUDA
            commands["cu"] = [*nvcc, "-Xcompiler=-fPIC,-fvisibility=hidden", f"-I{ROOT / 'csrc'}"]
            link = [*nvcc, *(f"-Xcompiler={flag}" for flag in openmp), "-shared", "-Xlinker=--exclude-libs=ALL"]
        folder = Path(self.build_temp, "hflfnerv._C").resolve()
        folder.mkdir(parents=True, exist_ok=True)
        objects, lines, compilations = [], [RULES], []
        for source in sources:
            kind = next((key for key in ("cu", *X86_FLAGS) if source.endswith((f".{key}", f"_{key}.cpp"))), None)
            if kind in commands:
                objects.append(f"{folder / source.replace('/', '.')}.o")
                compilations.append([*commands[kind], "-c", str(ROOT / source), "-o", objects[-1]])
                lines.append(
                    f"build {path(objects[-1])}: compile {path(ROOT / source)}\n  with = {quoted(commands[kind])}"
                )
        lines.append(f"build {path(target)}: link {' '.join(map(path, objects))}\n  with = {quoted(link)}\n")
        if ninja is None:
            with ThreadPoolExecutor(self.parallel or os.cpu_count()) as pool:
                list(pool.map(run, compilations))
            run([*link, *objects, "-o", str(target)])
        else:
            Path(folder, "build.ninja").write_text("\n".join(lines))
            run([ninja, "-C", str(folder), *([f"-j{self.parallel}"] if self.parallel else [])])
        return {"compiler": compiler, "simd": simd, "openmp": bool(openmp), "no_cuda": no_cuda}


setup(
    ext_modules=[Extension("hflfnerv._C", SOURCES, depends=HEADERS)],
    cmdclass={"build_ext": NinjaBuildExt},
)
