"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import threading

import pytest

from hflfnerv._atomic import atomic_path, check_writable


def test_replaces_at_the_end(tmp_path):
    target = tmp_path / "out.txt"
    target.write_text("old")
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
        assert temporary.suffix == ".txt"
        assert temporary.parent == tmp_path
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_an_error_leaves_everything_as_it_was(tmp_path, error):
    target = tmp_path / "out.txt"
    target.write_text("old")

    def write():
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    with atomic_path(tmp_path / "atomic"):
        pass
    modes = {stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in ("plain", "atomic")}
    assert len(modes) == 1


def test_errors_name_the_target(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        check_writable("no/out.txt")
    assert caught.value.filename == "no/out.txt"  # as it was given
    with pytest.raises(FileNotFoundError) as caught, atomic_path(tmp_path / "no" / "out.txt"):
        pass
    assert caught.value.filename == str(tmp_path / "no" / "out.txt")

    def fill():
        with atomic_path(tmp_path / "out.txt"):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space") as caught:
        fill()
    assert caught.value.filename == str(tmp_path / "out.txt")


def test_check_writable(tmp_path):
    check_writable(tmp_path / "out.txt")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(IsADirectoryError):
        check_writable(tmp_path)
    with pytest.raises(FileNotFoundError):
        check_writable(tmp_path / "no" / "out.txt")


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "out.txt", tmp_path / "link.txt"
    target.write_text("old")
    link.symlink_to(target)
    check_writable(link)
    with atomic_path(link) as temporary:
        temporary.write_text("new")
        assert temporary.parent == target.parent
    assert link.is_symlink()
    assert target.read_text() == "new"
    target.unlink()
    with atomic_path(link) as temporary:
        temporary.write_text("again")
    assert target.read_text() == link.read_text() == "again"
    assert os.listdir(target.parent) == ["out.txt"]


def test_a_pipe_or_device_is_written_and_stays_what_it_is(tmp_path):
    pipe = tmp_path / "pipe.txt"
    os.mkfifo(pipe)
    check_writable(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    with atomic_path(pipe) as temporary:
        temporary.write_text("all")
        assert temporary.suffix == ".txt"
    reader.join()
    assert read == ["all"]
    assert pipe.is_fifo()
    check_writable(os.devnull)
    with atomic_path(os.devnull) as temporary:
        temporary.write_text("all")
    assert not os.path.isfile(os.devnull)
    assert os.listdir(tmp_path) == ["pipe.txt"]


def test_standard_output_is_one(tmp_path):
    code = "from hflfnerv._atomic import atomic_path\nwith atomic_path('/dev/stdout') as t: t.write_text('all')"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout == b"all"


def test_other_kinds_of_file_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's name must be short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        for check in (check_writable, lambda path: atomic_path(path).__enter__()):
            with pytest.raises(OSError, match="a regular file is needed"):
                check("socket")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OSError, match="symbolic links"):
        check_writable(tmp_path / "loop")
