"""Files: those that colm-edge writes are written whole, or what was there before stays; devices and
pipes are written, never replaced. Those of a model may be several."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import BinaryIO

from colm_edge.errors import WriteError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

AnyPath = str | os.PathLike[str]
FINGERPRINT_PLACES = 1024  # in a file, evenly spread
FINGERPRINT_BYTES = 4096  # read at each place
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
# Names of open files. Opening one again would write over what others write to it.
_DESCRIPTOR = re.compile(r"/(?:dev|proc/self)/fd/(\d+)")
_STANDARD = {"/dev/stdout": "/dev/fd/1", "/dev/stderr": "/dev/fd/2"}


def parts_of(name: str) -> list[str]:
    """Return the names of all files of a model, given that of any one. llama.cpp splits large
    models and numbers the parts."""
    part = _PART.search(name)
    if part is None or not 1 <= int(part[1]) <= int(part[2]):
        return [name]
    count = int(part[2])
    return [f"{name[: part.start()]}-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1)]


def fingerprint(*paths: Path) -> str:
    """Return a hash of the files' sizes and of samples of their bytes, without reading it all."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(str(size).encode())
        with path.open("rb") as file:
            for i in range(FINGERPRINT_PLACES):
                file.seek(size * i // FINGERPRINT_PLACES)
                digest.update(file.read(FINGERPRINT_BYTES))
    return digest.hexdigest()


def cache_folder() -> Path:
    """Return the folder of what can be made again: what decodes cost, models quantised here. It may
    not exist yet."""
    home = os.environ.get("XDG_CACHE_HOME")
    return Path(home) / "colm-edge" if home else Path.home() / ".cache" / "colm-edge"


def sha256_of(path: AnyPath) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: AnyPath, *, private: bool = False) -> Iterator[Path]:
    """Give a temporary path beside a file; put it in the file's place if all goes well.

    The temporary path has the file's suffix, and is removed on failure. The file gets the
    permissions that writing to it in place would have left it. private: a new file is its owner's
    alone. A device, a pipe, or a name of an open file such as /dev/stdout is written at the end,
    and stays what it is.

    Raises WriteError when it cannot be written, and for a folder.
    """
    try:
        if is_stream(path):
            with tempfile.TemporaryDirectory() as folder:
                temporary = Path(folder, f"result{Path(path).suffix}")
                temporary.touch(0o600)
                yield temporary
                with temporary.open("rb") as file, _opened_stream(path) as stream:
                    shutil.copyfileobj(file, stream)
            return
        target = _target(path)
        mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else None
        _remove_abandoned(target)
        with _made_beside(target, 0o600 if private or mode is not None else 0o666) as temporary:
            try:
                yield temporary
                if mode is not None:
                    temporary.chmod(mode)
                os.replace(temporary, target)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    except OSError as e:
        raise WriteError(f"{path}: cannot write: {e.strerror or e}") from e


@contextmanager
def _made_beside(target: Path, mode: int) -> Iterator[Path]:
    """Make an empty file beside another, locked as long as this process writes it.

    Not by the tempfile module, whose files are private whatever the umask.
    """
    while True:
        temporary = target.with_name(f".{target.stem}.{token_hex(4)}{target.suffix}")
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
        try:
            if fcntl is not None:
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
            else:
                os.close(descriptor)  # an open file is not replaced there
                descriptor = -1
            if temporary.exists():  # nobody has taken it for abandoned before it was locked
                yield temporary
                return
        finally:
            if descriptor >= 0:
                os.close(descriptor)


def _remove_abandoned(target: Path) -> None:
    """Remove what killed processes have left beside a file."""
    ours = re.compile(rf"\.{re.escape(target.stem)}\.[0-9a-f]{{8}}{re.escape(target.suffix)}")
    for path in target.parent.glob(".*") if fcntl is not None else ():
        if ours.fullmatch(path.name):
            with suppress(OSError), path.open("rb") as file:  # locked: somebody writes it
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


@contextmanager
def locked(folder: AnyPath) -> Iterator[None]:
    """Keep other runs out of a folder, which is made if it is not there, for its owner alone.

    Raises WriteError where another run is using it, or where it cannot be written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(Path(folder) / ".lock", timeout=0)
    try:
        Path(folder).mkdir(0o700, parents=True, exist_ok=True)  # it will hold prompts
        lock.acquire()
    except Timeout as e:
        raise WriteError(
            f"{folder} is used by another run; wait for its end, or name another folder"
        ) from e
    except OSError as e:
        raise WriteError(f"{folder}: cannot write: {e.strerror or e}") from e
    try:
        yield
    finally:
        lock.release()


def check_writable(path: AnyPath, *inputs: AnyPath | None) -> None:
    """Raise WriteError now, rather than after an hour's work, when a file cannot be written.

    inputs: files that are read, or are results too, which this one must not replace.
    """
    try:
        if is_stream(path):
            if _descriptor(path) is None and not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return
        target = _target(path)
        read = [Path(os.path.realpath(file)) for file in inputs if file is not None]
        same = target.exists() and any(file.exists() and target.samefile(file) for file in read)
        if target in read or same:  # what is not there yet may be another result
            raise WriteError(
                f"{path} is used by this command already; give the result another name"
            )
        if not target.parent.is_dir():
            raise WriteError(f"{target.parent}: no such folder; make it first")
        tempfile.TemporaryFile(dir=target.parent).close()
    except OSError as e:
        raise WriteError(f"{path}: cannot write: {e.strerror or e}") from e


def _target(path: AnyPath) -> Path:
    """Return where a file is or will be, past symbolic links, as writing in place would."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise WriteError(f"{path} is a folder; give a file's name")
    if target.exists() and not target.is_file():
        raise WriteError(f"{path} is neither a plain file nor a pipe; give another name")
    return target


def is_stream(path: AnyPath) -> bool:
    """Return whether something is written as it is, because a rename would take its place: a
    device, a pipe, or a name of an open file, whatever that is."""
    if _descriptor(path) is not None:
        return True
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)


def _descriptor(path: AnyPath) -> int | None:
    name = os.fsdecode(path)
    found = _DESCRIPTOR.fullmatch(_STANDARD.get(name, name))
    return None if found is None else int(found[1])


def _opened_stream(path: AnyPath) -> BinaryIO:
    descriptor = _descriptor(path)
    if descriptor is not None:
        return os.fdopen(os.dup(descriptor), "wb")
    return os.fdopen(os.open(path, os.O_WRONLY), "wb")
