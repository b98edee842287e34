"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["atomic_path", "check_writable"]


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces ``path`` when the block ends without an error.

    The temporary keeps the suffix, so that writers which choose a format by it work. On any error it is removed and an
    existing ``path`` is untouched.

    Raises:
        OSError: the folder does not exist or cannot be written.

    Example:
        >>> with atomic_path("/tmp/example.txt") as temporary:
        ...     _ = temporary.write_text("all or nothing")
    """
    target = Path(path)
    temporary = _temporary(target)
    try:
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, str(temporary)):
            raise type(error)(error.errno, error.strerror, str(target)) from None
        raise


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise now the OSError that writing ``path`` would raise after hours of work."""
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a file name is needed, this is a folder", str(target))
    _temporary(target).unlink()


def _temporary(target: Path) -> Path:
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=f".part{target.suffix}", dir=target.parent)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(target)) from None
    os.close(handle)
    return Path(name)
