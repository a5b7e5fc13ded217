"""Where scores are kept as they come: in memory, or in a work folder."""

from __future__ import annotations

import errno
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from colm_edge.errors import DataError
from colm_edge.train.documents import Documents

if TYPE_CHECKING:
    pass


Columns = dict[str, npt.NDArray[Any]]
Kinds = dict[str, tuple[tuple[int, ...], type]]  # a column's shape but for its rows, and its type
SAVE_SECONDS = 5.0  # between two notes of how far a pass has come
COPY_ROWS = 1 << 14
# A document's state in a ledger: to be scored, scored, or taken over from the folder's last data.
TO_DO, DONE, KEPT = 0, 1, 2
ENTRY = np.dtype([("key", np.uint64), ("rows", np.int64)])


class Memory:
    """One model's columns in memory."""

    def __init__(self, kinds: Kinds, documents: Documents) -> None:
        n = documents.n_scored
        self.kinds, self._documents = kinds, documents
        self.columns: Columns = {name: np.empty((n, *w), t) for name, (w, t) in kinds.items()}
        self.state = np.zeros(len(documents), np.uint8)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, group: npt.NDArray[np.int64], values: Columns) -> None:
        """Put down what was found for the documents of a group, in their order."""
        # A group's documents follow each other: nothing was kept from before.
        rows = slice(self._documents.rows[group[0]], self._documents.rows[group[-1] + 1])
        for name, column in values.items():
            self.columns[name][rows] = column
        self.state[group] = DONE


class Ledger:
    """One model's columns in a folder, and which documents of them are done.

    Columns are written, not mapped, while the pass runs: memory stays as it is whatever their
    size, and a full disk is an error of `write` and no crash.
    """

    def __init__(self, folder: Path, kinds: Kinds, documents: Documents, update: bool) -> None:
        self.kinds, self._folder, self._documents = kinds, folder, documents
        self._files: dict[str, FileIO] = {}
        self._begin: dict[str, int] = {}  # of the rows, after the header
        self._pending: list[npt.NDArray[np.int64]] = []
        self._saved_at = time.monotonic()
        with _disk(folder.parent):
            new = folder.with_name(folder.name + ".new")
            if new.exists() and not folder.exists():  # stopped between two renames
                os.replace(new, folder)
            known = self._known()
            if known is None:
                self._make(folder)
            elif np.array_equal(known["key"], documents.keys):
                self.state: npt.NDArray[np.uint8] = _kept(folder / "state.npy")
                _ = self.columns  # whole, or said to be broken now
            elif update:
                self._make_from(known, new)
            else:
                raise DataError(
                    f"{folder}: holds scores of other data; name another work folder, remove this "
                    "one, or have it updated (--update)"
                )

    def __enter__(self) -> Self:
        with _disk(self._folder.parent):
            self._open(self._folder)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._save()
        finally:
            self._close()

    @property
    def columns(self) -> Columns:
        """The columns, mapped."""
        return {name: _kept(self._folder / f"{name}.npy", mmap=True) for name in self.kinds}

    def write(self, group: npt.NDArray[np.int64], values: Columns) -> None:
        """Put down what was found for the documents of a group, in their order."""
        counts, rows = self._documents.counts[group], self._documents.rows[group]
        with _disk(self._folder.parent):
            for first, last in _runs(rows, counts):
                at = int(counts[:first].sum())
                n = int(counts[first:last].sum())
                for name, column in values.items():
                    self._put(name, int(rows[first]), column[at : at + n])
        self._pending.append(group)
        if time.monotonic() - self._saved_at >= SAVE_SECONDS:
            self._save()

    def _save(self) -> None:
        """Have the columns on the disk, and then note which documents of them are done."""
        with _disk(self._folder.parent):
            self._sync()
            for group in self._pending:
                self.state[group] = DONE
                # In its old place, which a disk without space left still has.
                self._put("state", int(group[0]), self.state[group[0] : group[-1] + 1])
            self._pending.clear()
        self._saved_at = time.monotonic()

    def _open(self, folder: Path) -> None:
        for name in (*self.kinds, "state"):
            file = self._files[name] = FileIO(folder / f"{name}.npy", "r+")
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            self._begin[name] = file.tell()

    def _close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _sync(self) -> None:
        for file in self._files.values():
            os.fsync(file.fileno())

    def _put(self, name: str, row: int, values: npt.NDArray[Any]) -> None:
        width = values.itemsize * math.prod(values.shape[1:])
        file = self._files[name]
        file.seek(self._begin[name] + row * width)
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
        while data:  # a disk that fills up takes a part
            data = data[file.write(data) :]

    def _known(self) -> npt.NDArray[Any] | None:
        path = self._folder / "documents.npy"
        if not path.exists():
            return None
        try:
            known = _kept(path)
            if known.dtype != ENTRY:
                raise ValueError(f"expected {ENTRY}, got {known.dtype}")
        except ValueError as e:
            raise DataError(f"{path}: is broken ({e}); remove the work folder") from e
        return known

    def _make(self, folder: Path) -> None:
        """Make a folder of columns without a row, none of their documents done."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        n = self._documents.n_scored
        for name, (width, kind) in self.kinds.items():
            with (folder / f"{name}.npy").open("wb") as file:
                _write_header(file, (n, *width), kind)
                file.truncate(file.tell() + n * math.prod(width) * np.dtype(kind).itemsize)
        self.state = np.full(len(self._documents), TO_DO, np.uint8)
        np.save(folder / "state.npy", self.state)
        entries = np.empty(len(self._documents), ENTRY)
        entries["key"], entries["rows"] = self._documents.keys, self._documents.counts
        np.save(folder / "documents.npy", entries)  # the last: now the folder counts

    def _make_from(self, known: npt.NDArray[Any], new: Path) -> None:
        """Make the folder anew for these documents, with what it knows of them.

        Until all is copied the old columns stay: the disk holds both for a while.
        """
        scored = _kept(self._folder / "state.npy") != TO_DO
        begins = np.cumsum(known["rows"]) - known["rows"]
        place = dict(zip(known["key"][scored].tolist(), begins[scored].tolist(), strict=True))
        found = np.array([place.get(key, -1) for key in self._documents.keys.tolist()], np.int64)
        kept = np.flatnonzero(found >= 0)
        source, target = found[kept], self._documents.rows[kept]
        counts = self._documents.counts[kept]
        columns = self.columns
        self._make(new)
        self._open(new)
        try:
            # Where the rows stood together and will again, many documents are one copy.
            together = [slice(*run) for run in _runs(source, counts, target)]
            for run in together:
                n = int(counts[run].sum())
                for at in range(0, n, COPY_ROWS):
                    begin, end = source[run][0] + at, source[run][0] + min(at + COPY_ROWS, n)
                    for name, column in columns.items():
                        self._put(name, int(target[run][0]) + at, column[begin:end])
            self.state[kept] = KEPT
            self._put("state", 0, self.state)
            self._sync()
        finally:
            self._close()
        old = self._folder.with_name(self._folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(self._folder, old)
        os.replace(new, self._folder)
        shutil.rmtree(old)


def _kept(path: Path, *, mmap: bool = False) -> npt.NDArray[Any]:
    """Read an array of a work folder. Raises DataError when it is not whole."""
    try:
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r" if mmap else None)
    except (FileNotFoundError, ValueError, EOFError) as e:
        raise DataError(f"{path}: is missing or broken ({e}); remove the work folder") from e
    return array


def _runs(*starts_and_counts: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield (first, last + 1) of the stretches of documents whose rows follow each other.

    Arguments: where each document's rows begin, how many they are, and, if it matters, where they
    begin elsewhere.
    """
    starts, counts, *others = starts_and_counts
    if not len(starts):
        return
    breaks = np.zeros(len(starts) - 1, np.bool_)
    for begin in (starts, *others):
        breaks |= begin[1:] != begin[:-1] + counts[:-1]
    ends = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(starts)]
    yield from pairwise(ends)


def _write_header(file: BinaryIO, shape: tuple[int, ...], kind: type) -> None:
    described = np.lib.format.dtype_to_descr(np.dtype(kind))
    header = {"descr": described, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


@contextmanager
def _disk(work: Path) -> Iterator[None]:
    """Turn what a disk says into one line."""
    try:
        yield
    except OSError as e:
        reason = e.strerror or str(e)
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DataError(
                f"{work}: {reason.lower()}; the scores so far are kept: make space and run the "
                "same command again"
            ) from e
        raise DataError(f"{work}: cannot keep the scores there: {reason}") from e
