"""Writing files: completely or not at all, with the usual permissions, and never over a device."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from colm_edge.errors import ColmError, SwitchError, WriteError
from colm_edge.files import check_writable, fingerprint, replacing


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@contextmanager
def umask(mask: int):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def test_a_file_appears_only_when_it_is_complete(tmp_path):
    target = tmp_path / "t.png"
    for text in ("first", "second"):
        with replacing(target) as temporary:
            assert temporary.parent == tmp_path
            assert temporary.suffix == ".png"
            temporary.write_text(text)
            assert not target.exists() or target.read_text() == "first"
        assert target.read_text() == text
        assert names(tmp_path) == ["t.png"]


@pytest.mark.parametrize("before", [None, "old"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SwitchError])
def test_a_failed_write_changes_nothing(tmp_path, before, error):
    target = tmp_path / "t.txt"
    if before is not None:
        target.write_text(before)
    here = names(tmp_path)

    def write():
        with replacing(target) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert names(tmp_path) == here
    assert before is None or target.read_text() == before


def test_a_system_error_becomes_one_line_that_names_the_file(tmp_path, monkeypatch):
    target = tmp_path / "t.txt"
    target.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    with pytest.raises(WriteError) as caught, replacing(target):
        full()
    assert str(caught.value) == f"{target}: cannot write: No space left on device"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with (
            pytest.raises(WriteError, match=r"t\.txt: cannot write: No space left"),
            replacing(target),
        ):
            pass
    with pytest.raises(WriteError, match="No such file"), replacing(tmp_path / "absent" / "t.txt"):
        pass
    assert names(tmp_path) == ["t.txt"]
    assert target.read_text() == "old"
    assert issubclass(WriteError, ColmError)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_a_file_written_in_place(tmp_path, mask):
    plain, ours = tmp_path / "plain", tmp_path / "ours"
    with umask(mask):
        plain.write_text("x")
        with replacing(ours) as temporary:
            temporary.write_text("x")
        assert mode_of(ours) == mode_of(plain) == 0o666 & ~mask
        # An existing file keeps its mode, and the temporary file is never readable to more users.
        for mode in (0o600, 0o664, 0o444):
            ours.chmod(mode)
            with replacing(ours) as temporary:
                assert mode_of(temporary) & ~(mode | 0o600) == 0
                temporary.write_text("y")
            assert mode_of(ours) == mode


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "t.txt", tmp_path / "link.txt"
    link.symlink_to(target)
    for text in ("made", "replaced"):
        with replacing(link) as temporary:
            assert temporary.parent == target.parent
            temporary.write_text(text)
        assert link.is_symlink()
        assert target.read_text() == text
        assert names(target.parent) == ["t.txt"]


def test_what_can_be_neither_replaced_nor_written_is_refused(tmp_path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    for path, words in ((tmp_path / "socket", "neither a plain file nor"), (tmp_path, "a folder")):
        with pytest.raises(WriteError, match=words), replacing(path):
            pytest.fail("it was opened")
        with pytest.raises(WriteError, match=words):
            check_writable(path)


def test_a_pipe_is_written_and_stays_one(tmp_path):
    pipe, link, read = tmp_path / "pipe.npz", tmp_path / "link", list[bytes]()
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link):
        check_writable(path)
        reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
        reader.start()
        with replacing(path) as temporary:
            assert temporary.suffix == path.suffix
            temporary.write_bytes(b"all of it")
        reader.join()
        assert stat.S_ISFIFO(path.stat().st_mode)
    assert read == [b"all of it"] * 2
    assert names(tmp_path) == ["link", "pipe.npz"]


def test_a_failed_write_leaves_a_pipe_empty(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)

    def write():
        with replacing(pipe) as temporary:
            temporary.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        write()
    assert os.read(reader, 10) == b""
    os.close(reader)


def device(path: Path, minor: int) -> Path:
    """A copy of one of the memory devices: 3 is null, 7 is full."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, minor))
        path.open("wb").close()
    except (OSError, AttributeError):
        pytest.skip("devices can be neither made nor opened here")
    return path


def test_a_device_is_written_and_stays_one(tmp_path):
    null, full = device(tmp_path / "null.gguf", 3), device(tmp_path / "full.gguf", 7)
    for path in (null, full):
        check_writable(path)
    with replacing(null) as temporary:
        temporary.write_text("gone")
    with pytest.raises(WriteError, match="No space left"), replacing(full) as temporary:
        temporary.write_text("too much")
    for path in (null, full):
        assert stat.S_ISCHR(path.stat().st_mode)
    assert names(tmp_path) == ["full.gguf", "null.gguf"]


@pytest.mark.skipif(not os.path.exists("/dev/fd"), reason="names of open files")
@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1"])
def test_an_open_file_is_written_where_it_is(tmp_path, name):
    """The shell's `>` has opened it: what is printed comes behind, and nothing takes its place."""
    script = (
        "import sys; from colm_edge.files import check_writable, replacing\n"
        f"check_writable({name!r})\n"
        f"with replacing({name!r}) as file: file.write_text('written ')\n"
        "print('printed', end='')"
    )
    target = tmp_path / "t"
    with target.open("wb") as file:
        file.write(b"before ")
        file.flush()
        subprocess.run([sys.executable, "-c", script], stdout=file, check=True)
    assert target.read_bytes() == b"before written printed"
    piped = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert piped.stdout == b"written printed"


def test_two_writers_do_not_disturb_each_other(tmp_path):
    """Each has a temporary file of its own; the one that finishes last wins."""
    target, both = tmp_path / "t.txt", threading.Barrier(2)

    def write(text):
        with replacing(target) as temporary:
            temporary.write_text(text)
            both.wait(10)
            assert temporary.read_text() == text

    threads = [threading.Thread(target=write, args=(text,)) for text in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_text() in ("one", "two")
    assert names(tmp_path) == ["t.txt"]


KILLED = """
import os, signal, sys
from colm_edge.files import replacing
with replacing(sys.argv[1]) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(os.name != "posix", reason="kill -9, and locks that end with a process")
def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path):
    target, other = tmp_path / "t.txt", tmp_path / ".t.notours.txt"
    target.write_text("before")
    other.write_text("not ours")
    for _ in range(2):
        subprocess.run([sys.executable, "-c", KILLED, target], check=False)
    assert target.read_text() == "before"
    assert len(names(tmp_path)) == 3  # the second has removed what the first left
    with replacing(target) as first, replacing(target) as second:
        first.write_text("one")  # nobody takes what is being written for abandoned
        second.write_text("two")
    assert target.read_text() == "one"
    assert names(tmp_path) == [".t.notours.txt", "t.txt"]


def test_an_input_file_is_not_replaced(tmp_path):
    data, link = tmp_path / "d.jsonl", tmp_path / "link"
    data.write_text("x")
    link.symlink_to(data)
    for target in (data, link):
        with pytest.raises(WriteError, match="is used by this command already"):
            check_writable(target, None, tmp_path / "absent", data)
    check_writable(data)
    with pytest.raises(WriteError, match="is used by this command already"):  # two new results
        check_writable(tmp_path / "new", tmp_path / "." / "new")
    with pytest.raises(WriteError, match="is used by this command already"):  # another result
        check_writable(tmp_path / "new", tmp_path / "folder" / ".." / "new")


def test_a_fingerprint_depends_on_bytes_from_all_over_the_file(tmp_path):
    """A merged fine-tune may differ in one tensor in the middle, and in nothing else."""
    data = bytearray(3_000_000)
    seen = set()
    for at in (None, 0, 1_499_000, 1_502_000, len(data) - 1):
        changed = data.copy()
        if at is not None:
            changed[at] = 1
        path = tmp_path / "model.gguf"
        path.write_bytes(changed)
        seen.add(fingerprint(path))
    path.write_bytes(data[:-1])
    assert len(seen | {fingerprint(path)}) == 6
