"""What a measured figure depends on besides the code: the processor, and the commit of the code itself."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

__all__ = ["commit_of", "git", "processor", "vector_extensions"]


def processor() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    if "model name" not in named:
        return platform.processor()
    return f"{named['model name']} (family {named.get('cpu family')}, model {named.get('model')})"


def vector_extensions() -> str | None:
    """Return the widest of AVX2, AVX-512 and AMX that the processor has, or None."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return None
    names = (("amx_bf16", "AMX"), ("avx512f", "AVX-512"), ("avx2", "AVX2"))
    return next((name for flag, name in names if flag in flags), None)


def git(checkout: Path, *arguments: str) -> str | None:
    """Return the output of a git command in a checkout, or None where there is no git or no commit."""
    # A copy of the checkout may belong to someone else, which git must be told to accept.
    command = ["git", "-c", f"safe.directory={checkout}", *arguments]
    try:
        result = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def commit_of(checkout: Path) -> str | None:
    """Return the commit of a checkout; of a copy, whoever made it knows it and says so in HFLFNERV_COMMIT."""
    told = os.environ.get("HFLFNERV_COMMIT")
    if told:
        return told
    # Else git would answer for whatever repository an installed package happens to lie in.
    return git(checkout, "rev-parse", "HEAD") if (checkout / ".git").exists() else None
