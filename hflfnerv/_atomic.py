"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["atomic_path", "check_writable", "resolve_target"]


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces ``path`` when the block ends without an error.

    The temporary keeps the suffix, so that writers which choose a format by it work. On any error it is removed and an
    existing ``path`` is untouched. A link stays one: the file that it points to is replaced. Nothing can take the place
    of a pipe or a character device such as ``/dev/stdout``: what was written is copied into it at the end.

    Raises:
        OSError: the folder does not exist or cannot be written, or ``path`` is a folder or another kind of file.

    Example:
        >>> with atomic_path("/tmp/example.txt") as temporary:
        ...     _ = temporary.write_text("all or nothing")
    """
    target = resolve_target(path)
    if target is None:
        with _buffer_of(Path(path)) as temporary:
            yield temporary
        return
    temporary = _temporary(target, path)
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
            raise type(error)(error.errno, error.strerror, os.fspath(path)) from None
        raise


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise now the OSError that writing ``path`` would raise after hours of work."""
    target = resolve_target(path)
    if target is not None:
        _temporary(target, path).unlink()
    elif not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))


def resolve_target(path: str | os.PathLike[str]) -> Path | None:
    """Return the regular file, there or not, that is replaced where ``path`` is written.

    Returns:
        What ``path`` and its links lead to; None for a pipe or a character device, which can be written but not
        replaced.

    Raises:
        OSError: it is a folder, a block device or a socket, or a link that leads nowhere.
    """
    try:
        # Not of the real path: that of an open pipe, to which /dev/stdout leads, is no name that can be looked up.
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return Path(os.path.realpath(path))
    if stat.S_ISREG(mode):
        return Path(os.path.realpath(path))
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "a file name is needed, this is a folder", os.fspath(path))
    raise OSError(errno.EINVAL, "a regular file is needed, this is another kind", os.fspath(path))


@contextmanager
def _buffer_of(path: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        buffer = Path(folder, "buffer").with_suffix(path.suffix)
        buffer.touch()
        yield buffer
        with buffer.open("rb") as source, path.open("wb") as sink:
            shutil.copyfileobj(source, sink)


def _temporary(target: Path, path: str | os.PathLike[str]) -> Path:
    """Make a file beside ``target``; errors name the ``path`` that was asked for."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=f".part{target.suffix}", dir=target.parent)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, os.fspath(path)) from None
    os.close(handle)
    return Path(name)
